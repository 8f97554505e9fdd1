"""Several processes as one run: who is who by the launcher's variables, whose rows are whose, one line when a process is lost; and,
marked slow, two processes of 4 devices that train, stop, die, go on, and hand their checkpoint to one process."""
import io
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny_run import arguments, lines

import main
from data import corpus
from model import sharding
from model.errors import UserError
from train import checkpoint, cluster

ROOT = pathlib.Path(main.__file__).parent
STEPS = 10
JAX = dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")
SLURM = dict(SLURM_NTASKS="7", SLURM_PROCID="6", SLURM_LOCALID="0", SLURM_STEP_TASKS_PER_NODE="2(x3),1", SLURM_NODEID="3",
             SLURM_STEP_NODELIST="n[1-4]")
OMPI = dict(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="2")


@pytest.mark.parametrize("env, n_gpus, place", [
    ({}, 8, None),
    (JAX, 8, ("a:1", 2, 1, None)),
    (JAX | dict(JAX_LOCAL_DEVICE_IDS="0,3"), 8, ("a:1", 2, 1, [0, 3])),
    (JAX | dict(JAX_NUM_PROCESSES="1", JAX_PROCESS_ID="0"), 8, None),
    (SLURM, 8, (None, 7, 6, list(range(8)))),  # alone on its host: all of it
    (SLURM | dict(SLURM_NODEID="1", SLURM_PROCID="3", SLURM_LOCALID="1"), 8, (None, 7, 3, [4, 5, 6, 7])),
    (SLURM | dict(SLURM_NODEID="1", SLURM_PROCID="3", SLURM_LOCALID="1"), 1, (None, 7, 3, [0])),  # the launcher has shared them out
    (SLURM, 0, (None, 7, 6, None)),
    (SLURM | dict(SLURM_NTASKS="1"), 8, None),
    ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, 8, None),  # sbatch before srun
    (OMPI | dict(OMPI_MCA_orte_hnp_uri="1.0;tcp://h:1"), 4, (None, 4, 3, [2, 3])),
    (OMPI | dict(JAX_COORDINATOR_ADDRESS="h:9"), 0, ("h:9", 4, 3, None))])
def test_a_process_finds_its_place(env, n_gpus, place):
    assert cluster.place(env, n_gpus) == place


