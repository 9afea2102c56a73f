"""Reading settings from YAML, `a.b=c` and dicts into flat leaves that remember where they stand.

Nothing here knows the schema: a leaf's text is typed later, by the field it is for.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.errors import Problems, UserError, did_you_mean, nearest
from gptjax.files import other_encoding

# What peers (nanoGPT, nanochat, litgpt, torchtune, TRL, axolotl, the book) call the same thing.
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
    "max_iters": "train.max_steps", "num_iterations": "train.max_steps", "steps": "train.max_steps",
    "num_steps": "train.max_steps", "max_steps": "train.max_steps", "lr_decay_iters": "train.max_steps",
    "num_epochs": "train.epochs", "num_train_epochs": "train.epochs", "n_epochs": "train.epochs",
    "micro_batch_size": "train.batch_size", "device_batch_size": "train.batch_size", "bs": "train.batch_size",
    "global_batch_size": "train.batch_size", "total_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size", "gradient_accumulation_steps": "train.accumulation",
    "grad_accum_steps": "train.accumulation", "gradient_accumulation": "train.accumulation",
    "eval_interval": "train.eval_every", "eval_steps": "train.eval_every", "eval_freq": "train.eval_every",
    "save_interval": "train.checkpoint_every", "save_steps": "train.checkpoint_every",
    "save_every": "train.checkpoint_every",
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
    "max_tokens": "sample.max_new_tokens", "temp": "sample.temperature",
}  # fmt: skip

# What peers have and this has not, with the way out.
NOT_HERE: dict[str, str] = {
    "use_peft": "gptjax finetune trains a LoRA adapter; finetune.trainable=all trains all weights",
    **dict.fromkeys(
        ("device", "device_type", "accelerator"),
        "JAX takes the best device it finds; JAX_PLATFORMS=cpu in front forces one",
    ),
    "compile": "every step is compiled",
    "precision": "model.dtype=bfloat16 multiplies in bfloat16; model.precision says how exactly float32 is multiplied",
    "eval_iters": "validation always reads the whole validation set",
    "eval_iter": "validation always reads the whole validation set",
}  # fmt: skip


EXAMPLE = "optim.lr=3e-4"


class Leaf(NamedTuple):
    """One setting as it was written. `value` is text when it came from text, None for YAML's null."""

    key: str
    value: Any
    where: str


def read_text(path: Path, what: str = "file") -> str:
    """The file's text. Raises UserError: missing, a folder, unreadable, not UTF-8."""
    try:
        data = path.read_bytes()
        if other := other_encoding(data):
            raise UserError(f"{path}: {other}")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, byte {error.start} is not; is this the right {what}?") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the {what}: {error.strerror}") from None


MAX_YAML, MAX_VALUES, MAX_DEPTH = 1 << 18, 20_000, 16  # characters; values after aliases; levels of mappings and lists
MAX_KEYS, MAX_KEY = 500, 200  # names, their characters


def from_yaml(text: str, name: str) -> list[Leaf]:
    """Every scalar and list of a YAML mapping, with `name:line`. Raises UserError at YAML mistakes, double keys, and
    what is no config by its size or nesting."""
    import yaml

    if len(text) > MAX_YAML:
        raise UserError(f"{name}: {len(text):,} characters, more than a config can have ({MAX_YAML:,})")
    problems = Problems()
    try:
        if not _is_flat(text, MAX_DEPTH):
            raise UserError(f"{name}: more than {MAX_DEPTH} levels, too many for a config")
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{name}:{root.start_mark.line + 1}: expected `key: value` lines, got a {root.id}")
        _refuse_large(root, name)
        leaves = list(itertools.islice(_walk(loader, root, "", name, problems), MAX_KEYS + 1))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{name}:{line}: a control character; is this a text file?") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        at = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise UserError(f"{at}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if len(leaves) > MAX_KEYS:
        raise UserError(f"{name}: more than {MAX_KEYS} settings; is this a config?")
    problems.raise_if_any()
    return leaves


