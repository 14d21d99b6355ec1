"""Print the recorded results as Markdown tables: ``python benchmarks/table.py [results/loss-cpu.json ...]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from harness import RESULTS


def table(record: dict[str, Any]) -> str:
    """One suite's record as a heading, a line about the device and a table."""
    device = record["device"]
    where = device.get("gpu") or f"{device['cpu']}, {device['threads']} threads"
    lines = [
        f"### {record['suite']}",
        "",
        f"{where}; torch {device['torch']}; {device['date']}.",
        "",
        "| case | implementation | median ms | quartiles | share of copy bandwidth | ours is faster by |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for comparison in record["comparisons"]:
        case = ", ".join(str(value) for value in comparison["case"].values())
        for timing in comparison["timings"]:
            share = "" if timing["share"] is None else f"{timing['share']:.0%}"
            lines.append(
                f"| {case} | {timing['name']} | {timing['median'] * 1e3:.3f} "
                f"| {timing['low'] * 1e3:.3f} to {timing['high'] * 1e3:.3f} | {share} | {timing['speedup']:.2f} |"
            )
            case = ""
    return "\n".join(lines)


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:]] or sorted(RESULTS.glob("*.json"))
    print("\n\n".join(table(json.loads(path.read_text())) for path in paths))
