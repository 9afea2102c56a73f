"""Traces and lowers programs of all presets and architectures for a GPU and a TPU, without either.

Nothing is run or allocated. `traced_dtypes` checks the dtypes in the trace of a bfloat16 model. By default every
architecture is traced in every use, every field of ModelConfig in one use, and some of these programs are lowered.
`pytest -m slow` runs every eleventh case of the full matrix (`test_switches.py` has the part with the fields of
ModelConfig), and GPTJAX_ALL_TRACES=1 all cases.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import traced_dtypes
import traced_programs as programs
from traced_programs import BOTH, LOWERING, MORE_USES, USES, Setting

from gptjax import config
from gptjax.config import ARCHS, Config, ModelConfig
from gptjax.model import gpt, layers
from gptjax.ops import attention, device, linear, norm
from gptjax.ops.scale import scaled
from gptjax.planning import program as planning
from gptjax.tasks import distill

ALL_USES = USES | MORE_USES
VARIANTS: dict[str, tuple[dict[str, Any], Setting]] = {
    "one document per row": ({}, Setting(documents=False)),
    "a length of 100": ({}, Setting(length=100)),
    "multi-head attention (n_kv_head = n_head)": ({"n_kv_head": None}, Setting()),
    "sliding window": ({"sliding_window": 40}, Setting()),
    "sliding window, one document per row": ({"sliding_window": 40}, Setting(documents=False)),
    "sliding window in some layers": ({"sliding_window": 40, "window_pattern": "SL"}, Setting()),
}
VARIED_USES = ("forward", "gradient", "cached step", "generate", "lora", "int8", "classify", "dpo", "taps")
PRESETS = config.presets()
PRESET_USES = ("init", "forward", "gradient", "cached step", "generate")
# Vocabulary size by tokenizer, and the preset that has the shape of a base model.
VOCABULARY = {"gpt2": 50257, "chars": 65, "bytes": 257}
BASES = {
    "smollm2-135m-instruct": "smollm2-135m", "hf:openai-community/gpt2": "gpt2-124m",
    "hf:openai-community/gpt2-medium": "gpt2-355m", "models/random": "the-verdict", "runs/book-instruct": "gpt2-355m",
}  # fmt: skip


def check(cfg: ModelConfig, program: programs.Program, platform: str, *, tokens: int, lower: bool = True) -> list[str]:
    traced = programs.trace(program, platform)
    if lower:
        programs.lower(traced, platform)
    return traced_dtypes.complaints(traced, cfg, program, rows=programs.ROWS, tokens=tokens)


def check_uses(
    cfg: ModelConfig, uses: Any, platform: str, setting: Setting = Setting(), lowered: Any = ALL_USES  # noqa: B008
) -> None:  # fmt: skip
    complaints = []
    for use in uses:
        lines = check(cfg, ALL_USES[use](cfg, setting), platform, tokens=setting.length, lower=use in lowered)
        complaints += [f"{use}: {line}" for line in lines]
    assert not complaints, "\n".join(complaints)


# ---------------------------------------------------------------- run by default


@pytest.mark.first_cases(1)
@pytest.mark.parametrize(("arch", "platform"), list(zip(ARCHS, itertools.cycle(LOWERING))))
def test_every_use_of_an_architecture(arch, platform):
    check_uses(programs.model(arch, dtype="bfloat16"), USES, platform, lowered=("gradient", "cached step"))


SMALL = programs.model(dtype="bfloat16")
ONE_BY_ONE = {k: cfg for k, cfg in programs.switches(SMALL).items() if k.split("=")[0] not in programs.CONSTANTS}
ONE_BY_ONE["constants"] = programs.constants(SMALL)


@pytest.mark.first_cases(20)
@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_a_switch(name):
    """Traces the gradient for a TPU. Fields that are constants in the program are changed together.

    Rows have 100 tokens, which splash does not support, so attention is computed by XLA.
    """
    cfg = ONE_BY_ONE[name]
    assert not check(cfg, programs.gradient(cfg, Setting(length=100)), "tpu", tokens=100, lower=False)


def test_every_field_of_the_config_is_covered():
    base = programs.model()
    names = {field.name for field in dataclasses.fields(ModelConfig)} - {"_derived"}
    covered = {text.split("=")[0] for text in programs.switches(base)}
    assert covered | set(programs.EVERYWHERE) == names
    assert set(programs.VALUES) | set(programs.COMPANIONS) <= names
    for text, cfg in programs.switches(base).items():  # each config differs in one field and in those derived from it
        name = text.split("=")[0]
        before = dataclasses.replace(base, **programs.COMPANIONS.get(name, {}))
        changed = {f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != getattr(before, f.name)}
        assert name in changed and changed <= {name, "_derived", *cfg._derived}, text


def test_a_new_field_without_values_is_an_error():
    """For numbers the other values to test must be listed in `VALUES`."""
    with pytest.raises(KeyError):
        programs.other_values("d_ff", programs.model(), values={})


def on_eight(which: str) -> dict[str, Any]:
    """Output of `eight.py`, run in a process with eight CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).with_name("eight.py")
    run = subprocess.run([sys.executable, script, which], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


ALL_MESHES = [pytest.mark.slow, pytest.mark.further_case, pytest.mark.timeout(1200)]  # six minutes


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=ALL_MESHES)])
def test_meshes_of_eight_devices(which):
    result = on_eight(which)
    print(f"{result['programs']} programs for meshes of eight devices")
    assert result["programs"] and not result["complaints"], result["complaints"]


