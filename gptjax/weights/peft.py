"""Reads and writes adapters in the folder format of the PEFT library: adapter_config.json and
adapter_model.safetensors. Into the folder of an adapter, gptjax writes the additional file gptjax_sha256.json, which
holds the hashes of adapter_config.json and adapter_model.safetensors.

    gptjax  blocks/attn/q/kernel: a [L, in, R], b [L, R, out]
    PEFT    base_model.model.model.layers.{i}.self_attn.q_proj: lora_A.weight [R, in], lora_B.weight [out, R]

A MiSS adapter has one matrix, d [L, R, out] in gptjax and miss_block [R, out] in PEFT.

PEFT adapts GPT-2's q, k and v as one matrix, whereas gptjax adapts q, k and v as three matrices. For GPT-2, gptjax's
three LoRA adapters of q, k and v are exported as one PEFT adapter of three times the rank with a block-diagonal matrix
B. A GPT-2 adapter that PEFT trained is read as three LoRA adapters of q, k and v with the same matrix a. If the LoRA
adapters of q, k and v have the same matrix a, the three adapters are exported as one PEFT adapter of the original rank.

Source: PEFT's tuners/lora and tuners/miss, version 0.21 (names and shapes of the tensors, attributes that change the
result).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import tree
from gptjax.config import LoraConfig, ModelConfig
from gptjax.errors import UserError, refuse
from gptjax.files import read_json, sha256, write_json
from gptjax.formats import safetensors
from gptjax.model.gpt import abstract_params
from gptjax.types import Params
from gptjax.weights import families
from gptjax.weights.export import new_folder, refuse_bias
from gptjax.weights.native import fingerprint
from gptjax.weights.rules import Out, Rule, Tensor, identity, is_float, tensors_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HASHES = "gptjax_sha256.json"  # SHA-256 hashes of CONFIG and WEIGHTS; other tools ignore this file
_PREFIX = "base_model.model."
_SUFFIXES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector", "d": "miss_block"}
_HEAD = f"{_PREFIX}score.weight"  # Name of the head of a classifier in transformers.
_BASE = "gptjax_base"  # Key in adapter_config.json for the fingerprint of the base model.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision",
    "task_type", "megatron_core", "loftq_config", "qalora_group_size", "target_modules", "exclude_modules",
    "layers_pattern", "layers_to_transform", "ensure_weight_tying", "peft_type", "fan_in_fan_out", _BASE,
}  # fmt: skip
_Pair = dict[str, np.ndarray]
T = TypeVar("T")


def export_peft(
    folder: str | os.PathLike[str],
    adapter: Params,
    lora: LoraConfig,
    cfg: ModelConfig,
    *,
    head: Params | None = None,
    base: Params | str | None = None,
    base_name: str | None = None,
) -> Path:
    """Writes an adapter that PEFT loads onto the transformers model with the same base weights.

    Layers in which all values of the adapter are zero, such as layers that lora.targets leaves out, are not written.
    The layers whose adapters are written are listed as PEFT's layers_to_transform, or in target_modules if the layers
    with an adapter differ between matrices.

    Args:
        head: parameters of a classification head with last-token pooling: a dict with the key "kernel"
            [D, n_classes]. The head is written as transformers' `score`, one of PEFT's modules_to_save.
        base: the parameters of the base model, or their `fingerprint`. The fingerprint is stored, so that `load_peft`
            can check that the base model is the same.
        base_name: path or Hub name from which transformers loads the base model.

    Raises:
        UserError: the adapter was initialised by `lora.init_from_weights` (export the result of `lora.to_lora`
            instead); PEFT's format or the model's Hugging Face architecture has no place for some of the weights, or
            for MiSS; the head has a bias; or the folder is not empty.
    """
    if head is not None:
        refuse_bias(head)
    if lora.init != "lora":
        raise UserError(
            f"an adapter of lora.init={lora.init} belongs to the residual weights, not to those of the base: "
            "export lora.to_lora(adapter, start), with init=lora, twice the rank and the alpha for the same scale"
        )
    pairs = tree.by_parent(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), adapter))
    modules = _modules(cfg)
    covered = {rule.ours for module in modules for rule in module.rules}
    refuse("peft's format has no place for", sorted(path for path in pairs if path not in covered))
    if any(("d" in pair) != lora.miss for pair in pairs.values()):
        raise UserError(f"lora.miss={str(lora.miss).lower()} does not fit the adapter: export it with its config")
    if lora.miss and has_conv1d(cfg):
        raise UserError("peft's MiSS adapts torch.nn.Linear only, not the Conv1D layers of GPT-2: export hf instead")
    adapted = {path: _adapted_layers(pair) for path, pair in pairs.items()}
    tensors: dict[str, np.ndarray] = {}
    # `ranks` maps each name in PEFT's target_modules to the ranks of the modules with this name, and `layers` maps each
    # name in PEFT's target_modules to the adapted layers.
    ranks: dict[str, dict[str, int]] = {}
    layers: dict[str, list[int]] = {}
    for module in modules:
        slices = [_slice(pairs.get(rule.ours, {}), adapted.get(rule.ours, []), module.layer) for rule in module.rules]
        if not any(slices):
            continue
        pair = _join(module, slices)
        tensors |= {f"{_PREFIX}{module.name}.{_SUFFIXES[key]}": array for key, array in pair.items()}
        inside_layer = re.sub(r"^.*?\.\d+\.", "", module.name)  # name of the module in PEFT's target_modules
        ranks.setdefault(inside_layer, {})[module.name] = (pair["a"] if "a" in pair else pair["d"]).shape[0]
        if module.layer is not None:
            layers.setdefault(inside_layer, []).append(module.layer)
    power = 0.5 if lora.scaling == "alpha/sqrt(r)" else 1
    # If all layers have the same rank, one entry in PEFT's rank_pattern is enough.
    patterns: dict[str, int] = {}
    for name, by_name in ranks.items():
        equal = len(set(by_name.values())) == 1
        patterns |= {name: max(by_name.values())} if equal else by_name
    settings: dict[str, Any] = {
        "lora_alpha": _number(lora.scale * lora.rank**power),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.scaling == "alpha/sqrt(r)",
        "use_dora": lora.dora,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: r for name, r in patterns.items() if r != lora.rank},
        "alpha_pattern": {name: _number(lora.scale * r**power) for name, r in patterns.items() if r != lora.rank},
        "fan_in_fan_out": has_conv1d(cfg),
    }
    if lora.miss:
        settings = {"miss_dropout": lora.dropout, "init_weights": True, "target_modules": sorted(ranks)}
    body = {
        "peft_type": "MISS" if lora.miss else "LORA",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        **settings,
        "bias": "none",
        "inference_mode": True,
    }
    if any(len(chosen) < cfg.n_layer for chosen in layers.values()):
        first = next(iter(layers.values()))
        names = sorted(name for by_name in ranks.values() for name in by_name)
        same = all(chosen == first for chosen in layers.values())
        body |= {"layers_to_transform": first} if same else {"target_modules": names}
    if head is not None:
        tensors[_HEAD] = np.asarray(head["kernel"], np.float32).T
        body |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    if base is not None:
        body[_BASE] = base if isinstance(base, str) else fingerprint(base)
    folder = Path(folder)
    new_folder(folder)
    out = [Out(name, array.shape, partial(np.asarray, array)) for name, array in tensors.items()]
    try:
        safetensors.write_file(folder / WEIGHTS, out, np.dtype(np.float32))
        (folder / CONFIG).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        write_json(folder / HASHES, {name: sha256(folder / name) for name in (CONFIG, WEIGHTS)})
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def load_peft(
    folder: str | os.PathLike[str], cfg: ModelConfig, *, base: Params | None = None
) -> tuple[Params, LoraConfig]:
    """Loads an adapter from a PEFT folder. Returns the adapter and its config, with which `lora.attach` attaches the
    adapter to the model of `cfg`.

    The adapters of all layers are stacked. A layer without an adapter gets an adapter of zeros. If the ranks of the
    layers differ, adapters of a smaller rank are padded with zeros to the largest rank. If the LoRA scale of a module
    differs from the scale of the returned config, the matrix b of the module is multiplied by the ratio of the two
    scales. The targets of the returned config name the layers that have an adapter. The `score` head of a classifier is
    returned as cls_head/kernel.

    Args:
        base: parameters of the base model, which are compared with the fingerprint in the folder, if the folder has
            one.

    Raises:
        UserError: adapter_config.json has a setting that is not supported here and would change the outputs; a tensor
            is unknown, missing or of a wrong shape; the base model is not the one that the adapter was trained on; or
            files have changed since gptjax wrote them.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no adapter: expected {CONFIG} and {WEIGHTS}")
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(safetensors.refuse_pickle(folder / "adapter_model.bin"))
    location = str(folder / CONFIG)
    body = safetensors.parse_json((folder / CONFIG).read_bytes(), location, "adapter config")
    lora, rank_of, alpha_of = _config(body, location)
    if base is not None and _BASE in body and body[_BASE] != fingerprint(base):
        raise UserError(
            f"{folder} is an adapter for other weights than these (fingerprint {str(body[_BASE])[:12]}, not "
            f"{fingerprint(base)[:12]}): load the model it was trained on"
        )
    file = safetensors.open_file(folder / WEIGHTS)
    modules = {module.name: module for module in _modules(cfg)}
    pairs, problems = _read(file, modules, cfg)
    power = 0.5 if lora.scaling == "alpha/sqrt(r)" else 1
    stacks: dict[str, dict[int | None, _Pair]] = {}
    for name, pair in pairs.items():
        expected = ("d",) if lora.miss else ("a", "b", *("m" * lora.dora))
        if lacking := [_SUFFIXES[key] for key in expected if key not in pair]:
            problems.append(f"{name} has no {', '.join(lacking)}")
            continue
        rank = pair[expected[0]].shape[0]
        if rank != rank_of(name):
            problems.append(f"{name} has rank {rank}, {CONFIG} says {rank_of(name)}")
        scale = alpha_of(name) / rank**power
        for rule, ours in _split(modules[name], {key: pair[key] for key in expected}):
            if not lora.miss:
                ours["b"] = ours["b"] * np.float32(scale / lora.scale)
            stacks.setdefault(rule.ours, {})[modules[name].layer] = ours
    if lora.dora:
        problems += [
            f"{path}: {cfg.n_layer - len(layers)} layers have no magnitude vector; DoRA needs one in every layer"
            for path, layers in stacks.items()
            if None not in layers and len(layers) < cfg.n_layer
        ]
    refuse(str(folder), problems)
    if not stacks:
        raise UserError(f"{folder}: the adapter is empty")
    rank = max(_rank(pair) for layers in stacks.values() for pair in layers.values())
    leaves = {
        f"{path}/{key}": jnp.asarray(array)
        for path, layers in stacks.items()
        for key, array in _stack(layers, cfg.n_layer).items()
    }
    if _HEAD in file.shapes():
        leaves["cls_head/kernel"] = jnp.asarray(np.asarray(file.array(_HEAD)).astype(np.float32).T)
    _verify(folder)
    alpha = lora.alpha if lora.miss else lora.scale * rank**power
    patterns = [_pattern(path, layers, cfg.n_layer) for path, layers in sorted(stacks.items())]
    return tree.unflatten(leaves), dataclasses.replace(lora, rank=rank, alpha=alpha, targets=" | ".join(patterns))


