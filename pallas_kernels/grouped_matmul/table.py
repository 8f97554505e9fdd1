"""The tables of `grouped_matmul.tiles` on Hopper, each in one launch: bound by latency, so nothing waits for another warp.

A thread makes a column. Its warp reads all sizes at once, a lane a share of the segments one after the other; two sums over the
lanes (rows, then tiles) say where each share begins. A thread finds the share of its tile by halving, and within it the segment.
Bit for bit what `tiles` makes, also past the last tile, of sizes of 0 and more. Everything is one `plgpu.inline_mgpu` body.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.emit import Emit
from pallas_kernels.grouped_matmul import tiles
from pallas_kernels.quantize.reference import ceil_div

REF = plgpu.RefType()
SCALAR = plgpu.Layout.WG_SPLAT(())
THREADS = 128  # of a block
NAN = 0x7FC00000  # as jnp has it


@dataclasses.dataclass(frozen=True)
class Job:
    """What one launch does."""

    kind: str  # rows, masked, gradient
    groups: int
    n_rows: int  # of all groups; of each (masked); of its weight gradient (gradient)
    tile_m: int
    k_blocks: int = 0
    align: int = 1
    block: int = 1  # rows of a block of K (gradient)

    @property
    def segments(self) -> int:
        return dict(rows=self.groups + 1, masked=2 * self.groups, gradient=self.groups)[self.kind]

    @property
    def share(self) -> int:
        """Segments of a lane."""
        return ceil_div(self.segments, 32)

    @property
    def per_group(self) -> int:
        """Tiles of a group's weight gradient."""
        return ceil_div(self.n_rows, self.tile_m)

    @property
    def entries(self) -> int:
        if self.kind == "gradient":
            return self.groups * self.per_group
        return tiles.most(self.segments, self.n_rows * (self.groups if self.kind == "masked" else 1), self.tile_m, self.align)


