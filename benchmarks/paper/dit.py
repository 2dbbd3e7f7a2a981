"""diffusers' DiT, the peer of the paper's Table 3: real modules, random weights."""

import statistics
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import seconds_of

CLASSES = 1000
SHAPE = {  # of the published DiT-XL/2
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": CLASSES,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}


class DiTSize(NamedTuple):
    """A model of the DiT paper's Table 1."""

    layers: int
    width: int
    heads: int
    latent_side: int = 32

    def build(self) -> torch.nn.Module:
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel(
            num_attention_heads=self.heads,
            attention_head_dim=self.width // self.heads,
            num_layers=self.layers,
            sample_size=self.latent_side,
            **SHAPE,
        ).eval()


PEERS = {"S": "B", "B": "L", "L": "XL"}  # E-CAR : DiT, as the paper pairs them
SIZES = {"B": DiTSize(12, 768, 12), "L": DiTSize(24, 1024, 16), "XL": DiTSize(28, 1152, 16)}


def scheduler(solver: str) -> Any:
    """diffusers' pipeline's own for "ddim"; "dpmsolver++" is what its users take for few steps."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    found = DDIMScheduler(clip_sample=False)
    if solver == "ddim":
        return found
    options = {"algorithm_type": solver, "solver_order": 2}
    return DPMSolverMultistepScheduler.from_config(found.config, **options)


@torch.no_grad()
def step_seconds(model: torch.nn.Module, steps: int, solver: str, timed_steps: int) -> float:
    """The median over the first steps of an image by `steps` network calls, without guidance: the
    loop of diffusers' DiTPipeline, without the decoder."""
    side, schedule = model.config.sample_size, scheduler(solver)
    x = torch.randn(1, 4, side, side, dtype=model.dtype)
    label = torch.randint(CLASSES, (1,))
    schedule.set_timesteps(steps)

    def step(t: torch.Tensor) -> None:
        nonlocal x
        predicted = model(x, timestep=t[None], class_labels=label).sample
        noise = predicted.split(4, dim=1)[0]  # the other half is the variance
        x = schedule.step(noise, t, x).prev_sample

    times = schedule.timesteps[:timed_steps]
    return statistics.median([seconds_of(lambda t=t: step(t)) for t in times])


def count(size: DiTSize, steps: int, *, guided: bool) -> tuple[int, int]:
    """Parameters, and multiply-adds of one image: matrix products alone, as E-CAR's are counted."""
    with torch.device("meta"):
        model, rows = size.build(), torch.zeros(1 + guided, dtype=torch.long)
        x = torch.empty(len(rows), 4, size.latent_side, size.latent_side)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, timestep=rows, class_labels=rows)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2 * steps
