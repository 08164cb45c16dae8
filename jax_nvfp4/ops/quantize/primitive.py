# SPDX-License-Identifier: Apache-2.0
"""The quantize primitive: rows of 16-element blocks, with one of four sources of global scale."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from jax_nvfp4 import custom_calls, numerics
from jax_nvfp4.config.quantize import SHARED_ROW, OutFormat, select_quantize
from jax_nvfp4.config.quantize import Mode as KernelMode
from jax_nvfp4.ops import device, primitive
from jax_nvfp4.ops.sharding import partition

Mode = Literal["tensor", "token", "static", "amax"]
"""Where the global scale comes from: the amax of all of x, the amax of each row, a given global
scale, or a given amax (of data of which x is a part)."""


def quantize(
    x: jax.Array, given: jax.Array | None = None, *, mode: Mode
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes the rows of an array.

    Args:
        x: (..., K), f32, bf16 or f16. Its axes stay apart, for each may be divided over devices.
        given: float32 () or (...), the global scale ("static") or the amax ("amax").
        mode: the source of the global scale.

    Returns:
        data uint8 (..., ceil(K/16)*8), block_scale float8_e4m3fn (..., ceil(K/16)), and
        global_scale float32, () or (...).
    """
    operands = (x,) if given is None else (x, given)
    data, block_scale, global_scale = primitive.bind(quantize_p, *operands, mode=mode)
    return data, block_scale, global_scale


def scales(x: jax.Array, *given: jax.Array, mode: Mode) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Encode scale S, decode scale D, and the global scale to report, for each mode."""
    if mode == "static":
        return *numerics.static_scales(given[0]), given[0]
    axis = -1 if mode == "token" else None
    largest = given[0] if mode == "amax" else numerics.amax(x, axis=axis)
    encode, decode = numerics.dynamic_scales(largest)
    return encode, decode, decode


def _abstract(x: Any, *given: Any, mode: Mode) -> list[Any]:
    *rows, k = x.shape
    blocks = -(-k // numerics.BLOCK)
    scale_shape = given[0].shape if given else (rows if mode == "token" else ())
    return [
        primitive.out_aval((*rows, blocks * 8), jnp.uint8, x),
        primitive.out_aval((*rows, blocks), jnp.float8_e4m3fn, x),
        primitive.out_aval(scale_shape, jnp.float32, x),
    ]


def _reference(x: jax.Array, *given: jax.Array, mode: Mode) -> list[jax.Array]:
    encode, decode, global_scale = scales(x, *given, mode=mode)
    return [*numerics.quantize(x, encode, decode), global_scale]


# By whether there is a scale or an amax for each row.
_KERNEL_MODES = {
    "tensor": (KernelMode.TENSOR, KernelMode.TENSOR),
    "token": (KernelMode.TOKEN, KernelMode.TOKEN),
    "static": (KernelMode.SCALAR_GIVEN, KernelMode.ROWS_GIVEN),
    "amax": (KernelMode.SCALAR_AMAX, KernelMode.ROWS_AMAX),
}


def kernel_mode(x: jax.Array, given: tuple[jax.Array, ...], mode: Mode) -> KernelMode:
    """The kernels' mode for a mode of the primitive."""
    m, k = x.shape
    found = _KERNEL_MODES[mode][bool(given and given[0].ndim)]
    if found == KernelMode.TENSOR and m == 1 and k <= SHARED_ROW and k % 8 == 0:
        return KernelMode.TOKEN  # the same for one row, and faster
    return found


