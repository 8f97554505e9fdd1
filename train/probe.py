"""Job `probe`: one model on one batch in two precisions (V3 §3.3, App. B): how far they part, layer by layer and site by site, forwards
and backwards, and where first; and what every tensor would lose under each way of scaling it.

    python main.py --config=configs/deepseek_v3.py:tiny --config.job=probe --config.run.precision.kind=fp8_block --workdir=runs/probe

`run.precision.kind` is measured against `probe.against`. Nothing is hooked: the sites are those of the tape, whose records hold each
matmul's input and output and whose zeros have its output's gradient as theirs, and the tensors between them are `run.probes`. The
reference's expert choices are replayed by the other, so that rows of experts correspond; how many would have been chosen otherwise is
counted beside. The MTP modules keep no tape and are left out of both runs. The statistics (probe_statistics.py) are those of a run in
which nothing is quantised: the one of the two without FP8, else a third in bf16. Delayed scales come from `probe.history` earlier
batches at the same weights. Writes probe.json, probe.html and plots/. One device.
"""
from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from data import corpus
from data import tokenizer as tokenizers
from model import block, expert_parallel, moe, precision, transformer
from model import config as model_config
from model.config import Execution, ModelConfig
from model.errors import choice, freeze, leaf, named_input, require
from model.tape import LayerTape, Record, Tape
from pallas_kernels import quantize
from train import checkpoint, probe_page
from train import state as states
from train.cross_entropy import token_logp
from train.loop import InitFrom, key_of
from train.metrics import plain, prepare_workdir, write_atomically
from train.optimizer import path_name
from train.probe_statistics import by_layer, relative


@dataclasses.dataclass(frozen=True)
class Probe:
    """config.probe: the precision compared with, the batch, the relative difference that counts as parted, the batches of history."""

    against: str
    batch_size: int
    seq_len: int
    threshold: float
    history: int

    def __post_init__(self):
        choice(self.against, precision.KINDS, "against")
        for name, least in dict(batch_size=1, seq_len=2, history=1).items():
            require(getattr(self, name) >= least, name, getattr(self, name), f"{least} or more")
        require(self.threshold >= 0, "threshold", self.threshold, "0 or more")


class Pass(NamedTuple):
    """A forward and backward: records and gradients of their outputs by stack and site, [L, ...]; probes by 'component/LAYER/tensor';
    dparams f32 as params; experts i32 [L, B, T, K] or None."""

    loss: Any
    logits: Any
    records: dict[str, dict[str, Record]]
    gradients: dict[str, dict[str, Any]]
    probes: dict[str, Any]
    dparams: Any
    experts: Any


def probe(config, workdir: str) -> dict[str, Any]:
    """The job; returns what it writes as probe.json."""
    path = prepare_workdir(workdir, config)
    spec, cfg, run = freeze(Probe, config.probe, "probe"), model_config.parse(config.model), model_config.parse_run(config.run)
    init_from, seed = freeze(InitFrom, config.init_from, "init_from"), leaf(config, "seed", int, "config")
    params, bias = jax.jit(lambda key: (transformer.init(key, cfg), states.init_router_bias(cfg)))(key_of(seed, "init"))
    if init_from.path:
        params, bias = checkpoint.warm_start(init_from, params, bias, cfg)
    *history, batch = batches(config, spec, cfg, seed)
    result = measure(params, bias, batch, history, cfg, run, spec)
    result |= dict(device=jax.devices()[0].device_kind, weights=init_from.path or "initial", seed=seed)
    write_atomically(path / "probe.json", json.dumps(plain(result), indent=1) + "\n")
    result = json.loads((path / "probe.json").read_text())
    probe_page.show(result)
    print(f"probe: {probe_page.write(path, result)}")
    return result


