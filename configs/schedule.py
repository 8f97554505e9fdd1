"""Pipeline schedules compared: V3 §3.2.1, table 2 and figure 5.

Stands for: the bubble formulas of table 2 and the picture of DualPipe with 8 ranks and 20 micro-batches.
Cost: about ten seconds on one CPU core.
Expect: 8 x 20, F = I = W = 1, F&B = 3: dualpipe makespan 66, idle 6 on every rank; 1f1b 81, 21; zb1p 67, 7. Exact.
Run: python main.py --config=configs/schedule.py [--config.schedule.kind=zb1p] [--config.schedule.times=measured.json]
     python main.py --config=configs/schedule.py --config.schedule.csv=mine.csv   (format: train/pipeline/grid.py)
Tiny: is tiny.
Differs from the paper: nothing; times are units here, measured.json brings yours (an object of the leaves t_*).
"""
import ml_collections
from ml_collections import config_dict


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    if arg:
        raise ValueError(f"configs/schedule.py: found argument {arg!r}, allowed: none")
    return ml_collections.ConfigDict(dict(
        job="schedule",
        seed=0,
        schedule=dict(
            kind="dualpipe",  # gpipe, 1f1b, interleaved, zb1p, dualpipe, dualpipev
            n_ranks=8,
            n_microbatches=20,
            n_chunks=2,  # of a rank, interleaved only
            csv="",  # a hand-written schedule instead of kind and sizes
            max_activations=config_dict.placeholder(int),  # bound on the chunks in flight of that schedule
            max_stash=config_dict.placeholder(int),  # bound on the weight parts put off on slots
            times="",  # a JSON object of the five t_ below, in place of them
            t_forward=1.0,  # of 1/n_ranks of the model; any unit
            t_backward_input=1.0,
            t_backward_weight=1.0,
            t_overlapped=3.0,  # a forward and a whole backward as one
            t_comm=0.0,  # a message
            map_ranks=(2, 4, 8, 16),  # of the picture of winners
            map_per_rank=(1, 2, 4, 8),  # micro-batches / ranks
            map_overlapped=(1.0, 0.8),  # t_overlapped / (F + B)
            map_comm=(0.0, 0.1, 0.3, 1.0),  # t_comm / F
        ),
    ))
