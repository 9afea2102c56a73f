"""The model's public functions, all pure functions of the parameters: initialisation, forward pass, KV cache, taps."""

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
from gptjax._moved import moved_name
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
    """Draws the initial parameters: a nested dict of float32 arrays; the arrays of the blocks are stacked [L, ..].

    init=gpt2 follows Hugging Face's GPT-2: matrices are drawn from normal distributions with mean 0 and standard
    deviation 0.02 (output projections: 0.02 / sqrt(2L), token embeddings: embed_std), and biases are 0. init=torch uses
    PyTorch's defaults: embeddings are drawn from N(0, 1), and linear layers from U(+-1/sqrt(in)), so that the expected
    initial loss of GPT-2 with an untied head is ln V + 1/6.
    """
    return _init(key, dataclasses.replace(cfg, unroll=False))


@partial(jax.jit, static_argnums=1)
def _init(key: jax.Array, cfg: ModelConfig) -> Params:
    """Draws the parameters. `cfg.unroll` must be False, so that layers are scanned.

    With 40 unrolled layers, compiling this function took half a minute.
    """
    return GPT(cfg).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def abstract_params(cfg: ModelConfig) -> Params:
    """Returns the tree of `init_params`, with a `jax.ShapeDtypeStruct` for each array; allocates no arrays."""
    return jax.eval_shape(lambda key: init_params(key, cfg), jax.random.key(0))


@with_matmul_precision
def backbone(
    params: Params,
    tokens: jax.Array,
    cfg: ModelConfig,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    subtree_end: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    patches: Patches | None = None,
) -> jax.Array:
    """Computes the last hidden state [B, T, D], after the final norm, of token ids [B, T].

    Args:
        positions: position of each token, [B, T] or [T] int32. None: positions are counted from 0 within each document.
        segment_ids: document of each token, [B, T] int32; a token attends only to tokens of its own document. Padding
            counts as one more document.
        subtree_end: [B, T] int32, for documents that are token trees: index in the row from which on each token is no
            longer visible (see `data.token_tree`). It needs `positions`, and a model without cfg.smear. None: every
            document is a plain sequence.
        dropout_key: random key for dropout, or None for no dropout.
        patches: maps paths (or patterns of paths) of activations to their patches. A patch is an array that replaces
            the activation, a function that computes the replacement from the activation, a `Patch`, or a tuple of
            these. Paths and shapes are listed in `gptjax.model.activations`.

    Raises:
        UserError: a patch matches no activation, or its shape does not fit the activation; or `subtree_end` is given
            without `positions`, or for a model with cfg.smear, which reads the token before each token in the row.
    """
    if subtree_end is not None and (positions is None or cfg.smear):
        raise UserError("subtree_end: token trees need positions, and a model with smear=false")
    placed, model = activations.place(patches, cfg), GPT(cfg)
    return model.apply({"params": params}, tokens, positions, segment_ids, dropout_key, None, placed, subtree_end)[0]


def _check(tokens: Any, cfg: ModelConfig, positions: Any) -> None:
    if not isinstance(cfg, ModelConfig):
        raise UserError(
            f"cfg: expected a ModelConfig, got {type(cfg).__name__}; under jit make it a static argument: "
            "jax.jit(forward, static_argnums=2), or close over it"
        )
    shape = getattr(tokens, "shape", None)
    if shape is None or len(shape) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        got = f"{tokens.dtype}{list(shape)}" if shape is not None else type(tokens).__name__
        raise UserError(f"tokens: expected integer ids [B, T], got {got}; for a single sequence use tokens[None]")
    if cfg.position == "learned" and positions is None and shape[1] > cfg.context_length:
        raise UserError(
            f"tokens: {shape[1]} per row, and the position table has {cfg.context_length} rows: use fewer tokens"
        )
    check_ids("tokens", tokens, cfg.vocab_size)


