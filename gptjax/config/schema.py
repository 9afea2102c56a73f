"""Defines the settings of a run as nested frozen dataclasses. Each field of the dataclasses has a help text and a valid
range.

The config dataclasses are frozen and therefore hashable, so that a `ModelConfig` can be a static argument of a jitted
function.
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
    Filled = Annotated[T, "may be null in a file; never None in a constructed ModelConfig"]
else:
    Filled = Optional

# `ARCHS` maps each value of model.arch to the default values of the settings of the architecture. A value that the user
# sets overrides the default in `ARCHS`.
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
    """The interval of valid values of a numeric setting. The interval includes both bounds, unless `low_open` or
    `high_open` is True."""

    low: float = 0
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.low_open else number >= self.low
        return above and (number < self.high if self.high_open else number <= self.high)

    def __str__(self) -> str:
        if self.high < MOST:
            low, high = (" (exclusive)" * is_open for is_open in (self.low_open, self.high_open))
            return f"from {self.low}{low} to {self.high}{high}"
        most = "finite" if math.isinf(self.high) else f"at most {self.high}"
        return f"{'above' if self.low_open else 'at least'} {self.low} and {most}"


MOST = 2**31 - 1
ANY = Range(-math.inf, low_open=True, high_open=True)
NOT_NEGATIVE = Range(high_open=True)
POSITIVE = Range(low_open=True, high_open=True)
COUNT = Range(1, MOST)
SEED = Range(0, 2**32 - 1)
AXIS = Range(-1, MOST)  # The size of a mesh axis; -1 stands for all remaining devices.
RATIO = Range(0, 1)  # [0, 1]
RATE = Range(0, 1, high_open=True)  # [0, 1)
SHARE = Range(0, 1, low_open=True)  # (0, 1]
FRACTION = Range(0, 1, low_open=True, high_open=True)  # (0, 1)

# STYLE, PACKING, VAL_FRACTION and TEST_FRACTION are the help texts of settings that several fine-tuning tasks have; {}
# stands for an item of the task's data, such as "example".
STYLE = (
    "Prompt style. chat: the model's own chat template; chatml, alpaca and phi3: a fixed template instead of it."
    " null: chat if the model has a template, else alpaca."
)
PACKING = "Layout of the rows. packed: several {0}s per row; padded: one {0} per row."
VAL_FRACTION = "Fraction of the {}s to hold out for validation, from the end of the source."
TEST_FRACTION = "Fraction of the {0}s to hold out for testing, from just before the validation {0}s."


def setting(default: Any, text: str, range: Range = NOT_NEGATIVE, choices: tuple[str, ...] = ()) -> Any:
    """Returns a dataclass field with a default value, a `--help` text, a valid range and, for a list, the allowed
    items.

    A setting whose value is a single string declares its allowed values in the type of the field, as a `Literal`.
    """
    return field(default=default, metadata={"help": text, "range": range, "choices": choices})


@dataclass(frozen=True)
class Architecture:
    """The architecture of a model: its sizes, and its variants, such as the activation function."""

    _derived: tuple[str, ...] = field(
        default=(), repr=False, compare=False, kw_only=True
    )  # names of the fields that were None at construction and were set to a default
    arch: Literal["gpt2", "llama", "modern"] = setting(
        "gpt2", "Model family, which determines the defaults of settings such as position, norm and activation."
    )
    vocab_size: int = setting(
        0, "Vocabulary size: number of rows of the token embedding. 0: the vocabulary size of the tokenizer."
    )
    context_length: int = setting(1024, "Maximum sequence length in tokens, for training and generation.", COUNT)
    n_layer: int = setting(12, "Number of transformer blocks.", COUNT)
    n_head: int = setting(12, "Number of query heads per layer.", COUNT)
    n_kv_head: Filled[int] = setting(
        None,
        "Number of key-value heads (grouped-query attention); must divide n_head. null: n_head (multi-head attention).",
        COUNT,
    )
    d_head: Optional[int] = setting(None, "Head dimension. null: d_model / n_head.", COUNT)
    d_model: int = setting(768, "Width of the residual stream.", COUNT)
    d_ff: Filled[int] = setting(None, "Hidden width of the feed-forward layer. null: 4 * d_model.", COUNT)
    # switches
    position: Filled[Literal["learned", "sinusoidal", "rope", "alibi"]] = setting(
        None, "Positional encoding. null: determined by model.arch."
    )
    rope_base: float = setting(10_000.0, "RoPE base frequency (theta).", POSITIVE)
    rope_scaling: Literal["none", "linear", "llama3"] = setting(
        "none", "RoPE scaling method, for contexts that are longer than in pretraining."
    )
    rope_factor: float = setting(
        1.0,
        "RoPE scaling factor. With rope_scaling=linear, all rotation angles are divided by this factor; with llama3,"
        " only the angles of low frequencies are divided by this factor.",
        POSITIVE,
    )
    rope_slow: float = setting(
        1.0,
        "With rope_scaling=llama3, RoPE frequencies that make at most this many rotations within"
        " rope_original_context tokens count as low frequencies (low_freq_factor in Hugging Face).",
        POSITIVE,
    )
    rope_fast: float = setting(
        4.0,
        "With rope_scaling=llama3, RoPE frequencies that make at least this many rotations within"
        " rope_original_context tokens are not scaled (high_freq_factor in Hugging Face).",
        POSITIVE,
    )
    rope_original_context: int = setting(
        8192, "With rope_scaling=llama3, the context length of the original pretraining, in tokens.", COUNT
    )
    rope_local_base: Optional[float] = setting(
        None, "RoPE base frequency of the layers with sliding-window attention. null: rope_base.", POSITIVE
    )
    sliding_window: int = setting(
        0,
        "Sliding-window attention: number of tokens that a query attends to, including its own token. 0: full"
        " attention.",
    )
    window_pattern: str = setting(
        "S",
        "Attention type of each layer, one letter per layer; the string is repeated until it covers all layers."
        " Letter S: attend to sliding_window tokens; letter L: attend to the full context.",
    )
    norm: Filled[Literal["layernorm", "rmsnorm"]] = setting(
        None, "Normalisation layer. null: determined by model.arch."
    )
    norm_scale: Filled[bool] = setting(None, "Learn a scale in normalisation layers. null: determined by model.arch.")
    norm_bias: Filled[bool] = setting(None, "Learn a bias in LayerNorm. null: determined by model.arch.")
    norm_eps: Filled[float] = setting(
        None, "Epsilon of normalisation layers. null: determined by model.arch.", POSITIVE
    )
    norm_position: Literal["pre", "post", "both"] = setting(
        "pre",
        "Normalise the input of attention and feed-forward layers (pre), the output of these layers (post), or both.",
    )
    activation: Filled[Literal["gelu", "swiglu", "geglu", "relu2"]] = setting(
        None, "Activation function of the feed-forward layer. null: determined by model.arch."
    )
    qkv_bias: Filled[bool] = setting(
        None, "Learn a bias in the query, key and value projections. null: determined by model.arch."
    )
    bias: Filled[bool] = setting(
        None,
        "Learn a bias in all linear layers except the query, key and value projections and the output heads. null:"
        " the default of arch.",
    )
    n_classes: int = setting(0, "Number of classes of an additional classification head. 0: no classification head.")
    cls_bias: bool = setting(True, "Learn a bias in the classification head.")
    tie_embeddings: Filled[bool] = setting(
        None,
        "Share weights between the token embedding and the output head (weight tying). null: determined by model.arch.",
    )
    qk_norm: Filled[bool] = setting(None, "Normalise queries and keys (QK-norm). null: determined by model.arch.")
    qk_norm_over: Literal["head", "all"] = setting(
        "head",
        "Axes over which QK-norm normalises queries and keys. head: each head separately; all: all heads jointly.",
    )
    qk_gain: Filled[float] = setting(
        None, "Multiplier of queries and keys after QK-norm. null: determined by model.arch.", POSITIVE
    )
    attention_scale: Optional[float] = setting(
        None, "Multiplier of the attention logits q k^T. null: head_dim ** -0.5.", POSITIVE
    )
    embed_gain: float = setting(1.0, "Multiplier of the token embedding.", POSITIVE)
    embed_norm: Filled[bool] = setting(None, "Normalise the token embedding. null: determined by model.arch.")
    logit_softcap: Filled[float] = setting(
        None,
        "Soft cap of the output logits, which become cap * tanh(logits / cap). 0: off; null: determined by model.arch.",
    )
    value_residual: Filled[bool] = setting(
        None,
        "Value residual: mix the attention values of each layer with the attention values of the first layer, with a"
        " learned weight. null: determined by model.arch.",
    )
    residual_lambdas: Filled[bool] = setting(
        None, "Multiply the residual stream by a learned factor before each block. null: determined by model.arch."
    )
    x0_lambdas: Filled[bool] = setting(
        None,
        "Before each block, add the token embedding, multiplied by a learned factor, to the residual stream. null:"
        " the default of arch.",
    )
    smear: Filled[bool] = setting(
        None,
        "Add the embedding of the previous token, multiplied by a learned factor per channel, to each token's"
        " embedding. null: determined by model.arch.",
    )
    # initialisation
    embed_std: float = setting(
        0.02, "Standard deviation of the token embedding at initialisation; used only with init=gpt2.", POSITIVE
    )
    zero_init_proj: Filled[bool] = setting(
        None,
        "Initialise the output projections of attention and feed-forward layers to zero."
        " null: determined by model.arch.",
    )
    zero_init_head: Filled[bool] = setting(
        None, "Initialise an untied output head to zero. null: determined by model.arch."
    )

    @property
    def head_dim(self) -> int:
        return self.d_head or self.d_model // self.n_head

    @property
    def gated(self) -> bool:
        """True if the feed-forward layer is gated (GLU), that is, if it has a gate projection in addition to its up
        projection."""
        return self.activation in ("swiglu", "geglu")

    @property
    def windows(self) -> tuple[int, ...]:
        """Sliding-window size of each layer in tokens, including the query's own token; 0 stands for full attention."""
        pattern = self.window_pattern * self.n_layer
        return tuple(self.sliding_window if mark == "S" else 0 for mark in pattern[: self.n_layer])


