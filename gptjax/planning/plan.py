"""`plan`: one configuration on one TPU slice, compiled and weighed; `search`: which mesh, remat and micro-batches."""

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

_MARGIN = 0.92  # of a chip's HBM that the formula may fill before something is compiled


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step at the chip's peaks. The truth lies above `best`; a good program comes near `worst`."""

    compute_s: float
    hbm_s: float
    ici_s: float

    @property
    def best(self) -> float:
        """All three at once."""
        return max(self.compute_s, self.hbm_s, self.ici_s)

    @property
    def worst(self) -> float:
        """One after the other."""
        return self.compute_s + self.hbm_s + self.ici_s


@dataclass(frozen=True)
class Plan:
    """What a step takes on every chip of a slice. Without `fits` there is no program, and no work or time."""

    what: str  # train or decode
    slice: str
    topology: str
    chips: int
    mesh: dict[str, int]
    remat: str
    rows: int  # a step
    accumulation: int
    tokens: int  # a step
    n_params: int
    fits: bool
    hbm_bytes: int  # of the chip
    needed_bytes: int
    parts: dict[str, int]  # bytes a chip: params, optimizer, batch, .., activations and workspace
    compile_s: float
    host_bytes: int = 0  # a chip, of what waits in its host's memory: optim.offload, model.remat=offload
    model_flops: float = 0.0  # a step, all chips, by formula: 6 a weight, 12 L D T of attention; nothing twice
    flops: float = 0.0  # a step and chip, as compiled
    hbm_traffic_bytes: float = 0.0
    collectives: dict[str, float] = field(default_factory=dict)  # kind -> bytes that a chip sends a step
    largest_gather_bytes: int = 0
    kernels: dict[str, float] = field(default_factory=dict)
    roofline: Roofline | None = None
    peaks: dict[str, float] = field(default_factory=dict)
    advice: tuple[str, ...] = ()

    def tokens_per_s(self, step_s: float) -> float:
        return self.tokens / step_s

    def mfu(self, step_s: float) -> float:
        """Model FLOP/s as a part of the slice's peak."""
        return self.model_flops / step_s / (self.chips * self.peaks["tflops"] * 1e12)

    @property
    def step_s(self) -> tuple[float, float]:
        """Seconds of a step that fits: if all three of the roofline overlap, and if none do."""
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
    """Compile the step of `cfg` for a TPU slice that need not be there, and weigh it.

    Args:
        on: a name such as v5e-8, or a topology such as v5p:4x4x8. mesh: None: cfg.mesh.
        decode: the decode step with sample.batch_size rows a data shard, in the place of the train step.
        chunk: of the loss, see `losses.next_token`. keep_text: gets the compiled program's text.

    Raises:
        UserError: no such slice; libtpu is missing; the batch does not divide over the mesh.
    """
    where = slice_of(on)
    devices = devices_of(where)
    shape = sizes(cfg.mesh if mesh is None else mesh, where.n_chips)
    laid = mesh_of(shape, devices)
    rows = cfg.sample.batch_size * shape[0] * shape[1] if decode else cfg.train.batch_size
    built = program.decode_program(cfg, laid, rows) if decode else program.train_program(cfg, laid, chunk=chunk)
    return weigh(cfg, where, shape, built, rows=rows, decode=decode, keep_text=keep_text)


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
    """The plan of a compiled program."""
    model, chip = cfg.model, on.chip
    T = program.width(cfg)
    n_params = program.count(cfg)
    parts = {name: size for name, size in built.parts.items() if size}
    parts["activations, gradients, workspace"] = max(0, built.needed_bytes - sum(parts.values()))
    found = Plan(
        what="decode" if decode else "train", slice=on.name, topology=on.topology, chips=on.n_chips,
        mesh=dict(zip(AXES, shape, strict=True)), remat=model.remat, rows=rows,
        accumulation=1 if decode else cfg.train.accumulation, tokens=rows * (1 if decode else T), n_params=n_params,
        fits=built.compiled is not None, hbm_bytes=built.usable_bytes or round(chip.hbm_gib * GIB),
        needed_bytes=built.needed_bytes, parts=parts, compile_s=round(built.seconds, 1), host_bytes=built.host_bytes,
        peaks={"tflops": chip.tflops, "hbm_gbps": chip.hbm_gbps, "ici_gbps": chip.ici_gbps},
    )  # fmt: skip
    if built.compiled is None:
        return dataclasses.replace(found, advice=() if decode else advice(cfg, on, shape, n_params, found))
    text = built.compiled.as_text() or ""
    if keep_text:
        keep_text(text)
    done = hlo.work(text)
    flops = done.flops + kernel_flops(done.kernels, model, rows // found.accumulation, T, shape)
    sent = sum(done.collectives.values())
    return dataclasses.replace(
        found,
        model_flops=found.tokens * _flops_a_token(cfg, T, decode),
        flops=flops,
        hbm_traffic_bytes=done.hbm_bytes,
        collectives=done.collectives,
        largest_gather_bytes=done.largest_gather_bytes,
        kernels=done.kernels,
        roofline=Roofline(
            flops / (chip.tflops * 1e12), done.hbm_bytes / (chip.hbm_gbps * 1e9), sent / (chip.ici_gbps * 1e9)
        ),
    )


def _flops_a_token(cfg: Config, T: int, decode: bool) -> float:
    """6 a weight and 12 L D T of attention; a third of it to decode, and without a frozen weight's own gradient."""
    shapes = abstract_params(cfg.model)
    if decode:
        return flops_per_token(cfg.model, shapes) / 3
    frozen = 0.0
    if cfg.task != "pretrain":
        n_trained = tree.size(trainable.abstract_trained(cfg, *trainable.split_heads(shapes), cfg.model))
        frozen = trainable.frozen_share(cfg, tree.size(shapes), n_trained)
    return flops_per_token(cfg.model, shapes, width=T, frozen=frozen)


# Products of [T, T] with H numbers that each of splash's kernels makes: scores and values; and in the backward pass
# scores, their gradient, and one product for each result.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def kernel_flops(
    kernels: dict[str, float], model: ModelConfig, rows: int, T: int, shape: tuple[int, int, int, int]
) -> float:
    """Of splash on one chip: the tiles that are not skipped, counted as whole. Where tokens are divided, on the chip
    that has the last ones: they see the most keys."""
    block = next((size for size in (512, 256, 128) if T // shape[3] % size == 0), T // shape[3])
    n, window = T // block, model.windows[0]
    reach = n if not window else min(n, -(-(window - 1) // block) + 1)
    tiles = sum(min(i + 1, reach) for i in range(n - n // shape[3], n))
    heads = model.n_head / shape[2] * max(1, rows / (shape[0] * shape[1]))
    a_product = 2.0 * heads * tiles * block**2 * model.head_dim
    return sum(
        times * count * a_product
        for name, times in kernels.items()
        for part, count in _PRODUCTS.items()
        if f"_{part}_" in name
    )


def advice(cfg: Config, on: Slice, shape: tuple[int, int, int, int], n_params: int, found: Plan) -> tuple[str, ...]:
    """Single changes that would make it fit: the formula's, scaled by what the compiler said of this one."""
    width = program.width(cfg)
    off = found.needed_bytes / chip_bytes(cfg, n_params, width, shape)
    rows, (data, fsdp, tensor, context) = cfg.train.batch_size, shape

    def changed(**changes: str | int) -> Config:
        groups = {"remat": "model", "batch_size": "train", "accumulation": "train"}
        out = cfg
        for key, value in changes.items():
            group = groups[key]
            out = dataclasses.replace(out, **{group: dataclasses.replace(getattr(out, group), **{key: value})})
        return out

    options = [(f"model.remat={remat}", changed(remat=remat), shape) for remat in ("dots", "full")]
    for n in (2, 4, 8, 16, 32, 64):
        accumulation, others = cfg.train.accumulation * n, data // n if data % n == 0 else 0
        if rows % accumulation == 0 and rows // accumulation % (data * fsdp) == 0:
            options.append((f"train.accumulation={accumulation}", changed(accumulation=accumulation), shape))
        if others:
            options.append((f"mesh.data={others} mesh.fsdp={fsdp * n}", cfg, (others, fsdp * n, tensor, context)))
        if (smaller := rows // n) * n == rows and smaller % (cfg.train.accumulation * data * fsdp) == 0:
            options.append((f"train.batch_size={smaller}", changed(batch_size=smaller), shape))
    useful = [
        (text.split("=")[0], text)
        for text, other, there in options
        if off * chip_bytes(other, n_params, width, there) < found.hbm_bytes
        and (text.split("=")[0] != "model.remat" or other.model.remat != cfg.model.remat)
    ]
    first = dict(reversed(useful))  # the smallest change of each kind
    return tuple(first[kind] for kind in dict.fromkeys(kind for kind, _ in useful)) or (
        f"nothing by itself: a larger slice than {on.name}, or --search for several changes together",
    )


def search(
    cfg: Config,
    on: str = "v5e-8",
    *,
    best: int = 3,
    seconds: float = 150.0,
    say: Callable[[str], None] = lambda line: None,
) -> list[Plan]:
    """Meshes, remat policies and micro-batches for the same batch: sorted by formula, the first ones compiled.

    Args:
        best: how many that fit are wanted.
        seconds: no compilation starts when one of twice the last one's time would end after it.
        say: gets a line for each that is compiled.

    Returns:
        Those that fit, the fastest first: by the roofline's three times added up.

    Raises:
        UserError: nothing fits, even by formula.
    """
    where = slice_of(on)
    devices = devices_of(where)
    n_params = program.count(cfg)
    room = where.chip.hbm_gib * GIB
    everything = estimate.variants(cfg, where, n_params)
    if not everything:
        raise UserError(
            f"train.batch_size ({cfg.train.batch_size}) does not divide over {where.n_chips} chips: take a multiple"
        )
    waiting = [c for c in everything if c.memory_bytes < _MARGIN * room]
    say(f"{len(everything)} variants, {len(waiting)} fit by formula")
    if not waiting:
        least = min(everything, key=lambda c: c.memory_bytes)
        raise UserError(
            f"nothing fits {where.n_chips} chips of {where.chip.hbm_gib:g} GiB: the least needs about "
            f"{least.memory_bytes / GIB:.1f} GiB a chip ({_variant(least)}); take a larger slice or a smaller batch"
        )
    found: list[Plan] = []
    started, last, scale = time.monotonic(), 0.0, 1.0
    for c in waiting:
        if len(found) >= best or (found and time.monotonic() - started + 2 * last > seconds):
            break
        if scale * c.memory_bytes > room:
            continue  # the formula was too kind to an earlier one
        built = program.train_program(c.cfg, mesh_of(c.shape, devices))
        result = weigh(c.cfg, where, c.shape, built, rows=cfg.train.batch_size)
        last, scale = built.seconds, max(scale, result.needed_bytes / c.memory_bytes)
        size = f"{result.needed_bytes / GIB:.1f} GiB a chip"
        verdict = f"needs {size}, which does not fit"
        if result.fits:
            found.append(result)
            verdict = "{}, {:.3g} to {:.3g} s a step".format(size, *result.step_s)
        say(f"{_variant(c)}: {verdict}, {built.seconds:.0f} s to compile")
    if not found:
        raise UserError(
            f"none of the variants that were compiled for {on} fits; take a larger slice or a smaller batch"
        )
    return sorted(found, key=lambda p: p.step_s[1])


def _variant(c: estimate.Candidate) -> str:
    mesh = " ".join(f"{name}={n}" for name, n in zip(AXES, c.shape, strict=True) if n > 1)
    return f"{mesh or 'one chip'} remat={c.cfg.model.remat} accumulation={c.cfg.train.accumulation}"
