"""The exchange, dispatch and combine around the experts (V3 §3.2.2), and EPLB (V3 §3.4.1).

`dispatch` sorts the M*K (token, expert) pairs by expert and starts each group at a multiple of `align` rows (128 under FP8, so that no
128x1 scale tile crosses a group; 64 on the GPU; the block size of the block form on the CPU); `combine` weights the rows and adds
them back to their tokens. Both directions are gathers (`pallas_kernels/rows`): forwards rows[i] = x[token of i], backwards dx[t] = sum
of the K rows of t. What else is added at a token, the shared expert's output and the residual stream forwards, the gradients of the gate
and the shared expert backwards, joins these sums in the kernel. No token is ever dropped.

Under FP8 the weights join the experts' hidden rows instead (the same sum, as the last product is linear): gradients too are then
dispatched as bytes (V3 §3.3.3), and no expert's output is kept.
Shapes: M tokens, K chosen, E experts, P padded rows, D width.
"""
from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from model import block_matmul, precision, sharding
from model.fp8_linear import Carried
from pallas_kernels import quantize
from pallas_kernels.rows import gather, gather_sum, weighted_backward

EXPERT_AXES = ("node", "expert")


class Route(NamedTuple):
    """position i32 [M, K]: the row of each (token, choice), P for one of no group here; source i32 [P]: the flat (token, choice) of
    each row, M*K if padding."""

    position: Any
    source: Any


def apply(run_experts, readers, addends, x_MD, experts_MK, w_up, w_down, cfg, run, tape):
    """An MoE layer once its experts are chosen: (addends + readers' outputs + weighted sum of the experts' [M, D], what is kept).

    The experts are run_experts(rows, quantized, group_sizes, align, weights of the rows or None, w_up, w_down, tape). The readers are
    functions of x_MD too: the first gives (weights [M, K], anything to be kept), a second one [M, D]. They run after dispatch: so it gets
    their gradients.

    Under a mesh each data shard dispatches its own tokens. With experts over several shards ('one_hop'), a shard sees the tokens of
    its expert group by one all-gather and returns weighted sums by one reduce-scatter: static shapes make a dropless exchange cost
    its worst case, every token to every shard, and these two collectives move just that, in one hop. XLA adds the rest then.
    """
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    exchange = () if alone else tuple(axis for axis in EXPERT_AXES if mesh.shape[axis] > 1)
    if alone or mesh.manual_axes and not exchange:
        return _alone(run_experts, readers, addends, x_MD, experts_MK, w_up, w_down, cfg, run, tape)
    (weights, kept), *more = (read(x_MD) for read in readers)
    routed = _over_mesh(mesh, exchange, run_experts, x_MD, weights, experts_MK, w_up, w_down, cfg, run, tape)
    return sum((*more, *addends), routed), kept


def _alone(run_experts, readers, addends, x_MD, experts_MK, w_up, w_down, cfg, run, tape):
    """`apply` where no token meets another device."""
    with jax.named_scope("moe/dispatch"):
        rows, route, others = _send(x_MD, _quantize(x_MD, w_up, run), experts_MK, cfg.moe.n_routed_experts, run, len(readers))
    (weights, kept), *more = (read(x) for read, x in zip(readers, others, strict=True))
    joined = row_weights(weights, route) if precision.fuses(w_down, run, tape) else None
    with jax.named_scope("moe/experts"):
        rows = run_experts(*rows, joined, w_up, w_down, tape)
    with jax.named_scope("moe/combine"):
        if joined is not None:
            return combine_carried(rows, route, (*more, *addends)), kept
        return combine(rows, weights, route, (*more, *addends)), kept