def _is_flat(text: str, levels: int) -> bool:
    """Whether mappings and lists stand in at most so many levels; looked at before anything recursive is done."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > levels:
            return False
    return True


def _refuse_large(root: Any, name: str) -> None:
    """Raises UserError where a few aliases stand for many values, or one leads back to itself."""
    import yaml

    sizes: dict[int, int] = {}  # by node, with what its aliases stand for; 0 while it is counted

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0
            inner: Iterable[Any] = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = itertools.chain.from_iterable(inner) if isinstance(node, yaml.MappingNode) else inner
            sizes[id(node)] = 1 + sum(map(size, parts))
        elif not sizes[id(node)]:
            raise UserError(f"{name}:{node.start_mark.line + 1}: an alias that stands inside what it stands for")
        return sizes[id(node)]

    if size(root) > MAX_VALUES:
        raise UserError(f"{name}: its aliases stand for {size(root):,} values, a config has {MAX_VALUES:,} at most")


def _walk(loader: Any, node: Any, prefix: str, name: str, problems: Problems) -> Iterator[Leaf]:
    import yaml

    loader.flatten_mapping(node)
    seen: dict[str, int] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or len(key_node.value) > MAX_KEY:
            problems.append(f"{name}:{line}: expected a name before the colon, of at most {MAX_KEY} characters")
            continue
        key = prefix + key_node.value
        if key in seen:
            problems.append(f"{name}:{line}: {key} is given twice, first in line {seen[key]}")
        seen[key] = line
        if isinstance(value, yaml.MappingNode):
            yield from _walk(loader, value, key + ".", name, problems)
        else:
            yield Leaf(key, _plain(value, f"{name}:{line}: {key}", problems), f"{name}:{line}")


def _plain(node: Any, what: str, problems: Problems) -> Any:
    """A scalar's own text (the schema types it: YAML reads 1e-3 as a string and `on` as a bool), a list, or None."""
    import yaml

    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        problems.append(f"{what}: the YAML tag {node.tag} means nothing here")
        return None
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag.endswith(":null") else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [item.value for item in node.value]
    problems.append(f"{what}: expected a value or a flat list of values")
    return None


def from_args(args: Iterable[str], where: str = "command line", example: str = EXAMPLE) -> list[Leaf]:
    """`a.b=c`, `--a.b=c` and `--a.b c`, split at the first `=` only. Raises UserError for anything else."""
    leaves, problems, rest = [], Problems(), list(args)
    while rest:
        arg = rest.pop(0)
        key, equals, value = arg.partition("=")
        flag = key.startswith("--")
        key = key.removeprefix("--").replace("-", "_")
        if flag and not equals and rest and not rest[0].startswith("--"):
            value, equals = rest.pop(0), "="
        if not equals or not key.strip():
            shape = f"{arg} VALUE" if flag else "KEY=VALUE"
            problems.append(f"{arg!r}: expected {shape}, such as {example}")
            continue
        leaves.append(Leaf(key.strip(), value, where))
    problems.raise_if_any()
    return leaves


def from_mapping(values: dict[str, Any], where: str = "dict", prefix: str = "") -> Iterator[Leaf]:
    """Every leaf of a nested dict of Python values."""
    if prefix.count(".") > MAX_DEPTH:
        raise UserError(f"{where}: {prefix[:80]}..: more than {MAX_DEPTH} levels, too many for a config")
    for key, value in values.items():
        if isinstance(value, dict):
            yield from from_mapping(value, where, f"{prefix}{key}.")
        else:
            yield Leaf(f"{prefix}{key}", value, where)


def split_list(text: str) -> list[str]:
    """`[a, "b c"]` or `(a, b)` -> its parts as text; anything else -> one part, and so the name of a file that is
    there, whatever it looks like. Raises ValueError when not closed."""
    import yaml

    stripped = text.strip()
    if not stripped.startswith(("[", "(")) or os.path.exists(text):
        return [text]
    if len(stripped) > MAX_YAML:
        raise ValueError(f"a list of {len(stripped):,} characters, at most {MAX_YAML:,} are read")
    if stripped[0] == "(" and stripped[-1] == ")":
        stripped = f"[{stripped[1:-1]}]"
    try:
        items = yaml.load(stripped, Loader=yaml.BaseLoader) if _is_flat(stripped, 1) else None
    except yaml.YAMLError:
        raise ValueError("a list that is not closed") from None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("not a flat list")
    return items


def unknown_key(key: str, known: Sequence[str]) -> str:
    """What to say about a key that the schema does not have: ours for a peer's name, or the nearest spelling."""
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
    pool = [name for name in known if name.startswith(group + ".")] or known
    hint = did_you_mean(key, pool) or did_you_mean(key, known)
    leaves = {name.rpartition(".")[2]: name for name in known} | {
        peer: ours for peer, ours in ALIASES.items() if ours in known
    }
    if not hint and (near := nearest(last, leaves, cutoff=0.7)):
        hint = f"; did you mean {leaves[near]}?"
    return f"unknown key {key}{hint or '; `gptjax VERB --help` lists what a verb reads'}"
