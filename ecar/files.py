"""Files written whole or not at all, and safetensors read with errors that name the file.

Whatever the product writes goes through ``atomic_path``, ``atomic_folder`` or ``append``. What
can't be written is an OSError of one line that names the file, and the file is as it was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "append",
    "atomic_folder",
    "atomic_path",
    "check_output_folder",
    "check_target",
    "link",
    "naming",
    "read_json",
    "read_tensors",
    "require_floats",
    "require_weights",
    "weights_sha256",
    "write_json",
    "write_tensors",
]

_SCRATCH = ".ecar-tmp"
# What a weight may be stored as. Integers and 8-bit floats are quantized: they mean nothing without
# the scales that go with them.
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WEIGHT_CODES = ("F32", "BF16", "F16", "F64")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path of the same name, which replaces ``path`` when the block ends well.

    The folder is made if needed.

    Raises:
        OSError: if ``path`` can't be written, naming it; also for what fails in the block.
    """
    target = Path(path)
    check_target(target)
    with naming(target), _made(target.parent), _scratch(target.parent) as scratch:
        temporary = scratch / target.name
        yield temporary
        _replace(temporary, target)


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike[str], *, keep: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder, whose files replace those in ``folder`` when the block ends well.

    ``folder`` is made if needed; what else it holds stays.

    Args:
        keep: names of files that are left as they are where ``folder`` has them.

    Raises:
        OSError: naming the file that can't be written; none is replaced then.
    """
    folder = Path(folder)
    with naming(folder), _made(folder), _scratch(folder) as scratch:
        try:
            yield scratch
            moves = [
                (file, folder / file.relative_to(scratch))
                for file in sorted(scratch.rglob("*"))
                if file.is_file() and not (file.name in keep and (folder / file.name).exists())
            ]
            for _, target in moves:
                check_target(target)
            for file, target in moves:
                target.parent.mkdir(parents=True, exist_ok=True)
                _replace(file, target)
        except (OSError, SafetensorError) as error:
            name = getattr(error, "filename", None)
            if name is None and str(scratch) in str(error):
                raise _like(error, str(error).replace(str(scratch), str(folder))) from None
            # It names no file, or one in the scratch folder: else the one that was written last.
            files = [file for file in scratch.rglob("*") if file.is_file()]
            last = max(files, key=lambda file: file.stat().st_mtime_ns, default=scratch)
            if name is not None and Path(name).is_relative_to(scratch):
                last = Path(name)
            raise _written(error, folder / last.relative_to(scratch)) from None


def link(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """The same file under a second name, or a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def append(path: str | os.PathLike[str], text: str) -> None:
    """Add ``text`` to the end of a file, whole or not at all.

    Raises:
        OSError: naming the file.
    """
    with naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size, data = os.fstat(descriptor).st_size, text.encode("utf-8")
            if (written := os.write(descriptor, data)) < len(data):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes could be written")
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """A block that writes ``path``: what fails there is an OSError of one line that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _written(error, path) from None


def _written(error: Exception, path: str | os.PathLike[str]) -> Exception:
    """The error of a write that failed, naming the file; what is no such error, as it is."""
    name, message = os.fspath(path), " ".join(str(error).split())
    other = getattr(error, "filename", None)
    if other is None and name in message and "\n" not in str(error):
        return error  # as raised here
    if other is not None and _SCRATCH not in str(other) and not name.startswith(str(other)):
        return error  # of another file, which it names
    code, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
    if isinstance(error, SafetensorError):  # "... I/O error: No space left on device (os error 28)"
        if (found := re.search(r"\(os error (\d+)\)", message)) is None:
            return error
        code = int(found[1])
        reason = os.strerror(code)
    return _like(error, f"{name}: cannot be written ({reason or message})", code)


def _like(error: Exception, message: str, code: int | None = None) -> OSError:
    """An OSError of the class and number of another one, whose text is ``message``."""
    code = getattr(error, "errno", None) if code is None else code
    kind = OSError if code is None else type(OSError(code, ""))
    renamed = kind(" ".join(message.split()))
    renamed.errno = code
    return renamed


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes the folder, and takes it back if it is new and the block fails."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for temporary files in ``folder``: on its disk, under no name that it may have.

    It is locked, so that one that a killed process left is known, and used again.
    """
    path, lock = _claim(folder)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _claim(folder: Path) -> tuple[Path, int | None]:
    """The first scratch folder that no process works in, empty, and its lock."""
    number = 0
    while True:
        path = folder / f"{_SCRATCH}{number}"
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # its owner has just removed it
        except OSError:
            number += 1  # somebody else's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path), os.fstat(lock)):
                for left in path.iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                return path, lock
        except BlockingIOError:
            number += 1
        except FileNotFoundError:
            pass
        except OSError:  # a file system without locks
            os.close(lock)
            with contextlib.suppress(OSError):
                path.rmdir()
            path = folder / f"{_SCRATCH}-{uuid.uuid4().hex}"
            path.mkdir()
            return path, None
        os.close(lock)


