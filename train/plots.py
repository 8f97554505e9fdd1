"""The pictures of a report: each function draws one PNG from plain numbers and returns its path."""
from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, StrMethodFormatter

INK, GRID, MUTED = "#1f2933", "#e4e7eb", "#7b8794"
COLOURS = ("#2563a8", "#d1603d", "#2f8f6b", "#8a5fb4", "#b8860b", "#c2417c", "#4b8f29", "#5c6b7a",
           "#00838f", "#7b3f00", "#9e9d24", "#ad1457")
MARKS = "osD^vPX*"
SIZE = (5.4, 3.3)  # inches; read on a phone at 360 pixels, hence no small print
FONT = {"family": "DejaVu Sans"}


_DRAWN: dict[pathlib.Path, tuple[bytes, int]] = {}


def _once(draw: Callable[..., pathlib.Path]) -> Callable[..., pathlib.Path]:
    """Leaves a picture as it is while this process has drawn the same numbers into it: a report is rewritten after every stage."""
    @functools.wraps(draw)
    def wrapped(path: pathlib.Path, *arguments: Any, **options: Any) -> pathlib.Path:
        key = hashlib.sha256(pickle.dumps((draw.__name__, arguments, options))).digest()
        if not (path.exists() and _DRAWN.get(path) == (key, path.stat().st_mtime_ns)):
            draw(path, *arguments, **options)
            _DRAWN[path] = key, path.stat().st_mtime_ns
        return path

    return wrapped


@dataclasses.dataclass(frozen=True)
class Curve:
    """y over x, drawn faint with its running mean on top if smooth and long; low and high shade a band, dashed ones are references."""

    label: str
    x: np.ndarray
    y: np.ndarray
    smooth: bool = False
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    style: str = "-"
    colour: str | None = None


@_once
def curves(path: pathlib.Path, title: str, series: Sequence[Curve], *, ylabel: str = "", xlabel: str = "step",
           levels: Sequence[tuple[str, float]] = (), log: bool = False, from_zero: bool = False, share: bool = False, legend: bool = True,
           size=SIZE) -> pathlib.Path:
    """Lines over steps; levels are horizontal references (label, y), a share is shown from 0 to 1."""
    figure, axes = _axes(title, size)
    for i, s in enumerate(series):
        colour = s.colour or COLOURS[i % len(COLOURS)]
        marker = "o" if len(s.x) <= 12 else None
        if s.smooth and len(s.x) >= 40:
            axes.plot(s.x, s.y, color=colour, alpha=0.22, lw=0.8)
            axes.plot(s.x, running_mean(s.y), s.style, color=colour, lw=1.8, label=s.label)
        else:
            axes.plot(s.x, s.y, s.style, color=colour, lw=1.8, marker=marker, ms=4, label=s.label)
        if s.low is not None:
            axes.fill_between(s.x, s.low, s.high, color=colour, alpha=0.15, lw=0)
    for i, (label, y) in enumerate(levels):
        axes.axhline(y, color=COLOURS[i % len(COLOURS)], ls=":", lw=1.4, label=label)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        axes.tick_params(which="minor", labelsize=9.5, length=0)
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
        if share:
            axes.set_ylim(-0.02, 1.04)
        elif from_zero:
            axes.set_ylim(bottom=0)
    if max((np.max(np.abs(s.y)) for s in series if len(s.y)), default=0) >= 5000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if legend and len(series) + len(levels) > 1:
        many = len(series) + len(levels) > 4
        axes.legend(frameon=many, fontsize=8 if many else 9, ncols=2 if many else 1, edgecolor="none", framealpha=0.85, handlelength=1.4)
    return _save(figure, path)


def running_mean(y: np.ndarray) -> np.ndarray:
    """The mean over a twentieth of the curve around each point, of what there is of it at the ends; a short curve stays as it is."""
    at, half = np.arange(len(y)), len(y) // 40
    total, low, high = np.concatenate([[0.0], np.cumsum(y)]), np.maximum(at - half, 0), np.minimum(at + half + 1, len(y))
    return (total[high] - total[low]) / (high - low)


@_once
def load_map(path: pathlib.Path, title: str, steps: np.ndarray, load: np.ndarray) -> pathlib.Path:
    """load [n, E] of one layer as multiples of the mean: white is balanced, red too much, blue too little (clipped at 1/4 and 4)."""
    figure, axes = _axes(title, SIZE)
    relative = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    bins = np.array_split(np.arange(len(steps)), min(len(steps), 150))
    grid = np.stack([relative[b].mean(axis=0) for b in bins], axis=1)
    image = axes.imshow(np.log2(np.clip(grid, 0.25, 4)), aspect="auto", origin="lower", cmap="RdBu_r", interpolation="nearest",
                        norm=TwoSlopeNorm(0, -2, 2), extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, load.shape[1] - 0.5))
    axes.grid(False)
    axes.set_xlabel("step")
    axes.set_ylabel("expert")
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.09, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/4", "1/2", "1x", "2x", "4x"], fontsize=9)
    bar.outline.set_visible(False)
    return _save(figure, path)