def _pattern(path: str, layers: Collection[int | None], n_layer: int) -> str:
    """Returns the pattern of lora.targets that selects the layers `layers` of a stack, such as
    blocks/[0-3,8]/attn/q/kernel, or `path` itself for all layers."""
    ranges: list[list[int]] = []
    for i in sorted(layer for layer in layers if layer is not None):
        if ranges and ranges[-1][1] == i - 1:
            ranges[-1][1] = i
        else:
            ranges.append([i, i])
    if None in layers or ranges == [[0, n_layer - 1]]:
        return path
    numbers = ",".join(f"{low}-{high}" if low < high else str(low) for low, high in ranges)
    return path.replace("blocks/", f"blocks/{numbers if numbers.isdecimal() else f'[{numbers}]'}/", 1)


def _verify(folder: Path) -> None:
    """Compares the config file and the weights file with the hashes that `export_peft` wrote, if the folder has a file
    of hashes. The environment variable GPTJAX_VERIFY=0 disables the check.

    Raises:
        UserError: a hash differs.
    """
    if os.environ.get("GPTJAX_VERIFY") == "0" or not (folder / HASHES).is_file():
        return
    hashes = read_json(folder / HASHES)
    if wrong := [name for name in (CONFIG, WEIGHTS) if hashes.get(name) != sha256(folder / name)]:
        raise UserError(
            f"{folder}: {', '.join(wrong)}: not as gptjax wrote it (sha256 differs): damaged or modified\n"
            f"  restore a good copy; if another tool wrote it, delete {HASHES}; GPTJAX_VERIFY=0 disables this check"
        )


