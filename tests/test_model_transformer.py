"""The whole model: causality, packing, caches, scans, remat, MTP, the tape."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import forward, init, random_tokens, tiny

from model import precision, transformer
from model.config import Execution
from model.tape import Tape


def bias_of(cfg, seed=3):
    return 0.2 * jax.random.normal(jax.random.key(seed), (cfg.n_moe_layers + cfg.mtp_depth, cfg.moe.n_routed_experts), jnp.float32)


# one layer of every kind: test_attention.py
@pytest.mark.parametrize("kind", ["mla", pytest.param("gqa", marks=pytest.mark.slow), pytest.param("gated", marks=pytest.mark.slow)])
def test_cached_decode_equals_the_full_forward(kind):
    with jax.enable_x64(True):
        cfg = tiny(attention__kind=kind)
        params, bias = init(cfg, dtype=jnp.float64), bias_of(cfg)
        tokens = random_tokens(cfg, (3, 12))
        full, _ = forward(params, tokens, cfg, router_bias=bias)
        # a ragged prefill (rows of 5, 7 and 6 tokens, right-padded), then one token at a time
        lengths = jnp.array([5, 7, 6], jnp.int32)
        cache = transformer.init_cache(cfg, 3, 16, jnp.float64)
        out, _ = forward(params, tokens[:, :7], cfg, router_bias=bias, cache=cache, n_valid=lengths)
        for b, n in enumerate(lengths):
            np.testing.assert_allclose(out.logits[b, :n], full.logits[b, :n], atol=1e-10)
        cache = out.cache
        assert cache.lengths.tolist() == lengths.tolist()
        for _ in range(5):
            new = jnp.take_along_axis(tokens, cache.lengths[:, None], axis=1)
            out, _ = forward(params, new, cfg, router_bias=bias, cache=cache)
            want = jnp.take_along_axis(full.logits, cache.lengths[:, None, None], axis=1)
            np.testing.assert_allclose(out.logits, want, atol=1e-10)
            cache = out.cache


def test_absorbed_mla_equals_expanded_and_the_cache_holds_the_latent_alone():
    with jax.enable_x64(True):
        cfg = tiny()
        params, tokens = init(cfg, dtype=jnp.float64), random_tokens(cfg, (2, 6))
        cache = transformer.init_cache(cfg, 2, 8, jnp.float64)
        assert {k: v.shape for k, v in cache.kv.items()} == {"c": (3, 2, 8, 16), "k_rope": (3, 2, 8, 4)}
        absorbed, _ = forward(params, tokens, cfg, run=Execution(absorbed_max=6), cache=cache)
        expanded, _ = forward(params, tokens, cfg, run=Execution(absorbed_max=0), cache=cache)
        np.testing.assert_allclose(absorbed.logits, expanded.logits, atol=1e-12)
        grown = transformer.grow(absorbed.cache, 9)
        assert grown.kv["c"].shape[2] == 16
        again, _ = forward(params, tokens[:, :1], cfg, cache=grown)
        short, _ = forward(params, tokens[:, :1], cfg, cache=absorbed.cache)
        np.testing.assert_allclose(again.logits, short.logits, atol=1e-12)


def test_no_position_sees_the_future():
    cfg = tiny(mtp_depth=2)
    params, tokens = init(cfg), random_tokens(cfg, (1, 8))

    def logits(x):
        outer = dict(params, embedding=x)
        out, _ = forward(outer, jnp.arange(8, dtype=jnp.int32)[None], cfg)  # token i reads row i of x
        return out.logits, *out.mtp_logits

    x = params["embedding"][tokens[0]]
    jacobians = jax.jit(jax.jacrev(lambda x: [jnp.sum(part[0] ** 2, axis=-1) for part in logits(x)]))(x)
    for k, jacobian in enumerate(jacobians):  # [position, token, d]
        seen = np.abs(np.asarray(jacobian)).max(axis=-1) > 0
        for i in range(8 - k):
            # the main head at i has seen tokens 0..i, MTP depth k also tokens up to i+k
            assert seen[i].tolist() == [t <= i + k for t in range(8)], (k, i)


def test_packed_documents_equal_separate_ones():
    cfg = tiny()
    params = init(cfg)
    first, second = random_tokens(cfg, (1, 5)), random_tokens(cfg, (1, 7), seed=2)
    packed = jnp.concatenate([first, second, jnp.zeros((1, 2), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 7 + [0] * 2], jnp.int32)
    positions = jnp.array([[*range(5), *range(7), 0, 0]], jnp.int32)
    out, metrics = forward(params, packed, cfg, segment_ids=segments, positions=positions)
    separate = [forward(params, part, cfg) for part in (first, second)]
    np.testing.assert_allclose(out.logits[:, :5], separate[0][0].logits, atol=2e-5)
    np.testing.assert_allclose(out.logits[:, 5:12], separate[1][0].logits, atol=2e-5)
    # padding is routed nowhere: the load of the main layers is the sum of the two documents'
    np.testing.assert_array_equal(metrics["moe/load"][:2], sum(m["moe/load"][:2] for _, m in separate))


@functools.cache
def gradients(run):
    """Gradients of a loss over everything a model returns, float64, run as `run` says."""
    with jax.enable_x64(True):
        cfg = tiny(mtp_depth=1)
        params, tokens = init(cfg, dtype=jnp.float64), random_tokens(cfg, (2, 9))

        def loss(params):
            out, metrics = transformer.apply(params, tokens, cfg, run=run)
            return jnp.sum(jnp.sin(out.logits)) + jnp.sum(out.mtp_logits[0] ** 2) + metrics["moe/balance_loss"]

        return jax.device_get(jax.jit(jax.grad(loss))(params))


@pytest.mark.parametrize("run", [
    pytest.param(Execution(scan_unroll=2), marks=pytest.mark.slow), pytest.param(Execution(remat="full"), marks=pytest.mark.slow),
    pytest.param(Execution(experts="ragged"), marks=pytest.mark.slow), pytest.param(Execution(experts="block"), marks=pytest.mark.slow),
    Execution(remat="names", remat_save=("c_kv",), experts="block")], ids=["unroll", "remat_full", "ragged", "block", "remat_names_block"])
def test_how_a_model_runs_changes_nothing(run):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), gradients(run), gradients(Execution(experts="masked")))


def test_mtp_shares_embedding_and_head_and_their_gradients_sum():
    cfg = tiny(n_layers=2, mtp_depth=1)
    params, tokens = init(cfg), random_tokens(cfg, (2, 6))
    assert "embedding" not in params["mtp"] and "head" not in params["mtp"]

    def part(params, which):
        out, _ = forward(params, tokens, cfg)
        return jnp.sum(jnp.cos(out.logits if which == "main" else out.mtp_logits[0]))

    main, mtp, both = (jax.jit(jax.grad(f))(params) for f in (
        lambda p: part(p, "main"), lambda p: part(p, "mtp"), lambda p: part(p, "main") + part(p, "mtp")))
    for leaf in ("embedding", "head"):
        assert np.abs(mtp[leaf]).max() > 0
        np.testing.assert_allclose(both[leaf], main[leaf] + mtp[leaf], rtol=1e-4, atol=1e-4)
    plain, _ = forward({k: v for k, v in params.items() if k != "mtp"}, tokens, dataclasses.replace(cfg, mtp_depth=0))
    np.testing.assert_array_equal(plain.logits, forward(params, tokens, cfg)[0].logits)
    assert plain.mtp_logits == []


def test_embed_stage_tail_in_turn_are_apply_over_any_slices():
    cfg = tiny(n_layers=4, n_dense_layers=2)
    params, tokens, bias = init(cfg), random_tokens(cfg, (2, 7)), bias_of(cfg)
    want, metrics = forward(params, tokens, cfg, router_bias=bias)
    aux = dict(positions=None, segment_ids=None, tokens=tokens)
    run, x, loads = Execution(), transformer.embed(params, tokens, cfg, Execution()), []
    stage = jax.jit(lambda layers, x, rows: transformer.stage(layers, x, aux | dict(router_bias=rows), cfg, run))
    tail = jax.jit(lambda x, rows: transformer.tail(params, x, aux | dict(router_bias=rows), cfg, run))

    def cut(stack, i, j):
        return jax.tree.map(lambda leaf: leaf[i:j], params[stack])

    for layers, rows in ((dict(dense=cut("dense", 0, 1)), bias[:0]), (dict(dense=cut("dense", 1, 2), moe=cut("moe", 0, 1)), bias[:1]),
                         (dict(moe=cut("moe", 1, 2)), bias[1:2])):
        x, out = stage(layers, x, rows)
        loads += [] if out.load is None else [out.load]
    got = tail(x, bias[2:])
    np.testing.assert_allclose(got.logits, want.logits, atol=1e-5)
    np.testing.assert_allclose(got.mtp_logits[0], want.mtp_logits[0], atol=1e-5)
    np.testing.assert_array_equal(jnp.concatenate(loads), metrics["moe/load"][:2])


def stage_parts(cfg, params, tokens):
    """x, aux, stacks and the loss of a stage, for the tape tests."""
    run, aux = Execution(experts="block"), dict(positions=None, segment_ids=None, router_bias=None)
    stacks = {k: params[k] for k in ("dense", "moe")}
    x = transformer.embed(params, tokens, cfg, run)
    return run, aux, stacks, x


def test_input_part_and_weight_part_are_the_whole_gradient():
    with jax.enable_x64(True):
        cfg = tiny()
        params, tokens = init(cfg, dtype=jnp.float64), random_tokens(cfg, (2, 6))
        run, aux, stacks, x = stage_parts(cfg, params, tokens)
        dy = jax.random.normal(jax.random.key(9), x.shape, x.dtype)
        whole = jax.jit(lambda s, x, dy: jax.vjp(lambda s, x: transformer.stage(s, x, aux, cfg, run)[0], s, x)[1](dy))
        want_stacks, want_x = whole(stacks, x, dy)

        def records_of(zeros, stacks, x):
            tape = {k: Tape(zeros=zeros.get(k, {})) for k in stacks}
            y, out = transformer.stage(stacks, x, aux, cfg, run, tape=tape)
            return y, out

        shapes = jax.eval_shape(lambda: records_of({}, stacks, x)[1].records)
        zeros = {k: {site: jnp.zeros(r.output.shape, r.output.dtype) for site, r in sites.items()} for k, sites in shapes.items()}
        small = jax.tree_util.tree_map_with_path(lambda path, leaf: path[-1].key not in precision.MATMULS, stacks)

        def input_part(x, zeros, little):
            merged = jax.tree.map(lambda is_small, a, b: a if is_small else b, small, little, stacks)
            y, out = records_of(zeros, merged, x)
            return y, out.records

        @jax.jit
        def backward(x, zeros, stacks, dy):
            _, pull, records = jax.vjp(input_part, x, zeros, stacks, has_aux=True)
            return pull(dy), records

        (got_x, dys, got_small), records = backward(x, zeros, stacks, dy)
        np.testing.assert_allclose(got_x, want_x, atol=1e-12)
        n_sites = 0
        for stack, sites in dys.items():
            for site, site_dy in sites.items():
                record = records[stack][site]
                where = stacks[stack] if site.startswith("ffn") else stacks[stack]["attention" if site.startswith("mla") else "moe"]
                want = want_stacks[stack] if site.startswith("ffn") else want_stacks[stack][
                    "attention" if site.startswith("mla") else "moe"]
                name = site.split("/")[1]
                for i in range(site_dy.shape[0]):
                    sizes = None if record.group_sizes is None else record.group_sizes[i]
                    dw = precision.weight_gradient(record.input[i], site_dy[i], site, run, group_sizes=sizes)
                    np.testing.assert_allclose(dw.reshape(where[name].shape[1:]), want[name][i], atol=1e-12, err_msg=site)
                n_sites += 1
        assert n_sites == 7 + 9
        jax.tree.map(lambda is_small, a, b: np.testing.assert_allclose(a, b, atol=1e-12) if is_small else None, small, got_small,
                     want_stacks)


def test_replayed_outputs_and_given_experts_change_nothing():
    with jax.enable_x64(True):
        cfg = tiny()
        params, tokens = init(cfg, dtype=jnp.float64), random_tokens(cfg, (2, 6))
        run, aux, stacks, x = stage_parts(cfg, params, tokens)
        y, out = jax.jit(lambda x: transformer.stage(stacks, x, aux, cfg, run, tape={k: Tape() for k in stacks}))(x)
        kept = {k: {site: r.output for site, r in sites.items()} for k, sites in out.records.items()}
        tape = {"dense": Tape(outputs=kept["dense"]), "moe": Tape(outputs=kept["moe"], experts=out.experts)}

        def value(x, tape):
            return jnp.sum(jnp.sin(transformer.stage(stacks, x, aux, cfg, run, tape=tape)[0]))

        gradient = jax.jit(jax.value_and_grad(value))
        (replayed, dx), (computed, want_dx) = gradient(x, tape), gradient(x, None)
        assert replayed == computed == jnp.sum(jnp.sin(y))
        np.testing.assert_allclose(dx, want_dx, atol=1e-12)

        def dense(tape):
            return jax.jit(lambda x: transformer.stage({"dense": stacks["dense"]}, x, aux, cfg, run, tape=tape)[0])

        plain, replayed = dense(None), dense({"dense": tape["dense"]})
        flops = [f.lower(x).compile().cost_analysis()["flops"] for f in (plain, replayed)]
        assert flops[1] < 0.3 * flops[0]  # the replayed matmuls are gone


def test_probes_come_back_by_layer():
    cfg = tiny()
    params, tokens = init(cfg), random_tokens(cfg, (2, 5))
    run = Execution(probes=("mla/*/c_kv", "moe/2/gate", "block/0/out"))
    out, _ = forward(params, tokens, cfg, run=run)
    assert {k: v.shape for k, v in out.probes.items()} == {
        "mla/0/c_kv": (2, 5, 16), "mla/1/c_kv": (2, 5, 16), "mla/2/c_kv": (2, 5, 16), "moe/2/gate": (2, 5, 8), "block/0/out": (2, 5, 32)}
    x = transformer.embed(params, tokens, cfg, run)
    one, _ = transformer.stage({"dense": params["dense"]}, x, dict(positions=None, segment_ids=None, router_bias=None), cfg, run)
    np.testing.assert_allclose(out.probes["block/0/out"], one, atol=1e-6)
    assert forward(params, tokens, cfg)[0].probes == {}


def test_gradients_in_bf16_reach_the_float32_masters():
    cfg = tiny(n_layers=2, ffn__moe__n_activated_experts=8, ffn__moe__groups__kind="none")  # every expert chosen: rounding flips no choice
    params, tokens = init(cfg), random_tokens(cfg, (2, 6))
    run = Execution(precision=precision.Precision("bf16"))
    prepared = precision.prepare(params, run)
    assert prepared["moe"]["attention"]["q_up"].low.dtype == jnp.bfloat16 and prepared["head"] is params["head"]

    def loss(params, prepared, run):
        weights = precision.with_masters(prepared, params) if prepared is not None else params
        out, _ = forward(weights, tokens, cfg, run=run)
        return jnp.mean(jax.nn.logsumexp(out.logits.astype(jnp.float32), axis=-1))

    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    low, full = gradient(params, prepared, run), gradient(params, None, Execution())
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(low), jax.tree.leaves(full), strict=True):
        assert leaf.dtype == jnp.float32, path
        size = float(jnp.linalg.norm(other))
        if size > 1e-4:
            assert float(jnp.linalg.norm(leaf - other)) < 0.1 * size, path
    with_stored = jax.tree.map(lambda w: precision.Weight(None, w.low, None) if precision.is_weight(w) else w, prepared,
                               is_leaf=precision.is_weight)
    assert jnp.isfinite(forward(with_stored, tokens, cfg, run=run)[0].logits).all()
    with pytest.raises(ValueError, match="no masters"):
        jax.grad(lambda head: jnp.sum(forward(dict(with_stored, embedding=head), tokens, cfg, run=run)[0].logits))(
            params["embedding"])