@_once
def table_map(path: pathlib.Path, title: str, rows: Sequence[str], load: np.ndarray) -> pathlib.Path:
    """load [rows, E] as multiples of each row's mean, for example expert x domain."""
    figure, axes = _axes(title, (SIZE[0], 1.5 + 0.34 * len(rows)), layout="constrained")
    relative = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    axes.imshow(np.log2(np.clip(relative, 0.25, 4)), aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(0, -2, 2))
    axes.grid(False)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("expert")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    return _save(figure, path)


@_once
def intervals(path: pathlib.Path, title: str, rows: Sequence[tuple[str, float, float | None, float | None]], *, xlabel: str = "",
              points: Sequence[Sequence[float]] = (), zero: bool = False, marked: Sequence[str] = (), size=None) -> pathlib.Path:
    """One line a row: (label, mean, low, high), its single points beneath; rows named in `marked` are drawn in red."""
    figure, axes = _axes(title, size or (SIZE[0] * 1.15, 1.2 + 0.34 * len(rows)), layout="constrained")
    for i, (label, mean, low, high) in enumerate(rows):
        y, colour = len(rows) - 1 - i, "#c0272d" if label in marked else COLOURS[0]
        if i < len(points) and len(points[i]):
            spread = 0.12 * np.linspace(-1, 1, len(points[i]))
            axes.scatter(points[i], y - 0.24 + spread, s=11, color=MUTED, alpha=0.75, lw=0, zorder=2)
        if low is not None:
            axes.plot([low, high], [y, y], color=colour, lw=2.4, solid_capstyle="butt", zorder=3)
        axes.plot([mean], [y], "D", color=colour, ms=5, zorder=4)
    if zero:
        axes.axvline(0, color=INK, lw=1)
    axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    axes.set_ylim(-0.7, len(rows) - 0.4)
    axes.set_xlabel(xlabel)
    return _save(figure, path)


@_once
def site_map(path: pathlib.Path, title: str, rows: Sequence[str], columns: Sequence[Any], values: np.ndarray,
             limits: tuple[float, float], marked: tuple[int, int] | None = None) -> pathlib.Path:
    """values [rows, columns] of 0 or more by site and layer, light where small and dark where large, on a logarithmic scale within the
    limits; grey where there is none (not a number); one cell may be framed. Few columns are wide enough for the numbers themselves."""
    few = len(columns) <= 8
    figure, axes = _axes(title, (SIZE[0] * 1.15, 1.1 + 0.27 * len(rows)), layout="constrained")
    shown = np.ma.masked_invalid(np.maximum(values, limits[0]))
    norm = LogNorm(limits[0], max(limits[1], limits[0] * 1.01), clip=True)
    colours = colormaps["YlGnBu"].with_extremes(bad=GRID)
    image = axes.imshow(shown, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    axes.grid(False)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("layer")
    axes.spines["bottom"].set_visible(False)
    if few:
        axes.set_xticks(range(len(columns)), columns)
        for (i, j), value in np.ndenumerate(shown.filled(np.nan)):
            if np.isfinite(value):
                axes.text(j, i, f"{values[i, j]:.2g}", ha="center", va="center", fontsize=8,
                          color="white" if norm(value) > 0.52 else INK)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=8.5, length=0)
    if marked:
        axes.add_patch(Rectangle((marked[1] - 0.5, marked[0] - 0.5), 1, 1, fill=False, ec="#c0272d", lw=2))
    return _save(figure, path)


@_once
def dots(path: pathlib.Path, title: str, rows: Sequence[str], series: Mapping[str, Sequence[float]],
         colours: Mapping[str, str], *, xlabel: str = "", share: bool = False) -> pathlib.Path:
    """One line a row with a mark for each of the series, in its colour; a share is drawn on a scale that shows small ones
    (linear below 0.01 %)."""
    figure, axes = _axes(title, (SIZE[0] * 1.15, 1.45 + 0.3 * len(rows)), layout="constrained")
    height = np.arange(len(rows))[::-1]
    for label, values in series.items():
        axes.plot(values, height, MARKS[list(colours).index(label) % len(MARKS)], color=colours[label], ms=6.5, alpha=0.9, label=label,
                  mec="white", mew=0.6, ls="none")
    if share:
        axes.set_xscale("symlog", linthresh=1e-4)
        axes.set_xlim(-2e-5, 1.3)
        axes.set_xticks([0, 1e-4, 1e-3, 1e-2, 1e-1, 1], ["0", "0.01 %", "0.1 %", "1 %", "10 %", "100 %"])
        axes.minorticks_off()
    axes.set_yticks(height, rows)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(xlabel)
    figure.legend(frameon=False, fontsize=8.5, ncols=len(series), loc="outside lower center", handletextpad=0.1, columnspacing=1.0)
    return _save(figure, path)


def _axes(title: str, size: tuple[float, float], layout: str | None = None):
    """An empty picture; only a 'constrained' layout makes room for long labels, and takes twice the time."""
    figure = Figure(figsize=size, dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot() if layout else figure.add_axes((0.135, 0.15, 0.85, 0.73))
    axes.set_title(title, loc="left", fontsize=11.5, color=INK, fontweight="bold", **FONT)
    axes.grid(True, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9.5, colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.xaxis.label.set(fontsize=9.5, color=MUTED)
    axes.yaxis.label.set(fontsize=9.5, color=MUTED)
    return figure, axes


def _save(figure: Figure, path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})  # the same numbers give the same bytes
    return path
