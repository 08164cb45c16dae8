# SPDX-License-Identifier: Apache-2.0
"""What `linear` and `ragged_linear` hand to the GEMM kernels, and what they make of the results.

The custom calls are replaced by functions that do, in float64, what the kernels document: so the
orders of rows, scales and biases are checked on a machine without a GPU.
"""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_nvfp4 as nvfp4
from jax_nvfp4 import custom_calls
from jax_nvfp4.config import Scaling
from jax_nvfp4.layout.orders import order
from jax_nvfp4.ops import device
from jax_nvfp4.ops.linear.cuda import cuda as linear_cuda
from jax_nvfp4.ops.linear.reference import reference as linear_reference
from jax_nvfp4.ops.linear.spec import LinearSpec, Operands
from jax_nvfp4.ops.ragged_linear.cuda import cuda as ragged_cuda
from jax_nvfp4.ops.ragged_linear.reference import reference as ragged_reference
from jax_nvfp4.ops.ragged_linear.spec import Operands as RaggedOperands
from jax_nvfp4.ops.ragged_linear.spec import RaggedSpec

ORDER = order("sm_90a")
M, N, K, GROUPS = 7, 2 * 70, 80, 3
SIZES = np.array([1, 2, 0, 3], np.int32)
CALLED: list[str] = []