def batches(config, spec: Probe, cfg: ModelConfig, seed: int) -> list[dict[str, Any]]:
    """history + 1 batches of config.data, as pretraining reads them."""
    with named_input("data", "tokenizer"):
        source, tokenizer = corpus.parse(config.data), tokenizers.parse(config.tokenizer)
        require(tokenizer.vocab_size <= cfg.vocab_size, "model.vocab_size", cfg.vocab_size,
                f"at least the tokenizer's {tokenizer.vocab_size}")
        rows = corpus.make_iterator(source, tokenizer, batch_size=spec.batch_size, seq_len=spec.seq_len, n_micro=1, seed=seed)
        names = ("tokens", "weight") if source.packing.kind == "concat" else ("tokens", "weight", "positions", "segment_ids")
        drawn = [next(rows) for _ in range(spec.history + 1)]
    return [{name: b[name][0] for name in names} for b in drawn]


def measure(params, bias, batch, history, cfg: ModelConfig, run: Execution, spec: Probe) -> dict[str, Any]:
    """Everything the page shows, as arrays and numbers; batch and history as `batches` gives them."""
    cfg = dataclasses.replace(cfg, mtp_depth=0)
    params = {k: v for k, v in params.items() if k != "mtp"}
    bias = None if bias is None else bias[:cfg.n_moe_layers]
    kind, against = run.precision.kind, spec.against
    passes: dict[str, Callable] = {k: make_pass(cfg, with_kind(run, k)) for k in (kind, against)}
    sites = sites_in_order(params, batch, cfg, run)
    require("moe" not in sites or "moe/down" in sites["moe"], "probe.batch_size", f"{batch['tokens'].size} tokens",
            "a batch large enough to group its tokens by expert, and run.experts.kind other than masked")
    reference = passes[against](params, bias, batch, None)
    other = passes[kind](params, bias, batch, reference.experts)
    compared = jax.jit(functools.partial(compare, cfg=cfg, runs=(with_kind(run, kind), with_kind(run, against))))(other, reference, bias)
    rows = list(site_rows(compared, sites, cfg))
    result = dict(kind=kind, against=against, threshold=spec.threshold, tokens=batch["tokens"].size, batch_size=spec.batch_size,
                  seq_len=spec.seq_len, history=spec.history,
                  loss={kind: other.loss, against: reference.loss}, logits=compared["logits"][0], sites=rows,
                  parted=dict(forward=first_over(rows, "output", spec.threshold),
                              backward=first_over(reversed(rows), "gradient", spec.threshold)),
                  between=[dict(component=component, layer=int(layer), tensor=tensor, difference=d) for (component, layer, tensor), d in
                           sorted(((name.split("/"), d) for name, d in compared["between"].items()), key=lambda item: int(item[0][1]))],
                  weights_gradient=[dict(parameter=name, layer=first_layer(name, cfg) + i, difference=d)
                                    for name, ds in compared["weights"].items() for i, d in enumerate(ds)],
                  rerouted=[dict(layer=cfg.n_dense_layers + i, share=share) for i, share in enumerate(compared["rerouted"])])
    del other, compared
    source = next((k for k in (against, kind) if not with_kind(run, k).precision.recipe), "bf16")
    look = passes.get(source) or make_pass(cfg, with_kind(run, source))
    plainest = reference if source == against else look(params, bias, batch, None)
    past = [largest(look(params, bias, b, None)) for b in history]
    past = jax.tree.map(lambda *values: jnp.max(jnp.stack(values), axis=0), *past)
    tensors = [*activations(plainest, past, sites, batch["tokens"].size, cfg), *weights(params, cfg)]
    return jax.device_get(result | dict(statistics_of=source, tensors=tensors))


