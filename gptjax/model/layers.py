"""This module defines the Flax Linen modules of the decoder, which declare the parameters and call `gptjax.ops`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import ModelConfig
from gptjax.model import activations
from gptjax.model.activations import WEIGHTS, Patch, Placed, Reader
from gptjax.model.cache import Cache
from gptjax.ops import activation, device, position
from gptjax.ops.attention import Branches, attention_weights, heads_attention, weighted_values
from gptjax.ops.dropout import dropout
from gptjax.ops.fused import SAVED
from gptjax.ops.linear import Gathered, linear, take
from gptjax.ops.norm import layer_norm, rms_norm
from gptjax.ops.scale import scaled

# `jax.ad_checkpoint.checkpoint_name` gives the names BLOCK_INPUT and PRODUCT to arrays, so that a rematerialisation
# policy can select these arrays.
BLOCK_INPUT = "block"  # BLOCK_INPUT names the input of each block.
PRODUCT = "product"  # PRODUCT names the output of each linear layer, in the dtype of activations.
_GPU_LAYERS = 12  # On a GPU, one iteration of the scan over layers runs at most _GPU_LAYERS layers.
TOKENS = (device.ROWS, device.CONTEXT, None)  # TOKENS is the partition spec of activations [B, T, D].


class SharedInputs(NamedTuple):
    """Holds the inputs that every block reads in addition to the residual stream and that are equal for all layers."""

    rope: tuple[jax.Array, jax.Array] | None  # `rope` holds the cosines and sines of `_rope_table`.
    segment_ids: jax.Array | None
    branches: Branches | None
    dropout_key: jax.Array | None
    patches: Mapping[str, dict[int, tuple[Patch, ...]]]  # `patches` holds the result of `activations.layer_patches`.


class Residual(NamedTuple):
    """Holds the carry of the scan over layers: the residual stream and other state that passes from block to block."""

    x: jax.Array  # `x` is the residual stream, [B, T, D].
    x0: jax.Array | None  # `x0` is the input of the first block, [B, T, D], or None without cfg.x0_lambdas.
    # `v0` is the attention values of the first layer, [B, T, K, H], or None without cfg.value_residual.
    v0: jax.Array | None
    cache: Cache | None
    layer: jax.Array  # `layer` is the index of the next block, int32.


def _read(module: nn.Module, name: str, init: Callable[..., jax.Array], shape: tuple[int, ...]) -> Any:
    """Returns the parameter `name` of the module, or creates a new array if the module has no such parameter.

    `flax.linen.Module.param` raises an error for existing parameters that are not arrays, such as weights with adapters
    and quantised matrices, but `_read` returns existing parameters of any type.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, jnp.float32)


def normal(std: float) -> Callable[..., jax.Array]:
    return nn.initializers.normal(std) if std else nn.initializers.zeros


def uniform(bound: float) -> Callable[..., jax.Array]:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class Linear(nn.Module):
    """Applies a linear layer, x @ kernel [in, out], with or without a bias.

    With init=torch, kernel and bias are drawn from U(-1/sqrt(in), 1/sqrt(in)). With any other `cfg.init`, the kernel is
    drawn from a normal distribution with mean 0 and standard deviation `std`, and the bias is 0.
    """

    cfg: ModelConfig
    features: int
    bias: bool
    std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d_in = x.shape[-1]
        torch = self.cfg.init == "torch" and self.std > 0
        kernel_init = uniform(d_in**-0.5) if torch else normal(self.std)
        bias_init = uniform(d_in**-0.5) if torch else nn.initializers.zeros
        kernel = _read(self, "kernel", kernel_init, (d_in, self.features))
        bias = _read(self, "bias", bias_init, (self.features,)) if self.bias else None
        axes = device.product_axes("/".join((*self.path, "kernel")))
        if axes is not None and isinstance(kernel, jax.Array):
            kernel = Gathered(kernel, axes)
        return checkpoint_name(linear(x, kernel, bias, self.cfg.dtype), PRODUCT)


