"""The paper's Table 2: parameters and multiply-adds.

Counted from the modules on the meta device: one 256 x 256 image by the paper's protocol of 250 even
Euler steps with classifier-free guidance. The paper calls multiply-adds FLOPs. DiT is diffusers',
which has a time and a label embedding in every block; the published model shares one.
"""

import functools
import operator
import sys
from typing import Any

from benchmarks import commands
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


def count(model: str) -> dict[str, list[dict[str, Any]]]:
    """A model's row."""
    if model == "DiT-XL/2":
        parameters, products = dit.count(dit.SIZES["XL"], PAPER_STEPS, guided=True)
    else:
        config = ECARConfig.preset(model[-1])
        # Any scale but 1 adds unconditional rows.
        stages = count_multiply_adds(config, steps=PAPER, guidance_scale=2.0)
        parameters, products = count_parameters(config)["total"], sum(s.total for s in stages)
    return {"rows": [{"model": model, "parameters": parameters, "multiply_adds": products}]}


def render(record: dict[str, Any]) -> str:
    lines = [
        (row["model"], f"{row['parameters'] * 1e-6:.1f} M", f"{PAPERS[row['model']][0]} M",
         f"{row['multiply_adds'] * 1e-12:.2f} T", f"{PAPERS[row['model']][1]:g} T")
        for row in record["rows"]
    ]  # fmt: skip
    return markdown(("model", "parameters", "paper", "multiply-adds", "paper"), lines)


main = functools.partial(
    commands.main, "paper.table2", __doc__, count, list(PAPERS), render,
    same=operator.itemgetter("model"), order=[*PAPERS],
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
