"""The recipe's text: problems of the look-up families (and countdown) written as short documents of at most 64 words.

Prompt `FAMILY d1 .. dn _ _ =`: fixed slots, so that the operand of every step is at the same distance. A worked answer
is `<think> r1 .. rn </think> <answer> rn </answer>`, a direct one has nothing between the think tags, a bare one has
no tags. Working and tags are drawn independently, so that rewarding tags alone does not reward working. Two languages;
a worked trace is in the prompt's, in the other, or mixed digit by digit. Loss on prompt tokens is weighted down.
Problems whose hash is 0 mod `held_out` are never trained on; the hash is of family and digits, the same in both
languages. Documents are made by whole arrays of word numbers: over a million tokens a second with symbols.
"""
import dataclasses
import functools

import numpy as np

from data.tasks import answer as grading
from data.tasks import lookup, mod, relay, swap, walk
from data.tasks import sum as sum_task
from data.tasks.families import verify
from data.tasks.lookup import DIGITS, LANGUAGES, SLOTS
from data.tasks.problem import Problem

LOOKUP = ("sum", "mod", "swap", "walk")
FAMILIES = LOOKUP + ("relay", "countdown")
COUNTDOWN_WORDS = ("count", "凑数")
WORDS = (
    "<pad>", "<bos>", "<eos>", "_", "=", "<think>", "</think>", "<answer>", "</answer>",
    "sum", "求和", "mod", "取余", "swap", "交换", "walk", "行走", "count", "凑数",
    *DIGITS["en"], *DIGITS["zh"], "+", "-", "*", "/", "(", ")", ",",
)  # fmt: skip
_ID = {word: i for i, word in enumerate(WORDS)}
_WRITE = np.array([[_ID[c] for c in DIGITS[language]] for language in LANGUAGES], np.int32)
_BLANK = -1


@dataclasses.dataclass(frozen=True)
class Spec:
    """Frozen config.data.tasks. `families`: shares of documents; `lengths`: weights of 2..7 digits; `trace`: shares of
    worked traces in the prompt's language, the other, mixed."""

    digits: int
    base: int
    modulus: int
    families: tuple[float, ...]
    lengths: tuple[float, ...]
    worked: float
    tagged: float
    trace: tuple[float, float, float]
    prompt_weight: float
    held_out: int

    @functools.cached_property
    def rules(self) -> dict[str, lookup.Rule]:
        """The look-up rules at this spec's sizes, all over the same states (so that relay can chain them)."""
        d, states = self.digits, max(self.digits, self.modulus)
        rules = (sum_task.rule(d, states), mod.rule(d, states, self.base, self.modulus), swap.rule(d, states),
                 walk.rule(d, states))  # fmt: skip
        return {rule.name: rule for rule in rules}

    @functools.cached_property
    def pairs(self) -> tuple:
        """relay's pairs of rules."""
        return tuple(relay.pairs(tuple(self.rules[name] for name in ("sum", "mod", "swap"))))


def parse(config) -> Spec:
    """config.data.tasks -> Spec; ValueError names the leaf, what was found and what is allowed."""
    families = config["families"]
    for name in families:
        if name not in FAMILIES:
            raise ValueError(f"data.tasks.families: {name!r}; allowed: {', '.join(FAMILIES)}")
    trace = config["trace"]
    spec = Spec(
        digits=config["digits"], base=config["base"], modulus=config["modulus"], worked=float(config["worked"]),
        families=tuple(float(families[name]) for name in FAMILIES), lengths=tuple(float(w) for w in config["lengths"]),
        tagged=float(config["tagged"]), trace=(float(trace["same"]), float(trace["other"]), float(trace["mixed"])),
        prompt_weight=float(config["prompt_weight"]), held_out=config["held_out"],
    )  # fmt: skip
    if not 3 <= spec.digits <= 10:
        raise ValueError(f"data.tasks.digits: {spec.digits}; allowed: 3 to 10")
    if len(spec.lengths) != SLOTS - 1:
        raise ValueError(f"data.tasks.lengths: {spec.lengths}; {SLOTS - 1} weights, for 2 to {SLOTS} digits")
    for leaf in ("families", "lengths", "trace"):
        if min(getattr(spec, leaf)) < 0 or sum(getattr(spec, leaf)) <= 0:
            raise ValueError(f"data.tasks.{leaf}: {getattr(spec, leaf)}; no weight below 0, at least one above")
    for leaf in ("worked", "tagged", "prompt_weight"):
        if not 0 <= getattr(spec, leaf) <= 1:
            raise ValueError(f"data.tasks.{leaf}: {getattr(spec, leaf)}; a share from 0 to 1")
    if spec.held_out < 2:
        raise ValueError(f"data.tasks.held_out: {spec.held_out}; at least 2 (one problem in that many is held out)")
    assert spec.rules  # a degenerate modulus is refused here
    return spec