# ---------------------------------------------------------------- modules of PEFT


def _modules(cfg: ModelConfig) -> list[Tensor]:
    """Returns the linear modules of the model's Hugging Face family, with the module names of transformers."""
    kernels = [
        rule._replace(theirs=rule.theirs.removesuffix(".weight"))
        for rule in families.family_of(cfg).rules
        if rule.ours.endswith("/kernel")
    ]
    return tensors_of(kernels, [rule.ours for rule in kernels], cfg.n_layer)


def has_conv1d(cfg: ModelConfig) -> bool:
    """Returns True if transformers implements the linear layers of the model as Conv1D with weights [in, out], as in
    GPT-2."""
    return any(rule.form is identity for module in _modules(cfg) for rule in module.rules)


def _rank(pair: _Pair) -> int:
    """Returns the rank of an adapter with gptjax's arrays a [in, R] or d [R, out]."""
    return pair["a"].shape[-1] if "a" in pair else pair["d"].shape[-2]


def _adapted_layers(pair: _Pair) -> list[int]:
    """Returns the layers of a stack whose adapter has values other than zero, or all layers if every value is zero."""
    *_, array = pair.values()
    nonzero = [i for i in range(len(array)) if any(value[i].any() for value in pair.values())]
    return nonzero or list(range(len(array)))


