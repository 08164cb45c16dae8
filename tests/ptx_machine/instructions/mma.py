# SPDX-License-Identifier: Apache-2.0
"""Warp-level mma.sync: f16, bf16, tf32, 8-bit floats and integers, and block-scaled FP4/FP6/FP8."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .. import formats as fmt
from ..decode import Closure, Context, op
from ..errors import Fault
from ..parser import Instruction

U32 = np.uint32
ACCUMULATORS = {"f32": np.float32, "s32": np.int32, "f16": np.float16}
ELEMENT_BITS = {
    "f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8, "f64": 64,
    "e2m1": 8, "e3m2": 8, "e2m3": 8,
}  # fmt: skip


# Fragments. In bytes the layout is the same for elements of every width: lane 4 * g + t holds in
# one register four bytes of K, from byte 4 * t of row (or column) g.


def a_fragment(registers: np.ndarray) -> np.ndarray:
    """Bytes (16, 8 * n) of the operand A in (n, 32) registers.

    Registers alternate between the rows g and g + 8, then move on by 16 bytes of K.
    """
    parts = registers.view(np.uint8).reshape(-1, 2, 8, 4, 4)  # 16 bytes of K, half, g, t, byte
    return parts.transpose(1, 2, 0, 3, 4).reshape(16, -1)


def b_fragment(registers: np.ndarray) -> np.ndarray:
    """Bytes (8, 16 * n) of the operand B, a column of it in each row, in (n, 32) registers."""
    parts = registers.view(np.uint8).reshape(-1, 8, 4, 4)  # 16 bytes of K, g, t, byte
    return parts.transpose(1, 0, 2, 3).reshape(8, -1)


def c_fragment(registers: np.ndarray, kind: str) -> np.ndarray:
    """The accumulator (16, N) of f32, s32 or f16 in (n, 32) registers.

    Of each eight columns a lane has the columns 2 * t and 2 * t + 1, of row g and then of g + 8;
    f16 pairs share a register.
    """
    if kind == "f16":
        parts = registers.view(np.float16).reshape(-1, 2, 8, 4, 2)  # 8 columns, half, g, t, column
        return parts.transpose(1, 2, 0, 3, 4).reshape(16, -1)
    parts = registers.view(ACCUMULATORS[kind]).reshape(-1, 2, 2, 8, 4)  # 8 columns, half, column
    return parts.transpose(1, 3, 0, 4, 2).reshape(16, -1)


def c_registers(values: np.ndarray, kind: str) -> np.ndarray:
    """Registers (n, 32) of an accumulator, the inverse of `c_fragment`."""
    parts = accumulated(values, kind).reshape(2, 8, -1, 4, 2)
    order = (2, 0, 1, 3, 4) if kind == "f16" else (2, 0, 4, 1, 3)
    return np.ascontiguousarray(parts.transpose(order)).view(U32).reshape(-1, 32)


def accumulated(values: np.ndarray, kind: str) -> np.ndarray:
    """Sums in the type of the accumulators; integers wrap."""
    return (values.astype(np.int64) if kind == "s32" else values).astype(ACCUMULATORS[kind])


def elements(raw: np.ndarray, kind: str, bits: int) -> np.ndarray:
    """float64 values (rows, K) of the bytes of an operand."""
    if bits == 4:
        return fmt.e2m1_pairs(raw)
    if bits == 8:
        if kind == "s8":
            return raw.view(np.int8).astype(np.float64)
        if kind == "u8":
            return raw.astype(np.float64)
        if kind == "e2m1":  # in the middle four bits of each byte
            return fmt.TABLES["e2m1"][(raw >> 2) & 15]
        return fmt.float_values(raw, kind)
    return fmt.float_values(raw.view(np.uint16 if bits == 16 else U32), kind)


@op("mma")
def mma(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    shape = next(p for p in parts if re.fullmatch(r"m\d+n\d+k\d+", p))
    m, n, k = (int(v) for v in re.findall(r"\d+", shape))
    if (m, n) != (16, 8) or "sp" in parts or any(p.startswith("sp::") for p in parts):
        raise ctx.error(f"mma.sync {shape} is not modeled")
    types = [p for p in parts if p in ELEMENT_BITS or p in ACCUMULATORS]
    dkind, akind, bkind, _ = types[:4]
    scaled = "block_scale" in parts
    kind = next((p for p in parts if p.startswith("kind::")), "")
    packed4 = scaled and kind in ("kind::mxf4", "kind::mxf4nvf4")
    bits = 4 if packed4 else ELEMENT_BITS[akind]
    bits_b = 4 if packed4 else ELEMENT_BITS[bkind]
    if bits != bits_b:
        raise ctx.error("mixed element widths")
    if akind == "f64":
        raise ctx.error("mma.sync of f64 is not modeled")
    vectors = [ctx.vector(o) for o in ins.operands]
    dst = [ctx.dst(o) for o in vectors[0]]
    a, b = ([ctx.src(o, "b32") for o in v] for v in vectors[1:3])
    c = [ctx.src(o, "b32") for o in vectors[3]]
    need = (16 * k * bits // 1024, 8 * k * bits // 1024)
    if (len(a), len(b)) != need:
        raise ctx.error(f"{shape} takes {need} registers of A and B, got {(len(a), len(b))}")
    scales = _scale_reader(ctx, ins, parts, vectors, k, kind) if scaled else None

    def run(w) -> None:
        if w.mask is not None:
            raise Fault("mma.sync with inactive lanes")
        R = w.R
        A = elements(a_fragment(np.array([R[i] for i in a])), akind, bits)
        B = elements(b_fragment(np.array([R[i] for i in b])), bkind, bits)
        C = c_fragment(np.array([R[i] for i in c]), dkind)
        if scales is not None:
            scales(R, A, B)
        for d, value in zip(dst, c_registers(A @ B.T + C, dkind), strict=True):
            R[d] = value

    return run


def _scale_reader(
    ctx: Context, ins: Instruction, parts: list[str], vectors: list, k: int, kind: str
) -> Callable:
    """Function that multiplies A (16, k) and B (8, k) in place with the scale operands' factors.

    A's scales of row g + 8 * h sit in the lane of quad g whose index in the quad is
    ``2 * thread-id-a / 2 + h``; B's of column g in the one that thread-id-b names. The byte id
    selects the first of the 1, 2 or 4 bytes.
    """
    default = {"kind::mxf4": "scale_vec::2X", "kind::mxf8f6f4": "scale_vec::1X"}.get(kind, "")
    size = next((p for p in parts if p.startswith("scale_vec::")), default)
    count = int(size[len("scale_vec::")])
    stype = parts[-1]
    table = fmt.TABLES[stype]
    sa, sb = ctx.src(vectors[4][0], "b32"), ctx.src(vectors[6][0], "b32")
    ids = [[ctx.src(o, "u16") for o in vectors[i]] for i in (5, 7)]
    group = k // count

    quad = np.arange(8) * 4

    def run(R: list, A: np.ndarray, B: np.ndarray) -> None:
        byte_a, thread_a = (int(R[i][0]) for i in ids[0])
        byte_b, thread_b = (int(R[i][0]) for i in ids[1])
        for byte, thread, limit in ((byte_a, thread_a, 2), (byte_b, thread_b, 4)):
            allowed = {1: (0, 1, 2, 3), 2: (0, 2), 4: (0,)}[count]
            if byte not in allowed or not 0 <= thread < limit:
                raise Fault(f"block scale selector byte-id {byte}, thread-id {thread}")
        bytes_a = R[sa].view(np.uint8).reshape(32, 4)
        bytes_b = R[sb].view(np.uint8).reshape(32, 4)
        rows = np.concatenate([quad + 2 * thread_a, quad + 2 * thread_a + 1])
        scale_a = table[bytes_a[rows, byte_a : byte_a + count]]  # (16, count)
        scale_b = table[bytes_b[quad + thread_b, byte_b : byte_b + count]]  # (8, count)
        for values, scale in ((A, scale_a), (B, scale_b)):
            values.reshape(-1, count, group)[...] *= scale[:, :, None]

    return run
