"""Deprecated: this module's names are in ``ecar.sampling``."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from ecar import sampling

if TYPE_CHECKING:
    from ecar.sampling import *  # noqa: F403

__all__ = list(sampling.__all__)


if not TYPE_CHECKING:  # type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        warnings.warn(
            f"ecar.sampler.{name} is deprecated and will be removed in 0.2: import it from "
            "ecar.sampling",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(sampling, name)
