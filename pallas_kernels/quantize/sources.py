"""What a tile's values are: read from GMEM or from the ring in SMEM, made there if need be, and held by the threads.

A thread holds ROWS x 8 of them, as float32 (`Floats`) or packed in half the registers (`Packed`): both give single values and
the bits of the largest magnitudes of the rows and columns of the tile that the warp has.
"""
import dataclasses

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, scf

from pallas_kernels.quantize.emit import QuantizeEmit
from pallas_kernels.quantize.reference import ceil_div

ROWS = 4  # of a thread


@dataclasses.dataclass(frozen=True)
class Share:
    """A thread's part of a tile: ROWS rows from row0, 8 columns from col0."""

    exists: ir.Value  # the tile
    batch: ir.Value
    tile_m: ir.Value
    tile_k: ir.Value
    thread: ir.Value  # of the tile's 512
    lane: ir.Value
    group: ir.Value  # of 8 columns in the tile
    slot: ir.Value  # of ROWS rows in the tile
    column: ir.Value  # the first, in the tile
    row0: ir.Value
    col0: ir.Value
    at_row: list[ir.Value]  # each row, counted through the batches
    live: list[ir.Value]  # whether it exists
    stage: ir.Value | None  # of the ring


class Floats:
    """x: ROWS x 8 float32."""

    def __init__(self, e: QuantizeEmit, x):
        self.e, self.x = e, x
        self.sizes = [[arith.andi(e.bits(v), e.int(0x7FFFFFFF)) for v in row] for row in x]

    def size(self, i, j):
        return self.sizes[i][j]

    def value(self, i, j):
        return self.x[i][j]

    def row_maxima(self):
        return [self.e.largest_across(self.e.largest([self.size(i, j) for j in range(8)]), (8, 4, 2, 1)) for i in range(ROWS)]

    def column_maxima(self):
        return [self.e.largest_across(self.e.largest([self.size(i, j) for i in range(ROWS)]), (16,)) for j in range(8)]


class MadeFloats(Floats):
    """The same, made in a branch, and what came of it beside. Magnitudes and maxima by an asm with effects, where they are used: LLVM would
    keep the magnitudes beside the values, and take the maxima of columns only where they are stored."""

    def __init__(self, e: QuantizeEmit, x, dots):
        self.e, self.x, self.dots = e, x, dots

    def size(self, i, j):
        return self.e.asm(self.e.i32, "and.b32 $0, $1, 0x7fffffff;", [self.e.bits(self.x[i][j])], "=r,r")

    def column_maxima(self):
        e = self.e
        return [e.largest_across(e.largest([self.size(i, j) for i in range(ROWS)]), (16,), e.max_u32) for j in range(8)]


