"""What a machine with a GPU would else build and compile, made without one and carried there.

    python -m benchmarks.gpu.carry pack [--output build/gpu-carry]      make gpu-pack
    python -m benchmarks.gpu.carry warm COMMAND [--share I/N] [--fake]

`pack` builds the library, with its CUDA half for one architecture, and has the kernels of all rows
of `make gpu` compiled by Triton for it under a GPU that is not there (`tools.fake_gpu`): library/,
kernels.tar.xz and manifest.json, which says what machine they fit. Run it by the Python, torch and
Triton of the machine they are for. On that machine `--carried` uses what fits; why something does
not is a line, and it is built or compiled there.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import ROOT

FOLDER = ROOT / "build" / "gpu-carry"
LIBRARY = ("libecar_cpu.so", "libecar_cuda.so")
KERNELS, MANIFEST = "kernels.tar.xz", "manifest.json"
LARGEST = 16 * 2**20  # what a lent machine takes of one file, and more than either needs
COMMANDS = ("check", "image", "ops")
OLDEST_TORCH = "2.10"  # of the stable ABI that the library keeps to


def digest(*patterns: str) -> str:
    """Of the names and contents of the tree's files."""
    found = hashlib.sha256()
    for file in sorted(file for pattern in patterns for file in ROOT.glob(pattern)):
        if file.is_file():
            found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def library_facts(architecture: int) -> dict[str, Any]:
    """What the library must find on a machine."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "architecture": architecture,
        "sources": digest("csrc/**/*", "CMakeLists.txt"),
        "glibc": platform.libc_ver()[1],
        "torch": OLDEST_TORCH,
    }


def kernel_facts(architecture: int) -> dict[str, Any]:
    """What Triton's cache must find: its keys are made of these."""
    import triton
    from triton.runtime.cache import triton_key

    return {
        "triton": triton.__version__,
        "python": platform.python_version().rpartition(".")[0],
        "architecture": architecture,
        "sources": digest("ecar_kernels/**/*.py"),
        "compiler": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
    }


AT_LEAST = ("glibc", "torch")  # the others must be equal


def misfit(needs: dict[str, Any], here: dict[str, Any]) -> str | None:
    """None where it fits, else the first reason."""

    def number(version: object) -> tuple[int, ...]:
        return tuple(int(part) for part in str(version).partition("+")[0].split(".")[:2])

    for name, needed in needs.items():
        found = here.get(name)
        if name in AT_LEAST:
            if not found or number(found) < number(needed):
                return f"it is for {name} {needed} or newer, here is {found}"
        elif found != needed:
            return f"it is for {name} {needed}, here is {found}"
    return None


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The needs of the "library" or the "kernels"; ValueError or OSError where there is none."""
    found = json.loads((folder / MANIFEST).read_text("utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get(kind), dict):
        raise ValueError(f"{folder / MANIFEST}: expected an object with {kind!r}")
    return found[kind]


def install_library(folder: Path, dry: bool = False) -> str | None:
    """Puts the carried library into ecar_kernels/; the reason where it does not fit here."""
    from ecar_kernels._native import FOLDER as PACKAGE
    from ecar_kernels._native import WHY_NOT_BUILT, WHY_NOT_CUDA

    try:
        here = library_facts(architecture(dry)) | {"torch": torch.__version__}
        if (reason := misfit(read_manifest(folder, "library"), here)) is not None:
            return reason
        if not dry:
            for name in LIBRARY:
                partial = PACKAGE / f"{name}.partial"
                shutil.copyfile(folder / "library" / name, partial)
                partial.replace(PACKAGE / name)
            for name in (WHY_NOT_BUILT, WHY_NOT_CUDA):
                (PACKAGE / name).unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def install_kernels(folder: Path, chip: int) -> tuple[str | None, int]:
    """Unpacks the kernels into Triton's cache: (the reason where they do not fit, how many)."""
    try:
        here = kernel_facts(chip)
        if (reason := misfit(read_manifest(folder, "kernels"), here)) is not None:
            return reason, 0
        return None, unpack(folder / KERNELS)
    except (OSError, ValueError, ImportError, tarfile.TarError) as error:
        return str(error), 0


def architecture(dry: bool = False) -> int:
    """Of the GPU here; a dry run's is 90."""
    major, minor = (9, 0) if dry else torch.cuda.get_device_capability()
    return 10 * major + minor


def build_variables(architecture: int) -> dict[str, str]:
    """Environment of a build that is for one architecture, and fails where a half is missing."""
    return {
        "ECAR_REQUIRE_NATIVE": "1",
        "TORCH_CUDA_ARCH_LIST": f"{architecture // 10}.{architecture % 10}",
    }


def cache_folder() -> Path:
    """Triton's, as of now."""
    from triton import knobs

    return Path(knobs.cache.dir)


def archive(cache: Path, file: Path) -> int:
    """What a launch needs of each kernel in a cache, its machine code and metadata, as one file;
    how many kernels. Intermediate code stays behind, and the group files, which hold paths."""
    partial, count = file.with_name(f"{file.name}.partial"), 0
    with tarfile.open(partial, "w:xz") as packed:
        for group in sorted(cache.glob("*/__grp__*.json")):
            name = group.name.removeprefix("__grp__")
            for part in (group.with_name(name), group.with_name(name).with_suffix(".cubin")):
                packed.add(part, f"{part.parent.name}/{part.name}")
            count += 1
    partial.replace(file)
    return count


