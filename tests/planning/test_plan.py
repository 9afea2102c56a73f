"""Slices by name, arithmetic of the roofline, what is refused, and a small step compiled for real TPUs."""

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
    """v5p and v4 are named by TensorCores, two a chip."""
    found = slices.slice_of(name)
    assert (found.topology, found.n_chips) == (topology, chips)


@pytest.mark.parametrize(
    ("name", "says"), [("v5e-7", "did you mean v5e-"), ("h100-8", "no such TPU slice"), ("v2-8", "v4-8")]
)
def test_a_slice_that_is_not_there(name, says):
    with pytest.raises(UserError, match=says):
        slices.slice_of(name)


def test_the_layouts_hold_as_many_chips_as_they_say():
    for name, topology in slices.SLICES.items():
        number, sides = int(name.split("-")[1]), topology.split(":")[1].split("x")
        assert math.prod(map(int, sides)) * (2 if name[:3] in ("v5p", "v4-") else 1) == number


def a_plan(**changes):
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
    found = a_plan()
    assert found.roofline.best == 0.5 and found.roofline.worst == pytest.approx(0.7)
    assert found.tokens_per_s(0.5) == 4096
    assert found.mfu(0.5) == pytest.approx(0.5)  # 197e12 in half a second on four chips of 197e12
    read = json.loads(found.to_json())
    assert read["tokens_per_s_best"] == 4096 and read["mfu_worst"] == pytest.approx(0.357, abs=1e-3)


def test_the_table_says_what_a_budget_takes():
    text = "\n".join(report.table(a_plan(), tokens=4096 * 3600, hours=2.0))
    assert "1:00:00 to 1:24:00" in text and "4.0 to 5.6 chip hours" in text and "7,200 steps" in text
    assert "2 hours" in text and "all-gather" in text and "data=2 fsdp=2" in text
    assert "4,096 to 2,926" in report.comparison([a_plan()])[1]


def test_the_picture(tmp_path):
    report.draw([a_plan(), a_plan(collectives={})], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_kernels_count_the_tiles_they_do_not_skip():
    model = dataclasses.replace(CFG.model, context_length=1024)
    one = {"splash_mha_fwd_residuals": 1.0}
    tiles = 3  # of the four of 512 x 512
    whole = plan.kernel_flops(one, model, 8, 1024, (1, 1, 1, 1))
    assert whole == 2 * 2 * 8 * model.n_head * model.head_dim * tiles * 512**2
    assert plan.kernel_flops(one, model, 8, 1024, (2, 2, 2, 1)) == whole / 8
    assert plan.kernel_flops(one, model, 8, 1024, (1, 1, 1, 2)) == whole * 2 / 3  # the second half's two
    window = dataclasses.replace(model, sliding_window=128, context_length=2048)
    assert plan.kernel_flops(one, window, 1, 2048, (1, 1, 1, 1)) == 4 * model.n_head * model.head_dim * 7 * 512**2


def test_an_error_of_the_compiler_is_read():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.81G of "
    )
    assert program.out_of_memory(message + "15.75G hbm. Exceeded") == (int(18.81 * 2**30), int(15.75 * 2**30))
    early = (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (40G) exceeds available HBM (31.25G)."
    )
    assert program.out_of_memory(early, 2**30) == (41 * 2**30, int(31.25 * 2**30))
    assert program.out_of_memory("INTERNAL: something else") == (0, 0)


def test_what_would_make_it_fit_is_said():
    cfg = load_config("gpt2-124m", "train.batch_size=64", "train.accumulation=1")
    needed = round(chip_bytes(cfg, 124_439_808, cfg.window, (1, 1, 1, 1)))
    found = a_plan(needed_bytes=needed, hbm_bytes=12 * 2**30, fits=False, roofline=None)
    said = plan.advice(cfg, slices.slice_of("v5e-1"), (1, 1, 1, 1), 124_439_808, found)
    assert any(line.startswith("train.accumulation=") for line in said)
    assert any(line.startswith("model.remat=") for line in said)
    assert "would fit with" in "\n".join(report.table(dataclasses.replace(found, advice=said)))


def test_the_formula_prefers_what_is_fast_and_knows_what_is_large():
    cfg = load_config("llama-3.1-8b")
    on = slices.slice_of("v5p-128")
    found = estimate.variants(cfg, on, 8_030_261_248)
    assert found[0].seconds <= found[-1].seconds
    least = {shape: min(c.memory_bytes for c in found if c.shape == shape) for shape in {c.shape for c in found}}
    assert least[64, 1, 1, 1] > 95 * 2**30 > least[1, 64, 1, 1]
    assert {math.prod(c.shape) for c in found} == {64}


