"""Where a step's time goes on each GPU: computing, communicating behind it, communicating exposed, idle; from a jax.profiler trace.

The trace (an xplane file) has a plane a GPU and in it a line a CUDA stream, whose events are kernels and copies. A kernel
communicates if NCCL made it, or if the HLO operation that launched it is a collective; everything else computes (copies within a
device too). Exposed = time in which something communicates and nothing computes. A collective also waits for the other GPU inside
its kernel: skew between the GPUs counts as communication.
"""
from __future__ import annotations

import collections
import pathlib
import re
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator

import jax

Span = tuple[float, float]  # begin and end, ns

COLLECTIVE = re.compile(r"nccl|^(ragged.?)?all.?(gather|reduce|to.?all)|^reduce.?scatter|^collective.?permute", re.IGNORECASE)


def of(run: Callable[[], object], kept: pathlib.Path) -> dict[str, float]:
    """The shares of a run's time (`shares`), the mean over this process's GPUs; {} where the trace has no GPU (on a CPU). The trace
    stays in the file `kept`, for any reader of xplane.pb."""
    take(run, kept)
    shared = [shares(computing, communicating) for computing, communicating in devices(read(kept))]
    return {name: statistics.mean(s[name] for s in shared) for name in shared[0]} if shared else {}


def take(run: Callable[[], object], kept: pathlib.Path) -> None:
    """Traces a run into the file `kept`."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level, options.enable_hlo_proto = 0, 0, False  # kernels are all we read
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        shutil.copy(next(pathlib.Path(folder).rglob("*.xplane.pb")), kept)


def read(path: pathlib.Path):
    """The trace of a file, as jax.profiler.ProfileData."""
    return jax.profiler.ProfileData.from_file(str(path))


def kernels(trace) -> dict[str, tuple[float, int]]:
    """{kind of kernel: (milliseconds on all GPUs, launches)}, the longest first. A kind is a kernel's name without what the compiler
    numbers: XLA's fusions by their first word (loop, input, wrapped, ...), others by their first 32 characters."""
    time, launches = collections.Counter(), collections.Counter()
    for plane in trace.planes:
        for line in plane.lines if plane.name.startswith("/device:GPU") else ():
            for event in line.events if line.name.startswith("Stream") else ():
                fused = re.match(r"(loop|input|wrapped|gemm_fusion|sort)_", event.name)
                kind = fused[1] if fused else event.name[:32]
                time[kind] += event.duration_ns / 1e6
                launches[kind] += 1
    return {kind: (ms, launches[kind]) for kind, ms in time.most_common()}


def devices(trace) -> Iterator[tuple[list[Span], list[Span]]]:
    """(spans that compute, spans that communicate) of each GPU of a trace that did anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of jaxlib's own iterator of stats
        for plane in trace.planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            spans: tuple[list[Span], list[Span]] = ([], [])
            for line in plane.lines:
                if line.name.startswith("Stream"):  # other lines are summaries of these
                    for event in line.events:
                        spans[communicates(event)].append((event.start_ns, event.start_ns + event.duration_ns))
            if any(spans):
                yield spans


def communicates(event) -> bool:
    """Whether a kernel moves bytes between devices."""
    operations = (str(value) for name, value in event.stats if name == "hlo_op")
    return any(COLLECTIVE.search(text) and "fusion" not in text for text in (event.name, *operations))


def shares(computing: Iterable[Span], communicating: Iterable[Span]) -> dict[str, float]:
    """Of the time from the first kernel to the end of the last: computing, hidden, exposed, idle (computing + exposed + idle = 1)."""
    computing, communicating = union(computing), union(communicating)
    everything = union(computing + communicating)
    whole = everything[-1][1] - everything[0][0]
    exposed = length(everything) - length(computing)
    return dict(computing=length(computing) / whole, hidden=(length(communicating) - exposed) / whole, exposed=exposed / whole,
                idle=1 - length(everything) / whole)


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time as spans that neither meet nor overlap, in order."""
    out: list[Span] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((begin, end))
    return out


def length(spans: list[Span]) -> float:
    """The time of disjoint spans."""
    return sum(end - begin for begin, end in spans)
