"""How well a model solves problems it was never trained on: pass@1, cons@k, and what its answers look like (R1 §2.2.4, table 2).

pass@1 is the share of right answers, one sample a problem at the temperature given; cons@k votes over k samples (evaluate.py). Every
rate has its 95 % Wilson interval, every mean its normal one. `length` counts tokens without tags and without the end, so that a
reward on tags cannot pass for longer thinking. Worked answers write more than the result; `*_right` are rates within their kind.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from data.tasks import miniature, relay
from model.config import Execution, ModelConfig
from model.errors import freeze, require, sequence
from train import evaluate, rewards, sampler
from train.statistics import wilson

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
RATES = ("format", "worked", "tagged")
WITHIN = {  # rates within a kind of answer: name -> (kind, tagged or not; None: both)
    "worked_right": (True, None), "direct_right": (False, None), "worked_right_tagged": (True, True),
    "direct_right_tagged": (False, True), "worked_right_bare": (True, False), "direct_right_bare": (False, False)}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """config.evaluation: `problems` of `families` (shares) and `lengths`; cons@`cons_samples` on the first `cons_problems` of them;
    `transfer_problems` of each family in `transfer`, which no stage of RL or SFT has seen. batch_size: answers generated at once."""

    problems: int
    lengths: tuple
    families: dict
    cons_problems: int
    cons_samples: int
    transfer: tuple
    transfer_problems: int
    max_new: int
    temperature: float
    batch_size: int

    def __post_init__(self):
        for name in ("problems", "max_new", "batch_size", "cons_samples"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")
        require(0 <= self.cons_problems <= self.problems, "cons_problems", self.cons_problems, f"0 to problems={self.problems}")
        require(self.transfer_problems >= 1, "transfer_problems", self.transfer_problems, "a positive integer")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        for name in self.transfer:
            require(name in miniature.FAMILIES, "transfer", name, ", ".join(miniature.FAMILIES))


class Policy(NamedTuple):
    """What answers: weights without MTP modules (never used in answering), so that every stage shares one compiled rollout."""

    params: Any
    router_bias: Any
    cfg: ModelConfig
    run: Execution


class Answers(NamedTuple):
    """Of N prompts x S samples, prompt by prompt: texts without the end; n_tokens [N, S] with it; finished [N, S]; rollout as sampled
    (numpy, [N * S, ...])."""

    texts: list[list[str]]
    n_tokens: np.ndarray
    finished: np.ndarray
    rollout: sampler.Rollout


def parse(config, name: str = "evaluation") -> Evaluation:
    """Freezes config.evaluation."""
    return freeze(Evaluation, {k: v for k, v in config.items() if k != "families"}, name, families=families_of(config, name))


def families_of(config, path: str) -> dict[str, float]:
    """config.families: a weight for each family of problems, 0 or more, not all 0."""
    table = {k: float(v) for k, v in config["families"].items()}
    for family, weight in table.items():
        require(family in miniature.FAMILIES, f"{path}.families", family, ", ".join(miniature.FAMILIES))
        require(weight >= 0, f"{path}.families.{family}", weight, "0 or more")
    require(sum(table.values()) > 0, f"{path}.families", table, "at least one weight above 0")
    return table


def lengths_of(config, path: str) -> tuple[int, ...]:
    """config.lengths: numbers of digits of the look-up families."""
    lengths = sequence(config, "lengths", path)
    require(len(lengths) > 0 and all(n in range(2, 8) for n in lengths), f"{path}.lengths", lengths, "some of 2 to 7")
    return lengths


def policy(params, router_bias, cfg: ModelConfig, run: Execution) -> Policy:
    """The model without its MTP modules."""
    return Policy({k: v for k, v in params.items() if k != "mtp"},
                  None if router_bias is None else router_bias[:cfg.n_moe_layers], dataclasses.replace(cfg, mtp_depth=0), run)


def complete(model: Policy, tokenizer, prompts: Sequence[str], samples: int, *, seed: int, step: int, max_new: int, temperature: float,
             batch_size: int) -> Answers:
    """`samples` answers to each prompt, batch_size at a time (the last batch filled up with repeats): one compiled rollout, whose
    expert choices come along wherever there are experts, so that training and evaluation share it."""
    ids = [miniature.encode_prompt(tokenizer, p) for p in prompts]
    width = sampler.bucket(max(map(len, ids)))
    tokens = np.array([p + [tokenizer.pad] * (width - len(p)) for p in ids], np.int32)
    n = len(ids) * samples
    of, k = np.divmod(np.arange(-(-n // batch_size) * batch_size) % n, samples)
    keys, lengths = np.stack([of, k], axis=1).astype(np.int32), np.array([len(p) for p in ids], np.int32)
    parts = []
    for start in range(0, len(of), batch_size):
        here = slice(start, start + batch_size)
        parts.append(jax.device_get(sampler.generate(
            model.params, model.router_bias, tokens[of[here]], lengths[of[here]], keys[here], seed, step, model.cfg, model.run,
            max_new=max_new, temperature=temperature, stop_ids=(tokenizer.eos,), return_experts=model.cfg.moe is not None)))

    def joined(name):
        values = [getattr(p, name) for p in parts]
        if name == "steps" or values[0] is None:
            return values[0]
        axis = 1 if name == "experts" else 0
        return np.take(np.concatenate(values, axis=axis), np.arange(n), axis=axis)

    rollout = sampler.Rollout(*map(joined, sampler.Rollout._fields))
    texts = [tokenizer.decode(rollout.tokens[i, :rollout.lengths[i] - int(rollout.finished[i])]) for i in range(n)]
    shape = (len(ids), samples)
    return Answers([texts[i * samples:(i + 1) * samples] for i in range(len(ids))], rollout.lengths.reshape(shape),
                   rollout.finished.reshape(shape), rollout)


def inspect(problem, text: str, tokenizer) -> dict[str, Any]:
    """What one answer is: right, tagged, worked, trace_right, answer, format, consistency, length (without tags)."""
    words = text
    for tag in TAGS:
        words = words.replace(tag, " ")
    language = problem.meta.get("language", "en")
    return miniature.inspect(problem, text) | dict(
        format=rewards.format(text) == 1, consistency=rewards.language_consistency(text, language), language=language,
        length=len(words.split()) if tokenizer.kind == "symbols" else len(tokenizer.encode(" ".join(words.split()))))


def summary(looks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rates and means of inspected answers with their intervals: NAME, NAME_low, NAME_high, NAME_n where it is not all of them.

    An answer without tags is wrong for pass@1, whatever it says; `*_right` of bare answers looks at their last word.
    """
    n = len(looks)
    out: dict[str, Any] = dict(n=n) | rate("pass_at_1", [x["right"] and x["tagged"] for x in looks])
    for name in RATES:
        out |= rate(name, [bool(x[name]) for x in looks])
    for name in ("length", "consistency"):
        out |= mean(name, [x[name] for x in looks])
    for name, (worked, tagged) in WITHIN.items():
        out |= rate(name, [x["right"] for x in looks if x["worked"] == worked and tagged in (None, x["tagged"])], count=True)
    out |= rate("tagged_right", [x["right"] for x in looks if x["tagged"]], count=True)
    return out


