"""Sampling computes what the model's modules compute, whatever stands in their places.

Situations of tests/support/situations.py on every layer that sampling uses, each drawn by the
ways that there are, against the same changed model under the reference backend, which is composed
of PyTorch's ops; and that, against the training path, whose modules are all called.
"""

import contextlib
import warnings

import pytest
import torch
from torch import nn

import ecar_kernels
from ecar import ECAR, ECARConfig
from ecar.sampling import sample
from tests.support import situations
from tests.support.modules import accelerated

CONFIG = ECARConfig(
    stage_sides=(4, 8), channels=1, num_classes=10, width=32, heads=2, ar_layers=2, flow_blocks=2
)


def model(seed: int = 0) -> ECAR:
    torch.manual_seed(seed)
    made = ECAR(CONFIG)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.eval().requires_grad_(False)


def draw(drawn: ECAR, **options) -> torch.Tensor:
    return sample(
        drawn,
        torch.tensor([1, 2]),
        seeds=torch.tensor([3, 4]),
        steps=4,
        guidance_scale=1.5,
        **options,
    ).latents


LAYERS = situations.linear_layers(model())
# One of each kind, and of both stages and ends.
CHOSEN = [name for name in LAYERS if ".1." not in name or name.startswith("heads.1.blocks.1")]
WAYS = {
    "plain": lambda m: m,
    "accelerated": accelerated,
    "packed alone": lambda m: accelerated(m, keep_weights=False),
}


def agree(got, right):
    return (got - right).abs().max() <= 2e-4 * max(1, right.abs().max().item())


def under_reference(changed: ECAR) -> torch.Tensor:
    with ecar_kernels.use_backend("reference"):
        return draw(changed)


UNTOUCHED = {}


def untouched() -> torch.Tensor:
    if not UNTOUCHED:
        UNTOUCHED["latents"] = under_reference(model())
    return UNTOUCHED["latents"]


CHANGES = [
    situations.an_adapter,
    situations.a_forward_hook,
    situations.a_wrapped_forward,
    situations.a_parametrization,
    situations.pruning,
    situations.dynamic_quantization,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", CHOSEN)
def test_every_layer_is_called(name, change):
    changed = model()
    change(changed, name, changed.get_submodule(name))
    right = under_reference(changed)
    assert not agree(untouched(), right), "the change is not seen by the reference either"
    for way in WAYS.values():  # accelerated models stay so: bound, rebound, packed alone
        assert agree(draw(way(changed)), right)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHOSEN)
def test_what_comes_and_goes_between_two_images(name, way):
    drawn = WAYS[way](model())
    first = draw(drawn)
    handle = drawn.get_submodule(name).register_forward_hook(lambda m, i, o: 2 * o)
    hooked = draw(drawn)
    handle.remove()
    plain = model()
    plain.get_submodule(name).register_forward_hook(lambda m, i, o: 2 * o)
    assert agree(hooked, under_reference(plain)) and not agree(hooked, first)
    assert agree(draw(drawn), first)


