"""What a configuration costs: tokens, parameters and multiply-adds, counted from the modules."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ecar.config import ECARConfig
from ecar.model import ECAR
from ecar.sampling import sample, split_steps
from ecar.sampling.guidance import DEFAULT_STEPS, Steps
from ecar.sampling.plain import boundary_op
from ecar_kernels import resolve, use_backend

__all__ = [
    "StageCost",
    "backends_in_use",
    "count_multiply_adds",
    "count_parameters",
    "count_training_multiply_adds",
]

SAMPLING_OPS = (
    "stage_attention",
    "adaln_linear",
    "linear_gated_residual",
    "euler_step",
    "upsample_renoise_euler",
    "initial_noise",
)


@dataclass(frozen=True)
class StageCost:
    """One stage of sampling one image; multiply-adds, not FLOPs (a multiply-add is two)."""

    stage: int  # counted from 1
    side: int  # of its latent
    tokens: int
    steps: int
    ar: int  # the AR transformer's pass, input embedding included
    modulation: int  # adaLN's spatial part, and its step part for all steps
    flow: int  # all steps of the flow head

    @property
    def total(self) -> int:
        return self.ar + self.modulation + self.flow


def count_parameters(config: ECARConfig) -> dict[str, int]:
    """Parameters by part, counted from the modules on the meta device.

    Returns:
        "ar_embeddings" (class, positions, end states), "ar_layers" (with the last norm),
        "flow_head_1" .. "flow_head_S", and "total".
    """
    model = _meta_model(config)

    def size(*parts: nn.Module | nn.Parameter) -> int:
        return sum(
            part.numel()
            if isinstance(part, nn.Parameter)
            else sum(parameter.numel() for parameter in part.parameters())
            for part in parts
        )

    ar = model.ar
    embeddings = size(ar.class_embedding, ar.inputs, ar.positions)
    heads = {f"flow_head_{stage}": size(head) for stage, head in enumerate(model.heads, start=1)}
    return {
        "ar_embeddings": embeddings,
        "ar_layers": size(ar) - embeddings,
        **heads,
        "total": size(model),
    }


def count_multiply_adds(
    config: ECARConfig,
    *,
    steps: Steps = DEFAULT_STEPS,
    guidance_scale: float = 1.0,
    **settings: Any,
) -> list[StageCost]:
    """Multiply-adds of sampling one image, stage by stage.

    The sampler itself runs, with a model on the meta device (shapes, no values), and torch's
    FlopCounterMode counts its matrix products and attention; FLOPs are halved. Steps of equal
    shapes are counted once and added each time. Elementwise work is not counted.

    Args:
        steps, guidance_scale, settings: of ``ecar.sample``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    counts = split_steps(steps, config.num_stages)
    model = _meta_model(config)
    # "auto" on the meta device is plain PyTorch, all of whose products the counter knows.
    with use_backend("auto"), FlopCounterMode(display=False) as counter:
        ledger = _Ledger(model, counter)
        zero = torch.zeros(1, dtype=torch.int64)
        sample(model, zero, seeds=zero, steps=steps, guidance_scale=guidance_scale, **settings)
    stages = [
        StageCost(
            stage,
            config.stage_sides[stage - 1],
            config.stage_tokens[stage - 1],
            count,
            **{part: ledger.flops[stage, part] // 2 for part in ("ar", "modulation", "flow")},
        )
        for stage, count in enumerate(counts, start=1)
    ]
    counted, total = ledger.computed, counter.get_total_flops()
    assert counted == total, f"the parts hold {counted} FLOPs of the sampler's {total}"
    return stages


def count_training_multiply_adds(config: ECARConfig) -> int:
    """Multiply-adds of one training image: forward, backward and GradNorm's gradients.

    Counted as ``count_multiply_adds`` does, of a training step of one image. Nothing is recomputed
    (``gradient_checkpointing`` adds the forward of the blocks once more).
    """
    model = _meta_model(config).train()
    shape, stages = (1, *config.latent_shape), config.num_stages
    with torch.device("meta"):
        latents, noise, tau = torch.empty(shape), torch.empty(shape), torch.empty(1, stages)
        labels = torch.empty(1, dtype=torch.int64)
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        if config.ar_layers:
            losses, shared = model(latents, labels, noise, tau, return_shared=True)
            losses.sum().backward()
            shared.stage_gradients()
        else:
            model(latents, labels, noise, tau).sum().backward()
    return counter.get_total_flops() // 2


def backends_in_use(
    config: ECARConfig, device: torch.device | str, dtype: torch.dtype
) -> dict[str, str]:
    """The backend that serves each op of sampling, for tensors of this device and dtype.

    flow_boundary is among them where the sampler uses it: where a kernel serves it.

    Raises:
        BackendUnavailableError: a backend is asked for by name and cannot serve an op.
    """
    serving = {}
    boundary = ("flow_boundary",) if boundary_op(device, dtype, config.width) else ()
    for op in (*SAMPLING_OPS, *boundary):
        width = config.head_dim if op == "stage_attention" else config.width
        serving[op] = resolve(op, device=device, dtype=dtype, width=width).backend
    return serving


def _meta_model(config: ECARConfig) -> ECAR:
    """The modules with shapes and no values."""
    with torch.device("meta"):
        return ECAR(config).eval()


class _Ledger:
    """FLOPs by (stage, part), from the methods that the sampler calls.

    Sampling a stage begins with the embedding of the AR's input. Without values the steps of a
    stage differ by their number of rows alone (guided or not), so that a velocity is computed
    once for each shape, and recalled with its FLOPs after that.
    """

    def __init__(self, model: ECAR, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.stage = 0
        self.flops: Counter[tuple[int, str]] = Counter()
        self.computed = 0  # without what was recalled
        self._velocities: dict[tuple[Any, ...], tuple[Tensor, int]] = {}
        self._replace(model.ar, "embed_class", self._embed)
        self._replace(model.ar, "embed_end", self._embed)
        self._replace(model.ar, "stage", self._ar)
        for head in model.heads:
            self._replace(head, "spatial_modulation", self._modulation)
            self._replace(head, "step_modulation", self._modulation)
            self._replace(head, "velocity", self._velocity)

    def _replace(self, module: nn.Module, name: str, record: Callable[..., Any]) -> None:
        setattr(module, name, functools.partial(record, getattr(module, name)))

    def _embed(self, method: Callable[..., Any], *arguments: Any) -> Any:
        self.stage += 1
        return self._ar(method, *arguments)

    def _ar(self, method: Callable[..., Any], *arguments: Any) -> Any:
        return self._record("ar", *self._measure(method, *arguments))

    def _modulation(self, method: Callable[..., Any], *arguments: Any) -> Any:
        return self._record("modulation", *self._measure(method, *arguments))

    def _velocity(self, method: Callable[..., Any], x: Tensor, *parts: Any) -> Tensor:
        key = (self.stage, x.shape)
        if key not in self._velocities:
            self._velocities[key] = self._measure(method, x, *parts)
        return self._record("flow", *self._velocities[key])

    def _measure(self, method: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
        before = self.counter.get_total_flops()
        result = method(*arguments)
        flops = self.counter.get_total_flops() - before
        self.computed += flops
        return result, flops

    def _record(self, part: str, result: Any, flops: int) -> Any:
        self.flops[self.stage, part] += flops
        return result
