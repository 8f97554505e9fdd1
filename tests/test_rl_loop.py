"""The RL loop: token ids alone pass from sampler to trainer, both agree, steps move the policy to what is rewarded, resume is exact."""
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_recipe

from data import corpus
from data import tokenizer as tokenizers
from model.errors import UserError
from train import checkpoint, evaluate_tasks, loop, rl, rl_loop
from train.metrics import read_jsonl


def judge_of(config, tmp_path, **changed):
    s = loop.setup(config, tmp_path, "r1_zero", "r1_zero")
    spec = dataclasses.replace(rl_loop.parse(config.r1_zero, "r1_zero"), **changed)
    return rl_loop.Judge(s, spec, evaluate_tasks.parse(config.evaluation), corpus.parse(config.data).tasks,
                         tokenizers.parse(config.tokenizer))


def fresh(judge):
    """(state, programs) of a random policy."""
    loss = rl_loop.policy_loss(judge.spec.loss, False, judge.spec.max_new, judge.spec.experts)
    with jax.set_mesh(judge.s.mesh):
        made = loop.programs(judge.s.cfg, judge.s.run, judge.s.optimizer, loss, judge.s.mesh)
        return made.create(jax.random.key(3)), made


def knobs_of(**more):
    return {k: np.float32(v) for k, v in (dict(lr=0.0, clip=1.0, bias_rate=0.0, clip_low=0.2, clip_high=0.2, beta=0.0,
                                               temperature=1.0) | more).items()}


@pytest.fixture(scope="module")
def rolled(tmp_path_factory):
    """A real rollout of a random policy, with made-up rewards: the second group has no signal."""
    judge = judge_of(tiny_recipe.config(), tmp_path_factory.mktemp("rolled"), experts="replay")
    state, made = fresh(judge)
    problems = judge.problems(0)
    with jax.set_mesh(judge.s.mesh):
        answers = judge.answers(state, problems, 0)
    total = np.random.default_rng(0).normal(size=16)
    total[4:8] = 1.5
    batches = rl_loop.minibatches(judge.spec, judge.tokenizer, problems, answers, total, (0, 1, 2))
    return judge, state, made, problems, answers, total, batches


def test_packed_columns_follow_each_answer_and_groups_without_signal_are_left_out(rolled):
    judge, _, _, problems, answers, total, batches = rolled
    advantages, seen = rl.group_advantages(total, 4, kind="group_std"), []
    prompts = [tuple(judge.tokenizer.encode(p.prompt)) for p in problems]
    for batch in batches:
        rows = {k: v[0] for k, v in batch.items()}
        assert rows["tokens"].shape == (judge.spec.batch_size, judge.spec.seq_len)
        for r in range(len(rows["tokens"])):
            for segment in range(1, rows["segment_ids"][r].max(initial=0) + 1):
                here = rows["segment_ids"][r] == segment
                ids, counted = rows["tokens"][r][here], rows["weight"][r][here] > 0
                n_prompt = int(np.argmax(counted))
                assert counted[n_prompt:].all() and not counted[:n_prompt].any()
                p = prompts.index(tuple(ids[1:n_prompt].tolist()))
                new = ids[n_prompt:]
                a = next(4 * p + g for g in range(4) if answers.n_tokens[p, g] == len(new) and 4 * p + g not in seen
                         and (answers.rollout.tokens[4 * p + g, :len(new)] == new).all())
                seen.append(a)
                np.testing.assert_array_equal(rows["logp_old"][r][here][counted], answers.rollout.logp[a, :len(new)])
                np.testing.assert_allclose(rows["advantages"][r][here][counted], advantages[a], rtol=1e-6)
                np.testing.assert_array_equal(np.moveaxis(rows["experts"][r][here], 1, 0), answers.rollout.experts[:, a, :len(ids)])
    assert sorted(seen) == [a for a in range(16) if not 4 <= a < 8]


def test_minibatches_are_spread_evenly_and_without_a_signal_there_are_none(rolled):
    judge, _, _, problems, answers, total, batches = rolled
    filled = [int((b["segment_ids"][0].max(axis=1) > 0).sum()) for b in batches]
    assert max(filled) - min(filled) <= 1
    assert rl_loop.minibatches(judge.spec, judge.tokenizer, problems, answers, np.ones(16), (0,)) == []
    kept = dataclasses.replace(judge.spec, zero_std="keep")
    many = rl_loop.minibatches(kept, judge.tokenizer, problems, answers, np.ones(16), (0,))
    assert sum(int((b["weight"] > 0).sum()) for b in many) == answers.n_tokens.sum() and not any(b["advantages"].any() for b in many)
    assert rl_loop.gather([])["loss"] == 0.0


def test_sampler_and_trainer_agree_and_replayed_choices_leave_no_flip(rolled):
    judge, state, made, *_, batches = rolled
    with jax.set_mesh(judge.s.mesh):
        for batch in batches:
            copied = jax.tree.map(jnp.copy, state)  # a step donates its state
            _, metrics = jax.device_get(made.step(copied, batch | dict(knobs=knobs_of()), jax.random.key(0)))
            assert metrics["sampling/logp_difference/mean"] < 1e-5
            assert metrics["sampling/logp_difference/max"] < 1e-4
            assert metrics["sampling/flipped"] == 0
            np.testing.assert_allclose(metrics["loss"], -np.sum(_coefficients(batch) * batch["advantages"]), atol=1e-3)
            again = rl_loop.packed_logp(judge.s.cfg, judge.s.run)(state.params, state.router_bias, batch, np.float32(1.0))
            counted = batch["weight"][0] > 0
            np.testing.assert_allclose(np.asarray(again)[counted], batch["logp_old"][0][counted], atol=1e-4)


