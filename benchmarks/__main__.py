"""`python -m benchmarks`: times every op, merges the rows into a file, prints a table.

Ctrl-C keeps the rows that were measured. benchmarks/README.md says how to read them.
"""

import argparse
import signal
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog="Needs torch alone."
    )
    parser.add_argument(
        "-k", nargs="+", default=[], metavar="WORD", dest="words",
        help="only rows whose names contain all of these words",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the rows' names and exit")
    parser.add_argument(
        "--full",
        action="store_true",
        help="every size, stage and batch, forward and backward (about an hour)",
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="of measuring for each row (default: 0.5)"
    )
    parser.add_argument(
        "--minutes", type=float, help="start no row later (default: 14, no limit with --full)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="merge into FOLDER/<device>/micro.json (default: benchmarks/results)",
    )
    options = parser.parse_args(arguments)
    from benchmarks import micro, results

    chosen = micro.jobs(options.full, options.words)
    if not chosen:
        parser.error(f"argument -k: no row's name contains all of {', '.join(options.words)}")
    if options.list:
        print("\n".join(job.name for job in chosen))
        return 0
    file = results.path("micro", options.results or results.FOLDER)
    minutes = options.minutes or (None if options.full else 14.0)
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        rows = micro.run(
            chosen, file, seconds=options.seconds, minutes=minutes, interrupted=lambda: bool(came)
        )
    except KeyboardInterrupt:
        print(f"interrupted; rows measured before are in {file}", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not rows:
        print("error: nothing was measured", file=sys.stderr)
        return 1
    this = results.read(file)["runs"][-1:]
    print(f"\n{micro.render({'rows': rows, 'runs': this})}\n\nmerged into {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
