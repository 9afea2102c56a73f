"""The settings: nested frozen dataclasses, each field with its help and the range of its numbers.

Frozen means hashable: a `ModelConfig` is a static argument under `jit`.
"""

import functools
import math
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, TypeVar, Union, get_args, get_origin

T = TypeVar("T")
if TYPE_CHECKING:
    Filled = Annotated[T, "null in a file; a ModelConfig that was made holds a value"]
else:
    Filled = Optional

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


@dataclass(frozen=True)
class Range:
    """What a number may be. An open end is itself left out."""

    low: float = 0
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.low_open else number >= self.low
        return above and (number < self.high if self.high_open else number <= self.high)

    def __str__(self) -> str:
        if self.high < MOST:
            low, high = (" (not itself)" * is_open for is_open in (self.low_open, self.high_open))
            return f"from {self.low}{low} to {self.high}{high}"
        most = "finite" if math.isinf(self.high) else f"at most {self.high}"
        return f"{'above' if self.low_open else 'at least'} {self.low} and {most}"


MOST = 2**31 - 1
NOT_NEGATIVE = Range(high_open=True)
POSITIVE = Range(low_open=True, high_open=True)
COUNT = Range(1, MOST)
SEED = Range(0, 2**32 - 1)
AXIS = Range(-1, MOST)  # size of a mesh axis
RATIO = Range(0, 1)  # [0, 1]
RATE = Range(0, 1, high_open=True)  # [0, 1)
SHARE = Range(0, 1, low_open=True)  # (0, 1]
FRACTION = Range(0, 1, low_open=True, high_open=True)  # (0, 1)


def setting(default: Any, text: str, range: Range = NOT_NEGATIVE, choices: tuple[str, ...] = ()) -> Any:
    """A field with its default, its line of `--help`, the range of its numbers, and the choices of a list; those of a
    single word are its type."""
    return field(default=default, metadata={"help": text, "range": range, "choices": choices})


