r"""Rule rewards: what the answer is, when it is right, and what must not pay."""
import time

import pytest

from data.tasks import miniature
from train import rewards


def answered(text):
    return f"<think> some work </think> <answer> {text} </answer>"


@pytest.mark.parametrize("text, answer", [
    ("<think>a</think><answer>5</answer>", "5"), ("<answer> 5 </answer>", "5"), ("5", None), ("", None), ("the answer is 5", None),
    ("<answer>4</answer> then <answer>5</answer>", "5"), ("<think><answer>4</answer></think>", None),
    ("<think>x <answer>4</answer>", None), ("<think>a</think> <answer>5", None), ("<answer>4</answer><answer>5", "4"),
    ("<answer></answer>", None), ("<answer>  </answer>", None), ("<answer>4</answer> <answer> </answer>", None),
    ("<answer><answer>5</answer>", "5"), ("<answer>a\nb</answer>", "a\nb"),
    (r"so \boxed{5}", "5"), (r"\boxed{4} \boxed{5}", "5"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{5", None),
    (r"\boxed{4} and \boxed{5", "4"), (r"\boxed{\boxed{5}}", "5"), (r"\boxed {5}", "5"), (r"\boxed{}", None),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{4} #### 5", "4"), (r"<answer>5</answer> \boxed{4} #### 3", "5"),
    (r"<think>\boxed{4}</think> #### 5", "5"), (r"<think>\boxed{5}</think>", None), (r"<think>#### 5</think> done", None),
    ("#### 5", "5"), ("#### 4\n#### 5", "5"), ("####", None), ("a #### 1,200 ", "1,200"), ("### 5", None),
    ("<think>a</think> x <think>#### 4</think> y", None), ("work </think> <answer>5</answer>", "5"),
    ("<answer>4</answer> </think> nothing", None), ("<think> <think> </think> <answer>5</answer>", "5"),
    ("<THINK>a</THINK> <answer>5</answer>", "5"), ("<Answer>5</Answer>", None),
])  # fmt: skip
def test_extract_answer(text, answer):
    assert rewards.extract_answer(text) == answer


SAME = [
    ("5", "5"), (" 5\n", "5"), ("5.", "5"), ("5.0", "5"), ("05", "5"), ("+5", "5"), (".5", "0.5"), ("0.50", "1/2"), ("5.", "5.0"),
    ("1,000", "1000"), ("1000", "1,000"), ("$1,000.00", "1000"), ("1,234,567", "1234567"), ("1 000", "1000"), (r"1{,}000", "1000"),
    (r"1\,000", "1000"), ("$18", "18"), ("18 dollars", "18"), ("18$", "18"), (r"\$18", "18"), ("€5", "5"), ("5 €", "5"),
    ("USD 5", "5"), ("-$5", "-5"), ("$-5", "-5"), ("$ 5", "5"), ("¥5", "5"), ("−5", "-5"), ("- 5", "-5"),
    ("12 eggs per day", "12"), ("5 km/h", "5"), ("5km", "5"), ("5 cm^2", "5"), (r"5\text{ cm}", "5"), (r"5 \mathrm{cm}", "5"),
    ("90°", "90"), (r"90^\circ", "90"), (r"90^{\circ}", "90"), ("20 °C", "20"),
    ("50%", "50"), (r"50\%", "50"), ("50%", "0.5"), ("50", "50%"),
    ("1/2", "50%"), ("50 percent", "50"), ("50%", "50%"), ("12.5%", "1/8"), ("100%", "1"),
    ("1/2", "0.5"), ("2/4", "1/2"), ("-1/2", "-0.5"), (r"\frac{1}{2}", "1/2"), (r"\dfrac{1}{2}", "0.5"), (r"\frac12", "1/2"),
    (r"-\frac{1}{2}", "-0.5"), (r"\frac{-1}{2}", "-1/2"), (r"1\frac{1}{2}", "1.5"), ("1 1/2", "3/2"), ("1½", "1.5"), ("½", "0.5"),
    (r"\boxed{\frac{1}{2}}", "1/2"), (r"$\frac{1}{2}$", "0.5"), (r"\(5\)", "5"), (r"\[5\]", "5"), ("$5$", "5"), ("**5**", "5"),
    (r"$\boxed{5}$", "5"), ("x = 5", "5"), ("x=5", "5"), ("= 5", "5"), ("5 million", "5000000"), ("2.5 thousand", "2500"),
    ("5k", "5000"),
    ("1e3", "1000"), (r"3 \times 10^{5}", "300000"), (r"3\times 10^5", "300000"), ("3 x 10^-2", "0.03"), ("５", "5"), ("Paris", "paris"),
    ("(A)", "(A)"), ("3:2", "3 : 2"), ("x^2 + 1", "x^2+1"), (r"\left(1, 2\right)", "(1,2)"), ("5", r"so \boxed{5}"),
    ("18", "She has 9 * 2 = <<9*2=18>>18\n#### 18"), ("0", "-0"), ("1/3", "2/6"),
]  # fmt: skip
DIFFERENT = [
    ("5", "6"), ("5", "-5"), ("0.333", "1/3"), ("0.3333333333333333", "1/3"), ("3.14", "22/7"), ("5.0001", "5"), ("1,00", "100"),
    ("1,0000", "10000"), ("1,000", "1.000"), ("1.000", "1000"), ("1,2", "12"), ("10,00,000", "1000000"), ("5 or 6", "5"), ("5 or 6", "6"),
    ("5, 6", "5"), ("5 6", "56"), ("5 6", "5"), ("between 5 and 6", "5"), ("not 5", "5"), ("about 5", "5"), ("~5", "5"), ("5?", "5"),
    ("5 or six", "5"), ("five", "5"), ("2+3", "5"), ("2*3", "6"), ("10/2/1", "5"), ("5 != 6", "5"), ("x = 5 or x = 6", "5"), ("1/0", "1"),
    ("0/0", "0"), ("nan", "0"), ("inf", "5"), ("5^2", "5"), ("5²5", "5"), ("5x", "5"), ("5 + x", "5"), ("5!", "5"), ("0x5", "5"),
    ("5e", "5"),
    ("1e400000000", "5"), ("9" * 5000, "9"), ("5%", "5%%"), ("50%", "5"), ("0.5%", "0.5%%"), ("50%", "0.5%"), ("5 million", "5"),
    ("5 k", "5000"), (r"\frac{1}{0}", "1"), (r"\frac{1}{2}", "2"), (r"\frac{1}{2}", "12"), (r"\sqrt{25}", "5"), ("2 hours 30 minutes", "2"),
    ("3:2", "3"), ("3-2", "3"), ("5--", "5"), ("--5", "5"), ("(5", "5"), ("{5}5", "5"), ("", "5"), ("?", "5"), ("1 1/2", "11/2"),
    ("A", "B"), ("(1,2)", "(2,1)"), ("12", "(1,2)"), ("0 1 2 3 4 5 6 7 8 9", "5"), ("5 halves", "5"), ("5 plus one", "5"),
]  # fmt: skip


@pytest.mark.parametrize("found, gold", SAME)
def test_equal_values_score_one(found, gold):
    assert rewards.accuracy(answered(found), gold) == 1.0


@pytest.mark.parametrize("found, gold", DIFFERENT)
def test_unequal_values_score_zero(found, gold):
    assert rewards.accuracy(answered(found), gold) == 0.0


@pytest.mark.parametrize("completion", [
    "", "5", "The answer is 5.", "<think> 5 </think>", "<think> <answer>5</answer> </think>", r"<think>\boxed{5}</think> six",
    "<answer>5</answer> <answer>6</answer>", "<answer>5", "<think> <answer>5</answer>", "<answer>5 5</answer>",
    "<answer> 1 2 3 4 5 </answer>", "<answer>5</answer> </think> 6", "<answer> 5 or 6 </answer>", "[answer]5[/answer]",
])  # fmt: skip
def test_known_hacks_score_zero(completion):
    assert rewards.accuracy(completion, "5") == 0.0


def test_graders_are_fast_on_hostile_text():
    start = time.perf_counter()
    for text in (r"\boxed{" * 20000, "<answer>" * 20000 + "</answer>", "<think>" * 20000, "#### " * 20000, answered("1 " * 50000),
                 answered("1e" + "9" * 400), answered("1," * 400), "<think>" + " " * 50000 + "</think><answer>" + " " * 50000,
                 answered(" " * 900 + "x"), answered("1" + " a" * 480), answered(r"\frac{" * 150), answered("$" * 900)):  # fmt: skip
        rewards.accuracy(text, "5")
        rewards.format(text)
        rewards.language_consistency(text, "en")
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("completion, score", [
    ("<think> a </think> <answer> 5 </answer>", 1), ("<think></think><answer>5</answer>", 1),
    ("\n<think>a\nb</think>\n<answer>5</answer>\n", 1),
    ("", 0), ("5", 0), ("<answer>5</answer>", 0), ("<think>a</think>", 0), ("<think>a</think> <answer> </answer>", 0),
    ("hi <think>a</think> <answer>5</answer>", 0), ("<think>a</think> so <answer>5</answer>", 0),
    ("<think>a</think> <answer>5</answer> bye", 0), ("<think>a</think> <answer>5", 0), ("<think>a <answer>5</answer>", 0),
    ("<answer>5</answer> <think>a</think>", 0), ("<think>a</think> <answer>5</answer> <answer>6</answer>", 0),
    ("<think>a</think> <think>b</think> <answer>5</answer>", 0), ("<think>a <answer>4</answer> </think> <answer>5</answer>", 0),
    ("<think>a</think> <answer>5</answer></answer>", 0), ("<think><think>a</think> <answer>5</answer>", 0),
])  # fmt: skip
def test_format(completion, score):
    assert rewards.format(completion) == score


@pytest.mark.parametrize("completion, language, score", [
    ("<think> we add two and two </think> <answer> 4 </answer>", "en", 1), ("<think> we 加 two </think>", "en", 2 / 3),
    ("<think> 我们 add </think> <answer> four </answer>", "zh", 2 / 3), ("<think> 答案是 5 </think>", "zh", 1),
    ("<think> the answer is 5 </think>", "zh", 0), ("<think> 3 2 5 </think> <answer> 5 </answer>", "en", 1),
    ("<think> 3 2 5 </think> <answer> 五 </answer>", "zh", 0), ("<think> 三 2 五 零 </think>", "zh", 0.75),
    ("<think> 三 2 五 零 </think>", "en", 0.25), ("<think> </think> <answer> 五 </answer>", "en", 1), ("", "en", 1),
    (r"<think> \frac{1}{2} 加 </think>", "zh", 1), ("<think> да да ok </think>", "ru", 2 / 3), ("<think> open 三", "zh", 0.5),
    ("no tags 三", "en", 2 / 3), ("<answer> 五 </answer>", "zh", 1),
])  # fmt: skip
def test_language_consistency(completion, language, score):
    assert rewards.language_consistency(completion, language) == pytest.approx(score)


def test_language_must_be_known():
    with pytest.raises(ValueError, match="language: 'tlh'; allowed: en, zh"):
        rewards.language_consistency("a", "tlh")


def test_soft_overlong_is_dapos_line():
    assert [rewards.soft_overlong(n, 100, 20) for n in (0, 80, 85, 90, 100, 101)] == [0, 0, -0.25, -0.5, -1, -1]
    assert [rewards.soft_overlong(n, 100, 0) for n in (100, 101)] == [0, -1]


def test_functions_take_columns_and_return_a_float_each(rng):
    n = 6
    spec = miniature.parse(__import__("test_data_corpus").config()["tasks"])
    problems = miniature.problems(spec, rng, n)
    completions = [miniature.completion(p, language="zh") for p in problems[:3]] + ["x"] * 3
    columns = rewards.columns(problems) | dict(length=[3] * n, max_length=[10] * n, cache=[8] * n, seed=[0] * n, step=[1] * n,
                                               tests=["assert False"] * n)  # fmt: skip
    prompts = [p.prompt for p in problems]
    out = {name: f(prompts, completions, **columns) for name, f in rewards.FUNCTIONS.items()}
    assert all(len(v) == n and all(type(x) is float for x in v) for v in out.values())
    assert out["accuracy"] == out["format"] == [1.0] * 3 + [0.0] * 3
    assert out["length_penalty"] == [-0.3] * n and out["soft_overlong"] == [-0.125] * n and out["code"] == [0.0] * n
    assert rewards.FUNCTIONS["accuracy"](["q"] * 2, [answered("1,000"), "1000"], answer=["1000"] * 2) == [1.0, 0.0]


def test_random_reward_ignores_what_was_written_and_repeats_on_resume():
    f = rewards.FUNCTIONS["random"]
    draw = lambda step, text: f([""] * 400, [text] * 400, seed=[1] * 400, step=[step] * 400)  # noqa: E731
    assert draw(1, "a") == draw(1, "b") != draw(2, "a")
    assert 0.4 < sum(draw(3, "a")) / 400 < 0.6


def test_check_passes_real_tasks_and_refuses_ones_that_can_be_hacked(rng, monkeypatch):
    spec = miniature.parse(__import__("test_data_corpus").config()["tasks"])
    families = dict(sum=1, mod=1, swap=1, walk=1, relay=1, countdown=1)
    problems = miniature.problems(spec, rng, 60, families=families)
    rewards.check(("accuracy", "format"), problems, miniature.completion)
    with pytest.raises(ValueError, match="the gold answer .* scores 0.0, not 1"):
        rewards.check(("accuracy",), problems, lambda p: "<answer> wrong </answer>")
    with pytest.raises(ValueError, match="rewards: 'charm'; allowed: accuracy"):
        rewards.check(("charm",), problems, miniature.completion)
    monkeypatch.setitem(rewards.FUNCTIONS, "accuracy", lambda p, c, problem, **_: [float(q.answer in x) for q, x in zip(problem, c)])  # noqa: B905
    with pytest.raises(ValueError, match="the hack 'untagged' on .* scores 1.0, not 0"):
        rewards.check(("accuracy",), problems, miniature.completion)


def test_code_runs_the_last_block_outside_the_thinking_to_the_end_of_its_tests():
    good, bad = "```python\ndef f(x):\n    return x + 1\n```", "```python\ndef f(x):\n    return x\n```"
    tests = "assert f(1) == 2"
    assert rewards.code(f"<think>{bad}</think> first {bad} then {good}", tests) == 1.0
    for cheat in (bad, f"{good} no: {bad}", f"<think>{good}</think>", "def f(x): return x + 1", "",
                  "```python\nraise SystemExit(0)\n```", "```python\nimport os\nos._exit(0)\n```", "```python\ndef f(\n```"):  # fmt: skip
        assert rewards.code(cheat, tests) == 0.0, cheat
