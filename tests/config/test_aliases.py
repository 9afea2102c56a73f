"""Unknown keys: the error suggests gptjax's name of the setting."""

import pytest

from gptjax import config

UNKNOWN = [
    ("learning_rate=1", "optim.lr"),
    ("lr=1", "optim.lr"),
    ("optim.lrr=1", "optim.lr"),
    ("optim.learning_rate=1", "optim.lr"),
    ("max_iters=1", "train.max_steps"),
    ("batch_size=1", "train.batch_size"),
    ("train.batch_sise=1", "train.batch_size"),
    ("block_size=1", "model.context_length"),
    ("n_embd=1", "model.d_model"),
    ("model.n_embd=1", "model.d_model"),
    ("out_dir=1", "run_dir"),
    ("output_dir=1", "run_dir"),
    ("epochs=1", "train.epochs"),
    ("warmup_steps=1", "optim.warmup_steps"),
    ("weight_decay=1", "optim.weight_decay"),
    ("learnig_rate=1", "optim.lr"),
    ("lora_r=8", "lora.rank"),
    ("lora_alpha=8", "lora.alpha"),
    ("num_generations=8", "reward.group"),
    ("reward.epsilon=0.2", "reward.clip"),
    ("num_iterations=2", "train.max_steps is the number of training steps, reward.updates"),
    ("use_peft=true", "finetune.trainable=all"),
    ("device=cpu", "JAX_PLATFORMS"),
    ("precision=bf16", "model.dtype=bfloat16"),
    ("vocab_size=1", "tokenizer.vocab_size or model.vocab_size"),
    ("optim=1", "group of settings"),
    ("qqq=1", "--help"),
]


@pytest.mark.parametrize(("override", "suggestion"), UNKNOWN, ids=[text for text, _ in UNKNOWN])
def test_an_unknown_key_gets_a_suggestion(complaint, override, suggestion):
    assert suggestion in complaint("tiny-gpt2", override)


def test_every_alias_names_an_existing_setting():
    from gptjax.config.aliases import ALIASES

    assert set(ALIASES.values()) <= set(config.schema())