@dataclass(frozen=True)
class Computation:
    """Settings of a model besides its architecture: dropout, dtype, precision, rematerialisation and initialisation.

    The settings in `Computation` are not stored with a trained model: fine-tuning takes the `Architecture` from the
    base model, but the `Computation` from the config of the fine-tuning run.
    """

    dropout: float = setting(0.0, "Dropout rate during training.", RATE)
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "Compute dtype of the model; parameters are stored in float32."
    )
    precision: Literal["default", "high", "highest"] = setting(
        "default",
        "Precision of float32 matrix multiplications. default: TF32 on a GPU (3 decimal digits), one bfloat16 pass on"
        " a TPU (2 to 3 digits); high: TF32 on a GPU, three bfloat16 passes on a TPU; highest: float32. The precision"
        " has no effect with dtype=bfloat16, or on a CPU, which always computes in float32.",
    )
    remat: Literal["none", "dots", "full", "offload"] = setting(
        "none",
        "Rematerialisation (gradient checkpointing): recompute activations in the backward pass to save memory."
        " none: keep all activations; dots: keep the results of matrix multiplications; full: keep only the input of"
        " each block; offload: keep the input of each block in host memory.",
    )
    unroll: Optional[bool] = setting(
        None,
        "Unroll the transformer blocks in the compiled program instead of scanning over the blocks. null: unroll"
        " small models on a CPU, and up to 12 blocks at a time on a GPU.",
    )
    init: Literal["gpt2", "torch"] = setting(
        "gpt2",
        "Weight initialisation. gpt2: the initialisation of GPT-2; torch: the default initialisation of PyTorch's"
        " layers.",
    )


