"""What a format of numbers costs in accuracy, next to what the solver costs."""

from __future__ import annotations

from typing import Any

import torch

from ecar.pipeline import ECARPipeline
from ecar.sampling.guidance import plan_steps

from .steps import Setting, Sweep, relative_distance

__all__ = ["cast_and_compare"]


def cast_and_compare(
    pipeline: ECARPipeline,
    dtype: torch.dtype,
    *,
    images: int,
    first_seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Cast a pipeline, and measure how far its latents move by it.

    An error is the distance to the converged trajectories, as in ``sweep_steps``; they are drawn,
    before the cast, in the dtype that the pipeline had.

    Args:
        pipeline: left in ``dtype``.
        images, first_seed, batch_size: of the images; their classes are spread over all there are.
        settings: all of the pipeline's call.

    Returns: {"images", "seeds", "converged", "error_before" (the solver's alone), "error" (with
        the cast), "distance" (of the latents before and after, relative to those before)}.
    """
    stages = pipeline.model.config.num_stages
    counts, solver, grid = plan_steps(
        settings["num_inference_steps"], settings["solver"], settings["grid"], stages
    )
    guidance = {name: settings[name] for name in settings if name.startswith("guidance_")}
    sweep = Sweep(pipeline, images, first_seed, batch_size, guidance, progress)
    setting = Setting(solver, grid, tuple(counts))
    before = sweep.draw(setting)
    pipeline.to(dtype)
    after = sweep.draw(setting)
    return {
        "images": images,
        "seeds": [first_seed, first_seed + images - 1],
        "converged": sweep.reference_facts,
        "error_before": relative_distance(before, sweep.reference),
        "error": relative_distance(after, sweep.reference),
        "distance": relative_distance(after, before),
    }
