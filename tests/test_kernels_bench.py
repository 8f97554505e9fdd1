"""Job bench on the CPU: every op gives a line, with the reference."""
import json

import pytest

from configs.bench import get_config
from pallas_kernels.bench import OPS, bench


def test_every_op_gives_a_line_and_the_roofline_is_drawn(tmp_path, capsys):
    config = get_config("tiny")
    rows = bench(config, str(tmp_path))
    assert set(config.bench.ops) == set(OPS) == set(get_config().bench.shapes)
    printed = capsys.readouterr().out
    for row in rows:
        assert row["us"] > 0 and row["op"] in printed
    assert [json.loads(line)["op"] for line in (tmp_path / "bench.jsonl").read_text().splitlines()] == [r["op"] for r in rows]
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_an_unknown_op_or_peer_is_one_clear_line(tmp_path):
    config = get_config("tiny")
    config.bench.ops = ("denze",)
    with pytest.raises(ValueError, match="config.bench.ops names .'denze'.: must be among"):
        bench(config, str(tmp_path))
    config = get_config("tiny")
    config.bench.deepgemm = str(tmp_path)
    with pytest.raises(ValueError, match="config.bench.deepgemm=.*no checkout of DeepGEMM"):
        bench(config, str(tmp_path))
