"""Drop-in modules built on the ops; `ecar_kernels.accelerate` binds each to a backend.

All work on tokens [B, N, C] in float32, bfloat16 or float16, all of one type on one device, or in
float64 on the references. Errors are those of the ops. Modulations have a part for the token and,
optionally, one for the step, as in `ecar_kernels.adaln`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from ecar_kernels import fused, recompute
from ecar_kernels._written import as_written, remember
from ecar_kernels.acceleration import PUBLIC, Accelerated, Ops, accelerates
from ecar_kernels.fused import rows


class KVCache(Protocol):
    """What an attention writes its keys and values to when it goes on stage by stage; a product on
    a GPU does so itself where the class has also `room(layer, B, n)`: it returns what `write` does
    and writes nothing."""

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest stage's [B, n, H, D]; all stages' so far, [B, N, H, D]."""


class OpsModule(nn.Module):
    """Base of modules that call their ops through `self.ops(x)`.

    So an accelerated class, whose `ops` are bound ones, can have nothing to override:

        @ecar_kernels.accelerates(Block)
        class AcceleratedBlock(ecar_kernels.Accelerated, Block):
            uses = ("adaln",)
    """

    def ops(self, x: Tensor, *like: Tensor | None) -> Ops:
        """The ops for x [.., C] and for tensors like it: here the public ones."""
        return PUBLIC


