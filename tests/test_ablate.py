"""An ablation's table is what its cells' files say, whole pairs at a time, and every edit changes what it claims to change."""
import fcntl
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import ablate as ablate_config
from configs import ablations, deepseek_v3
from model import config as model_config
from model.errors import UserError
from train import ablate, ablation_table, report, run_record, statistics
from train.pretrain import pretrain

STEPS = 20
calls = []


def fake_job(config, workdir):
    """Writes what a run would: an effect of the edit, one of the seed, noise of both; `stop_after_s` stops it half way."""
    path = pathlib.Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    calls.append(path.parent.name + "/" + path.name)
    (path / "config.json").write_text(config.to_json_best_effort())
    kind = config.model.attention.kind
    if kind == "mqa" and config.seed == 1:
        raise FloatingPointError("pretrain: the loss is not finite at step 7")
    rng = np.random.default_rng([config.seed, len(kind)])
    bits = 2.5 + 0.3 * math.sin(config.seed) + 0.1 * (kind == "gqa") + 0.001 * rng.normal()
    lines = [{"step": i + 1, "loss": 3.0 - i / 10, "main_loss": 3.0 - i / 10, "tokens": 64.0, "step_time": 0.1, "tokens_per_s": 640.0,
              "moe/max_violation": float(rng.uniform())} for i in range(STEPS)]
    if not config.stop_after_s:
        lines.append(dict(event="closing", step=STEPS, bits_per_byte=dict(code=bits - 0.1, prose=bits + 0.1), bigram=dict(code=3.0)))
        (path / "checkpoints").mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def config_of(**changed):
    config = ablate_config.get_config()
    config.ablate.update(dict(names=("gqa", "mqa", "no_fim"), seeds=4) | changed)
    return config


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr(ablate, "JOBS", {"pretrain": f"{__name__}:fake_job"})
    calls.clear()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "JOBS", {"pretrain": f"{__name__}:fake_job"})
        ablate.ablate(config_of(), str(path))
    return path


@pytest.fixture
def table(faked, finished, tmp_path):
    """A copy of a finished ablation, and its numbers."""
    workdir = shutil.copytree(finished, tmp_path / "ablation")
    return workdir, json.loads((workdir / "ablation.json").read_text())


