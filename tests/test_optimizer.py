"""AdamW, Muon, rules and EMA against numpy float64, written from the papers' formulas."""
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_model import tiny

from configs import deepseek_v3
from model.errors import UserError
from train import optimizer as optimizers
from train import state as states

SHAPES = dict(embedding=(5, 4), norm=(4,), moe=dict(attention=dict(q_up=(3, 6, 4), q_norm=(3, 4)), ffn=dict(gate_up=(3, 2, 2, 5, 4))))


def config(**edits):
    c = deepseek_v3.get_config("tiny").optimizer
    c.update(edits)
    return c


def draw(rng, scale=1.0):
    return jax.tree.map(lambda s: scale * rng.standard_normal(s), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def run(c, params, grads, lr=1e-2, clip=1.0, dtype=jnp.float64):
    """Params and state after one update a gradient, in dtype."""
    opt = optimizers.parse(c)
    place = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: E731
    params, state, norms = place(params), None, []
    state = opt.init(params)
    for g in grads:
        params, state, norm = jax.jit(opt.update)(place(g), state, params, jnp.asarray(lr, dtype), jnp.asarray(clip, dtype))
        norms.append(float(norm))
    return params, state, norms


def oracle(params, grads, lr=1e-2, clip=1.0, b1=0.9, b2=0.95, eps=1e-8, decay=0.1, store=lambda x: x):
    """AdamW by the book: the global norm is clipped first, moments are bias-corrected, decay is decoupled and spares norms.
    store is applied to a moment as it is kept from one step to the next."""
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    names, p = [path[-1].key for path, _ in flat], [np.array(x) for _, x in flat]
    m, v = [np.zeros_like(x) for x in p], [np.zeros_like(x) for x in p]
    for n, g in enumerate(map(jax.tree.leaves, grads), 1):
        norm = np.sqrt(sum((x**2).sum() for x in g))
        for i, x in enumerate(g):
            x = x * min(1, clip / norm)
            new_m, new_v = b1 * m[i] + (1 - b1) * x, b2 * v[i] + (1 - b2) * x * x
            wd = 0 if names[i].endswith("norm") else decay
            p[i] = p[i] - lr * (new_m / (1 - b1**n) / (np.sqrt(new_v / (1 - b2**n)) + eps) + wd * p[i])
            m[i], v[i] = store(new_m), store(new_v)
    return tree.unflatten(p), m, v


def assert_close(tree, expected, rtol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=rtol, atol=rtol), tree, expected)


@pytest.mark.parametrize("clip", [1.0, 1e6])
def test_adamw_is_the_papers_in_float64(rng, clip):
    params, grads = draw(rng), [draw(rng) for _ in range(4)]
    with jax.enable_x64(True):
        out, state, norms = run(config(adamw=dict(b1=0.9, b2=0.95, eps=1e-8, moment_dtype="parameter")), params, grads, clip=clip)
        expected, m, v = oracle(params, grads, clip=clip)
        assert_close(out, expected, 1e-12)
        assert_close(jax.tree.leaves(state.mu), m, 1e-12)
        assert_close(jax.tree.leaves(state.nu), v, 1e-12)
        # the norm reported is that before clipping
        assert norms[0] == pytest.approx(np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(grads[0]))), rel=1e-12)


def test_bfloat16_moments_are_rounded_only_where_they_are_stored(rng):
    """V3 §3.3.2: equal to the oracle that rounds a moment to bf16 between steps; the update itself uses the unrounded one."""
    params, grads = draw(rng), [draw(rng) for _ in range(4)]
    store = lambda x: x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)  # noqa: E731
    with jax.enable_x64(True):
        out, state, _ = run(config(), params, grads)
        expected, m, _ = oracle(params, grads, store=store)
        assert {x.dtype for x in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype(jnp.bfloat16)}
        assert_close(out, expected, 1e-7)
        assert_close(jax.tree.leaves(state.mu), m, 2**-8)
    unrounded, _, _ = oracle(params, grads)
    drift = max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(unrounded), strict=True))
    assert 0 < drift < 4 * 1e-2 * 2**-7  # a few bf16 roundings of 4 steps of length lr


@pytest.mark.parametrize("kind, dtype", [("bfloat16", jnp.bfloat16), ("float32", jnp.float32), ("parameter", jnp.float64)])
def test_moment_dtypes(rng, kind, dtype):
    with jax.enable_x64(True):
        _, state, _ = run(config(adamw=dict(b1=0.9, b2=0.95, eps=1e-8, moment_dtype=kind)), draw(rng), [draw(rng)])
        assert {x.dtype for x in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype(dtype)} and state.count.dtype == jnp.int32


