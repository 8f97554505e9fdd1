"""The job `rl`: GRPO on rule-verified problems (R1 §2.2; the objective and its kinds are in rl.py).

A step: draw problems, G answers to each in one compiled rollout, rewards by rule, advantages within groups, then the answers packed
into rows of one compiled shape and one update a minibatch of rows. Only token ids, log-probs and expert choices pass from sampler to
trainer, never text. A step is a function of (state, seed, step number) alone: problems, sampling keys and row order are drawn from
them, so a resumed run is the uninterrupted one to the bit. Adam goes on across minibatches; `step` counts RL steps.
Left out: a value model (that is GRPO's point), dropout, several epochs over one rollout.
"""
from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data import corpus, packing
from data import tokenizer as tokenizers
from data.tasks import miniature
from model import transformer
from model.errors import choice, freeze, leaf, named_input, require
from train import checkpoint, evaluate_tasks, loop, report, rewards, rl, schedules
from train.cross_entropy import token_logp
from train.metrics import Progress, prepare_workdir

ZERO_BY_CONSTRUCTION = ("the loss is near 0 by construction: at a step's first update every ratio is 1 and the advantages of a group add "
                        "up to 0; its gradient is not, so watch reward and length")
CHOICES = {"advantage": tuple(rl.ADVANTAGES), "loss": tuple(rl.COEFFICIENTS), "zero_std": ("drop", "keep"),
           "old_logp": ("sampler", "trainer"), "experts": ("none", "compare", "replay")}


