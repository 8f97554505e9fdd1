"""Jobs import_hf and export_hf: a Hugging Face directory into a run's checkpoint, and a checkpoint into such a directory.

    python main.py --config.job=import_hf --config.import_hf.dir=DIR --workdir=RUN
    python main.py --config.job=export_hf --config.init_from.path=RUN --config.export_hf.dir=DIR
An import's config.model is what config.json says; a training job on the run goes on from it through init_from.path=RUN.
"""
from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import jax
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from model import hf, precision, sharding
from model.errors import UserError, choice, freeze, require
from train import checkpoint
from train.metrics import prepare_workdir

QUANTIZE = {"none": None, "fp8_block": "fp8_block"}


@dataclasses.dataclass(frozen=True)
class Import:
    """config.import_hf: dtype 'stored' keeps FP8 weights, which then run but do not train."""

    dir: str
    dtype: str

    def __post_init__(self):
        require(bool(self.dir), "dir", self.dir, "a directory with config.json and safetensors")
        choice(self.dtype, hf.DTYPES, "dtype")


@dataclasses.dataclass(frozen=True)
class Export:
    """config.export_hf: dtype is that of all that is not quantised; 'stored' as the checkpoint has it."""

    dir: str
    quantize: str
    dtype: str

    def __post_init__(self):
        require(bool(self.dir), "dir", self.dir, "a directory that is new or empty")
        choice(self.quantize, QUANTIZE, "quantize")
        choice(self.dtype, hf.DTYPES, "dtype")


def import_hf(config, workdir: str) -> None:
    """Writes checkpoints/0 of workdir from config.import_hf.dir."""
    settings = freeze(Import, config.import_hf, "import_hf")
    target = pathlib.Path(workdir) / "checkpoints"
    if checkpoint.steps(target):
        raise UserError(f"workdir: found checkpoints in {workdir!r}, allowed: a folder without a run")
    mesh = sharding.make_mesh(config.mesh)
    model = hf.read_config(settings.dir)
    with _bar(f"reading {settings.dir}") as progress:
        cfg, params, router_bias = hf.load(settings.dir, settings.dtype, mesh=mesh if mesh.size > 1 else None, progress=progress)
    config.model.update(model)
    prepare_workdir(workdir, config)
    path = checkpoint.save_params(target.absolute(), 0, config.model.to_dict(), params, router_bias)
    leaves = jax.tree.leaves(params, is_leaf=precision.is_weight)
    held = sorted({(leaf.low if precision.is_weight(leaf) else leaf).dtype.name for leaf in leaves})
    print(f"imported {cfg.num_params()['total']:,} parameters and {cfg.num_params()['mtp']:,} of MTP ({', '.join(held)}) into {path}")


def export_hf(config, workdir: str) -> None:
    """Writes config.export_hf.dir from the checkpoint at config.init_from.path, or from workdir's last."""
    settings = freeze(Export, config.export_hf, "export_hf")
    source = config.init_from.path or workdir
    cfg, params, router_bias = checkpoint.load_params(source, ema=config.init_from.ema)
    router_bias = jax.device_get(router_bias)
    if jax.process_index() == 0:  # which holds a copy of everything
        with _bar(f"writing {settings.dir}") as progress:
            hf.save(settings.dir, cfg, params, router_bias, QUANTIZE[settings.quantize], dtype=settings.dtype, progress=progress)
        print(f"exported {source} to {settings.dir}")


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes, and what updates it."""
    columns = (TextColumn("{task.description}"), BarColumn(24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
