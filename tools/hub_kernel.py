"""The library as a kernel of the Hugging Face Hub: python -m tools.hub_kernel, `make hub-kernel`.

Writes a repository as the package `kernels` loads it: `build.toml`, the Python sources in
`torch-ext`, and in `build` one variant for each kind of machine. `torch-stable-abi210-cpu-..` has
the C++ library, for every torch from 2.10 and every Python; `torch-cuda` has the Triton kernels.

Several versions of a kernel may be in one process, next to an installed ecar_kernels. So each
variant's package, and what it registers in torch.ops, is named by its `id`, a hash of the sources:
imports become relative, and the bindings are compiled once more under that name.
"""

import argparse
import base64
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from ecar_kernels.version import __version__

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ecar_kernels"
NAME = "ecar-kernels"
LIBRARY = "libecar_cpu.so"
VERSION = 0  # of the kernel: by the Hub's convention not stable yet
LICENSE = "Apache-2.0"
# Of sm_80 and later; others are compiled from the same Triton source where it runs.
ARCHS = ("8.0", "8.9", "9.0", "10.0", "12.0")

BUILD = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = ["cpu"]

[torch]
include = ["csrc", "csrc/include"]
cxx-flags = ["-DECAR_OPS=TORCH_EXTENSION_NAME", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
src = [{{bindings}}]

[torch.stable-abi]
cpu = "2.10"
"""
# The kernels, once for each instruction set, as CMakeLists.txt compiles them.
KERNEL = """
[kernel.{name}]
backend = "cpu"
depends = ["torch"]
include = ["csrc", "csrc/include"]
cxx-flags = [{flags}]
src = [{sources}]
"""
EXACT = ("-O3", "-fno-fast-math", "-ffp-contract=off")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")))
SETS = {"baseline": (), "avx2": AVX2, "avx512": (*AVX512, "-mprefer-vector-width=512")}
# Older loaders look for a package of the kernel's name in the variant's folder.
FORMER = """\
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from sys import modules

if "{id}" not in modules:
    _spec = spec_from_file_location("{id}", Path(__file__).parent.parent / "__init__.py")
    modules["{id}"] = module_from_spec(_spec)
    _spec.loader.exec_module(modules["{id}"])
globals().update(vars(modules["{id}"]))
"""


def build_toml() -> str:
    """What kernel-builder compiles, in its own form."""

    def listed(values: Iterable[object]) -> str:
        return ", ".join(f'"{value}"' for value in values)

    bindings, cpu = (
        [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(f"csrc/{kind}/*.cpp"))]
        for kind in ("bindings", "cpu")
    )
    each = [path for path in cpu if path.endswith("_isa.cpp")]
    once = [path for path in cpu if path not in each]
    text = BUILD.format(bindings=listed(bindings))
    text += KERNEL.format(name="cpu", flags=listed(EXACT), sources=listed(once))
    for isa, flags in SETS.items():
        flags = (*EXACT, *flags, f"-DECAR_ISA={isa}", f"-DECAR_ISA_{isa}=1")
        text += KERNEL.format(name=f"cpu_{isa}", flags=listed(flags), sources=listed(each))
    return text


def sources() -> list[Path]:
    """The package's Python files; its command line has no use there."""
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py")


def identity(kind: str) -> str:
    """The name of a variant's package and ops, which is another for other sources."""
    digest = hashlib.sha256()
    for path in (*sources(), *sorted(ROOT.glob("csrc/**/*.*")), ROOT / "CMakeLists.txt"):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return f"_ecar_kernels_{kind}_{digest.hexdigest()[:10]}"


def renamed(text: str, depth: int, name: str) -> str:
    """A file's source as part of a package of that name; `depth` folders below its top."""
    dots = "." * (depth + 1)
    text = re.sub(r"^(\s*)from ecar_kernels import ", rf"\1from {dots} import ", text, flags=re.M)
    text = re.sub(r"^(\s*)from ecar_kernels\.", rf"\1from {dots}", text, flags=re.M)
    text = re.sub(r"\"ecar_kernels\.(?=[a-z{])", f'"{name}.', text)
    text = re.sub(r"torch\.ops\.ecar(?=[._,)])", f"torch.ops.{name}", text)
    return re.sub(r"\"ecar(?=(_numbers|_triton|_libraries)?(\"|::))", f'"{name}', text)


def compiled(name: str) -> bytes:
    """The C++ library whose ops are in torch.ops.<name>, from the build that is there."""
    caches = sorted(
        ROOT.glob("build/native-*/CMakeCache.txt"), key=lambda path: path.stat().st_mtime
    )
    if not caches:
        raise SystemExit("hub_kernel: no build in build/: run python setup.py build_ext --inplace")
    folder, cmake = caches[-1].parent, Path(sys.executable).with_name("cmake")
    for command in (
        [cmake, "-S", ROOT, "-B", folder, f"-DECAR_HUB_OPS={name}"],
        [cmake, "--build", folder, "--target", "ecar_hub"],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{done.stdout}{done.stderr}\nhub_kernel: the build failed")
    return (folder / "libecar_hub.so").read_bytes()


def write_variant(folder: Path, name: str, backend: dict, library: bytes | None) -> None:
    for path in sources():
        inner = path.relative_to(PACKAGE)
        to = folder / inner
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(renamed(path.read_text("utf-8"), len(inner.parts) - 1, name), "utf-8")
    if library is None:
        reason = f"the variant {folder.name} is without it"
        (folder / "libecar_cpu.why_not.txt").write_text(reason, "utf-8")
    else:
        (folder / LIBRARY).write_bytes(library)
    former = folder / NAME.replace("-", "_") / "__init__.py"
    former.parent.mkdir()
    former.write_text(FORMER.format(id=name), "utf-8")
    metadata = {
        "id": name,
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": dict(_digests(folder))},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).digest()
            yield path.relative_to(folder).as_posix(), base64.b64encode(digest).decode()


def write(output: Path) -> list[Path]:
    """The repository; the folders of its variants."""
    shutil.rmtree(output, ignore_errors=True)
    for pattern in ("csrc/**/*.h", "csrc/cpu/*.cpp", "csrc/bindings/*.cpp"):
        for path in ROOT.glob(pattern):
            (output / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, output / path.relative_to(ROOT))
    for path in sources():
        to = output / "torch-ext" / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    (output / "build.toml").write_text(build_toml(), "utf-8")
    cpu, cuda = identity("cpu"), identity("cuda")
    variants = {
        f"torch-stable-abi210-cpu-{platform.machine()}-linux": (
            cpu,
            {"type": "cpu"},
            compiled(cpu),
        ),
        "torch-cuda": (cuda, {"type": "cuda", "archs": list(ARCHS)}, None),
    }
    for variant, content in variants.items():
        write_variant(output / "build" / variant, *content)
    return [output / "build" / variant for variant in variants]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "hub", help="replaced if it exists"
    )
    output = parser.parse_args().output
    for folder in write(output):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder}: {size / 2**20:.1f} MiB")
    print(f"{NAME} {__version__}: kernels.get_local_kernel({str(output / 'build')!r})")


if __name__ == "__main__":
    main()