def _over_mesh(mesh, exchange, run_experts, x_MD, weights_MK, experts_MK, w_up, w_down, cfg, run, tape):
    """The weighted sum of the experts' outputs [M, D] where devices share tokens or experts."""
    local = functools.partial(_local, run_experts, cfg=cfg, run=run, tape=tape)
    if mesh.manual_axes:  # a pipeline's shard_map: everything here is local already
        return local(x_MD, weights_MK, experts_MK, w_up, w_down, shards=exchange)
    n_data = math.prod(mesh.shape[axis] for axis in sharding.DATA_AXES)
    n_shards = math.prod(mesh.shape[axis] for axis in exchange)
    if x_MD.shape[0] % n_data or cfg.moe.n_routed_experts % n_shards:
        return local(x_MD, weights_MK, experts_MK, w_up, w_down, shards=())  # too few rows or experts to split: XLA places them
    split_ffn = mesh.shape["tensor"] > 1 and cfg.moe.d_expert % mesh.shape["tensor"] == 0 and not run.precision.recipe
    tensor = "tensor" if split_ffn else None
    rows, up, down = PartitionSpec(sharding.DATA_AXES), PartitionSpec(exchange, None, tensor), PartitionSpec(exchange, None, tensor)
    up, down = (jax.tree.map(lambda leaf, spec=spec: spec if leaf.ndim > 2 else PartitionSpec(exchange), w)
                for w, spec in ((w_up, up), (w_down, down)))
    if tape.tape is not None and (tape.tape.zeros or tape.tape.outputs):
        raise ValueError("moe: a tape's zeros and outputs do not cross a mesh here; a pipeline's own shard_map takes them")
    local = functools.partial(local, tape=None)  # nor do its records
    copied = tuple(axis for axis in sharding.DATA_AXES if axis not in exchange)  # axes along which the experts are copies

    def placed(x, weights, experts, *w):
        w = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, copied, to="varying") if copied else leaf, w)
        if tensor:
            x, weights, experts = (jax.lax.pcast(a, tensor, to="varying") for a in (x, weights, experts))
        return local(x, weights, experts, *w, shards=exchange, tensor=tensor)

    split = jax.shard_map(placed, in_specs=(rows, rows, rows, up, down), out_specs=rows)
    return split(x_MD, weights_MK, experts_MK, w_up, w_down)


def _local(run_experts, x_MD, weights_MK, experts_MK, w_up, w_down, *, cfg, run, tape, shards, tensor=None):
    """What one device does: its tokens (and those of the shards it exchanges with) through its own experts."""
    E = cfg.moe.n_routed_experts
    with jax.named_scope("moe/dispatch"):
        quantized = _quantize(x_MD, w_up, run)
        if shards:
            E //= jax.lax.axis_size(shards)
            x_MD, weights_MK, experts_MK = (jax.lax.all_gather(a, shards, tiled=True) for a in (x_MD, weights_MK, experts_MK))
            quantized = quantized and tuple(jax.lax.all_gather(a, shards, tiled=True) for a in quantized)
            experts_MK = experts_MK - jax.lax.axis_index(shards) * E
            mine = (experts_MK >= 0) & (experts_MK < E)
            experts_MK, weights_MK = jnp.where(mine, experts_MK, E), jnp.where(mine, weights_MK, 0)  # E: of no group here
        rows, route, _ = _send(x_MD, quantized, experts_MK, E, run)
    joined = row_weights(weights_MK, route) if precision.fuses(w_down, run, tape) else None
    with jax.named_scope("moe/experts"):
        rows = run_experts(*rows, joined, w_up, w_down, tape)
    with jax.named_scope("moe/combine"):
        if joined is not None:
            return combine_carried(rows, route, (), shards)
        out = combine(rows, weights_MK, route)
        out = jax.lax.psum(out, tensor) if tensor else out
        return jax.lax.psum_scatter(out, shards, tiled=True) if shards else out


def _quantize(x_MD, w_up, run):
    """The tokens in FP8, (bytes u8 [M, D], scales), or None."""
    quantized = precision.quantize_tokens(x_MD, w_up, run, "moe/gate_up")
    return quantized and _as_bytes(*quantized)


def _as_bytes(q, scale):
    return jax.lax.bitcast_convert_type(q, jnp.uint8), scale


