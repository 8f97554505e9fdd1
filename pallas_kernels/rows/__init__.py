from pallas_kernels.rows.op import gather, gather_sum, weighted_backward  # noqa: F401
