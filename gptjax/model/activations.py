"""The names of a model's activations, and what reads or replaces them on the way.

    embed                  [B, T, D]     what enters the first block
    blocks/*/resid_pre     [B, T, D]     what attention's norm reads and attn/out is added to
    blocks/*/ln_1/out      [B, T, D]     what attention reads
    blocks/*/attn/q        [B, T, N, H]  queries as they meet the keys: after their norm and their rotation
    blocks/*/attn/k, v     [B, T, K, H]  keys and values as they are attended to, and cached
    blocks/*/attn/weights  [B, N, T, S]  probabilities; S is T, or the cache's slots
    blocks/*/attn/heads    [B, T, N, H]  what each head gives, before the output projection
    blocks/*/attn/out      [B, T, D]     what attention adds to the stream
    blocks/*/resid_mid     [B, T, D]     between attention and feed-forward
    blocks/*/ln_2/out      [B, T, D]     what the feed-forward layer reads
    blocks/*/mlp/hidden    [B, T, F]     its neurons, after activation and gate
    blocks/*/mlp/out       [B, T, D]     what it adds to the stream
    blocks/*/resid         [B, T, D]     after the block
    ln_f/out               [B, T, D]     what the head reads

`blocks/*/resid` is that activation of all layers, [L, B, T, D]; `blocks/3/resid` of one, [B, T, D]. A pattern is a
glob as in `gptjax.tree`: one that takes any layer (`blocks/*/attn/*`, `*/resid`) stands for stacks, any other
(`blocks/[0-2]/resid`) for single layers. The weights come by their own name only: kernels never hold them, so that
they are computed beside; and where they are replaced, attention is computed from them.

Whether the parameters are stacked or lie layer by layer changes none of this. A model without the norm before a part
(norm_position=post) has no ln_1/out and ln_2/out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax import tree
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
    """fn(x, *data) in the place of an activation x; what it gives is broadcast to x's shape, in x's dtype.

    The data are traced: they can be arguments of a jitted function, differentiated and vmapped over. At a stacked path
    each has a leading axis L, and layer i gets its own part. `fn` is static: another function is another program.
    """

    fn: Callable[..., jax.Array] = struct.field(pytree_node=False)
    data: tuple[Any, ...] = ()


def replace(value: Any, mask: Any = None) -> Patch:
    """`value` in the place of the activation; with a mask (bool, broadcast to it) only where that is true."""
    return Patch(_value, (value,)) if mask is None else Patch(_where, (value, mask))


def add(value: Any) -> Patch:
    """`value` is added: a direction [D], or with a leading axis L one for every layer."""
    return Patch(_add, (value,))


def scale(factor: Any) -> Patch:
    """The activation is multiplied by `factor`: [N, 1] at attn/heads has zeros for the heads to be ablated."""
    return Patch(_scale, (factor,))


def _value(x, value):
    return value


def _where(x, value, mask):
    return jnp.where(mask, value, x)


def _add(x, value):
    return x + value


def _scale(x, factor):
    return x * factor


Patches = Mapping[str, Any]  # pattern -> array, function (x) -> x, Patch, or several of these in a tuple
Placed = dict[str, tuple[Patch, ...]]  # path -> patches, in the order in which they are applied


def names(cfg: ModelConfig) -> list[str]:
    """The paths of all activations, each block's as a stack."""
    without = ("ln_1/out", "ln_2/out") if cfg.norm_position == "post" else ()
    return ["embed", *(f"{_BLOCKS}*/{site}" for site in SITES if site not in without), "ln_f/out"]


def paths(patterns: Iterable[str], cfg: ModelConfig) -> tuple[str, ...]:
    """The paths that patterns stand for, in order, each once.

    Raises:
        UserError: a part of a pattern, between "|", that matches no activation; all of them are named.
    """
    if isinstance(patterns, str):
        patterns = (patterns,)
    matched: dict[str, None] = {}
    unmatched = []
    for part in (part.strip() for pattern in patterns for part in pattern.split("|")):
        stacked = [name for name in names(cfg) if not name.endswith(WEIGHTS) or part.endswith("weights")]
        # "*" takes the words "any layer" as it takes every number; "3", "?" and "[0-2]" do not
        matches = [name for name in stacked if tree.matches(part, name.replace("*", "any layer"))]
        if not matches:
            single = [name.replace("*", str(i)) for i in range(cfg.n_layer) for name in stacked if "*" in name]
            matches = [name for name in single if tree.matches(part, name)]
        if not matches:
            unmatched.append(repr(part))
        matched |= dict.fromkeys(matches)
    if unmatched:
        raise UserError(
            f"{', '.join(unmatched)} matches no activation; there are {', '.join(names(cfg))}, and for * one of the "
            f"layers 0 to {cfg.n_layer - 1}"
        )
    return tuple(matched)


