from pallas_kernels.grouped_matmul.op import dgrad, matmul, weight_gradient  # noqa: F401
