"""The compile gate's table, docs/compile-gate.json, and the page docs/compile-gate.md from it.

    {"fields": [...], "3.9.0": {family: {case: {chip: [a value for each field]}}}, ...}

Each entry has a digest of what it was made from: the kernel with everything that it calls, the
case's settings, and the compiler. Where a kernel lies in its file, comments and docstrings do not
count, nor does the Python or the machine that it is taken on.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

Key = tuple[str, str, int]  # family, case, chip


@dataclass(frozen=True)
class Entry:
    """What a case that passed takes of the chip, under the settings of its launch."""

    num_warps: int
    num_stages: int
    max_registers: int | None  # that the launch allows a thread; None leaves it to ptxas
    registers: int
    shared_bytes: int
    instructions: dict[str, int]
    digest: str


FIELDS = [field.name for field in dataclasses.fields(Entry)]


def load(path: Path) -> dict[str, dict[Key, Entry]]:
    """Entries by Triton's version; none where there is no file."""
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text("utf-8"))
        fields = table.pop("fields")
    except (ValueError, LookupError, TypeError, AttributeError):
        fields = None
    if fields != FIELDS:
        raise ValueError(
            f"{path} is no table of the compile gate with the fields {FIELDS}; "
            "delete it to record all cases again"
        )
    return {
        version: {
            (family, case, int(chip)): Entry(*values)
            for family, cases in families.items()
            for case, chips in cases.items()
            for chip, values in chips.items()
        }
        for version, families in table.items()
    }


def save(path: Path, table: dict[str, dict[Key, Entry]]) -> None:
    """The JSON alone, a line for each case."""
    parts = [f'{{"fields": {json.dumps(FIELDS)}']
    for version, entries in sorted(table.items(), key=lambda item: _natural(item[0])):
        families = []
        for family, cases in _grouped(entries).items():
            lines = [
                json.dumps(case)
                + ": "
                + json.dumps(
                    {
                        str(chip): [getattr(entry, field) for field in FIELDS]
                        for chip, entry in chips.items()
                    }
                )
                for case, chips in cases.items()
            ]
            families.append(f"{json.dumps(family)}: {{\n" + ",\n".join(lines) + "}")
        parts.append(f"{json.dumps(version)}: {{" + ",\n".join(families) + "}")
    write(path, ",\n".join(parts) + "}\n")


def _grouped(entries: dict[Key, Entry]) -> dict[str, dict[str, dict[int, Entry]]]:
    """By family, case and chip, in one order whatever they were recorded in."""
    found: dict[str, dict[str, dict[int, Entry]]] = {}
    for key in sorted(entries, key=lambda key: (key[0], _natural(key[1]), key[2])):
        family, case, chip = key
        found.setdefault(family, {}).setdefault(case, {})[chip] = entries[key]
    return found


