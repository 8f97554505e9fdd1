"""Packing and FIM: nothing lost, nothing twice, segments and positions as the contract says."""
import numpy as np
import pytest

from data import fim, packing
from data.tokenizer import bytes_tokenizer

PAD = 258


def random_documents(rng, n=40, longest=50):
    sizes = rng.integers(1, longest, n)
    starts = np.cumsum(sizes) - sizes  # every token of every document is a different number
    return [dict(tokens=np.arange(s, s + k, dtype=np.int32) + 1000, weight=rng.random(k).astype(np.float32) + 0.1,
                 own=np.full(k, i, np.int32)) for i, (s, k) in enumerate(zip(starts, sizes, strict=True))]  # fmt: skip


@pytest.mark.parametrize("kind", ["concat", "isolate"])
@pytest.mark.parametrize("seq_len", [1, 7, 16, 64])
def test_every_token_appears_exactly_once_with_its_columns(kind, seq_len, rng):
    documents = random_documents(rng)
    rows = packing.pack(documents, seq_len, PAD, kind)
    real = rows["segment_ids"] > 0
    assert sorted(rows["tokens"][real]) == sorted(np.concatenate([d["tokens"] for d in documents]))
    owner = {int(t): i for i, d in enumerate(documents) for t in d["tokens"]}
    assert all(owner[int(t)] == o for t, o in zip(rows["tokens"][real], rows["own"][real], strict=True))
    assert (rows["tokens"][~real] == PAD).all() and not rows["weight"][~real].any() and not rows["positions"][~real].any()
    assert {k: v.dtype for k, v in rows.items()} == dict(tokens=np.int32, segment_ids=np.int32, positions=np.int32,
                                                          weight=np.float32, own=np.int32)  # fmt: skip


