"""The sections of a recipe's report (R1 §2): the paper's figures in miniature, stage by stage, from lines that carry `stage`.

Reads events `evaluation` (pass_at_1, _low, _high, cons_at_16, length, format, consistency, worked, worked_right, direct_right,
by_family, by_difficulty), `claim` (claim, held, value, low, high), `gate`, `rejection` and `budget` (compile_s, run_s, evaluation_s,
tokens), RL steps (reward/*, kl, entropy, ...) and samples. What was not logged is left out.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from train import page, plots, report_traces
from train.plots import Curve
from train.run_record import Run

TITLE = "DeepSeek-R1 in miniature"
ZERO = ("r1_zero", "r1-zero", "zero")  # names under which the stage of pure RL is looked for
SHARES = {"length": "tokens", "format": "format", "consistency": "one language", "worked": "worked",
          "worked_right": "worked, right", "direct_right": "direct, right"}
TASK = ("A problem names a rule and its digits, such as 'sum 1 2 3 _ _ _ _ ='; an answer gives the result at once or writes the result "
        "after each digit first, which is called worked. Lengths leave out tags and the end.")
REJECTION = ("sampled", "right", "formatted", "one_language", "not_lucky", "unique", "general")
# step metric -> title, and what it means
RL_CURVES = {
    "completions/mean_length": ("Length of rollouts", "Mean tokens of an answer during RL, tags and end counted."),
    "worked": ("Share of worked answers", "Share of answers that write their steps down before the result."),
    "entropy": ("Entropy", "Mean entropy of the policy's tokens, nats."),
    "kl": ("KL to the reference", "k3 estimate, nats a token."),
    "consistency": ("Language consistency", "Share of an answer's words in the prompt's language."),
    "frac_reward_zero_std": ("Groups without signal", "Share of groups whose rewards are all equal: no gradient from them."),
    "clipped_ratio": ("Answers cut off", "Share of answers that reached the length limit."),
    "grad_norm": ("Gradient norm", "Before clipping."),
}
# prefix of step metrics drawn together
RL_GROUPS = {
    "clip_ratio/": ("Clipped tokens", "Share of tokens whose ratio left the trust region, below and above."),
    "sampling/": ("Sampler against trainer", "Differences of log-probabilities of the same tokens, computed twice."),
}


def is_recipe(run: Run) -> bool:
    """True for a run whose lines carry stages."""
    return any(stage is not None for stage in run.stages)


def sections(run: Run) -> list[page.Section]:
    """What a reader of the paper looks for, in its order."""
    rl, zero = [s for s in run.stages if run.of(s).series("reward/mean")[0].size], zero_stage(run)
    return [
        page.Section("Result", result(run)),
        page.Section("Stages", stage_table(run)),
        page.Section("Pure RL", rl_curves(run, [s for s in rl if s == zero], "zero")),
        page.Section("RL after it", rl_curves(run, [s for s in rl if s != zero], "later")),
        page.Section("SFT", sft_curves(run)),
        page.Section("Distillation", distillation(run)),
        page.Section("Traces", report_traces.browser(run.samples)),
        page.Section("Budget", budget(run)),
    ]


def evaluations(run: Run) -> dict[str, dict[str, Any]]:
    """The last evaluation of each stage."""
    return {line["stage"]: line for line in run.named("evaluation") if line.get("stage") is not None}


def result(run: Run) -> str:
    """What RL did, in words; the claims of the paper, held or not."""
    shown = [page.paragraph(TASK), page.paragraph(*in_words(run)), page.paragraph(*gates(run))]
    rows = [(c.get("claim"), page.badge(bool(c.get("held")), "held" if c.get("held") else "not held"),
             with_interval(dict(d=c.get("value"), d_low=c.get("low"), d_high=c.get("high")), "d")) for c in run.named("claim")]
    if rows:
        shown.append(page.table(("claim of the paper", "here", "difference"), rows,
                                "Judged on this run's own numbers; under a difference its 95 % interval."))
    wanted, seen = list((run.config.get("recipe") or {}).get("stages") or ()), [s for s in run.stages if s]
    left = [s for s in wanted if s not in seen]
    if left:
        shown.append(page.paragraph(f"Not begun yet: {', '.join(left)}. The same command goes on from here."))
    return "".join(shown)


def gates(run: Run) -> list[str]:
    """What the gate measured before RL, round by round."""
    found = list({(e.get("stage"), e["step"]): e for e in run.named("gate")}.values())
    if not found:
        return []
    rounds = ", ".join(f"{100 * (e.get('worked_right') or 0):.0f} % at step {e['step']}" for e in found)
    passed = "it passed" if found[-1].get("passed") else "it did not pass, so RL has little to choose from"
    asked = 100 * found[-1].get("threshold", 0)
    return [f"The gate before RL asks that worked answers with tags be right {asked:.0f} % of the time: {rounds}; {passed}."]


def in_words(run: Run) -> list[str]:
    """What happened between the base and R1-Zero, from the numbers alone."""
    stage = zero_stage(run)
    if stage is None:
        return ["This run trains a tiny DeepSeek-V3 and takes it through the stages of DeepSeek-R1."]
    found, last = run.of(stage).named("evaluation"), evaluations(run)
    earlier = [e for e in run.named("evaluation") if e.get("stage") in run.stages[:run.stages.index(stage)]]
    source = last.get((run.config.get(stage) or {}).get("init_from"))
    before = source or (found[0] if found and not found[0]["step"] else (earlier or [None])[-1])
    if not found or before is None:
        return []
    before, after = ({k: v for k, v in e.items() if v is not None} for e in (before, found[-1]))

    def change(key, name):
        return f"{name} from {page.number(before[key])} to {page.number(after[key])}" if key in before and key in after else ""

    moves = [change("pass_at_1", "accuracy on held-out problems went"), change("length", "the length of an answer"),
             change("worked", "the share of answers that work the problem out")]
    words = [f"In pure RL ({stage}) {', '.join(m for m in moves if m)}."]
    if {"worked_right", "direct_right", "worked"} <= before.keys() and "worked" in after:
        right, direct = before["worked_right"], before["direct_right"]
        words.append(f"The base already got {100 * right:.0f} % of the answers right that it worked out, and {100 * direct:.0f} % of those "
                     "it gave at once.")
        if after["worked"] - before["worked"] > 0.2 and right > direct:
            words.append("So what RL taught is to work rather than to guess; answers grow because working takes tokens. "
                         "The skill of working itself came from pretraining.")
        else:
            words.append("RL did not make it work more often on this seed.")
    if "consistency" in before and after.get("consistency", 1) < before["consistency"] - 0.05:
        words.append(f"Nothing rewarded one language, and answers began to mix them: {change('consistency', 'consistency went')}.")
    return words


def zero_stage(run: Run) -> str | None:
    """The stage of pure RL: by name, else the first with rewards."""
    rewarded = [s for s in run.stages if s and (run.of(s).series("reward/mean")[0].size or s in ZERO)]
    return next((s for s in rewarded if s in ZERO), rewarded[0] if rewarded else None)


def stage_table(run: Run) -> str:
    """One row a stage with intervals; the same as a picture; by family."""
    last = evaluations(run)
    if not last:
        return ""
    votes = {k: k.replace("cons_at_", "cons@") for e in last.values() for k in e if k.startswith("cons_at_") and k[8:].isdigit()}
    names = {"pass_at_1": "pass@1"} | votes | SHARES
    keys = [k for k in names if any(k in e for e in last.values())]
    rows = [(with_source(run, stage), *(with_interval(e, k) for k in keys)) for stage, e in last.items()]
    shown = [page.table(("after stage", *(names[k] for k in keys)), rows,
                        "Held-out problems, sampled at temperature 1 where not said otherwise; 95 % intervals.")]
    dots = [(s, e["pass_at_1"], e.get("pass_at_1_low"), e.get("pass_at_1_high")) for s, e in last.items() if "pass_at_1" in e]
    if dots:
        shown.append(page.picture(plots.intervals(run.path / "plots" / "stages.png", "pass@1 by stage", dots, xlabel="pass@1"),
                                  "Accuracy on held-out problems after each stage, with 95 % intervals.", wide=True))
    for key, title in (("by_family", "family of problems"), ("by_difficulty", "length of the problem")):
        groups = list(dict.fromkeys(g for e in last.values() for g in e.get(key) or {}))
        if groups:
            rows = [(s, *(group_cell((e.get(key) or {}).get(g)) for g in groups)) for s, e in last.items()]
            body = page.table(("after stage", *groups), rows, untrained(last) if key == "by_family" else "")
            shown.append(f"<h3>By {title} (pass@1)</h3>{body}" if key == "by_family" else page.fold(f"By {title} (pass@1)", body))
    kept = [(e["stage"], *(e.get(k) for k in REJECTION)) for e in run.named("rejection")]
    if kept:
        shown.append("<h3>Rejection sampling</h3>" + page.table(("stage", *(k.replace("_", " ") for k in REJECTION)), kept,
                                                                "Answers left after each filter, then the direct ones added."))
    return "".join(shown)


def untrained(last: dict[str, dict[str, Any]]) -> str:
    """Which families no stage of SFT or RL has seen, and the chance level of those that have one."""
    cells = [item for e in last.values() for item in (e.get("by_family") or {}).items() if isinstance(item[1], dict)]
    transfer = list(dict.fromkeys(family for family, cell in cells if cell.get("transfer")))
    levels = {family: cell["chance"] for family, cell in cells if cell.get("chance")}
    return " ".join(part for part in (
        f"Never in SFT or RL: {', '.join(transfer)}." if transfer else "",
        "Chance: " + ", ".join(f"{f} {page.number(v)}" for f, v in levels.items()) + "." if levels else "") if part)


def group_cell(value: Any) -> Any:
    """A group's pass@1: a number, or a dict with pass_at_1 and its interval."""
    return with_interval(value, "pass_at_1") if isinstance(value, dict) else value