@dataclass(frozen=True)
class Architecture:
    """What a model computes: its shape and its switches."""

    _derived: tuple[str, ...] = field(default=(), repr=False, compare=False, kw_only=True)  # names that were None
    arch: Literal["gpt2", "llama", "modern"] = setting(
        "gpt2", "Family of the model: sets every switch below that is null."
    )
    vocab_size: int = setting(0, "Rows of the token embedding. 0: the tokenizer's vocabulary size.")
    context_length: int = setting(1024, "Longest sequence in tokens, in training and generation.", COUNT)
    n_layer: int = setting(12, "Number of transformer blocks.", COUNT)
    n_head: int = setting(12, "Number of query heads per layer.", COUNT)
    n_kv_head: Filled[int] = setting(
        None, "Number of key and value heads (grouped-query attention); must divide n_head. null: n_head.", COUNT
    )
    d_head: Optional[int] = setting(None, "Width of one head. null: d_model / n_head.", COUNT)
    d_model: int = setting(768, "Width of the residual stream.", COUNT)
    d_ff: Filled[int] = setting(None, "Hidden width of the feed-forward layer. null: 4 * d_model.", COUNT)
    # switches
    position: Filled[Literal["learned", "sinusoidal", "rope", "alibi"]] = setting(
        None, "Position encoding. null: by arch."
    )
    rope_base: float = setting(10_000.0, "RoPE base frequency (theta).", POSITIVE)
    rope_scaling: Literal["none", "linear", "llama3"] = setting(
        "none", "RoPE scaling for contexts longer than in pretraining."
    )
    rope_factor: float = setting(
        1.0, "RoPE scaling: angles are divided by it; with llama3 only the low frequencies are.", POSITIVE
    )
    rope_slow: float = setting(
        1.0,
        "RoPE scaling llama3: angles with at most this many turns in rope_original_context are low frequencies.",
        POSITIVE,
    )
    rope_fast: float = setting(
        4.0, "RoPE scaling llama3: angles with at least this many turns are not scaled.", POSITIVE
    )
    rope_original_context: int = setting(8192, "RoPE scaling llama3: context length of the pretraining.", COUNT)
    rope_local_base: Optional[float] = setting(
        None, "RoPE base frequency in layers with a sliding window. null: rope_base.", POSITIVE
    )
    sliding_window: int = setting(
        0, "Tokens that a layer with a sliding window attends to, its own included. 0: no window."
    )
    window_pattern: str = setting("S", "S: a layer with the sliding window, L: one without; repeated over the layers.")
    norm: Filled[Literal["layernorm", "rmsnorm"]] = setting(None, "Normalisation. null: by arch.")
    norm_scale: Filled[bool] = setting(None, "Normalisation has a learned scale. null: by arch.")
    norm_bias: Filled[bool] = setting(None, "LayerNorm has a learned bias. null: by arch.")
    norm_eps: Filled[float] = setting(None, "Epsilon of the normalisation. null: by arch.", POSITIVE)
    norm_position: Literal["pre", "post", "both"] = setting(
        "pre", "Normalise before attention and feed-forward, after them, or both."
    )
    activation: Filled[Literal["gelu", "swiglu", "geglu", "relu2"]] = setting(
        None, "Feed-forward activation. null: by arch."
    )
    qkv_bias: Filled[bool] = setting(None, "Bias in the q, k and v projections. null: by arch.")
    bias: Filled[bool] = setting(None, "Bias in all other linear layers but the output head. null: by arch.")
    n_classes: int = setting(0, "Classes of a classification head beside the language model's. 0: no such head.")
    cls_bias: bool = setting(True, "Bias in the classification head.")
    tie_embeddings: Filled[bool] = setting(None, "The output head shares the token embedding's weights. null: by arch.")
    qk_norm: Filled[bool] = setting(None, "Normalise queries and keys (QK-norm). null: by arch.")
    qk_norm_over: Literal["head", "all"] = setting(
        "head", "QK-norm over each head by itself, or over all heads at once."
    )
    qk_gain: Filled[float] = setting(None, "Factor on queries and keys after QK-norm. null: by arch.", POSITIVE)
    attention_scale: Optional[float] = setting(
        None, "Factor on the attention logits q k^T. null: head width ** -0.5.", POSITIVE
    )
    embed_gain: float = setting(1.0, "Factor on the token embedding.", POSITIVE)
    embed_norm: Filled[bool] = setting(None, "Normalise the token embedding. null: by arch.")
    logit_softcap: Filled[float] = setting(
        None, "Output logits become cap * tanh(logits / cap). 0: off; null: by arch."
    )
    value_residual: Filled[bool] = setting(
        None, "Mix each layer's values with the first layer's, with a learned weight. null: by arch."
    )
    residual_lambdas: Filled[bool] = setting(
        None, "Learned factor on the residual stream before each block. null: by arch."
    )
    x0_lambdas: Filled[bool] = setting(
        None, "Add the embedding before each block, with a learned factor. null: by arch."
    )
    smear: Filled[bool] = setting(
        None, "Add the previous token's embedding, with a learned factor per channel. null: by arch."
    )
    # initialisation
    embed_std: float = setting(
        0.02, "Standard deviation of the token embedding at the start, under init=gpt2.", POSITIVE
    )
    zero_init_proj: Filled[bool] = setting(
        None, "Output projections of attention and feed-forward start at zero. null: by arch."
    )
    zero_init_head: Filled[bool] = setting(None, "An untied output head starts at zero. null: by arch.")

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


@dataclass(frozen=True)
class Computation:
    """How a model is initialised, trained and computed. None of it is part of a trained model: a fine-tuning takes the
    `Architecture` of its base and the `Computation` of its own config."""

    dropout: float = setting(0.0, "Dropout rate during training.", RATE)
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
    init: Literal["gpt2", "torch"] = setting("gpt2", "Initialisation of new weights, as GPT-2 or as PyTorch's layers.")