@dataclass(frozen=True)
class ModelConfig(Computation, Architecture):
    """A decoder-only transformer: its architecture, and settings such as dropout, dtype and initialisation.

    At construction of a `ModelConfig`, each field in `ARCHS` that is None is set to the value in `ARCHS[arch]`. If
    n_kv_head is None, n_kv_head is set to n_head; if d_ff is None, d_ff is set to 4 * d_model. A printed `ModelConfig`
    shows the default values that were set at construction. `dataclasses.replace` computes the defaults of fields that
    were None again: for example, replace(ModelConfig(d_model=32), d_model=64).d_ff is 256.

    Raises:
        UserError: some values or combinations of values are invalid; the message lists all of them.
    """

    def __new__(cls, *args: Any, **given: Any) -> "ModelConfig":
        self = object.__new__(cls)
        # `dataclasses.replace` passes two groups of fields to the constructor: first the fields that the caller
        # changes, then the fields that are copied from the old config. `_derived` is the first of the fields that
        # `dataclasses.replace` copies from the old config.
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
        """Returns this config with the `Computation` fields of `other`."""
        return replace(self, **{item.name: getattr(other, item.name) for item in fields(Computation)})


# `CHECKS` holds functions that check a model config; the module `config.check` adds these functions to `CHECKS` when
# `config.check` is imported.
CHECKS: dict[str, Callable[[ModelConfig], None]] = {}
# `CHECKED_LATER` is True while `load.build` constructs a config: ModelConfig then skips its checks, because
# `load.build` runs these checks later.
CHECKED_LATER: ContextVar[bool] = ContextVar("checked later", default=False)


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: gpt2, chars, bytes, words, bpe, wordpiece, unigram, or the path of a saved tokenizer."""

    name: str = setting(
        "chars", "Tokenizer: gpt2, chars, bytes, words, bpe, wordpiece, unigram, or the path of a saved tokenizer."
    )
    vocab_size: int = setting(
        1024, "Vocabulary size of a bpe, wordpiece or unigram tokenizer, which is trained on the training text.", COUNT
    )


@dataclass(frozen=True)
class DataConfig:
    """The training and validation text, and the order in which the text is read."""

    source: tuple[str, ...] = setting(
        ("shakespeare",),
        "Training text: files, folders, datasets on the Hugging Face Hub (hf:org/name), or the names of"
        " built-in texts, such as shakespeare and python-docs.",
    )
    text_field: str = setting("text", "Name of the text field in .jsonl, .csv, .parquet and hf: sources.")
    weights: tuple[float, ...] = setting(
        (), "Sampling weight of each data source. []: the weight is proportional to the number of tokens of the source."
    )
    temperature: float = setting(
        1.0,
        "Exponent of the sampling weights: data source i is sampled in proportion to weight_i ** temperature, so that"
        " values below 1 flatten the distribution over the sources.",
    )
    val_source: tuple[str, ...] = setting((), "Sources of the validation text. []: hold out a part of data.source.")
    val_fraction: float = setting(0.1, "Fraction of data.source to hold out for validation.", FRACTION)
    split: Literal["auto", "document", "file", "tail"] = setting(
        "auto",
        "Unit in which validation text is held out from each source: whole documents, whole files, or the tail of"
        " each file. auto: document if the source has at least 10 documents, otherwise tail.",
    )
    order: Literal["shuffle", "sequential"] = setting(
        "shuffle",
        "Order of the training windows; a window is a sequence of consecutive tokens, which forms one row of a batch.",
    )
    stride: Optional[int] = setting(
        None,
        "Number of tokens between the starts of consecutive training windows. null: the length of a window, and with"
        " order=shuffle, each epoch starts at a random offset.",
        COUNT,
    )
    document_mask: bool = setting(
        True, "Document masking: tokens do not attend to tokens of other documents in the same window."
    )
    mask_tokens: int = setting(
        0,
        "Number of input tokens per window, at most 3, that are replaced with other random tokens, to reduce"
        " memorisation.",
        Range(0, 3),
    )
    max_documents: Optional[int] = setting(
        None, "Maximum number of documents to read per source. null: all documents.", COUNT
    )
    streaming: bool = setting(
        False,
        "Stream datasets of the Hugging Face Hub (hf: sources) row by row, up to max_documents rows, instead of"
        " downloading whole datasets.",
    )
    cache_dir: Optional[str] = setting(
        None, "Folder in which the tokenised data is cached. null: the user's cache folder."
    )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its hyperparameters.

    lr, embed_lr, head_lr and vector_lr are peak learning rates, which the learning-rate schedule scales at each step.
    """

    name: Literal["adamw", "muon"] = setting(
        "adamw", "Optimizer: AdamW, or Muon for the matrices of the blocks and AdamW for the other parameters."
    )
    lr: float = setting(1e-3, "Peak learning rate.", POSITIVE)
    embed_lr: Optional[float] = setting(None, "Peak learning rate of the embeddings. null: lr.")
    head_lr: Optional[float] = setting(None, "Peak learning rate of the output head. null: lr.")
    vector_lr: Optional[float] = setting(
        None,
        "Peak learning rate of normalisation scales, biases and learned factors such as residual_lambdas. null: lr.",
    )
    schedule: Literal["cosine", "wsd", "linear", "constant"] = setting(
        "cosine",
        "Learning-rate schedule after the warmup: cosine decay, wsd (warmup-stable-decay: constant, then a linear"
        " decay in the last steps), linear decay, or constant.",
    )
    warmup_steps: int = setting(0, "Number of linear warmup steps.")
    initial_lr_ratio: float = setting(
        0.0, "Learning rate at the start of the warmup, as a fraction of the peak learning rate.", RATIO
    )
    min_lr_ratio: float = setting(
        0.0, "Learning rate at the end of the decay, as a fraction of the peak learning rate.", RATIO
    )
    decay_fraction: float = setting(
        0.2,
        "With schedule=wsd, the fraction of all steps, at the end of training, in which the learning rate decays.",
        SHARE,
    )
    beta1: float = setting(0.9, "AdamW: decay rate of the first moment.", RATE)
    beta2: float = setting(0.95, "AdamW: decay rate of the second moment.", RATE)
    eps: float = setting(1e-8, "AdamW: epsilon added to the denominator.", POSITIVE)
    weight_decay: float = setting(0.1, "Weight decay coefficient, decoupled from the gradient as in AdamW.")
    weight_decay_schedule: Literal["constant", "lr", "linear", "cosine"] = setting(
        "constant",
        "Schedule of the weight decay coefficient. constant: weight_decay at all steps; lr: proportional to the"
        " learning rate (AdamC, arXiv:2506.02285); linear, cosine: decay to 0 at the last step.",
    )
    decay: Literal["matrices", "all"] = setting(
        "matrices", "Parameters to which weight decay applies: matrices only, or all parameters."
    )
    cautious_decay: bool = setting(
        False,
        "Cautious weight decay: apply weight decay only to weights that the optimizer's update moves towards 0"
        " (arXiv:2510.12402).",
    )
    cautious: bool = setting(
        False,
        "Cautious optimizer: set elements of the update to 0 if their sign differs from the sign of the gradient, and"
        " scale up the remaining elements (arXiv:2411.16085).",
    )
    clip_norm: float = setting(1.0, "Maximum global gradient norm (gradient clipping). 0: off.")
    momentum: float = setting(0.95, "Momentum of Muon.", RATE)
    nesterov: bool = setting(True, "Nesterov momentum in Muon.")
    preconditioning: Literal["frobenius", "spectral", "aol", "schatten"] = setting(
        "frobenius",
        "Scaling that Muon applies to a matrix before orthogonalising the matrix: by its Frobenius norm, by its"
        " spectral norm (slow), per row (aol, arXiv:2512.04632) or by its Schatten-4 norm (arXiv:2506.10935).",
    )
    muon_scale: Literal["rms", "width"] = setting(
        "rms",
        "Scale of Muon's updates of a matrix [in, out]. rms: 0.2 * sqrt(max(in, out)), which gives updates the root"
        " mean square of AdamW's updates (arXiv:2502.16982); width: sqrt(max(1, out / in)), which needs higher"
        " learning rates.",
    )
    normuon: float = setting(
        0.0,
        "NorMuon: decay rate of the second moment of each output neuron, such as 0.95; this second moment normalises"
        " Muon's updates (arXiv:2510.05491). 0: off.",
        RATE,
    )
    offload: bool = setting(False, "Offload the optimizer state to host memory between updates.")

    @property
    def open_ended(self) -> bool:
        """True if neither the learning rate nor the weight decay depends on the total number of training steps."""
        fixed = self.weight_decay == 0 or self.weight_decay_schedule in ("constant", "lr")
        return self.schedule == "constant" and fixed


