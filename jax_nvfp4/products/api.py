# SPDX-License-Identifier: Apache-2.0
"""`dot_general` and `einsum` of an array and an NVFP4 weight: checks what the user gave, once."""

from collections.abc import Sequence
from typing import Any

import jax
import opt_einsum
from jax.typing import ArrayLike, DTypeLike

from jax_nvfp4.ops import checks
from jax_nvfp4.products.contraction import How, Labels, contract
from jax_nvfp4.products.kernel import Nvfp4Kernel, as_kernel, as_operand
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight

Operand = ArrayLike | Nvfp4Kernel | Nvfp4Tensor | RepackedWeight
DotDimensionNumbers = tuple[
    tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]
]


def dot_general(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DotDimensionNumbers,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: Any = None,
    activation_scale: checks.ActivationScale = "token",
    batch_invariant: bool = False,
) -> jax.Array:
    """`jax.lax.dot_general` where one operand, either one, is an NVFP4 weight.

    The math is that of `linear`: products are exact, sums are float32, the result is rounded once,
    the gradient is straight-through. A matrix of a stack is multiplied after the other.

    Args:
        lhs: an array, or an NVFP4 weight: an Nvfp4Kernel, or an Nvfp4Tensor or RepackedWeight,
            which stands for an array (..., N, K) that is contracted over K.
        rhs: an NVFP4 weight, or an array.
        dimension_numbers: `((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))`, as of
            `jax.lax.dot_general`. The weight is contracted over the axes that it was quantized for;
            its batch axes may be batch, free or contracted ones of the product. Free axes of the
            weight may be batch axes of the product; where it is repacked, each call then pays for
            putting it back into canonical order (name them with `quantize_kernel(batch=)`).
        precision: no effect: products are exact and sums float32.
        preferred_element_type: dtype of the result: bfloat16, float16 or float32. None: what the
            array and the dtype of the weight promote to.
        out_sharding: of the result, on a mesh with explicit axes.
        activation_scale: how the array is quantized, as of `linear`. "token": a scale for each
            index of its axes that are not contracted; "tensor": one for all of it.
        batch_invariant: as of `linear`.

    Returns:
        The product; its axes are batch axes, free axes of lhs, free axes of rhs.

    Raises:
        TypeError: neither operand is an NVFP4 weight, or both are; a dtype is not taken.
        ValueError: axes are out of range, sizes differ, or the weight was quantized for products
            over other axes.
    """
    x, kernel, kernel_first = _operands("dot_general", lhs, rhs)
    shapes = (kernel.shape, x.shape) if kernel_first else (x.shape, kernel.shape)
    of_lhs, of_rhs, of_result = _dot_general_labels(dimension_numbers, *map(len, shapes))
    of_x, of_kernel = (of_rhs, of_lhs) if kernel_first else (of_lhs, of_rhs)
    how = How(activation_scale, batch_invariant, _result_dtype(preferred_element_type))
    y = contract(x, of_x, kernel.weight, kernel.axes, of_kernel, of_result, how)
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def einsum(
    subscripts: Any,
    *operands: Any,
    optimize: Any = "auto",
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
    activation_scale: checks.ActivationScale = "token",
    batch_invariant: bool = False,
) -> jax.Array:
    """`jax.numpy.einsum` of two operands of which one, either one, is an NVFP4 weight.

    Args:
        subscripts: as of `jax.numpy.einsum`, "btd,dnh->btnh"; ellipses, an implied result and the
            form with lists of axes included.
        *operands: an array and an NVFP4 weight, in any order, as of `dot_general`.
        optimize: no effect: there is one product.
        precision: no effect: products are exact and sums float32.
        preferred_element_type: as of `dot_general`.
        out_sharding: as of `dot_general`.
        activation_scale: as of `dot_general`.
        batch_invariant: as of `linear`.

    Returns:
        The product.

    Raises:
        TypeError: neither operand is an NVFP4 weight, or both are; a dtype is not taken.
        ValueError: the subscripts do not go with the operands, an axis of the weight has the
            subscript of another, or the weight was quantized for products over other axes.
    """
    del optimize, precision
    how = How(activation_scale, batch_invariant, _result_dtype(preferred_element_type))
    y = einsum_with_bias(subscripts, operands, None, how)
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def einsum_with_bias(
    subscripts: Any, operands: Sequence[Any], bias: jax.Array | None, how: How
) -> jax.Array:
    """`einsum` plus a bias, rounded once.

    Args:
        subscripts: as of `einsum`.
        operands: likewise.
        bias: None, or an array whose elements are those of the weight's axes that the result has,
            in the order of the result.
        how: the rest.
    """
    inputs, result, arrays = opt_einsum.parser.parse_einsum_input((subscripts, *operands))
    if len(arrays) != 2:
        raise ValueError(
            f"einsum takes an array and an NVFP4 weight; got {len(arrays)} operands "
            f"(multiply the arrays with one another first)"
        )
    x, kernel, kernel_first = _operands("einsum", *arrays)
    of_lhs, of_rhs = inputs.split(",")
    of_x, of_kernel = (of_rhs, of_lhs) if kernel_first else (of_lhs, of_rhs)
    for name, labels, array in (("array", of_x, x), ("NVFP4 weight", of_kernel, kernel)):
        if len(labels) != len(array.shape):
            raise ValueError(
                f"the subscripts {labels!r} do not go with the {name}, of shape {array.shape}"
            )
    if len(set(of_kernel)) != len(of_kernel):
        raise ValueError(f"the NVFP4 weight has a subscript twice in {of_kernel!r}")
    x, of_x = _plain(x, of_x, kernel, of_kernel)
    of_bias = tuple(label for label in result if label in of_kernel)
    shape = [kernel.shape[of_kernel.index(label)] for label in of_bias]
    return contract(
        x,
        tuple(of_x),
        kernel.weight,
        kernel.axes,
        tuple(of_kernel),
        tuple(result),
        how,
        None if bias is None else (bias.reshape(shape), of_bias),
    )


