"""Pictures of schedules: what runs when, bubble against micro-batches, which kind wins where. PNG and SVG of each.

Kinds of work differ in lightness and directions in hatching, so that a grey print can be read.
"""
from __future__ import annotations

import pathlib

from train.pipeline.compare import Case, Size, Winner
from train.pipeline.op import Op, Pair
from train.pipeline.schedule import Schedule
from train.pipeline.simulate import Timeline

COLOURS = {"F": "#fff0b8", "B": "#62a3cf", "Bi": "#9ccfae", "W": "#4f3d82"}  # lightness 95, 64, 79, 30
NAMES = {"F": "forward", "B": "backward, whole", "Bi": "backward, input part", "W": "backward, weight part"}
LINES = {  # kind -> colour, marker, line, width; broad below the kind that equals it where nothing is sent
    "gpipe": ("#b0b0b0", "", "-", 7), "1f1b": ("#000000", "s", "-", 1.5), "interleaved": ("#c77800", "^", "--", 1.5),
    "zb1p": ("#c9bfe4", "", "-", 7), "dualpipe": ("#1f77b4", "D", "-", 1.5), "dualpipev": ("#5b4a8a", "v", "--", 1.5),
}
PALE = {"gpipe": "#d9d9d9", "1f1b": "#ffffff", "interleaved": "#ffd9a0", "zb1p": "#e3dcf5", "dualpipe": "#a9d2ee",
        "dualpipev": "#bfe8d4"}
SECOND = (dict(edgecolor="#8a8a8a"), dict(edgecolor="#8a8a8a", hatch="////"))  # chunk 0, others


def _save(figure, path: str) -> None:
    """path: without ending."""
    import matplotlib
    from PIL import Image  # matplotlib's own dependency

    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pipeline", "hatch.linewidth": 0.7}):
        figure.savefig(f"{path}.png", dpi=100)
        Image.open(f"{path}.png").convert("RGB").quantize(64).save(f"{path}.png", optimize=True)  # a third of the bytes
        figure.savefig(f"{path}.svg", metadata={"Date": None})


