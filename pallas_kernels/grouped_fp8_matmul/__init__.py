from pallas_kernels.grouped_fp8_matmul.op import grouped_matmul, masked_matmul, weight_gradient  # noqa: F401
