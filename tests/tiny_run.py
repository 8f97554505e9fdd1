"""The arguments of the smallest run: 1 dense and 1 MoE layer with MTP on a few kB of this Python's own library."""
import json
import pathlib


def arguments(workdir, *edits, steps=6, job="pretrain"):
    """argv of main.run; edits such as 'pretrain.lr.v3.peak=1e-3' come last."""
    leaves = [
        f"job={job}", "mesh.fsdp=1", "model.vocab_size=264",
        "model.d_model=16", "model.n_layers=2", "model.d_ff=16", "model.attention.mla.n_heads=2",
        "model.attention.mla.q_lora_rank=8", "model.attention.mla.kv_lora_rank=8", "model.attention.mla.qk_nope_head_dim=8",
        "model.attention.mla.qk_rope_head_dim=4", "model.attention.mla.v_head_dim=8", "model.ffn.moe.d_expert=8", "data.max_bytes=8000",
        "data.validation_every=3", f"pretrain.steps={steps}", "pretrain.seq_len=16", "pretrain.batch_size=4", "pretrain.n_micro=2",
        "pretrain.eval.every=3", "pretrain.eval.max_bytes=200", "pretrain.eval.batch_size=4", "pretrain.sample.prompts=()",
        "optimizer.ema.kind=host", "checkpoint.every=2", "checkpoint.keep=0", *edits]
    config = pathlib.Path(__file__).parent.parent / "configs" / "deepseek_v3.py:tiny"
    return ["main.py", f"--config={config}", f"--workdir={workdir}", *(f"--config.{leaf}" for leaf in leaves)]


def lines(workdir, name="metrics.jsonl"):
    """The lines of a run, without what the clock decides."""
    read = [json.loads(line) for line in (pathlib.Path(workdir) / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("step_time", "tokens_per_s")} for line in read]
