"""Fill in the middle: prefix-suffix-middle order for a tenth of the documents, before packing (V3 §4.1).

`begin prefix hole suffix end middle`, the document's own end following the middle. Cuts are between tokens, so a
document keeps its tokens and grows by three; all of them carry loss.
"""
import numpy as np


def chosen(n_documents: int, rate: float, seed: int) -> np.ndarray:
    """bool[n_documents]: exactly round(rate * n) of them, so that every epoch has equally many tokens."""
    mask = np.zeros(n_documents, bool)
    mask[np.random.default_rng((seed, 0xF1)).permutation(n_documents)[: round(rate * n_documents)]] = True
    return mask


def rearrange(ids: np.ndarray, rng: np.random.Generator, tokenizer) -> np.ndarray:
    """int32[n] -> int32[n + 3]: two cuts drawn evenly over the n + 1 gaps; empty parts may occur."""
    low, high = np.sort(rng.integers(0, len(ids) + 1, 2))
    begin, hole, end = (np.asarray([tokenizer.special(f"fim_{n}")], np.int32) for n in ("begin", "hole", "end"))
    return np.concatenate([begin, ids[:low], hole, ids[high:], end, ids[low:high]]).astype(np.int32)


def restore(ids: np.ndarray, tokenizer) -> np.ndarray:
    """The inverse of `rearrange`: prefix, middle, suffix joined again (ids without the three marks)."""
    hole, end = (int(np.flatnonzero(ids == tokenizer.special(f"fim_{n}"))[0]) for n in ("hole", "end"))
    return np.concatenate([ids[1:hole], ids[end + 1 :], ids[hole + 1 : end]])
