# SPDX-License-Identifier: Apache-2.0
"""Floating-point arithmetic: f32, f64, f16, bf16 and their packed pairs.

Results that the ISA defines exactly are exact, in each rounding mode. The ``.approx`` functions
are computed in float64 and rounded to nearest, so they may differ from a GPU in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import formats as fmt
from ..decode import Closure, Context, elementwise, op, put, where
from ..parser import Instruction

FLOAT_KINDS = {"f32", "f64", "f16", "bf16", "f16x2", "bf16x2", "f32x2", "tf32"}
ROUND = ("rn", "rz", "rm", "rp", "rna")
SUMS = ("add", "sub", "fma")
U32, U64, U16 = np.uint32, np.uint64, np.uint16
TINY = np.float32(2.0**-126)
SMALL = np.float32(2.0**-100)
NAN32 = U32(0x7FFFFFFF)


def flush32(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 values become zeros of their sign."""
    return where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def _exact(name: str) -> Callable:
    """float64 functions of float64 operands whose result rounds correctly to f32, f16, bf16."""
    return {
        "add": fmt.add_round_to_odd,
        "sub": lambda a, b: fmt.add_round_to_odd(a, -b),
        "mul": np.multiply,
        "div": np.divide,
        "fma": lambda a, b, c: fmt.add_round_to_odd(a * b, c),
    }[name]


def _signed_zero(name: str, total: np.ndarray, x: list[np.ndarray]) -> np.ndarray:
    """Sums rounded toward minus infinity: an exact zero is -0, unless both addends are +0.

    IEEE 754-2019, section 6.3. Of addends with a sum of zero, one is negative or both are +0.

    Args:
        name: add, sub or fma.
        total: the sums, float64.
        x: the operands.
    """
    zero = total == 0
    if not zero.any():
        return total
    first, last = (x[0] * x[1], x[2]) if name == "fma" else x
    negative = np.signbit(first) | (np.signbit(last) ^ (name == "sub"))
    return where(zero & negative, -0.0, total)


_last_fma: tuple[np.ndarray | None, ...] = (None, None, None, None)


