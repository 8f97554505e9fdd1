"""On two GPUs: a step on fsdp, expert and tensor meshes against one GPU; two processes, one killed, and back on one GPU.

DEEPSEEK_JAX_TEST_GPU=1 python -m pytest -m gpu -s tests/test_scaling_gpu.py -k equal   (or -k processes; each prints what it found)
"""
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import pytest

from configs import deepseek_v3
from train import scaling

pytestmark = pytest.mark.gpu
ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8_block"])
def test_a_step_on_several_gpus_is_equal_to_that_of_one(kind, tmp_path):
    assert len(jax.devices()) > 1, "needs two GPUs"
    config = deepseek_v3.get_config("700m")
    config.run.scan_unroll = 1
    config.scaling.parts = ("equality",)
    config.scaling.equality.precisions = (kind,)
    found = scaling.scaling(config, str(tmp_path))["equality"]  # it raises if one is out of tolerance
    assert [row["mesh"] for row in found] == [*config.scaling.meshes, scaling.REORDERED]


@pytest.fixture
def start(tmp_path):
    """start(name, *flags, rank=, n=, port=): one process of a run on its own GPU, and the file of what it says. None outlives the test."""
    started = []

    def one(*arguments, **named):
        started.append(launch(tmp_path, *arguments, **named))
        return started[-1]

    yield one
    for process, _ in started:
        process.kill()
        process.wait()


def launch(workdir: pathlib.Path, name: str, *flags: str, rank: int, n: int = 2, port: int = 0) -> tuple[subprocess.Popen, pathlib.Path]:
    env = dict(os.environ, CUDA_VISIBLE_DEVICES=str(rank), XLA_PYTHON_CLIENT_MEM_FRACTION=".2")
    env.pop("XLA_FLAGS")  # conftest's
    if n > 1:
        env |= dict(JAX_COORDINATOR_ADDRESS=f"localhost:{port}", JAX_NUM_PROCESSES=str(n), JAX_PROCESS_ID=str(rank),
                    JAX_HEARTBEAT_TIMEOUT_SECONDS="10")
    said = workdir / f"{name}.{rank}"
    command = [sys.executable, "-u", "main.py", "--config=configs/deepseek_v3.py:tiny", "--config.pretrain.steps=1000000",
               "--config.checkpoint.every=10", "--config.pretrain.eval.every=0", f"--workdir={workdir / 'run'}", *flags]
    with open(said, "w") as out:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True), said


def saved(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "run" / "checkpoints").glob("*") if path.name.isdigit())


def test_two_processes_one_killed_then_both_again_then_one_alone(start, tmp_path):
    (first, said), (second, _) = (start("killed", rank=i, port=9911) for i in range(2))
    until = time.monotonic() + 240
    while not (steps := saved(tmp_path)) or steps[-1] < 20:
        assert first.poll() is None and time.monotonic() < until, said.read_text()[-3000:]
        time.sleep(0.5)
    second.kill()
    began = time.monotonic()
    code, took = first.wait(60), time.monotonic() - began
    time.sleep(2)  # its last words come through a process of their own
    words = said.read_text().splitlines()
    print(f"\nprocess 1 killed: process 0 ended with {code} after {took:.0f} s, saying {words[-1]!r}; saved {saved(tmp_path)}")
    assert code and re.match(r"error: process 0 of 2 lost (process 1|another process)\b", words[-1]), words[-5:]

    steps = saved(tmp_path)
    both = [start("again", "--config.stop_after_s=10", rank=i, port=9912) for i in range(2)]
    codes, words = [process.wait(240) for process, _ in both], both[0][1].read_text()
    print(f"both again: ended with {codes}; saved {saved(tmp_path)}")
    assert codes == [0, 0] and saved(tmp_path)[-1] > steps[-1] and "stopped after 10 s" in words, words[-3000:]

    steps = saved(tmp_path)
    alone, said = start("alone", "--config.stop_after_s=10", rank=0, n=1)
    code, words = alone.wait(240), said.read_text()
    print(f"one process from the checkpoint of two: ended with {code}; saved {saved(tmp_path)}")
    assert code == 0 and saved(tmp_path)[-1] > steps[-1] and "stopped after 10 s" in words, words[-3000:]