def _slice(pair: _Pair, layers: Collection[int], layer: int | None) -> _Pair:
    """Returns the adapter of one layer of a stack, or an empty dict if the layer has no adapter."""
    if layer is None:
        return pair
    return {key: array[layer] for key, array in pair.items()} if layer in layers else {}


def _join(module: Tensor, slices: list[_Pair]) -> _Pair:
    """Joins gptjax's adapters of the slices of a PEFT module, such as q, k and v of GPT-2, into one adapter of the
    module.

    Args:
        slices: the adapter of each slice; the dict of a slice without an adapter is empty.

    Returns:
        A dict with the matrices "a" [R, in] and "b" [out, R] and, for DoRA, the magnitude vector "m" [out]; for MiSS
        with "d" [R, out].
    """
    first = next(pair for pair in slices if pair)
    if "d" in first:
        zeros = np.zeros_like(first["d"])
        return {"d": np.concatenate([pair["d"] if pair else zeros for pair in slices], -1)}
    width = first["b"].shape[-1]
    if "m" in first and not all(slices):
        raise UserError(f"{module.name}: PEFT adapts q, k and v as one matrix, so DoRA needs all three as targets")
    a = [pair["a"] for pair in slices if pair]
    # Those slices of a PEFT module (such as q, k and v) that have an adapter share one matrix a if PEFT trained the
    # adapter, or if only one slice has an adapter.
    if all(np.array_equal(x, a[0]) for x in a):
        zeros = np.zeros_like(first["b"])
        joined = {"a": a[0].T, "b": np.concatenate([pair["b"] if pair else zeros for pair in slices], -1).T}
    else:
        rank = sum(x.shape[-1] for x in a)
        b, row = np.zeros((rank, width * len(slices)), np.float32), 0
        for k, pair in enumerate(slices):
            if pair:
                b[row : row + len(pair["b"]), k * width : (k + 1) * width] = pair["b"]
                row += len(pair["b"])
        joined = {"a": np.concatenate(a, -1).T, "b": b.T}
    if "m" in first:
        joined["m"] = np.concatenate([pair["m"][0] for pair in slices])
    return joined


