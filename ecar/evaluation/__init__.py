"""Evaluation: what is measured, in whose features, and under which protocol.

    from ecar.evaluation import evaluate
    report = evaluate("checkpoints/mnist", "mnist", num_images=5000, report="evaluation.json")

The parts work alone: `frechet_distance`, `inception_score` and `precision_recall` take features,
`evaluate_images` takes pictures from anywhere, and an extractor is any callable
images [B, C, H, W] in [-1, 1] -> (features [B, F], logits [B, K] or None).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecar.evaluation.classifier import Classifier as Classifier
    from ecar.evaluation.export import save_npz as save_npz
    from ecar.evaluation.extractors import InceptionExtractor as InceptionExtractor
    from ecar.evaluation.extractors import extract as extract
    from ecar.evaluation.measure import evaluate_images as evaluate_images
    from ecar.evaluation.metrics import feature_statistics as feature_statistics
    from ecar.evaluation.metrics import frechet_distance as frechet_distance
    from ecar.evaluation.metrics import frechet_distance_of_features as frechet_distance_of_features
    from ecar.evaluation.metrics import inception_score as inception_score
    from ecar.evaluation.metrics import precision_recall as precision_recall
    from ecar.evaluation.neighbours import nearest_training as nearest_training
    from ecar.evaluation.report import evaluate as evaluate
    from ecar.evaluation.report import summary as summary
    from ecar.evaluation.sampling import draw_labels as draw_labels
    from ecar.evaluation.sampling import generate as generate
    from ecar.evaluation.steps import best_row as best_row
    from ecar.evaluation.steps import sweep_steps as sweep_steps
    from ecar.evaluation.steps import write_best as write_best

_HOMES = {
    "Classifier": "classifier",
    "InceptionExtractor": "extractors",
    "best_row": "steps",
    "draw_labels": "sampling",
    "evaluate": "report",
    "evaluate_images": "measure",
    "extract": "extractors",
    "feature_statistics": "metrics",
    "frechet_distance": "metrics",
    "frechet_distance_of_features": "metrics",
    "generate": "sampling",
    "inception_score": "metrics",
    "nearest_training": "neighbours",
    "precision_recall": "metrics",
    "save_npz": "export",
    "summary": "report",
    "sweep_steps": "steps",
    "write_best": "steps",
}

__all__ = sorted(_HOMES)


if not TYPE_CHECKING:  # type checkers would accept any name

    def __getattr__(name: str) -> Any:
        # On first use, so that `python -m ecar.evaluation.classifier` does not import itself.
        if name not in _HOMES:
            raise AttributeError(f"module 'ecar.evaluation' has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
