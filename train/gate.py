"""The job `gate`: is the base ready for RL? It goes on pretraining, in whole rounds, while worked answers are right too seldom.

GRPO can only choose between the ways of answering that the base has: where worked answers are not clearly more often right than direct
ones it learns to guess in the right format (LOG.md). Judged are tagged answers, as only those are graded. A round is
config[NAME].steps steps of pretraining with its own warm-up and decay, on rows that the base has not seen; config[NAME] has the leaves
of `pretrain` and init_from, threshold, rounds (at most), problems.
"""
from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np

from data import corpus
from data import tokenizer as tokenizers
from model.errors import leaf, named_input, require
from train import checkpoint, evaluate_tasks, loop, pretrain, schedules
from train.metrics import prepare_workdir, read_jsonl


def gate(config, workdir: str, name: str = "gate", stage: str | None = None) -> bool | None:
    """Leaves checkpoints/NAME: the base itself where it passed at once."""
    path, sub = pathlib.Path(workdir) if stage else prepare_workdir(workdir, config), config[name]
    s = loop.setup(config, path, name, stage)
    threshold, rounds = leaf(sub, "threshold", float, name), leaf(sub, "rounds", int, name)
    n, length, rows, seq_len = (leaf(sub, k, int, name) for k in ("problems", "steps", "batch_size", "seq_len"))
    require(0 <= threshold <= 1, f"{name}.threshold", threshold, "a share from 0 to 1")
    require(rounds >= 0 and length >= 1, f"{name}.rounds, steps", (rounds, length), "0 rounds or more of at least 1 step")
    require(bool(s.init_from.path), "init_from.path", "", f"the base that {name} judges")
    lr = schedules.parse_lr(sub.lr, f"{name}.lr")
    mtp_weight, bias_rate = (schedules.parse_switch(sub[k], f"{name}.{k}") for k in ("mtp_weight", "bias_rate"))
    evaluation = evaluate_tasks.parse(config.evaluation)
    with named_input("data", "tokenizer"):
        spec, tokenizer = corpus.parse(config.data), tokenizers.parse(config.tokenizer)
        iterator = corpus.make_iterator(spec, tokenizer, batch_size=rows, seq_len=seq_len, n_micro=1, seed=s.seed + 7919)

    def knobs(step: int) -> dict:
        at = step % length
        p = at / length
        return dict(lr=lr(at, p), clip=s.optimizer.clip, mtp_weight=mtp_weight(p), bias_rate=bias_rate(p), n_micro=np.int32(1))

    loss = pretrain.loss_of(s.cfg.mtp_depth)
    with jax.set_mesh(s.mesh):
        state = loop.start(s, iterator, loop.programs(s.cfg, s.run, s.optimizer, loss, s.mesh))
    n_done = int(state.step)
    if not n_done and s.done is None:
        checkpoint.save(s.checkpoints, state, s.model, {"data": iterator.get_state()}, s.saving.keep)
    while True:
        if n_done % length == 0:
            model = evaluate_tasks.policy(state.params, state.router_bias, s.cfg, s.run)
            seen, _ = evaluate_tasks.score(model, tokenizer, spec.tasks, evaluation, seed=s.seed, step=n_done, n=n)
            worked, direct = (seen[f"{kind}_right_tagged"] or 0.0 for kind in ("worked", "direct"))
            k = n_done // length
            passed = worked >= threshold
            if not _logged(s, n_done):  # killed behind the last round, it is judged again
                s.logger.event("gate", n_done, passed=passed, threshold=threshold, worked_right=worked, direct_right=direct,
                               worked_right_all=seen["worked_right"], direct_right_all=seen["direct_right"], worked=seen["worked"],
                               by_family=seen["by_family"])
            verdict = (f"passed{f' after {k} more rounds of {length} steps' if k else ''}" if passed else
                       f"not passed, and {rounds} rounds were the bound: going on as it is" if k >= rounds else
                       f"not passed: round {k + 1} of at most {rounds}, {length} steps of pretraining")
            print(f"{name}: tagged answers are right {worked:.2f} of the time when worked (asked: {threshold:.2f}), {direct:.2f} when "
                  f"direct; {verdict}", flush=True)
            if passed or k >= rounds:
                return
        try:
            state = loop.fit(_resumed(s), iterator, (n_done // length + 1) * length, knobs, loss)
        except loop.Stopped:
            return False
        n_done = int(state.step)


def _logged(s: loop.Setup, step: int) -> bool:
    path = s.workdir / "metrics.jsonl"
    return path.exists() and any(line.get("event") == "gate" and line["step"] == step and line.get("stage") == s.logger.stage
                                 for line in read_jsonl(path))


def _resumed(s: loop.Setup) -> loop.Setup:
    """The same stage, to go on from its newest checkpoint."""
    return dataclasses.replace(s, done=checkpoint.steps(s.checkpoints)[-1])
