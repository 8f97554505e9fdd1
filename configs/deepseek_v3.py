"""DeepSeek-V3 and its kin (V3 §4.2, Table of hyperparameters; V2 §3.1.2, App. B; Moonlight's released config).

Stands for: the model presets 671b, v2, v2_lite, moonlight, 700m, v3_layer, and `tiny`, which trains on the running Python's own
library and documentation. Cost: tiny about 2 minutes on two CPU cores; 671b was never run here (`plan` says what it would need).
Run: python main.py --config=configs/deepseek_v3.py:tiny
Expect (tiny): held-out bits per byte below a byte bigram model fitted on the same split, printed beside it; figures in LOG.md.
Differs from the paper: 671b's data are not public, so its `data` is the same Python corpus; YaRN is off until the context is
extended (--config.model.rope.scaling.kind=yarn --config.data.seq_len=32768).
"""
from ml_collections import ConfigDict


def get_config(arg: str = "tiny") -> ConfigDict:
    """The pretraining config of a preset: 671b, v2, v2_lite, moonlight, 700m, v3_layer, tiny."""
    arg = arg or "tiny"
    if arg not in PRESETS:
        raise ValueError(f"configs/deepseek_v3.py: found {arg!r}, allowed: {', '.join(PRESETS)}")
    config = base()
    PRESETS[arg](config)
    return config


def base() -> ConfigDict:
    """Every leaf of a pretraining run, at V3's values."""
    return ConfigDict(dict(
        job="pretrain",
        seed=0,
        model=model(),
        run=run(),
        mesh=dict(pipe=1, node=1, expert=1, fsdp=-1, tensor=1),
        data=data(),
        tokenizer=dict(kind="bytes", bytes=dict(), bpe=dict(path="runs/tokenizer.json", vocab_size=32768), symbols=dict(words=())),
        optimizer=optimizer(),
        pretrain=pretrain(),
        eval=dict(path="", ema=False, max_bytes=1_000_000, batch_size=16, seq_len=512),  # path: a run, '' is --workdir
        init_from=dict(path="", include=".*", exclude="", rename=(), ema=False),
        checkpoint=dict(every=0, keep=2),
        stop_after_s=0.0,
        resume="same",  # allow_diff: go on although the config changed; the difference is printed either way
        report=dict(runs=()),
        sample=dict(prompt="def ", n=1, max_new=200, temperature=0.8, top_p=1.0, checkpoints=(),
                    template=dict(kind="raw", raw=dict(), chat=dict()), draft=dict(kind="none", none=dict(), mtp=dict())),
        import_hf=dict(dir="", dtype="float32"),
        export_hf=dict(dir="", quantize="none", dtype="bfloat16"),
        probe=dict(against="bf16", batch_size=4, seq_len=1024, threshold=0.1, history=8),  # against: run.precision.kind
        speed=dict(batch_size=8, seq_len=2048, repeats=10, gen_batch=32, gen_prompt=64, gen_new=128, peak_tflops=989.5, parts=0, trace=0),
        plan=dict(n_devices=2048, rows=1, seq_len=4096, memory_gib=80.0,
                  program=dict(kind="none", none=dict(), here=dict(steps=2), mock=dict(steps=2))),
        scaling=dict(parts=("equality", "throughput", "exchange"), meshes=("fsdp=-1", "expert=-1", "tensor=-1"), trace=3,
                     equality=dict(precisions=("fp32", "bf16"), n_layers=2, batch_size=8, seq_len=256),
                     exchange=dict(rows=(1024, 8192), widths=(1024, 7168), repeats=20)),
    ))


