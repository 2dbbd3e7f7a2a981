"""What an installed ecar must do: python -I tests/smoke.py [REASON].

Needs the installed package alone. Every op is held against the reference; the C++ ones must be
there, or, where REASON is given, be reported missing for it.
"""

import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import ecar
import ecar_kernels as ek
from ecar_kernels import _native, registry
from ecar_kernels.testing import SampleSizes, arguments

SIZES = SampleSizes(channels=100, hidden=75)
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
    printed(str(Path(sys.executable).with_name("ecar")), "info", "--preset", "digits")
    print(
        f"ecar {ek.__version__} works with torch {torch.__version__}: "
        f"{'C++ and ' if reason is None else ''}reference ops"
    )


if __name__ == "__main__":
    main()