def kernel(
    x: jax.Array, *given: jax.Array, mode: Mode, arch: str, out_format: OutFormat
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes a matrix by a kernel of `arch`. Results as of `custom_calls.quantize_call`."""
    of_kernel = kernel_mode(x, given, mode)
    data, block_scale, global_scale = custom_calls.quantize_call(
        x,
        given[0] if given else None,
        config=select_quantize(arch, x.dtype.name, of_kernel),
        mode=of_kernel,
        out_format=out_format,
        num_sms=device.num_sms(arch),
    )
    return data, block_scale, global_scale.reshape(()) if mode == "tensor" else global_scale


def _cuda(x: jax.Array, *given: jax.Array, mode: Mode) -> list[jax.Array]:
    arch = device.kernel_arch(None)
    if arch is None or x.size == 0:
        return _reference(x, *given, mode=mode)
    *rows, k = x.shape
    results = kernel(
        x.reshape(math.prod(rows), k),
        *flat(given),
        mode=mode,
        arch=arch,
        out_format=OutFormat.LINEAR,
    )
    return [r.reshape(*rows, *r.shape[1:]) if r.ndim else r for r in results]


def flat(given: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """A given scale, if any, for the rows of x as a matrix."""
    return tuple(g.reshape(-1) if g.ndim else g for g in given)


def _factors(x: Any, *given: Any, mode: Mode) -> partition.Factors:
    """Rows may be divided, and columns where shards hold whole blocks."""
    rows, k = partition.leading(x), x.shape[-1]
    blocks = -(-k // numerics.BLOCK)
    per_row = given[0].shape if given else mode == "token"
    scale = rows if per_row else ()
    sizes = {**dict(zip(rows, x.shape, strict=False)), "blocks": blocks, "codes": 8}
    columns: Any = "k"
    if k % numerics.BLOCK == 0:
        columns, sizes["elements"] = ("blocks", "elements"), numerics.BLOCK
    else:
        sizes["k"] = k
    return partition.Factors(
        operands=((*rows, columns), *(scale for _ in given)),
        results=((*rows, ("blocks", "codes")), (*rows, "blocks"), scale),
        sizes=sizes,
        divisible=(*rows, "blocks") if k % numerics.BLOCK == 0 else rows,
    )


def of_part(
    x: jax.Array, given: tuple[jax.Array, ...], mode: Mode, axes: partition.Axes
) -> tuple[tuple[jax.Array, ...], Mode]:
    """The scale with which a device quantizes its part of x to the bits of the whole.

    An amax is exchanged for per-tensor scaling of divided rows and for any dynamic scaling of
    divided columns.

    Args:
        x: the part.
        given: the scale of the whole, or of the part's rows, if any.
        mode: of the quantization of the whole.
        axes: mesh axes over which x is divided.

    Returns:
        `given` and `mode` for the part: an amax that is not that of the part alone is given.
    """
    columns = axes.get("blocks", ())
    rows = partition.mesh_axes(axes, partition.leading(x))
    shared = (*rows, *columns) if mode == "tensor" else columns if mode == "token" else ()
    if not shared:
        return given, mode
    largest = numerics.amax(x, axis=-1 if mode == "token" else None)
    return (lax.pmax(largest, shared),), "amax"


def _part(
    operands: tuple[jax.Array, ...],
    *,
    axes: partition.Axes,
    parts: Mapping[str, int],
    mode: Mode,
) -> list[jax.Array]:
    del parts
    x, *given = operands
    used, mode = of_part(x, tuple(given), mode, axes)
    return quantize_p.bind(x, *used, mode=mode)


def with_batch(
    args: tuple[Any, ...], dims: tuple[int | None, ...], mode: Mode
) -> tuple[jax.Array, tuple[jax.Array, ...], Mode]:
    """Makes a batch axis the first axis of x and of its given scale.

    Args:
        args: x (..., K), and perhaps the given scale, with a batch axis where `dims` says so.
        dims: the batch axis of each, or None.
        mode: the mode of each element of the batch.

    Returns:
        x of shape (B, ..., K), the given scale of shape () or (B, ...) if any, and the mode that
        quantizes those rows to the same bits.
    """
    size = primitive.batch_size(args, dims)
    x = primitive.to_front(args[0], dims[0])
    if dims[0] is None:
        x = jnp.broadcast_to(x, (size, *x.shape))
    given = [primitive.to_front(a, d) for a, d in zip(args[1:], dims[1:], strict=True)]
    mapped = [d is not None for d in dims[1:]]
    if mode == "tensor":
        given, mapped, mode = [_amax_of_each(x)], [True], "amax"
    rows = x.shape[:-1]

    def for_rows(scale: jax.Array, mapped: bool) -> jax.Array:
        if mapped and scale.ndim == 1:  # one for each element of the batch
            scale = scale.reshape(size, *[1] * (len(rows) - 1))
        return jnp.broadcast_to(scale, rows) if scale.ndim else scale

    return x, tuple(map(for_rows, given, mapped)), mode


def _amax_of_each(x: jax.Array) -> jax.Array:
    """The amax of each element of a batch."""
    return numerics.amax(x, axis=tuple(range(1, x.ndim)))


def _batch(args: tuple[Any, ...], dims: tuple[int | None, ...], *, mode: Mode) -> tuple[Any, Any]:
    x, given, row_mode = with_batch(args, dims, mode)
    data, block_scale, row_scale = quantize_p.bind(x, *given, mode=row_mode)
    if mode == "static":
        global_scale, dim = args[1], dims[1]
    elif mode == "amax":
        global_scale, dim = numerics.dynamic_scales(args[1])[1], dims[1]
    elif mode == "token":
        global_scale, dim = row_scale, 0
    else:
        global_scale, dim = numerics.dynamic_scales(_amax_of_each(x))[1], 0
    return [data, block_scale, global_scale], [0, 0, dim]


def _jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...], *, mode: Mode) -> tuple[Any, Any]:
    del tangents  # piecewise constant
    results = quantize_p.bind(*primals, mode=mode)
    return results, [primitive.zero_tangent(r) for r in results]


quantize_p = primitive.define(
    "nvfp4_quantize",
    abstract=_abstract,
    reference=_reference,
    batch=_batch,
    cuda=_cuda,
    partitioning=partition.Partitioning(_factors, _part),
)
ad.primitive_jvps[quantize_p] = _jvp