def held_out(family: np.ndarray, length: np.ndarray, digits: np.ndarray, modulus: int) -> np.ndarray:
    """bool[n]: the problem's hash is 0 mod `modulus`. family [n] (place in FAMILIES, relay's by pair), digits [n,
    SLOTS].
    """
    h = family.astype(np.uint64) * np.uint64(97) + length.astype(np.uint64)
    for i in range(digits.shape[1]):
        h = (h ^ np.where(i < length, digits[:, i] + 1, 0).astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        h ^= h >> np.uint64(29)
    return (h >> np.uint64(20)) % np.uint64(modulus) == 0


def is_held_out(spec: Spec, problem: Problem) -> bool:
    """Whether a problem is of the held-out split."""
    family = problem.meta["family"]
    if family == "countdown":
        return _countdown_held_out(spec, problem)
    digits = np.zeros((1, SLOTS), np.int64)
    digits[0, : len(problem.meta["digits"])] = problem.meta["digits"]
    code = FAMILIES.index(family) + problem.meta.get("pair", 0) * len(FAMILIES)
    return bool(held_out(np.array([code]), np.array([len(problem.meta["digits"])]), digits, spec.held_out)[0])


def draw_problems(spec: Spec, rng, n: int, split: str, families=None, lengths=None) -> dict[str, np.ndarray]:
    """Arrays of n look-up problems of a split: family and pair [n], length [n], digits [n, SLOTS], steps [n, SLOTS]."""
    weights = np.array([(families or dict(zip(FAMILIES, spec.families, strict=True))).get(f, 0) for f in FAMILIES[:5]])
    if not weights.sum():
        raise ValueError("data.tasks.families: no look-up family has weight")
    by_length = np.array(spec.lengths)
    if lengths is not None:
        by_length = np.array([k in lengths for k in range(2, SLOTS + 1)], float)
    parts, missing = [], n
    while missing > 0:
        m = missing + 32 if split == "train" else (missing + 8) * spec.held_out
        if split == "train":
            m += 2 * missing // spec.held_out
        family = rng.choice(5, m, p=weights / weights.sum())
        pair = rng.integers(len(spec.pairs), size=m) * (family == FAMILIES.index("relay"))
        length = rng.choice(np.arange(2, SLOTS + 1), m, p=by_length / by_length.sum())
        digits = rng.integers(0, spec.digits, (m, SLOTS))
        out = held_out(family + pair * len(FAMILIES), length, digits, spec.held_out)
        kept = np.flatnonzero(out if split == "validation" else ~out)[:missing]
        parts.append(dict(family=family[kept], pair=pair[kept], length=length[kept], digits=digits[kept]))
        missing -= len(kept)
    drawn = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return drawn | dict(steps=_steps(spec, drawn))


def problems(spec: Spec, rng, n: int, split: str = "train", families=None, lengths=None) -> list[Problem]:
    """n Problems of a split. `families`: dict name -> weight (default the spec's); `lengths`: allowed numbers of
    digits.

    `meta` has family, digits, steps, language, length (countdown: numbers, target, language, length).
    """
    share = families or dict(zip(FAMILIES, spec.families, strict=True))
    total = sum(share.values())
    n_countdown = int(rng.binomial(n, share.get("countdown", 0) / total))
    made = [_countdown_problem(spec, rng, split) for _ in range(n_countdown)]
    if n > n_countdown:
        drawn = draw_problems(spec, rng, n - n_countdown, split, families, lengths)
        languages = rng.integers(2, size=n - n_countdown)
        made += [_problem(spec, drawn, i, LANGUAGES[languages[i]]) for i in range(n - n_countdown)]
    return [made[i] for i in rng.permutation(n)]


def draw_columns(spec: Spec, tokenizer, rng, n: int, split: str = "train") -> tuple[dict[str, np.ndarray], np.ndarray]:
    """n documents as ids: (flat columns tokens int32 and weight float32, lengths [n]), bos and eos included."""
    words, prompt, lengths = _draw_words(spec, rng, n, split)
    if tokenizer.kind == "symbols":
        flat = _translation(tokenizer)[words[words != _BLANK]]
    else:
        rows = [[WORDS[w] for w in row if w != _BLANK] for row in words]
        ids = [(encode_prompt(tokenizer, " ".join(row[1:p])), encode_completion(tokenizer, " ".join(row[p:-1])))
               for row, p in zip(rows, prompt, strict=True)]  # fmt: skip
        prompt, lengths = np.array([len(a) for a, _ in ids]), np.array([len(a) + len(b) for a, b in ids])
        flat = np.concatenate([np.array(a + b, np.int32) for a, b in ids])
    within = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    weight = np.where(within < np.repeat(prompt, lengths), spec.prompt_weight, 1.0).astype(np.float32)
    return dict(tokens=flat, weight=weight), lengths


def texts(spec: Spec, n: int, seed: int, split: str) -> list[str]:
    """n documents as text, without bos and eos."""
    words, _, _ = _draw_words(spec, np.random.default_rng((seed, 0x7A)), n, split)
    return [" ".join(WORDS[w] for w in row if w != _BLANK)[len("<bos> ") : -len(" <eos>")] for row in words]


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """bos and the prompt: what the sampler starts from."""
    return [tokenizer.bos, *tokenizer.encode(prompt)]


def encode_completion(tokenizer, completion: str) -> list[int]:
    """The completion and eos, to stand after `encode_prompt`'s ids."""
    return [*tokenizer.encode(completion if tokenizer.kind == "symbols" else f" {completion}"), tokenizer.eos]


def completion(problem: Problem, *, worked=True, tagged=True, language: str | None = None) -> str:
    """A right answer to a problem in one language (default the prompt's): the readable traces of a cold start."""
    language = language or problem.meta["language"]
    if problem.meta["family"] == "countdown":
        trace, result = problem.meta["trace"], problem.answer
        if language == "zh":
            write = {str(i): c for i, c in enumerate(DIGITS["zh"])}
            trace, result = (" ".join(write.get(w, w) for w in t.split()) for t in (trace, result))
    else:
        steps = [DIGITS[language][r] for r in problem.meta["steps"]]
        trace, result = " ".join(steps), steps[-1]
    trace = trace if worked else ""
    if tagged:
        return " ".join(["<think>", *trace.split(), "</think>", "<answer>", *result.split(), "</answer>"])
    return trace or result


def inspect(problem: Problem, completion: str) -> dict:
    """What a completion is: dict(tagged, worked, right, trace_right, answer).

    tagged: has an extractable answer; worked: more than a lone answer was written; right: its answer is right (an
    untagged one by its last word, so that a base's bare answers can be counted apart); trace_right: the work is
    exactly the steps.
    """
    found = grading.extract_answer(completion)
    thought = "<think>" in completion
    work = (completion.partition("<think>")[2].partition("</think>")[0] if thought else completion).split()
    worked = len(work) > (0 if thought else 1)
    right = verify(problem, completion)
    trace = lookup.read_digits(" ".join(work))
    if found is None and problem.meta["family"] != "countdown" and not {"<think>", "<answer>"} & {*completion.split()}:
        right = bool(trace) and trace[-1] == problem.meta["steps"][-1]
    trace_right = worked and (right if "steps" not in problem.meta else trace == problem.meta["steps"])
    return dict(tagged=found is not None, worked=worked, right=right, answer=found, trace_right=trace_right)


def _steps(spec: Spec, drawn) -> np.ndarray:
    """r_i of all problems at once: a gather a step."""
    rules = [spec.rules[name] for name in LOOKUP]
    first, table = (np.stack([getattr(r, part) for r in rules]) for part in ("first", "table"))
    turns = np.array([[LOOKUP.index(r.name) for r in pair] for pair in spec.pairs])
    steps = np.zeros_like(drawn["digits"])
    relayed = drawn["family"] == FAMILIES.index("relay")
    for i in range(SLOTS):
        rule = np.where(relayed, turns[drawn["pair"], i % 2], np.minimum(drawn["family"], len(LOOKUP) - 1))
        d = drawn["digits"][:, i]
        steps[:, i] = first[rule, d] if i == 0 else table[rule, steps[:, i - 1], d]
    return steps


def _rules_of(spec: Spec, family: str, pair: int) -> tuple[lookup.Rule, ...]:
    return spec.pairs[pair] if family == "relay" else (spec.rules[family],)


def _problem(spec: Spec, drawn, i: int, language: str) -> Problem:
    family, pair = FAMILIES[drawn["family"][i]], int(drawn["pair"][i])
    digits = drawn["digits"][i, : drawn["length"][i]].tolist()
    made = lookup.problem(family, _rules_of(spec, family, pair), digits, language)
    made.meta.update(length=len(digits), pair=pair)
    return made


def _draw_words(spec: Spec, rng, n: int, split: str):
    """Documents as word numbers [n, widest] with _BLANK where nothing stands: (words, prompt lengths, lengths)."""
    share = np.array(spec.families)
    n_countdown = int(rng.binomial(n, share[-1] / share.sum()))
    blocks = []
    if n > n_countdown:
        blocks.append(_lookup_words(spec, rng, n - n_countdown, split))
    if n_countdown:
        blocks.append(_countdown_words(spec, rng, n_countdown, split))
    width = max(words.shape[1] for words, _ in blocks)
    words = np.concatenate([np.pad(w, ((0, 0), (0, width - w.shape[1])), constant_values=_BLANK) for w, _ in blocks])
    prompt = np.concatenate([p for _, p in blocks])
    order = rng.permutation(n) if len(blocks) > 1 else np.arange(n)
    return words[order], prompt[order], (words[order] != _BLANK).sum(1)


def _lookup_words(spec: Spec, rng, n: int, split: str):
    """The look-up families' documents by arrays: every column is one place of the layout."""
    drawn = draw_problems(spec, rng, n, split)
    language = rng.integers(2, size=n)
    worked, tagged = rng.random(n) < spec.worked, rng.random(n) < spec.tagged
    trace = rng.choice(3, n, p=np.array(spec.trace) / sum(spec.trace))
    mixed = rng.integers(2, size=(n, SLOTS + 1))
    written = np.where((trace == 2)[:, None], mixed, (language ^ (trace == 1))[:, None])
    written = np.where(worked[:, None], written, language[:, None])  # a direct answer is in the prompt's language
    slot = np.arange(SLOTS)[None, :] < drawn["length"][:, None]
    family_words = np.array([[_ID[w] for w in spec.rules[name].words] for name in LOOKUP])
    turns = np.array([[LOOKUP.index(r.name) for r in pair] for pair in spec.pairs])[drawn["pair"]]
    relayed = drawn["family"] == FAMILIES.index("relay")
    last = np.take_along_axis(drawn["steps"], drawn["length"][:, None] - 1, 1)[:, 0]

    def column(values, where=True):
        return np.broadcast_to(np.where(where, values, _BLANK), n)[:, None]

    single = family_words[np.minimum(drawn["family"], len(LOOKUP) - 1), language]
    steps = np.where(slot & worked[:, None], _WRITE[written[:, :SLOTS], drawn["steps"]], _BLANK)
    words = np.concatenate([
        column(_ID["<bos>"]),
        column(family_words[turns[:, 0], language], relayed),
        column(np.where(relayed, family_words[turns[:, 1], language], single)),
        np.where(slot, _WRITE[language[:, None], drawn["digits"]], _ID["_"]),
        column(_ID["="]),
        column(_ID["<think>"], tagged), steps, column(_ID["</think>"], tagged),
        column(_ID["<answer>"], tagged), column(_WRITE[written[:, SLOTS], last], tagged | ~worked),
        column(_ID["</answer>"], tagged), column(_ID["<eos>"]),
    ], axis=1)  # fmt: skip
    return words, np.full(n, SLOTS + 3) + relayed


def _countdown_words(spec: Spec, rng, n: int, split: str):
    """countdown's documents one by one (it is a small share of the text)."""
    rows, prompts = [], []
    for _ in range(n):
        made = _countdown_problem(spec, rng, split)
        languages = (made.meta["language"], *(x for x in LANGUAGES if x != made.meta["language"]))
        language = languages[rng.choice(2, p=np.array(spec.trace[:2]) / sum(spec.trace[:2]))]
        worked, tagged = rng.random(2) < (spec.worked, spec.tagged)
        answer = completion(made, worked=worked, tagged=tagged, language=language if worked else None)
        prompt = ["<bos>", *made.prompt.split()]
        rows.append([_ID[w] for w in (*prompt, *answer.split(), "<eos>")])
        prompts.append(len(prompt))
    words = np.full((n, max(map(len, rows))), _BLANK, np.int32)
    for i, row in enumerate(rows):
        words[i, : len(row)] = row
    return words, np.array(prompts)


def _countdown_problem(spec: Spec, rng, split: str) -> Problem:
    """countdown with three numbers 1..9 and a target up to 99, written in the miniature's words and slots."""
    while True:
        numbers = [int(x) for x in rng.integers(1, 10, 3)]
        made = _countdown_fold(rng, numbers)
        if made is None:
            continue
        trace, expression, target = made
        language = LANGUAGES[rng.integers(2)]
        write = DIGITS[language]
        slots = [write[x] for x in numbers] + ["_"] * (SLOTS - 5)
        shown = [write[int(c)] for c in f"{target:2d}".strip()]
        prompt = [COUNTDOWN_WORDS[LANGUAGES.index(language)], *slots, *["_"] * (2 - len(shown)), *shown, "="]
        meta = dict(family="countdown", numbers=numbers, target=target, language=language, length=3, trace=trace)
        problem = Problem(" ".join(prompt), expression, meta)
        if _countdown_held_out(spec, problem) == (split == "validation"):
            return problem


def _countdown_fold(rng, numbers: list[int]):
    """(trace, expression, target) of ((a o b) o c) with whole results from 1 to 99 at each step, or None."""
    a, b, c = (numbers[i] for i in rng.permutation(3))
    value, trace, expression = a, [], str(a)
    for k, x in enumerate((b, c)):
        operator = "+-*/"[rng.integers(4)]
        if operator == "/" and value % x:
            return None
        result = {"+": value + x, "-": value - x, "*": value * x, "/": value // x}[operator]
        if not 0 < result < 100:
            return None
        trace.append(f"{' '.join(str(value))} {operator} {x} = {' '.join(str(result))}")
        expression = f"{expression} {operator} {x}" if k == 0 else f"( {expression} ) {operator} {x}"
        value = result
    return " , ".join(trace), expression, value


def _countdown_held_out(spec: Spec, problem: Problem) -> bool:
    digits = np.zeros((1, SLOTS), np.int64)
    digits[0, :4] = [*sorted(problem.meta["numbers"]), problem.meta["target"]]
    return bool(held_out(np.array([FAMILIES.index("countdown")]), np.array([4]), digits, spec.held_out)[0])


@functools.lru_cache(8)
def _translation(tokenizer) -> np.ndarray:
    """Word number -> the tokenizer's id; ValueError names a word that its list lacks."""
    return np.array([tokenizer.encode(word)[0] for word in WORDS], np.int32)