@with_matmul_precision
def head_factors(params: Params, hidden: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns two plain arrays, hidden' [.., D'] and kernel' [D', V], whose product is the logits of hidden [.., D].

    The logits are those before the softcap. D' is D, or larger if the head has an adapter with dropout. An adapter of a
    tied embedding table has no dropout, as in PEFT.
    """
    if cfg.tie_embeddings:
        return hidden, dense(params["wte"]["embedding"]).T
    return factors(params["lm_head"]["kernel"], hidden)


@with_matmul_precision
def lm_logits(params: Params, hidden: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Computes the logits [.., V] float32 of hidden states [.., D], and applies the softcap cfg.logit_softcap.

    The logits are never rounded to bfloat16.
    """
    if cfg.dtype != "float32":
        hidden = hidden.astype(jnp.float32)  # `matmul` returns the dtype of its input: float32 is needed here
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
    """Computes the logits [B, T, V] float32 of token ids [B, T] int32. Keyword arguments are passed to `backbone`.

    Ids outside the vocabulary raise an error, except under `jit`, where ids are not known and are clipped instead.

    Raises:
        UserError: `tokens` is not an integer array [B, T], an id is outside the vocabulary, T exceeds the number of
            rows of the learned position table (checked only without `positions`), or `cfg` is not a `ModelConfig`, for
            example because it is traced.
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
    """Returns the logits [B, T, V] of `forward`, and the activations named by `taps` as a dict from path to array.

        logits, acts = tapped(params, tokens, cfg, ("blocks/*/attn/out", "blocks/3/resid"))
        acts["blocks/*/attn/out"]   [L, B, T, D]
        acts["blocks/3/resid"]      [B, T, D]

    The paths of activations are listed in `gptjax.model.activations`. A patched activation is returned with its patch
    applied. The returned activations can be used as patches: `forward(params, tokens, cfg, patches=acts)` gives the
    same logits. With stacked parameters, tapping an activation in one layer takes as much memory as tapping it in all
    layers.

    Raises:
        UserError: a tap or a patch matches no activation, or a patch's shape does not fit.
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
    """Runs the model on tokens [B, T] that follow the tokens of the cache, for prefill (T > 1) or decoding (T == 1).

    Args:
        lengths: [B] int32, the number of new tokens in each row; the rest of a row is padding, which the cache does not
            keep and whose logits are meaningless. If `lengths` is None, all T tokens are new.
        patches: activation patches as in `backbone`, applied to the T new tokens. The cache holds patched keys and
            values.

    Returns:
        logits [B, T, V] float32, and the cache extended by the new tokens. The caller must keep cache.length + T within
        the cache's slots.

    Raises:
        UserError: any error that `forward` raises, or the tokens do not fit into the cache (checked only outside `jit`,
            where the lengths are known).
    """
    _check(tokens, cfg, None)
    # the lengths are checked where they are known; under `jit`, tokens that do not fit overwrite the last slots
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
    """Like `extend`, but also returns the activations named by `taps`, as `tapped` does."""
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
    """Like `extend`, but returns the last hidden state [B, T, D] in place of the logits.

    Prefill needs the logits of the last token only, and computes them from that token's hidden state with `lm_logits`.
    """
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
    """Raises an error if the model is a classifier, for callers that need a language model.

    In a classifier, the language-modelling head was not trained together with the other parameters, and classifiers
    from Hugging Face have no such head.

    Args:
        source: the model's name or path, as the user gave it.
        way_out: advice at the end of the error message; if it is empty, the advice is to use `gptjax classify`.

    Raises:
        UserError: the model has a classification head.
    """
    if cfg.n_classes:
        kind, use = f"classifier of {cfg.n_classes} classes", f'gptjax classify {source or "RUN"} "TEXT"'
        use = f"{use} tells the class of a text"
        if cfg.n_classes == 1:
            kind = "reward model"
            use = f"gptjax sample MODEL chat=true n=8 pick=reward reward_model={source or 'RUN'} uses it"
        raise UserError(f"{source or 'the model'} is a {kind}, which does not write: {way_out or use}")


def grow_vocabulary(
    params: Params, cfg: ModelConfig, vocab_size: int, *, used: int | None = None
) -> tuple[Params, ModelConfig]:
    """Initialises the rows of new tokens in the token embeddings and the head; adds rows if there are too few.

    The row of every new token is the mean of the rows of the existing tokens. The logits of existing tokens do not
    change. The embeddings of a model may have more rows than its tokenizer has tokens (Qwen2.5: 151,936 rows and
    151,665 tokens); new tokens use these spare rows before any rows are added.

    Args:
        params: parameters, all of them plain arrays.
        vocab_size: vocabulary size of the extended tokenizer (`tokenizers.extend`).
        used: vocabulary size of the tokenizer before it was extended; rows from this index on are initialised anew.
            If `used` is None, all existing rows are kept.

    Raises:
        UserError: `vocab_size` is below `used`, or `used` is above the number of rows of the token embedding.
    """
    used = min(cfg.vocab_size, vocab_size) if used is None else used
    if not 1 <= used <= min(cfg.vocab_size, vocab_size):
        raise UserError(
            f"vocab_size={vocab_size}, used={used}: the model has {cfg.vocab_size} rows; expected "
            "1 <= used <= rows, and used <= vocab_size"
        )
    rows = max(vocab_size, cfg.vocab_size)

    def resized(w: jax.Array, axis: int) -> jax.Array:
        old = jax.lax.slice_in_dim(w, 0, used, axis=axis)
        new = jnp.repeat(old.mean(axis, keepdims=True, dtype=jnp.float32).astype(w.dtype), vocab_size - used, axis)
        spare = jax.lax.slice_in_dim(w, min(vocab_size, cfg.vocab_size), None, axis=axis)
        return jnp.concatenate([old, new, spare], axis)

    params = params | {"wte": {"embedding": resized(params["wte"]["embedding"], 0)}}
    if not cfg.tie_embeddings:
        params |= {"lm_head": {"kernel": resized(params["lm_head"]["kernel"], 1)}}
    return params, dataclasses.replace(cfg, vocab_size=rows)


