"""Pretraining (V3 §4): next-token loss plus the MTP losses over packed rows of a corpus.

L = -sum_t w_t log p(t_t) / W + (lambda / D) sum_k -sum_t w_t log p^k(t_t) / W (V3 eq. 24-25 divides every depth by the same count),
W the weight of the whole batch. lr, lambda and the bias rate follow V3's schedules (schedules.py) as traced scalars.
"""
from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from data import corpus
from data import tokenizer as tokenizers
from model import sharding
from model.errors import freeze, leaf, named_input, require
from train import cluster, evaluate, loop, report, sampler, schedules
from train.cross_entropy import token_logp
from train.metrics import prepare_workdir, table


@dataclasses.dataclass(frozen=True)
class Eval:
    """Bits per byte by domain every `every` steps (0: only at the end), on the first `max_bytes` held-out bytes of each domain."""

    every: int
    max_bytes: int
    batch_size: int

    def __post_init__(self):
        require(self.every >= 0, "every", self.every, "0 or more steps")
        for name in ("max_bytes", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Completions written at each evaluation: prompts are pairs (domain, text), none by (); max_new tokens each."""

    prompts: tuple
    max_new: int
    temperature: float
    top_p: float

    def __post_init__(self):
        for pair in self.prompts:
            require(isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(x, str) for x in pair), "prompts", pair,
                    "pairs (domain, text)")
        require(self.max_new >= 1, "max_new", self.max_new, "a positive integer")


def pretrain(config, workdir: str, name: str = "pretrain", stage: str | None = None) -> bool | None:
    """The job: config[name] = dict(steps, batch_size, n_micro, seq_len, lr, ramp, mtp_weight, bias_rate, eval, sample). False: stopped."""
    path = pathlib.Path(workdir) if stage else prepare_workdir(workdir, config)
    sub = config[name]
    s = loop.setup(config, path, name, stage)
    steps, batch_size, n_micro, seq_len = (leaf(sub, k, int, name) for k in ("steps", "batch_size", "n_micro", "seq_len"))
    for key, value in dict(steps=steps, batch_size=batch_size, n_micro=n_micro).items():
        require(value >= 1, f"{name}.{key}", value, "a positive integer")
    require(seq_len >= 2, f"{name}.seq_len", seq_len, "at least 2")
    require(batch_size % n_micro == 0, f"{name}.batch_size", batch_size, f"a multiple of n_micro={n_micro}")
    ramp, lr = schedules.parse_ramp(sub.ramp, f"{name}.ramp"), schedules.parse_lr(sub.lr, f"{name}.lr")
    mtp_weight = schedules.parse_switch(sub.mtp_weight, f"{name}.mtp_weight")
    bias_rate = schedules.parse_switch(sub.bias_rate, f"{name}.bias_rate")
    evaluation, sample = freeze(Eval, sub.eval, f"{name}.eval"), freeze(Sample, sub.sample, f"{name}.sample")
    with named_input("data", "tokenizer"):
        spec, tokenizer = corpus.parse(config.data), tokenizers.parse(config.tokenizer)
    require(tokenizer.vocab_size <= s.cfg.vocab_size, "model.vocab_size", s.cfg.vocab_size,
            f"at least the tokenizer's {tokenizer.vocab_size}")

    rows = batch_size // n_micro
    here = sharding.rows_here(s.mesh, rows)
    require(ramp is None or rows <= ramp[0] <= batch_size, f"{name}.ramp.linear.start", ramp and ramp[0],
            f"batch_size / n_micro = {rows} to batch_size = {batch_size}: a ramp adds micro-batches, raise n_micro")
    plan = schedules.plan(steps, batch_size, ramp, multiple=rows)
    with named_input("data", "tokenizer"):
        iterator = corpus.make_iterator(spec, tokenizer, batch_size=rows, seq_len=seq_len, n_micro=1, seed=s.seed, rows=here)
        domains = {d: evaluate.clip_bytes(corpus.validation_documents(spec, d), evaluation.max_bytes) for d in spec.domains}
    if s.done is None:
        s.logger.event("corpus", 0, **corpus.describe(spec))

    def knobs(step: int) -> dict:
        p = plan.progress[step]
        return dict(lr=lr(step, p), clip=s.optimizer.clip, mtp_weight=mtp_weight(p), bias_rate=bias_rate(p),
                    n_micro=np.int32(plan.rows[step] // rows))

    def shape_batch(step: int, iterator) -> dict:
        """The step's micro-batches, up to the largest number with empty ones: a batch ramp compiles once."""
        parts = [next(iterator) for _ in range(plan.rows[step] // rows)]
        batch = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        if spec.packing.kind == "concat":  # one causal sequence a row: no mask but the causal one
            batch = {k: batch[k] for k in ("tokens", "weight")}
        return {k: np.pad(v, [(0, n_micro - len(v))] + [(0, 0)] * (v.ndim - 1)) for k, v in batch.items()}

    logp = evaluate.make_logp(s.cfg, s.run)

    def score(state) -> dict[str, dict]:
        return evaluate.by_domain(logp, state.params, state.router_bias, domains, tokenizer, batch_size=evaluation.batch_size,
                                  seq_len=seq_len)

    last = {}

    def look(state, progress) -> None:
        step, found = int(state.step), score(state)
        scores = found["bits_per_byte"]
        last.update({step: scores})
        s.logger.event("eval", step, **found)
        progress.note(f"{name} step {step}: held-out bits per byte " + ", ".join(f"{d} {v:.3f}" for d, v in scores.items()))
        for line in samples(state, s, sample, tokenizer):
            s.logger.sample(step, **line)
            progress.note(f"  {line['domain']}: {line['prompt']!r} -> {line['completion']!r}")

    try:
        state = loop.fit(s, iterator, steps, knobs, loss_of(s.cfg.mtp_depth), shape_batch=shape_batch, hooks={evaluation.every: look},
                         shown=("loss", "mtp_loss", "moe/max_violation"))
    except loop.Stopped:
        return False
    if stage is None:
        finish(s, steps, spec, domains, last.get(steps) or score(state)["bits_per_byte"])


@functools.lru_cache(8)
def loss_of(mtp_depth: int) -> Callable:
    """loss(output, microbatch, totals) for a model with this many MTP modules; one object a depth."""
    def loss(output, microbatch, totals):
        tokens, weight = microbatch["tokens"], microbatch["weight"]
        logp = token_logp(output.logits, tokens)
        weight, total = weight.astype(logp.dtype), totals["weight"].astype(logp.dtype)
        main = -jnp.sum(weight * logp) / total
        metrics = {"main_loss": main}
        if mtp_depth:
            depths = [mtp_loss(logits, tokens, weight, microbatch.get("segment_ids"), k) for k, logits in enumerate(output.mtp_logits)]
            metrics["mtp_loss"] = functools.reduce(jnp.add, depths) / total / mtp_depth
        return main + microbatch["knobs"]["mtp_weight"].astype(main.dtype) * metrics.get("mtp_loss", 0.0), metrics

    return loss


def mtp_loss(logits, tokens, weight, segment_ids, k: int):
    """-sum w_t log p^k(t_t): depth k's position i predicts token i+2+k, if that lies in the same segment as token i."""
    skip = 1 + k
    logp = token_logp(logits, jnp.roll(tokens, -skip, axis=1))[:, 1:-skip]  # rows cut after, not before: no copies of the logits
    weight = weight[:, 1 + skip:]
    if segment_ids is not None:
        weight = jnp.where(segment_ids[:, 1 + skip:] == segment_ids[:, :-1 - skip], weight, 0)
    return -jnp.sum(weight * logp)


def samples(state, s: loop.Setup, spec: Sample, tokenizer) -> list[dict[str, str]]:
    """One completion of each fixed prompt, as lines of samples.jsonl; the same state always writes the same."""
    if not spec.prompts:
        return []
    prompts = [[tokenizer.bos, *tokenizer.encode(text)] for _, text in spec.prompts]
    lengths, ids = [len(p) for p in prompts], np.array([(i, 0) for i in range(len(prompts))], np.int32)
    tokens = np.array([p + [0] * (max(lengths) - len(p)) for p in prompts], np.int32)
    rollout = cluster.fetch(sampler.generate(
        state.params, state.router_bias, tokens, lengths, ids, s.seed, int(state.step), s.cfg, s.run, max_new=spec.max_new,
        temperature=spec.temperature, top_p=spec.top_p, stop_ids=(tokenizer.eos,)))
    return [dict(prompt=text, completion=tokenizer.decode(rollout.tokens[i, :rollout.lengths[i]]), domain=domain)
            for i, (domain, text) in enumerate(spec.prompts)]


def finish(s: loop.Setup, steps: int, spec, domains, scores: dict[str, float]) -> None:
    """The closing table: bits per byte by domain beside a byte bigram fitted on the same split; then the report."""
    bigram = {d: evaluate.bigram_bits_per_byte(corpus.documents(spec, d, "train"), docs) for d, docs in domains.items()}
    s.logger.event("closing", steps, bits_per_byte=scores, bigram=bigram)
    if jax.process_index() == 0:
        rows = [(d, scores[d], bigram[d], "below" if scores[d] < bigram[d] else "NOT below") for d in scores]
        print(table("held-out bits per byte", ("domain", "model", "byte bigram", "model is"), rows))
        print(f"report: {report.write(s.workdir)}")
