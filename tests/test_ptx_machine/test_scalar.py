# SPDX-License-Identifier: Apache-2.0
"""Lane-wise instructions of the PTX machine: integers, floats, conversions."""

import ml_dtypes
import numpy as np
import pytest
from ptx_machine.testing import lanewise

U32, I32, U64, F32 = np.uint32, np.int32, np.uint64, np.float32


def one(body, *inputs, out=U32):
    """The first lanes of the single result."""
    (result,) = lanewise(body, [np.atleast_1d(i) for i in inputs], [out])
    return result[: max(np.size(i) for i in inputs)].tolist()


# Each row: instruction, sources, expected; values worked out by hand from the ISA's text.
INTEGER = [
    ("add.u32", (U32(0xFFFFFFFF), U32(2)), 1),
    ("add.sat.s32", (U32(0x7FFFFFFF), U32(1)), 0x7FFFFFFF),
    ("sub.s32", (U32(3), U32(5)), 0xFFFFFFFE),
    ("mul.lo.s32", (U32(0x80000001), U32(3)), 0x80000003),
    ("mul.hi.s32", (U32(0xFFFFFFFF), U32(2)), 0xFFFFFFFF),
    ("mul.hi.u32", (U32(0xFFFFFFFF), U32(2)), 1),
    ("mad.lo.u32", (U32(7), U32(6), U32(1)), 43),
    ("div.s32", (U32(-7 & 0xFFFFFFFF), U32(2)), -3 & 0xFFFFFFFF),
    ("rem.s32", (U32(-7 & 0xFFFFFFFF), U32(2)), -1 & 0xFFFFFFFF),
    ("div.u32", (U32(0xFFFFFFFE), U32(3)), 0x55555554),
    ("min.s32", (U32(0xFFFFFFFF), U32(1)), 0xFFFFFFFF),
    ("max.u32", (U32(0xFFFFFFFF), U32(1)), 0xFFFFFFFF),
    ("abs.s32", (U32(0xFFFFFFFB),), 5),
    ("neg.s32", (U32(5),), 0xFFFFFFFB),
    ("popc.b32", (U32(0xF00F),), 8),
    ("clz.b32", (U32(0x00010000),), 15),
    ("clz.b32", (U32(0),), 32),
    ("bfind.u32", (U32(0x00010000),), 16),
    ("bfind.s32", (U32(0xFFFFFFFE),), 0),
    ("bfind.u32", (U32(0),), 0xFFFFFFFF),
    ("brev.b32", (U32(0x00000013),), 0xC8000000),
    ("bfe.u32", (U32(0xABCD1234), U32(8), U32(12)), 0xD12),
    ("bfe.s32", (U32(0xABCD1234), U32(8), U32(12)), 0xFFFFFD12),
    ("bfe.u32", (U32(0xABCD1234), U32(28), U32(12)), 0xA),
    ("bfe.s32", (U32(0xABCD1234), U32(28), U32(12)), 0xFFFFFFFA),
    ("bfe.u32", (U32(0xABCD1234), U32(8), U32(0)), 0),
    ("bfi.b32", (U32(0x5), U32(0xFFFFFFFF), U32(4), U32(4)), 0xFFFFFF5F),
    ("bfi.b32", (U32(0x5), U32(0xFFFF0000), U32(0), U32(0)), 0xFFFF0000),
    ("shl.b32", (U32(1), U32(31)), 0x80000000),
    ("shl.b32", (U32(1), U32(32)), 0),
    ("shr.u32", (U32(0x80000000), U32(33)), 0),
    ("shr.s32", (U32(0x80000000), U32(33)), 0xFFFFFFFF),
    ("shf.l.wrap.b32", (U32(0x80000001), U32(0x12345678), U32(4)), 0x23456788),
    ("shf.r.clamp.b32", (U32(0x80000001), U32(0x12345678), U32(32)), 0x12345678),
    ("shf.r.wrap.b32", (U32(0x80000001), U32(0x12345678), U32(8)), 0x78800000),
    ("lop3.b32", (U32(0xF0F0F0F0), U32(0xCCCCCCCC), U32(0xAAAAAAAA)), 0xE8E8E8E8, ", 0xE8"),
    ("lop3.b32", (U32(0xF0F0F0F0), U32(0xCCCCCCCC), U32(0xAAAAAAAA)), 0x1B1B1B1B, ", 0x1B"),
    ("prmt.b32", (U32(0x33221100), U32(0x77665544), U32(0x7531)), 0x77553311),
    ("prmt.b32", (U32(0x80221100), U32(0x77665544), U32(0xB30F)), 0xFF800000),
    ("prmt.b32.f4e", (U32(0x33221100), U32(0x77665544), U32(1)), 0x44332211),
    ("prmt.b32.b4e", (U32(0x33221100), U32(0x77665544), U32(1)), 0x66770011),
    ("prmt.b32.rc8", (U32(0x33221100), U32(0x77665544), U32(2)), 0x22222222),
    ("prmt.b32.ecl", (U32(0x33221100), U32(0x77665544), U32(1)), 0x33221111),
    ("prmt.b32.ecr", (U32(0x33221100), U32(0x77665544), U32(2)), 0x22221100),
    ("prmt.b32.rc16", (U32(0x33221100), U32(0x77665544), U32(1)), 0x33223322),
    ("dp4a.s32.s32", (U32(0x01FF0203), U32(0x02020202), U32(10)), 10 + 2 * (3 + 2 - 1 + 1)),
    ("sad.u32", (U32(3), U32(10), U32(1)), 8),
    ("bmsk.clamp.b32", (U32(4), U32(8)), 0xFF0),
    ("szext.clamp.s32", (U32(0x88), U32(8)), 0xFFFFFF88),
    ("not.b32", (U32(0x0F0F0F0F),), 0xF0F0F0F0),
    ("cnot.b32", (U32(0),), 1),
]  # fmt: skip


