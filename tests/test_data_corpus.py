"""The corpus: split by file, the same everywhere, batches by the contract, exact resume."""
import copy

import numpy as np
import pytest

from data import corpus
from data import tokenizer as tk
from data.tasks.miniature import WORDS

BYTES = tk.bytes_tokenizer()


def config(code=0.0, prose=0.0, text=0.0, tasks=0.0, files=(), kind="concat", fim=0.1, max_bytes=200_000):
    families = dict(sum=1.0, mod=1.0, swap=1.0, walk=0.33, relay=0.0, countdown=0.0)
    return dict(
        weights=dict(code=code, prose=prose, text=text, tasks=tasks), max_bytes=max_bytes, text=dict(files=files),
        validation_every=16, fim=dict(rate=fim), threads=1,
        packing=dict(kind=kind, concat={}, isolate=dict(long="split")),
        tasks=dict(digits=6, base=2, modulus=5, families=families, lengths=(30, 20, 14, 12, 12, 12), worked=0.2, tagged=0.6,
                   trace=dict(same=0.75, other=0.05, mixed=0.2), prompt_weight=0.05, held_out=16),
    )  # fmt: skip


@pytest.fixture(scope="module")
def python():
    return corpus.parse(config(code=0.5, prose=0.5))


def test_the_python_corpus_is_real_text_split_without_overlap(python):
    for domain, sign in (("code", "def "), ("prose", " the ")):
        train, validation = (corpus.documents(python, domain, s) for s in ("train", "validation"))
        assert train and validation and not set(train) & set(validation)
        assert sum(sign in d for d in train) > 0.5 * len(train)
        assert list(validation) == corpus.validation_documents(python, domain)


def test_the_docstrings_of_a_validation_file_are_not_in_the_code_trained_on():
    whole = corpus.parse(config(code=0.5, prose=0.5, max_bytes=2_000_000))
    heads = [text[:200] for text in corpus.validation_documents(whole, "prose") if len(text) > 200]
    train, validation = ("\n".join(corpus.documents(whole, "code", s)) for s in ("train", "validation"))
    assert not [h for h in heads if h in train] and sum(h in validation for h in heads) > 2


def test_describe_is_deterministic_and_follows_the_contents(python):
    a, b = corpus.describe(python), corpus.describe(corpus.parse(config(code=0.5, prose=0.5)))
    assert a == b and set(a) == {"hash", "python", "bytes"} and set(a["bytes"]["code"]) == {"train", "validation"}
    assert 150_000 < sum(a["bytes"]["prose"].values()) < 800_000
    assert corpus.describe(corpus.parse(config(code=1.0)))["hash"] != a["hash"]


@pytest.mark.parametrize("kind", ["concat", "isolate"])
def test_batches_keep_the_contract(python, kind):
    spec = corpus.parse(config(code=0.5, prose=0.5, kind=kind))
    iterator = corpus.make_iterator(spec, BYTES, batch_size=8, seq_len=64, n_micro=2, seed=0)
    for _ in range(5):
        batch = next(iterator)
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            name: ((2, 4, 64), np.dtype(t)) for name, t in
            dict(tokens="int32", segment_ids="int32", positions="int32", weight="float32").items()
        }  # fmt: skip
        first = np.diff(batch["segment_ids"], axis=-1, prepend=-1) != 0
        assert not batch["weight"][first].any() and not batch["positions"][first].any()
        assert (batch["weight"][~first & (batch["segment_ids"] > 0)] == 1).all()
        assert batch["tokens"].max() < BYTES.vocab_size


@pytest.mark.parametrize("name", ["python", "tasks", "all"])
def test_set_state_resumes_exactly_and_seeds_differ(name):
    weights = dict(python=dict(code=0.5, prose=0.5), tasks=dict(tasks=1.0), all=dict(code=1.0, prose=2.0, tasks=3.0))[name]
    spec = corpus.parse(config(**weights))

    def make(seed=0):
        return corpus.make_iterator(spec, BYTES, batch_size=4, seq_len=48, n_micro=1, seed=seed)

    a = make()
    for _ in range(3):
        next(a)
    state = copy.deepcopy(a.get_state())
    expected = [next(a) for _ in range(4)]
    b = make()
    b.set_state(state)
    for batch in expected:
        again = next(b)
        assert all((batch[k] == again[k]).all() for k in batch)
    assert (next(make(1))["tokens"] != next(make())["tokens"]).any()