def make_pass(cfg: ModelConfig, run: Execution) -> Callable:
    """Jitted (params, router_bias, batch, experts or None) -> Pass, of the mean next-token loss."""
    run = dataclasses.replace(run, probes=("*/*/*",), scan_unroll=1)  # run a few times: compiling is what costs

    @jax.jit
    def one(params, bias, batch, experts):
        prepared = precision.prepare(params, run)
        aux = dict(positions=batch.get("positions"), segment_ids=batch.get("segment_ids"), router_bias=bias, tokens=batch["tokens"])

        def loss(params, zeros):
            weights = precision.with_masters(prepared, params)
            stacks = {k: weights[k] for k in ("dense", "moe") if k in weights}
            tape = {k: Tape(zeros=zeros.get(k, {}), experts=experts if k == "moe" else None) for k in stacks}
            x = transformer.embed(weights, batch["tokens"], cfg, run)
            x, staged = transformer.stage(stacks, x, aux, cfg, run, tape=tape)
            logits = transformer.tail(weights, x, aux, cfg, run).logits
            weight = jnp.asarray(batch["weight"])
            total = -jnp.sum(weight * token_logp(logits, batch["tokens"])) / jnp.sum(weight)
            return total, (logits, staged.records, staged.probes, staged.experts)

        shapes = jax.eval_shape(loss, params, {})[1][1]
        zeros = {k: {site: jnp.zeros(r.output.shape, r.output.dtype) for site, r in records.items()} for k, records in shapes.items()}
        (total, (logits, records, probes, chosen)), (dparams, gradients) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            params, zeros)
        return Pass(total, logits, records, gradients, probes, dparams, chosen)

    return one


def with_kind(run: Execution, kind: str) -> Execution:
    return dataclasses.replace(run, precision=precision.Precision(kind))


def sites_in_order(params, batch, cfg: ModelConfig, run: Execution) -> dict[str, list[str]]:
    """The sites of each stack in the order in which a layer runs them (a scan gives records back by name)."""
    run, order = with_kind(run, "fp32"), {}
    x = jnp.zeros((*batch["tokens"].shape, cfg.d_model), jnp.float32)
    layout, valid = transformer.layout_of(*batch["tokens"].shape, dict(positions=None, segment_ids=None), cfg, x.dtype)
    for stack in [k for k in ("dense", "moe") if k in params]:
        notes = LayerTape(Tape())
        one = block.Block(cfg.dense() if stack == "dense" else cfg, run)
        layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params[stack])
        jax.eval_shape(lambda p, x: one.apply({"params": p}, x, layout, None, valid, None, notes)[0], layer, x)
        order[stack] = list(notes.records)
    return order


def compare(a: Pass, b: Pass, bias, *, cfg: ModelConfig, runs: tuple[Execution, Execution]) -> dict[str, Any]:
    """Relative differences of a from b: by stack, site and tensor [L]; of logits, probes, weight gradients; and `rerouted` [L_moe], the
    share of a's own expert choices that are not those of b, which it was made to follow."""
    def rows(tensor, record, passed: Pass, run):
        """Rows of experts in the order of (token, choice), padding gone: kinds pad groups to different multiples."""
        if record.group_sizes is None:
            return tensor
        chosen = passed.experts.reshape(len(passed.experts), -1, cfg.moe.n_activated_experts)
        align = expert_parallel.row_alignment(chosen[0].size, cfg.moe.n_routed_experts, fp8=run.precision.recipe is not None)
        place = jax.vmap(lambda experts: expert_parallel.plan(experts, cfg.moe.n_routed_experts, align)[0].position.reshape(-1))(chosen)
        return jax.vmap(lambda t, at: t[at])(tensor, place)

    def apart(read):
        return {stack: {site: relative(*(rows(read(p, stack, site), p.records[stack][site], p, run)
                                         for p, run in zip((a, b), runs, strict=True)))
                        for site in b.records[stack]} for stack in b.records}

    weights = {path_name(path): relative(x, y) for (path, x), (_, y) in zip(
        jax.tree_util.tree_leaves_with_path(a.dparams), jax.tree_util.tree_leaves_with_path(b.dparams), strict=True)
        if path[-1].key in precision.MATMULS}
    return dict(
        output=apart(lambda p, stack, site: p.records[stack][site].output),
        input=apart(lambda p, stack, site: dequantized(p.records[stack][site].input)),
        gradient=apart(lambda p, stack, site: p.gradients[stack][site]),
        between={name: relative(a.probes[name][None], b.probes[name][None])[0] for name in b.probes},
        logits=relative(a.logits[None], b.logits[None]), weights=weights, rerouted=rerouted(a, bias, cfg))


