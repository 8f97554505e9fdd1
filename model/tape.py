"""What one layer leaves behind besides its output: the tape of its matmuls, and probes.

A Tape is the pytree a pipeline hands to `transformer.stage`, stacked over the layers of the stage: `zeros` are added to a matmul's
output by site (their gradient is dy), `outputs` are replayed instead of computed, `experts` are expert choices to route by. A
LayerTape is one layer's slice of it with a notebook: `linear` and `grouped_linear` write a Record a site, the block writes probes.
"""
from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any, NamedTuple

import jax


class Tape(NamedTuple):
    """By site, stacked over layers: zeros and outputs [L, ...]; experts i32 [L, B, T, K] or None."""

    zeros: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    experts: Any = None


class Record(NamedTuple):
    """One matmul: its input (quantised under fp8), its output before any zeros, and group_sizes for experts."""

    input: Any
    output: Any
    group_sizes: Any = None


@dataclasses.dataclass
class LayerTape:
    """The notebook of one layer while it is traced; `wanted` are probe patterns 'component/LAYER/tensor'."""

    tape: Tape | None = None
    wanted: tuple[str, ...] = ()
    records: dict[str, Record] = dataclasses.field(default_factory=dict)
    probes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def probe(self, component: str, tensor: str, value: Any) -> Any:
        """Keeps value if a pattern asks for this tensor in some layer; returns it."""
        for pattern in self.wanted:
            parts = pattern.split("/")
            if len(parts) == 3 and fnmatch.fnmatch(component, parts[0]) and fnmatch.fnmatch(tensor, parts[2]):
                self.probes[f"{component}/{tensor}"] = value
        return value


def write(tape: LayerTape | None, site: str, x, compute, group_sizes=None):
    """Runs one matmul through the tape: compute(stored output or None), recorded, with the site's zeros added."""
    if tape is None or tape.tape is None:
        return compute(None)
    y = compute(stored(tape, site))
    tape.records[site] = Record(x, y, group_sizes)
    return y + tape.tape.zeros[site] if site in tape.tape.zeros else y


def stored(tape: LayerTape | None, site: str):
    """The output to replay at this site, or None."""
    return None if tape is None or tape.tape is None else tape.tape.outputs.get(site)


def layer_slice(tape: Tape | None, start: int, stop: int) -> Tape | None:
    """Rows start..stop of a stacked tape."""
    return None if tape is None else jax.tree.map(lambda leaf: leaf[start:stop], tape)


def select_probes(probes: dict[str, Any], first_layer: int, patterns: tuple[str, ...]) -> dict[str, Any]:
    """{'mla/3/c_kv': array}: of the stacked probes [L, ...], the layers whose full name matches a pattern."""
    chosen = {}
    for name, stacked in probes.items():
        component, tensor = name.split("/")
        for i in range(stacked.shape[0]):
            full = f"{component}/{first_layer + i}/{tensor}"
            if any(fnmatch.fnmatch(full, pattern) for pattern in patterns):
                chosen[full] = stacked[i]
    return chosen
