"""Norms of MLA's latents on the CPU: the reference against float64, its gradients, and attention's path to the kernel."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from test_kernels_norm import CLOSE, EPS, arrays, close, plain
from tiny_model import tiny

from model import norm as model_norm
from model import precision, sharding, transformer
from model.config import Execution
from model.tape import LayerTape
from pallas_kernels.latent_norm import kernel, latent_norm, latent_norm_backward

M, CUTS = 12, (40, 24, 8)


def plain_split(y, scales):
    """Both norms and the rest, in the simplest form."""
    *latents, rest = jnp.split(y, np.cumsum([len(scale) for scale in scales]), axis=-1)
    return *(plain(x, scale) for x, scale in zip(latents, scales, strict=True)), rest


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("cuts", [CUTS, CUTS[1:]])
def test_forward_and_backward_are_those_of_plain_float64_norms_of_slices(rng, dtype, cuts):
    with jax.enable_x64(True):
        (y,), gs = arrays(rng, dtype, 1, M, sum(cuts)), [arrays(rng, dtype, 1, M, d)[0] for d in cuts]
        wide = jnp.float64 if dtype == "float64" else jnp.float32
        scales = tuple(jnp.asarray(rng.standard_normal(d), wide) for d in cuts[:-1])
        exact = jax.tree.map(lambda x: x.astype(jnp.float64), (y, scales, tuple(gs)))
        (*want, _), pull = jax.vjp(plain_split, *exact[:2])
        want_y, want_scales = pull(exact[2])
        d_y, d_scales = latent_norm_backward(y, scales, tuple(gs[:-1]), gs[-1], EPS)
        for got, w in zip(latent_norm(y, scales, EPS), want, strict=True):
            close(got, w, dtype)
        close(d_y, want_y, dtype)
        np.testing.assert_array_equal(d_y[:, -cuts[-1]:], gs[-1])
        for got, w in zip(d_scales, want_scales, strict=True):
            close(got, w, str(scales[0].dtype))


def test_wrong_operands_raise_one_line_and_what_the_kernel_does_not_take_is_named():
    y, scales = jnp.zeros((4, 24)), (jnp.zeros(8), jnp.zeros(12))
    gs, rest = (jnp.zeros((4, 8)), jnp.zeros((4, 12))), jnp.zeros((4, 4))
    for run in (lambda: latent_norm(y[0], scales, EPS), lambda: latent_norm(y, (), EPS), lambda: latent_norm(y, (*scales, scales[0]), EPS),
                lambda: latent_norm(y, (y,), EPS), lambda: latent_norm(y.astype(jnp.int32), scales, EPS),
                lambda: latent_norm_backward(y, scales, gs[::-1], rest, EPS), lambda: latent_norm_backward(y, scales, gs, gs[0], EPS),
                lambda: latent_norm_backward(y, scales, gs, rest.astype(jnp.bfloat16), EPS)):
        with pytest.raises(ValueError, match="must be") as error:
            run()
        assert "\n" not in str(error.value)
    for dtype, m, widths, rest, scale in (
            ("float64", 4, (16,), 8, "float64"), ("bfloat16", 4, (16, 12), 8, "float32"), ("bfloat16", 4, (16, 8), 4, "float32"),
            ("bfloat16", 4, (1536, 768), 64, "float32"), ("bfloat16", 4, (16,), 264, "float32"), ("bfloat16", 4, (16,), 0, "float32"),
            ("bfloat16", 0, (16,), 8, "float32"), ("float32", 4, (16,), 8, "bfloat16")):
        assert kernel.unfit(kernel.Job(False, m, widths, rest, dtype, EPS), {scale})


@pytest.mark.parametrize("dtype", kernel.DTYPES)
def test_every_byte_of_a_row_has_a_lane_and_three_turns_fit_into_shared_memory(dtype):
    for *widths, rest in ((512, 256, 32), (1536, 512, 64), (64, 32, 16), (512, 64), (2048, 128), (8, 8), (72, 264, 8)):
        for backward in (False, True):
            job = kernel.Job(backward, 1003, tuple(widths), rest, dtype, EPS)
            assert not kernel.unfit(job, {"float32"})
            assert [cut.start for cut in job.joint] == [sum(widths[:k]) * job.itemsize for k in range(len(widths) + 1)]
            assert all(32 * job.width * cut.pieces * job.itemsize >= cut.size for cut in job.copied)
            assert 3 <= job.stages and job.stages * job.turn_bytes < 226 * 1024
            assert job.warps * job.columns <= 512 and job.grid * job.warps * job.turns >= job.M
            assert job.warps * 32 * job.columns * 4 <= job.stages * job.turn_bytes or not backward  # the partial sums at the end


def losses_and_gradients(rng, monkeypatch, dtype, loss, batch=8):
    """Of a split: by the custom VJP that a Hopper card takes (with the reference in the kernel's place), in the plain form; and the rows
    that each call of the kernel's backward would have had."""
    (y,), scales = arrays(rng, dtype, 1, batch, 3, sum(CUTS)), tuple(jnp.asarray(rng.standard_normal(d), dtype) for d in CUTS[:-1])
    want, calls = jax.jit(jax.value_and_grad(loss, (0, 1)))(y, scales), []
    pretend(monkeypatch, calls)
    got = jax.jit(lambda *a: jax.value_and_grad(loss, (0, 1))(*a))(y, scales)
    return jax.tree.leaves(got), jax.tree.leaves(want), calls


def pretend(monkeypatch, calls):
    monkeypatch.setattr(model_norm.latent_norm, "takes_kernel", lambda y, scales: True)
    monkeypatch.setattr(model_norm.latent_norm, "latent_norm_backward", lambda *a: calls.append(a[0].shape) or latent_norm_backward(*a))


def split_loss(y, scales):
    c_q, c_kv, k_rope = model_norm.split_rms_norm(y, scales, EPS)
    return jnp.sum(jnp.cos(c_q)) + jnp.sum(jnp.sin(c_kv)[..., :8] * k_rope)


def test_the_models_path_to_the_kernel_is_the_plain_one(rng, monkeypatch):
    with jax.enable_x64(True):
        got, want, calls = losses_and_gradients(rng, monkeypatch, "float64", split_loss)
        assert calls == [(24, sum(CUTS))]
        for g, w in zip(got, want, strict=True):
            close(g, w, "float64")


@pytest.mark.parametrize("batch, rows", [(8, [(6, sum(CUTS))]), (6, [])])  # 6 sequences do not divide over 4 shards: the plain form
def test_each_data_shard_norms_its_rows_and_gradients_of_scales_are_added(rng, monkeypatch, batch, rows):
    with jax.set_mesh(sharding.make_mesh(dict(pipe=1, node=1, expert=2, fsdp=2, tensor=2))):
        got, want, calls = losses_and_gradients(rng, monkeypatch, "float32", split_loss, batch)
    assert calls == rows
    for g, w in zip(got, want, strict=True):
        close(g, w, "float32")


def test_inside_a_shard_map_of_somebody_else_rows_are_local(rng, monkeypatch):
    mesh, rows = sharding.make_mesh(dict(pipe=1, node=1, expert=1, fsdp=8, tensor=1)), jax.P(sharding.DATA_AXES)

    def loss(y, scales):
        total = lambda *a: jax.lax.psum(split_loss(*a), sharding.DATA_AXES)  # noqa: E731
        return jax.shard_map(total, mesh=mesh, in_specs=(rows, jax.P()), out_specs=jax.P())(y, scales)

    got, want, calls = losses_and_gradients(rng, monkeypatch, "float32", loss)
    assert calls == [(3, sum(CUTS))]
    for g, w in zip(got, want, strict=True):
        close(g, w, "float32")


@pytest.mark.parametrize("kind", ["bf16", "as_stored"])  # weights as stored are two products, of which the kernel has the second
def test_attention_gives_the_kernel_its_joint_product_and_keeps_its_probes(rng, monkeypatch, kind):
    cfg, run = tiny(n_layers=1, n_dense_layers=1), Execution(precision=precision.Precision(kind))
    module, x = cfg.attention.module(cfg, run), jnp.asarray(rng.standard_normal((2, 6, cfg.d_model)), precision.KINDS[kind] or jnp.float32)
    layout, _ = transformer.layout_of(2, 6, dict(segment_ids=None, positions=None, cache=None), cfg, x.dtype)
    params = meta.unbox(module.init(jax.random.key(0), x, layout, None, LayerTape())["params"])

    def f(params, x):
        tape, copies = LayerTape(wanted=("mla/*/c_*",)), precision.with_masters(precision.prepare(params, run), params)
        out, _ = module.apply({"params": copies}, x, layout, None, tape)
        return jnp.sum(jnp.cos(out.astype(jnp.float32))), tape.probes

    grad = functools.partial(jax.value_and_grad, has_aux=True)
    (want, want_probes), want_grads = jax.jit(grad(f))(params, x)
    pretend(monkeypatch, calls := [])
    (got, probes), grads = jax.jit(grad(lambda *a: f(*a)))(params, x)
    a = cfg.attention
    assert calls == [(12, (a.q_lora_rank if kind == "bf16" else 0) + a.kv_lora_rank + a.qk_rope_head_dim)]
    assert set(probes) == set(want_probes) == {"mla/c_q", "mla/c_kv"}
    for g, w in zip(*map(jax.tree.leaves, ((got, probes, grads), (want, want_probes, want_grads))), strict=True):
        error = np.linalg.norm(np.asarray(g - w, np.float64)) / np.linalg.norm(np.asarray(w, np.float64))
        assert error < (1e-2 if kind == "bf16" else 1e-5)
