"""Quantisation by tiles: q = round(x / scale), scale = amax / 448 a tile; also fused with what stands before it.

| function | what | for |
|---|---|---|
| `quantize_tiles` | tiles 1x128, 128x1, 128x128 | activations and gradients; operands of a weight gradient; weights |
| `quantize_both` | 1x128 and 128x1 in one read | a gradient: the dgrad wants rows, the weight gradient columns |
| `requantize_tiles` | 1x128 (E4M3 or E5M6) -> other tiles, E4M3 | the cached input, for the weight gradient |
| `quantize_heads` | that of heads cut from two arrays, never joined | MLA: the gradient of k and v by what makes them |
| `quantize_rotated_back` | that of heads rotated back on their way | MLA: the gradient of q by what makes it |
| `quantize_weight` | 128x128 blocks, and the transposed copy, in one read | a weight: forward and dgrad |
| `swiglu_quantize` | silu(gate) * up, rows weighted or not, then tiles, from bf16 or cached FP8 | forward; recomputation |
| `swiglu_gradient` | the gradient of that by gate and up, 1x128 and 128x1, and by the weights | backward |

Layouts. Every result has the logical shape of the data: q like x, scale [ceil(M/tile_m), ceil(K/tile_k)]. On Hopper the
bytes lie as the matmul kernels read them: scales of 1x128 tiles as [K/128, M], q of 128x1 tiles as [K, M] (FP8 wgmma
wants both operands with the reduction contiguous). The functions show the transposed view and the matmuls undo it, so
that XLA cancels the two: `.T` of a result costs nothing when the consumer is one of our kernels.

Tolerance: none. Kernel and reference agree bit for bit (SwiGLU and its gradient up to the exponential's last bit).
Speed: docs/kernels.md.
"""
import math

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import kernel, reference, tuned
from pallas_kernels.target import choose

TILES = ((1, 128), (128, 1), (128, 128))
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)


def _check(x: jax.Array, tile: tuple[int, int], format: str) -> tuple[int, int]:
    tile = tuple(tile)
    if tile not in TILES:
        raise ValueError(f"tile={tile}: must be one of {TILES}")
    if format not in reference.FORMATS:
        raise ValueError(f"format={format!r}: must be one of {tuple(reference.FORMATS)}")
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(f"x {x.shape}: must be [..., M, K] with M, K >= 1")
    if x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype}: must be a float of 16 bits or more")
    return tile


def _check_scale(q: jax.Array, scale: jax.Array, tile: tuple[int, int]) -> None:
    want = (*q.shape[:-2], *(reference.ceil_div(n, t) for n, t in zip(q.shape[-2:], tile, strict=True)))
    if scale.shape != want or scale.dtype != jnp.float32:
        raise ValueError(f"scale {scale.dtype}{scale.shape}: q {q.shape} in {tile} tiles needs float32{want}")


