"""What a probe found, for a person: the table on the console, and probe.html with its pictures, all from probe.json."""
from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from train import page, plots
from train.metrics import write_atomically
from train.plots import Curve

ROLES = {"input": "Inputs of matmuls", "gradient": "Gradients of matmul outputs", "weight": "Weights"}
NAMES = {"tensor": "whole tensor", "delayed": "delayed", "1x128": "1x128", "128x1": "128x1", "128x128": "128x128", "e5m6": "E5M6"}


def show(result: dict[str, Any]) -> None:
    """A line a layer and site, differences past the threshold in red; then what each kind of tensor loses, at its worst layer."""
    over = result["threshold"]

    def cell(value):
        text = "not finite" if value is None else f"{value:.4f}" if value else "0"
        return text if value is not None and value <= over else f"[red]{text}[/red]"

    console = Console(width=100)
    found = _table(f"{result['kind']} against {result['against']}: relative difference", ("layer", "site", "input", "output", "gradient"))
    for i, row in enumerate(result["sites"]):
        if i and row["layer"] != result["sites"][i - 1]["layer"]:
            found.add_section()
        found.add_row(str(row["layer"]), row["site"], *(cell(row[k]) for k in ("input", "output", "gradient")))
    console.print(found)
    losses = _table(f"what E4M3 (and E5M6) lose, worst layer: signal-to-noise in dB, values that become 0; {result['statistics_of']}",
                    ("tensor", "max/rms", "kurtosis", *NAMES.values(), "to 0, tensor", "1x128"))
    for role in ROLES:
        losses.add_section()
        for name, entries in tensors(result, role).items():
            losses.add_row(f"{name} {role}", f"{worst(entries, peak):.1f}", f"{worst(entries, 'kurtosis'):.1f}",
                           *(_decibels(entries, s) if s in shown(role) else "" for s in NAMES),
                           *(f"{worst(entries, 'underflow', s):.2%}" for s in ("tensor", "1x128")))
    Console(width=150).print(losses)
    for line in parted(result):
        console.print(line, highlight=False)


def write(workdir: pathlib.Path, result: dict[str, Any]) -> pathlib.Path:
    """Writes workdir/probe.html and workdir/plots/probe_*.png."""
    kind, against = result["kind"], result["against"]
    losses = result["loss"]
    tiles = [(f"loss, {k}", v, f"{result['tokens']:,} tokens") for k, v in losses.items()]
    tiles += [("logits apart", result["logits"], "relative"),
              ("experts chosen otherwise", max((r["share"] for r in result["rerouted"]), default=None), "share of choices, worst layer")]
    summary = page.tiles(tiles) + page.paragraph(
        f"One batch of {result['batch_size']} rows of {result['seq_len']} tokens through the same weights ({result['weights']}) in {kind} "
        f"and in {against}, on one {result['device']}. A relative difference is |a - b| / |b| over a whole tensor.", *parted(result))
    sections = [page.Section("Result", summary), page.Section("By layer", layers(workdir, result)),
                page.Section("By site", sites(workdir, result)), page.Section("By scale", scales(workdir, result)),
                page.Section("Tensors", numbers(result))]
    target = workdir / "probe.html"
    write_atomically(target, page.page(f"Probe: {kind} against {against}", f"{workdir} · seed {result['seed']}", sections))
    return target


def parted(result: dict[str, Any]) -> list[str]:
    """Where the two first differ by more than the threshold, in words."""
    lines = []
    for way, where in (("Forwards", result["parted"]["forward"]), ("Backwards", result["parted"]["backward"])):
        lines.append(f"{way} no site differs by more than {result['threshold']:g}." if where is None else
                     f"{way} the two first differ by more than {result['threshold']:g} in layer {where['layer']} at {where['site']} "
                     f"({'not finite' if where['difference'] is None else page.number(where['difference'])}).")
    return lines


