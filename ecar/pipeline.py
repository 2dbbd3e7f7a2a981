"""ECARPipeline: from classes to pictures, with diffusers' conventions."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ecar.checkpoint import (
    CHECKPOINT_FILES,
    PIPELINE_FILE,
    VAE_FOLDER,
    complete_settings,
    merge_settings,
    read_settings,
)
from ecar.codec import CODECS, AutoencoderKLCodec, IdentityCodec, load_codec
from ecar.hub import checkpoint_folder, chosen_dtype, require_hub_options
from ecar.images import to_numpy, to_pil, to_unit
from ecar.inputs import ClassNames, draw_seeds, pair, repeat
from ecar.model import ECAR
from ecar.pipeline_mixin import PipelineMixin
from ecar.sampling import StepInfo, sample
from ecar.sampling.guidance import Steps
from ecar_kernels import accelerate, active_backend

__all__ = ["ECARPipeline", "ECARPipelineOutput"]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DECODE_ROWS = 8  # a VAE's decoder needs far more memory for an image than the model does


@dataclass(frozen=True)
class ECARPipelineOutput:
    """What a pipeline call returns.

    Attributes:
        images: B pictures: a list of PIL ones (mode L or RGB), a float32 array [B, H, W, C] or a
            float32 tensor [B, C, H, W], both in [0, 1], or float32 latents [B, c, h, w].
        seeds: the seed of each; with it the same picture can be made again.
        stage_images: with ``return_stages``, the end state of each stage, coarse to fine, in the
            form of ``images``. All but the last are smaller and still partly noise.
        served, why_not_graph: as in ``SampleOutput``: which backend served each op, and why no
            CUDA graph was replayed.
        class_labels: the class of each image.
        class_names: its name, where the classes have names.
    """

    images: Any
    seeds: list[int]
    stage_images: list[Any] | None = None
    served: dict[str, str] = field(default_factory=dict)
    why_not_graph: str | None = None
    class_labels: list[int] = field(default_factory=list)
    class_names: list[str] | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """(images, seeds), and stage_images where they were asked for."""
        parts = (self.images, self.seeds)
        return parts if self.stage_images is None else (*parts, self.stage_images)


class ECARPipeline(PipelineMixin):
    """A model, the codec of its latents, and how it is best sampled.

    Args:
        model: put in evaluation mode.
        codec: None is the identity: latents are pixels.
        class_names: one name for each class; synonyms are separated by commas.
        defaults: of the call's ``num_inference_steps``, ``guidance_scale``,
            ``guidance_schedule``, ``guidance_interval``, ``solver`` and ``grid``.
        graphs: on a CUDA device, draw by a CUDA graph, captured at the first call of a kind:
            "auto" where one can be had, True or an error, or False; see ``ecar.sample``. Also an
            attribute, to be set later.
        tf32: float32 matrix products of the model on CUDA in TF32 or not; None leaves torch's
            setting. Also an attribute.
        accelerate: serve the model by ``ecar_kernels.accelerate`` when it first draws, in place,
            from the backend then in force, its packed weights in place of the plain ones.
            ``ecar_kernels.restore(pipe.model)`` undoes it.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        model: ECAR,
        codec: IdentityCodec | AutoencoderKLCodec | None = None,
        class_names: Sequence[str] | None = None,
        defaults: dict[str, Any] | None = None,
        *,
        graphs: bool | str = "auto",
        tf32: bool | None = None,
        accelerate: bool = False,
    ) -> None:
        if not isinstance(model, ECAR):
            raise TypeError(f"argument 'model': expected an ECAR, got {type(model).__name__}")
        codec = IdentityCodec() if codec is None else codec
        if not isinstance(codec, tuple(CODECS.values())):
            raise TypeError(
                f"argument 'codec': expected one of {', '.join(CODECS)}, got {type(codec).__name__}"
            )
        channels = model.config.channels
        if isinstance(codec, AutoencoderKLCodec) and codec.vae.config.latent_channels != channels:
            raise ValueError(
                f"argument 'codec': expected the model's {channels} latent channels, got "
                f"{codec.vae.config.latent_channels}"
            )
        self.model = model.eval()
        self.codec = codec
        self.classes = ClassNames(class_names, model.config.num_classes)
        self.defaults = complete_settings(defaults or {}, model.config.num_stages)
        self.class_names = self.classes.names
        self.graphs, self.tf32, self.accelerate = graphs, tf32, accelerate
        self._progress_bar = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | Literal["auto"] | None = None,
        torch_dtype: torch.dtype | Literal["auto"] | None = None,
        accelerate: bool = True,
        **hub_options: Any,
    ) -> ECARPipeline:
        """Load a folder that ``save_pretrained`` wrote, or a hub repository 'owner/name'.

        A folder without pipeline.json has the identity codec and no class names.

        Args:
            dtype: of the weights. None is float32; "auto" is bfloat16 where this CPU multiplies it
                (``recommended_dtype``), in about half of the time, else float32. An image is
                another in detail then (docs/steps.md).
            torch_dtype: another name for ``dtype``.
            accelerate: as for the class; the model is the pipeline's own here.
            hub_options: revision, token, cache_dir, force_download, local_files_only.

        Raises:
            OSError: naming the folder or file that is missing.
            TypeError: naming an option that is none of these.
            ValueError: naming the file that holds something else, or for two dtypes that differ.
        """
        chosen = chosen_dtype(dtype, torch_dtype)
        require_hub_options(hub_options, "dtype", "torch_dtype", "accelerate")
        folder = checkpoint_folder(pretrained_model_name_or_path, CHECKPOINT_FILES, **hub_options)
        settings = read_settings(folder)
        model = ECAR.from_pretrained(folder)
        codec = load_codec(settings.pop("codec", IdentityCodec.kind), folder / VAE_FOLDER)
        try:
            pipeline = cls(model, codec, **settings, accelerate=accelerate)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / PIPELINE_FILE}: {error}") from None
        return pipeline if chosen is None else pipeline.to(chosen)

    @overload
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        num_inference_steps: Steps | None = None,
        guidance_scale: float | None = None,
        *,
        guidance_schedule: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        solver: str | None = None,
        grid: float | Sequence[Sequence[float]] | None = None,
        seeds: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_stages: bool = False,
        progress: bool = True,
        return_dict: Literal[True] = True,
    ) -> ECARPipelineOutput: ...

    @overload
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        num_inference_steps: Steps | None = None,
        guidance_scale: float | None = None,
        *,
        guidance_schedule: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        solver: str | None = None,
        grid: float | Sequence[Sequence[float]] | None = None,
        seeds: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_stages: bool = False,
        progress: bool = True,
        return_dict: Literal[False],
    ) -> tuple[Any, ...]: ...

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        num_inference_steps: Steps | None = None,
        guidance_scale: float | None = None,
        *,
        guidance_schedule: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        solver: str | None = None,
        grid: float | Sequence[Sequence[float]] | None = None,
        seeds: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_stages: bool = False,
        progress: bool = True,
        return_dict: bool = True,
    ) -> ECARPipelineOutput | tuple[Any, ...]:
        """Draw pictures of classes, each from a seed of its own.

        A picture depends on its class, its seed and the settings alone, not on its batch.

        Args:
            class_labels: class numbers or names, or both mixed. One alone goes with every seed.
            num_inference_steps: of all stages together, a list with each stage's, or "paper",
                the paper's protocol: 250 even Euler steps. Here and below None is the pipeline's
                default.
            guidance_scale: w of classifier-free guidance; 1 is none.
            guidance_schedule: "constant", or "linear" over stages.
            guidance_interval: global times (low, high) outside which there is no guidance.
            num_images_per_prompt: pictures of each class label, which follow each other; there are
                as many ``seeds`` as pictures.
            solver: "euler", "heun" (order 2, two network calls a step) or "ab2" (order 2, one).
            grid: where a stage's steps lie: the exponent p of (i / N)^p, or each stage's times.
            seeds: int64 numbers. One alone goes with every class: the same noise.
            generator: draws the seeds; not with ``seeds``. With neither, torch's default one.
            output_type: "pil", "np" (float32 [B, H, W, C] in [0, 1]), "pt" (float32
                [B, C, H, W] in [0, 1]) or "latent".
            callback_on_step_end: called as ``callback(pipe, step_index, timestep, kwargs)``
                after each step, with the global time in [0, 1] at which the step began and
                ``kwargs["latents"]``, the state after it, [B, c, h, w] at its stage's size.
                Returned ``{"latents": ...}`` take its place, except at the last step of a stage
                before the final one, where another tensor is refused.
            callback_on_step_end_tensor_inputs: what ``kwargs`` holds; "latents" is all there is.
            return_stages: also return the end state of every stage.
            progress: show a progress bar, as ``set_progress_bar_config`` says.
            return_dict: False returns ``(images, seeds)``, or with ``return_stages``
                ``(images, seeds, stage_images)``.

        Raises:
            TypeError, ValueError: naming the argument.
            FloatingPointError: the states are not finite, as in a dtype with too small a range.
        """
        chosen = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "guidance_interval": guidance_interval,
            "solver": solver,
            "grid": grid,
        }
        chosen = {name: value for name, value in chosen.items() if value is not None}
        settings = merge_settings(self.defaults, chosen, self.model.config.num_stages)
        self._check_output_type(output_type)
        if set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise ValueError(
                "argument 'callback_on_step_end_tensor_inputs': expected only 'latents', got "
                f"{list(callback_on_step_end_tensor_inputs)}"
            )
        labels = repeat(self.classes.numbers(class_labels), num_images_per_prompt)
        numbers = draw_seeds(seeds, generator, len(labels))
        given = (class_labels, seeds) if num_images_per_prompt == 1 else (labels, numbers)
        labels, numbers = pair(labels, numbers, *given)

        call: Any = callback_on_step_end  # of None there is no callback

        def callback(info: StepInfo) -> Tensor | None:
            time = (info.stage - 1 + info.tau) / self.model.config.num_stages
            given = dict.fromkeys(callback_on_step_end_tensor_inputs, info.latents)
            returned = call(self, info.index, time, given)
            if returned is None or isinstance(returned, dict):
                return (returned or {}).get("latents")
            raise TypeError(
                "argument 'callback_on_step_end': expected it to return None or a dict, got "
                f"{type(returned).__name__}"
            )

        with self._working(self.model):
            self._accelerate()
            drawn = sample(
                self.model,
                torch.tensor(labels, dtype=torch.int64),
                seeds=torch.tensor(numbers, dtype=torch.int64),
                steps=settings.pop("num_inference_steps"),
                callback=None if callback_on_step_end is None else callback,
                progress=self._progress_bar if progress else False,
                return_stage_ends=return_stages,
                graphs=self.graphs if self._offload_device is None else self.graphs is True,
                tf32=self.tf32,
                **settings,
            )
        if not torch.isfinite(drawn.latents).all():
            raise FloatingPointError(
                f"sampling in {self.dtype} gave values that are not finite; use bfloat16 or float32"
            )
        with self._working(self.codec):
            images = self._pictures(drawn.latents, output_type)
            stage_images = None
            if drawn.stage_ends is not None:
                stage_images = [self._pictures(end, output_type) for end in drawn.stage_ends]
        names = self.class_names and [self.class_names[label] for label in labels]
        output = ECARPipelineOutput(
            images, numbers, stage_images, drawn.served, drawn.why_not_graph, labels, names
        )
        return output if return_dict else output.to_tuple()

    def _accelerate(self) -> None:
        backend = active_backend()
        if self.accelerate and self._accelerated_for != backend:
            accelerate(self.model, keep_weights=False)
            self._accelerated_for = backend

    def _pictures(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        images = torch.cat([self.codec.decode(rows) for rows in latents.split(DECODE_ROWS)])
        return {"pil": to_pil, "np": to_numpy, "pt": to_unit}[output_type](images)

    def _check_output_type(self, output_type: str) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"argument 'output_type': expected one of {OUTPUT_TYPES}, got {output_type!r}"
            )
        channels = self.model.config.channels
        if output_type != "latent" and self.codec.kind == "identity" and channels not in (1, 3):
            raise ValueError(
                f"argument 'output_type': expected 'latent', got {output_type!r}: without a codec "
                f"{channels}-channel latents are no pictures"
            )

    def __repr__(self) -> str:
        config = self.model.config
        millions = sum(weight.numel() for weight in self.model.parameters()) / 1e6
        names = "unnamed" if self.class_names is None else f"{', '.join(self.class_names[:3])}, .."
        return (
            f"ECARPipeline(\n"
            f"  model: {millions:.1f} M parameters, stages "
            f"{'/'.join(map(str, config.stage_sides))}, {self.dtype} on {self.device}\n"
            f"  codec: {self.codec}\n"
            f"  classes: {config.num_classes} ({names})\n"
            f"  defaults: {self.defaults}\n"
            f")"
        )
