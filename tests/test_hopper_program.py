"""The training step as XLA compiles it for an H100, without a GPU (tests/hopper_program.py): what must not come back."""
import re
import subprocess
import sys

import pytest

from tests import sass

pytestmark = pytest.mark.sass


@pytest.fixture(scope="module")
def listing():
    """What tests/hopper_program.py prints for two layers of `700m`."""
    assert not sass.missing(), sass.missing()
    done = subprocess.run([sys.executable, "-m", "tests.hopper_program", "configs/deepseek_v3.py:700m", "model.n_layers=2"],
                          capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def test_a_step_has_no_more_kernels_than_it_had(listing):
    assert int(re.search(r"(\d+) kernels", listing)[1]) <= 253


def test_the_residual_streams_norms_are_in_our_kernels(listing):
    rows = [line for line in listing.splitlines() if re.search(r"Block/(reduce_sum|rsqrt|div)\b", line) and "[8,2048" in line]
    assert "rms_norm" in listing and not rows


def test_what_is_added_around_the_experts_is_added_by_our_kernel(listing):
    assert "gather_sum" in listing and "moe/add_any" not in listing


def test_nothing_is_sorted_and_swiglus_gradient_is_one_pass(listing):
    assert not re.search(r"\bsort\b", listing)
    concatenated = [line for line in listing.splitlines() if "moe/concatenate" in line or "Block/concatenate" in line]
    assert concatenated and not [line for line in concatenated if "wrapped" in line]


def test_our_kernels_and_cudnn_are_what_runs(listing):
    assert "mosaic_gpu" in listing and "__cudnn$fmhaSoftmaxBackward" in listing
