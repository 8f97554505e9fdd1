"""Text <-> ids. Three kinds behind one protocol: raw bytes, byte-level BPE, and words of a fixed list.

Every kind: `encode(text) -> list[int]`, `decode(ids) -> str`, `vocab_size`, `special(name) -> int`, and
decode(encode(x)) = x. `encode` never makes a special id from text under bytes and bpe, so that text cannot forge a
turn or an end; under symbols the tags and specials are words like any other. `decode` spells specials out; `text`
leaves them out. Special spellings are DeepSeek's, so that its `tokenizer.json` finds its own ids. V3 §4.1 (byte-level
BPE, 128K, FIM tokens).
"""
import dataclasses
import os
import pathlib
import re

SPECIALS = dict(
    bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", pad="<｜▁pad▁｜>",
    fim_begin="<｜fim▁begin｜>", fim_hole="<｜fim▁hole｜>", fim_end="<｜fim▁end｜>",
    user="<｜User｜>", assistant="<｜Assistant｜>",
)  # fmt: skip
UNKNOWN = "\ufffd"  # what an id beyond the vocabulary (a model padded to a round size can sample one) decodes to


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """What the kinds share. `specials` maps names to ids; a kind without a name (symbols: chat, FIM) lacks the key."""

    kind: str
    vocab_size: int
    specials: dict[str, int]
    names: dict[int, str]

    def special(self, name: str) -> int:
        """The id of a special token; ValueError if this tokenizer has none of that name."""
        if name not in self.specials:
            raise ValueError(f"tokenizer.kind: {self.kind!r} has no {name!r} token; it has {', '.join(self.specials)}")
        return self.specials[name]

    @property
    def bos(self) -> int:
        return self.special("bos")

    @property
    def eos(self) -> int:
        return self.special("eos")

    @property
    def pad(self) -> int:
        return self.special("pad")

    def text(self, ids) -> str:
        """`decode` without the specials."""
        return self.decode([i for i in map(int, ids) if i not in self.names])


@dataclasses.dataclass(frozen=True, eq=False)
class ByteTokenizer(Tokenizer):
    """Pieces of UTF-8: piece i is `pieces[i]`. Without merges (`bpe` None) a piece is a byte."""

    pieces: tuple[bytes, ...]
    bpe: object = None
    byte_ids: tuple[int, ...] = tuple(range(256))

    def encode(self, text: str) -> list[int]:
        if self.bpe is None:
            return list(text.encode("utf-8", "surrogatepass"))
        ids = []
        # lone surrogates are no UTF-8 and the Rust library refuses them: their three bytes go in as single bytes
        for k, part in enumerate(re.split("([\ud800-\udfff]+)", text)):
            if k % 2:
                ids += [self.byte_ids[b] for b in part.encode("utf-8", "surrogatepass")]
            elif part:
                ids += self.bpe.encode(part, add_special_tokens=False).ids
        return ids

    def decode(self, ids) -> str:
        out = []
        for i in map(int, ids):
            name = self.names.get(i)
            out.append(name.encode() if name else self.pieces[i] if 0 <= i < len(self.pieces) else UNKNOWN.encode())
        raw = b"".join(out)
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # a model may stop in the middle of a character
            return raw.decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True, eq=False)
class SymbolTokenizer(Tokenizer):
    """Words parted by single spaces; the id of a word is its place in the config."""

    words: tuple[str, ...]
    ids: dict[str, int]

    def encode(self, text: str) -> list[int]:
        """ValueError names the first unknown word."""
        if not text:
            return []
        try:
            return [self.ids[word] for word in text.split(" ")]
        except KeyError as e:
            raise ValueError(f"tokenizer.symbols.words: {e.args[0]!r} in {text[:60]!r} is not one of its "
                             f"{len(self.words)} words (words are parted by single spaces)") from None  # fmt: skip

    def decode(self, ids) -> str:
        return " ".join(self.words[i] if 0 <= i < len(self.words) else UNKNOWN for i in map(int, ids))


def parse(config) -> Tokenizer:
    """config.tokenizer -> a frozen tokenizer. `dict(kind, bytes=dict(), bpe=dict(path, vocab_size),
    symbols=dict(words))`.
    """
    if config["kind"] not in KINDS:
        raise ValueError(f"tokenizer.kind: {config['kind']!r}; allowed: {', '.join(KINDS)}")
    return KINDS[config["kind"]](**config[config["kind"]])


def bytes_tokenizer() -> ByteTokenizer:
    """256 bytes, then the specials: 264 ids."""
    specials = {name: 256 + k for k, name in enumerate(SPECIALS)}
    return ByteTokenizer("bytes", 256 + len(SPECIALS), specials, {i: SPECIALS[n] for n, i in specials.items()},
                         tuple(bytes([b]) for b in range(256)))  # fmt: skip


