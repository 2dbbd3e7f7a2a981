"""Launch settings: the measured ones of this device where there are any, else the usual ones.

A file for each kind of GPU holds the choices that `ecar tune` measured there: those shipped in
ecar_kernels/tuned, and before them the user's own, in $ECAR_TUNED, else ~/.cache/ecar/tuned. It
is data, checked when it is read. Between the row counts that were measured, the nearest in log
space decides. Nothing is ever measured at a call.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

ENVIRONMENT_VARIABLE = "ECAR_TUNED"
SHIPPED = Path(__file__).parent / "tuned"
FORMAT = 1
MAX_BYTES = 1 << 24
_ENTRY = {"op": str, "key": list, "rows": int, "settings": dict}
# No more than any kernel was ever built with; a larger number is damage.
_MOST = {"num_warps": 32, "num_stages": 16}
_NO_POWER = ("num_stages", "program_rows", "shares")
_NAMED = ("backend",)  # settings that are names; who asked knows which there are

Settings = TypeVar("Settings")
# (op, key) -> the settings measured, by rows.
Table = dict[tuple[str, tuple], dict[int, dict[str, Any]]]

_tables: dict[int, Table] = {}
_measured: dict[tuple, Any] = {}
_MOST_MEASURED = 4096
_warned: set[int] = set()
_forced: dict[str, Any] = {}
_recorded: list[tuple] | None = None


def choose(op: str, key: tuple, rows: int, usual: Settings, device: int | None) -> Settings:
    """The settings for `rows` rows of a problem `key` of `op`, on the CUDA device of that index.

    `usual` where nothing was measured for this op and key, and on None, no CUDA device. A file
    for the device that lacks the key or cannot be used is warned about, once per device.
    """
    if _recorded is not None:
        _recorded.append((op, key, rows, usual))
    if op in _forced:
        return _forced[op]
    if device is None:
        return usual
    asked = (op, key, rows, device)
    try:
        found = _measured[asked]
    except KeyError:
        if len(_measured) >= _MOST_MEASURED:
            _measured.clear()
        found = _measured[asked] = _search(op, key, rows, usual, device)
    return usual if found is None else found


@contextlib.contextmanager
def forced(**settings: object) -> Iterator[None]:
    """Within the block, `op=settings` are what `choose` gives: to measure them, or test them."""
    before = dict(_forced)
    _forced.update(settings)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple]]:
    """Collects (op, key, rows, usual) of every `choose` within the block."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def forget() -> None:
    """Read the files again at the next call."""
    for cache in (_tables, _measured, _warned):
        cache.clear()


def file_name(device_name: str) -> str:
    """Its file: "NVIDIA H100 80GB HBM3" -> "NVIDIA-H100-80GB-HBM3.json"."""
    return re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-") + ".json"


def user_folder() -> Path:
    """Where `ecar tune` writes: $ECAR_TUNED, else ecar/tuned in the user's cache."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(cache) / "ecar" / "tuned"


def read(path: Path, device_name: str) -> Table:
    """The choices in a file. ValueError naming the file and what is wrong with it; OSError."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES} bytes")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    expected = {"format": FORMAT, "device": device_name}
    for name, value in expected.items():
        if not isinstance(content, dict) or content.get(name) != value:
            got = content.get(name) if isinstance(content, dict) else content
            raise ValueError(f"{path}: expected {name!r} to be {value!r}, got {str(got)[:80]!r}")
    if not isinstance(content.get("choices"), list):
        raise ValueError(f"{path}: expected 'choices' to be a list")
    table: Table = {}
    for number, entry in enumerate(content["choices"]):
        if (problem := _problem(entry)) is not None:
            raise ValueError(f"{path}: choices[{number}]: {problem}")
        by_rows = table.setdefault((entry["op"], tuple(entry["key"])), {})
        by_rows[entry["rows"]] = entry["settings"]
    return table


def entries(path: Path, device_name: str) -> list[dict]:
    """What `write` was given for a file; nothing where there is none. Raises as `read`."""
    if not path.is_file():
        return []
    read(path, device_name)
    return json.loads(path.read_text("utf-8"))["choices"]


def write(path: Path, device_name: str, choices: list[dict], **about: str) -> None:
    """Write a file that `read` takes, whole or not at all. `about`: versions and the like.

    Raises:
        OSError: naming the file, which is as it was.
    """
    content = {"format": FORMAT, "device": device_name, **about}
    lines = ",\n".join(f"  {json.dumps(choice)}" for choice in choices)
    text = f'{json.dumps(content, indent=1)[:-2]},\n "choices": [\n{lines}\n ]\n}}\n'
    temporary = None
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.stat().st_mode & 0o222:  # root may, whatever is marked
            raise PermissionError(errno.EACCES, "it is read-only")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
        temporary = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        read(temporary, device_name)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise type(error)(f"{path}: cannot be written ({reason})") from None
        raise


def _problem(entry: object) -> str | None:
    if not isinstance(entry, dict):
        return f"expected an object, got {str(entry)[:80]!r}"
    for name, kind in _ENTRY.items():
        if type(entry.get(name)) is not kind:
            return f"expected {name!r} to be of type {kind.__name__}, got {entry.get(name)!r:.80}"
    if not all(type(part) in (int, str) for part in entry["key"]):
        return f"expected 'key' to hold integers and strings, got {entry['key']!r:.80}"
    if entry["rows"] < 1:
        return f"expected 'rows' to be positive, got {entry['rows']}"
    for name, value in entry["settings"].items():
        if type(value) is (str if name in _NAMED else bool):
            continue
        if type(value) is not int or not 1 <= value <= _MOST.get(name, 4096):
            return (
                f"setting {name!r}: expected true, false or an integer from 1 to "
                f"{_MOST.get(name, 4096)}, got {value!r:.80}"
            )
        if name not in _NO_POWER and value & (value - 1):
            return f"setting {name!r}: expected a power of two, got {value}"
    return None


def _search(op: str, key: tuple, rows: int, usual: Any, device: int) -> Any:
    table = _tables.get(device)
    if table is None:
        table = _tables[device] = _load(device)
    by_rows = table.get((op, key))
    if not by_rows:
        if table:
            warn(
                device,
                f"the measured launch settings of this {_name(device)} have none for {op} of {key}",
            )
        return None
    nearest = min(by_rows, key=lambda measured: (abs(math.log(measured / max(rows, 1))), measured))
    settings = by_rows[nearest]
    fields = {field.name: type(getattr(usual, field.name)) for field in dataclasses.fields(usual)}
    if {name: type(value) for name, value in settings.items()} != fields:
        warn(
            device,
            f"the measured launch settings of {op} of {key} are of another version of ecar_kernels",
        )
        return None
    return type(usual)(**settings)


def _load(device: int) -> Table:
    """What is shipped and, before it, what the user measured; a bad file counts as none."""
    name = _name(device)
    table: Table = {}
    for folder in (SHIPPED, user_folder()):
        path = folder / file_name(name)
        try:
            if path.is_file():
                for problem, by_rows in read(path, name).items():
                    table.setdefault(problem, {}).update(by_rows)
        except (OSError, ValueError) as error:
            warn(device, f"measured launch settings cannot be used: {error}")
    return table


def _name(device: int) -> str:
    return torch.cuda.get_device_name(device)


def warn(device: int, message: str) -> None:
    """Once for each GPU."""
    if device not in _warned:
        _warned.add(device)
        warnings.warn(
            f"ecar_kernels: {message}; the usual settings are taken, `ecar tune` "
            f"measures (said once for each GPU)",
            stacklevel=2,
        )
