"""Every task by name, and the verifier of a problem: the dict that a new task is added to.

A task is a module with `generate(rng, difficulty) -> Problem` and `verify(problem, completion) -> bool`.
"""
from data.tasks import countdown, gsm8k, mod, relay, swap, walk
from data.tasks import sum as sum_task

TASKS = dict(sum=sum_task, mod=mod, swap=swap, walk=walk, relay=relay, countdown=countdown, gsm8k=gsm8k)


def verify(problem, completion: str) -> bool:
    """The verifier of the problem's own family."""
    return TASKS[problem.meta["family"]].verify(problem, completion)
