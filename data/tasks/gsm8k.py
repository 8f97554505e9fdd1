"""gsm8k: grade-school word problems from a file the user gives (a line: {"question": ..., "answer": "... #### 18"}).

Nothing is downloaded. An answer is right if its exact value is that of the text after the last `####`.
"""
import json
import pathlib

from data.tasks import answer as grading
from data.tasks.problem import Problem

INSTRUCTION = "Think inside <think> </think>, then give the number in <answer> </answer>."


def read(path: str) -> list[Problem]:
    """Every problem of a .jsonl file; ValueError names file and line of the first bad one."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"gsm8k: cannot read {str(path)!r} ({e.__class__.__name__}); give a .jsonl file") from None
    problems = []
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, solution = row["question"], row["answer"]
            gold = grading.extract_answer(solution)
        except (json.JSONDecodeError, KeyError, TypeError):
            gold = None
        if gold is None:
            raise ValueError(f"{path}:{n}: found {line[:40]!r}; every line is an object with 'question' and 'answer', "
                             "the answer ending in '#### number'")  # fmt: skip
        problems.append(Problem(f"{question}\n{INSTRUCTION}", gold, dict(family="gsm8k", solution=solution)))
    if not problems:
        raise ValueError(f"gsm8k: {str(path)!r} holds no problem")
    return problems


def generate(rng, difficulty: int, problems: list[Problem] | None = None) -> Problem:
    """One of `problems` (from `read`) at random; difficulty, the number of steps marked <<..>>, picks among those near
    it.
    """
    if not problems:
        raise ValueError("gsm8k: no problems; read a file first (gsm8k.read(path))")
    near = [p for p in problems if p.meta["solution"].count("<<") == difficulty] or problems
    return near[rng.integers(len(near))]


def verify(problem: Problem, completion: str) -> bool:
    found = grading.extract_answer(completion)
    return found is not None and grading.same(found, problem.answer)
