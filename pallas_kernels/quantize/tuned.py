"""How a quantisation is laid on the card (H100 80GB HBM3; figures in docs/kernels.md)."""
import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tuning:
    tiles: int = 1  # of 128 x 128 that a block works on side by side, 512 threads each
    stages: int = 0  # tiles on their way to SMEM by TMA, the grid persistent; 0: a block a tile, from GMEM to registers
    workers: int = 264  # of 512 threads, in the persistent grid
    walk: int = 0  # row tiles of a band, walked in every column tile before the next (0 is 1: along the columns; negative: all rows)


# PAIR where more than 64 registers a thread would be used: for 1024 threads ptxas has no more, and it takes 32 warps a multiprocessor to
# hide the latency of memory. BANDED where both copies are written: 1 KB of each column of a 128x1 copy is then written at about the same
# time. STAGED for sources of one byte an element.
ONE, PAIR, BANDED, STAGED = Tuning(), Tuning(tiles=2), Tuning(tiles=2, walk=8), Tuning(tiles=2, stages=2, walk=-1)
GRADIENT = PAIR  # of a SwiGLU, whose halves lie side by side


def direct(job) -> Tuning:
    """For a `kernel.Job`, without TMA."""
    if job.form == "swiglu_gradient":
        return GRADIENT
    if job.rows and job.columns and not job.block:
        return BANDED
    return ONE if job.form == "plain" else PAIR


def pick(job) -> Tuning:
    """For a `kernel.Job`. TMA wants rows of 16 bytes, and 2 bytes for each result are what SMEM has room for."""
    width = jnp.dtype(job.source).itemsize * (2 if job.form == "swiglu" else 1)
    return STAGED if job.scaled and job.columns and job.K % 16 == 0 and width <= 2 else direct(job)
