# SPDX-License-Identifier: Apache-2.0
"""Products that end with an activation, of gated weights and plain ones, and fused projections."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
import this_machine
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_nvfp4 as nvfp4
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.layout.orders import order
from jax_nvfp4.ops.linear import cuda as on_gpu
from jax_nvfp4.ops.linear.reference import reference as linear_by_xla
from jax_nvfp4.ops.linear.spec import LinearSpec, Operands

GATED = {
    "swiglu": (nvfp4.SwiGLU(), {}),
    "clamped": (nvfp4.SwiGLU(limit=1.5), {"limit": 1.5}),
    "gpt-oss": (
        nvfp4.SwiGLU(limit=7.0, alpha=1.702, beta=1.0),
        {"limit": 7.0, "alpha": 1.702, "beta": 1.0},
    ),
    "geglu": (nvfp4.GeGLU(), {"gelu": True}),
}
ARCHES = ("canonical", *this_machine.arches())
M, I, K = 5, 72, 80  # noqa: E741
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((M, K)), jnp.float32)
BIAS = jnp.asarray(RNG.standard_normal(2 * I), jnp.float32)


def weight(rows, seed, size=1.0, k=K):
    """Random codes and block scales, whose values have a spread of about `size`."""
    rng = np.random.default_rng(seed)
    return nvfp4.Nvfp4Tensor(
        rng.integers(0, 256, (rows, k // 2), np.uint8),
        rng.integers(40, 72, (rows, k // 16), np.uint8),
        jnp.float32(size / (np.sqrt(k) * 4)),
    )


GATE, UP = weight(I, 1), weight(I, 2, 1000.0)
"""Scales that differ a thousandfold: one in place of both would be seen in every row."""


def gated_weight(arch, gate=GATE, up=UP):
    w = nvfp4.gate_up(gate, up)
    return w if arch == "canonical" else nvfp4.repack(w, arch)


def sums(x, w, bias, scaling):
    """Exact sums and how far float32 ones may be off, of a canonical weight."""
    x = np.asarray(x)
    if scaling is None:
        values = x.astype(ml_dtypes.bfloat16).astype(np.float64)
    else:
        codes, bits, scale = oracle.quantize(x, scaling)
        values = oracle.dequantize(codes, bits, scale, x.shape[-1])
    codes = oracle.unpack(np.asarray(w.data))
    bits = np.asarray(w.block_scale).view(np.uint8)
    dense = oracle.dequantize(codes, bits, np.asarray(w.global_scale), w.k)
    exact, magnitude = oracle.linear(values, dense, bias)
    return exact, 2.0**-18 * magnitude + 2.0**-22 * np.abs(exact)


@pytest.mark.parametrize(
    ("name", "out_dtype"),
    [
        ("swiglu", "bfloat16"),
        ("swiglu", "float16"),
        ("clamped", "float32"),
        ("gpt-oss", "bfloat16"),
        ("geglu", "float32"),
    ],
)
def test_gated_against_float64(name, out_dtype):
    activation, fields = GATED[name]
    scaling = None if out_dtype == "bfloat16" else "token"
    bias = np.asarray(BIAS)
    x = X * (0.01 if out_dtype == "float16" else 1)
    up = weight(I, 2) if name == "clamped" else UP
    z, spread = sums(x, nvfp4.gate_up(GATE, up), bias, scaling)
    y = nvfp4.linear(
        x,
        gated_weight(ARCHES[-1], up=up),
        BIAS,
        activation=activation,
        activation_scale=scaling,
        out_dtype=out_dtype,
    )
    assert y.shape == (M, I)
    halves = z[:, :I], z[:, I:]
    if name == "clamped":  # both are, here and there
        for half in halves:
            assert 0 < (np.abs(half) > 1.5).sum() < half.size
    oracle.assert_activated_close(
        np.asarray(y),
        functools.partial(oracle.gated, **fields),
        halves,
        (spread[:, :I], spread[:, I:]),
        scale=np.abs(halves[0]) * (np.abs(halves[1]) + 1),
    )


@pytest.mark.parametrize("name", oracle.ACTIVATIONS)
def test_plain_against_float64(name):
    z, spread = sums(X, GATE, np.asarray(BIAS)[:I], "token")
    w, out_dtype = nvfp4.repack(GATE, ARCHES[-1]), "bfloat16" if name == "relu2" else "float32"
    y = nvfp4.linear(X, w, BIAS[:I], activation=name, out_dtype=out_dtype)
    oracle.assert_activated_close(
        np.asarray(y), oracle.ACTIVATIONS[name], (z,), (spread,), scale=np.abs(z)
    )


@pytest.mark.parametrize(("arch", "half"), [(a, (I, 1)[i % 2]) for i, a in enumerate(ARCHES)])
def test_a_gated_weight_is_its_halves_side_by_side(arch, half):
    gate, up = weight(half, 3), weight(half, 4, 1000.0)
    bias = jnp.resize(BIAS, 2 * half)
    linear = functools.partial(nvfp4.linear, X, batch_invariant=True)
    both = jnp.concatenate([linear(gate, bias[:half]), linear(up, bias[half:])], axis=-1)
    w = gated_weight(arch, gate, up)
    np.testing.assert_array_equal(linear(w, bias), both)
    if arch != "canonical":
        back = w.canonical()
        assert jax.tree.structure(back) == jax.tree.structure(nvfp4.gate_up(gate, up))
        np.testing.assert_array_equal(back.dequantize(), nvfp4.gate_up(gate, up).dequantize())


def test_concatenated_weights_are_their_parts_side_by_side():
    parts = [weight(n, n, size) for n, size in ((40, 1.0), (8, 1000.0), (8, 1e-3))]
    w = nvfp4.repack(nvfp4.concatenate(parts), ARCHES[-1])
    linear = functools.partial(nvfp4.linear, X, batch_invariant=True)
    np.testing.assert_array_equal(
        linear(w), np.concatenate([linear(nvfp4.repack(p, ARCHES[-1])) for p in parts], axis=-1)
    )


@pytest.mark.parametrize("name", ["clamped", "geglu"])
def test_nan_passes_the_clamps_and_stays_in_its_row(name):
    activation, _ = GATED[name]
    linear = functools.partial(nvfp4.linear, weight=gated_weight(ARCHES[-1]), activation=activation)
    y = np.asarray(linear(X.at[2, 3].set(np.nan)))
    assert np.isnan(y[2]).all()
    np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(linear(X.at[2].set(0)), 2, 0))


@pytest.mark.parametrize("activation", [None, nvfp4.SwiGLU()])
@pytest.mark.parametrize("arch", [None, "sm_100f"])
def test_around_a_kernel_without_the_activation(monkeypatch, arch, activation):
    """What XLA does before and after a kernel to which a gated weight is a plain one.

    That for float16 activations which are not quantized is one.
    """
    w = nvfp4.gate_up(GATE, UP)
    w = w if arch is None else nvfp4.repack(w, arch)
    spec = LinearSpec(
        arch, 2 * I, K, Scaling.NONE, True, "bfloat16", False, gated=True, activation=activation
    )
    x = X.astype(jnp.float16)
    flat = Operands(x, w.data, w.block_scale, w.global_scale, BIAS.reshape(2, I), None).flat()

    def kernel(operands, chosen, groups):
        assert chosen.gate is None
        assert groups.operands is None
        plain = dataclasses.replace(
            spec,
            arch=chosen.arch,
            n=chosen.gemm_n,
            out_dtype=chosen.gemm_out_dtype,
            gated=False,
            activation=None,
        )
        # To the kernel a scale is a byte, whatever axes of length 1 mark the order.
        scales = operands.block_scale.reshape(order(chosen.arch).shapes(plain.n, K)[1])
        return linear_by_xla(*operands._replace(block_scale=scales).flat(), spec=plain)[0]

    for name in ("_one_call", "_gemm_call"):
        monkeypatch.setattr(on_gpu, name, kernel)
    monkeypatch.setattr(on_gpu.device, "kernel_arch", lambda asked: "sm_100f")
    found = jax.jit(functools.partial(on_gpu.cuda, spec=spec))(*flat)
    expected = jax.jit(functools.partial(linear_by_xla, spec=spec))(*flat)
    np.testing.assert_array_equal(found[0], expected[0])


# ---- Transformations ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "arch"),
    [(nvfp4.SwiGLU(limit=2.0, alpha=1.5, beta=0.5), ARCHES[-1]), ("gelu_tanh", "canonical")],
)
def test_the_gradient_is_straight_through_the_activation(activation, arch):
    is_gated = activation != "gelu_tanh"
    w = nvfp4.gate_up(GATE, weight(I, 2)) if is_gated else GATE
    n = w.shape[0]
    packed = w if arch == "canonical" else nvfp4.repack(w, arch)
    dense = w.dequantize()
    ct = jnp.asarray(RNG.standard_normal((M, I)), jnp.float32)

    def loss(x, b):
        return (nvfp4.linear(x, packed, b, activation=activation) * ct).sum()

    def expected(x, b, z_off):
        """The same with a dense product, its sums moved to those of the quantized x."""
        z = x @ dense.T + b + z_off
        if is_gated:
            g, u = jnp.minimum(z[:, :I], 2.0), jnp.clip(z[:, I:], -2.0, 2.0)
            return (g * jax.nn.sigmoid(1.5 * g) * (u + 0.5) * ct).sum()
        return (jax.nn.gelu(z, approximate=True) * ct).sum()

    b = BIAS[:n]
    off = nvfp4.linear(X, packed, b) - (X @ dense.T + b)
    found = jax.jit(jax.value_and_grad(loss, (0, 1)))(X, b)
    wanted = jax.value_and_grad(expected, (0, 1))(X, b, off)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, wanted)
    np.testing.assert_allclose(found[0], loss(X, b), rtol=1e-6)


def test_vmap_and_scan_over_stacked_gated_weights():
    f = functools.partial(nvfp4.linear, activation=nvfp4.SwiGLU(), batch_invariant=True)
    ws = [gated_weight(ARCHES[-1]), gated_weight(ARCHES[-1], UP, GATE)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ws)
    assert stacked.shape == (2, 2 * I, K)
    one_by_one = np.stack([f(X, w, BIAS) for w in ws])
    mapped = jax.vmap(f, (None, 0, None))(X, stacked, BIAS)
    np.testing.assert_array_equal(mapped, one_by_one)
    _, scanned = jax.lax.scan(lambda _, w: (None, f(X, w, BIAS)), None, stacked)
    np.testing.assert_array_equal(scanned, one_by_one)
    rows = jax.vmap(f, (0, None, None))(X, ws[0], BIAS)
    np.testing.assert_array_equal(rows, one_by_one[0])


# ---- Sharding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", this_machine.mesh_sizes()[:1] or (None,), ids=str)
@pytest.mark.parametrize("arch", ["canonical", "reference", *this_machine.arches()[1:2]])
def test_rows_of_a_gated_weight_are_divided(arch, sizes):
    mesh = this_machine.mesh(sizes)
    half = 64 * 4
    w = gated_weight(arch, weight(half, 5), weight(half, 6, 1000.0))
    bias = jnp.resize(BIAS, 2 * half)
    f = functools.partial(nvfp4.linear, activation=nvfp4.SwiGLU(), batch_invariant=True)
    expected = f(X, w, bias)
    rows = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P("y"))), w)
    compiled = jax.jit(f).lower(X, rows, bias).compile()
    y = compiled(X, rows, bias)
    np.testing.assert_array_equal(y, expected)
    gathers = "all-gather" in compiled.as_text()
    if arch == "canonical":
        assert gathers or y.sharding.is_fully_replicated
    else:
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "y")), 2)
        assert not gathers
        local = jax.shard_map(
            lambda x, w: f(x, w), mesh=mesh, in_specs=(P(), P("y")), out_specs=P(None, "y")
        )
        np.testing.assert_array_equal(jax.jit(local)(X, w), f(X, w))


@pytest.mark.parametrize("sizes", this_machine.mesh_sizes()[:1] or (None,), ids=str)
def test_a_canonical_gated_weight_is_not_divided_in_shard_map(sizes):
    mesh = this_machine.mesh(sizes)
    w = jax.tree.map(jnp.asarray, gated_weight("canonical", weight(64, 5), weight(64, 6)))
    f = jax.shard_map(nvfp4.linear, mesh=mesh, in_specs=(P(), P("y")), out_specs=P(None, "y"))
    with pytest.raises(ValueError, match=r"gated weight of parts \(64, 64\).*once it is repacked"):
        f(X, w)


# ---- What is refused ----------------------------------------------------------------------------

REFUSED = [
    (lambda: nvfp4.linear(X, GATE, activation="relu"), ValueError, "activation must be .*'relu'"),
    (lambda: nvfp4.linear(X, GATE, activation=jax.nn.silu), TypeError, "activation must be"),
    (
        lambda: nvfp4.linear(X, GATE, activation=nvfp4.SwiGLU),
        TypeError,
        r"must be SwiGLU\(\.\.\.\).*got <class",
    ),
    (
        lambda: nvfp4.linear(X, GATE, activation=nvfp4.GeGLU()),
        ValueError,
        r"takes a gated weight, made by gate_up",
    ),
    (
        lambda: nvfp4.linear(X, nvfp4.gate_up(GATE, UP), activation="silu"),
        ValueError,
        'activation="silu" is for plain weights',
    ),
    (
        lambda: nvfp4.linear(X, nvfp4.gate_up(GATE, UP), BIAS[:I], activation=nvfp4.SwiGLU()),
        ValueError,
        rf"bias must have shape \({2 * I},\).*got \({I},\)",
    ),
    (lambda: nvfp4.SwiGLU(limit=0.0), ValueError, "limit must be positive and finite; got 0"),
    (lambda: nvfp4.SwiGLU(alpha=np.inf), ValueError, "alpha must be finite; got inf"),
    (lambda: nvfp4.SwiGLU(beta=jnp.float32(1)), TypeError, "beta must be a Python number"),
]


@pytest.mark.parametrize("call,error,message", REFUSED)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
