# SPDX-License-Identifier: Apache-2.0
"""cvt: conversions between integers and floats of every width, packed forms included."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import formats as fmt
from ..decode import Closure, Context, elementwise, op, storage, where
from ..parser import TYPE_BYTES, Instruction

U32 = np.uint32
INTEGERS = {"u8": np.uint8, "s8": np.int8, "u16": np.uint16, "s16": np.int16, "u32": np.uint32,
            "s32": np.int32, "u64": np.uint64, "s64": np.int64}  # fmt: skip
FLOATS = ("f16", "bf16", "f32", "f64", "tf32")
NARROW = {"e4m3": 8, "e5m2": 8, "e2m1": 4, "e2m3": 6, "e3m2": 6, "ue8m0": 8}
ROUNDING = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi", "rs")


def _base(kind: str) -> tuple[str, int]:
    """(element, count) of a possibly packed type."""
    for suffix in ("x4", "x2"):
        if kind.endswith(suffix) and kind[:-2] in {**NARROW, "f16": 0, "bf16": 0}:
            return kind[:-2], int(suffix[1])
    return kind, 1


def read_integer(bits: np.ndarray, kind: str) -> np.ndarray:
    """Values of an integer type in registers that may be wider."""
    return bits.astype(storage_unsigned(kind)).view(INTEGERS[kind])


def storage_unsigned(kind: str) -> type:
    return {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[TYPE_BYTES[kind]]


@op("cvt")
def cvt(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    if parts[1] == "pack":
        return _pack_integers(ctx, ins)
    types = [p for p in parts[1:] if p in INTEGERS or p in FLOATS or _base(p)[1] > 1]
    if len(types) < 2:
        raise ctx.error("cvt needs two types")
    to, source = types[0], types[1]
    mods = {p for p in parts if p not in types}
    if "rs" in mods:
        return _stochastic(ctx, ins, to, source, mods)
    if _base(to)[1] > 1 or _base(source)[1] > 1:
        return _packed(ctx, ins, to, source, mods)
    dst = ctx.dst(ins.operands[0])
    a = ctx.src(ins.operands[1], source)
    out = storage(ctx.kinds[ins.operands[0].name])
    return elementwise(scalar(to, source, mods, out), dst, a)


def scalar(to: str, source: str, mods: set, out: type) -> Callable:
    """Function of register bits for a conversion between single values."""
    mode = next((p for p in mods if p in ROUNDING), "")
    if source in INTEGERS and to in INTEGERS:
        return _integer_to_integer(to, source, "sat" in mods, out)
    if source in INTEGERS:
        return _integer_to_float(to, source, mode or "rn", out)
    ftz = "ftz" in mods
    if to in INTEGERS:
        return _float_to_integer(to, source, mode or "rzi", ftz, out)
    return _float_to_float(to, source, mode, ftz, mods, out)


def _widen(values: np.ndarray, to: str, out: type) -> np.ndarray:
    """An integer result in a register at least as wide; signed types are sign-extended."""
    if out is np.bool_:
        raise ValueError("cvt to a predicate")
    signed = {2: np.int16, 4: np.int32, 8: np.int64}[out().itemsize]
    if to[0] == "s":
        return values.astype(INTEGERS[to]).astype(signed).view(out)
    return values.astype(INTEGERS[to]).astype(out)


def _integer_to_integer(to: str, source: str, saturate: bool, out: type) -> Callable:
    info = np.iinfo(INTEGERS[to])

    def run(bits: np.ndarray) -> np.ndarray:
        x = read_integer(bits, source)
        if saturate:
            low = max(info.min, np.iinfo(x.dtype).min)
            high = min(info.max, np.iinfo(x.dtype).max)
            x = np.clip(x, x.dtype.type(low), x.dtype.type(high))
        return _widen(x, to, out)

    return run


def _store_float(y: np.ndarray, to: str, out: type) -> np.ndarray:
    if to == "f64":
        return y.astype(np.float64).view(np.uint64)
    return fmt.encode(y, fmt.FORMATS[to]).astype(out)


def _integer_to_float(to: str, source: str, mode: str, out: type) -> Callable:
    def run(bits: np.ndarray) -> np.ndarray:
        x = read_integer(bits, source)
        if to == "f32" and mode == "rn":
            return x.astype(np.float32).view(U32)
        if to == "f64" and mode == "rn":
            return x.astype(np.float64).view(np.uint64)
        if x.dtype.itemsize == 8:
            # 64-bit integers do not fit float64: round to odd at 53 bits first.
            y = np.array([_round_to_odd(int(v)) for v in x])
        else:
            y = x.astype(np.float64)
        if to == "f64":
            raise NotImplementedError("integer to f64 with directed rounding")
        return _store_float(fmt.round_to(y, fmt.FORMATS[to], mode), to, out)

    return run


def _round_to_odd(value: int) -> float:
    magnitude = abs(value)
    extra = max(magnitude.bit_length() - 53, 0)
    kept = magnitude >> extra
    if kept << extra != magnitude:
        kept |= 1
    return float(kept << extra) * (-1.0 if value < 0 else 1.0)


def _float_to_integer(to: str, source: str, mode: str, ftz: bool, out: type) -> Callable:
    info = np.iinfo(INTEGERS[to])

    def run(bits: np.ndarray) -> np.ndarray:
        x = fmt.float_values(bits, source)
        if ftz and source == "f32":
            x = where(np.abs(x) < 2.0**-126, 0.0, x)
        y = fmt.round_integral(x, mode)
        nan = np.isnan(y)
        y = where(nan, 0.0, y)
        if TYPE_BYTES[to] == 8:
            values = np.array([min(max(int(v) if np.isfinite(v) else (info.max if v > 0 else
                               info.min), info.min), info.max) for v in y], object)  # fmt: skip
            values = np.array([int(v) & 0xFFFFFFFFFFFFFFFF for v in values], np.uint64)
            values = where(nan, np.uint64(1 << 63), values)
            return values.astype(out)
        values = np.clip(y, info.min, info.max).astype(np.int64)
        # NaN: 0 for up to 32 bits.
        return _widen(values, to, out)

    return run


def _float_to_float(to: str, source: str, mode: str, ftz: bool, mods: set, out: type) -> Callable:
    relu, saturate = "relu" in mods, "satfinite" in mods
    sat = "sat" in mods

    def run(bits: np.ndarray) -> np.ndarray:
        x = fmt.float_values(bits, source)
        if ftz and source == "f32":
            x = where(np.abs(x) < 2.0**-126, np.copysign(0.0, x), x)
        if mode.endswith("i"):
            y = np.copysign(fmt.round_integral(x, mode), x)
        elif to == "f64" or mode == "":
            y = x
        else:
            y = fmt.round_to(x, fmt.FORMATS[to], mode, saturate)
        if mode.endswith("i") or mode == "":
            y = fmt.round_to(y, fmt.FORMATS[to], "rn", saturate) if to != "f64" else y
        if sat:
            y = where(np.isnan(y), 0.0, np.clip(y, 0.0, 1.0))
        if relu:
            y = where(np.isnan(y), y, np.maximum(y, 0.0))
        if ftz and to == "f32":
            y = where(np.abs(y) < 2.0**-126, np.copysign(0.0, y), y)
        return _store_float(y, to, out)

    return run


# -- packed ------------------------------------------------------------------------------------
def encode_narrow(x: np.ndarray, kind: str, mode: str, saturate: bool, relu: bool) -> np.ndarray:
    """Codes of float64 values in one of the packed element types."""
    if relu:
        x = where(np.isnan(x), x, np.maximum(x, 0.0))
    if kind == "ue8m0":
        return _encode_ue8m0(x, mode, saturate)
    target = fmt.FORMATS[kind]
    return fmt.encode(fmt.round_to(x, target, mode, saturate), target)


def _encode_ue8m0(x: np.ndarray, mode: str, saturate: bool) -> np.ndarray:
    """Powers of two: the magnitude rounded up (rp) or toward zero (rz) to 2^(code - 127)."""
    magnitude = np.abs(x)
    mantissa, exponent = np.frexp(where(np.isfinite(magnitude), magnitude, 1.0))
    e = exponent - 1
    if mode == "rp":
        e = where(mantissa > 0.5, e + 1, e)
    code = where(magnitude == 0, 0, np.clip(e + 127, 0, 254))
    over = (e + 127 > 254) | np.isinf(magnitude)
    code = where(over, 254 if saturate else 255, code)
    return where(np.isnan(x), 255, code).astype(U32)


def _packed(ctx: Context, ins: Instruction, to: str, source: str, mods: set) -> Closure:
    element, count = _base(to)
    src_element, src_count = _base(source)
    mode = next((p for p in mods if p in ROUNDING), "rn")
    relu, saturate = "relu" in mods, "satfinite" in mods
    dst = ctx.dst(ins.operands[0])
    out = storage(ctx.kinds[ins.operands[0].name])
    width = NARROW.get(element, 16)
    step = 8 if width == 6 else width  # 6-bit elements sit one in a byte
    if src_count == 1:
        # Two f32: the first source is the upper half.
        operands = list(ins.operands[1:])
        if len(operands) == 1 and hasattr(operands[0], "items"):
            operands = list(operands[0].items)
        srcs = [ctx.src(o, source) for o in operands[:count]]

        nearest = mode == "rn" and not relu and not saturate
        if nearest and source == "f32" and element in ("f16", "bf16"):
            narrow = fmt.f32_to_bf16 if element == "bf16" else fmt.f32_to_f16

            def both(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
                pairs = np.empty((32, 2), np.uint16)
                pairs[:, 0] = narrow(lower.view(np.float32))
                pairs[:, 1] = narrow(upper.view(np.float32))
                return pairs.view(U32).reshape(-1).astype(out)

            return elementwise(both, dst, *srcs)

        def combine(*bits: np.ndarray) -> np.ndarray:
            value = np.zeros(32, U32)
            for i, b in enumerate(reversed(bits)):
                x = fmt.float_values(b, source)
                code = encode_narrow(x, element, mode, saturate, relu)
                value |= code << U32(i * step)
            return value.astype(out)

        return elementwise(combine, dst, *srcs)
    a = ctx.src(ins.operands[1], "b32" if ctx.width(ins.operands[1]) >= 4 else "b16")
    src_width = NARROW.get(src_element, 16)
    src_step = 8 if src_width == 6 else src_width

    def unpack(bits: np.ndarray) -> np.ndarray:
        raw = bits.astype(U32)
        value = np.zeros(32, U32)
        for i in range(count):
            code = (raw >> U32(i * src_step)) & U32((1 << src_width) - 1)
            x = fmt.float_values(code, src_element)
            value |= encode_narrow(x, element, mode, saturate, relu) << U32(i * step)
        return value.astype(out)

    return elementwise(unpack, dst, a)


def _stochastic(ctx: Context, ins: Instruction, to: str, source: str, mods: set) -> Closure:
    raise ctx.error("stochastic rounding is not modeled: the ISA leaves its arithmetic open")


def _pack_integers(ctx: Context, ins: Instruction) -> Closure:
    """cvt.pack.sat: two 32-bit integers saturated and packed, over a third operand's bits."""
    types = [p for p in ins.parts[1:] if p in (*INTEGERS, "u4", "s4", "u2", "s2", "b32")]
    to = types[0]
    bits = int(to[1:])
    dst = ctx.dst(ins.operands[0])
    a, b = (ctx.src(o, "b32") for o in ins.operands[1:3])
    c = ctx.src(ins.operands[3], "b32") if len(ins.operands) > 3 else -1
    low = -(1 << (bits - 1)) if to[0] == "s" else 0
    high = (1 << (bits - 1)) - 1 if to[0] == "s" else (1 << bits) - 1
    signed = types[1][0] == "s"
    mask = (1 << bits) - 1

    def run(x: np.ndarray, y: np.ndarray, z: np.ndarray | None = None) -> np.ndarray:
        def clip(v: np.ndarray) -> np.ndarray:
            wide = (v.view(np.int32) if signed else v).astype(np.int64)
            return np.clip(wide, low, high) & mask

        value = (clip(x) << bits) | clip(y)
        if z is not None:
            value |= (z.astype(np.int64) << (2 * bits)) & 0xFFFFFFFF
        return value.astype(U32)

    return elementwise(run, dst, a, b) if c < 0 else elementwise(run, dst, a, b, c)