def linear_general(
    x: jax.Array,
    kernel: Nvfp4Kernel,
    bias: jax.Array | None,
    contracting: Sequence[int],
    batch: Sequence[int],
    how: How,
) -> jax.Array:
    """The product of Flax's general dense layers, plus a bias, rounded once.

    Args:
        x: an array.
        kernel: of shape (batch..., contracted..., features...).
        bias: (batch..., features...) or None.
        contracting: the axes of x that are contracted, in the kernel's order.
        batch: the leading axes of x that are batch axes of the kernel.
        how: the rest.

    Returns:
        (batch..., other axes of x..., features...).
    """
    count, summed = len(batch), len(contracting)
    numbers: Any = (contracting, range(count, count + summed)), (batch, range(count))
    of_x, of_kernel, of_result = _dot_general_labels(numbers, x.ndim, kernel.ndim)
    of_bias = of_kernel[:count] + of_kernel[count + summed :]
    return contract(
        x,
        of_x,
        kernel.weight,
        kernel.axes,
        of_kernel,
        of_result,
        how,
        None if bias is None else (bias, of_bias),
    )


def _plain(x: jax.Array, of_x: str, kernel: Nvfp4Kernel, of_kernel: str) -> tuple[jax.Array, str]:
    """x with each subscript once, and without axes of one element that are broadcast."""
    once = "".join(dict.fromkeys(of_x))
    if once != of_x:
        x = jax.numpy.einsum(f"{of_x}->{once}", x)
    sizes = dict(zip(of_kernel, kernel.shape, strict=True))
    one = [i for i, label in enumerate(once) if x.shape[i] == 1 != sizes.get(label, 1)]
    return jax.numpy.squeeze(x, one), "".join(a for i, a in enumerate(once) if i not in one)


def _operands(function: str, lhs: Operand, rhs: Operand) -> tuple[jax.Array, Nvfp4Kernel, bool]:
    """The array, the NVFP4 weight, and whether that is the first of the two."""
    kernels = as_kernel(lhs), as_kernel(rhs)
    if (kernels[0] is None) == (kernels[1] is None):
        what = "neither is one" if kernels[0] is None else "both are"
        raise TypeError(f"one operand of {function} must be an NVFP4 weight; {what}")
    kernel, other = (kernels[0], rhs) if kernels[0] is not None else (kernels[1], lhs)
    assert kernel is not None
    return as_operand(other, kernel), kernel, kernels[0] is not None


def _result_dtype(preferred: DTypeLike | None) -> Any:
    return None if preferred is None else checks.float_dtype("preferred_element_type", preferred)


def _dot_general_labels(
    dimension_numbers: DotDimensionNumbers, lhs_ndim: int, rhs_ndim: int
) -> tuple[Labels, Labels, Labels]:
    """Labels of the axes of lhs, of rhs, and of the result.

    Raises:
        ValueError: the dimension numbers do not go with the operands.
    """
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = (
        [tuple(map(int, axes)) for axes in pair] for pair in dimension_numbers
    )
    if len(lhs_sum) != len(rhs_sum) or len(lhs_batch) != len(rhs_batch):
        raise ValueError(f"dimension_numbers name axes that have no partner: {dimension_numbers}")
    labels: list[list[Any]] = []
    for name, ndim, axes in (
        ("lhs", lhs_ndim, (*lhs_sum, *lhs_batch)),
        ("rhs", rhs_ndim, (*rhs_sum, *rhs_batch)),
    ):
        if len(set(axes)) != len(axes) or any(not 0 <= a < ndim for a in axes):
            raise ValueError(
                f"dimension_numbers must name different axes of {name}, which has {ndim}; "
                f"got {axes}"
            )
        labels.append([(name, a) for a in range(ndim)])
    of_lhs, of_rhs = labels
    for left, right in zip((*lhs_sum, *lhs_batch), (*rhs_sum, *rhs_batch), strict=True):
        of_rhs[right] = of_lhs[left]
    batch = [of_lhs[a] for a in lhs_batch]
    of_result = (
        *batch,
        *(of_lhs[a] for a in range(lhs_ndim) if a not in (*lhs_sum, *lhs_batch)),
        *(of_rhs[a] for a in range(rhs_ndim) if a not in (*rhs_sum, *rhs_batch)),
    )
    return tuple(of_lhs), tuple(of_rhs), of_result