@pytest.mark.parametrize("env, said", [
    (JAX | dict(JAX_PROCESS_ID="2"), "JAX_PROCESS_ID: found 2, allowed: 0 to JAX_NUM_PROCESSES - 1 = 1"),
    (JAX | dict(JAX_PROCESS_ID="one"), "JAX_PROCESS_ID: found 'one', allowed: a whole number"),
    (JAX | dict(JAX_COORDINATOR_ADDRESS="a"), "JAX_COORDINATOR_ADDRESS: found 'a', allowed: host:port"),
    (dict(JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0"), "JAX_COORDINATOR_ADDRESS: missing"),
    (OMPI, "JAX_COORDINATOR_ADDRESS: missing")])
def test_a_launcher_that_says_too_little_is_one_line(env, said):
    with pytest.raises(UserError, match=said):
        cluster.place(env)


def test_the_last_words_of_the_runtime_become_one_line(monkeypatch, capsys):
    fatal = ("E1124 23:27:28.405363 8637 coordination_service.cc:1518] UNAVAILABLE: The following tasks are unhealthy (stopped sending "
             "heartbeats):\n1\nThe tasks have crashed.\nF1124 23:27:28.4 8648 client.h:86] Terminating process\n    @ 0x7f475793d7d4 f()\n")
    for text, left in (
            ("a warning\n" + fatal, f"a warning\nerror: process 0 of 2 lost process 1: {cluster.AGAIN}\n"),
            ("error: process 0 of 2 lost another process: ...\n" + fatal, "error: process 0 of 2 lost another process: ...\n"),
            ("[Gloo] Rank 0 is connected\n2 is connected to 3 peer ranks.\nerror: seed: found -1\n", "error: seed: found -1\n")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        cluster._read("process 0 of 2")
        assert capsys.readouterr().err == left


def test_processes_read_the_rows_of_one_batch_between_them():
    """Rows 0, 3 and 1, 2 of every micro-batch, by two iterators: together the whole batch; a place fits either."""
    source = [dict(tokens=np.full(3, i, np.int32)) for i in range(64)]
    whole, a, b = (corpus.iterate([source], [1.0], 8, 2, rows=rows) for rows in (None, np.array([0, 3]), np.array([1, 2])))
    for _ in range(3):
        batch, state = next(whole)["tokens"], whole.get_state()
        for part, rows in ((a, [0, 3]), (b, [1, 2])):
            np.testing.assert_array_equal(next(part)["tokens"], batch[:, rows])
            assert part.get_state() == state
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1) | dict(fsdp=4, tensor=2))
    assert sharding.rows_here(mesh, 8).tolist() == list(range(8))
    with pytest.raises(UserError, match=r"mesh: found '4 data shards .*', allowed: a divisor of the 6 rows"):
        sharding.rows_here(mesh, 6)


def start(workdir, *edits, steps=STEPS, job="pretrain", n=2):
    """n processes of 8 / n CPU devices; one process where n is 1."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={8 // n} --xla_backend_optimization_level=0"
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | dict(
        JAX_PLATFORMS="cpu", XLA_FLAGS=flags, JAX_COMPILATION_CACHE_DIR=jax.config.jax_compilation_cache_dir,
        JAX_HEARTBEAT_TIMEOUT_SECONDS="15")
    command = [sys.executable, "main.py", *arguments(workdir, *edits, steps=steps, job=job)[1:]]
    return [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env | (dict(
        JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(n), JAX_PROCESS_ID=str(i)) if n > 1 else {})) for i in range(n)]


def finish(processes, code=0):
    """What each wrote, (stdout, stderr); every one ended with this code."""
    said = [process.communicate(timeout=1200) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said


def until(processes, log, text):
    while not (log.exists() and text in log.read_text()):
        assert all(p.poll() is None for p in processes), finish(processes)
        time.sleep(0.05)


def arrays(step):
    """Every array of a checkpoint by path."""
    like = {k: checkpoint._as_abstract(v) for k, v in checkpoint.ocp.checkpointables_metadata(step).metadata.items()}
    found = checkpoint.ocp.load_checkpointables(step, like)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(found)}


MESH = ("mesh.expert=2", "mesh.fsdp=4", "pretrain.batch_size=16", "pretrain.eval.every=5", "pretrain.sample.max_new=4",
        "pretrain.sample.prompts=(('code','def '),)")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, what was said) of an unbroken run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    return folder, finish(start(folder, *MESH))


@pytest.mark.slow
def test_two_processes_are_the_run_of_one_and_one_goes_on_from_them(whole, tmp_path):
    """Metrics, samples and parameters of 2 x 4 devices are those of 1 x 8 (float32 sums in another order); only process 0 speaks and
    writes; the checkpoint goes on in one process on another mesh, ZeRO-1, from the very same arrays."""
    folder, said = whole
    assert f"pretrain {STEPS}/{STEPS}" in said[0][0] and "report: " in said[0][0] and said[1][0] == ""
    assert "error" not in said[0][1] + said[1][1]
    finish(start(tmp_path / "one", *MESH, n=1))
    for a, b in zip(lines(folder), lines(tmp_path / "one"), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if isinstance(a[key], (int, float)):
                assert a[key] == pytest.approx(b[key], rel=1e-4), key
    two, one = (arrays(path / "checkpoints" / str(STEPS)) for path in (folder, tmp_path / "one"))
    assert two.keys() == one.keys()
    for key in two:
        if "params" in key or "ema" in key:
            np.testing.assert_allclose(two[key], one[key], atol=1e-4, err_msg=key)
    (tmp_path / "on").mkdir()
    finish([subprocess.Popen(["cp", "-a", f"{folder}/.", str(tmp_path / "on")])])
    finish(start(tmp_path / "on", *MESH, "mesh.expert=4", "mesh.fsdp=1", "mesh.tensor=2", "optimizer.sharding.kind=zero1",
                 "resume=allow_diff", steps=STEPS + 1, n=1))
    assert [line["step"] for line in lines(tmp_path / "on") if "event" not in line] == list(range(1, STEPS + 2))
    again = arrays(tmp_path / "on" / "checkpoints" / str(STEPS))
    assert all(again[k].tobytes() == two[k].tobytes() for k in two)


@pytest.mark.slow
def test_a_signal_stops_both_and_a_lost_process_ends_the_other(whole, tmp_path):
    """SIGTERM to process 1 alone: both save the same step and end with 130. SIGKILL: the other ends with one line. Started again, the
    run is the unbroken one to the bit."""
    log = tmp_path / "metrics.jsonl"
    both = start(tmp_path, *MESH)
    until(both, log, '"step": 1')
    both[1].send_signal(signal.SIGTERM)
    finish(both, 130)
    done = checkpoint.steps(tmp_path / "checkpoints")[-1]
    assert 1 <= done < STEPS
    both = start(tmp_path, *MESH)
    until(both, log, f'"step": {done + 1}')
    both[1].kill()
    (_, said), _ = (process.communicate(timeout=600) for process in both)
    assert said.count("\n") == 1 and said.startswith("error: process 0 of 2 lost ") and both[0].returncode not in (0, 2)
    finish(start(tmp_path, *MESH))
    assert lines(tmp_path) == lines(whole[0])
    a, b = arrays(tmp_path / "checkpoints" / str(STEPS)), arrays(whole[0] / "checkpoints" / str(STEPS))
    assert a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


@pytest.mark.slow
def test_files_of_two_processes_are_those_of_one_and_other_jobs_are_refused(whole, tmp_path):
    """An export by two processes is byte for byte that of one; imported by two onto the mesh and exported again it is itself; eval
    scores as at the end of training; a job that has no part for several processes is one line each, exit 2."""
    def export(source, name, n):
        finish(start(tmp_path / "w", f"init_from.path={source}", f"export_hf.dir={tmp_path / name}", job="export_hf", n=n))
        return {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}

    two, one = export(whole[0], "two", 2), export(whole[0], "one", 1)
    assert two == one and any(name.endswith(".safetensors") for name in two)
    finish(start(tmp_path / "in", *MESH, f"import_hf.dir={tmp_path / 'two'}", "import_hf.dtype=stored", job="import_hf"))
    assert export(tmp_path / "in", "again", 1) == two
    said = finish(start(tmp_path / "e", f"eval.path={whole[0]}", "eval.max_bytes=200", "eval.seq_len=16", job="eval"))
    assert "byte bigram" in said[0][0] and said[1][0] == ""
    for _, error in finish(start(tmp_path / "s", job="sample"), 2):
        assert error.startswith("error: job under several processes: found 'sample', allowed: pretrain, ") and error.count("\n") == 1
