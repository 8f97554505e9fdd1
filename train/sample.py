"""Jobs `sample` and `chat`: answers of a checkpoint, printed as they come, the thinking set apart.

A checkpoint is a run, stage or step of ours, or a Hugging Face directory, which brings its own tokenizer.json where it has one.
Several answer side by side. config.sample = dict(prompt, n, max_new, temperature, top_p, checkpoints: paths beside or instead of
init_from.path; template = dict(kind='raw' | 'chat'); draft = dict(kind='none' | 'mtp')).
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from data import chat as chats
from data import tokenizer as tokenizers
from model import hf
from model.config import Execution, ModelConfig, parse_run
from model.errors import UserError, choice, leaf, require, user_input
from train import checkpoint, sampler
from train.speculation import Acceptance, speculate

UNFINISHED = "\ufffd"  # how a decoder shows the first bytes of a character
TEMPLATES = {
    "raw": lambda prompt, tokenizer: [tokenizer.bos, *tokenizer.encode(prompt)],
    "chat": lambda prompt, tokenizer: chats.render([dict(role="user", content=prompt)], tokenizer, answer_next=True)[0],
}
DRAFTS = {"none": sampler.stream, "mtp": speculate}


@dataclasses.dataclass(frozen=True)
class Plan:
    """config.sample, frozen."""

    prompt: str
    n: int
    template: str
    draft: str
    paths: tuple[str, ...]
    ema: bool
    run: Execution
    draws: dict[str, Any]  # what `stream` takes: max_new, temperature, top_p, seed


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A checkpoint that can be asked: `ids(prompt ids, sample, acceptance)` yields the answer without its eos."""

    name: str
    cfg: ModelConfig
    tokenizer: Any
    ids: Callable[[list[int], int, Acceptance], Iterator[int]]


def sample(config, workdir: str) -> None:
    """Prints config.sample.n answers to config.sample.prompt."""
    del workdir
    plan = parse(config)
    console, speakers = Console(highlight=False, soft_wrap=True), load(plan, config.tokenizer)
    for k in range(plan.n):
        if plan.n > 1:
            console.print(f"answer {k + 1} of {plan.n}", style="bold")
        with user_input("sample.prompt"):
            prompts = [TEMPLATES[plan.template](plan.prompt, s.tokenizer) for s in speakers]
        answer(console, speakers, prompts, k, plan.prompt if plan.template == "raw" else "")


def chat(config, workdir: str) -> None:
    """Reads questions from the terminal until an empty line, each answered with the talk so far in the chat template."""
    del workdir
    plan = parse(config)
    console, speakers = Console(highlight=False, soft_wrap=True), load(plan, config.tokenizer)
    talks: list[list[dict]] = [[] for _ in speakers]
    for turn in itertools.count():
        try:
            question = console.input("[bold]you:[/] ")
        except EOFError:
            return
        if not question.strip():
            return
        for talk in talks:
            talk.append(dict(role="user", content=question))
        with user_input("chat"):
            prompts = [chats.render(talk, s.tokenizer, answer_next=True)[0] for talk, s in zip(talks, speakers, strict=True)]
        for talk, text in zip(talks, answer(console, speakers, prompts, turn), strict=True):
            talk.append(dict(role="assistant", content=text or " "))  # the template knows no empty answer


def parse(config) -> Plan:
    """Freezes config.sample, init_from and run. Raises UserError."""
    sub = config.sample
    n, max_new = (leaf(sub, name, int, "sample") for name in ("n", "max_new"))
    for name, value in dict(n=n, max_new=max_new).items():
        require(value >= 1, f"sample.{name}", value, "a positive integer")
    temperature, top_p = (leaf(sub, name, float, "sample") for name in ("temperature", "top_p"))
    with user_input("sample"):
        sampler.check_sampling(temperature, top_p)
    paths = tuple(path for path in (config.init_from.path, *sub.checkpoints) if path)
    require(len(paths) >= 1, "init_from.path", "", "a run, stage, step or Hugging Face directory to answer")
    return Plan(
        leaf(sub, "prompt", str, "sample"), n, choice(sub.template.kind, TEMPLATES, "sample.template.kind"),
        choice(sub.draft.kind, DRAFTS, "sample.draft.kind"), paths, leaf(config.init_from, "ema", bool, "init_from"),
        parse_run(config.run), dict(max_new=max_new, temperature=temperature, top_p=top_p, seed=leaf(config, "seed", int, "config")))


