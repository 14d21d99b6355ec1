"""The record of the GPU benchmark as a table, and the floors of its cells."""

from __future__ import annotations

from typing import Any

import gpu_cells
import gpu_floor


def summary(record: dict[str, Any]) -> str:
    """The record as a Markdown table: a row a measurement, beside its floor."""
    device = record["device"]
    where = device.get("gpu") or f"{device['cpu']} (dry run: the figures mean nothing)"
    roofs = next((r["roofs"] for r in record["results"] if "roofs" in r), None)
    lines = [f"### GPU: {where}", "", f"torch {device['torch']}, Triton {device['triton']}; {device['date']}.", ""]
    if roofs is not None:
        rates = ", ".join(f"{name} {roofs[name] / 1e12:.0f} TFLOP/s" for name in ("bf16", "tf32", "fp32"))
        lines += [f"Measured roofs: copy {roofs['copy'] / 1e12:.2f} TB/s; products {rates}.", ""]
    lines += [
        "| cell | variant | ms | spread | ours is faster by | floor ms | share | TFLOP/s | TB/s | kernels | peak GiB "
        "| kept GiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    by_cell: dict[str, list[dict[str, Any]]] = {}
    for result in record["results"]:
        if "roofs" not in result:
            by_cell.setdefault(result["name"], []).append(result)
    for name, results in by_cell.items():
        ours = min((r["seconds"] for r in results if r["variant"] in gpu_cells.OURS and "seconds" in r), default=None)
        for result in results:
            lines.append(_row(name, result, ours, roofs))
            name = ""
    if record.get("not_run"):
        lines += ["", f"Not run for want of time: {len(record['not_run'])} measurements."]
    return "\n".join(lines) + "\n"


def _row(name: str, result: dict[str, Any], ours: float | None, roofs: dict[str, float] | None) -> str:
    if "seconds" not in result:
        return f"| {name} | {result['variant']} | {result.get('error', 'no result')} | | | | | | | | | |"
    cell = gpu_cells.Cell(**result["cell"])
    passes, seconds = gpu_cells.passes(cell), result["seconds"]
    amount = gpu_floor.total(passes)
    floor = gpu_floor.Roof(roofs[cell.dtype], roofs["copy"]).seconds(passes) if roofs is not None and passes else None

    def gib(key: str) -> str:
        return f"{result[key] / 2**30:.2f}" if result.get(key) is not None else ""

    ratio = f"{seconds / ours:.2f}" if ours is not None and result["variant"] not in gpu_cells.OURS else ""
    if "host_seconds" in result:
        ratio += f" (host {result['host_seconds'] * 1e6:.0f} us)"
    cells = [
        name, result["variant"], f"{seconds * 1e3:.3f}", f"{result['spread']:.1%}", ratio,
        "" if floor is None else f"{floor * 1e3:.3f}", "" if floor is None else f"{floor / seconds:.0%}",
        f"{amount.flops / seconds / 1e12:.1f}", f"{amount.bytes / seconds / 1e12:.2f}",
        str(result["kernels"]) if result.get("kernels") is not None else "", gib("peak_bytes"), gib("kept_bytes"),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def floors(flops: float, bandwidth: float) -> str:
    """The floors of all cells at given rates (operations and bytes a second), as a Markdown table."""
    roof = gpu_floor.Roof(flops, bandwidth)
    lines = ["| cell | TFLOP | GB | by operations, ms | by bytes, ms | floor, ms |", "|---|---:|---:|---:|---:|---:|"]
    for cell in dict.fromkeys(job.cell for job in gpu_cells.jobs()):
        if cell.workload in ("roofs", "host overhead") or cell.dtype != "bf16":
            continue
        passes = gpu_cells.passes(cell)
        amount = gpu_floor.total(passes)
        times = amount.flops / flops, amount.bytes / bandwidth, roof.seconds(passes)
        lines.append(
            f"| {cell.name} | {amount.flops / 1e12:.2f} | {amount.bytes / 1e9:.2f} | "
            + " | ".join(f"{t * 1e3:.2f}" for t in times)
            + " |"
        )
    return "\n".join(lines)