@dataclass(frozen=True)
class ModelConfig(Computation, Architecture):
    """One decoder: its architecture, and how it is computed.

    A switch left at None takes its value from `ARCHS[arch]`: after construction every switch holds a value, so printing
    the config shows all of them. `dataclasses.replace` derives anew what was left at None:
    replace(ModelConfig(d_model=32), d_model=64).d_ff is 256.

    Raises:
        UserError: every value or combination that cannot work.
    """

    def __new__(cls, *args: Any, **given: Any) -> "ModelConfig":
        self = object.__new__(cls)
        # `dataclasses.replace` gives its changes first, then a copy of every other field, `_derived` before all
        names = list(given)
        copied = names[names.index("_derived") :] if "_derived" in given else ()
        object.__setattr__(self, "_copied", copied)
        return self

    def __post_init__(self) -> None:
        for name in set(self._derived).intersection(vars(self).pop("_copied")):
            object.__setattr__(self, name, None)
        if not CHECKED_LATER.get():
            CHECKS["types"](self)
        fill = dict(ARCHS.get(self.arch, {}), n_kv_head=self.n_head, d_ff=4 * self.d_model)
        derived = [name for name in fill if getattr(self, name) is None]
        for name in derived:
            object.__setattr__(self, name, fill[name])
        object.__setattr__(self, "_derived", tuple(derived))
        if not CHECKED_LATER.get():
            CHECKS["model"](self)

    def computed_as(self, other: Computation) -> "ModelConfig":
        """This architecture, computed as `other`."""
        return replace(self, **{item.name: getattr(other, item.name) for item in fields(Computation)})


CHECKS: dict[str, Callable[[ModelConfig], None]] = {}  # `config.check`, which knows the schema, puts its own in here
CHECKED_LATER: ContextVar[bool] = ContextVar("checked later", default=False)  # with all other settings at once


