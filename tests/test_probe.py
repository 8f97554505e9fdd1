"""The probe: its statistics against float64, an outlier that stays in its tile, and two runs whose difference is what was put in."""
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_model import random_tokens, tiny

import main
from model import precision, transformer
from model.config import Execution
from model.errors import UserError, freeze
from model.tape import LayerTape, Tape
from train import probe, probe_page
from train import probe_statistics as statistics

M, K = 160, 200


def rounded(x, exponent, mantissa, largest):
    """x f64 at the nearest value of a format with this smallest exponent and so many bits of mantissa, ties to even."""
    x = np.clip(x, -largest, largest)
    power = np.maximum(np.floor(np.log2(np.where(x == 0, 1, np.abs(x)))), exponent)
    step = 2.0 ** (power - mantissa)
    return np.round(x / step) * step


def oracle(x, name, past):
    """x f64 through a scheme, written anew: scales by loops over tiles."""
    rows, columns = {"1x128": (1, 128), "e5m6": (1, 128), "128x1": (128, 1), "128x128": (128, 128)}.get(name, x.shape)
    e5m6 = name == "e5m6"
    out, largest = np.empty_like(x), 65024.0 if e5m6 else 448.0
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            tile = x[i:i + rows, j:j + columns]
            scale = (past if name == "delayed" else max(np.abs(tile).max(), 1e-30)) / largest
            scale = 2.0 ** np.ceil(np.log2(scale)) if e5m6 else scale
            out[i:i + rows, j:j + columns] = rounded(tile / scale, *((-14, 6) if e5m6 else (-6, 3)), largest) * scale
    return out


def test_statistics_against_float64(rng):
    x = (rng.normal(size=(M, K)) * np.exp(1.2 * rng.normal(size=(M, K)))).astype(np.float32)
    x[5, 7], x[40:60, :] = 1e5, 0  # an outlier, rows of padding
    x *= np.float32(1e-9)  # the size of gradients
    n, past, exact = (M - 20) * K, 20e-9, x.astype(np.float64)
    found = jax.jit(statistics.statistics)(x, jnp.float32(n), jnp.float32(past))
    power = np.sum(exact ** 2)
    np.testing.assert_allclose([found["amax"], found["rms"]], [1e-4, np.sqrt(power / n)], rtol=1e-5)
    np.testing.assert_allclose(found["kurtosis"], n * np.sum(exact ** 4) / power ** 2, rtol=1e-4)
    for name in statistics.SCHEMES:
        want = oracle(exact, name, past)
        np.testing.assert_allclose(found["snr"][name], 10 * np.log10(power / np.sum((exact - want) ** 2)), atol=0.01, err_msg=name)
        lost = np.sum((want == 0) & (exact != 0)) / np.sum(exact != 0)
        np.testing.assert_allclose(found["underflow"][name], lost, atol=2e-4, err_msg=name)
    assert found["underflow"]["tensor"] > 0.1 > found["underflow"]["1x128"] and found["saturation"]["tensor"] == 0
    np.testing.assert_allclose(found["saturation"]["delayed"], np.sum(np.abs(exact) > past) / np.sum(exact != 0), rtol=1e-5)
    zero = jax.jit(statistics.statistics)(np.zeros((M, K), np.float32), jnp.float32(n), jnp.float32(past))
    assert zero["rms"] == zero["kurtosis"] == 0 and not any(np.isnan(v) for v in jax.tree.leaves(zero))


def test_an_outlier_moves_its_own_tile_alone(rng):
    """The record of a linear's input, with and without one value 1e4 times too large."""
    x, w = jnp.array(rng.normal(size=(16, 384)), jnp.bfloat16), jnp.array(rng.normal(size=(8, 384)), jnp.float32)

    @jax.jit
    def read(x):
        inputs = {}
        for kind in ("fp8_block", "fp8_tensor"):
            run, tape = Execution(precision=precision.Precision(kind)), LayerTape(Tape())
            precision.linear(x, precision.prepare({"q": w}, run)["q"], run, "ffn/down", tape)
            inputs[kind] = probe.dequantized(tape.records["ffn/down"].input)
        return inputs

    before, after = read(x), read(x.at[3, 130].set(1e4))
    moved = {kind: np.asarray(before[kind] != after[kind]).reshape(16, 3, 128).any(axis=-1) for kind in before}
    assert np.argwhere(moved["fp8_block"]).tolist() == [[3, 1]]  # bit for bit, the tile of the outlier alone
    assert moved["fp8_tensor"].all()


