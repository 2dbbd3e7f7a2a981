"""What each design choice is worth: one image with each switched off alone.

One E-CAR image by the paper's protocol of 250 steps, no guidance, random weights, float32; four
steps of each stage are run and scaled. All variants compute the same image (to rounding), share
their weights and take turns; figures are medians over the rounds.
"""

import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import models, timing
from benchmarks.models import Way
from benchmarks.results import duration, medians, table, times
from ecar import ECAR, ECARConfig
from ecar.flow import FlowHead, time_frequencies
from ecar.transformer import ARTransformer
from ecar_kernels import FlowBlock, resolve

ALL = "everything"


def _no_hoisting(model: ECAR) -> None:
    """Recomputes each token's modulation at every step, from SiLU(c) + SiLU(t), as DiT does."""
    for head in model.heads:
        head.spatial_parts = types.MethodType(lambda self, map: (self.condition(map),), head)
        head.step_parts = types.MethodType(lambda self, times: list(times.split(1)), head)
        head.velocity = types.MethodType(_modulated_velocity, head)


def _modulated_velocity(self: FlowHead, x: Tensor, spatial: tuple[Tensor], time: Tensor) -> Tensor:
    embedding = self.time(time_frequencies(time).to(x.dtype))
    modulation = self.modulation(F.silu(spatial[0]) + F.silu(embedding)[:, None])
    parts = modulation.chunk(self.parts, dim=-1)
    return FlowHead.velocity(self, x, parts, (None,) * self.parts)


def _no_cache(model: ECAR) -> None:
    """The AR recomputes the earlier stages at every stage."""
    seen: list[Tensor] = []

    def stage(self: ARTransformer, tokens: Tensor, cache: Any) -> Tensor:
        if cache.stages == 0:
            seen.clear()
        seen.append(tokens)
        x, lengths = torch.cat(seen, dim=1), self.config.stage_tokens[: len(seen)]
        for block in self.blocks:
            x = block(x, lengths)
        cache.stages += 1
        return self.norm(x)[:, -tokens.shape[1] :]

    model.ar.stage = types.MethodType(stage, model.ar)


def _packed(layer: nn.Linear, x: Tensor) -> Tensor:
    return timing.packed_linear(layer.weight, layer.bias, x.shape[1])(x)


def _separate(product: Callable, backend: str, model: ECAR) -> None:
    """Flow blocks of products and, between them, the adaLN family's ops by a backend."""
    ops = ("adaln", "gated_residual_adaln", "gated_residual")
    adaln, residual_adaln, residual = (
        resolve(op, device="cpu", dtype=torch.float32, backend=backend) for op in ops
    )

    def infer(self: FlowBlock, x: Tensor, spatial: Sequence, step: Sequence) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = spatial
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = step
        y = adaln(x, shift, scale, step_shift=t_shift, step_scale=t_scale)
        branch = product(self.proj, self.attend(product(self.qkv, y)))
        steps = {"step_gate": t_gate, "step_shift": t_mlp_shift, "step_scale": t_mlp_scale}
        x, y = residual_adaln(x, branch, gate, mlp_shift, mlp_scale, **steps)
        hidden = F.gelu(product(self.mlp.fc1, y), approximate="tanh")
        return residual(x, product(self.mlp.fc2, hidden), mlp_gate, step_gate=t_mlp_gate)

    for head in model.heads:
        for block in head.blocks:
            block.infer = types.MethodType(infer, block)


# What is switched off -> how, on an accelerated model.
SWITCHES: dict[str, Callable[[ECAR], None]] = {
    "hoisted modulation": _no_hoisting,
    "KV cache": _no_cache,
    # The reference's elementwise ops between packed products; fused ones between nn.Linear's.
    "fused elementwise ops": functools.partial(_separate, _packed, "reference"),
    "packed GEMMs": functools.partial(_separate, nn.Linear.forward, "auto"),
}
AHEAD = "ops bound ahead of time"


def variants(model: ECAR) -> dict[str, Way]:
    """Everything on, then each switched off alone."""
    found = {name: Way(models.accelerated(model)) for name in (ALL, *SWITCHES)}
    for name, switch in SWITCHES.items():
        switch(found[name].model)
    return found | {AHEAD: Way(models.twin(model))}


def measure(size: str, seconds: float) -> dict[str, list]:
    """One size's row."""
    ways = variants(models.random_model(ECARConfig.preset(size)))
    taken = models.compare(models.images(ways), seconds)
    return {"rows": [{"size": size, "seconds": timing.summaries(taken)}]}


def render(record: dict[str, Any]) -> str:
    rows = [
        {
            "model": f"E-CAR-{row['size']}",
            "switched off": "nothing" if name == ALL else name,
            "one image": duration(seconds),
            "of the time with everything": times(seconds, medians(row)[ALL]),
        }
        for row in record["rows"]
        for name, seconds in medians(row).items()
    ]
    return table(rows)


main = functools.partial(
    models.main, "paper.ablation", __doc__, measure, render, seconds=120, words=("E-CAR-S",)
)

if __name__ == "__main__":
    sys.exit(main())
