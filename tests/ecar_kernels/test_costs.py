"""Costs against values counted by hand, and against what the backwards really are given."""

import pytest
import torch

from ecar_kernels import costs, resolve
from ecar_kernels.registry import FAMILIES, OPS
from tests.support.native import needs_native
from tests.support.ops import DIFFERENTIABLE, SIZES, arguments, function, tensor_names

B, N, C, H, D, K, P = (SIZES.letters[letter] for letter in "BNCHDKP")  # stages 1, 4, 16
TOKENS, STEP, IMAGE = 4 * B * N * C, 4 * C, 4 * B * 3 * 4 * 6
HEADS = 4 * B * N * H * D

# Bytes and multiply-adds of the support module's float32 calls, step parts included.
FORWARD = {
    "stage_attention": (4 * HEADS, 2 * B * H * D * (1 * 1 + 4 * 5 + 16 * 21)),
    "adaln": (4 * TOKENS + 2 * STEP, 0),
    "gated_residual": (4 * TOKENS + STEP, 0),
    "gated_residual_adaln": (7 * TOKENS + 3 * STEP, 0),
    "adaln_linear": (3 * TOKENS + 4 * (K * C + K + B * N * K) + 2 * STEP, B * N * C * K),
    "linear_gated_residual": (3 * TOKENS + 4 * (K * C + C + B * N * K) + STEP, B * N * C * K),
    # x, the velocity of 2B rows, that before, and out x' and the velocity
    "euler_step": ((1 + 2 + 1 + 1 + 1) * IMAGE, 0),
    "upsample_renoise_euler": ((1 + 2 + 1 + 3 + 1 + 4 + 1) * IMAGE, 0),
    "initial_noise": (8 * B + IMAGE, 0),
    # x, shift, scale in and embedded out, of 2B rows; the state and a velocity in and out; weights,
    # positions
    "flow_boundary": (
        8 * TOKENS + 4 * (4 * B * N * P + 2 * P * C + P + C + N * C) + 2 * STEP,
        (2 * B + B) * N * C * P,
    ),
}
BACKWARD = {
    # q, k, v, the output and its gradient in; dq, dk, dv out
    "stage_attention": (8 * HEADS, 5 * B * H * D * (1 * 1 + 4 * 5 + 16 * 21)),
    # dy, x, scale in; dx, dscale out (dshift is dy); step_scale in, two steps out
    "adaln": (5 * TOKENS + 3 * STEP, 0),
    # dx', branch, gate in; dbranch, dgate out (dx is dx')
    "gated_residual": (5 * TOKENS + 2 * STEP, 0),
    # dx', dy, x', branch, gate, scale in; dx, dbranch, dgate, dscale out
    "gated_residual_adaln": (10 * TOKENS + 5 * STEP, 0),
    # dy, x, shift, scale, weight, steps in; dx, dshift, dscale, dweight, dbias, dsteps out
    "adaln_linear": (6 * TOKENS + 4 * (2 * K * C + K + B * N * K) + 4 * STEP, 2 * B * N * C * K),
    # dx', h, weight, gate, step in; dh, dweight, dbias, dgate, dstep out (dresidual is dx')
    "linear_gated_residual": (
        3 * TOKENS + 4 * (2 * K * C + C + 2 * B * N * K) + 2 * STEP,
        2 * B * N * C * K,
    ),
    # d of x' and of the velocity in; those of the velocity of 2B rows and of that before out
    "euler_step": ((2 + 2 + 1) * IMAGE, 0),
    # dend, dstart, d of the velocity in; dx, dvelocity, dprevious, ddetails out
    "upsample_renoise_euler": ((1 + 4 + 1 + 1 + 2 + 1 + 3) * IMAGE, 0),
}


def call(op):
    given = arguments(op)
    return given, function(op)(**given)


@pytest.mark.parametrize("op", FORWARD)
def test_forward(op):
    assert costs.cost(op, *call(op)) == costs.Cost(*FORWARD[op])


@pytest.mark.parametrize("op", BACKWARD)
def test_backward(op):
    assert costs.backward_cost(op, *call(op)) == costs.Cost(*BACKWARD[op])


def test_every_op_with_a_backward_has_a_cost():
    assert set(costs.BACKWARD_READS) == set(DIFFERENTIABLE)
    assert set(FORWARD) <= set(OPS) and set(BACKWARD) <= set(DIFFERENTIABLE)