@dataclass(frozen=True)
class TrainConfig:
    """The training loop: number of steps, batch size, evaluation, checkpoints and logging."""

    max_steps: int = setting(1000, "Number of optimizer steps.", COUNT)
    epochs: Optional[float] = setting(
        None,
        "Number of passes over the training data (epochs), from which the number of steps is computed. null: use"
        " max_steps.",
        POSITIVE,
    )
    batch_size: int = setting(
        12,
        "Global batch size: number of rows per optimizer step, over all micro-batches and devices. auto (command line"
        " only): as many rows as are estimated to fit in device memory.",
        COUNT,
    )
    accumulation: int = setting(
        1, "Gradient accumulation: number of micro-batches per optimizer step; must divide batch_size.", COUNT
    )
    steps_per_call: Optional[int] = setting(
        None,
        "Number of optimizer steps per call of the compiled training step. null: up to 10, but 1 for models with"
        " more than 20 million parameters.",
        COUNT,
    )
    eval_every: int = setting(250, "Number of steps between evaluations on the validation data.", COUNT)
    eval_train_batches: int = setting(
        0,
        "Number of training batches on which each evaluation also computes the training loss, without dropout. 0: off.",
    )
    patience: int = setting(
        0,
        "Early stopping: end training after this many consecutive evaluations without a lower validation loss. 0: off.",
    )
    ema: float = setting(
        0.0,
        "Decay rate of an exponential moving average (EMA) of the trained weights, such as 0.999. The averaged"
        " weights are evaluated and saved as the model; the averaging does not affect training. 0: off.",
        RATE,
    )
    average_last: float = setting(
        0.0,
        "Number of last training steps over which the trained weights are averaged uniformly; a value below 1 is a"
        " fraction of all steps. The averaged weights are evaluated and saved as the model. 0: off.",
    )
    checkpoint_every: int = setting(250, "Number of steps between checkpoints.", COUNT)
    log_every: int = setting(10, "Number of steps between log lines in metrics.jsonl.", COUNT)
    keep_checkpoints: int = setting(2, "Number of newest checkpoints to keep, at least 2.", Range(2, MOST))
    max_nonfinite: int = setting(
        5, "Stop training after this many consecutive steps with a loss or gradient that is not finite.", COUNT
    )
    resume: Literal["auto", "never"] = setting(
        "auto",
        "Behaviour if run_dir already contains a run. auto: resume from the latest checkpoint of the run; never: stop"
        " with an error.",
    )
    loggers: tuple[str, ...] = setting((), "Additional loggers: tensorboard, wandb.", choices=("tensorboard", "wandb"))

    def steps(self, size: int, per_step: int) -> int:
        """Returns the number of training steps: max_steps if `epochs` is None, otherwise epochs * size / per_step,
        rounded, but at least 1.

        Args:
            size: number of tokens or rows in the training data.
            per_step: number of tokens or rows in one training step.
        """
        return self.max_steps if self.epochs is None else max(1, round(self.epochs * size / per_step))


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh: the product of its axis sizes is the device count. mesh=auto: data parallel on all devices."""

    data: int = setting(
        -1, "Data-parallel size: shards the batch, replicates the parameters. -1: all remaining devices.", AXIS
    )
    fsdp: int = setting(
        1, "Fully sharded data parallel (FSDP) size: shards the batch, the parameters and the optimizer state.", AXIS
    )
    tensor: int = setting(
        1, "Tensor-parallel size: shards attention heads and the feed-forward layer's hidden dimension.", AXIS
    )
    context: int = setting(1, "Context-parallel size: shards the sequence dimension.", AXIS)


@dataclass(frozen=True)
class DistributedConfig:
    """Multi-process training, for which the same command is run on every host."""

    coordinator: Optional[str] = setting(
        None,
        "Address of process 0, as HOST:PORT. auto: detect the address on a TPU pod or under Slurm; null: run a single"
        " process.",
    )
    num_processes: Optional[int] = setting(None, "Number of processes.", COUNT)
    process_id: Optional[int] = setting(None, "Index of this process among all processes, from 0.")
    timeout_s: int = setting(300, "Seconds to wait for the other processes at startup.", COUNT)
    heartbeat_s: int = setting(
        100,
        "Heartbeat timeout: if a process sends no heartbeat for this many seconds, the other processes stop with an"
        " error.",
        COUNT,
    )


@dataclass(frozen=True)
class SampleConfig:
    """Text generation by `gptjax sample`, and during training."""

    prompt: str = setting("\n", "Prompt to continue.")
    prompts: Optional[str] = setting(
        None,
        'File of prompts: .jsonl with the field "prompt", or text with one prompt per line. null: use sample.prompt'
        " only.",
    )
    out: Optional[str] = setting(None, "Output .jsonl file, which must not exist yet. null: print the continuations.")
    chat: bool = setting(
        False,
        "Treat each prompt as a message to a chat model: render the prompt with the model's chat template, and print"
        " only the answer. A reward model scores the prompt and the answer in the reward model's chat template.",
    )
    batch_size: int = setting(8, "Number of prompts per batch.", COUNT)
    max_new_tokens: int = setting(300, "Maximum number of tokens to generate per continuation.", COUNT)
    n: int = setting(1, "Number of continuations per prompt.", COUNT)
    pick: Optional[Literal["reward", "majority", "logprob"]] = setting(
        None,
        "Method that chooses one of the n continuations of a prompt. reward: the continuation with the largest reward"
        " (best-of-n); majority: the most frequent continuation (self-consistency, arXiv:2203.11171), ignoring case,"
        " whitespace and a final full stop; logprob: the continuation with the largest mean log-probability per token."
        " null: keep all continuations.",
    )
    reward_model: Optional[str] = setting(
        None,
        "Reward model for pick=reward: a run of gptjax finetune reward_model, or another model with a head of one"
        " class. The reward model must have the vocabulary of the model that generates the continuations.",
    )
    temperature: float = setting(0.8, "Sampling temperature. 0: greedy decoding.")
    top_k: int = setting(0, "Top-k sampling: sample from the k most likely tokens. 0: off.")
    top_p: float = setting(
        1.0,
        "Nucleus (top-p) sampling: sample from the smallest set of most likely tokens with at least this total"
        " probability. 1: off.",
        SHARE,
    )
    min_p: float = setting(
        0.0,
        "Min-p sampling: exclude tokens with less than min_p times the probability of the most likely token. 0: off.",
        RATE,
    )
    repetition_penalty: float = setting(
        1.0,
        "Repetition penalty: makes tokens that already occur in the prompt or the continuation less likely. 1: off.",
        POSITIVE,
    )
    stop: tuple[str, ...] = setting((), "Stop strings: generation ends before the first occurrence of any stop string.")
    quantize: Literal["none", "int8", "nf4"] = setting(
        "none", "Weight quantisation, which needs less memory but is slower on a CPU."
    )
    cache_dtype: Optional[Literal["float32", "bfloat16", "int8"]] = setting(
        None, "Dtype of the KV cache. null: float32 on a CPU, model.dtype on other devices."
    )
    draft: Optional[str] = setting(
        None,
        "Speculative decoding: a draft model, or ngram for prompt lookup, which proposes the tokens that followed an"
        " earlier occurrence of the last tokens. null: off.",
    )
    ahead: int = setting(4, "Speculative decoding: number of draft tokens proposed per step.", COUNT)
    seed: int = setting(0, "Random seed of sampling.", SEED)


@dataclass(frozen=True)
class LoraConfig:
    """The LoRA adapter (arXiv:2106.09685): y = x W + scale * x a b, with trained low-rank matrices a and b."""

    rank: int = setting(16, "Rank of the adapter.", COUNT)
    alpha: float = setting(
        32.0, "Numerator alpha of the adapter's scale; lora.scaling selects the formula of the scale.", POSITIVE
    )
    scaling: Literal["alpha/r", "alpha/sqrt(r)", "alpha"] = setting(
        "alpha/r",
        "Formula of the scale by which the adapter's low-rank product a b is multiplied, for rank r; alpha/sqrt(r) is"
        " rsLoRA (arXiv:2312.03732).",
    )
    targets: str = setting(
        "blocks/*/kernel",
        "Weights that get an adapter: parameter path patterns joined by |, such as blocks/3/*/kernel for block 3 only,"
        " or blocks/[0-3,8-11]/attn/*/kernel for the attention of blocks 0 to 3 and 8 to 11.",
    )
    init: Literal["lora", "pissa", "olora"] = setting(
        "lora",
        "Adapter initialisation: lora (a random, b zero), pissa (SVD of the weights) or olora (QR of the weights).",
    )
    dora: bool = setting(False, "DoRA: also learn a magnitude per output column (arXiv:2402.09353).")
    miss: bool = setting(
        False,
        "MiSS (arXiv:2409.15371): instead of LoRA's matrices a and b, train one matrix of `rank` rows, which"
        " multiplies the sum of the input's blocks of `rank` channels. It has no scale.",
    )
    dropout: float = setting(0.0, "Dropout rate on the adapter's input; not applied to adapters of embeddings.", RATE)
    lr_ratio: float = setting(
        1.0,
        "LoRA+: ratio of the learning rate of b to the learning rate of a (arXiv:2402.12354 recommends 16). 1: off.",
        POSITIVE,
    )

    @property
    def scale(self) -> float:
        """The factor by which the low-rank product a b is multiplied in y = x W + scale * x a b; 1 for MiSS."""
        if self.miss:
            return 1.0
        return self.alpha / {"alpha/r": self.rank, "alpha/sqrt(r)": self.rank**0.5, "alpha": 1}[self.scaling]


@dataclass(frozen=True)
class PretrainConfig:
    """Continued pretraining, with the architecture and the tokenizer of the base model."""

    base: Optional[str] = setting(
        None,
        "Base model: a run, model folder, .gguf file, smollm2-135m-instruct or hf:org/name. null: train from scratch.",
    )
    context_length: Optional[int] = setting(
        None,
        "Number of tokens per training window. null: the model's context length, but at most 1024 if pretrain.base is"
        " set.",
        COUNT,
    )


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning: the base model, and the parameters that are trained."""

    base: str = setting(
        "smollm2-135m-instruct", "Base model: a run, model folder, .gguf file, smollm2-135m-instruct or hf:org/name."
    )
    trainable: str = setting(
        "lora",
        "Parameters to train: lora (a LoRA adapter only), all, or the parameters that match path patterns joined by |.",
    )
    quantize: Literal["none", "int8", "nf4"] = setting(
        "none", "Quantisation of the frozen base model that an adapter is trained on (QLoRA)."
    )
    save_merged: Optional[bool] = setting(
        None,
        "Merge the adapter into the base model's weights, and save the merged model. false: save only the adapter,"
        " which cannot be loaded without its base model. null: false if lora.init=lora and the base model can be"
        " downloaded again (smollm2-135m-instruct or hf:org/name), otherwise true.",
    )
    seeds: int = setting(
        1,
        "Number of runs, with random seeds seed, seed + 1, and so on. Each seed has a separate run folder; seeds.json"
        " has the mean scores over all seeds.",
        COUNT,
    )
    together: Optional[bool] = setting(
        None,
        "Train all seeds in one vmapped program. null: only LoRA adapters on a GPU or TPU, because on a CPU one program"
        " is no faster than sequential runs.",
    )


