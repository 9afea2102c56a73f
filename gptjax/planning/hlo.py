"""This module counts the FLOPs, HBM traffic and collectives of a compiled program in the HLO text of the program.

The body of a loop, such as the scan over the layers, is counted once per iteration. The `cost_analysis` of XLA counts
the body of a loop only once in total, and therefore reports too few FLOPs and bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128}
_NO_WORK = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "domain",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


class Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    # `in_hbm` is True if the array is in HBM, and False if the array is in the vector or scalar memory of the chip.
    in_hbm: bool

    @property
    def size_bytes(self) -> int:
        # The digits in a dtype name such as f32, s8 or f8e4m3fn are the bits per element.
        digits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * _BITS.get(self.dtype, int(digits[0]) if digits else 0) // 8


@dataclass(frozen=True)
class Instruction:
    name: str
    results: tuple[Array, ...]
    op: str
    operands: tuple[str, ...]
    rest: str  # `rest` holds the attributes as text, and the value of a constant or index of a parameter.
    root: bool

    def called(self, attribute: str) -> list[str]:
        """Returns the names of the computations in the attribute named `attribute`, such as body, condition or
        calls."""
        match = re.search(attribute + r"=(\{[^}]*\}|%[\w.\-]+)", self.rest)
        return re.findall(r"%([\w.\-]+)", match[1]) if match else []


Computation = dict[str, Instruction]  # A Computation maps instruction names to instructions.


class Work(NamedTuple):
    """Holds the FLOPs, HBM traffic, collectives and kernel calls of one device for one execution of a program."""

    flops: float  # `flops` is the FLOPs of all matrix multiplications outside Pallas kernels.
    # `hbm_bytes` is the bytes read from and written to HBM if each operation reads and writes its arrays once.
    hbm_bytes: float
    # `collectives` is the bytes that the device sends, by kind of collective, such as all-gather.
    collectives: dict[str, float]
    # `largest_gather_bytes` is the size in bytes of the largest array that an all-gather returns.
    largest_gather_bytes: int
    kernels: dict[str, float]  # `kernels` is the number of calls of each Pallas kernel, by kernel name.


def work(text: str) -> Work:
    """Returns the FLOPs, HBM traffic, collectives and kernel calls of a compiled program.

    The argument `text` is the HLO text of the program of one device (`compiled.as_text()`).
    """
    computations = parse(text)
    partitions = re.search(r"num_partitions=(\d+)", text)
    n_devices = int(partitions[1]) if partitions else 1
    flops = hbm = 0.0
    collectives: dict[str, float] = {}
    kernels: dict[str, float] = {}
    largest, seen = 0, set()
    for comp_name, instruction, times in executed(computations):
        computation = computations[comp_name]
        if (kind := _collective(instruction, comp_name)) is not None:
            if (key := _overlapped(instruction, comp_name)) in seen:
                continue
            seen |= {key} - {None}
            sent, whole = _sent(instruction, kind, computation, n_devices)
            collectives[kind] = collectives.get(kind, 0.0) + times * sent
            largest = max(largest, whole if kind == "all-gather" else 0)
        elif instruction.op in ("dot", "convolution"):
            flops += times * _product_flops(instruction, computation)
        elif instruction.op == "custom-call" and _is_kernel(instruction):
            name = re.sub(r"\.\d+$", "", instruction.name)
            kernels[name] = kernels.get(name, 0.0) + times
    for comp_name, instruction, times in executed(computations, into_fusions=False):
        hbm += times * _traffic(instruction, computations[comp_name], computations)
    return Work(flops, hbm, collectives, largest, kernels)


# ---------------------------------------------------------------- parsing


def parse(text: str) -> dict[str, Computation]:
    """Returns the computations in an HLO text by name.

    The entry computation is stored under two names, its own name and "ENTRY".
    """
    computations: dict[str, Computation] = {}
    computation: Computation = {}
    for line in text.splitlines():
        if (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)) and not line.startswith(" "):
            computation = computations[head[2]] = {}
            if head[1]:
                computations["ENTRY"] = computation
        elif (match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)) is not None:
            computation[match[2]] = _instruction(match[2], line[match.end() :], bool(match[1]))
    return computations


def _instruction(name: str, body: str, root: bool) -> Instruction:
    """Parses an HLO instruction from `body`, the text `type op(operands), attributes` after the name of the
    instruction."""
    end = _closing(body, 0, " ")
    kind, body = body[:end], body[end + 1 :]
    op, _, _ = body.partition("(")
    close = _closing(body, len(op) + 1, ")")
    inside = body[len(op) + 1 : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    rest = body[close + 1 :] + (f" value={inside}" if op in ("constant", "parameter") else "")
    arrays = tuple(
        Array(m[1], tuple(int(n) for n in re.findall(r"\d+", m[2])), re.search(r"S\([1-9]", m[3] or "") is None)
        for m in re.finditer(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](\{[^}]*\})?", kind)
    )
    return Instruction(name, arrays, op, operands, rest, root)


def _closing(text: str, start: int, mark: str) -> int:
    """Returns the index of the first character `mark` in `text`, from `start` on, that is outside all brackets."""
    depth = 0
    for i in range(start, len(text)):
        if depth == 0 and text[i] == mark:
            return i
        depth += (text[i] in "([{") - (text[i] in ")]}")
    return len(text)


# ---------------------------------------------------------------- loops


def executed(
    computations: dict[str, Computation], comp_name: str = "ENTRY", times: float = 1, *, into_fusions: bool = True
) -> Iterator[tuple[str, Instruction, float]]:
    """Yields (computation name, instruction, number of executions) for every instruction that the program executes.

    `executed` starts with the instructions of the computation `comp_name`. All branches of an HLO conditional count as
    executed.
    """
    for instruction in computations[comp_name].values():
        yield comp_name, instruction, times
        inner, factor = [], 1
        if instruction.op == "while":
            inner, factor = instruction.called("body"), trip_count(instruction, computations)
        elif instruction.op == "conditional":
            inner = instruction.called("branch_computations") or [
                *instruction.called("true_computation"), *instruction.called("false_computation"),
            ]  # fmt: skip
        elif instruction.op in ("call", "async-start") or (instruction.op == "fusion" and into_fusions):
            inner = instruction.called("calls") or instruction.called("to_apply")
        for name in inner:
            yield from executed(computations, name, times * factor, into_fusions=into_fusions)


def trip_count(loop: Instruction, computations: dict[str, Computation]) -> int:
    """Returns the number of iterations of a loop in an HLO program.

    The number of iterations of a loop is read from the annotation known_trip_count of XLA. In a loop without the
    annotation known_trip_count, the number of iterations is the constant with which the loop condition compares the
    loop counter, because the counter starts at 0.
    """
    if (known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)) is not None:
        return int(known[1])
    condition = computations[loop.called("condition")[0]]
    bounds = [re.search(r"value=(\d+)", i.rest) for i in condition.values() if i.op == "constant"]
    return max((int(match[1]) for match in bounds if match), default=1)


# ---------------------------------------------------------------- instruction costs


def _collective(instruction: Instruction, comp_name: str) -> str | None:
    kind = instruction.op.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    if kind == "all-reduce" and comp_name.startswith("all-reduce-scatter"):
        return "reduce-scatter"  # In TPU programs, a reduce-scatter appears as an all-reduce followed by a slice.
    return kind


def _overlapped(instruction: Instruction, comp_name: str) -> tuple[str, str, tuple[Array, ...]] | None:
    """Returns a key that identifies a collective that overlaps with computation, or None for any other collective.

    In TPU programs, an asynchronous collective appears several times with the same channel id: in the fusion that
    starts the collective, in each fusion that runs while the collective is in progress, and in the fusion that ends the
    collective. All appearances of an asynchronous collective have the same key, so that `work` counts the collective
    once.
    """
    channel = re.search(r"channel_id=(\d+)", instruction.rest)
    if channel is None or not ("fused_computation" in comp_name or "collective_fusion" in comp_name):
        return None
    return channel[1], instruction.op, instruction.results


def _sent(instruction: Instruction, kind: str, computation: Computation, n_devices: int) -> tuple[float, int]:
    """Returns the bytes that one device sends in a collective, and the size in bytes of the collective's largest
    result.

    The number of bytes that a device sends is computed under the assumption that collectives use ring algorithms.
    """
    n = _group_size(instruction.rest, n_devices)
    operand_bytes = sum(array.size_bytes for name in instruction.operands for array in computation[name].results[:1])
    result_bytes = [array.size_bytes for array in instruction.results]
    if kind == "collective-permute":
        return operand_bytes, operand_bytes
    if kind == "all-gather":
        whole = operand_bytes * n
        return whole * (n - 1) / n, max(result_bytes, default=0)
    factor = {"all-reduce": 2, "reduce-scatter": 1, "all-to-all": 1}[kind]
    return factor * operand_bytes * (n - 1) / n, max(result_bytes, default=0)


def _group_size(rest: str, n_devices: int) -> int:
    """Returns the number of devices in each group of a collective.

    The number of devices is read from the attribute replica_groups, which HLO writes in three different notations.
    """
    if (named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)) is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", named[2]))
    if (listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest)) is not None:
        return len(listed[1].split(","))
    if (iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest)) is not None:
        return int(iota[1])
    return n_devices


def _product_flops(instruction: Instruction, computation: Computation) -> float:
    left, right = (computation[name].results[0].shape for name in instruction.operands[:2])
    out = instruction.results[0].shape
    if instruction.op == "dot":
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        dims = [int(i) for i in match[1].split(",") if i] if match else []
        return 2.0 * math.prod(out) * math.prod(left[i] for i in dims)
    return _convolution_flops(instruction.rest, left, right, out)


def _convolution_flops(rest: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> float:
    """Returns the FLOPs of a convolution, which is the form of every matrix multiplication in TPU programs.

    Window positions of the convolution that fall on padding or on the gaps of a dilation are not counted, because
    multiplications at these positions have a factor of zero. If the convolution is a batched matrix multiplication, the
    window slides along the batch axis, and most window positions multiply by zero.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    if labels is None:
        return 0.0
    window = {
        key: value.split("x")
        for key, value in re.findall(r"(\w+)=([\d_x\-]+)", (re.search(r"window=\{([^}]*)\}", rest) or ["", ""])[1])
    }
    valid = 1
    for d in range(len(labels[1]) - 2):
        size, result, n_in = (
            shape[label.index(str(d))] for shape, label in ((right, labels[2]), (out, labels[3]), (left, labels[1]))
        )
        option = {key: value[d] for key, value in window.items()}
        stride, lhs_dilation, rhs_dilation = (int(option.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(option.get("pad", "0_0").split("_")[0])
        span = (n_in - 1) * lhs_dilation + 1
        positions = (o * stride + k * rhs_dilation - low for k in range(size) for o in range(result))
        valid *= sum(0 <= i < span and i % lhs_dilation == 0 for i in positions)
    groups = re.search(r"batch_group_count=(\d+)", rest)
    depth = right[labels[2].index("i")] * out[labels[3].index("f")] * out[labels[3].index("b")]
    return 2.0 * depth * valid / (int(groups[1]) if groups else 1)


def _is_kernel(call: Instruction) -> bool:
    """Returns True if an HLO custom call is a Pallas kernel.

    `work` does not count custom calls that are not Pallas kernels, because the compiler uses these custom calls only to
    allocate memory.
    """
    return '"tpu_custom_call"' in call.rest


def _traffic(instruction: Instruction, computation: Computation, computations: dict[str, Computation]) -> float:
    """Returns the number of bytes that an instruction reads from HBM and writes to HBM.

    The bytes of each operand and each result of the HLO instruction are counted once. If the HLO instruction slices an
    operand, only the bytes of the slice are counted.
    """
    op = instruction.op
    if op in _NO_WORK or op.endswith("-done") or (op == "custom-call" and not _is_kernel(instruction)):
        return 0
    if op in _SLICES:
        return 2 * _hbm(instruction.results)
    if op == "slice-start":  # The results of a slice-start operation are (operand, slice, ..).
        result = instruction.results[1]
        return result.size_bytes + _hbm((result,))
    if op == "dynamic-update-slice":
        return 2 * _hbm(computation[instruction.operands[1]].results)
    if op.endswith("-start"):  # The results of an asynchronous operation are (operand, result, ..).
        return _hbm(instruction.results[:2])
    read, written = [_hbm(computation[name].results) for name in instruction.operands], _hbm(instruction.results)
    if op == "fusion":
        inner = computations[instruction.called("calls")[0]]
        read = [min(size, used) for size, used in zip(read, _read_bytes(inner, len(read), computations), strict=True)]
        written = min(written, sum(_written(i, inner) for i in inner.values() if i.root))
    return sum(read) + written


def _read_bytes(inner: Computation, n: int, computations: dict[str, Computation]) -> list[float]:
    """Returns the number of bytes that a fused computation reads from each of its `n` parameters.

    For a parameter that the fused computation reads completely, the number of bytes is infinity. For a parameter that
    the fused computation only slices, only the bytes of the slices are counted. For a parameter that the fused
    computation only updates in place, no bytes are counted.
    """
    users: dict[str, list[Instruction]] = {}
    for instruction in inner.values():
        for name in dict.fromkeys(instruction.operands):
            users.setdefault(name, []).append(instruction)

    def used_bytes(name: str) -> float:
        total = 0.0
        for user in users.get(name, []):
            if user.op == "bitcast":
                total += used_bytes(user.name)
            elif user.op == "fusion":
                within = _read_bytes(computations[user.called("calls")[0]], len(user.operands), computations)
                total += sum(size for operand, size in zip(user.operands, within, strict=True) if operand == name)
            elif user.op in _SLICES and user.operands[0] == name:
                total += sum(array.size_bytes for array in user.results)
            elif not (user.op == "dynamic-update-slice" and user.operands[0] == name):
                return math.inf
        return total

    read = [math.inf] * n
    for instruction in inner.values():
        if instruction.op == "parameter":
            read[int(re.findall(r"value=(\d+)", instruction.rest)[0])] = used_bytes(instruction.name)
    return read


def _written(root: Instruction, inner: Computation) -> float:
    if root.op == "dynamic-update-slice":
        return sum(array.size_bytes for array in inner[root.operands[1]].results)
    if root.op in ("tuple", "bitcast"):
        return sum(_written(inner[name], inner) for name in root.operands)
    return sum(array.size_bytes for array in root.results)


def _hbm(arrays: tuple[Array, ...]) -> float:
    return sum(array.size_bytes for array in arrays if array.in_hbm)
