"""An accelerated module computes what the plain one does, whatever was done to its layers, takes
what the plain one takes and refuses what it refuses.

Tables of situations over all modules: a module that `accelerate` knows must have an entry.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

import ecar_kernels
from ecar_kernels import acceleration, modules, swapping
from ecar_kernels.modules import AdaLN, FlowBlock, GatedResidual, Linear, StageAttention, StageBlock
from tests.support import situations
from tests.support.modules import accelerated

WIDTH, TOKENS, BATCH = 32, 10, 2


def six(*shape):
    return [torch.randn(*shape, WIDTH) for _ in range(6)]


# A module, and its calls: a name, the call of (module, arguments), and the arguments.
MODULES = {
    AdaLN: (
        AdaLN,
        {
            "forward": (
                lambda m, a: m(*a),
                lambda: [
                    torch.randn(BATCH, TOKENS, WIDTH),
                    *six(BATCH, TOKENS)[:2],
                    *six(1, 1)[:2],
                ],
            )
        },
    ),
    GatedResidual: (
        GatedResidual,
        {"forward": (lambda m, a: m(*a), lambda: [*six(BATCH, TOKENS)[:3], *six(1, 1)[:1]])},
    ),
    Linear: (
        lambda: Linear(WIDTH, 48),
        {
            "forward": (lambda m, a: m(*a), lambda: [torch.randn(BATCH, TOKENS, WIDTH)]),
            "product": (lambda m, a: m.product(*a), lambda: [torch.randn(BATCH, TOKENS, WIDTH)]),
        },
    ),
    StageAttention: (
        lambda: StageAttention(WIDTH, 4),
        {
            "forward": (
                lambda m, a: m(*a, (2, TOKENS - 2)),
                lambda: [torch.randn(BATCH, TOKENS, WIDTH)],
            )
        },
    ),
    StageBlock: (
        lambda: StageBlock(WIDTH, 4),
        {
            "forward": (
                lambda m, a: m(*a, (2, TOKENS - 2)),
                lambda: [torch.randn(BATCH, TOKENS, WIDTH)],
            )
        },
    ),
    FlowBlock: (
        lambda: FlowBlock(WIDTH, 4),
        {
            "infer": (
                lambda m, a: m.infer(a[0], a[1:7], a[7:]),
                lambda: [torch.randn(BATCH, TOKENS, WIDTH), *six(BATCH, TOKENS), *six(1, 1)],
            ),
            "forward": (
                lambda m, a: torch.stack(m(a[0], a[1], a[2:8], a[8:])),
                lambda: [*six(BATCH, TOKENS)[:2], *six(BATCH, TOKENS), *six(BATCH, 1)],
            ),
        },
    ),
}
CALLS = [(kind, call) for kind, (_, calls) in MODULES.items() for call in calls]
LAYER_CASES = [
    (kind, call, name)
    for kind, call in CALLS
    for name in situations.linear_layers(MODULES[kind][0]())
]
NORM_CASES = [
    (kind, call, name) for kind, call in CALLS for name in situations.norms(MODULES[kind][0]())
]


def made(kind: type, call: str):
    make, calls = MODULES[kind]
    run, arguments = calls[call]
    module = make().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return module, run, arguments()


def named(case):
    return "-".join(getattr(part, "__name__", str(part)) for part in case)


def agree(got, right):
    return (got - right).abs().max() <= 1e-4 * max(1, right.abs().max().item())


def reference(module, run, arguments):
    """By a plain copy under the reference."""
    with ecar_kernels.use_backend("reference"):
        return run(module, arguments)


@pytest.mark.parametrize("change", situations.LAYERS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("case", LAYER_CASES, ids=named)
@pytest.mark.parametrize("order", ["before", "after", "later"])
@torch.no_grad()
def test_what_stands_in_a_layers_place_is_called(case, change, order):
    """It is there before `accelerate`, comes after it, or after a first call."""
    kind, call, name = case
    module, run, arguments = made(kind, call)
    plain = copy.deepcopy(module)
    untouched = reference(plain, run, arguments)
    if order == "before":
        torch.manual_seed(0)
        change(module, name, module.get_submodule(name))
    ecar_kernels.accelerate(module)
    if order == "later":
        run(module, arguments)
    if order != "before":
        torch.manual_seed(0)
        change(module, name, module.get_submodule(name))
    torch.manual_seed(0)
    change(plain, name, plain.get_submodule(name))
    right = reference(plain, run, arguments)

    def is_right(got):
        if change is situations.dynamic_quantization:
            # The layer rounds its inputs to 255 levels: one at an edge may come out a level off.
            return (got - right).norm() <= 0.3 * (untouched - right).norm()
        return agree(got, right)

    assert not agree(untouched, right) or change in (situations.a_tied_weight,)
    assert is_right(run(module, arguments))
    if (
        change is not situations.no_bias
        and change is not situations.a_tied_weight
        and (call == "infer" or kind is StageBlock)
    ):
        assert name in str(ecar_kernels.report(module))
    ecar_kernels.restore(module)
    assert is_right(run(module, arguments))


@pytest.mark.parametrize("change", situations.NORMS)
@pytest.mark.parametrize("case", NORM_CASES, ids=named)
@torch.no_grad()
def test_any_norm(case, change):
    kind, call, name = case
    module, run, arguments = made(kind, call)
    situations.NORMS[change](module, name, module.get_submodule(name))
    right = reference(copy.deepcopy(module), run, arguments)
    assert agree(run(accelerated(module), arguments), right)
    assert name in str(ecar_kernels.report(module))


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every other column": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "one number": lambda x: x.flatten()[:1].expand(x.shape),
    "rows of a wider one": lambda x: torch.cat((x, x), -1)[..., x.shape[-1] :],
    "odd address": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),
    "empty": lambda x: x[:0] if x.shape[0] > 1 else x,
    "no tokens": lambda x: x[:, :0] if x.shape[1] > 1 else x,
    "float64": lambda x: x.double(),
}
WRONG = {
    "narrower": lambda x: x[..., :-1],
    "one channel": lambda x: x[..., :1],
    "half": lambda x: x[..., : x.shape[-1] // 2],
    "wider": lambda x: torch.cat((x, x), -1),
    "another dtype": lambda x: x.bfloat16(),
    "integers": lambda x: x.long(),
    "no tensor": lambda x: x.tolist(),
    "a number": lambda x: 1.0,
    "another device": lambda x: x.to("meta"),
    "more images": lambda x: torch.cat((x, x, x)),
}


def outcome(call):
    try:
        return call(), None
    except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        return None, error


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CALLS, ids=named)
@torch.no_grad()
def test_it_takes_what_the_plain_module_takes(case, layout):
    kind, call = case
    module, run, arguments = made(kind, call)
    module = module.double() if layout == "float64" else module
    changed = [LAYOUTS[layout](a) for a in arguments]
    right, refused = outcome(lambda: reference(module, run, [a.contiguous() for a in changed]))
    got, error = outcome(lambda: run(module, changed))
    assert (error is None) == (refused is None), error
    fast, error = outcome(lambda: run(accelerated(module), changed))
    assert (error is None) == (refused is None), error
    if refused is None and right.numel():
        assert fast.dtype == got.dtype == right.dtype
        assert agree(got, right) and agree(fast, right)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("case", CALLS, ids=named)
@torch.no_grad()
def test_it_refuses_what_the_plain_module_refuses(case, wrong):
    """Each argument in turn. Never a result where the plain module has none."""
    kind, call = case
    module, run, arguments = made(kind, call)
    fast = accelerated(copy.deepcopy(module))
    for index, argument in enumerate(arguments):
        changed = [*arguments[:index], WRONG[wrong](argument), *arguments[index + 1 :]]
        right, refused = outcome(lambda a=changed: reference(module, run, a))
        got, error = outcome(lambda a=changed: run(fast, a))
        assert (error is None) == (refused is None), (index, error, refused)
        if refused is None and right.device.type != "meta":
            assert agree(got, right)


def test_every_accelerated_module_has_an_entry():
    kinds = {kind for kind in acceleration.replacements if kind.__module__ == modules.__name__}
    assert kinds == set(MODULES)


def test_the_report_is_a_table_of_what_was_swapped_and_left():
    class Other(StageBlock):
        def forward(self, x):
            return x

    model = nn.ModuleDict({"block": StageBlock(WIDTH, 4), "other": Other(WIDTH, 4)})
    model["block"].proj = situations.Adapter(model["block"].proj)
    ecar_kernels.accelerate(model)
    rows = {row.name: row for row in ecar_kernels.report(model)}
    assert rows["block"].served["stage_attention"] in ecar_kernels.registry.BACKENDS
    assert rows["block"].left == ("proj: a Adapter in the place of a Linear",)
    assert rows["other"].served == {} and "a subclass" in rows["other"].left[0]
    table = str(ecar_kernels.report(model)).splitlines()
    assert table[0].split() == ["module", "class", "served", "left"]
    assert len(table) == 1 + len(rows)
    with pytest.raises(TypeError, match="argument 'model': expected a module, got int"):
        ecar_kernels.report(3)


def test_it_warns_where_nothing_is_swapped():
    with pytest.warns(UserWarning, match="accelerate: no module of Sequential was swapped"):
        ecar_kernels.accelerate(nn.Sequential(nn.Linear(4, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ecar_kernels.accelerate(FlowBlock(WIDTH, 4))


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    model = nn.ModuleList([StageBlock(WIDTH, 4), StageBlock(WIDTH, 4)])
    ecar_kernels.accelerate(model[0], backend="reference")
    before = [(type(module), vars(module).get("_binding")) for module in model.modules()]
    prepare, calls = swapping._prepare_weights, []

    def fail(module, keep):
        calls.append(module)
        if len(calls) == 3:
            raise MemoryError("no memory for the packed weights")
        prepare(module, keep)

    monkeypatch.setattr(swapping, "_prepare_weights", fail)
    with pytest.raises(MemoryError):
        ecar_kernels.accelerate(model)
    assert [(type(module), vars(module).get("_binding")) for module in model.modules()] == before
