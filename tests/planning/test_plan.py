"""Tests of `plan`: names of slices, roofline arithmetic, errors, and small steps compiled for TPUs ahead of time."""

import dataclasses
import json
import math

import jax
import pytest

import gptjax
from gptjax.config import load_config
from gptjax.errors import UserError
from gptjax.planning import estimate, hlo, plan, program, report, slices
from gptjax.planning.plan import Plan, Roofline
from gptjax.training.memory import chip_bytes

CFG = load_config(
    "tiny-llama", "model.vocab_size=512", "model.dtype=bfloat16", "model.context_length=256", "model.n_head=4",
    "model.n_kv_head=2", "model.n_layer=3", "model.d_model=256", "train.batch_size=8", "train.accumulation=1",
    "mesh.data=1", "mesh.fsdp=-1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "topology", "chips"),
    [
        ("v5e-1", "v5e:1x1", 1), ("v5litepod-8", "v5e:2x4", 8), ("v6e-256", "v6e:16x16", 256),
        ("v5p-128", "v5p:4x4x4", 64), ("v4-8", "v4:2x2x1", 4), ("v5p:4x4x8", "v5p:4x4x8", 128),
    ],
)  # fmt: skip
def test_names_of_slices(name, topology, chips):
    """The names of v5p and v4 slices count TensorCores, two per chip."""
    tpu = slices.slice_of(name)
    assert (tpu.topology, tpu.n_chips) == (topology, chips)


@pytest.mark.parametrize(
    ("name", "message"), [("v5e-7", "did you mean v5e-"), ("h100-8", "no such TPU slice"), ("v2-8", "v4-8")]
)
def test_unknown_slices(name, message):
    with pytest.raises(UserError, match=message):
        slices.slice_of(name)


def test_topologies_have_the_number_of_chips_in_their_name():
    for name, topology in slices.SLICES.items():
        number, dims = int(name.split("-")[1]), topology.split(":")[1].split("x")
        assert math.prod(map(int, dims)) * (2 if name[:3] in ("v5p", "v4-") else 1) == number


