"""What diffusers' users do to its models: processors, fused projections, options, LoRA, caches."""

import copy
import importlib
import sys
import warnings

import diffusers
import peft
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


# Whole models.


def images(**more):
    return {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 700]), **more}


SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
SQUARE = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4}
MODELS = {
    "DiT": (
        lambda: diffusers.DiTTransformer2DModel(**SMALL, **SQUARE, num_embeds_ada_norm=10),
        lambda: images(class_labels=torch.tensor([1, 10])),
        2,
    ),
    "PixArt": (
        lambda: diffusers.PixArtTransformer2DModel(
            **SMALL, **SQUARE, cross_attention_dim=WIDTH, caption_channels=24
        ),
        lambda: images(
            encoder_hidden_states=torch.randn(2, TEXT, 24),
            encoder_attention_mask=torch.tensor([[1] * TEXT, [1, 1] + [0] * (TEXT - 2)]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ),
        2,
    ),
    "SD3": (
        lambda: diffusers.SD3Transformer2DModel(
            **SMALL,
            **SQUARE,
            joint_attention_dim=24,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=20,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        lambda: images(
            encoder_hidden_states=torch.randn(2, TEXT, 24), pooled_projections=torch.randn(2, 20)
        ),
        2,
    ),
    "Flux": (
        lambda: diffusers.FluxTransformer2DModel(
            **SMALL,
            patch_size=1,
            in_channels=4,
            num_single_layers=1,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            axes_dims_rope=(4, 4, 8),
        ),
        lambda: {
            "hidden_states": torch.randn(2, 16, 4),
            "timestep": torch.rand(2),
            "encoder_hidden_states": torch.randn(2, TEXT, 24),
            "pooled_projections": torch.randn(2, 20),
            "txt_ids": torch.zeros(TEXT, 3),
            "img_ids": torch.randint(4, (16, 3)).float(),
        },
        3,
    ),
}


def model(name):
    build, arguments, blocks = MODELS[name]
    built = build().eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return built, arguments(), blocks


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_whole_model(name):
    plain, arguments, blocks = model(name)
    fast = copy.deepcopy(plain)
    found = accelerate(fast)
    assert len(found) == blocks and not any(row.left for row in found)
    assert near(fast(**arguments).sample, plain(**arguments).sample)
    restore(fast)
    assert fast(**arguments).sample.equal(plain(**arguments).sample)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first", ["adapter", "accelerate"])
def test_peft(name, first):
    """LoRA of all linear layers: it acts, trains alone, and leaves with its layers."""
    plain, arguments, blocks = model(name)
    fast = copy.deepcopy(plain)

    def adapted(model):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        return peft.get_peft_model(model, config)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if first == "accelerate":
            accelerate(fast)
        plain, fast = adapted(plain), adapted(fast)
        if first == "adapter":
            accelerate(fast)
    rows = report(fast)
    assert len(rows) == blocks and all("in the place of a Linear" in row.left[0] for row in rows)
    with torch.no_grad(), record() as log:
        right = plain(**arguments).sample
        assert near(fast(**arguments).sample, right)
        assert "stage_attention" in log
        with plain.disable_adapter(), fast.disable_adapter():
            without = plain(**arguments).sample
            assert near(fast(**arguments).sample, without) and not near(without, right)
    gradients = []
    for each in (plain, fast):
        each(**arguments).sample.square().sum().backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(value.abs().max() for value in gradients[0].values())
    for key, value in gradients[0].items():
        assert "lora" in key and (gradients[1][key] - value).abs().max() <= 1e-4 * largest
    with torch.no_grad():
        merged = fast.merge_and_unload()
        assert not any(row.left for row in report(merged))
        assert near(merged(**arguments).sample, right)


@torch.no_grad()
def test_models_that_diffusers_changes_as_a_whole():
    """Fused projections, forward chunking: reported, and as before when it is undone."""
    built, arguments, _ = model("PixArt")
    right = built(**arguments).sample
    accelerate(built)
    built.fuse_qkv_projections()
    assert "its processor is a FusedAttnProcessor2_0" in str(report(built))
    assert near(built(**arguments).sample, right)
    built.unfuse_qkv_projections()
    assert not any(row.left for row in report(built))
    assert near(built(**arguments).sample, right)


def test_gradient_checkpointing():
    plain, arguments, _ = model("DiT")
    fast = copy.deepcopy(plain)
    accelerate(fast)
    fast.enable_gradient_checkpointing()
    fast.train()
    fast.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob = 0.0
    fast.transformer_blocks[1].norm1.emb.class_embedder.dropout_prob = 0.0
    gradients = [
        torch.autograd.grad(each(**arguments).sample.square().sum(), each.pos_embed.proj.weight)[0]
        for each in (plain, fast)
    ]
    assert near(*gradients)


@pytest.mark.parametrize("first", ["cache", "accelerate"])
@torch.no_grad()
def test_a_cache_of_diffusers(first):
    """First-block cache, which looks the block's class up in a table of its own."""
    plain, arguments, _ = model("Flux")
    fast = copy.deepcopy(plain)
    config = diffusers.hooks.FirstBlockCacheConfig(threshold=0.0)
    if first == "accelerate":
        accelerate(fast)
    for each in (plain, fast):
        diffusers.hooks.apply_first_block_cache(each, config)
    if first == "cache":
        with pytest.warns(UserWarning, match="its forward was replaced"):
            accelerate(fast)
    with plain.cache_context("a"), fast.cache_context("a"):
        assert near(fast(**arguments).sample, plain(**arguments).sample)


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
