"""Families whose worked answer is one table look-up a step: r_1 = first[d_1], r_i = table[r_{i-1}, d_i], answer r_n.

The shared form of sum, mod, swap, walk and relay. Prompt: family word(s), the digits, blanks up to SLOTS, `=`. Two
written languages: digits 0.. and 零.., and a family word each. Difficulty is the number of digits, 2..SLOTS.
"""
import dataclasses

import numpy as np

from data.tasks import answer as grading
from data.tasks.problem import Problem

SLOTS = 7
LANGUAGES = ("en", "zh")
DIGITS = dict(en="0123456789", zh="零一二三四五六七八九")
_READ = {c: i for digits in DIGITS.values() for i, c in enumerate(digits)}


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """`first` int[D] and `table` int[S, D] hold states below S; `words` name the family in each language."""

    name: str
    words: tuple[str, str]
    first: np.ndarray
    table: np.ndarray


def steps(rules: tuple[Rule, ...], digits) -> list[int]:
    """r_1 .. r_n, the rules taking turns."""
    out = [int(rules[0].first[digits[0]])]
    for i, d in enumerate(digits[1:], 1):
        out.append(int(rules[i % len(rules)].table[out[-1], d]))
    return out


def problem(family: str, rules: tuple[Rule, ...], digits, language: str = "en") -> Problem:
    """The problem of given digits; meta holds family, digits, steps, language (and what each rule alone gives)."""
    k, write, trace = LANGUAGES.index(language), DIGITS[language], steps(rules, digits)
    slots = [write[d] for d in digits] + ["_"] * (SLOTS - len(digits))
    meta = dict(family=family, digits=[int(d) for d in digits], steps=trace, language=language)
    if len(rules) > 1:
        meta["single"] = [steps((rule,), digits)[-1] for rule in rules]
    return Problem(" ".join([*(r.words[k] for r in rules), *slots, "="]), write[trace[-1]], meta)


def generate(rules: tuple[Rule, ...], rng: np.random.Generator, difficulty: int, family: str | None = None) -> Problem:
    """A problem of `difficulty` digits in a random language. ValueError outside 2..SLOTS."""
    if not 2 <= difficulty <= SLOTS:
        raise ValueError(f"difficulty: {difficulty} digits; allowed: 2 to {SLOTS}")
    digits = rng.integers(0, len(rules[0].first), difficulty)
    return problem(family or rules[0].name, rules, digits, LANGUAGES[rng.integers(2)])


def read_digits(text: str) -> list[int] | None:
    """The digits of a text of single digits parted by blanks, in either language; None if there is anything else."""
    values = [_READ.get(word) for word in text.split()]
    return None if None in values else values


def verify(problem: Problem, completion: str) -> bool:
    """The extracted answer is the last step's digit, in either language."""
    found = grading.extract_answer(completion)
    return found is not None and read_digits(found) == [problem.meta["steps"][-1]]
