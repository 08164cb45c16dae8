# SPDX-License-Identifier: Apache-2.0
"""NVFP4 in 30 lines: a weight, a product with it, and a whole model in one line."""

import jax
import jax.numpy as jnp
from flax import nnx

import jax_nvfp4 as nvfp4

# A weight: 4-bit codes, an 8-bit scale for each 16 of them, a float32 scale for all.
kernel = jax.random.normal(jax.random.key(0), (512, 256), jnp.bfloat16)  # (out, in)
weight = nvfp4.quantize(kernel, search="sweep")  # the scales that leave the least error
print(f"{kernel.nbytes} bytes in bf16, {weight.nbytes} in NVFP4")

# A product: repack once, at load; each row of x is quantized by itself.
x = jax.random.normal(jax.random.key(1), (8, 256), jnp.bfloat16)
y = nvfp4.linear(x, nvfp4.repack(weight))
exact = x.astype(jnp.float32) @ kernel.astype(jnp.float32).T
print(f"relative error {jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact):.3f}")

# A model that knows nothing of all this, converted; None leaves activations at 16 bits.
model = nnx.Sequential(
    nnx.Linear(256, 1024, rngs=nnx.Rngs(2)), nnx.gelu, nnx.Linear(1024, 256, rngs=nnx.Rngs(3))
)
graph, params = nnx.split(model)
apply = lambda params, x: nnx.merge(graph, params)(x)  # noqa: E731
run, params4, report = nvfp4.convert(apply, params, x, activation_scale=None)
print(report)
print(f"largest difference {jnp.abs(jax.jit(run)(params4, x) - model(x)).max():.3f}")
