"""Write the checkpoints' figures into README.md, from their evaluation.json and train.json.

    python tools/update_readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from ecar.files import atomic_path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: evaluation -->", "<!-- end of figures -->"
COLUMNS = ("checkpoint", "read as the class asked for", "Fréchet distance, generated",
           "the same, real", "ratio", "precision", "recall", "steps", "guidance")


def figures(root: Path = ROOT) -> str:
    """The table between the markers: one row for each checkpoint that has been evaluated."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for path in sorted(root.glob("checkpoints/*/evaluation.json")):
        report = json.loads(path.read_text("utf-8"))
        metrics, real, protocol = report["metrics"], report["real"], report["protocol"]
        sampling = protocol["sampling"]
        rows.append((
            f"[`{path.parent.name}`](checkpoints/{path.parent.name}/README.md)",
            f"{metrics['label_accuracy']:.2%} of {protocol['generated_images']:,}",
            f"{metrics['frechet_distance_matched']:.3f}",
            f"{real['frechet_distance']:.3f} ({protocol['real_train_images']:,} images)",
            f"{metrics['frechet_ratio']:.2f}",
            f"{metrics['precision']:.3f}",
            f"{metrics['recall']:.3f}",
            str(sampling["num_inference_steps"]),
            f"{sampling['guidance_scale']:g}",
        ))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def updated(readme: str) -> str:
    """README.md with the table between its markers."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if len(pattern.findall(readme)) != 1:
        raise ValueError(f"README.md: expected one {BEGIN} .. {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{figures()}\n{END}", readme)


if __name__ == "__main__":
    page = ROOT / "README.md"
    text = updated(page.read_text("utf-8"))
    with atomic_path(page) as temporary:
        temporary.write_text(text, "utf-8")