def bits_of(workdir, arm, seed):
    """Read by other means than the code under test."""
    lines = (workdir / "cells" / arm / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()
    found = next(line for line in map(json.loads, lines) if line.get("event") == "closing")["bits_per_byte"]
    return (found["code"] + found["prose"]) / 2


def test_the_numbers_are_rebuilt_from_metrics_jsonl(table):
    workdir, result = table
    rows = {row["name"]: row for row in result["tables"]["bits_per_byte"]}
    for name, arm, shift in (("gqa", "gqa", 0), ("no_fim", "no_fim", 0), ("A/A", "base", 4)):
        apart = [bits_of(workdir, arm, s + shift) - bits_of(workdir, "base", s) for s in range(4)]
        assert rows[name]["differences"] == pytest.approx(apart, abs=1e-12)
        half = 3.182446305284263 * np.std(apart, ddof=1) / 2
        assert rows[name]["mean"] == pytest.approx(np.mean(apart)) and rows[name]["low"] == pytest.approx(np.mean(apart) - half)
        assert rows[name]["high"] == pytest.approx(np.mean(apart) + half) and rows[name]["p"] == statistics.sign_flip_p(apart)
    assert rows["gqa"]["verdict"] == "as predicted" and rows["gqa"]["p"] == 2 / 2 ** 4
    tail = [run_record.read(workdir / "cells" / "gqa" / f"seed-{s}").steps[-2:] for s in range(4)]
    found = {row["name"]: row for row in result["tables"]["max_violation"]}["gqa"]["edit"]
    assert found == pytest.approx([np.mean([line["moe/max_violation"] for line in lines]) for lines in tail])


def test_the_a_a_arm_is_the_base_on_disjoint_seeds_and_stands_in_every_table(table):
    workdir, result = table
    assert all(rows[0]["name"] == "A/A" for rows in result["tables"].values())
    assert sorted(p.name for p in (workdir / "cells" / "base").iterdir()) == [f"seed-{s}" for s in range(8)]
    assert sorted(p.name for p in (workdir / "cells" / "gqa").iterdir()) == [f"seed-{s}" for s in range(4)]


def test_a_miss_of_zero_by_the_a_a_row_is_marked_not_hidden(faked, tmp_path, monkeypatch):
    monkeypatch.setattr(math, "sin", lambda seed: seed >= 4)  # what the second set of seeds shares
    ablate.ablate(config_of(names=("gqa",)), str(tmp_path))
    rows = json.loads((tmp_path / "ablation.json").read_text())["tables"]["bits_per_byte"]
    assert rows[0]["verdict"] == "MISSES 0" and rows[0]["low"] > 0
    assert 'class="marked"' in (tmp_path / "report.html").read_text() and "MISSES 0" in (tmp_path / "ablation.md").read_text()


def test_a_diverged_cell_stays_in_the_table_with_its_reason_and_its_pair_left_out(table):
    workdir, result = table
    row = {row["name"]: row for row in result["tables"]["bits_per_byte"]}["mqa"]
    assert row["seeds"] == [0, 2, 3] and row["n"] == 3 and row["missing"] == {"1": "pretrain: the loss is not finite at step 7"}
    for name in ("ablation.md", "report.html"):
        assert "not finite at step 7" in (workdir / name).read_text()


def test_finished_cells_are_skipped_and_half_ones_run_again(table):
    workdir, before = table
    half = workdir / "cells" / "gqa" / "seed-2" / "metrics.jsonl"
    half.write_text("".join(half.read_text().splitlines(keepends=True)[:9]))
    calls.clear()
    ablate.ablate(config_of(), str(workdir))
    assert calls == ["gqa/seed-2"]
    assert json.loads((workdir / "ablation.json").read_text()) == before
    assert not list(workdir.glob("cells/*/*/checkpoints"))


def test_a_recipe_s_cell_is_done_when_every_stage_has_its_budget(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(job="r1", recipe=dict(stages=["base", "r1_zero"]))))
    lines = [dict(stage="base", event="evaluation", step=4, worked=0.2, worked_right=None), dict(stage="base", event="budget", step=4),
             dict(stage="r1_zero", event="evaluation", step=8, worked=0.9, worked_right=0.5), dict(stage="r1_zero", event="budget", step=8)]
    for n, wanted in ((3, "half"), (4, "done")):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:n]))
        assert ablation_table.status(tmp_path) == wanted
    run = run_record.read(tmp_path)
    rise, end = ablation_table.METRICS["rise"], ablation_table.METRICS["evaluation"]
    assert rise(run, "worked") == pytest.approx(0.7) and rise(run, "worked_right") is None and end(run, "worked_right") == 0.5


def test_seeds_are_the_outer_loop_so_that_a_stop_leaves_whole_pairs(faked, tmp_path):
    ablate.ablate(config_of(seeds=2), str(tmp_path))
    arms = (("base", 0), ("base", 2), ("gqa", 0), ("mqa", 0), ("no_fim", 0))
    assert calls == [f"{arm}/seed-{s + k}" for k in range(2) for arm, s in arms]


def test_stop_after_s_writes_what_there_is(faked, tmp_path, capsys):
    config = config_of()
    config.stop_after_s = 1e-9
    ablate.ablate(config, str(tmp_path))
    assert "0 of 20 cells done" in capsys.readouterr().out and (tmp_path / "report.html").exists() and not calls


def test_processes_share_a_table_cell_by_cell_and_the_last_writes_it(table, capsys):
    """A lock is of an open file, so this test is the other process."""
    workdir, before = table
    for arm, seed in (("gqa", 2), ("base", 6)):
        (workdir / "cells" / arm / f"seed-{seed}" / "metrics.jsonl").unlink()
    (workdir / "ablation.json").unlink()
    calls.clear()
    with ablate.opened(workdir) as desk, ablate.opened(workdir / "cells" / "gqa" / "seed-2") as cell:
        fcntl.flock(desk, fcntl.LOCK_SH)
        assert ablate.hold(cell)
        ablate.ablate(config_of(), str(workdir))
        assert calls == ["base/seed-6"] and "others are at work" in capsys.readouterr().out
        assert not (workdir / "ablation.json").exists() and ablate.hold(desk)
    ablate.ablate(config_of(), str(workdir))
    assert calls == ["base/seed-6", "gqa/seed-2"] and json.loads((workdir / "ablation.json").read_text()) == before


