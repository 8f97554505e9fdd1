"""A run that was killed, interrupted or stopped and started again equals the uninterrupted one to the bit."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny_run import arguments, lines

import main
from train import checkpoint, metrics

ROOT = pathlib.Path(main.__file__).parent
RAMP = ("pretrain.ramp.kind=linear", "pretrain.ramp.linear.start=2", "pretrain.ramp.linear.until=0.5")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, with a batch ramp, EMA and bf16 moments."""
    folder = tmp_path_factory.mktemp("whole")
    assert main.run(arguments(folder, *RAMP)) == 0
    return folder


def arrays(workdir, step=6):
    """Every array of a checkpoint by path."""
    found = checkpoint.ocp.load_checkpointables(pathlib.Path(workdir) / "checkpoints" / str(step))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(found)}


def assert_same_run(workdir, whole):
    assert lines(workdir) == lines(whole)
    a, b = arrays(workdir), arrays(whole)
    assert a.keys() == b.keys() and any("ema" in k for k in a) and any("router_bias" in k for k in a)
    assert all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_kill_9_and_start_again_is_the_uninterrupted_run(whole, tmp_path):
    """SIGKILL once step 3 is logged, past the checkpoint at step 2: parameters, moments, router bias, EMA and metrics.jsonl agree."""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    process = subprocess.Popen([sys.executable, "main.py", *arguments(tmp_path, *RAMP)[1:]], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    deadline, log = time.monotonic() + 300, tmp_path / "metrics.jsonl"
    while not (log.exists() and '"step": 3' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    # what a kill within a write and within a save would leave
    with open(log, "a") as file:
        file.write('{"step": 99, "loss": 1.0}\n{"step": 4, "lo')
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(exist_ok=True)
    assert main.run(arguments(tmp_path, *RAMP)) == 0
    assert_same_run(tmp_path, whole)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "6", "final"]


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("how", ["ctrl_c", "sigterm", "stop_after_s"])
def test_a_stopped_run_is_saved_where_it_stopped_and_goes_on(whole, tmp_path, monkeypatch, capsys, how):
    """Ctrl-C and SIGTERM end the step under way and save it (exit 130); stop_after_s saves and exits 0."""
    step = metrics.Logger.step

    def interrupt(self, i, values):
        if i == 3 and how != "stop_after_s":
            os.kill(os.getpid(), signal.SIGINT if how == "ctrl_c" else signal.SIGTERM)
        return step(self, i, values)

    with monkeypatch.context() as m:
        m.setattr(metrics.Logger, "step", interrupt)
        edits = ["stop_after_s=1e-9"] if how == "stop_after_s" else []
        assert main.run(arguments(tmp_path, *RAMP, *edits)) == (0 if edits else 130)
    stopped = 1 if how == "stop_after_s" else 4  # a step is logged while the next one runs
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == stopped and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "the same command goes on" in capsys.readouterr().err or how == "stop_after_s"
    if how != "sigterm":
        assert main.run(arguments(tmp_path, *RAMP)) == 0
        assert_same_run(tmp_path, whole)


def test_a_finished_run_started_again_changes_nothing(whole, capsys):
    before = lines(whole)
    assert main.run(arguments(whole, *RAMP)) == 0
    assert lines(whole) == before and "byte bigram" in capsys.readouterr().out


def test_a_changed_config_is_shown_and_refused_unless_allowed(whole, tmp_path, capsys):
    """One line on stderr, the difference on stdout, config.json as it was; how long a run lasts and when it saves may change."""
    before, config = lines(whole), (whole / "config.json").read_text()
    assert main.run(arguments(whole, *RAMP, "pretrain.lr.v3.peak=1e-3", "seed=1")) == 2
    out, err = capsys.readouterr()
    assert "pretrain.lr.v3.peak: 0.004 -> 0.001" in out and "seed: 0 -> 1" in out
    assert err.startswith("error: resume: ") and err.count("\n") == 1 and "allow_diff" in err
    assert (whole / "config.json").read_text() == config and lines(whole) == before
    assert main.run(arguments(whole, *RAMP, "checkpoint.keep=9", "stop_after_s=1000.0")) == 0
    # the model cannot change, whatever is allowed; nor can a run end before it is
    assert main.run(arguments(whole, *RAMP, "resume=allow_diff", "model.norm_eps=1e-5")) == 2
    assert "another config.model" in capsys.readouterr().err
    assert main.run(arguments(whole, *RAMP, "resume=allow_diff", steps=4)) == 2
    assert "pretrain.steps: found 4, allowed: at least the 6 steps" in capsys.readouterr().err
    assert main.run(arguments(whole, *RAMP, "resume=allow_diff", steps=7)) == 0
    assert json.loads((whole / "config.json").read_text())["pretrain"]["steps"] == 7
    assert [line["step"] for line in lines(whole) if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]


def test_files_of_a_run_are_replaced_whole(tmp_path, monkeypatch):
    """A write that dies leaves the old file."""
    path = tmp_path / "config.json"
    metrics.write_atomically(path, "old")
    monkeypatch.setattr(pathlib.Path, "write_text", lambda self, text: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        metrics.write_atomically(path, "new")
    assert path.read_bytes() == b"old"