@dataclass(frozen=True)
class TokenizerConfig:
    """`name` is gpt2, chars, bytes, words, bpe, wordpiece, unigram, or the path of a saved tokenizer."""

    name: str = setting(
        "chars", "gpt2, chars, bytes, words, bpe, wordpiece, unigram, or the path of a saved tokenizer."
    )
    vocab_size: int = setting(
        1024, "Vocabulary size of the tokenizers that are trained: bpe, wordpiece, unigram.", COUNT
    )


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
    val_fraction: float = setting(0.1, "Fraction of source that is held out for validation.", FRACTION)
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
        COUNT,
    )
    document_mask: bool = setting(True, "No token attends to another document.")
    mask_tokens: int = setting(
        0, "Replace 0 to 3 input tokens per window at random, against memorisation.", Range(0, 3)
    )
    max_documents: Optional[int] = setting(None, "Read at most this many documents. null: all.", COUNT)
    streaming: bool = setting(False, "Read hf: sources while training instead of downloading them first.")
    cache_dir: Optional[str] = setting(None, "Folder for prepared token files. null: the user's cache folder.")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, or Muon on the block matrices with AdamW on the rest. Rates are peaks of the schedule."""

    name: Literal["adamw", "muon"] = setting(
        "adamw", "Optimizer: AdamW, or Muon on the block matrices with AdamW on the rest."
    )
    lr: float = setting(1e-3, "Peak learning rate.", POSITIVE)
    embed_lr: Optional[float] = setting(None, "Peak learning rate of the embeddings. null: lr.")
    head_lr: Optional[float] = setting(None, "Peak learning rate of the output head. null: lr.")
    vector_lr: Optional[float] = setting(None, "Peak learning rate of norms, biases and learned factors. null: lr.")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = setting(
        "cosine", "Learning rate schedule after the warmup."
    )
    warmup_steps: int = setting(0, "Steps of linear warmup.")
    initial_lr_ratio: float = setting(
        0.0, "Learning rate at the start of the warmup, as a fraction of the peak.", RATIO
    )
    min_lr_ratio: float = setting(0.0, "Learning rate at the end of the decay, as a fraction of the peak.", RATIO)
    decay_fraction: float = setting(0.2, "Schedule wsd: last fraction of the steps, over which the rate decays.", SHARE)
    beta1: float = setting(0.9, "AdamW: decay of the first moment.", RATE)
    beta2: float = setting(0.95, "AdamW: decay of the second moment.", RATE)
    eps: float = setting(1e-8, "AdamW: added to the denominator.", POSITIVE)
    weight_decay: float = setting(0.1, "Decoupled weight decay.")
    decay: Literal["matrices", "all"] = setting("matrices", "Which parameters decay: matrices, or all.")
    clip_norm: float = setting(1.0, "Clip the gradient's global norm to this. 0: off.")
    momentum: float = setting(0.95, "Muon: momentum.", RATE)
    offload: bool = setting(False, "Keep the optimizer's state in the host's memory between updates.")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how often, how much at once."""

    max_steps: int = setting(1000, "Optimizer steps of the run.", COUNT)
    epochs: Optional[float] = setting(
        None, "Passes over the training data; sets max_steps. null: max_steps as given.", POSITIVE
    )
    batch_size: int = setting(
        12,
        "Rows per step, over all micro-batches and devices. auto, on a command line: as many as fit by estimate.",
        COUNT,
    )
    accumulation: int = setting(1, "Gradient accumulation: micro-batches per step; must divide batch_size.", COUNT)
    steps_per_call: Optional[int] = setting(
        None, "Steps in one compiled call. null: chosen by the model's size.", COUNT
    )
    eval_every: int = setting(250, "Steps between evaluations on the validation data.", COUNT)
    eval_train_batches: int = setting(
        0, "Training batches whose loss without dropout is logged at each evaluation too."
    )
    checkpoint_every: int = setting(250, "Steps between checkpoints.", COUNT)
    log_every: int = setting(10, "Steps between lines in metrics.jsonl.", COUNT)
    keep_checkpoints: int = setting(2, "Newest checkpoints to keep, at least 2.", Range(2, MOST))
    max_nonfinite: int = setting(5, "Stop after this many steps in a row with a loss that is not finite.", COUNT)
    resume: Literal["auto", "never"] = setting(
        "auto", "auto: go on where the run directory stands; never: refuse a directory that holds a run."
    )
    loggers: tuple[str, ...] = setting((), "Also log to these: tensorboard, wandb.", choices=("tensorboard", "wandb"))

    def steps(self, size: int, per_step: int) -> int:
        """max_steps, or what `epochs` over `size` tokens, texts or rows make of it, `per_step` at a time."""
        return self.max_steps if self.epochs is None else max(1, round(self.epochs * size / per_step))


@dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work; their product is the number of devices. mesh=auto: all of it over data."""

    data: int = setting(
        -1, "Data-parallel size: shards the batch, replicates the parameters. -1: all remaining devices.", AXIS
    )
    fsdp: int = setting(1, "FSDP size: shards the batch and the parameters.", AXIS)
    tensor: int = setting(1, "Tensor-parallel size: shards heads and the feed-forward layer.", AXIS)
    context: int = setting(1, "Context-parallel size: shards the tokens of a row.", AXIS)


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes as one run; the same command on every host."""

    coordinator: Optional[str] = setting(
        None, "HOST:PORT of process 0; auto: as a TPU pod or Slurm says. null: a single process."
    )
    num_processes: Optional[int] = setting(None, "Number of processes.", COUNT)
    process_id: Optional[int] = setting(None, "Number of this process, from 0.")
    timeout_s: int = setting(300, "Seconds to wait for the other processes at the start.", COUNT)
    heartbeat_s: int = setting(100, "Seconds after which a silent process counts as lost.", COUNT)