@pytest.mark.slow
def test_three_processes_run_the_smoke_table_once(tmp_path):
    root = pathlib.Path(ablate.__file__).parent.parent
    command = [sys.executable, "main.py", "--config=configs/ablate.py:smoke", "--config.ablate.edits=('pretrain.steps=4',"
               "'pretrain.eval.max_bytes=400','pretrain.sample.prompts=()','data.max_bytes=100000')", f"--workdir={tmp_path}"]
    started = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": ""}) for _ in range(3)]
    said = "".join(process.communicate()[0] for process in started)
    assert not any(process.returncode for process in started) and said.count(": done in") == 8
    assert said.count("8 of 8 cells done") == 2 and said.count("report: ") == 1  # once for each of two metrics


def test_cells_of_other_settings_are_refused_before_anything_runs(table):
    workdir, _ = table
    calls.clear()
    with pytest.raises(UserError, match=r"other settings.*pretrain\.steps"):
        ablate.ablate(config_of(edits=("pretrain.steps=7",)), str(workdir))
    assert not calls
    for config in workdir.glob("cells/base/*/config.json"):  # a kind that came later, or went
        read = json.loads(config.read_text())
        read["model"]["attention"]["mystery"] = dict(n_heads=3)
        config.write_text(json.dumps(read))
    ablate.ablate(config_of(), str(workdir))
    assert not calls


def test_a_report_is_rebuilt_without_running(table):
    workdir, before = table
    report.report(ConfigDict(dict(report=dict(runs=()))), str(workdir))
    source = (workdir / "report.html").read_text()
    for name in ("report.html", "ablation.json", "ablation.md"):
        (workdir / name).unlink()
    shutil.rmtree(workdir / "plots")
    assert report.write(workdir).read_text() == source and not calls
    assert json.loads((workdir / "ablation.json").read_text()) == before
    assert {p.name for p in (workdir / "plots").iterdir()} >= {"ablation_bits_per_byte.png", "ablation_loss.png"}


@pytest.mark.parametrize(("low", "high", "sign", "wanted"), [
    (0.01, 0.2, "up", "as predicted"), (-0.2, -0.01, "up", "opposite"), (-0.01, 0.2, "up", "undecided"),
    (-0.2, -0.01, "down", "as predicted"), (0.01, 0.2, "down", "opposite"), (None, None, "down", "undecided"),
    (-0.01, 0.015, "same", "as predicted"), (-0.01, 0.03, "same", "undecided"), (0.03, 0.05, "same", "opposite"), (0.1, 0.2, None, None)])
def test_verdicts_are_the_interval_s(low, high, sign, wanted):
    assert ablation_table.verdict(dict(name="x", low=low, high=high, predicted=sign), margin=0.02) == wanted


@pytest.mark.parametrize(("changed", "message"), [
    (dict(names=("nope",)), "found 'nope'"), (dict(names=()), "ablate.names"), (dict(names=("base",)), "base and A/A always run"),
    (dict(seeds=0), "ablate.seeds"), (dict(metrics=("perplexity",)), "ablate.metrics: found 'perplexity'"),
    (dict(base="nope:tiny"), "found base 'nope'"), (dict(base="deepseek_v3:nope"), "found 'nope'"), (dict(file="nope.py"), "ablate.file"),
    (dict(edits=("pretrain.stepz=3",)), "pretrain.stepz=3"), (dict(edits=("pretrain.steps=many",)), "pretrain.steps=many"),
    (dict(edits=("pretrain=3",)), "ablate.edits"), (dict(edits=("model.ffn.moe.n_activated_experts=99",)), "n_activated_experts: found 99"),
    (dict(checkpoints="burn"), "ablate.checkpoints")])