def test_muon_orthogonalises_each_matrix_of_a_stack(rng):
    """Singular values near 1 times rms * sqrt(max(shape)); a stack equals its matrices one by one; the rest is AdamW's."""
    params, grads = draw(rng), [draw(rng)]
    c = config(kind="muon", weight_decay=0.0)
    out, _, _ = run(c, params, grads, lr=1.0, dtype=jnp.float32)
    change = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, params, out)
    for stack in (change["moe"]["attention"]["q_up"], change["moe"]["ffn"]["gate_up"].reshape(12, 5, 4)):
        for matrix in stack:
            values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(max(matrix.shape)))
            assert np.all((values > 0.6) & (values < 1.25)), values
            # Moonlight §2.2: the rms of an update is about that of AdamW, 0.2
            assert np.sqrt((matrix**2).mean()) == pytest.approx(0.2, rel=0.25)
    shuffled = jax.tree.map(lambda g: np.array(g), grads[0])
    shuffled["moe"]["attention"]["q_up"][1:] = rng.standard_normal((2, 6, 4))
    other, _, _ = run(c, params, [shuffled], lr=1.0, clip=1e9, dtype=jnp.float32)
    same, _, _ = run(c, params, grads, lr=1.0, clip=1e9, dtype=jnp.float32)
    np.testing.assert_array_equal(other["moe"]["attention"]["q_up"][0], same["moe"]["attention"]["q_up"][0])
    with jax.enable_x64(True):
        expected, _, _ = oracle(params, grads, lr=1.0, decay=0.0)
    for name in ("embedding", "norm"):
        np.testing.assert_allclose(out[name], expected[name], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(out["moe"]["attention"]["q_norm"], expected["moe"]["attention"]["q_norm"], rtol=2e-5, atol=2e-5)


def test_rules_set_decay_and_rate_by_path_and_the_last_match_wins(rng):
    params, zero = draw(rng), jax.tree.map(np.zeros_like, draw(rng))
    rules = (("moe/", "decay", 0.5), ("ffn", "decay", 0.0), ("embedding", "lr", 3.0), ("q_norm", "decay", 0.2))
    with jax.enable_x64(True):
        out, _, _ = run(config(rules=rules), params, [zero])
        factor = jax.tree.map(lambda a, b: float(np.mean(np.asarray(a) / b)), out, params)
    assert factor["moe"]["attention"]["q_up"] == pytest.approx(1 - 1e-2 * 0.5)
    assert factor["moe"]["ffn"]["gate_up"] == pytest.approx(1)
    assert factor["embedding"] == pytest.approx(1 - 3e-2 * 0.1)
    assert factor["norm"] == pytest.approx(1) and factor["moe"]["attention"]["q_norm"] == pytest.approx(1 - 1e-2 * 0.2)


def test_a_frozen_leaf_stays_to_the_bit_and_leaves_the_norm(rng):
    params, grads = draw(rng), [draw(rng) for _ in range(2)]
    with jax.enable_x64(True):
        out, _, norms = run(config(rules=(("embedding", "freeze", 1),)), params, grads)
        np.testing.assert_array_equal(out["embedding"], params["embedding"])
        assert not np.array_equal(out["norm"], params["norm"])
        rest = [x for path, x in jax.tree_util.tree_leaves_with_path(grads[0]) if path[0].key != "embedding"]
        assert norms[0] == pytest.approx(np.sqrt(sum((x**2).sum() for x in rest)), rel=1e-12)
        unfrozen, _, _ = run(config(rules=(("embedding", "freeze", 1), ("embedding", "lr", 1.0))), params, grads)
        assert not np.array_equal(unfrozen["embedding"], params["embedding"])


@pytest.mark.parametrize("edit, named", [
    (dict(rules=(("no_such_leaf", "decay", 0.0),)), "no_such_leaf"), (dict(rules=(("norm", "decay"),)), r"rules\[0\]"),
    (dict(rules=(("(", "decay", 0.0),)), "regular expression"), (dict(rules=(("norm", "speed", 0.0),)), "decay, lr, freeze"),
    (dict(rules=(("norm", "lr", "fast"),)), r"rules\[0\] value"), (dict(rules="norm"), "optimizer.rules"),
    (dict(weight_decay=-0.1), "weight_decay"), (dict(clip=0.0), "optimizer.clip"), (dict(kind="sgd"), "adamw, muon"),
    (dict(adamw=dict(b1=1.0, b2=0.95, eps=1e-8, moment_dtype="bfloat16")), "optimizer.adamw.b1"),
    (dict(adamw=dict(b1=0.9, b2=0.95, eps=1e-8, moment_dtype="bf16")), "optimizer.adamw.moment_dtype"),
    (dict(adamw=dict(b1=0.9, b2=0.95, eps=0.0, moment_dtype="bfloat16")), "optimizer.adamw.eps"),
    (dict(ema=dict(kind="host", host=dict(decay=1.0), none=dict())), "optimizer.ema.host.decay")])
def test_what_cannot_be_is_one_line_that_names_the_leaf(edit, named):
    with pytest.raises(UserError, match=named) as error:
        c = config()
        with c.ignore_type():
            c.update(edit)
        optimizers.parse(c).init(jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda x: isinstance(x, tuple)))
    assert "\n" not in str(error.value)


def test_moments_lie_where_their_parameters_lie():
    """ZeRO-1 by sharding: of every optimizer, each moment has the layout of its parameter, and so has the EMA."""
    cfg = tiny()
    mesh = jax.make_mesh((1, 1, 2, 2, 2), ("pipe", "node", "expert", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 5)
    for kind in ("adamw", "muon"):
        opt = optimizers.parse(config(kind=kind, ema=dict(kind="host", host=dict(decay=0.9), none=dict())))
        layout = states.shardings(mesh, cfg, jax.eval_shape(lambda k: states.create(k, cfg, opt), jax.random.key(0)))  # noqa: B023
        of = dict(jax.tree_util.tree_leaves_with_path(layout.params))
        assert {p: s for p, s in jax.tree_util.tree_leaves_with_path(layout.ema)} == of
        split = [s for s in of.values() if s.spec != jax.P(*(None,) * len(s.spec))]
        moments = [s for p, s in jax.tree_util.tree_leaves_with_path(layout.opt_state) if s.spec and any(s.spec)]
        assert len(split) > 10 and len(moments) == (2 * len(split) if kind == "adamw" else len(moments)) and len(moments) >= len(split)
