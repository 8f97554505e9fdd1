"""Multi-token prediction (V3 §2.2, eq. 21-25): modules in a chain, embedding and head shared with the main model.

Module k joins norms of the previous hidden states and of the embedding of token i+k, projects 2D -> D, runs one block and a norm;
the shared head then predicts token i+k+1. The join is [embedding; hidden], as the published weights are laid out (the paper's
equation writes the reverse). Sequences keep their length: the last k positions read wrapped tokens, are masked out of load and
balance, and carry no weight in any loss.
"""
from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from model import precision
from model.block import Block
from model.norm import norm_param, rms_norm
from model.sharding import normal, param
from model.tape import LayerTape


def join(params, hidden, embedding, cfg, run):
    """Eq. 21: the norms of embedding and hidden [B, T, D] side by side, projected 2D -> D. params: enorm, hnorm, proj."""
    sides = rms_norm(embedding, params["enorm"], cfg.norm_eps), rms_norm(hidden, params["hnorm"], cfg.norm_eps)
    return precision.linear(jnp.concatenate(sides, axis=-1), params["proj"], run, "mtp/proj")


class MTPModule(nn.Module):
    """(hidden [B, T, D], embedding of the next token [B, T, D]) -> (hidden [B, T, D] after its own norm, Routing or None)."""

    cfg: Any
    run: Any

    @nn.compact
    def __call__(self, hidden, embedding, layout, bias_E, valid_BT):
        cfg, D = self.cfg, hidden.shape[-1]
        enorm, hnorm, norm = (norm_param(self, name, D) for name in ("enorm", "hnorm", "norm"))
        w = param(self, "proj", (D, 2 * D), ("embed", "embed_in"), normal(cfg.init_std))
        x = join(dict(enorm=enorm, hnorm=hnorm, proj=w), hidden, embedding, cfg, self.run)
        x, routing, _ = Block(cfg, self.run, name="block")(x, layout, bias_E, valid_BT, None, LayerTape())
        return rms_norm(x, norm, cfg.norm_eps), routing


def forward(params, hidden, tokens_BT, embed, layout, router_bias, valid_BT, cfg, run):
    """Runs the chain: params stacked [J, ...], embed(tokens) -> [B, T, D]. Returns ([hidden of each depth], [Routing of each])."""
    T, hiddens, routings = tokens_BT.shape[1], [], []
    for k in range(1, cfg.mtp_depth + 1):
        with jax.named_scope(f"mtp/{k}"):
            has_next = jnp.arange(T)[None] < T - k
            bias = None if router_bias is None else router_bias[k - 1]
            module = jax.tree.map(lambda leaf: leaf[k - 1], params)
            hidden, routing = MTPModule(cfg, run).apply(
                {"params": module}, hidden, embed(jnp.roll(tokens_BT, -k, axis=1)), layout, bias, valid_BT & has_next)
        hiddens.append(hidden)
        routings.append(routing)
    return hiddens, routings