def model() -> dict:
    """V3-671B: every leaf of config.model."""
    mla = dict(n_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    return dict(
        vocab_size=129280, d_model=7168, n_layers=61, n_dense_layers=3, d_ff=18432, norm_eps=1e-6, init_std=0.006, mtp_depth=1,
        attention=dict(
            kind="mla",
            mla=mla,
            gated=mla,  # one subtree under two names: a preset sizes both
            mha=dict(n_heads=128, head_dim=128),
            gqa=dict(n_heads=128, n_kv_heads=8, head_dim=128),
            mqa=dict(n_heads=128, head_dim=128)),
        rope=dict(
            theta=10000.0,
            scaling=dict(kind="none", none=dict(), yarn=dict(
                factor=40.0, original_max_position=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0))),
        ffn=dict(kind="moe", dense=dict(), moe=dict(
            n_routed_experts=256, n_shared_experts=1, n_activated_experts=8, d_expert=2048, route_scale=2.5,
            gate=dict(kind="sigmoid", sigmoid=dict(weights="normalised"), softmax=dict(weights="raw")),
            groups=dict(kind="limited", limited=dict(n_expert_groups=8, n_limited_groups=4, score="top2_sum"), none=dict()),
            balance=dict(kind="bias", bias=dict(alpha=1e-4), aux_loss=dict(alpha=1e-3), batch_aux=dict(alpha=1e-3), none=dict()))))


def run() -> dict:
    """Every leaf of config.run: how a model runs, on the CPU."""
    return dict(
        precision=dict(kind="fp32", fp8_delayed=dict(history=1024, margin=0)),
        remat=dict(kind="none", names=dict(save=("c_kv",))),
        attention=dict(kind="auto"),
        experts=dict(kind="auto"),
        exchange=dict(kind="auto"),
        scan_unroll=1,
        absorbed_max=4,
        probes=())


def optimizer() -> dict:
    """AdamW of V3 §4.2 with bf16 moments (§3.3.2); every leaf of config.optimizer."""
    adamw = dict(b1=0.9, b2=0.95, eps=1e-8, moment_dtype="bfloat16")
    return dict(kind="adamw", adamw=adamw, muon=dict(momentum=0.95, rms=0.2, adamw=adamw), weight_decay=0.1, clip=1.0, rules=(),
                sharding=dict(kind="fsdp", fsdp=dict(), zero1=dict()),  # of masters and moments over the data axes
                ema=dict(kind="none", none=dict(), host=dict(decay=0.999)))


def pretrain() -> dict:
    """V3 §4.2: 14.8T tokens in rows of 4,096, the batch growing from 3,072 to 15,360 rows over the first 469B."""
    return dict(
        steps=242_784, batch_size=15_360, n_micro=120, seq_len=4096,  # 14.79998T tokens; the ramp moves by a micro-batch, 128 rows
        lr=dict(kind="v3",
                constant=dict(peak=2.2e-4, warmup_steps=2000),
                cosine=dict(peak=2.2e-4, final=2.2e-5, warmup_steps=2000),
                linear=dict(peak=2.2e-4, final=2.2e-5, warmup_steps=2000, constant_until=0.65),
                multi_step=dict(peak=2.4e-4, factor=0.316, warmup_steps=2000, first=0.6, second=0.9),
                v3=dict(peak=2.2e-4, final=2.2e-5, tail=7.3e-6, warmup_steps=2000,
                        constant_until=10 / 14.8, cosine_until=14.3 / 14.8, final_until=14.633 / 14.8)),
        ramp=dict(kind="linear", none=dict(), linear=dict(start=3072, until=0.469 / 14.8)),
        mtp_weight=dict(first=0.3, then=0.1, until=10 / 14.8),
        bias_rate=dict(first=1e-3, then=0.0, until=14.3 / 14.8),
        eval=dict(every=1000, max_bytes=1_000_000, batch_size=16),
        sample=dict(prompts=(("code", "def "), ("prose", "Return ")), max_new=64, temperature=0.8, top_p=0.95))


def data() -> dict:
    """The running Python's own library and documentation; every leaf of config.data (data/corpus.py)."""
    return dict(
        weights=dict(code=0.7, prose=0.3, text=0.0, tasks=0.0), max_bytes=16_000_000, validation_every=20,
        text=dict(files=()), fim=dict(rate=0.1), packing=dict(kind="concat", concat=dict(), isolate=dict(long="split")), threads=1,
        tasks=dict(digits=6, base=5, modulus=7, families=dict(sum=1.0, mod=1.0, swap=1.0, walk=0.0, relay=0.0, countdown=0.0),
                   lengths=(30.0, 20.0, 14.0, 12.0, 12.0, 12.0), worked=0.2, tagged=0.6, trace=dict(same=0.75, other=0.05, mixed=0.2),
                   prompt_weight=0.05, held_out=16))


def _671b(config):
    config.run.precision.kind = "bf16"
    config.run.remat.kind = "full"


def _v2(config):
    """V2-236B (V2 §3.1.2): softmax gate, no renormalisation, best 3 of 8 groups by their best expert."""
    _671b(config)
    m = config.model
    m.update(dict(vocab_size=102400, d_model=5120, n_layers=60, n_dense_layers=1, d_ff=12288, mtp_depth=0))
    m.ffn.moe.update(dict(n_routed_experts=160, n_shared_experts=2, n_activated_experts=6, d_expert=1536, route_scale=16.0))
    m.ffn.moe.gate.kind = "softmax"
    m.ffn.moe.groups.limited.update(dict(n_limited_groups=3, score="max"))
    m.ffn.moe.balance.kind = "aux_loss"
    m.rope.scaling.yarn.update(dict(mscale=0.707, mscale_all_dim=0.707))


def _v2_lite(config):
    """V2-Lite-16B (V2 App. B): queries not compressed, no groups."""
    _v2(config)
    m = config.model
    m.update(dict(d_model=2048, n_layers=27, d_ff=10944))
    m.attention.mla.update(dict(n_heads=16, q_lora_rank=0))
    m.ffn.moe.update(dict(n_routed_experts=64, d_expert=1408, route_scale=1.0))
    m.ffn.moe.groups.kind = "none"


def _moonlight(config):
    """Moonlight-16B-A3B: V2-Lite's shape with V3's gate."""
    _671b(config)
    m = config.model
    m.update(dict(vocab_size=163840, d_model=2048, n_layers=27, n_dense_layers=1, d_ff=11264, norm_eps=1e-5, mtp_depth=0))
    m.attention.mla.update(dict(n_heads=16, q_lora_rank=0))
    m.rope.theta = 50000.0
    m.ffn.moe.update(dict(n_routed_experts=64, n_shared_experts=2, n_activated_experts=6, d_expert=1408, route_scale=2.446))
    m.ffn.moe.groups.kind = "none"


def _700m(config):
    """671M parameters: the sizes raced against Hugging Face's DeepseekV3 on one GPU."""
    config.run.precision.kind = "bf16"
    config.run.scan_unroll = 11  # a third faster on one H100 than a rolled scan, at 36 s of compiling instead of 16 (LOG.md)
    m = config.model
    m.update(dict(vocab_size=32768, d_model=1024, n_layers=12, n_dense_layers=1, d_ff=2816, mtp_depth=0))
    m.attention.mla.update(dict(
        n_heads=8, q_lora_rank=512, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64))
    m.ffn.moe.update(dict(n_routed_experts=32, n_activated_experts=4, d_expert=512))
    m.ffn.moe.groups.limited.update(dict(n_expert_groups=4, n_limited_groups=2))


def _v3_layer(config):
    """V3's true widths in two layers, about 2B parameters: where speed claims are honest."""
    _671b(config)
    config.run.remat.kind = "none"
    m = config.model
    m.update(dict(vocab_size=32768, n_layers=2, n_dense_layers=1, mtp_depth=0))
    m.ffn.moe.n_routed_experts = 16
    m.ffn.moe.groups.limited.update(dict(n_expert_groups=8, n_limited_groups=4))


def _tiny(config):
    """A V3 for two CPU cores: every part of the paper, 1 dense and 2 MoE layers."""
    config.run.scan_unroll = 3  # rolled loops of two layers cost more than they save
    m = config.model
    m.update(dict(vocab_size=512, d_model=128, n_layers=3, n_dense_layers=1, d_ff=384, init_std=0.02, mtp_depth=1))
    m.attention.mla.update(dict(
        n_heads=4, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=24))
    m.attention.mha.update(dict(n_heads=4, head_dim=32))
    m.attention.gqa.update(dict(n_heads=4, n_kv_heads=2, head_dim=32))
    m.attention.mqa.update(dict(n_heads=4, head_dim=32))
    m.ffn.moe.update(dict(n_routed_experts=8, n_activated_experts=2, d_expert=96))
    m.ffn.moe.groups.limited.update(dict(n_expert_groups=4, n_limited_groups=2))
    config.pretrain.update(dict(steps=450, batch_size=16, n_micro=1, seq_len=128))
    config.pretrain.ramp.kind = "none"
    config.pretrain.lr.v3.update(dict(peak=4e-3, final=4e-4, tail=1.3e-4, warmup_steps=20))
    config.pretrain.bias_rate.first = 1e-2  # at 1e-3 the load stays at twice the mean for hundreds of steps
    config.pretrain.eval.update(dict(every=150, max_bytes=60_000))
    config.data.max_bytes = 4_000_000
    config.probe.seq_len = 128
    config.speed.update(dict(batch_size=16, seq_len=128, gen_batch=16, gen_prompt=32, gen_new=32, peak_tflops=0.0))


PRESETS = {"671b": _671b, "v2": _v2, "v2_lite": _v2_lite, "moonlight": _moonlight, "700m": _700m, "v3_layer": _v3_layer, "tiny": _tiny}
