"""The doors of the model: pure functions of a parameter tree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import tree
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model import activations
from gptjax.model.activations import Patches
from gptjax.model.cache import Cache
from gptjax.model.layers import GPT
from gptjax.ops import device
from gptjax.ops.ids import check_ids, is_local
from gptjax.ops.linear import aligned_columns, dense, factors, matmul, matmul_transposed, side_by_side, transposed
from gptjax.ops.loss import softcap
from gptjax.ops.precision import with_matmul_precision
from gptjax.types import Params


def init_params(key: jax.Array, cfg: ModelConfig) -> Params:
    """Fresh parameters, a nested dict of float32 arrays; blocks are stacked [L, ..].

    init=gpt2: N(0, 0.02), output projections 0.02 / sqrt(2L), embeddings N(0, embed_std), biases 0 (GPT-2's code).
    init=torch: embeddings N(0, 1), linears U(+-1/sqrt(in)), as PyTorch's layers start; the expected first loss of
    gpt2 with an untied head is then ln V + 1/6.
    """
    return _init(key, dataclasses.replace(cfg, unroll=False))


@partial(jax.jit, static_argnums=1)
def _init(key: jax.Array, cfg: ModelConfig) -> Params:
    """One layer for all: unrolled, forty of them took half a minute to compile."""
    return GPT(cfg).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def abstract_params(cfg: ModelConfig) -> Params:
    """The tree of `init_params` as shapes and dtypes, in no memory."""
    return jax.eval_shape(lambda key: init_params(key, cfg), jax.random.key(0))


@with_matmul_precision
def backbone(
    params: Params,
    tokens: jax.Array,
    cfg: ModelConfig,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    patches: Patches | None = None,
) -> jax.Array:
    """Token ids [B, T] -> the last hidden state [B, T, D], after the final norm.

    Args:
        positions: [B, T] or [T] int32; None: 0..T-1, from 0 again in every document.
        segment_ids: [B, T] int32; a token sees its own document only. Padding is one more document.
        dropout_key: None: no dropout.
        patches: what takes the place of activations, {path or pattern: array, function (x) -> x, or `Patch`}; the
            paths, and what fits them, stand in `gptjax.model.activations`.

    Raises:
        UserError: a patch that matches or fits no activation.
    """
    placed = activations.place(patches, cfg)
    return GPT(cfg).apply({"params": params}, tokens, positions, segment_ids, dropout_key, None, placed)[0]


def _check(tokens: Any, cfg: ModelConfig, positions: Any) -> None:
    if not isinstance(cfg, ModelConfig):
        raise UserError(
            f"cfg: expected a ModelConfig, got {type(cfg).__name__}; under jit it is static: "
            "jax.jit(forward, static_argnums=2), or a function that closes over it"
        )
    shape = getattr(tokens, "shape", None)
    if shape is None or len(shape) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        got = f"{tokens.dtype}{list(shape)}" if shape is not None else type(tokens).__name__
        raise UserError(f"tokens: expected integer ids [B, T], got {got}; a single row is tokens[None]")
    if cfg.position == "learned" and positions is None and shape[1] > cfg.context_length:
        raise UserError(f"tokens: {shape[1]} in a row, and the position table has {cfg.context_length}: give fewer")
    check_ids("tokens", tokens, cfg.vocab_size)


@with_matmul_precision
def head_factors(params: Params, hidden: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """[.., D] -> hidden' [.., D'] and kernel' [D', V], whose product is the logits: D' is D, and more where the head
    has an adapter with dropout. An adapter of a tied table has no dropout (peft: none in embeddings)."""
    if cfg.tie_embeddings:
        return hidden, dense(params["wte"]["embedding"]).T
    return factors(params["lm_head"]["kernel"], hidden)


@with_matmul_precision
def lm_logits(params: Params, hidden: jax.Array, cfg: ModelConfig) -> jax.Array:
    """[.., D] -> [.., V] float32, softcapped where cfg says so: the float32 sum of the product, never rounded."""
    if cfg.dtype != "float32":
        hidden = hidden.astype(jnp.float32)  # a product is given in its input's dtype; its operands are cfg.dtype
    head = params["wte"]["embedding"] if cfg.tie_embeddings else params["lm_head"]["kernel"]
    if isinstance(head, jax.Array) and device.platform() == "gpu" and device.mesh() is None:
        kernel = aligned_columns(head.T if cfg.tie_embeddings else head)
        logits = matmul(kernel, hidden, cfg.dtype)[..., : cfg.vocab_size]
    elif cfg.tie_embeddings:
        logits = matmul_transposed(head, hidden, cfg.dtype)
    else:
        logits = matmul(head, hidden, cfg.dtype)
    return softcap(logits.astype(jnp.float32), cfg.logit_softcap)


def forward(params: Params, tokens: jax.Array, cfg: ModelConfig, **context: Any) -> jax.Array:
    """Token ids [B, T] int32 -> logits [B, T, V] float32; keywords as in `backbone`.

    An id outside the vocabulary is noticed where its value is known: under `jit` it counts as the nearest one.

    Raises:
        UserError: tokens of another shape or outside the vocabulary, more of them than a learned position table has
            rows, or a cfg that is traced.
    """
    _check(tokens, cfg, context.get("positions"))
    return lm_logits(params, backbone(params, tokens, cfg, **context), cfg)


@with_matmul_precision
def tapped(
    params: Params,
    tokens: jax.Array,
    cfg: ModelConfig,
    taps: Iterable[str],
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    patches: Patches | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`forward`, and the activations that `taps` name: logits [B, T, V] and {path: array}.

        logits, acts = tapped(params, tokens, cfg, ("blocks/*/attn/out", "blocks/3/resid"))
        acts["blocks/*/attn/out"]   [L, B, T, D]
        acts["blocks/3/resid"]      [B, T, D]

    The paths stand in `gptjax.model.activations`; an activation that is patched too comes as it goes on. What comes
    out can go in: `forward(params, tokens, cfg, patches=acts)` gives the same logits. Of stacked parameters a single
    layer's activation costs the memory of all layers'.

    Raises:
        UserError: a tap or a patch that matches no activation, or does not fit it.
    """
    placed, paths = activations.place(patches, cfg), activations.paths(taps, cfg)
    outs: Any = GPT(cfg, paths).apply({"params": params}, tokens, positions, segment_ids, dropout_key, None, placed)
    hidden, _, seen = outs
    return lm_logits(params, hidden, cfg), seen


