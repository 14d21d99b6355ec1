"""Colours and figure set-up shared by every picture: the Okabe-Ito palette, in a light and a dark version."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = ["DARK", "LIGHT", "Picture", "Theme", "number", "plain_log_ticks", "render"]


@dataclass(frozen=True)
class Theme:
    """Colours of one version of the pictures. Pairs that meet in one picture differ in lightness as well as in hue."""

    paper: str
    ink: str
    faint: str
    grid: str
    normal: str
    anomaly: str
    second: str
    mark: str


LIGHT = Theme("#ffffff", "#1d2733", "#5b6775", "#e3e8ee", "#0072b2", "#d55e00", "#e69f00", "#1d2733")
DARK = Theme("#182028", "#e6ebf0", "#9aa7b4", "#2d3742", "#56b4e9", "#ff8f3f", "#f0e442", "#ffffff")


@dataclass(frozen=True)
class Picture:
    """A drawn figure: PNG bytes for light and dark pages, a heading, a caption and a text alternative."""

    name: str
    title: str
    alt: str
    caption: str
    light: bytes
    dark: bytes


def number(value: float | int | None, digits: int = 4) -> str:
    """Format a number for reading: thousands separated, ``digits`` significant ones, a dash where undefined."""
    if value is None or math.isnan(value):
        return "–"
    value = float(value)
    if math.isinf(value):
        return "∞" if value > 0 else "\u2212∞"
    if value == 0 or (value == int(value) and abs(value) < 1e15):
        return f"{value:,.0f}".replace("-", "\u2212")
    magnitude = abs(value)
    if magnitude >= 1e6 or magnitude < 1e-4:
        return f"{value:.{digits - 1}e}".replace("-", "\u2212")
    if magnitude >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace("-", "\u2212")
    return f"{value:#,.{digits}g}".replace("-", "\u2212")


def plain_log_ticks(axis: Axis, low: float, high: float) -> None:
    """Label a logarithmic axis with plain numbers (1, 2, 5, 10, ...) where it spans few enough decades for that."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(high / low)
    if decades < 5:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axis.set_minor_formatter(NullFormatter())


def _dress(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(theme.faint)
        spine.set_linewidth(0.8)
    axes.tick_params(which="both", colors=theme.faint, labelcolor=theme.ink, labelsize=9.5)
    axes.grid(True, which="major", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)


def render(
    draw: Callable[[Axes, Theme], None],
    *,
    name: str,
    title: str,
    alt: str,
    caption: str = "",
    size: tuple[float, float] = (4.9, 3.1),
) -> Picture:
    """Draw one figure twice, for light and for dark pages.

    Parameters
    ----------
    draw : callable
        Takes the axes and the theme and draws; called once for each theme.
    name : str
        Stem of the PNG file.
    size : tuple of float
        Inches. Small, so that a phone, which scales the picture to its width, still shows 8-point text.
    """
    # The object interface: no pyplot, so no global state, no display and no figure left open.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pages = []
    for theme in (LIGHT, DARK):
        figure = Figure(figsize=size, dpi=180, layout="constrained", facecolor=theme.paper)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _dress(axes, theme)
        draw(axes, theme)
        legend = axes.get_legend()
        if legend is not None:
            legend.get_frame().set(facecolor=theme.paper, edgecolor=theme.grid, alpha=0.9)
            for text in legend.get_texts():
                text.set(color=theme.ink, fontsize=9.5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor=theme.paper, metadata={"Software": None})
        pages.append(buffer.getvalue())
    return Picture(name, title, alt, caption, pages[0], pages[1])