def with_interval(values: dict[str, Any], key: str) -> Any:
    """The number, its interval small beneath it if there is one."""
    value, low, high = (values.get(k) for k in (key, f"{key}_low", f"{key}_high"))
    if value is None or low is None or high is None:
        return value
    return page.Html(f'{page.number(value)}<div class="under">{interval(low, high)}</div>')


def with_source(run: Run, stage: str) -> Any:
    """The stage's name; beneath it what it does and from where."""
    made = run.config.get(stage) or {}
    told = " from ".join(str(made[k]) for k in ("job", "init_from") if made.get(k))
    return page.Html(f'{page.text(stage)}<div class="under">{page.text(told)}</div>') if told else stage


def interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{page.number(low)}, {page.number(high)}]"


def rl_curves(run: Run, stages: list[str], name: str) -> str:
    """Accuracy and length against steps, as in the paper's two figures; then reward, entropy, KL, consistency; stages on one axis."""
    folder, shown, parts = run.path / "plots", [], [(s, run.of(s)) for s in stages]

    def evaluated(key, title, caption, share=False):
        lines = []
        for stage, part in parts:
            seen = list({e["step"]: e for e in part.named("evaluation") if e.get(key) is not None}.values())
            x, y = np.array([e["step"] for e in seen]), np.array([e[key] for e in seen], np.float64)
            low, high = (np.array([e.get(f"{key}_{side}", e[key]) for e in seen]) if share else None for side in ("low", "high"))
            lines += [Curve(stage, x, y, low=low, high=high)] if len(seen) > 1 else []
        if lines:
            shown.append((plots.curves(folder / f"{name}_{key}.png", title, lines, from_zero=True, share=share), caption))

    evaluated("pass_at_1", "Accuracy on held-out problems", "pass@1 against RL steps, with its 95 % interval.", share=True)
    evaluated("length", "Length of answers", "Tokens of held-out answers against RL steps, without tags and end.")
    for stage, part in parts:
        names = sorted({k for line in part.steps for k in line if k.startswith("reward/") and not k.endswith("std")})
        lines = [Curve(k.split("/", 1)[1], *part.series(k), smooth=True) for k in names if part.series(k)[0].size]
        title = "Reward" if len(parts) == 1 else f"Reward in {stage}"
        weights = {k: w for k, w in ((run.config.get(stage) or {}).get("rewards") or {}).items() if w}
        sums = " + ".join(f"{w:g} {k.replace('_', ' ')}" for k, w in weights.items()) or "the weighted sum"
        shown.append((plots.curves(folder / f"{stage}_reward.png", title, lines), f"Each function's mean; the mean reward is {sums}."))
    for key, (title, caption) in RL_CURVES.items():
        lines = [Curve(stage, *part.series(key), smooth=True) for stage, part in parts if part.series(key)[0].size]
        if lines:
            path = folder / f"{name}_{key.replace('/', '_')}.png"
            shown.append((plots.curves(path, title, lines, from_zero=True, share=caption.startswith("Share")), caption))
    for prefix, (title, caption) in RL_GROUPS.items() if len(parts) == 1 else ():
        part = parts[0][1]
        keys = sorted({k for line in part.steps for k in line if k.startswith(prefix)})
        lines = [Curve(k.removeprefix(prefix), *part.series(k), smooth=True) for k in keys if part.series(k)[0].size]
        if lines:
            path = folder / f"{name}_{prefix.strip('/')}.png"
            shown.append((plots.curves(path, title, lines, log=all((c.y > 0).all() for c in lines)), caption))
    return page.grid(*(page.picture(path, caption) for path, caption in shown))


