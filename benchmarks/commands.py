"""Command lines of benchmarks: cases are chosen by name, measured, and merged into a file."""

import argparse
import functools
import operator
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks import results
from benchmarks.results import Record, Row
from ecar.files import read_json

Measure = Callable[[], dict[str, list[Row]]]  # a case's rows by list
INTERRUPTED = 130  # status of a command, as a shell has it


def parser(
    name: str, doc: str, *, writes: bool = True, seconds: float | None = None
) -> argparse.ArgumentParser:
    """Of `python -m benchmarks.NAME`, described by its docstring's first paragraph.

    writes: with --results, and with what `chosen` reads. seconds: of a row, where they can be set.
    """
    found = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}".rstrip("."), description=doc.partition("\n\n")[0]
    )
    add = found.add_argument
    if writes:
        add("--results", type=Path, default=results.FOLDER, metavar="FOLDER",
            help="write FOLDER/<device>/*.json (default: benchmarks/results)")  # fmt: skip
        add("-k", nargs="+", default=[], dest="words", metavar="WORD",
            help="only rows whose names contain all of these words")  # fmt: skip
        add("--list", action="store_true", help="print the rows' names and exit")
    if seconds is not None:
        add("--seconds", type=float, default=seconds, help=f"for each row (default: {seconds:g})")
    return found


def chosen(
    command: argparse.ArgumentParser, options: argparse.Namespace, names: Iterable[str]
) -> list[str]:
    """The names of the rows to measure: none with --list, which prints them."""
    found = [name for name in names if all(word in name for word in options.words)]
    if not found:
        command.error(f"argument -k: no row's name contains all of {', '.join(options.words)}")
    if options.list:
        print("\n".join(found))
    return [] if options.list else found


def run(
    cases: Mapping[str, Measure],
    file: Path,
    kind: str,
    *,
    same: Callable[[Row], Any] = operator.itemgetter("name"),
    order: Sequence[Any] = (),
    this: dict[str, Any] | None = None,
    minutes: float | None = None,
    say: Callable[[Row], str] = lambda row: "done",
    **content: Any,
) -> tuple[Record, int]:
    """Measures cases by name, and merges the rows of each into the file before the next is begun;
    returns the record of these rows alone, and how many cases failed.

    Ctrl-C loses the case that is being measured and no other, and exits with INTERRUPTED. Cases
    that would begin after `minutes` are left out; where one fails, the others go on. say: what is
    printed of a case's first row. content: what the file says besides its rows, and must say
    already if it is there. this, same, order: as of `results.merge`.
    """
    this, begin, failed, interrupted = this or results.describe(), time.monotonic(), 0, False
    before = results.read(file) if file.exists() else {}
    for what, its in content.items():
        if results.dumps(known := before.get(what, its)) != results.dumps(its):
            sys.exit(f"error: {file} has {what} {known}, not {its}; --results takes another folder")
    found: dict[str, list[Row]] = {}

    def interrupt(*_: object) -> None:
        nonlocal interrupted  # what is measured may swallow the exception
        interrupted = True
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGINT, interrupt)
    try:
        for index, (name, measure) in enumerate(cases.items(), start=1):
            taken = (time.monotonic() - begin) / 60
            if minutes is not None and taken > minutes:
                print(f"{minutes:g} minutes are over: {len(cases) - index + 1} rows were left out")
                break
            try:
                rows = measure()
                results.merge(file, kind, this, rows, same, order, **content)
                for key, its in rows.items():
                    found.setdefault(key, []).extend(row | {"run": 0} for row in its)
                said = say(next(iter(rows.values()))[0])
            except Exception as error:
                failed += 1
                said = f"FAILED: {type(error).__name__}: {error}"
            print(f"[{index}/{len(cases)}, {taken:.1f} min] {name}: {said}", flush=True)
            if interrupted:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        print(f"interrupted; rows measured before are in {file}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, former)
    return {"kind": kind, "runs": [this], **content, **found}, failed


def finish(record: Record, failed: int, file: Path, render: Callable[[Record], str]) -> int:
    """Prints a run's tables; the command's status, which is 1 where a case failed or none is."""
    if not results.rows_of(record):
        print("error: nothing was measured", file=sys.stderr)
        return 1
    print(f"\n{render(record)}\n\n{results.environments(record)}\n\nmerged into {file}")
    return int(failed > 0)


def run_chosen(
    command_line: argparse.ArgumentParser,
    options: argparse.Namespace,
    kind: str,
    files: Mapping[str, Mapping[str, Measure]],
    render: Callable[[Record], str],
    content: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    **how: Any,
) -> int:
    """Runs the cases that are chosen of each file, by the file's stem; the command's status."""
    every, status = [name for cases in files.values() for name in cases], 0
    names = chosen(command_line, options, every)
    for stem, cases in files.items():
        if those := {name: cases[name] for name in names if name in cases}:
            file = results.path(stem, options.results)
            found = run(those, file, kind, **how, **content.get(stem, {}))
            status = max(status, finish(*found, file, render))
    return status


def main(
    name: str,
    doc: str,
    measure: Callable[..., dict[str, list[Row]]],
    cases: Mapping[str, Any] | Sequence[str],
    render: Callable[[Record], str],
    *,
    seconds: float | None = None,
    words: Sequence[str] = (),
    arguments: Sequence[str] | None = None,
    **how: Any,
) -> int:
    """The command line of a benchmark that measures a case, by name, for so many seconds each.

    measure: a case's rows by list. words: those of -k, if none are given and nothing is
    listed; how: as of `run`.
    """
    command_line, kind = parser(name, doc, seconds=seconds), name.rpartition(".")[2]
    options = command_line.parse_args(arguments)
    if not options.list:
        options.words = options.words or words
    timed = {} if seconds is None else {"seconds": options.seconds}
    by_name = cases if isinstance(cases, Mapping) else {case: case for case in cases}
    measures = {key: functools.partial(measure, case, **timed) for key, case in by_name.items()}
    return run_chosen(command_line, options, kind, {kind: measures}, render, **how)


def check_counts(
    file: Path,
    doc: str,
    count: Callable[[], dict],
    compare: Callable[[dict, dict], list[str] | None],
    render: Callable[[dict], str],
    arguments: Sequence[str] | None = None,
) -> int:
    """The command of counts that are committed; its status is 1 if `compare` complains."""
    command = parser(file.stem, doc, writes=False)
    command.add_argument("--update", action="store_true", help=f"write {file.name}")
    options, found = command.parse_args(arguments), count()
    print(render(found))
    if options.update:
        results.save(file, found)
        print(f"\nwrote {file}")
        return 0
    if not file.exists():
        print(f"\nnot compared: there is no {file}")
        return 0
    complaints = compare(found, read_json(file))
    if complaints is not None:
        print("", *complaints or ["no count is above the committed one"], sep="\n")
    return int(bool(complaints))


def risen(found: Mapping[str, int], committed: Mapping[str, int], share: float = 0.0) -> list[str]:
    """A line for each count that is above the committed one by more than a share of it, or new."""
    return [
        f"{name}: {count:,}, {f'{committed[name]:,} committed' if name in committed else 'new'}"
        for name, count in found.items()
        if name not in committed or count > committed[name] * (1 + share)
    ]
