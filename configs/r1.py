"""DeepSeek-R1 in miniature: the whole recipe of 2501.12948 on a tiny DeepSeek-V3, from nothing (R1 §2, fig. 2-3, table 6).

Stands for: fig. 2 (R1-Zero's accuracy against steps), fig. 3 (its length), §2.3 (cold start, RL with language consistency, rejection
sampling, SFT, final RL), §4.1 (distillation against RL on the small model). Cost, curves and seeds: docs/recipe.md and LOG.md.
Run: python main.py                                                 tiny: two CPU cores
     python main.py --config=configs/r1.py:full --workdir=runs/full more digits, countdown, G 16, cons@64, equal-token distillation
     python main.py --config=configs/r1.py:gpu --workdir=runs/gpu   one H100, byte tokens; pretraining and R1-Zero
     python main.py --config.recipe.stages="('base','gate','r1_zero')"      any part, in any order that has its inputs
Tiny: `smoke` shows the form of every stage in a minute and teaches nothing.
Differs from the paper: the base is trained here on rule-made problems (there is no V3-Base to start from), answers are 1 to 13 tokens,
general data are problems answered at once, the reward of the final stage is by rules alone (no preference model).

A stage is config.NAME = dict(job, init_from, edits, ...): init_from is an earlier stage or a checkpoint's path ('' is none), edits are
'path=value' on the shared leaves (model, optimizer, run, data) for this stage alone. Every stage is a checkpoint, checkpoints/NAME.
"""
from ml_collections import ConfigDict

from configs import deepseek_v3

# data/tasks/miniature.py's words, in its order
WORDS = (
    "<pad>", "<bos>", "<eos>", "_", "=", "<think>", "</think>", "<answer>", "</answer>",
    "sum", "求和", "mod", "取余", "swap", "交换", "walk", "行走", "count", "凑数",
    "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "零", "一", "二", "三", "四", "五", "六", "七", "八", "九",
    "+", "-", "*", "/", "(", ")", ",")
TRAINED = dict(sum=1.0, mod=1.0, swap=1.0, walk=0.0, relay=0.0, countdown=0.0)
NO_MTP = ("model.mtp_depth=0", "checkpoint.every=8")  # MTP is for pretraining; its module stays in the base's checkpoint
SMALL = ("model.mtp_depth=0", "model.d_model=48", "model.n_layers=2", "model.n_dense_layers=2", "model.ffn.kind=dense",
         "checkpoint.every=100")


def get_config(arg: str = "tiny") -> ConfigDict:
    """The recipe: tiny (two CPU cores), full (the same, more of everything), gpu (one H100), smoke (seconds; teaches nothing)."""
    arg = arg or "tiny"
    if arg not in SIZES:
        raise ValueError(f"configs/r1.py: found {arg!r}, allowed: {', '.join(SIZES)}")
    config = tiny()
    SIZES[arg](config)
    return config


def tiny() -> ConfigDict:
    """Every leaf of the default recipe."""
    config = deepseek_v3.get_config("tiny")
    shared(config)
    with config.unlocked():
        config.update(dict(
            recipe=dict(stages=("base", "gate", "r1_zero", "cold_start", "rl", "rejection", "sft", "final",
                                "small_base", "traces", "small_distil", "small_rl"),
                        expected="4 to 7 minutes on two idle cores"),
            evaluation=evaluation(),
            base=dict(job="pretrain", init_from="", edits=("checkpoint.every=325",)) | pretraining(1300, 3e-3),
            gate=dict(job="gate", init_from="base", edits=(), threshold=0.6, rounds=4, problems=256) | pretraining(200, 2e-3),
            r1_zero=rl("gate", 24, rate=lr(4e-4, 5, "linear")),  # at a constant 8e-4 a random reward drifts twice as far: docs/recipe.md
            cold_start=sft("gate", "traces", epochs=6.0),
            rl=rl("cold_start", 20, language_consistency=0.3),
            rejection=rejection("rl", prompts=1024, samples=2),
            sft=sft("gate", "stage", epochs=4.0, stage="rejection"),
            final=rl("sft", 15, language_consistency=0.3, lengths=(2, 3, 4, 5, 6, 7)),
            small_base=dict(job="pretrain", init_from="", edits=SMALL) | pretraining(400, 4e-3),
            traces=rejection("final", prompts=6144, samples=1, general=0.0, lengths=(2, 3, 4, 5, 6, 7)),
            small_distil=sft("small_base", "stage", epochs=6.0, stage="traces", peak=4e-3, edits=SMALL),
            small_rl=rl("small_base", 24, language_consistency=0.3, edits=SMALL),
            sample=dict(prompt="sum 1 2 3 4 _ _ _ =", n=4, max_new=16, temperature=1.0, top_p=1.0, checkpoints=(),
                        template=dict(kind="raw", raw=dict(), chat=dict()), draft=dict(kind="none", none=dict(), mtp=dict())),
        ))
    config.job = "r1"
    return config


