# SPDX-License-Identifier: Apache-2.0
"""The custom calls on a GPU: in a graph, from threads, without a wait, serialized, with errors."""

import pathlib
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable

from jax_nvfp4 import config, numerics
from jax_nvfp4 import custom_calls as ffi
from jax_nvfp4.config.enums import OutFormat, Scaling
from jax_nvfp4.config.quantize import KIND_OF_SCALING, select_quantize
from jax_nvfp4.layout import swizzle
from jax_nvfp4.layout.orders import order


def _device() -> Any:
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        pytest.skip("no NVIDIA GPU", allow_module_level=True)


DEVICE = _device()
CAPABILITY = tuple(map(int, str(DEVICE.compute_capability).split(".")))
ARCH = config.arch_of_compute_capability(*CAPABILITY)
RUNNABLE = config.runnable_arches(config.most_specific_arch(*CAPABILITY))
SMS = DEVICE.core_count
if ARCH not in ffi.arches():
    pytest.fail(f"{DEVICE.device_kind}: {ffi.reason(ARCH)}", pytrace=False)

AMAX = (Scaling.AMAX, Scaling.AMAX_ROWS)

# XLA makes a graph only of five calls or more by default.
GRAPH = {"xla_gpu_graph_min_graph_size": 1}


def quantize(
    x: jax.Array, g: jax.Array | None = None, *, scaling: Scaling, out_format: OutFormat
) -> Any:
    c = select_quantize(ARCH, x.dtype.name, scaling)
    return ffi.quantize_call(x, g, config=c, scaling=scaling, out_format=out_format, num_sms=SMS)


