# SPDX-License-Identifier: Apache-2.0
"""The two forms of an NVFP4 tensor: canonical, as on disk, and repacked for one architecture."""

import dataclasses
import json
from typing import Any, Self

import jax
import jax.export
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jax_nvfp4 import numerics
from jax_nvfp4.layout.weights import unpack_weight


def _keyed_parts(tensor: Any) -> tuple[tuple[jax.tree_util.GetAttrKey, Any], ...]:
    """The parts that both forms have, with their names."""
    return tuple(
        (jax.tree_util.GetAttrKey(name), getattr(tensor, name))
        for name in ("data", "block_scale", "global_scale")
    )


def _nbytes(tensor: Any) -> int:
    return sum(part.size * part.dtype.itemsize for _, part in _keyed_parts(tensor))


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
        k: K, the logical length of the last axis.
    """

    data: jax.Array
    block_scale: jax.Array
    global_scale: jax.Array
    k: int

    def __init__(
        self,
        data: Any,
        block_scale: Any,
        global_scale: Any,
        *,
        k: int | None = None,
    ) -> None:
        """Checks and holds the parts.

        Args:
            data: uint8 (..., ceil(k/16)*8).
            block_scale: float8_e4m3fn, or its bits as uint8, (..., ceil(k/16)).
            global_scale: float32, its shape the first axes of `data`'s leading ones, or ().
            k: the logical length of the last axis; `2 * data.shape[-1]` by default.

        Raises:
            TypeError: a part has another dtype.
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
        k = 2 * data.shape[-1] if k is None else int(k)
        blocks = -(-k // numerics.BLOCK)
        if data.shape[-1] != blocks * 8 or k < 0:
            raise ValueError(
                f"data of shape {data.shape} must have ceil(k/16)*8 = {blocks * 8} bytes along "
                f"its last axis for k = {k}"
            )
        if block_scale.shape != (*data.shape[:-1], blocks):
            raise ValueError(
                f"block_scale must have shape {(*data.shape[:-1], blocks)} to go with data of "
                f"shape {data.shape} and k = {k}; got {block_scale.shape}"
            )
        if global_scale.shape != data.shape[: global_scale.ndim] or global_scale.ndim >= data.ndim:
            raise ValueError(
                f"global_scale must be a scalar or have the leading axes of "
                f"{data.shape[:-1]}; got shape {global_scale.shape}"
            )
        self._set(data, block_scale, global_scale, k)

    def _set(self, data: Any, block_scale: Any, global_scale: Any, k: int) -> None:
        for name, value in zip(
            ("data", "block_scale", "global_scale", "k"),
            (data, block_scale, global_scale, k),
            strict=True,
        ):
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, `(..., K)`."""
        return (*self.data.shape[:-1], self.k)

    @property
    def ndim(self) -> int:
        """The number of logical axes."""
        return self.data.ndim

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
        global_scale = _expand(self.global_scale, self.ndim)
        values = numerics.dequantize(self.data, self.block_scale, global_scale)
        return values[..., : self.k].astype(dtype)

    def tree_flatten_with_keys(self) -> tuple[Any, int]:
        """The parts with their names, and k."""
        return _keyed_parts(self), self.k

    @classmethod
    def tree_unflatten(cls, k: int, leaves: Any) -> Self:
        """Rebuilds without checks: transformations put other things than arrays at the leaves."""
        self = object.__new__(cls)
        data, block_scale, global_scale = leaves
        self._set(data, block_scale, global_scale, k)
        return self

    def __repr__(self) -> str:
        if not hasattr(self.data, "shape"):
            return f"Nvfp4Tensor({self.data}, {self.block_scale}, {self.global_scale}, k={self.k})"
        scale = "scalar" if self.global_scale.ndim == 0 else self.global_scale.shape
        return f"Nvfp4Tensor(shape={self.shape}, global_scale={scale}, nbytes={self.nbytes})"


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class RepackedWeight:
    """A weight in the order that one architecture's GEMM reads, a pytree. Made by `repack`.

    Attributes:
        data: uint8, codes in the architecture's order, padded; two axes, after those of stacked
            weights.
        block_scale: uint8, e4m3 scales in the architecture's order, padded with zeros.
        global_scale: float32, a scalar or one per row (N,); stacked weights have leading axes.
        arch: the architecture, a name of `config.ARCHES` or "reference".
        n: logical rows (output features).
        k: logical columns (input features).
    """

    data: jax.Array
    block_scale: jax.Array
    global_scale: jax.Array
    arch: str
    n: int
    k: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, `(..., N, K)`."""
        return (*self.data.shape[:-2], self.n, self.k)

    @property
    def nbytes(self) -> int:
        """The bytes its parts take, padding included."""
        return _nbytes(self)

    def canonical(self) -> Nvfp4Tensor:
        """The tensor it was made from, the same bits."""
        data, block_scale = unpack_weight(self.arch, self.data, self.block_scale, self.n, self.k)
        return Nvfp4Tensor(data, block_scale, self.global_scale, k=self.k)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The values, of shape `(..., N, K)`."""
        return self.canonical().dequantize(dtype)

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[str, int, int]]:
        """The parts with their names, and what is static."""
        return _keyed_parts(self), (self.arch, self.n, self.k)

    @classmethod
    def tree_unflatten(cls, static: tuple[str, int, int], leaves: Any) -> Self:
        """Rebuilds from the parts."""
        data, block_scale, global_scale = leaves
        return cls(data, block_scale, global_scale, *static)

    def __repr__(self) -> str:
        return f"RepackedWeight(arch={self.arch!r}, n={self.n}, k={self.k}, data={self.data!r:.60})"


def _serialization(cls: type[Any]) -> None:
    """Lets `jax.export` write and read the pytree type."""
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jax_nvfp4.{cls.__name__}",
        serialize_auxdata=lambda static: json.dumps(static).encode(),
        deserialize_auxdata=lambda blob: _static(json.loads(blob)),
    )


def _static(decoded: Any) -> Any:
    """JSON makes tuples lists."""
    return tuple(decoded) if isinstance(decoded, list) else decoded


_serialization(Nvfp4Tensor)
_serialization(RepackedWeight)
