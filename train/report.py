"""report.html and plots/*.png of a run, from its files alone (config.json, metrics.jsonl, samples.jsonl), whatever of them is there yet.

`write` is called at the end of a job, and after each stage of a recipe. The job `report` rebuilds one (--config.job=report
--workdir=RUN), or with report.runs=(A, B, C) compares runs on one page, workdir/compare.html.
"""
from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from model import config as model_config
from model.errors import UserError, freeze
from train import ablation_table, page, plots, report_compare, report_recipe, run_record
from train.metrics import read_jsonl, write_atomically
from train.plots import Curve
from train.run_record import Run

ATTENTION = {"mla": "multi-head latent attention (MLA)", "mha": "multi-head attention", "gqa": "grouped-query attention",
             "mqa": "multi-query attention"}
BALANCE = {"bias": "a bias on the router, moved by the sign rule after each step", "aux_loss": "a sequence-wise balance loss",
           "batch_aux": "a batch-wise balance loss", "none": "nothing"}
DOMAINS = {"code": "Python's own library sources", "prose": "its documentation", "text": "text files", "tasks": "rule-made problems"}
DEAD = 0.01  # of the mean load, over the last tenth of the steps
SAMPLES_SHOWN = 12  # prompts


@dataclasses.dataclass(frozen=True)
class Report:
    """config.report: folders of runs to compare; () rebuilds the report of workdir."""

    runs: tuple


def report(config, workdir: str) -> None:
    """The job: rewrites workdir/report.html, or compares config.report.runs in workdir/compare.html."""
    spec = freeze(Report, config.report, "report")
    if spec.runs:
        print(f"report: {report_compare.write([run_record.read(r) for r in spec.runs], pathlib.Path(workdir))}")
    else:
        print(f"report: {write(pathlib.Path(workdir))}")


def write(workdir: pathlib.Path) -> pathlib.Path:
    """Writes report.html and plots/*.png from the run's files; returns the page's path. Raises UserError if it is no run's folder."""
    run = run_record.read(workdir)
    if run.config.get("job") == "ablate":
        return ablation_table.write(run.path)
    recipe = report_recipe.is_recipe(run)
    sections = report_recipe.sections(run) if recipe else [page.Section("Result", result(run))]
    for stage in report_recipe.pretrained(run) if recipe else [None]:
        part, name = run.of(stage), f": {stage}" if stage else ""
        if part.steps:
            sections += [page.Section(f"Training{name}", training(part, stage)), page.Section(f"Experts{name}", experts(part, stage))]
    if not recipe:
        sections.append(page.Section("Samples", samples(run)))
    sections.append(page.Section("Checkpoints", checkpoints(run)))
    sections += [page.Section("Data", data(run)), page.Section("Settings", settings(run))]
    title = report_recipe.TITLE if recipe else f"DeepSeek-V3: {run.config.get('job', 'a run')}"
    target = run.path / "report.html"
    write_atomically(target, page.page(title, subtitle(run), sections))
    return target


def subtitle(run: Run) -> str:
    """Where it lies, and of which commit it is."""
    parts = [str(run.path), f"seed {run.config.get('seed', '?')}", f"commit {run.commit[:10]}" if run.commit else ""]
    return " · ".join(p for p in parts if p)


