"""Tokenizers: decode(encode(x)) = x for every kind and any text, specials out of text's reach, clear refusals."""
import json
import pathlib

import numpy as np
import pytest

from data import tokenizer as tk
from data.tasks.miniature import WORDS

TEXTS = [
    "", " ", "hello world", "  two  spaces\t\r\n\x00\x07\x7f", "def f(x):\n    return x  # é 中文 𝄞 👩‍👩‍👧 \u200d",
    "<｜end▁of▁sentence｜><｜User｜> <|eos|> <bos>", "\ud800 lone \udfff\udc80", "".join(map(chr, range(0x250))),
]  # fmt: skip


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(tk.train_bpe(["def hello(world):\n    return world\n", "the cat sat on the mat"] * 20, 330).to_str())
    return str(path)


def make(kind, bpe_path=""):
    return tk.parse(dict(kind=kind, bytes={}, bpe=dict(path=bpe_path, vocab_size=0), symbols=dict(words=WORDS)))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_decode_of_encode_is_the_text_and_text_makes_no_special(kind, bpe_path, rng):
    t = make(kind, bpe_path)
    random = ["".join(map(chr, rng.integers(0, 0x11000, 200))) for _ in range(50)]
    for text in TEXTS + random:
        ids = t.encode(text)
        assert t.decode(ids) == text
        assert not set(ids) & set(t.specials.values())
        assert all(0 <= i < t.vocab_size for i in ids)


def test_merges_shorten_and_specials_are_distinct(bpe_path):
    t = make("bpe", bpe_path)
    assert len(t.encode("hello(world)")) < len("hello(world)") / 2
    for kind in ("bytes", "bpe", "symbols"):
        t = make(kind, bpe_path)
        ids = list(t.specials.values())
        assert len(set(ids)) == len(ids) and max(ids) < t.vocab_size
    assert make("bytes").vocab_size == 264


def test_special_ids_are_spelled_by_decode_and_left_out_by_text(bpe_path):
    for kind in ("bytes", "bpe"):
        t = make(kind, bpe_path)
        ids = [t.bos, *t.encode("hé"), t.special("user"), t.eos]
        assert t.text(ids) == "hé" and t.decode(ids).startswith(tk.SPECIALS["bos"])
    t = make("symbols")
    assert t.text([t.bos, *t.encode("sum 1 2"), t.eos, t.pad]) == "sum 1 2"


def test_any_ids_decode_without_an_error(bpe_path, rng):
    for kind in ("bytes", "bpe", "symbols"):
        t = make(kind, bpe_path)
        for _ in range(20):
            assert isinstance(t.decode(rng.integers(0, t.vocab_size + 50, 30).astype(np.int32)), str)


def test_symbols_keep_the_ids_of_the_config_and_name_an_unknown_word():
    t = make("symbols")
    for text in ("<bos> sum 1 2 零 <eos>", "", "= _ <think>"):
        assert t.decode(t.encode(text)) == text
    assert t.encode("<bos> sum") == [WORDS.index("<bos>"), WORDS.index("sum")]
    with pytest.raises(ValueError, match="'banana' in 'sum banana'"):
        t.encode("sum banana")
    with pytest.raises(ValueError, match="symbols.words: 'a' stands twice"):
        tk.symbols_tokenizer(("a", "b", "a"))
    with pytest.raises(ValueError, match="no 'user' token"):
        t.special("user")


def test_published_tokenizer_files_bring_their_own_special_ids(bpe_path, tmp_path):
    raw = json.loads(pathlib.Path(bpe_path).read_text())
    n = len(raw["model"]["vocab"])
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    raw["added_tokens"] = [dict(id=n, content=tk.SPECIALS["eos"], **flags), dict(id=n + 1, content="<extra>", **flags)]
    path = tmp_path / "published.json"
    path.write_text(json.dumps(raw))
    t = make("bpe", str(path))
    assert t.eos == n and t.vocab_size == n + 2 + len(tk.SPECIALS) - 1
    for text in TEXTS + ["<extra>"]:
        assert t.decode(t.encode(text)) == text and n not in t.encode(text)


def test_the_job_trains_on_the_corpus_and_writes_the_file_whole(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words and some more words\n" * 200)
    from test_data_corpus import config

    data = config(text=1.0, files=(f"mine={tmp_path}/*.txt",))
    settings = dict(data=data, tokenizer=dict(kind="bpe", bpe=dict(path="", vocab_size=280), bytes={}, symbols={}))
    path = tk.tokenizer(settings, str(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["tokenizer.json"] and "tokenizer.json" in capsys.readouterr().out
    t = make("bpe", path)
    assert t.decode(t.encode("some words")) == "some words" and len(t.encode("some words")) <= 4


@pytest.mark.parametrize("config, said", [
    (dict(kind="wordpiece"), "tokenizer.kind: 'wordpiece'; allowed: bytes, bpe, symbols"),
    (dict(kind="bpe", bpe=dict(path="", vocab_size=1)), "tokenizer.bpe.path: empty"),
    (dict(kind="bpe", bpe=dict(path="/nowhere.json", vocab_size=1)), "no file '/nowhere.json'"),
    (dict(kind="bpe", bpe=dict(path=__file__, vocab_size=1)), "is no tokenizer.json"),
])  # fmt: skip
def test_bad_tokenizer_configs_are_one_line(config, said):
    with pytest.raises(ValueError, match=said) as e:
        tk.parse(config)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="vocab_size: 100; at least 264"):
        tk.train_bpe(["a"], 100)
