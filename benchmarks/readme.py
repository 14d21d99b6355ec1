"""Draw the README's table of speeds and its plot anew from the recorded results: ``python benchmarks/readme.py``.

What stands between the two markers in README.md is replaced; ``docs/results/score-KIND.svg`` is written for each kind
of CPU that has a record (``harness.kind``). Nothing is measured here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness import RESULTS

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- speed: written by benchmarks/readme.py -->", "<!-- /speed -->"
KINDS = {"cpu-amx": "On a CPU with AMX", "cpu": "On a CPU without AMX"}
OURS = ("rvae_fast fp32", "rvae_fast bf16")


def load(suite: str, kind: str) -> list[dict[str, Any]]:
    """A suite's comparisons, each with the facts of the run it was made in; empty where it was never recorded."""
    path = RESULTS / f"{suite}-{kind}.json"
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    return [{"device": record["device"], **comparison} for comparison in record["comparisons"]]


def medians(comparison: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by implementation."""
    return {timing["name"]: 1e3 * timing["median"] for timing in comparison["timings"]}


def quickest(times: dict[str, float], start: str, end: str = "") -> float | None:
    """The least of the times whose names begin and end so, or None."""
    return min((ms for name, ms in times.items() if name.startswith(start) and name.endswith(end)), default=None)


def number(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]


def where(comparison: dict[str, Any]) -> str:
    device = comparison["device"]
    return f"{device['cpu']}, {device['threads']} threads, torch {device['torch']}, {device['date']}"


def by_workload(comparison: dict[str, Any]) -> int:
    return ("article", "table", "deep", "wide").index(comparison["case"]["workload"])


def deepest(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every workload, batch and dtype the network of most layers: the whole one, where it was recorded."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for comparison in comparisons:
        case = comparison["case"]
        key = (case["workload"], case["batch"], case.get("dtype"))
        if key not in found or case["layers"] > found[key]["case"]["layers"]:
            found[key] = comparison
    return sorted(found.values(), key=by_workload)


def score_tables(kind: str) -> list[str]:
    lines: list[str] = []
    header = ["ms", *OURS, "eager fp32", "eager bf16", "best torch.compile", "ONNX Runtime", "floor fp32", "floor bf16"]
    for title, one_row in (("Scoring a batch", False), ("Scoring one row", True)):
        found = [c for c in load("score", kind) if (c["case"]["batch"] == 1) == one_row]
        rows = []
        for c in deepest(found):
            times = medians(c)
            name = f"{c['case']['workload']}, {c['case']['layers']} layers" + (
                "" if one_row else f", {c['case']['batch']} rows"
            )
            cells = [times.get(o) for o in (*OURS, "eager fp32", "eager bf16")]
            cells += [
                quickest(times, "compile"),
                quickest(times, "ONNX"),
                times.get("brgemm fp32"),
                times.get("brgemm bf16"),
            ]
            rows.append([name, *map(number, cells)])
        if rows:
            lines += ["", f"{title} ({where(found[-1])}):", "", *markdown(header, rows)]
    return lines


def training_table(kind: str) -> list[str]:
    """Ours in each dtype beside eager, torch.compile and the products of that dtype, layers as run."""
    found = sorted(deepest(load("train", kind)), key=lambda c: (by_workload(c), c["case"]["dtype"] == "bf16"))
    rows = []
    for c in found:
        case, times = c["case"], medians(c)
        name = f"{case['workload']}, {case['layers']} layers, {case['batch']} rows, {case['dtype']}"
        cells = [times["rvae_fast"], times["eager"], quickest(times, "compile"), times["products"]]
        rows.append([name, *map(number, cells)])
    if not rows:
        return []
    header = ["ms", "rvae_fast", "eager", "best torch.compile", "products alone"]
    return ["", f"One training step ({where(found[-1])}):", "", *markdown(header, rows)]


def detector_table(kind: str) -> list[str]:
    found = load("detector", kind)
    if not found:
        return []
    rows = []
    for c in found:
        times = medians(c)
        theirs = times[f"PyOD {c['case']['against']}"]
        ours = {name: ms for name, ms in times.items() if name.startswith(("AE", "VAE"))}
        name, best = min(ours.items(), key=lambda item: item[1])
        rows.append([f"{c['case']['what']}: {name}, PyOD's {c['case']['against']}", number(best), number(theirs)])
        rows[-1].append(f"{theirs / best:.1f}")
    case = found[0]["case"]
    title = f"Detectors against PyOD's, {case['rows']}, {case['epochs']} epochs ({where(found[-1])}):"
    return ["", title, "", *markdown(["ms", "ours", "PyOD", "ours is faster by"], rows)]


def memory_table(kind: str) -> list[str]:
    found = load("memory", kind)
    if not found:
        return []
    rows = []
    for c in sorted(found, key=by_workload):
        kept = [c["notes"][name]["kept"] for name in ("rvae_fast", "eager")]
        case = f"{c['case']['workload']}, {c['case']['dtype']}"
        rows.append([case, *(f"{size / 1e6:.0f}" for size in kept), f"{kept[0] / kept[1]:.0%}"])
    title = f"Kept for the backward of a training step ({where(found[-1])}):"
    return ["", title, "", *markdown(["MB", "rvae_fast", "eager", "share"], rows)]


def draw(kind: str) -> None:
    """A bar an implementation, a panel a workload; one axis each, from zero."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "rvae-fast"  # the same results give the same file
    from matplotlib import pyplot as plt

    found = deepest([c for c in load("score", kind) if c["case"]["batch"] > 1])
    figure, axes = plt.subplots(1, len(found), figsize=(3.4 * len(found), 3.2), squeeze=False)
    for axis, c in zip(axes[0], found, strict=True):
        times = {n: ms for n, ms in medians(c).items() if not n.startswith(("products", "brgemm"))}
        names = sorted(times, key=times.__getitem__, reverse=True)
        colours = ["#1f6f8b" if name in OURS else "#b8b8b8" for name in names]
        axis.barh(names, [times[name] for name in names], color=colours)
        for floor, style in (("brgemm fp32", "--"), ("brgemm bf16", ":")):
            if floor in medians(c):
                axis.axvline(
                    medians(c)[floor], color="black", linestyle=style, linewidth=1, label=f"floor, {floor[7:]}"
                )
        axis.set_title(f"{c['case']['workload']}: {c['case']['batch']} rows", fontsize=10)
        axis.set_xlabel("ms")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    # Below the axes, where it covers neither bars nor floors.
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(ROOT / "docs" / "results" / f"score-{kind}.svg", metadata={"Date": None})


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"README.md has no place for the table: {BEGIN} ... {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    lines: list[str] = []
    for kind, title in KINDS.items():
        tables = [*score_tables(kind), *training_table(kind), *detector_table(kind), *memory_table(kind)]
        if tables:
            picture = f"![Times of scoring a batch, by implementation](docs/results/score-{kind}.svg)"
            lines += ["", f"### {title}", *tables, "", picture]
            draw(kind)
    readme.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + after)


if __name__ == "__main__":
    main()
