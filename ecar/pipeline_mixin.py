"""What all pipelines of diffusers have, for ECARPipeline: parts that move, a bar, the hub."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import SoftTemporaryDirectory

from ecar.checkpoint import write_settings
from ecar.codec import AutoencoderKLCodec, IdentityCodec
from ecar.files import atomic_folder
from ecar.model import ECAR
from ecar.sampling import release_graphs

__all__ = ["PipelineMixin"]


class PipelineMixin:
    """Base of a pipeline with a model and a codec."""

    model: ECAR
    codec: IdentityCodec | AutoencoderKLCodec
    class_names: list[str] | None
    defaults: dict[str, Any]
    _accelerated_for: str | None = None  # the backend, once it is done
    _offload_device: torch.device | None = None  # where a part is while it works
    _progress_bar: dict[str, Any]  # tqdm's options

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def components(self) -> dict[str, Any]:
        """What another pipeline of the same weights is made of: ``ECARPipeline(**components)``."""
        return {
            "model": self.model,
            "codec": self.codec,
            "class_names": self.class_names,
            "defaults": self.defaults,
        }

    def to(
        self,
        *targets: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Move the model and the codec: ``pipe.to("cuda")``, ``pipe.to("cuda", torch.bfloat16)``.

        A VAE that must not run in float16 stays in float32. A device ends
        ``enable_model_cpu_offload``.
        """
        for target in targets:
            if isinstance(target, torch.dtype):
                dtype = target
            else:
                device = target
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"argument 'dtype': expected a floating-point dtype, got {dtype}")
        if device is not None:
            self._offload_device = None
        release_graphs(self.model)  # they read the weights where they lie now
        self.model.to(device=device, dtype=dtype)
        self.codec.to(device, dtype)
        self._accelerated_for = None
        return self

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the model and the VAE on the CPU, and each on the accelerator only while it works.

        It saves the memory of the smaller of the two, and costs their transfer at every call. No
        CUDA graphs are used, unless ``graphs`` is True. ``pipe.to(device)`` ends it.

        Args:
            gpu_id: the accelerator's number; not with a ``device`` that has one.
            device: None is the accelerator that there is.

        Raises:
            RuntimeError: ``device`` is None, and there is no accelerator.
            ValueError: two numbers.
        """
        if device is None:
            found = torch.accelerator.current_accelerator()
            if found is None or not torch.accelerator.is_available():
                raise RuntimeError(
                    "enable_model_cpu_offload: needs an accelerator, and there is none; argument "
                    "'device' names one"
                )
            device = found.type
        chosen = torch.device(device)
        if gpu_id is not None:
            if chosen.index is not None:
                raise ValueError(
                    f"argument 'gpu_id': expected none with device={str(device)!r}, got {gpu_id}"
                )
            chosen = torch.device(chosen.type, gpu_id)
        self.to("cpu")
        self._offload_device = chosen

    @contextlib.contextmanager
    def _working(self, part: ECAR | IdentityCodec | AutoencoderKLCodec) -> Iterator[None]:
        """A block in which the part computes, and for which it is moved under offloading."""
        if self._offload_device is None:
            yield
            return
        part.to(self._offload_device)
        try:
            yield
        finally:
            release_graphs(self.model)
            part.to("cpu")

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm for the bar of later calls, as ``disable=True`` or ``leave=False``."""
        self._progress_bar = options

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Upload what ``save_pretrained`` writes to a repository of the hub, made if needed.

        Args:
            repo_id: "owner/name", or "name" of your own.
            commit_message: None is "Upload ECARPipeline".
            private: a new repository's; None is its owner's default.
            token: None is that of `hf auth login`.
            create_pr: open a pull request with the files.

        Returns:
            huggingface_hub's ``CommitInfo``.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with SoftTemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                create_pr=create_pr,
            )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> Any:
        """Write config.json, model.safetensors, pipeline.json and, if there is a VAE, vae/.

        Args:
            push_to_hub: upload them as well, to ``repo_id``, by default the folder's name.
            options: of ``push_to_hub``.

        Raises:
            OSError: naming the file that can't be written; all are then as they were.
        """
        with atomic_folder(save_directory, keep=("README.md",)) as folder:
            self.model.save_pretrained(folder)
            write_settings(folder, self.codec, self.class_names, self.defaults)
        if push_to_hub:
            return self.push_to_hub(repo_id or Path(save_directory).name, **options)
        return None
