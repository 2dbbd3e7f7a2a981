"""E-CAR: the AR transformer and one flow head per stage (paper, Figure 3)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from torch import Tensor, nn

from ecar import stages
from ecar.config import ECARConfig
from ecar.files import atomic_folder, read_tensors, require_weights, write_tensors
from ecar.flow import FlowHead
from ecar.hub import checkpoint_folder, chosen_dtype, require_hub_options
from ecar.transformer import ARTransformer
from ecar_kernels import recompute

__all__ = ["ECAR", "SharedLayer", "load_weights"]


@dataclass
class SharedLayer:
    """What GradNorm needs of W, the weight of the last layer shared by all stages.

    A token of stage s reaches, after W, the loss L_s alone: so dL/dW of the weighted sum of
    losses splits by token segment into the gradients of the stages, and one backward gives
    them all.
    """

    hidden: Tensor  # [B, N, hidden], of which W's input is the GELU
    output: Tensor  # [B, N, width], W's output, which keeps its gradient
    stage_tokens: tuple[int, ...]

    @torch.no_grad()
    def stage_gradients(self) -> Tensor:
        """d(w_s L_s)/dW of each stage, float32 [S, *W.shape], after sum_s w_s L_s's backward."""
        if self.output.grad is None:
            raise ValueError("stage_gradients: expected to be called after the losses' backward")
        gradients = self.output.grad.split(self.stage_tokens, dim=1)
        z = recompute.gelu(self.hidden, recompute.gelu_by_cpp(self.hidden))
        return torch.stack(
            [
                (gradient.flatten(0, 1).T @ part.flatten(0, 1)).float()
                for gradient, part in zip(gradients, z.split(self.stage_tokens, dim=1), strict=True)
            ]
        )


MODEL_CARD = """---
{{ card_data }}
---

An E-CAR model: `ecar.ECARPipeline.from_pretrained` loads it; `config.json` holds its sizes.
"""