@dataclass(frozen=True)
class ClassifyConfig:
    """Text classification: the labelled texts, and the pooling of hidden states."""

    source: Optional[str] = setting(
        None, "Source of the labelled texts: a .csv, .tsv, .jsonl, .json or .parquet file, or hf:org/name."
    )
    text_field: Optional[str] = setting(
        None, "Column of the texts. null: detect the column by its name, such as text; exactly one column must match."
    )
    label_field: Optional[str] = setting(
        None, "Column of the labels. null: detect the column by its name, such as label; exactly one column must match."
    )
    labels: tuple[str, ...] = setting(
        (), "Names of the classes, in order. []: the labels that occur in the data, sorted."
    )
    balance: bool = setting(False, "Balance the classes: undersample each class to the size of the rarest class.")
    deduplicate: bool = setting(True, "Remove duplicate texts, so that no text occurs in several splits.")
    split: Literal["stratified", "grouped", "book"] = setting(
        "stratified",
        "Method of splitting the texts into training, validation and test data. stratified: equal class proportions"
        " in all splits; grouped: identical texts are in the same split; book: the balanced split of chapter 6 of"
        " Build a Large Language Model (From Scratch).",
    )
    val_fraction: float = setting(0.1, "Fraction of the texts to hold out for validation.", FRACTION)
    test_fraction: float = setting(0.2, "Fraction of the texts to hold out for testing.", FRACTION)
    max_length: Optional[int] = setting(
        None,
        "Maximum number of tokens per text; longer texts are truncated. null: the length of the longest text, but at"
        " most the context length.",
        COUNT,
    )
    packing: Literal["packed", "padded"] = setting("packed", PACKING.format("text"))
    pooling: Literal["last", "first", "mean"] = setting(
        "last",
        "Pooling of hidden states for the classification head: the last token before the padding, the first token, or"
        " the mean over all tokens.",
    )
    bias: bool = setting(
        False,
        "Learn a bias in the classification head. The libraries transformers and peft only support heads"
        " without a bias.",
    )
    prompt: str = setting("{text}", "Prompt template, in which {text} is replaced with the text to classify.")


