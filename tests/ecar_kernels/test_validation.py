"""Every wrong argument is refused by name, before anything runs."""

import math

import pytest
import torch

from ecar_kernels import BackendUnavailableError, use_backend
from ecar_kernels.registry import BACKENDS, OPS, RECORDS
from tests.support.accuracy import tensors
from tests.support.ops import INFERENCE_ONLY, arguments, function, tensor_names

TENSORS = [(op, name) for op in OPS for name in tensor_names(op)]
LEADING = [(op, tensor_names(op)[0]) for op in OPS if tensor_names(op)]
FOLLOWING = [pair for pair in TENSORS if pair not in LEADING]


def call(op: str, **changes):
    return function(op)(**arguments(op) | changes)


def refused(op: str, error: type[Exception], message: str, **changes) -> None:
    with pytest.raises(error) as caught:
        call(op, **changes)
    assert type(caught.value) is error
    assert message in str(caught.value)


@pytest.mark.parametrize("op, name", TENSORS)
def test_not_a_tensor(op, name):
    refused(op, TypeError, f"argument '{name}': expected a tensor, got list", **{name: [1.0]})


@pytest.mark.parametrize("op, name", LEADING)
def test_the_leading_tensors_type(op, name):
    for dtype in (torch.int64, torch.bool, torch.complex64):
        value = torch.zeros(arguments(op)[name].shape, dtype=dtype)
        refused(
            op,
            TypeError,
            f"argument '{name}': expected torch.float32, torch.bfloat16, "
            f"torch.float16 or torch.float64, got {dtype}",
            **{name: value},
        )


@pytest.mark.parametrize("op, name", FOLLOWING)
def test_one_type_and_one_device(op, name):
    value, leading = arguments(op)[name], tensor_names(op)[0]
    (like,) = [its.like for its in RECORDS[op].arguments if its.name == name]
    if like:
        leading = like
    if op == "linear_gated_residual" and name in ("gate", "step_gate"):
        leading = "residual"  # what they modulate
    refused(
        op,
        TypeError,
        f"argument '{name}': expected torch.float32 like '{leading}', got torch.bfloat16",
        **{name: value.bfloat16()},
    )
    refused(
        op,
        ValueError,
        f"argument '{name}': expected a tensor on cpu like '{leading}', got meta",
        **{name: value.to("meta")},
    )


@pytest.mark.parametrize("op, name", TENSORS)
def test_the_last_dimension_is_contiguous(op, name):
    value = torch.repeat_interleave(arguments(op)[name], 2, dim=-1)[..., ::2]
    refused(
        op,
        ValueError,
        f"argument '{name}': expected a tensor whose last dimension is "
        f"contiguous, got strides {list(value.stride())}",
        **{name: value},
    )


@pytest.mark.parametrize("op, name", TENSORS)
def test_shapes(op, name):
    value = arguments(op)[name]
    wrong = [value[0], value[None], torch.tensor(1.0)]
    if (op, name) in FOLLOWING:
        wrong += [
            value[:, :-1] if value.ndim > 1 else value[:-1],
            value.new_zeros((*value.shape[:-1], value.shape[-1] + 1)),
        ]
    for bad in wrong:
        with pytest.raises(ValueError, match=f"argument '{name}': expected .*, got ") as caught:
            call(op, **{name: bad.contiguous()})
        assert f"got {list(bad.shape)}" in str(caught.value)


def test_a_shape_error_says_what_its_letters_stand_for():
    x = torch.zeros(2, 16, 64)
    with pytest.raises(ValueError) as caught:
        function("adaln")(x, torch.zeros(2, 3, 64), x)
    assert str(caught.value) == (
        "argument 'shift': expected a tensor of shape [B, N, C] or [B, 1, C] with B=2, N=16, "
        "C=64, got [2, 3, 64]"
    )


@pytest.mark.parametrize("op", ["adaln", "gated_residual", "gated_residual_adaln"])
def test_modulation_broadcasts_over_no_more_than_the_contract(op):
    """A spatial part shared by the batch and a step part for each token are refused."""
    for name in tensor_names(op)[1:]:
        value = arguments(op)[name]
        if name.startswith("step_"):
            refused(op, ValueError, f"argument '{name}'", **{name: value.expand(2, 21, 24)})
        elif name != "branch":
            refused(op, ValueError, f"argument '{name}'", **{name: value[:1].contiguous()})


@pytest.mark.parametrize("op", INFERENCE_ONLY)
def test_inference_only_ops_refuse_gradients(op):
    for name in tensor_names(op):
        value = arguments(op)[name].detach().requires_grad_()
        refused(
            op,
            ValueError,
            f"argument '{name}': requires grad, but this op is for inference",
            **{name: value},
        )
        with torch.no_grad():
            call(op, **{name: value})


NUMBERS = [
    (op, argument.name)
    for op, record in RECORDS.items()
    for argument in record.arguments
    if argument.number
]
INVALID = [(op, invalid) for op, record in RECORDS.items() for invalid in record.invalid]


@pytest.mark.parametrize("op, name", NUMBERS)
def test_numbers(op, name):
    for value in (math.nan, math.inf, -math.inf):
        refused(
            op,
            ValueError,
            f"argument '{name}': expected a finite number, got {value}",
            **{name: value},
        )
    for value, kind in (("1", "str"), (True, "bool"), (torch.ones(1), "Tensor")):
        refused(op, TypeError, f"argument '{name}': expected a float, got {kind}", **{name: value})


@pytest.mark.parametrize("op, invalid", INVALID, ids=[f"{op}: {i.message}" for op, i in INVALID])
def test_values(op, invalid):
    """What the records say is invalid, and by their own rules it is."""
    changes = invalid.arguments()
    refused(op, invalid.error, invalid.message, **changes)
    assert not RECORDS[op].is_valid(arguments(op) | changes)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("optional", [True, False])
def test_samples_are_valid_by_their_records(op, optional):
    assert RECORDS[op].is_valid(arguments(op, optional=optional))


@pytest.mark.parametrize("op", ["euler_step", "upsample_renoise_euler"])
def test_guidance_needs_unconditional_rows(op):
    velocity = arguments(op)["velocity"][:2]
    refused(
        op,
        ValueError,
        "argument 'guidance_scale': expected 1.0 for a velocity without "
        "unconditional rows, got 1.5",
        velocity=velocity,
    )
    call(op, velocity=velocity, guidance_scale=1.0)


@pytest.mark.parametrize("op", OPS)
def test_float64_is_served_by_the_reference(op):
    double = arguments(op, dtype=torch.float64)
    for backend in BACKENDS[1:]:
        with use_backend(backend), pytest.raises(BackendUnavailableError, match="cannot serve"):
            function(op)(**double)
    with use_backend("reference"):
        expected = tensors(function(op)(**double))
    for result, wanted in zip(tensors(function(op)(**double)), expected, strict=True):
        assert result.dtype == torch.float64
        assert result.equal(wanted)
