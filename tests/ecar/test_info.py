"""Counts of parameters and multiply-adds, from the modules."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ecar.config import ECARConfig
from ecar.info import (
    backends_in_use,
    count_multiply_adds,
    count_parameters,
    count_training_multiply_adds,
)
from ecar.model import ECAR
from ecar.sampling import sample
from ecar_kernels import BackendUnavailableError, _native, registry, use_backend

TINY = ECARConfig(
    stage_sides=(4, 8),
    channels=1,
    patch_size=2,
    num_classes=10,
    width=32,
    heads=2,
    ar_layers=2,
    flow_blocks=1,
)


@pytest.mark.parametrize(
    ("preset", "parameters", "multiply_adds"),
    [("S", 155.8e6, 0.89e12), ("B", 515.5e6, 3.12e12), ("L", 859.2e6, 5.82e12)],
)
def test_presets_meet_the_paper(preset, parameters, multiply_adds):
    config = ECARConfig.preset(preset)
    assert (config.stage_sides, config.channels, config.patch_size, config.num_classes) == (
        (8, 16, 32),
        4,
        2,
        1000,
    )
    assert count_parameters(config)["total"] == pytest.approx(parameters, rel=0.01)
    stages = count_multiply_adds(config, steps="paper", guidance_scale=4.0)
    assert [stage.tokens for stage in stages] == [16, 64, 256]
    assert [stage.steps for stage in stages] == [84, 83, 83]
    total = sum(stage.total for stage in stages)
    assert total == pytest.approx(multiply_adds, rel=0.01)
    assert total > 6 * sum(stage.total for stage in count_multiply_adds(config, guidance_scale=4.0))


def test_parameters_add_up_to_those_of_a_real_model():
    parts = count_parameters(TINY)
    total = parts.pop("total")
    assert list(parts) == ["ar_embeddings", "ar_layers", "flow_head_1", "flow_head_2"]
    assert total == sum(parts.values()) == sum(p.numel() for p in ECAR(TINY).parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": [3, 5]},
        {"steps": 7, "guidance_scale": 2.0},
        {"steps": 6, "guidance_scale": 2.0, "guidance_interval": (0.3, 0.7)},
        {"steps": 5, "guidance_scale": 2.0, "guidance_schedule": "linear", "solver": "heun"},
    ],
)
def test_counts_are_those_of_a_real_sampling(settings, monkeypatch):
    """With values, and every step run: the short cut of the meta count leaves nothing out."""
    monkeypatch.setattr(registry, "_servers", {})
    # The counter does not see into those in C++.
    for op in (*registry.FAMILIES["flow_block"], "flow_boundary", "stage_attention"):
        monkeypatch.delitem(registry.IMPLEMENTATIONS[op], "cpp")
    zero = torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        sample(ECAR(TINY).eval(), zero, seeds=zero, **settings)
    stages = count_multiply_adds(TINY, **settings)
    assert 2 * sum(stage.total for stage in stages) == counter.get_total_flops()


def test_flow_grows_with_steps_and_ar_does_not():
    few, many = (count_multiply_adds(TINY, steps=[2, steps]) for steps in (3, 12))
    assert few[0] == many[0]
    assert many[1].flow == 4 * few[1].flow
    assert many[1].ar == few[1].ar


def test_bad_steps_are_named():
    with pytest.raises(ValueError, match="'steps'"):
        count_multiply_adds(TINY, steps=0)


def test_backends_in_use_under_reference_and_auto():
    with use_backend("reference"):
        assert set(backends_in_use(TINY, "cpu", torch.float32).values()) == {"reference"}
    with use_backend("auto"):
        serving = backends_in_use(TINY, "cpu", torch.float32)
    assert serving.keys() == {
        "stage_attention",
        "adaln_linear",
        "linear_gated_residual",
        "euler_step",
        "upsample_renoise_euler",
        "initial_noise",
    } | ({"flow_boundary"} if _native.why_not() is None else set())
    assert set(serving.values()) <= {"reference", "cpp", "triton"}


def test_flow_boundary_is_in_use_where_a_kernel_serves_it(monkeypatch):
    kernel = registry.Implementation("ecar_kernels.adaln.reference:adaln")
    monkeypatch.setitem(registry.IMPLEMENTATIONS["flow_boundary"], "cpp", kernel)
    monkeypatch.setattr(registry, "_servers", {})
    with use_backend("auto"):
        assert backends_in_use(TINY, "cpu", torch.float32)["flow_boundary"] == "cpp"


def test_a_named_backend_that_cannot_serve_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(BackendUnavailableError, match="triton"):
        backends_in_use(TINY, "cpu", torch.float32)


@pytest.mark.parametrize("ar_layers", [0, 2])
def test_training_is_counted_as_its_products_are(ar_layers):
    """A product costs as much for each of its two gradients; the first layers have one."""
    config = ECARConfig.from_dict({**TINY.to_dict(), "ar_layers": ar_layers})
    model = ECAR(config)
    arguments = (
        torch.randn(1, *config.latent_shape), torch.zeros(1, dtype=torch.int64),
        torch.randn(1, *config.latent_shape), torch.rand(1, config.num_stages),
    )  # fmt: skip
    with use_backend("reference"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*arguments)
    forward = counter.get_total_flops() // 2
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(*arguments).sum().backward()
    both = counter.get_total_flops() // 2
    # GradNorm's: for each stage's tokens, the gradient of one weight, width x 4 width.
    gradnorm = config.num_tokens * 4 * config.width**2 if ar_layers else 0
    assert count_training_multiply_adds(config) == both + gradnorm
    assert 2.8 * forward < both < 3.2 * forward
