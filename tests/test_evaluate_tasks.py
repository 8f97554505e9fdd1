"""Evaluation counts what it says: rates within kinds of answers, length without tags, votes across languages, chance, batch size."""
import jax
import numpy as np
import pytest
import tiny_recipe

from data import corpus
from data import tokenizer as tokenizers
from data.tasks import miniature
from model import config as model_config
from model import transformer
from model.config import Execution
from train import claims, evaluate_tasks
from train.statistics import wilson

CONFIG = tiny_recipe.config()
TASKS, TOKENIZER = corpus.parse(CONFIG.data).tasks, tokenizers.parse(CONFIG.tokenizer)
PROBLEM = miniature.problems(TASKS, np.random.default_rng(4), 1, "validation", {"sum": 1.0}, (5,))[0]
GOLD = PROBLEM.meta["steps"][-1]
TRACE = " ".join(map(str, PROBLEM.meta["steps"]))
ZH = "零一二三四五"
ANSWERS = {  # name -> (text, right, worked, tagged)
    "worked": (f"<think> {TRACE} </think> <answer> {GOLD} </answer>", True, True, True),
    "worked_wrong": (f"<think> {TRACE} </think> <answer> {(GOLD + 1) % 6} </answer>", False, True, True),
    "direct": (f"<think> </think> <answer> {ZH[GOLD]} </answer>", True, False, True),
    "direct_wrong": (f"<think> </think> <answer> {(GOLD + 2) % 6} </answer>", False, False, True),
    "bare": (f"{GOLD}", True, False, False),
    "bare_worked": (TRACE, True, True, False),
    "nothing": ("", False, False, False),
}


@pytest.fixture(scope="module")
def policy():
    cfg = model_config.parse(tiny_recipe.config(model__mtp_depth=1).model)
    params = jax.jit(lambda key: transformer.init(key, cfg))(jax.random.key(0))
    return evaluate_tasks.policy(params, np.zeros((2, 8), np.float32), cfg, Execution())


def looks(*names):
    return [evaluate_tasks.inspect(PROBLEM, ANSWERS[n][0], TOKENIZER) for n in names]


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_seen_for_what_it_is(name):
    text, right, worked, tagged = ANSWERS[name]
    look = looks(name)[0]
    assert (look["right"], look["worked"], look["tagged"]) == (right, worked, tagged)
    assert look["length"] == len([w for w in text.split() if not w.startswith("<")])


def test_rates_are_counted_within_their_kind_and_bare_answers_never_pass():
    names = ("worked", "worked", "worked_wrong", "direct", "direct_wrong", "direct_wrong", "bare", "bare_worked")
    found = evaluate_tasks.summary(looks(*names))
    assert found["n"] == 8 and found["pass_at_1"] == 3 / 8
    assert (found["pass_at_1_low"], found["pass_at_1_high"]) == wilson(3, 8)
    assert found["worked"] == 4 / 8 and found["tagged"] == 6 / 8
    assert found["worked_right_tagged"] == 2 / 3 and found["worked_right_bare"] == 1 and found["worked_right"] == 3 / 4
    assert found["direct_right_tagged"] == 1 / 3 and found["direct_right_tagged_n"] == 3 and found["direct_right"] == 2 / 4
    assert found["tagged_right"] == 3 / 6
    empty = evaluate_tasks.summary(looks("nothing"))
    assert empty["worked_right"] is None and empty["pass_at_1"] == 0 and empty["length"] == 0


def test_votes_agree_across_languages_and_wrong_ones_count_by_what_they_say():
    vote = lambda text: evaluate_tasks._value(PROBLEM, text)  # noqa: E731
    assert vote(ANSWERS["worked"][0]) == vote(ANSWERS["direct"][0]) == GOLD
    a, b = (GOLD + 1) % 6, (GOLD + 2) % 6
    assert vote(f"<answer> {a} </answer>") == vote(f"<answer> {ZH[a]} </answer>") != vote(f"<answer> {b} </answer>")
    assert vote("no tags") is None


def test_answers_do_not_depend_on_the_batch_and_come_back_in_order(policy):
    problems = evaluate_tasks.problems_of(evaluate_tasks.parse(CONFIG.evaluation), TASKS)[:3]
    knobs = dict(seed=1, step=2, max_new=8, temperature=1.0)
    prompts = [p.prompt for p in problems]
    whole = evaluate_tasks.complete(policy, TOKENIZER, prompts, 2, batch_size=16, **knobs)
    parts = evaluate_tasks.complete(policy, TOKENIZER, prompts, 2, batch_size=4, **knobs)
    assert whole.texts == parts.texts and len(whole.texts) == 3 and len(whole.texts[0]) == 2
    np.testing.assert_array_equal(whole.n_tokens, parts.n_tokens)
    alone = evaluate_tasks.complete(policy, TOKENIZER, prompts[:1], 2, batch_size=4, **knobs)
    assert alone.texts[0] == whole.texts[0]
    assert whole.texts[0][0] != whole.texts[0][1]
    single = evaluate_tasks.complete(policy, TOKENIZER, prompts, 1, batch_size=4, **knobs)  # sample 0 of each prompt is the same again
    assert [group[0] for group in single.texts] == [group[0] for group in whole.texts]


def test_every_problem_is_held_out_and_the_same_for_every_stage():
    spec = evaluate_tasks.parse(CONFIG.evaluation)
    one, two = evaluate_tasks.problems_of(spec, TASKS), evaluate_tasks.problems_of(spec, TASKS)
    assert [p.prompt for p in one] == [p.prompt for p in two]
    assert all(miniature.is_held_out(TASKS, p) for p in one)


def test_a_full_evaluation_has_intervals_families_difficulties_votes_and_transfer_with_chance(policy):
    found, traces = evaluate_tasks.full(policy, TOKENIZER, TASKS, evaluate_tasks.parse(CONFIG.evaluation), seed=0, step=0)
    assert {"walk", "relay"} < set(found["by_family"]) and found["by_family"]["relay"]["transfer"]
    assert 0 < found["by_family"]["relay"]["chance"] <= 1
    assert found["cons_at_4_low"] <= found["cons_at_4"] <= found["cons_at_4_high"]
    assert sum(v["n"] for v in found["by_difficulty"].values()) == found["n"] == len(traces)


def test_claims_are_judged_by_their_interval():
    before = evaluate_tasks.rate("pass_at_1", [True] * 30 + [False] * 70) | evaluate_tasks.rate("worked", [True] * 50 + [False] * 50)
    after = evaluate_tasks.rate("pass_at_1", [True] * 90 + [False] * 10) | evaluate_tasks.rate("worked", [True] * 52 + [False] * 48)
    found = {c["claim"]: c for c in claims.judge(dict(gate=before, r1_zero=after), "gate")}
    rise, work = (next(c for text, c in found.items() if word in text) for word in ("raises accuracy", "chooses to work"))
    assert rise["held"] and rise["value"] == pytest.approx(0.6) and rise["low"] > 0.4 and rise["stage"] == "r1_zero"
    assert not work["held"] and work["low"] < 0 < work["high"]
    # Newcombe's method 10, his own example: 56/70 against 48/80
    a, b = evaluate_tasks.rate("x", [True] * 56 + [False] * 14), evaluate_tasks.rate("x", [True] * 48 + [False] * 32)
    _, low, high = claims.difference(claims._limits(a, "x"), claims._limits(b, "x"))
    assert (low, high) == (pytest.approx(0.0524, abs=5e-4), pytest.approx(0.3339, abs=5e-4))