def make_plan(**changes):
    base = Plan(
        what="train", slice="v5e-4", topology="v5e:2x2", chips=4,
        mesh={"data": 2, "fsdp": 2, "tensor": 1, "context": 1},
        remat="full", rows=8, accumulation=1, tokens=2048, n_params=10**6, fits=True, hbm_bytes=16 * 2**30,
        needed_bytes=2**30, parts={"params": 2**29, "activations, gradients, workspace": 2**29}, compile_s=1.0,
        model_flops=197e12, flops=98.5e12, hbm_traffic_bytes=81.9e9, collectives={"all-gather": 20e9},
        roofline=Roofline(0.5, 0.1, 0.1), peaks={"tflops": 197, "hbm_gbps": 819, "ici_gbps": 200},
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def test_roofline_arithmetic():
    result = make_plan()
    assert result.roofline.best == 0.5 and result.roofline.worst == pytest.approx(0.7)
    assert result.tokens_per_s(0.5) == 4096
    assert result.mfu(0.5) == pytest.approx(0.5)  # 197e12 FLOPs in 0.5 s on four chips of 197e12 FLOP/s
    as_json = json.loads(result.to_json())
    assert as_json["tokens_per_s_best"] == 4096 and as_json["mfu_worst"] == pytest.approx(0.357, abs=1e-3)


def test_the_table_reports_token_and_time_budgets():
    text = "\n".join(report.table(make_plan(), tokens=4096 * 3600, hours=2.0))
    assert "1:00:00 to 1:24:00" in text and "4.0 to 5.6 chip hours" in text and "7,200 steps" in text
    assert "2 hours" in text and "all-gather" in text and "data=2 fsdp=2" in text
    assert "4,096 to 2,926" in report.comparison([make_plan()])[1]


def test_the_roofline_plot(tmp_path):
    report.draw([make_plan(), make_plan(collectives={})], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_kernel_flops_count_only_tiles_that_are_not_skipped():
    model = dataclasses.replace(CFG.model, context_length=1024)
    kernels = {"splash_mha_fwd_residuals": 1.0}
    tiles = 3  # of four tiles of 512 x 512
    whole = plan.kernel_flops(kernels, model, 8, 1024, (1, 1, 1, 1))
    assert whole == 2 * 2 * 8 * model.n_head * model.head_dim * tiles * 512**2
    assert plan.kernel_flops(kernels, model, 8, 1024, (2, 2, 2, 1)) == whole / 8
    assert plan.kernel_flops(kernels, model, 8, 1024, (1, 1, 1, 2)) == whole * 2 / 3  # the second device's two tiles
    window = dataclasses.replace(model, sliding_window=128, context_length=2048)
    assert plan.kernel_flops(kernels, window, 1, 2048, (1, 1, 1, 1)) == 4 * model.n_head * model.head_dim * 7 * 512**2


def test_the_compilers_out_of_memory_message_is_parsed():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.81G of "
    )
    assert program.out_of_memory(message + "15.75G hbm. Exceeded") == (int(18.81 * 2**30), int(15.75 * 2**30))
    early = (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (40G) exceeds available HBM (31.25G)."
    )
    assert program.out_of_memory(early, 2**30) == (41 * 2**30, int(31.25 * 2**30))
    assert program.out_of_memory("INTERNAL: something else") == (0, 0)


def test_advice_if_the_step_does_not_fit():
    cfg = load_config("gpt2-124m", "train.batch_size=64", "train.accumulation=1")
    needed = round(chip_bytes(cfg, 124_439_808, cfg.window, (1, 1, 1, 1)))
    result = make_plan(needed_bytes=needed, hbm_bytes=12 * 2**30, fits=False, roofline=None)
    advice = plan.advice(cfg, slices.slice_of("v5e-1"), (1, 1, 1, 1), 124_439_808, result)
    assert any(line.startswith("train.accumulation=") for line in advice)
    assert any(line.startswith("model.remat=") for line in advice)
    assert "would fit with" in "\n".join(report.table(dataclasses.replace(result, advice=advice)))


def test_the_cost_model_ranks_by_time_and_estimates_memory():
    cfg = load_config("llama-3.1-8b")
    tpu = slices.slice_of("v5p-128")
    candidates = estimate.variants(cfg, tpu, 8_030_261_248)
    assert candidates[0].seconds <= candidates[-1].seconds
    shapes = {c.shape for c in candidates}
    least = {shape: min(c.memory_bytes for c in candidates if c.shape == shape) for shape in shapes}
    assert least[64, 1, 1, 1] > 95 * 2**30 > least[1, 64, 1, 1]
    assert {math.prod(c.shape) for c in candidates} == {64}


def test_a_pattern_that_matches_no_parameter():
    from gptjax.optim import make_optimizer

    cfg = load_config("tiny-llama", "model.vocab_size=512", "task=instruct", "finetune.trainable=nothing/*")
    create, _ = program._state(cfg, make_optimizer(cfg.optim, 10))
    with pytest.raises(UserError, match="nothing/"):
        jax.eval_shape(create, jax.random.key(0))


def test_fine_tuning_takes_the_shape_of_the_base_model(tmp_path):
    from gptjax.cli.plan import with_shape

    shape = dataclasses.replace(CFG.model, n_layer=1, d_model=16, d_ff=32)
    gptjax.save(tmp_path / "base", gptjax.init_params(jax.random.key(0), shape), shape)
    cfg = load_config("classify", f"finetune.base={tmp_path / 'base'}", "classify.source=x.csv")
    model = with_shape(cfg).model
    assert (model.n_layer, model.d_model, model.vocab_size, model.n_classes) == (1, 16, 512, 2)


def test_without_the_tpu_compiler(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(UserError, match=r"\.\[tpu-plan\]"):
        slices.devices_of(slices.slice_of("v5e-1"))


@pytest.mark.slow
def test_a_training_step_compiles_with_context_parallelism():
    """Splash attention runs on each chip over all-gathered keys and values; no [T, T] scores are stored."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    text, cfg = [], load_config(CFG, "model.context_length=2048", "mesh.context=4", "mesh.fsdp=1")
    result = plan.plan(cfg, "v5e-4", keep_text=text.append)
    for kind in ("fwd", "dq", "dkv"):
        assert sum(times for name, times in result.kernels.items() if f"_{kind}_" in name) == cfg.model.n_layer
    assert "2048,2048]" not in text[0] and "all-to-all" not in result.collectives


@pytest.mark.parametrize("on", ["v5e-1", "v5e-4"])
def test_a_training_step_compiles_for_a_tpu(on):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    text = []
    result = plan.plan(CFG, on, keep_text=text.append)
    L = CFG.model.n_layer
    assert result.fits and result.needed_bytes == sum(result.parts.values())
    assert result.flops * result.chips == pytest.approx(result.model_flops, rel=0.3)
    splash = [name for name in result.kernels if name.startswith("splash_mha_fwd")]
    assert len(splash) == 1 and result.kernels[splash[0]] == L
    assert "tpu_custom_call" in text[0]
    bytes_per_param = {"params": 4, "optimizer": 8}
    for name, size in bytes_per_param.items():
        assert result.parts[name] == pytest.approx(size * result.n_params / result.chips, rel=0.02)
    if result.chips > 1:
        assert sum(result.collectives.values()) > 0
        # all-gathers one layer's matrix at a time, or the embedding table, never the stack of all layers
        computations = hlo.parse(text[0])
        gathered = [
            array.shape
            for home, instruction, _ in hlo.executed(computations)
            if hlo._collective(instruction, home) == "all-gather"
            for array in instruction.results
        ]
        assert gathered and not [shape for shape in gathered if len(shape) == 3 and shape[0] == L]
        largest = 4 * max(CFG.model.d_model * CFG.model.d_ff, CFG.model.vocab_size * CFG.model.d_model)
        assert 0 < result.largest_gather_bytes <= largest


def test_decoding_compiles_for_a_tpu():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    result = plan.plan(CFG, "v5e-1", decode=True)
    assert result.fits and result.what == "decode" and result.tokens == CFG.sample.batch_size
    cache = 2 * CFG.model.n_layer * result.rows * CFG.model.n_kv_head * CFG.model.head_dim * 256 * 2
    assert result.parts["cache"] == pytest.approx(cache, rel=0.01)


@pytest.mark.parametrize("task", ["instruct", "classify", "prefer", "reward_model"])
def test_lora_compiles_for_a_tpu(task):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    settings = dataclasses.replace(
        getattr(CFG, task), **{"max_length" if task == "classify" else "context_length": 128}
    )
    model = dataclasses.replace(CFG.model, n_classes={"classify": 2, "reward_model": 1}.get(task, 0))
    lora = dataclasses.replace(CFG.lora, rank=4, dropout=0.1 * (task == "prefer"))
    result = plan.plan(dataclasses.replace(CFG, task=task, model=model, lora=lora, **{task: settings}), "v5e-1")
    assert result.tokens == 8 * 128
    assert result.parts["frozen"] == pytest.approx(4 * result.n_params, rel=0.01)
    assert result.parts["params"] < 0.2 * result.parts["frozen"]
    assert result.model_flops == pytest.approx(result.flops * result.chips, rel=0.5)


def test_training_selected_parameters_compiles_for_a_tpu():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    trainable = dataclasses.replace(CFG.finetune, trainable="blocks/2/* | ln_f/*")
    result = plan.plan(dataclasses.replace(CFG, task="instruct", finetune=trainable), "v5e-1")
    assert 0 < result.parts["params"] < result.parts["frozen"]
    assert result.parts["optimizer"] == pytest.approx(2 * result.parts["params"], rel=0.02)


def test_offloaded_arrays_do_not_count_as_hbm():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    cfg = dataclasses.replace(
        CFG, optim=dataclasses.replace(CFG.optim, offload=True), model=dataclasses.replace(CFG.model, remat="offload")
    )
    result, model = plan.plan(cfg, "v5e-1"), cfg.model
    assert result.parts["optimizer"] < 1000  # step counters only
    inputs = model.n_layer * result.rows * model.context_length * model.d_model * 2
    assert result.host_bytes == pytest.approx(8 * result.n_params + inputs, rel=0.02)
    assert any("host memory" in line for line in report.table(result))
