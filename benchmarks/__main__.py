"""`python -m benchmarks`: time every op, print one table, write it as JSON.

Other options go to pytest: `python -m benchmarks -k adaln`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks import environment, results, table

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="every size, stage and batch, forward and backward (about an hour)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.5,
        help="of measuring for each row (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="rows that would begin later are left out (default: 14, none with --full)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=results.FOLDER,
        help="folder to write <device>/micro.json into (default: %(default)s)",
    )
    options, for_pytest = parser.parse_known_args()
    minutes = options.minutes or (None if options.full else 14.0)
    facts, file = environment.describe(), results.path("micro", options.results)
    with tempfile.TemporaryDirectory() as folder:
        collected = Path(folder) / "benchmark.json"
        counter = _LeftOut()
        status = pytest.main(
            [
                str(HERE / "micro"),
                f"--benchmark-json={collected}",
                "--benchmark-quiet",
                "-p",
                "no:cacheprovider",
                "-q",
                "--no-header",
                f"--ecar-seconds={options.seconds}",
                *(["--ecar-full"] if options.full else []),
                *([f"--ecar-minutes={minutes}"] if minutes is not None else []),
                *for_pytest,
            ],
            plugins=[counter],
        )
        text = collected.read_text(encoding="utf-8") if collected.exists() else ""
    if status != 0:
        return int(status)
    if not text:
        print("error: nothing was measured", file=sys.stderr)
        return 1
    results.write(file, "micro", facts, **json.loads(text), left_out=counter.count)
    print(f"\n{table.render(results.read(file))}\n\nwrote {file}")
    return 0


class _LeftOut:
    """Counts the rows for which there was no time."""

    count = 0

    def pytest_runtest_logreport(self, report):
        self.count += report.skipped


if __name__ == "__main__":
    sys.exit(main())