@pytest.mark.parametrize("row", INTEGER, ids=lambda r: f"{r[0]}-{r[2]:x}")
def test_integer(row):
    name, sources, expected, *tail = row
    operands = ", ".join(f"{{a{i}}}" for i in range(len(sources)))
    assert one(f"{name} {{d0}}, {operands}{''.join(tail)};", *sources) == [expected]


def test_wide_and_carry():
    assert one("mul.wide.s32 {d0}, {a0}, {a1};", U32(0xFFFFFFFF), U32(3), out=U64) == [2**64 - 3]
    assert one("mul.hi.u64 {d0}, {a0}, {a1};", U64(2**63), U64(6), out=U64) == [3]
    body = "add.cc.u32 {d0}, {a0}, {a1}; addc.u32 {d1}, {a2}, 0;"
    low, high = lanewise(body, [U32([0xFFFFFFFF]), U32([1]), U32([7])], [U32, U32])
    assert (low[0], high[0]) == (0, 8)


def test_setp_selp():
    body = "setp.lt.s32 %p1|%p2, {a0}, {a1}; selp.b32 {d0}, 1, 2, %p1; selp.b32 {d1}, 1, 2, %p2;"
    a, b = lanewise(body, [I32([-1, 3]).view(U32), I32([2, 2]).view(U32)], [U32, U32])
    assert a[:2].tolist() == [1, 2]
    assert b[:2].tolist() == [2, 1]
    # Unsigned comparison of the same bits, combined with a negated predicate.
    body = (
        "setp.ne.u32 %p3, {a0}, 3; setp.lo.and.u32 %p1, {a0}, {a1}, !%p3; selp.b32 {d0}, 1, 0, %p1;"
    )
    assert one(body, I32([-1, 3, 1]).view(U32), U32([4, 4, 4])) == [0, 1, 0]


NAN = float("nan")


