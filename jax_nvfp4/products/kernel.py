# SPDX-License-Identifier: Apache-2.0
"""Nvfp4Kernel: an NVFP4 weight that remembers which axes of which array it came from."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_nvfp4.ops import checks
from jax_nvfp4.ops.quantize.api import quantize
from jax_nvfp4.products.axes import KernelAxes
from jax_nvfp4.products.contraction import How, Labels, Weight, contract
from jax_nvfp4.tensor import Nvfp4Tensor, PartKey, RepackedWeight


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Nvfp4Kernel:
    """An NVFP4 weight in the shape of the array it stands for, a pytree. Made by `quantize_kernel`.

    It multiplies by `x @ kernel`, `kernel @ x`, `jax_nvfp4.dot_general` and `jax_nvfp4.einsum`,
    over the axes that it was quantized for. `kernel[i]` takes a matrix of a stack, `kernel.T`
    reverses the axes; both leave the codes as they are. `scan`, `vmap` and `shard_map` over its
    parts take off and divide the batch axes.

    Attributes:
        weight: (batch..., N, K), an Nvfp4Tensor or a RepackedWeight.
        axes: which axes of the array N and K run over.
    """

    weight: Weight
    axes: KernelAxes

    # NumPy arrays leave `x @ kernel` to the kernel.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array it stands for."""
        return self.axes.shape(self.weight.shape)

    @property
    def ndim(self) -> int:
        """The number of axes of the array."""
        return self.weight.ndim - 2 + len(self.axes.sizes)

    @property
    def size(self) -> int:
        """The number of elements of the array."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array that was quantized, which products promote with that of x."""
        return self.weight.dtype

    @property
    def nbytes(self) -> int:
        """The bytes its parts take."""
        return self.weight.nbytes

    def check(self) -> None:
        """Refuses parts that do not belong together, which transformations may have changed.

        Raises:
            TypeError: a part is not an array of its dtype.
            ValueError: the shapes do not belong together, or not to the array.
        """
        self.weight.check()
        _ = self.shape

    @property
    def batch(self) -> tuple[int, ...]:
        """The positions of the batch axes, in the order in which the weight has them."""
        return self.axes.places(self.weight.ndim - 2)[0]

    @property
    def free(self) -> tuple[int, ...]:
        """The positions of the axes that N runs over, major first."""
        return self.axes.places(self.weight.ndim - 2)[1]

    @property
    def contracting(self) -> tuple[int, ...]:
        """The positions of the axes that K runs over, major first."""
        return self.axes.places(self.weight.ndim - 2)[2]

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The values, in the shape of the array.

        Args:
            dtype: of the result.
        """
        values = self.weight.dequantize(dtype)
        shape, order = self.shape, (*self.batch, *self.free, *self.contracting)
        values = values.reshape([shape[p] for p in order])
        return values.transpose([order.index(p) for p in range(self.ndim)])

    @property
    def T(self) -> "Nvfp4Kernel":  # noqa: N802
        """The kernel of the array with its axes reversed; the same parts."""
        return self.transpose()

    def transpose(self, *axes: int) -> "Nvfp4Kernel":
        """The kernel of the array with its axes in another order; the same parts.

        Args:
            *axes: a permutation of the axes, as of `jnp.transpose`; none: reversed.

        Raises:
            ValueError: it is no permutation.
        """
        given: Any = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
        order = tuple(a + self.ndim if a < 0 else a for a in given) or tuple(range(self.ndim))[::-1]
        if sorted(order) != list(range(self.ndim)):
            raise ValueError(f"axes must be a permutation of {self.ndim} axes; got {tuple(given)}")
        return Nvfp4Kernel(self.weight, self.axes.transposed(order))

    def __getitem__(self, index: Any) -> "Nvfp4Kernel":
        """A part of a stack of kernels; traceable.

        Args:
            index: an integer (traced or not), a slice, `...`, or a tuple of them, with whole slices
                along axes that are no batch axes. Where the batch axes come first, also arrays of
                integers: a kernel for each.

        Raises:
            IndexError: a static integer is out of range, or there are too many.
            TypeError: the index is of another kind, or along another axis than a batch axis.
        """
        entries = self._entries(index)
        of_lead = tuple(entries[p] for p in self.batch)

        def cut(part: jax.Array) -> jax.Array:
            # A global scale has some of the leading axes, or none.
            return part[of_lead[: part.ndim]]

        axes = self.axes
        if axes.batch:
            kept = [p for p in range(self.ndim) if isinstance(entries[p], slice)]
            left = tuple(kept.index(p) for p in self.batch if p in kept)
            axes = dataclasses.replace(axes, batch=left)
        return Nvfp4Kernel(jax.tree.map(cut, self.weight), axes)

    def _entries(self, index: Any) -> tuple[Any, ...]:
        """An index for each axis."""
        given = index if isinstance(index, tuple) else (index,)
        dots = [i for i, entry in enumerate(given) if entry is Ellipsis]
        if len(dots) > 1:
            raise IndexError("an index can only have a single ellipsis ('...')")
        at = dots[0] if dots else len(given)
        before, after = given[:at], given[at + 1 :]
        missing = self.ndim - len(before) - len(after)
        if missing < 0:
            raise IndexError(f"too many indices for an NVFP4 kernel of shape {self.shape}: {index}")
        entries = (*before, *[slice(None)] * missing, *after)
        for position, (entry, size) in enumerate(zip(entries, self.shape, strict=True)):
            self._check_entry(position, entry, size)
        return entries

    def _check_entry(self, position: int, entry: Any, size: int) -> None:
        """Refuses an index that would not give a kernel."""
        if isinstance(entry, slice):
            if entry == slice(None):
                return
        elif not _is_integer(entry) or (self.axes.batch and jnp.ndim(entry)):
            raise TypeError(
                f"an NVFP4 kernel takes integers and slices as indices; got {type(entry).__name__} "
                f"for axis {position}"
            )
        if position not in self.batch:
            raise TypeError(
                f"axis {position} of the NVFP4 kernel of shape {self.shape} is quantized together "
                f"with others and cannot be indexed; its batch axes {self.batch} can "
                f"(dequantize() gives an array)"
            )
        if isinstance(entry, int | np.integer) and not -size <= entry < size:
            raise IndexError(f"index {entry} is out of range for axis {position} of size {size}")

    def __len__(self) -> int:
        """The size of the first axis."""
        if not self.ndim:
            raise TypeError("an NVFP4 kernel without axes has no len()")
        return self.shape[0]

    def __iter__(self) -> Iterator["Nvfp4Kernel"]:
        """The kernels along the first axis, a batch axis."""
        return (self[i] for i in range(len(self)))

    def __matmul__(self, x: ArrayLike) -> jax.Array:
        """`kernel @ x`, as `jnp.matmul` has it; activations quantized with a scale per token."""
        x = as_operand(x, self)
        if not (x.ndim and self.ndim):
            return NotImplemented
        k, n = ("k",), ("n",)
        of_kernel, of_x, batch = _matmul_labels(self, x)
        of_kernel += (("m",) if self.ndim > 1 else ()) + k
        of_x += k + (n if x.ndim > 1 else ())
        result = (*batch, *(("m",) if self.ndim > 1 else ()), *(n if x.ndim > 1 else ()))
        return self._times(x, of_x, of_kernel, result)

    def __rmatmul__(self, x: ArrayLike) -> jax.Array:
        """`x @ kernel`, as `jnp.matmul` has it; activations quantized with a scale per token."""
        x = as_operand(x, self)
        if not (x.ndim and self.ndim):
            return NotImplemented
        k, n = ("k",), ("n",)
        of_kernel, of_x, batch = _matmul_labels(self, x)
        of_x += (("m",) if x.ndim > 1 else ()) + k
        of_kernel += k + (n if self.ndim > 1 else ())
        result = (*batch, *(("m",) if x.ndim > 1 else ()), *(n if self.ndim > 1 else ()))
        return self._times(x, of_x, of_kernel, result)

    def _times(self, x: jax.Array, of_x: Labels, of_kernel: Labels, result: Labels) -> jax.Array:
        """The product of `@`; broadcasts batch axes of x that have one element."""
        shape = dict(zip(of_kernel, self.shape, strict=True))
        broadcast = [
            i
            for i, label in enumerate(of_x)
            if isinstance(label, int) and x.shape[i] == 1 != shape.get(label, 1)
        ]
        of_x = tuple(label for i, label in enumerate(of_x) if i not in broadcast)
        return contract(
            jnp.squeeze(x, broadcast), of_x, self.weight, self.axes, of_kernel, result, How()
        )

    def tree_flatten_with_keys(self) -> tuple[Any, KernelAxes]:
        """The weight with its name, and what is static."""
        return ((PartKey("weight"), self.weight),), self.axes

    @classmethod
    def tree_unflatten(cls, axes: KernelAxes, children: Any) -> Self:
        """Rebuilds without checks: transformations put other things than weights there."""
        (weight,) = children
        return cls(weight, axes)

    def __repr__(self) -> str:
        if not isinstance(self.weight, Nvfp4Tensor | RepackedWeight):
            return f"Nvfp4Kernel({self.weight}, {self.axes})"
        try:
            what = f"shape={self.shape}, contracting={self.contracting}, batch={self.batch}"
        except (AttributeError, TypeError, ValueError):
            what = f"{self.axes}"
        return f"Nvfp4Kernel({what}, weight={self.weight})"


def _is_integer(entry: Any) -> bool:
    """Whether an index is an integer or an array of integers, traced or not."""
    if entry is None or isinstance(entry, bool):
        return False
    if isinstance(entry, int):
        return True
    return hasattr(entry, "dtype") and jnp.issubdtype(entry.dtype, jnp.integer)


def _matmul_labels(kernel: Nvfp4Kernel, x: jax.Array) -> tuple[Labels, Labels, Labels]:
    """Labels of the axes before the last two: of the kernel, of x, of the product.

    They are integers, counted from the right. An axis of the kernel that has one element where x
    has more is a label of its own, which the product does not have.
    """
    of_kernel: list[Any] = list(range(max(kernel.ndim - 2, 0)))[::-1]
    of_x = list(range(max(x.ndim - 2, 0)))[::-1]
    for i, label in enumerate(of_kernel):
        if label in of_x and kernel.shape[i] == 1 != x.shape[of_x.index(label)]:
            of_kernel[i] = f"one{label}"
    batch = of_kernel if len(of_kernel) > len(of_x) else of_x
    return tuple(of_kernel), tuple(of_x), tuple(range(len(batch)))[::-1]


def as_operand(x: Any, kernel: Nvfp4Kernel) -> jax.Array:
    """The other operand of a kernel: integers become the dtype that both promote to."""
    x = checks.as_array("the operand", x, "an array")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.promote_types(x.dtype, kernel.dtype))
    return x


def as_kernel(weight: Any) -> Nvfp4Kernel | None:
    """An NVFP4 weight as a kernel: an Nvfp4Tensor stands for an array (..., N, K); else None."""
    if isinstance(weight, Nvfp4Kernel):
        return weight
    if not isinstance(weight, Nvfp4Tensor | RepackedWeight):
        return None
    if weight.ndim < 2:
        raise ValueError(f"a weight must have shape (..., N, K); got {weight.shape}")
    return Nvfp4Kernel(weight, KernelAxes(weight.shape[-2:], free=(0,), contracting=(1,)))


def _positions(name: str, given: Any, ndim: int) -> tuple[int, ...]:
    """Axes as positions.

    Raises:
        ValueError: one is out of range, or there twice.
    """
    axes = tuple(given) if not isinstance(given, int) else (given,)
    found = tuple(a + ndim if a < 0 else a for a in axes)
    if any(not 0 <= a < ndim for a in found) or len(set(found)) != len(found):
        raise ValueError(f"{name} must be different axes of an array of {ndim}; got {axes}")
    return found


def quantize_kernel(
    w: ArrayLike,
    contracting: int | Sequence[int] = (0,),
    batch: int | Sequence[int] = (),
    **as_quantize: Any,
) -> Nvfp4Kernel:
    """Quantizes the kernel of a layer, whatever the order of its axes.

    Blocks of 16 run along the contracted axes, which products sum over. Each matrix of a stack (the
    experts of a mixture, the layers of a scan) is quantized by itself.

    Args:
        w: bfloat16, float16 or float32, of any shape: (in, out) of a Dense layer, (d, heads, dim)
            of a query projection, (experts, in, out)...
        contracting: the axes that a product sums over. Where there are several, K runs over them
            in this order, major first.
        batch: axes of stacked matrices, or none.
        **as_quantize: as of `jax_nvfp4.quantize`, for each matrix (N, K), with "token" scaling for
            one global scale per row. A `global_scale` that is given is a scalar, one for each
            matrix (the sizes of the batch axes), or one for each row (then those of the free axes).

    Returns:
        An Nvfp4Kernel of the shape of w.

    Raises:
        TypeError: w has a dtype that is not taken.
        ValueError: axes are out of range, there twice, or none is contracted; a global_scale has
            another shape.
    """
    w = checks.as_float_array("w", w, min_ndim=1)
    contracting, batch = (
        _positions("contracting", contracting, w.ndim),
        _positions("batch", batch, w.ndim),
    )
    if not contracting or set(contracting) & set(batch):
        raise ValueError(
            f"contracting must be one axis or more, none of which is in batch; got {contracting} "
            f"and batch {batch}"
        )
    free = tuple(a for a in range(w.ndim) if a not in (*contracting, *batch))
    lead, rows, columns = (tuple(w.shape[a] for a in axes) for axes in (batch, free, contracting))
    n, k = math.prod(rows), math.prod(columns)
    matrices = w.transpose(*batch, *free, *contracting).reshape(*lead, n, k)

    scale = as_quantize.pop("global_scale", None)
    scale_shape = jnp.shape(scale) if scale is not None else ()
    if scale_shape not in ((), lead, (*lead, *rows)):
        raise ValueError(
            f"global_scale must be a scalar, one for each matrix, {lead}, or one for each row, "
            f"{(*lead, *rows)}; got shape {scale_shape}"
        )
    if len(scale_shape) > len(lead):
        scale = jnp.reshape(scale, (*lead, n))

    def one(matrix: jax.Array, scale: jax.Array | None) -> Nvfp4Tensor:
        return quantize(matrix, global_scale=scale, **as_quantize)

    for _ in lead:
        one = jax.vmap(one, (0, 0 if scale_shape else None))
    everywhere = [a for a in range(w.ndim) if a not in batch]
    axes = KernelAxes(
        sizes=tuple(w.shape[a] for a in everywhere),
        free=tuple(everywhere.index(a) for a in free),
        contracting=tuple(everywhere.index(a) for a in contracting),
        batch=batch,
    )
    return Nvfp4Kernel(one(matrices, scale), axes)


def _axes_from_json(blob: bytes) -> KernelAxes:
    return KernelAxes(*map(tuple, json.loads(blob)))


jax.export.register_pytree_node_serialization(
    Nvfp4Kernel,
    serialized_name="jax_nvfp4.Nvfp4Kernel",
    serialize_auxdata=lambda axes: json.dumps(dataclasses.astuple(axes)).encode(),
    deserialize_auxdata=_axes_from_json,
)