def place(patches: Patches | None, cfg: ModelConfig) -> Placed:
    """{path: patches} of {pattern: patch}; where several meet, in the order given, and a single layer's after a
    stack's. What comes out can go in again.

    Raises:
        UserError: a pattern that matches no activation; data of a stack without an axis of all layers.
    """
    placed: dict[str, tuple[Patch, ...]] = {}
    for pattern, given in (patches or {}).items():
        own = tuple(
            patch if isinstance(patch, Patch) else Patch(patch) if callable(patch) else replace(patch)
            for patch in (given if isinstance(given, tuple) else (given,))
        )
        for path in paths((pattern,), cfg):
            shapes = [jnp.shape(a) for a in jax.tree.leaves(own)]
            if "*" in path and (wrong := [s for s in shapes if s[:1] != (cfg.n_layer,)]):
                raise UserError(
                    f"patch of {path}: expected arrays with a leading axis of {cfg.n_layer} layers, got {wrong[0]}; "
                    f"name one layer (blocks/0/..), repeat it for all, or give a function of the activation"
                )
            placed[path] = placed.get(path, ()) + own
    return placed


def split(path: str) -> tuple[str, str]:
    """("3", "attn/out") of blocks/3/attn/out: the layer, or *, and the site; ("", "embed") outside the blocks."""
    if not path.startswith(_BLOCKS):
        return "", path
    layer, site = path.removeprefix(_BLOCKS).split("/", 1)
    return layer, site


def of_all_layers(placed: Placed) -> dict[str, tuple[Patch, ...]]:
    """{site: patches} of the stacks."""
    return {site: own for path, own in placed.items() for layer, site in [split(path)] if layer == "*"}


def of_one_layer(placed: Placed) -> dict[str, dict[int, tuple[Patch, ...]]]:
    """{site: {layer: patches}}."""
    out: dict[str, dict[int, tuple[Patch, ...]]] = {}
    for path, own in placed.items():
        layer, site = split(path)
        if layer.isdecimal():
            out.setdefault(site, {})[int(layer)] = own
    return out


def in_blocks(taps: Iterable[str]) -> list[tuple[str, tuple[str, str]]]:
    """(path, (layer, site)) of those that are in blocks."""
    return [(path, split(path)) for path in taps if split(path)[0]]


def sites(taps: Iterable[str], layer: int | None = None) -> tuple[str, ...]:
    """What has to be read in the blocks, or in one of them."""
    asked = [site for _, (at, site) in in_blocks(taps) if layer is None or at in ("*", str(layer))]
    return tuple(dict.fromkeys(asked))


class Reader:
    """x = at("attn/out", x): passes each activation on, patched, and keeps those that were asked for in `seen`.

    One lives for one trace of a block. With nothing to patch and nothing to keep it does nothing.
    """

    def __init__(
        self,
        taps: Iterable[str] = (),
        patches: Mapping[str, tuple[Patch, ...]] | None = None,
        single: Mapping[str, dict[int, tuple[Patch, ...]]] | None = None,
        layer: jax.Array | None = None,
    ):
        """Args: `patches` of every layer that comes by, `single` of some; `layer` is which one comes by, traced."""
        self.taps, self.patches, self.single, self.layer = frozenset(taps), patches or {}, single or {}, layer
        self.seen: dict[str, jax.Array] = {}

    def patched(self, site: str) -> bool:
        return site in self.patches or site in self.single

    def wanted(self, site: str) -> bool:
        return site in self.taps or self.patched(site)

    def __call__(self, site: str, x: jax.Array) -> jax.Array:
        x = _apply(site, x, self.patches.get(site, ()))
        for layer, own in self.single.get(site, {}).items():
            # the branch is taken, not both sides: the index is the same in every copy that vmap makes
            x = jax.lax.cond(self.layer == layer, lambda x, own: _apply(site, x, own), lambda x, own: x, x, own)
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
