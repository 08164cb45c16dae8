# SPDX-License-Identifier: Apache-2.0
"""mma.sync, ldmatrix and stmatrix of the PTX machine against the fragment tables of the ISA."""

import ml_dtypes
import numpy as np
import pytest
from ptx_machine import PtxRuntimeError
from ptx_machine.testing import kernel, run

U32 = np.uint32
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])


def run_mma(opcode, a, b, c, *, scales="", extra=()):
    """Runs one mma.sync on (32, n) register arrays; returns D's registers."""
    registers, loads, params = [], [], []
    start = 20
    for i, values in enumerate((a, b, c, *extra)):
        values = np.ascontiguousarray(values)
        count = values.shape[1]
        params.append(values)
        names = [f"%r{start + j}" for j in range(count)]
        registers.append("{" + ", ".join(names) + "}")
        loads.append(f"ld.param.u64 %rd1, [p{i}]; mad.wide.u32 %rd2, %r1, {4 * count}, %rd1;")
        loads += [f"ld.global.b32 {n}, [%rd2+{4 * j}];" for j, n in enumerate(names)]
        start += count
    out = np.zeros_like(params[2])
    count = out.shape[1]
    results = [f"%r{10 + j}" for j in range(count)]
    tail = scales.format(*[r[1:-1] for r in registers[3:]]) if scales else ""
    body = "mov.u32 %r1, %tid.x;\n" + "\n".join(loads)
    body += f"\n{opcode} {{{', '.join(results)}}}, {registers[0]}, {registers[1]}, {registers[2]}"
    body += f"{tail};\nld.param.u64 %rd1, [p{len(params)}];\n"
    body += f"mad.wide.u32 %rd2, %r1, {4 * count}, %rd1;\n"
    body += "\n".join(f"st.global.b32 [%rd2+{4 * j}], {n};" for j, n in enumerate(results))
    run(kernel(body, ["u64"] * (len(params) + 1), target="sm_120a"), [*params, out])
    return out