def result(run: Run) -> str:
    """What this run is, in words; what came out, beside the byte bigram; the held-out curve."""
    closing, evaluations = run.last("closing"), run.named("eval")
    scores = (closing or (evaluations or [{}])[-1]).get("bits_per_byte") or {}
    bigram = (closing or {}).get("bigram") or {}
    shown = [page.paragraph(*describe_model(run.config)), page.paragraph(*describe_training(run), outcome(scores, bigram))]
    tiles = [(f"{d}, bits per byte", v, f"byte bigram {page.number(bigram[d])}" if d in bigram else "held out") for d, v in scores.items()]
    tokens = sum(line.get("tokens") or 0 for line in run.steps)
    if run.steps:
        tiles += [("last loss", run.tail_mean("main_loss") or run.tail_mean("loss"), "nats a token, mean of the last tenth"),
                  ("tokens", count(tokens), f"{len(run.steps):,} steps"), ("time in steps", clock(run.seconds()), "first compile included")]
    shown.append(page.tiles(tiles))
    if scores:
        rows = [(d, v, bigram.get(d), v - bigram[d] if d in bigram else None,
                 page.badge(v < bigram[d], "below" if v < bigram[d] else "NOT below") if d in bigram else None) for d, v in scores.items()]
        table = page.table(("held out", "model", "byte bigram", "difference", "the model is"), rows,
                           "Bits per byte of files never trained on (lower is better). The bigram is fitted on the same training text.")
        shown.append(page.grid(table, held_out(run, evaluations, bigram)))
    return "".join(shown)


def outcome(scores: dict[str, float], bigram: dict[str, float]) -> str:
    """The closing table in a sentence."""
    if not scores or not bigram:
        return ""
    beaten = [d for d in scores if d in bigram and scores[d] < bigram[d]]
    where = "everywhere" if len(beaten) == len(scores) else f"in {', '.join(beaten)} only" if beaten else "nowhere"
    return (f"On held-out files it needs {' and '.join(f'{v:.2f} bits for a byte of {d}' for d, v in scores.items())}; it is below a byte "
            f"bigram fitted on the same text {where}.")


def held_out(run: Run, evaluations: list[dict[str, Any]], bigram: dict[str, float]) -> str:
    """Bits per byte by domain against steps."""
    if len(evaluations) < 2:
        return ""
    domains = evaluations[-1]["bits_per_byte"]
    lines = [Curve(d, np.array([e["step"] for e in evaluations]), np.array([e["bits_per_byte"][d] for e in evaluations])) for d in domains]
    path = plots.curves(run.path / "plots" / "held_out.png", "Held-out bits per byte", lines,
                        levels=[(f"byte bigram, {d}", v) for d, v in bigram.items()])
    return page.picture(path, "Held-out bits per byte during training; dotted, the byte bigram.")


def describe_model(config: dict[str, Any]) -> list[str]:
    """The model in a few sentences; [] if the config cannot be read as one."""
    try:
        cfg = model_config.parse(config["model"])
    except (UserError, KeyError, TypeError):
        return []
    n, kind = cfg.num_params(), config["model"]["attention"]["kind"]
    words = [f"The model has {count(n['total'])} parameters, {count(n['activated'])} of them at work on each token, in {cfg.n_layers} "
             f"layers of width {cfg.d_model} with {ATTENTION.get(kind, f'{kind} attention')}."]
    if cfg.moe:
        shared = f" beside {cfg.moe.n_shared_experts} shared" if cfg.moe.n_shared_experts else ""
        first = f"The first {'layer is' if cfg.n_dense_layers == 1 else f'{cfg.n_dense_layers} layers are'} dense; each other"
        words.append(f"{first if cfg.n_dense_layers else 'Each'} layer has {cfg.moe.n_routed_experts} experts, of which a token "
                     f"uses {cfg.moe.n_activated_experts}{shared}; {BALANCE[config['model']['ffn']['moe']['balance']['kind']]} "
                     "keeps them evenly used.")
    if cfg.mtp_depth:
        modules = "One more module predicts the token" if cfg.mtp_depth == 1 else f"{cfg.mtp_depth} more modules predict the tokens"
        words.append(f"{modules} after the next one (MTP, {count(n['mtp'])} parameters, used in training only).")
    return words