def sft_curves(run: Run) -> str:
    """The loss of every stage that the config calls SFT, on one axis."""
    stages = [s for s in run.stages if s and (run.config.get(s) or {}).get("job") == "sft"]
    lines = [Curve(s, *run.of(s).series("loss"), smooth=True) for s in stages if run.of(s).series("loss")[0].size]
    if not lines:
        return ""
    return page.grid(page.picture(plots.curves(run.path / "plots" / "sft_loss.png", "Loss on completions", lines), "Nats a token."))


def pretrained(run: Run) -> list[str]:
    """The stages of pretraining: by the config's word, or by an MTP loss."""
    jobs = {s: (run.config.get(s) or {}).get("job") for s in run.stages if s}
    return [s for s, job in jobs.items() if job in ("pretrain", "gate") or (job is None and run.of(s).series("mtp_loss")[0].size)]


def distillation(run: Run) -> str:
    """The small model: distilled against RL run on it directly."""
    rows = [(s, with_interval(e, "pass_at_1"), e.get("length"), e.get("worked"), e.get("tokens")) for s, e in evaluations(run).items()
            if e.get("model") == "small" or s.startswith(("small", "distil"))]
    if not rows:
        return ""
    teacher = [(f"{s} (the teacher's last stage)", with_interval(e, "pass_at_1"), e.get("length"), e.get("worked"), e.get("tokens"))
               for s, e in evaluations(run).items() if not (e.get("model") == "small" or s.startswith(("small", "distil")))][-1:]
    return page.paragraph("The paper finds that distilling a large model's traces into a small one beats running RL on the small one. "
                          "Both start here from one small base.") + page.table(
        ("after stage", "pass@1", "tokens an answer", "worked", "tokens trained"), rows + teacher)


