#!/usr/bin/env python3
"""Puts the tables of benches/record/*.json into docs/performance.md, between `<!-- table NAME -->` and `<!-- end NAME -->`.

    scripts/docs-tables.py             rewrite the document
    scripts/docs-tables.py --check     exit with status 1 if it does not show what the records hold
"""

import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benches" / "peer"))
sys.dont_write_bytecode = True
from tables import markdown  # noqa: E402

SUMMARY = ("config", "batch", "gflop", "ms", "images_s", "gflop_s", "peak_pct", "floor_ms", "floor_pct", "spread_pct", "machine")
BY_OP = ("op", "count", "ms", "share_pct", "gflop_s", "gb_s", "floor_pct")


def number(x):
    if not isinstance(x, float):
        return "-" if x is None else str(x)
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"


def table(rows, columns):
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(number(r[c]) for c in columns) + " |" for r in rows]


def step(record):
    """The record of `iddpm bench step`: its summary, and for its last configuration the ops that take 1 % or more."""
    c, m = record["ceilings"], record["machine"]
    lines = [f"{record['date']}, commit {record['commit']}, {m['cpu']}, {record['threads']} threads of {m['cores']} cores; ceilings "
             f"{c['gflops']:.0f} GFLOP/s ({c['instructions']} multiply-adds) and {c['gb_s']:.0f} GB/s (copy).", ""]
    summary, *ops = record["tables"]
    lines += table(summary["rows"], SUMMARY) + [""]
    last = ops[-1]
    lines += [last["name"] + ":", ""] + table([r for r in last["rows"] if r["share_pct"] >= 1], BY_OP)
    return "\n".join(lines) + "\n"


def render(path):
    record = json.loads(path.read_text())
    return markdown(record) if "rows" in record else step(record)


def main():
    document = ROOT / "docs" / "performance.md"
    text = old = document.read_text()
    for name in re.findall(r"<!-- table (\w+) -->", text):
        path = ROOT / "benches" / "record" / f"{name}.json"
        if not path.exists():
            sys.exit(f"docs-tables: {document.name} has a table {name}, but there is no {path}")
        start, end = f"<!-- table {name} -->\n", f"<!-- end {name} -->"
        before, rest = text.split(start, 1)
        text = before + start + "\n" + render(path) + "\n" + end + rest.split(end, 1)[1]
    if "--check" in sys.argv[1:]:
        sys.exit(0 if text == old else f"docs-tables: {document.name} differs from the records: run scripts/docs-tables.py")
    document.write_text(text)


if __name__ == "__main__":
    main()
