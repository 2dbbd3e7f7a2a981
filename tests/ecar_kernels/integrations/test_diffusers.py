"""What diffusers' users do to its blocks: processors, fused projections, options."""

import copy
import importlib
import sys

import pytest
import torch
from diffusers.models import attention_dispatch, attention_processor
from diffusers.models.attention import BasicTransformerBlock

from ecar_kernels import accelerate, foreign, report, restore
from ecar_kernels.foreign import Foreign
from ecar_kernels.registry import record
from tests.support.blocks import BLOCKS, TEXT, WIDTH, agree, dit, joint, made, near, pixart

# What a block has that is not known, and the reason that is given.
OTHERS = {
    "a layer norm": (lambda: dit(norm_type="layer_norm"), "its norm_type is 'layer_norm'"),
    "cross-attention": (
        lambda: dit(cross_attention_dim=WIDTH),
        "its attn2 is a Attention, not None",
    ),
    "an affine norm": (
        lambda: pixart(norm_elementwise_affine=True),
        "norm1: a LayerNorm with a weight or a bias",
    ),
    "another GELU": (lambda: dit(activation_fn="gelu"), "ff.net.0: its approximate is 'none'"),
    "a gated unit": (
        lambda: dit(activation_fn="geglu"),
        "ff.net.0: a GEGLU in the place of a GELU",
    ),
    "positions": (
        lambda: dit(positional_embeddings="sinusoidal", num_positional_embeddings=16),
        "its pos_embed is a SinusoidalPositionalEmbedding, not None",
    ),
    "chunks": (lambda: chunked(joint()), "its _chunk_size is 3, not None"),
    "norms of all heads": (
        lambda: with_processor(joint(qk_norm="layer_norm"), "attn", None),
        "attn.norm_q: a LayerNorm in the place of a RMSNorm",
    ),
    "the old attention": (
        lambda: with_processor(dit(), "attn1", attention_processor.AttnProcessor()),
        "attn1: its processor is a AttnProcessor",
    ),
    "sliced attention": (
        lambda: with_processor(pixart(), "attn1", attention_processor.SlicedAttnProcessor(1)),
        "attn1: its processor is a SlicedAttnProcessor",
    ),
    "fused projections": (
        lambda: with_processor(joint(), "attn", attention_processor.FusedJointAttnProcessor2_0()),
        "attn: its processor is a FusedJointAttnProcessor2_0",
    ),
    "fused projections of Flux": (lambda: fused(made("Flux")[0]), "attn: its fused_projections is"),
    "another backend": (
        lambda: of_backend(made("Flux single")[0], "_native_math"),
        "attn: its processor's _attention_backend is",
    ),
    "a rescaled output": (
        lambda: rescaled(dit()),
        "attn1: its rescale_output_factor is 2.0, not 1.0",
    ),
    "dropout": (
        lambda: dit(dropout=0.5).train(),
        "attn1.to_out.1: it is training with a dropout of 0.5",
    ),
}


def chunked(block):
    block.set_chunk_feed_forward(3, dim=1)
    return block


def with_processor(block, attention, processor):
    if processor is not None:
        getattr(block, attention).set_processor(processor)
    return block


def fused(block):
    block.attn.fuse_projections()
    return block


def of_backend(block, backend):
    block.attn.set_attention_backend(backend)
    return block


def rescaled(block):
    block.attn1.rescale_output_factor = 2.0
    return block


@pytest.mark.parametrize("other", OTHERS)
def test_a_block_that_is_not_known_is_left_alone(other):
    make, reason = OTHERS[other]
    block = make()
    kind = type(block)
    with pytest.warns(UserWarning, match="no module of .* was swapped: 1 ") as caught:
        (row,) = accelerate(block)
    assert reason in str(caught[0].message) and reason in row.left[0]
    assert row.kind == kind.__name__ and row.served == {} and type(block) is kind
    assert reason in str(report(block))


