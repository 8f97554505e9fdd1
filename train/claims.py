"""The claims of the R1 paper that a recipe touches, judged on its own numbers: held, or not, with the 95 % interval.

A difference of two rates or means a - b has Newcombe's interval (Interval estimation for the difference between independent
proportions, 1998, method 10): each side's own limits, squared and added.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

NEAR = 0.05  # pass@1 within which two stages count as equally accurate


@dataclasses.dataclass(frozen=True)
class Claim:
    """text; the stage it belongs to; measure(evaluations) -> (value, low, high), or None where a number is missing; held(low, high)."""

    text: str
    stage: str
    measure: Callable[[Mapping[str, dict]], tuple[float, float, float] | None]
    held: Callable[[float, float], bool] = lambda low, high: low > 0


def change(after: str, before: str, key: str) -> Callable:
    """The difference after - before of one number between two stages."""
    return lambda e: difference(_get(e, after, key), _get(e, before, key))


def within(stage: str, one: str, other: str) -> Callable:
    """The difference one - other of two numbers of a stage."""
    return lambda e: difference(_get(e, stage, one), _get(e, stage, other))


def family(after: str, before: str, name: str) -> Callable:
    """The change of pass@1 in one family."""
    def of(e, stage):
        return _limits((e.get(stage, {}).get("by_family") or {}).get(name) or {}, "pass_at_1")

    return lambda e: difference(of(e, after), of(e, before))


def above_chance(stage: str, name: str) -> Callable:
    """pass@1 in one family, less its chance level."""
    def of(e):
        cell = (e.get(stage, {}).get("by_family") or {}).get(name) or {}
        level = cell.get("chance")
        return None if level is None else difference(_limits(cell, "pass_at_1"), (level, level, level))

    return of


CLAIMS = (
    Claim("in the base, worked answers are right more often than direct ones", "before", within("before", "worked_right", "direct_right")),
    Claim("pure RL, without any SFT, raises accuracy (R1 fig. 2)", "r1_zero", change("r1_zero", "before", "pass_at_1")),
    Claim("its answers grow longer by themselves (R1 fig. 3; tags not counted)", "r1_zero", change("r1_zero", "before", "length")),
    Claim("they grow because it chooses to work: the share of worked answers rises", "r1_zero", change("r1_zero", "before", "worked")),
    Claim("languages mix where nothing rewards one (R1 §2.2.4)", "r1_zero", change("r1_zero", "before", "consistency"),
          lambda low, high: high < 0),
    Claim("a majority of 16 beats one of the same samples (R1 table 2)", "r1_zero", within("r1_zero", "cons_at_16", "cons_baseline")),
    Claim("what RL learns reaches a family that RL never saw (walk, known from the text)", "r1_zero", family("r1_zero", "before", "walk")),
    Claim("it reaches a family that nothing trained on: relay, above its chance level", "r1_zero", above_chance("r1_zero", "relay")),
    Claim("a reward on one language brings one language back (R1 §2.3.2)", "rl", change("rl", "r1_zero", "consistency")),
    Claim(f"the final model is as accurate as R1-Zero, within {NEAR}", "final", change("final", "r1_zero", "pass_at_1"),
          lambda low, high: low > -NEAR),
    Claim("distillation beats RL on the small model (R1 table 6)", "small_distil", change("small_distil", "small_rl", "pass_at_1")),
)


def judge(evaluations: Mapping[str, dict[str, Any]], before: str | None) -> list[dict[str, Any]]:
    """The claims whose numbers are there: dict(stage, claim, held, value, low, high). before: the stage that pure RL started from."""
    table = dict(evaluations) | ({"before": evaluations[before]} if before in evaluations else {})
    out = []
    for claim in CLAIMS:
        measured = claim.measure(table)
        if measured is not None:
            value, low, high = measured
            stage = before if claim.stage == "before" else claim.stage
            out.append(dict(stage=stage, claim=claim.text, held=bool(claim.held(low, high)), value=value, low=low, high=high))
    return out


def difference(a: tuple[float, float, float] | None, b: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
    """a - b with its interval; each is (value, low, high) or None."""
    if a is None or b is None:
        return None
    value = a[0] - b[0]
    return value, value - ((a[0] - a[1]) ** 2 + (b[2] - b[0]) ** 2) ** 0.5, value + ((a[2] - a[0]) ** 2 + (b[0] - b[1]) ** 2) ** 0.5


def _get(evaluations, stage: str, key: str):
    return _limits(evaluations.get(stage, {}), key)


def _limits(values: Mapping[str, Any], key: str) -> tuple[float, float, float] | None:
    found = tuple(values.get(k) for k in (key, f"{key}_low", f"{key}_high"))
    return None if None in found else found
