"""Writes error texts for unknown keys of settings. The error text for an unknown key suggests the key of gptjax for a
setting of another tool, or the key with the nearest spelling."""

from __future__ import annotations

from collections.abc import Sequence

from gptjax.errors import did_you_mean, nearest

# Maps names of settings in nanoGPT, nanochat, litgpt, torchtune, TRL, axolotl or Build a Large Language Model (From
# Scratch) to the keys of the corresponding settings in gptjax.
ALIASES: dict[str, str] = {
    "learning_rate": "optim.lr", "max_lr": "optim.lr", "peak_lr": "optim.lr", "embedding_lr": "optim.embed_lr",
    "unembedding_lr": "optim.head_lr", "matrix_lr": "optim.lr", "optimizer": "optim.name", "optim": "optim.name",
    "lr_scheduler": "optim.schedule", "lr_scheduler_type": "optim.schedule", "scheduler": "optim.schedule",
    "decay_lr": "optim.schedule", "warmup_iters": "optim.warmup_steps", "lr_warmup_steps": "optim.warmup_steps",
    "num_warmup_steps": "optim.warmup_steps", "warmup_ratio": "optim.warmup_steps",
    "initial_lr": "optim.initial_lr_ratio",
    "min_lr": "optim.min_lr_ratio", "final_lr_frac": "optim.min_lr_ratio", "warmdown_ratio": "optim.decay_fraction",
    "wd": "optim.weight_decay", "adam_beta1": "optim.beta1", "adam_beta2": "optim.beta2", "adam_epsilon": "optim.eps",
    "betas": "optim.beta1", "grad_clip": "optim.clip_norm", "max_grad_norm": "optim.clip_norm",
    "gradient_clip_val": "optim.clip_norm", "max_norm": "optim.clip_norm",
    "max_iters": "train.max_steps", "steps": "train.max_steps",
    "num_steps": "train.max_steps", "max_steps": "train.max_steps", "lr_decay_iters": "train.max_steps",
    "num_epochs": "train.epochs", "num_train_epochs": "train.epochs", "n_epochs": "train.epochs",
    "micro_batch_size": "train.batch_size", "device_batch_size": "train.batch_size", "bs": "train.batch_size",
    "global_batch_size": "train.batch_size", "total_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size", "gradient_accumulation_steps": "train.accumulation",
    "grad_accum_steps": "train.accumulation", "gradient_accumulation": "train.accumulation",
    "eval_interval": "train.eval_every", "eval_steps": "train.eval_every", "eval_freq": "train.eval_every",
    "save_interval": "train.checkpoint_every", "save_steps": "train.checkpoint_every",
    "save_every": "train.checkpoint_every",
    "early_stopping_patience": "train.patience", "ema_decay": "train.ema",
    "log_interval": "train.log_every", "logging_steps": "train.log_every", "save_total_limit": "train.keep_checkpoints",
    "init_from": "train.resume", "resume_from_checkpoint": "train.resume", "report_to": "train.loggers",
    "wandb_log": "train.loggers", "logger_name": "train.loggers",
    "block_size": "model.context_length", "max_seq_len": "model.context_length", "seq_len": "model.context_length",
    "max_seq_length": "model.context_length", "sequence_len": "model.context_length", "n_ctx": "model.context_length",
    "n_positions": "model.context_length", "max_length": "model.context_length", "ctx_len": "model.context_length",
    "n_embd": "model.d_model", "emb_dim": "model.d_model", "hidden_size": "model.d_model", "dim": "model.d_model",
    "n_layers": "model.n_layer", "num_hidden_layers": "model.n_layer", "num_layers": "model.n_layer",
    "depth": "model.n_layer",
    "n_heads": "model.n_head", "num_attention_heads": "model.n_head", "num_heads": "model.n_head",
    "n_kv_heads": "model.n_kv_head", "num_key_value_heads": "model.n_kv_head", "n_query_groups": "model.n_kv_head",
    "intermediate_size": "model.d_ff", "n_inner": "model.d_ff", "hidden_dim": "model.d_ff", "ffn_dim": "model.d_ff",
    "drop_rate": "model.dropout", "dropout_rate": "model.dropout", "resid_pdrop": "model.dropout",
    "tie_weights": "model.tie_embeddings", "tie_word_embeddings": "model.tie_embeddings",
    "weight_tying": "model.tie_embeddings", "rope_theta": "model.rope_base", "act": "model.activation",
    "hidden_act": "model.activation", "activation_function": "model.activation", "pos": "model.position",
    "layer_norm_eps": "model.norm_eps", "rms_norm_eps": "model.norm_eps", "layer_norm_epsilon": "model.norm_eps",
    "softcap": "model.logit_softcap", "bf16": "model.dtype", "torch_dtype": "model.dtype",
    "gradient_checkpointing": "model.remat", "padded_vocab_size": "model.vocab_size",
    "out_dir": "run_dir", "output_dir": "run_dir", "save_dir": "run_dir", "name": "run_dir", "run_name": "run_dir",
    "random_seed": "seed", "dataset": "data.source", "data": "data.source", "datasets": "data.source",
    "data_path": "data.source", "data_dir": "data.source", "train_file": "data.source", "dataset_name": "data.source",
    "path": "data.source", "input_file": "data.source", "validation_file": "data.val_source",
    "val_split_fraction": "data.val_fraction", "val_set_size": "data.val_fraction", "val_ratio": "data.val_fraction",
    "dataset_text_field": "data.text_field", "shuffle": "data.order", "tokenizer_name": "tokenizer.name",
    "tok": "tokenizer.name", "start": "sample.prompt", "prompts": "sample.prompt", "num_samples": "sample.n",
    "lora_r": "lora.rank", "lora_rank": "lora.rank", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout",
    "use_dora": "lora.dora", "target_modules": "lora.targets", "num_generations": "reward.group",
    "epsilon": "reward.clip", "epsilon_high": "reward.clip_high", "reward_funcs": "reward.functions",
    "reward_weights": "reward.weights", "max_completion_length": "reward.max_new_tokens", "lmbda": "distill.on_policy",
    "teacher_model_name_or_path": "distill.teacher",
    "max_tokens": "sample.max_new_tokens", "temp": "sample.temperature",
}  # fmt: skip

