"""The configuration: nested frozen dataclasses, and the layers that fill them.

default < arch < preset < YAML (each may name its `base:`) < `a.b=c` on the command line.
Frozen means hashable: a `ModelConfig` is a static argument under `jit`.
"""

from __future__ import annotations

import functools
import math
import os
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

from gptjax import config_io
from gptjax.config_io import Leaf, Problems
from gptjax.types import UserError

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
    d_head: Optional[int] = None  # numbers a head; None: d_model // n_head
    d_model: int = 768
    d_ff: Optional[int] = None  # None: 4 * d_model
    # switches
    position: Optional[Literal["learned", "sinusoidal", "rope", "alibi"]] = None
    rope_base: float = 10_000.0
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: float = 1.0  # of the scaling: angles are divided by it, llama3: the slow ones only
    rope_slow: float = 1.0  # llama3: turns in rope_original_context up to which an angle counts as slow
    rope_fast: float = 4.0  # llama3: turns from which an angle stays as it is
    rope_original_context: int = 8192  # llama3
    rope_local_base: Optional[float] = None  # of the layers with a window; None: as all others
    sliding_window: int = 0  # tokens that a layer with a window sees, itself included; 0: no window
    window_pattern: str = "S"  # S a layer with a window, L one without; repeated over the layers
    norm: Optional[Literal["layernorm", "rmsnorm"]] = None
    norm_scale: Optional[bool] = None  # learned scale
    norm_bias: Optional[bool] = None  # learned shift, layernorm only
    norm_eps: Optional[float] = None
    norm_position: Literal["pre", "post", "both"] = "pre"  # before attention and feed-forward, after them, or both
    activation: Optional[Literal["gelu", "swiglu", "geglu", "relu2"]] = None
    qkv_bias: Optional[bool] = None
    bias: Optional[bool] = None  # every linear but q, k, v and the head
    n_classes: int = 0  # of a head that classifies, beside the one for tokens; 0: none
    cls_bias: bool = True  # of that head
    tie_embeddings: Optional[bool] = None
    qk_norm: Optional[bool] = None
    qk_norm_over: Literal["head", "all"] = "head"  # one head's numbers, or all heads' together
    qk_gain: Optional[float] = None  # q and k are multiplied by it after their norm
    attention_scale: Optional[float] = None  # of q k^T; None: head_dim ** -0.5
    embed_gain: float = 1.0  # the embedding is multiplied by it
    embed_norm: Optional[bool] = None  # norm right after the embedding
    logit_softcap: Optional[float] = None  # 0: off; else cap * tanh(logits / cap)
    value_residual: Optional[bool] = None  # v = (1 - w) v + w v_of_first_layer, w learned a layer
    residual_lambdas: Optional[bool] = None  # x = w x before each block, w learned
    x0_lambdas: Optional[bool] = None  # x = x + w x_of_embedding before each block, w learned
    smear: Optional[bool] = None  # x = x + w x_of_the_token_before after the embedding, w learned a channel
    # initialisation
    init: Literal["gpt2", "torch"] = "gpt2"
    embed_std: float = 0.02  # token embedding under init=gpt2
    zero_init_proj: Optional[bool] = None  # attention and feed-forward outputs start at 0
    zero_init_head: Optional[bool] = None  # untied head starts at 0
    dropout: float = 0.0
    # how it is computed, not what
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the products; params stay float32
    remat: Literal["none", "dots", "full", "offload"] = "none"  # what the backward pass computes again; offload: all
    # but each block's input, which waits in the host's memory
    unroll: Optional[bool] = None  # blocks as one program; None: small models on CPU

    def __post_init__(self) -> None:
        fill = dict(ARCHS.get(self.arch, {}), n_kv_head=self.n_head, d_ff=4 * self.d_model)
        for name, value in fill.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

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


COMPUTED = ("dropout", "dtype", "remat", "unroll", "init")  # of ModelConfig, what a fine-tuning may say of its base


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
    offload: bool = False  # its state lies in the host's memory, and visits the devices for the update


