# SPDX-License-Identifier: Apache-2.0
"""tcgen05 of the PTX machine: tensor memory, fragments, scale factors, descriptors, CTA pairs."""

import ml_dtypes
import numpy as np
import pytest
from ptx_machine import PtxRuntimeError
from ptx_machine.testing import SEEDS, kernel, run

U32 = np.uint32
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])
SHARED = """.shared .align 1024 .b8 tiles[65536];
.shared .align 8 .b64 bar;
.shared .align 4 .b32 taddr;"""
ALLOC = """
mov.u32 %r1, %tid.x; mov.u32 %r2, %warpid; setp.eq.u32 %p1, %r2, 0; setp.eq.u32 %p2, %r1, 0;
@%p1 tcgen05.alloc.cta_group::{g}.sync.aligned.shared::cta.b32 [taddr], {columns};
@%p1 tcgen05.relinquish_alloc_permit.cta_group::{g}.sync.aligned;
mov.u32 %r4, bar; @%p2 mbarrier.init.shared.b64 [%r4], 1; fence.mbarrier_init.release.cluster;
bar.sync 0; ld.shared.b32 %r3, [taddr]; shl.b32 %r5, %r2, 21; add.u32 %r6, %r3, %r5;
"""
FREE = """
tcgen05.fence::before_thread_sync; bar.sync 0;
@%p1 tcgen05.dealloc.cta_group::{g}.sync.aligned.b32 %r3, {columns};
"""


def fill(text, **values):
    for key, value in values.items():
        text = text.replace("{" + key + "}", str(value))
    return text


def regs(count, first=20):
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def dump(count, param, first=20):
    body = f"ld.param.u64 %rd1, [p{param}]; mad.wide.u32 %rd2, %r1, {4 * count}, %rd1;\n"
    return body + "\n".join(f"st.global.b32 [%rd2+{4 * i}], %r{first + i};" for i in range(count))


# -- ld and st -----------------------------------------------------------------------------------
def tag_memory(columns):
    """Stores 1000 * lane + column into the first columns of tensor memory."""
    body = "mov.u32 %r7, %laneid; mad.lo.u32 %r7, %r2, 32, %r7; mul.lo.u32 %r8, %r7, 1000;\n"
    body += "\n".join(f"add.u32 %r{20 + i}, %r8, {i};" for i in range(columns))
    return (
        body
        + f"\ntcgen05.st.sync.aligned.32x32b.x{columns}.b32 [%r6], {regs(columns)};\n"
        + ("tcgen05.wait::st.sync.aligned;\n")
    )


