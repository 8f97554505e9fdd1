"""Several processes as one run: the same command started once a process, by Slurm, Open MPI, or with JAX's own variables.

| launcher | what it sets | coordinator |
|---|---|---|
| none, Kubernetes | JAX_NUM_PROCESSES, JAX_PROCESS_ID | JAX_COORDINATOR_ADDRESS=host:port |
| srun | SLURM_* | the first host of the step, found by JAX |
| mpirun | OMPI_COMM_WORLD_* | found by JAX up to Open MPI 4, else JAX_COORDINATOR_ADDRESS |

`jax.distributed` is the engine. Here are its arguments, what processes must agree on, and one line where it dies: a lost process ends
every other within JAX_HEARTBEAT_TIMEOUT_SECONDS (100). Process 0 alone writes to the console and to a run's files. This module starts
without importing JAX.
"""
from __future__ import annotations

import glob
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from model.errors import UserError

AGAIN = "start every process again with the same command to go on from the last checkpoint"


class Place(NamedTuple):
    """One process's arguments of jax.distributed.initialize; address None: JAX finds it; devices None: all that are visible."""

    address: str | None
    n: int
    id: int
    devices: list[int] | None


def place(env: Mapping[str, str], n_gpus: int = 0) -> Place | None:
    """This process's place, None where it is the only one. n_gpus visible here are shared out among the processes of one host, unless
    the launcher has already done so. Raises UserError."""
    address = env.get("JAX_COORDINATOR_ADDRESS")
    for names in (("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", None, None),
                  ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
                  ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")):
        if names[0] not in env or (names[0].startswith("SLURM") and "SLURM_STEP_NODELIST" not in env):
            continue  # a batch script before srun is one process, whatever the job's size
        n, rank = _whole(env, names[0]), _whole(env, names[1])
        if n == 1:
            return None
        if not 0 <= rank < n:
            raise UserError(f"{names[1]}: found {rank}, allowed: 0 to {names[0]} - 1 = {n - 1}")
        if address is None and (names[2] is None or (names[0].startswith("OMPI") and "OMPI_MCA_orte_hnp_uri" not in env)):
            raise UserError(f"JAX_COORDINATOR_ADDRESS: missing, allowed: host:port of process 0, as {names[0]}={n}")
        if address is not None and not re.fullmatch(r".+:\d+", address):
            raise UserError(f"JAX_COORDINATOR_ADDRESS: found {address!r}, allowed: host:port")
        return Place(address, n, rank, _devices(env, n_gpus, names[2], names[3]))
    return None


def _whole(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "")
    if not value.isdigit():
        raise UserError(f"{name}: found {value!r}, allowed: a whole number")
    return int(value)


def _devices(env: Mapping[str, str], n_gpus: int, rank: str | None, size: str | None) -> list[int] | None:
    """The GPUs of this process: JAX_LOCAL_DEVICE_IDS, or an equal share among the host's processes. JAX itself would give one each,
    also to the only process of a host."""
    if "JAX_LOCAL_DEVICE_IDS" in env:
        return [int(i) for i in env["JAX_LOCAL_DEVICE_IDS"].split(",")]
    if rank is None or not n_gpus:
        return None
    counts = []  # Slurm's form is '2(x3),1'
    for part in env.get(size, "1").split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    here = counts[min(int(env.get("SLURM_NODEID", 0)), len(counts) - 1)]
    each = n_gpus // here if n_gpus % here == 0 else n_gpus
    first = _whole(env, rank) * each if each < n_gpus else 0
    return list(range(first, first + each))


def start() -> bool:
    """Joins this process to the others, if there are any: True. Call it before JAX touches a device. Raises UserError."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    mine = place(os.environ, len([d for d in visible.split(",") if d]) if visible is not None else len(glob.glob("/dev/nvidia[0-9]*")))
    if mine is None:
        return False
    sys.stdout.flush()
    reader = subprocess.Popen([sys.executable, "-m", "train.cluster", f"process {mine.id} of {mine.n}"], stdin=subprocess.PIPE,
                              cwd=pathlib.Path(__file__).parent.parent, start_new_session=True)
    sys.stdout = open(os.devnull if mine.id else os.dup(1), "w", buffering=1)
    for stream in (1, 2):  # what C++ writes to either; Python's own stdout stays the console's
        os.dup2(reader.stdin.fileno(), stream)
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # the loops take SIGTERM themselves
    try:
        # at a normal end everyone has met before, so that only a failed process ever waits at the shutdown
        jax.distributed.initialize(mine.address, mine.n, mine.id, mine.devices, shutdown_timeout_seconds=10,
                                   heartbeat_timeout_seconds=int(os.environ.get("JAX_HEARTBEAT_TIMEOUT_SECONDS", 100)))
    except RuntimeError as error:
        raise UserError(f"cluster: process {mine.id} of {mine.n} cannot join ({str(error).splitlines()[0][:200]}), allowed: a coordinator "
                        f"that every process reaches (here {mine.address or 'as JAX found it'})") from error
    return True


def several() -> bool:
    """True if this run has more than one process."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def barrier(name: str) -> None:
    """Waits for every process."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(wish: int) -> int:
    """The largest wish of any process: what a signal or a clock tells one of them is no decision yet."""
    if not several():
        return wish
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(wish)).max())


def fetch(tree: Any) -> Any:
    """tree as numpy, whole, whichever process holds it."""
    import jax

    if several():
        from jax.experimental import multihost_utils

        tree = jax.tree.map(lambda x: x if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
                            else multihost_utils.process_allgather(x, tiled=True), tree)
    return jax.device_get(tree)


def leave(code: int) -> int:
    """Parts from the others after a job that ended with this exit code, and returns it."""
    if several():
        import jax

        sys.stdout.flush()
        if code == 0:
            barrier("end")
        jax.distributed.shutdown()
    return code


def give_up(error: Exception) -> None:
    """Raises error again, or, where it says that another process is gone, ends this one with one line."""
    if not (several() and re.search(r"Gloo|NCCL|Connection (reset|closed)|closed by peer|heartbeat|coordination", str(error))):
        raise error
    import jax

    print(condense(str(error), f"process {jax.process_index()} of {jax.process_count()}"), file=sys.stderr, flush=True)
    os._exit(1)  # whatever waits for the others would wait in vain


def condense(text: str, who: str) -> str:
    """What is left of the last words of JAX's runtime: one line."""
    reason = re.findall(r"(?:UNKNOWN|UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED): (.*)", text)
    gone = re.search(r"stopped sending heartbeats\):\s*([\d,\s]*\d)", text)
    which = f"process {', '.join(gone[1].split())}" if gone else f"another process ({(reason[0] if reason else '').strip()[:120]})"
    return f"error: {who} lost {which}: {AGAIN}"


def _read(who: str) -> None:
    """Passes stderr on from stdin, but for the lines of JAX's distributed runtime: these become one, when the process has ended."""
    last, said = [], False
    for line in sys.stdin:
        if last or re.match(r"[EF]\d{4} .*(coordination|distributed|client\.h)", line):
            last.append(line)
        elif not re.search(r"\[Gloo\]|peer ranks", line):  # its threads write over one another
            said = said or line.startswith("error: ")
            sys.stderr.write(line)
            sys.stderr.flush()
    if last and not said:
        print(condense("".join(last), who), file=sys.stderr)


if __name__ == "__main__":
    _read(sys.argv[1])
