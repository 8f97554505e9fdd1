"""A report is rebuilt from a run's files alone, is whole at any moment, loads nothing, and says what the numbers say."""
import html.parser
import json
import math
import pathlib
import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import deepseek_v3
from model.errors import UserError
from model.moe import max_violation
from train import metrics, page, plots, report, report_compare, report_recipe, report_traces, run_record

VOID = {"meta", "img", "input", "br"}


class Outline(html.parser.HTMLParser):
    """Open tags, every address, and how often each tag came."""

    def __init__(self, source):
        super().__init__()
        self.open, self.addresses, self.tags, self.words, self.ids = [], [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open, self.open
        assert len(set(self.ids)) == len(self.ids), self.ids

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster")]
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)


def lines_of_a_pretraining(n_steps=30, stage=None, seed=0):
    rng = np.random.default_rng(seed)
    tag = {} if stage is None else {"stage": stage}
    yield tag | dict(event="corpus", step=0, hash="0123456789abcdef", python="3.12.1",
                     bytes={"code": dict(train=3_773_725, validation=228_830)})
    for step in range(1, n_steps + 1):
        loss = 5 * math.exp(-step / 10) + 1.5 + rng.normal(scale=0.02)
        load = rng.multinomial(4064, np.ones(8) / 8, size=3).astype(float)
        load[0, 3] = 0
        yield tag | {"step": step, "loss": loss * 1.3, "main_loss": loss, "mtp_loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens": 2032.0,
                     "moe/load": load.tolist(), "moe/bias": (load / 1e5).tolist(), "tokens_per_s": 9000.0,
                     "step_time": 10.0 if step == 1 else 0.2}
        if step % 10 == 0:
            yield tag | dict(event="eval", step=step, bits_per_byte={"code": 4 - step / 20},
                             domain_load={"code": load[:2].tolist(), "prose": load[:2, ::-1].tolist()})
    yield tag | dict(event="closing", step=n_steps, bits_per_byte={"code": 2.3456}, bigram={"code": 3.6})


def lines_of_a_recipe(worked_after=1.0, n=24):
    rng = np.random.default_rng(1)
    yield from (line for line in lines_of_a_pretraining(stage="base") if line.get("event") not in ("closing",))
    families = ("sum", "mod", "swap")

    def evaluation(stage, step, acc, length, worked, **more):
        return dict(stage=stage, event="evaluation", step=step, pass_at_1=acc, pass_at_1_low=acc - 0.03, pass_at_1_high=min(1, acc + 0.03),
                    cons_at_16=min(1.0, acc + 0.05), length=length, format=0.6 + 0.4 * worked, consistency=0.96 - 0.25 * worked,
                    worked=worked, worked_right=0.93, direct_right=0.35,
                    by_family={f: dict(pass_at_1=acc, pass_at_1_low=acc - 0.05, pass_at_1_high=acc + 0.04) for f in families}
                    | {"relay": dict(pass_at_1=0.2 + 0.1 * worked, chance=1 / 6, transfer=True)}, **more)

    yield evaluation("base", 30, 0.28, 5.6, 0.22)
    for step, right in ((0, 0.4), (0, 0.4), (150, 0.93)):
        yield dict(stage="gate", event="gate", step=step, passed=right > 0.6, threshold=0.6, worked_right=right, direct_right=None)
    for i, stage in enumerate(("r1_zero", "rl")):
        for step in range(1, n + 1):
            share = 1 / (1 + math.exp(-(step - n / 3) / 2))
            worked = 0.22 + (worked_after - 0.22) * share
            yield {"stage": stage, "step": step, "loss": 0.01, "reward/mean": 0.3 + 0.8 * worked, "reward/std": 0.4,
                   "reward/accuracy": 0.28 + 0.67 * worked, "reward/format": 0.12 + 0.08 * worked,
                   "completions/mean_length": 5.6 + 6 * worked, "worked": worked, "lr": 8e-4, "grad_norm": 0.5,
                   "entropy": 0.8 - 0.5 * share + rng.normal(scale=0.02), "kl": 0.02 * step,
                   "consistency": 0.96 - 0.25 * share * (1 - i), "frac_reward_zero_std": 0.2 * share, "tokens": 1536.0, "step_time": 1.3}
            if step % 8 == 0 or step == 1:
                yield evaluation(stage, step, 0.28 + 0.67 * worked, 5.6 + 6 * worked, worked)
    yield evaluation("final", 15, 0.95, 11.5, worked_after)
    yield evaluation("small_distil", 40, 0.99, 11.6, 1.0, model="small")
    yield evaluation("small_rl", 24, 0.23, 6.2, 0.04, model="small")
    yield dict(stage="r1_zero", event="claim", step=n, claim="pure RL raises accuracy", held=True, value=0.67, low=0.6, high=0.73)
    yield dict(stage="small_rl", event="claim", step=n, claim="distillation beats RL on the small model", held=False, value=-0.1,
               low=-0.2, high=0.1)
    yield dict(stage="r1_zero", event="budget", step=n, compile_s=8.5, run_s=31.0, evaluation_s=2.5, tokens=123_456)
    yield dict(stage="rejection", event="rejection", step=0, sampled=2048, right=1900, formatted=1890, one_language=1700, not_lucky=1650,
               unique=940, general=313)