def test_float_comparison_with_nan():
    x, y = F32([1, NAN, 2]), F32([2, 1, 2])
    results = {}
    for name in ("lt", "ltu", "ne", "neu", "num", "nan", "ge", "equ"):
        body = f"setp.{name}.f32 %p1, {{a0}}, {{a1}}; selp.b32 {{d0}}, 1, 0, %p1;"
        results[name] = one(body, x, y)
    assert results == {
        "lt": [1, 0, 0], "ltu": [1, 1, 0], "ne": [1, 0, 0], "neu": [1, 1, 0], "num": [1, 0, 1],
        "nan": [0, 1, 0], "ge": [0, 0, 1], "equ": [0, 1, 1],
    }  # fmt: skip


def test_fma_rounds_once():
    # 1 + 2^-12 squared is 1 + 2^-11 + 2^-24: the last term is lost by a product rounded to f32.
    x = F32(1 + 2**-12)
    assert one("fma.rn.f32 {d0}, {a0}, {a0}, {a1};", x, F32(-(1 + 2**-11)), out=F32) == [2.0**-24]
    # A sum that float64 rounds to a tie: 2^24 + 1 + 2^-40 must round up, not to even.
    got = one("fma.rn.f32 {d0}, {a0}, {a1}, {a2};", F32(2**-20), F32(2**-20), F32(1), out=F32)
    assert got == [1.0]
    exact = one("fma.rn.f32 {d0}, {a0}, {a1}, {a2};", F32(1 + 2**-23), F32(2**-24), F32(1), out=F32)
    assert exact == [1 + 2.0**-23]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("rn", 1.0), ("rz", 1.0), ("rm", 1.0), ("rp", 1 + 2.0**-23)],
)
def test_directed_rounding(mode, expected):
    assert one(f"add.{mode}.f32 {{d0}}, {{a0}}, {{a1}};", F32(1), F32(2**-30), out=F32) == [
        expected
    ]
    negative = one(f"sub.{mode}.f32 {{d0}}, {{a0}}, {{a1}};", F32(-1), F32(2**-30), out=F32)
    assert negative == [{"rm": -(1 + 2.0**-23)}.get(mode, -1.0)]


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_the_sign_of_a_sum_of_zero(mode):
    """IEEE 754: toward minus infinity a sum of zero is -0, unless of +0 and +0; else +0."""
    a, b = F32([1, -1, 0.0, 0.0, -0.0, -0.0]), F32([-1, 1, 0.0, -0.0, 0.0, -0.0])
    expected = [mode == "rm"] * 2 + [False, mode == "rm", mode == "rm", True]
    minus, ones = F32(-b), F32([1] * 6)
    packed = lambda v: np.stack([v, v[::-1]], 1).copy().view(np.uint64)[:, 0]  # noqa: E731
    for name, operands in (("add", (a, b)), ("sub", (a, minus)), ("fma", (a, ones, b)),
                           ("fma", (-ones, -a, b))):  # fmt: skip
        arguments = ", ".join(f"{{a{i}}}" for i in range(len(operands)))
        for ftz in ("", ".ftz"):
            got = lanewise(f"{name}.{mode}{ftz}.f32 {{d0}}, {arguments};", [*operands], [F32])[0]
            assert (got[:6] == 0).all() and np.signbit(got[:6]).tolist() == expected, (name, ftz)
        pairs = [packed(v) for v in operands]
        got = lanewise(f"{name}.{mode}.f32x2 {{d0}}, {arguments};", pairs, [np.uint64])[0]
        got = got[:6].copy().view(np.float32).reshape(6, 2)
        assert np.signbit(got[:, 0]).tolist() == np.signbit(got[::-1, 1]).tolist() == expected
    # The product of 2^-100 and itself, of either sign, is not zero, nor is its sum with zero.
    small = F32([2.0**-100, -(2.0**-100)])
    zero = F32([-0.0, 0.0])
    got = lanewise(f"fma.{mode}.f32 {{d0}}, {{a0}}, {{a1}}, {{a2}};",
                   [small, abs(small), zero], [F32])[0][:2]  # fmt: skip
    up, down = mode == "rp", mode == "rm"
    assert got.tolist() == [up * 2.0**-149, -down * 2.0**-149]
    assert np.signbit(got).tolist() == [False, True]


