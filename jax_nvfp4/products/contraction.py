# SPDX-License-Identifier: Apache-2.0
"""The product of an array and a kernel, its axes named by labels, in terms of `linear`.

What a product asks of an axis of the kernel need not be what the axis is in the weight: a batch
axis of the weight may be a batch axis of the product, a free one (each expert takes all of x) or a
contracted one (the sum over experts).
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_nvfp4 import numerics
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.ops import checks
from jax_nvfp4.ops.linear.api import checked, run
from jax_nvfp4.ops.ragged_linear.api import ragged_linear
from jax_nvfp4.ops.sharding import typed
from jax_nvfp4.products.axes import KernelAxes
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight

Weight = Nvfp4Tensor | RepackedWeight
Labels = tuple[Hashable, ...]


@dataclasses.dataclass(frozen=True)
class How:
    """What a product takes beside its operands.

    Attributes:
        activation_scale: as of `linear`; "tensor" is one scale for all of x.
        batch_invariant: as of `linear`.
        out_dtype: of the result; None: what the operands promote to.
    """

    activation_scale: checks.ActivationScale = "token"
    batch_invariant: bool = False
    out_dtype: Any = None


def contract(
    x: jax.Array,
    of_x: Labels,
    weight: Weight,
    axes: KernelAxes,
    of_kernel: Labels,
    of_result: Labels,
    how: How,
    bias: tuple[jax.Array, Labels] | None = None,
) -> jax.Array:
    """The product of x and a kernel, summed over each label that the result does not have.

    Args:
        x: a floating-point array.
        of_x: a label for each axis of x, none twice.
        weight: (batch..., N, K).
        axes: of the kernel that the weight stands for.
        of_kernel: a label for each axis of the kernel, none twice.
        of_result: a label for each axis of the result, each of x or of the kernel.
        how: the rest.
        bias: to add before the result is rounded, with a label for each of its axes: those of the
            kernel that the result has.

    Returns:
        The result, its axes in the order of `of_result`.

    Raises:
        ValueError: sizes differ, or the sum runs over other axes of the kernel than those that it
            was quantized for.
    """
    shape = axes.shape(weight.shape)
    _check_sizes(x, of_x, shape, of_kernel)
    _check_sum(axes, weight, of_kernel, [a for a in of_kernel if a in of_x and a not in of_result])
    scale = how.activation_scale
    arrays = (x, weight, bias and bias[0], None if isinstance(scale, str) else scale)

    def product(x: jax.Array, weight: Weight, added: Any, scale: Any) -> tuple[jax.Array]:
        used = how if scale is None else dataclasses.replace(how, activation_scale=scale)
        of_bias = bias and (added, bias[1])
        return (_product(x, of_x, weight, axes, of_kernel, of_result, used, of_bias),)

    def placement() -> typed.Placement:
        """Each axis of the result lies as that of x or of the weight."""
        sizes = dict(zip(of_kernel, shape, strict=True)) | dict(zip(of_x, x.shape, strict=True))
        batch, free, _ = axes.places(weight.ndim - 2)
        of_data = [of_kernel[p] for p in (*batch, *free[:1])]
        entries = dict(zip(of_data, typed.entries(weight.data), strict=False))
        entries |= {a: e for a, e in zip(of_x, typed.entries(x), strict=True) if e is not None}
        return ((tuple(map(entries.get, of_result)), tuple(sizes[a] for a in of_result)),)

    (y,) = typed.call(product, arrays, placement)
    return y


def _product(
    x: jax.Array,
    of_x: Labels,
    weight: Weight,
    axes: KernelAxes,
    of_kernel: Labels,
    of_result: Labels,
    how: How,
    bias: tuple[jax.Array, Labels] | None,
) -> jax.Array:
    """`contract`, once its operands are known to go together and axes are the compiler's."""
    alone = [i for i, label in enumerate(of_x) if label not in (*of_kernel, *of_result)]
    if alone:
        x, of_x = x.sum(alone), tuple(a for i, a in enumerate(of_x) if i not in alone)
    _, free, _ = axes.places(weight.ndim - 2)
    rows_apart = [p for p in free if of_kernel[p] in of_x]
    if rows_apart:
        weight, axes = _rows_to_batch(weight, axes, rows_apart)
    batch, free, contracting = axes.places(weight.ndim - 2)
    loops, rows, columns = (
        tuple(of_kernel[p] for p in places) for places in (batch, free, contracting)
    )
    in_x = [label for label in loops if label in of_x]
    others = [label for label in of_x if label not in (*in_x, *columns)]
    x = x.transpose([of_x.index(label) for label in (*in_x, *others, *columns)])
    x = x.reshape(*x.shape[: x.ndim - len(columns)], weight.shape[-1])

    late = [i for i, label in enumerate((*loops, *others, *rows)) if label not in of_result]
    out_dtype = how.out_dtype or jnp.promote_types(x.dtype, weight.dtype)
    how = dataclasses.replace(how, out_dtype=jnp.float32 if late else out_dtype)
    early = None
    if bias is not None and not late:
        early = _in_order(*bias, (*loops, *rows)).reshape(*weight.shape[:-1])
    y = _each(x, weight, early, [label in of_x for label in loops], how)
    sizes = dict(zip(of_kernel, axes.shape(weight.shape), strict=True))
    y = y.reshape(*y.shape[:-1], *(sizes[label] for label in rows))
    found = tuple(label for label in (*loops, *others, *rows) if label in of_result)
    if late:
        y = y.sum(late)
        if bias is not None:
            y += _in_order(*bias, found).astype(jnp.float32)
        y = y.astype(out_dtype)
    return _in_order(y, found, of_result)


