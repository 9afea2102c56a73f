"""The configuration: nested frozen dataclasses, and the layers that fill them.

default < arch < preset < YAML (each may name its `base:`) < `a.b=c` on the command line.
Frozen means hashable: a `ModelConfig` is a static argument under `jit`.
"""

from __future__ import annotations

import functools
import math
import numbers
import os
import re
import types
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

from gptjax import config_io
from gptjax.config_io import Leaf
from gptjax.errors import Problems, UserError, did_you_mean
from gptjax.files import user_path

# What each `arch` switches on. A switch that is given explicitly wins over this table.
ARCHS: dict[str, dict[str, Any]] = {
    "gpt2": dict(
        position="learned", norm="layernorm", norm_scale=True, norm_bias=True, activation="gelu",
        qkv_bias=True, bias=True, tie_embeddings=True, qk_norm=False, qk_gain=1.0, embed_norm=False,
        logit_softcap=0.0, value_residual=False, residual_lambdas=False, x0_lambdas=False, smear=False,
        zero_init_proj=False, zero_init_head=False, norm_eps=1e-5,
    ),
    "llama": dict(
        position="rope", norm="rmsnorm", norm_scale=True, norm_bias=False, activation="swiglu",
        qkv_bias=False, bias=False, tie_embeddings=False, qk_norm=False, qk_gain=1.0, embed_norm=False,
        logit_softcap=0.0, value_residual=False, residual_lambdas=False, x0_lambdas=False, smear=False,
        zero_init_proj=False, zero_init_head=False, norm_eps=1e-5,
    ),
    "modern": dict(
        position="rope", norm="rmsnorm", norm_scale=False, norm_bias=False, activation="relu2",
        qkv_bias=False, bias=False, tie_embeddings=False, qk_norm=True, qk_gain=1.2, embed_norm=True,
        logit_softcap=15.0, value_residual=True, residual_lambdas=True, x0_lambdas=True, smear=True,
        zero_init_proj=True, zero_init_head=True, norm_eps=1e-6,
    ),
}  # fmt: skip


def setting(default: Any, text: str) -> Any:
    """A field with its default and its line of `--help`."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelConfig:
    """Shape and switches of one decoder. A switch left at None takes its value from `ARCHS[arch]`.

    After construction every switch holds a value, so printing the config shows all of them. `dataclasses.replace`
    derives anew what was left at None: replace(ModelConfig(d_model=32), d_model=64).d_ff is 256.

    Raises:
        UserError: every value or combination that cannot work.
    """

    _derived: tuple[str, ...] = field(default=(), repr=False, compare=False, kw_only=True)  # names that were None
    arch: Literal["gpt2", "llama", "modern"] = setting(
        "gpt2", "Family of the model: sets every switch below that is null."
    )
    vocab_size: int = setting(0, "Rows of the token embedding. 0: the tokenizer's vocabulary size.")
    context_length: int = setting(1024, "Longest sequence in tokens, in training and generation.")
    n_layer: int = setting(12, "Number of transformer blocks.")
    n_head: int = setting(12, "Number of query heads per layer.")
    n_kv_head: Optional[int] = setting(
        None, "Number of key and value heads (grouped-query attention); must divide n_head. null: n_head."
    )
    d_head: Optional[int] = setting(None, "Width of one head. null: d_model / n_head.")
    d_model: int = setting(768, "Width of the residual stream.")
    d_ff: Optional[int] = setting(None, "Hidden width of the feed-forward layer. null: 4 * d_model.")
    # switches
    position: Optional[Literal["learned", "sinusoidal", "rope", "alibi"]] = setting(
        None, "Position encoding. null: by arch."
    )
    rope_base: float = setting(10_000.0, "RoPE base frequency (theta).")
    rope_scaling: Literal["none", "linear", "llama3"] = setting(
        "none", "RoPE scaling for contexts longer than in pretraining."
    )
    rope_factor: float = setting(
        1.0, "RoPE scaling: angles are divided by it; with llama3 only the low frequencies are."
    )
    rope_slow: float = setting(
        1.0, "RoPE scaling llama3: angles with at most this many turns in rope_original_context are low frequencies."
    )
    rope_fast: float = setting(4.0, "RoPE scaling llama3: angles with at least this many turns are not scaled.")
    rope_original_context: int = setting(8192, "RoPE scaling llama3: context length of the pretraining.")
    rope_local_base: Optional[float] = setting(
        None, "RoPE base frequency in layers with a sliding window. null: rope_base."
    )
    sliding_window: int = setting(
        0, "Tokens that a layer with a sliding window attends to, its own included. 0: no window."
    )
    window_pattern: str = setting("S", "S: a layer with the sliding window, L: one without; repeated over the layers.")
    norm: Optional[Literal["layernorm", "rmsnorm"]] = setting(None, "Normalisation. null: by arch.")
    norm_scale: Optional[bool] = setting(None, "Normalisation has a learned scale. null: by arch.")
    norm_bias: Optional[bool] = setting(None, "LayerNorm has a learned bias. null: by arch.")
    norm_eps: Optional[float] = setting(None, "Epsilon of the normalisation. null: by arch.")
    norm_position: Literal["pre", "post", "both"] = setting(
        "pre", "Normalise before attention and feed-forward, after them, or both."
    )
    activation: Optional[Literal["gelu", "swiglu", "geglu", "relu2"]] = setting(
        None, "Feed-forward activation. null: by arch."
    )
    qkv_bias: Optional[bool] = setting(None, "Bias in the q, k and v projections. null: by arch.")
    bias: Optional[bool] = setting(None, "Bias in all other linear layers but the output head. null: by arch.")
    n_classes: int = setting(0, "Classes of a classification head beside the language model's. 0: no such head.")
    cls_bias: bool = setting(True, "Bias in the classification head.")
    tie_embeddings: Optional[bool] = setting(
        None, "The output head shares the token embedding's weights. null: by arch."
    )
    qk_norm: Optional[bool] = setting(None, "Normalise queries and keys (QK-norm). null: by arch.")
    qk_norm_over: Literal["head", "all"] = setting(
        "head", "QK-norm over each head by itself, or over all heads at once."
    )
    qk_gain: Optional[float] = setting(None, "Factor on queries and keys after QK-norm. null: by arch.")
    attention_scale: Optional[float] = setting(None, "Factor on the attention logits q k^T. null: head width ** -0.5.")
    embed_gain: float = setting(1.0, "Factor on the token embedding.")
    embed_norm: Optional[bool] = setting(None, "Normalise the token embedding. null: by arch.")
    logit_softcap: Optional[float] = setting(
        None, "Output logits become cap * tanh(logits / cap). 0: off; null: by arch."
    )
    value_residual: Optional[bool] = setting(
        None, "Mix each layer's values with the first layer's, with a learned weight. null: by arch."
    )
    residual_lambdas: Optional[bool] = setting(
        None, "Learned factor on the residual stream before each block. null: by arch."
    )
    x0_lambdas: Optional[bool] = setting(
        None, "Add the embedding before each block, with a learned factor. null: by arch."
    )
    smear: Optional[bool] = setting(
        None, "Add the previous token's embedding, with a learned factor per channel. null: by arch."
    )
    # initialisation
    init: Literal["gpt2", "torch"] = setting("gpt2", "Initialisation of new weights, as GPT-2 or as PyTorch's layers.")
    embed_std: float = setting(0.02, "Standard deviation of the token embedding at the start, under init=gpt2.")
    zero_init_proj: Optional[bool] = setting(
        None, "Output projections of attention and feed-forward start at zero. null: by arch."
    )
    zero_init_head: Optional[bool] = setting(None, "An untied output head starts at zero. null: by arch.")
    dropout: float = setting(0.0, "Dropout rate during training.")
    # how it is computed, not what
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "Compute dtype of matrix multiplications; parameters stay float32."
    )
    precision: Literal["default", "high", "highest"] = setting(
        "default",
        "Precision of float32 matrix multiplications. default: TF32 on a GPU (3 decimal digits), one bfloat16 pass on a"
        " TPU (2 to 3 digits); high: TF32, three passes; highest: float32. A CPU always computes float32, and bfloat16"
        " is the same under all three.",
    )
    remat: Literal["none", "dots", "full", "offload"] = setting(
        "none",
        "Rematerialisation (gradient checkpointing): what the backward pass computes again instead of keeping"
        " it; offload keeps only each block's input, in the host's memory.",
    )
    unroll: Optional[bool] = setting(
        None,
        "Compile the blocks as one unrolled program instead of a scan. null: small models on a CPU; on a GPU up to 12 "
        "blocks at a time.",
    )

    def __new__(cls, *args: Any, **given: Any) -> ModelConfig:
        self = object.__new__(cls)
        # `dataclasses.replace` gives its changes first, then a copy of every other field, `_derived` before all
        names = list(given)
        copied = names[names.index("_derived") :] if "_derived" in given else ()
        object.__setattr__(self, "_copied", copied)
        return self

    def __post_init__(self) -> None:
        for name in set(self._derived).intersection(self._copied):
            object.__setattr__(self, name, None)
        object.__delattr__(self, "_copied")
        if not _CHECKED_LATER.get():
            Problems(_wrong_types(self)).raise_if_any()
        fill = dict(ARCHS.get(self.arch, {}), n_kv_head=self.n_head, d_ff=4 * self.d_model)
        derived = [name for name in fill if getattr(self, name) is None]
        for name in derived:
            object.__setattr__(self, name, fill[name])
        object.__setattr__(self, "_derived", tuple(derived))
        if not _CHECKED_LATER.get():
            complaints = (*_ranges(flat(self, "model.")), *_model_combinations(self))
            Problems(text for _, text in complaints).raise_if_any()

    @property
    def head_dim(self) -> int:
        return self.d_head or self.d_model // self.n_head

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate beside its first matrix."""
        return self.activation in ("swiglu", "geglu")

    @property
    def windows(self) -> tuple[int, ...]:
        """How many tokens each layer sees, itself included; 0: all."""
        pattern = self.window_pattern * self.n_layer
        return tuple(self.sliding_window if mark == "S" else 0 for mark in pattern[: self.n_layer])


