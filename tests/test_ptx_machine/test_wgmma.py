# SPDX-License-Identifier: Apache-2.0
"""wgmma of the PTX machine: descriptors, swizzles, register fragments, groups and fences."""

import ml_dtypes
import numpy as np
import pytest
from ptx_machine import PtxRuntimeError
from ptx_machine.testing import SEEDS, kernel, run

U32, BF16 = np.uint32, ml_dtypes.bfloat16
SPAN = {"none": 16, "32B": 32, "64B": 64, "128B": 128}
MODE = {"none": 0, "128B": 1, "64B": 2, "32B": 3}
BASE_A, BASE_B = 1024, 1024 + 16384  # where the two tiles lie in shared memory
SHARED = ".shared .align 1024 .b8 tiles[32768];"


def image(matrix, swizzle, stride, leading, *, mn_major=False):
    """Shared-memory bytes of an (extent, K) operand in a canonical layout.

    The address of each element is written out from the ISA's definitions: a swizzle atom is eight
    rows of ``SPAN`` bytes; ``stride`` and ``leading`` are the descriptor's byte offsets.
    """
    extent, k = matrix.shape
    size = matrix.dtype.itemsize
    span = SPAN[swizzle]
    out = np.zeros(16384, np.uint8)
    for i in range(extent):
        for j in range(k):
            if not mn_major:
                chunk, byte = divmod(j * size, 16)
                address = i // 8 * stride + i % 8 * span + byte
                address += chunk * leading if swizzle == "none" else chunk * 16
            else:
                chunk, byte = divmod(i * size, 16)
                if swizzle == "none":
                    address = chunk * stride + j % 8 * 16 + j // 8 * leading + byte
                else:
                    per = span // 16
                    address = chunk // per * leading + chunk % per * 16 + byte
                    address += j % 8 * span + j // 8 * stride
            line = address >> 7
            xor = {"none": 0, "32B": line & 1, "64B": line & 3, "128B": line & 7}[swizzle]
            address ^= xor << 4
            out[address : address + size] = np.frombuffer(matrix[i, j].tobytes(), np.uint8)
    return out


def descriptor(base, swizzle, stride, leading):
    return base >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | MODE[swizzle] << 62


STAGE = """
mov.u32 %r1, %tid.x; mov.u32 %r2, tiles; mov.b32 %r3, %r1;
COPY: setp.ge.u32 %p1, %r3, 2048; @%p1 bra STAGED;
ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r3, 16, %rd1; mad.lo.u32 %r4, %r3, 16, %r2;
ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%rd2]; st.shared.v4.u32 [%r4], {%r5, %r6, %r7, %r8};
add.u32 %r3, %r3, 128; bra COPY;
STAGED: FENCE bar.sync 0;
ld.param.u64 %rd10, [p1]; ld.param.u64 %rd11, [p2];
"""
FENCE = "fence.proxy.async.shared::cta;"


def run_wgmma(a_image, b_image, desc_a, desc_b, core, registers, *, seed=0, fence=FENCE, extra=()):
    """Stages the tiles, runs ``core``, and returns registers %r20... of the 128 threads."""
    images = np.concatenate([a_image, b_image])
    out = np.zeros((128, registers), U32)
    body = STAGE.replace("FENCE", fence) + core
    position = 3 + len(extra)
    body += f"ld.param.u64 %rd1, [p{position}]; mad.wide.u32 %rd2, %r1, {4 * registers}, %rd1;\n"
    body += "\n".join(f"st.global.b32 [%rd2+{4 * i}], %r{20 + i};" for i in range(registers))
    text = kernel(body, ["u64"] * (position + 1), shared=SHARED, target="sm_90a")
    run(text, [images, desc_a, desc_b, *extra, out], block=128, schedule_seed=seed)
    return out