@needs_native
@pytest.mark.parametrize("op", [*FAMILIES["adaln"], *FAMILIES["flow_block"]])
def test_backward_reads_no_more_than_autograd_keeps(op):
    """The floor of a backward counts nothing that the cpp one does without."""
    given = arguments(op)
    for name in tensor_names(op):
        given[name].requires_grad_()
    outputs = resolve(op, device="cpu", dtype=torch.float32, backend="cpp")(**given)
    node = (outputs if isinstance(outputs, torch.Tensor) else outputs[0]).grad_fn
    kept = {tensor.data_ptr() for tensor in node.saved_tensors if tensor is not None}
    assert {given[name].data_ptr() for name in costs.BACKWARD_READS[op]} <= kept


def test_broadcast_tensors_count_once():
    x, row = torch.empty(B, N, C, device="meta"), torch.empty(B, 1, C, device="meta")
    given = {"x": x, "shift": row, "scale": row.expand(B, N, C), "eps": 1e-6}
    assert costs.cost("adaln", given, x) == costs.Cost(2 * TOKENS + 2 * B * STEP, 0)
    # A broadcast shift's gradient is a sum, and written; so is the scale's, whole.
    given = {"x": x, "shift": row, "scale": x}
    assert costs.backward_cost("adaln", given, x).bytes == 5 * TOKENS + B * STEP


def test_half_precision_halves_the_bytes():
    given = {"x": torch.empty(B, 3, 4, 6, dtype=torch.bfloat16)}
    given |= {"velocity": given["x"], "dt": 0.1}
    assert costs.cost("euler_step", given, given["x"]) == costs.Cost(3 * IMAGE // 2, 0)


def test_queries_of_the_newest_stages_see_all_before_them():
    q, kv = torch.empty(B, 20, H, D), torch.empty(B, N, H, D)
    given = {"q": q, "k": kv, "v": kv, "stage_lengths": (1, 4, 16)}
    assert costs.cost("stage_attention", given, q).multiply_adds == (
        2 * B * H * D * (4 * 5 + 16 * 21)
    )


def test_floor_is_the_longer_of_both():
    rates = costs.Rates(bytes_per_second=10.0, multiply_adds_per_second=100.0)
    assert costs.floor_seconds(costs.Cost(20, 100), rates) == 2.0
    assert costs.floor_seconds(costs.Cost(20, 1000), rates) == 10.0
    assert costs.Cost(20, 1) + costs.Cost(1, 2) == costs.Cost(21, 3)


def test_what_a_launch_is_expected_to_take():
    """Programs draw on as many multiprocessors as there are of them, in waves."""
    rates = costs.Rates(bytes_per_second=800.0, multiply_adds_per_second=600.0)
    chip = costs.Chip("", 90, 10, 0, 1.0, rates)  # a multiprocessor moves 64 bytes a second
    idle = costs.launch_seconds(chip)

    def seconds(moved, products, programs):
        return costs.expected_seconds(costs.Cost(moved, products), programs, chip) - idle

    assert seconds(0, 0, 1) == 0.0
    assert seconds(1600, 0, None) == pytest.approx(1600 / 800)
    assert seconds(1600, 0, 20) == pytest.approx(1600 / 640)
    assert seconds(1280, 0, 4) == pytest.approx(1280 / 256)
    assert seconds(0, 1200, 20) == seconds(0, 1200, None) == pytest.approx(2.0)
    assert seconds(0, 1200, 5) == pytest.approx(4.0)
    assert seconds(0, 1200, 15) == pytest.approx(8 / 3)  # the second wave is half full
    assert [costs.waves(n, chip) for n in (1, 10, 11, 20)] == [1, 1, 2, 2]
    assert idle == pytest.approx(costs.LAUNCH_SECONDS + 2000)


def test_published_rates():
    """Tensor cores of sm_80 multiply 1024 bfloat16 a cycle and multiprocessor, of sm_90 and sm_100
    2048 and 4096, and of sm_89 and sm_120 512 or 256, as they are sold."""
    for chip in costs.CHIPS.values():
        cycle = chip.rates.multiply_adds_per_second / chip.clock / chip.multiprocessors
        assert any(cycle == pytest.approx(n, rel=0.02) for n in (256, 512, 1024, 2048, 4096)), chip


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"argument 'op': expected one of .*, got 'nothing'"):
        costs.cost("nothing", {}, ())
    with pytest.raises(ValueError, match=r"argument 'op': .* backward, got 'flow_boundary'"):
        costs.backward_cost("flow_boundary", *call("flow_boundary"))
