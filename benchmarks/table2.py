"""`python -m benchmarks.table2`: parameters and multiply-adds beside the paper's Table 2.

Counted, not measured: from the modules on the meta device, one 256 x 256 image of 250 steps with
classifier-free guidance. The paper calls multiply-adds FLOPs. diffusers' DiT has a time and a
label embedding in every block, which the published model shares.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import dit, environment, results
from benchmarks.models import STEPS
from benchmarks.results import markdown
from ecar.config import ECARConfig
from ecar.info import count_multiply_adds, count_parameters

# Parameters in millions and multiply-adds in units of 10^12.
PAPER = {"E-CAR-S": (155, 1.0), "E-CAR-B": (511, 3.2), "E-CAR-L": (854, 5.8), "DiT-XL/2": (675, 60)}


def count() -> list[dict[str, Any]]:
    rows = []
    for size in ("S", "B", "L"):
        config = ECARConfig.preset(size)
        # Any scale but 1 adds unconditional rows.
        stages = count_multiply_adds(config, steps=STEPS, guidance_scale=2.0)
        rows.append(
            {
                "model": f"E-CAR-{size}",
                "parameters": count_parameters(config)["total"],
                "multiply_adds": sum(stage.total for stage in stages),
            }
        )
    parameters, multiply_adds = dit.count(dit.SIZES["XL"], STEPS, guided=True)
    rows.append({"model": "DiT-XL/2", "parameters": parameters, "multiply_adds": multiply_adds})
    return rows


def render(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        parameters, multiply_adds = PAPER[row["model"]]
        rows.append(
            (
                row["model"],
                f"{row['parameters'] * 1e-6:.1f} M",
                f"{parameters} M",
                f"{row['multiply_adds'] * 1e-12:.2f} T",
                f"{multiply_adds:g} T",
            )
        )
    table = markdown(("model", "parameters", "paper", "multiply-adds", "paper"), rows)
    return (
        f"{table}\n\nOne 256 x 256 image, {STEPS} steps, classifier-free guidance; counted "
        "from the modules.\nDiT is diffusers' own, which embeds time and label anew in each "
        "block."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table2", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=results.FOLDER,
        help="folder to write <device>/table2.json into",
    )
    options = parser.parse_args()
    facts, rows = environment.describe(), count()
    file = results.path("table2", options.results)
    results.write(file, "table2", facts, rows=rows)
    print(f"{render({'rows': rows})}\n\n{results.where(facts)}\n\nwrote {file}")


if __name__ == "__main__":
    main()
