"""Bad input: exit code 2 and one line on stderr that names the field, what was found and what is allowed; a bug keeps its traceback."""
import os
import pathlib
import subprocess
import sys

import pytest
from tiny_run import arguments

import main
from train import pretrain

ROOT = pathlib.Path(main.__file__).parent

# name -> (arguments after the smallest run's, words that the line must hold)
CASES = {
    # flags and files
    "positional": (["stray"], ["arguments", "'stray'", "flags only"]),
    "unknown_flag": (["--wrkdir=x"], ["wrkdir", "workdir"]),
    "unknown_leaf": (["--config.model.d_modell=32"], ["config.model.d_modell", "unknown leaf", "config.model.d_model"]),
    "unknown_leaf_elsewhere": (["--config.seq_len=32"], ["config.seq_len", "config.pretrain.seq_len"]),
    "unknown_subtree": (["--config.modle.d_model=32"], ["config.modle.d_model", "config.model.d_model"]),
    "subtree_for_leaf": (["--config.model.attention=gqa"], ["config.model.attention", "subtree", "leaves"]),
    "no_value": (["--config.seed"], ["config.seed", "Missing value"]),
    "text_for_int": (["--config.model.d_model=wide"], ["config.model.d_model", "'wide'", "int"]),
    "float_for_int": (["--config.model.d_model=32.5"], ["config.model.d_model", "'32.5'", "int"]),
    "text_for_float": (["--config.pretrain.lr.v3.peak=high"], ["config.pretrain.lr.v3.peak", "'high'", "float"]),
    "other_kind": (["--config.model.attention.gqa.n_heads=2"], ["config.model.attention.gqa", "not chosen", "kind='mla'"]),
    "other_kind_of_schedule": (["--config.pretrain.lr.cosine.peak=1.0"], ["config.pretrain.lr.cosine", "kind='v3'"]),
    "job": (["--config.job=pretrian"], ["job", "'pretrian'", "did you mean 'pretrain'"]),
    "no_config_file": (["--config=configs/nothing.py"], ["config", "configs/nothing.py", "configs/deepseek_v3.py"]),
    "config_argument": (["--config=configs/deepseek_v3.py:huge"], ["'huge'", "671b"]),
    "config_not_python": (["--config=README.md"], ["config", "README.md", "Python file"]),
    # model, run, mesh
    "no_layers": (["--config.model.n_layers=0"], ["model.n_layers", "0", "positive"]),
    "dense_layers": (["--config.model.n_dense_layers=9"], ["model.n_dense_layers", "9", "n_layers=2"]),
    "attention_kind": (["--config.model.attention.kind=mqla"], ["model.attention.kind", "'mqla'", "mla"]),
    "experts": (["--config.model.ffn.moe.n_activated_experts=99"], ["n_activated_experts", "99"]),
    "groups": (["--config.model.ffn.moe.groups.limited.n_expert_groups=3"], ["n_expert_groups", "3", "divisor"]),
    "mtp_depth": (["--config.model.mtp_depth=-1"], ["model.mtp_depth", "-1", "0 to 8"]),
    "not_finite": (["--config.model.init_std=nan"], ["model.init_std", "nan", "finite"]),
    "precision": (["--config.run.precision.kind=fp4"], ["run.precision.kind", "'fp4'", "bf16"]),
    "remat": (["--config.run.remat.kind=some"], ["run.remat.kind", "'some'", "full"]),
    "mesh_too_large": (["--config.mesh.tensor=64"], ["mesh", "64", "8 devices"]),
    "mesh_zero": (["--config.mesh.fsdp=0"], ["mesh.fsdp", "0", "positive"]),
    "mesh_free_twice": (["--config.mesh.fsdp=-1", "--config.mesh.expert=-1"], ["mesh", "at most one"]),
    # optimizer
    "rule_pattern": (["--config.optimizer.rules=(('no_such','decay',0.0),)"], ["optimizer.rules", "no_such", "dense/attention"]),
    "rule_shape": (["--config.optimizer.rules=(('norm','decay'),)"], ["optimizer.rules[0]", "(pattern, field, value)"]),
    "rule_field": (["--config.optimizer.rules=(('norm','speed',1.0),)"], ["optimizer.rules[0] field", "'speed'", "freeze"]),
    "rule_regex": (["--config.optimizer.rules=(('(','decay',1.0),)"], ["optimizer.rules[0]", "regular expression"]),
    "optimizer_kind": (["--config.optimizer.kind=sgd"], ["optimizer.kind", "'sgd'", "muon"]),
    "beta": (["--config.optimizer.adamw.b1=1.5"], ["optimizer.adamw.b1", "1.5"]),
    "moment_dtype": (["--config.optimizer.adamw.moment_dtype=fp16"], ["moment_dtype", "'fp16'", "bfloat16"]),
    "clip": (["--config.optimizer.clip=0.0"], ["optimizer.clip", "0.0", "positive"]),
    "ema_decay": (["--config.optimizer.ema.host.decay=1.0"], ["optimizer.ema.host.decay", "1.0"]),
    # the job and its schedules
    "steps": (["--config.pretrain.steps=0"], ["pretrain.steps", "0", "positive"]),
    "batch": (["--config.pretrain.batch_size=5"], ["pretrain.batch_size", "5", "n_micro=2"]),
    "seq_len": (["--config.pretrain.seq_len=1"], ["pretrain.seq_len", "1", "at least 2"]),
    "lr_kind": (["--config.pretrain.lr.kind=step"], ["pretrain.lr.kind", "'step'", "multi_step"]),
    "lr_bounds": (["--config.pretrain.lr.v3.cosine_until=0.1"], ["pretrain.lr.v3", "cosine_until", "0.1", "growing"]),
    "ramp": (["--config.pretrain.ramp.kind=linear", "--config.pretrain.ramp.linear.start=1"],
             ["pretrain.ramp.linear.start", "1", "n_micro"]),
    "eval_every": (["--config.pretrain.eval.every=-1"], ["pretrain.eval.every", "-1"]),
    "prompts": (["--config.pretrain.sample.prompts=('def ',)"], ["pretrain.sample.prompts", "'def '", "pairs"]),
    "seed": (["--config.seed=-1"], ["seed", "-1"]),
    "stop_after": (["--config.stop_after_s=-1.0"], ["stop_after_s", "-1.0"]),
    "checkpoint_every": (["--config.checkpoint.every=-2"], ["checkpoint.every", "-2"]),
    "resume": (["--config.resume=maybe"], ["resume", "'maybe'", "allow_diff"]),
    # data and tokenizer
    "vocabulary": (["--config.model.vocab_size=100"], ["model.vocab_size", "100", "264"]),
    "no_weight": (["--config.data.weights.code=0.0", "--config.data.weights.prose=0.0"], ["data.weights"]),
    "fim_rate": (["--config.data.fim.rate=1.5"], ["data.fim.rate", "1.5"]),
    "no_text_files": (["--config.data.weights.text=1.0"], ["data.text.files", "empty"]),
    "text_glob": (["--config.data.weights.text=1.0", "--config.data.text.files=('/nowhere/*.txt',)"],
                  ["data.text.files", "/nowhere/*.txt"]),
    "packing": (["--config.data.packing.kind=tight"], ["data.packing.kind", "'tight'", "concat"]),
    "tokenizer_kind": (["--config.tokenizer.kind=words"], ["tokenizer.kind", "'words'", "bpe"]),
    "tokenizer_file": (["--config.tokenizer.kind=bpe", "--config.tokenizer.bpe.path=/nowhere.json"], ["tokenizer", "/nowhere.json"]),
    # other runs
    "init_path": (["--config.init_from.path=/nowhere"], ["init_from.path", "'/nowhere'", "finished checkpoint"]),
    "init_regex": (["--config.init_from.include=("], ["init_from.include", "'('", "regular expression"]),
    "init_rename": (["--config.init_from.rename=('head',)"], ["init_from.rename", "pairs"]),
    "eval_path": (["--config.job=eval", "--config.eval.path=/nowhere"], ["eval.path", "'/nowhere'", "run"]),
    "eval_seq_len": (["--config.job=eval", "--config.eval.seq_len=1"], ["eval.seq_len", "1"]),
}
SHELL = ("positional", "unknown_leaf", "no_config_file", "job", "text_for_int")