def unpack(file: Path) -> int:
    """Into Triton's cache, with new group files; how many kernels."""
    cache, count = cache_folder(), 0
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file) as packed:
        packed.extractall(cache, filter="data")
        names = packed.getnames()
    for name in names:
        metadata = cache / name
        if metadata.suffix != ".json":
            continue
        group = {path.name: str(path) for path in (metadata, metadata.with_suffix(".cubin"))}
        partial = metadata.with_name(f"__grp__{metadata.name}.partial")
        partial.write_text(json.dumps({"child_paths": group}), "utf-8")
        partial.replace(metadata.with_name(f"__grp__{metadata.name}"))
        count += 1
    return count


def pack(
    output: Path,
    architecture: int = 90,
    processes: int = 2,
    *,
    only: Sequence[str] = (),
    commands: Sequence[str] = COMMANDS,
) -> None:
    """Library and kernels for a machine as this one, with a GPU of that architecture."""
    output.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if not only or "library" in only:
            manifest["library"] = _pack_library(output, Path(scratch), architecture)
        if not only or "kernels" in only:
            manifest["kernels"] = _pack_kernels(
                output, Path(scratch), architecture, processes, commands
            )
    partial = output / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    partial.replace(output / MANIFEST)
    for file in sorted(file for file in output.rglob("*") if file.is_file()):
        size = file.stat().st_size
        print(
            f"{file.relative_to(output)}: {size / 2**20:.1f} MiB"
            f"{', too large to be carried' if size > LARGEST else ''}"
        )


def _pack_library(output: Path, scratch: Path, architecture: int) -> dict[str, Any]:
    if torch.version.cuda is None:
        raise SystemExit(
            f"error: torch {torch.__version__} has no CUDA, and so would the library; "
            "pack by the Python of an environment like the machine's"
        )
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(scratch / "lib"), "--build-temp", str(scratch / "temp")]
    environment = {**os.environ, **build_variables(architecture)}
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    (output / "library").mkdir(exist_ok=True)
    for name in LIBRARY:
        shutil.copyfile(scratch / "lib" / "ecar_kernels" / name, output / "library" / name)
    return library_facts(architecture)


def _pack_kernels(
    output: Path, scratch: Path, architecture: int, processes: int, commands: Sequence[str]
) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(scratch / "cache")
    for command in commands:
        running = []
        for i in range(processes):
            argv = [*warm_command(command, i, processes), "--fake", str(architecture)]
            running.append(subprocess.Popen(argv, cwd=ROOT, env=environment))
        if any([process.wait() for process in running]):
            raise SystemExit(f"error: the kernels of {command} could not be compiled")
    count = archive(scratch / "cache", output / KERNELS)
    print(f"{count} kernels")
    return kernel_facts(architecture)


def warm_command(command: str, index: int, processes: int) -> list[str]:
    share = f"{index}/{processes}"
    return [sys.executable, "-m", "benchmarks.gpu.carry", "warm", command, "--share", share]


def warm(command: str, share: str, architecture: int | None, words: Sequence[str] = ()) -> None:
    """Runs each N-th of what has the command's kernels compiled; prints what was compiled."""
    index, processes = map(int, share.split("/"))
    gpu = None
    with contextlib.ExitStack() as stack:
        if architecture is not None:
            from tools import fake_gpu

            gpu = stack.enter_context(fake_gpu.FakeGPU(fake_gpu.chip_of(architecture)))
        from benchmarks.gpu.checks import warm_items
        from benchmarks.gpu.work import Work

        counted = stack.enter_context(compilations())
        begin = time.perf_counter()
        work = Work(command, "warm", words=tuple(words), place=gpu and gpu.place)
        items = [(name, item) for name, item in warm_items(work) if work.chosen(name)]
        for name, item in items[index::processes]:
            item()
            print(
                f"warm: {command}: {name}: {counted['compiled']} kernels compiled, "
                f"{counted['found']} found, {time.perf_counter() - begin:.0f} s",
                flush=True,
            )


@contextlib.contextmanager
def compilations() -> Any:
    """Counts what Triton compiles within the block, and what it finds in its cache."""
    from triton import knobs

    counted, lock = {"compiled": 0, "found": 0}, threading.Lock()

    def listen(*, cache_hit: bool, **ignored: Any) -> None:
        with lock:
            counted["found" if cache_hit else "compiled"] += 1

    before, knobs.compilation.listener = knobs.compilation.listener, listen
    try:
        yield counted
    finally:
        knobs.compilation.listener = before


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.carry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    packing = actions.add_parser("pack")
    packing.add_argument("--output", type=Path, default=FOLDER)
    packing.add_argument("--architecture", type=int, default=90, help="default: %(default)s")
    packing.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    packing.add_argument("--only", nargs="+", choices=("library", "kernels"), default=())
    warming = actions.add_parser("warm")
    warming.add_argument("command", choices=COMMANDS)
    warming.add_argument("--share", default="0/1", metavar="I/N", help="each N-th, from the I-th")
    warming.add_argument("--fake", type=int, metavar="ARCHITECTURE", help="90, without a GPU")
    warming.add_argument("-k", nargs="+", default=[], metavar="WORD", dest="words")
    options = parser.parse_args(arguments)
    if options.action == "pack":
        pack(options.output, options.architecture, options.processes, only=options.only)
    else:
        warm(options.command, options.share, options.fake, options.words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
