from pallas_kernels.norm.op import rms_norm, rms_norm_backward, takes_kernel  # noqa: F401