def expected_fragment(shape, lane, register, split):
    """(lane, column) that a register holds, from the figures of the ISA."""
    row, quad = lane // 4, lane % 4
    if shape == "32x32b":
        return lane, register
    if shape == "16x64b":
        return row + 8 * (quad % 2), 2 * register + quad // 2
    if shape == "16x128b":
        return row + 8 * (register % 2), 4 * (register // 2) + quad
    if shape == "16x256b":
        return row + 8 * (register // 2 % 2), 8 * (register // 4) + 2 * quad + register % 2
    return lane % 16, register + (split if lane >= 16 else 0)


@pytest.mark.parametrize(
    ("shape", "num", "count"),
    [("32x32b", 1, 1), ("32x32b", 32, 32), ("16x64b", 1, 1), ("16x64b", 8, 8), ("16x128b", 1, 2),
     ("16x128b", 4, 8), ("16x256b", 1, 4), ("16x256b", 4, 16), ("16x32bx2", 4, 4)],
)  # fmt: skip
@pytest.mark.parametrize("half", [0, 16])
def test_load_fragments(shape, num, count, half):
    if shape == "32x32b" and half:
        pytest.skip("32 lanes start at a multiple of 32")
    split = 16
    tail = f", {split}" if shape == "16x32bx2" else ""
    body = (
        fill(ALLOC, g=1, columns=32)
        + tag_memory(32)
        + f"""
add.u32 %r9, %r6, {half << 16};
tcgen05.ld.sync.aligned.{shape}.x{num}.b32 {regs(count, 60)}, [%r9]{tail};
tcgen05.wait::ld.sync.aligned;
"""
        + dump(count, 0, 60)
        + fill(FREE, g=1, columns=32)
    )
    for seed in (0, 1, 2):
        out = np.zeros((128, count), U32)
        run(kernel(body, ["u64"], shared=SHARED), [out], block=128, schedule_seed=seed)
        for thread in range(128):
            for register in range(count):
                lane, column = expected_fragment(shape, thread % 32, register, split)
                lane += 32 * (thread // 32) + half
                assert out[thread, register] == 1000 * lane + column


def test_packed_load():
    body = (
        fill(ALLOC, g=1, columns=32)
        + tag_memory(8)
        + f"""
tcgen05.ld.sync.aligned.32x32b.x4.pack::16b.b32 {regs(4, 60)}, [%r6];
tcgen05.wait::ld.sync.aligned;
"""
        + dump(4, 0, 60)
        + fill(FREE, g=1, columns=32)
    )
    out = np.zeros((128, 4), U32)
    run(kernel(body, ["u64"], shared=SHARED), [out], block=128)
    halves = out.view(np.uint16).reshape(128, 8)
    expected = (1000 * np.arange(128)[:, None] + np.arange(8)) & 0xFFFF
    np.testing.assert_array_equal(halves, expected)


ALLOC1 = fill(ALLOC, g=1, columns=32)
FREE1 = fill(FREE, g=1, columns=32)
LOAD1 = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r20}, [ADDRESS]; tcgen05.wait::ld.sync.aligned;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (ALLOC1, "tensor memory leaked: 32 columns"),
        (ALLOC1.replace("32;", "48;"), "not a power of two"),
        (ALLOC1 + LOAD1.replace("ADDRESS", "%r6") + FREE1, "never written"),
        (ALLOC1 + LOAD1.replace("ADDRESS", "%r3") + FREE1, "can access lanes 32..63"),
        (ALLOC1 + "add.u32 %r9, %r6, 32;" + LOAD1.replace("ADDRESS", "%r9") + FREE1,
         "column 32, which is not allocated"),
        (ALLOC1 + FREE1 + FREE1, "no such allocation"),
        (ALLOC1 + "@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [taddr], 32;",
         "after relinquish"),
        (ALLOC1.replace("32;", "512;") + FREE1, "no such allocation"),
    ],
    ids=["leak", "size", "unwritten", "quadrant", "outside", "double-free", "permit", "partial"],
)  # fmt: skip
def test_tensor_memory_mistakes(body, message):
    with pytest.raises(PtxRuntimeError, match=message):
        run(kernel(body, shared=SHARED), [], block=128)