@dataclass(frozen=True)
class SampleConfig:
    """What `gptjax sample` writes, and the samples during training."""

    prompt: str = setting("\n", "Text to continue.")
    prompts: Optional[str] = setting(
        None, 'File of prompts: .jsonl with "prompt", or a text with one per line. null: prompt alone.'
    )
    out: Optional[str] = setting(None, "New .jsonl file for the continuations. null: print them.")
    batch_size: int = setting(8, "Prompts per batch.", COUNT)
    max_new_tokens: int = setting(300, "Most tokens per continuation.", COUNT)
    n: int = setting(1, "Continuations per prompt.", COUNT)
    temperature: float = setting(0.8, "Sampling temperature. 0: greedy.")
    top_k: int = setting(0, "Sample from the k most likely tokens. 0: off.")
    top_p: float = setting(1.0, "Nucleus sampling: smallest set of tokens with this total probability. 1: off.", SHARE)
    min_p: float = setting(0.0, "Drop tokens less likely than min_p times the most likely one. 0: off.", RATE)
    repetition_penalty: float = setting(1.0, "Penalty on tokens that came before. 1: off.", POSITIVE)
    stop: tuple[str, ...] = setting((), "Stop strings: a continuation ends before the first of them.")
    quantize: Literal["none", "int8", "nf4"] = setting("none", "Quantise the weights: less memory, slower on a CPU.")
    cache_dtype: Optional[Literal["float32", "bfloat16", "int8"]] = setting(
        None, "Dtype of the KV cache. null: float32 on a CPU, model.dtype elsewhere."
    )
    draft: Optional[str] = setting(
        None, "Speculative decoding: a smaller model that proposes tokens, or ngram: the text so far does. null: off."
    )
    ahead: int = setting(4, "Tokens proposed at a time, with a draft.", COUNT)
    seed: int = setting(0, "Random seed of the sampling.", SEED)


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter: which weights it is for, and its form."""

    rank: int = setting(16, "Rank of the adapter.", COUNT)
    alpha: float = setting(32.0, "Numerator of the scale; see scaling.", POSITIVE)
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
    dropout: float = setting(0.0, "Dropout on the adapter's input; adapters of embedding tables have none.", RATE)
    lr_ratio: float = setting(1.0, "LoRA+: learning rate of b divided by that of a; the paper takes 16.", POSITIVE)

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
        None, "Tokens per window. null: the model's context length, of a base at most 1024.", COUNT
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
    seeds: int = setting(1, "Number of runs, with seed, seed + 1, ..; each in its own folder, and their mean.", COUNT)
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
    val_fraction: float = setting(0.1, "Fraction of the texts to validate on.", FRACTION)
    test_fraction: float = setting(0.2, "Fraction of the texts to test on.", FRACTION)
    max_length: Optional[int] = setting(
        None, "Tokens per text; longer ones are cut. null: the longest text, within the context.", COUNT
    )
    packing: Literal["packed", "padded"] = setting("packed", "packed: several texts per row; padded: one.")
    pooling: Literal["last", "first", "mean"] = setting(
        "last", "Which hidden state the head reads: the last real token's, the first's, or their mean."
    )
    bias: bool = setting(False, "Bias in the head, as in the book; transformers and peft know heads without one only.")
    prompt: str = setting("{text}", "Text around each example, such as a question; {text} stands for it.")


ChatStyle = Literal["chat", "chatml", "alpaca", "phi3"]  # what they write stands in tokenizers/chat.py


@dataclass(frozen=True)
class InstructConfig:
    """Conversations, and which of their tokens are learned."""

    source: Optional[str] = setting(
        None, "Conversations: .json, .jsonl, .csv, .parquet or hf:org/name. null: small synthetic skills."
    )
    style: Optional[ChatStyle] = setting(
        None, "Prompt style. chat: the model's own template; the others replace it. null: chat, else alpaca."
    )
    loss_on: Literal["response", "all"] = setting(
        "response", "Which tokens are learned: the responses, or prompts too."
    )
    packing: Literal["packed", "padded"] = setting("packed", "packed: several examples per row; padded: one.")
    context_length: int = setting(512, "Tokens per row; examples that do not fit are dropped and counted.", COUNT)
    val_fraction: float = setting(0.05, "Fraction to validate on: the end of the source.", FRACTION)
    test_fraction: float = setting(0.1, "Fraction to test on: before the validation part.", FRACTION)
    examples: int = setting(2000, "Number of questions of the synthetic skills.", COUNT)
    compare: bool = setting(True, "Let the base answer the test questions too.")


@dataclass(frozen=True)
class PreferConfig:
    """Pairs of answers, and the loss that tells them apart."""

    source: Optional[str] = setting(
        None, "Pairs of answers: .json, .jsonl, .csv, .parquet or hf:org/name. null: of the synthetic skills."
    )
    loss: Literal["dpo", "ipo", "orpo", "kto", "simpo"] = setting("dpo", "Preference loss.")
    beta: Optional[float] = setting(None, "Strength of the loss. null: the loss's usual one, 0.1 (simpo: 2).", POSITIVE)
    margin: float = setting(1.0, "SimPO: target margin between the rewards of the two answers.")
    style: Optional[ChatStyle] = setting(
        None, "Prompt style. chat: the model's own template; the others replace it. null: chat, else alpaca."
    )
    packing: Literal["packed", "padded"] = setting("packed", "packed: several pairs per row; padded: one.")
    context_length: int = setting(
        512, "Tokens per row, which holds both answers of a pair; pairs that do not fit are dropped and counted.", COUNT
    )
    val_fraction: float = setting(0.05, "Fraction to validate on: the end of the source.", FRACTION)
    test_fraction: float = setting(0.1, "Fraction to test on: before the validation part.", FRACTION)
    examples: int = setting(1000, "Number of pairs of the synthetic skills.", COUNT)


@dataclass(frozen=True)
class Config:
    """One run."""

    run_dir: Optional[str] = setting(None, "Folder of the run. null: runs/NAME-OF-THE-PRESET.")
    task: Literal["pretrain", "classify", "instruct", "prefer"] = setting(
        "pretrain", "What is trained; the verb sets it."
    )
    seed: int = setting(0, "Random seed of initialisation, data order and dropout.", SEED)
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


# ---------------------------------------------------------------- every setting by its key


def flat(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 0.001, ..} in the order of the schema."""
    out: dict[str, Any] = {}
    for item in fields(cfg):
        value = getattr(cfg, item.name)
        if item.name.startswith("_"):
            continue
        out |= flat(value, f"{prefix}{item.name}.") if is_dataclass(value) else {prefix + item.name: value}
    return out