def _split(module: Tensor, pair: _Pair) -> Iterator[tuple[Rule, _Pair]]:
    """Splits the adapter of a PEFT module into gptjax's adapters of the slices of the module, such as q, k and v of
    GPT-2.

    Yields the rule and the adapter of each slice of the module. The adapter of a slice has the keys "a" [in, R], "b"
    [R, out] and, for DoRA, "m" [1, out], or for MiSS the key "d" [R, out].
    """
    width = (pair["d"].shape[-1] if "d" in pair else pair["b"].shape[0]) // len(module.rules)
    for k, rule in enumerate(module.rules):
        rows = slice(k * width, (k + 1) * width)
        if "d" in pair:
            yield rule, {"d": pair["d"][:, rows]}
            continue
        ours = {"a": pair["a"].T, "b": pair["b"][rows].T}
        yield rule, ours | ({"m": pair["m"][None, rows]} if "m" in pair else {})


def _stack(layers: dict[int | None, _Pair], n_layer: int) -> _Pair:
    """Stacks the adapters of all layers into arrays [L, ..]. The adapter of a matrix outside the layers, which has the
    key None, is returned unchanged."""
    if None in layers:
        return layers[None]
    rank = max(map(_rank, layers.values()))
    rank_axis = {"a": 1, "b": 0, "d": 0}
    out = {}
    for key, value in next(iter(layers.values())).items():
        shape = [rank if axis == rank_axis.get(key) else size for axis, size in enumerate(value.shape)]
        out[key] = np.zeros((n_layer, *shape), np.float32)
        for i, pair in layers.items():
            out[key][i][tuple(map(slice, pair[key].shape))] = pair[key]
    return out


# ---------------------------------------------------------------- files of PEFT


def _config(body: dict[str, Any], location: str) -> tuple[LoraConfig, Callable[[str], int], Callable[[str], float]]:
    """Returns the config of the adapter, and two functions that map the name of a module to its rank and its alpha."""
    a = families.Attributes(body, neutral=_NEUTRAL)
    miss = body.get("peft_type") == "MISS"
    if body.get("peft_type") not in ("LORA", "MISS"):
        a.problems.append(f"peft_type={body.get('peft_type')!r:.60}: only LORA and MISS are known here")
    ranks, alphas, rslora, dora = {}, {}, False, False
    if miss:
        rank, alpha, dropout = a.take("r", int, 64), 1.0, a.take("miss_dropout", float, 0.0)
        a.must("init_weights", True, False)  # The values bat and mini of init_weights select methods other than MiSS.
        a.left.pop("mini_r", None)  # The attribute mini_r has no effect unless init_weights is mini.
    else:
        rank, alpha = a.take("r", int, 8), a.take("lora_alpha", float, 8.0)
        ranks, alphas = a.take("rank_pattern", dict, {}), a.take("alpha_pattern", dict, {})
        rslora, dora = a.take("use_rslora", bool, False), a.take("use_dora", bool, False)
        dropout = a.take("lora_dropout", float, 0.0)
        # The initialisations pissa, olora, corda and loftq raise an error, because adapters with these initialisations
        # belong to changed base weights, not to the base weights that `load` reads.
        a.must("init_lora_weights", True, False, "gaussian", "eva", "orthogonal")
    a.must("bias", "none")
    # Unknown attributes of an adapter may change its outputs, unless their value is false, null or 0.
    for name in list(a.left):
        if not a.left[name]:
            a.left.pop(name)
    if (saved := a.left.pop("modules_to_save", ["score"])) not in (["score"], ["classifier", "score"]):
        a.problems.append(f"modules_to_save={saved!r:.60}: no whole module but score is supported")
    if rank < 1 or not math.isfinite(alpha):
        a.problems.append(f"r={rank}, lora_alpha={alpha}: expected a rank of at least 1 and a finite alpha")
    for name, table in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        for key, value in table.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                a.problems.append(f"{name}: {key!r:.60}: {value!r:.60}: expected a finite number")
            if not _is_simple(key):
                a.problems.append(
                    f"{name}: {key!r:.60}: expected the name of a module, or a regular expression of at most 200 "
                    "characters, with at most four repetitions and none of a group"
                )
    a.end(location)

    def pattern(table: dict[str, T], default: T) -> Callable[[str], T]:
        """Returns a function that maps the name of a module to the value for the module in `table`.

        The keys of `table` are regular expressions. As in PEFT, the value for a module is the value of the first key of
        `table` that matches the whole name of the module, or the part of the name after one of the dots in the name. If
        no key of `table` matches, the value for the module is `default`.
        """

        def value(module: str) -> T:
            ends = [module, *(module[match.end() :] for match in re.finditer(r"\.", module))]
            return next((v for key, v in table.items() if any(re.fullmatch(key, end) for end in ends)), default)

        return value

    scaling: Literal["alpha/sqrt(r)", "alpha/r"] = "alpha/sqrt(r)" if rslora else "alpha/r"
    lora = LoraConfig(rank=rank, alpha=alpha, scaling=scaling, dora=dora, dropout=dropout, miss=miss)
    return lora, pattern(ranks, rank), pattern(alphas, alpha)


