"""`python -m benchmarks.saved`: what a training step keeps for its backward, eager and ours.

The profile behind the training row of `benchmarks.memory`: each tensor that autograd saves in the
forward is counted once, with the module in whose forward it was saved; weights are left out. One
image, as the sum grows with the batch.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import ecar_kernels
from benchmarks import environment, results
from benchmarks.results import markdown
from ecar.config import PRESETS, ECARConfig
from ecar.model import ECAR

MIB = 2**20
PARTS = {"ar": "AR transformer", "heads": "flow heads"}


def saved(model: ECAR, backend: str) -> dict[str, int]:
    """Bytes by "part: module class", of one image's loss."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    names = {module: name for name, module in model.named_modules()}
    stack: list[nn.Module] = []
    kept: dict[int, Tensor] = {}  # held, so that no address is used twice
    found: Counter[str] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights and address not in kept:
            kept[address] = tensor
            module = stack[-1] if stack else model
            part = PARTS.get(names[module].partition(".")[0], "loss")
            found[f"{part}: {type(module).__name__}"] += tensor.untyped_storage().nbytes()
        return tensor

    # Hooks of all modules, not of each: a module that has its own does not recompute.
    handles = [
        register_module_forward_pre_hook(lambda m, args: stack.append(m)),
        register_module_forward_hook(lambda m, args, out: stack.pop() and None, always_call=True),
    ]
    config = model.config
    try:
        with (
            ecar_kernels.use_backend(backend),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            model.loss(torch.randn(1, *config.latent_shape), torch.zeros(1, dtype=torch.int64))
    finally:
        for handle in handles:
            handle.remove()
    return dict(found)


def render(record: dict[str, Any]) -> str:
    eager, ours = record["eager"], record["ours"]
    names = sorted(eager.keys() | ours, key=lambda name: -eager.get(name, 0))

    def cells(name: str, before: int, after: int) -> tuple[str, ...]:
        ratio = f"{after / before:.2f}x" if before else "-"
        return name, f"{before / MIB:.1f}", f"{after / MIB:.1f}", ratio

    rows = [cells(name, eager.get(name, 0), ours.get(name, 0)) for name in names]
    rows.append(cells("all", sum(eager.values()), sum(ours.values())))
    return (
        markdown(("kept for the backward", "eager", "ours", "ours / eager"), rows)
        + f"\n\nE-CAR-{record['size']}, MiB of one image, float32, by the module in whose "
        "forward it was saved. A\nlinear layer keeps its input, or in ours what that is made "
        "anew of."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.saved", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--size", choices=PRESETS, default="S")
    parser.add_argument(
        "--results",
        type=Path,
        default=results.FOLDER,
        help="folder to write <device>/saved.json into",
    )
    options = parser.parse_args(arguments)
    facts, file = environment.describe(), results.path("saved", options.results)
    model = ECAR(ECARConfig.preset(options.size)).train()
    record = {
        "size": options.size,
        "eager": saved(model, "reference"),
        "ours": saved(model, "auto"),
    }
    results.write(file, "saved", facts, **record)
    print(f"{render(record)}\n\n{results.where(facts)}\n\nwrote {file}")


if __name__ == "__main__":
    main()