def _exact_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32 registers, as float64 rounded to odd.

    Kept for the next call: kernels round one sum in several modes. Registers are never modified in
    place, so that the same arrays are the same values.
    """
    global _last_fma
    if not (a is _last_fma[0] and b is _last_fma[1] and c is _last_fma[2]):
        x, y, z = (v.view(np.float32).astype(np.float64) for v in (a, b, c))
        _last_fma = a, b, c, fmt.add_round_to_odd(x * y, z)
    return _last_fma[3]


def _half_codec(kind: str) -> tuple[Callable, Callable]:
    half = fmt.F16 if kind.startswith("f16") else fmt.BF16
    base = "f16" if kind.startswith("f16") else "bf16"

    def load(x: np.ndarray) -> np.ndarray:
        return fmt.float_values(x, base)

    def store(x: np.ndarray) -> np.ndarray:
        if half is fmt.F16:
            return fmt.f32_to_f16(x)
        # f64 to f32 by rounding to odd, then to bf16: one rounding in effect.
        y = x.astype(np.float32)
        bits = y.view(U32)
        wide = y.astype(np.float64)
        inexact = (wide != x) & np.isfinite(x) & ((bits & U32(1)) == 0)
        if inexact.any():
            away = np.abs(wide) < np.abs(x)
            bits = where(inexact, where(away, bits + U32(1), bits - U32(1)), bits)
        return fmt.f32_to_bf16(bits.view(np.float32))

    return load, store


def _half_native(kind: str, function: Callable) -> Callable:
    """A sum or product of 16-bit floats by way of float32, or None where that rounds twice.

    float32 has more than twice the bits of either type, and two more: rounding to it first changes
    no sum or product, as long as it is no subnormal (Figueroa 1995). Sums of subnormals are exact.
    """
    if kind.startswith("f16"):
        return lambda a, b: fmt.f32_to_f16(
            function(a.view(np.float16).astype(np.float32), b.view(np.float16).astype(np.float32))
        )

    def run(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
        y = function(fmt.bf16_to_f32(a), fmt.bf16_to_f32(b))
        if function is np.multiply:
            size = np.abs(y)
            if np.count_nonzero(size < SMALL) != np.count_nonzero(size == 0):
                return None
        return fmt.f32_to_bf16(y)

    return run


def lanewise(kind: str, name: str, parts: list[str]) -> Callable:
    """The arithmetic ``name`` on the register bits of a float type."""
    mode = next((p for p in parts if p in ROUND), "rn")
    ftz, sat, relu = "ftz" in parts, "sat" in parts, "relu" in parts
    exact = _exact(name)
    native = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}.get(name)
    if kind == "f32":

        def f32(*bits: np.ndarray) -> np.ndarray:
            x = [b.view(np.float32) for b in bits]
            if ftz:
                x = [flush32(v) for v in x]
            if native is not None and mode == "rn":
                y = native(*x)
            else:
                if name == "fma" and not ftz:
                    wide = _exact_fma(*bits)
                else:
                    wide = exact(*[v.astype(np.float64) for v in x])
                if mode == "rm" and name in SUMS:
                    wide = _signed_zero(name, wide, x)
                y = fmt.f64_to_f32(wide, mode)
            if ftz:
                y = flush32(y)
            if sat:
                y = where(np.isnan(y), np.float32(0), np.clip(y, np.float32(0), np.float32(1)))
            bits = y.view(U32)
            bits[np.isnan(y)] = NAN32
            return bits

        return f32
    if kind == "f32x2":
        one = lanewise("f32", name, parts)

        def packed32(*bits: np.ndarray) -> np.ndarray:
            halves = [b.view(U32) for b in bits]
            return np.ascontiguousarray(one(*halves)).view(U64)

        return packed32
    if kind == "f64":
        if mode != "rn":
            raise NotImplementedError
        if name == "fma":

            def f64_fma(*bits: np.ndarray) -> np.ndarray:
                a, b, c = (v.view(np.float64) for v in bits)
                import math

                return np.array(
                    [math.fma(*t) if hasattr(math, "fma") else _fma64(*t)
                     for t in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
                ).view(U64)  # fmt: skip

            return f64_fma
        return lambda *bits: native(*[b.view(np.float64) for b in bits]).view(U64)
    load, store = _half_codec(kind)
    narrow = _half_native(kind, native) if native in (np.add, np.subtract, np.multiply) else None

    def half(*bits: np.ndarray) -> np.ndarray:
        if narrow is not None and not sat and not relu:
            code = narrow(*[b.view(U16) for b in bits])
            if code is not None:
                return code.view(bits[0].dtype)
        y = exact(*[load(b.view(U16)) for b in bits])
        if sat:
            y = where(np.isnan(y), 0.0, np.clip(y, 0.0, 1.0))
        if relu:
            y = where(np.isnan(y), y, np.maximum(y, 0.0))
        code = store(y)
        return code.view(bits[0].dtype) if bits[0].dtype != U16 else code

    return half


def _fma64(a: float, b: float, c: float) -> float:
    from fractions import Fraction

    if not all(np.isfinite((a, b, c))):
        return a * b + c
    value = Fraction(a) * Fraction(b) + Fraction(c)
    return float(value) if value else a * b + c


def arithmetic(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    name, kind = parts[0], parts[-1]
    if len([p for p in parts if p in FLOAT_KINDS]) == 2:  # mixed precision: add.f32.bf16
        return _mixed(ctx, ins)
    if name == "div" and ("approx" in parts or "full" in parts):
        parts = [p for p in parts if p not in ("approx", "full")]
    dst = ctx.dst(ins.operands[0])
    srcs = [ctx.src(o, kind) for o in ins.operands[1:3]]
    return elementwise(lanewise(kind, name, parts), dst, *srcs)


def _mixed(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    kind, small = parts[-2], parts[-1]
    dst = ctx.dst(ins.operands[0])
    exact = _exact(parts[0])
    mode = next((p for p in parts if p in ROUND), "rn")
    srcs = [ctx.src(o, small) for o in ins.operands[1:-1]]
    last = ctx.src(ins.operands[-1], kind)

    def run(*bits: np.ndarray) -> np.ndarray:
        x = [fmt.float_values(b, small) for b in bits[:-1]]
        x.append(bits[-1].view(np.float32).astype(np.float64))
        wide = exact(*x)
        if mode == "rm":
            wide = _signed_zero(parts[0], wide, x)
        return fmt.f64_to_f32(wide, mode).view(U32)

    return elementwise(run, dst, *srcs, last)


@op("fma")
def fma(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]
    if len([p for p in ins.parts if p in FLOAT_KINDS]) == 2:
        return _mixed(ctx, ins)
    dst = ctx.dst(ins.operands[0])
    srcs = [ctx.src(o, kind) for o in ins.operands[1:4]]
    return elementwise(lanewise(kind, "fma", ins.parts), dst, *srcs)


SIGN_BIT = {"f16": 0x8000, "bf16": 0x8000, "f16x2": 0x80008000, "bf16x2": 0x80008000,
            "f32": 0x80000000, "f64": 1 << 63, "f32x2": 0x8000000080000000}  # fmt: skip


def sign_op(ctx: Context, ins: Instruction) -> Closure:
    """abs and neg."""
    kind = ins.parts[-1]
    dst, a = ctx.dst(ins.operands[0]), ctx.src(ins.operands[1], kind)
    bit = SIGN_BIT[kind]
    ftz = "ftz" in ins.parts
    flip = ins.parts[0] == "neg"

    def run(x: np.ndarray) -> np.ndarray:
        if ftz and kind == "f32":
            x = flush32(x.view(np.float32)).view(U32)
        mask = x.dtype.type(bit)
        return x ^ mask if flip else x & ~mask

    return elementwise(run, dst, a)


@op("copysign")
def copysign(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]
    dst = ctx.dst(ins.operands[0])
    a, b = (ctx.src(o, kind) for o in ins.operands[1:3])
    bit = SIGN_BIT[kind]

    def run(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        mask = x.dtype.type(bit)
        return (y & ~mask) | (x & mask)

    return elementwise(run, dst, a, b)


def min_max(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    kind = parts[-1]
    maximum = parts[0] == "max"
    nan = "NaN" in parts
    ftz = "ftz" in parts
    absolute = "abs" in parts
    flip_sign = "xorsign" in parts
    dst = ctx.dst(ins.operands[0])
    srcs = [ctx.src(o, kind) for o in ins.operands[1:]]

    def choose(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        # -0 counts as less than +0.
        take_x = (x > y) | ((x == y) & ~np.signbit(x)) if maximum else (
            (x < y) | ((x == y) & np.signbit(x)))  # fmt: skip
        result = where(take_x, x, y)
        if nan:
            return where(np.isnan(x) | np.isnan(y), x.dtype.type(np.nan), result)
        return where(np.isnan(x), y, where(np.isnan(y), x, result))

    if kind in ("f32", "f64"):
        dtype = np.float32 if kind == "f32" else np.float64
        bits_type = U32 if kind == "f32" else U64
        quiet = bits_type(0x7FFFFFFF if kind == "f32" else 0x7FF8000000000000)

        def run(*bits: np.ndarray) -> np.ndarray:
            x = [b.view(dtype) for b in bits]
            if ftz:
                x = [flush32(v) for v in x]
            sign = None
            if flip_sign:
                sign = np.signbit(x[0]) ^ np.signbit(x[1])
            if absolute:
                x = [np.abs(v) for v in x]
            result = x[0]
            for other in x[1:]:
                result = choose(result, other)
            if sign is not None:
                result = where(sign, -np.abs(result), np.abs(result))
            return where(np.isnan(result), quiet, result.view(bits_type))

        return elementwise(run, dst, *srcs)
    load, _ = _half_codec(kind)

    def half(*bits: np.ndarray) -> np.ndarray:
        raw = [np.ascontiguousarray(b).view(U16) for b in bits]
        sign = None
        if flip_sign:
            sign = (raw[0] ^ raw[1]) & U16(0x8000)
        if absolute:
            raw = [r & U16(0x7FFF) for r in raw]
        result = raw[0]
        for other in raw[1:]:
            x, y = load(result), load(other)
            picked = choose(x, y)
            same = (picked == x) & (np.signbit(picked) == np.signbit(x))
            result = where(same, result, other)
            result = where(np.isnan(picked), U16(0x7FFF), result).astype(U16)
        if sign is not None:
            result = (result & U16(0x7FFF)) | sign
        return result.view(bits[0].dtype)

    return elementwise(half, dst, *srcs)


def comparison(name: str, kind: str, ftz: bool) -> Callable:
    """Float comparison; the ``u`` variants are true where an operand is NaN."""
    ordered = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
        "gt": np.greater, "ge": np.greater_equal,
    }  # fmt: skip

    def load(x: np.ndarray) -> np.ndarray:
        if kind == "f32":
            y = x.view(np.float32)
            return flush32(y) if ftz else y
        return fmt.float_values(x, kind)

    def run(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        x, y = load(a), load(b)
        nan = np.isnan(x) | np.isnan(y)
        if name == "num":
            return ~nan
        if name == "nan":
            return nan
        if name in ordered:
            return ordered[name](x, y) & ~nan
        return ordered[name[:-1]](x, y) | nan

    return run


def setp_packed(ctx: Context, ins: Instruction) -> Closure:
    from ..decode import pair

    kind = ins.parts[-1][:-2]
    fn = comparison(ins.parts[1], kind, False)
    first, second = pair(ins.operands[0])
    dst, dst2 = ctx.dst(first), ctx.dst(second)
    a, b = (ctx.src(o, "b32") for o in ins.operands[1:3])

    def run(w) -> None:
        x, y = w.R[a].view(U16).reshape(32, 2), w.R[b].view(U16).reshape(32, 2)
        put(w, dst, fn(x[:, 0], y[:, 0]))
        put(w, dst2, fn(x[:, 1], y[:, 1]))

    return run


def _unary(ctx: Context, ins: Instruction, fn: Callable) -> Closure:
    """A function computed in float64 and rounded to the type."""
    parts = ins.parts
    kind = parts[-1]
    mode = next((p for p in parts if p in ROUND), "rn")
    ftz = "ftz" in parts
    dst, a = ctx.dst(ins.operands[0]), ctx.src(ins.operands[1], kind)
    if kind == "f32":

        def f32(bits: np.ndarray) -> np.ndarray:
            x = bits.view(np.float32)
            if ftz:
                x = flush32(x)
            y = fmt.f64_to_f32(fn(x.astype(np.float64)), mode)
            if ftz:
                y = flush32(y)
            bits = y.view(U32)
            bits[np.isnan(y)] = NAN32
            return bits

        return elementwise(f32, dst, a)
    if kind == "f64":
        return elementwise(lambda bits: fn(bits.view(np.float64)).view(U64), dst, a)
    load, store = _half_codec(kind)

    def half(bits: np.ndarray) -> np.ndarray:
        return store(fn(load(bits.view(U16)))).view(bits.dtype)

    return elementwise(half, dst, a)


@op("rcp")
def rcp(ctx: Context, ins: Instruction) -> Closure:
    return _unary(ctx, ins, lambda x: 1.0 / x)


@op("sqrt")
def sqrt(ctx: Context, ins: Instruction) -> Closure:
    return _unary(ctx, ins, np.sqrt)


@op("rsqrt")
def rsqrt(ctx: Context, ins: Instruction) -> Closure:
    return _unary(ctx, ins, lambda x: 1.0 / np.sqrt(x))


@op("ex2")
def ex2(ctx: Context, ins: Instruction) -> Closure:
    return _unary(ctx, ins, np.exp2)


@op("lg2")
def lg2(ctx: Context, ins: Instruction) -> Closure:
    return _unary(ctx, ins, np.log2)


@op("sin")
def sin(ctx: Context, ins: Instruction) -> Closure:
    return _unary(ctx, ins, np.sin)


@op("cos")
def cos(ctx: Context, ins: Instruction) -> Closure:
    return _unary(ctx, ins, np.cos)


@op("tanh")
def tanh(ctx: Context, ins: Instruction) -> Closure:
    return _unary(ctx, ins, np.tanh)


@op("testp")
def testp(ctx: Context, ins: Instruction) -> Closure:
    kind, test = ins.parts[-1], ins.parts[1]
    dtype = np.float32 if kind == "f32" else np.float64
    dst, a = ctx.dst(ins.operands[0]), ctx.src(ins.operands[1], kind)
    tiny = np.finfo(dtype).tiny

    def run(bits: np.ndarray) -> np.ndarray:
        x = bits.view(dtype)
        return {
            "finite": lambda: np.isfinite(x),
            "infinite": lambda: np.isinf(x),
            "number": lambda: ~np.isnan(x),
            "notanumber": lambda: np.isnan(x),
            "normal": lambda: np.isfinite(x) & (np.abs(x) >= tiny),
            "subnormal": lambda: (x != 0) & (np.abs(x) < tiny),
        }[test]()

    return elementwise(run, dst, a)