def _replace(temporary: Path, target: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    # safetensors makes files that only their owner can read. The folder has what the umask leaves.
    os.chmod(temporary, temporary.parent.stat().st_mode & 0o666)
    os.replace(temporary, target)


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path as such, unless what lies there can't be replaced by a file.

    Raises:
        OSError: naming it: a folder, a device, a file marked read-only.
    """
    target = Path(path)
    with naming(target):
        try:
            mode = target.stat().st_mode
        except FileNotFoundError:
            return target
    if stat.S_ISDIR(mode):
        raise _like(
            IsADirectoryError(errno.EISDIR, ""), f"{target}: is a folder, expected a file's name"
        )
    if not stat.S_ISREG(mode):
        raise _like(OSError(errno.EINVAL, ""), f"{target}: is not a regular file")
    # The bits are asked as well: root may write whatever is marked.
    if not mode & 0o222 or not os.access(target, os.W_OK):
        raise _like(PermissionError(errno.EACCES, ""), f"{target}: is read-only")
    return target


def check_output_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path, if files can be written there; before any work is spent.

    It need not exist: what writes the files makes it.

    Raises:
        OSError: naming the folder, or the nearest above it that exists: no folder, or not writable.
    """
    folder = Path(folder)
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"output folder {nearest}: is not a folder")
    try:
        # A file is tried: permission bits don't tell of read-only file systems, nor bind root.
        tempfile.TemporaryFile(dir=nearest, prefix=".ecar-").close()
    except OSError as error:
        raise type(error)(f"output folder {nearest}: not writable ({error.strerror})") from None
    return folder


def write_json(path: str | os.PathLike[str], values: Any) -> None:
    """Write ``values`` as indented JSON."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON; ValueError naming the file if it is not JSON, OSError if it can't be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: not valid JSON ({error})") from None


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors and string metadata as one safetensors file."""
    with atomic_path(path) as temporary:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata=metadata)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors, on the CPU, and its metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not safetensors, or cut short.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"{name}: no such file")
    with open(name, "rb"):
        pass  # of a file without permission safetensors says that there is none
    try:
        with safe_open(name, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{name}: not a safetensors file, or cut short ({error})") from None


def require_floats(path: str | os.PathLike[str]) -> None:
    """ValueError naming the file and the tensor if a weight is stored in another type than
    ``WEIGHT_DTYPES``. Only the header is read; one that can't be is left to who reads the rest."""
    name = os.fspath(path)
    with contextlib.suppress(SafetensorError), safe_open(name, framework="numpy") as file:
        for key in file.keys():  # noqa: SIM118
            code = file.get_slice(key).get_dtype()
            if code not in _WEIGHT_CODES:
                raise ValueError(f"{name}: {_not_a_float(key, code)}")


def require_weights(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """Check what was read of ``path`` against a model's state.

    Raises:
        ValueError: naming the file and the tensor: missing, unknown, of another shape, of a type
            that holds no plain weights, not finite.
    """
    name = os.fspath(path)
    # Types first: quantized weights come with tensors of their own, and other shapes.
    for key in sorted(tensors.keys() & expected.keys()):
        dtype, plain = tensors[key].dtype, expected[key].dtype
        if expected[key].is_floating_point():
            if dtype not in WEIGHT_DTYPES:
                raise ValueError(f"{name}: {_not_a_float(key, dtype)}")
        elif dtype != plain:
            raise ValueError(f"{name}: tensor {key!r} is {dtype}, expected {plain}")
    for kind, keys in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has the unknown", tensors.keys() - expected.keys()),
    ):
        if keys:
            raise ValueError(
                f"{name}: of another configuration: {kind} tensor {min(keys)!r}"
                + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
            )
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{name}: of another configuration: tensor {key!r} has shape {list(tensor.shape)}, "
                f"expected {list(expected[key].shape)}"
            )
    require_finite(path, tensors)


def _not_a_float(key: str, dtype: object) -> str:
    return (
        f"tensor {key!r} is {dtype}, expected float32, bfloat16, float16 or float64; "
        "quantized weights are not read"
    )


def require_finite(path: str | os.PathLike[str], tensors: dict[str, Tensor]) -> None:
    """ValueError naming the file and the tensor if a weight is NaN or infinite."""
    for name, tensor in tensors.items():
        if tensor.dtype in WEIGHT_DTYPES and not torch.isfinite(tensor).all():
            raise ValueError(f"{os.fspath(path)}: tensor {name!r} holds NaN or infinite values")


def weights_sha256(model: torch.nn.Module) -> str:
    """Digest of names, dtypes, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