@functools.cache
def leaf_fields() -> dict[str, Field]:
    """{"optim.lr": its field, ..}"""
    return dict(_walk(Config, ""))


def _walk(cls: type, prefix: str) -> Iterator[tuple[str, Field]]:
    for item in fields(cls):
        if isinstance(item.type, type) and is_dataclass(item.type):
            yield from _walk(item.type, f"{prefix}{item.name}.")
        elif not item.name.startswith("_"):
            yield prefix + item.name, item


@functools.cache
def schema() -> dict[str, Any]:
    """{"optim.lr": float, ..}: the type of every leaf."""
    return {key: item.type for key, item in leaf_fields().items()}


def describe() -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """(group, what it is, [(key, type, help), ..]) for `--help`; the settings of the run itself are the group ""."""
    groups = {"": Config} | {item.name: item.type for item in fields(Config) if is_dataclass(item.type)}
    rows: dict[str, list[tuple[str, str, str]]] = {group: [] for group in groups}
    for key, item in leaf_fields().items():
        rows[key.rpartition(".")[0]].append((key, type_name(item.type), item.metadata["help"]))
    return [(group, (cls.__doc__ or "").partition("\n")[0], rows[group]) for group, cls in groups.items()]


def without_null(hint: Any) -> Any:
    """Optional[X] -> X."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    return next(part for part in get_args(hint) if part is not type(None))


def type_name(hint: Any) -> str:
    """How a person would say it: "a whole number", "gpt2, llama or modern"."""
    kind = without_null(hint)
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