# ---------------------------------------------------------------- the checks detect broken programs


def promoting(ndim):
    """`scaled`, but without the cast of the factor for arrays with `ndim` axes, which promotes them to float32."""
    return lambda x, factor: x * factor if x.ndim == ndim else scaled(x, factor)


def bias_in_its_own_dtype(x, kernel, bias=None, dtype="float32"):
    y = linear.matmul(kernel, x, dtype)
    return y if bias is None else y + bias.astype(y.dtype)


def float32(dtype):
    return jnp.float32


def rounded(logits, cap):
    return logits.astype(jnp.bfloat16).astype(jnp.float32)


BROKEN = {
    "float32 activations": ("gradient", device, "activation_dtype", float32, "for the backward pass is float32"),
    "float32 scan carry": ("gradient", device, "activation_dtype", float32, "a scan of 2 carries or stacks"),
    "float32 values": ("taps", layers, "scaled", promoting(4), "['blocks/*/attn/v'] is float32"),
    "norm without remat": ("gradient", norm, "_rematerialized", lambda fn: fn, "for the backward pass is float32"),
    "bias gradient": ("gradient", layers, "linear", bias_in_its_own_dtype, "computed in bfloat16: reduce_sum"),
    "factor gradient": (
        "gradient", layers, "scaled", lambda x, w: x * w.astype(x.dtype), "computed in bfloat16: reduce_sum",
    ),
    "rounded sums": ("forward", linear, "_low_product", lambda x, w: x @ w.astype(x.dtype), "not summed in float32"),
    "float32 operands": (
        "forward", linear, "_low_product", lambda x, w: x.astype(jnp.float32) @ w, "products with float32 operands",
    ),
    "softmax": ("gradient", attention, "_dot", jnp.matmul, "computed in bfloat16: exp"),
    "logits": ("forward", gpt, "softcap", rounded, "logits are rounded to bfloat16"),
    "logits of a cached step": ("cached step", gpt, "softcap", rounded, "logits are rounded to bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_check_detects_the_broken_program(name, monkeypatch):
    use, module, attribute, broken, line = BROKEN[name]
    cfg = programs.model("modern", dtype="bfloat16", bias=True, norm_scale=True)
    monkeypatch.setattr(module, attribute, broken)
    # splash does not support 100 tokens: XLA computes attention
    assert line in "\n".join(check(cfg, USES[use](cfg, Setting(length=100)), "tpu", tokens=100, lower=False))


def test_a_float32_cache_is_detected():
    cfg = programs.model("modern", dtype="bfloat16")
    program = programs.cached_step(cfg, Setting(), cache_dtype="float32")
    lines = "\n".join(check(cfg, program, "gpu", tokens=128, lower=False))
    assert "cache.k is float32" in lines and "a scan of 2 carries or stacks" in lines


def test_bfloat16_in_a_float32_model_is_detected(monkeypatch):
    monkeypatch.setattr(device, "activation_dtype", lambda dtype: jnp.bfloat16)
    cfg = programs.model()
    assert "bfloat16 in a float32 model" in check(cfg, programs.forward(cfg, Setting()), "gpu", tokens=128)[0]


@pytest.mark.parametrize(("use", "smear"), [("gradient", False), ("gradient", True), ("unstacked layers", False)])
def test_a_float32_scalar_in_the_residual_stream_is_detected(use, smear, monkeypatch):
    """Without the cast in `scaled`, a float32 scalar promotes the residual stream to float32.

    If this happens inside the scan over the layers, jax raises an error, because the carry changes its dtype. If it
    happens before the scan, or without one, the check detects it.
    """
    monkeypatch.setattr(layers, "scaled", lambda x, factor: x * factor)
    cfg = programs.model("modern", dtype="bfloat16", smear=smear)
    program = ALL_USES[use](cfg, Setting())
    if use == "gradient" and not smear:
        with pytest.raises(TypeError, match="carry"):
            programs.trace(program, "gpu")
    else:
        assert "for the backward pass is float32" in "\n".join(check(cfg, program, "gpu", tokens=128, lower=False))


def test_a_product_of_another_precision_is_detected():
    cfg = programs.model()
    program, highest = programs.forward(cfg, Setting()), dataclasses.replace(cfg, precision="highest")
    assert not check(cfg, program, "gpu", tokens=128, lower=False)
    assert "not of precision highest" in check(highest, program, "gpu", tokens=128, lower=False)[0]


# ---------------------------------------------------------------- the full matrix


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "dtype"), BOTH)
@pytest.mark.parametrize("arch", ARCHS)
def test_all_uses(arch, platform, dtype):
    check_uses(programs.model(arch, dtype=dtype), ALL_USES, platform)


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "dtype"), BOTH)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", ARCHS)
def test_documents_windows_and_heads(arch, variant, platform, dtype):
    switches, setting = VARIANTS[variant]
    check_uses(programs.model(arch, dtype=dtype, **switches), varied(variant, platform, dtype), platform, setting)