def _in_order(array: jax.Array, labels: Labels, order: Labels) -> jax.Array:
    """An array with its axes in an order; those that it does not have get one element."""
    found = [label for label in order if label in labels]
    array = array.transpose([labels.index(label) for label in found])
    return jnp.expand_dims(array, [i for i, label in enumerate(order) if label not in labels])


def _each(
    x: jax.Array, weight: Weight, bias: jax.Array | None, mapped: Sequence[bool], how: How
) -> jax.Array:
    """`linear` for each matrix of a weight.

    Args:
        x: (those batch axes of the weight that are `mapped`..., ..., K).
        weight: (batch..., N, K).
        bias: (batch..., N).
        mapped: for each batch axis of the weight, whether x has it.
        how: the rest.

    Returns:
        (batch..., ..., N).
    """
    if mapped and all(mapped):
        return _grouped(x, weight, bias, how)
    tensor = isinstance(how.activation_scale, str) and how.activation_scale == "tensor"
    amax = numerics.amax(x) if tensor and any(mapped) else None
    leaves, structure = jax.tree.flatten(weight)

    def matrix(x: jax.Array, bias: jax.Array | None, *leaves: jax.Array) -> jax.Array:
        operands, spec = checked(
            x,
            jax.tree.unflatten(structure, leaves),
            bias,
            None,
            how.activation_scale,
            how.out_dtype,
            how.batch_invariant,
        )
        if amax is not None:  # that of all of x, of which this is a part
            operands = operands._replace(scale_or_amax=amax)
            spec = dataclasses.replace(spec, scaling=Scaling.AMAX)
        return run(operands, spec)

    function: Callable[..., jax.Array] = matrix
    for depth in reversed(range(len(mapped))):
        # A global scale has some of the leading axes of its weight, or none.
        of_leaves = [0 if leaf.ndim > depth else None for leaf in leaves]
        function = jax.vmap(function, (0 if mapped[depth] else None, 0, *of_leaves))
    return function(x, bias, *leaves)


