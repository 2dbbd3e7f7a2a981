"""What an installed ecar must do: python -I tests/smoke.py [REASON].

Needs the installed package alone. Every op is held against the reference; the C++ ones must be
there, or, where REASON is given, be reported missing for it.
"""

import subprocess
import sys
from pathlib import Path

import torch

import ecar
import ecar_kernels as ek
from ecar_kernels import _native, registry


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def calls(dtype: torch.dtype) -> dict[str, dict]:
    """Arguments of every op."""

    def rows(names: str, *shape: int) -> dict:
        return {name: normal(*shape, dtype=dtype) for name in names.split()}

    b, n, c, hidden = 2, 21, 100, 75
    norm, gate = rows("shift scale", b, n, c) | rows("step_scale", 1, 1, c), rows("gate", b, 1, c)
    state = (
        rows("x", b, 3, 4, 6)
        | rows("velocity", 2 * b, 3, 4, 6)
        | {"dt": 0.125, "guidance_scale": 1.5}
    )
    seeds = torch.tensor([7, -7])
    return {
        "stage_attention": rows("q k v", b, n, 3, 8) | {"stage_lengths": (1, 4, 16)},
        "adaln": rows("x", b, n, c) | norm,
        "gated_residual": rows("x branch", b, n, c) | gate,
        "gated_residual_adaln": rows("x branch", b, n, c) | gate | norm,
        "adaln_linear": rows("x", b, n, c)
        | rows("weight", hidden, c)
        | rows("bias", hidden)
        | norm
        | {"activation": "gelu_tanh", "scale_offset": 0.5},
        "linear_gated_residual": rows("h", b, n, hidden)
        | rows("weight", c, hidden)
        | rows("bias", c)
        | rows("residual", b, n, c)
        | gate,
        "euler_step": state,
        "upsample_renoise_euler": state | {"time": 1 / 3, "stage": 2, "seeds": seeds},
        "flow_boundary": rows("x", 2 * b, n, c)
        | rows("shift scale", 2 * b, 1, c)
        | rows("state", b, n, 12)
        | rows("weight", 12, c)
        | rows("bias", 12)
        | rows("embed_weight", c, 12)
        | rows("embed_bias", c)
        | rows("positions", n, c)
        | {"dt": 0.125, "guidance_scale": 1.5},
        "initial_noise": {"seeds": seeds, "shape": (3, 4, 6), "device": "cpu", "dtype": dtype},
    }


def results(op: str, backend: str, call: dict) -> list[torch.Tensor]:
    with ek.use_backend(backend), torch.no_grad():
        out = getattr(ek, op)(**call)
    return [x.double() for x in (out if isinstance(out, tuple) else (out,))]


def compare(op: str, backend: str, dtype: torch.dtype) -> None:
    """The root mean square error is at most twice the reference's, plus an ulp."""
    call = calls(dtype)[op]
    exact_call = {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in call.items()
    }
    if op == "initial_noise":
        exact_call["dtype"] = torch.float64
    exact = results(op, "reference", exact_call)
    for ours, usual, oracle in zip(
        results(op, backend, call), results(op, "reference", call), exact, strict=True
    ):
        errors = [(x - oracle).square().mean().sqrt().item() for x in (ours, usual)]
        allowed = 2 * errors[1] + torch.finfo(dtype).eps * oracle.abs().max().item()
        assert errors[0] <= allowed, f"{op}, {backend}, {dtype}: {errors[0]}, allowed {allowed}"


def printed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def main() -> None:
    reason = sys.argv[1] if len(sys.argv) > 1 else None
    for package in (ecar, ek):
        assert "site-packages" in package.__file__, f"not installed: {package.__file__}"
    assert set(calls(torch.float32)) == set(registry.OPS)
    table = printed(sys.executable, "-I", "-m", "ecar_kernels").splitlines()
    for op in calls(torch.float32):
        (row,) = [line for line in table if line.split()[:2] == [op, "native"]]
        wanted = "yes" if reason is None else f"the C++ library is not built: {reason}"
        assert wanted in row, f"expected {wanted!r}, got {row!r}"
    if (_native.FOLDER / _native.CUDA_NAME).is_file():  # it loads without a GPU, too
        assert (why_not := _native.load_cuda()) is None, why_not
    for op in calls(torch.float32):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            compare(op, "auto", dtype)
            if reason is None:
                compare(op, "native", dtype)
    used = ek.resolve("adaln", device="cpu", dtype=torch.float32).__module__
    assert used == f"ecar_kernels.adaln.{'native' if reason is None else 'reference'}", used
    said = printed(str(Path(sys.executable).with_name("ecar")), "--version")
    assert ek.__version__ in said, said
    printed(str(Path(sys.executable).with_name("ecar")), "info", "--preset", "digits")
    print(
        f"ecar {ek.__version__} works with torch {torch.__version__}: "
        f"{'C++ and ' if reason is None else ''}reference ops"
    )


if __name__ == "__main__":
    main()
