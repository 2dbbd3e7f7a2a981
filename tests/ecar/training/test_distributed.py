"""Two gloo processes against one, at the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ecar.training import Trainer

ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys
import torch.distributed
from ecar.training import TrainConfig, Trainer
for path in sys.argv[1:]:
    Trainer(TrainConfig.from_json(path), progress=False).run()
torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(make_config, read_log, tmp_path):
    """GradNorm, clipping and accumulation on; then fixed weights, in the same processes."""
    configs = {}
    for name, fields in (
        ("gradnorm", {"gradient_accumulation": 2}),
        ("fixed", {"stage_weights": (2.0, 1.0)}),
    ):
        for count in ("one", "two"):
            configs[name, count] = make_config(
                steps=8,
                batch_size=16,
                grad_clip=0.5,
                output_dir=str(tmp_path / name / count),
                **fields,
            )
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = []
    for name in ("gradnorm", "fixed"):
        paths.append(str(tmp_path / f"{name}.json"))
        configs[name, "two"].to_json(paths[-1])
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(tmp_path / "script.py"),
            *paths,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    for name in ("gradnorm", "fixed"):
        Trainer(configs[name, "one"], progress=False).run()
        one, two = (read_log(configs[name, count].output_dir) for count in ("one", "two"))
        assert len(one["step"]) == len(two["step"]) == 8
        for column in ("loss_1", "loss_2", "weight_1", "weight_2", "grad_norm"):
            assert two[column] == pytest.approx(one[column], rel=1e-5, abs=1e-5), (name, column)
        assert any(norm > 0.5 for norm in one["grad_norm"])  # clipping took part
        left, right = (
            load_file(Path(configs[name, count].output_dir) / "model.safetensors")
            for count in ("one", "two")
        )
        # Adam magnifies rounding where a gradient is near 0, by at most a share of its step.
        for key in left:
            assert (left[key] - right[key]).abs().max() < 8 * 1e-3 * 0.05, key
