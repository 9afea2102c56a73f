"""Every preset, architecture and use, traced and lowered for a GPU and a TPU that are not there.

Nothing runs and nothing is allocated. What is read from a trace of a bfloat16 model stands in `traced_dtypes`. The
plain run traces every architecture in every use, and every switch in one, and lowers some of it; `pytest -m slow` takes
every seventh case of the matrix, of which `test_switches.py` has the switches, and with GPTJAX_ALL_TRACES=1 all of it.
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

ALL_USES = USES | MORE_USES
VARIANTS: dict[str, tuple[dict[str, Any], Setting]] = {
    "one document per row": ({}, Setting(documents=False)),
    "a length of 100": ({}, Setting(length=100)),
    "as many key heads as heads": ({"n_kv_head": None}, Setting()),
    "a window": ({"sliding_window": 40}, Setting()),
    "a window without documents": ({"sliding_window": 40}, Setting(documents=False)),
    "windows in some layers": ({"sliding_window": 40, "window_pattern": "SL"}, Setting()),
}
VARIED_USES = ("forward", "gradient", "cached step", "generate", "lora", "int8", "classify", "dpo", "taps")
PRESETS = config.presets()
PRESET_USES = ("init", "forward", "gradient", "cached step", "generate")
# Presets whose vocabulary, or whose model, comes from elsewhere.
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
    found = []
    for use in uses:
        lines = check(cfg, ALL_USES[use](cfg, setting), platform, tokens=setting.length, lower=use in lowered)
        found += [f"{use}: {line}" for line in lines]
    assert not found, "\n".join(found)


# ---------------------------------------------------------------- the plain run


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
    """In the gradient, for a TPU; those that are constants in it together. A length of 100 leaves attention to XLA."""
    cfg = ONE_BY_ONE[name]
    assert not check(cfg, programs.gradient(cfg, Setting(length=100)), "tpu", tokens=100, lower=False)


def test_no_switch_is_left_out():
    base = programs.model()
    names = {field.name for field in dataclasses.fields(ModelConfig)} - {"_derived"}
    covered = {text.split("=")[0] for text in programs.switches(base)}
    assert covered | set(programs.EVERYWHERE) == names
    assert set(programs.VALUES) | set(programs.COMPANIONS) <= names
    for text, cfg in programs.switches(base).items():  # each is one switch, and what is derived from it
        name = text.split("=")[0]
        before = dataclasses.replace(base, **programs.COMPANIONS.get(name, {}))
        changed = {f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != getattr(before, f.name)}
        assert name in changed and changed <= {name, "_derived", *cfg._derived}, text


def test_a_new_switch_cannot_be_forgotten():
    """A number has no other value by itself."""
    with pytest.raises(KeyError):
        programs.other_values("d_ff", programs.model(), values={})


def on_eight(which: str) -> dict[str, Any]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).with_name("eight.py")
    run = subprocess.run([sys.executable, script, which], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_a_mesh_of_eight(which):
    found = on_eight(which)
    print(f"{found['programs']} programs for a mesh of eight devices")
    assert found["programs"] and not found["complaints"], found["complaints"]


# ---------------------------------------------------------------- the checks find what they are for


def promoting(ndim):
    """`scaled` that makes arrays of so many axes float32."""
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
    "and in the loop": ("gradient", device, "activation_dtype", float32, "a scan of 2 carries or stacks"),
    "float32 values": ("taps", layers, "scaled", promoting(4), "['blocks/*/attn/v'] is float32"),
    "a norm's insides": ("gradient", norm, "_again", lambda fn: fn, "for the backward pass is float32"),
    "a bias": ("gradient", layers, "linear", bias_in_its_own_dtype, "computed in bfloat16: reduce_sum"),
    "a factor": ("gradient", layers, "scaled", lambda x, w: x * w.astype(x.dtype), "computed in bfloat16: reduce_sum"),
    "rounded sums": ("forward", linear, "_low_product", lambda x, w: x @ w.astype(x.dtype), "not summed in float32"),
    "float32 operands": (
        "forward", linear, "_low_product", lambda x, w: x.astype(jnp.float32) @ w, "products with float32 operands",
    ),
    "softmax": ("gradient", attention, "_dot", jnp.matmul, "computed in bfloat16: exp"),
    "logits": ("forward", gpt, "softcap", rounded, "logits are rounded to bfloat16"),
    "logits of a cached step": ("cached step", gpt, "softcap", rounded, "logits are rounded to bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_check_finds_what_it_is_for(name, monkeypatch):
    use, module, attribute, broken, line = BROKEN[name]
    cfg = programs.model("modern", dtype="bfloat16", bias=True, norm_scale=True)
    monkeypatch.setattr(module, attribute, broken)
    # 100 tokens: XLA attends
    assert line in "\n".join(check(cfg, USES[use](cfg, Setting(length=100)), "tpu", tokens=100, lower=False))


def test_a_float32_cache_is_found():
    cfg = programs.model("modern", dtype="bfloat16")
    program = programs.cached_step(cfg, Setting(), cache_dtype="float32")
    found = "\n".join(check(cfg, program, "gpu", tokens=128, lower=False))
    assert "cache.k is float32" in found and "a scan of 2 carries or stacks" in found


def test_bfloat16_in_a_float32_model_is_found(monkeypatch):
    monkeypatch.setattr(device, "activation_dtype", lambda dtype: jnp.bfloat16)
    cfg = programs.model()
    assert "bfloat16 in a float32 model" in check(cfg, programs.forward(cfg, Setting()), "gpu", tokens=128)[0]


@pytest.mark.parametrize(("use", "smear"), [("gradient", False), ("gradient", True), ("layers apart", False)])
def test_a_float32_scalar_in_the_residual_stream_is_found(use, smear, monkeypatch):
    """It makes the stream float32. A loop over the layers refuses that if it begins inside; if it has begun before, or
    without the loop, the check finds it."""
    monkeypatch.setattr(layers, "scaled", lambda x, factor: x * factor)
    cfg = programs.model("modern", dtype="bfloat16", smear=smear)
    program = ALL_USES[use](cfg, Setting())
    if use == "gradient" and not smear:
        with pytest.raises(TypeError, match="carry"):
            programs.trace(program, "gpu")
    else:
        assert "for the backward pass is float32" in "\n".join(check(cfg, program, "gpu", tokens=128, lower=False))


def test_a_product_of_another_precision_is_found():
    cfg = programs.model()
    program, stated = programs.forward(cfg, Setting()), dataclasses.replace(cfg, precision="highest")
    assert not check(cfg, program, "gpu", tokens=128, lower=False)
    assert "not of precision highest" in check(stated, program, "gpu", tokens=128, lower=False)[0]


# ---------------------------------------------------------------- the whole matrix


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
    """With the model at its full size, that of the base where a preset tunes one."""
    cfg = config.load_config(name)
    source = cfg if cfg.task == "pretrain" else config.load_config(BASES[cfg.finetune.base])
    vocab_size = source.model.vocab_size or VOCABULARY[source.tokenizer.name]
    model = dataclasses.replace(source.model, vocab_size=vocab_size)
    if cfg.task != "pretrain":
        classes = {"n_classes": 2, "cls_bias": cfg.classify.bias} if cfg.task == "classify" else {}
        model = dataclasses.replace(model.computed_as(cfg.model), **classes)
    return dataclasses.replace(cfg, model=dataclasses.replace(model, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "dtype"), BOTH)
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets(name, platform, dtype):
    """The step that the preset trains with, and its model in the common uses."""
    cfg, n = preset(name, dtype), sorted(PRESETS).index(name)
    found = check(cfg.model, programs.train_step(cfg), platform, tokens=planning.width(cfg))
    assert not found, "\n".join(found)
    check_uses(cfg.model, preset_uses(n, platform, dtype), platform, Setting(length=cfg.model.context_length))


def preset_uses(n: int, platform: str, dtype: str) -> tuple[str, ...]:
    return programs.uses_of(n, platform, dtype, PRESET_USES, ("cached step",))


def test_the_number_of_programs():
    """As the tests above and in `test_switches.py` go through them; `-s` shows it."""
    parts = {
        "architectures": len(ARCHS) * len(ALL_USES) * len(BOTH),
        "variants": len(ARCHS) * sum(len(varied(name, *where)) for name in VARIANTS for where in BOTH),
        "presets": sum(1 + len(preset_uses(n, *where)) for n in range(len(PRESETS)) for where in BOTH),
        "switches": sum(len(uses) for _, _, _, uses in programs.switch_cases()),
    }
    print("programs traced and lowered:", ", ".join(f"{n:,} {name}" for name, n in parts.items()))
    assert set(BASES.values()) <= set(PRESETS) and sum(parts.values()) > 2000


# ---------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.parametrize("use", ["gradient", "lora", "generate"])
def test_it_compiles_for_a_tpu(use):
    """The real compiler, for one v5e."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    from gptjax.planning import slices

    chip = jax.sharding.SingleDeviceSharding(slices.devices_of(slices.slice_of("v5e-1"))[0])
    cfg = programs.model("modern", dtype="bfloat16", d_model=256, vocab_size=512)
    program = USES[use](cfg, Setting())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip)  # noqa: E731
    traced = programs.trace(program._replace(args=jax.tree.map(place, program.args)), "tpu")
    with device.compiling_for("tpu"):
        compiled = traced.lower().compile()
    assert compiled.memory_analysis().generated_code_size_in_bytes > 0  # temporaries all fit the chip's own memory
    assert re.search(r"splash_mha_fwd.*tpu_custom_call", compiled.as_text())  # generate: the prompt


@pytest.mark.slow
@pytest.mark.parametrize("use", ["gradient", "lora", "generate", "int8", "nf4"])
def test_it_compiles_for_a_gpu(use):
    """The real compiler, with the kernels' own, for one H100."""
    pytest.importorskip("jax_cuda12_plugin", reason="the GPU compiler is not installed (gptjax[cuda])")
    import described

    try:
        described.card()
    except NotImplementedError:
        pytest.skip("jax lets the CUDA plugin go where it finds no card: JAX_PLATFORMS=cpu keeps it")
    cfg = programs.model("llama", dtype="bfloat16", d_model=256, vocab_size=512)
    program = USES[use](cfg, Setting())
    traced = programs.trace(program._replace(args=described.placed(program.args)), "gpu")
    with device.compiling_for("gpu"):
        compiled = traced.lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes > 0
    assert ("__gpu$xla.gpu.triton" in compiled.as_text()) == (use != "generate")  # flash, where a whole row is read