class TableEmit(Emit):
    """Segments of rows, [start, end) each, and their tiles: `tiles.segment_tiles` in scalars."""

    def __init__(self, job: Job, block):
        super().__init__()
        self.job = job
        thread = utils.thread_idx()
        self.lane = self.rem(thread, 32)
        self.index = self.add(self.mul(block, THREADS), thread)

    def sub(self, a, b):
        return arith.subi(a, b)

    def word(self, ref, index):
        """Its address. Anew: of an offset that it knows to be below 256 LLVM makes a bitwise or, as Mosaic says that arrays start at
        multiples of 256 bytes."""
        return self.pointer(ref, arith.extsi(self.i64, self.anew(index)), 4)

    def least(self, a, b):
        return arith.minsi(a, self.int(b) if isinstance(b, int) else b)

    def at_least_0(self, a):
        return arith.maxsi(a, self.int(0))

    def reached(self, x):
        """x <= this thread's tile."""
        return arith.cmpi(arith.CmpIPredicate.sle, x, self.index)

    def from_lane(self, x, lane):
        return self.shuffle(x, self.int(lane) if isinstance(lane, int) else lane, "idx")

    def sum_to(self, x):
        """Over this lane and those below."""
        for distance in (1, 2, 4, 8, 16):
            below = self.from_lane(x, self.add(self.lane, -distance))
            x = arith.select(self.less(self.lane, distance), x, self.add(x, below))
        return x

    def union(self, x):
        """The bits set in any lane."""
        return self.asm(self.i32, "redux.sync.or.b32 $0, $1, 0xffffffff;", [x], "=r,r")

    def live(self, segment):
        """Whether it is one of a group's counted rows."""
        return self.less(segment, self.job.groups)

    def group(self, segment):
        return arith.select(self.live(segment), segment, self.add(segment, -self.job.groups))

    def size(self, sizes, segment):
        """Of its group, 0 where it has none."""
        exists = self.less(segment, self.job.groups * (2 if self.job.kind == "masked" else 1))
        return self.load(self.word(sizes, self.group(segment)), 1, exists)[0]

    def bounds(self, segment, size, before):
        """(start, end), the sizes of the segments before being `before` in all."""
        job, live = self.job, self.live(segment)
        if job.kind == "masked":
            first = self.mul(self.group(segment), job.n_rows)
            cut = self.add(first, self.least(self.at_least_0(size), job.n_rows))
            return arith.select(live, first, cut), arith.select(live, cut, self.add(first, job.n_rows))
        if job.kind == "gradient":
            return before, self.add(before, size)
        end = self.least(self.add(before, size), job.n_rows)
        return self.least(end, before), arith.select(live, end, self.int(job.n_rows))

    def tiles(self, start, end):
        """(rows skipped, tiles of tile_m rows, tiles in all)."""
        job = self.job
        if job.kind == "gradient":
            return self.int(0), self.int(job.per_group), self.int(job.per_group)
        skip = arith.select(arith.cmpi(arith.CmpIPredicate.slt, start, end), self.rem(start, job.align), self.int(0))
        units = self.div(self.add(self.sub(end, start), skip, 63), 64)
        count = self.div(self.add(units, job.tile_m // 64 - 1), job.tile_m // 64)
        if job.tile_m != 192:
            return skip, count, count
        of_1 = arith.cmpi(arith.CmpIPredicate.eq, self.rem(units, 3), self.int(1))
        split = arith.andi(of_1, arith.cmpi(arith.CmpIPredicate.sge, units, self.int(4)))  # 192 + 64 rows as 128 + 128
        return skip, self.sub(self.div(units, 3), arith.extui(self.i32, split)), count

    def walk(self, sizes, lane, rows):
        """(segment, start, end, tiles) of each segment of a lane's share, `rows` in the shares before it."""
        for j, size in enumerate(sizes):
            segment = self.add(self.mul(lane, self.job.share), j)
            start, end = self.bounds(segment, size, rows)
            exists = self.less(segment, self.job.segments)
            yield segment, start, end, arith.select(exists, self.tiles(start, end)[2], self.int(0))
            rows = self.add(rows, size)

    def column(self, segment, start, end, within):
        """FIELDS of the segment's tile number `within`."""
        job, group, zero = self.job, self.group(segment), self.int(0)
        if job.kind == "gradient":
            row = self.mul(within, job.tile_m)
            rows = self.least(self.sub(self.int(job.n_rows), row), job.tile_m)
            return [row, self.add(self.mul(group, job.n_rows), row), rows, zero, zero, self.div(start, job.block),
                    self.div(self.sub(end, start), job.block)]
        skip, tall, _ = self.tiles(start, end)
        n_tall = arith.minsi(within, tall)
        row = self.add(self.sub(start, skip), self.mul(n_tall, job.tile_m), self.mul(self.sub(within, n_tall), 128))
        height = arith.select(arith.cmpi(arith.CmpIPredicate.slt, within, tall), self.int(job.tile_m), self.int(128))
        rows = self.least(self.at_least_0(self.sub(end, row)), height)
        skip = arith.select(self.less(within, 1), skip, zero)
        return [row, row, rows, skip, group, zero, arith.select(self.live(segment), self.int(job.k_blocks), zero)]


def _find(e: TableEmit, own):
    """From the sizes of the lane's share: (segment of this thread's tile, start, end, tiles before it), tiles in all."""
    size = e.add(*own)
    rows = e.sub(e.sum_to(size), size)
    own_tiles = e.add(*(n for *_, n in e.walk(own, e.lane, rows)))
    to_here = e.sum_to(own_tiles)
    before = e.sub(to_here, own_tiles)

    share = e.int(0)  # the last one that begins at this tile or earlier
    for step in (16, 8, 4, 2, 1):
        probe = e.add(share, step)
        further = arith.andi(e.reached(e.from_lane(before, probe)), e.less(probe, ceil_div(e.job.segments, e.job.share)))
        share = arith.select(further, probe, share)
    begin, found = e.from_lane(before, share), None
    for segment, start, end, n in e.walk([e.from_lane(size, share) for size in own], share, e.from_lane(rows, share)):
        here = segment, start, end, begin
        if found is not None:
            further = arith.andi(e.reached(begin), e.less(segment, e.job.segments))
            here = [arith.select(further, new, old) for new, old in zip(here, found, strict=True)]
        found, begin = here, e.add(begin, n)
    return found, e.from_lane(to_here, 31)


def _table(e: TableEmit, sizes, count, table, *poison):
    job = e.job
    own = [e.size(sizes, e.add(e.mul(e.lane, job.share), j)) for j in range(job.share)]
    (segment, start, end, before), total = _find(e, own)
    alone = [(count, total)]
    if poison:
        whole = e.less(e.union(functools.reduce(arith.ori, (e.rem(size, job.block) for size in own))), 1)
        alone.append((poison[0], arith.select(whole, e.int(0), e.int(NAN))))

    column = e.column(segment, start, end, e.sub(e.index, before))
    address, exists = e.word(table, e.index), e.less(e.index, job.entries)
    with utils.when(exists):  # one branch for all: ptxas makes several of the predicates
        for i, field in enumerate(column):
            e.store(arith.addi(address, arith.constant(e.i64, 4 * job.entries * i)), [field], exists)
    for ref, word in alone:
        e.store(e.word(ref, e.int(0)), [word], e.less(e.index, 1))


@functools.partial(jax.jit, static_argnums=0)  # traced and compiled once a shape, however often a model calls it
def _make(job: Job, sizes: jax.Array):
    """sizes i32 [G] -> (count i32 [1], table i32 [7, entries](, poison f32 [1]))."""
    out = [jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((len(tiles.FIELDS), job.entries), jnp.int32)]
    if job.kind == "gradient":
        out.append(jax.ShapeDtypeStruct((1,), jnp.float32))

    def inner(ctx, block, *refs):
        _table(TableEmit(job, block.registers.item()), *refs)

    def body(*refs):
        plgpu.inline_mgpu(arg_types=(SCALAR,) + (REF,) * len(refs))(inner)(lax.axis_index("grid"), *refs)

    return hopper.launch(body, (sizes,), tuple(out), (), name="tile_table", cluster=1, warpgroups=1, grid=ceil_div(job.entries, THREADS))


def row_tiles(group_sizes: jax.Array, n_rows: int, k_blocks: int, tile_m: int, align: int = 1) -> tuple[jax.Array, jax.Array]:
    """As `tiles.row_tiles`."""
    return _make(Job("rows", group_sizes.shape[0], n_rows, tile_m, k_blocks, align), group_sizes)


def masked_tiles(counts: jax.Array, n_rows: int, k_blocks: int, tile_m: int, align: int) -> tuple[jax.Array, jax.Array]:
    """As `tiles.masked_tiles`."""
    return _make(Job("masked", counts.shape[0], n_rows, tile_m, k_blocks, align), counts)


def gradient_tiles(group_sizes: jax.Array, n_out: int, tile_m: int, block: int) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """As `tiles.gradient_tiles`."""
    *table, poison = _make(Job("gradient", group_sizes.shape[0], n_out, tile_m, block=block), group_sizes)
    return tuple(table), poison