# -- cp ------------------------------------------------------------------------------------------
def no_swizzle(rows, row_bytes, stride, leading):
    """Image of 16-byte chunks: rows of eight 16-byte lines, K-major without a swizzle."""
    out = np.zeros(65536, np.uint8)
    data = np.random.default_rng(rows).integers(0, 256, (rows, row_bytes)).astype(np.uint8)
    for r in range(rows):
        for c in range(row_bytes // 16):
            at = r // 8 * stride + r % 8 * 16 + c * leading
            out[at : at + 16] = data[r, 16 * c : 16 * c + 16]
    return out, data


def blackwell(base, stride, leading, mode=0):
    return base >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | 1 << 46 | mode << 61


STAGE = """
mov.u32 %r10, tiles; mov.b32 %r11, %r1;
COPY: setp.ge.u32 %p3, %r11, 4096; @%p3 bra STAGED;
ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r11, 16, %rd1; mad.lo.u32 %r12, %r11, 16, %r10;
{rank}
ld.global.v4.u32 {%r13, %r14, %r15, %r16}, [%rd2];
st.shared.v4.u32 [%r12], {%r13, %r14, %r15, %r16};
add.u32 %r11, %r11, 128; bra COPY;
STAGED: fence.proxy.async.shared::cta; bar.sync 0;
"""
COMMIT = """
@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r4];
WAIT: mbarrier.try_wait.parity.shared.b64 %p4, [%r4], 0; @%p4 bra GO; bra WAIT;
GO: tcgen05.fence::after_thread_sync;
"""
BASE = 1024


@pytest.mark.parametrize(
    ("shape", "rows", "row_bytes", "lanes"),
    [
        ("32x128b.warpx4", 32, 16, lambda r: [r, r + 32, r + 64, r + 96]),
        ("64x128b.warpx2::02_13", 64, 16, lambda r: [r, r + 64]),
        ("64x128b.warpx2::01_23", 64, 16, lambda r: [r % 32 + 64 * (r // 32) + o for o in (0, 32)]),
        ("128x128b", 128, 16, lambda r: [r]),
        ("128x256b", 128, 32, lambda r: [r]),
        ("4x256b", 4, 32, lambda r: [32 * r]),
    ],
)
def test_copy_shapes(shape, rows, row_bytes, lanes):
    image, data = no_swizzle(rows, row_bytes, 256, 128)
    columns = row_bytes // 4
    # What is not written must not be read: first everything becomes zero.
    zeros = "\n".join(f"mov.b32 %r{20 + i}, 0;" for i in range(columns))
    body = (
        fill(ALLOC, g=1, columns=32)
        + fill(STAGE, rank="")
        + zeros
        + f"""
tcgen05.st.sync.aligned.32x32b.x{columns}.b32 [%r6], {regs(columns)};
tcgen05.wait::st.sync.aligned; tcgen05.fence::before_thread_sync; bar.sync 0;
tcgen05.fence::after_thread_sync; ld.param.u64 %rd10, [p1];
@%p2 tcgen05.cp.cta_group::1.{shape} [%r3], %rd10;
"""
        + COMMIT
        + f"""
tcgen05.ld.sync.aligned.32x32b.x{columns}.b32 {regs(columns)}, [%r6]; tcgen05.wait::ld.sync.aligned;
"""
        + dump(columns, 2)
        + fill(FREE, g=1, columns=32)
    )
    expected = np.zeros((128, columns), U32)
    for r in range(rows):
        for lane in lanes(r):
            expected[lane] = data[r].view(U32)
    for seed in (0, 1):
        out = np.zeros((128, columns), U32)
        text = kernel(body, ["u64", "u64", "u64"], shared=SHARED)
        run(text, [image, blackwell(BASE, 256, 128), out], block=128, schedule_seed=seed)
        np.testing.assert_array_equal(out, expected)


# -- mma -----------------------------------------------------------------------------------------
def swizzled_128(raw):
    """Bytes of an operand whose rows are raw's (at most 128 bytes), K-major, 128B swizzle."""
    rows, width = raw.shape
    out = np.zeros(-(-rows // 8) * 1024, np.uint8)
    for r in range(rows):
        for c in range(width // 16):
            at = r * 128 + (c ^ (r % 8)) * 16
            out[at : at + 16] = raw[r, 16 * c : 16 * c + 16]
    return out


def scale_image(scales):
    """128 x 4 scale bytes in the order tcgen05.cp.32x128b expects: row r at (r % 32, r // 32)."""
    out = np.zeros((len(scales) // 128, 32, 4, 4), np.uint8)
    for r, row in enumerate(scales):
        out[r // 128, r % 32, r % 128 // 32] = row
    return out.reshape(-1)


def idesc_scaled(m, n, kind, *, a_type=1, b_type=1, sfa=0, sfb=0, k96=0):
    e8 = 0 if kind == "ue4m3" else 1
    return (sfb << 4 | a_type << 7 | b_type << 10 | (n >> 3) << 17 | e8 << 23 | (m >> 7) << 27
            | sfa << 29 | k96 << 31)  # fmt: skip


def nvfp4_problem(m, n, seed=0, blocks=4, scale_type=ml_dtypes.float8_e4m3fn):
    rng = np.random.default_rng(seed)
    k = 64
    parts = []
    for extent in (m, n):
        codes = rng.integers(0, 16, (extent, k))
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
        scales = rng.uniform(0.25, 4, (extent, 4)).astype(scale_type)
        if scale_type is ml_dtypes.float8_e8m0fnu:
            scales = rng.integers(125, 130, (extent, 4)).astype(np.uint8).view(scale_type)
        used = scales.astype(np.float64)[:, :blocks]
        parts.append((packed, scales.view(np.uint8), E2M1[codes] * np.repeat(used, k // blocks, 1)))
    return parts


A_AT, B_AT, SFA_AT, SFB_AT = 0, 16384, 49152, 51200  # offsets in the tiles


def nvfp4_body(instruction, n, *, group=1, columns=512):
    """Copies scales, issues one mma into columns 0.., and reads D's columns back."""
    chunks = -(-n // 128)
    body = "ld.param.u64 %rd10, [p1]; ld.param.u64 %rd11, [p2]; ld.param.u64 %rd12, [p3]; " \
           "ld.param.u64 %rd13, [p4]; ld.param.u32 %r17, [p5];\n"  # fmt: skip
    body += "add.u32 %r18, %r3, 256; add.u32 %r19, %r3, 264; add.u32 %r9, %r3, 268;\n"
    issue = [f"tcgen05.cp.cta_group::{group}.32x128b.warpx4 [%r18], %rd12;"]
    issue.append(f"tcgen05.cp.cta_group::{group}.32x128b.warpx4 [%r19], %rd13;")
    if chunks == 2:
        issue.append("add.u64 %rd14, %rd13, 32;")
        issue.append(f"tcgen05.cp.cta_group::{group}.32x128b.warpx4 [%r9], %rd14;")
    issue.append("setp.ne.u32 %p5, %r17, %r17;")
    issue.append(f"{instruction} [%r3], %rd10, %rd11, %r17, [%r18], [%r19], %p5;")
    return body + "\n".join(f"@%p2 {i}" if not i.startswith(("add", "setp")) else i for i in issue)


def read_columns(n, param):
    body = ""
    for start in range(0, n, 64):
        count = min(64, n - start)
        body += f"add.u32 %r8, %r6, {start};\n"
        body += f"tcgen05.ld.sync.aligned.32x32b.x{count}.b32 {regs(count, 30)}, [%r8];\n"
        body += "tcgen05.wait::ld.sync.aligned;\n"
        body += f"ld.param.u64 %rd1, [p{param}]; mad.wide.u32 %rd2, %r1, {4 * n}, %rd1;\n"
        body += "\n".join(
            f"st.global.b32 [%rd2+{4 * (start + i)}], %r{30 + i};" for i in range(count)
        )
    return body


def tiles_image(parts):
    image = np.zeros(65536, np.uint8)
    for at, data in parts:
        image[at : at + data.size] = data
    return image


@pytest.mark.parametrize("n", [64, 128, 256])
def test_nvfp4_mma(n):
    (a, sfa, A), (b, sfb, B) = nvfp4_problem(128, n)
    padded = np.zeros((-(-n // 128) * 128, 4), np.uint8)
    padded[:n] = sfb
    image = tiles_image([
        (A_AT, swizzled_128(a)), (B_AT, swizzled_128(b)), (SFA_AT, scale_image(sfa)),
        (SFB_AT, scale_image(padded)),
    ])  # fmt: skip
    instruction = "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X"
    body = fill(ALLOC, g=1, columns=512) + fill(STAGE, rank="") + nvfp4_body(instruction, n)
    body += COMMIT + read_columns(n, 6) + fill(FREE, g=1, columns=512)
    text = kernel(body, ["u64"] * 5 + ["u32", "u64"], shared=SHARED)
    params = [
        image, blackwell(BASE + A_AT, 1024, 16, 2), blackwell(BASE + B_AT, 1024, 16, 2),
        blackwell(BASE + SFA_AT, 128, 16), blackwell(BASE + SFB_AT, 128, 16),
        idesc_scaled(128, n, "ue4m3"),
    ]  # fmt: skip
    for seed in (0, 1, 2):
        out = np.zeros((128, n), np.float32)
        run(text, [*params, out], block=128, schedule_seed=seed)
        np.testing.assert_allclose(out, A @ B.T, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("identity", [0, 2])
def test_mxf4_reads_two_scales_from_the_byte_of_its_id(identity):
    e8 = ml_dtypes.float8_e8m0fnu
    (a, sfa, _), (b, sfb, _) = nvfp4_problem(128, 64, scale_type=e8)
    codes = [np.stack([x & 15, x >> 4], axis=2).reshape(len(x), 64) for x in (a, b)]
    A, B = (
        E2M1[c] * np.repeat(2.0 ** (s[:, identity : identity + 2].astype(int) - 127), 32, axis=1)
        for c, s in zip(codes, (sfa, sfb), strict=True)
    )
    padded = np.zeros((128, 4), np.uint8)
    padded[:64] = sfb
    image = tiles_image([
        (A_AT, swizzled_128(a)), (B_AT, swizzled_128(b)), (SFA_AT, scale_image(sfa)),
        (SFB_AT, scale_image(padded)),
    ])  # fmt: skip
    instruction = "tcgen05.mma.cta_group::1.kind::mxf4.block_scale.block32"
    body = fill(ALLOC, g=1, columns=512) + fill(STAGE, rank="") + nvfp4_body(instruction, 64)
    body += COMMIT + read_columns(64, 6) + fill(FREE, g=1, columns=512)
    out = np.zeros((128, 64), np.float32)
    run(
        kernel(body, ["u64"] * 5 + ["u32", "u64"], shared=SHARED),
        [image, blackwell(BASE + A_AT, 1024, 16, 2), blackwell(BASE + B_AT, 1024, 16, 2),
         blackwell(BASE + SFA_AT, 128, 16), blackwell(BASE + SFB_AT, 128, 16),
         idesc_scaled(128, 64, "ue8m0", sfa=identity, sfb=identity), out],
        block=128,
    )  # fmt: skip
    np.testing.assert_allclose(out, A @ B.T, rtol=1e-6, atol=1e-5)


def dense_idesc(m, n, a=1, b=1, d=1):
    return d << 4 | a << 7 | b << 10 | (n >> 3) << 17 | (m >> 4) << 24


@pytest.mark.parametrize("m", [64, 128])
def test_bf16_mma_accumulates(m):
    rng = np.random.default_rng(0)
    A, B = (rng.standard_normal((r, 64)).astype(ml_dtypes.bfloat16) for r in (m, 32))
    image = tiles_image([(A_AT, swizzled_128(A.view(np.uint8))),
                         (B_AT, swizzled_128(B.view(np.uint8)))])  # fmt: skip
    body = fill(ALLOC, g=1, columns=32) + fill(STAGE, rank="")
    if m == 64:  # half of the lanes are not written by the mma
        body += "\n".join(f"mov.b32 %r{30 + i}, 0;" for i in range(32))
        body += f"tcgen05.st.sync.aligned.32x32b.x32.b32 [%r6], {regs(32, 30)};"
        body += "tcgen05.wait::st.sync.aligned; tcgen05.fence::before_thread_sync; bar.sync 0;"
        body += "tcgen05.fence::after_thread_sync;"
    body += "ld.param.u64 %rd10, [p1]; ld.param.u64 %rd11, [p2]; ld.param.u32 %r17, [p3];\n"
    for step in range(4):
        body += f"setp.ne.u32 %p5, {step}, 0;"
        body += "@%p2 tcgen05.mma.cta_group::1.kind::f16 [%r3], %rd10, %rd11, %r17, %p5;"
        body += "add.u64 %rd10, %rd10, 2; add.u64 %rd11, %rd11, 2;\n"
    body += COMMIT + read_columns(32, 4) + fill(FREE, g=1, columns=32)
    text = kernel(body, ["u64", "u64", "u64", "u32", "u64"], shared=SHARED)
    for seed in SEEDS:
        out = np.zeros((128, 32), np.float32)
        run(
            text,
            [image, blackwell(BASE + A_AT, 1024, 16, 2), blackwell(BASE + B_AT, 1024, 16, 2),
             dense_idesc(m, 32), out],
            block=128, schedule_seed=seed,
        )  # fmt: skip
        expected = A.astype(np.float64) @ B.astype(np.float64).T
        rows = np.arange(m)
        lanes = rows if m == 128 else rows // 16 * 32 + rows % 16
        np.testing.assert_allclose(out[lanes], expected, rtol=1e-5, atol=1e-5)


def two_mmas(first, second, waited, fence=True):
    """Two bf16 mma of one thread, each (address in tensor memory, m, n), in one order or another.

    `waited`: the first is committed, and its barrier waited for, with or without a `fence` after.
    """
    image = tiles_image([(0, np.zeros(49152, np.uint8))])
    wait = COMMIT.replace("WAIT", "WAIT0").replace("GO", "GO0") + "bar.sync 0;\n"
    wait = wait if fence else wait.replace("tcgen05.fence::after_thread_sync;", "")
    for seed in SEEDS:
        body = fill(ALLOC, g=1, columns=64) + fill(STAGE, rank="")
        body += "ld.param.u64 %rd10, [p1]; ld.param.u64 %rd11, [p2]; setp.ne.u32 %p5, %r1, %r1;\n"
        for i, (address, m, n) in enumerate((first, second)):
            body += f"add.u32 %r9, %r3, {address}; mov.b32 %r17, {dense_idesc(m, n)};\n"
            body += "@%p2 tcgen05.mma.cta_group::1.kind::f16 [%r9], %rd10, %rd11, %r17, %p5;\n"
            body += wait if waited and i == 0 else ""
        body += COMMIT.replace("[%r4], 0;", "[%r4], 1;") if waited else COMMIT
        body += fill(FREE, g=1, columns=64)
        text = kernel(body, ["u64"] * 3, shared=SHARED)
        operands = [blackwell(BASE + at, 1024, 16, 2) for at in (A_AT, B_AT)]
        run(text, [image, *operands], block=128, schedule_seed=seed)


LOWER_HALVES = 16 << 16


@pytest.mark.parametrize(
    ("second", "alike"),
    [((0, 128, 32), True), ((32, 128, 32), True), ((0, 128, 16), False), ((0, 128, 48), False),
     ((16, 128, 32), False), ((0, 64, 32), False), ((LOWER_HALVES, 64, 32), False)],
    ids=["same", "apart", "narrower", "wider", "overlapping", "fewer-rows", "other-lanes"],
)  # fmt: skip
def test_order_of_mmas_on_the_same_columns(second, alike):
    """Two mma run in the order of their issue if they have one accumulator and shape."""
    first = (0, 128, 32)
    two_mmas(first, second, waited=True)
    if alike:
        two_mmas(first, second, waited=False)
        return
    for one, other in ((first, second), (second, first)):
        with pytest.raises(PtxRuntimeError, match=r"mma writes .* another accumulator or shape"):
            two_mmas(one, other, waited=False)
    with pytest.raises(PtxRuntimeError, match=r"no tcgen05\.fence::after_thread_sync"):
        two_mmas(first, second, waited=True, fence=False)


def test_mmas_on_different_lanes_need_no_order():
    """With M = 64 an accumulator takes 16 of each 32 lanes: another one may take the rest."""
    two_mmas((0, 64, 32), (LOWER_HALVES, 64, 16), waited=False)
    two_mmas((LOWER_HALVES, 64, 16), (0, 64, 32), waited=False)


def test_nvfp4_mma_of_a_cta_pair():
    """M = 256: each CTA holds 128 rows of A and half of B; both hold all scales of B."""
    n = 128
    (a, sfa, A), (b, sfb, B) = nvfp4_problem(256, n)
    images = np.stack([
        tiles_image([
            (A_AT, swizzled_128(a[128 * r : 128 * r + 128])),
            (B_AT, swizzled_128(b[64 * r : 64 * r + 64])),
            (SFA_AT, scale_image(sfa[128 * r : 128 * r + 128])), (SFB_AT, scale_image(sfb)),
        ])
        for r in range(2)
    ])  # fmt: skip
    rank = "mov.u32 %r7, %cluster_ctarank; mad.wide.u32 %rd2, %r7, 65536, %rd2;"
    instruction = "tcgen05.mma.cta_group::2.kind::mxf4nvf4.block_scale.block16"
    leader = "mov.u32 %r7, %cluster_ctarank; setp.eq.and.u32 %p2, %r7, 0, %p2;\n"
    sync = "barrier.cluster.arrive; barrier.cluster.wait;\n"
    commit = fill(COMMIT.replace("::1.mb", "::2.mb").replace(
        "shared::cluster.b64 [%r4]", "shared::cluster.multicast::cluster.b64 [%r4], %rs1"
    ))  # fmt: skip
    body = fill(ALLOC, g=2, columns=512) + fill(STAGE, rank=rank) + sync + leader
    body += "mov.b16 %rs1, 3;\n" + nvfp4_body(instruction, n, group=2) + commit
    body += (
        "mad.lo.u32 %r7, %r7, 128, 0; add.u32 %r7, %r7, %r1; mov.b32 %r5, %r1; mov.b32 %r1, %r7;"
    )
    body += read_columns(n, 6) + sync + fill(FREE, g=2, columns=512)
    text = kernel(body, ["u64"] * 5 + ["u32", "u64"], shared=SHARED)
    params = [
        images, blackwell(BASE + A_AT, 1024, 16, 2), blackwell(BASE + B_AT, 1024, 16, 2),
        blackwell(BASE + SFA_AT, 128, 16), blackwell(BASE + SFB_AT, 128, 16),
        idesc_scaled(256, n, "ue4m3"),
    ]  # fmt: skip
    for seed in SEEDS:
        out = np.zeros((256, n), np.float32)
        run(text, [*params, out], block=128, grid=2, cluster=(2, 1, 1), schedule_seed=seed)
        np.testing.assert_allclose(out, A @ B.T, rtol=1e-6, atol=1e-5)


def nvfp4_variant(change, *, seed=0, params_change=None):
    (a, sfa, _), (b, sfb, _) = nvfp4_problem(128, 128)
    image = tiles_image([
        (A_AT, swizzled_128(a)), (B_AT, swizzled_128(b)), (SFA_AT, scale_image(sfa)),
        (SFB_AT, scale_image(sfb)),
    ])  # fmt: skip
    instruction = "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X"
    body = fill(ALLOC, g=1, columns=512) + fill(STAGE, rank="") + nvfp4_body(instruction, 128)
    body += COMMIT + read_columns(128, 6) + fill(FREE, g=1, columns=512)
    params = [
        image, blackwell(BASE + A_AT, 1024, 16, 2), blackwell(BASE + B_AT, 1024, 16, 2),
        blackwell(BASE + SFA_AT, 128, 16), blackwell(BASE + SFB_AT, 128, 16),
        idesc_scaled(128, 128, "ue4m3"), np.zeros((128, 128), np.float32),
    ]  # fmt: skip
    if params_change:
        params_change(params)
    text = kernel(change(body), ["u64"] * 5 + ["u32", "u64"], shared=SHARED)
    run(text, params, block=128, schedule_seed=seed)


def set_param(index, value):
    def change(params):
        params[index] = value

    return change


@pytest.mark.parametrize(
    ("change", "params_change", "message"),
    [
        (lambda b: b.replace("fence.proxy.async.shared::cta;", ""), None, "no fence.proxy.async"),
        (lambda b: b.replace("@%p2 tcgen05.cp", "@!%p2 nanosleep.u32 1; @%p4 tcgen05.cp", 1), None,
         "never written"),
        (lambda b: b.replace("@%p2 tcgen05.mma", "@%p1 tcgen05.mma"), None, "more than one thread"),
        (lambda b: b.replace("[%r19], %p5", "[%r18+64], %p5"), None, "scale factors of B"),
        (lambda b: b, set_param(5, idesc_scaled(128, 128, "ue4m3", sfa=2)), "scale factor ids"),
        (lambda b: b, set_param(5, idesc_scaled(128, 128, "ue4m3", a_type=5)), "E2M1 is 1"),
        (lambda b: b, set_param(5, idesc_scaled(256, 128, "ue4m3")), "of shape 256x128"),
        (lambda b: b, set_param(1, blackwell(BASE, 1024, 16, 2) ^ 1 << 46), "must be 0b001"),
        (lambda b: b, set_param(1, blackwell(BASE, 1024, 16, 3)), "swizzle mode 3"),
        (lambda b: b.replace("cta_group::1.mbarrier", "cta_group::2.mbarrier"), None, "both CTA"),
        (lambda b: b.replace("@%p2 tcgen05.commit", "@%p4 tcgen05.commit"), None, "deadlock"),
    ],
    ids=["proxy-fence", "scales-missing", "all-lanes", "scale-address", "sf-id", "a-type", "m",
         "version", "swizzle", "groups", "no-commit"],
)  # fmt: skip
def test_mma_mistakes(change, params_change, message):
    with pytest.raises(PtxRuntimeError, match=message):
        for seed in SEEDS:
            nvfp4_variant(change, seed=seed, params_change=params_change)


def test_reading_d_before_the_commit_arrives():
    def change(body):
        start = body.index("WAIT: mbarrier")
        return body[:start] + body[body.index("GO: tcgen05") + 3 :]

    with pytest.raises(PtxRuntimeError, match=r"never written|pending"):
        for seed in SEEDS:
            nvfp4_variant(change, seed=seed)


def test_dealloc_needs_the_other_warps_loads_ordered():
    load = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r60}, [%r6]; tcgen05.wait::ld.sync.aligned;"
    good = ALLOC1 + tag_memory(1) + load + FREE1
    run(kernel(good, shared=SHARED), [], block=128)
    bad = ALLOC1 + tag_memory(1) + load + FREE1.replace("bar.sync 0;", "")
    with pytest.raises(PtxRuntimeError, match=r"dealloc of |is not allocated"):
        for seed in SEEDS:
            run(kernel(bad, shared=SHARED), [], block=128, schedule_seed=seed)


def test_store_over_columns_that_a_load_has_yet_to_read():
    """Only wait::ld, or a use of the register that makes the assembler wait, orders the two."""
    load = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r60}, [%r6];\n"
    store = "mov.b32 %r61, 7; tcgen05.st.sync.aligned.32x32b.x1.b32 [%r6], {%r61};"
    store += "tcgen05.wait::st.sync.aligned;\n"
    for between in ("tcgen05.wait::ld.sync.aligned;", "mov.b32 %r62, %r60;", ""):
        body = ALLOC1 + tag_memory(1) + load + between + store + dump(1, 0, 60) + FREE1
        for seed in SEEDS:
            out = np.zeros((128, 1), U32)
            if between:
                run(kernel(body, ["u64"], shared=SHARED), [out], block=128, schedule_seed=seed)
                np.testing.assert_array_equal(out[:, 0], 1000 * np.arange(128))
            else:
                with pytest.raises(PtxRuntimeError, match=r"yet to read \(no wait::ld\)"):
                    run(kernel(body, ["u64"], shared=SHARED), [out], block=128, schedule_seed=seed)


# -- ordering between threads ----------------------------------------------------------------------
# Warps store to tensor memory, warp 0's thread 0 copies over the columns, all read them again, and
# thread 0 copies once more: each handover from one thread's tcgen05 operation to another's.
HANDOVER = """
tcgen05.st.sync.aligned.32x32b.x4.b32 [%r6], {%r20, %r21, %r22, %r23};
STORED
BEFORE1 bar.sync 0; AFTER1
ld.param.u64 %rd10, [p1];
@%p2 tcgen05.cp.cta_group::1.128x128b [%r3], %rd10;
@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r4];
WAIT0: mbarrier.try_wait.parity.shared.b64 %p4, [%r4], 0; @!%p4 bra WAIT0;
AFTER2
tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r20, %r21, %r22, %r23}, [%r6];
LOADED
BEFORE3 bar.sync 0; AFTER3
@%p2 tcgen05.cp.cta_group::1.128x128b [%r3], %rd10;
@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r4];
WAIT1: mbarrier.try_wait.parity.shared.b64 %p4, [%r4], 1; @!%p4 bra WAIT1;
"""
HANDED = {
    "STORED": "tcgen05.wait::st.sync.aligned;",
    "LOADED": "tcgen05.wait::ld.sync.aligned;",
    "BEFORE1": "tcgen05.fence::before_thread_sync;",
    "AFTER1": "tcgen05.fence::after_thread_sync;",
    "AFTER2": "tcgen05.fence::after_thread_sync;",
    "BEFORE3": "tcgen05.fence::before_thread_sync;",
    "AFTER3": "tcgen05.fence::after_thread_sync;",
}
MISSING = {
    "STORED": r"yet to write \(no wait::st\)",
    "LOADED": r"yet to read \(no wait::ld\)",
    "BEFORE1": "no tcgen05.fence::before_thread_sync before it",
    "AFTER1": "no tcgen05.fence::after_thread_sync since",
    "AFTER2": "no tcgen05.fence::after_thread_sync since",
    "BEFORE3": "no tcgen05.fence::before_thread_sync before it",
    "AFTER3": "no tcgen05.fence::after_thread_sync since",
}


def handover(without, seed, **options):
    zeros = "".join(f"mov.b32 %r{20 + i}, 0;" for i in range(4))
    body = ALLOC1 + fill(STAGE, rank="") + zeros + HANDOVER
    for key, instruction in HANDED.items():
        body = body.replace(key, "" if key in without else instruction)
    image, _ = no_swizzle(128, 16, 256, 128)
    text = kernel(body + FREE1, ["u64", "u64"], shared=SHARED)
    run(text, [image, blackwell(BASE, 256, 128)], block=128, schedule_seed=seed, **options)


@pytest.mark.parametrize("without", HANDED)
def test_handing_tensor_memory_from_thread_to_thread(without):
    for seed in SEEDS:
        handover((), seed)
        with pytest.raises(PtxRuntimeError, match=MISSING[without]):
            handover((without,), seed)


def test_fences_are_not_asked_of_code_that_has_none():
    """NVIDIA's code generator leaves the fences out; waits and synchronization it has."""
    fences = tuple(k for k, v in HANDED.items() if "fence" in v)
    for seed in SEEDS:
        handover(fences, seed, tensor_fences=False)
        with pytest.raises(PtxRuntimeError, match=r"tcgen05\.fence"):
            handover(fences, seed, tensor_fences=True)
        with pytest.raises(PtxRuntimeError, match=r"no wait::st"):
            handover((*fences, "STORED"), seed, tensor_fences=False)
