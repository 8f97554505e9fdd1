"""SFT: loss on completions alone, packing that changes nothing, the very ids that were sampled."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_recipe

from data import chat, corpus, packing
from data import tokenizer as tokenizers
from data.tasks import miniature
from model import config as model_config
from model import transformer
from model.errors import UserError
from train import checkpoint, pretrain, rejection, sft
from train.metrics import read_jsonl
from train.step import count_totals


def parts(config):
    return corpus.parse(config.data).tasks, tokenizers.parse(config.tokenizer)


def test_packed_loss_and_gradient_are_those_of_examples_one_a_row():
    config = tiny_recipe.config()
    tasks, tokenizer = parts(config)
    cfg = model_config.parse(config.model)
    pairs = sft.cold_start(dict(n=6, families=config.cold_start.source.traces.families.to_dict(), lengths=(2, 5, 7)), "traces", tasks, 0)
    documents = [chat.encode(dict(prompt=p, completion=c), tokenizer) for p, c in pairs]
    params = jax.jit(lambda key: transformer.init(key, cfg))(jax.random.key(0))

    @jax.jit
    def loss(params, rows):
        totals = count_totals({k: v[None] for k, v in rows.items()})
        output, _ = transformer.apply(params, rows["tokens"], cfg, positions=rows["positions"], segment_ids=rows["segment_ids"])
        return pretrain.loss_of(0)(output, rows | dict(knobs=dict(mtp_weight=jnp.float32(0))), totals)[0]

    packed = packing.pack(documents, 48, tokenizer.pad)
    alone = packing.pack(documents, 24, tokenizer.pad)
    alone = {k: np.pad(v, ((0, 0), (0, 24))) for k, v in alone.items()}
    assert len(packed["tokens"]) < len(alone["tokens"]) == 6
    short = len(alone["tokens"]) - len(packed["tokens"])
    packed = {k: np.pad(v, ((0, short), (0, 0))) for k, v in packed.items()}  # one program for both
    (a, da), (b, db) = (jax.value_and_grad(loss)(params, rows) for rows in (packed, alone))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), da, db)


@pytest.mark.parametrize("kind", ["symbols", "bytes"])
def test_traces_are_read_back_as_the_ids_that_were_sampled_with_loss_on_completions_alone(kind, tmp_path):
    config = tiny_recipe.config(tokenizer__kind=kind)
    tasks, tokenizer = parts(config)
    problems = miniature.problems(tasks, np.random.default_rng(0), 5, "train")
    pairs = [(p.prompt, miniature.completion(p)) for p in problems]
    sft.write_traces(tmp_path, "here", pairs, tokenizer)
    found = sft.examples(dict(kind="stage", stage=dict(name="here")), "sft", tmp_path, tasks, tokenizer, 0)
    for (prompt, completion), document in zip(pairs, found, strict=True):
        before, after = miniature.encode_prompt(tokenizer, prompt), miniature.encode_completion(tokenizer, completion)
        assert document["tokens"].tolist() == before + after
        assert document["weight"].tolist() == [0] * len(before) + [1] * len(after)


def test_the_job_learns_its_traces_and_a_finished_one_is_left_alone(tmp_path):
    config = tiny_recipe.config(cold_start__epochs=8.0, cold_start__lr__constant__peak=2e-2, cold_start__edits=())
    sft.sft(config, str(tmp_path), "cold_start", "cold_start")
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    losses = [x["loss"] for x in lines if "event" not in x]
    assert losses[-1] < 0.7 * losses[0] and all(x["stage"] == "cold_start" for x in lines)
    kept = checkpoint.load_params(tmp_path / "checkpoints" / "cold_start")[1]
    sft.sft(config, str(tmp_path), "cold_start", "cold_start")
    jax.tree.map(np.testing.assert_array_equal, kept, checkpoint.load_params(tmp_path / "checkpoints" / "cold_start")[1])
    assert [x["loss"] for x in read_jsonl(tmp_path / "metrics.jsonl") if "event" not in x] == losses


def test_cold_start_traces_are_right_worked_tagged_in_one_language_and_not_held_out():
    config = tiny_recipe.config()
    tasks, _ = parts(config)
    spec = dict(n=40, families=dict(sum=1.0, mod=1.0, swap=1.0), lengths=(4, 5, 6, 7))
    pairs = sft.cold_start(spec, "traces", tasks, 3)
    rng = np.random.default_rng((3, 0xC5))
    problems = {p.prompt: p for p in miniature.problems(tasks, rng, 40, "train", spec["families"], spec["lengths"])}
    for prompt, text in pairs:
        look = miniature.inspect(problems[prompt], text)
        assert look["right"] and look["worked"] and look["tagged"] and look["trace_right"]
        assert not miniature.is_held_out(tasks, problems[prompt])


def problem_and_answers(tasks):
    p = miniature.problems(tasks, np.random.default_rng(1), 1, "train", {"sum": 1.0}, (4,))[0]
    p.meta["language"], steps = "en", p.meta["steps"]
    trace, a = " ".join(map(str, steps)), steps[-1]
    other = (a + 1) % 6
    good = f"<think> {trace} </think> <answer> {a} </answer>"
    mixed = f"<think> {' '.join(map(str, steps[:-1]))} {'零一二三四五'[a]} </think> <answer> {a} </answer>"
    return p, dict(good=good, wrong=f"<think> {trace} </think> <answer> {other} </answer>", bare=f"{trace}",
                   lucky=f"<think> </think> <answer> {a} </answer>", mixed=mixed, untidy=f"{good} {a}",
                   odd=f"<think> {other} {trace} </think> <answer> {a} </answer>")


@pytest.mark.parametrize(("lucky", "kept"), [
    ("trace", ["good"]), ("none", ["good", "lucky", "odd"]), ("samples", ["good", "lucky", "odd"])])
def test_rejection_keeps_what_is_right_formatted_in_one_language_once(lucky, kept):
    config = tiny_recipe.config(rejection__lucky__kind=lucky, rejection__lucky__samples__least=0.5)
    tasks, tokenizer = parts(config)
    p, texts = problem_and_answers(tasks)
    spec = rejection.parse(config.rejection, "rejection")
    found, counts = rejection.choose(spec, [p], [[*texts.values(), texts["good"]]], tokenizer)
    assert [text for _, text in found] == [texts[k] for k in kept]
    assert counts["sampled"] == 8 and counts["unique"] == len(kept)
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    strict = tiny_recipe.config(rejection__lucky__kind="samples", rejection__lucky__samples__least=0.9)
    assert rejection.choose(rejection.parse(strict.rejection, "rejection"), [p], [list(texts.values())], tokenizer)[0] == []


def test_general_examples_are_their_share_and_stand_alone_where_nothing_passed():
    config = tiny_recipe.config()
    tasks, _ = parts(config)
    spec = rejection.parse(config.rejection, "rejection")
    found = rejection.general(spec, tasks, np.random.default_rng(0), 75)
    assert len(found) == 25 and all("<think> </think>" in text for _, text in found)
    assert len(rejection.general(spec, tasks, np.random.default_rng(0), 0)) == rejection.ALONE


@pytest.mark.parametrize(("edits", "words"), [
    (dict(cold_start__source__kind="file"), "cold_start.source.file"),
    (dict(cold_start__source__kind="trace"), "cold_start.source.kind"),
    (dict(cold_start__epochs=0.0), "cold_start.epochs"),
    (dict(cold_start__seq_len=8), "cold_start.source"),
])
def test_a_mistake_is_one_line_that_names_the_leaf(edits, words, tmp_path):
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        sft.sft(tiny_recipe.config(**edits), str(tmp_path), "cold_start", "cold_start")


def test_a_bad_line_of_a_file_is_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(dict(prompt="sum 1 2 _ _ _ _ _ =", completion="3")) + "\n{broken\n")
    with pytest.raises(UserError, match=r"mine\.jsonl:2"):
        sft.sft(tiny_recipe.config(cold_start__source__kind="file", cold_start__source__file__path=str(path)), str(tmp_path), "cold_start",
                "cold_start")
