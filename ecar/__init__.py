"""E-CAR: efficient continuous autoregressive image generation, by stages.

The names below are loaded on first use, so that ``import ecar`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ECAR": "ecar.model",
    "ECARConfig": "ecar.config",
    "ECARPipeline": "ecar.pipeline",
    "PRESETS": "ecar.config",
    "release_graphs": "ecar.sampling",
    "sample": "ecar.sampling",
    "split_steps": "ecar.sampling",
    "why_not_graphs": "ecar.sampling",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ecar' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