def budget(run: Run) -> str:
    """Where the time went: steps, tokens, compile and run seconds of each stage, and the speed of its steps without the first."""
    rows, written = [], {line.get("stage"): line for line in run.named("budget")}
    for stage in (s for s in run.stages if s):
        part, told = run.of(stage), written.get(stage, {})
        times = np.array([line["step_time"] for line in part.steps if line.get("step_time")])
        tokens = np.array([line.get("tokens") or 0 for line in part.steps if line.get("step_time")])
        first = max(0.0, float(times[0] - np.median(times))) if len(times) > 1 else None
        ran = told.get("run_s", float(times.sum()) - (first or 0.0) if len(times) else None)
        rows.append((stage, len(part.steps), told.get("tokens", int(tokens.sum())), told.get("compile_s", first), ran,
                     told.get("evaluation_s"), float(tokens[1:].sum() / times[1:].sum()) if len(times) > 1 and tokens.any() else None))
    if not rows:
        return ""
    rows.append(("all", *(sum(r[i] or 0 for r in rows) for i in range(1, 6)), None))
    return page.table(("stage", "steps", "tokens trained", "compile, s", "run, s", "of it evaluating, s", "tokens/s in steps"), rows,
                      "Where a stage did not write its own times, compile is the first step's excess over the median step, and run the sum "
                      "of the steps without it.", marked=[len(rows) - 1])
