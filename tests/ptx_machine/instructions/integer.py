# SPDX-License-Identifier: Apache-2.0
"""Integer, logic, shift, comparison and selection instructions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..decode import Closure, Context, elementwise, op, pair, put, storage, where
from ..parser import TYPE_BYTES, Imm, Instruction
from . import floating

SIGNED = {2: np.int16, 4: np.int32, 8: np.int64}
U32, U64 = np.uint32, np.uint64


def is_float(kind: str) -> bool:
    return kind in floating.FLOAT_KINDS


def bits_of(kind: str) -> int:
    return 8 * TYPE_BYTES[kind]


def signed_view(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """Function that reads registers of a type as signed or unsigned numbers."""
    if kind.startswith("s"):
        dtype = SIGNED[max(TYPE_BYTES[kind], 2)]
        return lambda x: x.view(dtype)
    return lambda x: x


def back(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """Function that turns results into the storage of a type."""
    dtype = storage(kind)
    return lambda x: x.view(dtype) if x.dtype.itemsize == dtype().itemsize else x.astype(dtype)


def simple(ctx: Context, ins: Instruction, kind: str, fn: Callable, sources: int) -> Closure:
    """Lane-wise instruction whose sources all have the destination's type."""
    dst = ctx.dst(ins.operands[0])
    srcs = [ctx.src(o, kind) for o in ins.operands[1 : 1 + sources]]
    return elementwise(fn, dst, *srcs)


