"""A micro run's record as one Markdown table, and a second one of what a call costs."""

from typing import Any

from benchmarks.results import duration, figures, markdown

HEADER = ("op", "size", "tokens", "batch", "time", "eager / ours", "compiled / ours", "rate",
          "of the floor")
OVERHEAD_HEADER = ("op", "ours", "through the API", "eager", "least: ours", "least: API",
                   "least: eager")


def render(record: dict[str, Any]) -> str:
    rows = [row for row in record["rows"] if not row.get("overhead")]
    calls = [row for row in record["rows"] if row.get("overhead")]
    parts = []
    if rows:
        parts.append(markdown(HEADER, map(_cells, rows)))
    if calls:
        parts += ["One call at 16 x 768 out of the cache, and `least`, the same call on one token "
                  "of 8 channels\nor one pixel: what it costs beside its arithmetic.",
                  markdown(OVERHEAD_HEADER, map(_overhead_cells, calls))]
    if "rates" in record:
        rates = record["rates"]
        parts.append(f"Measured in this run: copy {rates['bytes_per_second'] * 1e-9:.1f} GB/s, "
                     f"read and written bytes; GEMM {2e-9 * rates['multiply_adds_per_second']:.0f} "
                     "GFLOP/s. The floor is the longer of\nbytes and multiply-adds over these. "
                     "`time` is ours; ratios are of medians of interleaved rounds.")
    if failed := [row for row in rows if row["failures"]]:
        parts.append("\n".join(f"{_name(row)}: torch.compile: {row['failures']['compiled']}"
                               for row in failed))
    if record.get("left_out"):
        parts.append(f"{record['left_out']} rows were left out: out of time.")
    return "\n\n".join(parts)


def fraction_of_floor(row: dict[str, Any]) -> float:
    return row["floor_seconds"] / row["seconds"]["ours"]["median"]


def _name(row: dict[str, Any]) -> str:
    return row["op"] + (" backward" if row["backward"] else "")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    medians = {name: values["median"] for name, values in row["seconds"].items()}
    ours = medians["ours"]
    # GEMMs are judged by their FLOPs, the rest by their bytes.
    rate = (f"{2e-9 * row['multiply_adds'] / ours:.1f} GFLOP/s" if row["multiply_adds"]
            else f"{1e-9 * row['bytes'] / ours:.1f} GB/s")
    ratios = [f"{figures(medians[name] / ours)}x" if name in medians else "-"
              for name in ("eager", "compiled")]
    return (_name(row), row["size"], str(row["tokens"]), str(row["batch"]), duration(ours),
            *ratios, rate, f"{fraction_of_floor(row):.0%}")


def _overhead_cells(row: dict[str, Any]) -> tuple[str, ...]:
    names = ("ours", "api", "eager", "least", "api, least", "eager, least")
    return (row["op"], *(duration(row["seconds"][name]["median"]) for name in names))
