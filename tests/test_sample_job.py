"""The jobs sample and chat: text that streams whole characters, thinking set apart, and answers of every sort of checkpoint."""
import functools
import io
import sys

import numpy as np
import pytest
import tiny_model
from ml_collections import ConfigDict
from rich.console import Console

from configs import deepseek_v3
from data import tokenizer as tokenizers
from model import config as model_config
from model import hf
from model.errors import UserError
from train import checkpoint, sample, sampler

TEXT = "naïve café: 日本語 and 😀👍🏽, done\n<think>"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A tokenizer of each kind and text that it knows."""
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(tokenizers.train_bpe([TEXT * 3, "plain words"], 300).to_str(), encoding="utf-8")
    return {
        "bytes": (tokenizers.bytes_tokenizer(), TEXT),
        "bpe": (tokenizers.bpe_tokenizer(str(path), 0), TEXT + " plain wörds"),
        "symbols": (tokenizers.symbols_tokenizer(("sum", "三", "=", "<think>")), "sum 三 三 = <think> sum"),
    }


@pytest.mark.parametrize("kind", ["bytes", "bpe", "symbols"])
def test_text_streams_in_whole_characters(kinds, kind):
    tokenizer, text = kinds[kind]
    ids = tokenizer.encode(text)
    pieces = list(sample.text_pieces(iter(ids), tokenizer.decode))
    assert "".join(pieces) == text and all(pieces) and not any(sample.UNFINISHED in piece for piece in pieces)
    assert len(pieces) > len(text) // 4  # it does stream
    for cut in range(1, 4 if kind == "symbols" else 2):  # after a prompt: its last token decides whether a space comes between
        after = "".join(sample.text_pieces(iter(ids[cut:]), tokenizer.decode, ids[:cut][-1:]))
        assert tokenizer.decode(ids[:cut]) + after == text


def test_broken_bytes_stream_as_they_decode(rng, kinds):
    tokenizer, _ = kinds["bytes"]
    for _ in range(200):
        ids = [int(i) for i in rng.choice([0x41, 0xC3, 0xA9, 0xE6, 0x97, 0xA5, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 257], 12)]
        assert "".join(sample.text_pieces(iter(ids), tokenizer.decode)) == tokenizer.decode(ids)


def test_thinking_is_set_apart_however_the_text_is_cut(rng):
    text = "a<think>b < c</thin</think>d<think></think>e</think>f<think>open <thi"
    thinking = np.repeat([False, True, False, True, False, True], [1, 26, 1, 15, 10, 16])
    for _ in range(100):
        cuts = np.sort(rng.integers(0, len(text) + 1, 6)).tolist()
        parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        out = list(sample.set_apart(iter(parts)))
        assert "".join(t for t, _ in out) == text
        assert np.array_equal(np.concatenate([[apart] * len(t) for t, apart in out]), thinking)
    assert list(sample.set_apart(iter(["so</think>x"]), True)) == [("so</think>", True), ("x", False)]


def test_nothing_printed_steers_the_terminal():
    assert sample.printable("a\x1b[2Jb\ud800\n\tc") == "a\ufffd[2Jb\ufffd\n\tc"


@functools.cache
def model(seed: int):
    tree = tiny_model.tiny_config(vocab_size=264)
    cfg = model_config.parse(tree)
    return tree.to_dict(), cfg, tiny_model.init(cfg, seed), np.zeros((cfg.n_moe_layers + 1, cfg.moe.n_routed_experts), np.float32)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two checkpoints of ours and a Hugging Face directory of the first."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        tree, _, params, bias = model(seed)
        checkpoint.save_params(root / f"run{seed}" / "checkpoints", 5, tree, params, bias)
    _, cfg, params, bias = model(0)
    hf.save(root / "published", cfg, params, bias)
    return root


def job(path, **edits):
    config = deepseek_v3.get_config("tiny").unlock()
    config.sample = ConfigDict(dict(prompt="hé", n=1, max_new=8, temperature=0.0, top_p=1.0, checkpoints=(), template=dict(kind="raw"),
                                    draft=dict(kind="none")))
    config.init_from.path = str(path)
    config.sample.update(edits)
    return config


def expected(seed: int, prompt: str = "hé") -> str:
    _, cfg, params, bias = model(seed)
    tokenizer = tokenizers.bytes_tokenizer()
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    run = model_config.parse_run(deepseek_v3.get_config("tiny").run)
    new = list(sampler.stream(params, bias, ids, cfg, run, max_new=8, temperature=0.0, stop_ids=(tokenizer.eos,)))
    return sample.printable(tokenizer.decode([i for i in new if i != tokenizer.eos]))


def test_sample_prints_prompt_and_answer_of_our_runs_and_of_published_directories(runs, capsys):
    for path in (runs / "run0" / "checkpoints" / "final", runs / "run0" / "checkpoints" / "5", runs / "published"):
        sample.sample(job(path), "unused")
        out = capsys.readouterr().out
        assert out.startswith("hé" + expected(0)) and "8 tokens" in out and "drafts" not in out


def test_sample_drafts_by_mtp_without_changing_the_greedy_answer(runs, capsys):
    sample.sample(job(runs / "run0" / "checkpoints" / "final", draft=dict(kind="mtp")), "unused")
    out = capsys.readouterr().out
    assert out.startswith("hé" + expected(0)) and "drafts kept" in out


def test_two_checkpoints_answer_side_by_side(runs):
    plan = sample.parse(job(runs / "run0" / "checkpoints" / "final", checkpoints=(str(runs / "run1" / "checkpoints"),)))
    speakers = sample.load(plan, dict(kind="bytes", bytes=dict()))
    console = Console(file=io.StringIO(), width=200)
    prompts = [sample.TEMPLATES["raw"]("hé", s.tokenizer) for s in speakers]
    texts = sample.answer(console, speakers, prompts, 0, "hé")
    assert [sample.printable(t) for t in texts] == [expected(0), expected(1)] and texts[0] != texts[1]
    printed = console.file.getvalue()
    assert all(f"{speaker.name}: 8 tokens" in printed for speaker in speakers)


def test_chat_answers_with_the_talk_so_far(runs, capsys, monkeypatch):
    seen, render = [], sample.chats.render
    monkeypatch.setattr(sample.chats, "render", lambda talk, *a, **k: seen.append([m["role"] for m in talk]) or render(talk, *a, **k))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand?\n\nnever asked\n"))
    sample.chat(job(runs / "run0" / "checkpoints" / "final", max_new=4), "unused")
    assert seen == [["user"], ["user", "assistant", "user"]]
    assert capsys.readouterr().out.count(" tokens/s") == 2


@pytest.mark.parametrize("edit, text", [
    (dict(n=0), "sample.n: found 0"), (dict(temperature=-1.0), "temperature: found -1.0"), (dict(top_p=2.0), "top_p: found 2.0"),
    (dict(max_new="many"), "sample.max_new: found 'many'"), (dict(template=dict(kind="xml")), "sample.template.kind: found 'xml'"),
    (dict(checkpoints=("nowhere",)), "nowhere")])
def test_bad_settings_are_one_line(runs, edit, text):
    config = job(runs / "run0" / "checkpoints" / "final")
    for name, value in edit.items():
        with config.sample.ignore_type():
            config.sample[name] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(UserError, match=text) as error:
        sample.sample(config, "unused")
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(runs):
    config = job(runs / "run0" / "checkpoints" / "final")
    config.tokenizer = dict(kind="symbols", symbols=dict(words=tuple(f"w{i}" for i in range(300))))
    with pytest.raises(UserError, match="tokenizer: found 303 ids, allowed: at most the 264"):
        sample.sample(config, "unused")
    with pytest.raises(UserError, match="init_from.path"):
        sample.sample(job(""), "unused")