@dataclass(frozen=True)
class TrainConfig:
    """How long, how often, how much at once."""

    max_steps: int = 1000
    epochs: Optional[float] = None  # sets max_steps from the data
    batch_size: int = 12  # windows a step, over all micro-batches
    accumulation: int = 1  # micro-batches a step; must divide batch_size
    steps_per_call: Optional[int] = None  # steps inside one compiled call; None: chosen by size
    eval_every: int = 250
    eval_train_batches: int = 0  # training batches whose loss without dropout is logged at each evaluation too
    checkpoint_every: int = 250
    log_every: int = 10
    keep_checkpoints: int = 2
    max_nonfinite: int = 5  # skipped steps in a row before the run stops
    resume: Literal["auto", "never"] = "auto"
    loggers: tuple[str, ...] = ()  # tensorboard, wandb

    def steps(self, size: int, per_step: int) -> int:
        """max_steps, or what `epochs` over `size` tokens, texts or rows make of it, `per_step` at a time."""
        return self.max_steps if self.epochs is None else max(1, round(self.epochs * size / per_step))


@dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work; their product is the number of devices. mesh=auto: all of it over data."""

    data: int = -1  # rows of a batch, with a copy of the weights each; -1: what the others leave
    fsdp: int = 1  # rows of a batch, and the weights cut into as many parts
    tensor: int = 1  # heads and the feed-forward layer
    context: int = 1  # tokens of a row


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes as one run; the same command on every host."""

    coordinator: Optional[str] = None  # HOST:PORT of process 0; auto: as a TPU pod or Slurm says; None: one process
    num_processes: Optional[int] = None
    process_id: Optional[int] = None
    timeout_s: int = 300  # to wait for the others at the start
    heartbeat_s: int = 100  # after which a silent process counts as gone


@dataclass(frozen=True)
class SampleConfig:
    """What `gptjax sample` writes, and the samples during training."""

    prompt: str = "\n"
    prompts: Optional[str] = None  # file of prompts: .jsonl with "prompt", or one a line
    out: Optional[str] = None  # new .jsonl file for the continuations
    batch_size: int = 8  # prompts at a time
    max_new_tokens: int = 300
    n: int = 1
    temperature: float = 0.8  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0  # tokens at least so many times as likely as the likeliest
    repetition_penalty: float = 1.0  # on tokens that came before; 1: off
    stop: tuple[str, ...] = ()  # texts before which a continuation ends
    quantize: Literal["none", "int8", "nf4"] = "none"  # of the weights: less memory, on a CPU slower
    cache_dtype: Literal["float32", "bfloat16", "int8"] = "float32"  # of the keys and values that are kept
    seed: int = 0


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter: which weights it is for, and its form."""

    rank: int = 16
    alpha: float = 32.0
    scaling: Literal["alpha/r", "alpha/sqrt(r)", "alpha"] = "alpha/r"  # of a b; alpha/sqrt(r): rsLoRA
    targets: str = "blocks/*/kernel"  # patterns of paths, joined by |
    init: Literal["lora", "pissa", "olora"] = "lora"  # a random and b zero, or from the weights themselves
    dora: bool = False  # columns with lengths of their own
    dropout: float = 0.0  # of what goes into a
    lr_ratio: float = 1.0  # of b's learning rate to a's; LoRA+ takes 16

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by: three conventions are in use."""
        return self.alpha / {"alpha/r": self.rank, "alpha/sqrt(r)": self.rank**0.5, "alpha": 1}[self.scaling]


@dataclass(frozen=True)
class FinetuneConfig:
    """What a fine-tuning starts from, and which of it moves."""

    base: str = "smollm2-135m-instruct"  # run, model folder, .gguf file, asset or hf:org/name
    trainable: str = "lora"  # an adapter; all; or patterns of paths, joined by |
    quantize: Literal["none", "int8", "nf4"] = "none"  # of the frozen base under an adapter
    seeds: int = 1  # runs with seed, seed + 1, ..; each in a folder of its own, and their mean
    together: Optional[bool] = None  # adapters of all seeds in one program; None: not on a CPU, which gains nothing


