from pallas_kernels.quantize.op import (  # noqa: F401
    dequantize_tiles,
    quantize_both,
    quantize_heads,
    quantize_rotated_back,
    quantize_tiles,
    quantize_weight,
    requantize_tiles,
    swiglu_gradient,
    swiglu_quantize,
)
