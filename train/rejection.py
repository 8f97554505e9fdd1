"""The job `rejection`: traces of a policy for the next SFT, or for a smaller student (R1 §2.3.3, §2.4).

Kept are answers that are right, formatted and in one language, each once. A right answer may be a lucky guess: `lucky` asks for the
work itself to be right (trace), or for at least a share of a prompt's samples to be (samples). `general` parts of direct answers to
short problems are mixed in, as R1 mixes 200k general examples with 600k reasoning ones. Writes traces/STAGE.jsonl.
"""
from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from data import corpus
from data import tokenizer as tokenizers
from data.tasks import miniature
from model import config as model_config
from model.errors import choice, freeze, leaf, named_input, require, sequence
from train import checkpoint, evaluate_tasks, sft
from train.metrics import Logger, prepare_workdir

LUCKY = ("none", "trace", "samples")
ALONE = 32


@dataclasses.dataclass(frozen=True)
class Rejection:
    """config[NAME]: `samples` answers to each of `prompts` problems; general: direct answers as a share of all examples."""

    prompts: int
    samples: int
    max_new: int
    temperature: float
    batch_size: int
    general: float
    general_lengths: tuple
    families: dict
    lengths: tuple
    lucky: str
    least: float

    def __post_init__(self):
        for name in ("prompts", "samples", "max_new", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")
        require(0 <= self.general < 1, "general", self.general, "a share from 0 up to 1, 1 excluded")
        require(0 <= self.least <= 1, "lucky.samples.least", self.least, "a share from 0 to 1")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")


def parse(sub, name: str) -> Rejection:
    """Freezes config[name]."""
    given = dict(families=evaluate_tasks.families_of(sub, name), lengths=evaluate_tasks.lengths_of(sub, name),
                 lucky=choice(sub.lucky.kind, LUCKY, f"{name}.lucky.kind"), least=leaf(sub.lucky.samples, "least", float, name),
                 general_lengths=sequence(sub, "general_lengths", name))
    plain = {k: v for k, v in sub.items() if k not in (*given, "job", "init_from", "edits")}
    return freeze(Rejection, plain, name, **given)


def rejection(config, workdir: str, name: str = "rejection", stage: str | None = None) -> None:
    """The job: samples of config.init_from, judged by rule; no weights change."""
    path = pathlib.Path(workdir) if stage else prepare_workdir(workdir, config)
    spec, run, seed = parse(config[name], name), model_config.parse_run(config.run), leaf(config, "seed", int, "config")
    with named_input("data", "tokenizer"):
        tasks, tokenizer = corpus.parse(config.data).tasks, tokenizers.parse(config.tokenizer)
    logger = Logger(path, stage)
    logger.cut_back(-1)
    cfg, params, bias = checkpoint.load_params(config.init_from.path)
    rng = np.random.default_rng((seed, sum(name.encode())))
    problems = miniature.problems(tasks, rng, spec.prompts, "train", spec.families, spec.lengths)
    print(f"{name}: {spec.samples} answers to each of {spec.prompts} problems", flush=True)
    answers = evaluate_tasks.complete(
        evaluate_tasks.policy(params, bias, cfg, run), tokenizer, [p.prompt for p in problems], spec.samples, seed=seed, step=1 << 22,
        max_new=spec.max_new, temperature=spec.temperature, batch_size=spec.batch_size)
    kept, counts = choose(spec, problems, answers.texts, tokenizer)
    pairs = [(problems[i].prompt, text) for i, text in kept]
    direct = general(spec, tasks, rng, len(pairs))
    counts["general"] = len(direct)
    if not pairs:
        print(f"{name}: no answer passed; the {len(direct)} direct ones stand alone, so that a recipe can go on", flush=True)
    pairs = [(pairs + direct)[i] for i in rng.permutation(len(pairs) + len(direct))]
    target = sft.write_traces(path, name, pairs, tokenizer)
    logger.event("rejection", 0, **counts)
    for i, text in kept[:40]:
        look = evaluate_tasks.inspect(problems[i], text, tokenizer)
        logger.sample(0, **evaluate_tasks.trace(problems[i], text, look, len(text.split())))
    print(f"{name}: kept " + ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in counts.items()) + f"; written to {target}", flush=True)


def choose(spec: Rejection, problems: list, texts: list[list[str]], tokenizer) -> tuple[list[tuple[int, str]], dict[str, int]]:
    """([(problem, text)] that pass, how many were left after each filter)."""
    counts = dict(sampled=0, right=0, formatted=0, one_language=0, not_lucky=0, unique=0)
    kept, seen = [], set()
    for i, (problem, group) in enumerate(zip(problems, texts, strict=True)):
        looks = [evaluate_tasks.inspect(problem, t, tokenizer) for t in group]
        right = [x["right"] and x["tagged"] for x in looks]
        counts["sampled"] += len(group)
        for text, look, hit in zip(group, looks, right, strict=True):
            lucky = dict(none=False, trace=not look["trace_right"], samples=np.mean(right) < spec.least)[spec.lucky]
            passed = (hit, look["format"], look["consistency"] == 1, not lucky, (problem.prompt, text) not in seen)
            for stage, key in enumerate(("right", "formatted", "one_language", "not_lucky", "unique")):
                counts[key] += all(passed[:stage + 1])
            if all(passed):
                seen.add((problem.prompt, text))
                kept.append((i, text))
    return kept, counts


def general(spec: Rejection, tasks: miniature.Spec, rng, n: int) -> list[tuple[str, str]]:
    """Direct answers to short problems, so many that they are `general` of the whole; ALONE where there is no other example."""
    wanted = round(n * spec.general / (1 - spec.general)) if n else ALONE
    if not wanted:
        return []
    problems = miniature.problems(tasks, rng, wanted, "train", spec.families, spec.general_lengths)
    return [(p.prompt, miniature.completion(p, worked=False)) for p in problems]
