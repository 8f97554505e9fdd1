"""Block shapes of the grouped bf16 products (H100 80GB HBM3; figures in docs/kernels.md)."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Tuning:
    tile_m: int = 256  # two consumers of 128 x 128
    tile_n: int = 128
    stages: int = 4
    buffers: int = 2  # pieces of 64 rows x 128 bytes of a consumer that wait in SMEM for their TMA stores; divides those of a store
    cluster: int = 2  # blocks, neighbours in n, that share A by TMA multicast
    group: int = 8  # cluster tiles of N walked before M advances (L2 reuse)
    sms: int = 132


PAIR = Tuning()
INTERPRET = Tuning(stages=2, buffers=1, cluster=1, sms=2)