def _send(x_MD, quantized, experts_MK, n_experts: int, run, n_readers: int = 0):
    """((rows, rows in FP8 or None, group_sizes, align) as experts take them, Route, n_readers times x_MD)."""
    align = row_alignment(experts_MK.size, n_experts, fp8=run.precision.recipe is not None)
    route, group_sizes = plan(experts_MK, n_experts, align)
    rows, *others = dispatch(x_MD, route, n_readers)  # under FP8 nothing reads the rows: they carry the gradient
    return (rows, quantized and dispatch_quantized(*quantized, route), group_sizes, align), route, others


def row_alignment(n_rows: int, n_experts: int, *, fp8: bool = False) -> int:
    """Rows each group starts at a multiple of: those of a scale tile for FP8, of a stage of our bf16 kernel on a GPU, else of a block."""
    if fp8:
        return 128
    return 64 if jax.default_backend() == "gpu" else block_matmul.block_rows(n_rows, n_experts)


def plan(experts_MK, n_experts: int, align: int) -> tuple[Route, Any]:
    """(Route, group_sizes i32 [E], each a multiple of align) for experts i32 [M, K]."""
    position, source, padded = block_matmul.sort_into_groups(experts_MK.reshape(-1), n_experts, align)
    return Route(position.reshape(experts_MK.shape), source), padded


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dispatch(x_MD, route: Route, n_readers: int = 0):
    """(rows [P, D], each padded row its token's vector, zero where padding; then x_MD n_readers times, two at most, for what else reads
    it: those gradients are added in the pass that adds the rows')."""
    return gather(x_MD, _token(route)), *(x_MD,) * n_readers


def dispatch_quantized(q_MD, scale_MS, route: Route):
    """Tokens quantised in 1x128 tiles, as bytes u8 [M, D] with scales f32 [M, D/128] -> (E4M3 rows [P, D], scales [P, D/128]): FP8
    dispatch (V3 §3.3.3). Scales are gathered along the tokens as the kernels keep them, [D/128, M]."""
    token = _token(route)
    scale = jnp.take(scale_MS.T, jnp.minimum(token, q_MD.shape[0] - 1), axis=1).T
    return jax.lax.bitcast_convert_type(gather(q_MD, token), jnp.float8_e4m3fn), scale


def _token(route: Route):
    """i32 [P]: the token of each row, M (none) if padding."""
    return route.source // route.position.shape[1]


def _dispatch_backward(n_readers, route, gradients):
    g_PD, *others = gradients
    return gather_sum(g_PD, route.position, addends=tuple(others)), None


dispatch.defvjp(lambda x, route, n_readers: (dispatch(x, route, n_readers), route), _dispatch_backward)


@jax.custom_vjp
def combine(rows_PD, weights_MK, route: Route, addends=()):
    """out [M, D]: the K rows of each token times their weights, and up to two addends [M, D], added in the dtype of the weights, rounded
    once to that of the rows and addends."""
    return gather_sum(rows_PD, route.position, weights_MK, addends)


def _combine_forward(rows, weights, route, addends):
    return combine(rows, weights, route, addends), (rows, weights, route, (None,) * len(addends))


def _combine_backward(residuals, g_MD):
    rows, weights, route, addends = residuals
    row_weight = jnp.take(weights.reshape(-1), route.source, mode="fill", fill_value=0)
    return *weighted_backward(g_MD, rows, _token(route), row_weight, route.position), None, tuple(g_MD for _ in addends)


combine.defvjp(_combine_forward, _combine_backward)


@jax.custom_vjp
def row_weights(weights_MK, route: Route):
    """f32 [P]: the weight of each row, 0 if padding."""
    return jnp.take(weights_MK.reshape(-1), route.source, mode="fill", fill_value=0).astype(jnp.float32)


def _row_weights_backward(saved, g_P):
    position, like = saved
    return jnp.take(g_P, position, mode="fill", fill_value=0).astype(like.dtype), None