def layers(workdir: pathlib.Path, result: dict[str, Any]) -> str:
    """The residual stream through the layers, forwards and backwards."""
    between = [e for e in result["between"] if e["component"] == "block"]
    series = [_curve(label, [(e["layer"], e["difference"]) for e in between if e["tensor"] == tensor])
              for label, tensor in (("after attention", "attention"), ("after the block", "out"))]
    series.append(_curve("gradient after attention", [(r["layer"], r["gradient"]) for r in result["sites"] if r["site"].endswith("/out")]))
    path = plots.curves(workdir / "plots" / "probe_layers.png", "The residual stream, relative difference", series, xlabel="layer",
                        from_zero=True)
    rerouted = [(r["layer"], r["share"]) for r in result["rerouted"]]
    routing = plots.curves(workdir / "plots" / "probe_routing.png", "Experts chosen otherwise", [_curve("share", rerouted)],
                           xlabel="layer", from_zero=True) if rerouted else None
    return page.paragraph("The gradient of the stream after attention is that of the output of the attention's last matmul.",
                          f"Both runs route by {result['against']}'s choices, so that rows correspond; the share of choices that the other "
                          "would have made otherwise is drawn beside." if rerouted else "") + page.grid(
        page.picture(path), page.picture(routing) if routing else "")


def sites(workdir: pathlib.Path, result: dict[str, Any]) -> str:
    """Maps of site by layer."""
    maps = {tensor: (title, {(r["site"], r["layer"]): r[tensor] for r in result["sites"]}) for tensor, title in (
        ("output", "Outputs of matmuls, forwards"), ("gradient", "Gradients of outputs, backwards"),
        ("input", "Inputs as the product reads them"))}
    maps["weights_gradient"] = "Gradients of weights", {
        (w["parameter"].partition("/")[2], w["layer"]): w["difference"] for w in result["weights_gradient"]}
    maps["between"] = "Between the matmuls, forwards", {(f"{e['component']}/{e['tensor']}", e["layer"]): e["difference"]
                                                        for e in result["between"]}
    found = [v for _, cells in maps.values() for v in cells.values() if v]
    limits = (max(min(found), 1e-4), max(found)) if found else (1e-4, 1e-3)
    first = dict(output=result["parted"]["forward"], gradient=result["parted"]["backward"])
    first = {name: (where["site"], where["layer"]) for name, where in first.items() if where}
    return page.paragraph("Relative differences, one scale of colours for all; framed: where they first part; grey: no such site in the "
                          "layer.") + page.grid(*(
        page.picture(_map(workdir / "plots" / f"probe_{name}.png", title, cells, limits, first.get(name)))
        for name, (title, cells) in maps.items()))


def scales(workdir: pathlib.Path, result: dict[str, Any]) -> str:
    """Signal-to-noise and underflow by scheme, worst layer of each tensor."""
    pictures, colours = [], dict(zip(NAMES.values(), plots.COLOURS, strict=False))
    for role, title in ROLES.items():
        found = tensors(result, role)
        series = {NAMES[s]: [-worst(e, lambda entry, s=s: -_or(entry["snr"][s], np.nan)) for e in found.values()]
                  for s in shown(role) if s != "e5m6"}
        pictures.append(plots.dots(workdir / "plots" / f"probe_snr_{role}.png", f"{title}: signal-to-noise", list(found), series,
                                   colours, xlabel="dB, worst layer (more is better)"))
        series = {NAMES[s]: [worst(e, "underflow", s) for e in found.values()] for s in shown(role)}
        pictures.append(plots.dots(workdir / "plots" / f"probe_underflow_{role}.png", f"{title}: values that become 0", list(found),
                                   series, colours, xlabel="share of the values other than 0, worst layer", share=True))
    return page.paragraph(
        f"What a tensor of the {result['statistics_of']} run would lose if it were stored in E4M3 with one scale for the whole tensor (its "
        f"own, or delayed: by the largest value of the {result['history']} batches before, at the same weights), one a tile, or in E5M6 "
        "with power-of-two scales in 1x128 tiles (its ratio, far above, stands in the tables). Weights have no history here: they do not "
        "change.") + page.grid(*map(page.picture, pictures))


