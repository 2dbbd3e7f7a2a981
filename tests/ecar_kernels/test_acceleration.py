"""accelerate and restore: what changes, what does not, and weights that are held packed alone."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ecar_kernels
from ecar_kernels import (
    Accelerated,
    AdaLN,
    BackendUnavailableError,
    FlowBlock,
    Linear,
    OpsModule,
    StageBlock,
    accelerate,
    accelerates,
    acceleration,
    report,
    restore,
    use_backend,
)
from ecar_kernels.flow_block import packing
from ecar_kernels.flow_block.packing import PackedWeight
from tests.support.modules import accelerated
from tests.support.native import needs_native

WIDTH = 64


class Model(nn.Module):
    """Of every kind of module, with weights of whole and of broken panels."""

    def __init__(self):
        super().__init__()
        self.block = StageBlock(WIDTH, 4)
        self.flow = FlowBlock(WIDTH, 2, 100)
        self.modulation = Linear(WIDTH, 6 * WIDTH)
        self.norm = AdaLN()
        self.output = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.block(x, (1, x.shape[1] - 1))
        parts = self.modulation(x).chunk(6, -1)
        if torch.is_grad_enabled():
            y = self.norm(x, *parts[:2])
            steps = (x.new_zeros(1, 1, WIDTH),) * 6
            x, _ = self.flow(x, y, (*parts[2:], *parts[:2]), steps)
        else:
            x = self.flow.infer(x, parts, (x.new_zeros(1, 1, WIDTH),) * 6)
        return self.output(self.norm(x, *parts[:2]))


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def x():
    return torch.randn(2, 9, WIDTH)


def packed(model):
    return [name for name, weight in model.named_parameters() if type(weight) is PackedWeight]


def values_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def infer(model, x):
    return model(x)


@pytest.mark.parametrize("keep", [True, False])
def test_the_answer_stays_and_restore_gives_the_same_bits(model, x, keep):
    before, values, names = infer(model, x), values_of(model), str(model)
    parameters = dict(model.named_parameters())
    assert accelerate(model, keep_weights=keep) == report(model)
    assert (infer(model, x) - before).abs().max() < 1e-5
    assert all(parameters[name] is weight for name, weight in model.named_parameters())
    assert restore(model) is model
    assert infer(model, x).equal(before)
    assert same(model.state_dict(), values) and str(model) == names and not packed(model)
    assert not any("_binding" in vars(module) for module in model.modules())


@pytest.mark.parametrize("keep", [True, False])
def test_the_state_dict_is_unchanged(model, keep):
    values = values_of(model)
    state = accelerated(model, keep_weights=keep).state_dict()
    assert same(state, values)
    assert {type(value) for value in state.values()} == {torch.Tensor}
    assert all(value.is_contiguous() for value in state.values())


def test_print_shows_what_serves_each_module(model):
    assert "Accelerated" not in str(model)
    served = str(accelerated(model, backend="reference"))
    assert "AcceleratedFlowBlock" in served and "AcceleratedStageBlock" in served
    assert served.count("adaln_linear: reference") == 2
    assert "eps=1e-06, adaln: reference" in served


@needs_native
def test_print_names_the_native_backend(model):
    assert "linear_gated_residual: cpp" in str(accelerated(model, backend="cpp"))


def test_accelerating_twice_and_restoring_what_is_plain(model, x):
    before = infer(model, x)
    assert infer(restore(model), x).equal(before)
    first = infer(accelerated(model), x)
    text = str(model)
    assert infer(accelerated(model), x).equal(first) and str(model) == text
    assert infer(restore(model), x).equal(before)


def test_the_backend_is_bound_ahead_of_time(model, x):
    with use_backend("reference"):
        accelerate(model)
    assert "adaln: reference" in str(model) and "cpp" not in str(model)
    first = infer(model, x)
    accelerate(model)
    bound = infer(model, x)
    with use_backend("reference"):
        assert infer(model, x).equal(bound)
        assert infer(restore(model), x).equal(infer(restore(model), x))
    assert (first - bound).abs().max() < 1e-5


def test_hooks_stay(model, x):
    calls = []
    model.block.register_forward_hook(lambda *_: calls.append(1))
    infer(accelerated(model), x)
    infer(restore(model), x)
    assert len(calls) == 2


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("keep", [True, False])
def test_training_after_accelerate_is_training(model, x, keep):
    """The gradients' bits, and the weights after two steps with inference in between."""
    results = []
    for fast in (False, True):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(trained.parameters(), 1e-2)
        if fast:
            accelerate(trained, keep_weights=keep)
        found = [gradients(trained, x)]
        optimizer.step()
        between = infer(trained, x)
        if fast:
            accelerate(trained, keep_weights=keep)
            assert (infer(trained, x) - between).abs().max() < 1e-5
        found.append(gradients(trained, x))
        optimizer.step()
        results.append((found, values_of(trained), infer(trained, x)))
    (plain, weights, answer), (ours, own_weights, own_answer) = results
    for ours_, plain_ in zip(ours, plain, strict=True):
        assert same(ours_, plain_)
    assert same(own_weights, weights)
    assert (answer - own_answer).abs().max() < 1e-5
    assert (answer - infer(model, x)).abs().max() > 1e-3


