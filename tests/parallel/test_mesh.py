"""Every mesh gives the results of a single device: losses, checkpoints, generated tokens. Uses eight CPU devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import gptjax
from gptjax import lora, parallel, tree
from gptjax.config import ARCHS, MeshConfig
from gptjax.model.cache import init_cache
from gptjax.model.gpt import unstack_layers
from gptjax.ops.device import AXES
from gptjax.optim import make_optimizer, with_average
from gptjax.parallel.mesh import make_mesh, sizes
from gptjax.parallel.rules import product_axes

EIGHT = Path(__file__).with_name("eight.py")
# tests all 20 meshes of eight devices instead of those in SOME, or every third for the tasks in THIRD
ALL = bool(os.environ.get("GPTJAX_ALL_MESHES"))
THIRD = ("classify", "instruct", "distill")  # whose parameters are sharded like those of lora
SOME = {
    "pretrain": ["1,8,1,1", "1,1,4,2", "1,2,2,2"],
    "lora": ["2,2,2,1"],
    "classify": ["1,2,4,1"],
    "instruct": ["4,1,1,2"],
    "distill": ["2,1,2,2"],
}


def on_eight(*args):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, EIGHT, *args], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.first_cases(2)
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "kind", [pytest.param("pretrain", marks=pytest.mark.slow), "lora", "classify", "instruct", "distill"]
)
def test_every_mesh_gives_the_losses_of_one_device(kind):
    errors = on_eight(kind, *((["third"] if kind in THIRD else []) if ALL else SOME[kind]))
    assert len(errors) == ((7 if kind in THIRD else 20) if ALL else len(SOME[kind]))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.slow
def test_switches_of_the_optimizer_and_averages_on_a_mesh():
    errors = on_eight("switched")
    assert max(errors["smooth"]) < 1e-5 and errors["cautious"][0] < 1e-4, errors


@pytest.mark.slow
def test_accumulation_and_sharding_commute():
    assert on_eight("accumulated") < 1e-5


@pytest.mark.slow
def test_attention_kernels_divide_rows_heads_and_tokens():
    """splash and flash all-gather keys and values under context parallelism; XLA stands in for cuDNN."""
    errors = on_eight("attention")
    assert len(errors) == 5 and max(errors.values()) < 1e-4, errors


@pytest.mark.slow
def test_pmap_step_is_jit():
    assert max(on_eight("pmapped").values()) < 1e-5


@pytest.mark.slow
def test_a_checkpoint_goes_on_anywhere():
    """A checkpoint is restored on 8 -> 4 -> 2 -> 1 -> 8 devices."""
    result = on_eight("checkpointed")
    assert result["same"] == [True] * 4 and result["loss"] < 1e-5


@pytest.mark.slow
def test_generation_on_a_mesh_gives_the_same_tokens():
    assert on_eight("generated") is True


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fine_tuning_on_a_mesh_is_that_of_one_device():
    """With a teacher in every step, and with answers that the model generates."""
    results = on_eight("finetuned")
    assert all(result["loss"] < 1e-5 and result["learned"] > 1e-4 for result in results.values()), results
    assert results["reward"]["answers"] > 0.98 and results["reward"]["compiled"] == 0, results


# ---------------------------------------------------------------- rules, on a mesh that is only described


def described(*shape):
    return jax.sharding.AbstractMesh(shape, AXES)


@pytest.mark.first_cases(1)
@pytest.mark.parametrize("arch", ARCHS)
def test_rules_cover_params_adapters_and_optimizers(arch):
    cfg = gptjax.ModelConfig(
        arch=arch, n_layer=2, n_head=4, d_model=64, vocab_size=64, context_length=16, n_classes=2, qk_norm=True,
        norm_position="both", norm_scale=True, value_residual=True, residual_lambdas=True, x0_lambdas=True, smear=True,
        tie_embeddings=False,
    )  # fmt: skip
    mesh = described(1, 2, 2, 1)
    averaged = gptjax.Config(train=gptjax.TrainConfig(ema=0.9))
    for options in ({"name": "adamw"}, {"name": "muon", "normuon": 0.95, "weight_decay_schedule": "linear"}):
        tx = with_average(make_optimizer(gptjax.OptimConfig(**options), 10), averaged)
        state = jax.eval_shape(
            lambda key, tx=tx: gptjax.TrainState.create(gptjax.init_params(key, cfg), tx=tx, key=key), jax.random.key(0)
        )
        specs = {path: where.spec for path, where in tree.flatten(parallel.shardings(state, mesh)).items()}
        assert specs["params/blocks/attn/q/kernel"] == P(None, ("fsdp",), ("tensor",))
        assert specs["params/blocks/mlp/down/kernel"] == P(None, ("tensor",), ("fsdp",))
        moments = [spec for path, spec in specs.items() if "/mu/" in path and path.endswith("attn/q/kernel")]
        moments.append(specs["opt_state/mean/blocks/attn/q/kernel"])
        assert len(moments) > 1 and set(moments) == {P(None, ("fsdp",), ("tensor",))}
        if options["name"] == "muon":  # one second moment per output neuron, [L, 1, out]
            (per_neuron,) = (spec for path, spec in specs.items() if path.endswith("nu/blocks/attn/q/kernel"))
            assert per_neuron == P(None, None, ("tensor",))
    params = gptjax.init_params(jax.random.key(0), cfg)
    for more in (
        lora.init(jax.random.key(0), params, gptjax.LoraConfig(rank=2, dora=True)),
        lora.init(jax.random.key(0), params, gptjax.LoraConfig(rank=2, miss=True)),
        gptjax.quantize(params, "nf4"),
        gptjax.quantize(params, "int8"),
        unstack_layers(params, cfg),
    ):
        parallel.shardings(more, mesh)
    pair = tree.flatten(parallel.shardings(lora.init(jax.random.key(0), params, gptjax.LoraConfig(rank=2)), mesh))
    assert pair["blocks/attn/q/kernel/a"].spec == P(None, ("fsdp",), None)
    assert pair["blocks/attn/q/kernel/b"].spec == P(None, None, ("tensor",))


def test_what_no_rule_covers_is_an_error():
    leaves = {"blocks": {"attn": {"gate": {"kernel": np.zeros((2, 4, 4))}}}, "odd": np.zeros(3)}
    with pytest.raises(gptjax.UserError, match=r"no rule covers blocks/attn/gate/kernel[\s\S]*no rule covers odd"):
        parallel.shardings(leaves, described(1, 2, 1, 1))


@pytest.mark.parametrize(
    ("path", "axes"),
    [
        ("blocks/attn/q/kernel", (None, "tensor")),
        ("blocks_3/mlp/up_gate/kernel", (None, "tensor")),
        ("blocks/mlp/down/kernel", ("tensor", None)),
        ("cls_head/kernel", None),
    ],
)
def test_a_product_keeps_a_kernels_tensor_axis_and_gathers_the_other(path, axes):
    assert product_axes(path) == axes


def test_a_side_that_does_not_divide_stays_whole():
    leaves = {"lm_head": {"kernel": np.zeros((6, 65))}}
    shardings = parallel.shardings(leaves, described(1, 2, 2, 1))
    assert shardings["lm_head"]["kernel"].spec == P(("fsdp",), None)


def test_cache_and_batches():
    cfg = gptjax.ModelConfig(n_layer=2, n_head=4, d_model=32, vocab_size=8, context_length=16)
    specs = parallel.cache_shardings(init_cache(cfg, 4), described(2, 2, 2, 1))
    assert specs.k.spec == P(None, ("data", "fsdp"), ("tensor",)) and specs.length.spec == P(("data", "fsdp"))
    batch = {"tokens": np.zeros((8, 16)), "labels": np.zeros((8, 3))}
    specs = parallel.batch_shardings(batch, described(2, 2, 1, 2), context_length=16)
    assert specs["tokens"].spec == P(("data", "fsdp"), ("context",)) and specs["labels"].spec == P(
        ("data", "fsdp"), None
    )


# ---------------------------------------------------------------- sizes


def test_one_axis_takes_what_the_others_leave():
    assert sizes(MeshConfig(), 8) == (8, 1, 1, 1)
    assert sizes(MeshConfig(fsdp=2, tensor=2), 8) == (2, 2, 2, 1)
    assert sizes(MeshConfig(data=1, fsdp=-1), 4) == (1, 4, 1, 1)
    assert gptjax.load_config(None, "mesh=auto", "mesh.tensor=2").mesh == MeshConfig(data=-1, tensor=2)


class Device:
    platform, process_index = "cpu", 0


@pytest.mark.parametrize(
    ("mesh", "n", "rows", "words"),
    [
        (MeshConfig(data=3), 8, 0, "their product must be 8"),
        (MeshConfig(tensor=3), 8, 0, "a multiple of 3 devices, and there are 8"),
        (MeshConfig(data=8), 8, 12, r"\(12 rows\) must be divisible by mesh.data x mesh.fsdp \(8\): use 16 rows"),
        (MeshConfig(fsdp=8), 8, 12, "use 16 rows"),
    ],
)
def test_sizes_that_cannot_be(mesh, n, rows, words):
    with pytest.raises(gptjax.UserError, match=words):
        make_mesh(mesh, [Device()] * n, rows=rows)


def test_devices_that_rows_cannot_feed_are_left_idle():
    """12 rows on 8 devices: with an automatic mesh, 6 devices take 2 rows each."""
    assert dict(make_mesh(MeshConfig(), [Device() for _ in range(8)], rows=12).shape)["data"] == 6
    assert make_mesh(MeshConfig(), [Device()] * 8, rows=1) is None


def test_config_refuses(capsys):
    for words, *args in (
        ("only one of mesh.data, mesh.fsdp can be -1", "mesh.fsdp=-1"),
        ("mesh.tensor must be at least 1", "mesh.tensor=0"),
        ("mesh.context (3) must divide model.context_length (1024)", "mesh.context=3"),
    ):
        with pytest.raises(gptjax.UserError) as error:
            gptjax.load_config(None, *args)
        assert words in str(error.value)
