"""This module defines the public functions of the model: initialisation, forward pass, decoding with a KV cache, and
taps.

Every function of this module is a pure function of the parameters.
"""

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
    """Returns randomly initialised parameters: a nested dict of float32 arrays, with the blocks' arrays stacked [L,
    ..].

    With init=gpt2, as in Hugging Face's GPT-2, matrices are drawn from normal distributions with mean 0 and standard
    deviation 0.02 (output projections: 0.02 / sqrt(2L), token embeddings: embed_std), and biases are 0. With
    init=torch, as by default in PyTorch, embeddings are drawn from N(0, 1) and the weights of linear layers from
    U(-1/sqrt(in), 1/sqrt(in)). With init=torch, the expected initial loss of GPT-2 with an untied head is ln V + 1/6
    for the vocabulary size V.
    """
    return _init(key, dataclasses.replace(cfg, unroll=False))


@partial(jax.jit, static_argnums=1)
def _init(key: jax.Array, cfg: ModelConfig) -> Params:
    """Returns randomly initialised parameters; `cfg.unroll` must be False, so that the layers run in a scan.

    Compiling `_init` for 40 unrolled layers took half a minute.
    """
    return GPT(cfg).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def abstract_params(cfg: ModelConfig) -> Params:
    """Returns the parameter tree of `init_params` with a `jax.ShapeDtypeStruct` in place of each array, without
    allocating memory."""
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
    """Returns the hidden states [B, T, D] after the final norm for the token ids [B, T].

    Args:
        positions: position of each token, [B, T] or [T] int32. None: positions count from 0 within each document.
        segment_ids: id of the document of each token, [B, T] int32. A token attends only to tokens of the same
            document. Padding counts as one more document.
        subtree_end: for documents that are token trees, the index in the row from which on each token is no longer
            visible, [B, T] int32 (see `data.token_tree`). `subtree_end` requires `positions` and a model without
            cfg.smear. None: every document is a plain sequence.
        dropout_key: PRNG key for dropout, or None for no dropout.
        patches: maps paths (or patterns of paths) of activations to their patches. A patch is an array that replaces
            the activation, a function that computes the replacement from the activation, a `Patch`, or a tuple of
            patches. `gptjax.model.activations` lists the paths and shapes of activations.

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
    """Returns two plain arrays, hidden' [.., D'] and kernel' [D', V], whose product is the logits of `hidden` [.., D]
    before the softcap.

    The number of channels D' of hidden' equals D unless the head has an adapter with dropout, for which D' is larger
    than D. An adapter of a tied embedding table has no dropout, as in PEFT.
    """
    if cfg.tie_embeddings:
        return hidden, dense(params["wte"]["embedding"]).T
    return factors(params["lm_head"]["kernel"], hidden)


@with_matmul_precision
def lm_logits(params: Params, hidden: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Returns the logits [.., V] float32 of the hidden states [.., D], after the softcap `cfg.logit_softcap`.

    The logits are never rounded to bfloat16.
    """
    if cfg.dtype != "float32":
        # `matmul` returns logits in the dtype of `hidden`, and the logits must be float32.
        hidden = hidden.astype(jnp.float32)
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
    """Returns the logits [B, T, V] float32 for the token ids [B, T] int32. The keyword arguments are passed to
    `backbone`.

    Token ids outside the vocabulary raise an error. Under `jit`, the values of token ids are unknown, and ids outside
    the vocabulary are clipped.

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
    """Returns the logits [B, T, V] of `forward`, and a dict from path to array of the activations that `taps` selects.

        logits, acts = tapped(params, tokens, cfg, ("blocks/*/attn/out", "blocks/3/resid"))
        acts["blocks/*/attn/out"]   [L, B, T, D]
        acts["blocks/3/resid"]      [B, T, D]

    `gptjax.model.activations` lists the paths of activations. If an activation is both tapped and patched, the patched
    activation is returned. The activations `acts` that `tapped` returns can be used as patches: `forward(params,
    tokens, cfg, patches=acts)` gives the same logits as `tapped`. With stacked parameters, tapping an activation in one
    layer takes as much memory as tapping the activation in all layers.

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
    """Runs the model on tokens [B, T] that follow the tokens in the KV cache, for prefill (T > 1) or decoding (T == 1).

    Args:
        lengths: the number of new tokens in each row, [B] int32. The rest of a row is padding: the cache does not keep
            padding tokens, and the logits of padding tokens are meaningless. If `lengths` is None, all T tokens are
            new.
        patches: activation patches as in `backbone`, applied to the T new tokens. The cache stores the patched keys and
            values.

    Returns:
        the logits [B, T, V] float32, and the cache extended by the new tokens. The caller must ensure that cache.length
        + T does not exceed the number of slots of the cache.

    Raises:
        UserError: any error that `forward` raises, or the tokens do not fit into the cache (checked only outside `jit`,
            where the lengths are known).
    """
    _check(tokens, cfg, None)
    # Outside `jit`, the number of tokens in each row of the KV cache is known and checked. Under `jit`, tokens that do
    # not fit into the KV cache overwrite the last slots.
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
    """Returns the logits and the cache of `extend`, and the activations that `taps` selects as in `tapped`."""
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
    """Returns the hidden states [B, T, D] after the final norm, and the extended KV cache, for the arguments of
    `extend`.

    Prefill needs only the logits of the last token, and computes these logits with `lm_logits` from the hidden state of
    the last token.
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
    """Raises a UserError if the model is a classifier, for callers that need a language model.

    The language-modelling head of a classifier was not trained together with the classifier's other parameters.
    Classifiers from Hugging Face have no language-modelling head.

    Args:
        source: the name or path of the model, as the user gave it.
        way_out: advice at the end of the error message. If `way_out` is empty, the message recommends `gptjax
            classify`.

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
    """Returns the parameters and the config with initialised rows for new tokens in the token embeddings and the head.

    In the token embeddings and the head, the row of every new token is the mean of the rows of the existing tokens. The
    logits of existing tokens do not change. The token embeddings of a model may have more rows than the tokenizer has
    tokens (Qwen2.5: 151,936 rows and 151,665 tokens). New tokens use the spare rows of the token embeddings before
    further rows are added.

    Args:
        params: parameters, which must all be plain arrays.
        vocab_size: vocabulary size of the extended tokenizer (`tokenizers.extend`).
        used: vocabulary size of the tokenizer before the extension; rows from this index on are initialised anew. If
            `used` is None, all existing rows are kept.

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
    """Returns parameters in which the stacked layers `blocks` are split into the trees `blocks_0`, `blocks_1` and so
    on.

    All functions of this module accept both the stacked and the unstacked layout of the parameters. With one tree per
    layer, training can freeze individual layers: JAX computes no gradients for frozen layers, and backpropagation stops
    at the lowest trained layer.
    """
    rest = {name: node for name, node in params.items() if name != "blocks"}
    return rest | {f"blocks_{i}": jax.tree.map(lambda leaf: leaf[i], params["blocks"]) for i in range(cfg.n_layer)}  # noqa: B023


def stack_layers(params: Params, cfg: ModelConfig) -> Params:
    """Returns parameters in which the trees `blocks_0`, `blocks_1` and so on are stacked into one tree `blocks` [L,
    ..].

    `stack_layers` is the inverse of `unstack_layers`.
    """
    names = [f"blocks_{i}" for i in range(cfg.n_layer)]
    rest = {name: node for name, node in params.items() if name not in names}
    return rest | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))}


def for_decoding(params: Params, cfg: ModelConfig) -> Params:
    """Returns the parameters in the fastest layout for decoding one token at a time.

    All functions of this module accept the parameters that `for_decoding` returns, but these parameters must not be
    saved. `for_decoding` unstacks the layers, because slicing a layer's weights out of the stacked arrays takes as long
    as the matrix products with these weights. The weight matrices of q, k and v are concatenated into `qkv`, and the
    weight matrices of up and gate into `up_gate`, unless the matrices differ in type. The weight matrices of unstacked
    layers are stored transposed if their type supports this layout, so that each column is contiguous.

    On a CPU, the result of `for_decoding` contains both the unstacked and the stacked layers, because prefill of a
    short prompt compiles faster with stacked layers.

    On a GPU, the result of `for_decoding` does not contain the stacked layers. To free memory, delete `params` after
    `for_decoding` has returned. On a GPU, `for_decoding` does not unstack models with more than 48 layers. On a GPU,
    matrices are cast to bfloat16 if cfg.dtype is bfloat16, because matrix products cast their operands to bfloat16
    anyway. On a GPU, `for_decoding` pads the vocabulary axis of the head to a multiple of 128.

    `for_decoding` returns the parameters unchanged on a TPU, on several devices, and if the layers are already
    unstacked.
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
    """Returns the parameters with the head's vocabulary axis padded to a multiple of 128, and with matrices cast to
    bfloat16 if cfg.dtype is bfloat16.

    The cast to bfloat16 does not change the logits, because matrix multiplications cast their operands to cfg.dtype
    anyway.
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


# _MAX_UNSTACKED is the largest number of layers that `for_decoding` unstacks on a GPU. XLA compiles every unstacked
# layer separately, so that the compilation time grows with the number of layers.
_MAX_UNSTACKED = 48
_CONCATENATED = {"attn": ("qkv", ("q", "k", "v")), "mlp": ("up_gate", ("up", "gate"))}


@partial(jax.jit, static_argnums=2)
def _decoding_layer(stack: Params, i: jax.Array, platform: str) -> Params:
    """Returns the parameters of layer `i` in the layout of `for_decoding`, which depends on the static `platform`."""
    layer = _joined(jax.tree.map(lambda leaf: leaf[i], stack))
    return tree.unflatten({
        path: transposed(leaf) if path.endswith("/kernel") else leaf for path, leaf in tree.flatten_nodes(layer).items()
    })  # fmt: skip


def _joined(blocks: Params) -> Params:
    """Returns the parameters of one layer or of stacked layers with the matrices that share an input concatenated.

    The matrices of q, k and v are concatenated into `qkv`, and the matrices of up and gate into `up_gate`.
    """
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
    """Returns the function of this module that formerly had the given name, with a DeprecationWarning."""
    return moved_name(__name__, name)