def _natural(text: str) -> list[tuple[int, str]]:
    """Numbers in it sort as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def page(table: dict[str, dict[Key, Entry]]) -> str:
    """A row for each kernel by the newest Triton, and a line for each Triton."""
    versions = sorted((version for version in table if table[version]), key=_natural)
    newest = versions[-1]
    chips = sorted({chip for _, _, chip in table[newest]})
    lines = [
        "# What the Triton kernels take of each chip",
        "",
        "Made by `make compile-gate`, without a GPU, and from",
        "[compile-gate.json](compile-gate.json), which lists every kernel under every launch",
        "setting. A cell holds the range of registers a thread, the most shared memory a block in",
        "KiB, and the instructions that multiply matrices: UTCHMMA (Blackwell's tensor memory),",
        "HGMMA (Hopper's warp groups), HMMA (one warp), or FFMA alone. The gate fails where a",
        "kernel spills registers, and where each HGMMA waits for the one before it. Nothing on",
        "this page is a time.",
        "",
        f"| Triton {newest} | cases | " + " | ".join(f"sm_{chip}" for chip in chips) + " |",
        "|---|--:|" + "---|" * len(chips),
    ]
    kernels: dict[tuple[str, str], list[dict[int, Entry]]] = {}
    for family, cases in _grouped(table[newest]).items():
        for case, its in cases.items():
            kernels.setdefault((family, case.partition(" ")[0]), []).append(its)
    for (family, kernel), cases in kernels.items():
        name = kernel if kernel.startswith(family) else f"{family}: {kernel}"
        cells = [_cell([its[chip] for its in cases if chip in its]) for chip in chips]
        lines.append(f"| {name} | {len(cases)} | " + " | ".join(cells) + " |")
    lines.append("")
    lines += [
        f"Triton {version}: {len(table[version])} compiled, most registers "
        f"{max(entry.registers for entry in table[version].values())}, most shared memory "
        f"{max(entry.shared_bytes for entry in table[version].values()) / 1024:.0f} KiB."
        for version in versions
    ]
    return "\n".join(lines) + "\n"


def _cell(entries: list[Entry]) -> str:
    if not entries:
        return ""
    kinds = {
        kind
        for entry in entries
        for kind in entry.instructions
        if kind.endswith("HMMA") or kind == "HGMMA"
    }
    if any(entry.instructions for entry in entries) and not kinds:
        kinds = {"FFMA"}
    registers = [entry.registers for entry in entries]
    shared = max(entry.shared_bytes for entry in entries) / 1024
    return ", ".join([f"{min(registers)}-{max(registers)}", f"{shared:.1f}", *sorted(kinds)])


def digest(*parts) -> str:
    """Of values that JSON knows; the order of a dict's keys does not count."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


@functools.cache
def kernel_digest(kernel) -> str:
    """Of a triton.jit function: its code, that of all that it calls, and the globals they read."""
    found: dict[str, list] = {}
    todo = [kernel]
    while todo:
        function = todo.pop()
        name = f"{function.__module__}.{function.__name__}"
        if name in found:
            continue
        tree = function.parse()
        read = {}
        for used, value in _globals(tree, function):
            if hasattr(type(value), "cache_key"):  # a triton.jit function
                todo.append(value)
                read[used] = f"{value.__module__}.{value.__name__}"
            elif isinstance(getattr(value, "value", value), bool | int | float | str | None):
                read[used] = repr(value)
            else:
                raise ValueError(
                    f"{name} reads {used}, a {type(value).__name__}, which has no digest"
                )
        found[name] = [written(tree), bool(getattr(function, "noinline", False)), read]
    return digest(found)


def _globals(tree: ast.AST, function):
    """Names and values of what it reads from its module, but for what comes with Triton."""
    if inspect.getclosurevars(function.fn).nonlocals:
        raise ValueError(f"{function.__name__} has a closure, whose values have no digest")
    nodes = list(ast.walk(tree))
    local = {node.arg for node in nodes if isinstance(node, ast.arg)}
    local |= {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    at_hand = {name: value for name, value in function.fn.__globals__.items() if name not in local}
    for node in nodes:
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and isinstance(at_hand.get(node.value.id), ModuleType)
        ):
            module = at_hand[node.value.id]
            name, value = f"{node.value.id}.{node.attr}", getattr(module, node.attr, None)
        elif isinstance(node, ast.Name) and node.id in at_hand:
            name, value = node.id, at_hand[node.id]
        else:
            continue
        home = getattr(value, "__module__", None) or type(value).__module__
        of_triton = home.partition(".")[0] == "triton" and type(value).__name__ != "constexpr"
        if not isinstance(value, ModuleType) and not of_triton:
            yield name, value


def written(node) -> str:
    """A syntax tree as text that is the same in every Python: what is absent or empty is left
    out, and docstrings, too."""
    if isinstance(node, list):
        return "[" + ", ".join(map(written, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    given = (
        f"{name}={written(value)}"
        for name, value in fields.items()
        if value is not None and value != []
    )
    return f"{type(node).__name__}({', '.join(given)})"