@dataclass(frozen=True)
class ClassifyConfig:
    """Labelled texts, and how a text becomes one vector."""

    source: Optional[str] = None  # .csv, .tsv, .jsonl, .json, .parquet or hf:org/name
    text_field: Optional[str] = None  # None: guessed where only one fits
    label_field: Optional[str] = None
    labels: tuple[str, ...] = ()  # their order; empty: as they sort
    balance: bool = False  # every class as often as the rarest
    deduplicate: bool = True  # equal texts count once; false: they may stand in several splits
    split: Literal["stratified", "grouped", "book"] = "stratified"  # book: its balanced spam split, by name
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    max_length: Optional[int] = None  # tokens of a text; None: the longest, within the context
    packing: Literal["packed", "padded"] = "packed"  # several texts to a row, or one
    pooling: Literal["last", "first", "mean"] = "last"  # last real token; padding cannot change it
    bias: bool = True  # of the head; transformers' classifiers have none, so peft's format takes a head without
    prompt: str = "{text}"  # what stands around a text, such as a question about it


PromptStyle = Literal["chat", "chatml", "alpaca", "phi3"]


@dataclass(frozen=True)
class InstructConfig:
    """Conversations, and which of their tokens are learned."""

    source: Optional[str] = None  # .json, .jsonl, .csv, .parquet or hf:org/name; None: small synthetic skills
    style: Optional[PromptStyle] = None  # chat: the model's own template; others replace it. None: chat, else alpaca
    loss_on: Literal["response", "all"] = "response"
    packing: Literal["packed", "padded"] = "packed"  # several examples to a row, or one
    context_length: int = 512  # tokens of a row; examples that do not fit are dropped and counted
    val_fraction: float = 0.05  # the end of the source
    test_fraction: float = 0.1  # before it
    examples: int = 2000  # questions of the synthetic skills
    compare: bool = True  # the base answers what was held out too


@dataclass(frozen=True)
class PreferConfig:
    """Pairs of answers, and the loss that tells them apart."""

    source: Optional[str] = None  # .json, .jsonl, .csv, .parquet or hf:org/name; None: of the synthetic skills
    loss: Literal["dpo", "ipo", "orpo", "kto", "simpo"] = "dpo"
    beta: Optional[float] = None  # None: the loss's usual one, 0.1 (simpo: 2)
    margin: float = 1.0  # simpo: by how much the chosen answer's reward shall be larger
    style: Optional[PromptStyle] = None  # chat: the model's own template; others replace it. None: chat, else alpaca
    packing: Literal["packed", "padded"] = "packed"  # several pairs to a row, or one
    context_length: int = 512  # tokens of a row, which holds both sides of a pair
    val_fraction: float = 0.05  # the end of the source
    test_fraction: float = 0.1  # before it
    examples: int = 1000  # of the synthetic skills


@dataclass(frozen=True)
class Config:
    """One run."""

    run_dir: Optional[str] = None  # None: runs/NAME-OF-THE-PRESET
    task: Literal["pretrain", "classify", "instruct", "prefer"] = "pretrain"
    seed: int = 0
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    instruct: InstructConfig = field(default_factory=InstructConfig)
    prefer: PreferConfig = field(default_factory=PreferConfig)


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
    all others."""
    if source is not None and "=" in str(source) and not Path(source).exists():
        source, overrides = None, (str(source), *overrides)
    layers = _file_leaves(source) if source is not None else []
    if source is not None and (Path(source) / "config.yaml").is_file():  # a run, wherever it lies now
        layers = [*layers, Leaf("run_dir", str(source), "the run's own folder")]
    return _build([*under, *layers, *config_io.from_args(overrides), *leaves], _run_dir(source))


def from_yaml(text: str, name: str = "yaml") -> Config:
    """What `to_yaml` wrote, or any YAML of the schema."""
    return _build(config_io.from_yaml(text, name))[0]


def from_dict(values: dict[str, Any]) -> Config:
    """A nested dict of values, as strict as a file."""
    return _build(list(config_io.from_mapping(values)))[0]


def to_yaml(cfg: Config, provenance: Optional[Provenance] = None) -> str:
    """Every value, so that later defaults cannot change this run; with `# where` when the provenance is given."""
    lines, group = [], ""
    for key, value in flat(cfg).items():
        head, dot, leaf = key.rpartition(".")
        if dot and head != group:
            group = head
            lines.append(f"{head}:")
        text = f"{'  ' if dot else ''}{leaf}: {_yaml_value(value)}"
        lines.append(f"{text:<44} # {provenance[key]}" if provenance else text)
    return "\n".join(lines) + "\n"


def flat(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 0.001, ..} in the order of the schema."""
    out: dict[str, Any] = {}
    for item in fields(cfg):
        value = getattr(cfg, item.name)
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
        else:
            yield prefix + name, hint


