"""A persistent grid whose source tiles come to SMEM by TMA, `stages` ahead of their use.

For sources of one byte an element: the loads of 32 warps into registers are too few bytes to cover the memory's latency,
and while a block computes it loads nothing. Here the copies never stop, whatever the warps do.
"""
from collections.abc import Callable

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.emit import Emit


def each_tile(
    ctx, e: Emit, gmem: tuple, smem: tuple, barriers, *, stages: int, parts: int, part, thread, worker, workers: int,
    tiles: int, bytes_a_tile: int, origins: Callable, work: Callable,
) -> None:
    """Calls work(tile, stage, refill) for the tiles worker, worker + workers, ... of `tiles`.

    gmem, smem: source and its scales, as [batch, M, columns] and [batch, blocks, M], and as pieces [n, 128, 128] and
    [n, 128]. origins(tile): for each piece of a tile, where it starts in either. Tile `stage` has its pieces at
    stage * pieces + 0, 1, ...; `refill` may be called once all threads of the part have read them.
    """
    def index(x):
        return arith.index_cast(ir.IndexType.get(), x)

    def copy(source, target, at, start, barrier):
        rank = len(ir.MemRefType(target.type).shape) - 1  # the last axes are a window, the others a place
        slices = [index(i) if n < len(start) - rank else utils.DynamicSlice(index(i), 128) for n, i in enumerate(start)]
        ctx.async_copy(src_ref=source, dst_ref=utils.memref_slice(target, index(at)), gmem_slice=tuple(slices),
                       barrier=barrier, arrive=False, swizzle=None, predicate=None)

    def fill(tile, stage):
        wanted = arith.andi(e.less(thread, 32), e.less(tile, tiles))
        with utils.when(wanted), hopper.filling(barriers, parts * stages, stage, None, bytes_a_tile) as barrier:
            pieces = origins(tile)
            for n, starts in enumerate(pieces):
                at = e.add(e.mul(stage, len(pieces)), n)
                for source, target, start in zip(gmem, smem, starts, strict=True):
                    copy(source, target, at, start, barrier)

    hopper.init_barriers(parts * stages, 1, 1)(ctx, barriers)
    for s in range(stages):
        fill(e.add(worker, s * workers), e.add(e.mul(part, stages), s))

    @utils.fori(e.div(arith.subi(e.int(tiles + workers - 1), worker), workers), [])
    def _(i, _):
        def stage(i):
            return e.add(e.mul(part, stages), e.rem(i, stages))

        def refill():
            again = e.anew(i)
            fill(e.add(worker, e.mul(again, workers), stages * workers), stage(again))

        hopper.wait_full(ctx, barriers, stage(i), e.rem(e.div(i, stages), 2))
        work(e.add(worker, e.mul(i, workers)), stage(i), refill)
        return []
