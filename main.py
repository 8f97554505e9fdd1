"""Config in, job out: python main.py [--config=configs/NAME.py[:ARG]] [--config.path.to.leaf=VALUE ...] [--workdir=DIR]

Flags: --workdir (where the run is written), --traceback (show where a user error was found), --help.
Several processes (srun, mpirun, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID): the same command on each.
Exit codes: 0 done, 1 a bug of ours or a loss that is not finite, 2 a mistake in a flag, config or file (one line on stderr).
"""
import difflib
import functools
import importlib.util
import os
import re
import sys
import traceback

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# compiles sooner on a CPU; kernels on a GPU keep the full level
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
# compiled programs outlive the process: a second start does not compile again
_CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "deepseek-jax")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

from absl import flags  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

from model.errors import UserError, choice, require  # noqa: E402
from train import cluster  # noqa: E402

ROOT = os.path.dirname(os.path.abspath(__file__))
DEFAULT_CONFIG = "configs/r1.py:tiny"  # the whole recipe
# name -> 'module:function', imported when called: matplotlib, grain and orbax would eat the start
JOBS = {
    "r1": "train.recipe:r1",
    "pretrain": "train.pretrain:pretrain",
    "gate": "train.gate:gate",
    "sft": "train.sft:sft",
    "rl": "train.rl_loop:rl_job",
    "rejection": "train.rejection:rejection",
    "eval": "train.eval_job:evaluate",
    "speed": "train.speed:speed",
    "scaling": "train.scaling:scaling",
    "plan": "train.plan:plan",
    "probe": "train.probe:probe",
    "schedule": "train.pipeline.job:schedule",
    "import_hf": "train.convert:import_hf",
    "export_hf": "train.convert:export_hf",
    "sample": "train.sample:sample",
    "chat": "train.sample:chat",
    "report": "train.report:report",
    "ablate": "train.ablate:ablate",
    "tokenizer": "data.tokenizer:tokenizer",
    "bench": "pallas_kernels.bench:bench",
}

SEVERAL = ("pretrain", "sft", "eval", "import_hf", "export_hf")  # jobs that several processes can share


def run(argv: list[str]) -> int:
    """Runs one job from command-line arguments; returns the exit code. A user's mistake is one line on stderr, and 2."""
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}Jobs: {', '.join(JOBS)}\nConfigs: {', '.join(_configs())} (each says its cost and its command)")
        return 0
    try:
        config, workdir = read_flags(argv)
        module, function = JOBS[choice(config.job, JOBS, "job")].split(":")
        if cluster.start():
            choice(config.job, SEVERAL, "job under several processes")
        getattr(importlib.import_module(module), function)(config, workdir)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was saved stays, the same command goes on from there", file=sys.stderr)
        return 130
    except RuntimeError as error:
        cluster.give_up(error)
    except (UserError, AttributeError, KeyError) as error:
        if not isinstance(error, UserError):
            error = _missing_leaf(error)
        if "--traceback" in argv:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def read_flags(argv: list[str]) -> tuple[ConfigDict, str]:
    """(config, workdir) of the arguments; whatever goes wrong here is the user's to mend: UserError."""
    argv = [f"-{a}" if a.startswith("-config") else a for a in argv]
    given = [a.removeprefix("--config=") for a in argv if a.startswith("--config=")]
    config = load_config(given[-1] if given else os.path.join(ROOT, DEFAULT_CONFIG))
    check_overrides(argv, config)
    values = flags.FlagValues()
    argv = [a for a in argv if not a.startswith("--config=")]
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    workdir = flags.DEFINE_string("workdir", "runs/latest", "Where the run is written.", flag_values=values)
    flags.DEFINE_bool("traceback", False, "Show where a user error was found.", flag_values=values)
    try:
        rest, config = values(argv), holder.value
    except Exception as error:  # absl and ml_collections raise half a dozen types
        bad = re.match(r"flag --(config\.[\w.]+)=(.*?): ", str(error))
        if bad:
            kind = type(functools.reduce(ConfigDict.__getitem__, bad[1].split(".")[1:], config)).__name__
            raise UserError(f"{bad[1]}: found {bad[2]!r}, allowed: {kind}") from error
        raise UserError(f"flags: {error}, allowed: --config, --config.LEAF, --workdir, --traceback, --help") from error
    require(len(rest) == 1, "arguments", " ".join(rest[1:]), "flags only, such as --config=configs/deepseek_v3.py:tiny")
    refuse_unused_kinds(argv, config)
    return config, workdir.value


