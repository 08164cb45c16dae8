# SPDX-License-Identifier: Apache-2.0
"""The two forms of an NVFP4 tensor: canonical, as on disk, and repacked for one architecture."""

import dataclasses
import functools
import json
import math
from typing import Any, Self

import jax
import jax.export
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jax_nvfp4 import numerics
from jax_nvfp4.integers import ceil_div
from jax_nvfp4.layout.orders import order

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
FLOAT_NAMES = "bfloat16, float16 or float32"
"""The dtypes that we quantize from and compute in, and what errors call them."""


class PartKey(jax.tree_util.GetAttrKey):
    """The name of a part in the path of a leaf.

    Rules for params, such as masks of optimizers, join the `key` of each step of a path, which
    those of attributes do not have.
    """

    @property
    def key(self) -> str:
        """The name, as the keys of dicts call it."""
        return self.name


def _keyed_parts(tensor: Any) -> tuple[tuple[PartKey, Any], ...]:
    """The parts that both forms have, with their names."""
    return tuple(
        (PartKey(name), getattr(tensor, name)) for name in ("data", "block_scale", "global_scale")
    )


def _nbytes(tensor: Any) -> int:
    # Of the shape, which what Flax prints in the place of an array has too.
    return sum(math.prod(part.shape) * part.dtype.itemsize for _, part in _keyed_parts(tensor))


def _global_scale_name(tensor: Any) -> str:
    shape = tensor.global_scale.shape
    return str(shape) if shape else "scalar"


def _are_arrays(tensor: Any) -> bool:
    """Whether the parts are arrays; transformations put other things in their place."""
    return all(
        hasattr(part, "shape") and hasattr(part, "dtype") for _, part in _keyed_parts(tensor)
    )


def _check_dtypes(tensor: Any, **expected: Any) -> None:
    """Refuses parts that are no arrays or that have been cast.

    Raises:
        TypeError: a part is not an array of the expected dtype.
    """
    for name, dtype in expected.items():
        part = getattr(tensor, name)
        found = getattr(part, "dtype", None)
        if found != dtype:
            if found is None:
                got, hint = type(part).__name__, "params with metadata must be unboxed"
            else:
                got = found.name
                hint = (
                    "a cast of all params must leave NVFP4 weights alone, what was saved in one "
                    "order must be restored into a weight of that order"
                )
            raise TypeError(
                f"the {name} of {type(tensor).__name__} must be an array of "
                f"{jnp.dtype(dtype).name}; got {got} ({hint})"
            )


