# SPDX-License-Identifier: Apache-2.0
"""The extension and its calls, as far as a machine without a GPU can tell.

On the CPU the call targets run every check and then say that they have no kernel for the host: that
error is how a call that passes its checks ends here.
"""

import ctypes
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_objects
from jax_nvfp4 import config
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.config.quantize import KIND_OF_SCALING, quantize_configs, select_quantize
from jax_nvfp4.layout.orders import order

ARCHES = ("sm_90a", "sm_100f", "sm_120f")
PASSED = "runs on CUDA devices only"
GATE = {name: np.float32(1) for name in ("limit", "alpha", "cubic", "beta")}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@pytest.fixture(autouse=True)
def on_the_host() -> Any:
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def error_of(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jax.block_until_ready(jax.jit(lambda: function(*args, **kwargs))())
    return str(raised.value)


def quantize_operands(
    c: config.QuantizeConfig, m: int, k: int, scaling: Scaling | int
) -> tuple[jax.Array, jax.Array | None]:
    x = jnp.ones((m, k), DTYPES.get(c.x_dtype, jnp.float32))
    given = jnp.ones((m,) if Scaling(scaling).per_row else ())
    return x, given if Scaling(scaling).given else None


def gemm_operands(arch: str, x_dtype: str, m: int, n: int, k: int) -> dict[str, Any]:
    """Operands of a valid call, k a multiple of 64."""
    w, sfw = order(arch).pack(
        jnp.zeros((n, k // 2), jnp.uint8), jnp.zeros((n, k // 16), jnp.float8_e4m3fn)
    )
    if x_dtype == "e2m1":
        x = jnp.zeros((m, k // 2), jnp.uint8)
        sfx = jnp.zeros((-(-m // 128) * 128 * (k // 16),), jnp.uint8)
    else:
        x, sfx = jnp.zeros((m, k), x_dtype), jnp.zeros((0,), jnp.uint8)
    return {
        "x": x,
        "sfx": sfx,
        "w": w,
        "sfw": sfw,
        "x_scale": jnp.ones((m,)),
        "w_scale": jnp.ones(()),
        "bias": jnp.zeros((n,), jnp.bfloat16),
    }


@given(
    m=st.integers(1, 300),  # XLA drops a call without any result elements
    k=st.integers(0, 200),
    dtype=st.sampled_from(list(DTYPES)),
    scaling=st.sampled_from(list(KIND_OF_SCALING)),
    fmt=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_quantize_results_have_the_sizes_the_handler_checks(
    m: int, k: int, dtype: str, scaling: Scaling, fmt: int
) -> None:
    k = max(k, scaling in (Scaling.AMAX, Scaling.AMAX_ROWS))
    c = select_quantize("sm_100f", dtype, scaling)
    x, scale = quantize_operands(c, m, k, scaling)
    assert PASSED in error_of(
        kernel_objects.custom_calls().quantize_call,
        x,
        scale,
        config=c,
        scaling=scaling,
        out_format=fmt,
        num_sms=99,
    )


def plain_configs(arch: str) -> list[config.GemmConfig]:
    return [c for c in config.configs(arch) if c.epilogue == "plain" and not c.grouped]


@given(m=st.integers(1, 300), n=st.integers(1, 300), blocks=st.integers(1, 5), data=st.data())
@settings(max_examples=60, deadline=None)
def test_gemm_operands_have_the_sizes_the_handler_checks(
    m: int, n: int, blocks: int, data: st.DataObject
) -> None:
    arch = data.draw(st.sampled_from(ARCHES))
    c = data.draw(st.sampled_from(plain_configs(arch)))
    operands = gemm_operands(arch, c.x_dtype, m, n, 64 * blocks)
    for name in ("x_scale", "bias"):
        if data.draw(st.booleans()):
            operands[name] = None
    if data.draw(st.booleans()):
        operands["w_scale"] = jnp.ones((n,))
    if c.x_dtype != "e2m1":
        operands["sfx"] = None
    message = error_of(
        kernel_objects.custom_calls().gemm_call,
        **operands,
        config=c,
        split_k=1,
        n=n,
        out_dtype=data.draw(st.sampled_from(list(DTYPES.values()))),
        num_sms=132,
    )
    assert PASSED in message


def linear_operands(
    arch: str, dtype: str, scaling: Scaling, m: int, n: int, k: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Operands and options of a valid call of `linear_call`."""
    x_dtype = "bfloat16" if arch == "sm_90a" else "e2m1"
    c = select_quantize(arch, dtype, scaling)
    x, given = quantize_operands(c, m, k, scaling)
    gemm = gemm_operands(arch, x_dtype, m, n, -(-k // 64) * 64)
    operands = {"x": x, "scale_or_amax": given} | {
        name: gemm[name] for name in ("w", "sfw", "w_scale", "bias")
    }
    options = {
        "quantize_config": c,
        "scaling": scaling,
        "gemm_config": next(c for c in config.configs(arch) if c.x_dtype == x_dtype),
        "split_k": 1,
        "n": n,
        "out_dtype": jnp.bfloat16,
        "num_sms": 99,
    }
    return operands, options


@given(
    arch=st.sampled_from(ARCHES),
    dtype=st.sampled_from(list(DTYPES)),
    scaling=st.sampled_from(list(KIND_OF_SCALING)),
    m=st.integers(1, 300),
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    has_bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_linear_buffers_have_the_sizes_the_handler_checks(
    arch: str, dtype: str, scaling: Scaling, m: int, n: int, k: int, has_bias: bool
) -> None:
    operands, options = linear_operands(arch, dtype, scaling, m, n, k)
    if not has_bias:
        operands["bias"] = None
    message = error_of(kernel_objects.custom_calls().linear_call, **operands, **options)
    assert f"kernel {options['gemm_config'].name} {PASSED}" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": jnp.ones((5, 64), jnp.int32)},
            "linear (quantize): operand x: expected F32, BF16 or F16",
        ),
        (
            {"scale_or_amax": jnp.ones((4,))},
            "linear (quantize): operand global_scale (given): expected 5 elements",
        ),
        ({"scaling": 6}, "linear (quantize): operand scaling: expected 0 to 5, got 6"),
        ({"w": jnp.ones((7, 32), jnp.uint8)}, "linear (gemm): operand w: expected 8192 elements"),
        (
            {"bias": jnp.ones((5,))},
            "linear (gemm): operand bias: expected 7 elements (n), got F32[5]",
        ),
        ({"split_k": 0}, "linear (gemm): operand split_k: expected 1 to 65536, got 0"),
        (
            {"data": ((64, 5), jnp.bfloat16)},
            "linear (gemm): operand y: expected 64 rows, as many as x",
        ),
        (
            {
                "scaling": 0,
                "scale_or_amax": jnp.ones(()),
                "global_scale": ((), jnp.float32),
                "data": ((1, 320), jnp.bfloat16),
                "y": ((1, 7), jnp.bfloat16),
                "w": jnp.ones((128 * 384 // 2,), jnp.uint8),
                "sfw": jnp.ones((128 * 384 // 16,), jnp.uint8),
            },
            "linear (gemm): operand x: expected 5 rows, as many as quantize's x, got BF16[1,320]",
        ),
        (
            {"quantize_kernel": "no_such"},
            "linear (quantize): no kernel named 'no_such' is built in",
        ),
        ({"gemm_kernel": "no_such"}, "linear (gemm): no kernel named 'no_such' is built in"),
    ],
)
def test_linear_names_the_part_operand_expected_and_got(changes: dict, message: str) -> None:
    kernel_objects.custom_calls()
    operands, options = linear_operands("sm_90a", "bfloat16", Scaling.STATIC_ROWS, 5, 7, 64)

    def call(**changes: Any) -> str:
        c: dict[str, Any] = operands | {
            "y": ((5, 7), jnp.bfloat16),
            "data": ((5, 64), jnp.bfloat16),
            "block_scale": ((0,), jnp.uint8),
            "global_scale": ((5,), jnp.float32),
            "scratch": ((0,), jnp.uint8),
            "quantize_kernel": options["quantize_config"].name,
            "gemm_kernel": options["gemm_config"].name,
            "scaling": Scaling.STATIC_ROWS,
            "split_k": 1,
        }
        c |= changes
        results = ("y", "data", "block_scale", "global_scale", "scratch", "scratch")
        numbers = {"scaling": c["scaling"], "num_sms": 0, "out_format": 2, "split_k": c["split_k"]}
        return error_of(
            jax.ffi.ffi_call("jax_nvfp4_linear", [jax.ShapeDtypeStruct(*c[r]) for r in results]),
            *(c[name] for name in ("x", "scale_or_amax", "w", "sfw", "w_scale", "bias")),
            *[jnp.zeros((0,), jnp.int32)] * 2,  # no groups
            quantize_kernel=c["quantize_kernel"],
            gemm_kernel=c["gemm_kernel"],
            **{name: np.int32(value) for name, value in numbers.items()},
            **GATE,
        )

    assert PASSED in call()
    assert f"jax_nvfp4 {message}" in call(**changes)


@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_is_found_by_its_config(arch: str) -> None:
    ffi = kernel_objects.custom_calls()
    for c in quantize_configs(arch):
        x, _ = quantize_operands(c, 3, 32, 3)
        message = error_of(ffi.quantize_call, x, None, config=c, scaling=3, out_format=0, num_sms=9)
        assert f"kernel {c.name} {PASSED}" in message
    for c in config.configs(arch):
        operands = gemm_operands(arch, c.x_dtype, 2, 4, 64)
        arguments = {"config": c, "split_k": 1, "n": 4, "out_dtype": jnp.float32, "num_sms": 132}
        if c.grouped:
            operands, arguments["groups"] = grouped_operands(operands), groups(3)
        assert f"kernel {c.name} {PASSED}" in error_of(ffi.gemm_call, **operands, **arguments)


def grouped_operands(operands: dict[str, Any]) -> dict[str, Any]:
    """Operands with a weight for each of three groups."""
    whole = {name: jnp.stack([operands[name]] * 3) for name in ("w", "sfw", "w_scale", "bias")}
    return operands | whole


def groups(sizes: int) -> tuple[jax.Array, jax.Array]:
    return jnp.ones((sizes,), jnp.int32), jnp.zeros((1,), jnp.int32)


def raw_quantize(**changes: Any) -> str:
    """A call of the quantize target for (5, 40), changed in operands, results or attributes."""
    c = select_quantize("sm_90a", "bfloat16", 1)
    call: dict[str, Any] = {
        "x": jnp.ones((5, 40), jnp.bfloat16),
        "g": jnp.ones((5,)),
        "data": ((5, 24), jnp.uint8),
        "block_scale": ((5, 3), jnp.uint8),
        "global_scale": ((5,), jnp.float32),
        "scratch": ((0,), jnp.uint8),
        "kernel": c.name,
        "scaling": 1,
        "out_format": 0,
    }
    call |= changes
    results = [
        jax.ShapeDtypeStruct(*call[name])
        for name in ("data", "block_scale", "global_scale", "scratch")
    ]
    return error_of(
        jax.ffi.ffi_call("jax_nvfp4_quantize", results),
        call["x"],
        call["g"],
        kernel=call["kernel"],
        scaling=np.int32(call["scaling"]),
        num_sms=np.int32(0),
        out_format=np.int32(call["out_format"]),
    )


QUANTIZE_ERRORS = [
    ({"x": jnp.ones((5, 40), jnp.int32)}, "operand x", "F32, BF16 or F16 elements", "S32[5,40]"),
    ({"x": jnp.ones((5,), jnp.bfloat16)}, "operand x", "a matrix", "BF16[5]"),
    (
        {"g": jnp.ones(())},
        "operand global_scale (given)",
        "5 elements (one per row of x)",
        "F32[]",
    ),
    ({"g": jnp.ones((5,), jnp.float16)}, "operand global_scale (given)", "F32 elements", "F16[5]"),
    (
        {"scaling": 2},
        "operand global_scale (given)",
        "0 elements (none: it is computed)",
        "F32[5]",
    ),
    ({"scaling": 6}, "operand scaling", "0 to 5", "6"),
    ({"scaling": 4}, "operand amax", "1 elements (one)", "F32[5]"),
    ({"scaling": 5, "g": jnp.ones(())}, "operand amax", "5 elements (one per row of x)", "F32[]"),
    (
        {"scaling": 5, "x": jnp.ones((5, 0), jnp.bfloat16)},
        "operand x",
        "elements, of which there is an amax",
        "BF16[5,0]",
    ),
    ({"out_format": -1}, "operand out_format", "0 to 2", "-1"),
    ({"data": ((5, 20), jnp.uint8)}, "operand data", "120 elements", "U8[5,20]"),
    ({"data": ((5, 24), jnp.int8)}, "operand data", "U8 or F8E4M3FN elements", "S8[5,24]"),
    ({"block_scale": ((4, 3), jnp.uint8)}, "operand block_scale", "15 elements", "U8[4,3]"),
    ({"out_format": 1}, "operand data", "160 elements (m * ceil(k/64) * 32)", "U8[5,24]"),
    (
        {"out_format": 1, "data": ((5, 32), jnp.uint8)},
        "operand block_scale",
        "512 elements",
        "U8[5,3]",
    ),
    ({"out_format": 2}, "operand data", "BF16 elements", "U8[5,24]"),
    ({"global_scale": ((1,), jnp.float32)}, "operand global_scale", "5 elements", "F32[1]"),
]


@pytest.mark.parametrize(("changes", "operand", "expected", "got"), QUANTIZE_ERRORS)
def test_quantize_names_operand_expected_and_got(
    changes: dict, operand: str, expected: str, got: str
) -> None:
    kernel_objects.custom_calls()
    assert PASSED in raw_quantize()
    message = raw_quantize(**changes)
    assert f"jax_nvfp4 quantize: {operand}: expected {expected}" in message
    assert message.rstrip().endswith(f"got {got}")


def raw_gemm(arch: str, **changes: Any) -> str:
    """A call of the GEMM target for (5, 64) times (7, 64), changed as the caller says."""
    c = config.configs(arch)[0]
    call: dict[str, Any] = gemm_operands(arch, c.x_dtype, 5, 7, 64)
    call |= {"y": ((5, 7), jnp.bfloat16), "scratch": ((0,), jnp.uint8), "split_k": 1}
    call |= {"kernel": c.name} | changes
    none = jnp.zeros((0,), jnp.int32)
    call = {"group_sizes": none, "group_offset": none} | call
    names = ("x", "sfx", "w", "sfw", "x_scale", "w_scale", "bias", "group_sizes", "group_offset")
    return error_of(
        jax.ffi.ffi_call(
            "jax_nvfp4_gemm", [jax.ShapeDtypeStruct(*call[n]) for n in ("y", "scratch")]
        ),
        *(call[name] for name in names),
        kernel=call["kernel"],
        num_sms=np.int32(132),
        split_k=np.int32(call["split_k"]),
        **GATE,
    )


GEMM_ERRORS = [
    ("sm_90a", {"x": jnp.ones((5, 64))}, "x", "BF16 elements", "F32[5,64]"),
    (
        "sm_90a",
        {"x": jnp.ones((5, 72), jnp.bfloat16)},
        "x",
        "a positive multiple of 64",
        "BF16[5,72]",
    ),
    (
        "sm_90a",
        {"x": jnp.ones((5, 0), jnp.bfloat16)},
        "x",
        "a positive multiple of 64",
        "BF16[5,0]",
    ),
    ("sm_90a", {"sfx": jnp.ones((8,), jnp.uint8)}, "sfx", "0 elements", "U8[8]"),
    ("sm_100f", {"x": jnp.ones((5, 32), jnp.int8)}, "x", "U8 elements", "S8[5,32]"),
    ("sm_100f", {"sfx": jnp.ones((20,), jnp.uint8)}, "sfx", "512 elements", "U8[20]"),
    ("sm_90a", {"w": jnp.ones((7, 32), jnp.uint8)}, "w", "8192 elements", "U8[7,32]"),
    ("sm_120f", {"w": jnp.ones((7, 32), jnp.uint8)}, "w", "4096 elements", "U8[7,32]"),
    ("sm_100f", {"sfw": jnp.ones((7, 4), jnp.uint8)}, "sfw", "512 elements", "U8[7,4]"),
    ("sm_90a", {"x_scale": jnp.ones((7,))}, "x_scale", "1 or 5 elements", "F32[7]"),
    ("sm_90a", {"w_scale": jnp.ones((5,))}, "w_scale", "1 or 7 elements", "F32[5]"),
    ("sm_90a", {"w_scale": jnp.ones((), jnp.bfloat16)}, "w_scale", "F32 elements", "BF16[]"),
    ("sm_90a", {"bias": jnp.ones((5,))}, "bias", "7 elements (n)", "F32[5]"),
    ("sm_90a", {"bias": jnp.ones((7,), jnp.int32)}, "bias", "F32, BF16 or F16 elements", "S32[7]"),
    ("sm_90a", {"y": ((4, 7), jnp.bfloat16)}, "y", "5 rows, as many as x", "BF16[4,7]"),
    ("sm_90a", {"y": ((5, 7), jnp.uint8)}, "y", "F32, BF16 or F16 elements", "U8[5,7]"),
    ("sm_90a", {"split_k": 0}, "split_k", "1 to 65536", "0"),
]


@pytest.mark.parametrize(("arch", "changes", "operand", "expected", "got"), GEMM_ERRORS)
def test_gemm_names_operand_expected_and_got(
    arch: str, changes: dict, operand: str, expected: str, got: str
) -> None:
    kernel_objects.custom_calls()
    assert PASSED in raw_gemm(arch)
    message = raw_gemm(arch, **changes)
    assert f"jax_nvfp4 gemm: operand {operand}: expected {expected}" in message
    assert message.rstrip().endswith(f"got {got}")


def raw_variant(name: str, **changes: Any) -> str:
    """A call of a gated or grouped kernel for (5, 64) times (8, 64), changed as the caller says."""
    arch = "sm_120f" if name.startswith("sm120f") else "sm_90a"
    name = name if arch == "sm_120f" else f"sm90a_{name}"
    c = next(c for c in config.configs(arch) if c.name == f"gemm_{name}")
    call = gemm_operands(arch, c.x_dtype, 5, 8, 64)
    if c.grouped:
        call = grouped_operands(call)
        call["group_sizes"], call["group_offset"] = groups(7)
    columns = 4 if c.epilogue == "gated" else 8
    call |= {"y": ((5, columns), jnp.bfloat16), "kernel": c.name} | changes
    return raw_gemm(arch, **call)


GROUPED = "grouped_gated_small_m_bf16_8x64"
VARIANT_ERRORS = [
    ("gated_small_m_bf16_8x64", {"w_scale": jnp.ones((8,))}, "w_scale", "1 or 128 elements"),
    ("gated_small_m_bf16_8x64", {"bias": jnp.ones((4,))}, "bias", "8 elements (n)"),
    ("sm120f_gated_small_m_t16x64", {"w_scale": jnp.ones((8,))}, "w_scale", "1 or 128 elements"),
    ("sm120f_gated_small_m_t16x64", {"bias": jnp.ones((4,))}, "bias", "8 elements (n)"),
    (
        "gated_small_m_bf16_8x64",
        {"group_sizes": jnp.ones((3,), jnp.int32)},
        "group_sizes",
        "0 elements (none: the kernel is for rows in no groups)",
    ),
    (
        GROUPED,
        {"w": jnp.ones((3, 8, 32), jnp.uint8)},
        "w",
        "24576 elements (codes of 3 times (8,64)",
    ),
    (GROUPED, {"w": jnp.ones((24576,), jnp.uint8)}, "w", "a matrix for each group"),
    (GROUPED, {"w_scale": jnp.ones((2,))}, "w_scale", "3 or 384 elements"),
    (GROUPED, {"bias": jnp.ones((8,))}, "bias", "24 elements (groups * n)"),
    (GROUPED, {"group_sizes": jnp.ones((7,))}, "group_sizes", "S32 elements"),
    (GROUPED, {"group_sizes": jnp.ones((0,), jnp.int32)}, "group_sizes", "1 or more sizes"),
    (GROUPED, {"group_offset": jnp.ones((2,), jnp.int32)}, "group_offset", "1 elements (one)"),
]


@pytest.mark.parametrize(("kernel", "changes", "operand", "expected"), VARIANT_ERRORS)
def test_gated_and_grouped_kernels_name_operand_and_expected(
    kernel: str, changes: dict, operand: str, expected: str
) -> None:
    kernel_objects.custom_calls()
    assert PASSED in raw_variant(kernel)
    message = raw_variant(kernel, **changes)
    assert f"jax_nvfp4 gemm: operand {operand}: expected {expected}" in message


def test_an_unknown_kernel_is_named() -> None:
    kernel_objects.custom_calls()
    for message in (raw_quantize(kernel="no_such"), raw_gemm("sm_90a", kernel="no_such")):
        assert "no kernel named 'no_such' is built in" in message
    # A kernel's name serves its own op only.
    gemm = config.configs("sm_90a")[0].name
    assert f"no kernel named '{gemm}' is built in" in raw_quantize(kernel=gemm)


def test_manifest_is_the_one_it_was_built_from() -> None:
    ffi = kernel_objects.custom_calls()
    hashes = [
        {k["name"]: k["source_hash"] for k in manifest["kernels"]}
        for manifest in (ffi.manifest(), kernel_objects.manifest())
    ]
    assert hashes[0] == hashes[1]
    assert set(ffi.arches()) >= set(ARCHES)
    for arch in ARCHES:
        assert ffi.available(arch) and ffi.reason(arch) == ""
        assert set(ffi.kernels(arch)) == {
            k["name"] for k in ffi.manifest()["kernels"] if k["arch"] == arch
        }
    assert not ffi.available("reference")
    assert "and not for reference" in ffi.reason("reference")


def test_extension_is_small_and_keeps_its_symbols_to_itself() -> None:
    path = kernel_objects.extension_path()
    assert path.stat().st_size < 30e6
    library = ctypes.PyDLL(str(path))
    assert library.PyInit__ffi
    entry = kernel_objects.manifest()["kernels"][0]["entry"]
    for symbol in (
        "JaxNvfp4Gemm",
        "JaxNvfp4Quantize",
        "JaxNvfp4Linear",
        "cudaLaunchKernelExC",
        entry,
    ):
        with pytest.raises(AttributeError):
            getattr(library, symbol)


def test_extension_loads_neither_driver_nor_cuda_libraries() -> None:
    code = (
        "import importlib.util, json, sys\n"
        "spec = importlib.util.spec_from_file_location('_ffi', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "json.loads(module.manifest()), module.targets()\n"
        "print(open('/proc/self/maps').read())"
    )
    command = [sys.executable, "-c", code, str(kernel_objects.extension_path())]
    maps = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "_ffi" in maps
    assert "libcuda" not in maps and "libnv" not in maps


WITHOUT = """
import builtins, json, sys, importlib, importlib.abc
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "jax_nvfp4._ffi":
            raise {error}
sys.meta_path.insert(0, Block())
from jax_nvfp4 import custom_calls as ffi
print(json.dumps([ffi.available("sm_90a"), ffi.reason("sm_90a"), ffi.manifest(), ffi.arches()]))
"""


@pytest.mark.parametrize(
    ("error", "why"),
    [
        ("ModuleNotFoundError('x', name=name)", "is absent"),
        ("ImportError('undefined symbol: q')", "does not load: undefined symbol: q"),
    ],
)
def test_without_the_extension_all_is_told_and_nothing_breaks(error: str, why: str) -> None:
    command = [sys.executable, "-c", WITHOUT.format(error=error)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=kernel_objects.ROOT)
    assert done.returncode == 0, done.stderr
    available, reason, manifest, arches = json.loads(done.stdout.splitlines()[-1])
    assert available is False and why in reason
    assert manifest["kernels"] == [] and arches == []


def test_without_a_compiler_the_build_says_so_and_goes_on(tmp_path: pathlib.Path) -> None:
    missing = {"CXX": str(tmp_path / "no-such-compiler"), "PATH": str(tmp_path)}
    source = ("-S", str(kernel_objects.ROOT))
    done = kernel_objects.cmake(*source, "-B", str(tmp_path / "a"), env=missing)
    assert done.returncode == 0, done.stderr
    assert "installing without the CUDA extension: no C++ compiler was found" in done.stderr
    note = (tmp_path / "a" / "_no_extension.txt").read_text()
    assert note == "no C++ compiler was found when it was installed"
    required = "-DJAX_NVFP4_REQUIRE_EXTENSION=ON"
    done = kernel_objects.cmake(*source, "-B", str(tmp_path / "b"), required, env=missing)
    assert done.returncode != 0
    assert "the CUDA extension cannot be built: no C++ compiler" in done.stderr


def test_a_folder_without_kernels_is_refused(tmp_path: pathlib.Path) -> None:
    folders = ("-S", str(kernel_objects.ROOT), "-B", str(tmp_path / "build"))
    done = kernel_objects.cmake(*folders, f"-DJAX_NVFP4_KERNELS_DIR={tmp_path}")
    assert done.returncode != 0
    assert f"no manifest.json in {tmp_path}" in " ".join(done.stderr.split())
