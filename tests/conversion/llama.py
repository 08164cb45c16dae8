# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama as users write it, in nnx and in linen, and weights by a checkpoint's names."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

VOCAB, LAYERS, D, HEADS, HEAD, FFN = 40, 2, 32, 3, 16, 64
DTYPE = jnp.bfloat16


def norm(x, scale):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


def attention(q, k, v):
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / HEAD**0.5
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(mask, scores.astype(jnp.float32), -1e30))
    return jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        options = {"use_bias": False, "dtype": DTYPE, "param_dtype": DTYPE, "rngs": rngs}
        self.norm1, self.norm2 = nnx.Param(jnp.ones(D)), nnx.Param(jnp.ones(D))
        self.q, self.k, self.v = (nnx.LinearGeneral(D, (HEADS, HEAD), **options) for _ in range(3))
        self.o = nnx.LinearGeneral((HEADS, HEAD), D, axis=(-2, -1), **options)
        self.gate, self.up = (nnx.Linear(D, FFN, **options) for _ in range(2))
        self.down = nnx.Linear(FFN, D, **options)

    def __call__(self, x):
        h = norm(x, self.norm1[...])
        x = x + self.o(attention(self.q(h), self.k(h), self.v(h)))
        h = norm(x, self.norm2[...])
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))


class NnxLlama(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, D, dtype=DTYPE, param_dtype=DTYPE, rngs=rngs)
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])
        self.norm = nnx.Param(jnp.ones(D))
        self.lm_head = nnx.Linear(
            D, VOCAB, use_bias=False, dtype=DTYPE, param_dtype=DTYPE, rngs=rngs
        )

    def __call__(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(norm(x, self.norm[...]))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        options = {"use_bias": False, "dtype": DTYPE, "param_dtype": DTYPE}
        h = norm(x, self.param("norm1", nn.initializers.ones, (D,)))
        q, k, v = (nn.DenseGeneral((HEADS, HEAD), name=name, **options)(h) for name in "qkv")
        a = attention(q, k, v)
        x = x + nn.DenseGeneral(D, axis=(-2, -1), name="o", **options)(a)
        h = norm(x, self.param("norm2", nn.initializers.ones, (D,)))
        init = nn.initializers.lecun_normal(batch_axis=0)
        gates = self.param("gate_up", init, (2, D, FFN), DTYPE)  # as gemma has it
        h = jax.nn.silu(h @ gates[0]) * (h @ gates[1])
        return x + nn.Dense(D, name="down", **options)(h), None


class LinenLlama(nn.Module):
    """Its layers are stacked, and scanned over."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCAB, D, dtype=DTYPE, param_dtype=DTYPE, name="embed")(ids)
        layers = nn.scan(
            nn.remat(LinenBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = layers(name="layers")(x, None)
        x = norm(x, self.param("norm", nn.initializers.ones, (D,)))
        return nn.Dense(VOCAB, False, DTYPE, DTYPE, name="lm_head")(x)


SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD, D),
    "self_attn.k_proj": (HEADS * HEAD, D),
    "self_attn.v_proj": (HEADS * HEAD, D),
    "self_attn.o_proj": (D, HEADS * HEAD),
    "mlp.gate_proj": (FFN, D),
    "mlp.up_proj": (FFN, D),
    "mlp.down_proj": (D, FFN),
}


def weights(seed=0):
    """Float32 arrays, (N, K), by the names that Hugging Face gives them."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))

    tensors = {
        "model.embed_tokens.weight": normal(VOCAB, D),
        "model.norm.weight": 1 + normal(D),
        "lm_head.weight": normal(VOCAB, D),
    }
    for i in range(LAYERS):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{i}.{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = 1 + normal(D)
    return tensors


NNX_NAMES = {
    "embed.embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
    "layers.*.norm1": "model.layers.*.input_layernorm.weight",
    "layers.*.norm2": "model.layers.*.post_attention_layernorm.weight",
    **{
        f"layers.*.{name}.kernel": f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkvo"
    },
    **{
        f"layers.*.{name}.kernel": f"model.layers.*.mlp.{name}_proj.weight"
        for name in ("gate", "up", "down")
    },
}

LINEN_NAMES = {
    "params.embed.embedding": "model.embed_tokens.weight",
    "params.norm": "model.norm.weight",
    "params.lm_head.kernel": "lm_head.weight",
    "params.layers.norm1": "model.layers.{}.input_layernorm.weight",
    "params.layers.norm2": "model.layers.{}.post_attention_layernorm.weight",
    "params.layers.gate_up": [
        "model.layers.{}.mlp.gate_proj.weight",
        "model.layers.{}.mlp.up_proj.weight",
    ],
    "params.layers.down.kernel": "model.layers.{}.mlp.down_proj.weight",
    **{
        f"params.layers.{name}.kernel": f"model.layers.{{}}.self_attn.{name}_proj.weight"
        for name in "qkvo"
    },
}


def assert_equal_to_rounding(found, expected):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.abs(found - expected).max() <= 2**-6 * np.abs(expected).max()
