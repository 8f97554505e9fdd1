"""Documents of a real corpus by domain, and the pipeline that makes batches of them.

Sources: `code` and `prose` are the running Python's own library sources and its documentation (docstrings, language
reference of pydoc_data), which every machine has; `text` is the user's files; `tasks` are rule-generated problems
(data/tasks/miniature.py). Train and validation are parted by file: a file's sources and its docstrings fall on one
side. Pipeline: documents -> ids -> FIM -> rows (packing.py) -> mixture by weight -> batch, random access by index
throughout, so that the iterator's whole position is one number and resuming is exact.
"""
import ast
import dataclasses
import functools
import glob
import hashlib
import json
import pathlib
import platform
import sysconfig
import warnings

import numpy as np

from data import fim, packing
from data.tasks import miniature

SOURCES = ("code", "prose", "text", "tasks")
# tests and the like are not what a library reads like; encodings are near-equal tables on both sides of the split;
# _sysconfigdata is this machine's build
_LEFT_OUT = set("test tests site-packages encodings idlelib lib2to3 pydoc_data lib-dynload __pycache__".split())


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Frozen config.data. `weights` are shares of rows by source, in the order of SOURCES."""

    weights: tuple[float, ...]
    max_bytes: int
    files: tuple[str, ...]
    validation_every: int
    fim_rate: float
    packing: packing.Packing
    threads: int
    tasks: miniature.Spec

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains with weight: sources, `text` replaced by the names of its entries."""
        return tuple(_shares(self))


def parse(config) -> DataSpec:
    """config.data -> DataSpec, reading every file's existence but no content. ValueError names the field."""
    weights = tuple(float(config["weights"][s]) for s in SOURCES)
    if min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"data.weights: {dict(zip(SOURCES, weights, strict=True))}; none below 0, at least one above")
    files = config["text"]["files"]
    spec = DataSpec(
        weights=weights,
        max_bytes=_whole("data.max_bytes", config["max_bytes"], 0),
        files=(files,) if isinstance(files, str) else tuple(files),
        validation_every=_whole("data.validation_every", config["validation_every"], 2),
        fim_rate=float(config["fim"]["rate"]),
        packing=packing.parse(config["packing"]),
        threads=_whole("data.threads", config["threads"], 0),
        tasks=miniature.parse(config["tasks"]),
    )
    if not 0 <= spec.fim_rate <= 1:
        raise ValueError(f"data.fim.rate: {spec.fim_rate}; a share from 0 to 1")
    if dict(zip(SOURCES, weights, strict=True))["text"]:
        if not spec.files:
            raise ValueError("data.text.files: empty while data.weights.text > 0; give globs, or 'domain=glob'")
        for entry in spec.files:
            _expand(entry)
    return spec


@functools.lru_cache(16)
def documents(spec: DataSpec, domain: str, split: str) -> tuple[str, ...]:
    """The texts of one domain and split ('train' | 'validation'). Task documents are endless: a sample of them."""
    if split not in ("train", "validation"):
        raise ValueError(f"split: {split!r}; allowed: train, validation")
    if domain == "tasks":
        return tuple(miniature.texts(spec.tasks, 512, seed=0, split=split))
    if domain in ("code", "prose"):
        both = python_documents(domain, spec.max_bytes, spec.validation_every)
    else:
        entries = [e for e in spec.files if _expand(e)[0] == domain]
        if not entries:
            raise ValueError(f"data: no domain {domain!r}; there are {', '.join(spec.domains)}")
        both = _text_documents(entries, spec.max_bytes, spec.validation_every)
    return both[split == "validation"]


def validation_documents(spec: DataSpec, domain: str) -> list[str]:
    """Texts never trained on, for bits per byte by domain."""
    return list(documents(spec, domain, "validation"))


def describe(spec: DataSpec) -> dict:
    """dict(hash, python, bytes={domain: dict(train, validation)}): the hash is of every document of both splits."""
    digest, sizes = hashlib.sha256(), {}
    for domain in spec.domains:
        sizes[domain] = {}
        for split in ("train", "validation"):
            texts = [t.encode("utf-8", "surrogatepass") for t in documents(spec, domain, split)]
            for text in texts:
                digest.update(hashlib.sha256(text).digest())
            sizes[domain][split] = sum(map(len, texts))
    return dict(hash=digest.hexdigest()[:16], python=platform.python_version(), bytes=sizes)