def unstack_layers(params: Params, cfg: ModelConfig) -> Params:
    """Splits the stacked layers `blocks` into `blocks_0`, `blocks_1`, ..; this module's functions accept both layouts.

    With one tree per layer some layers can be trained while the others are frozen: no gradients are computed for frozen
    layers, and backpropagation stops at the lowest trained layer.
    """
    rest = {name: node for name, node in params.items() if name != "blocks"}
    return rest | {f"blocks_{i}": jax.tree.map(lambda leaf: leaf[i], params["blocks"]) for i in range(cfg.n_layer)}  # noqa: B023


def stack_layers(params: Params, cfg: ModelConfig) -> Params:
    """Stacks the layers `blocks_0`, `blocks_1`, .. as `blocks` [L, ..]: the inverse of `unstack_layers`."""
    names = [f"blocks_{i}" for i in range(cfg.n_layer)]
    rest = {name: node for name, node in params.items() if name not in names}
    return rest | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))}


def for_decoding(params: Params, cfg: ModelConfig) -> Params:
    """Returns the parameters in the fastest layout for decoding one token at a time.

    All functions of this module accept the decoding layout, but parameters in this layout must not be saved. The layers
    are unstacked, because slicing a layer's weights out of the stacked arrays takes as long as the matrix products with
    these weights. The matrices of q, k and v are concatenated as `qkv`, and the matrices of up and gate as `up_gate`,
    unless the matrices differ in type. The matrices of unstacked layers are stored transposed, so that each column is
    contiguous, if their type supports this layout.

    On a CPU the stacked layers are kept as well: prefill of a short prompt uses them, because it then compiles faster.

    On a GPU the stacked layers are not kept; if memory is short, delete `params` after this call. A model of more than
    48 layers is not unstacked on a GPU. If cfg.dtype is bfloat16, matrices are cast to bfloat16 on a GPU, because they
    are multiplied in that dtype. On a GPU, the vocabulary axis of the head is also padded to a multiple of 128.

    The parameters are returned unchanged on a TPU, on several devices, and if their layers are already unstacked.
    """
    known = (leaf for leaf in jax.tree.leaves(params) if not isinstance(leaf, np.ndarray | jax.core.Tracer))
    sharded = device.mesh() is not None or any(len(leaf.devices()) > 1 for leaf in known)
    if device.platform() == "tpu" or "blocks_0" in params or sharded:
        return params
    keep_stack = device.platform() == "cpu"
    if not keep_stack:
        params = _in_low_precision(params, cfg)
    if not keep_stack and cfg.n_layer > _MAX_UNSTACKED:
        return params | {"blocks": _joined(params["blocks"])}
    layers = {f"blocks_{i}": _decoding_layer(params["blocks"], i, device.platform()) for i in range(cfg.n_layer)}
    return {name: node for name, node in params.items() if keep_stack or name != "blocks"} | layers


def _in_low_precision(params: Params, cfg: ModelConfig) -> Params:
    """Casts matrices to bfloat16 if cfg.dtype is bfloat16, and pads the head's vocabulary axis to a multiple of 128.

    The logits do not change, because matrix multiplications cast their operands to cfg.dtype anyway.
    """

    def cast(path: tuple, leaf: Any) -> Any:
        top, last = (getattr(key, "key", None) for key in (path[0], path[-1]))
        if last not in ("kernel", "embedding") or not jnp.issubdtype(leaf.dtype, jnp.floating) or top == "cls_head":
            return leaf
        leaf = leaf.astype(cfg.dtype) if cfg.dtype == "bfloat16" else leaf
        if top == "wte" and cfg.tie_embeddings:
            return aligned_columns(leaf.T).T
        return aligned_columns(leaf) if top == "lm_head" else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


# largest number of layers to unstack on a GPU; unstacked layers are compiled separately, so that compilation takes
# longer with every layer
_MAX_UNSTACKED = 48
_CONCATENATED = {"attn": ("qkv", ("q", "k", "v")), "mlp": ("up_gate", ("up", "gate"))}


@partial(jax.jit, static_argnums=2)
def _decoding_layer(stack: Params, i: jax.Array, platform: str) -> Params:
    """Returns layer `i` in the layout of `for_decoding`; `platform` is static because the layout depends on it."""
    layer = _joined(jax.tree.map(lambda leaf: leaf[i], stack))
    return tree.unflatten({
        path: transposed(leaf) if path.endswith("/kernel") else leaf for path, leaf in tree.flatten_nodes(layer).items()
    })  # fmt: skip


def _joined(blocks: Params) -> Params:
    """Concatenates the matrices that have the same input into `qkv` and `up_gate`, in one layer or stacked layers."""
    out = dict(blocks)
    for module, (name, sources) in _CONCATENATED.items():
        node = blocks[module]
        if any(source not in node or node[source].keys() != node[sources[0]].keys() for source in sources):
            continue
        leaves = {key: [node[source][key] for source in sources] for key in node[sources[0]]}
        wide = {key: side_by_side(*group) for key, group in leaves.items()}
        if all(leaf is not None for leaf in wide.values()):
            out[module] = {key: leaf for key, leaf in node.items() if key not in sources} | {name: wide}
    return out


def __getattr__(name: str) -> Any:
    """Looks up renamed functions by their old names."""
    return moved_name(__name__, name)
