"""SwiGLU of a finished tile in registers, in MLIR: the body of one `plgpu.inline_mgpu` call."""
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jaxlib.mlir.dialects import llvm

from pallas_kernels.emit import Emit


def swiglu(ctx, gate, up):
    """silu(gate) * up of two bf16 arrays of one layout, in float32 with one rounding, a register (two columns) after the other."""
    e, out = Emit(), []
    for pair in zip(gate.registers.flat, up.registers.flat, strict=True):
        values = [e.floats([llvm.bitcast(e.i32, register)], "bfloat16") for register in pair]
        word, = e.words([e.swiglu(g, u) for g, u in zip(*values, strict=True)], "bfloat16")
        out.append(llvm.bitcast(pair[0].type, word))
    registers = np.array(out, dtype=object).reshape(gate.registers.shape)
    return fa.FragmentedArray(_registers=registers, _layout=gate.layout, _is_signed=None)
