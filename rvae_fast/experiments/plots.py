"""The pictures of an experiment: means with their spread, the published points drawn beside them; steps of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rvae_fast.report.theme import Picture, Theme, number, plain_log_ticks, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: How the lines of one picture differ: colour of the theme, marker, line style.
_STYLES = (
    ("normal", "o", "-"), ("anomaly", "s", "-"), ("second", "^", "-"), ("faint", "D", "-"), ("mark", "v", "-"),
    ("normal", "P", "--"), ("anomaly", "X", "--"), ("second", "<", "--"), ("faint", ">", "--"), ("mark", "*", "--"),
)  # fmt: skip
_MOST_POINTS = 1500
#: How far up a picture of steps goes, in the largest of its runs' medians.
_MOST_MEDIANS = 100.0


def plot_means(
    name: str,
    title: str,
    values: Mapping[str, Mapping[Any, Sequence[float]]],
    published: Mapping[str, Mapping[Any, float]] | None = None,
    *,
    xlabel: str,
    ylabel: str,
    caption: str = "",
    joined: bool = True,
    logarithmic: bool = False,
) -> Picture:
    """Draw mean and standard deviation over seeds by depth or class, one line a series.

    Parameters
    ----------
    name, title, caption : str
    values : mapping of series to mapping of x to values over seeds
        ``x`` are numbers, or labels of classes, which then stand side by side.
    published : mapping of series to mapping of x to value, optional
        Drawn hollow, in the colour of their series.
    joined : bool, default True
        Whether a line joins the means.
    logarithmic : bool, default False
        Whether both axes are (numbers only: x by powers of two).
    """
    published = {} if published is None else published
    every = [x for points in (*values.values(), *published.values()) for x in points]
    labels = list(dict.fromkeys(every))
    classes = any(isinstance(x, str) for x in labels)
    if all(str(x).isdigit() for x in labels):  # names of scores stay in the order given
        labels.sort(key=int)
    at = {x: i for i, x in enumerate(labels)} if classes else {x: x for x in labels}
    names = list(dict.fromkeys([*values, *published]))

    def draw(axes: Axes, theme: Theme) -> None:
        for i, series in enumerate(names):
            colour, marker, line = _STYLES[i % len(_STYLES)]
            shift = (i - (len(names) - 1) / 2) * 0.7 / max(len(names), 2) if classes else 0.0
            style: dict[str, Any] = {"color": getattr(theme, colour), "marker": marker, "ms": 5}
            points = values.get(series, {})
            if points:
                drawn = {x: v for x, v in points.items() if np.isfinite(v).all()}  # there is no place for the infinite
                xs = [at[x] + shift for x in drawn]
                means = [float(np.mean(v)) for v in drawn.values()]
                spread = [float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in drawn.values()]
                line = line if joined and not classes else "none"
                axes.errorbar(xs, means, yerr=spread, label=series, ls=line, lw=1.6, capsize=2.5, **style)
            theirs = published.get(series, {})
            if theirs:
                xs = [at[x] + shift for x in theirs]
                style |= {"mfc": "none", "ms": 7, "alpha": 0.9}
                axes.plot(xs, list(theirs.values()), ls="none", label=f"{series}, published", **style)
        if classes:
            axes.set_xticks(range(len(labels)), [str(x) for x in labels])
        elif logarithmic:
            axes.set_xscale("log", base=2)
            axes.set_xticks(labels, [str(x) for x in labels])
            axes.minorticks_off()
            axes.set_yscale("log")
            plain_log_ticks(axes.yaxis, *axes.get_ylim())
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        # Below the axes: "best" looks at lines, not at error bars, and would cover points.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)

    found = "; ".join(
        f"{series}: " + ", ".join(f"{x} {number(float(np.mean(v)))}" for x, v in points.items())
        for series, points in values.items()
    )
    endless = [f"{s} at {x}" for s, points in values.items() for x, v in points.items() if not np.isfinite(v).all()]
    if endless:
        caption = f"{caption} Without a point, some of their runs having diverged: {', '.join(endless)}.".strip()
    hollow = " Hollow: published." if published else ""
    return render(
        draw, name=name, title=title, alt=f"{ylabel} by {xlabel}. {found}.",
        caption=f"Mean and standard deviation.{hollow} {caption}".strip(), size=(7.2, 4.2),
    )  # fmt: skip


def plot_steps(name: str, title: str, runs: Mapping[str, np.ndarray], *, ylabel: str, caption: str = "") -> Picture:
    """Draw a quantity step by step on a logarithmic axis, one line a run; of a stretch of steps its largest value.

    A run that diverges leaves the picture, which would otherwise show nothing but that.
    """
    finite = [values[np.isfinite(values)] for values in runs.values()]
    highest = _MOST_MEDIANS * max((float(np.median(values)) for values in finite if len(values)), default=1.0)
    leaving = [label for label, values in runs.items() if np.max(values) > highest]
    if leaving:
        caption = f"{caption} Beyond the picture: {', '.join(leaving)}.".strip()

    def draw(axes: Axes, theme: Theme) -> None:
        for i, (label, values) in enumerate(runs.items()):
            colour, _, line = _STYLES[i % len(_STYLES)]
            pieces = np.array_split(np.arange(len(values)), min(len(values), _MOST_POINTS))
            steps = [piece[0] + 1 for piece in pieces]
            tops = [float(np.max(values[piece])) for piece in pieces]
            axes.plot(steps, tops, color=getattr(theme, colour), ls=line, lw=1.1, label=label)
        axes.set_yscale("log")
        if leaving:
            axes.set_ylim(top=highest)
        plain_log_ticks(axes.yaxis, *axes.get_ylim())
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(ylabel)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)

    found = "; ".join(
        f"{label}: median {number(float(np.median(v)))}, largest {number(float(np.max(v)))}"
        for label, v in runs.items()
    )
    return render(draw, name=name, title=title, alt=f"{ylabel} by step. {found}.", caption=caption, size=(7.2, 4.2))