def samples_of_a_recipe(n=24):
    for stage in ("base", "r1_zero", "final"):
        for i in range(n):
            right = stage != "base" or i % 3 == 0
            steps = " ".join(str((i * j) % 6) if stage != "r1_zero" or j % 2 else "零一二三四五"[(i * j) % 6] for j in range(2 + i % 4))
            text = f"<think> {steps} </think> <answer> {i % 6 if right else (i + 1) % 6} </answer>"
            yield dict(stage=stage, step=10 + i, prompt=f"sum {i % 8} 3 5 =", completion=text, reward=1.2 if right else 0.2,
                       answer=str(i % 6), right=right)


def folder(path: pathlib.Path, lines, samples=(), **changed) -> pathlib.Path:
    path.mkdir(parents=True, exist_ok=True)
    config = json.loads(deepseek_v3.get_config("tiny").to_json_best_effort()) | changed
    (path / "config.json").write_text(json.dumps(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if samples:
        (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return path


def written(path):
    source = report.write(path).read_text()
    return source, Outline(source)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = folder(tmp_path_factory.mktemp("recipe"), lines_of_a_recipe(), samples_of_a_recipe(), job="r1",
                  recipe={"stages": ["base", "r1_zero", "rl", "final", "small_distil", "small_rl", "last"]})
    return path, *written(path)


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    path = folder(tmp_path_factory.mktemp("pretraining"), lines_of_a_pretraining())
    return path, *written(path)


@pytest.mark.parametrize("kind", ["recipe", "pretraining"])
def test_the_page_loads_nothing_from_elsewhere_and_its_pictures_are_in_it(kind, request):
    path, source, outline = request.getfixturevalue(kind)
    assert outline.addresses and all(a.startswith(("data:image/png;base64,", "#")) for a in outline.addresses)
    assert not re.search(r"https?:|url\(|@import|\bfetch\b|XMLHttp", source)
    pictures = list((path / "plots").glob("*.png"))
    assert outline.tags.count("img") == len(pictures) > 5
    assert 'name="viewport"' in source


def test_the_same_files_give_the_same_page_to_the_byte(pretraining):
    path, source, _ = pretraining
    assert report.write(path).read_text() == source


def test_the_closing_table_and_the_corpus_are_those_of_the_files(pretraining):
    words = " ".join(pretraining[2].words)
    for wanted in ("2.346", "3.600", "-1.254", "below", "3,773,725", "0123456789abcdef", "3.12.1", "1.12 M", "30 of 450 steps"):
        assert wanted in words, wanted


def test_an_expert_without_tokens_is_reported_dead(pretraining):
    words = " ".join(" ".join(pretraining[2].words).split())
    assert "1 expert got less than" in words
    load = run_record.read(pretraining[0]).series("moe/load")[1]
    assert f"layer 2 {page.number(float(max_violation(load[0])[0]))} {page.number(float(max_violation(load[-1])[0]))}" in words
    assert re.search(r"layer 2 [\d.]+ [\d.]+ 0 [\d.]+ 3 layer 3", words)


def test_the_experts_of_a_domain_are_those_of_the_last_evaluation(pretraining, monkeypatch):
    run, seen, draw = run_record.read(pretraining[0]), {}, plots.table_map

    def table_map(path, title, rows, load):
        seen[title] = rows, load
        return draw(path, title, rows, load)

    monkeypatch.setattr(plots, "table_map", table_map)
    report.experts(run, None)
    last = run.named("eval")[-1]["domain_load"]
    assert list(seen) == ["Load of layer 2 by domain", "Load of layer 3 by domain"]  # of the main model; the MTP module has none
    for i, (rows, load) in enumerate(seen.values()):
        assert rows == ["code", "prose"]
        np.testing.assert_array_equal(load, [last[domain][i] for domain in rows])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.8])
def test_a_run_cut_off_anywhere_leaves_a_valid_page(share, tmp_path):
    path = folder(tmp_path, lines_of_a_recipe(n=2), samples_of_a_recipe(3), job="r1", recipe={"stages": ["base", "r1_zero"]})
    for name in ("metrics.jsonl", "samples.jsonl"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:int(share * len(whole))])
    written(path)


