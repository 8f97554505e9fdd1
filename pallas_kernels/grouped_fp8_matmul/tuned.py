"""Block shapes of the grouped FP8 products (H100 80GB HBM3; figures in docs/kernels.md)."""
from pallas_kernels.fp8_matmul.tuned import WIDE, WIDE_PAIR, Tuning


def pick(rows: int, groups: int) -> Tuning:
    """Forward and dgrad: pairs of blocks share the rows of A."""
    return WIDE_PAIR


GRADIENT = WIDE