def describe() -> list[tuple[str, str, list[tuple[str, str, str, str]]]]:
    """(group, what it is, [(key, type, default, comment), ..]) for `--help`, from this file's source."""
    comments = dict(_comments())
    defaults = flat(Config())
    return [
        (
            group,
            cls.__doc__.partition("\n")[0],
            [
                (
                    key,
                    type_name(hint),
                    _shown_default(key, defaults[key]),
                    comments.get((cls.__name__, key[len(prefix) :]), ""),
                )
                for key, hint in _leaf_types(cls, prefix)
                if key.count(".") == (1 if group else 0)
            ],
        )
        for group, prefix, cls in [("", "", Config), *((n, f"{n}.", c) for n, c in _groups().items())]
    ]


def _groups() -> dict[str, type]:
    return {name: hint for name, hint in get_type_hints(Config).items() if is_dataclass(hint)}


def _shown_default(key: str, value: Any) -> str:
    leaf = key.removeprefix("model.")
    if leaf in ARCHS["gpt2"] and leaf != key:
        return "null"  # by arch
    return _yaml_value(None if key in ("model.n_kv_head", "model.d_ff") else value)


def _comments() -> Iterator[tuple[tuple[str, str], str]]:
    """((class, field), the comment on its line)."""
    import ast

    text = Path(__file__).read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.parse(text).body:
        for item in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                tail = lines[item.end_lineno - 1][item.end_col_offset :].strip()
                yield (node.name, item.target.id), tail.removeprefix("#").strip()


# ---------------------------------------------------------------- layers


def presets() -> dict[str, Path]:
    """Name -> YAML file: from the checkout's configs/, or from the copy inside an installed package."""
    package = Path(__file__).parent
    root = next((path for path in (package / "_configs", package.parent / "configs") if path.is_dir()), None)
    return {path.stem: path for path in sorted(root.glob("*/*.yaml"))} if root else {}


def config_file(source: str | os.PathLike[str], near: Path = Path()) -> Path:
    """The file of a preset's name, a YAML path, or a run directory. Raises UserError with the nearest name."""
    text, path = str(source), near / source
    if path.is_dir() and (path / "config.yaml").exists():
        return path / "config.yaml"
    if path.is_file():
        return path
    known = presets()
    if text in known:
        return known[text]
    if text.endswith((".yaml", ".yml")) or "/" in text or path.exists():
        raise UserError(f"{path}: no such config file; `gptjax presets ls` lists what is here")
    hint = config_io.did_you_mean(text, known)
    raise UserError(f"no preset or file {text!r}{hint or '; presets: ' + ', '.join(known)}")