def test_equal_precisions_differ_by_nothing_and_the_tape_has_the_gradients(rng):
    cfg, run = tiny(mtp_depth=0, n_layers=1), Execution(precision=precision.Precision("bf16"))
    params = jax.tree.map(lambda leaf: jnp.array(0.2 * rng.normal(size=leaf.shape), jnp.float32),
                          jax.eval_shape(lambda key: transformer.init(key, cfg), jax.random.key(0)))
    tokens = random_tokens(cfg, (2, 32))
    batch, look = dict(tokens=tokens, weight=jnp.ones(tokens.shape, jnp.float32)), probe.make_pass(cfg, run)
    compare = jax.jit(lambda a, b: probe.compare(a, b, None, cfg=cfg, runs=(run, run)))
    a, again = (look(params, None, batch, None) for _ in range(2))
    found = compare(again, a)
    assert all(not np.any(v) for v in jax.tree.leaves(found)) and len(found["output"]["dense"]) == 7
    other = look(params | dict(embedding=params["embedding"] + 0.1), None, batch, None)
    found = compare(other, a)  # what does differ is seen everywhere
    assert all(np.all(np.asarray(v) > 0) for k in ("input", "output", "gradient", "between", "weights") for v in jax.tree.leaves(found[k]))
    record, dy = a.records["dense"]["mla/q_up"], a.gradients["dense"]["mla/q_up"]
    dw = precision.weight_gradient(record.input[0], dy[0], "mla/q_up", run)
    np.testing.assert_allclose(dw, a.dparams["dense"]["attention"]["q_up"][0], rtol=1e-5, atol=1e-8)


def test_where_they_part_first():
    rows = [dict(layer=i // 2, site=f"s{i % 2}", output=v) for i, v in enumerate((0.0, 0.05, 0.2, float("nan")))]
    assert probe.first_over(rows, "output", 0.1) == dict(layer=1, site="s0", difference=0.2)
    assert np.isnan(probe.first_over(reversed(rows), "output", 0.1)["difference"])  # not a number is no agreement
    assert probe.first_over(rows[:2], "output", 0.1) is None


@pytest.mark.parametrize("edit", [dict(against="fp9"), dict(seq_len=1), dict(threshold=-1.0), dict(history=0)])
def test_bad_leaves_are_named(edit):
    with pytest.raises(UserError, match=f"probe.{next(iter(edit))}"):
        freeze(probe.Probe, dict(against="bf16", batch_size=4, seq_len=8, threshold=0.1, history=1) | edit, "probe")


@pytest.mark.slow
@pytest.mark.parametrize("kind, against", [("fp8_block", "bf16"), ("fp8_block", "fp8_block"), ("fp8_tensor", "bf16"),
                                           ("fp8_block_grad", "fp32"), ("fp8_no_promotion", "bf16"), ("bf16", "fp32"), ("fp32", "fp32"),
                                           ("fp8_delayed", "fp8_tensor")])
def test_the_job(kind, against, tmp_path, capsys):
    argv = tiny_run.arguments(tmp_path, f"run.precision.kind={kind}", f"probe.against={against}", "probe.seq_len=32", "probe.batch_size=2",
                              "probe.history=2", "probe.threshold=0.001", job="probe")
    assert main.run(argv) == 0
    result = json.loads((tmp_path / "probe.json").read_text())
    differences = [row[k] for row in result["sites"] for k in ("input", "output", "gradient")]
    assert len(result["sites"]) == 7 + 9 and {e["role"] for e in result["tensors"]} == {"input", "gradient", "weight"}
    equal = kind in (against, "fp8_delayed")  # delayed scales without a past are those of now
    if equal:
        assert not any(differences) and result["parted"] == dict(forward=None, backward=None)
    else:
        assert 0 < max(differences) < 0.6  # rows of experts correspond although the kinds pad groups differently
    assert result["statistics_of"] == ("bf16" if against.startswith("fp8") else against)
    page = (tmp_path / "probe.html").read_text()
    assert page.count("data:image/png;base64") >= 10 and "src=\"http" not in page
    sites = [(row["layer"], row["site"]) for row in result["sites"]]
    assert sites[0] == (0, "mla/q_down") and sites[6] == (0, "ffn/down") and sites[-1] == (1, "moe/shared_down")
    assert ("first differ" in capsys.readouterr().out) == (not equal)
    assert probe_page.tensors(result, "gradient").keys() >= {"mla/q_down", "moe/down"}


def test_the_docs_name_tests_that_exist():
    root = pathlib.Path(__file__).parent.parent
    named = {name for path in (root / "docs").glob("*.md") for name in re.findall(r"`(test_\w+)`", path.read_text())}
    defined = {name for path in (root / "tests").glob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert named and named <= defined, named - defined
