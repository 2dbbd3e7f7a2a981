"""The library and Triton's kernels: made on the machine, or packed elsewhere and carried there.

    python -m benchmarks.gpu.build pack [--output build/gpu-carry]      make gpu-pack
    python -m benchmarks.gpu.build check|image|ops [--architecture 90] [-k WORD ...]

`pack` builds the library, with its CUDA half for one architecture, and compiles the kernels of all
commands under a GPU that is not there (`tools.fake_gpu`): library/, kernels.tar.xz and
manifest.json, which says what machine they fit. Run it by the Python, torch and Triton of the
machine they are for. There `--carried` uses what fits; why something does not is a row, and it is
made there. A command's name compiles the kernels of its rows.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.torch_version import TorchVersion

from benchmarks.gpu.work import Work
from benchmarks.results import ROOT
from ecar_kernels import _native
from ecar_kernels.registry import OPS

FOLDER = ROOT / "build" / "gpu-carry"
LIBRARY = ("libecar_cpu.so", "libecar_cuda.so")
KERNELS, MANIFEST = "kernels.tar.xz", "manifest.json"
SOURCES = {"library": ("csrc/**/*", "CMakeLists.txt"), "kernels": ("ecar_kernels/**/*.py",)}
OLDEST_TORCH = "2.10"  # of the stable ABI that the library keeps to
AT_LEAST = ("glibc", "torch")  # the other facts must be equal
PROCESSES = 12  # that compile at once


def build(work: Work) -> None:
    """The library for this device, whose CUDA half must load; then the command's kernels."""
    major, minor = (9, 0) if work.dry else torch.cuda.get_device_capability()
    chip, reason = 10 * major + minor, None
    if not install("library", work, chip):
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        code, output = work.run(command, _variables(chip))
        if code != 0:  # a library of an earlier build may load all the same
            reason = f"the build failed: {(output.strip().splitlines() or [str(code)])[-1]}"
        work.ran("build", code, output)
    # This process has loaded nothing yet: what it finds is what the next parts will.
    reason = reason or (_native.why_not() if work.dry else _native.why_not_cuda())
    name = "C++ library" if work.dry else "CUDA half"
    work.add(name, reason or "loaded", ok=reason is None, stop=reason)
    if reason is None:
        served = {op: work.backends(op)["auto"].backend for op in OPS}
        said = ", ".join(f"{op}: {backend}" for op, backend in served.items())
        work.add("backends", said, served=served)
        if not install("kernels", work, chip):
            compile_kernels(work)


def _variables(chip: int) -> dict[str, str]:
    """Environment of a build that is for one architecture, and fails where a half is missing."""
    return {"ECAR_REQUIRE_NATIVE": "cuda", "TORCH_CUDA_ARCH_LIST": f"{chip // 10}.{chip % 10}"}


def compile_kernels(work: Work, more: dict[str, str] | None = None, *how: str) -> None:
    """Triton's kernels of the command's rows into its cache, by all cores."""
    count = 1 if work.dry else min(PROCESSES, os.cpu_count() or 1)
    argv = [sys.executable, "-m", "benchmarks.gpu.build", work.command, *how, "--share"]
    with ThreadPoolExecutor(count) as pool:
        done = pool.map(lambda i: work.run([*argv, f"{i}/{count}"], more), range(count))
        for i, (code, output) in enumerate(done, 1):
            work.ran(f"kernels compiled, {i} of {count}", code, output)


def warm(options: argparse.Namespace) -> None:
    """Runs what has the command's kernels compiled; prints how many were."""
    from triton import knobs

    work, counted = Work(options.action, "warm", words=options.words), Counter(compiled=0, found=0)
    knobs.compilation.listener = lambda *, cache_hit, **more: counted.update(
        ["found" if cache_hit else "compiled"]
    )
    index, processes = map(int, options.share.split("/"))
    with contextlib.ExitStack() as stack:
        if options.architecture is not None:
            from tools import fake_gpu

            chip = fake_gpu.chip_of(options.architecture)
            work.place = stack.enter_context(fake_gpu.FakeGPU(chip)).place
        items = importlib.import_module(f"benchmarks.gpu.{work.command}").warm_items(work)
        for name, item in [its for its in items if work.chosen(its[0])][index::processes]:
            item()
            said = f"{counted['compiled']} kernels compiled, {counted['found']} found"
            print(f"{name}: {said}", flush=True)


