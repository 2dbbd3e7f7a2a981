"""The paper's Table 2: parameters and multiply-adds.

Counted, not measured: from the modules on the meta device, one 256 x 256 image by the paper's
protocol (250 even steps of Euler's) with classifier-free guidance. The paper calls multiply-adds
FLOPs. diffusers' DiT has a time and a label embedding in every block, which the published model
shares.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks import results
from benchmarks.models import STEPS
from benchmarks.paper import dit
from benchmarks.results import markdown
from ecar import ECARConfig
from ecar.info import count_multiply_adds, count_parameters
from ecar.sampling.guidance import PAPER_STEPS

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
    parameters, multiply_adds = dit.count(dit.SIZES["XL"], PAPER_STEPS, guided=True)
    return [*rows, {"model": "DiT-XL/2", "parameters": parameters, "multiply_adds": multiply_adds}]


def render(record: dict[str, Any]) -> str:
    rows = [
        (
            row["model"],
            f"{row['parameters'] * 1e-6:.1f} M",
            f"{PAPER[row['model']][0]} M",
            f"{row['multiply_adds'] * 1e-12:.2f} T",
            f"{PAPER[row['model']][1]:g} T",
        )
        for row in record["rows"]
    ]
    return markdown(("model", "parameters", "paper", "multiply-adds", "paper"), rows) + (
        f"\n\nOne 256 x 256 image by the paper's protocol, {PAPER_STEPS} steps, with "
        "classifier-free guidance; counted from the\nmodules. DiT is diffusers', which has a time "
        "and a label embedding in each block."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = results.parser("paper.table2", __doc__).parse_args(arguments)
    results.finish(options.results, "table2", results.describe(), render, rows=count())


if __name__ == "__main__":
    main()