def quantized(x: Any, g: Any, *, scaling: Scaling, out_format: OutFormat) -> tuple[np.ndarray, ...]:
    """What `quantize` is to return, computed on the CPU from the definition."""
    with jax.default_device(jax.devices("cpu")[0]):
        x = jnp.asarray(np.asarray(x))
        given = None if g is None else jnp.asarray(np.asarray(g), jnp.float32)
        if scaling in AMAX:
            encode, decode = numerics.dynamic_scales(given)
            scale = decode
        elif given is not None:
            encode, decode = numerics.static_scales(given)
            scale = given
        else:
            axis = -1 if scaling == Scaling.TOKEN else None
            encode, decode = numerics.dynamic_scales(numerics.amax(x, axis=axis))
            scale = decode
        data, block_scale = map(np.asarray, numerics.quantize(x, encode, decode))
        bits = block_scale.view(np.uint8)
        if out_format == OutFormat.LINEAR:
            return data, bits, np.asarray(scale)
        k = x.shape[1]
        if out_format == OutFormat.OPERAND:
            padded = np.pad(data, ((0, 0), (0, -(-k // 64) * 32 - data.shape[1])))
            return padded, swizzle.swizzle(bits), np.asarray(scale)
        values = np.asarray(numerics.block_values(data, block_scale))
        values = np.pad(values, ((0, 0), (0, -(-k // 64) * 64 - values.shape[1])))
        return values.astype(jnp.bfloat16), np.zeros((0,), np.uint8), np.asarray(scale)


def assert_same(got: Any, expected: tuple[np.ndarray, ...]) -> None:
    for name, g, e in zip(("data", "block_scale", "global_scale"), got, expected, strict=True):
        g, e = np.ascontiguousarray(np.asarray(g)), np.ascontiguousarray(e)
        assert g.shape == e.shape, name
        if e.dtype == jnp.bfloat16:  # -0 and NaN compare by value
            np.testing.assert_array_equal(g.astype(np.float32), e.astype(np.float32), name)
        else:
            np.testing.assert_array_equal(g.view(np.uint8), e.view(np.uint8), name)


@pytest.mark.parametrize("out_format", OutFormat)
@pytest.mark.parametrize("scaling", KIND_OF_SCALING)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_each_mode_and_format(dtype: str, scaling: Scaling, out_format: OutFormat) -> None:
    rng = np.random.default_rng(0)
    function = jax.jit(lambda x, g: quantize(x, g, scaling=scaling, out_format=out_format))
    for m, k in ((1, 16), (5, 40), (130, 192), (33, 100)):
        x = jnp.asarray(rng.standard_normal((m, k)) * 3, dtype)
        g = None
        if scaling.given:
            low, high = (4, 99) if scaling in AMAX else (1e-3, 2e-3)
            shape = (m,) if scaling.per_row else ()
            g = jnp.asarray(rng.uniform(low, high, shape), jnp.float32)
        expected = quantized(x, g, scaling=scaling, out_format=out_format)
        assert_same(function(x, g), expected)


def chain(x: jax.Array, length: int) -> jax.Array:
    """Calls that each wait for the one before: quantize, and put back into the next one's input."""
    for _ in range(length):
        values, _, scale = quantize(x, scaling=Scaling.TOKEN, out_format=OutFormat.VALUES)
        x = (values * scale[:, None]).astype(x.dtype)
    return x


def chain_on_cpu(x: Any, length: int) -> np.ndarray:
    x = np.asarray(x)
    for _ in range(length):
        values, _, scale = quantized(x, None, scaling=Scaling.TOKEN, out_format=OutFormat.VALUES)
        x = (values.astype(np.float32) * scale[:, None]).astype(x.dtype)
    return x


def test_calls_are_captured_and_inputs_can_be_rebound(tmp_path: pathlib.Path) -> None:
    x = jnp.ones((64, 256), jnp.bfloat16)
    options = {**GRAPH, "xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True}
    compiled = jax.jit(lambda x: chain(x, 3)).lower(x).compile(compiler_options=options)
    # XLA's own listing of what it runs: nested under a command buffer is what the graph holds.
    (listing,) = tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
    lines = listing.read_text().splitlines()
    outside = [line for line in lines if not line.startswith(" ") and "kCustomCall" in line]
    inside = [line for line in lines if line.startswith(" ") and "kCustomCall" in line]
    assert any("kCommandBuffer" in line for line in lines)
    assert (len(inside), len(outside)) == (3, 0), lines
    rng = np.random.default_rng(1)
    for seed in range(4):
        x = jnp.asarray(rng.standard_normal((64, 256)) * 2.0**seed, jnp.bfloat16)
        for _ in range(2):
            np.testing.assert_array_equal(np.asarray(compiled(x)), chain_on_cpu(x, 3))


def test_two_threads_at_once() -> None:
    rng = np.random.default_rng(2)
    inputs = [jnp.asarray(rng.standard_normal((48, 320)), jnp.bfloat16) for _ in range(2)]
    function = jax.jit(lambda x: chain(x, 2))
    expected = [chain_on_cpu(x, 2) for x in inputs]
    failures = []

    def work(which: int) -> None:
        for _ in range(50):
            if not np.array_equal(np.asarray(function(inputs[which])), expected[which]):
                failures.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_every_device_of_the_process_at_once() -> None:
    """One program on each GPU, from a thread each: a kernel is loaded for every device."""
    rng = np.random.default_rng(6)
    devices = [d for d in jax.local_devices() if d.device_kind == DEVICE.device_kind]
    inputs = [jnp.asarray(rng.standard_normal((16, 96)), jnp.float16) for _ in devices]
    results: list[Any] = [None] * len(devices)

    def work(which: int) -> None:
        x = jax.device_put(inputs[which], devices[which])
        results[which] = jax.jit(lambda x: chain(x, 6))(x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(devices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for device, x, y in zip(devices, inputs, results, strict=True):
        assert y.devices() == {device}
        np.testing.assert_array_equal(np.asarray(y), chain_on_cpu(x, 6))


def test_the_host_does_not_wait() -> None:
    """Calls are enqueued behind work that takes long: their dispatch must not take as long."""
    big = jnp.ones((8192, 8192), jnp.bfloat16)
    slow = jax.jit(lambda a: jax.lax.fori_loop(0, 300, lambda _, b: (a @ b) * 1e-4, a))
    function = jax.jit(lambda x, a: chain(x + a[:64, :256] * 0, 4))
    x = jnp.ones((64, 256), jnp.bfloat16)
    jax.block_until_ready(function(x, slow(big)))
    started = time.perf_counter()
    y = function(x, slow(big))
    dispatched = time.perf_counter() - started
    jax.block_until_ready(y)
    total = time.perf_counter() - started
    assert total > 0.2
    assert dispatched < 0.25 * total


def test_a_serialized_executable_runs() -> None:
    x = jnp.asarray(np.random.default_rng(3).standard_normal((16, 64)), jnp.float32)
    compiled = jax.jit(lambda x: chain(x, 2)).lower(x).compile()
    again = serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
    np.testing.assert_array_equal(np.asarray(again(x)), chain_on_cpu(x, 2))


@pytest.mark.parametrize("scaling", [scaling for scaling in KIND_OF_SCALING if scaling not in AMAX])
@pytest.mark.parametrize("m", [0, 3, 200])
def test_rows_without_elements(m: int, scaling: Scaling) -> None:
    g = jnp.full((m,) if scaling.per_row else (), 0.5) if scaling.given else None
    function = jax.jit(lambda x, g: quantize(x, g, scaling=scaling, out_format=OutFormat.LINEAR))
    data, block_scale, scale = function(jnp.zeros((m, 0), jnp.bfloat16), g)
    assert data.shape == (m, 0) and block_scale.shape == (m, 0)
    expected = jnp.ones(()) if g is None else g
    np.testing.assert_array_equal(scale, jnp.broadcast_to(expected, scale.shape))


def weights(layers: int, n: int, k: int) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of several repacked weights, stacked."""
    rng = np.random.default_rng(7)
    codes = jnp.asarray(rng.integers(0, 256, (layers, n, k // 2), dtype=np.uint8))
    scales = jnp.asarray(rng.uniform(0.25, 4, (layers, n, k // 16)), jnp.float8_e4m3fn)
    packed = [order(ARCH).pack(c, s) for c, s in zip(codes, scales, strict=True)]
    w, sfw = (jnp.stack(parts) for parts in zip(*packed, strict=True))
    return w, sfw


def linear(
    x: jax.Array, w: jax.Array, sfw: jax.Array, *, scaling: Scaling, n: int, one: bool
) -> Any:
    """x times a weight, with one custom call or with two."""
    x_dtype = "bfloat16" if ARCH == "sm_90a" else "e2m1"
    m, k = x.shape
    c, split = config.select(config.GemmProblem(m, n, -(-k // 64) * 64, ARCH, x_dtype), SMS)
    given = None
    if scaling.given:
        given = jnp.full((m,) if scaling.per_row else (), 4.5 if scaling in AMAX else 2e-3)
    w_scale = jnp.float32(1 / 64)
    options = {"split_k": split, "n": n, "out_dtype": jnp.bfloat16, "num_sms": SMS}
    quantizer = select_quantize(ARCH, x.dtype.name, scaling)
    if one:
        options |= {"quantize_config": quantizer, "scaling": scaling, "gemm_config": c}
        return ffi.linear_call(x, given, w, sfw, w_scale, None, **options)
    out_format = OutFormat.OPERAND if x_dtype == "e2m1" else OutFormat.VALUES
    operand, sfx, x_scale = quantize(x, given, scaling=scaling, out_format=out_format)
    sfx = sfx if x_dtype == "e2m1" else None
    return ffi.gemm_call(operand, sfx, w, sfw, x_scale, w_scale, None, config=c, **options)


@pytest.mark.parametrize("scaling", KIND_OF_SCALING)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_one_custom_call_is_the_two(dtype: str, scaling: Scaling) -> None:
    n, k = 384, 1344
    (w,), (sfw,) = weights(1, n, k)
    for m in (1, 16, 64, 200):
        x = jnp.asarray(np.random.default_rng(m).standard_normal((m, k)), dtype)
        one, two = (
            jax.jit(lambda x, one=one: linear(x, w, sfw, scaling=scaling, n=n, one=one))(x)
            for one in (True, False)
        )
        assert np.isfinite(np.asarray(one, np.float32)).all()
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


@pytest.mark.parametrize("options", [{}, GRAPH, {"xla_gpu_enable_command_buffer": ""}], ids=str)
@pytest.mark.parametrize("m", [1, 16, 100])
def test_the_second_kernel_waits_for_the_first(m: int, options: dict[str, Any]) -> None:
    """Layers in a loop: each weight has just been sliced, each x written, scratch used before."""
    layers, size = 8, 2048
    w, sfw = weights(layers, size, size)
    x = jnp.asarray(np.random.default_rng(8).standard_normal((m, size)), jnp.bfloat16)

    def layer(x: jax.Array, weight: tuple[jax.Array, jax.Array], one: bool) -> jax.Array:
        y = linear(x, *weight, scaling=Scaling.TOKEN, n=size, one=one).astype(jnp.float32)
        return (y / jnp.max(jnp.abs(y), axis=-1, keepdims=True)).astype(x.dtype)

    def loop(x: jax.Array, w: jax.Array, sfw: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(x: jax.Array, weight: tuple[jax.Array, jax.Array]) -> Any:
            x = layer(x, weight, True)
            return x, x

        return jax.lax.scan(step, x, (w, sfw))

    compiled = jax.jit(loop).lower(x, w, sfw).compile(compiler_options=options)
    alone = jax.jit(lambda x, w, sfw: layer(x, (w, sfw), False))
    for _ in range(3):
        expected, y = [], x
        for i in range(layers):
            y = alone(y, w[i], sfw[i])
            expected.append(np.asarray(y))
        for _ in range(20):
            last, every = compiled(x, w, sfw)
            np.testing.assert_array_equal(np.asarray(every), np.stack(expected))
            np.testing.assert_array_equal(np.asarray(last), expected[-1])
        w, sfw, x = w[::-1], sfw[::-1], last  # other buffers


def test_an_error_is_an_xla_error_and_leaves_the_device_usable() -> None:
    c = select_quantize(ARCH, "bfloat16", Scaling.TOKEN)
    arguments = {
        "config": c,
        "scaling": Scaling.TOKEN,
        "out_format": OutFormat.LINEAR,
        "num_sms": SMS,
    }
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"operand x: expected bfloat16.*F32"):
        jax.block_until_ready(
            jax.jit(lambda x: ffi.quantize_call(x, None, **arguments))(jnp.ones((4, 16)))
        )
    x = jnp.ones((4, 16), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda x: chain(x, 1))(x)), chain_on_cpu(x, 1))


def test_a_kernel_of_another_arch_is_refused() -> None:
    other = next(a for a in ("sm_90a", "sm_120f") if a in ffi.arches() and a != ARCH)
    c = select_quantize(other, "bfloat16", Scaling.TOKEN)
    arguments = {
        "config": c,
        "scaling": Scaling.TOKEN,
        "out_format": OutFormat.LINEAR,
        "num_sms": SMS,
    }
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{c.name} is for {other}, and device"):
        x = jnp.ones((4, 16), jnp.bfloat16)
        jax.block_until_ready(jax.jit(lambda x: ffi.quantize_call(x, None, **arguments))(x))


def test_a_hundred_calls_in_one_program() -> None:
    x = jnp.asarray(np.random.default_rng(4).standard_normal((8, 128)), jnp.bfloat16)
    got = jax.jit(lambda x: chain(x, 100))(x)
    np.testing.assert_array_equal(np.asarray(got), chain_on_cpu(x, 100))


CONFIGS = [
    c
    for arch in RUNNABLE
    if arch in ffi.arches()
    for c in config.configs(arch)
    if c.epilogue == "plain" and not c.grouped
]


@pytest.mark.parametrize("c", CONFIGS, ids=[c.name for c in CONFIGS])
def test_each_gemm_kernel(c: config.GemmConfig) -> None:
    """Every kernel once, with a bias, a scale per row and a scale of the weight."""
    rng = np.random.default_rng(5)
    m, n, k = 9, 200, 320
    codes = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
    scales = jnp.asarray(rng.uniform(0.25, 4, (n, k // 16)), jnp.float8_e4m3fn)
    w = np.asarray(numerics.block_values(jnp.asarray(codes), scales), np.float64)
    packed, sfw = order(ARCH).pack(jnp.asarray(codes), scales)
    x = jnp.asarray(rng.standard_normal((m, k)), jnp.bfloat16)
    sfx, x_scale = None, jnp.asarray(rng.uniform(0.5, 2, (m,)), jnp.float32)
    if c.x_dtype == "e2m1":
        values, _, _ = quantize(x, scaling=Scaling.TOKEN, out_format=OutFormat.VALUES)
        operand, sfx, x_scale = quantize(x, scaling=Scaling.TOKEN, out_format=OutFormat.OPERAND)
        exact = np.asarray(values, np.float64)[:, :k]
    else:
        operand = x.astype(c.x_dtype)
        exact = np.asarray(operand, np.float64)
    bias = jnp.asarray(rng.standard_normal((n,)), jnp.float32)
    y = jax.jit(
        lambda *a: ffi.gemm_call(*a, config=c, split_k=1, n=n, out_dtype=jnp.float32, num_sms=SMS)
    )(operand, sfx, packed, sfw, x_scale, jnp.float32(0.5), bias)
    alpha = np.asarray(x_scale, np.float64)[:, None] * 0.5
    expected = alpha * (exact @ w.T) + np.asarray(bias, np.float64)
    bound = 2.0**-18 * alpha * (np.abs(exact) @ np.abs(w).T) + 2.0**-23 * np.abs(expected)
    assert np.all(np.abs(np.asarray(y, np.float64) - expected) <= bound)
