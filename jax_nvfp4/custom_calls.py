# SPDX-License-Identifier: Apache-2.0
"""The custom calls into the compiled kernels; the only importer of the extension module.

Importing this module registers the call targets with JAX. Where the extension is absent the module
imports all the same, `available` is False for every architecture and `reason` says why.

The calls take operands that the caller has checked and computes nothing but shapes; the handlers
check all of it again, against one another and against the kernel, and return an XLA error that
names the op, the operand, expected and got.
"""

import dataclasses
import functools
import importlib
import importlib.resources
import json
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_nvfp4.config import Gate, GemmConfig, GemmProblem, QuantizeConfig, scratch_bytes
from jax_nvfp4.config.enums import OutFormat, Scaling
from jax_nvfp4.config.quantize import quantize_scratch_bytes
from jax_nvfp4.integers import ceil_div, round_up
from jax_nvfp4.layout import swizzle

_ABSENT_NOTE = "_no_extension.txt"


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and why there is none."""
    try:
        return importlib.import_module("jax_nvfp4._ffi"), ""
    except ModuleNotFoundError:
        note = importlib.resources.files("jax_nvfp4") / _ABSENT_NOTE
        why = note.read_text() if note.is_file() else "this installation was not built"
        return None, f"the CUDA extension jax_nvfp4._ffi is absent: {why}"
    except ImportError as error:
        return None, f"the CUDA extension jax_nvfp4._ffi does not load: {error}"


def _register(extension: ModuleType) -> None:
    for target in extension.targets():
        if target["state"] is not None:  # types first: a handler refers to its state's
            jax.ffi.register_ffi_type(target["state_name"], target["state"], target["platform"])
        jax.ffi.register_ffi_target(target["name"], target["handlers"], target["platform"])


_extension, _absent = _load()
if _extension is not None:
    _register(_extension)


@functools.cache
def manifest() -> dict[str, Any]:
    """The kernels that are built in, and by which compiler.

    {"dsl_version": str, "kernels": [{"name", "op", "arch", "config", ...}]}

    Each kernel has its resources too: `registers` a thread, static `shared_bytes` a CTA,
    `stack_bytes` a thread (where spills would be).
    """
    if _extension is None:
        return {"dsl_version": "", "kernels": []}
    return json.loads(_extension.manifest())


@functools.cache
def kernels(arch: str) -> dict[str, dict[str, Any]]:
    """The kernels built in for an architecture, from name to manifest entry."""
    return {entry["name"]: entry for entry in manifest()["kernels"] if entry["arch"] == arch}


def arches() -> tuple[str, ...]:
    """The architectures that kernels are built in for."""
    return tuple(sorted({entry["arch"] for entry in manifest()["kernels"]}))


def available(arch: str) -> bool:
    """Tells whether kernels for `arch` are built in."""
    return bool(kernels(arch))


def reason(arch: str) -> str:
    """Why `available(arch)` is False; an empty string where it is True."""
    if available(arch):
        return ""
    if _extension is None:
        return _absent
    return f"kernels are built in for {', '.join(arches())}, and not for {arch}"


def _empty(dtype: DTypeLike) -> np.ndarray:
    """The operand or result that stands for one that is not there."""
    return np.zeros((0,), dtype)


def quantize_call(
    x: jax.Array,
    scale_or_amax: jax.Array | None,
    *,
    config: QuantizeConfig,
    scaling: Scaling | int,
    out_format: OutFormat | int,
    num_sms: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Calls a quantize kernel.

    Args:
        x: (m, k), of the dtype the config is for.
        scale_or_amax: float32, the global scale or the amax of x, () or, by row, (m,); None for a
            dynamic scaling.
        config: the kernel to call.
        scaling: where the global scale comes from.
        out_format: what is written.
        num_sms: multiprocessors the call is planned for; a device with fewer uses all it has.

    Returns:
        (data, block_scale, global_scale). LINEAR: uint8 (m, ceil(k/16)*8) and float8_e4m3fn
        (m, ceil(k/16)). OPERAND: uint8 (m, ceil(k/64)*32) and uint8 of the swizzled shape, padding
        zero. VALUES: bfloat16 (m, ceil(k/64)*64) and uint8 (0,). global_scale is float32, () or,
        by row, (m,).
    """
    results = _quantize_results(x.shape, config, scaling, out_format, num_sms)
    codes, scales, used, _ = jax.ffi.ffi_call("jax_nvfp4_quantize", results)(
        x,
        _empty(np.float32) if scale_or_amax is None else scale_or_amax,
        kernel=config.name,
        scaling=np.int32(scaling),
        num_sms=np.int32(num_sms),
        out_format=np.int32(out_format),
    )
    return codes, scales, used


