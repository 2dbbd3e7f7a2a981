"""Two gloo processes: against one, at the same global batch, and told to end."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ecar.training import Trainer
from ecar.training.state import read_header, state_path

ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys
import torch.distributed
from ecar.training import TrainConfig, Trainer
for path in sys.argv[1:]:
    Trainer(TrainConfig.from_json(path), progress=False).run()
torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(make_config, tiny, read_log, tmp_path):
    """GradNorm, clipping and accumulation on; then fixed weights, and uncertainty's for a model
    without AR layers, in the same processes."""
    configs = {}
    for name, fields in (
        ("gradnorm", {"gradient_accumulation": 2}),
        ("fixed", {"stage_weights": (2.0, 1.0)}),
        ("without_ar", {"stage_weights": "uncertainty", "model": replace(tiny, ar_layers=0)}),
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
    for name in ("gradnorm", "fixed", "without_ar"):
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
    for name in ("gradnorm", "fixed", "without_ar"):
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


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    # Without --multi_gpu it starts one process, on CPUs too.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_to_one_process_saves_and_ends_both(make_config, tmp_path, launcher):
    config = make_config(steps=10**6, save_every=10**6, log_every=10, validate_every=0)
    config.to_json(tmp_path / "train.json")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", *LAUNCHERS[launcher]),
            *("-m", "ecar", "train", "--config", str(tmp_path / "train.json")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        log = Path(config.output_dir) / "log.csv"
        deadline = time.monotonic() + 120
        while not log.exists() or len(log.read_text().splitlines()) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(worker(process.pid), signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    step = read_header(state_path(config.output_dir))[1]["step"]
    assert step >= 20 and step % 10 == 0
    assert f"ecar: stopped by SIGTERM and saved at step {step} of 1000000" in output
    assert output.count("go on with: ecar train --resume") == 1
    assert "run: 2 x cpu" in output
    resumed = Trainer.resume(config.output_dir, steps=step + 1, progress=False)
    assert resumed.step == step and resumed.run().step == step + 1


def worker(launcher: int) -> int:
    """A process that trains, of those below the launcher: the one that was started last."""
    found = []
    parents = [launcher]
    while parents:
        parent = parents.pop()
        for task in Path(f"/proc/{parent}/task").iterdir():
            children = [int(child) for child in (task / "children").read_text().split()]
            parents += children
            found += children
    trains = [pid for pid in found if b"ecar" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return max(trains)