@pytest.mark.parametrize("keep", [True, False])
def test_changed_weights_are_seen(model, x, keep):
    other = Model()
    accelerate(model, keep_weights=keep)
    infer(model, x)
    model.load_state_dict(other.state_dict())
    assert (infer(model, x) - infer(other, x)).abs().max() < 1e-5


@pytest.mark.parametrize("keep", [True, False])
def test_copies(model, x, keep):
    answer = infer(accelerated(model, keep_weights=keep), x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.flow, Accelerated)
        assert infer(other, x).equal(answer)
        with torch.no_grad():
            other.flow.qkv.weight.add_(1)
        assert not infer(other, x).equal(answer)
        assert infer(model, x).equal(answer)


@pytest.mark.parametrize("keep", [True, False])
def test_another_dtype_and_back(model, x, keep):
    accelerate(model, keep_weights=keep)
    wide = infer(model, x)
    narrow = infer(model.to(torch.bfloat16), x.bfloat16())
    assert narrow.dtype is torch.bfloat16
    assert (narrow - wide).abs().max() < 0.05 * wide.abs().max()
    assert infer(model.float(), x).dtype is torch.float32


@pytest.mark.parametrize("keep", [True, False])
def test_another_device(model, x, keep):
    accelerate(model, keep_weights=keep)
    with torch.no_grad():
        assert model.to("meta")(x.to("meta")).shape == (2, 9, 3)


def test_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        plain = infer(model, x)
        ours = infer(accelerated(model), x)
    assert ours.dtype is plain.dtype
    assert ours.equal(plain)


@torch.inference_mode()
def test_inference_mode(model, x):
    before = model(x)
    assert (accelerated(model, keep_weights=False)(x) - before).abs().max() < 1e-5
    assert restore(model)(x).equal(before)


@pytest.mark.parametrize("keep", [True, False])
def test_compiled(model, x, keep):
    torch._dynamo.reset()
    accelerate(model, keep_weights=keep)
    eager = infer(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (infer(compiled, x) - eager).abs().max() < 1e-5
    with torch.no_grad():
        model.flow.qkv.weight.mul_(2)
    assert (infer(compiled, x) - infer(model, x)).abs().max() < 1e-5


def test_only_the_class_itself_is_swapped():
    class Mine(AdaLN):
        def forward(self, x):
            return x

    model = nn.Sequential(Mine(), nn.LayerNorm(3))
    assert str(accelerated(model)) == str(restore(model))


def test_a_users_own_block():
    class Norm(OpsModule):
        def forward(self, x, scale):
            return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale)

    try:

        @accelerates(Norm)
        class FastNorm(Accelerated, Norm):
            uses = ("adaln",)

            def forward(self, x, scale):
                return self.ops(x).adaln(x, torch.zeros_like(scale), scale)

        norm = Norm()
        x, scale = torch.randn(2, 2, 5, 24).unbind()
        plain = norm(x, scale)
        assert type(accelerated(norm)) is FastNorm and "adaln: " in str(norm)
        assert (infer_two(norm, x, scale) - plain).abs().max() < 1e-5
        assert type(restore(norm)) is Norm
    finally:
        acceleration.replacements.pop(Norm, None)


@torch.no_grad()
def infer_two(module, *arguments):
    return module(*arguments)


