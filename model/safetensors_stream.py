"""Safetensors by pieces: a directory's tensors as names and places in files, read and written a few rows at a time.

A file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, data_offsets), and the bytes. Nothing here maps
or holds a whole tensor, so that a 671B checkpoint passes through the memory of a small host. Every fault of a file is one UserError
that names the tensor or the file.
"""
from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from model.errors import UserError

DTYPES = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PIECE_BYTES = 16 << 20


class Tensor(NamedTuple):
    """Where a tensor lies: its name, file, type, shape and first byte."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Output(NamedTuple):
    """A tensor to be written: pieces() yields its rows in order, arrays of dtype."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def scan(directory: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the files that model.safetensors.index.json names. Reads headers only."""
    directory = Path(directory)
    if (directory / SINGLE).exists():
        return _header(directory / SINGLE)
    index = directory / INDEX
    if not index.exists():
        raise UserError(f"{directory}: found neither {SINGLE} nor {INDEX}, allowed: a directory with one of them")
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index}: found no JSON object with a weight_map, allowed: tensor name -> file name") from None
    found: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not (directory / file).exists():
            name = next(n for n, f in places.items() if f == file)
            raise UserError(f"{name}: its file {file} is missing from {directory}")
        for name, tensor in _header(directory / file).items():
            if places.get(name) != file:
                raise UserError(f"{name}: found in {file}, where {INDEX} does not place it")
            found[name] = tensor
    absent = [name for name in places if name not in found]
    if absent:
        raise UserError(f"{absent[0]}: missing from {places[absent[0]]}, where {INDEX} places it")
    return found


def _header(file: Path) -> dict[str, Tensor]:
    size = file.stat().st_size
    with open(file, "rb") as f:
        head = f.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > size - 8:
            raise UserError(f"{file}: corrupt header, found a file of {size} bytes, allowed: at least 8 + the {length} it announces")
        try:
            entries = json.loads(f.read(length))
            entries.pop("__metadata__", None)
            plain = {name: (e["dtype"], tuple(int(n) for n in e["shape"]), *map(int, e["data_offsets"]))
                     for name, e in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file}: corrupt header, found no JSON table of dtype, shape and data_offsets") from None
    tensors = {}
    for name, (dtype, shape, begin, end) in plain.items():
        if dtype not in DTYPES:
            raise UserError(f"{name}: found dtype {dtype} in {file.name}, allowed: {', '.join(DTYPES)}")
        tensor = tensors[name] = Tensor(name, file, DTYPES[dtype], shape, 8 + length + begin)
        if min(shape, default=0) < 0 or begin < 0 or end - begin != tensor.nbytes:
            raise UserError(f"{name}: corrupt header in {file.name}, found {end - begin} bytes for {dtype} {list(shape)}")
        if 8 + length + end > size:
            raise UserError(f"{name}: {file.name} is truncated, found {size} bytes, allowed: at least {8 + length + end}")
    return tensors


def rows(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    """Rows start..stop of a tensor, read into a fresh array."""
    out = np.empty((stop - start, *tensor.shape[1:]), tensor.dtype)
    step = out[:1].nbytes if len(out) else 0
    with open(tensor.file, "rb", buffering=0) as f:
        f.seek(tensor.start + start * step)
        view = memoryview(out.reshape(-1).view(np.uint8))
        while view:
            n = f.readinto(view)
            if not n:
                raise UserError(f"{tensor.name}: {tensor.file.name} ended {len(view)} bytes early")
            view = view[n:]
    return out


def ranges(shape: tuple[int, ...], itemsize: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges that cover a tensor in pieces of about PIECE_BYTES, each starting at a multiple of `multiple`."""
    row = max(1, math.prod(shape[1:]) * itemsize)
    step = max(multiple, PIECE_BYTES // row // multiple * multiple)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same type, compared piece by piece."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(rows(a, *part).tobytes() == rows(b, *part).tobytes() for part in ranges(a.shape, a.dtype.itemsize))


def write(directory: str | os.PathLike, outputs: list[Output], extra: dict[str, Any], *, shard_bytes: int,
          on_tensor: Callable[[Output], None] = lambda output: None) -> None:
    """Writes a directory whole or not at all: the tensors in files of at most shard_bytes with their index, and `extra` JSON files.

    Everything goes to a hidden directory beside the target, renamed at the end. Raises UserError if the target is not empty.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: found something there already, allowed: a new or empty directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from None
    try:
        for name, content in extra.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        files = _split(outputs, shard_bytes)
        names = [SINGLE] if len(files) == 1 else [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        for name, content in zip(names, files, strict=True):
            _write_file(partial / name, content, on_tensor)
        if len(files) > 1:
            places = {output.name: name for name, content in zip(names, files, strict=True) for output in content}
            total = sum(output.nbytes for output in outputs)
            (partial / INDEX).write_text(json.dumps(dict(metadata=dict(total_size=total), weight_map=places), indent=2) + "\n")
        partial.chmod(0o755)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _split(outputs: list[Output], shard_bytes: int) -> list[list[Output]]:
    files, held = [[]], 0
    for output in outputs:
        if files[-1] and held + output.nbytes > shard_bytes:
            files, held = [*files, []], 0
        files[-1].append(output)
        held += output.nbytes
    return files


def _write_file(file: Path, outputs: list[Output], on_tensor) -> None:
    outputs = sorted(outputs, key=lambda output: -output.dtype.itemsize)  # each tensor aligned to its type, as readers expect
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for output in outputs:
        header[output.name] = dict(dtype=NAMES[output.dtype], shape=list(output.shape), data_offsets=[place, place + output.nbytes])
        place += output.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for output in outputs:
            for piece in output.pieces():
                f.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
            on_tensor(output)
        f.flush()
        os.fsync(f.fileno())
        if f.tell() != 8 + len(text) + place:
            raise RuntimeError(f"{file}: wrote {f.tell()} bytes of {8 + len(text) + place}")