def shared(config) -> None:
    """Model, data, optimizer and pretraining of the miniature, by edits of configs/deepseek_v3.py:tiny."""
    m = config.model
    m.update(dict(vocab_size=len(WORDS), d_model=64, d_ff=128, init_std=0.08))  # at 0.02 the tables are learnt later: LOG.md
    m.attention.mla.update(dict(
        n_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16))
    m.rope.theta = 100.0
    m.ffn.moe.d_expert = 32
    config.run.scan_unroll = 3
    config.tokenizer.kind = "symbols"
    config.tokenizer.symbols.words = WORDS
    config.data.weights.update(dict(code=0.0, prose=0.0, text=0.0, tasks=1.0))
    config.data.fim.rate = 0.0
    config.data.packing.kind = "isolate"
    # Horner in base 2 mod 5: base 6 mod 5 would be a digit sum. walk is in the text alone, relay in nothing that trains
    config.data.tasks.update(dict(digits=6, base=2, modulus=5, families=TRAINED | dict(walk=0.33)))
    config.optimizer.weight_decay = 0.01
    config.pretrain.update(pretraining(1300, 3e-3))
    config.checkpoint.update(dict(every=0, keep=1))


def pretraining(steps: int, peak: float) -> dict:
    """The leaves of a pretraining stage of 1,536 tokens a step."""
    sub = deepseek_v3.get_config("tiny").pretrain
    sub.update(dict(steps=steps, batch_size=32, n_micro=1, seq_len=48))
    sub.lr.kind = "linear"
    sub.lr.linear.update(dict(peak=peak, final=peak / 20, warmup_steps=20, constant_until=0.65))
    sub.mtp_weight.update(dict(first=0.1, then=0.1, until=1.0))
    sub.bias_rate.update(dict(first=1e-2, then=0.0, until=0.9))
    sub.eval.update(dict(every=0, max_bytes=1_000_000, batch_size=32))
    sub.sample.update(dict(prompts=(("tasks", "sum 1 2 3 4 _ _ _ ="), ("tasks", "交换 一 二 三 四 _ _ _ =")), max_new=16,
                           temperature=1.0, top_p=1.0))
    return sub.to_dict()


def evaluation() -> dict:
    """How every stage is judged: held-out problems, pass@1 and cons@k at temperature 1, in batches of one compiled size."""
    return dict(problems=512, lengths=(4, 5, 6, 7), families=TRAINED, cons_problems=128, cons_samples=16, transfer=("walk", "relay"),
                transfer_problems=256, max_new=16, temperature=1.0, batch_size=512)


def lr(peak: float, warmup_steps: int, kind: str = "constant") -> dict:
    """Warm-up, then constant, or linear to a twentieth over the last 70 %; the other kinds beside it."""
    kinds = deepseek_v3.pretrain()["lr"]
    for name in kinds:
        if name != "kind":
            kinds[name].update(peak=peak, warmup_steps=warmup_steps)
    kinds["linear"].update(final=peak / 20, constant_until=0.3)
    return kinds | dict(kind=kind)


def rl(init_from: str, steps: int, language_consistency: float = 0.0, lengths: tuple = (4, 5, 6, 7), edits: tuple = NO_MTP,
       rate: dict | None = None) -> dict:
    """A GRPO stage (R1 §2.2): 64 prompts x 8 answers a step, in minibatches of 32 packed rows; KL to where the stage began, as R1's."""
    return dict(
        job="rl", init_from=init_from, edits=edits, steps=steps, prompts=64, group_size=8, max_new=16, temperature=1.0,
        batch_size=32, seq_len=48, lr=rate or lr(8e-4, 5), families=TRAINED, lengths=lengths,
        rewards=dict(accuracy=1.0, format=0.2, language_consistency=language_consistency, soft_overlong=0.0, length_penalty=0.0,
                     random=0.0),
        soft_overlong=4,  # tokens before max_new from which soft_overlong counts
        advantage=dict(kind="group_std", group_std=dict(), group_mean=dict(), rloo=dict(), batch_std=dict()),
        loss=dict(kind="grpo", grpo=dict(), bnpo=dict(), dapo=dict(), dr_grpo=dict()),
        clip_low=0.2, clip_high=0.2, beta=0.001,
        zero_std=dict(kind="drop", drop=dict(), keep=dict()),  # groups whose rewards are all equal
        old_logp=dict(kind="sampler", sampler=dict(), trainer=dict()),
        experts=dict(kind="compare", none=dict(), compare=dict(), replay=dict()),  # the rollout's expert choices, in the trainer
        bias_rate=0.0, eval=dict(every=4, problems=512), shown=2)