class ECAR(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="ecar",
    model_card_template=MODEL_CARD,
    license="apache-2.0",
    pipeline_tag="unconditional-image-generation",
    tags=["ecar", "class-conditional", "autoregressive", "flow-matching"],
):
    """E-CAR with random weights; ``from_pretrained`` loads trained ones.

    Args:
        config: the sizes.
    """

    def __init__(self, config: ECARConfig) -> None:
        if not isinstance(config, ECARConfig):
            raise TypeError(
                f"argument 'config': expected an ECARConfig, got {type(config).__name__}"
            )
        super().__init__()
        self.config = config
        self.ar = ARTransformer(config)
        self.heads = nn.ModuleList(
            FlowHead(config, stage) for stage in range(1, config.num_stages + 1)
        )

    @property
    def device(self) -> torch.device:
        return self.ar.positions.device

    @property
    def dtype(self) -> torch.dtype:
        return self.ar.positions.dtype

    def forward(
        self,
        latents: Tensor,
        labels: Tensor,
        noise: Tensor,
        tau: Tensor,
        return_shared: bool = False,
    ) -> Tensor | tuple[Tensor, SharedLayer]:
        """Stage losses of given draws (Eq. 3.14); a pure function, for compile and export.

        Args:
            latents: F1 [B, C, H, W].
            labels: int64 [B] in [0, num_classes], where num_classes is the null class.
            noise: n_S [B, C, H, W], standard normal.
            tau: time within each stage [B, S], in [0, 1].
            return_shared: also return the ``SharedLayer`` for GradNorm.

        Returns:
            The mean squared error of each stage's velocity, float32 [S].

        Raises:
            ValueError: ``return_shared``, and the last AR block has hooks, is another module, or
                there is none.
        """
        count = self.config.num_stages
        points = stages.end_points(latents, noise, count)
        maps, hidden, output = self.ar(labels, [end for _, end in points[:-1]], return_shared)
        if return_shared:
            output.retain_grad()
        losses = []
        for index, (head, token_map, (start, end)) in enumerate(
            zip(self.heads, maps, points, strict=True)
        ):
            x = stages.interpolate(start, end, tau[:, index])
            time = stages.global_time(index + 1, count, tau[:, index])
            velocity = head(x, time, token_map)
            losses.append((velocity.float() - (end - start).float()).square().mean())
        stacked = torch.stack(losses)
        if return_shared:
            return stacked, SharedLayer(hidden, output, self.config.stage_tokens)
        return stacked

    def loss(
        self, latents: Tensor, labels: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Stage losses with noise, tau ~ U(0, 1) and label dropout drawn here.

        Args:
            latents: F1 [B, C, H, W], in the model's dtype, on its device.
            labels: int64 [B] in [0, num_classes).
            generator: on the latents' device; torch's default one if None.

        Returns:
            float32 [S].

        Raises:
            TypeError, ValueError: naming the argument.
        """
        shape = self.config.latent_shape
        if not latents.is_floating_point():
            raise TypeError(f"argument 'latents': expected floating point, got {latents.dtype}")
        if latents.dim() != 4 or tuple(latents.shape[1:]) != shape:
            raise ValueError(
                f"argument 'latents': expected shape [B, {', '.join(map(str, shape))}], got "
                f"{list(latents.shape)}"
            )
        check_labels(labels, self.config.num_classes, rows=latents.shape[0])

        def uniform(*size: int) -> Tensor:
            return torch.rand(size, generator=generator, device=latents.device)

        noise = torch.randn(
            latents.shape, generator=generator, device=latents.device, dtype=latents.dtype
        )
        tau = uniform(latents.shape[0], self.config.num_stages)
        dropped = uniform(latents.shape[0]) < self.config.class_dropout
        return self(latents, labels.masked_fill(dropped, self.config.null_class), noise, tau)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the blocks' activations in the backward instead of keeping them."""
        self.ar.gradient_checkpointing = enabled
        for head in cast("Iterable[FlowHead]", self.heads):
            head.gradient_checkpointing = enabled

    def compile_regions(self, **options: Any) -> None:
        """torch.compile the repeated parts in place: AR layers and flow heads.

        One graph serves all layers of a kind. The last AR layer stays eager: GradNorm looks
        inside it.
        """
        for block in self.ar.blocks[:-1]:
            block.compile(**options)
        for head in self.heads:
            head.compile(**options)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> Any:
        """Write config.json, model.safetensors and, where there is none, README.md.

        Each file replaces the one from before whole or not at all.

        Args:
            push_to_hub: upload them as well, to ``repo_id``, by default the folder's name.
            options: of huggingface_hub's ``push_to_hub``.

        Raises:
            OSError: naming the file that can't be written; all are then as they were.
        """
        local = {name: options[name] for name in ("config", "model_card_kwargs") if name in options}
        # The mixin deletes config.json before it writes: let it work in a folder of its own.
        with atomic_folder(save_directory, keep=("README.md",)) as scratch:
            super().save_pretrained(scratch, **local)
        if push_to_hub:
            return self.push_to_hub(repo_id or Path(save_directory).name, **options)
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        self.config.to_json(save_directory / CONFIG_NAME)
        write_tensors(save_directory / SAFETENSORS_SINGLE_FILE, self.state_dict(), {"format": "pt"})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | Literal["auto"] | None = None,
        torch_dtype: torch.dtype | Literal["auto"] | None = None,
        **hub_options: Any,
    ) -> ECAR:
        """Load a folder that ``save_pretrained`` wrote, or a hub repository 'owner/name'.

        Args:
            pretrained_model_name_or_path: the folder, or the repository.
            dtype: of the weights; None is float32, "auto" is ``recommended_dtype()``.
            torch_dtype: another name for ``dtype``.
            hub_options: revision, token, cache_dir, force_download, local_files_only.

        Returns:
            The model in evaluation mode, on the CPU.

        Raises:
            FileNotFoundError: no such folder or file.
            TypeError: naming an option that is none of these.
            ValueError: weights cut short, of another configuration, not safetensors, quantized
                (integers or 8-bit floats), or not finite; two dtypes that differ.
        """
        chosen = chosen_dtype(dtype, torch_dtype)
        require_hub_options(hub_options, "dtype", "torch_dtype")
        files = (CONFIG_NAME, SAFETENSORS_SINGLE_FILE)
        folder = checkpoint_folder(pretrained_model_name_or_path, files, **hub_options)
        for file in files:
            if not (folder / file).is_file():
                name = os.fspath(pretrained_model_name_or_path)
                raise FileNotFoundError(f"checkpoint {name!r}: no file {file}")
        model = cls(ECARConfig.from_json(folder / CONFIG_NAME))
        load_weights(model, folder / SAFETENSORS_SINGLE_FILE)
        return model.eval().to(dtype=chosen)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy the weights of a safetensors file into ``model``: all names and shapes must agree, and
    the types be plain floats.

    Raises:
        ValueError: naming the file and the tensor. The model is then unchanged.
    """
    tensors, _ = read_tensors(path)
    require_weights(path, tensors, model.state_dict())
    model.load_state_dict(tensors)


def check_labels(labels: Tensor, num_classes: int, *, rows: int | None = None) -> None:
    """Validate int64 [B] class labels in [0, num_classes)."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        came = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"argument 'labels': expected an int64 tensor, got {came}")
    if labels.dim() != 1 or (rows is not None and labels.shape[0] != rows):
        raise ValueError(
            f"argument 'labels': expected shape [{'B' if rows is None else rows}], got "
            f"{list(labels.shape)}"
        )
    if labels.numel() and (labels.min() < 0 or labels.max() >= num_classes):
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise ValueError(
            f"argument 'labels': expected classes from 0 to {num_classes - 1}, got {int(wrong)}"
        )
