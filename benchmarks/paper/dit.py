"""diffusers' DiT, the peer of the paper's Table 3: real modules, random weights."""

import statistics
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import seconds_of

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


class Sampler:
    """The loop of diffusers' DiTPipeline for one image without guidance, the decoder left out.

    solver: "ddim", the pipeline's own, or "dpmsolver++", of order 2, which its users take for few
    steps (network calls).
    """

    def __init__(self, model: torch.nn.Module, steps: int, solver: str = "ddim") -> None:
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        self.model, self.steps = model, steps
        self.scheduler = DDIMScheduler(clip_sample=False)
        if solver == "dpmsolver++":
            self.scheduler = DPMSolverMultistepScheduler.from_config(
                self.scheduler.config, algorithm_type=solver, solver_order=2
            )

    @torch.no_grad()
    def step_seconds(self, timed_steps: int) -> float:
        """The median over the first `timed_steps` steps of an image."""
        side = self.model.config.sample_size
        x = torch.randn(1, 4, side, side, dtype=self.model.dtype)
        label = torch.randint(CLASSES, (1,))
        self.scheduler.set_timesteps(self.steps)

        def step(t: torch.Tensor) -> None:
            nonlocal x
            predicted = self.model(x, timestep=t[None], class_labels=label).sample
            noise = predicted.split(4, dim=1)[0]  # the other half is the variance
            x = self.scheduler.step(noise, t, x).prev_sample

        timed = self.scheduler.timesteps[:timed_steps]
        return statistics.median(seconds_of(lambda t=t: step(t)) for t in timed)


def count(size: DiTSize, steps: int, *, guided: bool) -> tuple[int, int]:
    """Parameters, and multiply-adds of one image: matrix products alone, as E-CAR's are counted."""
    with torch.device("meta"):
        model = build(size)
        x = torch.empty(2 if guided else 1, 4, size.latent_side, size.latent_side)
        rows = torch.zeros(len(x), dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, timestep=rows, class_labels=rows)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2 * steps
