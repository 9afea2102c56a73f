"""Each architecture against its paper's equations, written out in loops over tokens and heads in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.research.architectures import attention, deltanet, mla, moe, sliding_window

B, T, D = 2, 7, 16


def given(member, cfg):
    """(x, params as float64 numpy arrays, output of `apply`); every leaf is random."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    params = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape), member.init(jax.random.key(0), cfg))
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    y = jax.jit(lambda params, x: member.apply(params, x, cfg))(params, x)
    return x.astype(np.float64), jax.tree.map(lambda a: np.asarray(a, np.float64), params), np.asarray(y)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def silu(x):
    return x / (1 + np.exp(-x))


def rms(x, scale, eps=1e-5):
    return x / np.sqrt(np.mean(x * x) + eps) * scale


def rotate(x, position, base=10_000.0):
    """RoPE with complex numbers: channels j and j + H/2 are multiplied by exp(i position base^(-2j/H))."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * base ** (-2 * np.arange(half) / len(x)))
    return np.concatenate([z.real, z.imag])


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("window", [0, 3])
def test_attention(n_kv_head, window):
    cfg = (
        sliding_window.Config(D, n_head=4, n_kv_head=n_kv_head, window=window)
        if window
        else attention.Config(D, n_head=4, n_kv_head=n_kv_head)
    )
    x, p, y = given(sliding_window if window else attention, cfg)
    H, expected = cfg.head_dim, np.zeros((B, T, D))
    for b in range(B):
        for t in range(T):
            heads = []
            for n in range(4):
                head = slice(n * H, (n + 1) * H)
                kv = n * n_kv_head // 4
                shared = slice(kv * H, (kv + 1) * H)
                q = rotate(x[b, t] @ p["q"]["kernel"][:, head], t)
                seen = [s for s in range(t + 1) if not window or s > t - window]
                k = [rotate(x[b, s] @ p["k"]["kernel"][:, shared], s) for s in seen]
                v = [x[b, s] @ p["v"]["kernel"][:, shared] for s in seen]
                heads.append(softmax(np.array(k) @ q / np.sqrt(H)) @ np.array(v))
            expected[b, t] = np.concatenate(heads) @ p["o"]["kernel"]
    assert_close(y, expected)


@pytest.mark.slow
@pytest.mark.parametrize("d_query_latent", [None, 7])
def test_latent_attention(d_query_latent):
    """DeepSeek-V2, eq. 37-47."""
    N, H, R, P = 3, 4, 5, 2
    cfg = mla.Config(D, n_head=N, d_head=H, d_latent=R, d_rope=P, d_query_latent=d_query_latent)
    x, p, y = given(mla, cfg)
    w = {name: node["kernel"] for name, node in p.items() if "kernel" in node}
    expected = np.zeros((B, T, D))
    for b in range(B):
        c = [rms(h @ w["kv_down"], p["kv_norm"]["scale"]) for h in x[b]]
        k_r = [rotate(h @ w["k_rope"], s) for s, h in enumerate(x[b])]
        for t in range(T):
            c_q = x[b, t] if d_query_latent is None else rms(x[b, t] @ w["q_down"], p["q_norm"]["scale"])
            for n in range(N):
                head, rope_dims = slice(n * H, (n + 1) * H), slice(n * P, (n + 1) * P)
                q = np.concatenate([c_q @ w["q_up"][:, head], rotate(c_q @ w["q_rope"][:, rope_dims], t)])
                k = [np.concatenate([c[s] @ w["k_up"][:, head], k_r[s]]) for s in range(t + 1)]
                v = [c[s] @ w["v_up"][:, head] for s in range(t + 1)]
                expected[b, t] += softmax(np.array(k) @ q / np.sqrt(H + P)) @ np.array(v) @ w["o"][head]
    assert_close(y, expected)


@pytest.mark.parametrize("n_active", [1, 2, 4])
def test_experts(n_active):
    cfg = moe.Config(D, d_ff=12, n_expert=4, n_active=n_active)
    x, p, y = given(moe, cfg)
    expected = np.zeros((B, T, D))
    for b in range(B):
        for t in range(T):
            scores = x[b, t] @ p["router"]["kernel"]
            best = np.argsort(-scores)[:n_active]
            for weight, e in zip(softmax(scores[best]), best, strict=True):
                hidden = silu(x[b, t] @ p["gate"]["kernel"][e]) * (x[b, t] @ p["up"]["kernel"][e])
                expected[b, t] += weight * (hidden @ p["down"]["kernel"][e])
    assert_close(y, expected)


def test_even_and_uneven_routing():
    """The balance loss is 1 for a zero router (uniform routing), near 4 if all tokens choose one of four experts."""
    cfg = moe.Config(D, d_ff=12, n_expert=4, n_active=1)
    x = jnp.ones((B, T, D))
    params = moe.init(jax.random.key(0), cfg)
    flat = params | {"router": {"kernel": jnp.zeros((D, 4))}}
    steep = params | {"router": {"kernel": jnp.zeros((D, 4)).at[:, 2].set(1.0)}}
    np.testing.assert_allclose(moe.balance_loss(flat, x, cfg), 1, rtol=1e-6)
    np.testing.assert_allclose(moe.balance_loss(steep, x, cfg), 4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("conv_width", [1, 4])
def test_gated_delta(conv_width):
    """S_t = a S_t-1 (I - b k k^T) + b v k^T, o_t = S_t q_t; S maps keys to values, as in the paper."""
    N, H = 2, 6
    cfg = deltanet.Config(D, n_head=N, d_head=H, conv_width=conv_width)
    x, p, y = given(deltanet, cfg)
    expected = np.zeros((B, T, D))
    for b in range(B):
        inputs = x[b] @ np.concatenate([p[name]["kernel"] for name in "qkv"], 1)
        S = np.zeros((N, H, H))
        for t in range(T):
            past = [inputs[t - conv_width + 1 + i] if t - conv_width + 1 + i >= 0 else 0 for i in range(conv_width)]
            mixed = silu(sum(w * row for w, row in zip(p["conv"]["weight"], past, strict=True)))
            q, k, v = mixed.reshape(3, N, H)
            step = np.log1p(np.exp(x[b, t] @ p["forget"]["kernel"] + p["forget"]["bias"]))
            a = np.exp(-np.exp(p["forget"]["log_rate"]) * step)
            write = 1 / (1 + np.exp(-x[b, t] @ p["write"]["kernel"]))
            gate = silu(x[b, t] @ p["gate"]["kernel"]).reshape(N, H)
            heads = []
            for n in range(N):
                key, query = (z / np.sqrt((z * z).sum() + 1e-6) for z in (k[n], q[n]))
                S[n] = a[n] * S[n] @ (np.eye(H) - write[n] * np.outer(key, key)) + write[n] * np.outer(v[n], key)
                heads.append(rms(S[n] @ query, p["norm"]["scale"]) * gate[n])
            expected[b, t] = np.concatenate(heads) @ p["o"]["kernel"]
    assert_close(y, expected)


def test_delta_rule_remembers_and_replaces():
    """Without decay and with write strength 1, a key retrieves exactly the last value stored for it."""
    keys = jnp.eye(4)[jnp.array([0, 1, 2, 0])][None, :, None]  # the last token repeats the first key
    values = jnp.arange(16.0).reshape(1, 4, 1, 4)
    ones = jnp.ones((1, 4, 1))
    o, state = deltanet.gated_delta_rule(keys, keys, values, ones, ones, jnp.zeros((1, 1, 4, 4)))
    np.testing.assert_array_equal(o, values)
    np.testing.assert_array_equal(state[0, 0, :3], values[0, jnp.array([3, 1, 2]), 0])