class Norm(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, D = self.cfg, x.shape[-1]
        scale = _read(self, "scale", nn.initializers.ones, (D,)) if cfg.norm_scale else None
        if cfg.norm == "rmsnorm":
            return rms_norm(x, scale, cfg.norm_eps)
        bias = _read(self, "bias", nn.initializers.zeros, (D,)) if cfg.norm_bias else None
        return layer_norm(x, scale, bias, cfg.norm_eps)


class Attention(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, stream: Residual, shared: SharedInputs, key: jax.Array | None, tap: Reader
    ) -> tuple[jax.Array, jax.Array | None, Cache | None]:
        """Returns the attention output [B, T, D], the attention values of the first layer, and the updated KV cache."""
        cfg = self.cfg
        B, T, _ = x.shape
        H, K = cfg.head_dim, cfg.n_kv_head
        window = jnp.array(cfg.windows)[stream.layer] if len(set(cfg.windows)) > 1 else cfg.windows[0]
        sizes = {"q": cfg.n_head * H, "k": K * H, "v": K * H}
        if self.has_variable("params", "qkv"):
            qkv = Linear(cfg, sum(sizes.values()), cfg.qkv_bias, name="qkv")(x)
            q, k, v = jnp.split(qkv, (sizes["q"], sizes["q"] + sizes["k"]), axis=-1)
        else:
            q, k, v = (Linear(cfg, size, cfg.qkv_bias, name=name)(x) for name, size in sizes.items())
        # On a TPU, the optimisation barrier on q, k and v makes XLA round the matrix products to bfloat16 before the
        # products are split into heads. Without the optimisation barrier, XLA splits q, k and v into heads in float32,
        # which takes twice the memory.
        if device.platform() == "tpu":
            q, k, v = jax.lax.optimization_barrier((q, k, v))
        v = v.reshape(B, T, K, H)
        if cfg.qk_norm_over == "all":
            q, k = self._qk_norm(q, k)
        q, k = q.reshape(B, T, cfg.n_head, H), k.reshape(B, T, K, H)
        if cfg.qk_norm_over == "head":
            q, k = self._qk_norm(q, k)
        if shared.rope is not None:
            cos, sin = shared.rope
            if cfg.rope_local_base is not None:
                cos, sin = (jnp.where(window > 0, a[1], a[0]) for a in (cos, sin))
            q, k = position.rope(q, (cos, sin)), position.rope(k, (cos, sin))
        v0 = stream.v0
        if v0 is not None:
            mix = _read(self, "value_mix", nn.initializers.constant(0.5), ())
            v0 = jnp.where(stream.layer == 0, v, v0)
            v = scaled(v, 1 - mix) + scaled(v0, mix)
        q, k, v = tap("attn/q", q), tap("attn/k", k), tap("attn/v", v)
        cache = stream.cache
        offset: int | jax.Array = 0
        k, v = (a.astype(q.dtype).transpose(0, 2, 1, 3) for a in (k, v))
        if cache is not None:
            cache = cache.write(stream.layer, k, v)
            if not cache.empty:
                k, v = cache.read(stream.layer, q.dtype)
                offset = cache.length
        drop_keys = None if key is None else jax.random.split(key)
        options: dict[str, Any] = dict(
            offset=offset, segment_ids=shared.segment_ids, branches=shared.branches, window=window,
            scale=cfg.attention_scale, alibi=cfg.position == "alibi",
        )  # fmt: skip
        weights_dropout: dict[str, Any] = dict(
            dropout=cfg.dropout, dropout_key=None if drop_keys is None else drop_keys[0]
        )
        weights = tap(WEIGHTS, attention_weights(q, k, **options)) if tap.wanted(WEIGHTS) else None
        if weights is not None and tap.patched(WEIGHTS):
            y = weighted_values(weights, v, **weights_dropout)
        else:
            y = heads_attention(q, k, v, **options, **weights_dropout)
        y = tap("attn/heads", y)
        y = Linear(cfg, cfg.d_model, cfg.bias, _projection_std(cfg), name="o")(y.reshape(B, T, cfg.n_head * H))
        return dropout(y, cfg.dropout, None if drop_keys is None else drop_keys[1]), v0, cache

    def _qk_norm(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Applies RMS norm to queries and keys over the last axis.

        The last axis of queries and keys holds the channels of one head, or with qk_norm_over=all the channels of all
        heads.
        """
        cfg = self.cfg
        if not cfg.qk_norm:
            return q, k
        q_scale, k_scale = (
            _read(self, name, nn.initializers.ones, a.shape[-1:]) if cfg.norm_scale else None
            for name, a in (("q_norm", q), ("k_norm", k))
        )
        return cfg.qk_gain * rms_norm(q, q_scale, cfg.norm_eps), cfg.qk_gain * rms_norm(k, k_scale, cfg.norm_eps)


def _projection_std(cfg: ModelConfig) -> float:
    """Returns the initial standard deviation of output projections: 0.02 / sqrt(2L), or 0 with `cfg.zero_init_proj`.

    Each of the L layers adds two projections to the residual stream, one from attention and one from the feed-forward
    layer. The division by sqrt(2L) keeps the variance of the sum of all 2L projections independent of L.
    """
    return 0.0 if cfg.zero_init_proj else 0.02 / math.sqrt(2 * cfg.n_layer)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": activation.gelu, "geglu": activation.gelu, "swiglu": jax.nn.silu, "relu2": activation.relu_squared,
}  # fmt: skip


class FeedForward(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, key: jax.Array | None, tap: Reader) -> jax.Array:
        cfg = self.cfg
        act = _ACTIVATIONS[cfg.activation]
        if self.has_variable("params", "up_gate"):
            h, gate = jnp.split(Linear(cfg, 2 * cfg.d_ff, cfg.bias, name="up_gate")(x), 2, axis=-1)
            h = h * act(gate)
        else:
            h = Linear(cfg, cfg.d_ff, cfg.bias, name="up")(x)
            h = h * act(Linear(cfg, cfg.d_ff, cfg.bias, name="gate")(x)) if cfg.gated else act(h)
        h = tap("mlp/hidden", h)
        h = Linear(cfg, cfg.d_model, cfg.bias, _projection_std(cfg), name="down")(h)
        return dropout(h, cfg.dropout, key)


class Block(nn.Module):
    cfg: ModelConfig
    taps: tuple[str, ...] = ()  # `taps` names the sites (see `activations.SITES`) whose activations are returned.

    @nn.compact
    def __call__(
        self, stream: Residual, shared: SharedInputs, patches: Mapping[str, tuple[Patch, ...]]
    ) -> tuple[Residual, dict[str, jax.Array]]:
        """Runs one transformer block.

        Args:
            patches: patches of this layer, by site.

        Returns:
            the `Residual` after the block, and a dict from each site in `taps` to the activation at this site.
        """
        tap = Reader(self.taps, patches, shared.patches, stream.layer)
        cfg, x = self.cfg, checkpoint_name(device.constrain(stream.x, *TOKENS), BLOCK_INPUT)
        if cfg.residual_lambdas:
            x = scaled(x, _read(self, "residual_lambda", nn.initializers.ones, ()))
        if cfg.x0_lambdas:
            x = x + scaled(stream.x0, _read(self, "x0_lambda", nn.initializers.zeros, ()))
        keys = (
            (None, None)
            if shared.dropout_key is None
            else jax.random.split(jax.random.fold_in(shared.dropout_key, stream.layer))
        )
        x = tap("resid_pre", x)
        y, v0, cache = Attention(cfg, name="attn")(self._before(1, x, tap), stream, shared, keys[0], tap)
        x = tap("resid_mid", x + tap("attn/out", self._after(1, y)))
        y = FeedForward(cfg, name="mlp")(self._before(2, x, tap), keys[1], tap)
        x = tap("resid", x + tap("mlp/out", self._after(2, y)))
        return Residual(x, stream.x0, v0, cache, stream.layer + 1), tap.seen

    def _before(self, number: int, x: jax.Array, tap: Reader) -> jax.Array:
        if self.cfg.norm_position == "post":
            return x
        return tap(f"ln_{number}/out", Norm(self.cfg, name=f"ln_{number}")(x))

    def _after(self, number: int, x: jax.Array) -> jax.Array:
        return x if self.cfg.norm_position == "pre" else Norm(self.cfg, name=f"ln_{number}_post")(x)


_REMAT = {
    # The rematerialisation policy "dots" selects arrays by name, because jax.checkpoint_policies.dots_saveable would
    # save the matrix products in float32.
    "dots": jax.checkpoint_policies.save_only_these_names(SAVED, PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[BLOCK_INPUT], offload_src="device",
        offload_dst="pinned_host",
    ),
}  # fmt: skip


class GPT(nn.Module):
    """Implements the decoder-only transformer without the head.

    A call of the module takes token ids [B, T] and returns the hidden states [B, T, D] after the final norm, the KV
    cache, and a dict from each path in `taps` to the activation at this path. If the parameters of the blocks are
    stacked [L, ..], the blocks run in one `nn.scan`. If each layer has a separate tree (see `gpt.unstack_layers`), the
    blocks run in a Python loop.
    """

    cfg: ModelConfig
    taps: tuple[str, ...] = ()  # `taps` holds the paths of the activations to return.

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        cache: Cache | None = None,
        patches: Placed | None = None,
        subtree_end: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None, dict[str, jax.Array]]:
        cfg, patches = self.cfg, patches or {}
        B, T = tokens.shape
        branches = None
        if subtree_end is not None:
            # For token trees, `gpt.backbone` raises an error if `positions` is None or cfg.smear is set.
            assert positions is not None and not cfg.smear
            branches = Branches(positions, subtree_end)
        tap = Reader(self.taps, patches)
        if positions is None:
            positions = jnp.arange(T) if segment_ids is None else position.segment_positions(segment_ids)
        x = Embed(cfg, name="wte")(tokens)
        if cfg.embed_gain != 1:
            x = x * cfg.embed_gain
        if cfg.position == "learned":
            wpe = Embed(cfg, rows=cfg.context_length, std=0.02, name="wpe")(positions)
            # The position embeddings are added in float32, so that the gradient of the position embeddings, which is a
            # sum over the batch, is accumulated in float32.
            x = (x.astype(jnp.float32) + wpe.astype(jnp.float32)).astype(x.dtype)
        elif cfg.position == "sinusoidal":
            x = x + position.sinusoidal(positions, cfg.d_model).astype(x.dtype)
        if cfg.embed_norm:
            x = rms_norm(x, None, cfg.norm_eps) if cfg.norm == "rmsnorm" else layer_norm(x, None, None, cfg.norm_eps)
        if cfg.smear:
            before = None
            if cache is not None:
                before = None if cache.empty else cache.before()
                cache = cache.remember(x)
            weight = _read(self, "smear", nn.initializers.zeros, (cfg.d_model,))
            x = x + scaled(position.previous(x, before, segment_ids), weight)
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x = tap("embed", dropout(x, cfg.dropout, keys[0]))

        rope = _rope_table(cfg, positions) if cfg.position == "rope" else None
        stream = Residual(
            x=x,
            x0=x if cfg.x0_lambdas else None,
            v0=jnp.zeros((B, T, cfg.n_kv_head, cfg.head_dim), x.dtype) if cfg.value_residual else None,
            cache=cache,
            layer=jnp.int32(0),
        )
        run = self._run_unstacked if self.has_variable("params", "blocks_0") else self._run_stacked
        stream, seen = run(stream, SharedInputs(rope, segment_ids, branches, keys[1], {}), patches)
        hidden = tap("ln_f/out", Norm(cfg, name="ln_f")(device.constrain(stream.x, *TOKENS)))
        if not cfg.tie_embeddings and self.is_initializing():
            std = 0.0 if cfg.zero_init_head else 0.02
            # `gpt.lm_logits` reads the kernel of `lm_head`.
            Linear(cfg, cfg.vocab_size, False, std, name="lm_head")(hidden)
        if cfg.n_classes and self.is_initializing():
            # `losses.classify` reads the parameters of `cls_head`.
            Linear(cfg, cfg.n_classes, cfg.cls_bias, name="cls_head")(hidden)
        return hidden, stream.cache, {path: (seen | tap.seen)[path] for path in self.taps}

    def _run_unstacked(
        self, stream: Residual, shared: SharedInputs, patches: Placed
    ) -> tuple[Residual, dict[str, jax.Array]]:
        """Runs unstacked layers (see `gpt.unstack_layers` and `gpt.for_decoding`) in a Python loop."""
        stacked, single = activations.stacked_patches(patches), activations.layer_patches(patches)
        layers = []
        for i in range(self.cfg.n_layer):
            block_patches = jax.tree.map(lambda a: a[i], stacked)  # noqa: B023
            for site, by_layer in single.items():
                block_patches[site] = block_patches.get(site, ()) + by_layer.get(i, ())
            block = Block(self.cfg, activations.sites(self.taps, i), name=f"blocks_{i}")
            stream, seen = block(stream._replace(layer=jnp.int32(i)), shared, block_patches)
            layers.append(seen)
        tapped = {}
        for path, (layer, site) in activations.block_taps(self.taps):
            tapped[path] = jnp.stack([seen[site] for seen in layers]) if layer == "*" else layers[int(layer)][site]
        return stream, tapped

    def _run_stacked(
        self, stream: Residual, shared: SharedInputs, patches: Placed
    ) -> tuple[Residual, dict[str, jax.Array]]:
        """Runs the layers in one `nn.scan` over the stacked parameters `blocks`."""
        cfg = self.cfg
        unroll = layers_per_iteration(cfg)
        block = Block
        if cfg.remat != "none":
            block = nn.remat(Block, policy=_REMAT[cfg.remat], prevent_cse=unroll > 1)
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(nn.broadcast, 0),
            length=cfg.n_layer, unroll=unroll,
        )  # fmt: skip
        shared = shared._replace(patches=activations.layer_patches(patches))
        run = blocks(cfg, activations.sites(self.taps), name="blocks")
        stream, seen = run(stream, shared, activations.stacked_patches(patches))
        tapped = {}
        for path, (layer, site) in activations.block_taps(self.taps):
            tapped[path] = seen[site] if layer == "*" else seen[site][int(layer)]
        return stream, tapped


def _rope_table(cfg: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and the sines of RoPE for the given positions, [.., H/2] each.

    With cfg.rope_local_base, the cosines and the sines have the shape [2, .., H/2] each, where index 0 of the first
    axis is for layers with full attention and index 1 is for layers with sliding-window attention.
    """
    scaled = position.rope_frequencies(
        cfg.head_dim, cfg.rope_base, cfg.rope_scaling, cfg.rope_factor, cfg.rope_slow, cfg.rope_fast,
        cfg.rope_original_context,
    )  # fmt: skip
    if cfg.rope_local_base is None:
        return position.rope_table(positions, scaled)
    (cos, sin), (local_cos, local_sin) = (
        position.rope_table(positions, f)
        for f in (scaled, position.rope_frequencies(cfg.head_dim, cfg.rope_local_base))
    )
    return jnp.stack([cos, local_cos]), jnp.stack([sin, local_sin])


def layers_per_iteration(cfg: ModelConfig) -> int:
    """Returns the number of blocks per iteration of the scan over layers, which is the argument `unroll` of `nn.scan`.

    An iteration of the scan runs all blocks if `cfg.unroll` is True, and one block if `cfg.unroll` is False. If
    `cfg.unroll` is None, the number of blocks per iteration depends on the device, and is a divisor of cfg.n_layer.

    On a CPU, an iteration of the scan runs all blocks if the blocks have fewer than about 20 million weights in total,
    and otherwise one block. On a CPU, unrolling makes models with fewer than 20 million weights at least 10 % faster.
    For models of the size of GPT-2 or larger, unrolling gives no speed-up, lengthens the compilation, and copies each
    layer's weights out of the stacked arrays.

    On a GPU, an iteration of the scan runs up to 12 blocks. A training step of GPT-2 124M took 36.3 ms with all 12
    blocks unrolled and 42.5 ms with one block per iteration of the scan, and compiling the unrolled blocks took 9 s
    longer (H200, bfloat16, 16 x 1,024 tokens). On a TPU, an iteration of the scan runs one block.
    """
    if cfg.unroll is not None:
        return cfg.n_layer if cfg.unroll else 1
    if device.platform() == "gpu":
        return max(n for n in range(1, _GPU_LAYERS + 1) if cfg.n_layer % n == 0)
    small = device.platform() == "cpu" and 12 * cfg.n_layer * cfg.d_model**2 < 20_000_000
    return cfg.n_layer if small else 1


class Embed(nn.Module):
    """Looks up embeddings: token ids or positions [..] are mapped to vectors [.., D]."""

    cfg: ModelConfig
    rows: int | None = None  # If `rows` is None, the embedding table has cfg.vocab_size rows.
    std: float | None = None  # If `std` is None, the initial standard deviation is cfg.embed_std.

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        cfg = self.cfg
        std = 1.0 if cfg.init == "torch" else cfg.embed_std if self.std is None else self.std
        table = _read(self, "embedding", normal(std), (self.rows or cfg.vocab_size, cfg.d_model))
        return take(table, ids).astype(device.activation_dtype(cfg.dtype))
