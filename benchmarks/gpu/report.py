"""The record of a run as Markdown."""

from collections.abc import Callable
from typing import Any

from benchmarks.results import duration, markdown


def render(record: dict[str, Any]) -> str:
    """A heading and a table for each part; what was cut off or failed says so."""
    facts = record["environment"]
    lines = ["# GPU results", "", ", ".join(
        f"{name}: {value}" for name, value in facts["gpu"].items()), ""]
    if facts["dry_run"]:
        lines += ["A dry run at tiny sizes on the CPU: it shows that the code runs, no more.", ""]
    for name, part in record["parts"].items():
        lines += [f"## {name}", "", f"{part['status']}, {part['seconds']:.0f} s", ""]
        rows = part["rows"]
        if rows:
            lines += [TABLES.get(name, _plain)(rows), ""]
        if part["status"] != "done" and part["output"]:
            lines += ["```", part["output"], "```", ""]
    return "\n".join(lines)


def _plain(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row if name != "output"))
    table = markdown(names, [[_cell(row.get(name)) for name in names] for row in rows])
    outputs = [f"```\n{row['output'].rstrip()}\n```" for row in rows if row.get("output")]
    return "\n\n".join([table, *outputs])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _end_to_end(rows: list[dict[str, Any]]) -> str:
    table, notes = [], []
    for row in rows:
        if "note" in row:
            notes.append(row["note"])
        elif "baseline" in row:
            notes.append(f"E-CAR-{row['size']}, {row['baseline']}: {duration(row['median'])}, "
                         f"{_cell(row['launches_a_step'])} launches a step")
        else:
            table.append(_image(row))
    head = ("size", "batch", "guidance", "numbers", "graphs", "no graphs", "decoder", "an image",
            "floor: memory", "arithmetic", "launches", "fraction", "GB beyond weights")
    return "\n\n".join([markdown(head, table), *notes])


def _image(row: dict[str, Any]) -> list[str]:
    head = [row["size"], str(row["batch"]), "yes" if row["guided"] else "no", row["numbers"]]
    if "skipped" in row:
        return [*head, row["skipped"], *["-"] * 8]
    decode, eager = row["decode"], row["eager"]["median"]
    graphs = row["graphs"]["median"] if "graphs" in row else None
    peak = row.get("peak_bytes")
    return [
        *head, row["why_no_graph"] or duration(graphs), duration(eager), duration(decode),
        duration(((graphs or eager) + (decode or 0)) / row["batch"]),
        *(duration(row.get(f"floor_{name}")) for name in ("memory", "arithmetic", "launches")),
        f"{row['fraction']:.0%}" if "fraction" in row else "-",
        "-" if peak is None else f"{peak / 1e9:.2f}",
    ]


def _micro(rows: list[dict[str, Any]]) -> str:
    tables = []
    for group in dict.fromkeys(row["group"] for row in rows):
        of = [row for row in rows if row["group"] == group]
        names = list(dict.fromkeys(
            name for row in of for name in (*row.get("variants", {}), *row["failed"])))
        head = ("op", "size", "tokens", "batch", *names, "floor", "best: GB/s", "TFLOP/s")
        tables.append(f"{group}\n\n" + markdown(head, [_op(row, names) for row in of]))
    failed = sorted({f"{row['op']}, {name}: {why}" for row in rows
                     for name, why in row["failed"].items()})
    return "\n\n".join([*tables, *failed])


def _op(row: dict[str, Any], names: list[str]) -> list[str]:
    variants = row.get("variants", {})
    cells = [row["op"], row["size"], str(row["tokens"]), str(row["batch"])]
    for name in names:
        found = variants.get(name)
        mark = "" if found is None or found["how"] == "graph" else f" ({found['how']})"
        said = "no" if name in row["failed"] else "-"
        cells.append(said if found is None else duration(found["median"]) + mark)
    best = min((found["median"] for found in variants.values()), default=None)
    cells.append(duration(row.get("floor")))
    if best is None or "bytes" not in row:
        return [*cells, "-", "-"]
    flops = 2 * row["multiply_adds"] / best
    return [*cells, f"{row['bytes'] / best / 1e9:.0f}", f"{flops / 1e12:.1f}"]


TABLES: dict[str, Callable] = {"end_to_end": _end_to_end, "micro": _micro}