ChatStyle = Literal["chat", "chatml", "alpaca", "phi3"]  # the prompt styles that tokenizers/chat.py defines


@dataclass(frozen=True)
class InstructConfig:
    """Instruction tuning: the conversations, and the tokens that count in the loss."""

    source: Optional[str] = setting(
        None,
        "Source of the conversations: a .json, .jsonl, .csv or .parquet file, or hf:org/name. null: generated"
        " questions of small synthetic tasks.",
    )
    style: Optional[ChatStyle] = setting(None, STYLE)
    loss_on: Literal["response", "all"] = setting(
        "response",
        "Tokens that count in the loss. response: the tokens of the responses; all: the tokens of the prompts and the"
        " responses.",
    )
    packing: Literal["packed", "padded"] = setting("packed", PACKING.format("example"))
    branches: Optional[Literal["tree", "rows"]] = setting(
        None,
        "Layout of a conversation if the chat template renders earlier turns differently in later turns; Qwen3's chat"
        " template, for example, drops earlier reasoning. tree: one example per conversation, in which common prefixes"
        " occur once; rows: one example per answer. null: tree on a CPU; rows on other devices, whose attention"
        " kernels do not support trees.",
    )
    context_length: int = setting(
        512,
        "Number of tokens per row; examples with more tokens are dropped, and the number of dropped examples is"
        " reported.",
        COUNT,
    )
    val_fraction: float = setting(0.05, VAL_FRACTION.format("example"), FRACTION)
    test_fraction: float = setting(0.1, TEST_FRACTION.format("example"), FRACTION)
    examples: int = setting(2000, "Number of generated questions, if source is null.", COUNT)
    compare: bool = setting(True, "Also evaluate the base model on the test questions.")


@dataclass(frozen=True)
class PreferConfig:
    """Preference tuning: the pairs of answers, and the loss."""

    source: Optional[str] = setting(
        None,
        "Source of preference pairs, or of scored answers such as rollouts.jsonl of a reward run: a .json, .jsonl,"
        " .csv or .parquet file, or hf:org/name. null: generated pairs of small synthetic tasks.",
    )
    loss: Literal["dpo", "ipo", "orpo", "kto", "simpo"] = setting(
        "dpo", "Preference loss: DPO, IPO, ORPO, KTO or SimPO."
    )
    beta: Optional[float] = setting(
        None, "Coefficient beta of the preference loss. null: 0.1, or 2 with loss=simpo.", POSITIVE
    )
    margin: float = setting(1.0, "SimPO: target reward margin between the chosen and the rejected answer.")
    style: Optional[ChatStyle] = setting(None, STYLE)
    packing: Literal["packed", "padded"] = setting("packed", PACKING.format("pair"))
    context_length: int = setting(
        512,
        "Number of tokens per row. Both answers of a preference pair, each with its own copy of the prompt, must fit"
        " in one row; longer pairs are dropped, and the number of dropped pairs is reported.",
        COUNT,
    )
    val_fraction: float = setting(0.05, VAL_FRACTION.format("pair"), FRACTION)
    test_fraction: float = setting(0.1, TEST_FRACTION.format("pair"), FRACTION)
    examples: int = setting(1000, "Number of generated pairs, if source is null.", COUNT)


