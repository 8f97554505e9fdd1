"""countdown: reach a target from given numbers with + - * / and brackets, every number exactly once (TinyZero's task).

The answer is an expression; any that works is right. It is read by a small recursive parser into exact fractions:
nothing is ever evaluated as code. Difficulty is how many numbers are given, 2..6.
"""
import operator
import re
from fractions import Fraction

import numpy as np

from data.tasks import answer as grading
from data.tasks.problem import Problem

MAX_CHARS = 200
_ASCII = str.maketrans("×÷−零一二三四五六七八九", "*/-0123456789")
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_TOKEN = re.compile(r"\s*(0|[1-9][0-9]*|[-+*/()])")


def generate(rng: np.random.Generator, difficulty: int = 4, largest: int = 99) -> Problem:
    """A solvable problem: numbers 1..largest, the target a whole number reached by a random expression."""
    if not 2 <= difficulty <= 6:
        raise ValueError(f"difficulty: {difficulty} numbers; allowed: 2 to 6")
    while True:
        numbers = [int(n) for n in rng.integers(1, largest + 1, difficulty)]
        expression, target = _fold(rng, numbers)
        if target.denominator == 1 and 0 < target < 1000:
            break
    prompt = (f"Using the numbers {', '.join(map(str, numbers))} exactly once each, with + - * / and brackets, write "
              f"an expression that equals {target}. Think in <think> </think>, give it in <answer> </answer>.")
    return Problem(prompt, expression, dict(family="countdown", numbers=numbers, target=int(target)))


def verify(problem: Problem, completion: str) -> bool:
    """The extracted answer is an expression alone, uses exactly the given numbers and equals the target."""
    found = grading.extract_answer(completion)
    if found is None:
        return False
    try:
        value, used = evaluate(found.translate(_ASCII))
    except (ValueError, ZeroDivisionError):
        return False
    return value == problem.meta["target"] and sorted(used) == sorted(problem.meta["numbers"])


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """(exact value, numbers used) of an arithmetic expression. ValueError if it is none, ZeroDivisionError on a / 0.

    Grammar: sum = product (('+'|'-') product)*; product = atom (('*'|'/') atom)*; atom = number | '(' sum ')' |
    '-' atom. No powers, no `//`, no decimals, no leading zeros.
    """
    if len(expression) > MAX_CHARS or expression.count("(") > 20:  # bounds the recursion
        raise ValueError(f"expression of {len(expression)} characters; at most {MAX_CHARS}, and 20 brackets")
    tokens, end, text = [], 0, expression.rstrip()
    while end < len(text):
        match = _TOKEN.match(text, end)
        if not match:
            raise ValueError(f"{text[end:][:10]!r} is no number, operator or bracket")
        tokens.append(match[1])
        end = match.end()
    tokens.append("end")
    used: list[int] = []

    def level(at: int, operators: str, inner) -> tuple[Fraction, int]:
        value, at = inner(at)
        while tokens[at] in operators:
            other, after = inner(at + 1)
            value, at = _OPERATORS[tokens[at]](value, other), after
        return value, at

    def total(at: int):
        return level(at, "+-", lambda at: level(at, "*/", atom))

    def atom(at: int):
        if tokens[at].isdigit():
            used.append(int(tokens[at]))
            return Fraction(used[-1]), at + 1
        if tokens[at] == "-":
            value, at = atom(at + 1)
            return -value, at
        if tokens[at] == "(":
            value, at = total(at + 1)
            if tokens[at] == ")":
                return value, at + 1
        raise ValueError(f"{tokens[at]!r} stands where a number or an expression in brackets should")

    value, at = total(0)
    if tokens[at] != "end":
        raise ValueError(f"{tokens[at]!r} after the expression's end")
    return value, used


def _fold(rng, numbers: list[int]) -> tuple[str, Fraction]:
    """A random expression over all numbers, brackets around every pair."""
    pool = [(str(n), Fraction(n)) for n in numbers]
    while len(pool) > 1:
        a, x = pool.pop(rng.integers(len(pool)))
        b, y = pool.pop(rng.integers(len(pool)))
        sign = "+-*/"[rng.integers(4)]
        if sign == "/" and (y == 0 or (x / y).denominator != 1):
            sign = "+"
        pool.append((f"( {a} {sign} {b} )", _OPERATORS[sign](x, y)))
    text, value = pool[0]
    return text[2:-2], value
