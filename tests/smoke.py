"""What an installed ecar must do: python -I tests/smoke.py [REASON].

Needs the installed package alone. Every op is held against the reference; the C++ ones must be
there, or, where REASON is given, be reported missing for it. Then every module of the packages is
imported, every command says what it takes, and the command line draws and exports from a
checkpoint, in a folder of its own. A command of an extra that is absent names it in one line.
"""

import importlib
import importlib.util
import itertools
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import ecar
import ecar_kernels as ek
from ecar.cli import COMMANDS
from ecar_kernels import _native, registry
from ecar_kernels.testing import SampleSizes, arguments

SIZES = SampleSizes(channels=100, hidden=75)
OPTIONAL = (
    "accelerate", "diffusers", "flash_attn", "gradio", "matplotlib", "onnx", "scipy", "sklearn",
    "torch_fidelity", "torchmetrics", "webdataset", "xformers",
)  # fmt: skip
COMPILED = tuple(op for op, record in registry.RECORDS.items() if "cpp" in record.backends)


def results(op: str, backend: str, call: dict) -> list[torch.Tensor]:
    with ek.use_backend(backend), torch.no_grad():
        out = getattr(ek, op)(**call)
    return [x.double() for x in (out if isinstance(out, tuple) else (out,))]


def compare(op: str, backend: str, dtype: torch.dtype, optional: bool) -> None:
    """The root mean square error is at most twice the reference's, plus an ulp."""
    call = arguments(op, dtype=dtype, optional=optional, sizes=SIZES)
    exact_call = {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in call.items()
    }
    if "dtype" in call:
        exact_call["dtype"] = torch.float64
    exact = results(op, "reference", exact_call)
    for ours, usual, oracle in zip(
        results(op, backend, call), results(op, "reference", call), exact, strict=True
    ):
        errors = [(x - oracle).square().mean().sqrt().item() for x in (ours, usual)]
        allowed = 2 * errors[1] + torch.finfo(dtype).eps * oracle.abs().max().item()
        assert errors[0] <= allowed, f"{op}, {backend}, {dtype}: {errors[0]}, allowed {allowed}"


def every_op(compiled: bool, ops: Sequence[str] = registry.OPS) -> None:
    for op in ops:
        for dtype, optional in itertools.product(registry.KERNEL_DTYPES, (True, False)):
            compare(op, "auto", dtype, optional)
            if compiled and op in COMPILED:
                compare(op, "cpp", dtype, optional)


def every_module(reason: str | None) -> None:
    """Of both packages, but those that need what is not installed, or is not built for a reason."""
    absent = {name for name in OPTIONAL if importlib.util.find_spec(name) is None}
    for package in (ecar, ek):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.split(".")[-1] in ("__main__", "libecar_cpu", "libecar_cuda"):
                continue
            try:
                importlib.import_module(module.name)
            except ImportError as error:
                if reason is not None and reason in str(error):
                    continue
                assert (error.name or "").split(".")[0] in absent or any(
                    name.replace("_", "-") in str(error) for name in absent
                ), f"{module.name}: {error}"


def every_command(folder: Path) -> None:
    command = str(Path(sys.executable).with_name("ecar"))
    for name in COMMANDS:
        assert f"usage: ecar {name} " in printed(command, name, "--help")
    config = ecar.ECARConfig(
        stage_sides=(2, 4), channels=1, patch_size=1, width=16, heads=2, ar_layers=1,
        flow_blocks=1, num_classes=3,
    )  # fmt: skip
    model = str(folder / "model")
    ecar.ECAR(config).save_pretrained(model)
    for line in (
        [
            "sample",
            "--checkpoint",
            model,
            "--sheet",
            "3x1",
            "--output",
            str(folder / "a" / "b.png"),
        ],
        [
            "export",
            "--checkpoint",
            model,
            "--format",
            "torch",
            "--output",
            str(folder / "programs"),
        ],
        ["info", "--checkpoint", model],
    ):
        printed(command, *line)
    assert (folder / "a" / "b.png").stat().st_size > 0
    assert any((folder / "programs").glob("*.pt2"))
    (folder / "images").mkdir()
    for name, line in (
        ("diffusers", ["cache", "--dataset", "images", "--vae", model, "--output", "latents"]),
        ("gradio", ["gallery", "--checkpoint", model]),
        ("onnx", ["export", "--checkpoint", model, "--format", "onnx", "--output", "programs"]),
    ):
        if importlib.util.find_spec(name) is None:
            done = subprocess.run(
                [command, *line], capture_output=True, text=True, cwd=folder, timeout=300
            )
            assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done
            assert "pip install" in done.stderr or name in done.stderr, done.stderr


def printed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def main() -> None:
    reason = sys.argv[1] if len(sys.argv) > 1 else None
    for package in (ecar, ek):
        assert "site-packages" in package.__file__, f"not installed: {package.__file__}"
    table = printed(sys.executable, "-I", "-m", "ecar_kernels").splitlines()
    column = table[1].split().index("cpp")
    for op in COMPILED:
        (row,) = [line.split() for line in table if line.split()[:1] == [op]]
        assert row[column] == ("yes" if reason is None else "no"), row
    missing = f"cpp is missing: the C++ library is not built: {reason}"
    assert reason is None or missing in " ".join(" ".join(table).split()), table
    if (_native.FOLDER / _native.CUDA_NAME).is_file():  # it loads without a GPU, too
        assert (why_not := _native.load_cuda()) is None, why_not
    every_op(reason is None)
    used = ek.resolve("adaln", device="cpu", dtype=torch.float32).backend
    assert used == ("cpp" if reason is None else "reference"), used
    said = printed(str(Path(sys.executable).with_name("ecar")), "--version")
    assert ek.__version__ in said, said
    every_module(reason)
    with tempfile.TemporaryDirectory(prefix="ecar-smoke-") as folder:
        every_command(Path(folder))
    print(
        f"ecar {ek.__version__} works with torch {torch.__version__}: "
        f"{'C++ and ' if reason is None else ''}reference ops"
    )


if __name__ == "__main__":
    main()
