"""Evaluation: bits per byte by domain, pass@k, cons@k.

Bits per byte = total negative log-likelihood in nats / (ln 2 * UTF-8 bytes), every token of a document predicted once: long
documents are cut into windows and each document starts after <bos>. A byte bigram fitted on the training split is the floor to beat.
The same pass counts which experts these tokens went to: the load of a domain (V3 Fig. 9).
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model import transformer
from train import cluster
from train.cross_entropy import token_logp


def make_logp(cfg, run) -> Callable:
    """Jitted (params, router_bias, tokens i32 [B, T], weight [B, T]) -> (log p of each token f32 [B, T], 0 at t = 0; load [n_moe, E]: of
    the tokens with weight, those each expert of the main MoE layers was chosen for, None without experts)."""
    @jax.jit
    def logp(params, router_bias, tokens, weight):
        output, _ = transformer.apply(params, tokens, cfg, run=run, router_bias=router_bias)
        load = None
        if output.experts is not None:
            layers = jnp.arange(output.experts.shape[0])[:, None, None, None]
            load = jnp.zeros((len(layers), cfg.moe.n_routed_experts), weight.dtype)
            load = load.at[layers, output.experts].add(weight[None, :, :, None])
        return token_logp(output.logits, tokens), load

    return logp


def by_domain(logp: Callable, params, router_bias, domains: Mapping[str, Sequence[str]], tokenizer, **sizes: int) -> dict[str, dict]:
    """dict(bits_per_byte={domain: number}, domain_load={domain: load}), without the latter where a model has no experts."""
    found = {d: score(logp, params, router_bias, documents, tokenizer, **sizes) for d, documents in domains.items()}
    loads = {d: load for d, (_, load) in found.items() if load is not None}
    return dict(bits_per_byte={d: bits for d, (bits, _) in found.items()}) | (dict(domain_load=loads) if loads else {})


def score(logp: Callable, params, router_bias, documents: Sequence[str], tokenizer, *, batch_size: int, seq_len: int
          ) -> tuple[float, np.ndarray | None]:
    """(bits per byte of documents: nats of all tokens but <bos> over ln 2 times their bytes; load [n_moe, E] of the same tokens)."""
    rows, weights = windows([tokenizer.encode(d) for d in documents], tokenizer.bos, seq_len)
    n_bytes, nats, load = sum(map(len, map(utf8, documents))), 0.0, None
    for start in range(0, len(rows), batch_size):
        tokens, weight = rows[start:start + batch_size], weights[start:start + batch_size]
        short = batch_size - len(tokens)
        tokens, weight = np.pad(tokens, ((0, short), (0, 0))), np.pad(weight, ((0, short), (0, 0)))
        found, part = cluster.fetch(logp(params, router_bias, tokens, weight))
        nats -= float((found.astype(np.float64) * weight).sum())
        load = part if load is None else load + part
    return nats / (math.log(2) * max(n_bytes, 1)), load


def windows(documents: Sequence[Sequence[int]], bos: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens i32 [N, T], weight f32 [N, T]): windows that overlap by half, each token weighted in exactly one of them."""
    rows, weights = [], []
    for ids in documents:
        ids, done = [bos, *ids], 1
        while done < len(ids):
            start = 0 if done == 1 else done - seq_len // 2
            chunk = ids[start:start + seq_len]
            weight = np.zeros(seq_len, np.float32)
            weight[done - start:len(chunk)] = 1
            rows.append(chunk + [0] * (seq_len - len(chunk)))
            weights.append(weight)
            done = start + len(chunk)
    return np.array(rows, np.int32).reshape(-1, seq_len), np.array(weights, np.float32).reshape(-1, seq_len)


def utf8(text: str) -> bytes:
    """The bytes that are counted; a lone surrogate (real files hold some) is three."""
    return text.encode("utf-8", "surrogatepass")


def clip_bytes(documents: Sequence[str], max_bytes: int) -> list[str]:
    """The first documents that together hold at most max_bytes bytes; the last one is cut between two words (a tokenizer of symbols
    knows no half ones), a first one without a space between two characters."""
    kept, left = [], max_bytes
    for document in documents:
        part = utf8(document)[:left].decode(errors="ignore")
        if len(part) < len(document):
            words = part if document[len(part)].isspace() else part[:len(part) - len(part.split(" ")[-1])]
            return kept + [p for p in [words.rstrip() or part * (not kept)] if p]
        kept.append(part)
        left -= len(utf8(part))
    return kept


def bigram_bits_per_byte(train: Sequence[str], held_out: Sequence[str]) -> float:
    """Bits per byte of a byte bigram with add-1/256 smoothing fitted on `train`; a document starts after a start symbol."""
    counts = np.full((257, 256), 1 / 256)
    for document in train:
        data = np.frombuffer(utf8(document), np.uint8)
        if len(data):
            np.add.at(counts, (np.append(256, data[:-1].astype(np.int64)), data), 1)
    cost = -np.log2(counts / counts.sum(axis=1, keepdims=True))
    bits = n = 0.0
    for document in held_out:
        data = np.frombuffer(utf8(document), np.uint8)
        if len(data):
            bits, n = bits + cost[np.append(256, data[:-1].astype(np.int64)), data].sum(), n + len(data)
    return float(bits / max(n, 1))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k = 1 - C(n-c, k) / C(n, k) of n samples with c right (Chen et al. 2107.03374). Raises ValueError if k > n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k: found n={n}, c={c}, k={k}, allowed: 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def cons_at_k(answers: Sequence[Any], gold: Any, k: int) -> float:
    """1.0 if the most frequent of the first k answers is gold (None is no answer and never wins; the first seen wins a tie)."""
    votes = Counter(a for a in answers[:k] if a is not None)
    return float(bool(votes) and votes.most_common(1)[0][0] == gold)
