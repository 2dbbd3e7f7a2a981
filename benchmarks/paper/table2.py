"""The paper's Table 2: parameters and multiply-adds.

Counted from the modules on the meta device: one 256 x 256 image by the paper's protocol of 250 even
Euler steps with classifier-free guidance. The paper calls multiply-adds FLOPs. DiT is diffusers',
which has a time and a label embedding in every block; the published model shares one.
"""

from typing import Any

from benchmarks import results
from benchmarks.paper import dit
from benchmarks.results import markdown
from ecar import ECARConfig
from ecar.info import count_multiply_adds, count_parameters
from ecar.sampling.guidance import PAPER, PAPER_STEPS

# Parameters in millions and multiply-adds in units of 10^12.
PAPERS = {
    "E-CAR-S": (155, 1.0),
    "E-CAR-B": (511, 3.2),
    "E-CAR-L": (854, 5.8),
    "DiT-XL/2": (675, 60),
}


def count(model: str) -> tuple[int, int]:
    if model == "DiT-XL/2":
        return dit.count(dit.SIZES["XL"], PAPER_STEPS, guided=True)
    config = ECARConfig.preset(model[-1])
    # Any scale but 1 adds unconditional rows.
    stages = count_multiply_adds(config, steps=PAPER, guidance_scale=2.0)
    return count_parameters(config)["total"], sum(stage.total for stage in stages)


def rows() -> list[dict[str, Any]]:
    keys = ("model", "parameters", "multiply_adds")
    return [dict(zip(keys, (model, *count(model)), strict=True)) for model in PAPERS]


def render(record: dict[str, Any]) -> str:
    lines = [
        (row["model"], f"{row['parameters'] * 1e-6:.1f} M", f"{PAPERS[row['model']][0]} M",
         f"{row['multiply_adds'] * 1e-12:.2f} T", f"{PAPERS[row['model']][1]:g} T")
        for row in record["rows"]
    ]  # fmt: skip
    return markdown(("model", "parameters", "paper", "multiply-adds", "paper"), lines)


if __name__ == "__main__":
    options = results.parser("paper.table2", __doc__).parse_args()
    file = results.path("table2", options.results)
    results.finish(file, "table2", results.describe(), render, rows=rows())