def test_bad_input_is_one_line_before_the_first_run(changed, message, faked, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        ablate.ablate(config_of(**changed), str(tmp_path))
    assert "\n" not in str(error.value) and not calls


def test_edits_reach_every_cell_and_know_its_seed(tmp_path):
    spec = ablate.freeze(ablate.Ablate, config_of(edits=("pretrain.steps=7", "init_from.path=bases/{seed}")).ablate, "ablate")
    made = ablate.cells(spec, 10, ablations.get_config, tmp_path)
    assert {c.config.pretrain.steps for c in made} == {7} and all(c.config.init_from.path == f"bases/{c.seed}" for c in made)
    assert sorted({c.seed for c in made if c.arm == "A/A"}) == [14, 15, 16, 17]


def test_every_edit_has_a_note_and_makes_another_model_or_run():
    assert len(ablations.ABLATIONS) >= 15
    base = deepseek_v3.get_config("tiny")
    for name, edit in ablations.ABLATIONS.items():
        note = ablate.read_note(edit)
        assert note["claim"].endswith(".") and note["source"]
        if name != "base":
            assert note["predicted"], name
            read = run_record.leaves_read(ablations.get_config(name).to_dict())
            assert read != run_record.leaves_read(base.to_dict()), name


def test_edits_that_say_equal_flops_keep_them():
    def active(name):
        cfg = model_config.parse(ablations.get_config(name).model)
        return cfg.flops_per_token(128)["training"], cfg.num_params()["total"]

    flops, total = active("base")
    for name in ("fine", "coarse", "no_shared", "dense"):
        assert active(name)[0] == pytest.approx(flops, rel=0.005), name
    for name in ("fine", "coarse"):
        assert active(name)[1] == pytest.approx(total, rel=0.005), name


def test_a_name_runs_on_another_base():
    config = ablations.get_config("mqa@deepseek_v3:700m")
    assert config.model.attention.kind == "mqa" and config.model.d_model == 1024
    assert ablations.get_config("mqa").model.d_model == 128
    with pytest.raises(ValueError, match="found 'nope'"):
        ablations.get_config("nope@deepseek_v3:tiny")


def test_what_only_times_or_looks_leaves_a_table_as_it_is():
    config, other = deepseek_v3.get_config("tiny"), deepseek_v3.get_config("tiny")
    other.speed.repeats, other.probe.seq_len, other.model.attention.gqa.head_dim = 99, 64, 16  # another job's, a kind's not chosen
    assert run_record.deciding_leaves(ablate.as_json(config)) == run_record.deciding_leaves(ablate.as_json(other))
    other.optimizer.weight_decay = 0.0
    assert run_record.deciding_leaves(ablate.as_json(config)) != run_record.deciding_leaves(ablate.as_json(other))


def tiny_run(config, workdir):
    config = config.copy_and_resolve_references()
    m = config.model
    m.update(dict(d_model=32, n_layers=1, n_dense_layers=1, d_ff=32, mtp_depth=0))
    m.ffn.kind = "dense"
    m.attention.mla.update(dict(n_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8))
    config.pretrain.update(dict(steps=3, batch_size=8, seq_len=32))
    config.pretrain.sample.prompts = ()
    config.pretrain.eval.update(dict(max_bytes=400, every=0))
    config.data.max_bytes = 60_000
    config.seed = 5
    pretrain(config, str(workdir))
    return workdir


def test_the_same_config_and_seed_give_identical_metrics(tmp_path):
    """What makes pairing mean something; only the clock may differ."""
    clock = ("tokens_per_s", "step_time")
    runs = [run_record.read(tiny_run(deepseek_v3.get_config("tiny"), tmp_path / name)).lines for name in "ab"]
    first, second = ([{k: v for k, v in line.items() if k not in clock} for line in lines] for lines in runs)
    assert first == second and len(first) >= 5 and first[1]["loss"] > 1
    assert (tmp_path / "a" / "report.html").exists()