def load(plan: Plan, tokenizer_config) -> list[Speaker]:
    """The checkpoints of a plan, ready to speak. Raises UserError."""
    speakers = []
    for path in map(pathlib.Path, plan.paths):
        published = any(path.glob("*.safetensors"))
        own = path / "tokenizer.json"
        with user_input("tokenizer"):
            tokenizer = tokenizers.parse(dict(kind="bpe", bpe=dict(path=str(own), vocab_size=0)) if published and own.is_file()
                                         else tokenizer_config)
        if published:
            cfg, params, bias = hf.load(path, "bfloat16" if plan.run.precision.kind == "bf16" else "float32")
        else:
            cfg, params, bias = checkpoint.load_params(path, ema=plan.ema)
        if tokenizer.vocab_size > cfg.vocab_size:
            raise UserError(f"tokenizer: found {tokenizer.vocab_size} ids, allowed: at most the {cfg.vocab_size} of the model in {path}")
        ids = functools.partial(_ids, plan, cfg, sampler.ready(params, plan.run), bias, tokenizer.eos)
        speakers.append(Speaker(str(path), cfg, tokenizer, ids))
    return speakers


def _ids(plan: Plan, cfg, params, bias, eos: int, prompt_ids: list[int], index: int, acceptance: Acceptance) -> Iterator[int]:
    counted = dict(acceptance=acceptance) if plan.draft == "mtp" else {}
    ids = DRAFTS[plan.draft](params, bias, prompt_ids, cfg, plan.run, stop_ids=(eos,), sequence_id=(0, index), **plan.draws, **counted)
    return itertools.takewhile(lambda i: i != eos, ids)


def answer(console: Console, speakers: list[Speaker], prompts: list[list[int]], index: int, shown: str = "") -> list[str]:
    """Streams each speaker's answer, side by side if there are several; returns their texts. `shown` is printed before them."""
    texts, counts, start = [Text(printable(shown)) for _ in speakers], [Acceptance() for _ in speakers], time.perf_counter()
    numbers, spoken = [0] * len(speakers), [""] * len(speakers)

    def segments(k: int) -> Iterator[tuple[str, bool]]:
        def counted() -> Iterator[int]:
            for i in speakers[k].ids(prompts[k], index, counts[k]):
                numbers[k] += 1
                yield i

        thinking = shown.rfind("<think>") > shown.rfind("</think>")
        for text, apart in set_apart(text_pieces(counted(), speakers[k].tokenizer.decode, prompts[k][-1:]), thinking):
            spoken[k] += text
            yield text, apart

    streams = [segments(k) for k in range(len(speakers))]
    if len(speakers) == 1:
        console.print(texts[0], end="")
        for text, apart in streams[0]:
            console.print(Text(printable(text), "dim" if apart else ""), end="")
        console.print()
    else:
        with Live(console=console, refresh_per_second=8, vertical_overflow="visible") as live:
            for round_ in itertools.zip_longest(*streams):
                for text, piece in zip(texts, round_, strict=True):
                    if piece:
                        text.append(printable(piece[0]), "dim" if piece[1] else "")
                live.update(_columns(speakers, texts))
    seconds = time.perf_counter() - start
    for speaker, n, count in zip(speakers, numbers, counts, strict=True):
        kept = f", {count.rate:.0%} of {count.proposed} drafts kept" if count.proposed else ""
        console.print(f"{speaker.name}: {n} tokens, {n / seconds:.0f} tokens/s with compiling{kept}", style="dim")
    return spoken


def _columns(speakers: list[Speaker], texts: list[Text]) -> Group:
    table = Table(expand=True)
    for speaker in speakers:
        table.add_column(speaker.name, ratio=1, overflow="fold")
    table.add_row(*texts)
    return Group(table)


def text_pieces(ids: Iterable[int], decode: Callable[[list[int]], str], before: Iterable[int] = ()) -> Iterator[str]:
    """The text of ids as it grows: joined it is decode(before + ids) without decode(before). A character whose bytes have not all
    come is held back; only ids since the last whole character are decoded again."""
    window = list(before)
    shown = len(decode(window))
    for i in ids:
        window.append(i)
        text = decode(window)
        whole = len(text) - text.endswith(UNFINISHED)
        if whole > shown:
            yield text[shown:whole]
            shown = whole
        if whole == len(text):
            window = window[-1:]
            shown = len(decode(window))
    if len(rest := decode(window)) > shown:
        yield rest[shown:]


def set_apart(texts: Iterable[str], thinking: bool = False) -> Iterator[tuple[str, bool]]:
    """(text, whether it is thinking): <think> to </think>, tags included, however the pieces cut them."""
    held = ""
    for text in texts:
        held += text
        while held:
            tag = "</think>" if thinking else "<think>"
            head, found, rest = held.partition(tag)
            if not found:
                part = max(n for n in range(len(tag)) if held.endswith(tag[:n]))  # perhaps the beginning of a tag
                if len(held) > part:
                    yield held[:len(held) - part], thinking
                held = held[len(held) - part:]
                break
            now, held = (head + tag, rest) if thinking else (head, tag + rest)
            if now:
                yield now, thinking
            thinking = not thinking
    if held:
        yield held, thinking


def printable(text: str) -> str:
    """text without what would steer a terminal or cannot be written to it."""
    return "".join(c if c.isprintable() or c in "\n\t" else UNFINISHED for c in text)