def _source_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype that a tensor came from.

    Raises:
        TypeError: another than those that can be quantized.
    """
    found = jnp.dtype(dtype)
    if found not in FLOATS:
        raise TypeError(
            f"dtype, which the values came from, must be {FLOAT_NAMES}; got {found.name}"
        )
    return found


def _expand(global_scale: jax.Array, ndim: int) -> jax.Array:
    """Adds trailing axes: a global scale has the leading axes of its tensor, or none."""
    return global_scale.reshape(global_scale.shape + (1,) * (ndim - global_scale.ndim))


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, init=False, eq=False)
class Nvfp4Tensor:
    """An NVFP4 tensor in canonical form, a pytree with the logical shape `(..., K)`.

    The value of an element is `e2m1 * block_scale * global_scale`. Where K is not a multiple of 16
    the last block of each row is padded with zeros.

    Attributes:
        data: uint8 (..., ceil(K/16)*8). Byte i of a row holds element 2i in its low nibble and
            element 2i+1 in its high nibble.
        block_scale: float8_e4m3fn (..., ceil(K/16)), linear.
        global_scale: float32; a scalar (per tensor), one per row `(...)` (per token), or the
            leading axes of stacked tensors.
        padding: elements that fill up the last block of each row, 0 to 15.
        parts: the rows of each part of a weight that `concatenate` or `gate_up` made; () of others.
        gated: whether the two parts are a gate and an up projection.
        dtype: that the values came from. It changes no value; it is what layers promote with the
            dtypes of their inputs, as they would that of an array.
    """

    data: jax.Array
    block_scale: jax.Array
    global_scale: jax.Array
    padding: int
    parts: tuple[int, ...]
    gated: bool
    dtype: jnp.dtype

    def __init__(
        self,
        data: Any,
        block_scale: Any,
        global_scale: Any,
        *,
        k: int | None = None,
        padding: int = 0,
        parts: tuple[int, ...] = (),
        gated: bool = False,
        dtype: DTypeLike = jnp.bfloat16,
    ) -> None:
        """Checks and holds the parts.

        Args:
            data: uint8 (..., ceil(k/16)*8).
            block_scale: float8_e4m3fn, or its bits as uint8, (..., ceil(k/16)).
            global_scale: float32, its shape the first axes of `data`'s leading ones, or ().
            k: the logical length of the last axis; `2 * data.shape[-1] - padding` by default.
            padding: the same, said by what is missing to whole blocks.
            parts: the rows of each part, of a weight that was put together from several.
            gated: whether these are a gate and an up projection.
            dtype: that the values came from: bfloat16, float16 or float32.

        Raises:
            TypeError: a part has another dtype, or values cannot have come from `dtype`.
            ValueError: the shapes do not belong together.
        """
        data, block_scale = jnp.asarray(data), jnp.asarray(block_scale)
        if jnp.result_type(global_scale) != jnp.float32 and not isinstance(global_scale, float):
            raise TypeError(
                f"global_scale must be float32, got {jnp.result_type(global_scale).name}"
            )
        global_scale = jnp.asarray(global_scale, jnp.float32)
        if data.dtype != jnp.uint8:
            raise TypeError(f"data must be uint8, two codes a byte; got {data.dtype.name}")
        if block_scale.dtype == jnp.uint8:
            block_scale = lax.bitcast_convert_type(block_scale, jnp.float8_e4m3fn)
        if block_scale.dtype != jnp.float8_e4m3fn:
            raise TypeError(
                f"block_scale must be float8_e4m3fn (or its bits as uint8), "
                f"got {block_scale.dtype.name}"
            )
        if data.ndim == 0:
            raise ValueError("data must have at least one axis, got a scalar")
        k = 2 * data.shape[-1] - padding if k is None else int(k)
        if data.shape[-1] != _blocks(k) * 8 or k < 0:
            raise ValueError(
                f"data of shape {data.shape} must have ceil(k/16)*8 = {_blocks(k) * 8} bytes along "
                f"its last axis for k = {k}"
            )
        static = (-k % numerics.BLOCK, tuple(map(int, parts)), bool(gated), _source_dtype(dtype))
        self._set(data, block_scale, global_scale, *static)
        self._check_shapes()

    def check(self) -> None:
        """Refuses parts that do not belong together, which transformations may have changed.

        Raises:
            TypeError: a part is not an array of its dtype.
            ValueError: the shapes do not belong together.
        """
        _check_dtypes(self, data=jnp.uint8, block_scale=jnp.float8_e4m3fn, global_scale=jnp.float32)
        self._check_shapes()

    def _check_shapes(self) -> None:
        data, global_scale = self.data.shape, self.global_scale.shape
        expected = (*data[:-1], _blocks(self.k))
        if self.block_scale.shape != expected:
            raise ValueError(
                f"block_scale must have shape {expected} to go with data of "
                f"shape {data} and k = {self.k}; got {self.block_scale.shape}"
            )
        if global_scale != data[: len(global_scale)] or len(global_scale) >= len(data):
            raise ValueError(
                f"global_scale must be a scalar or have the leading axes of "
                f"{data[:-1]}; got shape {global_scale}"
            )
        if self.gated and (len(data) < 2 or self.parts != (data[-2] // 2,) * 2 or data[-2] % 2):
            raise ValueError(
                f"a gated weight of parts {self.parts} must have as many rows; got the shape "
                f"{self.shape} (a mesh may divide its rows once it is repacked, not before)"
            )

    def _set(self, *values: Any) -> None:
        for field, value in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)

    @property
    def k(self) -> int:
        """The logical length of the last axis; of a device's part, in `shard_map`, the part's."""
        return 2 * self.data.shape[-1] - self.padding

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, `(..., K)`."""
        return (*self.data.shape[:-1], self.k)

    @property
    def ndim(self) -> int:
        """The number of logical axes."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """The number of logical elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes its parts take."""
        return _nbytes(self)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The values.

        Args:
            dtype: of the result; computed in float32, `e2m1 * (block_scale * global_scale)`.

        Returns:
            An array of the logical shape.
        """
        self.check()
        return _dequantize(self.data, self.block_scale, self.global_scale, self.k, jnp.dtype(dtype))

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[Any, ...]]:
        """The arrays with their names, and what is static, which devices' parts have in common."""
        return _keyed_parts(self), (self.padding, self.parts, self.gated, self.dtype)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], leaves: Any) -> Self:
        """Rebuilds without checks: transformations put other things than arrays at the leaves."""
        self = object.__new__(cls)
        self._set(*leaves, *static)
        return self

    def __repr__(self) -> str:
        if not _are_arrays(self):
            return (
                f"Nvfp4Tensor({self.data}, {self.block_scale}, {self.global_scale}, "
                f"padding={self.padding}, dtype={self.dtype})"
            )
        return (
            f"Nvfp4Tensor(shape={self.shape}, dtype={self.dtype}, "
            f"global_scale={_global_scale_name(self)}, nbytes={self.nbytes})"
        )


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class RepackedWeight:
    """A weight in the order that one architecture's GEMM reads, a pytree. Made by `repack`.

    Attributes:
        data: uint8, codes in the architecture's order, padded; two axes, after those of stacked
            weights.
        block_scale: uint8, e4m3 scales in the architecture's order, padded with zeros.
        global_scale: float32, a scalar or one per row (N,); stacked weights have leading axes.
            Of a gated weight, one per row of the data: in its order, padded.
        arch: the architecture, a name of `config.ARCHES` or "reference".
        n: logical rows (output features); of a device's part, in `shard_map`, those of the whole.
        k: logical columns (input features).
        dtype: that the values came from, as of an Nvfp4Tensor.
        parts: as of the Nvfp4Tensor it was made from.
        gated: likewise; the rows of a gated weight are interleaved (`layout.gated`).
    """

    data: jax.Array
    block_scale: jax.Array
    global_scale: jax.Array
    arch: str
    n: int
    k: int
    dtype: Any = jnp.bfloat16  # a jnp.dtype, once it is made
    parts: tuple[int, ...] = ()
    gated: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _source_dtype(self.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, `(..., N, K)`: of a device's part, in `shard_map`, the part's."""
        *lead, rows, _ = self.data.shape
        return (*lead, rows if self._whole_tiles else self.n, self.k)

    @property
    def _whole_tiles(self) -> bool:
        """Whether no rows are padding, so that the rows of the data are the rows."""
        return order(self.arch).whole_tiles(self.n)

    @property
    def ndim(self) -> int:
        """The number of logical axes."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """The number of logical elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes its parts take, padding included."""
        return _nbytes(self)

    def canonical(self) -> Nvfp4Tensor:
        """The tensor it was made from, the same bits."""
        self.check()
        n = self.shape[-2]
        data, block_scale = _unpack(self.arch, self.data, self.block_scale, n, self.k, self.gated)
        global_scale, parts = self.global_scale, self.parts
        if self.gated:
            parts = (n // 2, n // 2)
            if global_scale.ndim == self.ndim - 1:
                global_scale = _deinterleave(self.arch, global_scale, n)
        return Nvfp4Tensor(
            data,
            block_scale,
            global_scale,
            k=self.k,
            parts=parts,
            gated=self.gated,
            dtype=self.dtype,
        )

    def check(self) -> None:
        """Refuses parts that do not belong together, which transformations may have changed.

        Raises:
            TypeError: a part is not an array of its dtype.
            ValueError: the shapes do not belong together.
        """
        _check_dtypes(self, data=jnp.uint8, block_scale=jnp.uint8, global_scale=jnp.float32)
        *lead, n, k = self.shape
        in_order = order(self.arch)
        shapes = in_order.shapes(n, k, gated=self.gated)
        expected = tuple((*lead, *shape) for shape in shapes)
        if (self.data.shape, self.block_scale.shape) != expected:
            raise ValueError(
                f"a weight of shape {self.shape} repacked for {self.arch} has data and block_scale "
                f"of shapes {expected[0]} and {expected[1]}; got {self.data.shape} and "
                f"{self.block_scale.shape} (rows may be divided by whole tiles of "
                f"{in_order.row_tile}, columns may not; what was saved for one arch must be "
                f"restored into a weight repacked for that arch)"
            )
        rows = in_order.gated.rows(n) if self.gated else n
        if self.gated and n % 2:
            raise ValueError(f"a gated weight must have gates and as many ups; got {n} rows")
        if self.global_scale.shape not in ((), tuple(lead), (*lead, rows)):
            raise ValueError(
                f"global_scale must be a scalar or have the leading axes of {(*lead, rows)}; "
                f"got shape {self.global_scale.shape}"
            )

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The values, of shape `(..., N, K)`."""
        return self.canonical().dequantize(dtype)

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[Any, ...]]:
        """The arrays with their names, and what is static."""
        static = (self.arch, self.n, self.k, self.parts, self.gated, self.dtype)
        return _keyed_parts(self), static

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], leaves: Any) -> Self:
        """Rebuilds from the arrays and what is static."""
        arch, n, k, parts, gated, dtype = static
        data, block_scale, global_scale = leaves
        return cls(data, block_scale, global_scale, arch, n, k, dtype, parts, gated)

    def __repr__(self) -> str:
        if not _are_arrays(self):
            return (
                f"RepackedWeight({self.data}, {self.block_scale}, {self.global_scale}, "
                f"arch={self.arch!r}, n={self.n}, k={self.k}, dtype={self.dtype})"
            )
        return (
            f"RepackedWeight(shape={self.shape}, arch={self.arch!r}, dtype={self.dtype}, "
            f"global_scale={_global_scale_name(self)}, nbytes={self.nbytes})"
        )


