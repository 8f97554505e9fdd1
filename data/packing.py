"""Documents -> rows of T tokens. Two kinds: `concat` runs documents on end to end, `isolate` keeps them apart.

concat: V3 §4.1, document packing without a cross-sample mask: all documents in a row are one segment (id 1), positions
run on, a document that meets the end of a row goes on in the next. isolate: SFT and RL, best fit, each piece a segment
of its own (ids 1, 2, ..), positions restart. Padding has segment id 0 and weight 0. `weight[t]` belongs to the
prediction of `tokens[t]` and is 0 at a segment's first token, which nothing in the row predicts.

A layout is made from lengths alone; tokens and any further columns (per-token log-probs, advantages) follow it.
"""
import dataclasses
import functools
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Pieces ordered by row and column: `size[p]` tokens of `document[p]` from `start[p]` on go to (row[p],
    column[p]).
    """

    n_rows: int
    row: np.ndarray
    column: np.ndarray
    segment: np.ndarray
    document: np.ndarray
    start: np.ndarray
    size: np.ndarray
    dropped: tuple[int, ...] = ()  # documents longer than a row, under isolate with long='drop'


@dataclasses.dataclass(frozen=True)
class Packing:
    """`long` (isolate): a document longer than a row is cut into pieces ('split') or left out ('drop')."""

    kind: str
    long: str = "split"


def parse(config) -> Packing:
    """config.data.packing = dict(kind, concat=dict(), isolate=dict(long='split'|'drop'))."""
    if config["kind"] not in KINDS:
        raise ValueError(f"data.packing.kind: {config['kind']!r}; allowed: {', '.join(KINDS)}")
    packing = Packing(config["kind"], **config[config["kind"]])
    if packing.long not in ("split", "drop"):
        raise ValueError(f"data.packing.isolate.long: {packing.long!r}; allowed: split, drop")
    return packing


def concat(lengths: np.ndarray, seq_len: int, long: str = "split") -> Layout:
    """Documents in the order given, end to end; nothing is lost, only the last row is padded."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(starts[-1])
    begin = np.union1d(starts[:-1][np.asarray(lengths) > 0], np.arange(0, total, seq_len)).astype(np.int64)
    document = np.searchsorted(starts, begin, side="right") - 1
    size = np.diff(np.append(begin, total))
    return Layout(-(-total // seq_len), begin // seq_len, begin % seq_len, np.ones_like(begin),
                  document, begin - starts[document], size)  # fmt: skip


def best_fit(lengths: np.ndarray, seq_len: int, long: str = "split") -> Layout:
    """Best fit, longest first: each piece goes to the row whose free space it leaves least of.

    The number of rows depends on the lengths alone, not on their order.
    """
    lengths = np.asarray(lengths, np.int64)
    dropped = np.flatnonzero(lengths > seq_len) if long == "drop" else np.zeros(0, np.int64)
    n_pieces = -(-lengths // seq_len)
    n_pieces[dropped] = 0
    document = np.repeat(np.arange(len(lengths)), n_pieces)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)) * seq_len
    size = np.minimum(lengths[document] - start, seq_len)
    row, column, segment = np.zeros_like(size), np.zeros_like(size), np.zeros_like(size)
    # rows by free space; `spaces` has bit s set while some row has s free tokens: the best fit is its lowest set bit
    rows_with, spaces, n_segments = [[] for _ in range(seq_len + 1)], 0, []
    for p in np.argsort(-size, kind="stable").tolist():
        n = int(size[p])
        fitting = spaces >> n
        if fitting:
            space = n + (fitting & -fitting).bit_length() - 1
            r = rows_with[space].pop()
            if not rows_with[space]:
                spaces ^= 1 << space
        else:
            r, space = len(n_segments), seq_len
            n_segments.append(0)
        n_segments[r] += 1
        row[p], column[p], segment[p] = r, seq_len - space, n_segments[r]
        rows_with[space - n].append(r)
        spaces |= 1 << (space - n)
    order = np.lexsort((column, row))
    pieces = (values[order] for values in (row, column, segment, document, start, size))
    return Layout(len(n_segments), *pieces, dropped=tuple(dropped.tolist()))


def place(layout: Layout, columns: dict[str, np.ndarray], offsets: np.ndarray, seq_len: int, pad: int) -> dict:
    """Rows [n_rows, T] of every column. `columns` are flat over documents, document d starting at `offsets[d]`.

    tokens int32, weight float32 (ones if no such column), segment_ids and positions int32, others keep their dtype.
    """
    lead = np.repeat(np.cumsum(layout.size) - layout.size, layout.size)
    within = np.arange(len(lead)) - lead
    to = np.repeat(layout.row * seq_len + layout.column, layout.size) + within
    source = np.repeat(np.asarray(offsets)[layout.document] + layout.start, layout.size) + within

    def rows(values, dtype, fill=0):
        out = np.full(layout.n_rows * seq_len, fill, dtype)
        out[to] = values
        return out.reshape(layout.n_rows, seq_len)

    segment_ids = rows(np.repeat(layout.segment, layout.size), np.int32)
    first = np.ones_like(segment_ids, bool)
    first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    column = np.broadcast_to(np.arange(seq_len, dtype=np.int32), segment_ids.shape)
    positions = column - np.maximum.accumulate(np.where(first, column, 0), axis=1)
    weight = columns["weight"][source] if "weight" in columns else 1.0
    out = {name: rows(v[source], v.dtype) for name, v in columns.items() if name not in ("tokens", "weight")}
    return out | dict(
        tokens=rows(columns["tokens"][source], np.int32, pad),
        segment_ids=segment_ids,
        positions=np.where(segment_ids > 0, positions, 0).astype(np.int32),
        weight=np.where(first, 0.0, rows(weight, np.float32)).astype(np.float32),
    )


