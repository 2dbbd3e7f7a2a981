"""What diffusers' users do to whole models: adapters, caches, offloading, casting, saving."""

import copy
import io
import warnings

import accelerate as hf_accelerate
import diffusers
import diffusers.training_utils
import peft
import pytest
import torch

from ecar_kernels import accelerate, report, restore
from ecar_kernels.registry import record
from tests.support.blocks import TEXT, WIDTH, near


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


def offloaded(model, kind):
    """Weights come from the CPU, and go there, at each call."""
    cpu = torch.device("cpu")
    model.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type=kind, num_blocks_per_group=1
    )


def cast(model, dtype):
    model.enable_layerwise_casting(storage_dtype=dtype, compute_dtype=torch.float32)


def broadcast(model):
    """Pyramid attention broadcast, which hooks the attentions."""
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    diffusers.apply_pyramid_attention_broadcast(model, config)


def adapted(config):
    """peft's adapters, by diffusers' own method where the model has it."""

    def change(model):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if hasattr(model, "add_adapter"):
                model.add_adapter(config())
            else:
                peft.inject_adapter_in_model(config(), model)

    return change


def lora(**options):
    return peft.LoraConfig(r=2, init_lora_weights=False, **options)


def keys_scaled():
    return peft.IA3Config(
        target_modules=["to_k", "to_v"], feedforward_modules=[], init_ia3_weights=False
    )


def fused_lora(model):
    adapted(lambda: lora(target_modules=["to_q", "to_out.0"]))(model)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            layer.merge()


def with_saved_modules(model):
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, lora(target_modules=["to_q"], modules_to_save=["to_v"]))


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model):
    """An average's weights in the place of the model's."""
    average = diffusers.training_utils.EMAModel(model.parameters())
    for shadow in average.shadow_params:
        shadow.mul_(1.1)
    average.copy_to(model.parameters())


def tied(model):
    """Two blocks with one block's weights, where their shapes are the same."""
    first, last = model.transformer_blocks[0], model.transformer_blocks[1]
    own = dict(last.named_parameters())
    for name, parameter in first.named_parameters():
        if name in own and own[name].shape == parameter.shape:
            path, _, short = name.rpartition(".")
            setattr(last.get_submodule(path), short, parameter)


def compiled_blocks(model):
    for block in model.transformer_blocks:
        block.compile(backend="eager")


CHANGES = {
    "layerwise casting": lambda model: cast(model, torch.bfloat16),
    "layerwise casting to 8 bits": lambda model: cast(model, torch.float8_e4m3fn),
    "groups offloaded": lambda model: offloaded(model, "block_level"),
    "leaves offloaded": lambda model: offloaded(model, "leaf_level"),
    "all offloaded": lambda model: hf_accelerate.cpu_offload(model, torch.device("cpu")),
    "attention broadcast": broadcast,
    "LoRA": adapted(lambda: lora(target_modules=["to_q", "to_out.0"])),
    "LoRA, merged": fused_lora,
    "DoRA": adapted(lambda: lora(target_modules=["to_q"], use_dora=True)),
    "IA3": adapted(keys_scaled),
    "modules to save": with_saved_modules,
    "pickled": pickled,
    "averaged": averaged,
    "tied": tied,
    "one block twice": lambda model: model.transformer_blocks.__setitem__(
        1, model.transformer_blocks[0]
    ),
    "compiled": lambda model: model.compile(backend="eager"),
    "compiled blocks": compiled_blocks,
}


# diffusers refuses to offload groups of DiT.
CASES = [
    (name, change)
    for name in MODELS
    for change in CHANGES
    if name != "DiT" or change not in ("groups offloaded", "leaves offloaded")
]


@pytest.mark.parametrize("name, change", CASES)
@torch.no_grad()
def test_a_changed_model(name, change):
    """Before `accelerate` and after it, and restored."""
    plain, arguments, _ = model(name)
    first, last = copy.deepcopy(plain), copy.deepcopy(plain)
    accelerate(last)
    last(**arguments)
    changed = []
    for each in (plain, first, last):
        torch._dynamo.reset()
        result = CHANGES[change](each)
        changed.append(result if isinstance(result, torch.nn.Module) else each)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where no block is swapped
        accelerate(changed[1])
    right = changed[0](**arguments).sample
    for fast in changed[1:]:
        assert near(fast(**arguments).sample, right)
        restore(fast)
        assert near(fast(**arguments).sample, right)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_saving(name, tmp_path):
    plain, arguments, blocks = model(name)
    right = plain(**arguments).sample
    accelerate(plain, keep_weights=False)
    plain(**arguments)
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    assert loaded(**arguments).sample.equal(right)
    assert len(accelerate(loaded)) == blocks and near(loaded(**arguments).sample, right)
