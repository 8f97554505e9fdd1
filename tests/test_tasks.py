"""Tasks: every generated answer verifies, wrong ones do not, no family is another in disguise, splits never meet."""
import json

import numpy as np
import pytest
from test_data_corpus import config

from data import tokenizer as tk
from data.tasks import countdown, gsm8k, lookup, miniature, mod, relay
from data.tasks.families import TASKS, verify

WORDS = tk.symbols_tokenizer(miniature.WORDS)
ALL = dict(sum=1.0, mod=1.0, swap=1.0, walk=1.0, relay=1.0, countdown=0.5)


def spec(**changes):
    return miniature.parse(config()["tasks"] | dict(families=ALL) | changes)


@pytest.mark.parametrize("family", ["sum", "mod", "swap", "walk", "relay", "countdown"])
def test_generated_answers_verify_and_others_do_not(family, rng):
    task = TASKS[family]
    for difficulty in range(2, 6):
        for _ in range(20):
            p = task.generate(rng, difficulty)
            assert task.verify(p, f"<think> x </think> <answer> {p.answer} </answer>")
            for wrong in ("", p.answer, f"<think> <answer> {p.answer} </answer> </think>", f"<answer> {p.answer}",
                          f"<answer> {p.answer} {p.answer} </answer>", "<answer> 0 1 2 3 4 5 </answer>",
                          f"<answer> {p.answer} </answer> <answer> ? </answer>", f"<answer> not {p.answer} </answer>"):  # fmt: skip
                assert not task.verify(p, wrong), wrong
    with pytest.raises(ValueError, match="difficulty: 9"):
        task.generate(rng, 9)


