"""Supervised fine-tuning on completions (R1 §2.3.1, §2.3.3; V3 §5.1): the mean over all completion tokens of -log p.

The job `sft` packs examples of the usual JSONL shapes (data/chat.py) into rows that keep them apart, so that the packed loss is the
unpacked one. Examples come from a file, from an earlier stage of a recipe (`traces/STAGE.jsonl`), or are traces made by rule.
"""
from __future__ import annotations

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from data import chat, corpus, packing
from data import tokenizer as tokenizers
from data.tasks import miniature
from model import sharding
from model.dtypes import at_least_f32
from model.errors import choice, leaf, named_input, require, user_input
from train import cluster, evaluate_tasks, loop, pretrain, report, schedules
from train.metrics import prepare_workdir, write_atomically

SOURCES = ("file", "stage", "traces")


def loss(logp, mask):
    """-(sum of logp over the tokens of mask) / their number: both [B, T]; masked positions may hold anything; 0 without tokens."""
    mask = jnp.asarray(mask).astype(bool)
    logp = jnp.asarray(logp)
    kept = jnp.where(mask, logp.astype(at_least_f32(logp.dtype)), 0)
    return -jnp.sum(kept) / jnp.maximum(jnp.sum(mask), 1).astype(kept.dtype)


def sft(config, workdir: str, name: str = "sft", stage: str | None = None) -> bool | None:
    """The job: config[name] = dict(epochs, batch_size, seq_len, lr, bias_rate, source=dict(kind='file' | 'stage' | 'traces', ...))."""
    path = pathlib.Path(workdir) if stage else prepare_workdir(workdir, config)
    s, sub = loop.setup(config, path, name, stage), config[name]
    batch_size, seq_len = (leaf(sub, k, int, name) for k in ("batch_size", "seq_len"))
    epochs, bias_rate = (leaf(sub, k, float, name) for k in ("epochs", "bias_rate"))
    require(epochs > 0, f"{name}.epochs", epochs, "above 0")
    require(batch_size >= 1 and seq_len >= 2, f"{name}.batch_size, seq_len", (batch_size, seq_len), "at least 1 row of 2 tokens")
    lr = schedules.parse_lr(sub.lr, f"{name}.lr")
    with named_input("data", "tokenizer"):
        spec, tokenizer = corpus.parse(config.data), tokenizers.parse(config.tokenizer)
    require(tokenizer.vocab_size <= s.cfg.vocab_size, "model.vocab_size", s.cfg.vocab_size,
            f"at least the tokenizer's {tokenizer.vocab_size}")
    documents = examples(sub.source, name, path, spec.tasks, tokenizer, s.seed)
    with user_input(f"{name}.source"):
        rows = packing.rows_of(documents, packing.Packing("isolate", "drop"), seq_len, s.seed, tokenizer.pad)
    dropped = sum(len(d["tokens"]) > seq_len for d in documents)
    steps = math.ceil(epochs * rows.n_rows / batch_size)
    if s.done is None:
        s.logger.event("examples", 0, n=len(documents), dropped=dropped, rows=rows.n_rows, steps=steps)
    print(f"{name}: {len(documents) - dropped} examples in {rows.n_rows} rows, {epochs:g} epochs are {steps} steps"
          + (f"; {dropped} longer than {seq_len} tokens are left out" if dropped else ""), flush=True)

    def knobs(step: int) -> dict:
        return dict(lr=lr(step, step / steps), clip=s.optimizer.clip, bias_rate=bias_rate, mtp_weight=0.0, n_micro=np.int32(1))

    iterator = corpus.iterate([rows], [1.0], batch_size, 1, rows=sharding.rows_here(s.mesh, batch_size))
    try:
        loop.fit(s, iterator, steps, knobs, pretrain.loss_of(s.cfg.mtp_depth))
    except loop.Stopped:
        return False
    if stage is None and jax.process_index() == 0:
        print(f"report: {report.write(path)}")


def examples(source, name: str, workdir: pathlib.Path, tasks: miniature.Spec, tokenizer, seed: int) -> list[dict]:
    """The documents of config[name].source as ids and weights (1 on completions). Raises UserError."""
    kind = choice(source["kind"], SOURCES, f"{name}.source.kind")
    if kind == "traces":
        path = write_traces(workdir, name, cold_start(source["traces"], f"{name}.source.traces", tasks, seed), tokenizer)
    else:
        path = traces_of(workdir, source["stage"]["name"]) if kind == "stage" else pathlib.Path(source["file"]["path"])
    with user_input(f"{name}.source.{kind}"):
        return [chat.encode(example, tokenizer) for example in chat.read(str(path))]


def cold_start(config, path: str, tasks: miniature.Spec, seed: int) -> list[tuple[str, str]]:
    """A few readable traces (R1 §2.3.1): right, worked, tagged, in the prompt's language; pairs (prompt, completion)."""
    n = leaf(config, "n", int, path)
    require(n >= 1, f"{path}.n", n, "a positive integer")
    rng = np.random.default_rng((seed, 0xC5))
    problems = miniature.problems(tasks, rng, n, "train", evaluate_tasks.families_of(config, path), evaluate_tasks.lengths_of(config, path))
    return [(p.prompt, miniature.completion(p)) for p in problems]


def write_traces(workdir: pathlib.Path, stage: str, pairs: list[tuple[str, str]], tokenizer) -> pathlib.Path:
    """Writes traces/STAGE.jsonl, one {"prompt", "completion"} a line, so that an SFT reads the very ids that were sampled."""
    space = "" if tokenizer.kind == "symbols" else " "
    path = traces_of(workdir, stage)
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(
            json.dumps(dict(prompt=p, completion=f"{space}{c.lstrip()}"), ensure_ascii=False) + "\n" for p, c in pairs))
    cluster.barrier("traces")
    return path


def traces_of(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    """Where a stage's traces lie."""
    return workdir / "traces" / f"{stage}.jsonl"
