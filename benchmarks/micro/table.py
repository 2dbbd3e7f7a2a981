"""A micro run's record as Markdown: ours, beside other libraries, and what a call costs."""

from typing import Any

from benchmarks.results import duration, figures, markdown

CASE = ("op", "size", "tokens", "batch")
HEADER = (*CASE, "time", "eager / ours", "compiled / ours", "rate", "of the floor")
PEER_HEADER = (*CASE, "by", "time", "it / ours", "rate", "of the floor")
FAILURE_HEADER = ("op", "by", "rows", "not measured, for")
OVERHEAD_HEADER = (
    "op",
    "ours",
    "through the API",
    "eager",
    "least: ours",
    "least: API",
    "least: eager",
)
OWN = ("eager", "compiled", "ours")
NAMES = {"compiled": "torch.compile"}


def render(record: dict[str, Any]) -> str:
    rows = [row for row in record["rows"] if not row.get("overhead")]
    calls = [row for row in record["rows"] if row.get("overhead")]
    parts = []
    if rows:
        parts.append(markdown(HEADER, map(_cells, rows)))
    if beside := [_peer_cells(row, name) for row in rows for name in peers(row)]:
        parts += [
            "Other libraries in the same rounds. Attention over the newest stage needs no "
            "mask and has none;\nover all stages it has the stages' mask.",
            markdown(PEER_HEADER, beside),
        ]
    if failed := failures(rows):
        parts.append(markdown(FAILURE_HEADER, failed))
    if calls:
        parts += [
            "One call at 16 x 768 out of the cache, and `least`, the same call on one token "
            "of 8 channels\nor one pixel: what it costs beside its arithmetic.",
            markdown(OVERHEAD_HEADER, map(_overhead_cells, calls)),
        ]
    if "rates" in record:
        rates = record["rates"]
        parts.append(
            f"Measured in this run: copy {rates['bytes_per_second'] * 1e-9:.1f} GB/s, "
            f"read and written bytes; GEMM {2e-9 * rates['multiply_adds_per_second']:.0f} "
            "GFLOP/s. The floor is the longer of\nbytes and multiply-adds over these. "
            "`time` is ours; ratios are of medians of interleaved rounds."
        )
    if record.get("left_out"):
        parts.append(f"{record['left_out']} rows were left out: out of time.")
    return "\n\n".join(parts)


def fraction_of_floor(row: dict[str, Any], name: str = "ours") -> float:
    return row["floor_seconds"] / row["seconds"][name]["median"]


def peers(row: dict[str, Any]) -> list[str]:
    """The other libraries that were timed at this row."""
    return [name for name in row["seconds"] if name not in OWN]


def failures(rows: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(op, way, rows, reason): what was not timed. One line for all rows of the same reason."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        for name, reason in row["failures"].items():
            key = (_name(row), NAMES.get(name, name), reason)
            counts[key] = counts.get(key, 0) + 1
    of = {name: sum(_name(row) == name for row in rows) for name, *_ in counts}
    return [
        (op, way, f"{count} of {of[op]}", reason) for (op, way, reason), count in counts.items()
    ]


def _name(row: dict[str, Any]) -> str:
    return row["op"] + (
        " backward" if row["backward"] else ", all stages" if row.get("whole") else ""
    )


def _case(row: dict[str, Any]) -> tuple[str, ...]:
    return (_name(row), row["size"], str(row["tokens"]), str(row["batch"]))


def _rate(row: dict[str, Any], seconds: float) -> str:
    # GEMMs are judged by their FLOPs, the rest by their bytes.
    return (
        f"{2e-9 * row['multiply_adds'] / seconds:.1f} GFLOP/s"
        if row["multiply_adds"]
        else f"{1e-9 * row['bytes'] / seconds:.1f} GB/s"
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    medians = {name: values["median"] for name, values in row["seconds"].items()}
    ours = medians["ours"]
    ratios = [
        f"{figures(medians[name] / ours)}x" if name in medians else "-"
        for name in ("eager", "compiled")
    ]
    return (*_case(row), duration(ours), *ratios, _rate(row, ours), f"{fraction_of_floor(row):.0%}")


def _peer_cells(row: dict[str, Any], name: str) -> tuple[str, ...]:
    seconds = row["seconds"][name]["median"]
    ratio = seconds / row["seconds"]["ours"]["median"]
    return (
        *_case(row),
        name,
        duration(seconds),
        f"{figures(ratio)}x",
        _rate(row, seconds),
        f"{fraction_of_floor(row, name):.0%}",
    )


def _overhead_cells(row: dict[str, Any]) -> tuple[str, ...]:
    names = ("ours", "api", "eager", "least", "api, least", "eager, least")
    return (row["op"], *(duration(row["seconds"][name]["median"]) for name in names))
