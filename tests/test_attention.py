"""Every kind of attention at the size of one layer: whatever its formula, a new row of KINDS is held to these."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from tiny_model import tiny

from model import attention, block_attention, hf_config, precision, transformer
from model.config import Execution
from model.errors import UserError
from model.tape import LayerTape

B, T = 2, 6
KINDS = [pytest.param(kind, marks=pytest.mark.slow) if kind in ("mha", "mqa") else kind for kind in attention.KINDS]  # gqa's module


@functools.cache
def layer(kind):
    """(cfg, params float64, x, f) of one attention layer; f(params, x, cache) -> (out, its core's heads, cache)."""
    cfg = tiny(attention__kind=kind, n_layers=1, n_dense_layers=1)
    module = cfg.attention.module(cfg, Execution())

    @jax.jit
    def f(params, x, cache):
        layout, _ = transformer.layout_of(B, x.shape[1], dict(segment_ids=None, positions=None, cache=cache), cfg, x.dtype)
        tape = LayerTape(wanted=("*/*/core",))
        slot = None if cache is None else attention.LayerCache(cache.kv, 0)
        out, slot = module.apply({"params": params}, x, layout, slot, tape)
        (heads,) = tape.probes.values()
        return out, heads, None if cache is None else transformer.Cache(slot.kv, cache.lengths + x.shape[1])

    def init(key, x):
        layout, _ = transformer.layout_of(B, T, dict(segment_ids=None, positions=None), cfg, x.dtype)
        return meta.unbox(module.init(key, x, layout, None, LayerTape())["params"])

    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, cfg.d_model)))
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), jax.jit(init)(jax.random.key(0), x.astype(jnp.float32)))
    return cfg, params, x, f


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_appending_token_by_token_equals_the_whole_and_so_sees_no_future(kind):
    cfg, params, x, f = layer(kind)
    whole, _, _ = f(params, x, None)
    cache = transformer.init_cache(cfg, B, 8, jnp.float64)
    for t in range(T):
        out, _, cache = f(params, x[:, t:t + 1], cache)
        np.testing.assert_allclose(out[:, 0], whole[:, t], atol=1e-12, rtol=0)
    assert np.abs(whole[:, 1:] - whole[:, :-1]).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_counts_by_formula_are_the_leaves(kind):
    cfg, params, _, _ = layer(kind)
    leaves = jax.tree.leaves(params)
    assert cfg.attention.num_params(cfg.d_model) == sum(leaf.size for leaf in leaves)
    assert cfg.attention.matmul_params(cfg.d_model) == sum(leaf.size for leaf in leaves if leaf.ndim == 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["bf16", "fp8_block"])
def test_a_layer_takes_weights_prepared_for_low_precision(kind, how):
    """Traced only: `prepare` replaces weights by another type, which a kind must not look into."""
    cfg, params, x, _ = layer(kind)
    run = Execution(precision=precision.Precision(how))

    def f(params, x):
        layout, _ = transformer.layout_of(B, T, dict(segment_ids=None, positions=None), cfg, x.dtype)
        prepared = precision.prepare({"dense": params}, run)["dense"]
        return cfg.attention.module(cfg, run).apply({"params": prepared}, x, layout, None, LayerTape())[0]

    out = jax.eval_shape(f, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), x.astype(jnp.bfloat16))
    assert out.shape == x.shape and out.dtype == jnp.bfloat16


def test_gated_is_mla_where_its_gate_is_one():
    """A gate of weights 0 is 1/2, so W^O is doubled: exact in binary. Shared weights start equal, so that an ablation is paired."""
    (_, params, x, f), (_, plain, _, mla) = layer("gated"), layer("mla")
    assert params.keys() - plain.keys() == {"head_gate"}
    for name in plain:
        np.testing.assert_array_equal(params[name], plain[name])
    opened = params | dict(head_gate=0 * params["head_gate"], out=2 * params["out"])
    np.testing.assert_array_equal(f(opened, x, None)[0], mla(plain, x, None)[0])
    assert np.abs(f(params, x, None)[0] - mla(plain, x, None)[0]).max() > 0.1


def test_gated_scales_every_channel_of_its_heads_by_a_sigmoid_of_the_input():
    _, params, x, f = layer("gated")
    out, heads, _ = f(params, x, None)
    gate = 1 / (1 + np.exp(-np.asarray(x) @ np.asarray(params["head_gate"]).T))
    np.testing.assert_allclose(out, (np.asarray(heads).reshape(gate.shape) * gate) @ np.asarray(params["out"]).T, atol=1e-12)


def test_gated_is_refused_by_hugging_face_in_one_line():
    with pytest.raises(UserError, match="model.attention.kind: found 'Gated', allowed: mla") as error:
        hf_config.write(tiny(attention__kind="gated"), "float32", fp8=False)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_cudnn_takes_v_narrower_than_q_and_k_forwards_and_backwards():
    """V3's head (192 and 128) against the plain path in float32: bf16's rounding apart. The function beneath JAX's public one is used."""
    B, T, H, K, P = 2, 256, 4, 192, 128
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, (B, T, H, width), jnp.bfloat16) for key, width in zip(keys, (K, K, P, P), strict=True))
    layout = attention.Layout(None, jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T)), causal_only=True)

    def run(kind, *qkv):
        out, pull = jax.vjp(lambda *qkv: attention.core(*qkv, layout, K ** -0.5, Execution(attention=kind)), *qkv)
        return (out, *pull(g.astype(out.dtype)))

    wide = (x.astype(jnp.float32) for x in (q, k, v))
    with jax.default_matmul_precision("highest"):
        for got, want in zip(jax.jit(lambda *a: run("cudnn", *a))(q, k, v), jax.jit(lambda *a: run("xla", *a))(*wide), strict=True):
            assert jnp.linalg.norm(got.astype(jnp.float32) - want) < 2e-2 * jnp.linalg.norm(want)


@pytest.mark.parametrize("n", [12, 128, 256])
def test_attention_in_blocks_of_queries_equals_the_plain_softmax_and_its_gradients(n):
    rng = np.random.default_rng(n)
    q, k, v, g = (jnp.asarray(rng.normal(size=(2, n, 2, width))) for width in (6, 6, 4, 4))
    segments = jnp.asarray(np.stack([np.zeros(n), np.arange(n) // (n // 3)]))
    index = jnp.arange(n)
    mask = (index[:, None] >= index[None])[None] & (segments[:, :, None] == segments[:, None])

    def plain(q, k, v):
        weights = attention._softmax(jnp.einsum("bthk,bshk->bhts", q, k), mask, 0.7)
        return jnp.einsum("bhts,bshp->bthp", weights, v)

    def blocks(q, k, v):
        return attention.core(q, k, v, attention.Layout(None, mask), 0.7, Execution())

    def with_gradients(f):
        def run(q, k, v, g):
            out, vjp = jax.vjp(f, q, k, v)
            return out, *vjp(g)

        return jax.jit(run)(q, k, v, g)

    assert block_attention.n_blocks(n) == {12: 1, 128: 2, 256: 4}[n]
    for ours, theirs in zip(with_gradients(blocks), with_gradients(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12, rtol=0)