def test_what_accelerates_refuses():
    class Stateful(Accelerated, AdaLN):
        def __init__(self):
            super().__init__()

    class Unknown(Accelerated, AdaLN):
        uses = ("softmax",)

    with pytest.raises(TypeError, match="argument 'original': expected a class of modules"):
        accelerates(int)
    with pytest.raises(TypeError, match="expected a subclass of Accelerated and of AdaLN"):
        accelerates(AdaLN)(nn.Linear)
    with pytest.raises(TypeError, match="Stateful defines __init__"):
        accelerates(AdaLN)(Stateful)
    with pytest.raises(ValueError, match=r"Unknown\.uses: .* got 'softmax'"):
        accelerates(AdaLN)(Unknown)
    assert acceleration.replacements[AdaLN].__name__ == "AcceleratedAdaLN"


def test_what_accelerate_refuses(model):
    with pytest.raises(TypeError, match="argument 'model': expected a module, got int"):
        accelerate(3)
    with pytest.raises(TypeError, match="argument 'model': expected a module, got str"):
        restore("model")
    with pytest.raises(ValueError, match=r"argument 'backend': .* got 'fast'"):
        accelerate(model, backend="fast")


def test_a_backend_that_cannot_serve_changes_nothing(model):
    text = str(model.double())
    with pytest.raises(BackendUnavailableError, match=r"module 'block' \(StageBlock\): .*cpp"):
        accelerate(model, backend="cpp")
    assert str(model) == text


def test_a_bound_backend_never_falls_back(model, x):
    accelerate(model, backend="reference")
    assert "reference" in str(model.double())  # which it serves
    if ecar_kernels._native.why_not() is None:
        accelerated(model.float(), backend="cpp").double()
        with pytest.raises(BackendUnavailableError, match=r"does not serve torch\.float64"):
            infer(model, x.double())


@needs_native
class TestHeldPackedAlone:
    """keep_weights=False."""

    WEIGHTS = ("qkv.weight", "proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")

    def test_memory_does_not_grow(self, model, x):
        packing.forget_packed()
        expected = [f"{part}.{name}" for part in ("block", "flow") for name in self.WEIGHTS]
        accelerate(model, keep_weights=False)
        for _ in range(2):
            infer(model, x)
            assert packed(model) == [*expected, "modulation.weight"]
            assert not packing._packed
        with torch._C.DisableTorchFunctionSubclass():
            left = [
                p.untyped_storage().nbytes() for p in model.parameters() if type(p) is PackedWeight
            ]
        assert set(left) == {4}
        whole = {name: p for name, p in model.named_parameters() if name in packed(model)}
        for weight in whole.values():
            assert weight.packed.numel() <= packing.packed_size(*weight.shape)

    def test_beside_each_weight_is_packed_once(self, model, x):
        packing.forget_packed()
        accelerate(model)
        held = {key: entry.tensor.data_ptr() for key, entry in packing._packed.items()}
        assert len(held) == 9 and not packed(model)
        infer(accelerated(model), x)
        assert held == {key: entry.tensor.data_ptr() for key, entry in packing._packed.items()}
        restore(model)
        assert not packing._packed

    def test_a_graph_that_waits_for_its_backward_keeps_its_weights(self, model, x):
        expected = gradients(copy.deepcopy(model), x)
        loss = model(x).square().mean()
        accelerate(model, keep_weights=False)
        infer(model, x)
        model.zero_grad()
        loss.backward()
        assert same({name: p.grad for name, p in model.named_parameters()}, expected)

    def test_a_tied_weight_is_packed_once(self, x):
        first, second = Linear(WIDTH, WIDTH), Linear(WIDTH, WIDTH)
        second.weight = first.weight
        model = nn.Sequential(first, second)
        before = infer(model, x)
        accelerate(model, keep_weights=False)
        assert (infer(model, x) - before).abs().max() < 1e-5
        assert packed(model) == ["0.weight"]

    def test_threads(self, model, x):
        """One reads and writes the weights back, two infer: never an unpacked or a half answer."""
        expected, wrong = infer(accelerated(model, keep_weights=False), x), []

        def work():
            differences = ((infer(model, x) - expected).abs().max() for _ in range(60))
            wrong.extend(difference for difference in differences if difference > 1e-5)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            accelerate(model, keep_weights=False)
            state = model.state_dict()
            assert all(value.isfinite().all() for value in state.values())
            del state
        assert not wrong
