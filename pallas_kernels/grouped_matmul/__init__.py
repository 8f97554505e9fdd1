from pallas_kernels.grouped_matmul.op import dgrad, matmul, matmul_swiglu, weight_gradient  # noqa: F401