row_weights.defvjp(lambda weights, route: (row_weights(weights, route), (route.position, weights[:0])), _row_weights_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def combine_carried(rows_PD: Carried, route: Route, addends=(), shards=()):
    """`combine` of rows that are weighted already, summed over shards by one reduce-scatter. Their gradient travels, there and to the
    rows, as E4M3 bytes in 1x128 tiles with power-of-two scales."""
    out = gather_sum(rows_PD.y, route.position, addends=addends)
    return jax.lax.psum_scatter(out, shards, tiled=True) if shards else out


def _combine_carried_forward(rows, route, addends, shards):
    return combine_carried(rows, route, addends, shards), (route, (None,) * len(addends))


def _combine_carried_backward(shards, saved, g_MD):
    route, addends = saved
    quantized = _as_bytes(*quantize.quantize_tiles(g_MD, power_of_two=True))
    if shards:
        quantized = tuple(jax.lax.all_gather(a, shards, tiled=True) for a in quantized)
    return Carried(None, *dispatch_quantized(*quantized, route)), None, tuple(g_MD for _ in addends)


combine_carried.defvjp(_combine_carried_forward, _combine_carried_backward)


def rebalance_experts(load, n_replicas: int, n_groups: int, n_nodes: int, n_gpus: int):
    """EPLB: (physical_to_logical [L, R], logical_to_physical [L, E, max count] padded with -1, count [L, E]) for load [L, E].

    Hierarchical where the groups divide over the nodes: groups to nodes, replicas inside a node, replicas to its GPUs; else the
    same with one group and one node. numpy, on the host. Raises ValueError on sizes that do not divide.
    """
    load = np.asarray(load, np.float64)
    n_layers, n_experts = load.shape
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    for name, big, small in (("experts over n_groups", n_experts, n_groups), ("n_gpus over n_nodes", n_gpus, n_nodes),
                             ("n_replicas over n_gpus", n_replicas, n_gpus)):
        if big % small:
            raise ValueError(f"{name}: found {big} over {small}, allowed: a multiple")
    if n_replicas < n_experts:
        raise ValueError(f"n_replicas: found {n_replicas}, allowed: at least the {n_experts} experts")
    physical, rank = np.zeros((2, n_layers, n_replicas), np.int64)
    count = np.zeros((n_layers, n_experts), np.int64)
    group_size, per_node = n_experts // n_groups, n_replicas // n_nodes
    for layer in range(n_layers):
        groups = _pack(load[layer].reshape(n_groups, group_size).sum(axis=1), n_nodes)
        for node, members in enumerate(groups):
            experts = np.concatenate([np.arange(g * group_size, (g + 1) * group_size) for g in members])
            replica_of, replica_rank, copies = _replicate(load[layer][experts], per_node)
            packs = _pack((load[layer][experts] / copies)[replica_of], n_gpus // n_nodes)
            order, place = np.concatenate(packs), slice(node * per_node, (node + 1) * per_node)
            physical[layer, place], rank[layer, place] = experts[replica_of[order]], replica_rank[order]
            count[layer, experts] = copies
    logical = np.full((n_layers, n_experts, count.max()), -1, np.int64)
    for layer in range(n_layers):
        logical[layer, physical[layer], rank[layer]] = np.arange(n_replicas)
    return physical, logical, count


def _pack(weight, n_packs: int):
    """Heaviest first, each into the lightest pack with room; lists of indices, one a pack; one item a pack: as they come."""
    room = len(weight) // n_packs
    if room == 1:
        return [[i] for i in range(n_packs)]
    packs, sums = [[] for _ in range(n_packs)], np.zeros(n_packs)
    for i in np.argsort(-weight, kind="stable"):
        open_packs = [p for p in range(n_packs) if len(packs[p]) < room]
        lightest = min(open_packs, key=lambda p: sums[p])
        packs[lightest].append(int(i))
        sums[lightest] += weight[i]
    return packs


def _replicate(weight, n_replicas: int):
    """(expert and rank of each replica, copies of each expert): one each, then the most loaded per copy, first on ties."""
    copies, replica_of, rank = np.ones(len(weight), np.int64), list(range(len(weight))), [0] * len(weight)
    for _ in range(n_replicas - len(weight)):
        expert = int(np.argmax(weight / copies))
        replica_of.append(expert)
        rank.append(int(copies[expert]))
        copies[expert] += 1
    return np.array(replica_of), np.array(rank), copies
