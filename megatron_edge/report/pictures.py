"""Pictures: curves of a run, and a sweep's losses over its bytes. SVG to stand inside of a page, PNG to stand alone.

A picture for a page is drawn in stand-in colours that become the page's CSS variables, so that it follows the reader's
light or dark scheme; its text stays text. matplotlib without pyplot: no state, no display.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it takes a second to import, which ranks that draw nothing need not wait for
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Palette:
    ink: str
    soft: str
    line: str
    series: str
    second: str
    bad: str
    surface: str


PAGE = Palette("#010203", "#020304", "#030405", "#040506", "#050607", "#060708", "#070809")  # stand-ins
PRINT = Palette("#1c2024", "#60646c", "#d9dce0", "#2563c9", "#b35a00", "#c62a2f", "#ffffff")
Draw = Callable[["Figure", Palette], None]


@dataclass(frozen=True)
class Point:
    """One run of a sweep. `half` is half of the 95% interval of its loss's difference to the lowest."""

    name: str
    size_mb: float
    loss: float
    half: float | None
    ms_per_token: float | None
    on_front: bool
    holds: bool


def _drawn(draw: Draw, palette: Palette, size: tuple[float, float], form: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": draw.__qualname__,
        "font.size": 11,
        "text.color": palette.ink,
        "text.parse_math": False,  # a "$" in an override is a "$"
        "axes.edgecolor": palette.line,
        "axes.labelcolor": palette.soft,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": palette.line,
        "grid.linewidth": 0.6,
        "xtick.color": palette.line,
        "ytick.color": palette.line,
        "xtick.labelcolor": palette.soft,
        "ytick.labelcolor": palette.soft,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained", facecolor=palette.surface)
        draw(figure, palette)
        for axes in figure.axes:
            axes.set_facecolor("none")
        out = io.BytesIO()
        figure.savefig(out, format=form, dpi=160, transparent=form == "svg")
    return out.getvalue()


def svg(draw: Draw, size: tuple[float, float], title: str) -> str:
    """An <svg> for a page, in its colours and its font, `size` in inches; `title` is what a screen reader says. It
    names no address."""
    text = _drawn(draw, PAGE, size, "svg").decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # which nothing refers to, and which repeat between pictures
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    text = re.sub(r"<svg [^>]*>", f'<svg {view[0]} role="img" aria-label="{html.escape(title)}">', text, count=1)
    for name, stand_in in asdict(PAGE).items():
        text = text.replace(stand_in, f"var(--{name})")
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", text)


def png(draw: Draw, size: tuple[float, float]) -> bytes:
    """The same on white paper."""
    return _drawn(draw, PRINT, size, "png")


def curve(
    metrics: Sequence[dict[str, Any]], key: str, name: str, *, logarithmic: bool = False, from_zero: bool = False
) -> str:
    """One number of metrics.jsonl over the steps. Steps that were skipped have no number, and a mark below."""

    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        steps = [record["step"] for record in metrics]
        values = [math.nan if record.get(key) is None else record[key] for record in metrics]
        axes.plot(steps, values, color=palette.series, linewidth=1.8)
        alone = [at for at, value in enumerate(values) if not math.isnan(value) and _is_alone(values, at)]
        axes.plot([steps[at] for at in alone], [values[at] for at in alone], "o", color=palette.series, markersize=4)
        skipped = [record["step"] for record in metrics if record.get("skipped")]
        plain = FuncFormatter(lambda value, _: f"{value:,.6g}")
        if logarithmic:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter(plain if high < 100 * low else NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
            if from_zero:
                axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(plain)
        if skipped:
            place = axes.get_xaxis_transform()
            axes.plot(skipped, [0.03] * len(skipped), "|", color=palette.bad, transform=place, markersize=9)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("step")

    return svg(draw, (4.6, 2.5), f"{name} over the steps")


def _is_alone(values: Sequence[float], at: int) -> bool:
    """No number on either side, so that no line shows it."""
    return all(math.isnan(value) for value in (*values[max(at - 1, 0) : at], *values[at + 1 : at + 2]))


def front(points: Sequence[Point]) -> Draw:
    """Held-out loss over bytes; a point's area is its time per token. The line is the front of loss and bytes alone:
    what no other beats by its time alone stands above it."""

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        if not points:
            axes.text(0.5, 0.5, "no run came to a result", ha="center", color=palette.soft, transform=axes.transAxes)
            return
        slowest = max((point.ms_per_token or 0.0 for point in points), default=0.0)
        edge: list[Point] = []
        for point in sorted((p for p in points if p.on_front), key=lambda p: (p.size_mb, p.loss)):
            if not edge or point.loss < edge[-1].loss:
                edge.append(point)
        where = [point.size_mb for point in edge], [point.loss for point in edge]
        axes.step(*where, where="post", color=palette.series, linewidth=1.4, alpha=0.6)
        sizes = [point.size_mb for point in points]
        middle = (min(sizes) + max(sizes)) / 2
        for point in points:
            area = 40 + 260 * point.ms_per_token / slowest if point.ms_per_token and slowest else 70.0
            colour = palette.series if point.on_front else palette.soft if point.holds else palette.bad
            face = colour if point.on_front else palette.surface
            if point.half:
                axes.errorbar(point.size_mb, point.loss, point.half, color=colour, elinewidth=1.0, capsize=3, alpha=0.7)
            axes.scatter(
                [point.size_mb], [point.loss], s=area, facecolor=face, edgecolor=colour, linewidth=1.6, zorder=3,
                marker="o" if point.holds else "X",
            )  # fmt: skip
            side = 1 if point.size_mb <= middle else -1
            below = -1 if point.on_front else 1  # left and below of a point of the front there is no other
            axes.annotate(
                point.name, (point.size_mb, point.loss), xytext=(side * 8, below * (5 + math.sqrt(area) / 2)),
                textcoords="offset points", ha="left" if side > 0 else "right", va="top" if below < 0 else "bottom",
                color=palette.ink, fontsize=10, zorder=2.5,
                bbox={"facecolor": palette.surface, "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
            )  # fmt: skip
        axes.margins(0.12, 0.18)
        axes.set_xlabel("weights, MB")
        axes.set_ylabel("held-out loss, nats/token")

    return draw
