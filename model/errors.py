"""Bad input: one line that names the leaf, what was found and what is allowed; and the checks that raise it."""
from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """A mistake in a config, flag or file: main.py prints it as one line and exits 2."""


def require(ok: bool, name: str, found: Any, allowed: str) -> None:
    """Raises UserError unless ok."""
    if not ok:
        raise UserError(f"{name}: found {found!r}, allowed: {allowed}")


def choice(value: Any, allowed: Iterable[str], name: str) -> str:
    """value, if it is one of allowed."""
    allowed = tuple(allowed)
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"{name}: found {value!r}, allowed: {', '.join(allowed)}{hint}")
    return value


def leaf(config: Mapping, key: str, kind: type, path: str) -> Any:
    """config[key] as kind: an int serves as a float, a bool never as a number, a float must be finite."""
    name = f"{path}.{key}"
    if key not in config:
        raise UserError(f"{name}: missing, allowed: {kind.__name__}")
    value = config[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name}: found {value!r} ({type(value).__name__}), allowed: {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name}: found {value!r}, allowed: a finite number")
    return value


def sequence(config: Mapping, key: str, path: str) -> tuple:
    """config[key] as a tuple: a list (JSON's tuple) or a tuple, never the letters of a string."""
    value = config.get(key)
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{path}.{key}: found {value!r}, allowed: a tuple")
    return tuple(value)


def pattern(value: Any, name: str) -> str:
    """value, if it is a regular expression."""
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise UserError(f"{name}: found {value!r} ({error}), allowed: a regular expression") from None
    return value


def freeze(cls: type, config: Mapping, path: str, **given: Any) -> Any:
    """A frozen dataclass from a subtree of plain leaves; a leaf of another name is an error; `given` fields are taken as they are."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name not in given}
    for name in config:
        if name not in fields and name not in given:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(f"{path}.{name}: unknown leaf, allowed: {', '.join(fields)}{hint}")
    values = {}
    for name, hint in fields.items():
        if hint is tuple or typing.get_origin(hint) is tuple:
            values[name] = sequence(config, name, path)
        elif isinstance(hint, types.UnionType) and config.get(name) is None:
            values[name] = None
        else:
            plain = typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
            values[name] = leaf(config, name, plain, path)
    try:
        return cls(**values, **given)
    except UserError as error:
        raise UserError(f"{path}.{error}") from None


def freeze_kind(kinds: Mapping[str, Any], config: Mapping, path: str) -> Any:
    """The chosen kind of a component, frozen: kinds maps a name to a dataclass or to a function (subtree, path) -> object."""
    kind = choice(config["kind"], kinds, f"{path}.kind")
    cls = kinds[kind]
    return freeze(cls, config[kind], f"{path}.{kind}") if dataclasses.is_dataclass(cls) else cls(config[kind], f"{path}.{kind}")


@contextlib.contextmanager
def user_input(name: str):
    """Turns what a file or a subtree of config raises while it is read (ValueError, OSError, KeyError) into one UserError line."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{name}: {error.filename or ''} {error.strerror or error}") from error
    except (ValueError, KeyError) as error:
        text = str(error)
        raise UserError(text if text.startswith(name) else f"{name}: {text}") from error


@contextlib.contextmanager
def named_input(*names: str):
    """Turns OSError, and a ValueError whose text begins with one of `names` (data/ raises such), into UserError; any other is a bug
    of ours and keeps its traceback."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{names[0]}: {error.filename or ''} {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, UserError) or not re.match(rf"({'|'.join(names)})\b", str(error)):
            raise
        raise UserError(str(error)) from error
