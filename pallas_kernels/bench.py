"""Job `bench`: every op at the model's shapes, a line each: time, rate, share of the peak, ratio to XLA in bf16.

Times are those of the GPU's own kernels (CUPTI), all that a call launches, each after 256 MB were rewritten so that the
L2 cache is cold; the candidates of a line take turns, the medians over `repeats` turns are printed. Without a GPU the
wall clock is taken, of the reference path. `config.bench.deepgemm` names a checkout of DeepGEMM to race against (its
kernels run on the same card in the same process, timed the same way). Results: bench.jsonl and roofline.png in workdir.
"""
import dataclasses
import functools
import importlib
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import fp8_matmul, grouped_fp8_matmul, grouped_matmul, quantize
from pallas_kernels.cross_entropy import log_probability_backward, log_sum_exp
from pallas_kernels.gate import route, route_backward
from pallas_kernels.gate.reference import Rule
from pallas_kernels.latent_norm import latent_norm, latent_norm_backward
from pallas_kernels.norm import rms_norm, rms_norm_backward
from pallas_kernels.quantize.reference import join_heads, rotate_back, swiglu, swiglu_gradient
from pallas_kernels.rows import gather, gather_sum, weighted_backward
from pallas_kernels.target import is_hopper

PEAKS = {"NVIDIA H100 80GB HBM3": dict(fp8=1979.0, bf16=989.5, gb_s=3350.0)}  # datasheet, dense


@dataclasses.dataclass(frozen=True)
class Case:
    """One line: what to run, what it must at least do, and what to compare with."""

    op: str
    shape: str
    run: Callable
    operands: tuple
    flops: float
    bytes: float
    kind: str = "fp8"  # whose peak
    carried: bool = False  # the last operand is replaced by the result (accumulation in place)
    baseline: tuple[Callable, tuple] | None = None
    peer: Callable | None = None  # (module deep_gemm, torch) -> function without arguments


@functools.partial(jax.jit, donate_argnums=0)
def _rewrite(buffer):
    return buffer ^ 0x5A5A5A5A


class Timer:
    """Seconds of one run: GPU kernels by CUPTI with a cold L2, or the wall clock."""

    def __init__(self):
        self.gpu = jax.default_backend() == "gpu"
        self.buffer = jnp.zeros(1 << 26 if self.gpu else 1, jnp.int32)
        if self.gpu:
            from jax._src.lib import mosaic_gpu
            self.cupti = mosaic_gpu._mosaic_gpu_ext

    def __call__(self, run: Callable) -> float:
        self.buffer = jax.block_until_ready(_rewrite(self.buffer))
        if not self.gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        self.cupti._cupti_init()
        run()
        return sum(ms for _, ms in self.cupti._cupti_get_timings(False)) * 1e-3


def _runner(run: Callable, operands: tuple, carried: bool) -> Callable:
    compiled = jax.jit(run, donate_argnums=(len(operands) - 1,) if carried else ())
    state = list(operands)

    def once():
        out = jax.block_until_ready(compiled(*state))
        if carried:
            state[-1] = out

    once()
    return once


def random(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape, jnp.float32).astype(jnp.bfloat16)


def _torch(torch, x: jax.Array):
    """A tensor with the same bytes (float8 has no common interchange format)."""
    raw = torch.from_dlpack(jax.lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == jnp.float8_e4m3fn else x)
    return (raw.view(torch.float8_e4m3fn) if x.dtype == jnp.float8_e4m3fn else raw).clone()


def _pair(torch, q, scale):
    """A 1x128 operand as DeepGEMM takes it: scales with the rows contiguous."""
    return _torch(torch, q), _torch(torch, scale.T).T


def dense(m: int, n: int, k: int):
    """Forward of x w^T; a dgrad is the same product of other sizes."""
    x, w = random(m, k), random(n, k)
    a, b = quantize.quantize_tiles(x), quantize.quantize_tiles(w, (128, 128))
    a = a[0], jnp.array(a[1].T)  # the layout the quantisation kernel writes

    def peer(deep_gemm, torch):
        lhs, rhs = _pair(torch, a[0], a[1].T), tuple(_torch(torch, v) for v in b)
        out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        return lambda: deep_gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs, out)

    run = lambda a, sa, b, sb: fp8_matmul.matmul(a, sa.T, b, sb)  # noqa: E731
    yield Case("fp8 dense", f"{m} x {n} x {k}", run, (*a, *b), 2 * m * n * k, m * k + n * k + 2 * m * n,
               baseline=(lambda x, w: x @ w.T, (x, w)), peer=peer)