def _grouped(x: jax.Array, weight: Weight, bias: jax.Array | None, how: How) -> jax.Array:
    """`_each` where x has all batch axes of the weight: one product of as many groups of rows."""
    *lead, n, k = weight.shape
    groups, rows = math.prod(lead), x.shape[len(lead) : -1]

    def flat(part: jax.Array) -> jax.Array:
        if 0 < part.ndim < len(lead):  # a global scale of the first of these axes
            part = jnp.broadcast_to(jnp.expand_dims(part, range(part.ndim, len(lead))), lead)
        return part.reshape(groups, *part.shape[len(lead) :]) if part.ndim else part

    y = ragged_linear(
        x.reshape(groups * math.prod(rows), k),
        jax.tree.map(flat, weight),
        jnp.full(groups, math.prod(rows), jnp.int32),
        None if bias is None else flat(bias),
        activation_scale=how.activation_scale,
        out_dtype=how.out_dtype,
        batch_invariant=how.batch_invariant,
    )
    return y.reshape(*lead, *rows, n)


def _rows_to_batch(
    weight: Weight, axes: KernelAxes, chosen: Sequence[int]
) -> tuple[Nvfp4Tensor, KernelAxes]:
    """Takes free axes, by their positions in the array, out of the rows of a weight.

    A repacked weight is put back into canonical order: its rows are in tiles.
    """
    tensor = weight.canonical() if isinstance(weight, RepackedWeight) else weight
    *lead, n, k = tensor.shape
    _, free, _ = axes.places(len(lead))
    sizes = [axes.shape(tensor.shape)[p] for p in free]
    order = [free.index(p) for p in chosen] + [i for i, p in enumerate(free) if p not in chosen]

    def apart(part: jax.Array) -> jax.Array:
        rest = part.shape[len(lead) + 1 :]
        part = part.reshape(*lead, *sizes, *rest)
        fixed, moved = len(lead), len(sizes)
        part = part.transpose(
            *range(fixed), *(fixed + i for i in order), *range(fixed + moved, part.ndim)
        )
        inner = math.prod(part.shape[fixed + len(chosen) : fixed + moved])
        return part.reshape(*part.shape[: fixed + len(chosen)], inner, *rest)

    scale = tensor.global_scale
    if scale.ndim > len(lead):
        scale = apart(scale)
    elif scale.ndim:  # one for each matrix, also for those that it falls into
        of_rows = jnp.broadcast_to(
            scale.reshape(*scale.shape, *[1] * (len(lead) + 1 - scale.ndim)), (*lead, n)
        )
        scale = apart(of_rows)
    parts = apart(tensor.data), apart(tensor.block_scale), scale
    result = Nvfp4Tensor(*parts, k=k, dtype=tensor.dtype)
    return result, axes.with_batch(len(lead), chosen)


def _check_sizes(x: jax.Array, of_x: Labels, shape: Sequence[int], of_kernel: Labels) -> None:
    """Refuses axes that share a label and have not one size."""
    for position, label in enumerate(of_kernel):
        if label in of_x and x.shape[of_x.index(label)] != shape[position]:
            raise ValueError(
                f"axis {of_x.index(label)} of x, of shape {x.shape}, and axis {position} of the "
                f"NVFP4 kernel, of shape {tuple(shape)}, must have one size"
            )


def _check_sum(
    axes: KernelAxes, weight: Weight, of_kernel: Labels, summed: Sequence[Hashable]
) -> None:
    """Refuses a sum over other axes than those that the kernel was quantized for."""
    _, _, contracting = axes.places(weight.ndim - 2)
    asked = {of_kernel.index(label) for label in summed}
    if set(contracting) <= asked:
        return
    raise ValueError(
        f"the NVFP4 kernel of shape {axes.shape(weight.shape)} was quantized for products that "
        f"contract its axes {tuple(sorted(contracting))}; this one contracts "
        f"{tuple(sorted(asked))} (quantize it with contracting={tuple(sorted(asked))})"
    )
