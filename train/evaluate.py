"""Evaluation: bits per byte by domain, pass@k, cons@k.

Bits per byte = total negative log-likelihood in nats / (ln 2 * UTF-8 bytes), every token of a document predicted once: long
documents are cut into windows and each document starts after <bos>. A byte bigram fitted on the training split is the floor to beat.
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from model import transformer
from train.step import token_logp


def make_logp(cfg, run) -> Callable:
    """Jitted (params, router_bias, tokens i32 [B, T]) -> log p of each token f32 [B, T], 0 at t = 0."""
    @jax.jit
    def logp(params, router_bias, tokens):
        output, _ = transformer.apply(params, tokens, cfg, run=run, router_bias=router_bias)
        return token_logp(output.logits, tokens)

    return logp


def bits_per_byte(logp: Callable, params, router_bias, documents: Sequence[str], tokenizer, *, batch_size: int, seq_len: int) -> float:
    """Bits per byte of documents: nats of all tokens but <bos>, over ln 2 times their bytes."""
    rows, weights = windows([tokenizer.encode(d) for d in documents], tokenizer.bos, seq_len)
    n_bytes, nats = sum(map(len, map(utf8, documents))), 0.0
    for start in range(0, len(rows), batch_size):
        tokens, weight = rows[start:start + batch_size], weights[start:start + batch_size]
        short = batch_size - len(tokens)
        tokens, weight = np.pad(tokens, ((0, short), (0, 0))), np.pad(weight, ((0, short), (0, 0)))
        nats -= float((np.asarray(logp(params, router_bias, tokens), np.float64) * weight).sum())
    return nats / (math.log(2) * max(n_bytes, 1))


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
    """The first documents that together hold max_bytes bytes, the last one cut."""
    kept, left = [], max_bytes
    for document in documents:
        if left <= 0:
            break
        kept.append(utf8(document)[:left].decode(errors="ignore"))
        left -= len(utf8(kept[-1]))
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
