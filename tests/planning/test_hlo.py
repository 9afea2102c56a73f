"""Tests of the FLOPs, traffic and collectives counted from HLO text: of a small text by hand, and of real programs."""

import jax
import jax.numpy as jnp
import pytest

from gptjax.planning import hlo

TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[64,16]) -> f32[8,16] {
  %p = f32[64,16]{1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(0)
  %whole = f32[64,16]{1,0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %part = f32[8,16]{1,0} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={8,16}
}

%cut (stack: bf16[5,8,16], i: s32[]) -> bf16[8,16] {
  %stack = bf16[5,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %none = s32[] constant(0)
  %one = bf16[1,8,16]{2,1,0} dynamic-slice(%stack, %i, %none, %none), dynamic_slice_sizes={1,8,16}
  ROOT %flat = bf16[8,16]{1,0} bitcast(%one)
}

%body (state: (s32[], bf16[5,8,16], f32[4,64])) -> (s32[], bf16[5,8,16], f32[4,64]) {
  %state = (s32[]{:T(128)}, bf16[5,8,16]{2,1,0:T(8,128)(2,1)}, f32[4,64]{1,0:T(4,128)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%state), index=0
  %w = bf16[5,8,16]{2,1,0} get-tuple-element(%state), index=1
  %x = f32[4,64]{1,0} get-tuple-element(%state), index=2
  %layer = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %n), kind=kLoop, calls=%cut
  %full = bf16[64,16]{1,0} all-gather(%layer), replica_groups=mesh['a'=8,'b'=1] {'a'}, dimensions={0}
  %y = f32[4,16]{1,0} convolution(%x, %full), dim_labels=bf_io->bf
  %g = f32[64,16]{1,0} dot(%x, %y), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %kept = f32[8,16]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], bf16[5,8,16], f32[4,64]) tuple(%n, %w, %x)
}

%condition (state: (s32[], bf16[5,8,16], f32[4,64])) -> pred[] {
  %state = (s32[], bf16[5,8,16], f32[4,64]) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %layers = s32[] constant(5)
  ROOT %more = pred[] compare(%n, %layers), direction=LT
}

ENTRY %main (w: bf16[5,8,16], x: f32[4,64]) -> f32[4,64] {
  %w = bf16[5,8,16]{2,1,0} parameter(0)
  %x = f32[4,64]{1,0} parameter(1)
  %start = s32[] constant(0)
  %begin = (s32[], bf16[5,8,16], f32[4,64]) tuple(%start, %w, %x)
  %loop = (s32[], bf16[5,8,16], f32[4,64]) while(%begin), condition=%condition, body=%body
  %end = f32[4,64]{1,0} get-tuple-element(%loop), index=2
  %sums = f32[4,64]{1,0} all-reduce(%end), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %sent = f32[4,64]{1,0} collective-permute(%sums), source_target_pairs={{0,1},{1,0}}
}
"""


def test_a_loop_body_counts_once_per_iteration():
    counted = hlo.work(TEXT)
    assert counted.flops == 5 * (2 * 4 * 64 * 16 + 2 * 64 * 16 * 4)
    assert counted.collectives == {
        "all-gather": 5 * 64 * 16 * 2 * 7 / 8,  # bfloat16, 8 devices
        "reduce-scatter": 5 * 64 * 16 * 4 * 7 / 8,  # an all-reduce of which each device keeps a slice
        "all-reduce": 2 * 4 * 64 * 4 * 3 / 4,  # 4 devices
        "collective-permute": 4 * 64 * 4,
    }
    assert counted.largest_gather_bytes == 64 * 16 * 2


def test_traffic_counts_hbm_only_and_slices_with_their_own_size():
    computations = hlo.parse(TEXT)
    body = computations["body"]
    # only the reads count: the result is in vector memory, S(1)
    assert hlo._traffic(body["layer"], body, computations) == 8 * 16 * 2 + 4
    assert hlo._traffic(body["y"], body, computations) == 4 * 64 * 4 + 64 * 16 * 2 + 4 * 16 * 4


def test_a_slice_in_a_nested_fusion_is_read_with_its_own_size():
    outer = """%outer (stack: bf16[5,8,16], i: s32[]) -> bf16[8,16] {
  %stack = bf16[5,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %part = bf16[8,16]{1,0} fusion(%stack, %i), kind=kLoop, calls=%cut
  ROOT %twice = bf16[8,16]{1,0} add(%part, %part)
}

"""
    text = TEXT.replace("%body (", outer + "%body (").replace(
        "kind=kLoop, calls=%cut\n  %full", "calls=%outer\n  %full"
    )
    computations = hlo.parse(text)
    assert computations["body"]["layer"].called("calls") == ["outer"]
    assert hlo._traffic(computations["body"]["layer"], computations["body"], computations) == 8 * 16 * 2 + 4


def test_an_overlapped_all_gather_counts_once():
    """HLO repeats it in the fusion that starts it, in those that run at the same time and in the one that ends it."""
    inner = """%NAME (p: bf16[8,16]) -> bf16[64,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %g = bf16[64,16]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

"""
    names = ("fused_computation.1", "async_collective_fusion.2", "fused_computation.3")
    calls = "".join(
        f"  %f{i} = bf16[64,16]{{1,0}} fusion(%layer), kind=kCustom, calls=%{name}\n" for i, name in enumerate(names)
    )
    text = TEXT.replace("%body (", "".join(inner.replace("NAME", name) for name in names) + "%body (")
    text = text.replace("  %kept = ", calls + "  %kept = ")
    assert hlo.work(text).collectives["all-gather"] == 2 * hlo.work(TEXT).collectives["all-gather"]


def test_the_known_trip_count_of_a_loop_is_used():
    loop = 'condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    text = TEXT.replace("condition=%condition, body=%body", loop)
    assert hlo.work(text).flops == hlo.work(TEXT).flops / 5 * 3


def test_flops_of_a_batched_product_written_as_a_convolution():
    """[8, 4, 5] times [8, 5, 6]: of the 8 x 8 pairs of matrices only 8 are multiplied."""
    rest = "window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf"
    assert hlo._convolution_flops(rest, (8, 4, 5), (8, 5, 6), (8, 4, 6)) == 2 * 8 * 4 * 5 * 6


@pytest.mark.cpu
@pytest.mark.parametrize("layers", [1, 7])
def test_a_real_program(layers):
    """A scan over layers, compiled for the CPU: one product per layer in the forward pass, two in the backward pass."""

    def loss(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

    w, x = jnp.zeros((layers, 32, 32)), jnp.zeros((16, 32))
    text = jax.jit(jax.grad(loss)).lower(w, x).compile().as_text()
    counted = hlo.work(text)
    backward = 2 * layers - 1  # the gradient of the first input is not needed; XLA may compute it anyway
    assert counted.flops / (2 * 16 * 32 * 32) in (layers + backward, layers + backward + 1)
    assert counted.collectives == {} and counted.hbm_bytes > 4 * layers * 32 * 32