class AdaLN(OpsModule):
    """LN(x) (1 + scale + step_scale) + shift + step_shift; no parameters.

    Args:
        eps: added to the variance.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(
        self,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        step_shift: Tensor | None = None,
        step_scale: Tensor | None = None,
    ) -> Tensor:
        """As `ecar_kernels.adaln`: x [B, N, C] -> [B, N, C]."""
        made: Any = tuple(map(rows, (x, shift, scale, step_shift, step_scale)))
        x, shift, scale, step_shift, step_scale = made
        return self.ops(*made).adaln(
            x, shift, scale, step_shift=step_shift, step_scale=step_scale, eps=self.eps
        )

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class GatedResidual(OpsModule):
    """x + (gate + step_gate) branch; no parameters."""

    def forward(
        self, x: Tensor, branch: Tensor, gate: Tensor, step_gate: Tensor | None = None
    ) -> Tensor:
        """As `ecar_kernels.gated_residual`: [B, N, C]."""
        made: Any = tuple(map(rows, (x, branch, gate, step_gate)))
        x, branch, gate, step_gate = made
        return self.ops(*made).gated_residual(x, branch, gate, step_gate=step_gate)


class Linear(nn.Linear):
    """nn.Linear, with the same arguments, which `accelerate` may serve from packed weights."""

    def product(self, x: Tensor) -> Tensor:
        """x weight^T, without the bias."""
        return F.linear(x, self.weight)


class MLP(nn.Module):
    """width -> hidden -> width with GELU (tanh).

    Args:
        width: channels C.
        hidden: None for 4 C.
    """

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden or 4 * width)
        self.fc2 = Linear(hidden or 4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.fc1(x))

    def project(self, x: Tensor) -> Tensor:
        """The second half, of tokens before their GELU: [.., hidden] -> [.., C]."""
        return recompute.gelu_linear(self.fc2, x)


class _Attention(OpsModule):
    """What has a packed projection to q, k, v, and heads that attend over stages."""

    mlp: MLP  # of blocks that have one

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"argument 'heads': expected a divisor of width={width}, got {heads}")
        self.width, self.heads, self.head_dim = width, heads, width // heads

    def attend(
        self,
        qkv: Tensor | tuple[Tensor, Tensor, Tensor],
        stage_lengths: Sequence[int] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """[B, n, 3 C], or its parts -> [B, n, C]; without lengths, all tokens are one stage."""
        if isinstance(qkv, Tensor):
            q, k, v = rows(qkv).view(*qkv.shape[:2], 3, self.heads, self.head_dim).unbind(2)
            if cache is not None:
                k, v = cache.write(layer, k, v)
        else:
            q, k, v = qkv
        b, n = q.shape[:2]
        lengths = stage_lengths or (n,)
        ops = self.ops(q) if _fits(lengths, q, k) else PUBLIC
        return ops.stage_attention(q, k, v, lengths).reshape(b, n, self.width)

    def feed_forward(self, z: Tensor, *made: Any) -> Tensor:
        """self.mlp(z), for blocks that have one; `made`: of what z is, as in `recompute`."""
        if not as_written(self.mlp, MLP):
            return self.mlp(z)
        return self.mlp.project(recompute.linear(self.mlp.fc1, z, *made))


def _fits(stage_lengths: Sequence[int], q: Tensor, k: Tensor) -> bool:
    """Bound ops do not look; where this is false, the public one says what is wrong."""
    if type(stage_lengths) not in (tuple, list) or k.dtype is not q.dtype:
        return False
    queries, keys = q.shape[1], k.shape[1]
    return sum(stage_lengths) == keys and (queries == keys or queries == stage_lengths[-1])


class StageAttention(_Attention):
    """Multi-head attention that is block-causal over stages, with its projections.

    Args:
        width: channels C.
        heads: a divisor of C.
        bias: of both projections.
    """

    def __init__(self, width: int, heads: int, *, bias: bool = True) -> None:
        super().__init__(width, heads)
        self.qkv = Linear(width, 3 * width, bias=bias)
        self.proj = Linear(width, width, bias=bias)

    def forward(
        self,
        x: Tensor,
        stage_lengths: Sequence[int] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """A token sees those of its own stage and of earlier ones: [B, N, C] -> [B, N, C].

        stage_lengths: tokens of each stage; None: all tokens are one stage. cache: x is the
        newest stage alone, and keys and values of those before are in the cache, as layer
        `layer`.
        """
        return self.proj(self.attend(self.qkv(x), stage_lengths, cache, layer))


class StageBlock(_Attention):
    """A pre-LN transformer layer, block-causal over stages: attention, then an MLP.

    Args:
        width: channels C.
        heads: a divisor of C.
        mlp_width: None for 4 C.
        eps: added to the variance.
    """

    def __init__(
        self, width: int, heads: int, mlp_width: int | None = None, *, eps: float = 1e-6
    ) -> None:
        super().__init__(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, mlp_width)

    def attention(
        self,
        x: Tensor,
        stage_lengths: Sequence[int] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """The attention's branch, which the residual stream adds."""
        qkv = recompute.linear(self.qkv, *recompute.layer_norm(self.norm1, x))
        return self.proj(self.attend(qkv, stage_lengths, cache, layer))

    def forward(
        self,
        x: Tensor,
        stage_lengths: Sequence[int] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """[B, N, C] -> [B, N, C]; arguments as those of `StageAttention`."""
        x = x + self.attention(x, stage_lengths, cache, layer)
        return x + self.feed_forward(*recompute.layer_norm(self.norm2, x))


class FlowBlock(_Attention):
    """DiT's adaLN-zero block; its six modulations are given, not computed here.

    Args:
        width: channels C.
        heads: a divisor of C.
        mlp_width: None for 4 C.
        eps: added to the variance.
    """

    def __init__(
        self, width: int, heads: int, mlp_width: int | None = None, *, eps: float = 1e-6
    ) -> None:
        super().__init__(width, heads)
        self.eps = eps
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = MLP(width, mlp_width)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        spatial: Sequence[Tensor],
        step: Sequence[Tensor],
        begun: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The training path: the residual stream is touched twice.

        Args:
            x: residual stream [B, N, C].
            y: this block's normalised and modulated input [B, N, C].
            spatial, step: six parts each, [B, N, C] and [B, 1, C]: this block's gate, the MLP's
                shift and scale, its gate, then the shift and scale with which the next block
                (or the final layer) begins.
            begun: the shift, scale, step's shift and step's scale that made y of x, from which
                the backward then makes it anew; None to keep y for it.

        Returns:
            The residual stream, and the next block's y.
        """
        x, y = rows(x), rows(y)
        made = (y,) if begun is None else recompute.adaln(y, x, *begun, self.eps)
        gate, shift, scale, mlp_gate, next_shift, next_scale = map(rows, spatial)
        t_gate, t_shift, t_scale, t_mlp_gate, t_next_shift, t_next_scale = map(rows, step)
        run = PUBLIC.gated_residual_adaln
        steps = {"step_gate": t_gate, "step_shift": t_shift, "step_scale": t_scale}
        branch = self.proj(self.attend(recompute.linear(self.qkv, *made)))
        x, y = run(x, branch, gate, shift, scale, eps=self.eps, **steps)
        made = recompute.adaln(y, x, shift, scale, t_shift, t_scale, self.eps)
        steps = {"step_gate": t_mlp_gate, "step_shift": t_next_shift, "step_scale": t_next_scale}
        branch = self.feed_forward(*made)
        return run(x, branch, mlp_gate, next_shift, next_scale, eps=self.eps, **steps)

    def infer(self, x: Tensor, spatial: Sequence[Tensor], step: Sequence[Tensor]) -> Tensor:
        """The inference path: five launches; up to 512 rows nothing normalised reaches memory.

        Args:
            x: residual stream [B, N, C].
            spatial, step: six parts each, [B, N, C] and [1, 1, C] or [B, 1, C]: shift, scale
                and gate of the attention, then of the MLP.

        Returns:
            The residual stream [B, N, C].
        """
        return self.infer_chained(x, None, spatial, step, leaves=False)[0]

    def infer_chained(
        self,
        x: Tensor,
        statistics: Tensor | None,
        spatial: Sequence[Tensor],
        step: Sequence[Tensor],
        leaves: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """`infer` of one of several blocks: `statistics` are what the block before returned with x,
        or None; returned where this one `leaves` them, and where its layers are as written."""
        x = rows(x)
        parts = [rows(part) for part in (*spatial, *step)]
        (shift, scale, gate, *mlp), (t_shift, t_scale, t_gate, *t_mlp) = parts[:6], parts[6:]
        ops = self.ops(x, *parts)
        how: Any = {"statistics": statistics, "eps": self.eps}
        steps: Any = {"step_shift": t_shift, "step_scale": t_scale}
        qkv = fused.adaln_linear(ops, self.qkv, x, shift, scale, **steps, **how)
        x, how["statistics"] = fused.linear_gated_residual(
            ops, self.proj, self.attend(qkv), gate, x, step_gate=t_gate, leaves=True
        )
        shift, scale, gate = mlp
        steps = dict(zip(("step_shift", "step_scale", "step_gate"), t_mlp, strict=True))
        how |= {"leaves": leaves, **steps}
        return fused.mlp_gated_residual(ops, self.mlp, MLP, x, shift, scale, gate, **how)


@accelerates(AdaLN)
class AcceleratedAdaLN(Accelerated, AdaLN):
    uses = ("adaln",)


@accelerates(GatedResidual)
class AcceleratedGatedResidual(Accelerated, GatedResidual):
    uses = ("gated_residual",)


@accelerates(StageAttention)
class AcceleratedStageAttention(Accelerated, StageAttention):
    uses = ("stage_attention",)


@accelerates(FlowBlock)
class AcceleratedFlowBlock(Accelerated, FlowBlock):
    uses = ("adaln_linear", "stage_attention", "linear_gated_residual")
    weights = ("qkv.weight", "proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


@accelerates(Linear)
class AcceleratedLinear(Accelerated, Linear):
    """On the CPU the packed GEMM of `linear_gated_residual`, with a gate of 1 and no residual."""

    uses = ("linear_gated_residual",)
    weights = ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        return _multiply(self, x, self.bias, Linear.forward)

    def product(self, x: Tensor) -> Tensor:
        return _multiply(self, x, None, Linear.product)


def _multiply(layer: Linear, x: Tensor, bias: Tensor | None, plain: Callable) -> Tensor:
    ops = layer.ops(x) if isinstance(layer, Accelerated) else PUBLIC  # restored, and still called
    if not fused.multiplies(ops, layer, x):
        return plain(layer, x)
    return fused.product(ops, layer.weight, bias, x)


@accelerates(StageBlock)
class AcceleratedStageBlock(Accelerated, StageBlock):
    """Five launches as in a flow block: LayerNorm's weight and bias are the modulation."""

    uses = ("adaln_linear", "stage_attention", "linear_gated_residual")
    weights = ("qkv.weight", "proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    norms = ("norm1", "norm2")

    def forward(self, x, stage_lengths=None, cache=None, layer=0):
        given = x, None, stage_lengths, cache, layer
        return AcceleratedStageBlock.forward_chained(self, *given, leaves=False)[0]

    def forward_chained(
        self, x, statistics, stage_lengths=None, cache=None, layer=0, *, leaves=True
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` of one of several blocks; statistics, leaves: as in `FlowBlock`."""
        x = rows(x)
        ops = self.ops(x)
        if ops is PUBLIC or not isinstance(self, Accelerated):  # restored, and still called
            return StageBlock.forward(self, x, stage_lengths, cache, layer), None
        how = {"statistics": statistics}
        qkv: Any = fused.norm_linear_cached(ops, self.norm1, self.qkv, x, cache, layer, **how)
        if qkv is None:
            qkv = fused.norm_linear(ops, self.norm1, self.qkv, x, **how)
        branch = self.attend(qkv, stage_lengths, cache, layer)
        x, statistics = fused.linear_residual(ops, self.proj, branch, x, leaves=True)
        how = {"statistics": statistics, "leaves": leaves}
        return fused.norm_mlp_residual(ops, self.norm2, self.mlp, MLP, x, **how)


remember(AdaLN, GatedResidual, Linear, MLP, StageAttention, StageBlock, FlowBlock)
