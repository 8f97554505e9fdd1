"""Where an op runs: our Mosaic GPU kernels need Hopper (sm_90a: wgmma, TMA, setmaxnreg); every op also has a reference.

`auto` takes the kernel on a Hopper card when the shapes allow it and the reference elsewhere, and logs once which; a
path asked for by name that cannot run raises.
"""
import functools
import logging

import jax

IMPLEMENTATIONS = ("auto", "kernel", "interpret", "reference")


@functools.cache
def is_hopper() -> bool:
    return jax.default_backend() == "gpu" and jax.local_devices()[0].compute_capability == "9.0"


@functools.cache
def _log_once(op: str, path: str, why: str) -> None:
    logging.getLogger(__name__).info("%s: %s%s", op, path, f" ({why})" if why else "")


def choose(op: str, implementation: str, unfit: str = "", interpretable: str | None = None) -> str:
    """The path `op` takes: 'kernel', 'interpret' or 'reference'.

    `unfit` says why these arguments do not fit the kernel ('' when they do); `interpretable` says why the plain Pallas
    version does not take them (None: the op has no such version). Raises ValueError if a named path cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: must be one of {IMPLEMENTATIONS}")
    if implementation == "interpret" and interpretable != "":
        raise ValueError(f"{op}: implementation='interpret': {interpretable or 'this op has no plain Pallas version'}")
    missing = ("" if is_hopper() else f"needs a Hopper GPU, the backend is {jax.default_backend()!r}") or unfit
    if implementation == "kernel" and missing:
        raise ValueError(f"{op}: implementation='kernel' cannot run: {missing}")
    path = implementation
    if implementation == "auto":
        path = "reference" if missing else "kernel"
        _log_once(op, path, missing)
    return path