MODULES = [
    "ar.blocks.0",
    "ar.blocks.0.mlp",
    "ar.blocks.0.norm1",
    "ar.norm",
    "ar.class_embedding",
    "heads.0",
    "heads.0.condition",
    "heads.0.time",
    "heads.0.time.1",
    "heads.0.blocks.0",
    "heads.1.blocks.1",
    "heads.1.blocks.1.mlp",
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_hooks_of_every_module(name, way):
    """What their hooks do is done, as often as the plain model calls them."""

    def counted(drawn):
        calls = []

        def hook(module, inputs, output):
            calls.append(1)
            return (
                tuple(1.5 * part for part in output) if isinstance(output, tuple) else 1.5 * output
            )

        drawn.get_submodule(name).register_forward_hook(hook)
        return calls

    plain, drawn = model(), WAYS[way](model())
    expected, calls = counted(plain), counted(drawn)
    right, got = under_reference(plain), draw(drawn)
    assert agree(got, right) and not agree(got, untouched())
    assert expected and calls


def test_the_reference_is_the_training_path():
    """A head with a hook is called as in training; without one, the velocity is the same."""
    plain, called = model(), model()
    for head in called.heads:
        head.register_forward_hook(lambda module, inputs, output: None)
    assert agree(draw(called), draw(plain))
    for head in called.heads:
        for block in head.blocks:
            block.register_forward_hook(lambda module, inputs, output: None)
    assert agree(draw(called), draw(plain))
    assert agree(under_reference(called), draw(plain))


def lora(drawn: ECAR, targets) -> nn.Module:
    import peft

    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(drawn, config)


TARGETS = {
    "attention": ["qkv", "proj"],
    "mlp": ["fc1", "fc2"],
    "ends": ["output", "embed", "modulation"],
    "time": ["time.0", "time.2"],
    "all": "all-linear",
}


class TestPeft:
    """LoRA adapters trained with peft: before and after `accelerate`, merged, disabled, removed."""

    @pytest.mark.parametrize("targets", TARGETS)
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("first", ["adapter", "way"])
    def test_an_adapter(self, targets, way, first):
        right_model = model()
        lora(right_model, TARGETS[targets])
        right = under_reference(right_model)
        assert not agree(right, untouched())
        drawn = model()
        if first == "way":
            WAYS[way](drawn)
            draw(drawn)
        wrapped = lora(drawn, TARGETS[targets])
        if first == "adapter":
            WAYS[way](drawn)
        assert agree(draw(drawn), right)
        with wrapped.disable_adapter():
            assert agree(draw(drawn), untouched())
        assert agree(draw(drawn), right)
        wrapped.merge_adapter()
        assert agree(draw(drawn), right)
        wrapped.unmerge_adapter()
        assert agree(draw(drawn), right)
        merged = wrapped.merge_and_unload()
        assert agree(draw(merged), right)
        assert all(
            type(module).__module__.startswith(("torch", "ecar")) for module in merged.modules()
        )

    def test_an_adapter_that_is_removed(self):
        drawn = accelerated(model())
        wrapped = lora(drawn, "all-linear")
        assert not agree(draw(drawn), untouched())
        assert agree(draw(wrapped.unload()), untouched())

    def test_the_report_names_it(self):
        drawn = accelerated(model())
        lora(drawn, ["qkv"])
        rows = [row for row in ecar_kernels.report(drawn) if row.name == "heads.0.blocks.0"]
        assert "qkv: a peft.tuners.lora.layer.Linear in the place of a Linear" in rows[0].left[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_torchao(way, order):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao import quantization

        config = quantization.Int8WeightOnlyConfig(version=2)
        plain, drawn = model(), model()
        # torchao's own kernels refuse a layer of one input, as the AR's for one channel is.
        options = {
            "filter_fn": lambda module, name: (
                isinstance(module, nn.Linear) and module.in_features > 4
            )
        }
        quantization.quantize_(plain, config, **options)
        right = under_reference(plain)
        if order == "after":
            WAYS[way](drawn)
            draw(drawn)
        quantization.quantize_(drawn, config, **options)
        if order == "before":
            WAYS[way](drawn)
        assert agree(draw(drawn), right) and not agree(untouched(), right)


def test_a_model_wrapped_for_data_parallel_training(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        drawn = accelerated(model().requires_grad_(True))
        wrapped = nn.parallel.DistributedDataParallel(drawn)
        x = torch.randn(2, 1, 8, 8)
        losses = wrapped(x, torch.tensor([1, 2]), torch.randn_like(x), torch.rand(2, 2))
        losses.sum().backward()
        torch.optim.SGD(wrapped.parameters(), lr=0.5).step()
        after = model(1)
        after.load_state_dict(drawn.state_dict())
        assert agree(draw(wrapped.module), under_reference(after))
        assert not agree(draw(wrapped.module), untouched())
    finally:
        torch.distributed.destroy_process_group()


STATES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "a default dtype": lambda: default_dtype(torch.float64),
    "a default device": lambda: torch.device("meta"),
    "deterministic algorithms": lambda: deterministic(),
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", STATES)
def test_global_states(state, way):
    """Drawn, and made ready for it, inside."""
    drawn, data = model(), (torch.tensor([1, 2]), torch.tensor([3, 4]))
    with STATES[state]():
        inside = sample(
            WAYS[way](drawn), data[0], seeds=data[1], steps=4, guidance_scale=1.5
        ).latents
    assert inside.dtype is torch.float32 and inside.device.type == "cpu"
    assert agree(inside, untouched()) and agree(draw(drawn), untouched())


def test_nan_of_a_later_stage_reaches_no_earlier_one():
    for way in WAYS.values():
        drawn = model()
        right = sample(
            drawn, torch.tensor([1]), seeds=torch.tensor([2]), steps=4, return_stage_ends=True
        ).stage_ends[0]
        drawn.heads[1].output.bias.fill_(float("nan"))
        ends = sample(
            way(drawn), torch.tensor([1]), seeds=torch.tensor([2]), steps=4, return_stage_ends=True
        ).stage_ends
        assert agree(ends[0], right) and ends[1].isnan().all()