def bpe_tokenizer(path: str, vocab_size: int) -> ByteTokenizer:
    """A byte-level `tokenizer.json` (ours or a published one). `vocab_size` is the trainer's; a file brings its own."""
    import tokenizers

    del vocab_size
    if not path:
        raise ValueError("tokenizer.bpe.path: empty; give a tokenizer.json (job `tokenizer` trains one)")
    if not os.path.isfile(path):
        raise ValueError(f"tokenizer.bpe.path: no file {path!r}; give a tokenizer.json (job `tokenizer` trains one)")
    try:
        bpe = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:
        raise ValueError(f"tokenizer.bpe.path: {path!r} is no tokenizer.json ({str(e).splitlines()[0]})") from None
    bpe.encode_special_tokens = True  # text that spells a special stays text
    vocab, byte_of = bpe.get_vocab(with_added_tokens=False), {c: b for b, c in enumerate(_byte_alphabet())}
    size = max(bpe.get_vocab(with_added_tokens=True).values()) + 1
    pieces = [b""] * size
    for token, i in vocab.items():
        pieces[i] = bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode()
    missing = [b for b, c in enumerate(_byte_alphabet()) if c not in vocab]
    if missing:
        raise ValueError(f"tokenizer.bpe.path: {path!r} is not byte-level: no piece for byte {missing[0]}")
    specials, names = {}, {i: token.content for i, token in bpe.get_added_tokens_decoder().items()}
    for i, content in names.items():
        pieces[i] = content.encode()
    for name, spelling in SPECIALS.items():
        found = bpe.token_to_id(spelling)
        specials[name] = size if found is None else found
        size += found is None
        names[specials[name]] = spelling
    return ByteTokenizer("bpe", size, specials, names, tuple(pieces), bpe, tuple(vocab[c] for c in _byte_alphabet()))


def symbols_tokenizer(words: tuple[str, ...]) -> SymbolTokenizer:
    """`<pad>`, `<bos>`, `<eos>` are appended where the list lacks them; other specials exist only if listed as
    `<name>`.
    """
    words = tuple(words)
    words += tuple(w for w in ("<pad>", "<bos>", "<eos>") if w not in words)
    for word in words:
        if not word or " " in word:
            raise ValueError(f"tokenizer.symbols.words: {word!r} is empty or holds a space")
    if len(set(words)) != len(words):
        double = next(w for k, w in enumerate(words) if w in words[:k])
        raise ValueError(f"tokenizer.symbols.words: {double!r} stands twice")
    ids = {word: i for i, word in enumerate(words)}
    specials = {name: ids[f"<{name}>"] for name in SPECIALS if f"<{name}>" in ids}
    return SymbolTokenizer("symbols", len(words), specials, {i: words[i] for i in specials.values()}, words, ids)


def train_bpe(documents, vocab_size: int):
    """Byte-level BPE over an iterable of texts: `vocab_size` ids, eight specials among them (added when loading)."""
    import tokenizers

    if vocab_size < 256 + len(SPECIALS):
        raise ValueError(f"tokenizer.bpe.vocab_size: {vocab_size}; at least {256 + len(SPECIALS)} (bytes and specials)")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS), initial_alphabet=list(_byte_alphabet()), show_progress=False
    )
    bpe.train_from_iterator(documents, trainer)
    return bpe


def tokenizer(config, workdir: str) -> str:
    """Job: train a BPE on the training split of config.data; write config.tokenizer.bpe.path or WORKDIR/tokenizer.json.

    The file appears whole or not at all. Returns its path.
    """
    from data import corpus

    spec = corpus.parse(config["data"])
    path = pathlib.Path(config["tokenizer"]["bpe"]["path"] or pathlib.Path(workdir) / "tokenizer.json")
    documents = [text for domain in spec.domains for text in corpus.documents(spec, domain, "train")]
    bpe = train_bpe(documents, config["tokenizer"]["bpe"]["vocab_size"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(bpe.to_str(), encoding="utf-8")
    os.replace(partial, path)
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in documents)
    loaded = bpe_tokenizer(str(path), 0)
    sample = documents[0][:100_000]
    ratio = len(sample.encode("utf-8", "surrogatepass")) / max(1, len(loaded.encode(sample)))
    print(f"tokenizer: {loaded.vocab_size} ids from {len(documents)} documents ({size:,} bytes), "
          f"{ratio:.2f} bytes a token on the first, written to {path}")  # fmt: skip
    return str(path)


def _byte_alphabet() -> str:
    """The printable character that byte-level BPE files write for each byte: itself where printable, else from U+0100
    on.
    """
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = {b: 256 + k for k, b in enumerate(b for b in range(256) if b not in kept)}
    return "".join(chr(moved.get(b, b)) for b in range(256))


KINDS = dict(bytes=bytes_tokenizer, bpe=bpe_tokenizer, symbols=symbols_tokenizer)