def test_unfinished_work_is_said(tmp_path, recipe):
    path = folder(tmp_path, list(lines_of_a_pretraining())[:9])
    assert "8 of 450 steps" in report.result(run_record.read(path))
    assert "Not begun yet: last." in " ".join(recipe[2].words)


def test_text_of_a_model_cannot_leave_its_place(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"
    lines = [dict(stage=evil, event="claim", claim=evil, held=True, value=evil)]
    path = folder(tmp_path, lines, [dict(stage=evil, step=1, prompt=evil, completion=evil, right=False)], job=evil)
    source, outline = written(path)
    assert outline.tags.count("script") == 2 and "<img src=x" not in source
    kept = json.loads(re.search(r'id="trace-data">(.*?)</script>', source)[1])
    assert kept[0]["text"] == evil


def test_the_recipe_page_says_what_rl_did(recipe):
    words = " ".join(" ".join(recipe[2].words).split())
    for wanted in ("accuracy on held-out problems went from 0.280 to 0.9", "work rather than to guess",
                   "93 % of the answers right that it worked out", "began to mix them", "held", "not held",
                   "[0.600, 0.730]", "123,456", "Never in SFT or RL: relay. Chance: relay 0.167",
                   "60 % of the time: 40 % at step 0, 93 % at step 150; it passed",
                   "0.990",
                   "2,048 1,900 1,890 1,700 1,650 940 313", "small_distil", "final (the teacher's last stage)"):
        assert wanted in words, wanted


def test_words_start_from_an_evaluation_before_the_first_step_where_there_is_one(tmp_path):
    lines = list(lines_of_a_recipe())
    first = next(line for line in lines if line["stage"] == "r1_zero" and line.get("event") == "evaluation")
    lines.insert(lines.index(first), first | dict(step=0, pass_at_1=0.123))
    lines.insert(lines.index(first), first | dict(step=4, worked_right=None, direct_right=None, length=None))  # no such answers
    assert "went from 0.123 to" in " ".join(report_recipe.in_words(run_record.read(folder(tmp_path, lines))))


def test_words_follow_the_numbers_when_rl_failed(tmp_path):
    path = folder(tmp_path, lines_of_a_recipe(worked_after=0.2), job="r1")
    words = " ".join(report_recipe.in_words(run_record.read(path)))
    assert "did not make it work more often" in words and "guess" not in words and "mix" not in words


def test_the_budget_is_the_stage_s_own_or_the_first_step_s_excess(tmp_path):
    run = run_record.read(folder(tmp_path, lines_of_a_recipe()))
    cells = [re.sub("<[^>]*>", " ", row).split() for row in report_recipe.budget(run).split("<tr")]
    rows = {c[1]: c[2:] for c in cells if len(c) > 2}
    assert rows["base"] == ["30", "60,960", "9.800", "6.000", "–", "10,160"]
    assert rows["r1_zero"] == ["24", "123,456", "8.500", "31.00", "2.500", "1,182"]
    assert rows["all"][:5] == ["78", "221,280", "18.30", "68.20", "2.500"]


def test_traces_are_found_wrong_long_or_mixed():
    rows = report_traces.records(list(samples_of_a_recipe()))
    base, zero, final = ([r for r in rows if r["stage"] == s] for s in ("base", "r1_zero", "final"))
    assert sum(not r["right"] for r in base) == 16 and all(r["right"] for r in zero)
    assert not any(r["mixed"] for r in base + final) and sum(r["mixed"] for r in zero) > 12
    assert {r["length"] for r in base if r["long"]} == {max(r["length"] for r in base)}
    assert report_traces.mixed(dict(completion="1 2", consistency=0.5))
    assert not report_traces.mixed(dict(completion="1 二", consistency=1.0))
    assert report_traces.browser([]) == ""


def test_leaves_of_kinds_not_chosen_are_no_part_of_what_was_read():
    config = deepseek_v3.get_config("tiny").to_dict()
    leaves = run_record.leaves_read(config)
    assert "model.attention.mla.n_heads" in leaves and "optimizer.ema.kind" in leaves and "run.remat.kind" in leaves
    assert not any(p.startswith(("model.attention.gqa", "optimizer.muon", "optimizer.ema.host", "pretrain.lr.cosine")) for p in leaves)


def test_compared_runs_show_exactly_the_settings_that_differ(tmp_path):
    def run(name, kind, peak):
        config = deepseek_v3.get_config("tiny")
        config.model.attention.kind = kind
        config.pretrain.lr.v3.peak, config.stop_after_s = peak, 1e5 * peak  # how long it may take makes it no other run
        return folder(tmp_path / name, lines_of_a_pretraining(), **json.loads(config.to_json_best_effort()))

    paths = [run("a", "mla", 4e-3), run("b", "mqa", 4e-3), run("c", "mla", 2e-3)]
    found = report_compare.different_leaves([run_record.read(p).config for p in paths])
    assert found["model.attention.kind"] == ["mla", "mqa", "mla"] and found["pretrain.lr.v3.peak"] == [4e-3, 4e-3, 2e-3]
    assert found["model.attention.mqa.n_heads"] == [report_compare.MISSING, 4, report_compare.MISSING]
    assert {p.rsplit(".", 1)[0] for p in found} == {"model.attention", "model.attention.mla", "model.attention.mqa", "pretrain.lr.v3"}

    config = ConfigDict(dict(report=dict(runs=tuple(str(p) for p in paths))))
    report.report(config, str(tmp_path / "out"))
    source = (tmp_path / "out" / "compare.html").read_text()
    outline = Outline(source)
    assert source.count("<mark>") == 1 + 1 + 2 + 6 and "2.346" in " ".join(outline.words)
    assert all(a.startswith(("data:", "#")) for a in outline.addresses)


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    paths = [folder(tmp_path / parent / "run", []) for parent in ("first", "second")]
    assert report_compare.labels([run_record.read(p) for p in paths]) == ["first/run", "second/run"]


@pytest.mark.parametrize(("runs", "message"), [((), "no config.json"), (("nowhere", "else"), "no config.json"),
                                               (("{run}",), "two runs or more")])
def test_a_folder_without_a_run_is_one_line(runs, message, tmp_path, pretraining):
    with pytest.raises(UserError, match=message) as error:
        report.report(ConfigDict(dict(report=dict(runs=tuple(r.format(run=pretraining[0]) for r in runs)))), str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_picture_is_drawn_again_only_when_its_numbers_changed(tmp_path):
    path, x = tmp_path / "a.png", np.arange(3)
    stamps = []
    for y in ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 4.0], [1.0, 2.0, 3.0]):
        plots.curves(path, "a", [plots.Curve("a", x, np.array(y))])
        stamps.append((path.stat().st_mtime_ns, path.read_bytes()))
    assert stamps[0] == stamps[1] != stamps[2] != stamps[3] and stamps[0][1] == stamps[3][1]
    path.write_bytes(b"")  # by someone else
    assert plots.curves(path, "a", [plots.Curve("a", x, np.array([1.0, 2.0, 3.0]))]).read_bytes() == stamps[0][1]