def numbers(result: dict[str, Any]) -> str:
    """Every tensor at its worst layer; single layers folded away."""
    def line(label, entries, role):
        return (*label, worst(entries, peak), worst(entries, "kurtosis"),
                *(-worst(entries, lambda e, s=s: -_or(e["snr"][s], np.nan)) for s in shown(role)),
                page.Html(f"{worst(entries, 'underflow', 'tensor'):.2%}"), page.Html(f"{worst(entries, 'underflow', '1x128'):.2%}"),
                *([page.Html(f"{worst(entries, 'saturation', 'delayed'):.3%}")] if role != "weight" else []))

    body = ""
    for role, title in ROLES.items():
        found = tensors(result, role)
        columns = ("max / rms", "kurtosis", *(f"{NAMES[s]}, dB" for s in shown(role)), "to 0, whole tensor", "to 0, 1x128",
                   *(["too large, delayed"] if role != "weight" else []))
        body += f"<h3>{page.text(title)}</h3>" + page.table(("tensor", *columns), [line((name,), e, role) for name, e in found.items()])
        body += page.fold("layer by layer", page.table(("tensor", "layer", *columns), [
            line((name, e["layer"]), [e], role) for name, entries in found.items() for e in entries]))
    return page.paragraph("At its worst layer: largest value over root mean square, kurtosis about zero (3 for a normal distribution), "
                          "signal-to-noise by scale, share of values that become 0, share beyond the largest value of the format.") + body


def tensors(result: dict[str, Any], role: str) -> dict[str, list[dict[str, Any]]]:
    """Name -> its entries by layer."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in result["tensors"]:
        if entry["role"] == role:
            found.setdefault(entry["tensor"], []).append(entry)
    return found


def shown(role: str) -> list[str]:
    """The schemes that say something of a role: weights have no history, nor tiles of one row or column."""
    return [s for s in NAMES if role != "weight" or s not in ("delayed", "128x1")]


def peak(entry: dict[str, Any]) -> float:
    """max / rms."""
    return _or(entry["amax"], np.nan) / entry["rms"] if entry["rms"] else np.nan


def worst(entries: Iterable[dict[str, Any]], what: Any, scheme: str = "") -> float:
    """The largest over the layers of a number: a key, a key and a scheme, or a function of an entry; not a number where there is none."""
    values = [what(e) if callable(what) else _or(e[what][scheme] if scheme else e[what], np.nan) for e in entries]
    finite = [v for v in values if np.isfinite(v)]
    return float(max(finite)) if finite else float("nan")


def _or(value: float | None, missing: float) -> float:
    return missing if value is None else value


def _decibels(entries: Sequence[dict[str, Any]], scheme: str) -> str:
    return f"{-worst(entries, lambda e: -_or(e['snr'][scheme], np.nan)):.1f}"


def _curve(label: str, points: Sequence[tuple[int, float | None]]) -> Curve:
    return Curve(label, np.array([x for x, _ in points]), np.array([_or(y, np.nan) for _, y in points], np.float64))


def _map(path: pathlib.Path, title: str, cells: dict[tuple[str, int], float | None], limits: tuple[float, float],
         first: tuple[str, int] | None) -> pathlib.Path:
    rows, columns = list(dict.fromkeys(row for row, _ in cells)), sorted({column for _, column in cells})
    values = np.array([[_or(cells.get((row, column)), np.nan) for column in columns] for row in rows], np.float64)
    return plots.site_map(path, title, rows, columns, values, limits, first and (rows.index(first[0]), columns.index(first[1])))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if column in ("site", "tensor") else "right", no_wrap=i < 2)
    return table
