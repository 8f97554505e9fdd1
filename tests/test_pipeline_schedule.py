"""Pipeline schedules: orders, sizes, and the simulator against published formulas, known makespans and a slow oracle."""
import dataclasses

import numpy as np
import pytest

from model.errors import UserError
from train.pipeline.grid import write
from train.pipeline.op import Op, Pair, Times
from train.pipeline.schedule import KINDS, make
from train.pipeline.simulate import simulate

SMALL = [(kind, p, n) for kind in KINDS for p, n in ((2, 4), (4, 8), (4, 12), (6, 18))]


def list_of(kind, p, n, rank):
    """A rank's list in the letters of grid.py."""
    return write(make(kind, p, n)).splitlines()[rank].split(", ", 1)[1]


def test_small_orders_by_hand():
    """Lists written down from the papers' figures and from the eight steps of DualPipe."""
    assert list_of("gpipe", 2, 3, 1) == "F0, F1, F2, B0, B1, B2"
    assert list_of("1f1b", 3, 4, 0) == "F0, F1, F2, B0, F3, B1, B2, B3"
    assert list_of("1f1b", 3, 4, 2) == "F0, B0, F1, B1, F2, B2, F3, B3"
    assert list_of("zb1p", 2, 3, 1) == "F0, Bi0, F1, Bi1, F2, W0, Bi2, W1, W2"
    assert list_of("interleaved", 2, 2, 1) == "F0, F1, F0.1, B0.1, F1.1, B1.1, B0, B1"
    assert list_of("dualpipe", 4, 8, 0) == ("F0, F1, F2, F0.1<, Bi0.1<, W0.1<, F1.1<, F3&B1.1<, F2.1<&B0, B2.1<, F3.1<&B1, "
                                            "B3.1<, Bi2, W2, Bi3, W3")
    assert list_of("dualpipe", 4, 8, 1) == ("F0, F0.1<, F1, F1.1<, F2, B0.1<, F2.1<&B0, F3&B1.1<, F3.1<&B1, B2.1<, B2, "
                                            "Bi3.1<, Bi3, W3.1<, W3")
    assert list_of("dualpipev", 1, 2, 0) == "F0, F0.1, F1, B0.1, F1.1&B0, B1.1, Bi1, W1"


@pytest.mark.parametrize("rank, counts", [(0, (6, 1, 3, 3, 3, 1, 3, 1)), (1, (4, 2, 2, 4, 2, 2, 2, 2)),
                                          (2, (2, 3, 1, 5, 1, 3, 1, 3)), (3, (0, 4, 0, 6, 0, 4, 0, 4))])
def test_dualpipe_8x20_makes_the_steps_of_the_paper(rank, counts):
    """The number of times that each of the eight steps is repeated, and what a step does, spelled out."""
    s1, s2, s3, s4, s5, s6, s7, s8 = counts
    middle = rank == 3
    expected = ["F0"] * s1 + ["F0", "F1"] * s2 + ["Bi1", "W1", "F1"] * s3
    expected += (["F0", "B1", "F1&B0"] if middle else ["F0&B1", "F1&B0"]) + ["F0&B1", "F1&B0"] * (s4 - 1)
    expected += ["B1", "F1&B0"] * s5
    last = [f"B{phase}" for _ in range(s6) for phase in (1, 0)]
    expected += last[:s6] + [b.replace("B", "Bi") for b in last[s6:]]
    for mirror in (rank, 7 - rank):  # phases are directions, swapped on the other half
        order = make("dualpipe", 8, 20).ops[mirror]

        def letters(entry, swap=mirror != rank):
            return "&".join(f"{op.kind}{op.direction ^ swap}" for op in entry.ops)

        found = [letters(entry) for entry in order]
        head, tail = found[:len(expected)], found[len(expected):]
        assert head == expected
        assert [t.rstrip("01") for t in tail] == ["W", "Bi"] * s7 + ["W"] * s8
        weights = [op[1:] for entry in order for op in entry.ops if op.kind == "W"]
        assert weights == [op[1:] for entry in order for op in entry.ops if op.kind == "Bi"]  # first in, first out
        assert len(weights) == 7 - rank


