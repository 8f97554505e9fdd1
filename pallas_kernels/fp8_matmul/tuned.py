"""Block shapes of the FP8 kernel and which product takes which (H100 80GB HBM3; figures in docs/kernels.md)."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Tuning:
    tile_m: int = 192
    tile_n: int = 128
    wgs: int = 3  # consumer warpgroups
    stages: int = 4
    overlap: bool = False  # two accumulators: promote block k while the wgmma of block k + 1 runs
    cluster: int = 1  # blocks, neighbours in n, that share A by TMA multicast
    group: int = 8  # cluster tiles of N walked before M advances (L2 reuse)
    unroll: int = 4  # K blocks a trip of the inner loop; equal to stages, it makes stage addresses constants
    buffers: int = 2  # pieces of 128 bytes a row staged in SMEM before their TMA stores
    registers: int = 160  # of a consumer thread (0: leave as launched); (512 - producer_registers) / wgs
    producer_registers: int = 32
    splits: int = 1  # parts of K that are tiles of their own
    sms: int = 132
    fewest_sms: bool = True  # as few blocks as finish in the same number of rounds

    def __post_init__(self):
        if self.tile_m % (64 * self.wgs) or self.tile_n not in (16, 32, 64, 128) or self.tile_m * self.tile_n > 256 * 128:
            raise ValueError(f"tile {self.tile_m} x {self.tile_n} with {self.wgs} consumers")
        if self.overlap and self.tile_m * self.tile_n > 128 * 128:
            raise ValueError("two accumulators of a 128 x 128 warpgroup tile do not fit the registers")


# WIDE: while one of three consumers promotes or stores, two keep the tensor cores fed. TALL: least traffic.
WIDE = Tuning()
WIDE_PAIR = Tuning(cluster=2)
TALL = Tuning(tile_m=256, wgs=2, buffers=1, cluster=2, registers=240, producer_registers=24)

GRADIENT = WIDE  # with a scale a row of B on top; 128 x 128 with two accumulators was 1-10 % slower


def small(rows: int, tile_n: int) -> Tuning:
    """At most 128 rows: memory-bound; two accumulators, narrow tiles so that every SM has one."""
    return Tuning(tile_m=rows, wgs=rows // 64, tile_n=tile_n, overlap=True, buffers=1,
                  registers=0 if rows == 64 else 240, producer_registers=24,
                  stages=5 if tile_n == 128 else 8, unroll=8 if tile_n < 64 else 4)


def split(t: Tuning, k: int) -> Tuning:
    """Tiles of 16 or 32 columns all read the whole of A, and walk all of K one block after the other. As many tiles of
    64 columns and a part of K move the same bytes of B and a half or a quarter of those of A (tiles of 128 spill)."""
    splits = 64 // t.tile_n
    for trip in (8, 7, 6):  # K blocks a trip, and stages: constant stage addresses
        if t.tile_n < 64 and k >= 4096 and -(-k // 128) % (splits * trip) == 0:
            return dataclasses.replace(t, tile_n=64, splits=splits, stages=trip, unroll=trip)
    return t


def _cost(t: Tuning, m: int, n: int, speed: float) -> float:
    """Time of a product in units of a full card's rate: rounds of the persistent grid times the tile."""
    tiles = -(-m // t.tile_m) * -(-n // (t.tile_n * t.cluster)) * t.cluster
    return -(-tiles // t.sms) * t.tile_m * t.tile_n / speed


def pick(m: int, n: int, k: int, row_scales: bool = False) -> Tuning:
    """The block shape of a dense product, by the rounds it takes and each shape's rate in full rounds."""
    if row_scales:
        return GRADIENT
    if m <= 128:  # memory-bound: the whole of M in one tile
        rows = 64 if m <= 64 else 128
        widths = {w: -(-n // w // 132) * w for w in (16, 32, 64, 128)}
        return split(small(rows, max(w for w in widths if widths[w] == min(widths.values()))), k)
    speeds = {WIDE: 0.97 if k > 2048 else 1.0, TALL: 1.0 if k > 2048 else 0.95, small(128, 128): 0.88,
              small(128, 64): 0.75, small(128, 32): 0.5}
    return min(speeds, key=lambda t: _cost(t, m, n, speeds[t]))
