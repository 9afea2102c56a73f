"""This module defines taps and patches, which are hooks that read or replace activations in the forward pass.

A tap returns an activation, and a patch replaces an activation. Each activation has a path:

    embed                  [B, T, D]     the input of the first block
    blocks/*/resid_pre     [B, T, D]     the residual stream before the block
    blocks/*/ln_1/out      [B, T, D]     the input of attention
    blocks/*/attn/q        [B, T, N, H]  queries after QK norm and RoPE
    blocks/*/attn/k, v     [B, T, K, H]  keys after QK norm and RoPE, and values
    blocks/*/attn/weights  [B, N, T, S]  attention weights; S is T, or the number of cache slots
    blocks/*/attn/heads    [B, T, N, H]  each head's output, before the output projection
    blocks/*/attn/out      [B, T, D]     the output of attention, which is added to the residual stream
    blocks/*/resid_mid     [B, T, D]     the residual stream between attention and feed-forward layer
    blocks/*/ln_2/out      [B, T, D]     the input of the feed-forward layer
    blocks/*/mlp/hidden    [B, T, F]     the hidden units of the feed-forward layer, after activation and gate
    blocks/*/mlp/out       [B, T, D]     the output of the feed-forward layer, which is added to the residual stream
    blocks/*/resid         [B, T, D]     the residual stream after the block
    ln_f/out               [B, T, D]     the input of the head

In the shapes of activations, B is the number of rows of the batch, T the number of tokens per row, D the number of
channels of the residual stream, N the number of query heads, K the number of key heads, H the number of channels per
head, F the number of hidden units of the feed-forward layer, and L the number of layers.

The path `blocks/*/resid` names the activations of all layers, stacked as [L, B, T, D]. The path `blocks/3/resid` names
the activation of layer 3, [B, T, D]. A pattern of paths is a glob, in which "*" also matches "/", or several globs
joined by "|". A glob that matches every layer (`blocks/*/attn/*`, `*/resid`) selects the stacked activations of all
layers. A glob that matches only some layers (`blocks/[0-2]/resid`) selects the activations of individual layers.

Attention weights are selected only by a glob that ends in "weights"; the glob `blocks/*/attn/*` does not select
attention weights. Fused attention kernels do not materialise the attention weights, so that reading the attention
weights needs a separate computation. If attention weights are patched, the output of attention is computed from the
patched weights.

Stacked and unstacked parameters (see `gpt.unstack_layers`) give the same activations. A model with norm_position=post
has no activations `ln_1/out` and `ln_2/out`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax import tree
from gptjax._moved import moved_name
from gptjax.config import ModelConfig
from gptjax.errors import UserError

SITES = (
    "resid_pre", "ln_1/out", "attn/q", "attn/k", "attn/v", "attn/weights", "attn/heads", "attn/out", "resid_mid",
    "ln_2/out", "mlp/hidden", "mlp/out", "resid",
)  # fmt: skip
WEIGHTS = "attn/weights"
_BLOCKS = "blocks/"


@struct.dataclass
class Patch:
    """Describes the replacement of an activation x by fn(x, *data), which is broadcast to the shape of x and cast to
    the dtype of x.

    The arrays in `data` may be tracers, so that a jitted function can take the arrays as arguments, and autodiff and
    vmap work. If the patched path names all layers, each array in `data` has a leading axis L, and layer i is patched
    with slice i. The field `fn` is static: if `fn` changes, JAX recompiles the model.
    """

    fn: Callable[..., jax.Array] = struct.field(pytree_node=False)
    data: tuple[Any, ...] = ()


def replace(value: Any, mask: Any = None) -> Patch:
    """Returns a `Patch` that replaces an activation by `value`.

    If a bool `mask` is given, only the elements of the activation at which the mask is True are replaced. The mask is
    broadcast to the shape of the activation.
    """
    return Patch(_value, (value,)) if mask is None else Patch(_where, (value, mask))


def add(value: Any) -> Patch:
    """Returns a `Patch` that adds `value` to an activation.

    For example, `value` can be a steering vector [D], or an array [L, D] of steering vectors if the patch is for all
    layers.
    """
    return Patch(_add, (value,))


def scale(factor: Any) -> Patch:
    """Returns a `Patch` that multiplies an activation by `factor`.

    For example, a patch of `attn/heads` with a factor [N, 1] that is 0 for some attention heads ablates these heads.
    """
    return Patch(_scale, (factor,))


def _value(x, value):
    return value


def _where(x, value, mask):
    return jnp.where(mask, value, x)


def _add(x, value):
    return x + value


def _scale(x, factor):
    return x * factor


# `Patches` maps each pattern of paths to a patch, which is a replacement array, a function that computes the
# replacement from the activation, a `Patch`, or a tuple of patches. `Placed` maps each path to the patches of this
# path, in the order in which the patches are applied.
Patches = Mapping[str, Any]
Placed = dict[str, tuple[Patch, ...]]


def names(cfg: ModelConfig) -> list[str]:
    """Returns the paths of all activations of a model, with `blocks/*/..` for the activations inside the blocks."""
    absent = ("ln_1/out", "ln_2/out") if cfg.norm_position == "post" else ()
    return ["embed", *(f"{_BLOCKS}*/{site}" for site in SITES if site not in absent), "ln_f/out"]


def paths(patterns: Iterable[str], cfg: ModelConfig) -> tuple[str, ...]:
    """Returns the paths of the activations that match `patterns`, in the order of the patterns and without duplicates.

    Raises:
        UserError: a pattern, or one of its alternatives separated by "|", matches no activation. The message names all
            patterns that match no activation.
    """
    if isinstance(patterns, str):
        patterns = (patterns,)
    matched: dict[str, None] = {}
    unmatched = []
    for glob in (glob.strip() for pattern in patterns for glob in pattern.split("|")):
        stacked = [name for name in names(cfg) if not name.endswith(WEIGHTS) or glob.endswith("weights")]
        # To find out whether a glob selects all layers, the glob is matched against paths in which the text "any layer"
        # replaces the index of the layer. Of the globs "*", "3", "?" and "[0-2]", only "*" matches the text "any
        # layer".
        matches = [name for name in stacked if tree.matches(glob, name.replace("*", "any layer"))]
        if not matches:
            single = [name.replace("*", str(i)) for i in range(cfg.n_layer) for name in stacked if "*" in name]
            matches = [name for name in single if tree.matches(glob, name)]
        if not matches:
            unmatched.append(repr(glob))
        matched |= dict.fromkeys(matches)
    if unmatched:
        raise UserError(
            f"{', '.join(unmatched)} matches no activation; there are {', '.join(names(cfg))}, and for * one of the "
            f"layers 0 to {cfg.n_layer - 1}"
        )
    return tuple(matched)


def place(patches: Patches | None, cfg: ModelConfig) -> Placed:
    """Returns a dict from each path of an activation to its patches, by matching the patterns in `patches`.

    The function is idempotent. Patches of the same path are applied in the order in which they are given. In each
    layer, the patches for all layers are applied before the patches for the individual layer.

    Raises:
        UserError: a pattern matches no activation, or an array of a patch for all layers lacks the leading axis L.
    """
    placed: dict[str, tuple[Patch, ...]] = {}
    for pattern, given in (patches or {}).items():
        new = tuple(
            patch if isinstance(patch, Patch) else Patch(patch) if callable(patch) else replace(patch)
            for patch in (given if isinstance(given, tuple) else (given,))
        )
        for path in paths((pattern,), cfg):
            shapes = [jnp.shape(a) for a in jax.tree.leaves(new)]
            if "*" in path and (wrong := [s for s in shapes if s[:1] != (cfg.n_layer,)]):
                raise UserError(
                    f"patch of {path}: expected arrays with a leading axis of {cfg.n_layer} layers, got {wrong[0]}; "
                    f"name one layer (blocks/0/..), repeat it for all, or give a function of the activation"
                )
            placed[path] = placed.get(path, ()) + new
    return placed


def split(path: str) -> tuple[str, str]:
    """Splits the path of an activation into the layer and the site, which is the path within the block.

    For example, the path `blocks/3/attn/out` is split into "3" and "attn/out", and the path `blocks/*/resid` into "*"
    and "resid". The path `embed`, which is outside the blocks, is split into "" and "embed".
    """
    if not path.startswith(_BLOCKS):
        return "", path
    layer, site = path.removeprefix(_BLOCKS).split("/", 1)
    return layer, site


def stacked_patches(placed: Placed) -> dict[str, tuple[Patch, ...]]:
    """Returns the patches whose path `blocks/*/..` names all layers, as a dict from each site to its patches."""
    return {site: patches for path, patches in placed.items() for layer, site in [split(path)] if layer == "*"}


def layer_patches(placed: Placed) -> dict[str, dict[int, tuple[Patch, ...]]]:
    """Returns the patches whose path names one layer, such as `blocks/3/..`, by site and layer.

    Returns:
        a dict from each site to a dict that maps the index of a layer to the patches of the site in this layer.
    """
    out: dict[str, dict[int, tuple[Patch, ...]]] = {}
    for path, patches in placed.items():
        layer, site = split(path)
        if layer.isdecimal():
            out.setdefault(site, {})[int(layer)] = patches
    return out


def block_taps(taps: Iterable[str]) -> list[tuple[str, tuple[str, str]]]:
    """Returns a pair (path, (layer, site)) for each tap inside the blocks, where (layer, site) = split(path)."""
    return [(path, split(path)) for path in taps if split(path)[0]]


def sites(taps: Iterable[str], layer: int | None = None) -> tuple[str, ...]:
    """Returns the sites, such as "attn/out", that `taps` read in any block, or in the block with index `layer`."""
    requested = [site for _, (index, site) in block_taps(taps) if layer is None or index in ("*", str(layer))]
    return tuple(dict.fromkeys(requested))


class Reader:
    """A callable that the model applies to each activation, for example x = tap("attn/out", x).

    Calling a `Reader` with the site "attn/out" applies the patches of this site to x, and records the result in `seen`
    if the site is tapped. For a site without taps and patches, the `Reader` returns x unchanged. The model creates a
    new `Reader` each time that a block is traced.
    """

    def __init__(
        self,
        taps: Iterable[str] = (),
        patches: Mapping[str, tuple[Patch, ...]] | None = None,
        single: Mapping[str, dict[int, tuple[Patch, ...]]] | None = None,
        layer: jax.Array | None = None,
    ):
        """Stores the taps and patches of one transformer block.

        Args:
            taps: the sites whose activations are recorded in `seen`.
            patches: patches of the block, by site.
            single: patches of individual layers, by site and layer index; only the patches of this block's layer are
                applied.
            layer: index of the block's layer, which may be a tracer.
        """
        self.taps, self.patches, self.single, self.layer = frozenset(taps), patches or {}, single or {}, layer
        self.seen: dict[str, jax.Array] = {}

    def patched(self, site: str) -> bool:
        return site in self.patches or site in self.single

    def wanted(self, site: str) -> bool:
        return site in self.taps or self.patched(site)

    def __call__(self, site: str, x: jax.Array) -> jax.Array:
        x = _apply(site, x, self.patches.get(site, ()))
        for layer, patches in self.single.get(site, {}).items():
            # `jax.lax.cond` runs only one of its branches, even under vmap, because vmap does not batch the layer
            # index.
            x = jax.lax.cond(self.layer == layer, lambda x, p: _apply(site, x, p), lambda x, p: x, x, patches)
        if site in self.taps:
            self.seen[site] = x
        return x


def _apply(site: str, x: jax.Array, patches: Iterable[Patch]) -> jax.Array:
    for patch in patches:
        shapes = [jnp.shape(a) for a in patch.data]
        try:
            y = jnp.asarray(patch.fn(x, *patch.data))
            x = jnp.broadcast_to(y, x.shape).astype(x.dtype)
        except (TypeError, ValueError) as error:
            raise UserError(f"patch of {site}: data {shapes} do not fit the activation {x.shape}: {error}") from error
    return x


def __getattr__(name: str) -> Any:
    """Returns the function of this module that formerly had the given name, with a DeprecationWarning."""
    return moved_name(__name__, name)