def rate(name: str, hits: Sequence[bool], count: bool = False) -> dict[str, float | None]:
    """A share with its Wilson interval, None without cases."""
    if not hits:
        return {name: None, f"{name}_low": None, f"{name}_high": None, f"{name}_n": 0}
    low, high = wilson(int(np.sum(hits)), len(hits))
    return {name: float(np.mean(hits)), f"{name}_low": low, f"{name}_high": high} | ({f"{name}_n": len(hits)} if count else {})


def mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """A mean with its normal interval."""
    x = np.asarray(values, np.float64)
    half = 1.96 * float(x.std(ddof=1)) / len(x) ** 0.5 if len(x) > 1 else 0.0
    return {name: float(x.mean()), f"{name}_low": float(x.mean()) - half, f"{name}_high": float(x.mean()) + half}


def problems_of(spec: Evaluation, tasks: miniature.Spec) -> list:
    """The held-out problems: the same for every stage and every seed of a run."""
    return miniature.problems(tasks, np.random.default_rng(0xE7), spec.problems, "validation", spec.families, spec.lengths)


def score(model: Policy, tokenizer, tasks: miniature.Spec, spec: Evaluation, *, seed: int, step: int,
          n: int | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(summary with by_family and by_difficulty, traces) of one sample on each of the first n held-out problems (default all)."""
    problems = problems_of(spec, tasks)[:n]
    answers = complete(model, tokenizer, [p.prompt for p in problems], 1, seed=seed, step=step, max_new=spec.max_new,
                       temperature=spec.temperature, batch_size=spec.batch_size)
    looks = [inspect(p, t[0], tokenizer) for p, t in zip(problems, answers.texts, strict=True)]
    out = summary(looks)

    def by(key):
        groups: dict[str, list] = {}
        for p, look in zip(problems, looks, strict=True):
            groups.setdefault(str(p.meta[key]), []).append(look)
        return {k: _short(summary(groups[k])) for k in sorted(groups)}

    out |= dict(by_family=by("family"), by_difficulty=by("length"))
    traces = [trace(p, t[0], look, int(k[0])) for p, t, look, k in zip(problems, answers.texts, looks, answers.n_tokens, strict=True)]
    return out, traces


def full(model: Policy, tokenizer, tasks: miniature.Spec, spec: Evaluation, *, seed: int, step: int) -> tuple[dict, list]:
    """`score`, with cons@k and a row of by_family for each transfer family, its chance level beside it."""
    out, traces = score(model, tokenizer, tasks, spec, seed=seed, step=step)
    knobs = dict(seed=seed, max_new=spec.max_new, temperature=spec.temperature, batch_size=spec.batch_size)
    if spec.cons_problems:
        problems = problems_of(spec, tasks)[:spec.cons_problems]
        answers = complete(model, tokenizer, [p.prompt for p in problems], spec.cons_samples, step=step + (1 << 20), **knobs)
        found = [[_value(p, t) for t in texts] for p, texts in zip(problems, answers.texts, strict=True)]
        golds = [_gold(p) for p in problems]
        pairs, k = list(zip(golds, found, strict=True)), spec.cons_samples
        out |= rate(f"cons_at_{k}", [evaluate.cons_at_k(f, g, k) == 1 for g, f in pairs])
        # what one of the very same samples scores
        out |= mean("cons_baseline", [float(np.mean([x == g for x in f])) for g, f in pairs])
    for family in spec.transfer:
        rng = np.random.default_rng(0xE8)
        problems = miniature.problems(tasks, rng, spec.transfer_problems, "validation", {family: 1.0}, spec.lengths)
        answers = complete(model, tokenizer, [p.prompt for p in problems], 1, step=step + (1 << 21), **knobs)
        looks = [inspect(p, t[0], tokenizer) for p, t in zip(problems, answers.texts, strict=True)]
        out["by_family"][family] = _short(summary(looks)) | dict(chance=chance(family, problems), transfer=True)
    return out, traces


def chance(family: str, problems: list) -> float:
    """The best accuracy without the skill: for relay also by one of its two rules throughout, else the commonest answer's share."""
    if family == "relay":
        return max(relay.chance(problems).values())
    golds = [_gold(p) for p in problems]
    return max(golds.count(g) for g in set(golds)) / len(golds)


def trace(problem, text: str, look: dict[str, Any], n_tokens: int) -> dict[str, Any]:
    """A line of samples.jsonl."""
    return dict(prompt=problem.prompt, completion=text, answer=problem.answer, right=bool(look["right"] and look["tagged"]),
                length=n_tokens, consistency=look["consistency"], worked=look["worked"], family=problem.meta["family"])


def _gold(problem):
    """What answers of any language are compared as: the last step, or the answer's text."""
    return problem.meta["steps"][-1] if "steps" in problem.meta else problem.answer


def _value(problem, text: str):
    """The extracted answer as _gold writes it: a wrong one stays a vote for itself, none is None."""
    look = miniature.inspect(problem, text)
    if look["right"] and look["tagged"]:
        return _gold(problem)
    return None if look["answer"] is None else f"wrong: {miniature.lookup.read_digits(look['answer']) or look['answer']}"


def _short(values: dict[str, Any]) -> dict[str, Any]:
    keys = ("pass_at_1", "worked_right", "direct_right")
    return {k: v for k, v in values.items() if k in ("n", "worked", "length") or any(k in (x, f"{x}_low", f"{x}_high") for x in keys)}
