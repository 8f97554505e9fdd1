"""Job `schedule`: files written, measured times, one clear line for what does not fit."""
import json

import pytest

from configs.schedule import get_config
from model.errors import UserError
from train.pipeline import compare
from train.pipeline.job import schedule
from train.pipeline.op import Times
from train.pipeline.schedule import make


def config(**leaves):
    config = get_config()
    config.schedule.update(map_ranks=(2,), map_per_rank=(1, 2), map_overlapped=(1.0,), map_comm=(0.0,))
    config.schedule.update(leaves)
    return config


def test_the_job_writes_table_and_pictures(tmp_path, capsys):
    times = tmp_path / "measured.json"
    times.write_text(json.dumps(dict(t_forward=1, t_backward_input=1, t_backward_weight=1, t_overlapped=2, t_comm=0)))
    schedule(config(n_ranks=4, n_microbatches=10, times=str(times)), str(tmp_path))
    written = (tmp_path / "schedule.md").read_text()
    assert written in capsys.readouterr().out
    assert "| dualpipe | 10 | 26 | 1 | 1 | 3.8% | 5 | 2 | 6 |" in written  # makespan by the measured pairs
    assert "allowed: a multiple of n_ranks = 4 (interleaved): shown with 12." in written
    for name in ("schedule", "bubble", "winner"):
        for ending in ("png", "svg"):
            assert 4_000 < (tmp_path / "plots" / f"{name}.{ending}").stat().st_size < 200_000


def test_a_broken_csv_is_named(tmp_path, capsys):
    path = tmp_path / "mine.csv"
    path.write_text("0, F0, B0, F1\n1, F0, F1, B0, B1\n")
    with pytest.raises(UserError, match="^schedule mine.csv: rank 0, slot 2: missing: no input part of micro-batch 1"):
        schedule(config(csv=str(path)), str(tmp_path))


@pytest.mark.parametrize("leaves, message", [
    (dict(n_ranks=7), "schedule.n_ranks: found 7, allowed: an even number"),
    (dict(n_microbatches=21), "schedule.n_microbatches: found 21"),
    (dict(kind="interleaved"), "schedule.n_microbatches: found 20, allowed: a multiple of n_ranks = 8"),
    (dict(kind="zb2p"), "schedule.kind: found 'zb2p', allowed: gpipe, 1f1b"),
    (dict(t_forward=0.0), "schedule.t_forward: found 0.0"),
    (dict(times="nowhere.json"), "schedule.times: found 'nowhere.json'"),
    (dict(csv="nowhere.csv"), "schedule.csv: found 'nowhere.csv'"),
    (dict(map_ranks=(0,)), r"schedule.map_ranks: found \(0,\), allowed: integers, at least 1"),
])
def test_bad_leaves(leaves, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        schedule(config(**leaves), str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "{", '{"t_forward": 1}', '{"t_forwards": 1}'])
def test_bad_times(text, tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(text)
    with pytest.raises(UserError, match="measured.json"):
        schedule(config(times=str(path)), str(tmp_path))


def test_messages():
    found = {kind: compare.messages(make(kind, 4, 8)) for kind in ("1f1b", "interleaved", "dualpipe", "dualpipev")}
    assert found == {"1f1b": 6, "interleaved": 14, "dualpipe": 6, "dualpipev": 12}  # the turn of dualpipev is no message


def test_winners():
    cases = {(1.0, 0.0): Times(), (1.0, 1.0): Times(t_comm=1.0)}
    grids = compare.winners((4,), (1, 2, 8), 2, cases)
    assert [grids[1.0, 0.0][4, each].kind for each in (1, 2, 8)] == ["zb1p", "dualpipe", "dualpipe"]
    assert grids[1.0, 0.0][4, 2] == ("dualpipe", "zb1p", pytest.approx(1 / 26))
    assert grids[1.0, 1.0][4, 8].kind == "gpipe"  # it waits for messages once each way
