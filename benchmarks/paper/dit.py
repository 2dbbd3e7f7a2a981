"""diffusers' DiT, the peer of the paper's Table 3: real modules, random weights."""

import statistics
import time
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

CLASSES = 1000


class DiTSize(NamedTuple):
    """A model of the DiT paper's Table 1."""

    layers: int
    width: int
    heads: int
    latent_side: int = 32


SIZES = {"B": DiTSize(12, 768, 12), "L": DiTSize(24, 1024, 16), "XL": DiTSize(28, 1152, 16)}


def build(size: DiTSize) -> torch.nn.Module:
    """diffusers' class with the published DiT-XL/2's configuration, of another size."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.width // size.heads,
        in_channels=4,
        out_channels=8,
        num_layers=size.layers,
        sample_size=size.latent_side,
        patch_size=2,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=CLASSES,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    ).eval()


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
    label, seconds = torch.randint(CLASSES, (1,)), []
    schedule.set_timesteps(steps)
    for t in schedule.timesteps[:timed_steps]:
        begin = time.perf_counter()
        predicted = model(x, timestep=t[None], class_labels=label).sample
        noise = predicted.split(4, dim=1)[0]  # the other half is the variance
        x = schedule.step(noise, t, x).prev_sample
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def count(size: DiTSize, steps: int, *, guided: bool) -> tuple[int, int]:
    """Parameters, and multiply-adds of one image: matrix products alone, as E-CAR's are counted."""
    with torch.device("meta"):
        model = build(size)
        x = torch.empty(2 if guided else 1, 4, size.latent_side, size.latent_side)
        rows = torch.zeros(len(x), dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, timestep=rows, class_labels=rows)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2 * steps