def _is_simple(pattern: str) -> bool:
    """Returns True if `pattern` is a regular expression without catastrophic backtracking. Regular expressions in
    adapters are checked because adapters may be untrusted files."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    operators = re.sub(r"\\.|\[[^]]*\]", "_", pattern)  # Replace escapes and character classes by underscores.
    few = len(re.findall(r"[*+{]", operators)) <= 4
    return len(pattern) <= 200 and few and not re.search(r"\)[*+?{]", operators)


def _read(file: safetensors.File, modules: dict[str, Tensor], cfg: ModelConfig) -> tuple[dict[str, _Pair], list[str]]:
    """Reads the adapter tensors of all modules from a PEFT file.

    Returns:
        A dict that maps the name of each module to its adapter, a dict with the keys "a" [R, in], "b" [out, R] and, for
        DoRA, "m" [out], or with the key "d" [R, out]; and a list of error messages about names, shapes and values.
    """
    pairs: dict[str, _Pair] = {}
    problems: list[str] = []
    ours = tree.flatten(abstract_params(cfg))
    # Map each module to its input size and output size, except for a tied LM head, whose weight matrix is not a gptjax
    # parameter.
    sizes = {
        name: (shapes[0][-2], sum(shape[-1] for shape in shapes))
        for name, module in modules.items()
        if (shapes := [ours[rule.ours].shape for rule in module.rules if rule.ours in ours])
    }
    for name, shape in file.shapes().items():
        if name == _HEAD:
            if not is_float(np.asarray(file.array(name))):
                problems.append(f"{name} holds no floating-point values")
            continue
        module, key = next(
            (
                (name.removeprefix(_PREFIX).removesuffix(f".{suffix}"), key)
                for key, suffix in _SUFFIXES.items()
                if name.startswith(_PREFIX) and name.endswith(f".{suffix}")
            ),
            ("", ""),
        )
        if name.removeprefix(_PREFIX).removesuffix(".base_layer.weight") in modules:
            continue  # PEFT's copy of the LM head equals the LM head of the base model.
        if module not in modules:
            problems.append(f"{name} {list(shape)} is no adapter of a matrix of this model")
            continue
        if module not in sizes:
            problems.append(
                f"{name}: {module} is the token embedding itself in this model (tie_word_embeddings): a tied head has "
                f"no adapter of its own here; train one without {module}"
            )
            continue
        d_in, d_out = sizes[module]
        rank = shape[{"a": 0, "b": -1, "d": 0}[key]] if key != "m" and len(shape) == 2 else 0
        expected = {"a": (rank, d_in), "b": (d_out, rank), "m": (d_out,), "d": (rank, d_out)}[key]
        if tuple(shape) != expected:
            problems.append(f"{name} is {list(shape)}, expected {list(expected)}")
            continue
        array = np.asarray(file.array(name))
        if not is_float(array):
            problems.append(f"{name} holds {array.dtype}, expected floating-point values")
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            problems.append(f"{name} has non-finite values")
        pairs.setdefault(module, {})[key] = array
    for name, pair in pairs.items():
        if {"a", "b"} <= pair.keys() and pair["a"].shape[0] != pair["b"].shape[1]:
            problems.append(f"{name}: lora_A has rank {pair['a'].shape[0]}, lora_B {pair['b'].shape[1]}")
    return pairs, problems


def _number(x: float) -> float | int:
    return int(x) if float(x).is_integer() else float(x)
