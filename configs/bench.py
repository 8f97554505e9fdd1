"""Kernels by themselves: every op of `pallas_kernels` at DeepSeek-V3's shapes (job `bench`).

run: python main.py --config=configs/bench.py [--config.bench.deepgemm=CHECKOUT]
  on one Hopper GPU, 2 to 3 minutes; prints a line an op, writes bench.jsonl and roofline.png into the workdir.
tiny: python main.py --config=configs/bench.py:tiny
  the same lines for the reference on a CPU, in seconds; says nothing about speed.
expect: docs/kernels.md has the tables, with the card.
"""
from ml_collections import ConfigDict

# (N, K): q_down + kv_down, q_up, kv_up, attention output, gate + up and down of an expert
V3 = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
EXPERT = ((4096, 7168), (7168, 2048))


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "tiny"):
        raise ValueError(f"configs/bench.py:{arg}: must be '' or 'tiny'")
    shapes = dict(
        dense=tuple((m, *nk) for m in (4096, 128, 64) for nk in V3),
        dense_gradient=tuple((4096, *nk) for nk in V3),
        grouped=tuple((*groups, *nk) for groups in ((4, 8192), (8, 4096), (32, 256)) for nk in EXPERT),
        grouped_swiglu=((32, 2048, 512, 1024), (8, 4096, 2048, 7168)),
        masked=tuple((*groups, *nk) for groups in ((4, 256), (8, 64)) for nk in EXPERT),
        grouped_gradient=tuple((*groups, *nk) for groups in ((4, 8192), (8, 4096)) for nk in EXPERT),
        quantisation=((16384, 7168), (16384, 4096)),
        rows=((16384, 1024, 4, 32), (8192, 7168, 8, 32)),
        norm=((16384, 1024), (32768, 7168)),
        latent_norm=((16384, 512, 256, 32), (16384, 1536, 512, 64)),
        cross_entropy=((16384, 32768), (4096, 129280)),
        gate=((16384, 32, 4, 2, 4), (16384, 256, 8, 4, 8)),
    )
    if arg == "tiny":
        shapes = dict(dense=((128, 256, 128),), dense_gradient=((128, 256, 128),), grouped=((2, 128, 128, 256),),
                      grouped_swiglu=((2, 128, 64, 256),),
                      masked=((2, 64, 128, 256),), grouped_gradient=((2, 128, 128, 256),), quantisation=((128, 256),),
                      rows=((64, 128, 2, 4),), norm=((64, 128),), latent_norm=((64, 32, 16, 8),), cross_entropy=((64, 512),),
                      gate=((64, 8, 4, 2, 2),))
    return ConfigDict(dict(
        job="bench",
        seed=0,
        bench=dict(
            ops=tuple(shapes),  # which, in this order
            shapes=shapes,
            repeats=1 if arg == "tiny" else 5,  # medians over so many turns
            deepgemm="",  # a checkout of DeepGEMM to race against
        ),
    ))
