"""Evaluation: what is measured, in whose features, and under which protocol.

    from ecar.evaluation import evaluate
    report = evaluate("checkpoints/mnist", "mnist", num_images=5000, report="evaluation.json")

The parts work alone: `frechet_distance`, `inception_score` and `precision_recall` take features,
`evaluate_images` takes pictures from anywhere, and an extractor is any callable
images [B, C, H, W] in [-1, 1] -> (features [B, F], logits [B, K] or None).
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DigitClassifier": "classifier",
    "InceptionExtractor": "extractors",
    "draw_labels": "sampling",
    "evaluate": "report",
    "evaluate_images": "report",
    "extract": "extractors",
    "feature_statistics": "metrics",
    "frechet_distance": "metrics",
    "frechet_distance_of_features": "metrics",
    "generate": "sampling",
    "inception_score": "metrics",
    "precision_recall": "metrics",
    "save_npz": "export",
    "summary": "report",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `python -m ecar.evaluation.classifier` does not import itself.
    if name not in _HOMES:
        raise AttributeError(f"module 'ecar.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