def test_concat_runs_documents_on_in_order_under_one_segment(rng):
    documents, seq_len = random_documents(rng), 16
    rows = packing.pack(documents, seq_len, PAD, "concat")
    flat = np.concatenate([d["tokens"] for d in documents])
    assert (rows["tokens"].ravel()[: len(flat)] == flat).all() and len(rows["tokens"]) == -(-len(flat) // seq_len)
    assert set(np.unique(rows["segment_ids"])) <= {0, 1}
    assert (rows["positions"][:-1] == np.arange(seq_len)).all()
    weight = np.concatenate([d["weight"] for d in documents])
    weight[::seq_len] = 0  # nothing in the row predicts its first token
    assert (rows["weight"].ravel()[: len(flat)] == weight).all()


def test_isolate_gives_each_document_its_own_segment_positions_and_unpredicted_first_token(rng):
    documents = random_documents(rng, longest=16)
    rows = packing.pack(documents, 16, PAD, "isolate")
    seen = 0
    for tokens, segments, positions, weight, own in zip(*(rows[k] for k in ("tokens", "segment_ids", "positions", "weight", "own")),
                                                        strict=True):  # fmt: skip
        ids = [s for s in np.unique(segments) if s]
        assert ids == list(range(1, len(ids) + 1))
        for s in ids:
            at = np.flatnonzero(segments == s)
            document = documents[own[at[0]]]
            assert (np.diff(at) == 1).all() and (tokens[at] == document["tokens"]).all()
            assert (positions[at] == np.arange(len(at))).all()
            assert weight[at[0]] == 0 and (weight[at[1:]] == document["weight"][1:]).all()
            seen += 1
    assert seen == len(documents)


def test_best_fit_wastes_little_and_needs_equally_many_rows_in_any_order(rng):
    lengths = rng.integers(5, 40, 500)
    layout = packing.best_fit(lengths, 64)
    assert layout.n_rows <= -(-int(lengths.sum()) // 64) * 1.05
    assert {packing.best_fit(rng.permutation(lengths), 64).n_rows for _ in range(3)} == {layout.n_rows}
    assert np.bincount(layout.row, layout.size).max() <= 64
    assert packing.best_fit(np.array([7, 6, 3, 2, 2]), 10).n_rows == 2  # the 3 goes beside the 7, not beside the 6


def test_a_document_longer_than_a_row_is_split_or_dropped_by_kind():
    documents = [dict(tokens=np.arange(40, dtype=np.int32)), dict(tokens=np.arange(100, 110, dtype=np.int32))]
    split = packing.pack(documents, 16, PAD)
    assert sorted(split["tokens"][split["segment_ids"] > 0]) == [*range(40), *range(100, 110)]
    dropped = packing.pack(documents, 16, PAD, long="drop")
    assert sorted(dropped["tokens"][dropped["segment_ids"] > 0]) == [*range(100, 110)]
    assert packing.best_fit(np.array([40, 10]), 16, "drop").dropped == (0,)
    with pytest.raises(ValueError, match="no document fits rows of 4 tokens"):
        packing.rows_of(documents, packing.Packing("isolate", "drop"), 4, 0, PAD)


@pytest.mark.parametrize("kind", ["concat", "isolate"])
def test_an_epoch_of_rows_is_all_documents_and_epochs_differ(kind, rng):
    documents = random_documents(rng)
    rows = packing.rows_of(documents, packing.Packing(kind), 16, seed=3, pad=PAD)
    epochs = []
    for epoch in range(2):
        got = [rows[epoch * rows.n_rows + i] for i in range(rows.n_rows)]
        tokens = np.concatenate([g["tokens"][g["segment_ids"] > 0] for g in got])
        assert sorted(tokens) == sorted(np.concatenate([d["tokens"] for d in documents]))
        epochs.append(tokens.tolist())
    assert epochs[0] != epochs[1]
    again = packing.rows_of(documents, packing.Packing(kind), 16, seed=3, pad=PAD)
    for i in (0, 1, rows.n_rows, 5 * rows.n_rows + 2):  # any index, in any order
        assert all((again[i][k] == rows[i][k]).all() for k in rows[i])


def test_generated_rows_depend_on_seed_and_index_alone_and_keep_the_mix_of_lengths():
    def draw(rng, n):
        lengths = rng.choice([4, 10], n)
        return dict(tokens=np.repeat(lengths, lengths).astype(np.int32)), lengths

    make = lambda: packing.Generated(draw, packing.Packing("isolate"), 24, seed=1, pad=0, chunk=16)  # noqa: E731
    a, b = make(), make()
    rows = [a[i] for i in range(320)]
    assert all((b[i][k] == rows[i][k]).all() for i in (300, 17, 0) for k in rows[i])
    tokens = np.concatenate([r["tokens"] for r in rows])
    assert (tokens != 0).mean() > 0.9
    share = (tokens == 4).sum() / 4 / ((tokens == 4).sum() / 4 + (tokens == 10).sum() / 10)
    assert abs(share - 0.5) < 0.05  # best fit's long-first order does not leak into what is kept


def test_fim_keeps_every_token_and_is_psm():
    t = bytes_tokenizer()
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 50):
        ids = np.arange(n, dtype=np.int32)
        out = fim.rearrange(ids, rng, t)
        marks = [t.special(f"fim_{name}") for name in ("begin", "hole", "end")]
        assert len(out) == n + 3 and out[0] == marks[0] and [i for i in out if i in marks] == marks
        assert (fim.restore(out, t) == ids).all()
    assert len({tuple(fim.rearrange(np.arange(50), rng, t)) for _ in range(20)}) > 15


def test_fim_takes_exactly_its_share_of_documents():
    for n, rate in ((1000, 0.1), (7, 0.5), (10, 0.0), (10, 1.0)):
        assert fim.chosen(n, rate, 5).sum() == round(n * rate)
    assert (fim.chosen(100, 0.1, 5) != fim.chosen(100, 0.1, 6)).any()


def test_bad_packing_configs_are_one_line():
    with pytest.raises(ValueError, match="data.packing.kind: 'tight'; allowed: concat, isolate"):
        packing.parse(dict(kind="tight"))
    with pytest.raises(ValueError, match="data.packing.isolate.long: 'cut'; allowed: split, drop"):
        packing.parse(dict(kind="isolate", isolate=dict(long="cut")))
