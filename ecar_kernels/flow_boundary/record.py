"""The boundary between two network calls of a stage, declared."""

import torch

from ecar_kernels import _native
from ecar_kernels.flow_step.record import HISTORY_INVALID
from ecar_kernels.ops import (
    DT,
    EPS,
    GUIDANCE_SCALE,
    Cost,
    Family,
    Implementation,
    Op,
    guided,
    history,
    modulation,
    tensor,
)

FAMILY = Family(
    "flow_boundary",
    ops=(
        Op(
            "flow_boundary",
            "from the last block to the next step's tokens; inference",
            (
                tensor("x", "[R, N, C]"),
                tensor("state", "[B, N, P]", either=torch.float32),
                *modulation("shift", "scale", rows="R"),
                tensor("weight", "[P, C]", weight=True, contiguous=True),
                tensor("bias", "[P]", contiguous=True),
                tensor("embed_weight", "[C, P]", weight=True, contiguous=True),
                tensor("embed_bias", "[C]", contiguous=True),
                tensor("positions", "[N, C]", contiguous=True),
                DT,
                GUIDANCE_SCALE,
                EPS,
                *history("[B, N, P]", like="state"),
            ),
            {
                "cpp": Implementation(
                    "ecar_kernels.flow_boundary.cpp:flow_boundary",
                    devices=("cpu",),
                    max_width=8192,
                    missing=_native.why_not,
                ),
                "cuda": Implementation(
                    "ecar_kernels.flow_boundary.cuda:flow_boundary",
                    chained="ecar_kernels.flow_boundary.cuda:flow_boundary_chained",
                    devices=("cuda",),
                    max_width=8192,
                    missing=_native.why_not_cuda,
                ),
            },
            rules=(
                lambda sizes, given: sizes["R"] in (sizes["B"], 2 * sizes["B"]),
                lambda sizes, given: 1 <= sizes["P"] <= 64,
                guided("R", "B"),
            ),
            invalid=HISTORY_INVALID,
            gradients="refused",
            cost=Cost(
                lambda sizes, given: (
                    (sizes["R"] + sizes["B"]) * sizes["N"] * sizes["C"] * sizes["P"]
                )
            ),
        ),
    ),
)
