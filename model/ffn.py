"""SwiGLU, the feed-forward network of dense layers and of every expert: FFN(x) = W2 (silu(W1 x) * W3 x).

W1 and W3 read the same input and are one parameter gate_up [2, F, D].
"""
from model import precision
from model.sharding import normal, param


def dense_ffn(module, x_BTD, width: int, scope: str, tape, prefix: str = ""):
    """SwiGLU of this width, its parameters in `module` under prefix: x [B, T, D] -> [B, T, D]."""
    D, init = x_BTD.shape[-1], normal(module.cfg.init_std)
    w_up = param(module, f"{prefix}gate_up", (2, width, D), ("pair", "ffn", "embed"), init)
    w_down = param(module, f"{prefix}down", (D, width), ("embed", "ffn"), init)
    gate_up, hidden = precision.gate_up(x_BTD, w_up, module.run, f"{scope}gate_up", tape)
    return precision.linear(hidden, w_down, module.run, f"{scope}down", tape, gate_up=gate_up)