def extend(
    params: Params,
    tokens: jax.Array,
    cfg: ModelConfig,
    cache: Cache,
    *,
    lengths: jax.Array | None = None,
    patches: Patches | None = None,
) -> tuple[jax.Array, Cache]:
    """Read tokens [B, T] after those in the cache: prefill (T > 1) and decoding (T == 1) are this one function.

    Args:
        lengths: [B] int32, how many of each row's tokens are real; the rest is padding on the right, whose logits
            mean nothing and which the cache forgets. None: all.
        patches: as in `backbone`; T is that of `tokens`. Keys and values are cached as patched.

    Returns:
        logits [B, T, V] float32 and the cache that now holds these tokens too. The caller keeps
        cache.length + T within the cache's slots.

    Raises:
        UserError: as `forward`; or, where the lengths are known, tokens that do not fit into the cache.
    """
    _check(tokens, cfg, None)
    # where the values are known: under `jit` what does not fit is written into the last slots
    if not any(isinstance(a, jax.core.Tracer) for a in (cache.length, lengths)) and is_local(cache.length):
        slots, context = cache.k.shape[3], cfg.context_length if cfg.position == "learned" else math.inf
        after = int((np.asarray(cache.length) + (tokens.shape[1] if lengths is None else np.asarray(lengths))).max())
        if after > min(slots, context):
            table = f", the position table {context}" if context < slots else ""
            raise UserError(f"tokens: {after} with those in the cache, and the cache has {slots} slots{table}")
    hidden, cache = extend_backbone(params, tokens, cfg, cache, lengths=lengths, patches=patches)
    return lm_logits(params, hidden, cfg), cache