def test_a_running_mean_has_no_lag_and_leaves_short_curves_alone(rng):
    line = np.linspace(0, 3, 200)
    np.testing.assert_allclose(plots.running_mean(line)[5:-5], line[5:-5], atol=1e-12)
    noise = rng.normal(size=400)
    assert plots.running_mean(noise).std() < 0.3 and abs(plots.running_mean(noise)[200] - noise[190:211].mean()) < 1e-12
    np.testing.assert_allclose(plots.running_mean(noise[:30]), noise[:30])


@pytest.mark.parametrize(("value", "shown"), [(0.0, "0"), (0.00123, "0.0012"), (0.5, "0.500"), (12.345, "12.35"), (-123.45, "-123.5"),
                                              (12345.6, "12,346")])
def test_numbers_show_the_digits_that_matter(value, shown):
    assert page.number(value) == shown


def test_a_logged_float32_has_its_own_digits_and_comes_back(rng):
    x = (rng.standard_normal(300) * 10.0 ** rng.integers(-30, 30, 300)).astype(np.float32)
    line = json.dumps(metrics.plain({"x": x, "rate": np.float32(0.001), "wide": np.float64(1 / 3), "bad": np.float32(np.inf)}))
    back = json.loads(line)
    np.testing.assert_array_equal(np.asarray(back["x"], np.float32), x)
    assert '"rate": 0.001,' in line and back["wide"] == 1 / 3 and back["bad"] is None
