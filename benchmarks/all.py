"""`python -m benchmarks.all`: every benchmark one after another, within a number of minutes.

Each writes its own file under benchmarks/results/<device>/; the tables follow at the end. A
part that fails does not stop those after it, and the command then ends with 1.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results, table


@dataclass(frozen=True)
class Part:
    """A benchmark, and its share of the time."""

    name: str
    share: float
    begins: float = 0.0  # minutes that it takes beside those that it is told to measure

    def command(self, minutes: float, folder: Path, quick: bool) -> list[str]:
        measured = max(0.0, minutes - self.begins)
        settings = {
            "micro": [f"--minutes={minutes:.2f}", "--seconds=0.4"],
            "end_to_end": [f"--minutes={measured:.2f}"],
            "table3": [f"--minutes={measured:.2f}"],
            "gemm": [f"--seconds={minutes * 60 / GEMM_CELLS:.3f}"],
            "ablation": [f"--minutes={measured:.2f}"],
            "scaling": [f"--minutes={measured:.2f}"],
            **{name: [f"--seconds={30 * minutes:.1f}"] for name in EXAMPLES},
        }
        small = {
            "micro": ["--minutes=9", "-k", "euler_step-forward and 16tokens and batch1"],
            "end_to_end": ["--sizes", "S", "--compile", "--steps", "9"],
            "table3": ["--sizes", "S", "--steps", "9"],
            "memory": ["--sizes", "digits", "--training", "digits", "--batch", "2"],
            "gemm": ["--widths", "16", "--rows", "3"],
            "scaling": ["--pixels", "256"],
            "profile": ["--size", "digits", "--steps", "3"],
            "saved": ["--size", "digits"],
            "backward": ["--sizes", "S", "--ops", "euler_step", "--seconds", "0.01"],
            "example-dit": ["--size", "S"],
            "example-var": ["--size", "d12"],
        }
        module = {"micro": "benchmarks", **EXAMPLES}.get(self.name, f"benchmarks.{self.name}")
        goal = (
            ["--output", str(results.path(self.name, folder))]
            if self.name in EXAMPLES
            else ["--results", str(folder)]
        )
        return [
            sys.executable,
            "-m",
            module,
            *goal,
            *settings.get(self.name, []),
            *(small.get(self.name, []) if quick else []),
        ]


EXAMPLES = {"example-dit": "examples.accelerate_dit", "example-var": "examples.accelerate_var"}
FURTHER = (
    Part("ablation", 0.08, 0.5),
    Part("scaling", 0.12, 0.5),
    Part("profile", 0.01),
    Part("saved", 0.01),
    Part("backward", 0.03, 1.0),
    *(Part(name, 0.02) for name in EXAMPLES),
)
GEMM_CELLS = 60  # of `benchmarks.gemm`'s widths, layers and rows: 3 x 4 x 4, and packing
# The quick and certain first; shares and beginnings as seen on two cores of a Zen 5.
PARTS = (
    Part("table2", 0.01),
    Part("micro", 0.33),
    Part("end_to_end", 0.30, 5.0),
    Part("table3", 0.20, 2.0),
    Part("memory", 0.11),
    Part("gemm", 0.05),
)


def main() -> int:
    names = [part.name for part in (*PARTS, *FURTHER)]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.all", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="in all, about (default: %(default)s)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=names,
        metavar="PART",
        help="of " + ", ".join(names),
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="next to nothing of each: does it run? The figures mean nothing",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=results.FOLDER,
        help="folder to write <device>/*.json into (default: %(default)s)",
    )
    options = parser.parse_args()
    parts = [part for part in (*PARTS, *FURTHER) if part.name in options.only]
    whole = sum(part.share for part in parts)
    failed, begin = [], time.monotonic()
    for part in parts:
        began = time.monotonic()
        command = part.command(options.minutes * part.share / whole, options.results, options.quick)
        print(f"\n== {part.name}: {' '.join(command[1:])}", flush=True)
        status = subprocess.run(command, cwd=results.ROOT, env=os.environ).returncode
        if status != 0:
            failed.append(part.name)
        print(f"== {part.name}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    files = [results.path(part.name, options.results) for part in parts if part.name not in failed]
    print(
        "\n"
        + "\n\n".join(f"## {file.stem}\n\n{table.render(results.read(file))}" for file in files)
    )
    print(
        f"\n{(time.monotonic() - begin) / 60:.1f} minutes in all"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