_CHECKED_LATER: ContextVar[bool] = ContextVar("checked later", default=False)  # with all other settings at once
# of ModelConfig, what a fine-tuning may say of its base
COMPUTED = ("dropout", "dtype", "precision", "remat", "unroll", "init")


@dataclass(frozen=True)
class TokenizerConfig:
    """`name` is gpt2, chars, bytes, words, bpe, wordpiece, unigram, or the path of a saved tokenizer."""

    name: str = setting(
        "chars", "gpt2, chars, bytes, words, bpe, wordpiece, unigram, or the path of a saved tokenizer."
    )
    vocab_size: int = setting(1024, "Vocabulary size of the tokenizers that are trained: bpe, wordpiece, unigram.")


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from, and in which order its windows are read."""

    source: tuple[str, ...] = setting(("shakespeare",), "Text to train on: assets, files, folders or hf:org/name.")
    text_field: str = setting("text", "Field with the text in .jsonl, .csv, .parquet and hf: sources.")
    weights: tuple[float, ...] = setting((), "Sampling weight of each source. []: in proportion to its tokens.")
    temperature: float = setting(
        1.0, "Exponent on the sampling weights: p_i ~ w_i ** temperature; below 1 it flattens them."
    )
    val_source: tuple[str, ...] = setting((), "Text to validate on. []: a part of source is held out.")
    val_fraction: float = setting(0.1, "Fraction of source that is held out for validation.")
    split: Literal["auto", "document", "file", "tail"] = setting(
        "auto",
        "What is held out: whole documents, whole files, or the tail of each; auto: documents where there are"
        " 10 or more, else the tail.",
    )
    order: Literal["shuffle", "sequential"] = setting("shuffle", "Order of the training windows.")
    stride: Optional[int] = setting(
        None,
        "Tokens from the start of one window to the next. null: context_length, shifted at random per epoch "
        "when shuffled.",
    )
    document_mask: bool = setting(True, "No token attends to another document.")
    mask_tokens: int = setting(0, "Replace 0 to 3 input tokens per window at random, against memorisation.")
    max_documents: Optional[int] = setting(None, "Read at most this many documents. null: all.")
    streaming: bool = setting(False, "Read hf: sources while training instead of downloading them first.")
    cache_dir: Optional[str] = setting(None, "Folder for prepared token files. null: the user's cache folder.")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, or Muon on the block matrices with AdamW on the rest. Rates are peaks of the schedule."""

    name: Literal["adamw", "muon"] = setting(
        "adamw", "Optimizer: AdamW, or Muon on the block matrices with AdamW on the rest."
    )
    lr: float = setting(1e-3, "Peak learning rate.")
    embed_lr: Optional[float] = setting(None, "Peak learning rate of the embeddings. null: lr.")
    head_lr: Optional[float] = setting(None, "Peak learning rate of the output head. null: lr.")
    vector_lr: Optional[float] = setting(None, "Peak learning rate of norms, biases and learned factors. null: lr.")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = setting(
        "cosine", "Learning rate schedule after the warmup."
    )
    warmup_steps: int = setting(0, "Steps of linear warmup.")
    initial_lr_ratio: float = setting(0.0, "Learning rate at the start of the warmup, as a fraction of the peak.")
    min_lr_ratio: float = setting(0.0, "Learning rate at the end of the decay, as a fraction of the peak.")
    decay_fraction: float = setting(0.2, "Schedule wsd: last fraction of the steps, over which the rate decays.")
    beta1: float = setting(0.9, "AdamW: decay of the first moment.")
    beta2: float = setting(0.95, "AdamW: decay of the second moment.")
    eps: float = setting(1e-8, "AdamW: added to the denominator.")
    weight_decay: float = setting(0.1, "Decoupled weight decay.")
    decay: Literal["matrices", "all"] = setting("matrices", "Which parameters decay: matrices, or all.")
    clip_norm: float = setting(1.0, "Clip the gradient's global norm to this. 0: off.")
    momentum: float = setting(0.95, "Muon: momentum.")
    offload: bool = setting(False, "Keep the optimizer's state in the host's memory between updates.")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how often, how much at once."""

    max_steps: int = setting(1000, "Optimizer steps of the run.")
    epochs: Optional[float] = setting(None, "Passes over the training data; sets max_steps. null: max_steps as given.")
    batch_size: int = setting(
        12, "Rows per step, over all micro-batches and devices. auto, on a command line: as many as fit by estimate."
    )
    accumulation: int = setting(1, "Gradient accumulation: micro-batches per step; must divide batch_size.")
    steps_per_call: Optional[int] = setting(None, "Steps in one compiled call. null: chosen by the model's size.")
    eval_every: int = setting(250, "Steps between evaluations on the validation data.")
    eval_train_batches: int = setting(
        0, "Training batches whose loss without dropout is logged at each evaluation too."
    )
    checkpoint_every: int = setting(250, "Steps between checkpoints.")
    log_every: int = setting(10, "Steps between lines in metrics.jsonl.")
    keep_checkpoints: int = setting(2, "Newest checkpoints to keep, at least 2.")
    max_nonfinite: int = setting(5, "Stop after this many steps in a row with a loss that is not finite.")
    resume: Literal["auto", "never"] = setting(
        "auto", "auto: go on where the run directory stands; never: refuse a directory that holds a run."
    )
    loggers: tuple[str, ...] = setting((), "Also log to these: tensorboard, wandb.")

    def steps(self, size: int, per_step: int) -> int:
        """max_steps, or what `epochs` over `size` tokens, texts or rows make of it, `per_step` at a time."""
        return self.max_steps if self.epochs is None else max(1, round(self.epochs * size / per_step))


@dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work; their product is the number of devices. mesh=auto: all of it over data."""

    data: int = setting(
        -1, "Data-parallel size: shards the batch, replicates the parameters. -1: all remaining devices."
    )
    fsdp: int = setting(1, "FSDP size: shards the batch and the parameters.")
    tensor: int = setting(1, "Tensor-parallel size: shards heads and the feed-forward layer.")
    context: int = setting(1, "Context-parallel size: shards the tokens of a row.")


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes as one run; the same command on every host."""

    coordinator: Optional[str] = setting(
        None, "HOST:PORT of process 0; auto: as a TPU pod or Slurm says. null: a single process."
    )
    num_processes: Optional[int] = setting(None, "Number of processes.")
    process_id: Optional[int] = setting(None, "Number of this process, from 0.")
    timeout_s: int = setting(300, "Seconds to wait for the other processes at the start.")
    heartbeat_s: int = setting(100, "Seconds after which a silent process counts as lost.")


@dataclass(frozen=True)
class SampleConfig:
    """What `gptjax sample` writes, and the samples during training."""

    prompt: str = setting("\n", "Text to continue.")
    prompts: Optional[str] = setting(
        None, 'File of prompts: .jsonl with "prompt", or a text with one per line. null: prompt alone.'
    )
    out: Optional[str] = setting(None, "New .jsonl file for the continuations. null: print them.")
    batch_size: int = setting(8, "Prompts per batch.")
    max_new_tokens: int = setting(300, "Most tokens per continuation.")
    n: int = setting(1, "Continuations per prompt.")
    temperature: float = setting(0.8, "Sampling temperature. 0: greedy.")
    top_k: int = setting(0, "Sample from the k most likely tokens. 0: off.")
    top_p: float = setting(1.0, "Nucleus sampling: smallest set of tokens with this total probability. 1: off.")
    min_p: float = setting(0.0, "Drop tokens less likely than min_p times the most likely one. 0: off.")
    repetition_penalty: float = setting(1.0, "Penalty on tokens that came before. 1: off.")
    stop: tuple[str, ...] = setting((), "Stop strings: a continuation ends before the first of them.")
    quantize: Literal["none", "int8", "nf4"] = setting("none", "Quantise the weights: less memory, slower on a CPU.")
    cache_dtype: Optional[Literal["float32", "bfloat16", "int8"]] = setting(
        None, "Dtype of the KV cache. null: float32 on a CPU, model.dtype elsewhere."
    )
    draft: Optional[str] = setting(
        None, "Speculative decoding: a smaller model that proposes tokens, or ngram: the text so far does. null: off."
    )
    ahead: int = setting(4, "Tokens proposed at a time, with a draft.")
    seed: int = setting(0, "Random seed of the sampling.")


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter: which weights it is for, and its form."""

    rank: int = setting(16, "Rank of the adapter.")
    alpha: float = setting(32.0, "Numerator of the scale; see scaling.")
    scaling: Literal["alpha/r", "alpha/sqrt(r)", "alpha"] = setting(
        "alpha/r", "Scale of the low-rank product; alpha/sqrt(r) is rsLoRA."
    )
    targets: str = setting(
        "blocks/*/kernel", "Weights with an adapter: path patterns, joined by |; blocks/3/*/kernel is one layer's."
    )
    init: Literal["lora", "pissa", "olora"] = setting(
        "lora", "Start of the adapter: lora (a random, b zero), or from the weights themselves."
    )
    dora: bool = setting(False, "DoRA: also learn a magnitude per output column (arXiv:2402.09353).")
    dropout: float = setting(0.0, "Dropout on the adapter's input; adapters of embedding tables have none.")
    lr_ratio: float = setting(1.0, "LoRA+: learning rate of b divided by that of a; the paper takes 16.")

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by: three conventions are in use."""
        return self.alpha / {"alpha/r": self.rank, "alpha/sqrt(r)": self.rank**0.5, "alpha": 1}[self.scaling]


@dataclass(frozen=True)
class PretrainConfig:
    """Continued pretraining: what it starts from. The base brings its own model and tokenizer."""

    base: Optional[str] = setting(
        None, "Model to go on from: run, model folder, .gguf file, asset or hf:org/name. null: new weights."
    )
    context_length: Optional[int] = setting(
        None, "Tokens per window. null: the model's context length, of a base at most 1024."
    )


@dataclass(frozen=True)
class FinetuneConfig:
    """What a fine-tuning starts from, and which of it moves."""

    base: str = setting(
        "smollm2-135m-instruct", "Model to start from: run, model folder, .gguf file, asset or hf:org/name."
    )
    trainable: str = setting("lora", "What is trained: lora (an adapter), all, or path patterns joined by |.")
    quantize: Literal["none", "int8", "nf4"] = setting("none", "Quantise the frozen base under an adapter.")
    save_merged: Optional[bool] = setting(
        None,
        "Save whole weights with the adapter merged into them; false: the adapter alone, read with its base again. "
        "null: whole, except where the base is an asset or hf:org/name, which do not change.",
    )
    seeds: int = setting(1, "Number of runs, with seed, seed + 1, ..; each in its own folder, and their mean.")
    together: Optional[bool] = setting(
        None, "Train all seeds in one vmapped program. null: on accelerators only; a CPU gains nothing."
    )


@dataclass(frozen=True)
class ClassifyConfig:
    """Labelled texts, and how a text becomes one vector."""

    source: Optional[str] = setting(None, "Labelled texts: .csv, .tsv, .jsonl, .json, .parquet or hf:org/name.")
    text_field: Optional[str] = setting(None, "Column of the texts. null: guessed where only one fits.")
    label_field: Optional[str] = setting(None, "Column of the labels. null: guessed where only one fits.")
    labels: tuple[str, ...] = setting((), "Order of the classes. []: sorted.")
    balance: bool = setting(False, "Take every class as often as the rarest.")
    deduplicate: bool = setting(True, "Keep one of equal texts; otherwise they may stand in several splits.")
    split: Literal["stratified", "grouped", "book"] = setting(
        "stratified", "How texts are held out; book: the balanced spam split of the book, by name."
    )
    val_fraction: float = setting(0.1, "Fraction of the texts to validate on.")
    test_fraction: float = setting(0.2, "Fraction of the texts to test on.")
    max_length: Optional[int] = setting(
        None, "Tokens per text; longer ones are cut. null: the longest text, within the context."
    )
    packing: Literal["packed", "padded"] = setting("packed", "packed: several texts per row; padded: one.")
    pooling: Literal["last", "first", "mean"] = setting(
        "last", "Which hidden state the head reads: the last real token's, the first's, or their mean."
    )
    bias: bool = setting(False, "Bias in the head, as in the book; transformers and peft know heads without one only.")
    prompt: str = setting("{text}", "Text around each example, such as a question; {text} stands for it.")


@dataclass(frozen=True)
class InstructConfig:
    """Conversations, and which of their tokens are learned."""

    source: Optional[str] = setting(
        None, "Conversations: .json, .jsonl, .csv, .parquet or hf:org/name. null: small synthetic skills."
    )
    style: Optional[Literal["chat", "chatml", "alpaca", "phi3"]] = setting(
        None, "Prompt style. chat: the model's own template; the others replace it. null: chat, else alpaca."
    )
    loss_on: Literal["response", "all"] = setting(
        "response", "Which tokens are learned: the responses, or prompts too."
    )
    packing: Literal["packed", "padded"] = setting("packed", "packed: several examples per row; padded: one.")
    context_length: int = setting(512, "Tokens per row; examples that do not fit are dropped and counted.")
    val_fraction: float = setting(0.05, "Fraction to validate on: the end of the source.")
    test_fraction: float = setting(0.1, "Fraction to test on: before the validation part.")
    examples: int = setting(2000, "Number of questions of the synthetic skills.")
    compare: bool = setting(True, "Let the base answer the test questions too.")


@dataclass(frozen=True)
class PreferConfig:
    """Pairs of answers, and the loss that tells them apart."""

    source: Optional[str] = setting(
        None, "Pairs of answers: .json, .jsonl, .csv, .parquet or hf:org/name. null: of the synthetic skills."
    )
    loss: Literal["dpo", "ipo", "orpo", "kto", "simpo"] = setting("dpo", "Preference loss.")
    beta: Optional[float] = setting(None, "Strength of the loss. null: the loss's usual one, 0.1 (simpo: 2).")
    margin: float = setting(1.0, "SimPO: target margin between the rewards of the two answers.")
    style: Optional[Literal["chat", "chatml", "alpaca", "phi3"]] = setting(
        None, "Prompt style. chat: the model's own template; the others replace it. null: chat, else alpaca."
    )
    packing: Literal["packed", "padded"] = setting("packed", "packed: several pairs per row; padded: one.")
    context_length: int = setting(
        512, "Tokens per row, which holds both answers of a pair; pairs that do not fit are dropped and counted."
    )
    val_fraction: float = setting(0.05, "Fraction to validate on: the end of the source.")
    test_fraction: float = setting(0.1, "Fraction to test on: before the validation part.")
    examples: int = setting(1000, "Number of pairs of the synthetic skills.")


@dataclass(frozen=True)
class Config:
    """One run."""

    run_dir: Optional[str] = setting(None, "Folder of the run. null: runs/NAME-OF-THE-PRESET.")
    task: Literal["pretrain", "classify", "instruct", "prefer"] = setting(
        "pretrain", "What is trained; the verb sets it."
    )
    seed: int = setting(0, "Random seed of initialisation, data order and dropout.")
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    instruct: InstructConfig = field(default_factory=InstructConfig)
    prefer: PreferConfig = field(default_factory=PreferConfig)

    @property
    def window(self) -> int:
        """Tokens of a row in pretraining."""
        return self.pretrain.context_length or self.model.context_length


Provenance = dict[str, str]  # "optim.lr" -> "configs/pretrain/x.yaml:12", "arch=modern", "command line" or "default"


def load_config(source: Optional[str | os.PathLike[str]] = None, *overrides: str) -> Config:
    """A preset or YAML file, changed by `"optim.lr=3e-4"` strings.

    Raises UserError that lists every unknown key, wrong type and impossible combination at once.
    """
    return resolve(source, *overrides)[0]


def resolve(
    source: Optional[str | os.PathLike[str]] = None,
    *overrides: str,
    leaves: Iterable[Leaf] = (),
    under: Iterable[Leaf] = (),
) -> tuple[Config, Provenance]:
    """`load_config`, and where each value came from. `leaves` are overrides that were read already, `under` goes below
    all others. Of a command line, `config_uses.resolve` refuses more."""
    for given in (source, *overrides):
        if not isinstance(given, str | os.PathLike | None):
            raise UserError(
                f"load_config: expected a preset's name, a YAML file and texts such as 'optim.lr=3e-4', got "
                f"{type(given).__name__}; a nested dict goes to gptjax.config.from_dict"
            )
    if source is not None and "=" in str(source) and not Path(source).exists():
        source, overrides = None, (str(source), *overrides)
    given = config_io.from_args(overrides, "load_config")
    return build([*under, *file_layers(source), *given, *leaves], _run_dir(source))


def file_layers(source: Optional[str | os.PathLike[str]]) -> list[Leaf]:
    """What a preset, a file or a run says, after those of its `base:`; of None nothing."""
    if source is None:
        return []
    layers = _file_leaves(source)
    if (Path(source) / "config.yaml").is_file():  # a run, wherever it lies now
        layers.append(Leaf("run_dir", str(source), "the run's own folder"))
    return layers


def from_yaml(text: str, name: str = "yaml") -> Config:
    """What `to_yaml` wrote, or any YAML of the schema."""
    return build(config_io.from_yaml(text, name))[0]


def from_dict(values: dict[str, Any]) -> Config:
    """A nested dict of values, as strict as a file, or what `dataclasses.asdict` made of a config."""
    return build([leaf for leaf in config_io.from_mapping(values) if leaf.key != "model._derived"])[0]


def to_yaml(cfg: Config, provenance: Optional[Provenance] = None, keys: Optional[Iterable[str]] = None) -> str:
    """Every value, so that later defaults cannot change this run; with `# where` when the provenance is given. `keys`:
    of these settings alone."""
    lines, group = [], ""
    values = flat(cfg)
    for key in values if keys is None else keys:
        value = values[key]
        head, dot, leaf = key.rpartition(".")
        if dot and head != group:
            group = head
            lines.append(f"{head}:")
        text = f"{'  ' if dot else ''}{leaf}: {yaml_value(value)}"
        lines.append(f"{text:<44} # {provenance[key]}" if provenance else text)
    return "\n".join(lines) + "\n"


def flat(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 0.001, ..} in the order of the schema."""
    out: dict[str, Any] = {}
    for item in fields(cfg):
        value = getattr(cfg, item.name)
        if item.name.startswith("_"):
            continue
        out |= flat(value, f"{prefix}{item.name}.") if is_dataclass(value) else {prefix + item.name: value}
    return out


