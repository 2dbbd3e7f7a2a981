"""What each design choice is worth: one image with each switched off alone.

One E-CAR image by the paper's protocol, no guidance, random weights, float32, as
`benchmarks.end_to_end` times it. All variants compute the same image (to rounding), take turns in
one run, and share their weights.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import models, rates, results, timing
from benchmarks.models import STEPS, Way, image_seconds, time_image
from benchmarks.results import duration, figures, markdown
from ecar import ECAR, ECARConfig, split_steps
from ecar.flow import FlowHead, time_frequencies
from ecar.sampling.guidance import Steps
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


def _no_fusion(model: ECAR) -> None:
    """The same packed GEMMs, and between them the reference's elementwise ops."""

    def product(layer: torch.nn.Linear, x: Tensor) -> Tensor:
        return rates.packed_linear(layer.weight, layer.bias, x.shape[1])(x)

    adaln, residual = (
        resolve(op, device="cpu", dtype=torch.float32, backend="reference")
        for op in ("adaln", "gated_residual")
    )

    def residual_adaln(
        x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, **steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = residual(x, branch, gate, step_gate=steps.pop("step_gate"))
        return x, adaln(x, shift, scale, **steps)

    _infer_with(model, product, adaln, residual_adaln, residual)


def _no_packing(model: ECAR) -> None:
    """nn.Linear, and between the products the fused elementwise ops: the training path's."""

    def product(layer: torch.nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight, layer.bias)

    ops = (
        resolve(op, device="cpu", dtype=torch.float32)
        for op in ("adaln", "gated_residual_adaln", "gated_residual")
    )
    _infer_with(model, product, *ops)


def _infer_with(
    model: ECAR, product: Callable, adaln: Callable, residual_adaln: Callable, residual: Callable
) -> None:
    """Replaces the flow blocks' inference by these ops, one after another."""

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
    "fused elementwise ops": _no_fusion,
    "packed GEMMs": _no_packing,
}
AHEAD = "ops bound ahead of time"


def variants(model: ECAR) -> dict[str, Way]:
    """Everything on, then each switched off alone."""
    found = {ALL: Way(models.accelerated(model), "auto")}
    for name, switch in SWITCHES.items():
        found[name] = Way(models.accelerated(model), "auto")
        switch(found[name].model)
    return found | {AHEAD: Way(models.twin(model), "auto")}


def measure(
    size: str, config: ECARConfig, seconds: float, *, steps: Steps = STEPS, timed_steps: int = 4
) -> dict[str, Any]:
    """One size's record."""
    ways = variants(models.random_model(config))
    runs = {
        name: lambda way=way: image_seconds(time_image(way, timed_steps, steps), steps)
        for name, way in ways.items()
    }
    taken = timing.rounds(runs, seconds, at_least=3, warm_up=True)
    return {
        "size": size,
        "steps": sum(split_steps(steps, config.num_stages)),
        "timed_steps_of_a_stage": max(3, timed_steps),
        "seconds": timing.summaries(taken),
    }


def render(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        whole = row["seconds"][ALL]["median"]
        for name, summary in row["seconds"].items():
            rows.append(
                (
                    f"E-CAR-{row['size']}",
                    "nothing" if name == ALL else name,
                    duration(summary["median"]),
                    f"{figures(summary['median'] / whole)}x",
                )
            )
    first = record["rows"][0]
    return (
        markdown(("model", "switched off", "one image", "of the time with everything"), rows)
        + f"\n\nOne image, no guidance, random weights, float32: "
        f"{first['timed_steps_of_a_stage']} steps of each stage were run and scaled to "
        f"{first['steps']}.\nMedians of interleaved rounds."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = results.parser("paper.ablation", __doc__)
    parser.add_argument("--sizes", nargs="+", choices=("S", "B", "L"), default=("S",))
    parser.add_argument("--minutes", type=float, default=2.0, help="of measuring (default: 2)")
    options = parser.parse_args(arguments)
    facts, seconds = results.describe(), 60 * options.minutes / len(options.sizes)
    rows = [measure(size, ECARConfig.preset(size), seconds) for size in options.sizes]
    results.finish(options.results, "ablation", facts, render, rows=rows)


if __name__ == "__main__":
    main()
