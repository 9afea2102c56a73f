"""This module computes the memory and cost of training and decode steps on a TPU slice.

The function `plan` compiles a training or decode step for a TPU slice and reports the cost of the step. The function
`search` compares the costs of training steps with different meshes, remat policies and numbers of micro-batches.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gptjax import tree
from gptjax.config import Config, MeshConfig, ModelConfig
from gptjax.errors import UserError
from gptjax.model.gpt import abstract_params
from gptjax.ops.device import AXES
from gptjax.parallel.mesh import mesh_of, sizes
from gptjax.planning import estimate, hlo, program
from gptjax.planning.slices import Slice, devices_of, slice_of
from gptjax.tasks import trainable
from gptjax.training.flops import flops_per_token
from gptjax.training.memory import GIB, chip_bytes

_MARGIN = 0.92  # `search` compiles a candidate only if its estimated memory is below _MARGIN times the chip's HBM.


@dataclass(frozen=True)
class Roofline:
    """Holds the seconds per step that computation, HBM traffic and communication take at the peak rates of the chip.

    A real step takes longer than `best`, the lower bound of the step time. The time of an efficient step is about
    `worst`, the sum of the times of computation, HBM traffic and communication.
    """

    compute_s: float
    hbm_s: float
    ici_s: float

    @property
    def best(self) -> float:
        """Returns the lower bound of the step time in seconds: computation, HBM traffic and communication overlap
        completely."""
        return max(self.compute_s, self.hbm_s, self.ici_s)

    @property
    def worst(self) -> float:
        """Returns the step time in seconds without overlap: the sum of the times of computation, HBM traffic and
        communication."""
        return self.compute_s + self.hbm_s + self.ici_s


@dataclass(frozen=True)
class Plan:
    """Holds the memory and the cost of a step on each chip of a TPU slice.

    If the step does not fit in memory (`fits` is False), the fields for FLOPs, traffic and `roofline` are not set.
    """

    what: str  # "train" or "decode"
    slice: str
    topology: str
    chips: int
    mesh: dict[str, int]
    remat: str
    rows: int  # `rows` is the number of rows (token sequences) per step.
    accumulation: int
    tokens: int  # tokens per step
    n_params: int
    fits: bool
    hbm_bytes: int  # `hbm_bytes` is the available HBM per chip in bytes.
    needed_bytes: int  # `needed_bytes` is the HBM that the step needs per chip in bytes.
    # `parts` splits needed_bytes into the step's arguments (params, optimizer, ..) and other memory.
    parts: dict[str, int]
    compile_s: float
    # The settings optim.offload and model.remat=offload keep `host_bytes` bytes per chip in host memory.
    host_bytes: int = 0
    model_flops: float = 0.0  # `model_flops` is the FLOPs per step of all chips by formula, without rematerialisation.
    flops: float = 0.0  # `flops` is the FLOPs per step and chip, counted in the compiled program.
    hbm_traffic_bytes: float = 0.0
    # `collectives` is the bytes sent per chip and step, by kind of collective.
    collectives: dict[str, float] = field(default_factory=dict)
    largest_gather_bytes: int = 0
    kernels: dict[str, float] = field(default_factory=dict)
    roofline: Roofline | None = None
    peaks: dict[str, float] = field(default_factory=dict)
    advice: tuple[str, ...] = ()

    def tokens_per_s(self, step_s: float) -> float:
        return self.tokens / step_s

    def mfu(self, step_s: float) -> float:
        """Returns the model FLOPs utilisation: model FLOP/s as a fraction of the peak FLOP/s of the slice
        (arXiv:2204.02311)."""
        return self.model_flops / step_s / (self.chips * self.peaks["tflops"] * 1e12)

    @property
    def step_s(self) -> tuple[float, float]:
        """Returns the step times (`Roofline.best`, `Roofline.worst`) in seconds, with complete overlap and without
        overlap."""
        assert self.roofline is not None
        return self.roofline.best, self.roofline.worst

    def to_json(self) -> str:
        out = dataclasses.asdict(self)
        if self.roofline is not None:
            out["roofline"] |= {"best_s": self.roofline.best, "worst_s": self.roofline.worst}
            for name, step_s in zip(("best", "worst"), self.step_s, strict=True):
                out[f"tokens_per_s_{name}"], out[f"mfu_{name}"] = self.tokens_per_s(step_s), self.mfu(step_s)
        return json.dumps(out, indent=2)


def plan(
    cfg: Config,
    on: str = "v5e-8",
    mesh: MeshConfig | None = None,
    *,
    decode: bool = False,
    chunk: int | None = None,
    keep_text: Callable[[str], None] | None = None,
) -> Plan:
    """Compiles a training or decode step ahead of time for a TPU slice, and returns the step's memory, FLOPs, traffic
    and time.

    The compiler of `plan` is libtpu, which works on machines with and without a TPU.

    Args:
        on: TPU slice: a name such as v5e-8, or a topology such as v5p:4x4x8.
        mesh: device mesh. None: cfg.mesh.
        decode: whether to compile the decode step instead of the training step. The decode step has sample.batch_size x
            mesh.data x mesh.fsdp rows.
        chunk: number of tokens per chunk of the pretraining loss, or None for the default chunk size of the loss.
        keep_text: function that is called with the HLO text of the compiled program.

    Raises:
        UserError: no such TPU slice exists, libtpu is not installed, the mesh does not have one device per chip, or the
            rows of a micro-batch are not divisible by mesh.data x mesh.fsdp.
    """
    tpu = slice_of(on)
    devices = devices_of(tpu)
    shape = sizes(cfg.mesh if mesh is None else mesh, tpu.n_chips)
    device_mesh = mesh_of(shape, devices)
    rows = cfg.sample.batch_size * shape[0] * shape[1] if decode else cfg.train.batch_size
    built = (
        program.decode_program(cfg, device_mesh, rows)
        if decode
        else program.train_program(cfg, device_mesh, chunk=chunk)
    )
    return weigh(cfg, tpu, shape, built, rows=rows, decode=decode, keep_text=keep_text)


def weigh(
    cfg: Config,
    on: Slice,
    shape: tuple[int, int, int, int],
    built: program.Program,
    *,
    rows: int,
    decode: bool = False,
    keep_text: Callable[[str], None] | None = None,
) -> Plan:
    """Returns the plan of a step, with the memory and cost of the step's compiled program `built`."""
    model, chip = cfg.model, on.chip
    T = program.width(cfg)
    n_params = program.count(cfg)
    breakdown = {name: size for name, size in built.argument_bytes.items() if size}
    breakdown["activations, gradients, workspace"] = max(0, built.needed_bytes - sum(breakdown.values()))
    result = Plan(
        what="decode" if decode else "train", slice=on.name, topology=on.topology, chips=on.n_chips,
        mesh=dict(zip(AXES, shape, strict=True)), remat=model.remat, rows=rows,
        accumulation=1 if decode else cfg.train.accumulation, tokens=rows * (1 if decode else T), n_params=n_params,
        fits=built.compiled is not None, hbm_bytes=built.usable_bytes or round(chip.hbm_gib * GIB),
        needed_bytes=built.needed_bytes, parts=breakdown, compile_s=round(built.seconds, 1),
        host_bytes=built.host_bytes,
        peaks={"tflops": chip.tflops, "hbm_gbps": chip.hbm_gbps, "ici_gbps": chip.ici_gbps},
    )  # fmt: skip
    if built.compiled is None:
        return dataclasses.replace(result, advice=() if decode else advice(cfg, on, shape, n_params, result))
    text = built.compiled.as_text() or ""
    if keep_text:
        keep_text(text)
    counted = hlo.work(text)
    flops = counted.flops + kernel_flops(counted.kernels, model, rows // result.accumulation, T, shape)
    sent = sum(counted.collectives.values())
    return dataclasses.replace(
        result,
        model_flops=result.tokens * _flops_per_token(cfg, T, decode),
        flops=flops,
        hbm_traffic_bytes=counted.hbm_bytes,
        collectives=counted.collectives,
        largest_gather_bytes=counted.largest_gather_bytes,
        kernels=counted.kernels,
        roofline=Roofline(
            flops / (chip.tflops * 1e12), counted.hbm_bytes / (chip.hbm_gbps * 1e9), sent / (chip.ici_gbps * 1e9)
        ),
    )


def _flops_per_token(cfg: Config, T: int, decode: bool) -> float:
    """Returns the FLOPs per token of a training or decode step.

    Training takes 6 FLOPs per token for each weight in a matrix multiplication (4 if the weight is frozen), plus 12 L D
    T FLOPs for attention (L layers, D attention channels, T tokens per row). Decoding takes a third of the training
    FLOPs per token, because decoding has no backward pass.
    """
    shapes = abstract_params(cfg.model)
    if decode:
        return flops_per_token(cfg.model, shapes) / 3
    frozen = 0.0
    if cfg.task != "pretrain":
        n_trained = tree.size(trainable.abstract_trained(cfg, *trainable.split_heads(shapes), cfg.model))
        frozen = trainable.frozen_share(cfg, tree.size(shapes), n_trained)
    return flops_per_token(cfg.model, shapes, width=T, frozen=frozen)


# _PRODUCTS holds the number of matrix multiplications per tile in each splash-attention kernel. The forward kernel of
# splash attention (fwd) computes the attention scores and the weighted values. The two backward kernels of splash
# attention (dq and dkv) compute the attention scores and the gradient of the attention weights. The backward kernel dq
# computes the gradient of q, and the backward kernel dkv computes the gradients of k and v.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def kernel_flops(
    kernels: dict[str, float], model: ModelConfig, rows: int, T: int, shape: tuple[int, int, int, int]
) -> float:
    """Returns the FLOPs of the splash-attention kernels on one chip.

    A partly masked tile of the attention scores is counted in full, because the splash-attention kernels skip only
    fully masked tiles.

    Under context parallelism, the result is the FLOPs of the chip with the last tokens, which attend to the most keys.
    """
    block = next((size for size in (512, 256, 128) if T // shape[3] % size == 0), T // shape[3])
    n, window = T // block, model.windows[0]
    reach = n if not window else min(n, -(-(window - 1) // block) + 1)
    tiles = sum(min(i + 1, reach) for i in range(n - n // shape[3], n))
    heads = model.n_head / shape[2] * max(1, rows / (shape[0] * shape[1]))
    flops_per_product = 2.0 * heads * tiles * block**2 * model.head_dim
    return sum(
        times * count * flops_per_product
        for name, times in kernels.items()
        for kind, count in _PRODUCTS.items()
        if f"_{kind}_" in name
    )


def advice(cfg: Config, on: Slice, shape: tuple[int, int, int, int], n_params: int, result: Plan) -> tuple[str, ...]:
    """Returns config changes, each of which is estimated to make the step fit in memory without any other change.

    The function `chip_bytes` estimates the memory of the step with a changed config. Each estimate of the step's memory
    is multiplied by a correction factor: the memory that the compiler reported for the unchanged step in `result`,
    divided by the estimate for the unchanged step.
    """
    width = program.width(cfg)
    ratio = result.needed_bytes / chip_bytes(cfg, n_params, width, shape)
    rows, (data, fsdp, tensor, context) = cfg.train.batch_size, shape

    def with_changes(**changes: str | int) -> Config:
        groups = {"remat": "model", "batch_size": "train", "accumulation": "train"}
        out = cfg
        for key, value in changes.items():
            group = groups[key]
            out = dataclasses.replace(out, **{group: dataclasses.replace(getattr(out, group), **{key: value})})
        return out

    options = [(f"model.remat={remat}", with_changes(remat=remat), shape) for remat in ("dots", "full")]
    for n in (2, 4, 8, 16, 32, 64):
        accumulation, new_data = cfg.train.accumulation * n, data // n if data % n == 0 else 0
        if rows % accumulation == 0 and rows // accumulation % (data * fsdp) == 0:
            options.append((f"train.accumulation={accumulation}", with_changes(accumulation=accumulation), shape))
        if new_data:
            options.append((f"mesh.data={new_data} mesh.fsdp={fsdp * n}", cfg, (new_data, fsdp * n, tensor, context)))
        if (smaller := rows // n) * n == rows and smaller % (cfg.train.accumulation * data * fsdp) == 0:
            options.append((f"train.batch_size={smaller}", with_changes(batch_size=smaller), shape))
    useful = [
        (text.split("=")[0], text)
        for text, variant, mesh_shape in options
        if ratio * chip_bytes(variant, n_params, width, mesh_shape) < result.hbm_bytes
        and (text.split("=")[0] != "model.remat" or variant.model.remat != cfg.model.remat)
    ]
    # `smallest` maps each setting to the first change of this setting in `useful`, which is the smallest change of the
    # setting that makes the step fit in memory.
    smallest = dict(reversed(useful))
    return tuple(smallest[kind] for kind in dict.fromkeys(kind for kind, _ in useful)) or (
        f"no single change is enough: use a larger slice than {on.name}, or --search for a combination",
    )


def search(
    cfg: Config,
    on: str = "v5e-8",
    *,
    best: int = 3,
    seconds: float = 150.0,
    say: Callable[[str], None] = lambda line: None,
) -> list[Plan]:
    """Searches for the mesh, remat policy and number of micro-batches with the fastest training step at the batch size
    of `cfg`.

    The candidates of `estimate.variants` are compiled in the order of estimated step time, fastest first.

    Args:
        on: TPU slice: a name such as v5e-8, or a topology such as v5p:4x4x8.
        best: number of plans to return. The search stops once `best` candidates that fit in memory have been found.
        seconds: time limit of the search. Once a candidate fits in memory, the next candidate is compiled only if the
            time left is at least twice the time of the last compilation.
        say: function that the search calls with a line of text about each compiled candidate.

    Returns:
        The plans of the compiled candidates that fit in memory, sorted by `Roofline.worst`, fastest first.

    Raises:
        UserError: no candidate fits in memory.
    """
    tpu = slice_of(on)
    devices = devices_of(tpu)
    n_params = program.count(cfg)
    hbm_bytes = tpu.chip.hbm_gib * GIB
    candidates = estimate.variants(cfg, tpu, n_params)
    if not candidates:
        raise UserError(
            f"train.batch_size ({cfg.train.batch_size}) is not divisible by {tpu.n_chips} chips: use a multiple"
        )
    fitting = [c for c in candidates if c.memory_bytes < _MARGIN * hbm_bytes]
    say(f"{len(candidates)} candidates, {len(fitting)} of them fit by estimate")
    if not fitting:
        least = min(candidates, key=lambda c: c.memory_bytes)
        raise UserError(
            f"no candidate fits {tpu.n_chips} chips of {tpu.chip.hbm_gib:g} GiB: the smallest needs about "
            f"{least.memory_bytes / GIB:.1f} GiB per chip ({_variant(least)}); use a larger slice or a smaller batch"
        )
    plans: list[Plan] = []
    started, last, scale = time.monotonic(), 0.0, 1.0
    for c in fitting:
        if len(plans) >= best or (plans and time.monotonic() - started + 2 * last > seconds):
            break
        if scale * c.memory_bytes > hbm_bytes:
            # The search skips candidate c, because an earlier candidate needed `scale` times the estimated memory, and
            # with the same correction factor candidate c would not fit in the memory of the chip.
            continue
        built = program.train_program(c.cfg, mesh_of(c.shape, devices))
        result = weigh(c.cfg, tpu, c.shape, built, rows=cfg.train.batch_size)
        last, scale = built.seconds, max(scale, result.needed_bytes / c.memory_bytes)
        size = f"{result.needed_bytes / GIB:.1f} GiB per chip"
        verdict = f"needs {size}, which does not fit"
        if result.fits:
            plans.append(result)
            verdict = "{}, {:.3g} to {:.3g} s per step".format(size, *result.step_s)
        say(f"{_variant(c)}: {verdict}, {built.seconds:.0f} s to compile")
    if not plans:
        raise UserError(f"none of the candidates compiled for {on} fits; use a larger slice or a smaller batch")
    return sorted(plans, key=lambda p: p.step_s[1])


def _variant(c: estimate.Candidate) -> str:
    mesh = " ".join(f"{name}={n}" for name, n in zip(AXES, c.shape, strict=True) if n > 1)
    return f"{mesh or 'one chip'} remat={c.cfg.model.remat} accumulation={c.cfg.train.accumulation}"