def pack(documents: list[dict[str, np.ndarray]], seq_len: int, pad: int, kind="isolate", long="split") -> dict:
    """A list of documents, each a dict of equally long 1-D columns with 'tokens', to rows [n_rows, T] (see `place`)."""
    lengths = np.array([len(d["tokens"]) for d in documents], np.int64)
    columns = {name: np.concatenate([d[name] for d in documents]) for name in documents[0]}
    return place(KINDS[kind](lengths, seq_len, long), columns, np.cumsum(lengths) - lengths, seq_len, pad)


class Rows:
    """Endless random-access rows over a finite set of documents: row i is in epoch i // n_rows.

    Every epoch has its own order of documents and of rows, a function of (seed, epoch) alone, and the same number of
    rows. `fetch(epoch, d)` returns document d's columns; its length must be `lengths[d]` in every epoch.
    """

    def __init__(self, lengths, fetch: Callable[[int, int], dict], packing: Packing, seq_len: int, seed: int, pad: int):
        self.lengths, self.packing, self.seq_len, self.seed, self.pad = np.asarray(lengths), packing, seq_len, seed, pad
        self.layout = functools.lru_cache(2)(self._layout)
        self.fetch = functools.lru_cache(4096)(fetch)
        self.n_rows = self.layout(0)[0].n_rows
        if not self.n_rows:
            raise ValueError(f"data: no document fits rows of {seq_len} tokens ({len(self.lengths)} documents)")

    def _layout(self, epoch: int):
        rng = np.random.default_rng((self.seed, 0xE0, epoch))
        order = rng.permutation(len(self.lengths))
        layout = KINDS[self.packing.kind](self.lengths[order], self.seq_len, self.packing.long)
        first = np.searchsorted(layout.row, np.arange(layout.n_rows + 1))
        return layout, order[layout.document], rng.permutation(layout.n_rows), first

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, i: int) -> dict:
        epoch, k = divmod(int(i), self.n_rows)
        layout, document, row_order, first = self.layout(epoch)
        here = slice(first[row_order[k]], first[row_order[k] + 1])
        start, size = layout.start[here], layout.size[here]
        parts = [(self.fetch(epoch, int(d)), slice(s, s + n)) for d, s, n in zip(document[here], start, size, strict=True)]
        columns = {name: np.concatenate([columns[name][part] for columns, part in parts]) for name in parts[0][0]}
        zeros = np.zeros_like(size)
        one = Layout(1, zeros, layout.column[here], layout.segment[here], np.arange(len(size)), zeros, size)
        rows = place(one, columns, np.cumsum(size) - size, self.seq_len, self.pad)
        return {name: value[0] for name, value in rows.items()}


def rows_of(documents: list[dict[str, np.ndarray]], packing: Packing, seq_len: int, seed: int, pad: int) -> Rows:
    """Endless rows over documents that are the same in every epoch (SFT)."""
    lengths = np.array([len(d["tokens"]) for d in documents])
    return Rows(lengths, lambda epoch, d: documents[d], packing, seq_len, seed, pad)


class Generated:
    """Endless random-access rows over documents made by rule: chunk c of `chunk` rows is a function of (seed, c) alone.

    `draw(rng, n) -> (columns, lengths)` makes n documents, columns flat. The rows kept are a random choice of those
    packed, as best fit puts long documents first.
    """

    def __init__(self, draw, packing: Packing, seq_len: int, seed: int, pad: int, chunk: int = 256):
        self.draw, self.packing, self.chunk = draw, packing, chunk
        self.seq_len, self.seed, self.pad = seq_len, seed, pad
        mean = np.mean(draw(np.random.default_rng((seed, 0xE1)), 256)[1])
        self.n_documents = int(1.1 * chunk * seq_len / mean) + 16
        self.rows = functools.lru_cache(4)(self._rows)

    def _rows(self, c: int) -> dict:
        rng = np.random.default_rng((self.seed, 0xE2, c))
        n = self.n_documents
        while True:
            columns, lengths = self.draw(rng, n)
            layout = KINDS[self.packing.kind](lengths, self.seq_len, self.packing.long)
            if layout.n_rows > self.chunk:  # one more than needed: the last row may be all but empty
                break
            n *= 2
        rows = place(layout, columns, np.cumsum(lengths) - lengths, self.seq_len, self.pad)
        kept = rng.permutation(layout.n_rows - 1)[: self.chunk]
        return {name: value[kept] for name, value in rows.items()}

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, i: int) -> dict:
        c, k = divmod(int(i), self.chunk)
        return {name: value[k] for name, value in self.rows(c).items()}


KINDS = dict(concat=concat, isolate=best_fit)
