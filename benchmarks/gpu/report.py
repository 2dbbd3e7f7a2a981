"""The record of a command as Markdown."""

from typing import Any

from benchmarks.results import duration, markdown

HIDDEN = ("output", "on", "served", "variants", "slowest")


def render(record: dict[str, Any]) -> str:
    """A heading and a table for each part; what was cut off or failed says so."""
    facts = record["environment"]
    command = f": {record['command']}" if "command" in record else ""
    lines = [
        f"# GPU results{command}",
        "",
        ", ".join(f"{name}: {value}" for name, value in facts["gpu"].items()),
        "",
    ]
    if facts["dry_run"]:
        lines += ["A dry run at tiny sizes on the CPU: it shows that the code runs, no more.", ""]
    for name, part in record["parts"].items():
        lines += [f"## {name}", "", f"{part['status']}, {part['seconds']:.0f} s", ""]
        if part["rows"]:
            lines += [_tables(part["rows"]), ""]
        if part["status"] != "done" and part["output"]:
            lines += ["```", part["output"], "```", ""]
    return "\n".join(lines)


def _tables(rows: list[dict[str, Any]]) -> str:
    """By what the rows are: an op's ways, images, or anything by the rows' own names."""
    found, rest = [], list(rows)
    for has, table in (("group", _ops), ("setting", _images)):
        these = [row for row in rest if has in row]
        rest = [row for row in rest if has not in row]
        found += [table(these)] if these else []
    return "\n\n".join(filter(None, [*found, _plain(rest)]))


def _plain(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    names = [
        name for name in dict.fromkeys(name for row in rows for name in row) if name not in HIDDEN
    ]
    table = markdown(names, [[_cell(row.get(name)) for name in names] for row in rows])
    outputs = [f"```\n{row['output'].rstrip()}\n```" for row in rows if row.get("output")]
    slowest = [
        f"{row['name']}\n\n"
        + markdown(
            ("kernel", "times", "together"),
            [
                [kernel[:90].replace("|", "/"), str(times), duration(seconds)]
                for kernel, (times, seconds) in row["slowest"].items()
            ],
        )
        for row in rows
        if row.get("slowest")
    ]
    return "\n\n".join([table, *outputs, *slowest])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_cell(part)}" for name, part in value.items()) or "-"
    return "-" if value is None else str(value).replace("|", "/")


def _images(rows: list[dict[str, Any]]) -> str:
    head = (
        "size",
        "batch",
        "numbers",
        "way",
        "steps",
        "graphs",
        "no graphs",
        "an image",
        "floor: memory",
        "arithmetic",
        "launches",
        "fraction",
        "GB more",
        "first call",
    )
    return markdown(head, [_image(row) for row in rows])


def _image(row: dict[str, Any]) -> list[str]:
    eager = row["eager"]["median"]
    graphs = row["graphs"]["median"] if "graphs" in row else None
    peak = row.get("peak_bytes")
    return [
        row["size"],
        str(row["batch"]),
        row["numbers"],
        row["way"],
        row["setting"],
        row["why_no_graph"] or duration(graphs),
        duration(eager),
        duration((graphs or eager) / row["batch"]),
        *(duration(row.get(f"floor_{name}")) for name in ("memory", "arithmetic", "launches")),
        f"{row['fraction']:.0%}" if "fraction" in row else "-",
        "-" if peak is None else f"{peak / 1e9:.2f}",
        duration(row["first_call"]),
    ]


def _ops(rows: list[dict[str, Any]]) -> str:
    tables = []
    for group in dict.fromkeys(row["group"] for row in rows):
        of = [row for row in rows if row["group"] == group]
        names = list(
            dict.fromkeys(name for row in of for name in (*row.get("variants", {}), *row["failed"]))
        )
        head = ("op", "size", "tokens", "batch", "auto", *names, "floor", "best: GB/s", "TFLOP/s")
        tables.append(f"{group}\n\n" + markdown(head, [_op(row, names) for row in of]))
    failed = sorted(
        {f"{row['op']}, {name}: {why}" for row in rows for name, why in row["failed"].items()}
    )
    return "\n\n".join([*tables, *failed])


def _op(row: dict[str, Any], names: list[str]) -> list[str]:
    variants = row.get("variants", {})
    cells = [row["op"], row["size"], str(row["tokens"]), str(row["batch"]), row.get("served", "-")]
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