def accumulator(matrix):
    """Registers of a 16 x 8 f32 matrix: c0, c1 in row g, c2, c3 in g + 8, columns 2t, 2t + 1."""
    out = np.zeros((32, 4), np.float32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            out[lane, i] = matrix[g + (8 if i >= 2 else 0), 2 * t + i % 2]
    return out


def from_accumulator(registers):
    matrix = np.zeros((16, 8))
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            matrix[g + (8 if i >= 2 else 0), 2 * t + i % 2] = registers[lane, i]
    return matrix


def test_bf16_m16n8k16():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((16, 16)).astype(ml_dtypes.bfloat16)
    B = rng.standard_normal((16, 8)).astype(ml_dtypes.bfloat16)
    C = rng.standard_normal((16, 8)).astype(np.float32)
    a, b = np.zeros((32, 8), A.dtype), np.zeros((32, 4), A.dtype)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(8):  # table of the ISA for .m16n8k16, 16-bit types
            row = g if i < 2 or 4 <= i < 6 else g + 8
            column = 2 * t + (i & 1) + (8 if i >= 4 else 0)
            a[lane, i] = A[row, column]
        for i in range(4):
            b[lane, i] = B[2 * t + (i & 1) + (8 if i >= 2 else 0), g]
    out = run_mma(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        a.view(U32), b.view(U32), accumulator(C),
    )  # fmt: skip
    expected = A.astype(np.float64) @ B.astype(np.float64) + C
    np.testing.assert_allclose(from_accumulator(out), expected, rtol=1e-6, atol=1e-6)


def test_e4m3_m16n8k32():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((16, 32)).astype(ml_dtypes.float8_e4m3fn)
    B = rng.standard_normal((32, 8)).astype(ml_dtypes.float8_e4m3fn)
    a, b = np.zeros((32, 16), A.dtype), np.zeros((32, 8), A.dtype)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(16):  # table of the ISA for .m16n8k32, 8-bit types
            row = g if i < 4 or 8 <= i < 12 else g + 8
            a[lane, i] = A[row, 4 * t + (i & 3) + (16 if i >= 8 else 0)]
        for i in range(8):
            b[lane, i] = B[4 * t + (i & 3) + (16 if i >= 4 else 0), g]
    out = run_mma(
        "mma.sync.aligned.kind::f8f6f4.m16n8k32.row.col.f32.e4m3.e4m3.f32",
        a.view(U32), b.view(U32), accumulator(np.zeros((16, 8))),
    )  # fmt: skip
    expected = A.astype(np.float64) @ B.astype(np.float64)
    np.testing.assert_allclose(from_accumulator(out), expected, rtol=1e-6, atol=1e-6)


def fp4_fragments(codes_a, codes_b):
    """Registers of a 16 x 64 and a 64 x 8 e2m1 matrix of codes, table of .m16n8k64."""
    a, b = np.zeros((32, 4), U32), np.zeros((32, 2), U32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(32):
            row = g if i < 8 or 16 <= i < 24 else g + 8
            column = 8 * t + (i & 7) + (32 if i >= 16 else 0)
            a[lane, i // 8] |= U32(int(codes_a[row, column]) << (4 * (i % 8)))
        for i in range(16):
            row = 8 * t + (i & 7) + (32 if i >= 8 else 0)
            b[lane, i // 8] |= U32(int(codes_b[row, g]) << (4 * (i % 8)))
    return a, b


@pytest.mark.parametrize("thread_a", [0, 1])
@pytest.mark.parametrize("thread_b", [0, 3])
def test_block_scaled_nvfp4(thread_a, thread_b):
    rng = np.random.default_rng(0)
    codes_a, codes_b = rng.integers(0, 16, (16, 64)), rng.integers(0, 16, (64, 8))
    scale_a = rng.uniform(0.5, 4, (16, 4)).astype(ml_dtypes.float8_e4m3fn)
    scale_b = rng.uniform(0.5, 4, (4, 8)).astype(ml_dtypes.float8_e4m3fn)
    a, b = fp4_fragments(codes_a, codes_b)
    # Lanes that must not be read hold NaN scales.
    sa, sb = np.full((32, 4), 0x7F, np.uint8), np.full((32, 4), 0x7F, np.uint8)
    for g in range(8):
        sa[4 * g + 2 * thread_a] = scale_a[g].view(np.uint8)
        sa[4 * g + 2 * thread_a + 1] = scale_a[g + 8].view(np.uint8)
        sb[4 * g + thread_b] = scale_b[:, g].view(np.uint8)
    out = run_mma(
        "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col."
        "f32.e2m1.e2m1.f32.ue4m3",
        a, b, accumulator(np.ones((16, 8))),
        scales=f", {{{{{{0}}}}}}, {{{{0, {thread_a}}}}}, {{{{{{1}}}}}}, {{{{0, {thread_b}}}}}",
        extra=(sa.view(U32), sb.view(U32)),
    )  # fmt: skip
    A = E2M1[codes_a] * np.repeat(scale_a.astype(np.float64), 16, axis=1)
    B = E2M1[codes_b] * np.repeat(scale_b.astype(np.float64), 16, axis=0)
    np.testing.assert_allclose(from_accumulator(out), A @ B + 1, rtol=1e-6)


def test_block_scaled_mxf4_selects_two_bytes():
    rng = np.random.default_rng(0)
    codes_a, codes_b = rng.integers(0, 16, (16, 64)), rng.integers(0, 16, (64, 8))
    scale_a, scale_b = rng.integers(124, 131, (16, 2)), rng.integers(124, 131, (2, 8))
    a, b = fp4_fragments(codes_a, codes_b)
    sa, sb = np.full((32, 4), 0xFF, np.uint8), np.full((32, 4), 0xFF, np.uint8)
    for g in range(8):
        sa[4 * g, 2:] = scale_a[g]
        sa[4 * g + 1, 2:] = scale_a[g + 8]
        sb[4 * g + 2, :2] = scale_b[:, g]
    out = run_mma(
        "mma.sync.aligned.kind::mxf4.block_scale.scale_vec::2X.m16n8k64.row.col."
        "f32.e2m1.e2m1.f32.ue8m0",
        a, b, accumulator(np.zeros((16, 8))),
        scales=", {{{0}}}, {{2, 0}}, {{{1}}}, {{0, 2}}", extra=(sa.view(U32), sb.view(U32)),
    )  # fmt: skip
    A = E2M1[codes_a] * np.repeat(2.0 ** (scale_a - 127), 32, axis=1)
    B = E2M1[codes_b] * np.repeat(2.0 ** (scale_b - 127), 32, axis=0)
    np.testing.assert_allclose(from_accumulator(out), A @ B, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("byte", range(4))
def test_block_scaled_mxf8_selects_one_byte(byte):
    """kind::mxf8f6f4: one ue8m0 scale for each row and column, the byte that byte-id names."""
    rng = np.random.default_rng(byte)
    A = rng.standard_normal((16, 32)).astype(ml_dtypes.float8_e4m3fn)
    B = rng.standard_normal((32, 8)).astype(ml_dtypes.float8_e4m3fn)
    scale_a, scale_b = rng.integers(124, 130, 16), rng.integers(124, 130, 8)
    a, b = np.zeros((32, 16), A.dtype), np.zeros((32, 8), A.dtype)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(16):
            row = g if i < 4 or 8 <= i < 12 else g + 8
            a[lane, i] = A[row, 4 * t + (i & 3) + (16 if i >= 8 else 0)]
        for i in range(8):
            b[lane, i] = B[4 * t + (i & 3) + (16 if i >= 4 else 0), g]
    sa, sb = np.full((32, 4), 0xFF, np.uint8), np.full((32, 4), 0xFF, np.uint8)
    for g in range(8):  # thread-id-a 1: lanes 2 and 3 of a quad; thread-id-b 2: lane 2
        sa[4 * g + 2, byte], sa[4 * g + 3, byte] = scale_a[g], scale_a[g + 8]
        sb[4 * g + 2, byte] = scale_b[g]
    out = run_mma(
        "mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32.row.col."
        "f32.e4m3.e4m3.f32.ue8m0",
        a.view(U32), b.view(U32), accumulator(np.zeros((16, 8))),
        scales=f", {{{{{{0}}}}}}, {{{{{byte}, 1}}}}, {{{{{{1}}}}}}, {{{{{byte}, 2}}}}",
        extra=(sa.view(U32), sb.view(U32)),
    )  # fmt: skip
    left = A.astype(np.float64) * 2.0 ** (scale_a[:, None] - 127)
    right = B.astype(np.float64) * 2.0 ** (scale_b[None, :] - 127)
    np.testing.assert_allclose(from_accumulator(out), left @ right, rtol=1e-6, atol=1e-6)


def test_tf32_m16n8k8():
    rng = np.random.default_rng(0)
    A = rng.integers(-512, 512, (16, 8)).astype(np.float32)  # ten bits: exact in tf32
    B = rng.integers(-512, 512, (8, 8)).astype(np.float32)
    a, b = np.zeros((32, 4), np.float32), np.zeros((32, 2), np.float32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        a[lane] = A[g, t], A[g + 8, t], A[g, t + 4], A[g + 8, t + 4]
        b[lane] = B[t, g], B[t + 4, g]
    out = run_mma(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
        a.view(U32), b.view(U32), accumulator(np.zeros((16, 8))),
    )  # fmt: skip
    np.testing.assert_array_equal(from_accumulator(out), A.astype(np.float64) @ B)


def test_s8_m16n8k32():
    rng = np.random.default_rng(0)
    A = rng.integers(-128, 128, (16, 32)).astype(np.int8)
    B = rng.integers(-128, 128, (32, 8)).astype(np.int8)
    a, b = np.zeros((32, 16), np.int8), np.zeros((32, 8), np.int8)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(16):
            row = g if i < 4 or 8 <= i < 12 else g + 8
            a[lane, i] = A[row, 4 * t + (i & 3) + (16 if i >= 8 else 0)]
        for i in range(8):
            b[lane, i] = B[4 * t + (i & 3) + (16 if i >= 4 else 0), g]
    start = accumulator(np.full((16, 8), 1000)).astype(np.int32)
    out = run_mma("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
                  a.view(U32), b.view(U32), start)  # fmt: skip
    expected = A.astype(np.int64) @ B.astype(np.int64) + 1000
    np.testing.assert_array_equal(from_accumulator(out), expected)


def test_f16_accumulator_m16n8k16():
    """Two registers of D: columns 2t, 2t + 1 of row g, and of row g + 8."""
    rng = np.random.default_rng(0)
    A, B = (rng.integers(-4, 5, shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    a, b = np.zeros((32, 8), np.float16), np.zeros((32, 4), np.float16)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(8):
            row = g if i < 2 or 4 <= i < 6 else g + 8
            a[lane, i] = A[row, 2 * t + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(4):
            b[lane, i] = B[2 * t + (i & 1) + (8 if i >= 2 else 0), g]
    out = run_mma("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16",
                  a.view(U32), b.view(U32), np.zeros((32, 2), U32))  # fmt: skip
    np.testing.assert_array_equal(from_accumulator(out.view(np.float16)), A @ B)


# -- ldmatrix and stmatrix -----------------------------------------------------------------------
SHARED = ".shared .align 128 .b8 tile[2048];"
STAGE = """
mov.u32 %r1, %tid.x; mov.u32 %r3, tile; ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 16, %rd1;
mad.lo.u32 %r4, %r1, 16, %r3; ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%rd2];
st.shared.v4.u32 [%r4], {%r5, %r6, %r7, %r8}; bar.sync 0;
"""


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix_x4(trans):
    data = np.arange(32 * 8, dtype=np.uint16).reshape(4, 8, 8)  # four 8 x 8 matrices
    out = np.zeros((32, 4), U32)
    name = "ldmatrix.sync.aligned.m8n8.x4" + (".trans" if trans else "") + ".shared.b16"
    body = (
        STAGE
        + name
        + """ {%r10, %r11, %r12, %r13}, [%r4];
ld.param.u64 %rd1, [p1]; mad.wide.u32 %rd2, %r1, 16, %rd1;
st.global.v4.u32 [%rd2], {%r10, %r11, %r12, %r13};
"""
    )
    run(kernel(body, ["u64", "u64"], shared=SHARED), [data, out])
    halves = out.view(np.uint16).reshape(32, 4, 2)
    for lane in range(32):
        for matrix in range(4):
            source = data[matrix].T if trans else data[matrix]
            row, column = lane // 4, 2 * (lane % 4)
            np.testing.assert_array_equal(halves[lane, matrix], source[row, column : column + 2])


@pytest.mark.parametrize("count", [1, 2])
def test_ldmatrix_m16n16_of_bytes(count):
    """16 x 16 bytes, transposed: a lane holds four columns' neighbors of its rows.

    Byte e of register r of lane t is element (row, column) = (4 (t mod 4) + 2 (r mod 2) + e mod 2,
    t / 4 + 8 (e / 2)) of matrix r / 2, as CUTLASS's copy atom of this instruction has it.
    """
    data = np.random.default_rng(0).integers(0, 256, (2, 16, 16)).astype(np.uint8)
    out = np.zeros((32, 4), U32)
    vector = "%r10, %r11" if count == 1 else "%r10, %r11, %r12, %r13"
    body = (
        STAGE
        + f"mov.b32 %r12, 0; mov.b32 %r13, 0; ldmatrix.sync.aligned.m16n16.x{count}"
        + (
            f".trans.shared.b8 {{{vector}}}, [%r4];"
            "ld.param.u64 %rd1, [p1]; mad.wide.u32 %rd2, %r1, 16, %rd1;"
            "st.global.v4.u32 [%rd2], {%r10, %r11, %r12, %r13};"
        )
    )
    run(kernel(body, ["u64", "u64"], shared=SHARED), [data, out])
    loaded = out.view(np.uint8).reshape(32, 4, 4)
    for lane in range(32):
        for register in range(2 * count):
            for byte in range(4):
                row = 4 * (lane % 4) + 2 * (register % 2) + byte % 2
                column = lane // 4 + 8 * (byte // 2)
                assert loaded[lane, register, byte] == data[register // 2, row, column]


def test_stmatrix_is_the_inverse_of_ldmatrix():
    for trans in ("", ".trans"):
        data = np.arange(256, dtype=np.uint16)
        out = np.zeros(256, np.uint16)
        body = (
            STAGE
            + f"""
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r4]; bar.sync 0;
stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r4], {{%r10, %r11, %r12, %r13}}; bar.sync 0;
ld.shared.v4.u32 {{%r5, %r6, %r7, %r8}}, [%r4];
ld.param.u64 %rd1, [p1]; mad.wide.u32 %rd2, %r1, 16, %rd1;
st.global.v4.u32 [%rd2], {{%r5, %r6, %r7, %r8}};
"""
        )
        run(kernel(body, ["u64", "u64"], shared=SHARED), [data, out])
        expected = data.reshape(4, 8, 8)
        expected = expected.transpose(0, 2, 1) if trans else expected
        np.testing.assert_array_equal(out, expected.reshape(-1))


def test_stmatrix_b8_transposes_the_accumulator_layout():
    # The 16 x 8 matrix lies like an f32 accumulator's, a byte an element, and is stored as 8 rows
    # of 16 bytes.
    matrix = np.arange(128, dtype=np.uint8).reshape(16, 8)
    registers = np.zeros((32, 4), np.uint8)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            registers[lane, i] = matrix[g + 8 * (i // 2), 2 * t + i % 2]
    out = np.zeros((8, 16), np.uint8)
    body = """
mov.u32 %r1, %tid.x; mov.u32 %r3, tile; ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1;
ld.global.u32 %r5, [%rd2]; and.b32 %r6, %r1, 7; mad.lo.u32 %r6, %r6, 16, %r3;
stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%r6], {%r5}; bar.sync 0;
mad.lo.u32 %r6, %r1, 4, %r3; ld.shared.u32 %r7, [%r6];
ld.param.u64 %rd1, [p1]; mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.u32 [%rd2], %r7;
"""
    run(kernel(body, ["u64", "u64"], shared=SHARED), [registers.view(U32), out])
    np.testing.assert_array_equal(out, matrix.T)


def test_ldmatrix_checks_alignment_and_lanes():
    with pytest.raises(PtxRuntimeError, match="misaligned"):
        body = STAGE + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r4+8];"
        run(kernel(body, ["u64"], shared=SHARED), [np.zeros(512, np.uint8)])
    with pytest.raises(PtxRuntimeError, match="inactive lanes"):
        body = STAGE + (
            "setp.eq.u32 %p1, %r1, 0; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r4];"
        )
        run(kernel(body, ["u64"], shared=SHARED), [np.zeros(512, np.uint8)])
