"""diffusers' DiT, the peer of the paper's Table 3: real modules, random weights."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

CLASSES = 1000


@dataclass(frozen=True)
class DiTSize:
    """A model of the DiT paper's Table 1."""

    layers: int
    width: int
    heads: int
    latent_side: int = 32

    @property
    def arguments(self) -> dict[str, Any]:
        """Of diffusers' class: the published DiT-XL/2's configuration, with these sizes."""
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.width // self.heads,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": self.layers,
            "sample_size": self.latent_side,
            "patch_size": 2,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": CLASSES,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
        }


SIZES = {"B": DiTSize(12, 768, 12), "L": DiTSize(24, 1024, 16), "XL": DiTSize(28, 1152, 16)}


def build(size: DiTSize) -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(**size.arguments).eval()


class Sampler:
    """The loop of diffusers' DiTPipeline for one image without guidance, the decoder left out.

    Args:
        size: of the model.
        steps: its network calls.
        solver: "ddim", the pipeline's own, or "dpmsolver++", of order 2, which its users take for
            few steps.
        dtype: of the model and the latents.
        model: another sampler's, to share; None builds one.
    """

    def __init__(
        self,
        size: DiTSize,
        steps: int,
        solver: str = "ddim",
        dtype: torch.dtype = torch.float32,
        model: torch.nn.Module | None = None,
    ) -> None:
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        self.size, self.steps, self.dtype = size, steps, dtype
        self.model = build(size).to(dtype) if model is None else model
        self.scheduler = DDIMScheduler(clip_sample=False)
        if solver == "dpmsolver++":
            self.scheduler = DPMSolverMultistepScheduler.from_config(
                self.scheduler.config, algorithm_type=solver, solver_order=2
            )

    @torch.no_grad()
    def time_image(self, timed_steps: int) -> float:
        """Seconds of an image: the median of its first `timed_steps` steps, times all."""
        side = self.size.latent_side
        x = torch.randn(1, 4, side, side, dtype=self.dtype)
        label, seconds = torch.randint(CLASSES, (1,)), []
        self.scheduler.set_timesteps(self.steps)
        for t in self.scheduler.timesteps[:timed_steps]:
            begin = time.perf_counter()
            predicted = self.model(x, timestep=t[None], class_labels=label).sample
            noise = predicted.split(4, dim=1)[0]  # the other half is the variance
            x = self.scheduler.step(noise, t, x).prev_sample
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds) * self.steps


def count(size: DiTSize, steps: int, *, guided: bool) -> tuple[int, int]:
    """Parameters, and multiply-adds of one image: matrix products alone, as E-CAR's are counted."""
    with torch.device("meta"):
        model = build(size)
        x = torch.empty(2 if guided else 1, 4, size.latent_side, size.latent_side)
        rows = torch.zeros(len(x), dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, timestep=rows, class_labels=rows)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2 * steps