def extend_tapped(
    params: Params,
    tokens: jax.Array,
    cfg: ModelConfig,
    cache: Cache,
    taps: Iterable[str],
    *,
    lengths: jax.Array | None = None,
    patches: Patches | None = None,
) -> tuple[jax.Array, Cache, dict[str, jax.Array]]:
    """`extend`, and the activations that `taps` name, as `tapped` gives them."""
    hidden, cache, seen = _extend(params, tokens, cfg, cache, activations.paths(taps, cfg), lengths, patches)
    return lm_logits(params, hidden, cfg), cache, seen


def extend_backbone(
    params: Params,
    tokens: jax.Array,
    cfg: ModelConfig,
    cache: Cache,
    *,
    lengths: jax.Array | None = None,
    patches: Patches | None = None,
) -> tuple[jax.Array, Cache]:
    """`extend` as far as the last hidden state [B, T, D]: of a long prompt only one place's logits are wanted."""
    return _extend(params, tokens, cfg, cache, (), lengths, patches)[:2]


@with_matmul_precision
def _extend(
    params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache, paths: tuple[str, ...],
    lengths: jax.Array | None, patches: Patches | None,
) -> tuple[jax.Array, Cache, dict[str, jax.Array]]:  # fmt: skip
    T = tokens.shape[1]
    positions = cache.length[:, None] + jnp.arange(T)
    placed = activations.place(patches, cfg)
    outs: Any = GPT(cfg, paths).apply({"params": params}, tokens, positions, None, None, cache, placed)
    hidden, cache, seen = outs
    length = cache.length + (T if lengths is None else lengths)
    return hidden, cache.replace(length=length, empty=False), seen


def refuse_classifier(cfg: ModelConfig, source: str = "", way_out: str = "") -> None:
    """Raises UserError for a model with a classification head, where one that writes is needed: an LM head beside it
    was not trained with the body, and a classifier of Hugging Face has none.

    Args:
        source: how the user named the model. way_out: what to do instead.
    """
    if cfg.n_classes:
        raise UserError(
            f"{source or 'the model'} is a classifier of {cfg.n_classes} classes, which does not write: "
            + (way_out or f'gptjax classify {source or "RUN"} "TEXT" tells the class of a text')
        )


def grow_vocabulary(
    params: Params, cfg: ModelConfig, vocab_size: int, *, used: int | None = None
) -> tuple[Params, ModelConfig]:
    """Parameters and config with more tokens: each new one starts as the mean of the old, and their logits stay.

    A model may have more rows than its tokenizer has tokens (Qwen2.5: 151,936 and 151,665): new tokens take those.

    Args:
        params: plain arrays. vocab_size: of the tokenizer that has grown (`tokenizers.extend`).
        used: of the tokenizer before it grew: the rows from there on start anew. None: rows that are there stay as they
            are.

    Raises:
        UserError: `vocab_size` is less than `used`, or `used` more than the model has.
    """
    used = min(cfg.vocab_size, vocab_size) if used is None else used
    if not 1 <= used <= min(cfg.vocab_size, vocab_size):
        raise UserError(
            f"vocab_size={vocab_size}, used={used}: the model has {cfg.vocab_size} rows; expected 1 or more tokens "
            "before, no more than there are rows, and no fewer after"
        )
    rows = max(vocab_size, cfg.vocab_size)

    def grown(w: jax.Array, axis: int) -> jax.Array:
        old = jax.lax.slice_in_dim(w, 0, used, axis=axis)
        new = jnp.repeat(old.mean(axis, keepdims=True, dtype=jnp.float32).astype(w.dtype), vocab_size - used, axis)
        spare = jax.lax.slice_in_dim(w, min(vocab_size, cfg.vocab_size), None, axis=axis)
        return jnp.concatenate([old, new, spare], axis)

    params = params | {"wte": {"embedding": grown(params["wte"]["embedding"], 0)}}
    if not cfg.tie_embeddings:
        params |= {"lm_head": {"kernel": grown(params["lm_head"]["kernel"], 1)}}
    return params, dataclasses.replace(cfg, vocab_size=rows)


