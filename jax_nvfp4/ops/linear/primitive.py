# SPDX-License-Identifier: Apache-2.0
"""The linear primitive: quantize the rows of x as asked, multiply by an NVFP4 weight, add a bias.

One primitive holds the activation quantization and the GEMM, so that a batch axis joins the rows of
both. Its derivative is straight-through: that of `x @ dequantize(weight).T + bias`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from jax_nvfp4 import custom_calls, numerics
from jax_nvfp4.config import REFERENCE, GemmProblem, serves
from jax_nvfp4.config.gemm.select import select
from jax_nvfp4.config.quantize import OutFormat, select_quantize
from jax_nvfp4.layout import swizzle
from jax_nvfp4.layout.weights import K_MULTIPLE, pack_weight, unpack_weight
from jax_nvfp4.ops import device, primitive
from jax_nvfp4.ops.quantize import primitive as quantize_op
from jax_nvfp4.ops.sharding import partition


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """What is static in a call of `linear`.

    Attributes:
        arch: the order the weight is in; None: canonical, to be repacked in the graph as needed.
        n: logical rows of the weight.
        k: logical columns of the weight.
        activation: the mode of quantization of x, or None (weight-only).
        has_bias: whether there is a bias operand.
        out_dtype: name of the result's dtype.
        batch_invariant: a row of the result has the same bits whatever the other rows.
    """

    arch: str | None
    n: int
    k: int
    activation: quantize_op.Mode | None
    has_bias: bool
    out_dtype: str
    batch_invariant: bool


def linear(
    x: jax.Array,
    weight: tuple[jax.Array, jax.Array, jax.Array],
    bias: jax.Array | None,
    given: jax.Array | None,
    spec: LinearSpec,
) -> jax.Array:
    """`y = alpha * (x_q @ w_q.T) + bias`.

    Args:
        x: (..., K), f32, bf16 or f16. Its axes stay apart, for each may be divided over devices.
        weight: data, block_scale, global_scale (() or (N,)) in the order of `spec.arch`.
        bias: (N,) or None.
        given: the activations' global scale or amax, () or (...); None where `spec.activation`
            needs none.
        spec: the rest.

    Returns:
        (..., N) of `spec.out_dtype`.
    """
    operands = _joined(x, weight, bias, () if given is None else (given,))
    (y,) = primitive.bind(linear_p, *operands, spec=spec)
    return y


def _joined(
    x: Any, weight: tuple[Any, Any, Any], bias: Any | None, given: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The operands of the primitive, in order; the inverse of `_split`."""
    return (x, *weight, *(() if bias is None else (bias,)), *given)


def _split(
    operands: tuple[Any, ...], spec: LinearSpec
) -> tuple[Any, tuple[Any, Any, Any], Any | None, tuple[Any, ...]]:
    """Operands of the primitive as (x, weight, bias or None, (given,) or ())."""
    x, data, block_scale, global_scale, *rest = operands
    bias = rest.pop(0) if spec.has_bias else None
    return x, (data, block_scale, global_scale), bias, tuple(rest)


def _abstract(*operands: Any, spec: LinearSpec) -> list[Any]:
    shape = (*operands[0].shape[:-1], spec.n)
    return [primitive.out_aval(shape, spec.out_dtype, operands[0])]


def _of_matrix(function: Callable[..., list[jax.Array]]) -> Callable[..., list[jax.Array]]:
    """An implementation for a matrix x as one for an x with any leading axes."""

    def implementation(*operands: jax.Array, spec: LinearSpec) -> list[jax.Array]:
        x, weight, bias, given = _split(operands, spec)
        *rows, k = x.shape
        matrix = x.reshape(math.prod(rows), k)
        (y,) = function(*_joined(matrix, weight, bias, quantize_op.flat(given)), spec=spec)
        return [y.reshape(*rows, spec.n)]

    return implementation


# ---- Reference ----------------------------------------------------------------------------------


def _canonical(
    weight: tuple[jax.Array, jax.Array, jax.Array], spec: LinearSpec
) -> tuple[jax.Array, jax.Array, jax.Array]:
    data, block_scale, global_scale = weight
    if spec.arch is not None:
        data, block_scale = unpack_weight(spec.arch, data, block_scale, spec.n, spec.k)
    return data, block_scale, global_scale


