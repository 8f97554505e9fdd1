"""Bits per byte, its windows, the bigram floor, pass@k and cons@k against plain loops."""
import collections
import itertools
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

from data import tokenizer as tokenizers
from model import transformer
from train import evaluate

BYTES = tokenizers.bytes_tokenizer()


def test_bits_per_byte_of_a_known_model_by_hand():
    """A model that gives byte b after byte a probability 2^-(1 + (a + b) mod 3) costs the hand sum over bytes, whatever the windows."""
    documents = ["abcab", "z", "", "The quick brown fox: déjà vu", "\ud800 alone"]
    cost = lambda a, b: 1 + (a + b) % 3  # noqa: E731

    def logp(params, bias, tokens, weight):
        before = np.concatenate([np.zeros((len(tokens), 1), int), tokens[:, :-1]], 1)
        out = -math.log(2) * (1 + (before + tokens) % 3).astype(np.float32)
        out[:, 0] = -1e9  # never to be counted: nothing predicts a row's first token
        return out, None

    bits, n = 0, 0
    for document in documents:
        ids = [BYTES.bos, *document.encode("utf-8", "surrogatepass")]
        bits, n = bits + sum(cost(a, b) for a, b in itertools.pairwise(ids)), n + len(ids) - 1
    for batch_size, seq_len in ((2, 4), (3, 64), (1, 2), (4, 7)):
        got, _ = evaluate.score(logp, None, None, documents, BYTES, batch_size=batch_size, seq_len=seq_len)
        assert got == pytest.approx(bits / n, rel=1e-6)
    assert evaluate.score(logp, None, None, [], BYTES, batch_size=2, seq_len=4)[0] == 0


def test_the_load_of_a_domain_counts_each_of_its_tokens_once_at_the_experts_it_went_to(monkeypatch):
    """A router that reads nothing but the token: layer l sends byte b to experts (b + l) mod 5 and (b // 3) mod 5."""
    def apply(params, tokens, cfg, *, run, router_bias):
        experts = jnp.stack([jnp.stack([(tokens + layer) % 5, tokens // 3 % 5], axis=-1) for layer in (0, 1)])
        return types.SimpleNamespace(logits=jnp.zeros((*tokens.shape, 264)), experts=experts if cfg.moe else None), {}

    monkeypatch.setattr(transformer, "apply", apply)
    domains = dict(code=["def f(x): return x", "", "pass"], prose=["The quick brown fox jumps over the lazy dog."], none=[])
    logp = evaluate.make_logp(types.SimpleNamespace(moe=types.SimpleNamespace(n_routed_experts=5)), None)
    for seq_len in (4, 64):
        found = evaluate.by_domain(logp, None, None, domains, BYTES, batch_size=3, seq_len=seq_len)
        assert found["bits_per_byte"]["code"] == pytest.approx(math.log2(264)) and "none" not in found["domain_load"]
        for domain in ("code", "prose"):
            want = np.zeros((2, 5))
            for byte, layer in itertools.product("".join(domains[domain]).encode(), (0, 1)):
                want[layer, (byte + layer) % 5] += 1
                want[layer, byte // 3 % 5] += 1
            np.testing.assert_array_equal(found["domain_load"][domain], want)
    plain = evaluate.make_logp(types.SimpleNamespace(moe=None), None)
    assert set(evaluate.by_domain(plain, None, None, domains, BYTES, batch_size=3, seq_len=64)) == {"bits_per_byte"}


@pytest.mark.parametrize("seq_len", [2, 3, 8, 9, 64])
def test_windows_weigh_each_token_once_after_at_least_half_a_window(rng, seq_len):
    documents = [rng.integers(1, 250, n).tolist() for n in (0, 1, 2, 7, 8, 9, 30, 63, 64, 65)]
    rows, weights = evaluate.windows(documents, 256, seq_len)
    counted = collections.Counter()
    for row, weight in zip(rows, weights, strict=True):
        assert weight[0] == 0 and row.dtype == np.int32
        counted.update(row[weight == 1].tolist())
        first = int(np.argmax(weight))
        assert row[0] == 256 or first >= seq_len // 2
    assert counted == collections.Counter(itertools.chain(*documents)) and set(np.unique(weights)) <= {0, 1}


def test_bigram_equals_a_plain_count():
    train, held = ["abab", "ba", ""], ["abz", "b"]
    counts = collections.defaultdict(lambda: collections.defaultdict(lambda: 1 / 256))
    for document in train:
        for a, b in itertools.pairwise(["start", *document.encode()]):
            counts[a][b] += 1
    bits = 0.0
    for document in held:
        for a, b in itertools.pairwise(["start", *document.encode()]):
            total = 1 + sum(v - 1 / 256 for v in counts[a].values())
            bits -= math.log2(counts[a][b] / total)
    assert evaluate.bigram_bits_per_byte(train, held) == pytest.approx(bits / 4, rel=1e-12)
    assert evaluate.bigram_bits_per_byte([], ["abc"]) == pytest.approx(8)
    assert evaluate.bigram_bits_per_byte(["a"], []) == 0


def test_clip_bytes_keeps_the_first_bytes_and_whole_words():
    assert evaluate.clip_bytes(["abc", "de fg", "h"], 6) == ["abc", "de"]
    assert evaluate.clip_bytes(["abc", "de fg"], 5) == ["abc", "de"]  # the cut falls on the space
    assert evaluate.clip_bytes(["abc", "de fg"], 4) == ["abc"]  # half a word is none
    assert evaluate.clip_bytes(["sum 零 一 ="], 9) == ["sum 零"]
    assert evaluate.clip_bytes(["aé", "x"], 2) == ["a"]  # half a character is none; where there is nothing else, half a word stays
    assert evaluate.clip_bytes(["abc"], 99) == ["abc"]


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for n, c in ((5, 0), (5, 2), (6, 5), (4, 4)):
        right = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(sum(map(max, subsets)) / len(subsets), abs=1e-12)
    for bad in ((3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)):
        with pytest.raises(ValueError, match="pass_at_k: found"):
            evaluate.pass_at_k(*bad)


@pytest.mark.parametrize("answers, k, right", [
    (["4", "5", "5"], 3, 0.0), (["4", "5", "5", "4", "4"], 5, 1.0), (["4", "5"], 2, 1.0), (["5", "4"], 2, 0.0),
    ([None, None, "4"], 3, 1.0), ([None], 1, 0.0), ([], 3, 0.0), (["4", "5", "5"], 1, 1.0)])
def test_cons_at_k_is_the_vote_of_the_first_k(answers, k, right):
    assert evaluate.cons_at_k(answers, "4", k) == right
