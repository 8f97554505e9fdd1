"""The loop under pretraining and SFT: steps over batches, logged, evaluated, checkpointed, resumable to the bit.

Whatever decides the next step is in the checkpoint: the state, the iterator's position, and the step number, from which keys and
schedules follow. `stop_after_s` ends a run after a checkpoint with exit code 0, Ctrl-C or SIGTERM after the step under way; the
same command goes on.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from model import sharding
from model.config import Execution, ModelConfig
from model.errors import UserError, freeze, leaf, pattern, require
from train import checkpoint, cluster
from train import state as states
from train.metrics import Logger, Progress
from train.optimizer import Optimizer
from train.step import compile_step, make_train_step


@dataclasses.dataclass(frozen=True)
class InitFrom:
    """config.init_from: weights of another run (path '' is none), by regular expressions over parameter names."""

    path: str
    include: str
    exclude: str
    rename: tuple
    ema: bool

    def __post_init__(self):
        pattern(self.include, "include")
        pattern(self.exclude, "exclude")
        for pair in self.rename:
            require(isinstance(pair, (tuple, list)) and len(pair) == 2, "rename", pair, "pairs (pattern, replacement)")
            pattern(pair[0], "rename")


@dataclasses.dataclass(frozen=True)
class Saving:
    """config.checkpoint: every so many steps (0: only at the end), the newest `keep` kept (0: all)."""

    every: int
    keep: int

    def __post_init__(self):
        for name in ("every", "keep"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a training stage is made of; made once by `setup`, below it there is no ConfigDict. done: the step of the checkpoint that
    it goes on from (None: a fresh start)."""

    name: str
    workdir: pathlib.Path
    model: Mapping[str, Any]
    cfg: ModelConfig
    run: Execution
    optimizer: Optimizer
    mesh: Any
    seed: int
    init_from: InitFrom
    saving: Saving
    stop_after_s: float
    logger: Logger
    done: int | None

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.workdir / "checkpoints" / (self.logger.stage or "")


class Programs(NamedTuple):
    """What is compiled for a stage: step(state, batch, rng), create(key) and from_params(params, router_bias) -> state, in `layout`."""

    layout: states.TrainState
    step: Callable
    create: Callable
    from_params: Callable


class Stopped(Exception):
    """The run was asked to stop early (stop_after_s) after a checkpoint."""


def setup(config, workdir: pathlib.Path, name: str, stage: str | None = None) -> Setup:
    """Freezes what every training job reads: model, run, optimizer, mesh, init_from, checkpoint, stop_after_s; and clears away what
    an interrupted run had left beyond its newest checkpoint."""
    from model import config as model_config

    cfg = model_config.parse(config.model)
    limit = leaf(config, "stop_after_s", float, "config")
    require(limit >= 0, "stop_after_s", limit, "seconds, 0 for no limit")
    seed = leaf(config, "seed", int, "config")
    require(0 <= seed < 2 ** 32, "seed", seed, "0 up to 2**32")
    s = Setup(
        name, workdir, config.model.to_dict(), cfg, model_config.parse_run(config.run),
        parse_optimizer(config.optimizer.to_json_best_effort()),
        sharding.make_mesh(config.mesh), seed, freeze(InitFrom, config.init_from, "init_from"),
        freeze(Saving, config.checkpoint, "checkpoint"), limit or math.inf, Logger(workdir, stage), None)
    if s.init_from.path:
        checkpoint.find(s.init_from.path)
    if jax.process_index() == 0:
        checkpoint.clean(s.checkpoints)
    cluster.barrier("clean")
    done = checkpoint.steps(s.checkpoints)
    s.logger.cut_back(done[-1] if done else -1)
    return dataclasses.replace(s, done=done[-1] if done else None)


def key_of(seed: int, purpose: str):
    """A root key by purpose; steps fold their number in."""
    return jax.random.fold_in(jax.random.key(seed), sum(ord(c) << (8 * (i % 3)) for i, c in enumerate(purpose)))


@functools.lru_cache(16)
def parse_optimizer(text: str) -> Optimizer:
    """config.optimizer from its JSON; the same object for equal text, so that stages share what is compiled."""
    from train import optimizer

    return optimizer.parse(ConfigDict(json.loads(text)))


@functools.lru_cache(32)
def programs(cfg: ModelConfig, run: Execution, optimizer: Optimizer, loss: Callable, mesh) -> Programs:
    """The programs of a stage, made once in a process for equal arguments: the stages of a recipe share them."""
    create = lambda key: states.create(key, cfg, optimizer, run)  # noqa: E731
    layout = states.shardings(mesh, cfg, jax.eval_shape(create, jax.random.key(0)), optimizer.layout)
    again = lambda params, bias: states.from_params(params, bias, optimizer, run)  # noqa: E731
    return Programs(layout, compile_step(make_train_step(cfg, run, optimizer, loss), mesh, layout),
                    jax.jit(create, out_shardings=layout), jax.jit(again, out_shardings=layout))