# Maps names of settings that other tools have, but gptjax does not have, to texts that explain what gptjax does
# instead.
NOT_HERE: dict[str, str] = {
    "num_iterations": "train.max_steps is the number of training steps, reward.updates the number of steps on the same "
    "answers (num_iterations in TRL)",
    "use_rslora": "lora.scaling=alpha/sqrt(r) is rsLoRA",
    "use_peft": "gptjax finetune trains a LoRA adapter; finetune.trainable=all trains all weights",
    **dict.fromkeys(
        ("device", "device_type", "accelerator"),
        "JAX uses the best available device; the environment variable JAX_PLATFORMS=cpu selects another",
    ),
    "compile": "training steps are always compiled",
    "precision": "model.dtype=bfloat16 computes in bfloat16; model.precision sets the precision of float32 products",
    "eval_iters": "evaluation always uses the whole validation set",
    "eval_iter": "evaluation always uses the whole validation set",
}  # fmt: skip


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Returns the error text for a setting whose key is not in the schema. If the unknown key is a setting of another
    tool, the error text suggests the corresponding key of gptjax, otherwise the key with the nearest spelling."""
    last = key.rpartition(".")[2].lower()
    groups = {name.partition(".")[0] for name in known if "." in name}
    if key in groups:
        return f"{key} is a group of settings, such as {next(name for name in known if name.startswith(key + '.'))}"
    same_leaf = [name for name in known if name.rpartition(".")[2] == last]
    if last in NOT_HERE:
        return f"unknown key {key}: {NOT_HERE[last]}"
    if same_leaf:
        return f"unknown key {key}; did you mean {' or '.join(same_leaf)}?"
    if ALIASES.get(last) in known:
        return f"unknown key {key}; here it is called {ALIASES[last]}"
    group = key.partition(".")[0]
    same_group = [name for name in known if name.startswith(group + ".")] or known
    hint = did_you_mean(key, same_group) or did_you_mean(key, known)
    leaves = {name.rpartition(".")[2]: name for name in known} | {
        alias: name for alias, name in ALIASES.items() if name in known
    }
    if not hint and (near := nearest(last, leaves, cutoff=0.7)):
        hint = f"; did you mean {leaves[near]}?"
    return f"unknown key {key}{hint or '; `gptjax COMMAND --help` lists the settings of a command'}"