def _dot(x: jax.Array, w: jax.Array, values: Any) -> jax.Array:
    """x (M, K) times w (N, K) transposed in float32; `values` is a dtype that holds both."""
    contract_k = (((1,), (1,)), ((), ()))

    def wide(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(x, w, contract_k, precision=lax.Precision.HIGHEST)

    def narrow(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(
            x.astype(values), w.astype(values), contract_k, preferred_element_type=jnp.float32
        )

    # A 16-bit dot has the same exact products. CPUs are faster, or only exact, with float32.
    return lax.platform_dependent(x, w, cpu=wide, default=narrow)


def _reference(*operands: jax.Array, spec: LinearSpec) -> list[jax.Array]:
    x, weight, bias, given = _split(operands, spec)
    data, block_scale, w_scale = _canonical(weight, spec)
    w = numerics.block_values(data, block_scale)[:, : spec.k]

    if spec.activation is None:
        values = jnp.dtype(jnp.float16 if x.dtype == jnp.float16 else jnp.bfloat16)
        x = x.astype(values).astype(jnp.float32)
        alpha = w_scale
    else:
        values = jnp.dtype(jnp.bfloat16)
        encode, decode, x_scale = quantize_op.scales(x, *given, mode=spec.activation)
        x = numerics.block_values(*numerics.quantize(x, encode, decode))[:, : spec.k]
        alpha = (x_scale if x_scale.ndim == 0 else x_scale[:, None]) * w_scale

    if spec.batch_invariant:
        # Each row by itself: the order of its reduction cannot depend on the other rows.
        acc = lax.map(lambda row: _dot(row[None], w, values)[0], x)
    else:
        acc = _dot(x, w, values)
    y = alpha * acc
    return [_with_bias(y, bias, spec)]


def _with_bias(y: jax.Array, bias: jax.Array | None, spec: LinearSpec) -> jax.Array:
    """The float32 product plus the bias, rounded once to the dtype of the result."""
    if bias is None:
        return y.astype(spec.out_dtype)
    bias = bias.astype(jnp.float32)
    return numerics.add_rounding_once(numerics.rounded(y), bias, spec.out_dtype)


# ---- Kernels ------------------------------------------------------------------------------------


ONE_CALL_ELEMENTS = 1 << 19
"""Elements of x up to which one custom call quantizes and multiplies.

One call saves about 0.7 us, since its second kernel starts while the first runs. Two can save the
first: XLA merges equal calls, so that layers that share x, as those of q, k and v do, quantize it
once. Up to here a quantization takes 2.5 us or less, and for the layers of a transformer, seven
with four different x, one call is worth more than or about as much as two. The result is the same
bit for bit.
"""


def _operand_dtype(x: jax.Array, spec: LinearSpec, arch: str) -> str:
    """The element type of x that the GEMM of `arch` takes."""
    if spec.activation is None:
        return "float16" if x.dtype == jnp.float16 else "bfloat16"
    return "bfloat16" if arch == "sm_90a" else "e2m1"


def _operand(
    x: jax.Array, given: tuple[jax.Array, ...], spec: LinearSpec, arch: str
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """x as the GEMM of `arch` takes it: values or codes, block scales, global scale."""
    x_dtype = _operand_dtype(x, spec, arch)
    if spec.activation is None:
        return numerics.pad_last(x.astype(x_dtype), K_MULTIPLE), None, None
    out_format = OutFormat.for_gemm(x_dtype)
    x, scales, x_scale = quantize_op.kernel(
        x, *given, mode=spec.activation, arch=arch, out_format=out_format
    )
    return x, scales if x_dtype == "e2m1" else None, x_scale


def _problem(x: jax.Array, x_dtype: str, spec: LinearSpec, arch: str) -> GemmProblem:
    padded_k = -(-spec.k // K_MULTIPLE) * K_MULTIPLE
    return GemmProblem(x.shape[0], spec.n, padded_k, arch, x_dtype, spec.batch_invariant)


def _weight_only_by_xla(x: jax.Array, spec: LinearSpec, arch: str) -> bool:
    """Whether 16-bit x goes through XLA's dot of the dequantized weight.

    Blackwell's tensor cores multiply 4-bit by 4-bit operands; its kernels for 16-bit x, where there
    are any, are for few rows.
    """
    if spec.activation is not None or arch == "sm_90a":
        return False
    return not serves(_problem(x, _operand_dtype(x, spec, arch), spec, arch), device.num_sms(arch))


def _cuda(*operands: jax.Array, spec: LinearSpec) -> list[jax.Array]:
    x, (data, block_scale, w_scale), bias, given = _split(operands, spec)
    arch = device.kernel_arch(spec.arch)
    if arch is None or 0 in (*x.shape, spec.n) or _weight_only_by_xla(x, spec, arch):
        return _reference(*operands, spec=spec)
    if spec.arch is None:
        data, block_scale = pack_weight(arch, data, block_scale)
    sms = device.num_sms(arch)
    out_dtype = jnp.dtype(spec.out_dtype)
    x_dtype = _operand_dtype(x, spec, arch)
    config, split_k = select(_problem(x, x_dtype, spec, arch), sms)
    if spec.activation is not None and x.size <= ONE_CALL_ELEMENTS:
        mode = quantize_op.kernel_mode(x, given, spec.activation)
        y = custom_calls.linear_call(
            x,
            given[0] if given else None,
            data,
            block_scale,
            w_scale,
            bias,
            quantize_config=select_quantize(arch, x.dtype.name, mode),
            mode=mode,
            gemm_config=config,
            split_k=split_k,
            n=spec.n,
            out_dtype=out_dtype,
            num_sms=sms,
        )
        return [y]
    x, scales, x_scale = _operand(x, given, spec, arch)
    y = custom_calls.gemm_call(
        x,
        scales,
        data,
        block_scale,
        x_scale,
        w_scale,
        bias,
        config=config,
        split_k=split_k,
        n=spec.n,
        out_dtype=out_dtype,
        num_sms=sms,
    )
    return [y]


# ---- Partitioning -------------------------------------------------------------------------------


def _factors(*operands: Any, spec: LinearSpec) -> partition.Factors:
    """Rows of x and of the weight may be divided; K where each device's part is whole blocks.

    The order of a repacked weight mixes the rows of a tile and the columns: it is divided by whole
    tiles along the rows, and not along K. Sums over devices would come in an order that may depend
    on the number of rows, and are not for `batch_invariant`.
    """
    x, (data, block_scale, w_scale), bias, given = _split(operands, spec)
    in_order = spec.arch in (None, REFERENCE)
    of_x = partition.leading(x)
    sizes = dict(zip(of_x, x.shape, strict=False))
    divisible = [*of_x]
    rows: Any = "n"
    if in_order:
        sizes["n"] = spec.n
        divisible.append("n")
        of_data, of_scales = [rows], [rows]
    elif spec.n % swizzle.ROWS == 0:
        sizes |= {"n": spec.n // swizzle.ROWS, "rows_of_tile": swizzle.ROWS}
        divisible.append("n")
        rows = ("n", "rows_of_tile")
        of_data, of_scales = [rows], ["n" if block_scale.ndim == 3 else rows]
    else:  # the last tile holds rows that the result does not have
        sizes |= {"n": spec.n, "padded_n": data.shape[0], "scale_n": block_scale.shape[0]}
        of_data, of_scales = ["padded_n"], ["scale_n"]

    columns: Any = "k"
    if in_order and spec.k % numerics.BLOCK == 0 and not spec.batch_invariant:
        sizes |= {"blocks": spec.k // numerics.BLOCK, "elements": numerics.BLOCK, "codes": 8}
        divisible.append("blocks")
        columns = ("blocks", "elements")
        of_data.append(("blocks", "codes"))
        of_scales.append("blocks")
    else:
        sizes |= {"k": spec.k, "packed_k": data.shape[1]}
        of_data.append("packed_k")
        for axis, size in enumerate(block_scale.shape[1:]):
            of_scales.append(f"scale_k{axis}")
            sizes[of_scales[-1]] = size
    return partition.Factors(
        operands=(
            (*of_x, columns),
            tuple(of_data),
            tuple(of_scales),
            (rows,) if w_scale.ndim else (),
            *([(rows,)] if bias is not None else []),
            *(of_x if g.ndim else () for g in given),
        ),
        results=((*of_x, rows),),
        sizes=sizes,
        divisible=tuple(divisible),
    )


def _part(
    operands: tuple[jax.Array, ...],
    *,
    axes: partition.Axes,
    parts: Mapping[str, int],
    spec: LinearSpec,
) -> list[jax.Array]:
    """A device's part of y. Partial sums along K are float32; the bias is added to their sum."""
    x, weight, bias, given = _split(operands, spec)
    over_k = axes.get("blocks", ())
    mode = spec.activation
    if mode is not None:
        given, mode = quantize_op.of_part(x, given, mode, axes)
    part = dataclasses.replace(
        spec,
        n=spec.n // parts.get("n", 1),
        k=spec.k // parts.get("blocks", 1),
        activation=mode,
    )
    if not over_k:
        return linear_p.bind(*_joined(x, weight, bias, given), spec=part)
    part = dataclasses.replace(part, has_bias=False, out_dtype="float32")
    (partial,) = linear_p.bind(*_joined(x, weight, None, given), spec=part)
    y = lax.psum(partial, over_k)
    return [_with_bias(y, bias, spec)]


# ---- Transformations ----------------------------------------------------------------------------


def _batch(
    operands: tuple[Any, ...], dims: tuple[int | None, ...], *, spec: LinearSpec
) -> tuple[Any, Any]:
    _, weight_dims, bias_dim, _ = _split(dims, spec)
    if any(d is not None for d in (*weight_dims, bias_dim)):
        return primitive.batch_by_loop(linear_p, operands, dims, {"spec": spec})

    x, weight, bias, given = _split(operands, spec)
    x_dim, _, _, given_dims = _split(dims, spec)
    mode = spec.activation
    if mode is None:
        x = primitive.to_front(x, x_dim)
    else:
        x, given, mode = quantize_op.with_batch((x, *given), (x_dim, *given_dims), mode)
    whole = dataclasses.replace(spec, activation=mode)
    return [linear(x, weight, bias, given[0] if given else None, whole)], [0]


def _jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...], *, spec: LinearSpec
) -> tuple[Any, Any]:
    (y,) = linear_p.bind(*primals, spec=spec)
    _, weight, _, _ = _split(primals, spec)
    x_dot, _, bias_dot, _ = _split(tangents, spec)
    terms = []
    if not isinstance(x_dot, ad.Zero):
        terms.append(_ste(x_dot, weight, transposed=False, dtype="float32", spec=spec))
    if bias_dot is not None and not isinstance(bias_dot, ad.Zero):
        terms.append(bias_dot.astype(jnp.float32))
    if not terms:
        return [y], [primitive.zero_tangent(y)]
    tangent = jnp.broadcast_to(functools.reduce(jnp.add, terms), y.shape)
    return [y], [tangent.astype(y.dtype)]


def _ste(v: jax.Array, weight: tuple[Any, ...], **params: Any) -> jax.Array:
    (result,) = primitive.bind(ste_p, v, *weight, **params)
    return result


def _ste_abstract(
    v: Any, *weight: Any, transposed: bool, dtype: str, spec: LinearSpec
) -> list[Any]:
    columns = spec.k if transposed else spec.n
    return [primitive.out_aval((*v.shape[:-1], columns), dtype, v)]


def _ste_impl(
    v: jax.Array, *weight: jax.Array, transposed: bool, dtype: str, spec: LinearSpec
) -> list[jax.Array]:
    """v (..., K) @ dequantize(w).T or, transposed, v (..., N) @ dequantize(w), as `dtype`."""
    data, block_scale, w_scale = _canonical((weight[0], weight[1], weight[2]), spec)
    w = numerics.dequantize(data, block_scale, w_scale if w_scale.ndim == 0 else w_scale[:, None])
    w = w[:, : spec.k]
    contract = (((v.ndim - 1,), (0 if transposed else 1,)), ((), ()))
    product = lax.dot_general(v.astype(jnp.float32), w, contract, precision=lax.Precision.HIGHEST)
    return [product.astype(dtype)]


def _ste_batch(args: tuple[Any, ...], dims: tuple[int | None, ...], **params: Any) -> Any:
    results = jax.vmap(functools.partial(_ste_impl, **params), in_axes=dims)(*args)
    return results, [0] * len(results)


def _ste_jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    v, *weight = primals
    results = ste_p.bind(v, *weight, **params)
    if isinstance(tangents[0], ad.Zero):
        return results, [primitive.zero_tangent(r) for r in results]
    return results, ste_p.bind(tangents[0], *weight, **params)


def _ste_transpose(
    cotangents: Any, v: Any, *weight: Any, transposed: bool, dtype: str, spec: LinearSpec
) -> list[Any]:
    del dtype
    (ct,) = cotangents
    none_for_weight = [None] * len(weight)
    if isinstance(ct, ad.Zero):
        return [ad.Zero(v.aval), *none_for_weight]
    dv = _ste(ct, weight, transposed=not transposed, dtype=v.aval.dtype.name, spec=spec)
    return [dv, *none_for_weight]


linear_p = primitive.define(
    "nvfp4_linear",
    abstract=_abstract,
    reference=_of_matrix(_reference),
    batch=_batch,
    cuda=_of_matrix(_cuda),
    partitioning=partition.Partitioning(_factors, _part),
)
ad.primitive_jvps[linear_p] = _jvp

ste_p = primitive.define(
    "nvfp4_linear_ste", abstract=_ste_abstract, reference=_ste_impl, batch=_ste_batch
)
ad.primitive_jvps[ste_p] = _ste_jvp
ad.primitive_transposes[ste_p] = _ste_transpose