@functools.partial(jax.jit, static_argnums=(3, 4))
def _dequantize(
    data: jax.Array, block_scale: jax.Array, global_scale: jax.Array, k: int, dtype: Any
) -> jax.Array:
    values = numerics.dequantize(data, block_scale, _expand(global_scale, data.ndim))
    return values[..., :k].astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _unpack(
    arch: str, data: jax.Array, block_scale: jax.Array, n: int, k: int, gated: bool
) -> tuple[jax.Array, jax.Array]:
    return order(arch).unpack(data, block_scale, n, k, gated=gated)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _deinterleave(arch: str, global_scale: jax.Array, n: int) -> jax.Array:
    return order(arch).gated.deinterleave(global_scale, -1, n)


def _blocks(k: int) -> int:
    return ceil_div(k, numerics.BLOCK)


def _serialization(cls: type[Any]) -> None:
    """Lets `jax.export` write and read the pytree type; the last static value is a dtype."""

    def serialize(static: tuple[Any, ...]) -> bytes:
        return json.dumps([*static[:-1], static[-1].name]).encode()

    def deserialize(blob: bytes) -> tuple[Any, ...]:
        *static, dtype = json.loads(blob)
        # JSON makes the tuple of the parts' rows a list.
        return (*(tuple(s) if isinstance(s, list) else s for s in static), jnp.dtype(dtype))

    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jax_nvfp4.{cls.__name__}",
        serialize_auxdata=serialize,
        deserialize_auxdata=deserialize,
    )


_serialization(Nvfp4Tensor)
_serialization(RepackedWeight)
