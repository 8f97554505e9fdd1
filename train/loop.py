"""The loop under pretraining and SFT: steps over batches, logged, evaluated, checkpointed, resumable to the bit.

Whatever decides the next step is in the checkpoint: the state, the iterator's position, and the step number, from which keys and
schedules follow. `stop_after_s` ends a run after a checkpoint with exit code 0; the same command goes on.
"""
from __future__ import annotations

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from model import sharding
from model.config import Execution, ModelConfig
from model.errors import UserError, freeze, leaf, require
from train import checkpoint
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


@dataclasses.dataclass(frozen=True)
class Saving:
    """config.checkpoint: every so many steps (0: only at the end), the newest `keep` kept (0: all)."""

    every: int
    keep: int


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a training stage is made of; made once by `setup`, below it there is no ConfigDict."""

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

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.workdir / "checkpoints" / (self.logger.stage or "")


class Stopped(Exception):
    """The run was asked to stop early (stop_after_s) after a checkpoint."""


def setup(config, workdir: pathlib.Path, name: str, stage: str | None = None) -> Setup:
    """Freezes what every training job reads: model, run, optimizer, mesh, init_from, checkpoint, stop_after_s."""
    from model import config as model_config
    from train import optimizer

    cfg = model_config.parse(config.model)
    limit = leaf(config, "stop_after_s", float, "config")
    require(limit >= 0, "stop_after_s", limit, "seconds, 0 for no limit")
    return Setup(
        name, workdir, config.model.to_dict(), cfg, model_config.parse_run(config.run), optimizer.parse(config.optimizer),
        sharding.make_mesh(config.mesh), leaf(config, "seed", int, "config"), freeze(InitFrom, config.init_from, "init_from"),
        freeze(Saving, config.checkpoint, "checkpoint"), limit or math.inf, Logger(workdir, stage))


def key_of(seed: int, purpose: str):
    """A root key by purpose; steps fold their number in."""
    return jax.random.fold_in(jax.random.key(seed), sum(ord(c) << (8 * (i % 3)) for i, c in enumerate(purpose)))


def start(s: Setup, iterator, layout: states.TrainState) -> states.TrainState:
    """The state to go on from: the newest checkpoint of this stage (the iterator set to its place), else fresh or warm-started."""
    checkpoint.clean(s.checkpoints)
    done = checkpoint.steps(s.checkpoints)
    make = lambda key: states.create(key, s.cfg, s.optimizer)  # noqa: E731
    if done:
        state, extra = checkpoint.restore(s.checkpoints / str(done[-1]), jax.eval_shape(make, jax.random.key(0)), layout)
        if checkpoint.metadata(s.checkpoints / str(done[-1]))["model"] != checkpoint.jsonable(s.model):
            raise UserError(f"workdir: {s.checkpoints} holds a run of another config.model, allowed: the same model, or an empty workdir")
        iterator.set_state(extra["data"])
    else:
        state = jax.jit(make, out_shardings=layout)(key_of(s.seed, "init"))
        if s.init_from.path:
            params, bias = checkpoint.warm_start(s.init_from, state.params, state.router_bias, s.cfg)
            again = lambda params, bias: states.from_params(params, bias, s.optimizer)  # noqa: E731
            state = jax.jit(again, out_shardings=layout)(params, bias)
    s.logger.cut_back(int(state.step))
    return state


def fit(s: Setup, iterator, steps: int, knobs: Callable[[int], dict[str, float]], loss: Callable, *,
        shape_batch: Callable[[int, Any], dict] = lambda step, batch: batch,
        hooks: Mapping[int, Callable[[states.TrainState, Progress], None]] | None = None,
        shown: tuple[str, ...] = ("loss",), at_end: Callable | None = None) -> states.TrainState:
    """Trains to `steps` steps. hooks: {every: f(state, progress)}, called after steps that `every` divides and after the last.

    knobs(step) are the scalars of a step; shape_batch(step, iterator) takes the step's batch from the iterator.
    """
    began = time.monotonic()
    with jax.set_mesh(s.mesh):
        layout = states.shardings(s.mesh, s.cfg, jax.eval_shape(lambda k: states.create(k, s.cfg, s.optimizer), jax.random.key(0)))
        state = start(s, iterator, layout)
        first, n_saved, key = int(state.step), int(state.step), key_of(s.seed, "step")
        step_fn = compile_step(make_train_step(s.cfg, s.run, s.optimizer, loss), s.mesh, layout)
        stopping = False
        with Progress(s.name, steps, first) as progress:
            last = time.monotonic()
            for i in range(first, steps):
                batch = shape_batch(i, iterator)
                batch["knobs"] = {k: np.float32(v) if isinstance(v, float) else v for k, v in knobs(i).items()}
                state, metrics = step_fn(state, batch, jax.random.fold_in(key, i))
                metrics = jax.device_get(metrics)
                now = time.monotonic()
                line = s.logger.step(i + 1, metrics | {"lr": batch["knobs"]["lr"], "tokens_per_s": float(metrics["tokens"]) / (now - last),
                                                       "step_time": now - last})
                last = now
                if line["loss"] is None:
                    raise FloatingPointError(f"{s.name}: the loss is not finite at step {i + 1}; the last checkpoint is {n_saved}")
                progress.update(i + 1, {k.split("/")[-1]: line[k] for k in (*shown, "tokens_per_s") if k in line})
                for every, hook in (hooks or {}).items():
                    if (every and (i + 1) % every == 0) or i + 1 == steps:
                        hook(state, progress)
                        last = time.monotonic()
                stopping = time.monotonic() - began > s.stop_after_s and i + 1 < steps
                if i + 1 == steps or stopping or (s.saving.every and (i + 1) % s.saving.every == 0):
                    checkpoint.save(s.checkpoints, state, s.model, {"data": iterator.get_state()}, s.saving.keep)
                    n_saved, last = i + 1, time.monotonic()
                if stopping:
                    progress.note(f"{s.name}: stopped after {s.stop_after_s:.0f} s at step {i + 1}; the same command goes on")
                    raise Stopped
        return state
