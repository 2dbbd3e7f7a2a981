import pytest
import torch

from ecar.transformer import KVCache, patchify, unpatchify


@pytest.mark.parametrize(("patch", "shape"), [(1, (3, 4, 4)), (2, (1, 8, 8)), (4, (2, 8, 4))])
def test_patches_go_there_and_back(patch, shape):
    x = torch.randn(3, *shape)
    tokens = patchify(x, patch)
    assert tokens.shape == (3, shape[1] * shape[2] // patch**2, shape[0] * patch**2)
    assert torch.equal(unpatchify(tokens, patch, shape), x)
    # The first token is the first patch, channel by channel, row by row.
    assert torch.equal(tokens[:, 0], x[:, :, :patch, :patch].flatten(1))


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"stage_sides": (4, 8, 16)},
        {"stage_sides": (8,)},
        {"patch_size": 1},
        {"patch_size": 4},
        {"stage_sides": (4, 8, 16), "ar_layers": 0},
    ],
)
def test_cached_stages_equal_the_whole_sequence(make_model, sizes):
    model = make_model(**sizes)
    config = model.config
    labels = torch.tensor([0, 7, config.null_class])
    ends = [torch.randn(3, *config.stage_shape(s)) for s in range(1, config.num_stages)]
    with torch.no_grad():
        maps, _, _ = model.ar(labels, ends)
        cache = KVCache(config, 3, device=model.device, dtype=model.dtype)
        cached = [model.ar.stage(model.ar.embed_class(labels), cache)]
        for stage, end in enumerate(ends, start=2):
            tokens = model.ar.with_class(model.ar.embed_end(end, stage), labels)
            cached.append(model.ar.stage(tokens, cache))
    assert cache.length == config.num_tokens
    for whole, alone in zip(maps, cached, strict=True):
        # Float32 rounding of another order of summation, of values of size 1 to 4.
        assert (whole - alone).abs().max() < 1e-5


def test_a_stage_does_not_see_those_after_it(make_model):
    model = make_model(stage_sides=(4, 8, 16))
    labels = torch.tensor([3, 4])
    ends = [torch.randn(2, *model.config.stage_shape(s)) for s in (1, 2)]
    with torch.no_grad():
        maps, _, _ = model.ar(labels, ends)
        changed, _, _ = model.ar(labels, [ends[0], torch.randn_like(ends[1])])
    assert torch.equal(maps[0], changed[0])
    assert torch.equal(maps[1], changed[1])
    assert not torch.equal(maps[2], changed[2])


def test_the_cache_is_allocated_once(make_model):
    model = make_model()
    cache = KVCache(model.config, 2, device=model.device, dtype=model.dtype)
    pointers = cache.keys.data_ptr(), cache.values.data_ptr()
    with torch.no_grad():
        model.ar.stage(model.ar.embed_class(torch.tensor([1, 2])), cache)
    assert pointers == (cache.keys.data_ptr(), cache.values.data_ptr())
    assert "cache" not in {name for name, _ in model.named_buffers()}


def test_with_patch_one_a_token_stands_on_its_nearest_pixel(make_model):
    model = make_model(patch_size=1)
    end = torch.randn(2, *model.config.stage_shape(1))
    tokens = model.ar.embed_end(end, 2) - model.ar.positions[16:]
    grid = tokens.unflatten(1, (8, 8))
    assert torch.allclose(grid[:, 2, 4], grid[:, 3, 5], atol=1e-6)


def test_a_model_of_16_bits_embeds_the_end_of_a_stage_unrounded(make_model):
    model = make_model().to(torch.bfloat16)
    end = torch.randn(2, *model.config.stage_shape(1))
    with torch.no_grad():
        found = model.ar.embed_end(end, 2)
        rounded = model.ar.embed_end(end.bfloat16(), 2)
        hook = model.ar.inputs[0].register_forward_hook(lambda module, inputs, output: 2 * output)
        called = model.ar.embed_end(end, 2)  # what is hooked is called
        assert called.equal(model.ar.embed_end(end.bfloat16(), 2))
        hook.remove()
        exact = model.double().ar.embed_end(end.double(), 2)
    assert found.dtype == torch.bfloat16
    assert ((found - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    assert (rounded - exact).norm() > 1.5 * (found - exact).norm()
    assert not called.equal(rounded)
