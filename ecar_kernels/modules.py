"""Drop-in modules built on the ops; `ecar_kernels.accelerate` binds each to a backend.

All work on tokens [B, N, C] in float32, bfloat16 or float16, all of one type on one device.
Errors are those of the ops. Modulations have a part for the token and, optionally, one for the
step, as in `ecar_kernels.adaln`.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from ecar_kernels import recompute
from ecar_kernels.acceleration import (
    PUBLIC,
    Accelerated,
    Ops,
    accelerates,
    server,
    unit_gate,
)


class KVCache(Protocol):
    """What an attention writes its keys and values to when it goes on stage by stage."""

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest stage's [B, n, H, D]; all stages' so far, [B, N, H, D]."""


class OpsModule(nn.Module):
    """Base of modules that call their ops through `self.ops(x)`.

    So an accelerated class, whose `ops` are bound ones, can have nothing to override:

        @ecar_kernels.accelerates(Block)
        class AcceleratedBlock(ecar_kernels.Accelerated, Block):
            uses = ("adaln",)
    """

    def ops(self, x: Tensor) -> Ops:
        """The ops for x [.., C]: here the public ones."""
        return PUBLIC


class AdaLN(OpsModule):
    """LN(x) (1 + scale + step_scale) + shift + step_shift; no parameters.

    Args:
        eps: added to the variance.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, step_shift: Tensor | None = None,
                step_scale: Tensor | None = None) -> Tensor:
        """As `ecar_kernels.adaln`: x [B, N, C] -> [B, N, C]."""
        return self.ops(x).adaln(x, shift, scale, step_shift=step_shift, step_scale=step_scale,
                                 eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class GatedResidual(OpsModule):
    """x + (gate + step_gate) branch; no parameters."""

    def forward(self, x: Tensor, branch: Tensor, gate: Tensor,
                step_gate: Tensor | None = None) -> Tensor:
        """As `ecar_kernels.gated_residual`: [B, N, C]."""
        return self.ops(x).gated_residual(x, branch, gate, step_gate=step_gate)


class Linear(nn.Linear):
    """nn.Linear, with the same arguments, which `accelerate` may serve from packed weights."""

    def product(self, x: Tensor) -> Tensor:
        """x weight^T, without the bias."""
        return F.linear(x, self.weight)

    def served(self, x: Tensor) -> Iterator[tuple[str, str]]:
        """As `acceleration.served`."""
        yield "Linear", "torch"


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

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"argument 'heads': expected a divisor of width={width}, got {heads}")
        self.width, self.heads, self.head_dim = width, heads, width // heads

    def attend(self, qkv: Tensor, stage_lengths: Sequence[int] | None = None,
               cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """[B, n, 3 C] -> [B, n, C]; without lengths, all tokens are one stage."""
        b, n = qkv.shape[:2]
        q, k, v = qkv.view(b, n, 3, self.heads, self.head_dim).unbind(2)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        run = self.ops(q).stage_attention
        return run(q, k, v, stage_lengths or (n,)).reshape(b, n, self.width)

    def _served(self, x: Tensor, *, fused: bool) -> Iterator[tuple[str, str]]:
        ops = self.ops(x)
        yield "stage_attention", server(ops, "stage_attention", x[..., :self.head_dim])
        if not fused:
            return
        for op, layers in (("adaln_linear", (self.qkv, self.mlp.fc1)),
                           ("linear_gated_residual", (self.proj, self.mlp.fc2))):
            for layer in layers:
                yield op, server(ops, op, x, layer.weight)

    def feed_forward(self, z: Tensor, *made: object) -> Tensor:
        """self.mlp(z), for blocks that have one; `made`: of what z is, as in `recompute`."""
        if not recompute.as_written(self.mlp, MLP):
            return self.mlp(z)
        return self.mlp.project(recompute.linear(self.mlp.fc1, z, *made))


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

    def forward(self, x: Tensor, stage_lengths: Sequence[int] | None = None,
                cache: KVCache | None = None, layer: int = 0) -> Tensor:
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

    def __init__(self, width: int, heads: int, mlp_width: int | None = None, *,
                 eps: float = 1e-6) -> None:
        super().__init__(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, mlp_width)

    def attention(self, x: Tensor, stage_lengths: Sequence[int] | None = None,
                  cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """The attention's branch, which the residual stream adds."""
        qkv = recompute.linear(self.qkv, *recompute.layer_norm(self.norm1, x))
        return self.proj(self.attend(qkv, stage_lengths, cache, layer))

    def forward(self, x: Tensor, stage_lengths: Sequence[int] | None = None,
                cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """[B, N, C] -> [B, N, C]; arguments as those of `StageAttention`."""
        x = x + self.attention(x, stage_lengths, cache, layer)
        return x + self.feed_forward(*recompute.layer_norm(self.norm2, x))

    def served(self, x: Tensor) -> Iterator[tuple[str, str]]:
        """As `acceleration.served`."""
        yield from self._served(x, fused=False)
        yield "StageBlock", "torch"


class FlowBlock(_Attention):
    """DiT's adaLN-zero block; its six modulations are given, not computed here.

    Args:
        width: channels C.
        heads: a divisor of C.
        mlp_width: None for 4 C.
        eps: added to the variance.
    """

    def __init__(self, width: int, heads: int, mlp_width: int | None = None, *,
                 eps: float = 1e-6) -> None:
        super().__init__(width, heads)
        self.eps = eps
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = MLP(width, mlp_width)

    def forward(
        self, x: Tensor, y: Tensor, spatial: Sequence[Tensor], step: Sequence[Tensor],
        begun: Sequence[Tensor] | None = None,
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
        made = (y,) if begun is None else recompute.adaln(y, x, *begun, self.eps)
        gate, shift, scale, mlp_gate, next_shift, next_scale = spatial
        t_gate, t_shift, t_scale, t_mlp_gate, t_next_shift, t_next_scale = step
        run = self.ops(x).gated_residual_adaln
        x, y = run(
            x, self.proj(self.attend(recompute.linear(self.qkv, *made))), gate, shift, scale,
            step_gate=t_gate, step_shift=t_shift, step_scale=t_scale, eps=self.eps,
        )
        made = recompute.adaln(y, x, shift, scale, t_shift, t_scale, self.eps)
        return run(
            x, self.feed_forward(*made), mlp_gate, next_shift, next_scale,
            step_gate=t_mlp_gate, step_shift=t_next_shift, step_scale=t_next_scale, eps=self.eps,
        )

    def infer(self, x: Tensor, spatial: Sequence[Tensor], step: Sequence[Tensor]) -> Tensor:
        """The inference path: five launches, the normalised stream never reaches memory.

        Args:
            x: residual stream [B, N, C].
            spatial, step: six parts each, [B, N, C] and [1, 1, C] or [B, 1, C]: shift, scale
                and gate of the attention, then of the MLP.

        Returns:
            The residual stream [B, N, C].
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = spatial
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = step
        ops, mlp = self.ops(x), self.mlp
        qkv = ops.adaln_linear(x, shift, scale, self.qkv.weight, self.qkv.bias,
                               step_shift=t_shift, step_scale=t_scale, eps=self.eps)
        x = ops.linear_gated_residual(self.attend(qkv), self.proj.weight, self.proj.bias, gate, x,
                                      step_gate=t_gate)
        hidden = ops.adaln_linear(x, mlp_shift, mlp_scale, mlp.fc1.weight, mlp.fc1.bias,
                                  step_shift=t_mlp_shift, step_scale=t_mlp_scale,
                                  activation="gelu_tanh", eps=self.eps)
        return ops.linear_gated_residual(hidden, mlp.fc2.weight, mlp.fc2.bias, mlp_gate, x,
                                         step_gate=t_mlp_gate)

    def served(self, x: Tensor) -> Iterator[tuple[str, str]]:
        """As `acceleration.served`, of `infer`."""
        return self._served(x, fused=True)


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
        return self._multiply(x, self.bias, super().forward)

    def product(self, x: Tensor) -> Tensor:
        return self._multiply(x, None, super().product)

    def served(self, x):
        if self._packs(x):
            yield "linear_gated_residual", server(self.ops(x), "linear_gated_residual", x,
                                                  self.weight)
        else:
            yield from super().served(x)

    def _packs(self, x):
        """Elsewhere the libraries' own GEMM is the one to take."""
        ops = self.ops(x)
        return (ops is not PUBLIC and x.ndim >= 2 and x.numel() > 0
                and server(ops, "linear_gated_residual", x) == "native")

    def _multiply(self, x, bias, plain):
        if not self._packs(x):
            return plain(x)
        tokens = x.reshape(-1, *x.shape[-2:])
        images, count = tokens.shape[:2]
        nothing = x.new_zeros(1, 1, self.out_features).expand(images, count, -1)
        return self.ops(x).linear_gated_residual(
            tokens, self.weight, bias, unit_gate(tokens, self.out_features), nothing
        ).view(*x.shape[:-1], -1)


@accelerates(StageBlock)
class AcceleratedStageBlock(Accelerated, StageBlock):
    """Five launches as in a flow block: LayerNorm's weight and bias are the modulation."""

    uses = ("adaln_linear", "stage_attention", "linear_gated_residual")
    weights = ("qkv.weight", "proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")

    def forward(self, x, stage_lengths=None, cache=None, layer=0):
        ops, mlp = self.ops(x), self.mlp
        if ops is PUBLIC or not self._has_plain_norms():
            return super().forward(x, stage_lengths, cache, layer)
        one = unit_gate(x, self.width)
        qkv = ops.adaln_linear(x, **_modulation(self.norm1, len(x)), weight=self.qkv.weight,
                               bias=self.qkv.bias)
        x = ops.linear_gated_residual(self.attend(qkv, stage_lengths, cache, layer),
                                      self.proj.weight, self.proj.bias, one, x)
        hidden = ops.adaln_linear(x, **_modulation(self.norm2, len(x)), weight=mlp.fc1.weight,
                                  bias=mlp.fc1.bias, activation="gelu_tanh")
        return ops.linear_gated_residual(hidden, mlp.fc2.weight, mlp.fc2.bias, one, x)

    def served(self, x):
        if self.ops(x) is PUBLIC or not self._has_plain_norms():
            return super().served(x)
        return self._served(x, fused=True)

    def _has_plain_norms(self):
        return all(recompute.as_written(norm, nn.LayerNorm)
                   and norm.weight is not None and norm.bias is not None
                   for norm in (self.norm1, self.norm2))


def _modulation(norm: nn.LayerNorm, batch: int) -> dict:
    """adaLN's arguments with which it is this LayerNorm: views of its parameters, no copy."""
    return {"shift": norm.bias.expand(batch, 1, -1), "scale": norm.weight.expand(batch, 1, -1),
            "scale_offset": 0.0, "eps": norm.eps}
