"""`python -m benchmarks`: time the ops, print the table, write the JSON.

Other options go to pytest: `python -m benchmarks -k adaln`.
"""

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks import environment

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--results",
        type=Path,
        default=HERE / "results",
        help="folder to write <device>/<date>.json into (default: %(default)s)",
    )
    options, for_pytest = parser.parse_known_args()
    facts = environment.describe()
    output = options.results / environment.slug(facts["device"]) / f"{facts['date'][:10]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    status = pytest.main(
        [
            str(HERE),
            f"--benchmark-json={output}",
            "--benchmark-warmup=on",
            "--benchmark-warmup-iterations=10",
            "--benchmark-max-time=0.25",
            "--benchmark-group-by=group",
            "--benchmark-columns=min,median,iqr,rounds",
            "--benchmark-disable-gc",
            *for_pytest,
        ]
    )
    if status == 0:
        print(f"{facts['device']}, {facts['threads']} threads, load {facts['load_before']}")
        print(f"wrote {output}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