def test_mixture_follows_the_weights():
    spec = corpus.parse(config(code=1.0, tasks=3.0, kind="isolate"))
    iterator = corpus.make_iterator(spec, BYTES, batch_size=40, seq_len=64, n_micro=1, seed=0)
    rows = np.concatenate([next(iterator)["tokens"][0] for _ in range(5)])
    of_tasks = np.mean([any(f in BYTES.decode(r) for f in ("answer>", " _ =", " = ")) and "_" in BYTES.decode(r) for r in rows])
    assert abs(of_tasks - 0.75) < 0.1


def test_fim_documents_appear_at_the_rate():
    spec = corpus.parse(config(prose=1.0, fim=0.5))
    rows = corpus._rows(spec, BYTES, "prose", seq_len=64, seed=0, split="train")
    tokens = np.concatenate([rows[i]["tokens"] for i in range(rows.n_rows)])
    n = (tokens == BYTES.bos).sum()
    assert n == (tokens == BYTES.eos).sum() == len(corpus.documents(spec, "prose", "train"))
    assert all((tokens == BYTES.special(f"fim_{m}")).sum() == round(n * 0.5) for m in ("begin", "hole", "end"))


def test_task_rows_weigh_prompts_down_and_hold_whole_documents():
    words = tk.symbols_tokenizer(WORDS)
    spec = corpus.parse(config(tasks=1.0, kind="isolate"))
    batch = next(corpus.make_iterator(spec, words, batch_size=16, seq_len=48, n_micro=1, seed=0))
    for tokens, segments, weight in zip(*(batch[k][0] for k in ("tokens", "segment_ids", "weight")), strict=True):
        for s in range(1, segments.max() + 1):
            at = segments == s
            text = words.decode(tokens[at]).split(" ")
            assert text[0] == "<bos>" and text[9] == "=" and text[-1] == "<eos>"
            assert weight[at][0] == 0 and np.allclose(weight[at][1:10], 0.05) and (weight[at][10:] == 1).all()


def test_user_files_become_domains_of_their_own(tmp_path):
    for i in range(40):
        (tmp_path / f"n{i}.txt").write_text(f"novel {i} " * 20)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "line \u2028 {i}"}}\n' for i in [*range(64), 5, 6]), encoding="utf-8")
    (tmp_path / "one.md").write_text("x" * 1600)
    spec = corpus.parse(config(text=1.0, files=(f"novels={tmp_path}/*.txt", f"{tmp_path}/a.jsonl", f"one={tmp_path}/one.md")))
    assert spec.domains == ("novels", "text", "one")
    train, held = (corpus.documents(spec, "novels", s) for s in ("train", "validation"))
    assert len(train) + len(held) == 40 and 0 < len(held) < 10
    assert len(corpus.documents(spec, "text", "train")) + len(corpus.validation_documents(spec, "text")) == 64
    assert [len(corpus.documents(spec, "one", s)[0]) for s in ("train", "validation")] == [1500, 100]


@pytest.mark.parametrize("change, said", [
    (dict(), "data.weights: .*at least one above"),
    (dict(code=-1.0, prose=2.0), "data.weights: .*none below 0"),
    (dict(text=1.0), "data.text.files: empty"),
    (dict(text=1.0, files=("/nowhere/*.txt",)), "data.text.files: '/nowhere/\\*.txt' matches no file"),
    (dict(text=1.0, files=(f"code={__file__}",)), "names the domain 'code'"),
    (dict(code=1.0, fim=1.5), "data.fim.rate: 1.5; a share from 0 to 1"),
    (dict(code=1.0, max_bytes=-1), "data.max_bytes: -1; a whole number of at least 0"),
    (dict(code=1.0, kind="best"), "data.packing.kind: 'best'"),
])  # fmt: skip
def test_bad_data_configs_are_one_line(change, said):
    with pytest.raises(ValueError, match=said) as e:
        corpus.parse(config(**change))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("line, said", [("{bad", "a.jsonl:2: not JSON"), ('{"txt": 1}', "a.jsonl:2: found .*text")])
def test_bad_lines_name_file_and_line(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    spec = corpus.parse(config(text=1.0, files=(f"{tmp_path}/a.jsonl",)))
    with pytest.raises(ValueError, match=said):
        corpus.documents(spec, "text", "train")


def test_rows_that_do_not_divide_are_refused(python):
    with pytest.raises(ValueError, match="batch_size: 7 rows do not divide into 2 micro-batches"):
        corpus.make_iterator(python, BYTES, batch_size=7, seq_len=16, n_micro=2, seed=0)
