from pallas_kernels.fp8_matmul.op import matmul, weight_gradient  # noqa: F401