class Packed:
    """packed: ROWS x 4 words of two bfloat16. An asm with effects keeps LLVM from unpacking them all at once."""

    def __init__(self, e: QuantizeEmit, packed):
        self.e, self.packed = e, packed
        self.size = [[arith.andi(w, e.int(0x7FFF7FFF)) for w in row] for row in packed]

    def value(self, i, j):
        ptx = "and.b32 $0, $1, 0xffff0000;" if j % 2 else "shl.b32 $0, $1, 16;"
        return self.e.to_float(self.e.asm(self.e.i32, ptx, [self.packed[i][j // 2]], "=r,r"))

    def _halves(self, word):
        """As magnitudes of float32."""
        return [arith.shli(word, self.e.int(16)), arith.andi(word, self.e.int(0xFFFF0000))]

    def row_maxima(self):
        e = self.e
        rows = [e.largest(row, e.max_u16x2) for row in self.size]
        rows = [e.max_u16x2(w, arith.shrui(w, e.int(16))) for w in rows]
        pairs = [arith.ori(arith.andi(rows[i], e.int(0xFFFF)), arith.shli(rows[i + ROWS // 2], e.int(16)))
                 for i in range(ROWS // 2)]
        pairs = [self._halves(e.largest_across(w, (8, 4, 2, 1), e.max_u16x2)) for w in pairs]
        return [p[0] for p in pairs] + [p[1] for p in pairs]

    def column_maxima(self):
        e = self.e
        words = [e.largest_across(e.largest([row[j] for row in self.size], e.max_u16x2), (16,), e.max_u16x2) for j in range(4)]
        return [m for w in words for m in self._halves(w)]


class Source:
    """Reads a `kernel.Job`'s operands: gmem their refs, smem the addresses of the ring's pieces (source, scales) or None. dots: where
    the weights' gradient goes."""

    def __init__(self, e: QuantizeEmit, job, gmem, smem, dots):
        self.e, self.job, self.smem, self.dots = e, job, smem, dots
        self.x, *rest = gmem
        self.scale = rest.pop(0) if job.scaled else None
        self.other = rest.pop(0) if job.form in ("swiglu_gradient", "heads") else None  # gate and up; the heads' second array
        self.cos, self.sin = (rest.pop(0), rest.pop(0)) if job.form == "rotated" else (None, None)
        self.weights = rest.pop(0) if job.weighted else None
        self.itemsize = jnp.dtype(job.source).itemsize
        self.pieces = 2 if job.form == "swiglu" else 1
        self.width = job.K * self.pieces  # columns of x

    def origins(self, batch, tile_m, tile_k):
        """Where each piece of a tile starts in the source and in its scales."""
        e, K = self.e, self.job.K
        row, col = e.mul(tile_m, 128), e.mul(tile_k, 128)
        return [((batch, row, e.add(col, n * K)), (batch, e.add(tile_k, n * K // 128), row)) for n in range(self.pieces)]

    def _first_in_ring(self, share: Share, piece: int):
        return self.e.add(self.e.mul(self.e.add(self.e.mul(share.stage, self.pieces), piece), 128), self.e.mul(share.slot, ROWS))

    def _packed_rows(self, share: Share, piece: int = 0):
        """i -> the 8 values of row i; piece 1 is the other half of the columns. GMEM is asked for all at once."""
        e, itemsize = self.e, self.itemsize
        if share.stage is not None:
            first = self._first_in_ring(share, piece)
            return lambda i: e.load_shared(
                e.add(self.smem[0], e.mul(e.add(e.mul(e.add(first, i), 128), share.column), itemsize)), itemsize * 2)
        words = []
        for i in range(ROWS):
            element = e.element(share.at_row[i], self.width, e.add(share.col0, piece * self.job.K))
            words.append(e.load_values(e.pointer(self.x, element, itemsize), 8 * itemsize, share.live[i]))
        return words.__getitem__

    def _load16(self, share: Share, ref, itemsize: int, pitch: int, column, live=None):
        """16 bytes of each row from a column on, under way in this order; zeros unless `live`."""
        e, lives = self.e, [row if live is None else arith.andi(row, live) for row in share.live]
        return [e.load16(e.pointer(ref, e.element(row, pitch, column), itemsize), row_lives)
                for row, row_lives in zip(share.at_row, lives, strict=True)]

    def _rows_of_heads(self, share: Share):
        """The ROWS x 4 words of a column tile: a head's channels in the first array or in the second."""
        e, heads = self.e, self.job.K // 256
        second, head = e.rem(share.tile_k, 2), e.div(share.tile_k, 2)
        is_first = e.less(second, 1)
        ref = arith.select(is_first, *(llvm.ptrtoint(e.i64, utils.memref_ptr(ref)) for ref in (self.x, self.other)))
        width = arith.select(is_first, *map(e.int, self.job.channels))
        pitch, column = arith.extsi(e.i64, e.mul(width, heads)), arith.extsi(e.i64, e.add(arith.muli(head, width), share.column))
        two = arith.constant(e.i64, ir.IntegerAttr.get(e.i64, 2))
        elements = [arith.addi(arith.muli(arith.extsi(e.i64, row), pitch), column) for row in share.at_row]
        return [e.load(arith.addi(ref, arith.muli(element, two)), 4, live) for element, live in zip(elements, share.live, strict=True)]

    def _rotated_rows(self, share: Share):
        """The ROWS x 4 words of neighbouring pairs, turned back where a head's last channels are. 8 columns are turned or not; in a branch,
        so that all loads are under way before the first use."""
        e, (channels, turned) = self.e, self.job.channels
        channel = e.rem(share.col0, channels)
        is_turned, pair = e.less(e.int(channels - turned - 1), channel), e.div(e.add(channel, turned - channels), 2)
        words = self._load16(share, self.x, 2, self.job.K, share.col0)
        cos, sin = (self._load16(share, ref, 4, turned // 2, pair, is_turned) for ref in (self.cos, self.sin))
        made = scf.IfOp(is_turned, [e.i32] * (ROWS * 4), has_else=True)
        with ir.InsertionPoint(made.then_block):
            back = []
            for word, c, s in zip(*(sum(rows, []) for rows in (words, cos, sin)), strict=True):
                (even, odd), c, s = e.floats([word], "bfloat16"), e.to_float(c), e.to_float(s)
                pair = arith.addf(arith.mulf(even, c), arith.mulf(odd, s)), arith.subf(arith.mulf(odd, c), arith.mulf(even, s))
                back += e.words(pair, "bfloat16")
            scf.yield_(back)
        with ir.InsertionPoint(made.else_block):
            scf.yield_(sum(words, []))
        back = list(made.results)
        return [back[4 * i:4 * i + 4] for i in range(ROWS)]

    def _scales(self, share: Share, piece: int):
        e, job = self.e, self.job
        if share.stage is not None:
            return e.load_shared(e.add(self.smem[1], e.mul(self._first_in_ring(share, piece), 4)), ROWS)
        line = e.add(e.mul(share.batch, ceil_div(self.width, 128)), share.tile_k, piece * job.K // 128)
        return [e.load(e.pointer(self.scale, e.element(line, job.M, e.add(share.row0, i)), 4), 1, share.live[i])[0]
                for i in range(ROWS)]

    def _read(self, share: Share, piece: int = 0):
        """ROWS x 8 floats, a row at a time."""
        e, job = self.e, self.job
        packed, scales = self._packed_rows(share, piece), self._scales(share, piece) if job.scaled else None
        for i in range(ROWS):
            row = e.floats(packed(i), job.source)
            yield [arith.mulf(v, e.to_float(scales[i])) for v in row] if job.scaled else row

    def _weights(self, share: Share):
        """i -> the factor of row i. Each lane loads that of one row."""
        e, half = self.e, arith.andi(share.lane, self.e.int(16))
        i = e.rem(share.group, ROWS)
        live = arith.andi(share.exists, e.less(e.add(share.row0, i), self.job.M))
        own = e.load(e.pointer(self.weights, arith.extsi(e.i64, e.add(share.at_row[0], i)), 4), 1, live)[0]
        return lambda i: e.to_float(e.shuffle(own, e.add(half, i), "idx"))

    def rows(self, share: Share):
        """ROWS x 8 floats, made a row at a time."""
        if self.job.form == "plain":
            yield from self._read(share)
            return
        weight = self._weights(share) if self.job.weighted else None
        for i, (gate, up) in enumerate(zip(self._read(share, 0), self._read(share, 1), strict=True)):
            x = [self.e.swiglu(g, u) for g, u in zip(gate, up, strict=True)]
            if weight:
                factor = weight(i)
                x = [arith.mulf(v, factor) for v in x]
            yield x

    def _gradient(self, share: Share):
        """The gradient by gate or, in the right half of the columns, by up. What the two share in L1 they load alike;
        all loads are under way before the first use."""
        e, job, F = self.e, self.job, self.job.K // 2
        of_gate = e.less(share.tile_k, F // 128)
        col = arith.select(of_gate, share.col0, e.add(share.col0, -F))
        weight = self._weights(share) if job.weighted else None

        gate, d = self._load16(share, self.other, 2, job.K, col), self._load16(share, self.x, 2, F, col)
        up = self._load16(share, self.other, 2, job.K, e.add(col, F), of_gate)
        made = scf.IfOp(of_gate, [e.f32] * (ROWS * 8 + (ROWS if weight else 0)), has_else=True)
        with ir.InsertionPoint(made.then_block):
            x, dots = [], [e.float(0.0)] * ROWS if weight else []
            for i in range(ROWS):
                for g, u, d_hidden in zip(*(e.floats(words[i], job.source) for words in (gate, up, d)), strict=True):
                    s = e.sigmoid(g)
                    silu = arith.mulf(g, s)
                    if weight:
                        dots[i] = math.fma(d_hidden, arith.mulf(silu, u), dots[i])
                    x.append(arith.mulf(d_hidden, arith.mulf(u, math.fma(silu, arith.subf(e.float(1.0), s), s))))
            scf.yield_(x + dots)
        with ir.InsertionPoint(made.else_block):
            x = []
            for i in range(ROWS):
                for g, d_hidden in zip(*(e.floats(words[i], job.source) for words in (gate, d)), strict=True):
                    silu = arith.mulf(g, e.sigmoid(g))
                    x.append(arith.mulf(d_hidden, silu))
            scf.yield_(x + [e.float(0.0)] * len(dots))
        x = list(made.results)
        x, dots = [x[8 * i:8 * i + 8] for i in range(ROWS)], x[ROWS * 8:]
        if weight:
            x = [[arith.mulf(v, factor) for v in row] for row, factor in zip(x, map(weight, range(ROWS)), strict=True)]
        return MadeFloats(e, x, dots)

    def store_dots(self, share: Share, dots):
        """A gate's tile's sums over its columns, [batch, F/128, M]. dots: the thread's own of each row."""
        e, job, tiles = self.e, self.job, self.job.K // 256
        for lanes in (8, 4):  # half of the rows stay, the others' sums go to the lane that keeps those
            keep_right, n = e.less(e.int(0), arith.andi(share.lane, e.int(lanes))), len(dots) // 2
            kept, given = ([arith.select(keep_right, a, b) for a, b in zip(*halves, strict=True)]
                           for halves in ((dots[n:], dots[:n]), (dots[:n], dots[n:])))
            dots = [arith.addf(k, e.to_float(e.shuffle(e.bits(g), e.int(lanes), "bfly"))) for k, g in zip(kept, given, strict=True)]
        (dot,) = e.across(dots, 4)
        row = e.add(share.row0, e.div(share.group, 4))
        live = arith.andi(arith.andi(share.exists, e.less(share.tile_k, tiles)), e.less(row, job.M))
        line = e.element(e.add(e.mul(share.batch, tiles), share.tile_k), job.M, row)
        e.store(e.pointer(self.dots, line, 4), [e.bits(dot)], arith.andi(live, e.less(e.rem(share.group, 4), 1)))

    def values(self, share: Share) -> Floats | Packed:
        if self.job.form == "swiglu_gradient":
            return self._gradient(share)
        if self.job.form in ("heads", "rotated"):
            return Packed(self.e, self._rows_of_heads(share) if self.job.form == "heads" else self._rotated_rows(share))
        if self.job.source == "bfloat16" and self.job.form == "plain":
            return Packed(self.e, list(map(self._packed_rows(share), range(ROWS))))
        return Floats(self.e, list(self.rows(share)))