def product(x, x_scale, w, sfw, w_scale, bias, *, config, n, gate):
    """One group's rows by a kernel, float64."""
    gated, of = config.epilogue == "gated", order(config.arch)
    assert (gate is not None) == gated
    k = x.shape[1]
    if not gated:  # a plain weight to the kernel, whatever its scales' shape says
        sfw = jnp.asarray(sfw).reshape(of.shapes(n, k)[1])
    data, scales = of.unpack(jnp.asarray(w), jnp.asarray(sfw), n, k, gated=gated)
    values = oracle.block_values(oracle.unpack(np.asarray(data)), np.asarray(scales).view(np.uint8))
    w_scale = np.asarray(w_scale, np.float64)
    if gated and w_scale.ndim:
        w_scale = np.asarray(of.gated.deinterleave(jnp.asarray(w_scale), -1, n), np.float64)
    z = np.asarray(x, np.float64) @ values.T * w_scale
    z = z * (1 if x_scale is None else np.asarray(x_scale, np.float64).reshape(-1, 1))
    z = z + (0 if bias is None else np.asarray(bias, np.float64))
    if not gated:
        return z
    g = np.minimum(z[:, : n // 2], gate.limit)
    u = np.clip(z[:, n // 2 :], -gate.limit, gate.limit)
    return g / (1 + np.exp(-g * (gate.alpha + gate.cubic * g**2))) * (u + gate.beta)


def gemm_call(x, sfx, w, sfw, x_scale, w_scale, bias, *, config, n, out_dtype, groups, gate, **_):
    assert sfx is None and config.grouped == (groups is not None)
    CALLED.append(config.name)
    how = {"config": config, "n": n, "gate": gate}
    if groups is None:
        y = product(x, x_scale, w, sfw, w_scale, bias, **how)
        return jnp.asarray(y).astype(out_dtype)
    sizes, (offset,) = map(np.asarray, groups)
    y = np.zeros((len(x), n // 2 if gate is not None else n))
    ends = np.cumsum(sizes)
    for g in range(len(w)):
        if 0 <= g + offset < len(sizes):
            rows = slice(ends[g + offset] - sizes[g + offset], ends[g + offset])
            own = None if x_scale is None else np.broadcast_to(x_scale, len(x))[rows]
            b = None if bias is None else bias[g]
            y[rows] = product(x[rows], own, w[g], sfw[g], w_scale[g], b, **how)
    return jnp.asarray(y).astype(out_dtype)


def linear_call(x, scale_or_amax, w, sfw, w_scale, bias, *, scaling, gemm_config, **how):
    """Quantizes as the quantize kernels do, per token, and multiplies."""
    assert scaling == Scaling.TOKEN and scale_or_amax is None
    how = {k: v for k, v in how.items() if k != "quantize_config"}
    codes, bits, x_scale = oracle.quantize(np.asarray(x), scaling="token")
    values = oracle.block_values(codes, bits)
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % 64)))
    return gemm_call(values, None, w, sfw, x_scale, w_scale, bias, config=gemm_config, **how)


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    monkeypatch.setattr(device, "kernel_arch", lambda asked: "sm_90a")
    monkeypatch.setattr(custom_calls, "gemm_call", gemm_call)
    monkeypatch.setattr(custom_calls, "linear_call", linear_call)
    CALLED.clear()


def weight(rng, gated, packed, lead=(), to=ORDER):
    """Codes, block scales and a global scale for each row, as operands of the primitives."""
    data = rng.integers(0, 256, (*lead, N, K // 2), dtype=np.uint8)
    scales = rng.integers(0x28, 0x40, (*lead, N, K // 16), dtype=np.uint8)
    data, scales = jnp.asarray(data), jnp.asarray(scales).view(jnp.float8_e4m3fn)
    w_scale = jnp.asarray(rng.uniform(0.01, 0.1, (*lead, N)), jnp.float32)
    if packed:
        data, scales = to.pack(data, scales, gated=gated)
        w_scale = to.gated.interleave(w_scale, -1) if gated else w_scale
    return data, scales, w_scale


CASES = [
    (True, nvfp4.SwiGLU(limit=2.0, alpha=1.702, beta=1.0), Scaling.NONE, "bfloat16", True),
    (True, nvfp4.GeGLU(), Scaling.TOKEN, "bfloat16", False),
    (True, nvfp4.SwiGLU(), Scaling.NONE, "float16", True),  # no kernel has it in its epilogue
    (True, None, Scaling.TOKEN, "bfloat16", True),
    (False, "relu2", Scaling.TOKEN, "float16", True),
    (False, None, Scaling.NONE, "bfloat16", False),
]


@pytest.mark.parametrize(("gated", "activation", "scaling", "dtype", "packed"), CASES)
def test_plans_are_carried_out_as_the_reference_computes(gated, activation, scaling, dtype, packed):
    rng = np.random.default_rng(0)
    spec = LinearSpec(
        "sm_90a" if packed else None, N, K, scaling, True, "float32", False, gated, activation
    )
    x = jnp.asarray(rng.standard_normal((M, K)), dtype)
    bias = jnp.asarray(rng.standard_normal((GROUPS, *((2, N // 2) if gated else (N,)))))
    bias = bias.astype(jnp.float32)
    fused = activation is not None and gated and dtype == "bfloat16"

    operands = Operands(x, *weight(rng, gated, packed), bias[0], None)
    (y,) = linear_cuda(*operands.flat(), spec=spec)
    (expected,) = linear_reference(*operands.flat(), spec=spec)
    np.testing.assert_allclose(np.asarray(y), np.asarray(expected), rtol=1e-4, atol=1e-4)

    ragged = RaggedSpec(spec, GROUPS, True)
    offset = jnp.int32(1)  # the weights of groups 1 to 3 of 4
    parts = weight(rng, gated, packed, (GROUPS,))
    operands = RaggedOperands(x, *parts, jnp.asarray(SIZES), offset, bias, None)
    (y,) = ragged_cuda(*operands.flat(), spec=ragged)
    (expected,) = ragged_reference(*operands.flat(), spec=ragged)
    np.testing.assert_allclose(np.asarray(y), np.asarray(expected), rtol=1e-4, atol=1e-4)
    assert not np.asarray(y)[[0, 6]].any() and np.asarray(y)[1:6].any()

    assert ["gated" in name for name in CALLED] == [fused] * 2
    assert ["grouped" in name for name in CALLED] == [False, True]


@pytest.mark.parametrize("arch", ["sm_100f", "sm_103a", "sm_120f"])
@pytest.mark.parametrize(("gated", "activation", "scaling", "dtype", "packed"), CASES)
def test_blackwell_s_plans_likewise(monkeypatch, arch, gated, activation, scaling, dtype, packed):
    """Of ungrouped rows, for which alone there are kernels."""
    monkeypatch.setattr(device, "kernel_arch", lambda asked: arch)
    rng = np.random.default_rng(0)
    spec = LinearSpec(
        arch if packed else None, N, K, scaling, True, "float32", False, gated, activation
    )
    x = jnp.asarray(rng.standard_normal((M, K)), dtype)
    bias = jnp.asarray(rng.standard_normal((2, N // 2) if gated else N), jnp.float32)
    parts = weight(rng, gated, packed, to=order(arch))
    flat = Operands(x, *parts, bias, None).flat()
    (y,), (expected,) = linear_cuda(*flat, spec=spec), linear_reference(*flat, spec=spec)
    np.testing.assert_allclose(np.asarray(y), np.asarray(expected), rtol=1e-4, atol=1e-4)
    fused = activation is not None and gated and dtype == "bfloat16"
    assert ["gated" in name for name in CALLED] == [fused]
