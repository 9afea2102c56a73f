"""The configuration: nested frozen dataclasses, and the layers that fill them.

default < arch < preset < YAML (each may name its `base:`) < `a.b=c` on the command line.
Frozen means hashable: a `ModelConfig` is a static argument under `jit`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Optional

# What each `arch` switches on. A switch that is given explicitly wins over this table.
ARCHS: dict[str, dict[str, Any]] = {
    "gpt2": dict(
        position="learned", norm="layernorm", norm_scale=True, norm_bias=True, activation="gelu",
        qkv_bias=True, bias=True, tie_embeddings=True, qk_norm=False, qk_gain=1.0, embed_norm=False,
        logit_softcap=0.0, value_residual=False, residual_lambdas=False, x0_lambdas=False,
        zero_init_proj=False, zero_init_head=False, norm_eps=1e-5,
    ),
    "llama": dict(
        position="rope", norm="rmsnorm", norm_scale=True, norm_bias=False, activation="swiglu",
        qkv_bias=False, bias=False, tie_embeddings=False, qk_norm=False, qk_gain=1.0, embed_norm=False,
        logit_softcap=0.0, value_residual=False, residual_lambdas=False, x0_lambdas=False,
        zero_init_proj=False, zero_init_head=False, norm_eps=1e-5,
    ),
    "modern": dict(
        position="rope", norm="rmsnorm", norm_scale=False, norm_bias=False, activation="relu2",
        qkv_bias=False, bias=False, tie_embeddings=False, qk_norm=True, qk_gain=1.2, embed_norm=True,
        logit_softcap=15.0, value_residual=True, residual_lambdas=True, x0_lambdas=True,
        zero_init_proj=True, zero_init_head=True, norm_eps=1e-6,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Shape and switches of one decoder. A switch left at None takes its value from `ARCHS[arch]`.

    After construction every switch holds a value, so printing the config shows all of them.
    """

    arch: Literal["gpt2", "llama", "modern"] = "gpt2"
    vocab_size: int = 0  # 0: the tokenizer's
    context_length: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: Optional[int] = None  # None: n_head
    d_model: int = 768
    d_ff: Optional[int] = None  # None: 4 * d_model
    # switches
    position: Optional[Literal["learned", "sinusoidal", "rope", "alibi"]] = None
    rope_base: float = 10_000.0
    norm: Optional[Literal["layernorm", "rmsnorm"]] = None
    norm_scale: Optional[bool] = None  # learned scale
    norm_bias: Optional[bool] = None  # learned shift, layernorm only
    norm_eps: Optional[float] = None
    activation: Optional[Literal["gelu", "swiglu", "relu2"]] = None
    qkv_bias: Optional[bool] = None
    bias: Optional[bool] = None  # every linear but q, k, v and the head
    tie_embeddings: Optional[bool] = None
    qk_norm: Optional[bool] = None
    qk_gain: Optional[float] = None  # q and k are multiplied by it after their norm
    embed_norm: Optional[bool] = None  # norm right after the embedding
    logit_softcap: Optional[float] = None  # 0: off; else cap * tanh(logits / cap)
    value_residual: Optional[bool] = None  # v = (1 - w) v + w v_of_first_layer, w learned a layer
    residual_lambdas: Optional[bool] = None  # x = w x before each block, w learned
    x0_lambdas: Optional[bool] = None  # x = x + w x_of_embedding before each block, w learned
    # initialisation
    init: Literal["gpt2", "torch"] = "gpt2"
    embed_std: float = 0.02  # token embedding under init=gpt2
    zero_init_proj: Optional[bool] = None  # attention and feed-forward outputs start at 0
    zero_init_head: Optional[bool] = None  # untied head starts at 0
    dropout: float = 0.0
    # how it is computed, not what
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the products; params stay float32
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass computes again
    unroll: Optional[bool] = None  # blocks as one unrolled program; None: yes on CPU, no elsewhere

    def __post_init__(self) -> None:
        fill = dict(ARCHS.get(self.arch, {}), n_kv_head=self.n_head, d_ff=4 * self.d_model)
        for name, value in fill.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head


@dataclass(frozen=True)
class TokenizerConfig:
    """`name` is gpt2, chars, bytes, words, bpe, wordpiece, unigram, or the path of a saved tokenizer."""

    name: str = "chars"
    vocab_size: int = 1024  # for those that are trained: bpe, wordpiece, unigram


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from, and in which order its windows are read."""

    source: tuple[str, ...] = ("shakespeare",)  # asset, file, folder, or hf:org/name
    text_field: str = "text"  # of .jsonl, .csv, .parquet and hf: rows
    weights: tuple[float, ...] = ()  # one a source; empty: in proportion to its tokens
    temperature: float = 1.0  # sources are drawn with p_i ~ w_i ** temperature
    val_source: tuple[str, ...] = ()  # empty: held out of `source`
    val_fraction: float = 0.1
    split: Literal["auto", "document", "file", "tail"] = "auto"  # auto: document where there are 10 or more
    order: Literal["shuffle", "sequential"] = "shuffle"
    stride: Optional[int] = None  # None: context_length, with a random offset an epoch when shuffled
    document_mask: bool = True  # no token sees another document
    mask_tokens: int = 0  # 0-3 input tokens a window replaced at random, against memorisation
    max_documents: Optional[int] = None
    streaming: bool = False  # hf: only
    cache_dir: Optional[str] = None  # None: the user's cache folder


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, or Muon on the block matrices with AdamW on the rest. Rates are peaks of the schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    embed_lr: Optional[float] = None  # None: lr
    head_lr: Optional[float] = None  # None: lr
    vector_lr: Optional[float] = None  # norms, biases, lambdas; None: lr
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    initial_lr_ratio: float = 0.0  # where the warmup starts, as a part of the peak
    min_lr_ratio: float = 0.0  # where the decay ends, as a part of the peak
    decay_fraction: float = 0.2  # wsd: the last part of the steps that decays
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Literal["matrices", "all"] = "matrices"
    clip_norm: float = 1.0  # 0: off
    momentum: float = 0.95  # muon


@dataclass(frozen=True)
class TrainConfig:
    max_steps: int = 1000
    epochs: Optional[float] = None  # sets max_steps from the data
    batch_size: int = 12  # windows a step, over all micro-batches
    accumulation: int = 1  # micro-batches a step; must divide batch_size
    steps_per_call: Optional[int] = None  # steps inside one compiled call; None: chosen by size
    eval_every: int = 250
    checkpoint_every: int = 250
    log_every: int = 10
    keep_checkpoints: int = 2
    max_nonfinite: int = 5  # skipped steps in a row before the run stops
    resume: Literal["auto", "never"] = "auto"
    loggers: tuple[str, ...] = ()  # tensorboard, wandb


@dataclass(frozen=True)
class SampleConfig:
    prompt: str = "\n"
    max_new_tokens: int = 300
    n: int = 1
    temperature: float = 0.8  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """One run."""

    run_dir: Optional[str] = None  # None: runs/NAME-OF-THE-PRESET
    seed: int = 0
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