def facts(kind: str, chip: int) -> dict[str, Any]:
    """What decides whether the "library" or the "kernels" fit a machine."""
    sources = hashlib.sha256()
    for file in sorted(file for pattern in SOURCES[kind] for file in ROOT.glob(pattern)):
        if file.is_file():
            sources.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    system = f"{platform.system()} {platform.machine()}"
    found = {"system": system, "architecture": chip, "sources": sources.hexdigest()[:16]}
    if kind == "library":
        return found | {"glibc": platform.libc_ver()[1], "torch": torch.__version__}
    import triton
    from triton.runtime.cache import triton_key

    return found | {
        "triton": triton.__version__,
        "python": platform.python_version().rpartition(".")[0],
        "compiler": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
    }


def misfit(needs: dict[str, Any], here: dict[str, Any]) -> str | None:
    """None where it fits, else the first reason."""
    for name, needed in needs.items():
        newer = name in AT_LEAST
        if here[name] != needed and not (newer and TorchVersion(here[name]) >= needed):
            return f"it is for {name} {needed}{' or newer' * newer}, here is {here[name]}"
    return None


def install(kind: str, work: Work, chip: int) -> bool:
    """Was the carried "library", or were the "kernels", put in their place? A row says why not."""
    if work.carried is None:
        return False
    file = work.carried / MANIFEST
    try:
        reason = misfit(json.loads(file.read_text("utf-8"))[kind], facts(kind, chip))
        if reason is None and not work.dry:
            (_install_library if kind == "library" else unpack)(work.carried)
    except (OSError, ValueError, LookupError, TypeError, ImportError, shutil.ReadError) as error:
        reason = f"{file}: {type(error).__name__}: {error}"
    work.add(f"carried {kind}", reason or "used", why_not=reason)
    return reason is None


def _install_library(folder: Path) -> None:
    for name in LIBRARY:
        shutil.copyfile(folder / "library" / name, _native.FOLDER / name)
    for name in (_native.WHY_NOT_BUILT, _native.WHY_NOT_CUDA):
        (_native.FOLDER / name).unlink(missing_ok=True)


def archive(cache: Path, folder: Path) -> None:
    """What a launch needs of a cache's kernels, machine code and metadata, as one file."""
    for file in [file for file in cache.glob("*/*") if file.suffix not in (".json", ".cubin")]:
        file.unlink()
    shutil.make_archive(str(folder / KERNELS.partition(".")[0]), "xztar", cache)


def unpack(folder: Path) -> None:
    """The kernels into Triton's cache, whose group files hold paths."""
    from triton import knobs

    cache = Path(knobs.cache.dir)
    shutil.unpack_archive(folder / KERNELS, cache, filter="data")
    for group in cache.glob("*/__grp__*.json"):
        paths = {path.name: str(path) for path in group.parent.glob("[!_]*")}
        group.write_text(json.dumps({"child_paths": paths}), "utf-8")


def pack(output: Path, chip: int) -> None:
    """Library and kernels for a machine as this one, with a GPU of that architecture."""
    (output / "library").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", scratch]
        command += ["--build-temp", f"{scratch}/temp"]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | _variables(chip))
        for name in LIBRARY:
            shutil.copyfile(Path(scratch, "ecar_kernels", name), output / "library" / name)
        more = {"TRITON_CACHE_DIR": f"{scratch}/cache", "TRITON_INTERPRET": "0"}
        for name in ("check", "image", "ops"):
            work = Work(name, name)
            compile_kernels(work, more, "--architecture", str(chip))
            if not all(row["ok"] for row in work.rows):
                raise SystemExit(f"error: the kernels of {name} could not be compiled")
        archive(Path(scratch, "cache"), output)
    manifest = {kind: facts(kind, chip) for kind in SOURCES}
    manifest["library"]["torch"] = OLDEST_TORCH
    (output / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    for file in sorted(file for file in output.rglob("*") if file.is_file()):
        print(f"{file.relative_to(output)}: {file.stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("action", choices=("pack", "check", "image", "ops"))
    add("--output", type=Path, default=FOLDER)
    add("--architecture", type=int, help="of a GPU that is not here; pack's is 90 if not given")
    add("--share", default="0/1", metavar="I/N", help="each N-th row, from the I-th")
    add("-k", nargs="+", default=[], metavar="WORD", dest="words", help="rows with all of these")
    options = parser.parse_args()
    if options.action == "pack":
        pack(options.output, options.architecture or 90)
    else:
        warm(options)


if __name__ == "__main__":
    main()
