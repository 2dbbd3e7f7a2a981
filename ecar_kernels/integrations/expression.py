"""What a forward computes, as an expression: to know code that is copied from project to project.

The forward is called with stand-ins for the module and its inputs, torch.fx's proxies, which record
what is done with them instead of computing it. So names, comments, the order of operands and
whether a sum is written in place do not matter, and any other step does.
"""

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from torch import fx

# Of a tensor's methods and operators, those that are the same step.
_SAME = {"add_": "add", "mul_": "mul", "reshape": "view"}
_COMMUTATIVE = {"add", "mul"}
# Results that may share memory with what they are taken of.
_VIEWS = {"chunk", "expand", "flatten", "getitem", "permute", "transpose", "unbind", "unsqueeze"}
_VIEWS |= {"detach", "getattr", "squeeze", "unflatten", "view"}


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Records what is done with its proxies."""

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        made: Any = super().create_proxy(kind, target, *args, **kwargs)
        if "chunk" in (target, getattr(target, "__name__", None)):
            return tuple(made[index] for index in range(made.node.args[1]))
        return made


class _Part:
    """Stands for a submodule: it may be called, its tensors read; or for a list of two."""

    def __init__(self, name: str, tracer: _Tracer) -> None:
        self._name, self._tracer = name, tracer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tracer.create_proxy("call_module", self._name, args, kwargs)

    def __iter__(self) -> Iterator["_Part"]:
        return (_Part(f"{self._name}.{index}", self._tracer) for index in range(2))

    def __getattr__(self, name: str) -> Any:
        return self._tracer.create_proxy("get_attr", f"{self._name}.{name}", (), {})


class _Module:
    """Stands for a module, with these attributes and no others."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


@functools.cache
def same_forward(
    forward: Callable,
    known: Callable,
    inputs: int,
    parts: tuple[str, ...],
    tensors: tuple[str, ...] = (),
    values: tuple[tuple[str, Any], ...] = (),
) -> bool:
    """Does a forward compute what `known`, a function of the same arguments, computes?

    inputs: how many arguments it takes after the module, tensors. parts, tensors: names of its
    submodules, and of its parameters, buffers and other attributes that are tensors. values: its
    other attributes, by name. What the forward assigns to attributes counts with what it returns.
    """
    if len(inspect.signature(forward).parameters) != 1 + inputs:
        return False
    numbers: dict[Hashable, int] = {}
    expected, found = (
        _expression(function, inputs, parts, tensors, dict(values), numbers)
        for function in (known, forward)
    )
    return expected is not None and expected == found


def _expression(
    function: Callable,
    inputs: int,
    parts: Sequence[str],
    tensors: Sequence[str],
    values: dict[str, Any],
    numbers: dict[Hashable, int],
) -> Hashable:
    """What a call returns and assigns; None where it asks of its tensors what only values tell."""
    graph = fx.Graph()
    tracer = _Tracer(graph)

    def tensor(kind: str, name: str) -> fx.Proxy:
        return tracer.create_proxy(kind, name, (), {})

    module = _Module(
        **values,
        **{name: _Part(name, tracer) for name in parts},
        **{name: tensor("get_attr", name) for name in tensors},
    )
    given = [tensor("placeholder", f"input{index}") for index in range(inputs)]
    try:
        result = function(module, *given)
        left = {k: v for k, v in vars(module).items() if not isinstance(v, _Part)}
        graph.output(fx.node.map_aggregate((result, left), _node))
        return _number(graph, numbers)
    except Exception:  # whatever another's code raises where it is given no tensors
        return None


def _node(value: Any) -> Any:
    return value.node if isinstance(value, fx.Proxy) else value


def _number(graph: fx.Graph, numbers: dict[Hashable, int]) -> Hashable:
    """What the graph puts out, each step by a number that the same step has in every graph."""
    current: dict[fx.Node, Hashable] = {}

    def key(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return "node", current[value]
        if isinstance(value, (tuple, list)):
            return tuple(map(key, value))
        if isinstance(value, dict):
            return tuple((name, key(item)) for name, item in sorted(value.items()))
        if isinstance(value, slice):
            return "slice", key(value.start), key(value.stop), key(value.step)
        return value

    for node in graph.nodes:
        if node.op == "output":
            return key(node.args)
        name, args, options = _name(node), [key(arg) for arg in node.args], dict(node.kwargs)
        if name == "getitem" and node.args[1] == (slice(None), None):
            name, args[1] = "unsqueeze", 1
        elif name == "chunk":
            dim = options.pop("dim", args.pop() if len(args) > 2 else 0)
            args.append(dim % 2)  # of [B, C]; with what else is chunked, the ops are not called
        if name in _COMMUTATIVE:
            args.sort(key=repr)
        made = node.op == "call_module", name, tuple(args), key(options)
        current[node] = numbers.setdefault(made, len(numbers))
        written = node
        while _in_place(written):
            written = written.args[0]
            if _shares(written):
                raise ValueError("it writes to a tensor that others may share")
            current[written] = current[node]
    raise ValueError("no output")


def _name(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return name if node.op == "call_module" else _SAME.get(name, name)


def _in_place(node: fx.Node) -> bool:
    name: Any = getattr(node.target, "__name__", node.target)
    return node.op in ("call_method", "call_function") and name.endswith("_")


def _shares(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr") or any(
        _name(other) in _VIEWS and other.op != "call_module" for other in (node, *node.users)
    )
