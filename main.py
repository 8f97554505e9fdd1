"""Config in, job out: python main.py [--config=configs/NAME.py[:ARG]] [--config.path.to.leaf=VALUE ...] [--workdir=DIR]."""
import importlib
import os
import sys
import traceback

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# a third off the time to the first step on a CPU, nothing lost at run time (LOG.md)
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

from absl import flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from model.errors import UserError, choice, require  # noqa: E402

DEFAULT_CONFIG = "configs/deepseek_v3.py:tiny"
# name -> 'module:function', imported when called: matplotlib, grain and orbax would eat the start
JOBS = {
    "pretrain": "train.pretrain:pretrain",
}


def run(argv: list[str]) -> int:
    """Runs one job from command-line arguments; returns the exit code. A user's mistake is one line on stderr, and 2."""
    show_traceback = "--traceback" in argv
    try:
        config, workdir = read_flags(argv)
        module, function = JOBS[choice(config.job, JOBS, "job")].split(":")
        getattr(importlib.import_module(module), function)(config, workdir)
    except UserError as error:
        if show_traceback:
            traceback.print_exc()
        else:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was saved stays, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def read_flags(argv: list[str]):
    """(config, workdir) of the arguments; whatever goes wrong here is the user's to mend: UserError."""
    values = flags.FlagValues()
    default = os.path.join(os.path.dirname(os.path.abspath(__file__)), DEFAULT_CONFIG)
    config = config_flags.DEFINE_config_file("config", default, "configs/NAME.py, with :ARG.", flag_values=values, lock_config=True)
    workdir = flags.DEFINE_string("workdir", "runs/latest", "Where the run is written.", flag_values=values)
    flags.DEFINE_bool("traceback", False, "Show where a user error was found.", flag_values=values)
    try:
        rest = values(argv)
        resolved = config.value
    except Exception as error:  # absl, ml_collections and the config file raise a dozen types
        raise UserError(f"flags: {error}") from error
    require(len(rest) == 1, "arguments", " ".join(rest[1:]), "flags only, such as --config=configs/deepseek_v3.py:tiny")
    refuse_unused_kinds(argv, resolved)
    return resolved, workdir.value


def refuse_unused_kinds(argv: list[str], config) -> None:
    """A leaf of a kind that is not chosen would be ignored in silence: refuse it."""
    for argument in argv[1:]:
        if not argument.startswith("--config."):
            continue
        node, seen = config, []
        for part in argument.removeprefix("--config.").split("=")[0].split("."):
            if not hasattr(node, "keys") or part not in node:
                break
            if "kind" in node and hasattr(node[part], "keys") and part != node.kind:
                path = ".".join(seen)
                raise UserError(f"{path}.{part}: found a leaf of a kind that is not chosen, allowed: leaves of {path}.kind={node.kind!r}")
            seen.append(part)
            node = node[part]


if __name__ == "__main__":
    sys.exit(run(sys.argv))