# -- add, sub, mul, mad ------------------------------------------------------------------------
def _saturated(kind: str, fn: Callable) -> Callable:
    info = np.iinfo(np.int32)

    def run(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        wide = fn(a.view(np.int32).astype(np.int64), b.view(np.int32).astype(np.int64))
        return np.clip(wide, info.min, info.max).astype(np.int32).view(U32)

    return run


@op("add", "sub")
def add_sub(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    kind = parts[-1]
    if is_float(kind):
        return floating.arithmetic(ctx, ins)
    fn = np.add if parts[0] == "add" else np.subtract
    if "cc" in parts:
        return _carry(ctx, ins, parts[0], out=True, use=False)
    if "sat" in parts:
        return simple(ctx, ins, kind, _saturated(kind, fn), 2)
    return simple(ctx, ins, kind, fn, 2)


def _carry(ctx: Context, ins: Instruction, name: str, out: bool, use: bool) -> Closure:
    kind = ins.parts[-1]
    dst = ctx.dst(ins.operands[0])
    a, b = (ctx.src(o, kind) for o in ins.operands[1:3])
    width = bits_of(kind)
    dtype = storage(kind)
    top = (1 << width) - 1

    def run(w) -> None:
        x, y = w.R[a].astype(object), w.R[b].astype(object)
        carry = w.token.get("cc", np.zeros(32, object)) if use else 0
        if name.startswith("sub"):
            total = x - y - carry
            flag = np.array([int(t < 0) for t in total], object)
        else:
            total = x + y + carry
            flag = np.array([int(t > top) for t in total], object)
        put(w, dst, np.array([int(t) & top for t in total], dtype))
        if out:
            w.token["cc"] = flag

    return run


@op("addc", "subc")
def addc(ctx: Context, ins: Instruction) -> Closure:
    return _carry(ctx, ins, ins.parts[0], out="cc" in ins.parts, use=True)


def _multiply(kind: str, part: str) -> Callable:
    view = signed_view(kind)
    size = TYPE_BYTES[kind]
    signed = kind.startswith("s")
    if part == "lo":
        return np.multiply
    if size <= 4:
        wide = {2: np.int32 if signed else U32, 4: np.int64 if signed else U64}[size]
        dtype = storage(kind)
        if part == "wide":
            out = U32 if size == 2 else U64
            return lambda a, b: (view(a).astype(wide) * view(b).astype(wide)).view(out)
        shift = wide(8 * size)
        return lambda a, b: ((view(a).astype(wide) * view(b).astype(wide)) >> shift).astype(dtype)

    def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        product = view(a).astype(object) * view(b).astype(object)
        return np.array([(int(p) >> 64) & 0xFFFFFFFFFFFFFFFF for p in product], U64)

    return high


@op("mul")
def mul(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    kind = parts[-1]
    if is_float(kind):
        return floating.arithmetic(ctx, ins)
    part = next(p for p in parts if p in ("lo", "hi", "wide"))
    return simple(ctx, ins, kind, _multiply(kind, part), 2)


@op("mad")
def mad(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    kind = parts[-1]
    if is_float(kind):
        return floating.fma(ctx, ins)
    if "cc" in parts or "sat" in parts:
        raise ctx.error("mad.cc and mad.sat are not modeled")
    part = next(p for p in parts if p in ("lo", "hi", "wide"))
    product = _multiply(kind, part)
    dst = ctx.dst(ins.operands[0])
    a, b = (ctx.src(o, kind) for o in ins.operands[1:3])
    wide = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}.get(kind, kind)
    c = ctx.src(ins.operands[3], wide if part == "wide" else kind)
    return elementwise(lambda x, y, z: product(x, y) + z, dst, a, b, c)


@op("mul24", "mad24")
def mul24(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    kind = parts[-1]
    low = "lo" in parts

    def value(x: np.ndarray) -> np.ndarray:
        wide = x.astype(np.int64) & 0xFFFFFF
        return (wide ^ 0x800000) - 0x800000 if kind == "s32" else wide

    def product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        p = value(x) * value(y)
        return (p if low else p >> 16).astype(U32)

    if parts[0] == "mul24":
        return simple(ctx, ins, kind, product, 2)
    return simple(ctx, ins, kind, lambda x, y, z: product(x, y) + z, 3)


@op("sad")
def sad(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]
    view = signed_view(kind)
    return simple(ctx, ins, kind, lambda a, b, c: c + where(view(a) < view(b), b - a, a - b), 3)


# -- div, rem ----------------------------------------------------------------------------------
def _divide(kind: str, remainder: bool) -> Callable:
    view, to = signed_view(kind), back(kind)
    signed = kind.startswith("s")

    def run(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        x, y = view(a), view(b)
        zero = y == 0
        safe = where(zero, y.dtype.type(1), y)
        if signed:
            wide_x, wide_y = x.astype(np.int64), safe.astype(np.int64)
            if x.dtype.itemsize == 8:
                q = np.array(
                    [
                        abs(int(i)) // abs(int(j)) * (1 if (i < 0) == (j < 0) else -1)
                        for i, j in zip(x, safe, strict=True)
                    ],
                    object,
                )
                q = np.array([int(v) & 0xFFFFFFFFFFFFFFFF for v in q], U64).view(np.int64)
            else:
                q = (np.abs(wide_x) // np.abs(wide_y)) * where((wide_x < 0) == (wide_y < 0), 1, -1)
            r = wide_x - q * wide_y
            result = (r if remainder else q).astype(x.dtype)
        else:
            result = x % safe if remainder else x // safe
        # Division by zero gives all ones, as the hardware does; the ISA leaves it undefined.
        bad = x if remainder else np.full_like(x, -1 if signed else np.iinfo(x.dtype).max)
        return to(where(zero, bad, result))

    return run


@op("div", "rem")
def div_rem(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]
    if is_float(kind):
        return floating.arithmetic(ctx, ins)
    return simple(ctx, ins, kind, _divide(kind, ins.parts[0] == "rem"), 2)


# -- one-operand and min/max -------------------------------------------------------------------
@op("abs")
def absolute(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]
    if is_float(kind):
        return floating.sign_op(ctx, ins)
    view, to = signed_view(kind), back(kind)
    return simple(ctx, ins, kind, lambda a: to(np.abs(view(a))), 1)


@op("neg")
def negate(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]
    if is_float(kind):
        return floating.sign_op(ctx, ins)
    return simple(ctx, ins, kind, lambda a: ~a + a.dtype.type(1), 1)


@op("min", "max")
def min_max(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]
    if is_float(kind):
        return floating.min_max(ctx, ins)
    fn = np.minimum if ins.parts[0] == "min" else np.maximum
    if kind in ("u16x2", "s16x2"):
        dtype = np.int16 if kind[0] == "s" else np.uint16
        relu = "relu" in ins.parts

        def packed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            value = fn(a.view(dtype), b.view(dtype))
            return (np.maximum(value, 0) if relu else value).astype(dtype).view(U32)

        return simple(ctx, ins, "b32", packed, 2)
    view, to = signed_view(kind), back(kind)
    if "relu" in ins.parts:
        return simple(ctx, ins, kind, lambda a, b: to(np.maximum(fn(view(a), view(b)), 0)), 2)
    return simple(ctx, ins, kind, lambda a, b: to(fn(view(a), view(b))), 2)


@op("popc")
def popc(ctx: Context, ins: Instruction) -> Closure:
    return simple(ctx, ins, ins.parts[-1], lambda a: np.bitwise_count(a).astype(U32), 1)


def _leading_zeros(x: np.ndarray, width: int) -> np.ndarray:
    value = x.copy()
    for shift in (1, 2, 4, 8, 16, 32):
        if shift < width:
            value |= value >> value.dtype.type(shift)
    return (width - np.bitwise_count(value)).astype(U32)


@op("clz")
def clz(ctx: Context, ins: Instruction) -> Closure:
    width = bits_of(ins.parts[-1])
    return simple(ctx, ins, ins.parts[-1], lambda a: _leading_zeros(a, width), 1)


@op("bfind")
def bfind(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]
    width = bits_of(kind)
    view = signed_view(kind)
    shiftamt = "shiftamt" in ins.parts

    def run(a: np.ndarray) -> np.ndarray:
        x = where(view(a) < 0, ~a, a) if kind[0] == "s" else a
        zeros = _leading_zeros(x, width)
        result = zeros if shiftamt else U32(width - 1) - zeros
        return where(x == 0, U32(0xFFFFFFFF), result)

    return simple(ctx, ins, kind, run, 1)


@op("brev")
def brev(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]

    def run(a: np.ndarray) -> np.ndarray:
        raw = np.ascontiguousarray(a).view(np.uint8).reshape(a.size, -1)
        bits = np.unpackbits(raw, axis=1, bitorder="little")[:, ::-1]
        return np.packbits(bits, axis=1, bitorder="little").view(a.dtype).reshape(-1)

    return simple(ctx, ins, kind, run, 1)


# -- bit fields --------------------------------------------------------------------------------
@op("bfe")
def bfe(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]
    width = bits_of(kind)
    dst = ctx.dst(ins.operands[0])
    a = ctx.src(ins.operands[1], kind)
    b, c = ctx.src(ins.operands[2], "u32"), ctx.src(ins.operands[3], "u32")
    dtype = storage(kind)
    signed = kind[0] == "s"

    def run(x: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        pos = (position & U32(0xFF)).astype(np.int64)
        count = (length & U32(0xFF)).astype(np.int64)
        out = []
        for value, p, n in zip(x, pos, count, strict=True):
            v, p, n = int(value), int(p), int(n)
            sign = (v >> min(p + n - 1, width - 1)) & 1 if signed and n else 0
            field = (v >> p) & ((1 << n) - 1) if p < width else 0
            have = min(n, max(width - p, 0))
            if sign:
                field |= ((1 << width) - 1) & ~((1 << have) - 1)
            out.append(field & ((1 << width) - 1))
        return np.array(out, dtype)

    def run32(x: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        p = (position & U32(0xFF)).astype(np.int64)
        n = np.minimum((length & U32(0xFF)).astype(np.int64), 32)
        value = (x.view(np.int32) if signed else x).astype(np.int64)
        field = (value >> np.minimum(p, 63)) & ((1 << n) - 1)
        if signed:
            sign = (value >> np.minimum(p + n - 1, 31)) & 1
            field = where((n > 0) & (sign != 0), field | ~((1 << n) - 1), field)
        return where(n == 0, 0, field).astype(U32)

    return elementwise(run32 if width == 32 else run, dst, a, b, c)


@op("bfi")
def bfi(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]
    width = bits_of(kind)
    dst = ctx.dst(ins.operands[0])
    a, b = (ctx.src(o, kind) for o in ins.operands[1:3])
    c, d = (ctx.src(o, "u32") for o in ins.operands[3:5])
    dtype = storage(kind)

    def run(x, y, position, length) -> np.ndarray:
        p = (position & U32(0xFF)).astype(U64)
        n = np.minimum((length & U32(0xFF)).astype(U64), U64(width))
        ones = where(n >= 64, ~U64(0), (U64(1) << np.minimum(n, U64(63))) - U64(1))
        mask = where(p < 64, ones << np.minimum(p, U64(63)), U64(0))
        mask = where(p >= width, U64(0), mask)
        shifted = where(p < 64, x.astype(U64) << np.minimum(p, U64(63)), U64(0))
        return ((y.astype(U64) & ~mask) | (shifted & mask)).astype(dtype)

    return elementwise(run, dst, a, b, c, d)


@op("bmsk")
def bmsk(ctx: Context, ins: Instruction) -> Closure:
    clamp = "clamp" in ins.parts

    def run(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        p, n = a.astype(np.int64), b.astype(np.int64)
        if clamp:
            p, n = np.minimum(p, 32), np.minimum(n, 32)
        else:
            p, n = p & 31, n & 31
        return ((((1 << n) - 1) << p) & 0xFFFFFFFF).astype(U32)

    return simple(ctx, ins, "b32", run, 2)


@op("szext")
def szext(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]
    clamp = "clamp" in ins.parts

    def run(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        n = b.astype(np.int64)
        n = np.minimum(n, 32) if clamp else n & 31
        value = a.astype(np.int64) & ((1 << n) - 1)
        if kind[0] == "s":
            sign = where(n > 0, (value >> np.maximum(n - 1, 0)) & 1, 0)
            value = value - (sign << n)
        return value.astype(U32)

    return simple(ctx, ins, "b32", run, 2)


# -- logic and shifts --------------------------------------------------------------------------
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@op("and", "or", "xor")
def logic(ctx: Context, ins: Instruction) -> Closure:
    return simple(ctx, ins, ins.parts[-1], _LOGIC[ins.parts[0]], 2)


@op("not")
def bit_not(ctx: Context, ins: Instruction) -> Closure:
    return simple(ctx, ins, ins.parts[-1], np.invert, 1)


@op("cnot")
def cnot(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]
    dtype = storage(kind)
    return simple(ctx, ins, kind, lambda a: (a == 0).astype(dtype), 1)


@op("lop3")
def lop3(ctx: Context, ins: Instruction) -> Closure:
    first, second = pair(ins.operands[0])
    boolean = [p for p in ins.parts if p in ("or", "and")]
    dst = ctx.dst(first)
    pdst = ctx.dst(second)
    a, b, c = (ctx.src(o, "b32") for o in ins.operands[1:4])
    table = int(ins.operands[4].value) & 0xFF
    q = ctx.pred(ins.operands[5]) if boolean else None

    def fn(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        result = np.zeros(32, U32)
        for bit in range(8):
            if table >> bit & 1:
                result |= (x if bit & 4 else ~x) & (y if bit & 2 else ~y) & (z if bit & 1 else ~z)
        return result

    quick = {
        0x80: lambda x, y, z: x & y & z, 0xFE: lambda x, y, z: x | y | z,
        0x96: lambda x, y, z: x ^ y ^ z, 0xEA: lambda x, y, z: (x & y) | z,
        0xF8: lambda x, y, z: x | (y & z), 0xCA: lambda x, y, z: (x & y) | (~x & z),
        0xC0: lambda x, y, z: x & y, 0xFC: lambda x, y, z: x | y, 0x3C: lambda x, y, z: x ^ y,
        0x6A: lambda x, y, z: (x & y) ^ z, 0x78: lambda x, y, z: x ^ (y & z),
        0xE2: lambda x, y, z: (x & y) | (z & ~y), 0xE8: lambda x, y, z: (x & y) | (z & (x | y)),
        0xA8: lambda x, y, z: (x | y) & z, 0xE0: lambda x, y, z: x & (y | z),
    }  # fmt: skip
    use = quick.get(table, fn)
    if not boolean:
        return elementwise(use, dst, a, b, c)

    def run(w) -> None:
        value = use(w.R[a], w.R[b], w.R[c])
        flag = value != 0
        other = q(w.R)
        put(w, dst, value)
        put(w, pdst, flag | other if boolean[0] == "or" else flag & other)

    return run


@op("shl", "shr")
def shift(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]
    width = bits_of(kind)
    dst = ctx.dst(ins.operands[0])
    a, b = ctx.src(ins.operands[1], kind), ctx.src(ins.operands[2], "u32")
    dtype = storage(kind)
    fixed = getattr(ins.operands[2], "value", None)
    if ins.parts[0] == "shl":
        if isinstance(fixed, int) and 0 <= fixed < width:
            amount = dtype(fixed)
            return elementwise(lambda x: x << amount, dst, a)

        def left(x: np.ndarray, n: np.ndarray) -> np.ndarray:
            small = np.minimum(n, U32(width - 1)).astype(dtype)
            return where(n >= width, dtype(0), x << small)

        return elementwise(left, dst, a, b)
    if kind[0] == "s":
        signed = SIGNED[TYPE_BYTES[kind]]
        if isinstance(fixed, int):
            amount = signed(min(fixed, width - 1))
            return elementwise(lambda x: (x.view(signed) >> amount).view(dtype), dst, a)

        def arithmetic(x: np.ndarray, n: np.ndarray) -> np.ndarray:
            return (x.view(signed) >> np.minimum(n, U32(width - 1)).astype(signed)).view(dtype)

        return elementwise(arithmetic, dst, a, b)
    if isinstance(fixed, int) and 0 <= fixed < width:
        amount = dtype(fixed)
        return elementwise(lambda x: x >> amount, dst, a)

    def right(x: np.ndarray, n: np.ndarray) -> np.ndarray:
        small = np.minimum(n, U32(width - 1)).astype(dtype)
        return where(n >= width, dtype(0), x >> small)

    return elementwise(right, dst, a, b)


@op("shf")
def funnel(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    wrap = "wrap" in parts
    left = "l" in parts

    def run(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        n = (c & U32(31) if wrap else np.minimum(c, U32(32))).astype(U64)
        wide = (b.astype(U64) << U64(32)) | a
        if left:
            return ((wide << n) >> U64(32)).astype(U32)
        return (wide >> n).astype(U32)

    dst = ctx.dst(ins.operands[0])
    srcs = [ctx.src(o, "b32") for o in ins.operands[1:4]]
    return elementwise(run, dst, *srcs)


@op("dp4a", "dp2a")
def dot(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    kinds = parts[-2], parts[-1]

    def unpack(x: np.ndarray, kind: str, size: int) -> np.ndarray:
        names = {("u", 1): np.uint8, ("s", 1): np.int8, ("u", 2): np.uint16, ("s", 2): np.int16}
        dtype = names[kind[0], size]
        return x.view(dtype).reshape(32, -1).astype(np.int64)

    if parts[0] == "dp4a":

        def run(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
            total = (unpack(a, kinds[0], 1) * unpack(b, kinds[1], 1)).sum(axis=1)
            return (total + c).astype(U32)
    else:
        half = slice(0, 2) if "lo" in parts else slice(2, 4)

        def run(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
            total = (unpack(a, kinds[0], 2) * unpack(b, kinds[1], 1)[:, half]).sum(axis=1)
            return (total + c).astype(U32)

    return simple(ctx, ins, "b32", run, 3)


# -- comparison and selection ------------------------------------------------------------------
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip


def comparison(ctx: Context, parts: list[str]) -> Callable:
    """The comparison of a set, setp instruction on registers of its type."""
    kind = next(p for p in reversed(parts) if p in TYPE_BYTES and p != "pred")
    name = parts[1]
    if is_float(kind):
        return floating.comparison(name, kind, "ftz" in parts)
    view = signed_view(kind)
    fn = COMPARE[name]
    if kind[0] != "s":
        return fn
    return lambda a, b: fn(view(a), view(b))


@op("setp")
def setp(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    kind = parts[-1]
    if kind in ("f16x2", "bf16x2"):
        return floating.setp_packed(ctx, ins)
    fn = comparison(ctx, parts)
    first, second = pair(ins.operands[0])
    dst, dst2 = ctx.dst(first), ctx.dst(second)
    a, b = (ctx.src(o, kind) for o in ins.operands[1:3])
    boolean = next((p for p in parts[2:] if p in ("and", "or", "xor")), None)
    if boolean is None and dst2 < 0 and dst >= 0:
        return elementwise(fn, dst, a, b)
    q = ctx.pred(ins.operands[3]) if boolean else None
    combine = _LOGIC.get(boolean or "")

    def run(w) -> None:
        flag = fn(w.R[a], w.R[b])
        other = ~flag
        if q is not None:
            c = q(w.R)
            flag, other = combine(flag, c), combine(other, c)
        put(w, dst, flag)
        put(w, dst2, other)

    return run


@op("set")
def set_(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    kinds = [p for p in parts if p in TYPE_BYTES]
    out, kind = kinds[0], kinds[1]
    fn = comparison(ctx, parts)
    dst = ctx.dst(ins.operands[0])
    a, b = (ctx.src(o, kind) for o in ins.operands[1:3])
    boolean = next((p for p in parts[2:] if p in ("and", "or", "xor")), None)
    q = ctx.pred(ins.operands[3]) if boolean else None
    true = U32(0x3F800000) if out == "f32" else U32(0xFFFFFFFF)
    if out in ("f16", "bf16", "f16x2", "bf16x2"):
        raise ctx.error("set to half types is not modeled")

    def run(w) -> None:
        flag = fn(w.R[a], w.R[b])
        if q is not None:
            flag = _LOGIC[boolean](flag, q(w.R))
        put(w, dst, where(flag, true, U32(0)))

    return run


@op("selp")
def selp(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]
    dst = ctx.dst(ins.operands[0])
    a, b = (ctx.src(o, kind) for o in ins.operands[1:3])
    p = ctx.pred(ins.operands[3])

    def run(w) -> None:
        R = w.R
        value = where(p(R), R[a], R[b])
        m = w.mask
        R[dst] = value if m is None else where(m, value, R[dst])

    return run


@op("slct")
def slct(ctx: Context, ins: Instruction) -> Closure:
    kind, test = ins.parts[-2], ins.parts[-1]
    dst = ctx.dst(ins.operands[0])
    a, b = (ctx.src(o, kind) for o in ins.operands[1:3])
    c = ctx.src(ins.operands[3], test)
    dtype = np.int32 if test == "s32" else np.float32
    return elementwise(lambda x, y, z: where(z.view(dtype) >= 0, x, y), dst, a, b, c)


@op("prmt")
def prmt(ctx: Context, ins: Instruction) -> Closure:
    mode = ins.parts[2] if len(ins.parts) > 2 else ""
    dst = ctx.dst(ins.operands[0])
    a, b, c = (ctx.src(o, "b32") for o in ins.operands[1:4])
    control = ins.operands[3]
    if mode == "" and isinstance(control, Imm) and not int(control.value) & 0x8888:
        order = [int(control.value) >> shift & 7 for shift in (0, 4, 8, 12)]

        def pick(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            source = np.array([x, y]).view(np.uint8).reshape(2, 32, 4)
            picked = np.empty((32, 4), np.uint8)
            for i, byte in enumerate(order):
                picked[:, i] = source[byte >> 2, :, byte & 3]
            return picked.view(U32).reshape(-1)

        return elementwise(pick, dst, a, b)

    def select(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        source = np.empty((32, 8), np.uint8)
        source[:, :4] = x.view(np.uint8).reshape(32, 4)
        source[:, 4:] = y.view(np.uint8).reshape(32, 4)
        control = z.astype(np.int64)
        if mode == "":
            nibbles = (control[:, None] >> np.array([0, 4, 8, 12])) & 0xF
            chosen = np.take_along_axis(source, nibbles & 7, axis=1)
            signs = where(chosen & 0x80, 0xFF, 0).astype(np.uint8)
            return where(nibbles & 8, signs, chosen).astype(np.uint8).view(U32).reshape(-1)
        k = control & 3
        tables = {
            "f4e": [[3, 2, 1, 0], [4, 3, 2, 1], [5, 4, 3, 2], [6, 5, 4, 3]],
            "b4e": [[5, 6, 7, 0], [6, 7, 0, 1], [7, 0, 1, 2], [0, 1, 2, 3]],
            "rc8": [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]],
            "ecl": [[3, 2, 1, 0], [3, 2, 1, 1], [3, 2, 2, 2], [3, 3, 3, 3]],
            "ecr": [[0, 0, 0, 0], [1, 1, 1, 0], [2, 2, 1, 0], [3, 2, 1, 0]],
            "rc16": [[1, 0, 1, 0], [3, 2, 3, 2], [1, 0, 1, 0], [3, 2, 3, 2]],
        }
        # The tables list byte 3 first.
        order = np.array(tables[mode])[k][:, ::-1]
        return np.take_along_axis(source, order, axis=1).view(U32).reshape(-1)

    return elementwise(select, dst, a, b, c)


@op("fns")
def fns(ctx: Context, ins: Instruction) -> Closure:
    def run(mask: np.ndarray, base: np.ndarray, offset: np.ndarray) -> np.ndarray:
        out = []
        for m, b, o in zip(mask, base, offset.view(np.int32), strict=True):
            m, b, o = int(m), int(b), int(o)
            found = 0xFFFFFFFF
            if o == 0:
                found = b if m >> b & 1 else found
            else:
                step, count = (1, o - 1) if o > 0 else (-1, -o - 1)
                pos = b
                while 0 <= pos < 32:
                    if m >> pos & 1:
                        if count == 0:
                            found = pos
                            break
                        count -= 1
                    pos += step
            out.append(found)
        return np.array(out, U32)

    return simple(ctx, ins, "b32", run, 3)