def sft(init_from: str, source: str, epochs: float, stage: str = "", peak: float = 2e-3, edits: tuple = NO_MTP) -> dict:
    """An SFT stage (R1 §2.3.1, §2.3.3): traces made by rule, those of an earlier stage, or a file."""
    return dict(
        job="sft", init_from=init_from, edits=edits, epochs=epochs, batch_size=32, seq_len=48, lr=lr(peak, 2), bias_rate=0.0,
        source=dict(kind=source, file=dict(path=""), stage=dict(name=stage), traces=dict(n=128, families=TRAINED, lengths=(4, 5, 6, 7))))


def rejection(init_from: str, prompts: int, samples: int, general: float = 0.25, lengths: tuple = (4, 5, 6, 7)) -> dict:
    """Rejection sampling (R1 §2.3.3): right, formatted, one language, no double, no lucky guess; `general` parts of direct answers."""
    return dict(
        job="rejection", init_from=init_from, edits=NO_MTP, prompts=prompts, samples=samples, max_new=16, temperature=1.0, batch_size=512,
        families=TRAINED, lengths=lengths, lucky=dict(kind="trace", none=dict(), trace=dict(), samples=dict(least=0.75)), general=general,
        general_lengths=(2,))


def _tiny(config):
    """What `tiny` is."""


def _full(config):
    """9 minutes on two cores (LOG.md): seven digits, countdown, 16 answers a group, a majority of 64, and a small base that reads as many
    tokens as the large one."""
    families = TRAINED | dict(countdown=0.2)
    config.recipe.expected = "9 minutes on two cores"
    config.data.tasks.update(dict(digits=7, base=3, modulus=5, families=families | dict(walk=0.33)))
    config.evaluation.update(dict(families=families, cons_samples=64, max_new=32))
    for name in config.recipe.stages:
        sub = config[name]
        if "max_new" in sub:
            sub.update(dict(max_new=32, families=families))  # countdown's worked answers have 26 tokens at most
        if sub.job == "rl":
            sub.update(dict(prompts=32, group_size=16, steps=2 * sub.steps))
    config.base.steps = config.small_base.steps = 3500
    config.gate.steps = 300
    config.cold_start.source.traces.update(dict(n=256, families=families))


def _gpu(config):
    """6 minutes on one H200 (docs/recipe.md): a 95M-parameter MoE in BF16 on byte tokens, pretraining and R1-Zero on tiny's tables.

    33M bytes of pretraining, 60 steps of RL. In parts: --config.stop_after_s=240, and the same command again.
    """
    config.recipe.update(dict(stages=("base", "gate", "r1_zero"), expected="6 minutes on one H200"))
    m = config.model
    m.update(dict(vocab_size=264, d_model=512, n_layers=8, n_dense_layers=1, d_ff=1408, init_std=0.02))
    m.attention.mla.update(dict(
        n_heads=8, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64))
    m.rope.theta = 10000.0
    m.ffn.moe.update(dict(n_routed_experts=32, n_activated_experts=4, d_expert=256))
    config.run.scan_unroll = 1
    config.run.precision.kind = "bf16"
    config.tokenizer.kind = "bytes"
    config.evaluation.update(dict(max_new=96))
    for name in ("base", "gate"):
        config[name].update(dict(batch_size=64, seq_len=256))
        config[name].lr.linear.update(dict(peak=1e-3, final=5e-5, warmup_steps=100))
        config[name].sample.max_new = 96
    config.base.update(dict(steps=2000, edits=("checkpoint.every=1000",)))
    config.gate.update(dict(steps=300, edits=("checkpoint.every=300",)))
    config.r1_zero.update(dict(steps=60, max_new=96, seq_len=256, soft_overlong=16, edits=("model.mtp_depth=0", "checkpoint.every=20")))
    config.r1_zero.lr.linear.update(dict(peak=1e-4, final=5e-6))
    # In bytes a tagged worked answer has 56 tokens and an untagged, unrewarded one 14: GRPO's mean over each answer weighs the choice to
    # work four times as much where it is punished, and working dies out (docs/recipe.md). DAPO's mean over all tokens does not.
    config.r1_zero.loss.kind = "dapo"
    config.r1_zero.eval.every = 5


def _smoke(config):
    """Every stage for a few steps."""
    config.recipe.expected = "a minute"
    config.evaluation.update(dict(problems=8, cons_problems=2, cons_samples=4, transfer_problems=4, batch_size=16))
    for name in config.recipe.stages:
        sub = config[name]
        if sub.job in ("pretrain", "gate", "sft"):
            sub.update(dict(batch_size=8))
        if sub.job in ("pretrain", "gate"):
            sub.update(dict(steps=4))
        if sub.job == "rl":
            sub.update(dict(steps=3, prompts=4, group_size=4, batch_size=8))
            sub.eval.update(dict(every=2, problems=4))
        if sub.job == "rejection":
            sub.update(dict(prompts=8, samples=2, batch_size=16))
    config.gate.update(dict(rounds=1, problems=8))
    config.cold_start.source.traces.n = 8


SIZES = {"tiny": _tiny, "full": _full, "gpu": _gpu, "smoke": _smoke}