def start(s: Setup, iterator, made: Programs) -> states.TrainState:
    """The state to go on from: the newest checkpoint of this stage (the iterator set to its place), else fresh or warm-started."""
    if s.done is not None:
        path = s.checkpoints / str(s.done)
        if checkpoint.metadata(path)["model"] != checkpoint.jsonable(s.model):
            raise UserError(f"workdir: {s.checkpoints} holds a run of another config.model, allowed: the same model, or an empty workdir")
        state, extra = checkpoint.restore(path, jax.eval_shape(made.create, jax.random.key(0)), made.layout)
        if iterator is not None:
            iterator.set_state(extra["data"])
    else:
        state = made.create(key_of(s.seed, "init"))
        if s.init_from.path:
            params, bias = checkpoint.warm_start(s.init_from, state.params, state.router_bias, s.cfg)
            state = made.from_params(params, bias)
    return state


@contextlib.contextmanager
def asked_to_stop():
    """Yields a list that a first Ctrl-C or SIGTERM is appended to, for the loop to end after its step; a second one interrupts."""
    came = []

    def handler(number, frame):
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt
        print("stopping after this step; again: at once", flush=True)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may
                before[number] = signal.signal(number, handler)
        yield came
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def fit(s: Setup, iterator, steps: int, knobs: Callable[[int], dict[str, float]], loss: Callable, *,
        shape_batch: Callable[[int, Any], dict] = lambda step, iterator: next(iterator),
        hooks: Mapping[int, Callable[[states.TrainState, Progress], None]] | None = None,
        shown: tuple[str, ...] = ("loss",)) -> states.TrainState:
    """Trains to `steps` steps. hooks: {every: f(state, progress)}, called after steps that `every` divides and after the last.

    knobs(step) are the scalars of a step; shape_batch(step, iterator) takes the step's batch from the iterator.
    """
    began = time.monotonic()
    with jax.set_mesh(s.mesh):
        made = programs(s.cfg, s.run, s.optimizer, loss, s.mesh)
        state = start(s, iterator, made)
        first, n_saved, key = int(state.step), int(state.step), key_of(s.seed, "step")
        require(first <= steps, f"{s.name}.steps", steps, f"at least the {first} steps that {s.checkpoints} holds")
        with asked_to_stop() as signals, Progress(s.name, steps, first) as progress:
            last, untold = time.monotonic(), None

            def tell(i: int, metrics, lr) -> None:
                """Waits for step i, logs it, and stops at a loss that is not finite."""
                nonlocal last
                metrics = jax.device_get(metrics)
                now = time.monotonic()
                line = s.logger.step(i + 1, metrics | {"lr": lr, "tokens_per_s": float(metrics["tokens"]) / (now - last),
                                                       "step_time": now - last})
                last = now
                if line["loss"] is None:
                    raise FloatingPointError(f"{s.name}: the loss is not finite at step {i + 1}; the last checkpoint is at step {n_saved}")
                progress.update(i + 1, {k.split("/")[-1]: line[k] for k in (*shown, "tokens_per_s") if k in line})

            for i in range(first, steps):
                batch = shape_batch(i, iterator)
                batch["knobs"] = {k: np.float32(v) if isinstance(v, float) else v for k, v in knobs(i).items()}
                state, metrics = made.step(state, batch, jax.random.fold_in(key, i))
                if untold:
                    tell(*untold)  # the step before, while the device works on this one
                untold = i, metrics, batch["knobs"]["lr"]
                timed_out = time.monotonic() - began > s.stop_after_s and i + 1 < steps
                stopping = cluster.agree(2 if signals else 1 if timed_out else 0)
                due = [hook for every, hook in (hooks or {}).items() if (every and (i + 1) % every == 0) or i + 1 == steps]
                saving = i + 1 == steps or stopping or (s.saving.every and (i + 1) % s.saving.every == 0)
                if due or saving:
                    tell(*untold)
                    untold = None
                    for hook in due:
                        hook(state, progress)
                    if saving:
                        checkpoint.save(s.checkpoints, state, s.model, {"data": iterator.get_state()}, s.saving.keep)
                        n_saved = i + 1
                    last = time.monotonic()
                if stopping == 2:
                    raise KeyboardInterrupt
                if stopping:
                    progress.note(f"{s.name}: stopped after {s.stop_after_s:.0f} s at step {i + 1}; the same command goes on")
                    raise Stopped
        return state
