"""Checkpoints by name: a folder on disk, or a repository of the Hugging Face hub."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from ecar.files import WEIGHT_DTYPES
from ecar_kernels.inspection import why_not_bfloat16

__all__ = ["checkpoint_folder", "chosen_dtype", "recommended_dtype", "require_hub_options"]

HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def require_hub_options(options: dict[str, Any], *others: str) -> None:
    """TypeError naming the first option that is none of ``HUB_OPTIONS``.

    Args:
        others: what else the caller takes; named in the message.
    """
    known = (*others, *HUB_OPTIONS)
    for name in options.keys() - set(HUB_OPTIONS):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(
            f"argument {name!r}: from_pretrained has no such option, expected one of "
            f"{', '.join(known)}{hint}"
        )


def recommended_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """What ``dtype="auto"`` is: bfloat16 on a CPU whose kernels multiply it at twice float32's
    rate, else float32. ``ecar_kernels.inspection.why_not_bfloat16()`` says why not."""
    fast = torch.device(device).type == "cpu" and why_not_bfloat16() is None
    return torch.bfloat16 if fast else torch.float32


def chosen_dtype(
    dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None
) -> torch.dtype | None:
    """The dtype that one of from_pretrained's two arguments gives, "auto" being the one for the
    CPU, where weights are loaded; None where neither does.

    Raises:
        TypeError: no floating-point dtype. ValueError: two different ones.
    """
    for name, value in (("dtype", dtype), ("torch_dtype", torch_dtype)):
        plain = isinstance(value, torch.dtype) and value in WEIGHT_DTYPES
        if value not in (None, "auto") and not plain:
            raise TypeError(
                f"argument {name!r}: expected torch.float32, bfloat16, float16, float64 or 'auto', "
                f"got {value!r}"
            )
    if None not in (dtype, torch_dtype) and dtype != torch_dtype:
        raise ValueError(
            f"argument 'torch_dtype': expected the same as 'dtype', {dtype}, got {torch_dtype}; "
            "one of the two is enough"
        )
    chosen = torch_dtype if dtype is None else dtype
    return recommended_dtype() if isinstance(chosen, str) else chosen


def checkpoint_folder(
    name: str | os.PathLike[str], files: Sequence[str], **hub_options: Any
) -> Path:
    """The local folder of a checkpoint: ``name`` itself, or a snapshot of a hub repository.

    Args:
        files: what is fetched of a repository; JSON and safetensors, never a pickle.
        hub_options: revision, token, cache_dir, force_download, local_files_only.

    Raises:
        FileNotFoundError: naming what is neither.
        TypeError: naming an option that is none of these.
    """
    require_hub_options(hub_options)
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