def test_ftz_sat_minmax():
    tiny = F32(2**-130)
    assert one("add.ftz.f32 {d0}, {a0}, {a0};", tiny, out=F32) == [0.0]
    assert one("add.f32 {d0}, {a0}, {a0};", tiny, out=F32) == [2.0**-129]
    assert one("add.sat.f32 {d0}, {a0}, {a0};", F32([3, -1, NAN]), out=F32) == [1, 0, 0]
    assert one("max.f32 {d0}, {a0}, {a1};", F32([NAN, -0.0]), F32([1, 0.0]), out=F32) == [1, 0]
    assert np.isnan(one("max.NaN.f32 {d0}, {a0}, {a1};", F32(NAN), F32(1), out=F32)[0])
    zero = lanewise("min.f32 {d0}, {a0}, {a1};", [F32([0.0]), F32([-0.0])], [F32])[0]
    assert np.signbit(zero[0])


def test_half_arithmetic():
    x = np.array([1.0, 65504.0], np.float16).view(np.uint16)
    y = np.array([2.0**-11, 65504.0], np.float16).view(np.uint16)
    got = lanewise("add.f16 {d0}, {a0}, {a1};", [x, y], [np.uint16])[0]
    assert got[0] == 0x3C00  # a tie, to even
    assert got[1] == 0x7C00  # infinity
    bf = lambda *v: np.array(v, ml_dtypes.bfloat16).view(np.uint16).view(U32)  # noqa: E731
    product = lanewise("mul.bf16x2 {d0}, {a0}, {a1};", [bf(1.5, -3.0), bf(1.5, 0.5)], [U32])[0]
    np.testing.assert_array_equal(product[:1].view(ml_dtypes.bfloat16), [2.25, -1.5])
    # 1 + 2^-7 squared rounds to 1 + 2^-6 (the exact product has a bit below half an ulp).
    square = lanewise("mul.bf16x2 {d0}, {a0}, {a0};", [bf(1 + 2**-7, 1 + 2**-7)], [U32])[0]
    assert float(square[:1].view(ml_dtypes.bfloat16)[0]) == 1 + 2.0**-6


def test_bf16_arithmetic_rounds_once():
    rng = np.random.default_rng(0)
    a, b = (
        (rng.standard_normal(32) * 2.0 ** rng.integers(-12, 12, 32)).astype(ml_dtypes.bfloat16)
        for _ in range(2)
    )
    got = lanewise(
        "add.bf16 {d0}, {a0}, {a1};", [a.view(np.uint16), b.view(np.uint16)], [np.uint16]
    )[0]
    exact = a.astype(np.float64) + b.astype(np.float64)
    value = got.view(ml_dtypes.bfloat16).astype(np.float64)
    bits = got.astype(np.int32)
    for step in (-1, 1):  # no neighbor is closer
        other = (bits + step).astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
        assert (np.abs(value - exact) <= np.abs(other - exact)).all()


# -- cvt -----------------------------------------------------------------------------------------
def test_cvt_integers():
    assert one("cvt.s32.s8 {d0}, {a0};", U32(0x80)) == [0xFFFFFF80]
    assert one("cvt.u32.u8 {d0}, {a0};", U32(0x180)) == [0x80]
    assert one("cvt.sat.u8.s32 {d0}, {a0};", I32([-5, 300]).view(U32)) == [0, 255]
    assert one("cvt.u64.u32 {d0}, {a0};", U32(0xFFFFFFFF), out=U64) == [0xFFFFFFFF]
    assert one("cvt.s64.s32 {d0}, {a0};", U32(0xFFFFFFFF), out=U64) == [2**64 - 1]