def make_iterator(spec: DataSpec, tokenizer, *, batch_size: int, seq_len: int, n_micro: int, seed: int, split="train", rows=None):
    """Endless batches dict(tokens, segment_ids, positions, weight), numpy [n_micro, batch_size / n_micro, seq_len].

    batch_size counts the rows of a whole step; rows (indices into a micro-batch) are those wanted here, by default all. The iterator
    has `get_state() -> dict` and `set_state(dict)`; a state fits whatever the rows.
    """
    make = functools.partial(_rows, spec, tokenizer, seq_len=seq_len, seed=seed, split=split)
    shares = _shares(spec)
    return iterate([make(domain) for domain in shares], list(shares.values()), batch_size, n_micro, spec.threads, rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Of a random-access source in batches of batch_size, the rows with these indices: what one process reads."""

    source: object
    batch_size: int
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.source) // self.batch_size * len(self.rows)

    def __getitem__(self, i: int):
        batch, k = divmod(int(i), len(self.rows))
        return self.source[batch * self.batch_size + int(self.rows[k])]


def iterate(sources: list, weights: list[float], batch_size: int, n_micro: int, threads: int = 1, rows=None):
    """The grain end of the pipeline, over any random-access sources of rows (packing.Rows, packing.Generated)."""
    import grain  # two seconds: only a job that trains pays them

    if batch_size % n_micro:
        raise ValueError(f"batch_size: {batch_size} rows do not divide into {n_micro} micro-batches")
    each = [grain.MapDataset.source(s) for s in sources]
    mixed = each[0] if len(each) == 1 else grain.MapDataset.mix(each, weights=weights)
    if rows is not None and len(rows) < batch_size // n_micro:
        here = (np.arange(n_micro)[:, None] * (batch_size // n_micro) + rows).ravel()
        mixed, batch_size = grain.MapDataset.source(Part(mixed, batch_size, here)), len(here)
    batches = mixed.batch(batch_size).map(lambda b: {k: v.reshape(n_micro, -1, *v.shape[1:]) for k, v in b.items()})
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def document_ids(text: str, tokenizer) -> np.ndarray:
    """bos, the text, eos: int32."""
    return np.asarray([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos], np.int32)


def _rows(spec, tokenizer, domain, *, seq_len, seed, split):
    """The random-access rows of one domain."""
    if domain == "tasks":
        draw = functools.partial(miniature.draw_columns, spec.tasks, tokenizer, split=split)
        return packing.Generated(draw, spec.packing, seq_len, seed, tokenizer.pad)
    ids = [document_ids(text, tokenizer) for text in documents(spec, domain, split)]
    if not ids:
        raise ValueError(f"data: domain {domain!r} has no {split} document")
    middle = fim.chosen(len(ids), spec.fim_rate, seed)

    def fetch(epoch, d):
        if not middle[d]:
            return dict(tokens=ids[d])
        rng = np.random.default_rng((seed, 0xF2, epoch, d))
        return dict(tokens=np.concatenate([ids[d][:1], fim.rearrange(ids[d][1:-1], rng, tokenizer), ids[d][-1:]]))

    lengths = np.array([len(x) for x in ids]) + 3 * middle
    return packing.Rows(lengths, fetch, spec.packing, seq_len, seed, tokenizer.pad)


def _shares(spec: DataSpec) -> dict[str, float]:
    """Weight by domain; the weight of `text` is shared out by bytes of its domains on disk."""
    shares = {s: w for s, w in zip(SOURCES, spec.weights, strict=True) if w > 0}
    text = shares.pop("text", 0)
    if text:
        sizes: dict[str, int] = {}
        for entry in spec.files:
            name, paths = _expand(entry)
            sizes[name] = sizes.get(name, 0) + sum(p.stat().st_size for p in paths)
        shares |= {name: text * max(size, 1) / max(sum(sizes.values()), 1) for name, size in sizes.items()}
    return shares


def _held_out(name: str, every: int) -> tuple[bool, str]:
    """(is in the validation split, a key that orders documents at random but equally everywhere)."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return int(digest[-8:], 16) % every == 0, digest


def _split(named, max_bytes: int, every: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(name, () -> text) pairs to (train, validation): in the order of the name's hash, doubles dropped, up to
    max_bytes.
    """
    sides, seen, size = ([], []), set(), 0
    for name, read in sorted(named, key=lambda pair: _held_out(pair[0], every)[1]):
        if max_bytes and size >= max_bytes:
            break
        text = read()
        content = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        if text.strip() and content not in seen:
            seen.add(content)
            size += len(text.encode("utf-8", "surrogatepass"))
            sides[_held_out(name, every)[0]].append(text)
    return tuple(sides[0]), tuple(sides[1])


@functools.lru_cache(4)
def python_documents(domain: str, max_bytes: int, every: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(train, validation) of the running Python: 'code' is library files, 'prose' their docstrings and reference
    topics.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*.py") if not p.name.startswith("_sysconfigdata")}
    files = {name: p for name, p in files.items() if not _LEFT_OUT & {*name.split("/")}}
    if not files:
        raise ValueError(f"data.weights.{domain}: this Python has no library sources under {root}; use data.text.files")
    if domain == "code":
        return _split([(name, functools.partial(_source, p)) for name, p in files.items()], max_bytes, every)
    from pydoc_data import topics

    named = [(f"pydoc_data/{name}", functools.partial(str, text)) for name, text in topics.topics.items()]
    named += [(name, lambda p=p: _docstrings(_source(p))) for name, p in files.items()]
    return _split(named, max_bytes, every)


def _source(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a few library files declare another encoding
        return ""


def _docstrings(source: str) -> str:
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings():  # of odd escapes; as errors they would change the corpus
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except SyntaxError:  # templates and version-specific files
        return ""
    return "\n\n".join(filter(None, (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, nodes))))


def _expand(entry: str) -> tuple[str, list[pathlib.Path]]:
    """'domain=glob' or 'glob' (domain 'text') -> (domain, files)."""
    name, mark, pattern = entry.partition("=")
    name, pattern = (name, pattern) if mark else ("text", entry)
    paths = sorted(pathlib.Path(p) for p in glob.glob(pattern, recursive=True) if pathlib.Path(p).is_file())
    if not paths:
        raise ValueError(f"data.text.files: {pattern!r} matches no file")
    if name in ("", "code", "prose", "tasks"):
        raise ValueError(f"data.text.files: {entry!r} names the domain {name!r}; choose one not in {SOURCES}")
    return name, paths


def _text_documents(entries: list[str], max_bytes: int, every: int):
    """(train, validation) of the user's files: a .jsonl holds a document a line (key 'text'), any other file is one.

    Files are parted by name, lines by content; where no whole file falls to validation, each file's last part does.
    """
    named, whole = [], []
    for path in (p for entry in entries for p in _expand(entry)[1]):
        if path.suffix == ".jsonl":
            texts = list(_jsonl(path))
            named += [(text, functools.partial(str, text)) for text in texts]
        else:
            whole.append(path)
    if whole and not any(_held_out(p.name, every)[0] for p in whole):
        texts = [_user_text(p)[: max_bytes or None] for p in whole]
        parts = [(t[: len(t) - len(t) // every], t[len(t) - len(t) // every :]) for t in texts]
        lines = _split(named, max_bytes, every)
        return tuple(tuple(part[k] for part in parts if part[k].strip()) + lines[k] for k in (0, 1))
    return _split(named + [(p.name, functools.partial(_user_text, p)) for p in whole], max_bytes, every)


def _user_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"data.text.files: {path}: not UTF-8 text (byte {e.start})") from None


def _jsonl(path: pathlib.Path):
    for n, line in enumerate(_user_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(f"data.text.files: {path}:{n}: not JSON ({e.msg} at column {e.colno})") from None
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise ValueError(f"data.text.files: {path}:{n}: found {line[:40]!r}; allowed: {{\"text\": \"...\"}}")
        yield value["text"]


def _whole(field: str, value, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{field}: {value!r}; a whole number of at least {least}")
    return value