def _file_leaves(source: str | os.PathLike[str], near: Path = Path(), inside: tuple[Path, ...] = ()) -> list[Leaf]:
    """The file's leaves after those of its `base:`."""
    path = config_file(source, near)
    if path.resolve() in inside:
        raise UserError(f"{path}: its `base:` leads back to itself")
    leaves = config_io.from_yaml(config_io.read_text(path, "config"), _short(path))
    if not leaves:
        raise UserError(f"{path}: the config is empty; `gptjax presets show shakespeare-char` prints one to start from")
    bases = [leaf for leaf in leaves if leaf.key == "base" and leaf.value]
    own = [leaf for leaf in leaves if leaf.key != "base"]
    if not bases:
        return own
    if not isinstance(bases[0].value, str):
        raise UserError(f"{bases[0].where}: base: expected one preset or file, got {bases[0].value}")
    return [*_file_leaves(bases[0].value, path.parent, (*inside, path.resolve())), *own]


def _short(path: Path) -> str:
    """The path as seen from here, where that is shorter."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _run_dir(source: Optional[str | os.PathLike[str]]) -> str:
    return f"runs/{config_file(source).stem if source is not None else 'default'}"


def _build(leaves: list[Leaf], run_dir: Optional[str] = None) -> tuple[Config, Provenance]:
    """Type every leaf by itself, then build, then validate: all problems in one error."""
    problems, bad = Problems(), set()
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
    cfg = _construct(Config, values, "")
    provenance = _provenance(cfg, values, where)
    problems += [text for keys, text in _complaints(cfg, provenance) if not bad.intersection(keys)]
    problems.raise_if_any()
    return cfg, provenance


# (a, b): b rules a or belongs to it, so b of an earlier layer goes back to its default where a later one says a
RULED = (("train.max_steps", "train.epochs"), ("data.source", "data.split"), ("data.source", "data.val_source"))


def _later_wins(leaves: list[Leaf], values: dict[str, Any], where: Provenance) -> Iterator[str]:
    """Drops what an earlier layer said of a ruling setting, and names two that one command line sets at once."""
    layers = list(dict.fromkeys(_layer(leaf.where) for leaf in leaves))
    for key, ruling in RULED:
        if values.get(key) is None or values.get(ruling) is None:
            continue
        first, second = layers.index(_layer(where[key])), layers.index(_layer(where[ruling]))
        if first > second:
            del values[ruling], where[ruling]
        elif first == second and (key, where[key]) == ("train.max_steps", "command line"):
            both = f"{key}={values[key]} and {ruling}={values[ruling]}"
            yield f"{where[key]}: {both}: the number of steps twice; give one of them"


def _layer(where: str) -> str:
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
    written = value if isinstance(value, str) else repr(value)
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
        raise ValueError(f"expected {type_name(hint)}, got {written!r}") from None


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


def _yaml_value(value: Any) -> str:
    import yaml

    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml_value, value))}]"
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
            "lora.rank", "finetune.seeds", "classify.max_length", "instruct.context_length", "instruct.examples",
            "prefer.context_length", "prefer.examples", "distributed.num_processes", "distributed.timeout_s",
            "distributed.heartbeat_s",
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
            if not (math.isfinite(number) and above and below):
                yield (key,), f"{key} ({number}) must be {_range_name(low, high, with_low, with_high)}"


def _range_name(low: float, high: float, with_low: bool, with_high: bool) -> str:
    if high < 2**31 - 1:
        return f"from {low}{'' if with_low else ' (not itself)'} to {high}{'' if with_high else ' (not itself)'}"
    return f"{'at least' if with_low else 'above'} {low} and {'finite' if math.isinf(high) else f'at most {high}'}"


def _combinations(cfg: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    model, data, optim, train = cfg.model, cfg.data, cfg.optim, cfg.train
    if min(model.d_model, model.n_head, model.n_kv_head or 1) >= 1:
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
    if "" in cfg.sample.stop:
        yield ("sample.stop",), "sample.stop holds an empty text, which would end everything at once: leave it out"
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
    if model.context_length >= 1 and cfg.mesh.context > 1 and model.context_length % cfg.mesh.context:
        yield (
            ("mesh.context", "model.context_length"),
            f"mesh.context ({cfg.mesh.context}) must divide model.context_length ({model.context_length})",
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
    found = [n for n in range(1, min(number, most or number) + 1) if number % n == 0]
    return ", ".join(map(str, found))