def layers_apart(params: Params, cfg: ModelConfig) -> Params:
    """`blocks_0`, `blocks_1`, .. in the place of the stack `blocks`; the doors take this form too.

    Each layer is a tree of its own, so that one can be trained while the others stay: their gradients are not computed,
    nor anything below the lowest that is.
    """
    rest = {name: node for name, node in params.items() if name != "blocks"}
    return rest | {f"blocks_{i}": jax.tree.map(lambda leaf: leaf[i], params["blocks"]) for i in range(cfg.n_layer)}  # noqa: B023


def layers_stacked(params: Params, cfg: ModelConfig) -> Params:
    """What `layers_apart` came from."""
    names = [f"blocks_{i}" for i in range(cfg.n_layer)]
    rest = {name: node for name, node in params.items() if name not in names}
    return rest | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))}


def for_decoding(params: Params, cfg: ModelConfig) -> Params:
    """The parameters as they are read fastest for one token. The doors take this form too; it is not for saving.

    Layers apart, since reading a layer out of its stack costs as much as the product with it; q, k and v in one matrix
    `qkv`, gate and up in `up_gate`, where they are of one kind; the elements of one column of a kernel together. On a
    CPU beside the stack, which reads a long prompt faster.

    On a GPU they take the place of the stack (keep only one of the two where memory is short), matrices are in bfloat16
    where cfg.dtype is, as which they are multiplied, and the head's columns are padded to a multiple of 128. On a TPU
    and over several devices the parameters stay as they came.
    """
    known = (leaf for leaf in jax.tree.leaves(params) if not isinstance(leaf, np.ndarray | jax.core.Tracer))
    sharded = device.mesh() is not None or any(len(leaf.devices()) > 1 for leaf in known)
    if device.platform() == "tpu" or "blocks_0" in params or sharded:
        return params
    beside = device.platform() == "cpu"
    if not beside:
        params = _in_low_precision(params, cfg)
    if not beside and cfg.n_layer > _MOST_APART:
        return params | {"blocks": _joined(params["blocks"])}
    layers = {f"blocks_{i}": _decoding_layer(params["blocks"], i, device.platform()) for i in range(cfg.n_layer)}
    return {name: node for name, node in params.items() if beside or name != "blocks"} | layers


def _in_low_precision(params: Params, cfg: ModelConfig) -> Params:
    """Matrices in bfloat16 where cfg.dtype is, and the head with aligned columns. The logits are the same: products
    take their operands in that dtype."""

    def low(path: tuple, leaf: Any) -> Any:
        top, last = (getattr(key, "key", None) for key in (path[0], path[-1]))
        if last not in ("kernel", "embedding") or not jnp.issubdtype(leaf.dtype, jnp.floating) or top == "cls_head":
            return leaf
        leaf = leaf.astype(cfg.dtype) if cfg.dtype == "bfloat16" else leaf
        if top == "wte" and cfg.tie_embeddings:
            return aligned_columns(leaf.T).T
        return aligned_columns(leaf) if top == "lm_head" else leaf

    return jax.tree_util.tree_map_with_path(low, params)


_MOST_APART = 48  # layers; every one is compiled by itself
_BESIDE = {"attn": ("qkv", ("q", "k", "v")), "mlp": ("up_gate", ("up", "gate"))}


@partial(jax.jit, static_argnums=2)
def _decoding_layer(stack: Params, i: jax.Array, platform: str) -> Params:
    """`platform` is what the layout depends on: a program for each."""
    layer = _joined(jax.tree.map(lambda leaf: leaf[i], stack))
    return tree.unflatten({
        path: transposed(leaf) if path.endswith("/kernel") else leaf for path, leaf in tree.flatten_nodes(layer).items()
    })  # fmt: skip


def _joined(blocks: Params) -> Params:
    """A layer's tree, or a stack of them, with the matrices that read the same input side by side."""
    out = dict(blocks)
    for module, (name, parts) in _BESIDE.items():
        node = blocks[module]
        if any(part not in node or node[part].keys() != node[parts[0]].keys() for part in parts):
            continue
        leaves = {key: [node[part][key] for part in parts] for key in node[parts[0]]}
        one = {key: side_by_side(*of) for key, of in leaves.items()}
        if all(leaf is not None for leaf in one.values()):
            out[module] = {key: leaf for key, leaf in node.items() if key not in parts} | {name: one}
    return out