def describe_training(run: Run) -> list[str]:
    """What it was trained on, and how far."""
    config, sub = run.config, run.config.get(run.config.get("job", ""), {})
    corpus, words = run.last("corpus"), []
    weights = {d: w for d, w in (config.get("data", {}).get("weights") or {}).items() if w}
    if weights and corpus:
        shares = " and ".join(f"{100 * w / sum(weights.values()):.0f} % {DOMAINS.get(d, d)}" for d, w in weights.items())
        words.append(f"It read {shares} (Python {corpus.get('python')}).")
    done, wanted = (run.steps[-1]["step"] if run.steps else 0), sub.get("steps")
    if wanted:
        rows = f" of {sub['batch_size']} rows of {sub['seq_len']} tokens" if {"batch_size", "seq_len"} <= sub.keys() else ""
        words.append(f"{done:,} of {wanted:,} steps{rows} are done" + ("." if done >= wanted else "; the same command goes on from there."))
    return words


def training(run: Run, stage: str | None) -> str:
    """Loss and MTP loss, learning rate, gradient norm, speed, step by step."""
    folder, shown = run.path / "plots", []
    prefix = f"{stage}_" if stage else ""

    def draw(name, title, keys, caption, smooth=True, **options):
        found = [Curve(label, *run.series(key), smooth=smooth) for key, label in keys.items() if run.series(key)[0].size]
        if found:
            shown.append(page.picture(plots.curves(folder / f"{prefix}{name}.png", title, found, **options), caption))

    losses = {"main_loss": "next token", "mtp_loss": "MTP (tokens further ahead)"}
    if not run.series("main_loss")[0].size:
        losses = {"loss": "loss"}
    draw("loss", "Loss", losses, "Nats a token: faint every step, strong the running mean.", ylabel="nats a token")
    draw("lr", "Learning rate", {"lr": "lr"}, "The schedule as it was run.", smooth=False, from_zero=True)
    draw("grad_norm", "Gradient norm", {"grad_norm": "norm"}, "Before clipping.", log=True)
    _, speed = run.series("tokens_per_s")
    caption = f"Tokens a second; median {np.median(speed):,.0f}. The first step compiles." if len(speed) else ""
    draw("speed", "Tokens a second", {"tokens_per_s": "tokens/s"}, caption, from_zero=True)
    return page.grid(*shown)


def experts(run: Run, stage: str | None) -> str:
    """Load [layer, expert] over steps, MaxVio, dead experts, and the bias and the domains where they were logged."""
    steps, load = run.series("moe/load")
    if not len(steps) or load.ndim != 3:
        return ""
    folder, prefix = run.path / "plots", f"{stage}_" if stage else ""
    names = layer_names(run.config, load.shape[1])
    violation = load.max(axis=-1) / np.maximum(load.mean(axis=-1), 1e-9) - 1  # as model.moe.max_violation, without compiling it
    tail = load[-max(1, round(run_record.TAIL * len(load))):].sum(axis=0)
    relative = tail / np.maximum(tail.mean(axis=1, keepdims=True), 1e-9)
    dead = int((relative < DEAD).sum())
    rows = [(names[i], float(violation[0, i]), float(violation[-1, i]), float(relative[i].min()), float(relative[i].max()),
             ", ".join(str(e) for e in np.flatnonzero(relative[i] < DEAD)) or "none") for i in range(load.shape[1])]
    shown = [plots.load_map(folder / f"{prefix}load_{i}.png", f"Load of {name}", steps, load[:, i]) for i, name in enumerate(names)]
    lines = [Curve(name, steps, violation[:, i], smooth=True) for i, name in enumerate(names)]
    shown.append(plots.curves(folder / f"{prefix}max_violation.png", "Imbalance (MaxVio)", lines, from_zero=True))
    pictures = [page.picture(p, "") for p in shown]
    at, bias = run.series("moe/bias")
    if len(at) and bias.ndim == 3:
        for i, name in enumerate(names):
            lines = [Curve(f"expert {e}", at, bias[:, i, e]) for e in range(bias.shape[2])]
            pictures.append(page.picture(plots.curves(folder / f"{prefix}bias_{i}.png", f"Router bias of {name}", lines,
                                                      legend=len(lines) <= 8)))
    by_domain = (run.last("eval") or {}).get("domain_load") or {}
    for i, name in enumerate(names if by_domain else []):
        per = np.array([layers[i] for layers in by_domain.values() if len(layers) > i], np.float64)
        if len(per) == len(by_domain):
            path = folder / f"{prefix}domains_{i}.png"
            pictures.append(page.picture(plots.table_map(path, f"Load of {name} by domain", list(by_domain), per),
                                         "Held-out tokens at the last evaluation, each domain against its own even share."))
    return "".join([
        page.paragraph(
            "Which experts the tokens of each step went to, as multiples of the even share: white is even, red too many, blue too few.",
            "MaxVio is the largest load of a layer over its mean, minus 1: 0 is perfect balance.",
            f"{dead or 'No'} expert{'' if dead == 1 else 's'} got less than {100 * DEAD:.0f} % of the even share over the last tenth of "
            "the steps (dead)."),
        page.grid(*pictures),
        page.table(("layer", "MaxVio, first step", "MaxVio, last step", "least used, last tenth", "most used, last tenth", "dead experts"),
                   rows, "Loads as multiples of the even share.")])


