"""The architectures against transformers' layers with the same weights: experts, latent attention, gated delta rule.

Needs the extra `parity`; without it these tests are skipped.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="extra 'parity' is not installed")
transformers = pytest.importorskip("transformers", reason="extra 'parity' is not installed")

from gptjax.research.architectures import deltanet, mla, moe  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
B, T, D = 2, 7, 16
RNG = np.random.default_rng(0)


def copy(parameter, array):
    with torch.no_grad():
        parameter.copy_(torch.tensor(np.array(array)))


def test_experts_are_mixtrals():
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    cfg = moe.Config(D, d_ff=12, n_expert=5, n_active=2)
    params = moe.init(jax.random.key(0), cfg)
    w = {name: node["kernel"] for name, node in params.items()}
    layer = MixtralSparseMoeBlock(
        transformers.MixtralConfig(hidden_size=D, intermediate_size=12, num_local_experts=5, num_experts_per_tok=2)
    ).eval()
    copy(layer.gate.weight, w["router"].T)
    copy(layer.experts.gate_up_proj, jnp.concatenate([w["gate"], w["up"]], -1).swapaxes(1, 2))
    copy(layer.experts.down_proj, w["down"].swapaxes(1, 2))
    x = RNG.normal(size=(B, T, D)).astype(np.float32)
    with torch.no_grad():
        expected = layer(torch.tensor(x)).numpy()
    np.testing.assert_allclose(moe.apply(params, x, cfg), expected, rtol=1e-5, atol=1e-5)


def test_latent_attention_is_deepseeks():
    """DeepSeek's RoPE rotates adjacent channels, ours i and i + P/2: the columns are permuted."""
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention

    N, H, R, P, Q = 4, 4, 6, 4, 7  # R + P is even, because DeepSeek's code views pairs of channels as complex numbers
    cfg = mla.Config(D, n_head=N, d_head=H, d_latent=R, d_rope=P, d_query_latent=Q)
    params = mla.init(jax.random.key(1), cfg)
    w = {name: np.array(node["kernel"]) for name, node in params.items() if "kernel" in node}
    settings = transformers.DeepseekV2Config(
        hidden_size=D, num_attention_heads=N, num_key_value_heads=N, q_lora_rank=Q, kv_lora_rank=R,
        qk_rope_head_dim=P, qk_nope_head_dim=H, v_head_dim=H, attention_bias=False,
    )  # fmt: skip
    settings._attn_implementation = "eager"
    layer = DeepseekV2Attention(settings, 0).eval()
    turns = np.arange(P).reshape(2, P // 2).T.reshape(-1)  # 0 2 1 3
    q_up = np.concatenate([w["q_up"].reshape(Q, N, H), w["q_rope"].reshape(Q, N, P)[..., turns]], -1)
    kv_up = np.concatenate([w["k_up"].reshape(R, N, H), w["v_up"].reshape(R, N, H)], -1)
    copy(layer.q_a_proj.weight, w["q_down"].T)
    copy(layer.q_b_proj.weight, q_up.reshape(Q, -1).T)
    copy(layer.kv_a_proj_with_mqa.weight, np.concatenate([w["kv_down"], w["k_rope"][:, turns]], 1).T)
    copy(layer.kv_b_proj.weight, kv_up.reshape(R, -1).T)
    copy(layer.o_proj.weight, w["o"].T)
    for norm in (layer.q_a_layernorm, layer.kv_a_layernorm):
        norm.variance_epsilon = 1e-5
    x = RNG.normal(size=(B, T, D)).astype(np.float32)
    angles = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, P, 2) / P)
    with torch.no_grad():
        expected = layer(
            torch.tensor(x),
            attention_mask=torch.full((T, T), -1e9).triu(1)[None, None],
            position_embeddings=torch.tensor(np.exp(1j * angles).astype(np.complex64))[None],
        )[0].numpy()
    np.testing.assert_allclose(mla.apply(params, x, cfg), expected, rtol=1e-5, atol=1e-5)


def test_the_delta_rule_is_qwen3_nexts():
    """Qwen3-Next's function takes log a, and divides the queries by sqrt(H)."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    N, H = 3, 8
    q, k, v = (RNG.normal(size=(B, T, N, H)).astype(np.float32) for _ in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    a, b = (RNG.uniform(low, 1, (B, T, N)).astype(np.float32) for low in (0.5, 0))
    state = RNG.normal(size=(B, N, H, H)).astype(np.float32)
    expected, after = torch_recurrent_gated_delta_rule(
        *(torch.tensor(z) for z in (q, k, v, np.log(a), b, state)), output_final_state=True
    )
    o, final_state = deltanet.gated_delta_rule(q, k, v, a, b, state)
    np.testing.assert_allclose(o, expected * H**0.5, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(final_state, after, rtol=1e-5, atol=1e-5)
