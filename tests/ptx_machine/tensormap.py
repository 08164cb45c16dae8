# SPDX-License-Identifier: Apache-2.0
"""Tensor maps: the fields of ``cuTensorMapEncodeTiled`` and the copies they describe."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .errors import Fault

# CUtensorMapDataType: name -> (bits of an element in global memory, code)
ELEMENT_TYPES = {
    "uint8": (8, 0), "uint16": (16, 1), "uint32": (32, 2), "int32": (32, 3), "uint64": (64, 4),
    "int64": (64, 5), "float16": (16, 6), "float32": (32, 7), "float64": (64, 8),
    "bfloat16": (16, 9), "float32_ftz": (32, 10), "tfloat32": (32, 11), "tfloat32_ftz": (32, 12),
    "16u4_align8b": (4, 13), "16u4_align16b": (4, 14), "16u6_align16b": (6, 15),
}  # fmt: skip
FLOAT_TYPES = {"float16", "float32", "float64", "bfloat16", "float32_ftz", "tfloat32",
               "tfloat32_ftz"}  # fmt: skip
NAN_BITS = {"float16": 0x7FFF, "bfloat16": 0x7FFF, "float32": 0x7FFFFFFF,
            "float32_ftz": 0x7FFFFFFF, "tfloat32": 0x7FFFFFFF, "tfloat32_ftz": 0x7FFFFFFF,
            "float64": 0x7FFFFFFFFFFFFFFF}  # fmt: skip
# (bits, lowest target bit, distance): target bits are xored with the bits ``distance`` above.
SWIZZLES = {
    "none": (0, 4, 3), "32B": (1, 4, 3), "64B": (2, 4, 3), "128B": (3, 4, 3),
    "128B_ATOM_32B": (2, 5, 2), "128B_ATOM_64B": (1, 6, 1),
}  # fmt: skip
SPANS = {"none": 16, "32B": 32, "64B": 64, "128B": 128, "128B_ATOM_32B": 128,
         "128B_ATOM_64B": 128}  # fmt: skip


@dataclass(eq=False)
class TensorMap:
    """A tiled tensor map.

    Attributes:
        array: the global array (any dtype; its bytes are what counts), or None when ``address`` is
            given.
        dims: extent of each dimension in elements, innermost first.
        strides: byte stride of dimensions 1, 2, ... (one fewer than dims).
        box: extent of the copied box in each dimension, elements.
        element_strides: traversal stride of each dimension; default all 1.
        element_type: a key of ``ELEMENT_TYPES``.
        swizzle: "none", "32B", "64B", "128B", "128B_ATOM_32B" or "128B_ATOM_64B".
        fill: "zero" or "nan", what out-of-bounds elements read as.
        interleave: only "none".
        offset: byte offset of the tensor in the array.
        address: device address of the tensor; set when the map is placed in a memory.
    """

    array: np.ndarray | None
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...] | None = None
    element_type: str = "uint8"
    swizzle: str = "none"
    fill: str = "zero"
    interleave: str = "none"
    offset: int = 0
    address: int | None = None
    _plans: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.dims = tuple(int(d) for d in self.dims)
        self.strides = tuple(int(s) for s in self.strides)
        self.box = tuple(int(b) for b in self.box)
        if self.element_strides is None:
            self.element_strides = (1,) * len(self.dims)
        self.element_strides = tuple(int(s) for s in self.element_strides)
        rank = len(self.dims)
        if not 1 <= rank <= 5 or len(self.box) != rank or len(self.strides) != rank - 1:
            raise ValueError(
                f"tensor map: rank {rank} with box {self.box} and strides {self.strides}"
            )
        if self.element_type not in ELEMENT_TYPES:
            raise ValueError(f"tensor map: unknown element type {self.element_type!r}")
        if self.swizzle not in SWIZZLES:
            raise ValueError(f"tensor map: unknown swizzle {self.swizzle!r}")
        if self.fill not in ("zero", "nan"):
            raise ValueError(f"tensor map: unknown fill {self.fill!r}")
        if self.fill == "nan" and self.element_type not in FLOAT_TYPES:
            raise ValueError(f"tensor map: NaN fill of {self.element_type}")
        if self.interleave != "none":
            raise ValueError("tensor map: interleaved layouts are not modeled")
        for d in self.dims:
            if not 1 <= d <= 1 << 32:
                raise ValueError(f"tensor map: dims {self.dims} not in [1, 2^32]")
        multiple = 32 if self.element_type in ("16u4_align16b", "16u6_align16b") else 16
        for s in self.strides:
            if s % multiple or not 0 <= s < 1 << 40:
                raise ValueError(f"tensor map: byte stride {s} is not a multiple of {multiple}")
        for b in self.box:
            if not 1 <= b <= 256:
                raise ValueError(f"tensor map: box {self.box} not in [1, 256]")
        for s in self.element_strides:
            if not 1 <= s <= 8:
                raise ValueError(f"tensor map: element strides {self.element_strides}")
        inner = self.inner_bytes
        if inner % 16:
            raise ValueError(f"tensor map: inner box dimension is {inner} bytes, not 16's multiple")
        span = SPANS[self.swizzle]
        if self.swizzle != "none" and inner > span:
            raise ValueError(
                f"tensor map: inner box dimension of {inner} bytes, its swizzle spans {span}"
            )
        if self.element_type == "16u4_align16b" and (self.dims[0] % 128 or self.box[0] != 128):
            raise ValueError("tensor map: 16u4_align16b needs dims[0] % 128 == 0 and box[0] == 128")
        if self.element_type == "16u4_align8b" and self.dims[0] % 2:
            raise ValueError("tensor map: 16u4_align8b needs an even dims[0]")

    # -- sizes -------------------------------------------------------------------------------
    @property
    def bits(self) -> int:
        """Bits of an element in global memory."""
        return ELEMENT_TYPES[self.element_type][0]

    @property
    def inner_bytes(self) -> int:
        """Bytes of the innermost box row in shared memory."""
        count = -(-self.box[0] // self.element_strides[0])
        if self.element_type in ("16u4_align16b", "16u6_align16b"):
            return count  # 16 elements occupy 16 bytes
        return count * self.bits // 8

    @property
    def counts(self) -> tuple[int, ...]:
        """Elements of the box in each dimension."""
        return tuple(-(-b // s) for b, s in zip(self.box, self.element_strides, strict=True))

    @property
    def box_bytes(self) -> int:
        """Bytes of the box in shared memory: what one copy adds to complete_tx."""
        rows = 1
        for c in self.counts[1:]:
            rows *= c
        return self.inner_bytes * rows

    # -- placement ---------------------------------------------------------------------------
    def place(self, memory, name: str, fresh: set = frozenset()) -> None:
        """Registers the array in global memory and computes the tensor's address."""
        self._plans.clear()
        if self.array is not None:
            allocation = memory.register(
                self.array, name, uninitialized=self.array.ctypes.data in fresh
            )
            self.address = allocation.base + self.offset
        if self.address is None or self.address % 16:
            raise ValueError(f"tensor map: global address {self.address} is not 16-byte aligned")

    @classmethod
    def from_descriptor(cls, raw: bytes) -> TensorMap:
        """Decodes the 128 bytes of a tensor map (see descriptor.py)."""
        from .descriptor import decode

        return decode(raw)

    # -- copies ------------------------------------------------------------------------------
    def _rows(self, coordinates: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Byte address and validity of each row of the box, outer dimensions in row-major order."""
        address = np.zeros(1, np.int64)
        valid = np.ones(1, bool)
        for d in range(len(self.dims) - 1, 0, -1):
            index = coordinates[d] + np.arange(self.counts[d]) * self.element_strides[d]
            inside = (index >= 0) & (index < self.dims[d])
            address = (address[:, None] + (index * self.strides[d - 1])[None, :]).reshape(-1)
            valid = (valid[:, None] & inside[None, :]).reshape(-1)
        return address + self.address, valid

    def _columns(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Byte offsets in a row and their validity, for the bytes as they lie in global memory."""
        step = self.element_strides[0]
        if self.bits < 8:
            if start % 2 or step != 1:
                raise Fault(f"tensor copy: odd coordinate {start} of a sub-byte element type")
            count = self.counts[0] * self.bits // 8
            offsets = start * self.bits // 8 + np.arange(count)
            return offsets, (offsets >= 0) & (offsets < self.dims[0] * self.bits // 8)
        width = self.bits // 8
        index = start + np.arange(self.counts[0]) * step
        inside = (index >= 0) & (index < self.dims[0])
        offsets = (index[:, None] * width + np.arange(width)).reshape(-1)
        return offsets, np.repeat(inside, width)

    def read_box(self, memory, coordinates: tuple[int, ...]) -> np.ndarray:
        """The box as the bytes a copy writes to shared memory, before the swizzle."""
        rows, row_valid = self._rows(coordinates)
        columns, column_valid = self._columns(coordinates[0])
        out = np.zeros((rows.size, columns.size), np.uint8)
        if self.fill == "nan":
            width = self.bits // 8
            nan = np.frombuffer(NAN_BITS[self.element_type].to_bytes(width, "little"), np.uint8)
            out[:] = np.tile(nan, columns.size // width)
        if row_valid.any() and column_valid.any():
            good_rows, good_columns = rows[row_valid], columns[column_valid]
            low = int(good_rows.min() + good_columns.min())
            high = int(good_rows.max() + good_columns.max()) + 1
            allocation = memory.find(low, high, "tensor copy reads")
            index = good_rows[:, None] + good_columns[None, :] - allocation.base
            if allocation.state is not None and not allocation.state[index].all():
                raise Fault(f"read of bytes of {allocation.name} that were never written")
            out[np.ix_(row_valid, column_valid)] = allocation.data[index]
        if self.element_type == "16u4_align16b":
            padded = np.zeros((rows.size, out.shape[1] // 8, 16), np.uint8)
            padded[:, :, :8] = out.reshape(rows.size, -1, 8)
            return padded.reshape(-1)
        if self.element_type == "16u6_align16b":
            padded = np.zeros((rows.size, out.shape[1] // 12, 16), np.uint8)
            padded[:, :, :12] = out.reshape(rows.size, -1, 12)
            return padded.reshape(-1)
        return out.reshape(-1)

    def box_bytes_at(self, memory, coordinates: tuple[int, ...], action: str) -> tuple | None:
        """The allocation and the in-bounds bytes of a box in it, or None where there are none."""
        rows, row_valid = self._rows(coordinates)
        columns, column_valid = self._columns(coordinates[0])
        if not (row_valid.any() and column_valid.any()):
            return None
        rows, columns = rows[row_valid], columns[column_valid]
        low, high = int(rows.min() + columns.min()), int(rows.max() + columns.max()) + 1
        allocation = memory.find(low, high, action)
        return allocation, rows[:, None] + columns[None, :] - allocation.base

    def write_box(
        self, memory, coordinates: tuple[int, ...], values: np.ndarray, combine=None
    ) -> None:
        """Stores (or with ``combine`` reduces) box bytes; out-of-bounds elements are dropped."""
        if self.element_type in ("16u4_align16b", "16u6_align16b"):
            raise Fault(f"tensor store of element type {self.element_type}")
        rows, row_valid = self._rows(coordinates)
        columns, column_valid = self._columns(coordinates[0])
        if not (row_valid.any() and column_valid.any()):
            return
        allocation, index = self.box_bytes_at(memory, coordinates, "tensor copy writes")
        if allocation.read_only:
            raise Fault(f"write to read-only {allocation.name}")
        data = values.reshape(rows.size, columns.size)[np.ix_(row_valid, column_valid)]
        if combine is not None:
            old = np.ascontiguousarray(allocation.data[index])
            data = combine(old, np.ascontiguousarray(data))
        allocation.data[index] = data
        if allocation.state is not None:
            allocation.state[index] = 1


def swizzle_offsets(start: int, count: int, swizzle: str) -> np.ndarray:
    """Shared memory offsets of ``count`` consecutive box bytes that start at ``start``.

    The pattern xors address bits [4, 4 + b) with bits [7, 7 + b), b = 1, 2, 3 for 32B, 64B, 128B.
    """
    linear = start + np.arange(count)
    bits, low, distance = SWIZZLES[swizzle]
    return linear ^ (((linear >> (low + distance)) & ((1 << bits) - 1)) << low)
