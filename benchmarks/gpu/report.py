"""The record of a command as Markdown."""

from typing import Any

from benchmarks.results import duration, markdown

HIDDEN = ("output", "on", "served", "variants", "slowest")
Rows = list[dict[str, Any]]


def render(record: dict[str, Any]) -> str:
    """A heading and a table for each part; what was cut off or failed says so."""
    facts = record["environment"]
    command = f": {record['command']}" if "command" in record else ""
    lines = [f"# GPU results{command}", ", ".join(f"{k}: {v}" for k, v in facts["gpu"].items())]
    if facts["dry_run"]:
        lines.append("A dry run at tiny sizes on the CPU: it shows that the code runs, no more.")
    for name, part in record["parts"].items():
        lines += [
            f"## {name}",
            f"{part['status']}, {part['seconds']:.0f} s",
            *_tables(part["rows"]),
        ]
        if part["status"] != "done" and part["output"]:
            lines.append(f"```\n{part['output']}\n```")
    return "\n\n".join(lines)


def _tables(rows: Rows) -> list[str]:
    """An op's ways, images, and anything else by the rows' own names."""
    groups = dict.fromkeys(row["group"] for row in rows if "group" in row)
    found = [_ops(group, [row for row in rows if row.get("group") == group]) for group in groups]
    failed = {
        f"{row['op']}, {name}: {why}"
        for row in rows
        if "group" in row
        for name, why in row["failed"].items()
    }
    images = [row for row in rows if "setting" in row]
    rest = [row for row in rows if not {"group", "setting"} & row.keys()]
    return [*found, *sorted(failed), *([_images(images)] if images else []), *_plain(rest)]


def _plain(rows: Rows) -> list[str]:
    if not rows:
        return []
    names = [n for n in dict.fromkeys(name for row in rows for name in row) if n not in HIDDEN]
    parts = [markdown(names, [[_cell(row.get(name)) for name in names] for row in rows])]
    parts += [f"```\n{row['output'].rstrip()}\n```" for row in rows if row.get("output")]
    for row in rows:
        if row.get("slowest"):
            slowest = [
                (kernel[:90].replace("|", "/"), str(times), duration(seconds))
                for kernel, (times, seconds) in row["slowest"].items()
            ]
            parts += [row["name"], markdown(("kernel", "times", "together"), slowest)]
    return parts


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_cell(part)}" for name, part in value.items()) or "-"
    return "-" if value is None else str(value).replace("|", "/")


def _images(rows: Rows) -> str:
    head = (
        "size", "batch", "numbers", "way", "steps", "graphs", "no graphs", "an image",
        "floor: memory", "arithmetic", "launches", "fraction", "GB more", "first call",
    )  # fmt: skip
    return markdown(head, map(_image, rows))


def _image(row: dict[str, Any]) -> list[str]:
    eager = row["eager"]["median"]
    graphs = row["graphs"]["median"] if "graphs" in row else None
    return [
        *(str(row[name]) for name in ("size", "batch", "numbers", "way", "setting")),
        row["why_no_graph"] or duration(graphs),
        duration(eager),
        duration((graphs or eager) / row["batch"]),
        *(duration(row.get(f"floor_{name}")) for name in ("memory", "arithmetic", "launches")),
        f"{row['fraction']:.0%}" if "fraction" in row else "-",
        f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else "-",
        duration(row["first_call"]),
    ]


def _ops(group: str, rows: Rows) -> str:
    names = dict.fromkeys(n for row in rows for n in (*row.get("variants", {}), *row["failed"]))
    head = ("op", "size", "tokens", "batch", "auto", *names, "floor", "best: GB/s", "TFLOP/s")
    return f"{group}\n\n" + markdown(head, [_op(row, list(names)) for row in rows])


def _op(row: dict[str, Any], names: list[str]) -> list[str]:
    variants = row.get("variants", {})
    cells = [str(row.get(name, "-")) for name in ("op", "size", "tokens", "batch", "served")]
    for name in names:
        found = variants.get(name)
        mark = "" if found is None or found["how"] == "graph" else f" ({found['how']})"
        said = "no" if name in row["failed"] else "-"
        cells.append(said if found is None else duration(found["median"]) + mark)
    cells.append(duration(row.get("floor")))
    if not variants or "bytes" not in row:
        return [*cells, "-", "-"]
    best = min(found["median"] for found in variants.values())
    flops = 2 * row["multiply_adds"] / best
    return [*cells, f"{row['bytes'] / best / 1e9:.0f}", f"{flops / 1e12:.1f}"]
