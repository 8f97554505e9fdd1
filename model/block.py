"""One transformer block: x + attention(norm(x)), then x + FFN(norm(x)) (V3 Fig. 2). The largest Linen module.

`Block(cfg, run).apply({'params': slice}, ...)` is the pure function that scan, pipeline and sampler call. A cfg without experts
(`cfg.dense()`) makes the dense blocks, one with experts the MoE blocks.
"""
from __future__ import annotations

from typing import Any

import flax.linen as nn

from model.attention import Layout
from model.ffn import dense_ffn
from model.moe import MoEFFN
from model.norm import RESIDUAL, add_rms_norm, norm_param
from model.sharding import constrain


class Block(nn.Module):
    """x [B, T, D] -> (x, Routing or None, this layer's cache or None)."""

    cfg: Any
    run: Any

    @nn.compact
    def __call__(self, x_BTD, layout: Layout, bias_E, valid_BT, cache, tape):
        cfg, D = self.cfg, x_BTD.shape[-1]
        attention_norm, ffn_norm = norm_param(self, "attention_norm", D), norm_param(self, "ffn_norm", D)
        x_BTD, normed = add_rms_norm(x_BTD, None, attention_norm, cfg.norm_eps)
        attended, cache = cfg.attention.module(cfg, self.run)(normed, layout, cache, tape)
        (x_BTD, normed), routing = add_rms_norm(x_BTD, attended, ffn_norm, cfg.norm_eps), None
        tape.probe("block", "attention", x_BTD)
        if cfg.moe is None:
            x_BTD = x_BTD + dense_ffn(self, normed, cfg.d_ff, "ffn/", tape)
        else:
            x_BTD, routing = MoEFFN(cfg, self.run, name="moe")(x_BTD, normed, bias_E, valid_BT, tape)
        x_BTD = constrain(x_BTD, RESIDUAL)
        return tape.probe("block", "out", x_BTD), routing, cache
