"""Steps that are bound ahead of time: what they compute, and what they are refused for."""

import copy

import pytest
import torch
from torch import nn

from ecar_kernels import (
    BoundFlowStep,
    BoundStageBlocks,
    FlowBlock,
    StageBlock,
    accelerate,
    flow_boundary,
    registry,
    upsample_renoise_euler,
    use_backend,
)
from tests.support import situations
from tests.support.modules import Cache, accelerated
from tests.support.native import needs_native

pytestmark = needs_native

BATCH, TOKENS, WIDTH, HEADS, VALUES, BLOCKS = 2, 9, 32, 2, 12, 2
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {"tokens": TOKENS, "width": WIDTH, "hidden": 4 * WIDTH, "values": VALUES}


class Head(nn.Module):
    """The layers that steps are bound to."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(FlowBlock(WIDTH, HEADS) for _ in range(BLOCKS))
        self.output = nn.Linear(WIDTH, VALUES)
        self.embed = nn.Linear(VALUES, WIDTH)
        self.register_buffer("positions", torch.randn(TOKENS, WIDTH))

    @property
    def parts(self):
        return self.blocks, self.output, self.embed, self.positions

    def why_not(self, dtype=torch.float32):
        with torch.no_grad():
            return BoundFlowStep.why_not(*self.parts, dtype)


def op_by_op(head, state, stream, spatial, times, plan):
    """The state after each step, by the modules and the public op."""
    shown, velocity = [], None
    for (rows, dt, scale, ratio), time in zip(plan, times, strict=True):
        if len(stream) < rows:
            stream = stream.repeat(2, 1, 1)
        own, step = spatial[:rows].split(WIDTH, dim=-1), time.split(WIDTH, dim=-1)
        x = stream[:rows]
        for index, block in enumerate(head.blocks):
            six = slice(6 * index, 6 * index + 6)
            x = block.infer(x, own[six], step[six])
        state, stream, velocity = flow_boundary(
            x,
            state,
            *own[-2:],
            head.output.weight,
            head.output.bias,
            head.embed.weight,
            head.embed.bias,
            head.positions,
            dt,
            step_shift=step[-2],
            step_scale=step[-1],
            guidance_scale=scale,
            previous=velocity if ratio else None,
            ratio=ratio,
            return_velocity=True,
        )
        shown.append(state)
    return shown


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed_alone", [False, True])
@torch.no_grad()
def test_it_computes_what_the_ops_do(dtype, packed_alone):
    """Steps of unequal length, some of them guided, some with a history, and a second head on the
    same buffers: no further from the exact states than twice the references, one by one."""
    bound = BoundFlowStep(batch=BATCH, rows=2 * BATCH, dtype=dtype, history=True, **SIZES)
    plan = [(2, 0.2, 1.0, 0.0), (4, 0.3, 2.5, 1.5), (4, 0.1, 0.5, 1 / 3), (2, 0.4, 1.0, 4.0)]
    plan += [(2, 0.2, 1.0, 0.0)]
    for _ in range(2):
        head = Head().to(dtype)
        exactly = copy.deepcopy(head).double()
        if packed_alone:
            accelerate(head, keep_weights=False)
        state = torch.randn(BATCH, TOKENS, VALUES)
        stream = head.embed(state.to(dtype)) + head.positions
        spatial = torch.randn(2 * BATCH, TOKENS, (6 * BLOCKS + 2) * WIDTH).to(dtype)
        times = torch.randn(len(plan), 1, 1, spatial.shape[-1]).to(dtype).unbind()
        given = state, stream, spatial, times
        with use_backend("reference"):
            plain = op_by_op(head, *given, plan)
            doubled = [x.double() for x in given[:3]] + [[time.double() for time in times]]
            exact = op_by_op(exactly, *doubled, plan)
        bound.bind(*head.parts, spatial)
        for (rows, dt, scale, ratio), time in zip(plan, times, strict=True):
            bound.add(time, rows=rows, dt=dt, guidance_scale=scale, ratio=ratio)
        bound.state.copy_(state)
        bound.stream[:BATCH].copy_(stream)
        for step, right in enumerate(exact):
            bound.run(step)
            assert bound.state.dtype == torch.float32
            assert (bound.state - right).norm() <= 2 * (plain[step] - right).norm()


@torch.no_grad()
def test_a_restart_is_an_euler_step_and_the_history_begins_with_it():
    """Bit for bit the steps of a plan that has an Euler step there, whatever came before."""
    head, states = Head(), []
    spatial = torch.randn(BATCH, TOKENS, (6 * BLOCKS + 2) * WIDTH)
    times = torch.randn(4, 1, 1, spatial.shape[-1]).unbind()
    state = torch.randn(BATCH, TOKENS, VALUES)
    for ratios, before in (((0, 1, 1, 2), 3.0), ((0, 0, 0, 2), torch.nan)):
        bound = BoundFlowStep(batch=BATCH, rows=BATCH, dtype=torch.float32, history=True, **SIZES)
        bound.bind(*head.parts, spatial)
        for time, ratio in zip(times, ratios, strict=True):
            bound.add(time, rows=BATCH, dt=0.1, ratio=ratio)
        for x, steps in ((before * state, (0, 1)), (state, (2, 3))):
            bound.state.copy_(x)
            bound.stream.copy_(head.embed(x) + head.positions)
            for step in steps:
                bound.run(step, restart=step == 2)
        states.append(bound.state.clone())
    assert states[0].equal(states[1]) and states[0].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(("history", "why"), [(True, "of the first step"), (False, "without a")])
def test_a_ratio_without_a_step_before_is_refused(history, why):
    head = Head()
    bound = BoundFlowStep(batch=BATCH, rows=BATCH, dtype=torch.float32, history=history, **SIZES)
    bound.bind(*head.parts, torch.randn(BATCH, TOKENS, (6 * BLOCKS + 2) * WIDTH))
    with pytest.raises(ValueError, match=f"argument 'ratio': expected 0 {why}.*, got 0.5"):
        bound.add(torch.randn(1, 1, (6 * BLOCKS + 2) * WIDTH), rows=BATCH, dt=0.1, ratio=0.5)


@torch.no_grad()
def test_a_jump_is_an_euler_step_of_no_length():
    end, seeds = torch.randn(BATCH, 3, 4, 6), torch.tensor([5, -6])
    start = torch.empty(BATCH, 3, 8, 12)
    BoundFlowStep.jump(end, start, time=0.25, stage=3, seeds=seeds)
    same, expected = upsample_renoise_euler(
        end, torch.zeros_like(end), 0.0, time=0.25, stage=3, seeds=seeds
    )
    assert end.equal(same) and start.equal(expected)


@torch.no_grad()
def test_what_serves_it_is_recorded():
    head, bound = Head(), BoundFlowStep(batch=BATCH, rows=BATCH, dtype=torch.float32, **SIZES)
    with registry.record() as log:
        bound.bind(*head.parts, torch.randn(BATCH, TOKENS, (6 * BLOCKS + 2) * WIDTH))
        BoundFlowStep.jump(
            torch.randn(1, 1, 2, 2),
            torch.empty(1, 1, 4, 4),
            time=0.5,
            stage=2,
            seeds=torch.tensor([1]),
        )
    ops = "adaln_linear", "stage_attention", "linear_gated_residual", "flow_boundary"
    assert log == {op: {"cpp"} for op in (*ops, "upsample_renoise_euler")}


class TestWhyNot:
    def test_none_as_written_plain_or_accelerated(self):
        assert Head().why_not() is None
        assert accelerated(Head()).why_not() is None
        assert accelerated(Head(), keep_weights=False).why_not() is None

    def test_another_backend(self):
        with use_backend("reference"):
            assert Head().why_not() == "flow_boundary is served by reference"
            of_the_reference = accelerated(Head())
        assert of_the_reference.why_not() == "adaln_linear is served by reference"

    def test_a_dtype_that_no_kernel_serves(self):
        assert "is served by reference" in Head().double().why_not(torch.float64)

    def test_autocast_gradients_and_transforms(self):
        head = Head()
        with torch.autocast("cpu", torch.bfloat16):
            assert head.why_not() == "torch.autocast is active"
        assert "gradient" in BoundFlowStep.why_not(*head.parts, torch.float32)
        with torch.autograd.forward_ad.dual_level():
            assert "forward-mode AD" in head.why_not()

    @pytest.mark.parametrize(
        "change",
        [
            situations.an_adapter,
            situations.a_forward_hook,
            situations.a_wrapped_forward,
            situations.a_parametrization,
            situations.pruning,
            situations.dynamic_quantization,
        ],
        ids=lambda change: change.__name__,
    )
    @pytest.mark.parametrize("prepare", [lambda head: head, accelerated], ids=["", "accelerated"])
    def test_every_layer_that_is_not_as_written(self, change, prepare):
        layers = situations.linear_layers(Head())
        assert len(layers) == 4 * BLOCKS + 2
        for layer in layers:
            head = prepare(Head())
            change(head, layer, head.get_submodule(layer))
            assert head.why_not().startswith(f"{layer}: "), layer

    @pytest.mark.parametrize("module", ["blocks.1", "blocks.0.mlp"])
    def test_a_hook_of_a_block_or_its_mlp(self, module):
        head = Head()
        handle = head.get_submodule(module).register_forward_hook(lambda *_: None)
        assert head.why_not() == f"{module}: it has forward hooks"
        handle.remove()
        assert head.why_not() is None

    def test_positions_that_are_computed(self):
        head = Head()
        head.positions = head.positions.to(torch.int32)
        assert "positions are a Tensor of torch.int32" in head.why_not()


class TestStageBlocks:
    """The AR's layers: what they compute, and what they are refused for."""

    STAGES = (4, TOKENS, 25)

    @staticmethod
    def blocks(dtype=torch.float32):
        made = nn.ModuleList(StageBlock(WIDTH, HEADS) for _ in range(BLOCKS)).requires_grad_(False)
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.3)
        return made.to(dtype)

    @staticmethod
    def why_not(blocks, dtype=torch.float32, device="cpu"):
        with torch.no_grad():
            return BoundStageBlocks.why_not(
                blocks, torch.empty(2, 4, WIDTH, dtype=dtype, device=device)
            )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("packed_alone", [False, True])
    def test_they_compute_what_the_modules_do(self, dtype, packed_alone):
        """Stage after stage, the last with fewer rows: no further from the exact tokens than twice
        the references."""
        blocks, rows, begin = self.blocks(dtype), 3, 0
        exactly, plain = copy.deepcopy(blocks).double(), copy.deepcopy(blocks)
        if packed_alone:
            accelerate(blocks, keep_weights=False)
        shape = BLOCKS, rows, sum(self.STAGES), HEADS, WIDTH // HEADS
        keys, values = torch.empty(2, *shape, dtype=dtype)
        caches = {kind: [Cache(*shape[1:]) for _ in blocks] for kind in (dtype, torch.float64)}
        bound = BoundStageBlocks(blocks, keys, values)
        for index, tokens in enumerate(self.STAGES):
            rows = 2 if index == len(self.STAGES) - 1 else 3
            x, results = torch.randn(rows, tokens, WIDTH).to(dtype), []
            for modules, kind in ((exactly, torch.float64), (plain, dtype)):
                y = x.to(kind)
                for module, cache in zip(modules, caches[kind], strict=True):
                    cache.held = cache.held.to(kind)[:, :rows]
                    with use_backend("reference"):
                        y = module(y, self.STAGES[: index + 1], cache)
                    cache.begin += tokens
                results.append(y)
            found, before = bound.run(x, begin), x.clone()
            begin += tokens
            assert x.equal(before)
            assert (found - results[0]).norm() <= 2 * (results[1] - results[0]).norm()

    def test_a_row_has_the_same_bits_alone(self):
        blocks, x = self.blocks(), torch.randn(3, TOKENS, WIDTH)
        keys, values = torch.empty(2, BLOCKS, 3, TOKENS, HEADS, WIDTH // HEADS)
        together = BoundStageBlocks(blocks, keys, values).run(x, 0)
        for row in range(3):
            alone = BoundStageBlocks(blocks, keys, values).run(x[row : row + 1], 0)
            assert alone.equal(together[row : row + 1])

    def test_what_serves_them_is_recorded(self):
        keys, values = torch.empty(2, BLOCKS, 1, 4, HEADS, WIDTH // HEADS)
        with registry.record() as log:
            blocks = self.blocks()
            assert self.why_not(blocks) is None
            assert not log  # asking is not serving
            BoundStageBlocks(blocks, keys, values).run(torch.randn(1, 4, WIDTH), 0)
        assert log == {
            op: {"cpp"} for op in ("adaln_linear", "stage_attention", "linear_gated_residual")
        }

    def test_plain_and_accelerated_ones_serve(self):
        assert self.why_not(self.blocks()) is None
        assert self.why_not(accelerated(self.blocks(), keep_weights=False)) is None

    def test_not_elsewhere_nor_by_another_backend(self):
        assert self.why_not(self.blocks(), device="meta") == "the tokens are on meta"
        with use_backend("reference"):
            assert self.why_not(self.blocks()) == "adaln_linear is served by reference"
        assert self.why_not(self.blocks(), torch.bfloat16) == (
            "blocks.0.norm1: it is not of the tokens' torch.bfloat16"
        )
        x = torch.empty(2, 4, WIDTH)
        assert BoundStageBlocks.why_not(self.blocks(), x) == "a gradient may be asked for"

    @pytest.mark.parametrize(
        "change",
        [situations.an_adapter, situations.a_forward_hook, situations.a_parametrization],
        ids=lambda change: change.__name__,
    )
    def test_not_with_a_layer_that_is_not_as_written(self, change):
        layers = situations.linear_layers(self.blocks())
        assert len(layers) == 4 * BLOCKS
        for layer in layers:
            blocks = self.blocks()
            change(blocks, layer, blocks.get_submodule(layer))
            assert self.why_not(blocks).startswith(f"blocks.{layer}: "), layer

    def test_not_with_a_norm_that_is_another(self):
        for name in ("norm1", "norm2"):
            for norm in (nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH // 2)):
                blocks = self.blocks()
                setattr(blocks[1], name, norm)
                assert self.why_not(blocks) == (
                    f"blocks.1.{name}: it has no weight and bias of {WIDTH}"
                )

    def test_not_with_a_block_that_overrides_what_it_inherits(self):
        class Mine(StageBlock):
            def attend(self, *arguments):
                return 2 * super().attend(*arguments)

        blocks = self.blocks()
        blocks[1].__class__ = Mine
        assert self.why_not(blocks) == "blocks.1: a Mine in the place of a StageBlock"
