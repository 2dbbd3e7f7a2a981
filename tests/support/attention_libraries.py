"""Stand-ins for attention libraries that need a GPU: their signatures and what they demand, and
in the place of their kernels their arithmetic in PyTorch's ops.

Signatures: flash-attn 2.7.0 to 2.8.3, xformers 0.0.35, torch 2.10 to 2.13.
"""

import itertools
import sys
from types import ModuleType, SimpleNamespace

import torch

from ecar_kernels.stage_attention import by_stage, sdpa_cudnn

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_number = itertools.count()


def _demand(*tensors, scale, max_width):
    """What a kernel that loads 16 bytes at once, and looks for the largest score before it scales,
    needs of its tensors [B, N, H, D]."""
    assert type(scale) is float and scale >= 0
    for x in tensors:
        width = x.shape[-1]
        assert x.dtype in SIXTEEN_BITS and x.numel()
        assert width % 8 == 0 and width <= max_width and x.stride(-1) == 1
        assert all(place * 2 % 16 == 0 for place in (*x.stride()[:-1], x.storage_offset()))


def forward(q, k, v, scale):
    """The output in q's dtype, and the logsumexp [B, H, Nq], natural, in float32."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().to(v.dtype)  # as kernels round them
    return torch.einsum("bhqk,bkhd->bqhd", weights.float(), v.float()).to(q.dtype), lse


def backward(grad, q, k, v, out, lse, scale):
    """As flash attention's: delta of the output as it was rounded."""
    q, k, v, out, wide = (x.float() for x in (q, k, v, out, grad))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale - lse[..., None]).exp()
    delta = torch.einsum("bqhd,bqhd->bhq", wide, out)
    of_weights = torch.einsum("bqhd,bkhd->bhqk", wide, v)
    of_scores = weights * (of_weights - delta[..., None]) * scale
    return (
        torch.einsum("bhqk,bkhd->bqhd", of_scores, k).to(grad.dtype),
        torch.einsum("bhqk,bqhd->bkhd", of_scores, q).to(grad.dtype),
        torch.einsum("bhqk,bqhd->bkhd", weights, wide).to(grad.dtype),
    )


def _flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    assert (dropout_p, causal, window_size, softcap, alibi_slopes) == (0, False, (-1, -1), 0, None)
    _demand(q, k, v, scale=softmax_scale, max_width=256)
    out, lse = forward(q, k, v, softmax_scale)
    return (out, lse, None) if return_attn_probs else out


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    assert (dropout_p, causal, softcap, alibi_slopes) == (0, False, 0, None)
    assert (window_size_left, window_size_right, deterministic) == (-1, -1, True)
    _demand(dout, q, k, v, out, dq, dk, dv, scale=softmax_scale, max_width=256)
    found = backward(dout, q, k, v, out, softmax_lse, softmax_scale)
    for result, to in zip(found, (dq, dk, dv), strict=True):
        to.copy_(result)
    return torch.empty_like(softmax_lse)


def _memory_efficient_attention_forward(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    return _memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias, p, scale, op=op, output_dtype=output_dtype
    )[0]


def _memory_efficient_attention_forward_requires_grad(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    assert (attn_bias, p, op, output_dtype) == (None, 0, None, None)
    _demand(query, key, value, scale=scale, max_width=256)
    return forward(query, key, value, scale)


def _memory_efficient_attention_backward(
    grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
):
    assert (attn_bias, p, op) == (None, 0, None)
    _demand(grad, output, query, key, value, scale=scale, max_width=256)
    return backward(grad, query, key, value, output, lse, scale)


def _cudnn(
    query,
    key,
    value,
    attn_bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    return_debug_mask=False,
    *,
    scale=None,
):
    assert (attn_bias, dropout_p, is_causal, return_debug_mask) == (None, 0, False, False)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    _demand(q, k, v, scale=scale, max_width=128)
    out, lse = forward(q, k, v, scale)
    lse = lse[..., None] if compute_log_sumexp else lse.new_empty(0)
    seed, offset = (torch.zeros((), dtype=torch.int64) for _ in range(2))
    return out.transpose(1, 2), lse, None, None, q.shape[1], k.shape[1], seed, offset, None


def _cudnn_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    philox_seed,
    philox_offset,
    attn_bias,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    *,
    scale=None,
):
    assert (attn_bias, cum_seq_q, cum_seq_k) == (None, None, None)
    assert (max_q, max_k, dropout_p, is_causal) == (query.shape[2], key.shape[2], 0, False)
    assert philox_seed.dtype == philox_offset.dtype == torch.int64
    tensors = [x.transpose(1, 2) for x in (grad_out, query, key, value, out)]
    _demand(*tensors, scale=scale, max_width=128)
    found = backward(*tensors, logsumexp.squeeze(-1), scale)
    return tuple(x.transpose(1, 2) for x in found)


def _module(name, **content):
    module = ModuleType(name)
    vars(module).update(content)
    return module


def stand_in(monkeypatch, name):
    """The library `name` as the test sees it: installed, or of another machine."""
    if name == "flash_attn":
        content = {
            "flash_attn_func": _flash_attn_func,
            "_flash_attn_backward": _flash_attn_backward,
        }
        modules = {"flash_attn": {}, "flash_attn.flash_attn_interface": content}
    elif name == "xformers":
        content = {
            f.__name__[1:]: f
            for f in (
                _memory_efficient_attention_forward,
                _memory_efficient_attention_forward_requires_grad,
                _memory_efficient_attention_backward,
            )
        }
        modules = {"xformers": {}, "xformers.ops": content}
    else:
        ops = SimpleNamespace(
            _scaled_dot_product_cudnn_attention=_cudnn,
            _scaled_dot_product_cudnn_attention_backward=_cudnn_backward,
        )
        monkeypatch.setattr(sdpa_cudnn, "_aten", ops)
        return
    for module, its in modules.items():
        monkeypatch.setitem(sys.modules, module, _module(module, **its))
    # Loaded by this test with the stand-in, and by none after it.
    backend = f"ecar_kernels.stage_attention.{name}"
    monkeypatch.setitem(sys.modules, backend, None)
    monkeypatch.delitem(sys.modules, backend)
    # Its ops are registered for this test as well.
    monkeypatch.setattr(by_stage, "NAMESPACE", namespace := f"ecar_stand_ins_{next(_number)}")
    monkeypatch.setattr(by_stage, "_library", torch.library.Library(namespace, "FRAGMENT"))