def accumulators(out, n):
    """(64, n) matrix from the f32 accumulator registers of a warpgroup."""
    values = out.view(np.float32)
    matrix = np.zeros((64, n))
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(n // 2):
            row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
            matrix[row, 8 * (i // 4) + 2 * (lane % 4) + i % 2] = values[thread, i]
    return matrix


def zero(count):
    return "\n".join(f"mov.b32 %r{20 + i}, 0;" for i in range(count)) + "\n"


def regs(count, first=20):
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def mma(shape, count, types="f32.bf16.bf16", tail="1, 1, 1, 0, 0", a="%rd10"):
    return f"wgmma.mma_async.sync.aligned.{shape}.{types} {regs(count)}, {a}, %rd11, {tail};\n"


END = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"


@pytest.mark.parametrize("swizzle", ["none", "32B", "64B", "128B"])
def test_k_major_swizzles(swizzle):
    rng = np.random.default_rng(0)
    A = rng.standard_normal((64, 16)).astype(BF16)
    B = rng.standard_normal((24, 16)).astype(BF16)
    span = SPAN[swizzle]
    stride = 8 * span if swizzle != "none" else 256
    leading = 128 if swizzle == "none" else 16
    core = zero(12) + "wgmma.fence.sync.aligned;\n" + mma("m64n24k16", 12) + END
    out = run_wgmma(
        image(A, swizzle, stride, leading), image(B, swizzle, stride, leading),
        descriptor(BASE_A, swizzle, stride, leading), descriptor(BASE_B, swizzle, stride, leading),
        core, 12,
    )  # fmt: skip
    expected = A.astype(np.float64) @ B.astype(np.float64).T
    np.testing.assert_allclose(accumulators(out, 24), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("swizzle", ["none", "32B", "64B", "128B"])
def test_mn_major_operands(swizzle):
    rng = np.random.default_rng(1)
    A = rng.standard_normal((64, 16)).astype(BF16)
    B = rng.standard_normal((64, 16)).astype(BF16)
    span = SPAN[swizzle]
    # Eight rows of k apart; next group of span bytes along M or N.
    if swizzle == "none":
        stride, leading = 128, 1024
    else:
        leading, stride = 16 * span, 8 * span
    core = (
        zero(32) + "wgmma.fence.sync.aligned;\n" + mma("m64n64k16", 32, tail="1, 1, 1, 1, 1") + END
    )
    out = run_wgmma(
        image(A, swizzle, stride, leading, mn_major=True),
        image(B, swizzle, stride, leading, mn_major=True),
        descriptor(BASE_A, swizzle, stride, leading), descriptor(BASE_B, swizzle, stride, leading),
        core, 32,
    )  # fmt: skip
    expected = A.astype(np.float64) @ B.astype(np.float64).T
    np.testing.assert_allclose(accumulators(out, 64), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("types", "dtype", "k"),
    [("f32.f16.f16", np.float16, 16), ("f32.e4m3.e4m3", ml_dtypes.float8_e4m3fn, 32),
     ("f32.tf32.tf32", np.float32, 8)],
)  # fmt: skip
def test_element_types(types, dtype, k):
    rng = np.random.default_rng(2)
    A = rng.integers(-4, 5, (64, k)).astype(dtype)
    B = rng.integers(-4, 5, (8, k)).astype(dtype)
    tail = "1, 1, 1, 0, 0" if k == 16 else "1, 1, 1"
    core = zero(4) + "wgmma.fence.sync.aligned;\n"
    core += mma(f"m64n8k{k}", 4, types, tail) + END
    out = run_wgmma(
        image(A, "128B", 1024, 16), image(B, "128B", 1024, 16),
        descriptor(BASE_A, "128B", 1024, 16), descriptor(BASE_B, "128B", 1024, 16), core, 4,
    )  # fmt: skip
    expected = A.astype(np.float64) @ B.astype(np.float64).T
    np.testing.assert_allclose(accumulators(out, 8), expected)


def operands(n=8):
    rng = np.random.default_rng(3)
    A = rng.standard_normal((64, 64)).astype(BF16)
    B = rng.standard_normal((n, 64)).astype(BF16)
    return A, B, image(A, "128B", 1024, 16), image(B, "128B", 1024, 16)


def test_descriptors_step_inside_the_swizzle_row():
    # Four k-steps of 32 bytes along a 128-byte row: the address advances, the pattern stays.
    A, B, a_image, b_image = operands()
    core = zero(4) + "wgmma.fence.sync.aligned;\n"
    for step in range(4):
        core += mma("m64n8k16", 4)
        if step < 3:
            core += "add.u64 %rd10, %rd10, 2; add.u64 %rd11, %rd11, 2;\n"
    for seed in SEEDS:
        out = run_wgmma(
            a_image, b_image, descriptor(BASE_A, "128B", 1024, 16),
            descriptor(BASE_B, "128B", 1024, 16), core + END, 4, seed=seed,
        )  # fmt: skip
        expected = A.astype(np.float64) @ B.astype(np.float64).T
        np.testing.assert_allclose(accumulators(out, 8), expected, rtol=1e-5, atol=1e-5)


def test_register_operand_a():
    A, B, a_image, b_image = operands()
    fragments = np.zeros((128, 8), BF16)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        g, t = divmod(lane, 4)
        for i in range(8):
            row = 16 * warp + g + (8 if i in (2, 3, 6, 7) else 0)
            fragments[thread, i] = A[row, 2 * t + (i & 1) + (8 if i >= 4 else 0)]
    core = "ld.param.u64 %rd1, [p3]; mad.wide.u32 %rd2, %r1, 16, %rd1;\n"
    core += "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd2];\n" + zero(4)
    core += "wgmma.fence.sync.aligned;\n"
    core += mma("m64n8k16", 4, a="{%r10, %r11, %r12, %r13}", tail="0, 1, -1, 0") + END
    out = run_wgmma(
        a_image, b_image, 0, descriptor(BASE_B, "128B", 1024, 16), core, 4,
        extra=(fragments.view(U32),),
    )  # fmt: skip
    expected = -A[:, :16].astype(np.float64) @ B[:, :16].astype(np.float64).T
    np.testing.assert_allclose(accumulators(out, 8), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("core", "message"),
    [
        (mma("m64n8k16", 4) + END, "without wgmma.fence"),
        ("wgmma.fence.sync.aligned;" + mma("m64n8k16", 4) + "wgmma.commit_group.sync.aligned;",
         "a wgmma in flight still holds"),
        ("wgmma.fence.sync.aligned;" + mma("m64n8k16", 4)
         + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;",
         "a wgmma in flight still holds"),
        ("wgmma.fence.sync.aligned;" + mma("m64n8k16", 4) + END
         + "mov.b32 %r20, 0;" + mma("m64n8k16", 4) + END, "after the last wgmma.fence"),
        ("mov.u32 %r9, %warpid; setp.eq.u32 %p3, %r9, 1; wgmma.fence.sync.aligned;"
         "@%p3 bra SKIP;" + mma("m64n8k16", 4) + END + "SKIP: mov.b32 %r9, 0;", "deadlock"),
    ],
    ids=["no-fence", "no-wait", "wait-for-too-few", "register-touched", "three-warps"],
)  # fmt: skip
def test_mistakes(core, message):
    _, _, a_image, b_image = operands()
    with pytest.raises(PtxRuntimeError, match=message):
        run_wgmma(
            a_image, b_image, descriptor(BASE_A, "128B", 1024, 16),
            descriptor(BASE_B, "128B", 1024, 16), zero(4) + core, 4,
        )  # fmt: skip


@pytest.mark.parametrize("committed", [True, False])
def test_operand_registers_stay_until_the_wait(committed):
    """The wait lets one group be in flight, or there is no group yet."""
    _, _, a_image, b_image = operands()
    registers = "{%r10, %r11, %r12, %r13}"
    one = mma("m64n8k16", 4, a=registers, tail="1, 1, 1, 0")
    commit = "wgmma.commit_group.sync.aligned;\n"
    core = "".join(f"mov.b32 %r{i}, 0;\n" for i in range(10, 14)) + zero(4)
    core += "wgmma.fence.sync.aligned;\n" + one + commit * committed
    core += "wgmma.wait_group.sync.aligned 1;\nmov.b32 %r12, 1;\nwgmma.fence.sync.aligned;\n"
    core += one + END
    for seed in SEEDS:
        with pytest.raises(PtxRuntimeError, match="register %r12, an operand of a wgmma"):
            run_wgmma(a_image, b_image, 0, descriptor(BASE_B, "128B", 1024, 16), core, 4, seed=seed)


def test_operand_registers_are_written_before_the_fence():
    _, _, a_image, b_image = operands()
    core = "".join(f"mov.b32 %r{i}, 0;\n" for i in range(10, 13)) + zero(4)
    core += "wgmma.fence.sync.aligned;\nmov.b32 %r13, 0;\n"
    core += mma("m64n8k16", 4, a="{%r10, %r11, %r12, %r13}", tail="1, 1, 1, 0") + END
    with pytest.raises(PtxRuntimeError, match=r"written after the last wgmma\.fence"):
        run_wgmma(a_image, b_image, 0, descriptor(BASE_B, "128B", 1024, 16), core, 4)


def test_missing_proxy_fence():
    _, _, a_image, b_image = operands()
    core = zero(4) + "wgmma.fence.sync.aligned;\n" + mma("m64n8k16", 4) + END
    with pytest.raises(PtxRuntimeError, match=r"no fence.proxy.async"):
        run_wgmma(
            a_image, b_image, descriptor(BASE_A, "128B", 1024, 16),
            descriptor(BASE_B, "128B", 1024, 16), core, 4, fence="",
        )  # fmt: skip


def test_overwriting_an_operand_before_the_wait_shows():
    A, B, a_image, b_image = operands()
    core = zero(4) + "wgmma.fence.sync.aligned;\n" + mma("m64n8k16", 4)
    core += "wgmma.commit_group.sync.aligned; mad.lo.u32 %r4, %r1, 16, %r2;\n"
    core += "st.shared.v4.u32 [%r4], {%r1, %r1, %r1, %r1};\nwgmma.wait_group.sync.aligned 0;\n"
    expected = A[:, :16].astype(np.float64) @ B[:, :16].astype(np.float64).T
    wrong = 0
    for seed in SEEDS:
        try:
            out = run_wgmma(
                a_image, b_image, descriptor(BASE_A, "128B", 1024, 16),
                descriptor(BASE_B, "128B", 1024, 16), core, 4, seed=seed,
            )  # fmt: skip
            wrong += not np.allclose(accumulators(out, 8), expected)
        except PtxRuntimeError as error:  # a warp was first with its store
            assert "no synchronization between" in str(error)
            wrong += 1
    assert wrong == len(SEEDS)