def rerouted(a: Pass, bias, cfg: ModelConfig) -> list[Any]:
    """By MoE layer, the share of (token, choice) pairs whose expert the gate's own logits would not have chosen."""
    shares = []
    for i in range(0 if a.experts is None else len(a.experts)):
        logits = a.probes[f"moe/{cfg.n_dense_layers + i}/gate"].reshape(-1, cfg.moe.n_routed_experts)
        own = moe.gate(logits, None if bias is None else bias[i], cfg)[1]
        given = a.experts[i].reshape(own.shape)
        shares.append(1 - jnp.mean(jnp.any(own[:, :, None] == given[:, None, :], axis=-1).astype(jnp.float32)))
    return shares


def dequantized(x):
    """A record's input as the product reads it."""
    return quantize.dequantize_tiles(x[0], x[1]) if isinstance(x, tuple) else x


def first_layer(name: str, cfg: ModelConfig) -> int:
    """The number of the first layer of the stack a name begins with."""
    return cfg.n_dense_layers if name.split("/")[0] == "moe" else 0


def site_rows(compared: dict[str, Any], sites: dict[str, list[str]], cfg: ModelConfig) -> Iterator[dict[str, Any]]:
    """One row a layer and site, in the order of the forward."""
    for stack, names in sites.items():
        for i in range(len(compared["output"][stack][names[0]])):
            for site in names:
                yield dict(layer=first_layer(stack, cfg) + i, site=site) | {
                    tensor: float(compared[tensor][stack][site][i]) for tensor in ("input", "output", "gradient")}


def first_over(rows, tensor: str, threshold: float) -> dict[str, Any] | None:
    """The first row, in this order, whose difference is not within the threshold (not a number is not)."""
    return next((dict(layer=r["layer"], site=r["site"], difference=r[tensor]) for r in rows if not r[tensor] <= threshold), None)


@jax.jit
def largest(passed: Pass) -> dict[str, Any]:
    """amax f32 [L] of each input and each gradient of an output, by stack and site."""
    def amax(x):
        return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim)))

    return {stack: {site: dict(input=amax(record.input), gradient=amax(passed.gradients[stack][site]))
                    for site, record in records.items()} for stack, records in passed.records.items()}


def activations(passed: Pass, past, sites, n_tokens: int, cfg: ModelConfig) -> Iterator[dict[str, Any]]:
    """Statistics of each site's input and of the gradient of its output, an entry a layer."""
    for stack, names in sites.items():
        for site in names:
            record = passed.records[stack][site]
            n = n_tokens * (1 if record.group_sizes is None else cfg.moe.n_activated_experts)
            for role, x in dict(input=record.input, gradient=passed.gradients[stack][site]).items():
                found = _by_layer(x, jnp.float32(n * x.shape[-1]), past[stack][site][role])
                yield from entries(found, site, role, first_layer(stack, cfg))


def weights(params, cfg: ModelConfig) -> Iterator[dict[str, Any]]:
    """Statistics of each matmul weight of the stacks, an entry a layer; experts of a layer together, each with its own scales."""
    for path, w in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        if path[0].key in ("dense", "moe") and path[-1].key in precision.MATMULS:
            merged = w.reshape(*w.shape[:-3], -1, w.shape[-1]) if path[-1].key.endswith("gate_up") else w
            found = _by_layer(merged, jnp.float32(w[0].size), jnp.zeros(len(w), jnp.float32))
            yield from entries(found, name.partition("/")[2], "weight", first_layer(name, cfg))


def entries(found: dict[str, Any], name: str, role: str, first: int) -> Iterator[dict[str, Any]]:
    found = jax.device_get(found)
    for i in range(len(found["amax"])):
        yield dict(layer=first + i, tensor=name, role=role) | jax.tree.map(lambda values: float(values[i]), found)


_by_layer = jax.jit(by_layer)