def check(code, err, words):
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err and all(word in err for word in words), err


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_exit_2(name, tmp_path, capsys):
    extra, words = CASES[name]
    code = main.run([*arguments(tmp_path), *extra])
    check(code, capsys.readouterr().err, words)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("name", SHELL)
def test_bad_input_through_the_shell(name, tmp_path):
    extra, words = CASES[name]
    command = [sys.executable, "main.py", f"--workdir={tmp_path}", *extra]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    check(done.returncode, done.stderr, words)


FILES = {
    "raises": ("def get_config():\n    raise RuntimeError('of its own\\nmaking')\n", ["RuntimeError", "of its own making"]),
    "syntax": ("def get_config(:\n", ["SyntaxError"]),
    "returns_nothing": ("def get_config():\n    pass\n", ["NoneType", "ConfigDict"]),
    "no_function": ("x = 1\n", ["get_config"]),
    "lacks_a_subtree": ("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict(dict(job='pretrain', seed=0))\n",
                        ["config: no leaf", "pretrain"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_config_file_that_fails_is_one_line(name, tmp_path, capsys):
    text, words = FILES[name]
    (tmp_path / "mine.py").write_text(text)
    check(main.run(["main.py", f"--workdir={tmp_path / 'run'}", f"--config={tmp_path / 'mine.py'}"]), capsys.readouterr().err, words)


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    check(main.run(arguments(tmp_path / "file" / "run")), capsys.readouterr().err, ["workdir", "folder that can be written"])


def test_a_damaged_record_of_a_run_is_one_line(tmp_path, capsys):
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{")
    check(main.run(arguments(tmp_path)), capsys.readouterr().err, ["workdir", "config.json", "not JSON"])


def test_traceback_shows_where_a_user_error_was_found(tmp_path, capsys):
    assert main.run([*arguments(tmp_path), "--traceback", "--config.pretrain.steps=0"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "pretrain.py" in err and err.splitlines()[-1].startswith("error: pretrain.steps")


@pytest.mark.parametrize("error", [KeyError("bug"), AttributeError("bug"), ValueError("bug"), TypeError("bug")])
def test_a_bug_of_ours_keeps_its_traceback(tmp_path, monkeypatch, error):
    """No exception of our own code is taken for a mistake of the user's, not even inside the data pipeline."""
    monkeypatch.setattr(pretrain.corpus, "make_iterator", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(type(error), match="bug"):
        main.run(arguments(tmp_path))


def test_a_bug_exits_1_through_the_shell(tmp_path):
    code = "import sys, main; main.JOBS['r1'] = 'json:loads'; sys.exit(main.run(['main.py']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 1 and "Traceback" in done.stderr and "TypeError: loads()" in done.stderr


def test_a_loss_that_is_not_finite_ends_with_its_step_and_exit_1(tmp_path, capsys):
    assert main.run(arguments(tmp_path, "pretrain.lr.v3.peak=1e30", "pretrain.lr.v3.warmup_steps=0", "optimizer.clip=1e9",
                              "pretrain.eval.every=0")) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "not finite at step" in err and "last checkpoint is at step" in err


def test_help_names_jobs_and_configs(capsys):
    assert main.run(["main.py", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--config" in out and "pretrain" in out and "configs/deepseek_v3.py" in out
