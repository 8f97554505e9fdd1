"""Block shapes of the grouped bf16 products and which product takes which (H200; figures in docs/kernels.md)."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Tuning:
    parts: int = 2  # of 128 rows of a tile: two consumers share it; with one they take turns, and one stores while the other multiplies
    tile_n: int = 128
    stages: int = 4
    buffers: int = 2  # pieces of 64 rows x 128 bytes of a consumer that wait in SMEM for their TMA stores; divides those of a store
    cluster: int = 2  # blocks, neighbours in n, that share A by TMA multicast
    group: int = 8  # cluster tiles of N walked before M advances (L2 reuse)
    sms: int = 132


SHARED = Tuning()  # least traffic: 5 % faster at a reduction of 7168
IN_TURN = Tuning(parts=1, stages=6)  # no tensor core waits for a store: 8 % faster at 1024, 11 % at 512
INTERPRET = Tuning(stages=2, buffers=1, cluster=1, sms=2)


def rows(reduction: int) -> Tuning:
    """Forward and dgrad."""
    return IN_TURN if reduction <= 1024 else SHARED


def gradient(rows_a_group: int) -> Tuning:
    """Weight gradient, by the mean rows of its groups: 4 % faster in turn at 2,112."""
    return IN_TURN if rows_a_group <= 2304 else SHARED
