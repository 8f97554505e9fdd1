"""The job `pretrain` from end to end on a few kB: what it learns, writes and repeats; then `eval` over its checkpoints."""
import json

import numpy as np
import pytest
from tiny_run import arguments, lines

import main
from train import checkpoint

SAMPLED = ("pretrain.sample.prompts=(('code','def '),('prose','A'))", "pretrain.sample.max_new=4", "pretrain.n_micro=1",
           "pretrain.lr.v3.peak=2e-2", "pretrain.lr.v3.warmup_steps=2", "checkpoint.every=4")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    assert main.run(arguments(folder, *SAMPLED, steps=12)) == 0
    return folder


def test_the_loss_falls_and_the_record_is_complete(run_folder):
    steps = [line for line in lines(run_folder) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert np.mean([s["main_loss"] for s in steps[-3:]]) < steps[0]["main_loss"] - 0.5
    for line in steps:
        assert set(line) == {"step", "loss", "main_loss", "mtp_loss", "moe/load", "moe/bias", "moe/balance_loss", "moe/max_violation",
                             "grad_norm",
                             "tokens", "lr"}
    events = [line["event"] for line in lines(run_folder) if "event" in line]
    assert events == ["corpus", *["eval"] * 4, "closing"]
    closing = [line for line in lines(run_folder) if line.get("event") == "closing"][0]
    assert set(closing["bits_per_byte"]) == set(closing["bigram"]) == {"code", "prose"}
    last = [line for line in lines(run_folder) if line.get("event") == "eval"][-1]
    assert last["bits_per_byte"] == closing["bits_per_byte"]
    load = np.array(last["domain_load"]["code"])  # 2 of 8 experts, each byte once
    assert load.shape == (1, 8) and load.sum() % 2 == 0 and 300 < load.sum() <= 400
    config = json.loads((run_folder / "config.json").read_text())
    assert config["pretrain"]["steps"] == 12 and config["model"]["d_model"] == 16
    assert checkpoint.steps(run_folder / "checkpoints") == [4, 8, 12]


def test_samples_come_with_each_evaluation(run_folder):
    samples = lines(run_folder, "samples.jsonl")
    assert [(s["step"], s["domain"], s["prompt"]) for s in samples] == [(k, d, p) for k in (3, 6, 9, 12) for d, p in
                                                                        (("code", "def "), ("prose", "A"))]
    assert all(isinstance(s["completion"], str) for s in samples)


def test_the_same_config_and_seed_give_the_same_run_and_another_seed_another(run_folder, tmp_path):
    assert main.run(arguments(tmp_path / "a", *SAMPLED, steps=12)) == 0
    assert lines(tmp_path / "a") == lines(run_folder) and lines(tmp_path / "a", "samples.jsonl") == lines(run_folder, "samples.jsonl")
    assert main.run(arguments(tmp_path / "b", *SAMPLED, "seed=1", "pretrain.sample.prompts=()", "pretrain.eval.every=0", steps=2)) == 0
    assert lines(tmp_path / "b")[1]["loss"] != lines(run_folder)[1]["loss"]


def test_eval_scores_every_checkpoint_and_leaves_the_run_as_it_is(run_folder, tmp_path, capsys):
    """At the job's own window and bytes the last checkpoint's score is the run's closing one; EMA weights give another."""
    before = {p: p.stat().st_mtime_ns for p in run_folder.rglob("*") if p.is_file()}
    same = ("eval.seq_len=16", "eval.max_bytes=200", "eval.batch_size=4", f"eval.path={run_folder}")
    assert main.run(arguments(tmp_path, *same, job="eval")) == 0
    assert {p: p.stat().st_mtime_ns for p in run_folder.rglob("*") if p.is_file()} == before
    scores = lines(tmp_path, "eval.jsonl")
    assert [s["step"] for s in scores] == [4, 8, 12]
    closing = [line for line in lines(run_folder) if line.get("event") == "closing"][0]
    assert scores[-1]["bits_per_byte"] == pytest.approx(closing["bits_per_byte"], rel=1e-6) and scores[-1]["bigram"] == closing["bigram"]
    last = [line for line in lines(run_folder) if line.get("event") == "eval"][-1]
    assert scores[-1]["domain_load"] == last["domain_load"]
    assert "byte bigram" in capsys.readouterr().out
    assert main.run(arguments(tmp_path, *same, "eval.ema=True", job="eval")) == 0
    averaged = lines(tmp_path, "eval.jsonl")
    assert averaged[-1]["ema"] and averaged[-1]["bits_per_byte"] != scores[-1]["bits_per_byte"]


def test_a_run_starts_from_another_runs_weights(run_folder, tmp_path):
    """init_from takes parameters and router bias, not step, moments or data; the first loss is near the other's last."""
    assert main.run(arguments(tmp_path, *SAMPLED, f"init_from.path={run_folder}", "pretrain.lr.v3.peak=0.0", "pretrain.eval.every=0",
                              "pretrain.sample.prompts=()", steps=2)) == 0
    _, params, bias = checkpoint.load_params(run_folder)
    _, mine, mine_bias = checkpoint.load_params(tmp_path)
    np.testing.assert_array_equal(params["head"], mine["head"])
    last = [line for line in lines(run_folder) if line.get("event") == "closing"][0]["bits_per_byte"]
    assert lines(tmp_path)[-1]["bits_per_byte"] == pytest.approx(last, abs=0.05)  # the router bias moved meanwhile
    assert lines(tmp_path)[1]["step"] == 1 and not np.array_equal(mine_bias, np.zeros_like(bias))