def diff(a: Config, b: Config) -> list[str]:
    """["optim.lr: 0.001 -> 0.0003", ..]"""
    before, after = flat(a), flat(b)
    return [f"{key}: {before[key]!r} -> {after[key]!r}" for key in before if before[key] != after[key]]


@functools.cache
def schema() -> dict[str, Any]:
    """{"optim.lr": float, ..}: the type of every leaf."""
    return dict(_leaf_types(Config, ""))


def _leaf_types(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint):
            yield from _leaf_types(hint, f"{prefix}{name}.")
        elif not name.startswith("_"):
            yield prefix + name, hint


def describe() -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """(group, what it is, [(key, type, help), ..]) for `--help`; the settings of the run itself are the group ""."""
    groups = {name: hint for name, hint in get_type_hints(Config).items() if is_dataclass(hint)}
    return [
        (group, cls.__doc__.partition("\n")[0], list(_described(cls, f"{group}." if group else "")))
        for group, cls in [("", Config), *groups.items()]
    ]


def _described(cls: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    hints = get_type_hints(cls)
    for item in fields(cls):
        if not is_dataclass(hints[item.name]) and not item.name.startswith("_"):
            yield prefix + item.name, type_name(hints[item.name]), item.metadata.get("help", "")


# ---------------------------------------------------------------- layers


def presets() -> dict[str, Path]:
    """Name -> YAML file: from the checkout's configs/, or from the copy inside an installed package."""
    package = Path(__file__).parent
    root = next((path for path in (package / "_configs", package.parent / "configs") if path.is_dir()), None)
    return {path.stem: path for path in sorted(root.glob("*/*.yaml"))} if root else {}


def config_file(source: str | os.PathLike[str], near: Path = Path()) -> Path:
    """The file of a preset's name, a YAML path, or a run directory. Raises UserError with the nearest name."""
    text, path = str(source), near / source
    user_path(path)
    if path.is_dir() and (path / "config.yaml").exists():
        return path / "config.yaml"
    if path.is_file():
        return path
    known = presets()
    if text in known:
        return known[text]
    if text.endswith((".yaml", ".yml")) or "/" in text or path.exists():
        raise UserError(f"{path}: no such config file; `gptjax presets ls` lists what is here")
    hint = did_you_mean(text, known)
    raise UserError(f"no preset or file {text!r}{hint or '; presets: ' + ', '.join(known)}")


def _file_leaves(source: str | os.PathLike[str], near: Path = Path(), inside: tuple[Path, ...] = ()) -> list[Leaf]:
    """The file's leaves after those of its `base:`."""
    path = config_file(source, near)
    if path.resolve() in inside:
        raise UserError(f"{path}: its `base:` leads back to itself")
    leaves = config_io.from_yaml(config_io.read_text(path, "config"), short(path))
    if not leaves:
        raise UserError(f"{path}: the config is empty; `gptjax presets show shakespeare-char` prints one to start from")
    bases = [leaf for leaf in leaves if leaf.key == "base" and leaf.value]
    own = [leaf for leaf in leaves if leaf.key != "base"]
    if path in presets().values():
        own = [Leaf("task", path.parent.name, short(path)), *own]
    if not bases:
        return own
    if not isinstance(bases[0].value, str):
        raise UserError(f"{bases[0].where}: base: expected one preset or file, got {bases[0].value}")
    try:
        config_file(bases[0].value, path.parent)
    except UserError as error:
        raise UserError(f"{bases[0].where}: base: {error}") from error
    return [*_file_leaves(bases[0].value, path.parent, (*inside, path.resolve())), *own]


def short(path: Path) -> str:
    """The path as seen from here, where that is shorter."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _run_dir(source: Optional[str | os.PathLike[str]]) -> str:
    return f"runs/{config_file(source).stem if source is not None else 'default'}"


def build(leaves: list[Leaf], run_dir: Optional[str] = None, problems: Iterable[str] = ()) -> tuple[Config, Provenance]:
    """Type every leaf by itself, then build, then validate: all problems in one error, after those that are known."""
    problems, bad = Problems(problems), set()
    values: dict[str, Any] = {}
    where: Provenance = {}
    for key, value, place in leaves:
        if key == "mesh" and value == "auto":
            key, value = "mesh.data", -1
        if key not in schema():
            if value is None and any(name.startswith(key + ".") for name in schema()):
                continue  # a group with every line commented out
            problems.append(f"{place}: {config_io.unknown_key(key, list(schema()))}")
            continue
        try:
            values[key], where[key] = _typed(key, value), place
        except ValueError as error:
            bad.add(key)
            problems.append(f"{place}: {key}: {error}")
    problems += _later_wins(leaves, values, where)
    if run_dir and values.get("run_dir") is None:
        values["run_dir"], where["run_dir"] = run_dir, "name of the config"
    later = _CHECKED_LATER.set(True)
    try:
        cfg = _construct(Config, values, "")
    finally:
        _CHECKED_LATER.reset(later)
    provenance = _provenance(cfg, values, where)
    if not problems:
        problems += _without_effect(cfg, where)
    problems += [text for keys, text in _complaints(cfg, provenance) if not bad.intersection(keys)]
    problems.raise_if_any()
    return cfg, provenance


# (a, b): b rules a or belongs to it, so b of an earlier layer goes back to its default where a later one says a
RULED = (
    ("train.max_steps", "train.epochs"), ("data.source", "data.split"), ("data.source", "data.val_source"),
    ("data.split", "data.val_source"), ("data.val_fraction", "data.val_source"),
)  # fmt: skip
# (keys, another setting that leaves them without effect, whether its value does): refused where they are asked for
WITHOUT_EFFECT: tuple[tuple[tuple[str, ...], str, Any], ...] = (
    (("optim.momentum",), "optim.name", lambda value: value != "muon"),
    (("optim.decay_fraction",), "optim.schedule", lambda value: value != "wsd"),
    (("optim.min_lr_ratio",), "optim.schedule", lambda value: value == "constant"),
    (("optim.initial_lr_ratio",), "optim.warmup_steps", lambda value: value == 0),
    (("prefer.margin",), "prefer.loss", lambda value: value != "simpo"),
    (("sample.top_k", "sample.top_p", "sample.min_p"), "sample.temperature", lambda value: value == 0),
    (("model.rope_",), "model.position", lambda value: value != "rope"),
    (("model.window_pattern",), "model.sliding_window", lambda value: value == 0),
    (("model.embed_std",), "model.init", lambda value: value == "torch"),
    (("model.qk_gain",), "model.qk_norm", lambda value: not value),
    (("data.split", "data.val_fraction"), "data.val_source", bool),
    (("sample.ahead",), "sample.draft", lambda value: value is None),
)


def _brought(key: str) -> bool:
    """Whether a base brings the setting: all of the model but how it is computed, and the tokenizer."""
    group, _, name = key.partition(".")
    return group == "tokenizer" or (group == "model" and name not in COMPUTED)


def _later_wins(leaves: list[Leaf], values: dict[str, Any], where: Provenance) -> Iterator[str]:
    """Drops what an earlier layer said of a ruling setting, and names two that one command line sets at once."""
    layers = list(dict.fromkeys(layer(leaf.where) for leaf in leaves))
    yield from _of_the_base(layers, values, where)
    for key, ruling in RULED:
        if values.get(key) is None or values.get(ruling) is None:
            continue
        first, second = layers.index(layer(where[key])), layers.index(layer(where[ruling]))
        if first > second:
            del values[ruling], where[ruling]
        elif first == second and key == "train.max_steps" and where[key] in ("command line", "load_config"):
            both = f"{key}={values[key]} and {ruling}={values[ruling]}"
            yield f"{where[key]}: {both}: the number of steps twice; give one of them"


def _without_effect(cfg: Config, where: Provenance) -> Iterator[str]:
    """Settings of the command line that another one leaves without effect."""
    values = flat(cfg)
    for keys, ruling, rules in WITHOUT_EFFECT:
        asked = [key for key in where if key.startswith(keys) and where[key] in ("command line", "load_config")]
        if asked and rules(values[ruling]):
            value = values[ruling] if values[ruling] is not None else "null"
            yield (
                f"{where[asked[0]]}: {', '.join(asked)} would have no effect: {ruling}={value} "
                f"({where.get(ruling, 'default')})"
            )


def _of_the_base(layers: list[str], values: dict[str, Any], where: Provenance) -> Iterator[str]:
    """Drops what earlier layers than pretrain.base said of the model and the tokenizer, and names what others did. A
    file that `to_yaml` wrote holds both."""
    if values.get("pretrain.base") is None:
        return
    own = layers.index(layer(where["pretrain.base"]))
    written = [key for key in schema() if key in values and layer(where[key]) == layers[own]]
    whole = len(written) > len(schema()) // 2
    clashing = []
    for key in [key for key in values if _brought(key)]:
        at = layers.index(layer(where[key]))
        if at < own:
            del values[key], where[key]
        elif at > own or not whole:
            clashing.append(f"{key} ({where[key]})")
    if clashing:
        base = f"pretrain.base={values['pretrain.base']}"
        yield f"{base} brings its own model and tokenizer: leave out {', '.join(clashing)}"


def layer(where: str) -> str:
    """The file of "base.yaml:3"; the command line is a layer of its own."""
    return re.sub(r":\d+$", "", where)


def _construct(cls: type, values: dict[str, Any], prefix: str) -> Any:
    given = {}
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint):
            given[name] = _construct(hint, values, f"{prefix}{name}.")
        elif prefix + name in values:
            given[name] = values[prefix + name]
    return cls(**given)


def _provenance(cfg: Config, values: dict[str, Any], where: Provenance) -> Provenance:
    def origin(key: str) -> str:
        group, _, leaf = key.rpartition(".")
        if values.get(key) is None and group == "model" and leaf in ARCHS[cfg.model.arch]:
            return f"arch={cfg.model.arch}"
        return where.get(key, "default")

    return {key: origin(key) for key in schema()}


# ---------------------------------------------------------------- types


def _typed(key: str, value: Any) -> Any:
    """The value as the field's type. Text is converted, a lone value is a list of one. Raises ValueError."""
    hint = schema()[key]
    kind = _inner(hint)
    written = value if isinstance(value, str) else _shown(value)
    if value is None or (isinstance(value, str) and value.strip().lower() in ("null", "none", "~")):
        if kind is not hint:
            return None
        if value is None:
            raise ValueError(f"expected {type_name(hint)}, got null")
    listed = get_origin(kind) is tuple
    if listed:
        value = config_io.split_list(value) if isinstance(value, str) else value
        value = list(value) if isinstance(value, list | tuple) else [value]
        if all(isinstance(item, str) for item in value) and get_args(kind)[0] is str:
            return tuple(value)
    elif kind is str and isinstance(value, str):
        return value
    elif isinstance(value, str):
        value = _whole(value.strip()) if kind is int else value.strip()
    try:
        return tuple(_scalar(get_args(kind)[0], item) for item in value) if listed else _scalar(kind, value)
    except (ValueError, OverflowError):
        raise ValueError(f"expected {type_name(hint)}, got {written!r:.200}") from None


def _shown(value: Any) -> str:
    """A value for a message; of a number with thousands of digits their count."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python writes, a list inside itself
        return "something very large"
    return text if len(text) <= 200 else f"{text[:40]}.. ({len(text):,} characters)"


def _scalar(kind: Any, value: Any) -> Any:
    """The value as a bool, int, float, str or one of a Literal's words. Raises ValueError, never truncates a number."""
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if kind is bool and str(value).lower() in _BOOLEANS:
        return str(value).lower() in _BOOLEANS[::2]
    if kind is str and isinstance(value, str | int | float):
        return str(value)
    if kind is int and type(value) in (str, int):  # a bool is an int to isinstance
        return int(value)
    if kind is float and type(value) in (str, int, float):
        return float(value)
    raise ValueError


_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")  # by turns true and false


def _whole(text: str) -> str:
    """1e3 -> 1000: people write counts so."""
    return str(int(float(text))) if re.fullmatch(r"\d+(\.\d+)?e\d\d?", text) and float(text).is_integer() else text


def _inner(hint: Any) -> Any:
    """Optional[X] -> X."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    return next(part for part in get_args(hint) if part is not type(None))


def type_name(hint: Any) -> str:
    """How a person would say it: "a whole number", "gpt2, llama or modern"."""
    kind = _inner(hint)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    plural = {int: "whole numbers", float: "numbers", str: "texts"}
    if get_origin(kind) is Literal:
        *first, last = get_args(kind)
        name = f"{', '.join(first)} or {last}"
    elif get_origin(kind) is tuple:
        name = f"a list of {plural[get_args(kind)[0]]}"
    else:
        name = names[kind]
    return name if kind is hint else f"{name}, or null"


def yaml_value(value: Any) -> str:
    import yaml

    if isinstance(value, tuple):
        return f"[{', '.join(map(yaml_value, value))}]"
    style = '"' if isinstance(value, str) and not re.fullmatch(r"[\w./+@-]+", value, re.ASCII) else None
    text = yaml.safe_dump(value, default_style=style, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()


# ---------------------------------------------------------------- what must hold


def validate(cfg: Config) -> None:
    """Raises UserError with every value or combination that cannot work."""
    Problems(text for _, text in _complaints(cfg, {})).raise_if_any()


def _complaints(cfg: Config, provenance: Provenance) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys concerned, what is wrong with where it was said)."""
    for keys, text in (*_ranges(flat(cfg)), *_combinations(cfg)):
        places = dict.fromkeys(provenance[key] for key in keys if provenance.get(key, "default") != "default")
        yield keys, text + (f"  [{'; '.join(places)}]" if places else "")


# key -> (low, high, low itself allowed, high itself allowed); every number not named here is >= 0
_RANGE: dict[str, tuple[float, float, bool, bool]] = {
    **dict.fromkeys(
        (
            "model.n_layer", "model.n_head", "model.n_kv_head", "model.d_head", "model.d_model", "model.d_ff",
            "model.context_length", "model.rope_original_context",
            "tokenizer.vocab_size", "data.stride", "data.max_documents", "train.max_steps", "train.batch_size",
            "train.accumulation", "train.steps_per_call", "train.eval_every", "train.checkpoint_every",
            "train.log_every", "train.max_nonfinite", "sample.max_new_tokens", "sample.n", "sample.batch_size",
            "sample.ahead", "lora.rank", "finetune.seeds", "classify.max_length", "instruct.context_length",
            "instruct.examples", "prefer.context_length", "prefer.examples", "pretrain.context_length",
            "distributed.num_processes", "distributed.timeout_s", "distributed.heartbeat_s",
        ),
        (1, 2**31 - 1, True, True),
    ),
    **dict.fromkeys(("seed", "sample.seed"), (0, 2**32 - 1, True, True)),
    **dict.fromkeys(
        (
            "optim.lr", "optim.eps", "model.norm_eps", "model.rope_base", "model.embed_std", "model.qk_gain",
            "model.rope_factor", "model.rope_slow", "model.rope_fast", "model.rope_local_base", "model.attention_scale",
            "model.embed_gain", "train.epochs", "sample.repetition_penalty", "lora.alpha", "lora.lr_ratio",
            "prefer.beta",
        ),
        (0, math.inf, False, False),
    ),
    **dict.fromkeys(
        ("model.dropout", "lora.dropout", "sample.min_p", "optim.beta1", "optim.beta2", "optim.momentum"),
        (0, 1, True, False),
    ),
    **dict.fromkeys(("optim.initial_lr_ratio", "optim.min_lr_ratio"), (0, 1, True, True)),
    **dict.fromkeys(("optim.decay_fraction", "sample.top_p"), (0, 1, False, True)),
    **dict.fromkeys(
        (
            "data.val_fraction", "classify.val_fraction", "classify.test_fraction", "instruct.val_fraction",
            "instruct.test_fraction", "prefer.val_fraction", "prefer.test_fraction",
        ),
        (0, 1, False, False),
    ),
    **dict.fromkeys(("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context"), (-1, 2**31 - 1, True, True)),
    "data.mask_tokens": (0, 3, True, True),
    "train.keep_checkpoints": (2, 2**31 - 1, True, True),  # should the newest be damaged, there is another
}  # fmt: skip


def _ranges(values: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            low, high, with_low, with_high = _RANGE.get(key, (0, math.inf, True, False))
            if isinstance(number, int):
                high = min(high, 2**32 - 1)
            above = number >= low if with_low else number > low
            below = number <= high if with_high else number < high
            finite = isinstance(number, int) or math.isfinite(number)  # a large int is no float
            if not (finite and above and below):
                yield (key,), f"{key} ({_shown(number)}) must be {_range_name(low, high, with_low, with_high)}"


def _range_name(low: float, high: float, with_low: bool, with_high: bool) -> str:
    if high < 2**31 - 1:
        return f"from {low}{'' if with_low else ' (not itself)'} to {high}{'' if with_high else ' (not itself)'}"
    return f"{'at least' if with_low else 'above'} {low} and {'finite' if math.isinf(high) else f'at most {high}'}"


def _wrong_types(model: ModelConfig) -> Iterator[str]:
    """Of a config made by hand; what is traced has no value yet."""
    for key, hint in schema().items():
        if not key.startswith("model."):
            continue
        value, kind = getattr(model, key.removeprefix("model.")), _inner(hint)
        if hasattr(value, "aval") or (value is None and kind is not hint):
            continue
        number = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
        fits = value in get_args(kind) if get_origin(kind) is Literal else isinstance(value, number)
        if not fits or (isinstance(value, bool) and kind is not bool):
            yield f"{key}: expected {type_name(hint)}, got {value!r:.80}"


def _model_combinations(model: ModelConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    if min(model.d_model, model.n_head, model.n_kv_head) >= 1:
        if model.d_model % model.n_head and not model.d_head:
            yield (
                ("model.d_model", "model.n_head"),
                f"model.d_model ({model.d_model}) must be divisible by model.n_head ({model.n_head}): "
                f"n_head can be {_divisors(model.d_model, 64)}",
            )
        elif model.position == "rope" and model.head_dim % 2:
            yield (
                ("model.d_model", "model.n_head", "model.d_head", "model.position"),
                f"model.position=rope turns pairs: d_head, or d_model / n_head ({model.head_dim}), must be even",
            )
        if model.n_head % model.n_kv_head:
            yield (
                ("model.n_head", "model.n_kv_head"),
                f"model.n_head ({model.n_head}) must be divisible by model.n_kv_head ({model.n_kv_head}): "
                f"use one of {_divisors(model.n_head)}",
            )
    if not model.window_pattern or model.window_pattern.strip("SL"):
        yield (
            ("model.window_pattern",),
            f"model.window_pattern ({model.window_pattern!r}) must be made of S (window) and L (whole), such as SSSL",
        )
    if model.rope_fast <= model.rope_slow:
        yield (
            ("model.rope_fast", "model.rope_slow"),
            f"model.rope_fast ({model.rope_fast}) must be above model.rope_slow ({model.rope_slow})",
        )
    if model.position == "sinusoidal" and model.d_model % 2:
        yield (
            ("model.position", "model.d_model"),
            f"model.position=sinusoidal needs an even model.d_model, got {model.d_model}",
        )


def _combinations(cfg: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    model, data, optim, train = cfg.model, cfg.data, cfg.optim, cfg.train
    yield from _model_combinations(model)
    if "" in cfg.sample.stop:
        yield ("sample.stop",), "sample.stop holds an empty text, which would end everything at once: leave it out"
    if train.batch_size >= 1 and train.accumulation >= 1 and train.batch_size % train.accumulation:
        yield (
            ("train.batch_size", "train.accumulation"),
            f"train.accumulation ({train.accumulation}) must divide train.batch_size ({train.batch_size}): "
            f"use one of {_divisors(train.batch_size)}",
        )
    if train.epochs is None and optim.warmup_steps >= train.max_steps >= 1:
        yield (
            ("optim.warmup_steps", "train.max_steps"),
            f"optim.warmup_steps ({optim.warmup_steps}) must be below train.max_steps ({train.max_steps})",
        )
    several = cfg.distributed
    if several.coordinator not in (None, "auto"):
        if several.num_processes is None or several.process_id is None or ":" not in several.coordinator:
            yield (
                ("distributed.coordinator", "distributed.num_processes", "distributed.process_id"),
                f"distributed.coordinator={several.coordinator} must be HOST:PORT, and needs "
                "distributed.num_processes=N and distributed.process_id=0 to N-1",
            )
        elif several.process_id >= several.num_processes:
            yield (
                ("distributed.process_id", "distributed.num_processes"),
                f"distributed.process_id ({several.process_id}) must be below distributed.num_processes "
                f"({several.num_processes})",
            )
    mesh = {f"mesh.{name}": size for name, size in flat(cfg.mesh).items()}
    if zero := [key for key, size in mesh.items() if size == 0]:
        yield tuple(zero), f"{', '.join(zero)} must be at least 1, or -1 for what the others leave"
    if (many := [key for key, size in mesh.items() if size == -1])[1:]:
        yield tuple(many), f"only one of {', '.join(many)} can take what the others leave (-1)"
    if cfg.window >= 1 and cfg.mesh.context > 1 and cfg.window % cfg.mesh.context:
        yield (
            ("mesh.context", "model.context_length"),
            f"mesh.context ({cfg.mesh.context}) must divide model.context_length ({cfg.window})",
        )
    if cfg.window > model.context_length >= 1 and (model.vocab_size or not cfg.pretrain.base):
        yield (
            ("pretrain.context_length", "model.context_length"),
            f"pretrain.context_length ({cfg.window}) must be at most the model's ({model.context_length})",
        )
    for name in sorted(set(train.loggers) - {"tensorboard", "wandb"}):
        yield ("train.loggers",), f"train.loggers: {name!r} is unknown: use tensorboard, wandb or []"
    yield from _data_combinations(data)
    yield from _task_combinations(cfg)
    if data.mask_tokens and data.mask_tokens >= model.context_length >= 1:
        yield (
            ("data.mask_tokens", "model.context_length"),
            f"data.mask_tokens ({data.mask_tokens}) must be below model.context_length ({model.context_length})",
        )
    for key in ("run_dir", "tokenizer.name", "data.text_field", "data.cache_dir"):
        if flat(cfg)[key] == "":
            yield (key,), f"{key} is empty"


def _data_combinations(data: DataConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    if not data.source or not all(data.source):
        yield ("data.source",), "data.source is empty: name an asset, a file, a folder, or hf:org/name"
    if data.weights and len(data.weights) != len(data.source):
        yield (
            ("data.weights", "data.source"),
            f"data.weights has {len(data.weights)} numbers for {len(data.source)} sources: "
            "give one a source, or [] for their own sizes",
        )
    if data.weights and not sum(data.weights) > 0:
        yield ("data.weights",), f"data.weights ({list(data.weights)}) must not all be 0"
    local = [source for source in (*data.source, *data.val_source) if not source.startswith("hf:")]
    if data.streaming and local:
        yield ("data.streaming", "data.source"), f"data.streaming reads hf: sources only, not {', '.join(local)}"


def _task_combinations(cfg: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    if cfg.task != "pretrain" and cfg.pretrain != PretrainConfig():
        yield (
            ("pretrain.base", "pretrain.context_length"),
            f"pretrain.base and pretrain.context_length: only for gptjax pretrain, this is task={cfg.task}; "
            f"a fine-tuning starts from finetune.base",
        )
    if cfg.task == "pretrain":
        before, here = flat(Config()), flat(cfg)
        changed = [
            key
            for key in here
            if key.startswith(("finetune.", "lora.", "classify.", "instruct.", "prefer.")) and here[key] != before[key]
        ]
        if changed:
            yield tuple(changed), f"{', '.join(changed)}: only for gptjax finetune, this is task=pretrain"
        return
    if cfg.finetune.quantize != "none" and cfg.finetune.trainable != "lora":
        yield (
            ("finetune.quantize", "finetune.trainable"),
            f"finetune.quantize={cfg.finetune.quantize} needs finetune.trainable=lora: quantised weights do not move",
        )
    if cfg.finetune.save_merged is False and (cfg.finetune.trainable != "lora" or cfg.lora.init != "lora"):
        yield (
            ("finetune.save_merged", "finetune.trainable", "lora.init"),
            "finetune.save_merged=false needs finetune.trainable=lora and lora.init=lora, got "
            f"{cfg.finetune.trainable} and {cfg.lora.init}: these change weights of the base too",
        )
    if cfg.finetune.together and cfg.finetune.trainable != "lora":
        yield (
            ("finetune.together", "finetune.trainable"),
            "finetune.together=true needs finetune.trainable=lora: adapters share one base, other weights do not",
        )
    for name in ("classify", "instruct", "prefer"):
        val, test = getattr(cfg, name).val_fraction, getattr(cfg, name).test_fraction
        if val + test >= 1:
            yield (
                (f"{name}.val_fraction", f"{name}.test_fraction"),
                f"{name}.val_fraction ({val}) and {name}.test_fraction ({test}) leave nothing to train on",
            )


def _divisors(number: int, most: Optional[int] = None) -> str:
    found = [n for n in range(1, min(number, most or 1024) + 1) if number % n == 0]
    return ", ".join(map(str, found))
