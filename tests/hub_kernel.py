"""The kernel for the Hub by the Hub's own loader: python -m tests.hub_kernel FOLDER.

FOLDER is what tools/hub_kernel.py wrote. Needs the package `kernels`, which `make hub-kernel` puts
in a folder of its own. The installed ecar_kernels is used first: the two must not meet.
"""

import importlib
import os
import sys
from pathlib import Path

import torch

import ecar_kernels.testing
from ecar_kernels import registry
from tests.smoke import COMPILED, SIZES


def compare(kernel, op: str, dtype: torch.dtype) -> None:
    """The same bits as the installed library's, by each one's C++."""
    call = ecar_kernels.testing.arguments(op, dtype=dtype, sizes=SIZES)
    results = []
    for library in (ecar_kernels, kernel):
        with library.use_backend("cpp"), torch.no_grad():
            out = getattr(library, op)(**call)
        results.append(out if isinstance(out, tuple) else (out,))
    for one, other in zip(*results, strict=True):
        assert one.equal(other), f"{op}, {dtype}: other results than the installed library's"


def gradients(kernel) -> None:
    q, k, v = (torch.randn(2, 21, 3, 16, requires_grad=True) for _ in range(3))
    found = []
    for library in (ecar_kernels, kernel):
        out = library.stage_attention(q, k, v, (1, 4, 16))
        found.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


def graph(kernel) -> None:
    x, shift, scale = (torch.randn(2, 5, 24) for _ in range(3))
    compiled = torch.compile(kernel.adaln, fullgraph=True, backend="eager")
    assert compiled(x, shift, scale).equal(kernel.adaln(x, shift, scale))


def check_metadata(folder: Path) -> None:
    """By the loader's own reader: the file, and every digest."""
    from kernels._rust import Build, Digest, Metadata

    Build.open(folder)  # ValueError for what is no build.toml
    for variant in sorted((folder / "build").iterdir()):
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from kernels import get_local_kernel

    folder = Path(sys.argv[1]).absolute()
    check_metadata(folder)
    ecar_kernels.adaln(*(torch.randn(1, 2, 8) for _ in range(3)))
    kernel = get_local_kernel(folder / "build", backend="cpu")
    name = kernel.__name__
    assert name.startswith("_ecar_kernels_cpu_") and kernel is not ecar_kernels
    own = importlib.import_module(f"{name}.registry")
    assert own is not registry and Path(own.__file__).is_relative_to(folder)
    for op in COMPILED:
        for dtype in registry.KERNEL_DTYPES:
            compare(kernel, op, dtype)
    gradients(kernel)
    graph(kernel)
    foreign = [
        module
        for module in sys.modules
        if module.startswith(f"{name}.")
        and not Path(sys.modules[module].__file__).is_relative_to(folder)
    ]
    assert not foreign, foreign
    print(f"{name}: {len(COMPILED)} ops by the Hub's loader, as the installed library's")


if __name__ == "__main__":
    main()
