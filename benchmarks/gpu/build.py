"""The library and Triton's kernels: made on the machine, or packed elsewhere and carried there.

`pack` (make gpu-pack) builds the library, with its CUDA half for one architecture, and compiles the
kernels of all commands under a GPU that is not there (`tools.fake_gpu`): library/, kernels.tar.xz
and manifest.json. There `--carried` uses the library if it is of these sources and that chip, and
loads; Triton finds of the kernels those that are what it would compile. A command's name compiles
the kernels of its rows.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import commands
from benchmarks.gpu.work import Work
from benchmarks.results import ROOT
from ecar_kernels import _native
from ecar_kernels.registry import OPS, resolve

FOLDER = ROOT / "build" / "gpu-carry"
LIBRARY = ("libecar_cpu.so", "libecar_cuda.so")
KERNELS, MANIFEST = "kernels.tar.xz", "manifest.json"
PROCESSES = min(12, os.cpu_count() or 1)  # that compile at once
COMPILE = (sys.executable, "-m", "benchmarks.gpu.build", f"--processes={PROCESSES}")
LOADS = "from ecar_kernels import _native; print(_native.why_not_cuda() or 'loads')"


class StoppedError(RuntimeError):
    """There is no library for this GPU, without which nothing can be shown."""


def build(work: Work) -> None:
    """The library for this device, whose CUDA half must load; then the command's kernels."""
    major, minor = (9, 0) if work.dry else torch.cuda.get_device_capability()
    chip = 10 * major + minor
    if not install(work, chip):
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        # A library of an earlier build may load all the same.
        if reason := work.run("build", command, **_variables(chip)):
            raise StoppedError(f"the build failed: {reason}")
    # This process has loaded nothing yet.
    if reason := _native.why_not() if work.dry else _native.why_not_cuda():
        raise StoppedError(reason)
    how = {"device": work.device, "dtype": torch.bfloat16}
    served = {op: resolve(op, **how).backend for op in OPS}
    work.add("library", f"loaded; {served}", served=served)
    work.run("kernels", [*COMPILE, work.command])


def _variables(chip: int) -> dict[str, str]:
    """Environment of a build that is for one architecture, and fails where a half is missing."""
    return {"ECAR_REQUIRE_NATIVE": "cuda", "TORCH_CUDA_ARCH_LIST": f"{chip // 10}.{chip % 10}"}


def facts(chip: int) -> dict[str, Any]:
    """What the library is for and of."""
    sources = hashlib.sha256()
    for file in sorted([*ROOT.glob("csrc/**/*.*"), ROOT / "CMakeLists.txt"]):
        sources.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    system = f"{platform.system()} {platform.machine()}"
    return {"system": system, "architecture": chip, "sources": sources.hexdigest()[:16]}


def install(work: Work, chip: int) -> bool:
    """Were the carried library and kernels put in their place? If not, a row says why."""
    if work.carried is None:
        return False
    try:
        needs, here = json.loads((work.carried / MANIFEST).read_text("utf-8")), facts(chip)
        differ = [
            f"it is for {k} {needs[k]}, here is {here[k]}" for k in here if needs[k] != here[k]
        ]
        if not differ and not work.dry:
            for name in LIBRARY:
                shutil.copyfile(work.carried / "library" / name, _native.FOLDER / name)
            for name in (_native.WHY_NOT_BUILT, _native.WHY_NOT_CUDA):
                (_native.FOLDER / name).unlink(missing_ok=True)
            unpack(work.carried)
            said = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True)
            differ = [said.stdout + said.stderr] * (said.stdout.strip() != "loads")
    except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
        differ = [f"{work.carried}: {type(error).__name__}: {error}"]
    work.add("carried", *differ[:1] or ["used"], why_not="; ".join(differ) or None)
    return not differ


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
        build = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={scratch}"]
        environment = os.environ | _variables(chip)
        environment |= {"TRITON_CACHE_DIR": f"{scratch}/cache", "TRITON_INTERPRET": "0"}
        compile = [*COMPILE, f"--architecture={chip}"]
        commands = [[*compile, command] for command in ("check", "image", "ops")]
        for command in ([*build, f"--build-temp={scratch}/temp"], *commands):
            subprocess.run(command, cwd=ROOT, check=True, env=environment)
        for name in LIBRARY:
            shutil.copyfile(Path(scratch, "ecar_kernels", name), output / "library" / name)
        archive(Path(scratch, "cache"), output)
    (output / MANIFEST).write_text(json.dumps(facts(chip), indent=1) + "\n", "utf-8")
    for file in sorted(file for file in output.rglob("*") if file.is_file()):
        print(f"{file.relative_to(output)}: {file.stat().st_size / 2**20:.1f} MiB")


def warm(options: argparse.Namespace, index: int) -> None:
    """Runs what has the command's kernels compiled, a process's share; prints how many were."""
    from triton import knobs

    work, counted = Work(options.action, "warm", words=options.words), Counter(compiled=0, found=0)
    knobs.compilation.listener = lambda *, cache_hit, **more: counted.update(
        ["found" if cache_hit else "compiled"]
    )
    with contextlib.ExitStack() as stack:
        if options.architecture is not None:
            from tools.fake_gpu import FakeGPU, chip_of

            work.place = stack.enter_context(FakeGPU(chip_of(options.architecture))).place
        items = importlib.import_module(f"benchmarks.gpu.{work.command}").warm_items(work)
        chosen = [its for its in items if work.begins(its[0], 0)]
        for name, item in chosen[index :: options.processes]:
            item()
            said = f"{counted['compiled']} kernels compiled, {counted['found']} found"
            print(f"{name}: {said}", flush=True)


def main() -> None:
    parser = commands.parser("gpu.build", __doc__, writes=False)
    add = parser.add_argument
    add("action", choices=("pack", "check", "image", "ops"))
    add("--output", type=Path, default=FOLDER)
    add("--architecture", type=int, help="of a GPU that is not here; pack's is 90 if not given")
    add("--processes", type=int, default=1, metavar="N", help="that compile at once (default: 1)")
    add("-k", nargs="+", default=[], metavar="WORD", dest="words", help="rows with all of these")
    options = parser.parse_args()
    if options.action == "pack":
        pack(options.output, options.architecture or 90)
    elif options.processes == 1:  # watched by compute-sanitizer, say
        warm(options, 0)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.processes, context) as pool:
            list(pool.map(functools.partial(warm, options), range(options.processes)))


if __name__ == "__main__":
    main()
