"""The recipe: stages from named checkpoints, exact resume inside one, mistakes refused before anything runs, a report at every moment."""
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_recipe

from configs import r1, r1_controls, rl, sft
from data import tokenizer as tokenizers
from model import config as model_config
from model.errors import UserError, freeze
from train import ablate, checkpoint, recipe, rejection, rl_loop
from train.metrics import read_jsonl

STAGES = ("base", "gate", "r1_zero", "cold_start", "rejection", "sft")
TIMES = {"step_time", "rollout_time", "tokens_per_s", "compile_s", "run_s", "evaluation_s"}


def config(**edits):
    """Every kind of stage once; SFT starts from the base."""
    return tiny_recipe.config(*STAGES, rejection__init_from="r1_zero", **edits)


def lines(path):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_jsonl(path / "metrics.jsonl")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "run"
    recipe.r1(config(), str(path))
    return path


def test_every_line_carries_its_stage_and_every_stage_leaves_what_it_should(run):
    found = lines(run)
    assert all("stage" in line for line in found) and list(dict.fromkeys(line["stage"] for line in found)) == list(STAGES)
    assert all(("event" in line) != ("loss" in line) for line in found)
    finals = [line["stage"] for line in found if line.get("event") == "evaluation" and line.get("final")]
    assert finals == [s for s in STAGES if s != "rejection"]
    assert [line["stage"] for line in found if line.get("event") == "budget"] == list(STAGES)
    assert {line["claim"] for line in found if line.get("event") == "claim"}
    gate = [line for line in found if line.get("event") == "gate"]
    assert [line["step"] for line in gate] == [0, 4] and not gate[0]["passed"]  # a random base goes one round, the bound
    assert (run / "traces" / "rejection.jsonl").exists() and (run / "report.html").stat().st_size > 10_000
    for stage in finals:
        checkpoint.find(run / "checkpoints" / stage)
    prompts = {s: [x["prompt"] for x in read_jsonl(run / "samples.jsonl") if x["stage"] == s and x.get("final")] for s in ("base", "sft")}
    assert prompts["base"] == prompts["sft"] and prompts["base"]  # so that two stages can be laid side by side


def test_a_finished_recipe_is_left_as_it_is(run, capsys):
    before = lines(run)
    recipe.r1(config(), str(run))
    assert capsys.readouterr().out.count("finished before") == len(STAGES)
    after = lines(run)
    assert sorted(map(json.dumps, after)) == sorted(map(json.dumps, before))


def test_a_recipe_killed_inside_a_stage_goes_on_to_the_same_bits(run, tmp_path):
    """As if killed in the second RL step: its first checkpoint is there, nothing after."""
    path = tmp_path / "killed"
    shutil.copytree(run, path, symlinks=True)
    stage = path / "checkpoints" / "r1_zero"
    for step in (2, 3):
        shutil.rmtree(stage / str(step))
    (stage / "final").unlink()
    (stage / "final").symlink_to("1")
    for later in ("cold_start", "sft"):
        shutil.rmtree(path / "checkpoints" / later)
    shutil.rmtree(path / "traces")
    for name in ("metrics.jsonl", "samples.jsonl"):
        kept = [x for x in read_jsonl(path / name) if STAGES.index(x["stage"]) <= 2 and x.get("event") not in ("claim", "budget")
                or x["stage"] in ("base", "gate")]
        (path / name).write_text("".join(json.dumps(x) + "\n" for x in kept))
    recipe.r1(config(), str(path))
    for name in ("r1_zero", "cold_start", "sft"):
        a, b = (checkpoint.load_params(p / "checkpoints" / name)[1] for p in (run, path))
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert (run / "traces" / "rejection.jsonl").read_text() == (path / "traces" / "rejection.jsonl").read_text()
    assert sorted(map(json.dumps, lines(run))) == sorted(map(json.dumps, lines(path)))


def test_an_interrupted_recipe_leaves_a_report(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.gate.gate", interrupted)
    c = tiny_recipe.config("base", "gate", base__steps=1)
    with pytest.raises(KeyboardInterrupt):
        recipe.r1(c, str(tmp_path))
    assert "Not begun yet: gate" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("size", r1.SIZES)
def test_every_size_is_a_recipe_whose_leaves_are_read(size, tmp_path):
    c = r1.get_config(size)
    stages = [recipe.stage_of(c, name, tmp_path) for name in recipe.names_of(c)]
    recipe.check(c, stages, tmp_path)
    for stage in stages:
        if stage.job == "rl":
            rl_loop.parse(stage.config[stage.name], stage.name)
        if stage.job == "rejection":
            rejection.parse(stage.config[stage.name], stage.name)
        cfg = model_config.parse(stage.config.model)
        assert tokenizers.parse(stage.config.tokenizer).vocab_size <= cfg.vocab_size
    n = model_config.parse(c.model).num_params()["total"]
    assert 30e6 < n < 100e6 if size == "gpu" else n < 1e6


@pytest.mark.parametrize("module", [rl, sft, r1_controls])
def test_a_stage_alone_is_a_job_with_every_leaf_of_its_subtree(module):
    c = module.get_config()
    assert c.job in c and (c.job == "ablate" or not {"edits", "job"} & set(c[c.job]))


def test_every_cell_of_the_controls_can_start(tmp_path):
    c = r1_controls.get_config()
    c.ablate.seeds = 1
    spec = freeze(ablate.Ablate, c.ablate, "ablate")
    for cell in ablate.cells(spec, 0, r1_controls.get_config, tmp_path):
        ablate.check(cell)
        rl_loop.parse(cell.config.rl, "rl")
        assert cell.config.init_from.path == f"runs/bases/seed-{cell.seed}/checkpoints/gate"
    for edit in r1_controls.ABLATIONS.values():
        assert set(ablate.read_note(edit)["predicted"]) <= set(spec.metrics)  # a prediction without a table would never be judged


@pytest.mark.parametrize(("edits", "words"), [
    (dict(recipe__stages=("base", "zero")), "recipe.stages: found 'zero'"),
    (dict(recipe__stages=("base", "base")), "each stage once"),
    (dict(recipe__stages=("base", "r1_zero")), "r1_zero.init_from: found 'gate'"),
    (dict(recipe__stages=("base", "gate", "sft")), "sft.source.stage.name: found 'rejection'"),
    (dict(base__edits=("model.width=3",)), "base.edits: found 'model.width=3'"),
    (dict(base__edits=("model.d_model='wide'",)), "base.edits"),
    (dict(gate__job="gates"), "gate.job"),
    (dict(evaluation__temperature=0.0), "evaluation.temperature"),
])
def test_mistakes_are_refused_before_anything_is_run(edits, words, tmp_path):
    with pytest.raises(UserError) as error:
        recipe.r1(config(**edits), str(tmp_path / "none"))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "none").exists()