@torch.no_grad()
def test_a_processor_that_comes_later_is_called():
    class Doubled(attention_processor.AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    block, arguments, call = made("DiT")
    fast = copy.deepcopy(block)
    accelerate(fast)
    call(fast, arguments)
    for each in (block, fast):
        each.attn1.set_processor(Doubled())
    assert near(call(fast, arguments), call(block, arguments))
    assert report(fast)[0].left == ("all: attn1: its processor is a Doubled",)
    fast.attn1.set_processor(attention_processor.AttnProcessor2_0())
    assert report(fast)[0].left == ()


@torch.no_grad()
def test_a_processors_class_that_was_changed_is_called(monkeypatch):
    block, arguments, call = made("SD3")
    accelerate(block)
    own = attention_processor.JointAttnProcessor2_0.__call__
    monkeypatch.setattr(
        attention_processor.JointAttnProcessor2_0,
        "__call__",
        lambda self, *args, **kwargs: tuple(2 * y for y in own(self, *args, **kwargs)),
    )
    with record() as log:
        changed = call(block, arguments)
    assert not log and "JointAttnProcessor2_0.__call__ was replaced" in str(report(block))
    assert near(changed[1], call(restore(block), arguments)[1])


@torch.no_grad()
def test_an_attention_backend_that_is_asked_for_serves():
    block, arguments, call = made("Flux")
    accelerate(block)
    with attention_dispatch.attention_backend("_native_math"), record() as log:
        call(block, arguments)
    assert not log
    with record() as log:
        call(block, arguments)
    assert "stage_attention" in log


@torch.no_grad()
def test_arguments_that_the_ops_do_not_take_go_to_the_plain_block():
    mask = torch.zeros(2, 1, 9)
    mask[:, :, 3:] = -10000
    for name, more in (
        ("DiT", {"attention_mask": mask}),
        ("DiT", {"cross_attention_kwargs": {"temb": None}}),
        ("SD3", {"joint_attention_kwargs": {"anything": 1}}),
        ("Flux", {"joint_attention_kwargs": {"attention_mask": torch.zeros(1, 1, 1, TEXT + 9)}}),
    ):
        block, arguments, call = made(name)
        right = call(block, arguments | more)
        accelerate(block)
        with record() as log:
            got = call(block, arguments | more)
        assert not log
        assert agree(got, right)


@pytest.mark.parametrize(
    ("name", "norm", "last"),
    [("Flux", "norm1_context", "ff_context.net.2"), ("Flux single", "norm", "proj_out")],
)
@torch.no_grad()
def test_half_precision_is_clipped_as_in_flux(name, norm, last):
    block, arguments, call = made(name)
    block = block.half()
    getattr(block, norm).linear.weight.zero_()
    getattr(block, norm).linear.bias.fill_(1)
    block.get_submodule(last).bias.fill_(1000)
    arguments = {
        key: tuple(x.half() for x in value) if isinstance(value, tuple) else value.half()
        for key, value in arguments.items()
    }
    arguments["encoder_hidden_states"].fill_(65000)
    right = call(block, arguments)
    accelerate(block)
    got = call(block, arguments)
    assert got[0].max() == right[0].max() == 65504


def test_a_cache_whose_table_is_imported_later(monkeypatch):
    """As in versions of diffusers whose models do not import it."""
    table = "diffusers.hooks._helpers"
    monkeypatch.delitem(sys.modules, table)
    monkeypatch.setattr(foreign, "_loaded", {})
    monkeypatch.setattr(foreign, "_joined", {})
    block, _, _ = made("Flux")
    accelerate(block)
    registry = importlib.import_module(table).TransformerBlockRegistry
    assert registry.get(type(block)).return_hidden_states_index == 1


def test_a_class_of_that_name_that_is_another_is_left_alone():
    """Another version of the library, with another forward."""
    other = type("BasicTransformerBlock", (torch.nn.Module,), {"forward": lambda self, x: x})
    other.__module__ = BasicTransformerBlock.__module__
    with pytest.warns(UserWarning, match="1 BasicTransformerBlock: "):
        accelerate(other())
    assert "forward" in str(report(other()))


def test_blocks_are_made_as_served():
    """So that a test above that a block is left alone has a cause."""
    for name in BLOCKS:
        block = made(name)[0]
        accelerate(block)
        assert isinstance(block, Foreign)
