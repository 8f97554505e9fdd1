"""The checker: its score on mutations and re-orderings, hand-written schedules as CSV."""
import dataclasses

import pytest

from model.errors import UserError
from train.pipeline import grid, mutate
from train.pipeline.check import RULES, check
from train.pipeline.op import Op, Pair
from train.pipeline.schedule import KINDS, make


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_pass_and_replay(kind):
    for p, n in ((2, 4), (4, 8), (6, 18)):
        schedule = make(kind, p, n)
        assert check(schedule).violations == () and mutate.replay(schedule)


def test_report():
    assert check(make("1f1b", 8, 20))[1:] == (8, 0, 2)
    assert check(make("zb1p", 8, 20))[1:] == (8, 8, 2)
    assert check(make("dualpipe", 8, 20))[1:] == (9, 4, 2)


@pytest.mark.parametrize("name", mutate.MUTATIONS)
def test_mutations_are_named_by_rule_rank_and_slot(name):
    """1,000 of each: python -m train.pipeline.mutate"""
    assert mutate.found(name, 60, seed=1) == 60


def test_the_checker_agrees_with_a_replay():
    accepted, refused, illegal = mutate.agreement(60, seed=1)
    assert (accepted, refused) == (60, illegal) and illegal > 20


@pytest.mark.slow
def test_the_whole_score():
    assert all(mutate.found(name, 1000, seed=0) == 1000 for name in mutate.MUTATIONS)
    accepted, refused, illegal = mutate.agreement(1000, seed=0)
    assert (accepted, refused) == (1000, illegal)


def named(schedule):
    return [violation[:3] for violation in check(schedule).violations]


def changed(schedule, rank, slot, entry):
    ops = [list(order) for order in schedule.ops]
    ops[rank][slot] = entry
    return dataclasses.replace(schedule, ops=ops)


def test_rules_that_random_mutations_do_not_reach():
    schedule = make("1f1b", 4, 8)
    for entry in (Op("X", 0, 0), Op("F", 1, 0), Op("F", 0, 8), Op("F", 0, -1), Pair(Op("B", 0, 0), Op("F", 0, 0))):
        assert named(changed(schedule, 2, 3, entry)) == [("op", 2, 3)]
    without = dataclasses.replace(schedule, ops=[[op for op in order if op.microbatch != 5] for order in schedule.ops])
    assert named(without) == [("missing", r, 14) for r in range(4) for _ in "FI"]
    last = make("1f1b", 2, 1)
    assert named(dataclasses.replace(last, ops=[last.ops[0], [Pair(*last.ops[1])]])) == [("order", 1, 0)]
    empty = dataclasses.replace(schedule, ops=[[] for _ in range(4)])
    assert {rule for rule, _, _ in named(empty)} == {"missing"}


def test_every_rule_says_what_is_wrong():
    schedule = dataclasses.replace(make("dualpipe", 4, 8), max_activations=4)
    assert str(check(schedule).violations[0]) == ("rank 0, slot 7: activations: 5 chunks are between F and their backward; "
                                                  "bound 4")


def test_every_rule_but_op_has_a_mutation(rng):
    broken = {name: mutate.MUTATIONS[name](make("dualpipe", 4, 8), rng) for name in set(mutate.MUTATIONS) - {"one_too_many", "deadlock"}}
    assert {place[0] for _, place in broken.values()} | {"op", "activations", "cycle"} == set(RULES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_csv_comes_back_as_it_was_written(kind, tmp_path):
    schedule = make(kind, 4, 8)
    path = tmp_path / "mine.csv"
    path.write_text(grid.write(schedule))
    expected = dataclasses.replace(schedule, kind="mine.csv")
    assert grid.read(str(path), schedule.max_activations) == expected


def read(tmp_path, text):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    return grid.read(str(path), max_activations=2)


def test_a_hand_written_schedule(tmp_path):
    right = read(tmp_path, "# two ranks\n0, F0, F1, , B0, , B1\n\n1, , F0, Bi0, F1, Bi1, W0, W1\n")
    assert check(right).violations == () and right.simulate(1, 1, 1, 3).makespan == 7
    assert right.ops[1][1] == Op("Bi", 0, 0) and right.n_microbatches == 2
    assert named(read(tmp_path, "0, F0, F1, B0, B1\n1, F0, Bi0, F1, B1\n")) == [("weight", 1, 1)]
    assert named(read(tmp_path, "0, F0, F1, B0, B1\n1, F0, F1, B1\n")) == [("missing", 1, 0)]
    assert named(read(tmp_path, "0, F0, F1, F2, B0, B1, B2\n1, F0, B0, F1, B1, F2, B2\n")) == [("activations", 0, 2)]
    assert named(read(tmp_path, "0, F0, B0, F1, B1\n1, F0, F1, B0, B1\n")) == [("cycle", 0, 1), ("cycle", 1, 1)]


@pytest.mark.parametrize("text, message", [
    ("", "found no rank"),
    ("0, F0, G0\n", "line 1: found 'G0', allowed: F, B, Bi or W"),
    ("0, F0 & B0 & F1\n", "line 1: found 'F0 & B0 & F1'"),
    ("F0, B0\n", "line 1: found 'F0', allowed: first the stages of the rank"),
    ("0, F0\n2, F0\n", r"found stages \[0, 2\] on 2 chunks in direction 0"),
    ("0, F0\n0, F0\n", r"found stages \[0\] on 2 chunks"),
    ("0, F0\n1 2, F0\n", "found ranks with unlike chunks"),
    ("0 2, F0\n1 3<, F0\n", "found ranks with unlike chunks"),
    ("0<, F0\n1<, F0\n", r"found stages \[\] on 0 chunks in direction 0"),
    ("0, F0\n3, F0\n1, F0\n2, F0\n", "found stage 0 on rank 0 and stage 1 on rank 2, allowed: the same rank or neighbours"),
])
def test_csv_that_cannot_be_read(text, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value)