def load_config(given: str) -> ConfigDict:
    """The locked config of 'configs/NAME.py' or 'configs/NAME.py:ARG'. Raises UserError."""
    path, colon, arg = given.partition(":")
    if not (path.endswith(".py") and os.path.isfile(path)):
        raise UserError(f"config: found no file {path!r}, allowed: a Python file, such as {', '.join(_configs())}")
    spec = importlib.util.spec_from_file_location("config_file", path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(arg) if colon else module.get_config()
    except Exception as error:  # whatever the file does
        raise UserError(f"config: {path} raised {type(error).__name__}: {error}") from error
    require(isinstance(config, ConfigDict) and "job" in config, f"config: {path}", type(config).__name__,
            "a file whose get_config returns a ConfigDict with a leaf `job`")
    return config.lock()


def check_overrides(argv: list[str], config: ConfigDict) -> None:
    """Every --config.PATH must name a leaf of the config."""
    for name in [a.removeprefix("--").split("=")[0] for a in argv if a.startswith("--config.")]:
        node = config
        for part in name.split(".")[1:]:
            node = node[part] if isinstance(node, ConfigDict) and part in node else leaves
        known = [f"config.{path}" for path in leaves(config)]
        if node is leaves:
            last = [k for k in known if k.split(".")[-1] == name.split(".")[-1]]  # the right name in another place
            raise UserError(f"{name}: unknown leaf, allowed: {', '.join((last or difflib.get_close_matches(name, known, 3, 0))[:3])}, ...")
        if isinstance(node, ConfigDict):
            inside = [k for k in known if k.startswith(f"{name}.")]
            raise UserError(f"{name}: found a subtree, allowed: its leaves one by one, such as {', '.join(inside[:3])}")


def refuse_unused_kinds(argv: list[str], config: ConfigDict) -> None:
    """A leaf of a kind that is not chosen would be ignored in silence: refuse it."""
    for name in [a.removeprefix("--").split("=")[0] for a in argv if a.startswith("--config.")]:
        node, path = config, "config"
        for part in name.split(".")[1:]:
            # a subtree with a kind of its own (optimizer.ema) is a component beside the kinds, not one of them
            if "kind" in node and isinstance(node[part], ConfigDict) and part != node.kind and "kind" not in node[part]:
                raise UserError(f"{path}.{part}: found a leaf of a kind that is not chosen, allowed: leaves of {path}.kind={node.kind!r}")
            node, path = node[part], f"{path}.{part}"


def leaves(config: ConfigDict, prefix: str = "") -> list[str]:
    """The dotted path of every leaf."""
    nested = [leaves(v, f"{prefix}{k}.") if isinstance(v, ConfigDict) else [f"{prefix}{k}"] for k, v in config.items()]
    return [path for paths in nested for path in paths]


def _missing_leaf(error: Exception) -> UserError:
    """The error of a config file that lacks a leaf; any other AttributeError or KeyError is a bug, and goes on."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    if not frame.tb_frame.f_globals["__name__"].startswith("ml_collections"):
        raise error
    name = str(error).split("\\n")[0].strip("'\"\\ ")
    return UserError(f"config: no leaf {name!r}, allowed: a config with every leaf of its job, such as {DEFAULT_CONFIG}")


def _configs() -> list[str]:
    return sorted(f"configs/{name}" for name in os.listdir(os.path.join(ROOT, "configs")) if name.endswith(".py") and name[0] != "_")


if __name__ == "__main__":
    sys.exit(cluster.leave(run(sys.argv)))
