"""The smallest recipe that tests share: configs/r1.py:smoke on a model of width 16."""
from tiny_model import edited

from configs import r1


def config(*stages, **edits):
    """The smoke recipe with these stages and edits."""
    c = r1.get_config("smoke")
    c.model.update(dict(d_model=16, n_layers=2, n_dense_layers=1, d_ff=24, mtp_depth=0, init_std=0.2))
    c.model.attention.mla.update(dict(
        n_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8))
    c.model.ffn.moe.d_expert = 12
    c.run.scan_unroll = 1
    c.mesh.fsdp = 1  # one of the 8 virtual devices
    c.checkpoint.update(dict(every=1, keep=0))
    for name in c.recipe.stages:
        c[name].edits = ()
        if c[name].job == "rl":
            c[name].beta = 0.0  # a reference is one more program to compile
    if stages:
        c.recipe.stages = stages
    return edited(c, edits)