def timeline(schedule: Schedule, line: Timeline, path: str) -> None:
    """Ranks down, time across; numbers are micro-batches; a pair is one framed box, forward above backward."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    n, unit = schedule.n_ranks, min(event.end - event.start for event in line.events if event.end > event.start)
    width = min(max(0.26 * line.makespan / unit, 8.0), 24.0)
    size = min(40 * (width - 1.5) * unit / line.makespan, 9.0)  # points: two digits fill 60 % of the narrowest box
    figure = Figure(figsize=(width, 0.46 * n + 1.5), layout="constrained")
    axes = figure.add_subplot()

    def box(op: Op, start, end, low, high, size):
        axes.add_patch(Rectangle((start, low), end - start, high - low, facecolor=COLOURS[op.kind], linewidth=0.5,
                                 hatchcolor="#ffffff90" if op.kind == "W" else "#00000060", **SECOND[bool(op.chunk)]))
        axes.text((start + end) / 2, (low + high) / 2, schedule.sample(op), ha="center", va="center_baseline",
                  fontsize=size, color="white" if op.kind == "W" else "black",
                  bbox=dict(facecolor=COLOURS[op.kind], edgecolor="none", pad=0.4) if op.chunk else None)

    for event in line.events:
        low, high = event.rank - 0.44, event.rank + 0.44
        if isinstance(event.op, Pair):
            box(event.op.forward, event.start, event.end, low, event.rank, size * 0.9)
            box(event.op.backward, event.start, event.end, event.rank, high, size * 0.9)
            axes.add_patch(Rectangle((event.start, low), event.end - event.start, high - low, fill=False,
                                     edgecolor="black", linewidth=1.4, zorder=3))
        else:
            box(event.op, event.start, event.end, low, high, size)
    for rank, idle in enumerate(line.idle_per_rank):
        axes.text(line.makespan * 1.006, rank, f"idle {idle:g}", va="center", fontsize=9)
    ops = [op for order in schedule.ops for entry in order for op in entry.ops]
    legend = [Patch(facecolor=COLOURS[kind], label=name, **SECOND[False]) for kind, name in NAMES.items()
              if any(op.kind == kind for op in ops)]
    if any(op.chunk for op in ops):
        what = "enters at the last rank" if max(schedule.directions) else "second pass (chunk 1 and up)"
        legend.append(Patch(facecolor="white", label=what, **SECOND[True]))
    if any(isinstance(event.op, Pair) for event in line.events):
        legend.append(Patch(facecolor="white", edgecolor="black", linewidth=1.4, label="overlapped pair"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=10)
    axes.set(xlim=(0, line.makespan), ylim=(n - 0.5, -0.5), xlabel="time")
    axes.set_yticks(range(n), [f"rank {r}" for r in range(n)])
    axes.set_title(f"{schedule.kind}: {n} ranks, {schedule.n_microbatches} micro-batches, makespan {line.makespan:g}, "
                   f"bubble {line.bubble:g} ({line.bubble / line.makespan:.1%})", fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    _save(figure, path)


def shares(curves: dict[str, list[tuple[int, float]]], title: str, path: str) -> None:
    """curves: kind -> (micro-batches, bubble share), a line each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, points in curves.items():
        colour, marker, style, width = LINES[kind]
        x, y = zip(*points, strict=True)
        axes.plot(x, y, style, color=colour, marker=marker, markersize=5, linewidth=width, label=kind)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set(xlabel="micro-batches a step", ylabel="bubble, share of the step", ylim=(0, None), title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    _save(figure, path)


def winners(panels: dict[Case, dict[Size, Winner]], title: str, path: str) -> None:
    """panels: what compare.winners gives; a row per overlap, a column per t_comm."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    overlaps, comms = (list(dict.fromkeys(key[axis] for key in panels)) for axis in (0, 1))
    heights, widths = (sorted({size[axis] for size in next(iter(panels.values()))}) for axis in (0, 1))
    figure = Figure(figsize=(1 + 0.84 * len(widths) * len(comms), 1.2 + (0.6 + 0.46 * len(heights)) * len(overlaps)),
                    layout="constrained")
    all_axes = figure.subplots(len(overlaps), len(comms), squeeze=False)
    for (overlap, comm), grid in panels.items():
        axes = all_axes[overlaps.index(overlap)][comms.index(comm)]
        for (n_ranks, a_rank), best in grid.items():
            x, y = widths.index(a_rank), heights.index(n_ranks)
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=PALE[best.kind], edgecolor="#8a8a8a"))
            alone = best.frugal == best.kind
            axes.text(x, y + 0.2 * (not alone), best.kind, ha="center", va="center", fontsize=8, weight="bold")
            if not alone:
                axes.text(x, y - 0.22, f"{best.frugal} +{best.longer:.0%}", ha="center", va="center", fontsize=6.5)
        axes.set(xlim=(-0.5, len(widths) - 0.5), ylim=(-0.5, len(heights) - 0.5))
        axes.set_title(f"F&B = {overlap:g} (F + B), t_comm = {comm:g} F", fontsize=10)
        axes.set_xticks(range(len(widths)), widths)
        axes.set_yticks(range(len(heights)), heights)
        axes.tick_params(length=0)
    for axes in all_axes[-1]:
        axes.set_xlabel("micro-batches / ranks")
    for row in all_axes:
        row[0].set_ylabel("ranks")
    figure.suptitle(title, fontsize=12)
    won = {best.kind for grid in panels.values() for best in grid.values()}
    handles = [Patch(facecolor=colour, edgecolor="#8a8a8a", label=kind) for kind, colour in PALE.items() if kind in won]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(won), frameon=False)
    _save(figure, path)