def test_cvt_float_to_integer():
    x = F32([2.5, -2.5, 3e9, NAN, -1])
    assert one("cvt.rni.s32.f32 {d0}, {a0};", x, out=I32) == [2, -2, 2**31 - 1, 0, -1]
    assert one("cvt.rzi.s32.f32 {d0}, {a0};", x, out=I32) == [2, -2, 2**31 - 1, 0, -1]
    assert one("cvt.rmi.s32.f32 {d0}, {a0};", x, out=I32) == [2, -3, 2**31 - 1, 0, -1]
    assert one("cvt.rpi.u32.f32 {d0}, {a0};", x) == [3, 0, 3000000000, 0, 0]
    assert one("cvt.rni.f32.f32 {d0}, {a0};", F32([2.5, 3.5]), out=F32) == [2.0, 4.0]


def test_cvt_integer_to_float():
    assert one("cvt.rn.f32.u32 {d0}, {a0};", U32(2**24 + 1), out=F32) == [2.0**24]
    assert one("cvt.rp.f32.u32 {d0}, {a0};", U32(2**24 + 1), out=F32) == [2.0**24 + 2]
    big = U64(2**63 + 2**39 + 1)  # just above a tie
    assert one("cvt.rn.f32.u64 {d0}, {a0};", big, out=F32) == [2.0**63 + 2.0**40]


def test_cvt_halves():
    x = F32([1 + 2**-11, 1 + 3 * 2**-11, 70000, NAN])
    assert one("cvt.rn.f16.f32 {d0}, {a0};", x, out=np.uint16) == [0x3C00, 0x3C02, 0x7C00, 0x7FFF]
    assert one("cvt.rn.satfinite.f16.f32 {d0}, {a0};", x, out=np.uint16)[2] == 0x7BFF
    assert one("cvt.rz.f16.f32 {d0}, {a0};", x, out=np.uint16)[1] == 0x3C01
    y = F32([1 + 2**-8, 1 + 3 * 2**-8, -1, NAN])
    assert one("cvt.rn.bf16.f32 {d0}, {a0};", y, out=np.uint16) == [0x3F80, 0x3F82, 0xBF80, 0x7FFF]
    assert one("cvt.rn.relu.bf16.f32 {d0}, {a0};", y, out=np.uint16)[2] == 0
    # The first source of a packed conversion is the upper half.
    assert one("cvt.rn.bf16x2.f32 {d0}, {a0}, {a1};", F32(1), F32(2)) == [0x3F804000]
    assert one("cvt.rn.f16x2.f32 {d0}, {a0}, {a1};", F32(1), F32(2)) == [0x3C004000]
    assert one("cvt.f32.bf16 {d0}, {a0};", np.uint16(0xBF80), out=F32) == [-1.0]


def test_cvt_tf32():
    x = F32([1 + 2**-11, 1 + 3 * 2**-11])
    assert one("cvt.rna.tf32.f32 {d0}, {a0};", x) == [0x3F802000, 0x3F804000]
    assert one("cvt.rn.tf32.f32 {d0}, {a0};", x) == [0x3F800000, 0x3F804000]
    assert one("cvt.rz.tf32.f32 {d0}, {a0};", x) == [0x3F800000, 0x3F802000]


def test_cvt_e4m3_against_the_format_table():
    # Ties to even: 1.0625 lies between 1 and 1.125; 1.1875 between 1.125 and 1.25.
    x = F32([1.0625, 1.1875, 448, 464, 465, 1e9, -NAN, 2**-10, 2**-9, -(2**-6)])
    got = one("cvt.rn.satfinite.e4m3x2.f32 {d0}, {a0}, {a1};", F32(0.0), x, out=np.uint16)
    codes = [0x38, 0x3A, 0x7E, 0x7E, 0x7E, 0x7E, 0x7F, 0x00, 0x01, 0x88]
    assert got == codes
    got = one("cvt.rn.satfinite.e4m3x2.f32 {d0}, {a1}, {a0};", F32(0.0), x, out=np.uint16)
    assert got == [c << 8 for c in codes]


def test_cvt_e5m2():
    x = F32([1.125, 1.375, 57344, 1e9, NAN])
    got = one("cvt.rn.satfinite.e5m2x2.f32 {d0}, {a0}, {a1};", F32(0.0), x, out=np.uint16)
    assert got == [0x3C, 0x3E, 0x7B, 0x7B, 0x7F]


