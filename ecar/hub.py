"""Checkpoints by name: a folder on disk, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

__all__ = ["checkpoint_folder"]


def checkpoint_folder(
    name: str | os.PathLike[str], files: Sequence[str], **hub_options: Any
) -> Path:
    """The local folder of a checkpoint: ``name`` itself, or a snapshot of a hub repository.

    Args:
        files: what is fetched of a repository; JSON and safetensors, never a pickle.
        hub_options: revision, token, cache_dir, force_download, local_files_only.

    Raises:
        FileNotFoundError: naming what is neither.
    """
    name = os.fspath(name)
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        reason = "not a folder" if os.path.exists(name) else "no such folder"
        raise FileNotFoundError(f"checkpoint {name!r}: {reason}")
    try:
        return Path(snapshot_download(name, allow_patterns=list(files), **hub_options))
    except (HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"checkpoint {name!r}: no such folder, and not had from the hub ({reason})"
        ) from None