@dataclasses.dataclass(frozen=True)
class RL:
    """config[NAME] of an RL job. rewards: weights by name; soft_overlong: tokens before max_new from which that reward counts.

    zero_std: groups with equal rewards are dropped or kept; old_logp: the sampler's, or computed again by the trainer; experts: what is
    done with the rollout's expert choices: nothing, compared with the trainer's, or replayed in the trainer.
    """

    name: str
    steps: int
    prompts: int
    group_size: int
    max_new: int
    temperature: float
    batch_size: int
    seq_len: int
    soft_overlong: int
    clip_low: float
    clip_high: float
    beta: float
    bias_rate: float
    shown: int
    rewards: dict
    families: dict
    lengths: tuple
    lr: Any
    eval_every: int
    eval_problems: int
    advantage: str
    loss: str
    zero_std: str
    old_logp: str
    experts: str

    def __post_init__(self):
        for name in ("steps", "prompts", "max_new", "batch_size", "eval_problems", "soft_overlong"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")
        for name in ("beta", "clip_low", "clip_high", "bias_rate", "eval_every", "shown"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.group_size >= 2, "group_size", self.group_size, "at least 2: an advantage compares answers")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(any(self.rewards.values()), "rewards", self.rewards, "at least one weight other than 0")


def parse(sub, name: str) -> RL:
    """Freezes config[name]."""
    kinds = {k: choice(sub[k]["kind"], allowed, f"{name}.{k}.kind") for k, allowed in CHOICES.items()}
    weights = {k: leaf(sub.rewards, k, float, f"{name}.rewards") for k in sub.rewards}
    for k in weights:
        choice(k, rewards.FUNCTIONS, f"{name}.rewards")
    given = kinds | dict(
        name=name, rewards=weights, families=evaluate_tasks.families_of(sub, name), lengths=evaluate_tasks.lengths_of(sub, name),
        lr=schedules.parse_lr(sub.lr, f"{name}.lr"), eval_every=leaf(sub.eval, "every", int, f"{name}.eval"),
        eval_problems=leaf(sub.eval, "problems", int, f"{name}.eval"))
    plain = {k: v for k, v in sub.items() if k not in (*given, "job", "init_from", "edits", "eval")}
    return freeze(RL, plain, name, **given)


def rl_job(config, workdir: str, name: str = "rl", stage: str | None = None) -> bool | None:
    """The job: config[name] as in configs/r1.py, config.evaluation, config.data.tasks, config.tokenizer, config.init_from."""
    path = pathlib.Path(workdir) if stage else prepare_workdir(workdir, config)
    s, spec = loop.setup(config, path, name, stage), parse(config[name], name)
    evaluation = evaluate_tasks.parse(config.evaluation)
    with named_input("data", "tokenizer"):
        tasks, tokenizer = corpus.parse(config.data).tasks, tokenizers.parse(config.tokenizer)
    require(s.cfg.mtp_depth == 0, "model.mtp_depth", s.cfg.mtp_depth, "0: RL trains no MTP module (edits=('model.mtp_depth=0',))")
    require(spec.experts != "replay" or s.cfg.moe is not None, f"{name}.experts.kind", spec.experts, "none for a model without experts")
    check_rewards(spec, tasks)
    loss = policy_loss(spec.loss, spec.beta > 0, spec.max_new, spec.experts if s.cfg.moe else "none")
    with jax.set_mesh(s.mesh):
        made = loop.programs(s.cfg, s.run, s.optimizer, loss, s.mesh)
        state = loop.start(s, None, made)
        reference = checkpoint.load_params(s.init_from.path)[1:] if spec.beta and s.init_from.path else None
        require(spec.beta == 0 or reference is not None, "init_from.path", s.init_from.path, f"a checkpoint: {name}.beta needs a reference")
        judge = Judge(s, spec, evaluation, tasks, tokenizer)
        state = run_steps(s, spec, made, state, judge, reference)
    if state is None:
        return False
    if stage is None:
        seen, _ = evaluate_tasks.full(judge.policy(state), tokenizer, tasks, evaluation, seed=s.seed, step=spec.steps)
        s.logger.event("evaluation", spec.steps, **seen, final=True)
        s.logger.event("closing", spec.steps, pass_at_1=seen["pass_at_1"])
        print(f"{name}: held-out pass@1 {seen['pass_at_1']:.3f} [{seen['pass_at_1_low']:.3f}, {seen['pass_at_1_high']:.3f}]\n"
              f"report: {report.write(path)}")
    return None


def check_rewards(spec: RL, tasks: miniature.Spec) -> None:
    """Refuses rewards that a hack could earn, on a problem of each family trained. Raises UserError."""
    rng = np.random.default_rng(0)
    problems = [miniature.problems(tasks, rng, 1, "train", {f: 1.0}, spec.lengths)[0] for f, w in spec.families.items() if w]
    with named_input("rewards"):
        rewards.check([k for k, w in spec.rewards.items() if w], problems, miniature.completion)


@dataclasses.dataclass(frozen=True)
class Judge:
    """What turns step numbers into problems, answers and scores."""

    s: loop.Setup
    spec: RL
    evaluation: evaluate_tasks.Evaluation
    tasks: miniature.Spec
    tokenizer: Any

    def policy(self, state) -> evaluate_tasks.Policy:
        return evaluate_tasks.policy(state.params, state.router_bias, self.s.cfg, self.s.run)

    def problems(self, step: int) -> list:
        rng = np.random.default_rng((self.s.seed, 0xA1, step))
        return miniature.problems(self.tasks, rng, self.spec.prompts, "train", self.spec.families, self.spec.lengths)

    def answers(self, state, problems: list, step: int) -> evaluate_tasks.Answers:
        G = self.spec.group_size
        return evaluate_tasks.complete(
            self.policy(state), self.tokenizer, [p.prompt for p in problems], G, seed=self.s.seed, step=step, batch_size=len(problems) * G,
            max_new=self.spec.max_new, temperature=self.spec.temperature)

    def rewards(self, problems: list, answers: evaluate_tasks.Answers, step: int) -> tuple[np.ndarray, dict[str, list[float]]]:
        """(weighted sums f64 [N], values by function)."""
        each = [p for p in problems for _ in range(self.spec.group_size)]
        texts = [t for group in answers.texts for t in group]
        n, m = len(each), self.spec.max_new
        columns = rewards.columns(each) | dict(
            length=answers.n_tokens.ravel().tolist(), max_length=[m] * n, cache=[self.spec.soft_overlong] * n, seed=[self.s.seed] * n,
            step=[step] * n)
        by = {k: rewards.FUNCTIONS[k]([p.prompt for p in each], texts, **columns) for k, w in self.spec.rewards.items() if w}
        return sum(self.spec.rewards[k] * np.asarray(v) for k, v in by.items()), by

    def look(self, state, step: int, n: int) -> tuple[dict, list]:
        """An evaluation on held-out problems."""
        return evaluate_tasks.score(self.policy(state), self.tokenizer, self.tasks, self.evaluation, seed=self.s.seed, step=step, n=n)


def run_steps(s: loop.Setup, spec: RL, made: loop.Programs, state, judge: Judge, reference):
    """Steps from the state's own to spec.steps: rollout, score, update, log, evaluate, save; returns the state, None if it
    was stopped on the way."""
    began, first, name = time.monotonic(), int(state.step), s.name
    require(first <= spec.steps, f"{name}.steps", spec.steps, f"at least the {first} steps that {s.checkpoints} holds")
    logp_of = packed_logp(s.cfg, s.run)
    with loop.asked_to_stop() as signals, Progress(name, spec.steps, first) as progress:
        if first == 0:
            progress.note(f"{name}: {ZERO_BY_CONSTRUCTION}")
            if spec.eval_every:
                evaluate(judge, state, 0, progress)
        for i in range(first, spec.steps):
            start = time.monotonic()
            problems = judge.problems(i)
            answers = judge.answers(state, problems, i)
            total, by = judge.rewards(problems, answers, i)
            rolled = time.monotonic()
            batches = minibatches(spec, judge.tokenizer, problems, answers, total, (s.seed, 0xA2, i))
            knobs = dict(lr=spec.lr(i, i / spec.steps), clip=s.optimizer.clip, bias_rate=spec.bias_rate, clip_low=spec.clip_low,
                         clip_high=spec.clip_high, beta=spec.beta, temperature=spec.temperature)
            knobs = {k: np.float32(v) for k, v in knobs.items()}
            for batch in batches:  # before the first update: these belong to the policy that sampled
                if spec.old_logp == "trainer":
                    batch["logp_old"] = np.asarray(logp_of(state.params, state.router_bias, batch, knobs["temperature"]))[None]
                if reference is not None:
                    batch["logp_ref"] = np.asarray(logp_of(*reference, batch, knobs["temperature"], False))[None]
            updates = []
            for batch in batches:
                state, metrics = made.step(state, batch | dict(knobs=knobs), loop.key_of(s.seed, "step"))
                updates.append(jax.device_get(metrics))
            state = state._replace(step=jnp.asarray(i + 1, jnp.int32))
            looks, described = describe(judge, problems, answers, total, by)
            now = time.monotonic()
            metrics = described | gather(updates)
            line = s.logger.step(i + 1, metrics | dict(lr=float(knobs["lr"]), tokens_per_s=metrics["tokens"] / (now - start),
                                                       step_time=now - start, rollout_time=rolled - start))
            if line["loss"] is None:
                raise FloatingPointError(f"{name}: the loss is not finite at step {i + 1}")
            progress.update(i + 1, {k: line[n] for k, n in dict(
                reward="reward/mean", right="right", length="completions/mean_length", worked="worked").items()})
            last = i + 1 == spec.steps
            if spec.eval_every and ((i + 1) % spec.eval_every == 0 or last):
                evaluate(judge, state, i + 1, progress)
                show(judge, problems, answers, total, looks, i + 1, progress)
            stopping = signals or (time.monotonic() - began > s.stop_after_s and not last)
            if last or stopping or (s.saving.every and (i + 1) % s.saving.every == 0):
                checkpoint.save(s.checkpoints, state, s.model, {}, s.saving.keep)
            if signals:
                raise KeyboardInterrupt
            if stopping:
                progress.note(f"{name}: stopped after {s.stop_after_s:.0f} s at step {i + 1}; the same command goes on")
                return None
    return state


def minibatches(spec: RL, tokenizer, problems: list, answers: evaluate_tasks.Answers, total: np.ndarray, seed: tuple) -> list[dict]:
    """One rollout as batches [1, batch_size, seq_len] of packed rows: tokens, segment_ids, positions, weight (1 on completions),
    advantages, logp_old, and the expert choices [1, B, T, n_moe, K] where the rollout has them; rows in random order, spread evenly,
    empty rows at a batch's end. [] if no group has a signal. Raises UserError for an answer that is longer than a row."""
    G, rollout = spec.group_size, answers.rollout
    advantages = rl.group_advantages(total, G, kind=spec.advantage).astype(np.float32)
    kept = [spec.zero_std == "keep" or rl.keep_group(group) for group in total.reshape(-1, G)]
    prompts = [np.asarray(miniature.encode_prompt(tokenizer, p.prompt), np.int32) for p in problems]
    widest = max(map(len, prompts)) + spec.max_new
    require(widest <= spec.seq_len, f"{spec.name}.seq_len", spec.seq_len, f"at least {widest}: the longest prompt and max_new")
    documents = []
    for a in [a for a in range(len(total)) if kept[a // G]]:
        prompt, n = prompts[a // G], int(rollout.lengths[a])
        weight = np.repeat(np.array([0, 1], np.float32), [len(prompt), n])
        documents.append(dict(tokens=np.concatenate([prompt, rollout.tokens[a, :n]]), weight=weight, answer=np.full(len(weight), a)))
    if not documents:
        return []
    rows = packing.pack(documents, spec.seq_len, tokenizer.pad)
    answer, counted = rows.pop("answer"), rows["weight"] > 0
    start = np.array([len(p) for p in prompts])[answer // G]
    at = np.where(counted, rows["positions"] - start, 0)
    rows["advantages"] = np.where(counted, advantages[answer], 0)
    rows["logp_old"] = np.where(counted, rollout.logp[answer, at], 0)
    if spec.experts != "none" and rollout.experts is not None:
        rows[_column(spec.experts)] = np.moveaxis(rollout.experts[:, answer, rows["positions"]], 0, 2)
    order = np.random.default_rng(seed).permutation(len(answer))
    n_updates = -(-len(order) // spec.batch_size)
    return [{k: _padded(v[part], spec.batch_size)[None] for k, v in rows.items()} for part in np.array_split(order, n_updates)]


def _padded(rows: np.ndarray, n: int) -> np.ndarray:
    return np.pad(rows, [(0, n - len(rows))] + [(0, 0)] * (rows.ndim - 1))


@functools.lru_cache(32)
def policy_loss(kind: str, with_reference: bool, max_length: int, experts: str) -> Callable:
    """loss(output, microbatch, totals) of one update; one object for equal arguments. Metrics are means over the batch's tokens."""
    def loss(output, microbatch, totals):
        knobs, tokens = microbatch["knobs"], microbatch["tokens"]
        mask = microbatch["weight"] > 0
        logits = output.logits / knobs["temperature"].astype(output.logits.dtype)
        logp = token_logp(logits, tokens)
        per_token, parts = rl.objective(
            logp, microbatch["logp_old"], microbatch.get("logp_ref"), microbatch["advantages"], mask, clip_low=knobs["clip_low"],
            clip_high=knobs["clip_high"], beta=knobs["beta"] if with_reference else 0.0)
        coefficients = rl.token_coefficients(kind, mask, microbatch["segment_ids"], totals, max_length).astype(per_token.dtype)
        metrics = {k: jnp.sum(v) / jnp.maximum(totals["tokens"], 1).astype(v.dtype) for k, v in (
            parts if with_reference else {k: v for k, v in parts.items() if k != "kl"}).items()}
        metrics["entropy"] = mean_entropy(logits, mask, totals["tokens"])
        if experts == "none":
            return -jnp.sum(coefficients * per_token), metrics | rl.logp_difference(logp, microbatch["logp_old"], mask)
        ours, theirs = jnp.moveaxis(output.experts, 0, 2), microbatch[_column(experts)]
        agree = jnp.all(jnp.sort(ours, axis=-1) == jnp.sort(theirs, axis=-1), axis=(-2, -1))
        flipped = jnp.sum(mask & ~agree).astype(logp.dtype) / jnp.maximum(totals["tokens"], 1).astype(logp.dtype)
        alike = rl.logp_difference(logp, microbatch["logp_old"], mask & agree)
        return -jnp.sum(coefficients * per_token), metrics | rl.logp_difference(logp, microbatch["logp_old"], mask) | {
            "sampling/flipped": flipped, "sampling/logp_difference/max_agreeing": alike["sampling/logp_difference/max"]}

    return loss


def _column(experts: str) -> str:
    """The batch's column with the rollout's choices: the step routes by `experts`, `rollout_experts` are only looked at."""
    return "experts" if experts == "replay" else "rollout_experts"


def mean_entropy(logits, mask, n):
    """Entropy of the policy before each token of mask, nats, summed over mask and divided by n."""
    logp = jax.nn.log_softmax(jax.lax.stop_gradient(logits).astype(jnp.float32))
    entropy = jnp.pad(-jnp.sum(jnp.exp(logp) * logp, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    return jnp.sum(jnp.where(mask, entropy, 0)) / jnp.maximum(n, 1)


@functools.lru_cache(8)
def packed_logp(cfg, run) -> Callable:
    """(params, router_bias, batch, temperature, replay) -> log p f32 [B, T] of a batch's tokens under the trainer's forward."""
    @jax.jit
    def logp(params, router_bias, tokens, positions, segment_ids, experts, temperature):
        output, _ = transformer.apply(params, tokens, cfg, run=run, positions=positions, segment_ids=segment_ids, router_bias=router_bias,
                                      experts=None if experts is None else jnp.moveaxis(experts, 2, 0))
        return token_logp(output.logits / temperature.astype(output.logits.dtype), tokens)

    def of(params, router_bias, batch, temperature, replay=True):
        experts = batch["experts"][0] if replay and "experts" in batch else None
        params = {k: v for k, v in params.items() if k != "mtp"}
        bias = None if router_bias is None else router_bias[:cfg.n_moe_layers]
        return logp(params, bias, batch["tokens"][0], batch["positions"][0], batch["segment_ids"][0], experts, temperature)

    return of


def gather(updates: list[dict]) -> dict[str, Any]:
    """A step's metrics from those of its updates: sums of tokens and load, else means; of `sampling/` the first update's, whose policy
    is the one that sampled. Without an update the loss is 0."""
    if not updates:
        return dict(loss=0.0, updates=0, tokens=0.0)
    out: dict[str, Any] = dict(updates=len(updates))
    for key, first in updates[0].items():
        values = [u[key] for u in updates]
        out[key] = first if key.startswith("sampling/") else sum(values) if key in ("tokens", "moe/load") else sum(values) / len(values)
    out["tokens"] = float(out["tokens"])
    return out


def describe(judge: Judge, problems: list, answers: evaluate_tasks.Answers, total: np.ndarray, by: dict) -> tuple[list, dict[str, Any]]:
    """(inspected answers, metrics of a rollout by the names people look for)."""
    G = judge.spec.group_size
    texts = [t for group in answers.texts for t in group]
    looks = [evaluate_tasks.inspect(problems[a // G], t, judge.tokenizer) for a, t in enumerate(texts)]
    share = lambda hits: float(np.mean(hits)) if len(hits) else None  # noqa: E731
    metrics = rl.reward_metrics(total, G, by, answers.n_tokens.ravel(), answers.finished.ravel())
    return looks, metrics | dict(
        clipped_ratio=metrics["completions/clipped_ratio"], right=share([x["right"] and x["tagged"] for x in looks]),
        worked=share([x["worked"] for x in looks]), consistency=share([x["consistency"] for x in looks]),
        length_without_tags=share([x["length"] for x in looks]),
        worked_right=share([x["right"] for x in looks if x["worked"]]), direct_right=share([x["right"] for x in looks if not x["worked"]]))


def evaluate(judge: Judge, state, step: int, progress: Progress) -> None:
    """Logs and shows an evaluation on held-out problems."""
    seen, _ = judge.look(state, step, judge.spec.eval_problems)
    judge.s.logger.event("evaluation", step, **seen)
    progress.note(f"{judge.s.name} step {step}: held-out pass@1 {seen['pass_at_1']:.3f} [{seen['pass_at_1_low']:.3f}, "
                  f"{seen['pass_at_1_high']:.3f}], length {seen['length']:.2f}, worked {seen['worked']:.2f}, one language "
                  f"{seen['consistency']:.2f}")


def show(judge: Judge, problems: list, answers: evaluate_tasks.Answers, total: np.ndarray, looks: list, step: int,
         progress: Progress) -> None:
    """The first answers of a rollout to samples.jsonl and the console."""
    G = judge.spec.group_size
    for p in range(min(judge.spec.shown, len(problems))):
        line = evaluate_tasks.trace(problems[p], answers.texts[p][0], looks[p * G], int(answers.n_tokens[p, 0]))
        judge.s.logger.sample(step, **line, reward=float(total[p * G]))
        progress.note(f"  {line['prompt']} {line['completion']}  ({'right' if line['right'] else 'wrong'}, reward {total[p * G]:.2f})")
