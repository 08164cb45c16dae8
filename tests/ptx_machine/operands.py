# SPDX-License-Identifier: Apache-2.0
"""Matrix operands in shared memory: descriptors of wgmma and tcgen05, and their layouts.

A layout is computed in units of 16 bytes: every core matrix row and every swizzle atom is a
multiple of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import formats as fmt
from .errors import Fault
from .memory import SharedMemory

HOPPER_SWIZZLES = {0: "none", 1: "128B", 2: "64B", 3: "32B"}
BLACKWELL_SWIZZLES = {0: "none", 1: "128B_32B", 2: "128B", 4: "64B", 6: "32B"}
SPAN = {"none": 16, "32B": 32, "64B": 64, "128B": 128, "128B_32B": 128}


@dataclass(frozen=True)
class MatrixDescriptor:
    """A decoded 64-bit matrix descriptor.

    Attributes:
        start: byte offset of the matrix in shared memory (18 bits).
        leading: leading dimension byte offset, or an absolute address in ``absolute`` mode.
        stride: stride dimension byte offset.
        swizzle: key of ``SPAN``.
        base_offset: matrix base offset field.
        absolute: leading dimension mode of sm_103's K = 48 bytes.
    """

    start: int
    leading: int
    stride: int
    swizzle: str
    base_offset: int = 0
    absolute: bool = False


def decode_hopper(value: int) -> MatrixDescriptor:
    """Decodes a wgmma descriptor."""
    return MatrixDescriptor(
        start=(value & 0x3FFF) << 4,
        leading=(value >> 16 & 0x3FFF) << 4,
        stride=(value >> 32 & 0x3FFF) << 4,
        swizzle=HOPPER_SWIZZLES[value >> 62 & 3],
        base_offset=value >> 49 & 7,
    )


def decode_blackwell(value: int) -> MatrixDescriptor:
    """Decodes a tcgen05 shared-memory descriptor."""
    if value >> 46 & 7 != 1:
        raise Fault(f"shared-memory descriptor {value:#018x}: bits 46-48 must be 0b001")
    mode = value >> 61 & 7
    if mode not in BLACKWELL_SWIZZLES:
        raise Fault(f"shared-memory descriptor {value:#018x}: swizzle mode {mode}")
    return MatrixDescriptor(
        start=(value & 0x3FFF) << 4,
        leading=(value >> 16 & 0x3FFF) << 4,
        stride=(value >> 32 & 0x3FFF) << 4,
        swizzle=BLACKWELL_SWIZZLES[mode],
        base_offset=value >> 49 & 7,
        absolute=bool(value >> 52 & 1),
    )


def swizzle_address(address: np.ndarray, swizzle: str) -> np.ndarray:
    """Applies a swizzle to byte addresses."""
    if swizzle == "none":
        return address
    if swizzle == "128B_32B":
        return address ^ ((address >> 7 & 3) << 5)
    bits = {"32B": 1, "64B": 2, "128B": 3}[swizzle]
    return address ^ ((address >> 7 & ((1 << bits) - 1)) << 4)


@lru_cache(maxsize=1024)
def chunk_index(
    desc: MatrixDescriptor, k_major: bool, extent: int, k_bytes: int, element_bytes: int
) -> np.ndarray:
    """16-byte chunk numbers of an operand.

    Args:
        desc: the descriptor.
        k_major: whether k runs fastest in memory.
        extent: size of the M or N dimension, elements.
        k_bytes: bytes of a row of K (K-major), or K itself (MN-major).
        element_bytes: bytes of an element (MN-major only).

    Returns:
        K-major: (extent, k_bytes / 16). MN-major: (K, extent * element_bytes / 16).
    """
    if desc.base_offset:
        raise Fault("a matrix base offset other than 0 is not modeled")
    span = SPAN[desc.swizzle]
    if k_major:
        row = np.arange(extent)[:, None]
        chunk = np.arange(k_bytes // 16)[None, :]
        if desc.swizzle == "none":
            offset = row % 8 * 16 + row // 8 * desc.stride + chunk * desc.leading
            address = desc.start + offset
        else:
            address = desc.start + row % 8 * span + row // 8 * desc.stride + chunk * 16
            if desc.absolute:
                # K of 48 bytes: what leaves the 128-byte row continues in the next buffer.
                row_start = desc.start & ~127
                inside = (desc.start & 127) + chunk * 16 < 128
                wrapped = desc.leading + (address - row_start) - 128
                address = np.where(inside, address, wrapped)
            elif (desc.start % span) + k_bytes > span:
                raise Fault(
                    f"operand of {k_bytes} bytes of K at {desc.start:#x} crosses its {span}-byte "
                    "swizzle row"
                )
    else:
        k = np.arange(k_bytes)[:, None]
        chunk = np.arange(extent * element_bytes // 16)[None, :]
        if desc.swizzle == "none":
            address = desc.start + chunk * desc.stride + k % 8 * 16 + k // 8 * desc.leading
        else:
            per = span // 16
            address = (
                desc.start + chunk % per * 16 + chunk // per * desc.leading
                + k % 8 * span + k // 8 * desc.stride
            )  # fmt: skip
    return (swizzle_address(address, desc.swizzle) >> 4).astype(np.int64)


def gather(shared: SharedMemory, index: np.ndarray, action: str) -> np.ndarray:
    """Bytes of chunks, shape index.shape[:-1] + (16 * chunks,), checked to be written."""
    low, high = int(index.min()) * 16, int(index.max()) * 16 + 16
    shared.check_range(low, high, action)
    states = shared.chunk_state[index]
    if not (states == SharedMemory.ALL_WRITTEN[8]).all():
        spread = index[..., None] * 16 + np.arange(16)
        shared.check_readable(spread, action)
    raw = shared.chunks[index]
    return raw.reshape(*index.shape[:-1], -1)


def check_operand(shared: SharedMemory, index: np.ndarray, w, action: str) -> None:
    """Checks, when an operation is issued, that its operand is complete and visible to it."""
    if not (shared.chunk_state[index] == SharedMemory.ALL_WRITTEN[8]).all():
        shared.check_readable((index[..., None] * 16 + np.arange(16)).reshape(-1), action)
    shared.accesses.check_chunks(index, w, action)


def element_values(raw: np.ndarray, kind: str, k_major: bool) -> np.ndarray:
    """float64 values (extent, K) of gathered operand bytes.

    ``raw`` is (extent, bytes) for K-major and (K, bytes) for MN-major operands. Kind ``e2m1x2``
    means two elements in a byte; other sub-byte kinds sit one in a byte.
    """
    if kind == "e2m1x2":
        values = fmt.e2m1_pairs(raw)
    elif kind in ("f16", "bf16"):
        values = fmt.float_values(np.ascontiguousarray(raw).view(np.uint16), kind)
    elif kind in ("tf32", "f32"):
        values = fmt.float_values(np.ascontiguousarray(raw).view(np.uint32), kind)
    elif kind == "s8":
        values = raw.view(np.int8).astype(np.float64)
    elif kind == "u8":
        values = raw.astype(np.float64)
    else:
        values = fmt.float_values(raw, kind)
    return values if k_major else values.T
