"""E-CAR: efficient continuous autoregressive image generation, by stages.

The names below are loaded on first use, so that ``import ecar`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecar.config import PRESETS as PRESETS
    from ecar.config import ECARConfig as ECARConfig
    from ecar.hub import recommended_dtype as recommended_dtype
    from ecar.model import ECAR as ECAR
    from ecar.pipeline import ECARPipeline as ECARPipeline
    from ecar.sampling import release_graphs as release_graphs
    from ecar.sampling import sample as sample
    from ecar.sampling import split_steps as split_steps
    from ecar.sampling import why_not_graphs as why_not_graphs
    from ecar_kernels.version import __version__ as __version__

_HOMES = {
    "ECAR": "ecar.model",
    "ECARConfig": "ecar.config",
    "ECARPipeline": "ecar.pipeline",
    "PRESETS": "ecar.config",
    "__version__": "ecar_kernels.version",
    "recommended_dtype": "ecar.hub",
    "release_graphs": "ecar.sampling",
    "sample": "ecar.sampling",
    "split_steps": "ecar.sampling",
    "why_not_graphs": "ecar.sampling",
}

__all__ = sorted(_HOMES)


if not TYPE_CHECKING:  # type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'ecar' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