def by_hand(family, digits, D=6, base=2, m=5):
    r = digits[0] % m if family == "mod" else digits[0]
    for d in digits[1:]:
        if family == "sum":
            r = (r + d) % D
        elif family == "mod":
            r = (base * r + d) % m
        elif family == "swap":
            cups = [c == r for c in range(D)]
            cups[d], cups[(d + 1) % D] = cups[(d + 1) % D], cups[d]
            r = cups.index(True)
        elif family == "walk":
            r = min(max(r + (1 if d >= D // 2 else -1), 0), D - 1)
    return r


def test_tables_say_what_the_docstrings_say(rng):
    for p in miniature.problems(spec(), rng, 400, families=dict(sum=1, mod=1, swap=1, walk=1)):
        assert p.meta["steps"][-1] == by_hand(p.meta["family"], p.meta["digits"])


def test_horner_is_no_digit_sum_and_every_digit_counts(rng):
    values = {}
    for digits in np.ndindex(6, 6, 6):
        values.setdefault((tuple(sorted(digits))), set()).add(lookup.steps((mod.rule(),), digits)[-1])
    assert np.mean([len(v) > 1 for v in values.values()]) > 0.8  # the same digits in another order give another result
    for i in range(5):
        digits = rng.integers(0, 6, 5)
        results = {lookup.steps((mod.rule(),), [*digits[:i], d, *digits[i + 1 :]])[-1] for d in range(6)}
        assert len(results) == 5
    for base, modulus in ((6, 5), (6, 3), (6, 4), (2, 1), (2, 0), (5, 11)):
        with pytest.raises(ValueError, match="data.tasks.modulus"):
            mod.rule(6, base=base, modulus=modulus)


def test_no_family_agrees_with_another_beyond_chance(rng):
    s = spec()
    answers = {name: [lookup.steps((rule,), d)[-1] for d in np.random.default_rng(1).integers(0, 6, (2000, 5))]
               for name, rule in s.rules.items()}  # fmt: skip
    for a in answers:
        for b in answers:
            assert a == b or np.mean(np.equal(answers[a], answers[b])) < 0.4
    problems = miniature.problems(s, rng, 1000, families=dict(relay=1.0), lengths=(4, 5, 6, 7))
    chance = relay.chance(problems)
    assert set(chance) == {"constant", "first", "second"} and all(0.1 < c < 0.45 for c in chance.values())


def test_problems_of_the_two_splits_never_meet_in_either_language(rng):
    s = spec()
    key = lambda p: (p.prompt.translate(str.maketrans(lookup.DIGITS["zh"], "0123456789")).split()[-8:], p.meta["family"])  # noqa: E731
    for split in ("train", "validation"):
        for p in miniature.problems(s, rng, 500, split):
            assert miniature.is_held_out(s, p) == (split == "validation"), key(p)
    # both languages of one problem fall on the same side, and about one in sixteen is held out
    drawn = np.random.default_rng(0).integers(0, 6, (8000, 7))
    share = miniature.held_out(np.zeros(8000, int), np.full(8000, 6), drawn, 16)
    assert 0.04 < share.mean() < 0.085
    assert (miniature.held_out(np.zeros(8000, int), np.full(8000, 6), np.where(np.arange(7) < 6, drawn, 0), 16) == share).all()


def test_training_documents_are_right_and_of_the_training_split(rng):
    s = spec(families=dict(ALL, countdown=0.0))
    read = {word: name for name, rule in s.rules.items() for word in rule.words}
    for text in miniature.texts(s, 800, 0, "train"):
        words = text.split(" ")
        families, rest = [read[w] for w in words if w in read], words[words.index("=") - 7 : words.index("=")]
        digits = lookup.read_digits(" ".join(w for w in rest if w != "_"))
        rules = tuple(s.rules[f] for f in families)
        p = lookup.problem("relay" if len(rules) > 1 else families[0], rules, digits)
        if len(rules) > 1:
            p.meta["pair"] = [[r.name for r in pair] for pair in s.pairs].index(families)
        assert not miniature.is_held_out(s, p)
        answer = text.split(" = ")[1].replace("</answer>", "").replace("</think> <answer>", "").replace("<think>", "")
        written = lookup.read_digits(answer)
        assert written in ([p.meta["steps"][-1]], p.meta["steps"], [*p.meta["steps"], p.meta["steps"][-1]])


def documents(s, n=6000):
    out = []
    for text in miniature.texts(s, n, 3, "train"):
        prompt, _, answer = text.partition(" = ")
        out.append((prompt + " =", answer))
    return out


def test_the_text_is_the_recipes_mixture():
    s = spec(families=dict(sum=1.0, mod=1.0, swap=1.0, walk=0.0, relay=0.0, countdown=0.0))
    rows = documents(s)
    n = np.array([sum(c in miniature._ID and c not in ("_", "=") for c in p.split()[1:]) for p, _ in rows])
    assert np.allclose([(n == k).mean() for k in range(2, 8)], np.array([30, 20, 14, 12, 12, 12]) / 100, atol=0.03)
    assert all(len(p.split()) == 9 for p, _ in rows)  # with bos: ten tokens
    assert all(("<think>" in a) == ("</think>" in a) == ("<answer>" in a) for _, a in rows)
    tagged = np.array(["<answer>" in a for _, a in rows])
    inner = [(a.split("<think>")[1].split("</think>")[0] if "<answer>" in a else a).split() for _, a in rows]
    worked = np.array([len(w) > (0 if t else 1) for w, t in zip(inner, tagged, strict=True)])
    assert abs(worked.mean() - 0.2) < 0.02 and abs(tagged.mean() - 0.6) < 0.02
    assert abs(tagged[worked].mean() - tagged[~worked].mean()) < 0.06  # tags are independent of working
    chinese = [[w in lookup.DIGITS["zh"] for w in a.split() if w not in "<think> </think> <answer> </answer>"] for _, a in rows]
    of_prompt = [any(c in p for c in "求取交") for p, _ in rows]
    own = np.array([np.mean(np.equal(c, o)) for c, o in zip(chinese, of_prompt, strict=True)])
    assert (own[~worked] == 1).all()
    long = worked & (n > 4)
    assert abs((own[long] == 1).mean() - 0.75) < 0.08 and abs((own[long] == 0).mean() - 0.05) < 0.04


def test_every_worked_document_is_right_step_by_step_and_inspect_tells_kinds_apart(rng):
    s = spec()
    for p in miniature.problems(s, rng, 200):
        for worked in (True, False):
            for tagged in (True, False):
                for language in ("en", "zh"):
                    c = miniature.completion(p, worked=worked, tagged=tagged, language=language)
                    assert set(c.split()) <= set(miniature.WORDS) and set(p.prompt.split()) <= set(miniature.WORDS)
                    if p.meta["family"] == "countdown" and not tagged:
                        continue
                    seen = miniature.inspect(p, c)
                    assert (seen["tagged"], seen["worked"], seen["right"]) == (tagged, worked, True), (c, seen)
                    assert seen["trace_right"] == worked
                    assert verify(p, c) == tagged
    p = lookup.problem("sum", (s.rules["sum"],), [1, 2, 3])
    lucky = miniature.inspect(p, "<think> 1 4 0 </think> <answer> 0 </answer>")
    assert lucky["right"] and lucky["worked"] and not lucky["trace_right"]
    assert not miniature.inspect(p, "<think> 1 3 0")["right"] and not miniature.inspect(p, "1 3 5")["right"]


def test_symbol_ids_and_text_are_the_same_documents():
    s = spec()
    columns, lengths = miniature.draw_columns(s, WORDS, np.random.default_rng(5), 300)
    as_bytes, byte_lengths = miniature.draw_columns(s, tk.bytes_tokenizer(), np.random.default_rng(5), 300)
    assert lengths.sum() == len(columns["tokens"]) and len(miniature.WORDS) <= 64
    at = np.cumsum(lengths) - lengths
    for i, start in enumerate(at):
        text = WORDS.decode(columns["tokens"][start : start + lengths[i]])
        b = int(byte_lengths[:i].sum())
        assert tk.bytes_tokenizer().text(as_bytes["tokens"][b : b + byte_lengths[i]]) == text[len("<bos> ") : -len(" <eos>")]
        prompt_words = text.split(" ").index("=") + 1
        assert columns["weight"][start : start + lengths[i]].tolist() == pytest.approx(
            [0.05] * prompt_words + [1.0] * (lengths[i] - prompt_words))  # fmt: skip


def test_countdown_accepts_any_right_expression_and_nothing_else(rng):
    p = countdown.Problem("", "", dict(family="countdown", numbers=[3, 5, 2, 2], target=20))
    for right in ("(3+2)*(2*5)/2-5/(1)", ):
        assert not countdown.verify(p, f"<answer>{right}</answer>")
    for right in ("5*(3+2/2)", "( 3 + 2 / 2 ) * 5", "5×(3+2÷2)", "((5*(3+2/2)))", "-5*(-3-2/2)"):
        assert countdown.verify(p, f"<think>..</think><answer>{right}</answer>"), right
    for wrong in ("20", "5*(3+1)", "5*3+2+2+1", "5*(3+2/2)=20", "5*(3+2/2)=", "5*(03+2/2)", "5.0*(3+2/2)",
                  "-" * 191 + "5*(3+2/2)", "5(3+2/2)", "5*(3+2//2)", "2**2*5+3-3", "5*(3+2/2)+0",
                  "5*(3+2/2)*1", "5*(3+2/2)*2/2", "5*(3+2/2) -", "5*(3+2/2", "5*(3+2/2))", "5 (3+2/2)", "__import__('os')", "5*(3+2/(2-2))",
                  "(" * 150 + "1" + ")" * 150, "5*(3+2/2)#", "5*(3+2/2)\n20", "10*2", "52-32", "0x14", "5*(3+2/2); 1", "1e1"):  # fmt: skip
        assert not countdown.verify(p, f"<answer>{wrong}</answer>"), wrong
    assert not countdown.verify(p, "<think><answer>5*(3+2/2)</answer></think>") and not countdown.verify(p, "5*(3+2/2)")
    assert countdown.evaluate("1/49*49")[0] == 1  # exact: floats give 0.9999999999999999
    third = countdown.Problem("", "", dict(family="countdown", numbers=[1, 3, 3], target=1))
    assert countdown.verify(third, "<answer>1/3*3</answer>")


def test_countdown_expressions_agree_with_python(rng):
    for _ in range(200):
        p = countdown.generate(rng, int(rng.integers(2, 7)))
        value, used = countdown.evaluate(p.answer)
        assert value == p.meta["target"] == round(eval(p.answer), 6) and sorted(used) == sorted(p.meta["numbers"])


def test_gsm8k_reads_a_users_file_and_grades_exactly(tmp_path, rng):
    path = tmp_path / "gsm.jsonl"
    path.write_text(json.dumps(dict(question="How much?", answer="a <<1+1=2>>\n#### 1,200")) + "\n")
    (p,) = gsm8k.read(str(path))
    assert p.answer == "1,200" and gsm8k.generate(rng, 1, [p]) is p
    assert gsm8k.verify(p, "<think> </think> <answer>$1200.00</answer>") and not gsm8k.verify(p, "<answer>1201</answer>")
    path.write_text('{"question": "x", "answer": "no mark"}\n')
    with pytest.raises(ValueError, match="gsm.jsonl:1: found"):
        gsm8k.read(str(path))
    with pytest.raises(ValueError, match="cannot read"):
        gsm8k.read(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="read a file first"):
        gsm8k.generate(rng, 1)


@pytest.mark.parametrize("change, said", [
    (dict(digits=2), "data.tasks.digits: 2; allowed: 3 to 10"), (dict(base=6), "data.tasks.modulus: 5 with base 6"),
    (dict(lengths=(1,)), "6 weights"), (dict(worked=2.0), "data.tasks.worked: 2.0"), (dict(held_out=1), "data.tasks.held_out: 1"),
    (dict(families=dict(ALL, jump=1.0)), "data.tasks.families: 'jump'"), (dict(families=dict.fromkeys(ALL, 0.0)), "at least one"),
    (dict(trace=dict(same=-1.0, other=1.0, mixed=1.0)), "data.tasks.trace"),
])  # fmt: skip
def test_bad_task_configs_are_one_line(change, said):
    with pytest.raises(ValueError, match=said) as e:
        spec(**change)
    assert "\n" not in str(e.value)
