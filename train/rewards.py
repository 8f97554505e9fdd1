"""Rule rewards (R1 §2.2.2, §2.3.2): accuracy, format, language consistency, and what the controls need.

Scalar graders take one completion; `FUNCTIONS` wraps them as `(prompts, completions, **columns) -> list[float]`, by
the names a config gives weights to. What an answer is and when two are equal stands in data/tasks/answer.py. A
completion includes its opening `<think>`. No model judges anything: R1 found that neural rewards get hacked.
"""
import re

import numpy as np

from data.tasks import answer as grading
from data.tasks.answer import extract_answer
from data.tasks.families import verify
from train import sandbox

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FORMAT = re.compile(r"\s*<think>.*</think>\s*<answer>(.*)</answer>\s*", re.S)
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\u3007"
_WORD = re.compile(rf"[{_HAN}]|[^\W\d_{_HAN}]+|[0-9]+")
_SCRIPTS = dict(en="[A-Za-z\u00c0-\u024f]", zh=f"[{_HAN}]", ja=f"[\u3040-\u30ff{_HAN}]", ko="[\uac00-\ud7af]",
                ru="[\u0400-\u04ff]")  # fmt: skip
_NUMERALS = re.compile("[0-9]+|[零〇一二三四五六七八九]")


def accuracy(completion: str, answer: str) -> float:
    """1 if the completion's extracted answer has the gold answer's exact value (or text). The gold may be a tagged
    solution.
    """
    found = extract_answer(completion)
    gold = str(answer)
    return float(found is not None and grading.same(found, extract_answer(gold) or gold))


def format(completion: str) -> float:
    """1 if the whole completion is one `<think>...</think>` (may be empty) and one non-blank `<answer>...</answer>`."""
    match = _FORMAT.fullmatch(completion) if all(completion.count(tag) == 1 for tag in _TAGS) else None
    return float(match is not None and bool(match[1].strip()))


def language_consistency(completion: str, language: str) -> float:
    """Share of the thinking's words that are of `language` (R1 §2.3.2); 1 without words, so a direct answer is
    consistent.

    A Chinese character is a word. Numerals count for no language, but in a trace of numerals alone (the miniature's),
    where 0-9 are English. Without think tags the whole completion counts. Tags and LaTeX commands do not.
    """
    if language not in _SCRIPTS:
        raise ValueError(f"language: {language!r}; allowed: {', '.join(_SCRIPTS)}")
    thoughts = re.findall(r"<think>(.*?)(?:</think>|$)", completion, re.S)
    text = " ".join(thoughts) if "<think>" in completion else completion
    words = _WORD.findall(re.sub(r"</?(?:think|answer)>|\\[A-Za-z]+", " ", text))
    if all(map(_NUMERALS.fullmatch, words)):
        own = [w[0].isascii() if language == "en" else bool(re.match(_SCRIPTS[language], w)) for w in words]
    else:
        own = [bool(re.match(_SCRIPTS[language], w)) for w in words if not w[0].isdigit()]
    return float(np.mean(own)) if own else 1.0


def soft_overlong(length: int, max_length: int, cache: int) -> float:
    """DAPO's length penalty (2503.14476, eq. 13): 0 up to max_length - cache, then to -1 at max_length, -1 beyond."""
    if length <= max_length - cache:
        return 0.0
    return -1.0 if length > max_length else (max_length - cache - length) / cache


def code(completion: str, tests: str, **limits) -> float:
    """1 if the last fenced Python block outside the thinking runs `tests` (asserts) to their end in the sandbox."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", grading.outside_thinking(completion), re.S)
    return float(bool(blocks) and sandbox.run(blocks[-1], tests=tests, **limits).finished)


def columns(problems: list) -> dict[str, list]:
    """What the functions below read, from Problems in the order of the completions."""
    language = [p.meta.get("language", "en") for p in problems]
    return dict(problem=problems, answer=[p.answer for p in problems], language=language)


def check(names, problems: list, completion) -> None:
    """Refuse rewards that can be had for nothing: ValueError unless gold answers score 1 under `accuracy` and hacks 0.

    names: the functions a config gives weight to; `completion(problem) -> str` writes a right, tagged answer.
    """
    for name in names:
        if name not in FUNCTIONS:
            raise ValueError(f"rewards: {name!r}; allowed: {', '.join(FUNCTIONS)}")
    if "accuracy" not in names:
        return
    for problem in problems:
        gold, a = completion(problem), problem.answer
        hacks = {"empty": "", "untagged": a, "only in thinking": f"<think> <answer> {a} </answer> </think>",
                 "unclosed": f"<answer> {a}", "blank": "<think> </think> <answer> </answer>",
                 "every digit": "<think> </think> <answer> 0 1 2 3 4 5 6 7 8 9 </answer>",
                 "answer twice": f"<answer> {a} {a} </answer>",
                 "overruled": f"<answer> {a} </answer> <answer> ? </answer>"}  # fmt: skip
        scores = FUNCTIONS["accuracy"]([problem.prompt] * 9, [gold, *hacks.values()], **columns([problem] * 9))
        if scores[0] != 1:
            raise ValueError(f"rewards: the gold answer {gold!r} to {problem.prompt!r} scores {scores[0]}, not 1")
        for hack, score in zip(hacks, scores[1:], strict=True):
            if score != 0:
                raise ValueError(f"rewards: the hack '{hack}' on {problem.prompt!r} scores {score}, not 0")


def _accuracy(prompts, completions, *, answer, problem=None, **_):
    """By the problem's own verifier where there is a problem, else by the gold answer."""
    if problem is not None:
        return [float(verify(p, c)) for p, c in zip(problem, completions, strict=True)]
    return [accuracy(c, a) for c, a in zip(completions, answer, strict=True)]


def _format(prompts, completions, **_):
    return [format(c) for c in completions]


def _language_consistency(prompts, completions, *, language, **_):
    return [language_consistency(c, x) for c, x in zip(completions, language, strict=True)]


def _soft_overlong(prompts, completions, *, length, max_length, cache, **_):
    return [soft_overlong(*x) for x in zip(length, max_length, cache, strict=True)]


def _length_penalty(prompts, completions, *, length, max_length, **_):
    """Control: minus the length's share of the limit."""
    return [-n / limit for n, limit in zip(length, max_length, strict=True)]


def _random(prompts, completions, *, seed, step, **_):
    """Control: a fair coin of (seed, step, place), blind to what was written; the same again on resume."""
    rng = np.random.default_rng((int(seed[0]), int(step[0]), 0xC0))
    return rng.integers(2, size=len(completions)).astype(float).tolist()


def _code(prompts, completions, *, tests, **_):
    return [code(c, t) for c, t in zip(completions, tests, strict=True)]


FUNCTIONS = dict(
    accuracy=_accuracy, format=_format, language_consistency=_language_consistency, soft_overlong=_soft_overlong,
    length_penalty=_length_penalty, random=_random, code=_code,
)  # fmt: skip