def layer_names(config: dict[str, Any], n: int) -> list[str]:
    """Names of the rows of moe/load: the MoE layers by their number from 1, then the MTP modules."""
    model = config.get("model", {})
    first, mtp = model.get("n_dense_layers", 0), model.get("mtp_depth", 0)
    return [f"layer {first + i + 1}" if i < n - mtp else f"MTP module {i - (n - mtp) + 1}" for i in range(n)]


def samples(run: Run) -> str:
    """The generated texts of a run without stages: each prompt, and what came of it as training went on."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in run.samples:
        by_prompt.setdefault(str(line.get("prompt", "")), []).append(line)
    shown = []
    for prompt, lines in list(by_prompt.items())[-SAMPLES_SHOWN:]:
        picked = [lines[i] for i in sorted({round(i) for i in np.linspace(0, len(lines) - 1, min(len(lines), 4))})]
        texts = "".join(f'<div class="meta">step {page.text(s.get("step"))}</div>' + page.pre(prompt + str(s.get("completion", "")))
                        for s in picked)
        shown.append(f'<div class="trace"><pre class="ask">{page.text(prompt)}</pre>{texts}</div>')
    return page.paragraph("The same prompts at several steps; what follows the prompt is the model's.") + page.grid(*shown) if shown else ""


def checkpoints(run: Run) -> str:
    """What the job `eval` found for the checkpoints of this run, if it was run here."""
    if not (run.path / "eval.jsonl").exists():
        return ""
    lines = read_jsonl(run.path / "eval.jsonl")
    domains = list(dict.fromkeys(d for line in lines for d in line.get("bits_per_byte", {})))
    rows = [(line.get("path", "").split("/checkpoints/")[-1], line.get("ema"), *(line["bits_per_byte"].get(d) for d in domains))
            for line in lines]
    return page.table(("checkpoint", "EMA", *domains), rows, "Held-out bits per byte of every checkpoint, on the same bytes.")


def data(run: Run) -> str:
    """The corpus: bytes by domain and split, its hash, the interpreter it came from."""
    corpus = run.last("corpus")
    if not corpus:
        return ""
    rows = [(d, b.get("train"), b.get("validation")) for d, b in (corpus.get("bytes") or {}).items()]
    return page.paragraph("Training and held-out text are parted by file.", page.Html(
        f"Corpus hash {page.code(str(corpus.get('hash')))}, Python {page.text(corpus.get('python'))}: with the same two, another machine "
        "reads the same text.")) + page.table(("domain", "bytes to train on", "bytes held out"), rows)


def settings(run: Run) -> str:
    """Every leaf the run could read; the leaves of kinds not chosen are left out."""
    return page.fold("All settings of this run (leaves of kinds that were not chosen are left out)",
                     page.settings(run_record.leaves_read(run.config)))


def count(n: float) -> str:
    """12,345,678 as 12.3 M."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:,.0f}"


def clock(seconds: float) -> str:
    """75.2 as 1 min 15 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s" if minutes else f"{rest} s"