@dataclass(frozen=True)
class RewardConfig:
    """Reward tuning (GRPO and others): the questions, the reward functions, and the loss."""

    source: Optional[str] = setting(
        None,
        "Source of questions with expected answers: a .json, .jsonl, .csv or .parquet file, or hf:org/name. null:"
        " generated questions of small synthetic tasks.",
    )
    functions: tuple[str, ...] = setting(
        ("exact",),
        "Reward functions, whose weighted sum is the reward of an answer: names such as exact, normalised, number,"
        " boxed, format, length:50 or constraints (see gptjax help data), or functions in Python files, such as"
        " path/to/mine.py:score.",
    )
    weights: tuple[float, ...] = setting(
        (), "Weight of each reward function. []: the weight 1 for each reward function.", ANY
    )
    time_limit: float = setting(
        10.0,
        "Time limit of a reward function per answer, in seconds; if a reward function exceeds the time limit, the"
        " answer has no reward.",
        POSITIVE,
    )
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp"] = setting(
        "grpo", "Policy-gradient loss and advantages: GRPO, dr_grpo (GRPO Done Right), DAPO, GSPO, RLOO or REINFORCE++."
    )
    group: int = setting(
        8,
        "Group size: number of answers per question; must divide train.batch_size, which is the number of answers per"
        " step.",
        Range(2, MOST),
    )
    updates: int = setting(
        1, "Number of training steps on the same answers, before the model generates new answers (mu in GRPO).", COUNT
    )
    clip: Optional[float] = setting(
        None,
        "Clip range epsilon: the probability ratio is clipped to at least 1 - clip. null: 0.2, or 0.0003 with"
        " loss=gspo.",
        SHARE,
    )
    clip_high: Optional[float] = setting(
        None,
        "Upper clip range: the probability ratio is clipped to at most 1 + clip_high. null: clip, but 0.28 with"
        " loss=dapo and 0.0004 with loss=gspo.",
        POSITIVE,
    )
    kl: float = setting(
        0.0, "Coefficient of the KL divergence from the base model (beta in GRPO). 0: off, which saves a forward pass."
    )
    temperature: float = setting(
        1.0, "Sampling temperature at which the model generates answers for training.", POSITIVE
    )
    max_new_tokens: int = setting(64, "Maximum number of tokens that the model generates per answer.", COUNT)
    branches: Optional[Literal["tree", "rows"]] = setting(
        None,
        "Layout of the answers to a question. tree: one row per question, a token tree that contains the prompt once;"
        " rows: one row per answer. null: tree on a single CPU device, where fewer tokens save time; rows on other"
        " devices.",
    )
    resample: Optional[int] = setting(
        None,
        "Dynamic sampling: maximum number of times that questions whose answers all have the same reward are replaced"
        " with further questions. null: 0, or 2 with loss=dapo.",
    )
    style: Optional[ChatStyle] = setting(None, STYLE)
    context_length: int = setting(
        512,
        "Number of tokens per row, which must hold the prompt and the answer; longer questions are dropped, and the"
        " number of dropped questions is reported.",
        COUNT,
    )
    val_fraction: float = setting(0.05, VAL_FRACTION.format("question"), FRACTION)
    test_fraction: float = setting(0.1, TEST_FRACTION.format("question"), FRACTION)
    examples: int = setting(2000, "Number of generated questions, if source is null.", COUNT)
    compare: bool = setting(True, "Also evaluate the base model on the test questions.")


@dataclass(frozen=True)
class RewardModelConfig:
    """Reward model: pairs of answers, of which the better answer should get the larger reward."""

    source: Optional[str] = setting(
        None,
        "Source of preference pairs, or of scored answers such as rollouts.jsonl of a reward run: a .json, .jsonl,"
        " .csv or .parquet file, or hf:org/name. null: generated pairs of small synthetic tasks.",
    )
    center: float = setting(
        0.0,
        "Coefficient of the mean squared sum of the two rewards of a pair, which keeps rewards near 0"
        " (arXiv:2312.09244 uses 0.01). 0: off.",
    )
    style: Optional[ChatStyle] = setting(None, STYLE)
    packing: Literal["packed", "padded"] = setting("packed", PACKING.format("pair"))
    context_length: int = setting(
        512,
        "Number of tokens per row. Both answers of a preference pair, each with its own copy of the prompt, must fit"
        " in one row; longer pairs are dropped, and the number of dropped pairs is reported.",
        COUNT,
    )
    val_fraction: float = setting(0.05, VAL_FRACTION.format("pair"), FRACTION)
    test_fraction: float = setting(0.1, TEST_FRACTION.format("pair"), FRACTION)
    examples: int = setting(1000, "Number of generated pairs, if source is null.", COUNT)


