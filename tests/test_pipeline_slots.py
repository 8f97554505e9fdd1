"""Slots: known lengths, what a slot may hold, buffer rows; and the columns alone suffice to train."""
import dataclasses

import numpy as np
import pytest

from model.errors import UserError
from train.pipeline import slots
from train.pipeline.check import check
from train.pipeline.op import Op, Pair, Times
from train.pipeline.schedule import KINDS, make

UNIT = Times()
LONG_FORWARD = Times(t_forward=4.0)  # room to fuse
SMALL = [(kind, p, n) for kind in KINDS for p, n in ((2, 4), (4, 8), (6, 12))]


@pytest.mark.parametrize("kind, n_slots, length, rows", [
    ("gpipe", 74, 74, (20, 20, 1)), ("1f1b", 74, 74, (8, 1, 1)), ("zb1p", 67, 67, (8, 1, 8)),
    ("dualpipe", 36, 66, (10, 1, 4)), ("dualpipev", 75, 69.5, (18, 2, 8)),
])
def test_8x20(kind, n_slots, length, rows):
    schedule = make(kind, 8, 20)
    table = slots.align(schedule, UNIT)
    assert (len(table), slots.length(schedule, table, UNIT)) == (n_slots, length)
    assert slots.tables(schedule, table)[1] == rows


def test_what_splitting_and_fusing_are_for():
    """1F1B waits for whole backwards unless they are split; DualPipe's pairs stand alone in their slots unless fused."""
    def length(kind, split, fuse):
        schedule = make(kind, 8, 20)
        return slots.length(schedule, slots._fill(schedule, UNIT, np.inf, split, fuse), UNIT)

    assert [length("1f1b", split, False) for split in (False, True)] == [100, 74]
    assert [length("dualpipe", False, fuse) for fuse in (False, True)] == [72, 66]


@pytest.mark.parametrize("costs, kind, length", [
    (Times(t_overlapped=2), "dualpipe", 52), (Times(t_backward_input=2), "1f1b", 101), (Times(t_backward_input=2), "zb1p", 101),
    (Times(t_backward_input=2, t_overlapped=4), "dualpipe", 94),
])
def test_other_costs(costs, kind, length):
    schedule = make(kind, 8, 20)
    assert slots.length(schedule, slots.align(schedule, costs), costs) == length


@pytest.mark.parametrize("kind, p, n", SMALL)
@pytest.mark.parametrize("max_stash", [None, 1, 2])
def test_a_table_keeps_lists_dependencies_and_bound(kind, p, n, max_stash):
    schedule = make(kind, p, n)
    table = slots.align(schedule, UNIT, max_stash)
    when = slots._when(schedule, table)
    parts = [(part, s, m) for s in range(schedule.n_stages) for m in range(n) for part in "FIW"]
    assert sorted(when) == sorted(parts)
    assert sum(op is not None for row in table for slot in row for op in slot) == len(parts)  # nothing twice
    for part, stage, sample in parts:
        slot = when[part, stage, sample]
        before = {"F": [("F", stage - 1)], "I": [("F", stage), ("I", stage + 1)], "W": [("I", stage)]}[part]
        for source, other in before:
            if 0 <= other < schedule.n_stages:
                assert when[source, other, sample] < slot + (part == "W")
    for rank, order in enumerate(schedule.ops):
        kinds = [[op for entry in order for op in entry.ops if op.kind in allowed] for allowed in (("F",), ("B", "Bi"))]
        for lane, listed in zip(("forward", "input"), kinds, strict=True):
            ran = [getattr(row[rank], lane) for row in table if getattr(row[rank], lane)]
            assert [op[1:] for op in ran] == [op[1:] for op in listed]
        pairs = {entry for entry in order if isinstance(entry, Pair)}
        assert pairs <= {row[rank][:2] for row in table}  # pairs stay pairs
    assert max_stash is None or slots.tables(schedule, table)[1].stash <= max_stash


def test_max_stash_is_checked():
    with pytest.raises(UserError, match="schedule.max_stash: found 0, allowed: at least 1"):
        slots.align(make("zb1p", 2, 4), UNIT, max_stash=0)


def test_colouring_is_right_and_tight(rng):
    for _ in range(200):
        starts = rng.integers(0, 20, rng.integers(0, 15))
        spans = [(int(a), int(a + d)) for a, d in zip(starts, rng.integers(1, 8, len(starts)), strict=True)]
        rows = slots.colour(spans)
        for (a, row_a), (b, row_b) in ((x, y) for i, x in enumerate(zip(spans, rows, strict=True))
                                       for y in list(zip(spans, rows, strict=True))[:i]):
            assert row_a != row_b or a[1] <= b[0] or b[1] <= a[0]
        at_once = max((sum(a <= t < b for a, b in spans) for t in range(30)), default=0)
        assert max(rows, default=-1) + 1 == at_once


def test_act_rows_by_rank():
    """The chunks in flight and one more where a message waits."""
    def rows(kind):
        schedule = make(kind, 8, 20)
        lives = slots.lifetimes(schedule, slots.align(schedule, UNIT))["act"]
        return [1 + max(slots.colour(list(of_rank.values()))) for of_rank in lives]

    assert rows("1f1b") == [8, 8, 7, 6, 5, 4, 3, 2]
    assert rows("dualpipe") == [9, 9, 9, 10, 10, 9, 9, 9]


