# SPDX-License-Identifier: Apache-2.0
"""The 128 bytes of a tensor map.

The layout is not documented. It was found by compiling one tiled TMA atom after another with the
CuTe DSL, whose host code writes these bytes itself, and comparing: each field below was seen to
follow its parameter, except the ones marked (assumed). Only the first 64 bytes carry data.

====  =====  ===============================================================
word  bits   field (64-bit words)
====  =====  ===============================================================
0     0-63   global address
1     0-3    2
1     4-6    rank - 1
1     7-10   element type (``TYPE_CODES``)
1     11-12  interleave (assumed)
1     13-14  swizzle: 0 none, 1 32B, 2 64B, 3 128B
1     15     NaN fill (assumed)
1     16     tf32 rounding of f32
1     17-18  L2 promotion
1     19-20  swizzle atom: 0 16B, 1 32B, 2 32B with 8B flip (assumed), 3 64B (assumed)
1     21     set for tensors of 2 MiB and more
1     32-63  stride of dimension 1, in units of 16 bytes
2     0-31   stride of dimension 2; 32-63 of dimension 3
3     0-31   stride of dimension 4
4, 5         extents - 1 of dimensions 0, 1 and 2, 3 (32 bits each)
6     0-31   extent - 1 of dimension 4
6     32-46  element strides - 1, 3 bits each (assumed)
6     56-63  box extent - 1 of dimension 0
7     0-31   box extents - 1 of dimensions 1 to 4, 8 bits each
====  =====  ===============================================================
"""

from __future__ import annotations

import numpy as np

from .errors import Fault
from .tensormap import TensorMap

TYPE_CODES = {
    0: "uint8", 1: "uint16", 2: "uint32", 3: "int32", 4: "uint64", 5: "int64", 6: "float16",
    7: "float32", 8: "float32_ftz", 9: "float64", 10: "bfloat16", 11: "16u4_align8b",
    12: "16u4_align16b", 13: "16u6_align16b",
}  # fmt: skip
SWIZZLE_CODES = {
    (0, 0): "none", (1, 0): "32B", (2, 0): "64B", (3, 0): "128B", (3, 1): "128B_ATOM_32B",
    (3, 3): "128B_ATOM_64B",
}  # fmt: skip


def decode(raw: bytes) -> TensorMap:
    """The fields of a tensor map from its bytes.

    Raises:
        Fault: the bytes are not a tensor map that the machine models.
    """
    words = [int(v) for v in np.frombuffer(raw[:64], np.uint64)]
    flags = words[1] & 0xFFFFFFFF
    if flags & 0xF != 2:
        raise Fault(f"these bytes are no tensor map (tag {flags & 0xF})")
    rank = (flags >> 4 & 7) + 1
    kind = TYPE_CODES.get(flags >> 7 & 0xF)
    if kind is None or flags >> 11 & 3:
        raise Fault(f"tensor map with type code {flags >> 7 & 15}, interleave {flags >> 11 & 3}")
    if kind == "float32" and flags >> 16 & 1:
        kind = "tfloat32"
    swizzle = SWIZZLE_CODES.get((flags >> 13 & 3, flags >> 19 & 3))
    if swizzle is None:
        raise Fault(f"tensor map with swizzle {flags >> 13 & 3} and atom {flags >> 19 & 3}")
    if words[3] >> 32:
        raise Fault("tensor map with a stride of 2^36 bytes or more")
    strides = [words[1] >> 32, words[2] & 0xFFFFFFFF, words[2] >> 32, words[3] & 0xFFFFFFFF]
    extents = [words[4] & 0xFFFFFFFF, words[4] >> 32, words[5] & 0xFFFFFFFF, words[5] >> 32,
               words[6] & 0xFFFFFFFF]  # fmt: skip
    steps = words[6] >> 32 & 0x7FFF
    boxes = [words[6] >> 56] + [words[7] >> (8 * i) & 0xFF for i in range(4)]
    try:
        tensor = TensorMap(
            array=None,
            dims=tuple(e + 1 for e in extents[:rank]),
            strides=tuple(s * 16 for s in strides[: rank - 1]),
            box=tuple(b + 1 for b in boxes[:rank]),
            element_strides=tuple((steps >> (3 * i) & 7) + 1 for i in range(rank)),
            element_type=kind,
            swizzle=swizzle,
            fill="nan" if flags >> 15 & 1 else "zero",
            address=words[0],
        )
    except ValueError as error:
        raise Fault(str(error)) from None
    if tensor.address % 16:
        raise Fault(f"tensor map of unaligned address {tensor.address:#x}")
    return tensor


def encode(tensor: TensorMap) -> bytes:
    """The 128 bytes of a tensor map whose address is set."""
    kind = {"tfloat32": "float32"}.get(tensor.element_type, tensor.element_type)
    code = next(c for c, k in TYPE_CODES.items() if k == kind)
    swizzle, atom = next(k for k, v in SWIZZLE_CODES.items() if v == tensor.swizzle)
    rank = len(tensor.dims)
    flags = 2 | (rank - 1) << 4 | code << 7 | swizzle << 13 | atom << 19
    flags |= (tensor.fill == "nan") << 15 | (tensor.element_type == "tfloat32") << 16
    strides = [s // 16 for s in tensor.strides] + [0] * (5 - rank)
    extents = [d - 1 for d in tensor.dims] + [0] * (5 - rank)
    boxes = [b - 1 for b in tensor.box] + [0] * (5 - rank)
    steps = sum((s - 1) << (3 * i) for i, s in enumerate(tensor.element_strides))
    words = [
        tensor.address,
        flags | strides[0] << 32,
        strides[1] | strides[2] << 32,
        strides[3],
        extents[0] | extents[1] << 32,
        extents[2] | extents[3] << 32,
        extents[4] | steps << 32 | boxes[0] << 56,
        boxes[1] | boxes[2] << 8 | boxes[3] << 16 | boxes[4] << 24,
    ]
    return np.array(words, np.uint64).tobytes() + bytes(64)