@dataclass(frozen=True)
class DistillConfig:
    """Knowledge distillation: the teacher, the loss, and the texts on which the student imitates the teacher."""

    teacher: Optional[str] = setting(
        None,
        "Teacher, a model with the same tokenizer: a run, model folder, .gguf file, smollm2-135m-instruct or"
        " hf:org/name.",
    )
    divergence: Literal["forward", "reverse", "js"] = setting(
        "forward",
        "Divergence of the next-token distributions. forward: KL(teacher || student); reverse: KL(student || teacher);"
        " js: generalised Jensen-Shannon divergence (arXiv:2306.13649).",
    )
    beta: float = setting(
        0.5,
        "With divergence=js, the weight of the teacher in the mixture of the distributions of teacher and student.",
        FRACTION,
    )
    temperature: float = setting(
        1.0,
        "Temperature by which the logits of both models are divided; the divergence is multiplied by the squared"
        " temperature, as in arXiv:1503.02531.",
        POSITIVE,
    )
    alpha: float = setting(
        0.5,
        "Weight of the cross-entropy loss on the training texts; the divergence from the teacher has the weight"
        " 1 - alpha.",
        RATIO,
    )
    top_k: Optional[int] = setting(
        None,
        "Compute the teacher's top_k most probable tokens once, before training, and store their probabilities in the"
        " cache; all other tokens are treated as one token. null: run the teacher in every step.",
        COUNT,
    )
    on_policy: float = setting(
        0.0,
        "Fraction of the batches, drawn at random, that consist of answers that the student generates to the prompts"
        " of the conversations (lambda in GKD, arXiv:2306.13649). The loss of batches of the student's answers is the"
        " divergence alone. 0: train only on the given texts.",
        RATIO,
    )
    sampling_temperature: float = setting(
        1.0, "With on_policy, the sampling temperature of the student's answers.", POSITIVE
    )
    max_new_tokens: int = setting(128, "With on_policy, the maximum number of tokens per answer of the student.", COUNT)
    source: Optional[str] = setting(
        None,
        "Source of the conversations: a .json, .jsonl, .csv or .parquet file, or hf:org/name; or of plain text: a"
        " .txt or .md file, or a folder. null: generated questions of small synthetic tasks.",
    )
    style: Optional[ChatStyle] = setting(
        None,
        "Prompt style of conversations. chat: the chat template of the teacher; chatml, alpaca and phi3: a fixed"
        " template instead of the teacher's chat template. null: chat if the teacher has a chat template, else alpaca.",
    )
    loss_on: Literal["response", "all"] = setting(
        "response",
        "Tokens of conversations that count in the loss. response: the tokens of the responses; all: the tokens of"
        " the prompts and the responses.",
    )
    packing: Literal["packed", "padded"] = setting(
        "packed",
        "Layout of the rows. packed: several examples per row; padded: one example per row, which on_policy always"
        " uses.",
    )
    context_length: int = setting(
        512,
        "Number of tokens per row. Conversations with more tokens are dropped, and the number of dropped"
        " conversations is reported; plain text is cut into examples of this length.",
        COUNT,
    )
    val_fraction: float = setting(0.05, VAL_FRACTION.format("example"), FRACTION)
    test_fraction: float = setting(0.1, TEST_FRACTION.format("example"), FRACTION)
    examples: int = setting(2000, "Number of generated questions, if source is null.", COUNT)


RUN_FOLDER = "runs/default"
TUNINGS = ("classify", "instruct", "prefer", "reward", "reward_model", "distill")  # names of the fine-tuning tasks


@dataclass(frozen=True)
class Config:
    """The settings of a run, in groups such as data, model and optim."""

    run_dir: Optional[str] = setting(None, "Folder to which the run is written. null: runs/NAME-OF-THE-PRESET.")
    task: Literal["pretrain", "classify", "instruct", "prefer", "reward", "reward_model", "distill"] = setting(
        "pretrain",
        "Training task, which is set by the command: pretrain, or the fine-tuning task classify, instruct, prefer,"
        " reward, reward_model or distill.",
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
    reward: RewardConfig = field(default_factory=RewardConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)

    @property
    def window(self) -> int:
        """Number of tokens per row in pretraining."""
        return self.pretrain.context_length or self.model.context_length

    @property
    def run_folder(self) -> str:
        """The run directory: `run_dir`, or runs/default if `run_dir` is None."""
        return self.run_dir or RUN_FOLDER

    @property
    def steps_per_rollout(self) -> int | None:
        """Number of training steps per rollout, in which the model generates the answers that it is trained on; None if
        the model is trained only on given data."""
        if self.task == "reward":
            return self.reward.updates
        return 1 if self.task == "distill" and self.distill.on_policy else None


# ---------------------------------------------------------------- dicts and lists of all settings


def flat(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the settings of a config as a flat dict, {"optim.lr": 0.001, ..}, in the order of the schema."""
    out: dict[str, Any] = {}
    for item in fields(cfg):
        value = getattr(cfg, item.name)
        if item.name.startswith("_"):
            continue
        out |= flat(value, f"{prefix}{item.name}.") if is_dataclass(value) else {prefix + item.name: value}
    return out


@functools.cache
def leaf_fields() -> dict[str, Field]:
    """Returns a dict that maps the key of each setting, such as "optim.lr", to its dataclass field."""
    return dict(_walk(Config, ""))


def _walk(cls: type, prefix: str) -> Iterator[tuple[str, Field]]:
    for item in fields(cls):
        if isinstance(item.type, type) and is_dataclass(item.type):
            yield from _walk(item.type, f"{prefix}{item.name}.")
        elif not item.name.startswith("_"):
            yield prefix + item.name, item


@functools.cache
def schema() -> dict[str, Any]:
    """Returns a dict that maps the key of each setting, such as "optim.lr", to its type, such as float."""
    return {key: item.type for key, item in leaf_fields().items()}


def describe() -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """Returns a list of tuples (group, description, [(key, type, help), ..]), one for each group of settings, for
    `--help`. Settings that belong to no group, such as seed, are in the group ""."""
    groups = {"": Config} | {item.name: item.type for item in fields(Config) if is_dataclass(item.type)}
    rows: dict[str, list[tuple[str, str, str]]] = {group: [] for group in groups}
    for key, item in leaf_fields().items():
        rows[key.rpartition(".")[0]].append((key, type_name(item.type), item.metadata["help"]))
    return [(group, (cls.__doc__ or "").partition("\n")[0], rows[group]) for group, cls in groups.items()]


def without_null(hint: Any) -> Any:
    """Returns X for the type Optional[X], and any other type unchanged."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    return next(arg for arg in get_args(hint) if arg is not type(None))


def type_name(hint: Any) -> str:
    """Formats a type for `--help` and error messages: returns a text such as "int", "list of str", "gpt2, llama or
    modern" or "float or null"."""
    kind = without_null(hint)
    if get_origin(kind) is Literal:
        names = list(get_args(kind))
    elif get_origin(kind) is tuple:
        names = [f"list of {get_args(kind)[0].__name__}"]
    else:
        names = ["true", "false"] if kind is bool else [kind.__name__]
    *first, last = names if kind is hint else [*names, "null"]
    return f"{', '.join(first)} or {last}" if first else last
