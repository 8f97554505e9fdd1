"""A question with a known answer: what every task's `generate(rng, difficulty)` returns."""
import dataclasses


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """`meta['family']` names the task that made it; the rest of `meta` is what its verifier needs."""

    prompt: str
    answer: str
    meta: dict
