"""The job `eval`: held-out bits per byte by domain, at fixed tokens, of every checkpoint of a run (of any stage, EMA too).

Each document is cut into windows and every token predicted once (evaluate.py), so that checkpoints, runs and EMA compare on the very
same bytes. Writes WORKDIR/eval.jsonl, an object a checkpoint, and prints the table; the run itself is left as it is.
"""
from __future__ import annotations

import dataclasses
import json
import pathlib

import jax

from data import corpus
from data import tokenizer as tokenizers
from model import config as model_config
from model.errors import UserError, freeze, named_input, require
from train import checkpoint
from train.evaluate import bigram_bits_per_byte, by_domain, clip_bytes, make_logp
from train.metrics import plain, table, write_atomically


@dataclasses.dataclass(frozen=True)
class Eval:
    """config.eval: path of a run, stage or step ('' is the workdir); ema: the averaged weights; max_bytes of each domain."""

    path: str
    ema: bool
    max_bytes: int
    batch_size: int
    seq_len: int

    def __post_init__(self):
        for name in ("max_bytes", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")
        require(self.seq_len >= 2, "seq_len", self.seq_len, "at least 2")


def evaluate(config, workdir: str) -> None:
    """The job: config.eval over config.data, config.tokenizer and config.run; the model's shape is the checkpoint's own."""
    e, run = freeze(Eval, config.eval, "eval"), model_config.parse_run(config.run)
    steps = checkpoints_of(pathlib.Path(e.path or workdir))
    with named_input("data", "tokenizer"):
        spec, tokenizer = corpus.parse(config.data), tokenizers.parse(config.tokenizer)
        domains = {d: clip_bytes(corpus.validation_documents(spec, d), e.max_bytes) for d in spec.domains}
    bigram = {d: bigram_bits_per_byte(corpus.documents(spec, d, "train"), docs) for d, docs in domains.items()}

    lines, logps = [], {}
    for path in steps:
        cfg, params, router_bias = checkpoint.load_params(path, ema=e.ema, leaf="eval")
        require(tokenizer.vocab_size <= cfg.vocab_size, "tokenizer", f"{tokenizer.vocab_size} ids",
                f"at most the {cfg.vocab_size} of {path}")
        logp = logps.setdefault(cfg, make_logp(cfg, run))
        found = by_domain(logp, params, router_bias, domains, tokenizer, batch_size=e.batch_size, seq_len=e.seq_len)
        lines.append(plain(dict(path=str(path), step=int(path.name), ema=e.ema, bigram=bigram) | found))
    if jax.process_index() == 0:
        try:
            pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
            write_atomically(pathlib.Path(workdir) / "eval.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise UserError(f"workdir: found {workdir!r} ({error.strerror}), allowed: a folder that can be written") from None
        names = [str(p).split("/checkpoints/")[-1] + (" (EMA)" if e.ema else "") for p in steps]
        rows = [(name, *line["bits_per_byte"].values()) for name, line in zip(names, lines, strict=True)]
        print(table("held-out bits per byte", ("checkpoint", *domains), [*rows, ("byte bigram", *bigram.values())]))


def checkpoints_of(path: pathlib.Path) -> list[pathlib.Path]:
    """The step directories of a run (all its stages), of a stage, or the one step. Raises UserError."""
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [folder / str(step) for folder in [root, *sorted(p for p in root.glob("*") if p.is_dir() and not p.is_symlink())]
             for step in checkpoint.steps(folder)]
    return found or [checkpoint.find(path, "eval")]