def test_cvt_e2m1_every_tie():
    magnitudes = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 1e9, NAN]
    codes = [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7, 7, 7, 7]
    body = "{ .reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, {a0}, {a1}; cvt.u32.u8 {d0}, t; }"
    assert one(body, F32(0.0), F32(magnitudes)) == codes
    negative = one(body, -F32(magnitudes[:-1]), F32(0.0))
    assert negative == [(c | 8) << 4 for c in codes[:-1]]


def test_cvt_e2m1_packs_bytes_of_a_word():
    # The form compilers emit: four conversions into bytes, packed by a move.
    body = """
{ .reg .b8 b0, b1, b2, b3;
cvt.rn.satfinite.e2m1x2.f32 b0, {a1}, {a0};
cvt.rn.satfinite.e2m1x2.f32 b1, {a0}, {a0};
cvt.rn.satfinite.e2m1x2.f32 b2, {a1}, {a1};
cvt.rn.satfinite.e2m1x2.f32 b3, {a0}, {a1};
mov.b32 {d0}, {b0, b1, b2, b3}; }"""
    assert one(body, F32(6), F32(-0.5)) == [0x799977 << 8 | 0x97]


def test_cvt_narrow_to_half():
    assert one("cvt.rn.f16x2.e4m3x2 {d0}, {a0};", np.uint16(0x7E38)) == [0x5F003C00]
    body = "{ .reg .b8 t; cvt.u8.u32 t, {a0}; cvt.rn.f16x2.e2m1x2 {d0}, t; }"
    assert one(body, U32(0x71)) == [0x46003800]
    body = "cvt.rn.bf16x2.ue8m0x2 {d0}, {a0};"
    assert one(body, np.uint16(0x7F80)) == [0x3F804000]


def test_cvt_ue8m0():
    x = F32([1.0, 1.5, 2**-127, 3e38])
    body = "cvt.rp.satfinite.ue8m0x2.f32 {d0}, {a0}, {a1};"
    assert one(body, F32(1.0), x, out=np.uint16) == [0x7F7F, 0x7F80, 0x7F00, 0x7FFE]
    body = "cvt.rz.satfinite.ue8m0x2.f32 {d0}, {a0}, {a1};"
    assert one(body, F32(1.0), x, out=np.uint16) == [0x7F7F, 0x7F7F, 0x7F00, 0x7FFE]


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_cvt_agrees_with_ml_dtypes_on_random_values(name):
    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[name]
    rng = np.random.default_rng(1)
    x = (rng.standard_normal(32) * 2.0 ** rng.integers(-9, 8, 32)).astype(F32)
    got = one(f"cvt.rn.satfinite.{name}x2.f32 {{d0}}, {{a0}}, {{a1}};", F32(0.0), x, out=np.uint16)
    assert got == x.astype(dtype).view(np.uint8).tolist()


def test_approximate_functions_are_close():
    x = F32([0.5, 3.0, 10.0])
    for name, fn in (("rcp.approx.ftz", lambda v: 1 / v), ("ex2.approx.ftz", np.exp2),
                     ("lg2.approx", np.log2), ("rsqrt.approx", lambda v: v**-0.5),
                     ("sqrt.rn", np.sqrt), ("rcp.rn", lambda v: 1 / v)):  # fmt: skip
        got = one(f"{name}.f32 {{d0}}, {{a0}};", x, out=F32)
        np.testing.assert_allclose(got, fn(x.astype(np.float64)), rtol=2**-23)


def test_f32x2():
    pack = lambda a, b: np.array([a, b], F32).view(U64)  # noqa: E731
    got = lanewise(
        "fma.rn.f32x2 {d0}, {a0}, {a1}, {a2};", [pack(1, 2), pack(3, 4), pack(5, 6)], [U64]
    )[0]
    np.testing.assert_array_equal(got[:1].view(F32), [8, 14])
