from pallas_kernels.gate.op import route, route_backward, takes_kernel  # noqa: F401