@pytest.mark.parametrize("p, n", [(2, 4), (4, 8), (4, 14), (8, 20), (10, 46)])
def test_dualpipe_is_its_own_mirror_and_dualpipev_its_half(p, n):
    dual, half = make("dualpipe", p, n).ops, make("dualpipev", p // 2, n // 2).ops

    def changed(entry, change):
        ops = [op._replace(**change(op)) for op in entry.ops]
        return Pair(*ops) if len(ops) == 2 else ops[0]

    for rank in range(p):
        mirror = [changed(e, lambda op: dict(chunk=1 - op.chunk, direction=1 - op.direction)) for e in dual[p - 1 - rank]]
        assert dual[rank] == mirror
    for rank in range(p // 2):
        assert half[rank] == [changed(e, lambda op: dict(direction=0)) for e in dual[rank]]


@pytest.mark.parametrize("kind", KINDS)
def test_bubbles_are_the_published_ones(kind):
    """All even PP up to 32 and several numbers of micro-batches; F = W = B/2, F&B = F + B."""
    for p in range(2, 33, 2):
        for n in (2 * p, 3 * p) if kind == "interleaved" or p > 8 else (2 * p, 2 * p + 2, 3 * p, 5 * p):
            line = make(kind, p, n).simulate(1, 1, 1, 3)
            assert line.bubble == KINDS[kind].bubble(p, 2, Times())
            assert line.makespan == 3 * n + line.bubble  # every rank works 3 n
            if kind != "interleaved":
                assert set(line.idle_per_rank) == {line.bubble}


def test_formulas_at_8_and_16():
    table = {"1f1b": (21, 45), "zb1p": (7, 15), "dualpipe": (6, 14)}
    assert {kind: (KINDS[kind].bubble(8, 2, Times()), KINDS[kind].bubble(16, 2, Times())) for kind in table} == table


@pytest.mark.parametrize("p, n, times, makespan, idle", [
    (8, 20, (1, 1, 1, 3), 66, [6] * 8),
    (4, 8, (1, 1, 1, 3), 26, [2] * 4),
    (16, 40, (1, 1, 1, 3), 134, [14] * 16),
    (8, 40, (1, 1, 1, 3), 126, [6] * 8),
    (8, 20, (1, 1, 1, 2), 52, [1, 2, 3, 3, 3, 3, 2, 1]),
    (8, 20, (1, 1, 1, 2.5), 59, [3.5, 4, 4.5, 4.5, 4.5, 4.5, 4, 3.5]),
    (8, 20, (1, 2, 1, 4), 91, [11] * 8),
])
def test_dualpipe_examples(p, n, times, makespan, idle):
    line = make("dualpipe", p, n).simulate(*times)
    assert (line.makespan, list(line.idle_per_rank)) == (makespan, idle)
    assert set(line.peak_activations_per_rank) == {p + 1}


def test_where_the_formulas_are_exact_and_by_how_much_they_miss():
    """Random times. 1F1B always; ZB1P if W <= F and I; DualPipe if F = I >= W, as the worst rank's idle time; else by the law."""
    rng = np.random.default_rng(1)
    for _ in range(40):
        f, i = rng.integers(1, 9, 2)
        w, gain = rng.integers(1, min(f, i) + 1), rng.integers(2)
        p, each = 2 * rng.integers(1, 5), rng.integers(2, 4)
        t = Times(*map(float, (f, i, w, f + i + w - gain * min(f, i, w) / 2)))
        for kind in ("gpipe", "1f1b", "interleaved", "zb1p"):
            assert simulate(make(kind, int(p), int(p * each)), t).bubble == KINDS[kind].bubble(p, 2, t)
        bubble, formula = simulate(make("dualpipe", int(p), int(p * each)), t).bubble, KINDS["dualpipe"].bubble(p, 2, t)
        depth = p // 2 - 1
        assert bubble - formula == pytest.approx(depth * (f - i) if f >= i else -min(f, depth * (i - f)))


@pytest.mark.parametrize("kind, p, n", SMALL)
def test_the_simulator_equals_a_relaxation(kind, p, n, rng):
    """Oracle: start all operations at 0 and push them later until nothing violates its list or its messages."""
    schedule = make(kind, p, n)
    t = Times(*rng.uniform(0.5, 2, 3), t_overlapped=rng.uniform(2, 4), t_comm=rng.uniform(0, 1))
    stage, last = schedule.stage, schedule.n_stages - 1
    entries = [(r, s) for r in range(p) for s in range(len(schedule.ops[r]))]
    where = {(k, stage(r, op.chunk), schedule.sample(op)): (r, s) for r, s in entries for op in schedule.ops[r][s].ops
             for k in dict(F="F", B="I", Bi="I", W="W")[op.kind]}
    end, cost = dict.fromkeys(entries, 0.0), {}
    for r, s in entries:
        entry = schedule.ops[r][s]
        parts = dict(F=t.t_forward, B=t.t_backward_input + t.t_backward_weight, Bi=t.t_backward_input, W=t.t_backward_weight)
        cost[r, s] = (t.t_overlapped if isinstance(entry, Pair) else parts[entry.kind]) * p / schedule.n_stages
    moved = True
    while moved:
        moved = False
        for r, s in entries:
            start = end[r, s - 1] if s else 0.0
            for op in schedule.ops[r][s].ops:
                here, m = stage(r, op.chunk), schedule.sample(op)
                sources = dict(F=[("F", here - 1, m)], W=[("I", here, m)], B=[("F", here, m), ("I", here + 1, m)])
                for source in sources[op.kind[0]]:
                    if 0 <= source[1] <= last:
                        place = where[source]
                        start = max(start, end[place] + t.t_comm * (place[0] != r))
            if start + cost[r, s] > end[r, s] + 1e-12:
                end[r, s], moved = start + cost[r, s], True
    line = simulate(schedule, t)
    assert line.makespan == pytest.approx(max(end.values()))
    seen = [0] * p
    for event in line.events:
        assert event.op == schedule.ops[event.rank][seen[event.rank]]
        assert event.end == pytest.approx(end[event.rank, seen[event.rank]])
        assert event.end - event.start == pytest.approx(cost[event.rank, seen[event.rank]])
        seen[event.rank] += 1


@pytest.mark.parametrize("kind, p, n", SMALL)
def test_peaks_stay_within_the_bound_and_reach_it(kind, p, n):
    schedule = make(kind, p, n)
    assert max(schedule.simulate(1, 1, 1, 3).peak_activations_per_rank) == schedule.max_activations
    assert schedule.copies == (2 if kind == "dualpipe" else 1)


def test_stages_and_samples():
    dual = make("dualpipe", 4, 8)
    assert [[dual.stage(r, c) for c in (0, 1)] for r in range(4)] == [[0, 3], [1, 2], [2, 1], [3, 0]]
    assert dual.sample(Op("F", 1, 3, 1)) == 7 and dual.n_stages == 4
    assert [make("dualpipev", 4, 8).stage(r, 1) for r in range(4)] == [7, 6, 5, 4]
    assert make("interleaved", 4, 8, 3).stage(1, 2) == 9


@pytest.mark.parametrize("kind, p, n, chunks, message", [
    ("dualpipe", 7, 20, 2, "schedule.n_ranks: found 7, allowed: an even number"),
    ("dualpipe", 8, 14, 2, "schedule.n_microbatches: found 14, allowed: an even number, at least 2 n_ranks = 16"),
    ("dualpipe", 8, 21, 2, "schedule.n_microbatches: found 21"),
    ("dualpipev", 4, 7, 2, "schedule.n_microbatches: found 7, allowed: at least 2 n_ranks = 8"),
    ("interleaved", 8, 20, 2, "schedule.n_microbatches: found 20, allowed: a multiple of n_ranks = 8"),
    ("interleaved", 4, 8, 1, "schedule.n_chunks: found 1"),
    ("1f1b", 0, 4, 2, "schedule.n_ranks: found 0"),
    ("1f1b", 4, True, 2, "schedule.n_microbatches: found True"),
    ("dualpip", 4, 8, 2, "schedule.kind: found 'dualpip', allowed: .*did you mean 'dualpipe'"),
])
def test_sizes_that_do_not_fit_are_one_clear_line(kind, p, n, chunks, message):
    with pytest.raises(UserError, match=message) as error:
        make(kind, p, n, chunks)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind, n", [("gpipe", 1), ("1f1b", 2), ("zb1p", 1), ("zb1p", 5)])
def test_fewer_micro_batches_than_ranks(kind, n):
    line = make(kind, 6, n).simulate(1, 1, 1, 3)
    short = max(6 - n, 0) if kind == "zb1p" else 0  # too few weight parts to fill ZB1P's waits
    assert line.bubble == KINDS[kind].bubble(6, 2, Times()) + short


def test_times_are_checked():
    for field in dataclasses.fields(Times):
        with pytest.raises(UserError, match=f"^{field.name}: found -1"):
            Times(**{field.name: -1.0})