def dense_gradient(m: int, n: int, k: int):
    """Weight gradient [n, k] over m tokens, added in place."""
    dy, x = random(m, n), random(m, k)
    a, b = quantize.quantize_tiles(dy, (128, 1)), quantize.quantize_tiles(x, (128, 1))
    a, b = (jnp.array(a[0].T), a[1]), (jnp.array(b[0].T), b[1])
    total = jnp.zeros((n, k))

    def peer(deep_gemm, torch):
        lhs, rhs = (_pair(torch, q, s.T) for q, s in (a, b))
        out = torch.zeros(n, k, device="cuda")
        return lambda: deep_gemm.wgrad_gemm_fp8_fp8_fp32_nt(lhs, rhs, out)

    run = lambda a, sa, b, sb, c: fp8_matmul.weight_gradient(a.T, sa, b.T, sb, accumulate=c)  # noqa: E731
    yield Case("fp8 weight gradient", f"{n} x {k}, {m} tokens", run, (*a, *b, total), 2 * m * n * k,
               m * k + n * m + 8 * n * k, carried=True, peer=peer,
               baseline=(lambda dy, x: jnp.matmul(dy.T, x, preferred_element_type=jnp.float32), (dy, x)))


def grouped(g: int, rows: int, n: int, k: int):
    """g experts, rows within 30 % of the mean, each group padded to 128: forward, bf16 and FP8."""
    real = (rows * np.random.default_rng(0).uniform(0.7, 1.3, g)).astype(int)
    padded = -(-real // 128) * 128
    m, sizes, flops = int(padded.sum()), jnp.asarray(padded, jnp.int32), 2 * int(real.sum()) * n * k
    x, w = random(m, k), random(g, n, k)
    a, b = quantize.quantize_tiles(x), quantize.quantize_tiles(w, (128, 128))
    a = a[0], jnp.array(a[1].T)
    shape, moved = f"{g} x {rows}, {n} x {k}", m * k + g * n * k + 2 * m * n

    def peer(deep_gemm, torch):
        lhs, rhs = _pair(torch, a[0], a[1].T), tuple(_torch(torch, v) for v in b)
        out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        index = torch.repeat_interleave(torch.arange(g), torch.tensor(padded)).int().cuda()
        return lambda: deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(lhs, rhs, out, index)

    xla = (lambda x, w, s: x @ w[0].T, (x, w, sizes))  # one dense product of as many rows
    yield Case("bf16 grouped", shape, grouped_matmul.matmul, (x, w, sizes), flops, 2 * moved, "bf16", baseline=xla)
    yield Case("fp8 grouped", shape, lambda a, sa, b, sb, s: grouped_fp8_matmul.grouped_matmul(a, sa.T, b, sb, s),
               (*a, *b, sizes), flops, moved, baseline=xla, peer=peer)


def grouped_swiglu(g: int, rows: int, f: int, k: int):
    """Gate and up of g experts of `rows` rows in bf16 and their SwiGLU, from one kernel; XLA's side makes it of our product's result."""
    m, sizes, x, w = g * rows, jnp.full(g, rows, jnp.int32), random(g * rows, k), random(g, 2, f, k)

    def apart(x, w, sizes):
        gate_up = grouped_matmul.matmul(x, w.reshape(g, 2 * f, k), sizes)
        return gate_up, swiglu(gate_up).astype(gate_up.dtype)

    yield Case("bf16 grouped with SwiGLU", f"{g} x {rows}, 2 x {f} x {k}", grouped_matmul.matmul_swiglu, (x, w, sizes), 4 * m * f * k,
               2 * (m * k + w.size + 3 * m * f), "bf16", baseline=(apart, (x, w, sizes)))


def masked(g: int, rows: int, n: int, k: int):
    """g experts with room for 2 * rows each, rows within 30 % of the mean filled."""
    m = 2 * rows
    counts = (rows * np.random.default_rng(0).uniform(0.7, 1.3, g)).astype(np.int32)
    x, w = random(g, m, k), random(g, n, k)
    a, b = quantize.quantize_tiles(x), quantize.quantize_tiles(w, (128, 128))
    a = a[0], jnp.array(a[1].reshape(g * m, -1).T)
    filled = int(counts.sum())

    def peer(deep_gemm, torch):
        lhs = _torch(torch, a[0]), _torch(torch, a[1].reshape(-1, g, m).transpose(1, 0, 2)).transpose(1, 2)
        rhs, out = tuple(_torch(torch, v) for v in b), torch.empty(g, m, n, device="cuda", dtype=torch.bfloat16)
        live = torch.tensor(counts).int().cuda()
        return lambda: deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_masked(lhs, rhs, out, live, rows)

    run = lambda a, sa, b, sb, c: grouped_fp8_matmul.masked_matmul(a, sa.T.reshape(g, m, -1), b, sb, c)  # noqa: E731
    yield Case("fp8 masked", f"{g} x {rows} of {m}, {n} x {k}", run, (*a, *b, jnp.asarray(counts)), 2 * filled * n * k,
               filled * k + g * n * k + 2 * filled * n, peer=peer)


def grouped_gradient(g: int, rows: int, n: int, k: int):
    """Weight gradients [g, n, k] of groups of `rows` tokens, bf16 and FP8."""
    m, sizes = g * rows, jnp.full(g, rows, jnp.int32)
    dy, x = random(m, n), random(m, k)
    a, b = (quantize.quantize_tiles(v, (128, 1)) for v in (dy, x))
    a, b = (jnp.array(a[0].T), a[1]), (jnp.array(b[0].T), b[1])
    shape, flops, moved = f"{g} x {n} x {k}, {rows} tokens each", 2 * m * n * k, m * (n + k)

    def peer(deep_gemm, torch):
        # each group's [N, rows] and [K, rows] one after the other, scales [blocks, N]
        def flat(q):
            return torch.cat([_torch(torch, part).flatten() for part in jnp.split(q, g, axis=1)])
        lhs, rhs = (flat(a[0]), _torch(torch, a[1])), (flat(b[0]), _torch(torch, b[1]))
        out = torch.zeros(g, n, k, device="cuda")
        return lambda: deep_gemm.k_grouped_wgrad_gemm_fp8_fp8_fp32_nt(lhs, rhs, out, [rows] * g)

    def bf16(dy, x, s, c):
        return grouped_matmul.weight_gradient(dy, x, s, accumulate=c)

    def fp8(a, sa, b, sb, s, c):
        return grouped_fp8_matmul.weight_gradient(a.T, sa, b.T, sb, s, accumulate=c)

    xla = (lambda dy, x: jax.lax.dot_general(dy.reshape(g, rows, n), x.reshape(g, rows, k), (((1,), (1,)), ((0,), (0,))),
                                             preferred_element_type=jnp.float32), (dy, x))
    total = jnp.zeros((g, n, k))
    yield Case("bf16 grouped gradient", shape, bf16, (dy, x, sizes, total + 0), flops, 2 * moved + 8 * g * n * k, "bf16",
               carried=True, baseline=xla)
    yield Case("fp8 grouped gradient", shape, fp8, (*a, *b, sizes, total), flops, moved + 8 * g * n * k, carried=True,
               baseline=xla, peer=peer)


def quantisation(m: int, k: int):
    """Bytes: every input read once, every output written once; scales count."""
    x, scales = random(m, k), 4 * m * k / 128
    cached = quantize.quantize_tiles(x)
    cached = cached[0], jnp.array(cached[1].T)
    copy = (lambda x: x + jnp.bfloat16(1), (x,))

    # No consumer undoes the transposed views here: hand out what the kernel wrote.
    def rows(pair):
        return pair[0], pair[1].T

    def columns(pair):
        return pair[0].T, pair[1]

    forms = {
        "1x128": (lambda x: rows(quantize.quantize_tiles(x)), (x,), 3 * m * k + scales),
        "128x1": (lambda x: columns(quantize.quantize_tiles(x, (128, 1))), (x,), 3 * m * k + scales),
        "both": (lambda x: (lambda r, c: (*rows(r), *columns(c)))(*quantize.quantize_both(x)), (x,),
                 4 * m * k + 2 * scales),
        "e5m6": (lambda x: rows(quantize.quantize_tiles(x, format="e5m6", power_of_two=True)), (x,), 4 * m * k + scales),
        "128x128 and its transpose": (quantize.quantize_weight, (x,), 4 * m * k),
        "1x128 -> 128x1": (lambda q, s: columns(quantize.requantize_tiles(q, s.T)), cached, 2 * m * k + 2 * scales),
        "swiglu, 1x128": (lambda x: rows(quantize.swiglu_quantize(x)), (x,), 2.5 * m * k + scales / 2),
        "swiglu from FP8, 128x1": (lambda q, s: columns(quantize.swiglu_quantize(q, s.T, (128, 1))), cached,
                                   1.5 * m * k + 1.5 * scales),
    }
    yield Case("copy (x + 1)", f"{m} x {k}", *copy, 0, 4 * m * k, "bf16")
    yield from fused_gradients(m, k)
    for name, (run, operands, moved) in forms.items():
        yield Case(f"quantise {name}", f"{m} x {k}", run, operands, 0, moved)


def fused_gradients(m: int, k: int):
    """Gradients [m, k] quantised both ways as they are made: of SwiGLU, of MLA's k and v and q; XLA's side writes them in bf16 first."""
    weights, d_hidden, gate_up, heads = jnp.ones(m), random(m, k // 2), random(m, k), tuple(random(m, k // 256, n) for n in (192, 128))

    def written(rows, columns, *rest):
        return rows[0], rows[1].T, columns[0].T, columns[1], *rest

    def gradient(d_hidden, gate_up, weights):
        return written(*quantize.swiglu_gradient(d_hidden, gate_up, weights))

    def both(x):
        return quantize.quantize_both(jax.lax.optimization_barrier(x.astype(jnp.bfloat16)))

    def apart(d_hidden, gate_up, weights):
        x, d_weights = swiglu_gradient(d_hidden, gate_up, weights)
        return written(*both(x), d_weights)

    operands, moved = (d_hidden, gate_up, weights), (3 + 2) * m * k + 8 * m * k / 128 + 8 * m
    yield Case("quantise swiglu gradient", f"{m} x {k}", gradient, operands, 0, moved, baseline=(apart, operands))
    yield Case("quantise heads", f"{m} x {k}", lambda *parts: written(*quantize.quantize_heads(parts, (128, 128))), heads, 0,
               4 * m * k + 8 * m * k / 128, baseline=(lambda *parts: written(*both(join_heads(parts, (128, 128)))), heads))
    rotated, n = (heads[0], jnp.cos(jnp.ones((m, 32))), jnp.sin(jnp.ones((m, 32)))), heads[0].size
    yield Case("quantise rotated", f"{m} x {n // m}", lambda *a: written(*quantize.quantize_rotated_back(*a)), rotated, 0,
               4 * n + 8 * n / 128 + 256 * m, baseline=(lambda *a: written(*both(rotate_back(*a))), rotated))
    yield Case("quantise swiglu, weighted", f"{m} x {k}", lambda x, w: (lambda q, s: (q, s.T))(*quantize.swiglu_quantize(x, weights=w)),
               (gate_up, weights), 0, 2.5 * m * k + 2 * m * k / 128 + 4 * m)


def moved_rows(m: int, d: int, k: int, e: int):
    """m tokens of width d, k of e experts each, groups padded to 128; XLA's side is the reference. Bytes: every input row read
    once, every output row written once; indices and weights count."""
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((m, e)), axis=1)[:, :k].reshape(-1)
    sizes = np.bincount(experts, minlength=e)
    padded = -(-sizes // 128) * 128
    order, p = np.argsort(experts, kind="stable"), int(padded.sum())
    place = np.arange(m * k) + np.repeat(np.cumsum(padded - sizes) - (padded - sizes), sizes)
    source, position = np.full(p, m, np.int32), np.empty(m * k, np.int32)
    source[place], position[order] = order // k, place
    source, position = jnp.asarray(source), jnp.asarray(position.reshape(m, k))
    x, y, wide, of_row, of_token = random(m, d), random(m, d), random(p, d), jnp.ones(p), jnp.ones((m, k))
    forms = {
        "gather": (gather, (x, source), 2 * d * (m + p) + 4 * p),
        "sum": (gather_sum, (wide, position, of_token), 2 * d * (m + m * k) + 8 * m * k),
        "sum and 2": (gather_sum, (wide, position, of_token, (x, y)), 2 * d * (3 * m + m * k) + 8 * m * k),
        "backward": (weighted_backward, (x, wide, source, of_row), 2 * d * (m + m * k + p) + 12 * p),
    }
    for name, (run, operands, moved) in forms.items():
        xla = functools.partial(run, implementation="reference")
        yield Case(f"rows {name}", f"{m} x {d}, {k} of {e}", run, operands, 0, moved, "bf16", baseline=(xla, operands))


def norms(m: int, d: int):
    """Rows of the residual stream; XLA's side is the reference. Bytes: every row of every operand and result once."""
    x, g, delta, scale = random(m, d), random(m, d), random(m, d), jnp.ones(d)
    forms = {
        "norm": (lambda x, s, **how: rms_norm(x, s, 1e-6, **how)[1], (x, scale)),
        "norm of a sum": (lambda x, s, delta, **how: rms_norm(x, s, 1e-6, delta, **how), (x, scale, delta)),
        "norm, backward": (functools.partial(rms_norm_backward, eps=1e-6), (x, scale, g, delta)),
    }
    for name, (run, operands) in forms.items():
        moved = 2 * m * d * (2 if name == "norm" else 4)
        xla = functools.partial(run, implementation="reference")
        yield Case(name, f"{m} x {d}", run, operands, 0, moved, "bf16", baseline=(xla, operands))


def latent_norms(m: int, *cuts: int):
    """MLA's latents in rows of cuts, the last without a scale; XLA's side is the reference. Bytes: every normed cut of every operand and
    result once, backwards the rest's gradient read and written too."""
    y, (*gs, g_rest) = random(m, sum(cuts)), (random(m, d) for d in cuts)
    scales, normed = tuple(jnp.ones(d) for d in cuts[:-1]), 2 * m * sum(cuts[:-1])
    for name, run, operands, moved in (("norm of latents", latent_norm, (y, scales), 2 * normed),
                                       ("norm of latents, backward", latent_norm_backward, (y, scales, tuple(gs), g_rest),
                                        3 * normed + 4 * m * cuts[-1])):
        run = functools.partial(run, eps=1e-6)
        xla = functools.partial(run, implementation="reference")
        yield Case(name, f"{m} x {cuts}", run, operands, 0, moved, "bf16", baseline=(xla, operands))


def cross_entropies(m: int, v: int):
    """Logits of m tokens over a vocabulary of v; XLA's side is the reference. Bytes: the logits once, and their gradient."""
    logits = 4 * random(m, v)
    log_z, targets, g = log_sum_exp(logits, implementation="reference"), jnp.arange(m, dtype=jnp.int32) * 7919 % v, jnp.ones(m) / m

    def backward(targets, log_z, g, logits, **how):
        return log_probability_backward(logits, targets, log_z, g, **how)

    for name, run, operands in (("log Z", log_sum_exp, ()), ("log p, backward", backward, (targets, log_z, g))):
        own = logits + 0 if operands else logits  # the gradient takes their place
        xla, moved = functools.partial(run, implementation="reference"), 2 * m * v * (2 if operands else 1)
        yield Case(name, f"{m} x {v}", run, (*operands, own), 0, moved, "bf16", bool(operands), (xla, (*operands, logits)))


def gates(m: int, e: int, groups: int, kept: int, k: int):
    """The gate of m tokens over e experts, k chosen in the kept groups; XLA's side is the reference. Bytes: operands and results once."""
    rule, logits = Rule(k, "sigmoid", "normalised", 2.5, groups, kept, "top2_sum"), random(8, m // 8, e).astype(jnp.float32)
    valid, d_shares = jnp.ones((8, m // 8), bool), jnp.ones((8, e))
    experts, weights, _ = route(logits, jnp.zeros(e), valid, rule, implementation="reference")
    forms = {
        "gate": (functools.partial(route, rule=rule), (logits, jnp.zeros(e), valid), 4 * m * (e + 2 * k)),
        "gate, backward": (functools.partial(route_backward, rule=rule), (logits, experts, valid, weights, d_shares), 4 * m * 2 * (e + k)),
    }
    for name, (run, operands, moved) in forms.items():
        xla = functools.partial(run, implementation="reference")
        yield Case(name, f"{m} x {e}, {k} of {kept}/{groups} groups", run, operands, 0, moved, "bf16", baseline=(xla, operands))


OPS = {"dense": dense, "dense_gradient": dense_gradient, "grouped": grouped, "grouped_swiglu": grouped_swiglu, "masked": masked,
       "grouped_gradient": grouped_gradient, "quantisation": quantisation, "rows": moved_rows, "norm": norms,
       "latent_norm": latent_norms, "cross_entropy": cross_entropies, "gate": gates}


def _deep_gemm(directory: str):
    """(deep_gemm, torch), or None without a directory."""
    if not directory:
        return None
    if not (pathlib.Path(directory) / "deep_gemm").is_dir():
        raise ValueError(f"config.bench.deepgemm={directory!r}: no checkout of DeepGEMM there (no folder deep_gemm)")
    sys.path.insert(0, directory)
    importlib.import_module("cuda.bindings.nvrtc")  # before torch, as DeepGEMM asks
    return importlib.import_module("deep_gemm"), importlib.import_module("torch")


def measure(case: Case, timer: Timer, repeats: int, peer: tuple | None) -> dict:
    """The line of one case."""
    runs = {"ours": _runner(case.run, case.operands, case.carried)}
    if case.baseline:
        runs["xla"] = _runner(*case.baseline, False)
    if peer and case.peer:
        deep_gemm, torch = peer
        theirs = case.peer(deep_gemm, torch)
        theirs()
        runs["deepgemm"] = lambda: (theirs(), torch.cuda.synchronize())
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(timer(run))
    seconds = {name: statistics.median(t) for name, t in times.items()}
    device = jax.devices()[0].device_kind
    t = seconds["ours"]
    row = dict(op=case.op, shape=case.shape, device=device, us=t * 1e6, tflop_s=case.flops / t / 1e12,
               gb_s=case.bytes / t / 1e9)
    if peak := PEAKS.get(device):
        row["share_of_peak"] = max(row["tflop_s"] / peak[case.kind], row["gb_s"] / peak["gb_s"])
    for name in ("xla", "deepgemm"):
        if name in seconds:
            row[f"{name}_us"], row[f"over_{name}"] = seconds[name] * 1e6, seconds[name] / t
    return row | dict(intensity=case.flops / case.bytes, kind=case.kind)


def _line(row: dict) -> str:
    text = f"{row['op']:24s} {row['shape']:28s} {row['us']:9.1f} us {row['tflop_s']:6.0f} TFLOP/s {row['gb_s']:6.0f} GB/s"
    if "share_of_peak" in row:
        text += f" {row['share_of_peak']:4.0%}"
    return text + "".join(f"  {row[f'over_{name}']:5.2f} x {name}" for name in ("xla", "deepgemm") if f"{name}_us" in row)


def roofline(rows: list[dict], path: pathlib.Path) -> None:
    """Rate against operations a byte, under the card's roofs."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 5))
    rows = [r for r in rows if r["tflop_s"]]
    peak = PEAKS.get(rows[0]["device"]) if rows else None
    if peak:
        x = np.geomspace(10, 1e4, 100)
        for kind, colour in (("fp8", "tab:blue"), ("bf16", "tab:orange")):
            axes.plot(x, np.minimum(x * peak["gb_s"] / 1e3, peak[kind]), color=colour, lw=1, label=f"peak {kind}")
    markers = dict(zip(dict.fromkeys(r["op"] for r in rows), "osD^v*P", strict=False))
    for op, marker in markers.items():
        mine = [r for r in rows if r["op"] == op]
        colour = "tab:blue" if mine[0]["kind"] == "fp8" else "tab:orange"
        axes.scatter([r["intensity"] for r in mine], [r["tflop_s"] for r in mine], marker=marker, s=22, color=colour,
                     edgecolors="black", linewidths=0.4, label=op)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s",
             title=rows[0]["device"] if rows else "")
    if rows:
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bench(config, workdir: str) -> list[dict]:
    """Measures what `config.bench` asks for: `ops` names of OPS with their `shapes` (a dict of tuples of sizes)."""
    options = config.bench
    if unknown := set(options.ops) - set(OPS):
        raise ValueError(f"config.bench.ops names {sorted(unknown)}: must be among {tuple(OPS)}")
    peer, timer, rows = _deep_gemm(options.deepgemm), Timer(), []
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    where = "our kernels" if is_hopper() else "the reference"
    print(f"bench on {jax.devices()[0].device_kind}: {where}")
    with open(workdir / "bench.jsonl", "w") as file:
        for op in options.ops:
            for sizes in options.shapes[op]:
                for case in OPS[op](*sizes):
                    rows.append(measure(case, timer, options.repeats, peer))
                    print(_line(rows[-1]), flush=True)
                    file.write(json.dumps(rows[-1]) + "\n")
    roofline(rows, workdir / "roofline.png")
    return rows