def _run(
    op: str, implementation: str, x: jax.Array, scale: jax.Array | None = None, *others: jax.Array, form: str = "plain", **what
) -> list[jax.Array] | None:
    """The kernel's outputs as the functions show them, or None where the reference has to do it. x [..., M, columns], of heads [..., M, H,
    channels]; others lead with [..., M] too."""
    lead = x.shape[:-3 if form in ("heads", "rotated") else -2]
    M, *columns = x.shape[len(lead):]
    batch, K = math.prod(lead), math.prod(columns)
    K = dict(swiglu=K // 2, swiglu_gradient=2 * K, heads=columns[0] * 256).get(form, K)
    job = kernel.Job(batch, M, K, x.dtype.name, form, scaled=scale is not None, **what)
    if choose(op, implementation, kernel.unfit(job)) == "reference":
        return None
    others = [x.reshape(batch, M, *x.shape[len(lead) + 1:]) for x in (x, *others)]
    operands = others if scale is None else [others[0], scale.mT.reshape(batch, -1, M), *others[1:]]
    return [o.reshape(*lead, *o.shape[1:]) for o in kernel.quantize(job, tuned.pick(job), *operands)]


def quantize_tiles(
    x: jax.Array, tile: tuple[int, int] = (1, 128), format: str = "e4m3", power_of_two: bool = False,
    *, implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """x [..., M, K] of any float -> q [..., M, K] (float8_e4m3fn; E5M6: float16), scale f32 [..., M/tm, K/tk] (ceil).

    x ~ q * scale tile by tile; scale = amax/448 in float32, or the next power of two. A zero tile gives zeros and the
    smallest normal scale; NaN and infinity stay not finite (at most with the rest of their tile). Raises ValueError on
    other tiles and formats.
    """
    tile = _check(x, tile, format)
    op = f"quantize_tiles {tile} {format}"
    if tile != (1, 128) and format != "e4m3":
        choose(op, implementation, "the kernel writes E5M6 in 1x128 tiles only")
    elif tile == (128, 1):
        if out := _run(op, implementation, x, columns=True, power_of_two=power_of_two):
            return out[0].mT, out[1]
    elif out := _run(op, implementation, x, rows=format, block=tile == (128, 128), power_of_two=power_of_two):
        return out[0], out[1] if tile == (128, 128) else out[1].mT
    return reference.quantize_tiles(x, tile, format, power_of_two)


def quantize_both(
    x: jax.Array, power_of_two: bool = False, *, implementation: str = "auto"
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """x [..., M, K] -> (q, scale) in 1x128 tiles and (q, scale) in 128x1 tiles, both E4M3, from one read of x."""
    _check(x, (1, 128), "e4m3")
    if out := _run("quantize_both", implementation, x, rows="e4m3", columns=True, power_of_two=power_of_two):
        return (out[0], out[1].mT), (out[2].mT, out[3])
    return tuple(reference.quantize_tiles(x, tile, "e4m3", power_of_two) for tile in ((1, 128), (128, 1)))


def quantize_heads(
    parts: tuple[jax.Array, jax.Array], widths: tuple[int, int], *, implementation: str = "auto"
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """`quantize_both` of heads that are never joined: of each of the H heads of parts [..., M, H, C0] and [..., M, H, C1] the first
    widths[0] and widths[1] channels, [..., M, H * (widths[0] + widths[1])]. MLA: the gradient of what k and v are made of."""
    first, second = parts
    if first.ndim < 3 or first.shape[:-1] != second.shape[:-1] or 0 in first.shape or first.dtype != second.dtype:
        raise ValueError(f"parts {first.dtype}{first.shape}, {second.dtype}{second.shape}: must be [..., M, H, channels] of one dtype")
    if first.dtype not in FLOATS or any(not 0 < n <= part.shape[-1] for n, part in zip(widths, parts, strict=True)):
        raise ValueError(f"widths={widths} of {first.dtype}{first.shape} and {second.shape}: must be channels of floats that are there")
    if tuple(widths) != (128, 128):
        choose("quantize_heads", implementation, f"heads of {widths} channels: the kernel takes 128 and 128")
    elif out := _run("quantize_heads", implementation, first, None, second, form="heads", channels=(first.shape[-1], second.shape[-1]),
                     rows="e4m3", columns=True):
        return (out[0], out[1].mT), (out[2].mT, out[3])
    x = reference.join_heads(parts, widths)
    return tuple(reference.quantize_tiles(x, tile, "e4m3", False) for tile in ((1, 128), (128, 1)))


def quantize_rotated_back(
    x: jax.Array, cos: jax.Array, sin: jax.Array, *, implementation: str = "auto"
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """`quantize_both` of heads x [..., M, H, C] whose last R channels are rotated back by cos, sin f32 [..., M, R/2], as [..., M, H * C];
    the values are rounded to x's dtype between, so the result is that of the two steps. MLA: the gradient of q by what makes it."""
    rotated = 2 * cos.shape[-1]
    if x.ndim < 3 or 0 in x.shape or x.dtype not in FLOATS or not 0 < rotated <= x.shape[-1]:
        raise ValueError(f"x {x.dtype}{x.shape}, cos {cos.shape}: must be floats [..., M, H, C] and [..., M, R/2]")
    if any(part.shape != (*x.shape[:-2], rotated // 2) or part.dtype != jnp.float32 for part in (cos, sin)):
        raise ValueError(f"cos {cos.dtype}{cos.shape}, sin {sin.dtype}{sin.shape}: must be float32{(*x.shape[:-2], rotated // 2)}")
    if out := _run("quantize_rotated_back", implementation, x, None, cos, sin, form="rotated", channels=(x.shape[-1], rotated),
                   rows="e4m3", columns=True):
        return (out[0], out[1].mT), (out[2].mT, out[3])
    x = reference.rotate_back(x, cos, sin)
    return tuple(reference.quantize_tiles(x, tile, "e4m3", False) for tile in ((1, 128), (128, 1)))


def quantize_weight(
    w: jax.Array, power_of_two: bool = False, *, implementation: str = "auto"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """w [..., N, K] -> q [..., N, K], its transposed copy [..., K, N], scale [..., N/128, K/128] (ceil) of 128x128
    blocks: forward takes (q, scale), dgrad (the copy, scale.mT)."""
    _check(w, (128, 128), "e4m3")
    if out := _run("quantize_weight", implementation, w, rows="e4m3", columns=True, block=True,
                   power_of_two=power_of_two):
        return tuple(out)
    q, scale = reference.quantize_tiles(w, (128, 128), "e4m3", power_of_two)
    return q, q.mT, scale


def requantize_tiles(
    q: jax.Array, scale: jax.Array, tile: tuple[int, int] = (128, 1), power_of_two: bool = False,
    *, implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """q [..., M, K] in 1x128 tiles (E4M3 or E5M6) with its scale [..., M, K/128] -> E4M3 (q, scale), 128x1 or 1x128."""
    tile = tuple(tile)
    _check_scale(q, scale, (1, 128))
    what = dict(columns=True) if tile == (128, 1) else dict(rows="e4m3", block=tile == (128, 128))
    if out := _run("requantize_tiles", implementation, q, scale, power_of_two=power_of_two, **what):
        return (out[0].mT, out[1]) if tile == (128, 1) else (out[0], out[1].mT if tile == (1, 128) else out[1])
    x = reference.dequantize_tiles(q, scale, (1, 128), jnp.float32)
    return reference.quantize_tiles(x, _check(x, tile, "e4m3"), "e4m3", power_of_two)


def dequantize_tiles(
    q: jax.Array, scale: jax.Array, tile: tuple[int, int] = (1, 128), dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """q * scale by tile in float32, rounded once to dtype: [..., M, K]. Plain jnp everywhere (XLA fuses it)."""
    _check_scale(q, scale, tuple(tile))
    return reference.dequantize_tiles(q, scale, tuple(tile), dtype)


def _check_weights(weights: jax.Array | None, rows: tuple[int, ...]) -> None:
    if weights is not None and (weights.shape != rows or weights.dtype != jnp.float32):
        raise ValueError(f"weights {weights.dtype}{weights.shape}: must be float32{rows}, one a row")


def swiglu_quantize(
    gate_up: jax.Array, scale: jax.Array | None = None, tile: tuple[int, int] = (1, 128), power_of_two: bool = False,
    weights: jax.Array | None = None, *, implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """silu(gate) * up in float32, then E4M3 tiles: gate_up [..., M, 2F] (gate first) -> q [..., M, F], its scale.

    With `scale` [..., M, 2F/128] (ceil), gate_up is its E4M3 values in 1x128 tiles: the recomputation in the backward.
    `weights` f32 [..., M] multiply the rows, in float32: an expert's hidden rows by the gate.
    """
    tile = tuple(tile)
    if gate_up.ndim < 2 or gate_up.shape[-1] % 2 or tile not in TILES[:2]:
        raise ValueError(f"gate_up {gate_up.shape}, tile={tile}: must be [..., M, 2F] and one of {TILES[:2]}")
    if scale is not None:
        _check_scale(gate_up, scale, (1, 128))
    _check_weights(weights, gate_up.shape[:-1])
    what = dict(columns=True) if tile == (128, 1) else dict(rows="e4m3")
    of_rows = () if weights is None else (weights,)
    if out := _run("swiglu_quantize", implementation, gate_up, scale, *of_rows, form="swiglu", weighted=bool(of_rows),
                   power_of_two=power_of_two, **what):
        return (out[0].mT, out[1]) if tile == (128, 1) else (out[0], out[1].mT)
    if scale is not None:
        gate_up = dequantize_tiles(gate_up, scale)
    x = reference.swiglu(gate_up)
    x = x if weights is None else x * weights[..., None].astype(x.dtype)
    return reference.quantize_tiles(x, tile, "e4m3", power_of_two)


def swiglu_gradient(
    d_hidden: jax.Array, gate_up: jax.Array, weights: jax.Array | None = None, *, implementation: str = "auto"
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array], jax.Array | None]:
    """The gradient of hidden = weights[:, None] * silu(gate) * up by gate_up, in float32, quantised both ways and never written
    otherwise: d_hidden [..., M, F], gate_up [..., M, 2F], weights f32 [..., M] -> E4M3 (q [..., M, 2F], scale) in 1x128 tiles,
    (q, scale) in 128x1 tiles, and the gradient of weights f32 [..., M] (None without), the same bits every run."""
    if d_hidden.ndim < 2 or 0 in d_hidden.shape or gate_up.shape != (*d_hidden.shape[:-1], 2 * d_hidden.shape[-1]):
        raise ValueError(f"d_hidden {d_hidden.shape}, gate_up {gate_up.shape}: must be [..., M, F] and [..., M, 2F]")
    if d_hidden.dtype != gate_up.dtype or gate_up.dtype not in FLOATS:
        raise ValueError(f"d_hidden is {d_hidden.dtype}, gate_up {gate_up.dtype}: must be the same float of 16 bits or more")
    _check_weights(weights, d_hidden.shape[:-1])
    of_rows = () if weights is None else (weights,)
    if out := _run("swiglu_gradient", implementation, d_hidden, None, gate_up, *of_rows, form="swiglu_gradient", weighted=bool(of_rows),
                   rows="e4m3", columns=True):
        return (out[0], out[1].mT), (out[2].mT, out[3]), jnp.sum(out[4], axis=-2) if of_rows else None
    x, d_weights = reference.swiglu_gradient(d_hidden, gate_up, weights)
    return *(reference.quantize_tiles(x, tile, "e4m3", False) for tile in ((1, 128), (128, 1))), d_weights
