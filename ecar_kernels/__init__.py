"""Ops for stage-wise flow transformers: stage attention, adaLN flow blocks, the flow step.

Each op has a pure PyTorch reference and, where it pays, faster backends; `use_backend` chooses,
`python -m ecar_kernels` says which are available and why not. `accelerate` binds a model's
modules to a backend ahead of time. The ops `adaln` and
`stage_attention` share their names with the families' folders: `ecar_kernels.adaln` is the op,
and `from ecar_kernels.adaln import reference` still finds the module.
"""

from ecar_kernels import integrations as integrations  # registers them
from ecar_kernels.acceleration import Accelerated, accelerates
from ecar_kernels.adaln.api import adaln, gated_residual, gated_residual_adaln
from ecar_kernels.bound import BoundFlowStep, BoundStageBlocks
from ecar_kernels.flow_block.api import adaln_linear, linear_gated_residual
from ecar_kernels.flow_boundary.api import flow_boundary
from ecar_kernels.flow_step.api import euler_step, initial_noise, upsample_renoise_euler
from ecar_kernels.flow_step.reference import haar_high_pass
from ecar_kernels.modules import (
    MLP,
    AdaLN,
    FlowBlock,
    GatedResidual,
    Linear,
    OpsModule,
    StageAttention,
    StageBlock,
)
from ecar_kernels.registry import (
    RECORDS,
    BackendUnavailableError,
    active_backend,
    backends,
    resolve,
    use_backend,
)
from ecar_kernels.stage_attention.api import stage_attention
from ecar_kernels.swapping import accelerate, report, restore
from ecar_kernels.version import __version__

__all__ = [
    "MLP",
    "Accelerated",
    "AdaLN",
    "BackendUnavailableError",
    "BoundFlowStep",
    "BoundStageBlocks",
    "FlowBlock",
    "GatedResidual",
    "Linear",
    "OpsModule",
    "StageAttention",
    "StageBlock",
    "__version__",
    "accelerate",
    "accelerates",
    "active_backend",
    "adaln",
    "adaln_linear",
    "backends",
    "euler_step",
    "flow_boundary",
    "gated_residual",
    "gated_residual_adaln",
    "haar_high_pass",
    "initial_noise",
    "linear_gated_residual",
    "report",
    "resolve",
    "restore",
    "stage_attention",
    "upsample_renoise_euler",
    "use_backend",
]

# Ops that the lines above, which are for type checkers, do not name: a record makes an op public.
for _op in RECORDS.values():
    globals()[_op.name] = _op.public
    if _op.name not in __all__:
        __all__.append(_op.name)