def varied(variant: str, platform: str, dtype: str) -> tuple[str, ...]:
    return programs.uses_of(list(VARIANTS).index(variant), platform, dtype, VARIED_USES, ("gradient", "cached step"))


def preset(name: str, dtype: str) -> Config:
    """The preset with the model at its full size; for fine-tuning presets, that of the base model."""
    cfg = config.load_config(name)
    source = cfg if cfg.task == "pretrain" else config.load_config(BASES[cfg.finetune.base])
    vocab_size = source.model.vocab_size or VOCABULARY[source.tokenizer.name]
    model = dataclasses.replace(source.model, vocab_size=vocab_size)
    if cfg.task != "pretrain":
        classes = {"n_classes": 2, "cls_bias": cfg.classify.bias} if cfg.task == "classify" else {}
        classes = {"n_classes": 1, "cls_bias": False} if cfg.task == "reward_model" else classes
        model = dataclasses.replace(model.computed_as(cfg.model), **classes)
    return dataclasses.replace(cfg, model=dataclasses.replace(model, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "dtype"), BOTH)
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets(name, platform, dtype, monkeypatch):
    """Checks the training step of the preset, and its model in the common uses. A teacher has the student's shape."""
    monkeypatch.setattr(distill, "teacher_config", lambda cfg: cfg.model)
    cfg, n = preset(name, dtype), sorted(PRESETS).index(name)
    complaints = check(cfg.model, programs.train_step(cfg), platform, tokens=planning.width(cfg))
    assert not complaints, "\n".join(complaints)
    check_uses(cfg.model, preset_uses(n, platform, dtype), platform, Setting(length=cfg.model.context_length))


def preset_uses(n: int, platform: str, dtype: str) -> tuple[str, ...]:
    return programs.uses_of(n, platform, dtype, PRESET_USES, ("cached step",))


def test_the_number_of_programs():
    """Counts the programs of the full matrix, here and in `test_switches.py`; `pytest -s` shows the counts."""
    counts = {
        "architectures": len(ARCHS) * len(ALL_USES) * len(BOTH),
        "variants": len(ARCHS) * sum(len(varied(name, *target)) for name in VARIANTS for target in BOTH),
        "presets": sum(1 + len(preset_uses(n, *target)) for n in range(len(PRESETS)) for target in BOTH),
        "switches": sum(len(uses) for _, _, _, uses in programs.switch_cases()),
    }
    print("programs traced and lowered:", ", ".join(f"{n:,} {name}" for name, n in counts.items()))
    assert set(BASES.values()) <= set(PRESETS) and sum(counts.values()) > 2000


# ---------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.parametrize("use", ["gradient", "lora", "generate"])
def test_it_compiles_for_a_tpu(use):
    """Compiles for one v5e chip with the TPU compiler."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    from gptjax.planning import slices

    chip = jax.sharding.SingleDeviceSharding(slices.devices_of(slices.slice_of("v5e-1"))[0])
    cfg = programs.model("modern", dtype="bfloat16", d_model=256, vocab_size=512)
    program = USES[use](cfg, Setting())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip)  # noqa: E731
    traced = programs.trace(program._replace(args=jax.tree.map(place, program.args)), "tpu")
    with device.compiling_for("tpu"):
        compiled = traced.lower().compile()
    assert (
        compiled.memory_analysis().generated_code_size_in_bytes > 0
    )  # not temporaries: they may all be in vector memory
    assert re.search(r"splash_mha_fwd.*tpu_custom_call", compiled.as_text())  # in generate for the prompt


@pytest.mark.slow
@pytest.mark.parametrize("use", ["gradient", "lora", "generate", "int8", "nf4"])
def test_it_compiles_for_a_gpu(use):
    """Compiles for one H100 with XLA and, for the kernels, Triton."""
    pytest.importorskip("jax_cuda12_plugin", reason="the GPU compiler is not installed (gptjax[cuda])")
    import described

    try:
        described.card()
    except NotImplementedError:
        pytest.skip("without a GPU, jax unloads the CUDA plugin unless JAX_PLATFORMS=cpu is set")
    cfg = programs.model("llama", dtype="bfloat16", d_model=256, vocab_size=512)
    program = USES[use](cfg, Setting())
    traced = programs.trace(program._replace(args=described.placed(program.args)), "gpu")
    with device.compiling_for("gpu"):
        compiled = traced.lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes > 0
    assert ("__gpu$xla.gpu.triton" in compiled.as_text()) == (
        use != "generate"
    )  # flash attention is used for whole rows
