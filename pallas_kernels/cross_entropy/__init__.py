from pallas_kernels.cross_entropy.op import log_probability_backward, log_sum_exp, takes_kernel  # noqa: F401
