# SPDX-License-Identifier: Apache-2.0
"""Warp-level mma.sync: f16, bf16, tf32, 8-bit floats and integers, and block-scaled FP4/FP6/FP8."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from .. import formats as fmt
from ..decode import Closure, Context, op
from ..errors import Fault
from ..parser import Instruction

U32 = np.uint32
LANE = np.arange(32)
ELEMENT_BITS = {
    "f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8, "f64": 64,
    "e2m1": 8, "e3m2": 8, "e2m3": 8,
}  # fmt: skip


@lru_cache
def a_layout(k: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of element e of lane l of the 16 x k operand A, arrays (32, elements).

    Registers hold 32 bits of consecutive k; registers alternate between row groups g and g + 8,
    then move on by half of each 256-bit k span.
    """
    per = 32 // bits
    registers = 16 * k // 32 // per
    group, thread = LANE // 4, LANE % 4
    e = np.arange(registers * per)
    register, position = e // per, e % per
    row = group[:, None] + 8 * (register % 2)[None, :]
    column = (thread * per)[:, None] + position[None, :] + (4 * per) * (register // 2)[None, :]
    return row, column


@lru_cache
def b_layout(k: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(k index, column) of element e of lane l of the k x 8 operand B."""
    per = 32 // bits
    registers = 8 * k // 32 // per
    group, thread = LANE // 4, LANE % 4
    e = np.arange(registers * per)
    register, position = e // per, e % per
    row = (thread * per)[:, None] + position[None, :] + (4 * per) * register[None, :]
    return row, np.broadcast_to(group[:, None], row.shape)


@lru_cache
def c_layout() -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of element e of lane l of the 16 x 8 accumulator."""
    group, thread = LANE // 4, LANE % 4
    e = np.arange(4)
    row = group[:, None] + 8 * (e // 2)[None, :]
    column = (2 * thread)[:, None] + (e % 2)[None, :]
    return row, column


def split_elements(registers: np.ndarray, kind: str, bits: int) -> np.ndarray:
    """float64 values of the elements in (32, n) registers, (32, n * 32 / bits)."""
    raw = np.ascontiguousarray(registers)
    if bits == 4:
        codes = raw.view(np.uint8)
        return fmt.E2M1_PAIRS[codes].reshape(32, -1)
    if bits == 8:
        codes = raw.view(np.uint8)
        if kind == "s8":
            return codes.view(np.int8).astype(np.float64)
        if kind == "u8":
            return codes.astype(np.float64)
        if kind == "e2m1":  # in the middle four bits of each byte
            return fmt.TABLES["e2m1"][(codes >> 2) & 15]
        return fmt.float_values(codes, kind)
    if bits == 16:
        return fmt.float_values(raw.view(np.uint16), kind)
    return fmt.float_values(raw, kind)


@op("mma")
def mma(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    shape = next(p for p in parts if re.fullmatch(r"m\d+n\d+k\d+", p))
    m, n, k = (int(v) for v in re.findall(r"\d+", shape))
    if (m, n) != (16, 8) or "sp" in parts or any(p.startswith("sp::") for p in parts):
        raise ctx.error(f"mma.sync {shape} is not modeled")
    at = parts.index("col")
    dkind, akind, bkind, _ = parts[at + 1 : at + 5]
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
    ra, ca = a_layout(k, bits)
    rb, cb = b_layout(k, bits)
    rc, cc = c_layout()
    scales = _scale_reader(ctx, ins, parts, vectors, k, kind) if scaled else None
    half = dkind == "f16"
    integer = dkind == "s32"

    def run(w) -> None:
        if w.mask is not None:
            raise Fault("mma.sync with inactive lanes")
        R = w.R
        A = np.empty((16, k))
        B = np.empty((k, 8))
        C = np.empty((16, 8))
        A[ra, ca] = split_elements(np.stack([R[i] for i in a], axis=1), akind, bits)
        B[rb, cb] = split_elements(np.stack([R[i] for i in b], axis=1), bkind, bits)
        acc = np.stack([R[i] for i in c], axis=1)
        if half:
            C[rc, cc] = fmt.float_values(np.ascontiguousarray(acc).view(np.uint16), "f16")
        elif integer:
            C[rc, cc] = acc.view(np.int32)
        else:
            C[rc, cc] = acc.view(np.float32)
        if scales is not None:
            sa, sb = scales(R)
            A *= sa
            B *= sb
        D = (A @ B + C)[rc, cc]
        if half:
            out = np.ascontiguousarray(D.astype(np.float16)).view(U32)
        elif integer:
            out = D.astype(np.int64).astype(U32)
        else:
            out = D.astype(np.float32).view(U32)
        for i, d in enumerate(dst):
            R[d] = np.ascontiguousarray(out[:, i])

    return run


def _scale_reader(
    ctx: Context, ins: Instruction, parts: list[str], vectors: list, k: int, kind: str
) -> Callable:
    """Reader of the scale operands: factors (16, k) of A and (k, 8) of B.

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

    def run(R: list) -> tuple[np.ndarray, np.ndarray]:
        byte_a, thread_a = (int(R[i][0]) for i in ids[0])
        byte_b, thread_b = (int(R[i][0]) for i in ids[1])
        for byte, thread, limit in ((byte_a, thread_a, 2), (byte_b, thread_b, 4)):
            allowed = {1: (0, 1, 2, 3), 2: (0, 2), 4: (0,)}[count]
            if byte not in allowed or not 0 <= thread < limit:
                raise Fault(f"block scale selector byte-id {byte}, thread-id {thread}")
        bytes_a = np.ascontiguousarray(R[sa]).view(np.uint8).reshape(32, 4)
        bytes_b = np.ascontiguousarray(R[sb]).view(np.uint8).reshape(32, 4)
        quad = np.arange(8) * 4
        rows = np.concatenate([quad + 2 * thread_a, quad + 2 * thread_a + 1])
        scale_a = table[bytes_a[rows, byte_a : byte_a + count]]  # (16, count)
        scale_b = table[bytes_b[quad + thread_b, byte_b : byte_b + count]]  # (8, count)
        return np.repeat(scale_a, group, axis=1), np.repeat(scale_b, group, axis=1).T

    return run
