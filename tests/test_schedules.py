"""Schedules against the numbers V3 §4.2 and V2 §3.1.2 print."""
import numpy as np
import pytest

from configs import deepseek_v3
from model.errors import UserError
from train import schedules

T = 1e12
V3 = deepseek_v3.get_config("671b").pretrain


@pytest.fixture(scope="module")
def v3_plan():
    rows = V3.batch_size // V3.n_micro
    return schedules.plan(V3.steps, V3.batch_size, schedules.parse_ramp(V3.ramp, "ramp"), multiple=rows)


@pytest.mark.parametrize("tokens, published", [
    (0, 2.2e-4), (10 * T, 2.2e-4), (12.15 * T, (2.2e-4 + 2.2e-5) / 2), (14.3 * T, 2.2e-5), (14.5 * T, 2.2e-5), (14.632 * T, 2.2e-5),
    (14.634 * T, 7.3e-6), (14.7 * T, 7.3e-6), (14.8 * T, 7.3e-6)])
def test_v3_learning_rate_at_published_tokens(tokens, published):
    """The cosine over 4.3T from 10T on is at its mean in its middle; steps are past the warm-up."""
    lr = schedules.parse_lr(V3.lr, "lr")
    assert lr(5000, tokens / (14.8 * T)) == pytest.approx(published, rel=1e-12)


def test_v3_cosine_is_a_half_cosine():
    lr = schedules.parse_lr(V3.lr, "lr")
    for share in np.linspace(0, 1, 11):
        expected = 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + np.cos(np.pi * share)) / 2
        assert lr(10**5, (10 + 4.3 * share) / 14.8) == pytest.approx(expected, rel=1e-9)


def test_v3_warms_up_linearly_over_2000_steps():
    lr = schedules.parse_lr(V3.lr, "lr")
    for done in (1, 500, 1000, 2000, 2001):  # steps done once this one is
        assert lr(done - 1, 0.0) == pytest.approx(2.2e-4 * min(done / 2000, 1))


def test_v3_plan_spends_14_8_trillion_tokens_on_the_published_ramp(v3_plan):
    rows, tokens = v3_plan.rows, v3_plan.rows * V3.seq_len
    done = np.cumsum(tokens) - tokens
    total = tokens.sum()
    # one step more or less would be further off
    assert abs(total - 14.8 * T) <= tokens[-1] / 2
    assert rows[0] == 3072 and rows[-1] == 15360 and np.all(np.diff(rows) >= 0)
    # linear in the tokens done, to half a micro-batch, and whole from 469B on
    ramp = 3072 + (15360 - 3072) * np.minimum(done / 469e9, 1)
    assert np.max(np.abs(rows - ramp)) <= 65
    assert done[np.argmax(rows == 15360)] == pytest.approx(469e9, rel=0.01)
    assert np.all(rows[done > 469e9] == 15360)
    np.testing.assert_allclose(v3_plan.progress, done / total, rtol=1e-12)


def test_v3_learning_rate_along_its_own_plan(v3_plan):
    """Step numbers and progress together: the bounds fall where the tokens say."""
    lr, done = schedules.parse_lr(V3.lr, "lr"), v3_plan.progress * 14.8
    values = np.array([lr(i, v3_plan.progress[i]) for i in range(0, v3_plan.steps, 50)])
    done = done[::50]
    assert np.all(values[(done > 0.2) & (done < 10)] == 2.2e-4)
    assert np.all(np.diff(values[(done > 10) & (done < 14.3)]) < 0)
    np.testing.assert_allclose(values[(done > 14.3) & (done < 14.633)], 2.2e-5)
    assert np.all(values[done > 14.634] == 7.3e-6)


def test_v3_mtp_weight_and_bias_rate_switch_at_10T_and_14_3T():
    weight, rate = schedules.parse_switch(V3.mtp_weight, "mtp_weight"), schedules.parse_switch(V3.bias_rate, "bias_rate")
    assert [weight(t / 14.8) for t in (0, 9.99, 10.01, 14.8)] == [0.3, 0.3, 0.1, 0.1]
    assert [rate(t / 14.8) for t in (0, 14.29, 14.31, 14.8)] == [1e-3, 1e-3, 0.0, 0.0]


def test_multi_step_is_v2s():
    """2.4e-4, times 0.316 at 60 % and again at 90 % of the tokens."""
    V3_lr = deepseek_v3.get_config("v2").pretrain.lr
    lr = schedules.MultiStep(**V3_lr.multi_step)
    assert [lr(5000, p) for p in (0.0, 0.59, 0.61, 0.89, 0.91)] == pytest.approx(
        [2.4e-4, 2.4e-4, 2.4e-4 * 0.316, 2.4e-4 * 0.316, 2.4e-4 * 0.316**2])


def test_other_kinds_at_their_ends_and_middles():
    assert schedules.Constant(1e-3, 10)(4, 0.9) == pytest.approx(5e-4)
    cosine = schedules.Cosine(1e-3, 1e-4, 0)
    assert [cosine(0, p) for p in (0, 0.5, 1)] == pytest.approx([1e-3, 5.5e-4, 1e-4])
    linear = schedules.Linear(1e-3, 0.0, 0, 0.5)
    assert [linear(0, p) for p in (0, 0.5, 0.75, 1)] == pytest.approx([1e-3, 1e-3, 5e-4, 0])


@pytest.mark.parametrize("steps, batch, ramp, multiple", [
    (37, 64, (8, 0.3), 8), (5, 64, (64, 0.5), 8), (400, 96, (12, 1.0), 4), (1, 8, (4, 0.1), 4)])
def test_a_ramp_keeps_to_its_steps_and_sizes(steps, batch, ramp, multiple):
    plan = schedules.plan(steps, batch, ramp, multiple)
    assert plan.steps == steps and np.all(plan.rows % multiple == 0)
    assert np.all((plan.rows >= ramp[0]) & (plan.rows <= batch)) and np.all(np.diff(plan.rows) >= 0)
    share = plan.progress[np.argmax(plan.rows == batch)]
    assert share <= ramp[1] + 2 * batch / plan.rows.sum()
    assert plan.progress[0] == 0 and plan.progress[-1] < 1


@pytest.mark.parametrize("make, named", [
    (lambda: schedules.V3(1e-3, 1e-4, 1e-5, 10, 0.9, 0.5, 1.0), "constant_until"),
    (lambda: schedules.Ramp(0, 0.5), "start"), (lambda: schedules.Ramp(4, 0.0), "until"),
    (lambda: schedules.Linear(1e-3, 0.0, 10, 1.5), "constant_until"), (lambda: schedules.Switch(0.3, 0.1, -1.0), "until"),
    (lambda: schedules.Constant(1e-3, -5), "warmup_steps"), (lambda: schedules.MultiStep(1e-3, 0.3, 0, 0.9, 0.6), "first")])
def test_impossible_schedules_are_one_line(make, named):
    with pytest.raises(UserError, match=named):
        make()
