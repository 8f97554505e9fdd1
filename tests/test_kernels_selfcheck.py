"""`python -m pallas_kernels.selfcheck` without a card: the reference against itself, and a wrong op is seen."""
import jax.numpy as jnp
import pytest

from pallas_kernels import selfcheck


@pytest.mark.slow
def test_every_op_is_checked_and_equals_itself(capsys):
    errors = dict(selfcheck.check())
    assert len(errors) == 33 and set(errors.values()) == {0.0}
    assert len(capsys.readouterr().out.splitlines()) == len(errors)


def test_a_wrong_op_shows(monkeypatch):
    def wrong(x, implementation):
        return x * (1.01 if implementation == "kernel" else 1.0)

    monkeypatch.setattr(selfcheck, "is_hopper", lambda: True)
    monkeypatch.setattr(selfcheck, "_cases", lambda: [("wrong", wrong, (jnp.ones(8),), {})])
    assert selfcheck.check()[0][1] > selfcheck.TOLERANCE