def _quantize_results(
    shape: tuple[int, ...],
    config: QuantizeConfig,
    scaling: Scaling | int,
    out_format: OutFormat | int,
    num_sms: int,
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The results and the scratch memory of a quantize kernel for an x of a shape."""
    m, k = shape
    if out_format == OutFormat.LINEAR:
        data = jax.ShapeDtypeStruct((m, round_up(k, 16) // 2), jnp.uint8)
        block_scale = jax.ShapeDtypeStruct((m, ceil_div(k, 16)), jnp.float8_e4m3fn)
    elif out_format == OutFormat.OPERAND:
        data = jax.ShapeDtypeStruct((m, round_up(k, 64) // 2), jnp.uint8)
        block_scale = jax.ShapeDtypeStruct(swizzle.swizzled_shape(m, ceil_div(k, 16)), jnp.uint8)
    else:
        data = jax.ShapeDtypeStruct((m, round_up(k, 64)), jnp.bfloat16)
        block_scale = jax.ShapeDtypeStruct((0,), jnp.uint8)
    per_row = Scaling(scaling).per_row
    return (
        data,
        block_scale,
        jax.ShapeDtypeStruct((m,) if per_row else (), jnp.float32),
        jax.ShapeDtypeStruct((quantize_scratch_bytes(config, num_sms),), jnp.uint8),
    )


def gemm_call(
    x: jax.Array,
    sfx: jax.Array | None,
    w: jax.Array,
    sfw: jax.Array,
    x_scale: jax.Array | None,
    w_scale: jax.Array,
    bias: jax.Array | None,
    *,
    config: GemmConfig,
    split_k: int,
    n: int,
    out_dtype: DTypeLike,
    num_sms: int,
    gate: Gate | None = None,
    groups: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Calls a GEMM kernel: `y = x_scale * w_scale * (x @ w.T) + bias`, rounded once.

    Args:
        x: (m, k), k a positive multiple of 64; uint8 (m, k/2) where the config takes e2m1.
        sfx: the 128x4-swizzled scales of an e2m1 x, else None.
        w: uint8, the repacked weight's codes.
        sfw: the repacked weight's scales.
        x_scale: float32, one value or (m,); None: 1.
        w_scale: float32, one value or (n,).
        bias: (n,) float32, bfloat16 or float16, or None.
        config: the kernel to call.
        split_k: number of ways in which K is split.
        n: logical rows of the weight.
        out_dtype: float32, bfloat16 or float16.
        num_sms: multiprocessors the call is planned for; a device with fewer uses all it has.
        gate: of a gated config, whose y has n / 2 columns; w_scale is then in the order of the
            repacked rows, and the bias in that of the logical ones.
        groups: of a grouped config, the rows of each group (int32) and the number of the first
            group that there is a weight of (int32, one element). w, sfw, w_scale and bias have a
            leading axis of the weights' groups.

    Returns:
        y, (m, n) of `out_dtype`.
    """
    m, columns = x.shape
    k = 2 * columns if config.x_dtype == "e2m1" else columns
    results = _gemm_results(m, n, k, config, split_k, out_dtype, num_sms)
    y, _ = jax.ffi.ffi_call("jax_nvfp4_gemm", results)(
        x,
        _empty(np.uint8) if sfx is None else sfx,
        w,
        sfw,
        _empty(np.float32) if x_scale is None else x_scale,
        w_scale,
        _empty(np.float32) if bias is None else bias,
        *(groups or (_empty(np.int32), _empty(np.int32))),
        kernel=config.name,
        num_sms=np.int32(num_sms),
        split_k=np.int32(split_k),
        **_gate_attributes(gate),
    )
    return y


def _gate_attributes(gate: Gate | None) -> dict[str, np.float32]:
    values = dataclasses.asdict(gate or Gate())
    return {name: np.float32(value) for name, value in values.items()}


def _gemm_results(
    m: int, n: int, k: int, config: GemmConfig, split_k: int, out_dtype: DTypeLike, num_sms: int
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The results and the scratch memory of a GEMM kernel."""
    problem = GemmProblem(m=m, n=n, k=k, arch=config.arch, x_dtype=config.x_dtype)
    return (
        jax.ShapeDtypeStruct((m, n // 2 if config.epilogue == "gated" else n), out_dtype),
        jax.ShapeDtypeStruct((scratch_bytes(config, problem, split_k, num_sms),), jnp.uint8),
    )


def linear_call(
    x: jax.Array,
    scale_or_amax: jax.Array | None,
    w: jax.Array,
    sfw: jax.Array,
    w_scale: jax.Array,
    bias: jax.Array | None,
    *,
    quantize_config: QuantizeConfig,
    scaling: Scaling | int,
    gemm_config: GemmConfig,
    split_k: int,
    n: int,
    out_dtype: DTypeLike,
    num_sms: int,
    gate: Gate | None = None,
    groups: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Calls a quantize kernel and a GEMM kernel on what it writes, as one custom call.

    The result is that of `quantize_call` and `gemm_call`, bit for bit. In one call the second
    kernel starts while the first runs.

    Args:
        x: (m, k), of the dtype the quantize config is for.
        scale_or_amax: float32, the global scale or the amax of x, () or, by row, (m,); None for a
            dynamic scaling.
        w: uint8, the repacked weight's codes.
        sfw: the repacked weight's scales.
        w_scale: float32, one value or (n,).
        bias: (n,) float32, bfloat16 or float16, or None.
        quantize_config: the first kernel.
        scaling: where the global scale of x comes from.
        gemm_config: the second kernel, for an x of e2m1 codes or of bfloat16 values.
        split_k: number of ways in which K is split.
        n: logical rows of the weight.
        out_dtype: float32, bfloat16 or float16.
        num_sms: multiprocessors the call is planned for; a device with fewer uses all it has.
        gate: as for `gemm_call`.
        groups: likewise.

    Returns:
        y, (m, n) of `out_dtype`.
    """
    m, k = x.shape
    out_format = OutFormat.for_gemm(gemm_config.x_dtype)
    operand = _quantize_results(x.shape, quantize_config, scaling, out_format, num_sms)
    y, scratch = _gemm_results(m, n, round_up(k, 64), gemm_config, split_k, out_dtype, num_sms)
    results = jax.ffi.ffi_call("jax_nvfp4_linear", (y, *operand, scratch))(
        x,
        _empty(np.float32) if scale_or_amax is None else scale_or_amax,
        w,
        sfw,
        w_scale,
        _empty(np.float32) if bias is None else bias,
        *(groups or (_empty(np.int32), _empty(np.int32))),
        gemm_kernel=gemm_config.name,
        scaling=np.int32(scaling),
        num_sms=np.int32(num_sms),
        out_format=np.int32(out_format),
        quantize_kernel=quantize_config.name,
        split_k=np.int32(split_k),
        **_gate_attributes(gate),
    )
    return results[0]
