"""The small models that tests share."""
import jax
import jax.numpy as jnp

from configs import deepseek_v3
from model import config as model_config
from model import transformer

# jitted, so that a test compiles one program instead of every operation
forward = jax.jit(transformer.apply, static_argnames=("cfg", "run"))


def tiny_config(**edits):
    """config.model of a V3 with every part, d_model 32, and these edits."""
    config = deepseek_v3.get_config("tiny").model
    config.update(dict(vocab_size=61, d_model=32, n_layers=3, n_dense_layers=1, d_ff=48, init_std=0.2, mtp_depth=1))
    config.attention.mla.update(dict(n_heads=2, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10))
    for kind in ("mha", "gqa", "mqa"):
        config.attention[kind].update(dict(n_heads=4, head_dim=8))
    config.attention.gqa.n_kv_heads = 2
    config.ffn.moe.update(dict(n_routed_experts=8, n_activated_experts=2, d_expert=20))
    return edited(config, edits)


def edited(config, edits: dict):
    """config with these leaves: 'path.to.leaf', dots written as double underscores."""
    for path, value in edits.items():
        *parents, leaf = path.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return config


def tiny(**edits):
    """The frozen ModelConfig of tiny_config."""
    return model_config.parse(tiny_config(**edits))


def init(cfg, seed=0, dtype=jnp.float32):
    """Random params of cfg in dtype, norms perturbed so that they matter."""
    params = jax.jit(lambda key: transformer.init(key, cfg))(jax.random.key(seed))

    def perturb(path, leaf):
        if path[-1].key.endswith("norm"):
            leaf = leaf + 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(seed), len(str(path))), leaf.shape, jnp.float32)
        return leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(perturb, params)


def random_tokens(cfg, shape, seed=1):
    """Tokens i32 of this shape."""
    return jax.random.randint(jax.random.key(seed), shape, 0, cfg.vocab_size, jnp.int32)