def run_tables(schedule, t, rows, weights, embedding, target):
    """An executor in numpy that sees columns only: y = tanh(x w) per stage, loss sum(y * target); gradients by copy of a stage.

    Buffers start as NaN and so does the trash row after every write, so a row that is read wrongly shows.
    """
    d, ranks = embedding.shape[1], range(schedule.n_ranks)
    act, grad, stash_x, stash_g = (np.full((schedule.n_ranks, n + 1, d), np.nan) for n in (rows.act, rows.grad, *[rows.stash] * 2))
    d_weights = [[np.zeros((d, d)) for _ in chunks] for chunks in schedule.stages]
    d_embedding = np.zeros_like(embedding)
    loss = np.zeros(len(embedding))
    for s in range(len(t.branch)):
        y, dx, late = {}, {}, []
        for r in ranks:
            c = slots.Tables(*(column[s, r] for column in t))
            if c.branch & 1:
                x = embedding[c.forward_sample] if c.forward_first else act[r, c.forward_act]
                y[r] = np.tanh(x @ weights[r][c.forward_chunk])
                if c.forward_last:
                    loss[c.forward_sample] = y[r] @ target[c.forward_sample]
                    late.append((grad, r, c.tail_grad, target[c.forward_sample]))
            if c.branch & 2:
                x = embedding[c.input_sample] if c.input_first else act[r, c.input_act]
                g = grad[r, c.input_grad] * (1 - np.tanh(x @ weights[r][c.input_chunk]) ** 2)
                dx[r] = g @ weights[r][c.input_chunk].T
                if c.input_first:
                    d_embedding[c.input_sample] += dx[r]
                stash_x[r, c.write_stash], stash_g[r, c.write_stash] = x, g
            if c.weight_on:
                d_weights[r][c.weight_chunk] += np.outer(stash_x[r, c.weight_stash], stash_g[r, c.weight_stash])
        nothing = np.full(d, np.nan)
        for buffer, sent, name in ((act, y, "act"), (grad, dx, "grad")):
            for side, step in (("from_left", -1), ("from_right", 1), ("own", 0)):
                late += [(buffer, r, getattr(t, f"{name}_{side}")[s, r], sent.get((r + step) % schedule.n_ranks, nothing))
                         for r in ranks]
        for buffer, r, row, value in late:
            buffer[r, row] = value
        act[:, -1], grad[:, -1], stash_x[:, -1] = np.nan, np.nan, np.nan
    return loss, d_embedding, d_weights


def train_on_columns(schedule, rng, costs, max_stash):
    """Asserts that losses and gradients are those of the model run stage by stage."""
    n = schedule.n_microbatches
    of_stage, embedding, target = rng.normal(size=(schedule.n_stages, 3, 3)), rng.normal(size=(n, 3)), rng.normal(size=(n, 3))
    weights = [[of_stage[stage] for stage in chunks] for chunks in schedule.stages]
    xs = [embedding]
    for w in of_stage:
        xs.append(np.tanh(xs[-1] @ w))
    g, expected = target, np.zeros_like(of_stage)
    for stage in reversed(range(schedule.n_stages)):
        g = g * (1 - xs[stage + 1] ** 2)
        expected[stage] = xs[stage].T @ g
        g = g @ of_stage[stage].T
    t, rows = slots.tables(schedule, slots.align(schedule, costs, max_stash))
    assert all(column.dtype == np.int32 and column.shape[1] == schedule.n_ranks for column in t)
    loss, d_embedding, d_weights = run_tables(schedule, t, rows, weights, embedding, target)
    found = np.zeros_like(expected)
    for chunks, gradients in zip(schedule.stages, d_weights, strict=True):
        for stage, gradient in zip(chunks, gradients, strict=True):
            found[stage] += gradient  # a stage that stands twice: summed
    np.testing.assert_allclose(loss, (xs[-1] * target).sum(1), rtol=1e-12)
    np.testing.assert_allclose(d_embedding, g, rtol=1e-11)
    np.testing.assert_allclose(found, expected, rtol=1e-11)


@pytest.mark.parametrize("costs, max_stash", [(UNIT, None), (UNIT, 1), (LONG_FORWARD, 2)])
@pytest.mark.parametrize("kind, p, n", [*SMALL, ("gpipe", 1, 2), ("zb1p", 1, 3), ("dualpipev", 1, 2), ("1f1b", 6, 2)])
def test_the_columns_are_all_that_an_executor_needs(kind, p, n, costs, max_stash, rng):
    train_on_columns(make(kind, p, n), rng, costs, max_stash)


def test_a_pair_may_leave_its_weight_part_for_later(rng):
    """Hand-written schedules may pair a forward with an input part; W then counts as itself, in the same slot or another."""
    whole = make("dualpipe", 4, 8)
    ops = [[e for entry in order for e in ([Pair(entry[0], entry[1]._replace(kind="Bi")), entry[1]._replace(kind="W")]
                                           if isinstance(entry, Pair) else [entry])] for order in whole.ops]
    split = dataclasses.replace(whole, ops=ops)
    assert check(split).violations == () and slots.length(split, slots.align(split, UNIT), UNIT) == 26
    train_on_columns(split, rng, UNIT, None)


def test_a_stash_row_is_taken_until_after_the_slot_of_its_weight_part():
    """In a slot the entry of one micro-batch is written before the weight part of another reads its own."""
    f, i, w = ([Op(kind, 0, m) for m in range(2)] for kind in ("F", "Bi", "W"))
    table = [[slots.Slot(f[0])], [slots.Slot(f[1], i[0])], [slots.Slot(None, i[1], w[0])], [slots.Slot(None, None, w[1])]]
    t, rows = slots.tables(make("zb1p", 1, 2), table)
    assert rows.stash == 2 and t.weight_stash[2, 0] != t.write_stash[2, 0]


def test_a_slot_says_what_runs():
    table = slots.align(make("dualpipe", 2, 4), UNIT)
    assert any(slot.input == slot.weight == Op("B", 1, 0, 1) for row in table for slot in row)
