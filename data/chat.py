"""Conversations -> ids and which of them carry loss (V3's template: bos, system, User turn, Assistant turn, eos).

`<bos>{system}<User>{question}<Assistant>{answer}<eos>`, further turns appended; loss on each answer and its eos alone.
Reads JSONL in the usual shapes: {"messages": [{"role", "content"}, ...]}, {"prompt": str, "completion": str} (raw
text, no turn marks), or prompt and completion as lists of messages.
"""
import json
import pathlib

import numpy as np

ROLES = ("system", "user", "assistant")
SHAPES = '{"messages": [{"role", "content"}, ...]} or {"prompt", "completion"}'


def encode(example: dict, tokenizer) -> dict[str, np.ndarray]:
    """One row of `read` -> dict(tokens int32[n], weight float32[n]), the weight 1 where the answer is predicted, else
    0.
    """
    if "messages" in example:
        ids, mask = render(example["messages"], tokenizer)
    else:
        prompt = [tokenizer.bos, *tokenizer.encode(example["prompt"])]
        answer = [*tokenizer.encode(example["completion"]), tokenizer.eos]
        ids, mask = prompt + answer, [0] * len(prompt) + [1] * len(answer)
    return dict(tokens=np.asarray(ids, np.int32), weight=np.asarray(mask, np.float32))


def render(messages: list[dict], tokenizer, *, answer_next: bool = False) -> tuple[list[int], list[int]]:
    """(ids, mask): mask is 1 on the tokens of assistant turns and the eos after each.

    answer_next ends with the assistant's mark, for the sampler to go on from. ValueError for messages out of order.
    """
    if complaint := _messages_complaint(messages, answered=not answer_next):
        raise ValueError(f"messages: {complaint}")
    ids, mask = [tokenizer.bos], [0]
    for message in messages:
        role, text = message["role"], tokenizer.encode(message["content"])
        mark = [] if role == "system" else [tokenizer.special(role)]
        end = [tokenizer.eos] if role == "assistant" else []
        ids += mark + text + end
        mask += [0] * len(mark) + [int(role == "assistant")] * (len(text) + len(end))
    if answer_next:
        ids, mask = [*ids, tokenizer.special("assistant")], [*mask, 0]
    return ids, mask


def read(path: str, on_bad: str = "refuse", say=print) -> list[dict]:
    """The examples of a .jsonl file, each dict(messages) or dict(prompt, completion).

    A bad line is one complaint, 'file:line: what was found': on_bad='refuse' raises ValueError with the first and the
    number of others, 'skip' says each and leaves the line out.
    """
    if on_bad not in ("refuse", "skip"):
        raise ValueError(f"on_bad: {on_bad!r}; allowed: refuse, skip")
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({e.__class__.__name__}); give a .jsonl file") from None
    examples, complaints = [], []
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        example, complaint = _parse(line)
        if complaint:
            complaints.append(f"{path}:{n}: {complaint}")
        else:
            examples.append(example)
    if complaints and on_bad == "refuse":
        more = f" (and {len(complaints) - 1} more bad lines)" if len(complaints) > 1 else ""
        raise ValueError(complaints[0] + more)
    for complaint in complaints:
        say(complaint)
    if not examples:
        raise ValueError(f"{path}: no example; every line is {SHAPES}")
    return examples


def _parse(line: str) -> tuple[dict | None, str | None]:
    """(example, None) or (None, what is wrong)."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        return None, f"not JSON ({e.msg} at column {e.colno})"
    except RecursionError:
        return None, "JSON nested too deep"
    if not isinstance(row, dict):
        return None, f"found a {type(row).__name__}; allowed: {SHAPES}"
    prompt, answer = row.get("prompt"), row.get("completion")
    if "messages" in row:
        messages = row["messages"]
    elif isinstance(prompt, list) and isinstance(answer, list):
        messages = prompt + answer
    elif "prompt" in row and "completion" in row:
        for name, value in (("prompt", prompt), ("completion", answer)):
            if not isinstance(value, str):
                return None, f"{name!r} is a {type(value).__name__}; both are strings, or both lists of messages"
        return (dict(prompt=prompt, completion=answer), None) if answer else (None, "'completion' is empty")
    else:
        return None, f"found keys {', '.join(map(repr, row)) or 'none'}; allowed: {SHAPES}"
    complaint = _messages_complaint(messages, answered=True)
    return (None, complaint) if complaint else (dict(messages=messages), None)


def _messages_complaint(messages, *, answered: bool) -> str | None:
    """What is wrong with a conversation: system first if at all, then user and assistant in turn, the last one's turn
    done.
    """
    if not isinstance(messages, list) or not messages:
        return f"'messages' is {messages!r:.40}; a list of at least one message"
    expected = "user"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            return f"message {i} is {message!r:.60}; allowed: a 'role' and a string 'content'"
        role = message["role"]
        if role not in ROLES:
            return f"message {i} has role {role!r}; allowed: {', '.join(ROLES)}"
        if role == "system" and i == 0:
            continue
        if role != expected:
            return f"message {i} has role {role!r} where {expected!r} should speak"
        if role == "assistant" and not message["content"]:
            return f"message {i} is an empty answer"
        expected = "user" if role == "assistant" else "assistant"
    if (expected == "user") != answered:
        wanted = "assistant" if answered else "user"
        return f"the last message is of {messages[-1]['role']!r}; it should be of {wanted!r}"
    return None