def test_a_pattern_that_matches_nothing():
    from gptjax.optim import make_optimizer

    cfg = load_config("tiny-llama", "model.vocab_size=512", "task=instruct", "finetune.trainable=nothing/*")
    create, _ = program._state(cfg, make_optimizer(cfg.optim, 10))
    with pytest.raises(UserError, match="nothing/"):
        jax.eval_shape(create, jax.random.key(0))


def test_a_fine_tuning_has_the_shape_of_its_base(tmp_path):
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
def test_a_train_step_compiles_where_tokens_are_divided():
    """Long rows do not fall to scores of T x T: splash runs on each chip, over keys and values that it gathers."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    text, cfg = [], load_config(CFG, "model.context_length=2048", "mesh.context=4", "mesh.fsdp=1")
    found = plan.plan(cfg, "v5e-4", keep_text=text.append)
    for part in ("fwd", "dq", "dkv"):
        assert sum(times for name, times in found.kernels.items() if f"_{part}_" in name) == cfg.model.n_layer
    assert "2048,2048]" not in text[0] and "all-to-all" not in found.collectives


@pytest.mark.parametrize("on", ["v5e-1", "v5e-4"])
def test_a_train_step_compiles_for_a_tpu(on):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    text = []
    found = plan.plan(CFG, on, keep_text=text.append)
    L = CFG.model.n_layer
    assert found.fits and found.needed_bytes == sum(found.parts.values())
    assert found.flops * found.chips == pytest.approx(found.model_flops, rel=0.3)
    splash = [name for name in found.kernels if name.startswith("splash_mha_fwd")]
    assert len(splash) == 1 and found.kernels[splash[0]] == L
    assert "tpu_custom_call" in text[0]
    weights = {"params": 4, "optimizer": 8}
    for part, size in weights.items():
        assert found.parts[part] == pytest.approx(size * found.n_params / found.chips, rel=0.02)
    if found.chips > 1:
        assert sum(found.collectives.values()) > 0
        # one layer's matrix at a time, or the table of words; never the stack
        parts = hlo.parse(text[0])
        gathered = [
            array.shape
            for home, instruction, _ in hlo.executed(parts)
            if hlo._collective(instruction, home) == "all-gather"
            for array in instruction.results
        ]
        assert gathered and not [shape for shape in gathered if len(shape) == 3 and shape[0] == L]
        largest = 4 * max(CFG.model.d_model * CFG.model.d_ff, CFG.model.vocab_size * CFG.model.d_model)
        assert 0 < found.largest_gather_bytes <= largest


def test_decoding_compiles_for_a_tpu():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    found = plan.plan(CFG, "v5e-1", decode=True)
    assert found.fits and found.what == "decode" and found.tokens == CFG.sample.batch_size
    cache = 2 * CFG.model.n_layer * found.rows * CFG.model.n_kv_head * CFG.model.head_dim * 256 * 2
    assert found.parts["cache"] == pytest.approx(cache, rel=0.01)


@pytest.mark.parametrize("task", ["instruct", "classify", "prefer"])
def test_lora_compiles_for_a_tpu(task):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    settings = dataclasses.replace(
        getattr(CFG, task), **{"max_length" if task == "classify" else "context_length": 128}
    )
    model = dataclasses.replace(CFG.model, n_classes=2 * (task == "classify"))
    lora = dataclasses.replace(CFG.lora, rank=4, dropout=0.1 * (task == "prefer"))
    found = plan.plan(dataclasses.replace(CFG, task=task, model=model, lora=lora, **{task: settings}), "v5e-1")
    assert found.tokens == 8 * 128
    assert found.parts["frozen"] == pytest.approx(4 * found.n_params, rel=0.01)
    assert found.parts["params"] < 0.2 * found.parts["frozen"]
    assert found.model_flops == pytest.approx(found.flops * found.chips, rel=0.5)


def test_a_part_of_the_weights_compiles_for_a_tpu():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    trainable = dataclasses.replace(CFG.finetune, trainable="blocks/2/* | ln_f/*")
    found = plan.plan(dataclasses.replace(CFG, task="instruct", finetune=trainable), "v5e-1")
    assert 0 < found.parts["params"] < found.parts["frozen"]
    assert found.parts["optimizer"] == pytest.approx(2 * found.parts["params"], rel=0.02)


def test_what_waits_in_the_hosts_memory_is_not_of_the_chips():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    cfg = dataclasses.replace(
        CFG, optim=dataclasses.replace(CFG.optim, offload=True), model=dataclasses.replace(CFG.model, remat="offload")
    )
    found, model = plan.plan(cfg, "v5e-1"), cfg.model
    assert found.parts["optimizer"] < 1000  # counters
    inputs = model.n_layer * found.rows * model.context_length * model.d_model * 2
    assert found.host_bytes == pytest.approx(8 * found.n_params + inputs, rel=0.02)
    assert any("host's memory" in line for line in report.table(found))