def _coefficients(batch):
    """1 / (answers * length), by counting."""
    out = np.zeros(batch["weight"].shape)
    keys = [(r, s) for r in range(out.shape[1]) for s in range(1, batch["segment_ids"][0, r].max() + 1)]
    for r, s in keys:
        here = (batch["segment_ids"][0, r] == s) & (batch["weight"][0, r] > 0)
        out[0, r, here] = 1 / here.sum() / len(keys)
    return out


def test_an_update_makes_better_answers_likelier_and_worse_ones_less_likely(rolled):
    judge, state, made, *_, batches = rolled
    logp = rl_loop.packed_logp(judge.s.cfg, judge.s.run)
    before = after = 0.0
    with jax.set_mesh(judge.s.mesh):
        moved = jax.tree.map(jnp.copy, state)
        for batch in batches:
            before += float(np.sum(np.asarray(logp(moved.params, moved.router_bias, batch, np.float32(1))) * batch["advantages"][0]))
            moved, _ = made.step(moved, batch | dict(knobs=knobs_of(lr=1e-3)), jax.random.key(0))
            after += float(np.sum(np.asarray(logp(moved.params, moved.router_bias, batch, np.float32(1))) * batch["advantages"][0]))
    assert after > before + 0.1


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    """Whole run against one killed after its first step: parameters, logged numbers and samples."""
    config = tiny_recipe.config(r1_zero__rewards__random=1.0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    rl_loop.rl_job(config, str(whole), "r1_zero", "r1_zero")
    shutil.copytree(whole, killed, symlinks=True)
    stage = killed / "checkpoints" / "r1_zero"
    for step in (2, 3):
        shutil.rmtree(stage / str(step))
    (stage / "final").unlink()
    (stage / "final").symlink_to("1")
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"stage": "r1_zero", "step": 4, "los')
    rl_loop.rl_job(config, str(killed), "r1_zero", "r1_zero")

    a, b = (checkpoint.load_params(run / "checkpoints" / "r1_zero" / "3")[1:] for run in (whole, killed))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert (whole / "samples.jsonl").read_text() == (killed / "samples.jsonl").read_text()
    times = {"step_time", "rollout_time", "tokens_per_s"}
    lines = [[{k: v for k, v in line.items() if k not in times} for line in read_jsonl(run / "metrics.jsonl")] for run in (whole, killed)]
    assert lines[0] == lines[1] and len([x for x in lines[0] if "event" not in x]) == 3
    assert {"reward/mean", "reward/accuracy", "frac_reward_zero_std", "completions/mean_length", "entropy", "grad_norm", "worked",
            "sampling/logp_difference/mean", "sampling/flipped", "clip_ratio/low"} <= {k for x in lines[0] for k in x}
    assert json.loads((whole / "samples.jsonl").read_text().splitlines()[0])["stage"] == "r1_zero"


def test_the_reference_is_the_policy_that_the_stage_started_from(tmp_path):
    """KL is 0 at the first update and above 0 once the policy has moved; the trainer's own log-probs serve as old ones."""
    config = tiny_recipe.config(r1_zero__beta=0.5, r1_zero__old_logp__kind="trainer", r1_zero__rewards__random=1.0, r1_zero__steps=2,
                                r1_zero__lr__linear__peak=2e-2, r1_zero__lr__linear__warmup_steps=0, r1_zero__eval__every=0,
                                r1_zero__experts__kind="none", r1_zero__batch_size=16, checkpoint__every=0)
    judge = judge_of(config, tmp_path, experts="none")
    state, _ = fresh(judge)
    checkpoint.save_params(tmp_path / "start", 0, config.model.to_dict(), state.params, state.router_bias)
    config.init_from.path = str(tmp_path / "start")
    rl_loop.rl_job(config, str(tmp_path), "r1_zero", "r1_zero")
    steps = [x for x in read_jsonl(tmp_path / "metrics.jsonl") if "event" not in x]
    assert steps[0]["updates"] == 1 and abs(steps[0]["kl"]) < 1e-6 and steps[1]["kl"] > 1e-3


@pytest.mark.parametrize(("edits", "words"), [
    (dict(r1_zero__beta=0.1), "init_from.path"),
    (dict(r1_zero__group_size=1), "group_size"),
    (dict(r1_zero__advantage__kind="std"), "r1_zero.advantage.kind"),
    (dict(r1_zero__rewards__accuracy=0.0, r1_zero__rewards__format=0.0), "rewards"),
    (dict(r1_zero__lengths=(9,)), "r1_zero.lengths"),
    (dict(r1_zero__seq_len=20), "r1_zero.seq_len"),
    (dict(model__mtp_depth=1), "model.mtp_depth"),
])
def test_a_mistake_is_one_line_that_names_the_leaf(edits, words, tmp_path):
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        rl_loop.rl_job(tiny_recipe.config(**edits), str(tmp_path), "r1_zero", "r1_zero")


def test_rewards_that_are_blind_to_the_answer_are_the_same_again_on_resume(rolled):
    judge, _, _, problems, answers, *_ = rolled
    blind = dataclasses.replace(judge, spec=dataclasses.replace(judge.spec, rewards=dict(random=1.0, length_penalty=2.0)))
    first, by = blind.rewards(problems, answers, 5)
    again, _ = blind.rewards(problems, answers, 5)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(first, np.array(by["random"]) - 2 * answers.n_tokens.ravel() / judge.spec.max_new)
    assert not np.array_equal(first, blind.rewards(problems, answers, 6)[0])
