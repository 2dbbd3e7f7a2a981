"""The record of a command as Markdown."""

from typing import Any

from benchmarks.results import duration, markdown

HIDDEN = ("group", "failed", "output", "served", "stop")
SECONDS = (
    *("floor", "memory", "arithmetic", "launches"),
    *("image", "predicted", "first_call", "span", "busy"),
)


def render(record: dict[str, Any]) -> str:
    """A heading and tables for each part; what was cut off or failed says so."""
    facts = record["environment"]
    command = f": {record['command']}" if "command" in record else ""
    lines = [f"# GPU results{command}", ", ".join(f"{k}: {v}" for k, v in facts["gpu"].items())]
    if facts["dry_run"]:
        lines.append("A dry run at tiny sizes on the CPU: it shows that the code runs, no more.")
    for name, part in record["parts"].items():
        rows = part["rows"]
        lines += [f"## {name}", f"{part['status']}, {part['seconds']:.0f} s"]
        for group in dict.fromkeys(row.get("group", "") for row in rows):
            cells = [_cells(row) for row in rows if row.get("group", "") == group]
            names = list(dict.fromkeys(name for its in cells for name in its))
            lines += [group] * bool(group)
            lines.append(markdown(names, [[its.get(name, "-") for name in names] for its in cells]))
        failures = [(row["op"], *its) for row in rows for its in row.get("failed", {}).items()]
        lines += sorted({f"{op}, {way}: {why}" for op, way, why in failures})
        outputs = [its["output"].rstrip() for its in (*rows, part) if its.get("output")]
        lines += [f"```\n{output}\n```" for output in outputs]
    return "\n\n".join(lines)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """A row by column, each way that was timed in a column of its own."""
    return {
        column: _cell(column, value)
        for name, its in row.items()
        if name not in HIDDEN
        for column, value in (its.items() if name in ("ways", "floors") else [(name, its)])
    }


def _cell(name: str, value: Any) -> str:
    if isinstance(value, dict) and "median" in value:  # of a timing
        how = value.get("how", "graph")
        return duration(value["median"]) + (f" ({how})" if how != "graph" else "")
    if isinstance(value, dict):
        return ", ".join(f"{name}: {part}" for name, part in value.items()) or "-"
    if isinstance(value, float):
        return duration(value) if name in SECONDS else f"{value:.4g}"
    return "-" if value is None else str(value).replace("|", "/")
