# SPDX-License-Identifier: Apache-2.0
"""Warps of the PTX machine: divergence, shuffles, votes, and memory accesses of lanes."""

import numpy as np
import pytest
from ptx_machine import Pointer, PtxError, PtxRuntimeError
from ptx_machine.testing import SEEDS, kernel, lanewise, run

U32 = np.uint32
LANE = np.arange(32)


def lanes(body, *inputs, outputs=1, dtype=U32):
    results = lanewise(body, [np.asarray(i) for i in inputs], [dtype] * outputs)
    return results[0] if outputs == 1 else results


ID = np.arange(32, dtype=U32)


# -- control flow --------------------------------------------------------------------------------
def test_if_else_reconverges():
    body = """
setp.lt.u32 %p1, {a0}, 7;
mov.b32 {d0}, 0;
@%p1 bra THEN;
add.u32 {d0}, {a0}, 100;
bra JOIN;
THEN: add.u32 {d0}, {a0}, 1000;
JOIN: vote.sync.ballot.b32 {d1}, %p1, -1;
"""
    value, ballot = lanes(body, ID, outputs=2)
    np.testing.assert_array_equal(value, np.where(LANE < 7, LANE + 1000, LANE + 100))
    assert (ballot == 0x7F).all()


def test_loop_with_lane_dependent_trip_count():
    body = """
mov.b32 {d0}, 0; mov.b32 %r5, 0;
LOOP: setp.ge.u32 %p1, %r5, {a0};
@%p1 bra DONE;
add.u32 {d0}, {d0}, %r5; add.u32 %r5, %r5, 1;
bra LOOP;
DONE: activemask.b32 {d1};
"""
    total, active = lanes(body, ID, outputs=2)
    np.testing.assert_array_equal(total, LANE * (LANE - 1) // 2)
    assert (active == 0xFFFFFFFF).all()


def test_nested_divergence_and_exit():
    out = np.zeros(32, U32)
    text = kernel(
        """
mov.u32 %r1, %tid.x;
setp.gt.u32 %p1, %r1, 20; @%p1 exit;
and.b32 %r2, %r1, 1; setp.eq.u32 %p2, %r2, 1;
@%p2 bra ODD;
and.b32 %r3, %r1, 2; setp.eq.u32 %p3, %r3, 2; mov.b32 %r4, 1;
@%p3 bra STORE; mov.b32 %r4, 2; bra STORE;
ODD: mov.b32 %r4, 3;
STORE: ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd1, %r1, 4, %rd1; st.global.u32 [%rd1], %r4;
""",
        ["u64"],
    )
    for seed in SEEDS:
        out[:] = 0
        run(text, [out], schedule_seed=seed)
        expected = np.where(LANE % 2 == 1, 3, np.where(LANE % 4 == 2, 1, 2))
        np.testing.assert_array_equal(out, np.where(LANE <= 20, expected, 0))


def test_indexed_branch():
    body = """
and.b32 %r5, {a0}, 3;
T: .branchtargets A, B, C, D;
brx.idx %r5, T;
A: mov.b32 {d0}, 10; bra E;
B: mov.b32 {d0}, 11; bra E;
C: mov.b32 {d0}, 12; bra E;
D: mov.b32 {d0}, 13;
E: activemask.b32 {d1};
"""
    value, active = lanes(body, ID, outputs=2)
    np.testing.assert_array_equal(value, 10 + LANE % 4)
    assert (active == 0xFFFFFFFF).all()


def test_predicated_instruction_keeps_inactive_lanes():
    body = "mov.b32 {d0}, 7; setp.eq.u32 %p1, {a0}, 3; @!%p1 add.u32 {d0}, {d0}, {a0};"
    np.testing.assert_array_equal(lanes(body, ID), np.where(LANE == 3, 7, 7 + LANE))


def test_warp_instruction_with_missing_lanes_is_an_error():
    body = """
setp.lt.u32 %p1, {a0}, 7; mov.b32 {d0}, 0;
@%p1 bra SKIP; shfl.sync.idx.b32 {d0}, {a0}, 8, 31, -1; SKIP: mov.b32 %r2, 0;
"""
    with pytest.raises(PtxRuntimeError, match=r"lanes 0x0000007f of membermask .* are elsewhere"):
        lanes(body, ID)


def test_uniform_branch_must_be_uniform():
    with pytest.raises(PtxRuntimeError, match=r"bra.uni"):
        lanes("setp.lt.u32 %p1, {a0}, 7; mov.b32 {d0}, 0; @%p1 bra.uni L; L: mov.b32 %r2, 0;", ID)


# -- warp-wide -----------------------------------------------------------------------------------
def test_shuffles():
    value = (LANE * 3 + 1).astype(U32)
    shfl = lambda text: lanes(f"shfl.sync.{text};", value)  # noqa: E731
    np.testing.assert_array_equal(shfl("bfly.b32 {d0}, {a0}, 5, 31, -1"), value[LANE ^ 5])
    up = np.where(LANE >= 3, value[LANE - 3], value)
    np.testing.assert_array_equal(shfl("up.b32 {d0}, {a0}, 3, 0, -1"), up)
    down = np.where(LANE + 3 < 32, value[(LANE + 3) % 32], value)
    np.testing.assert_array_equal(shfl("down.b32 {d0}, {a0}, 3, 31, -1"), down)
    np.testing.assert_array_equal(shfl("idx.b32 {d0}, {a0}, 9, 31, -1"), np.full(32, value[9]))
    # Segments of eight lanes: c = (mask 24 << 8) | 7 clamps to the segment.
    segmented = shfl(f"idx.b32 {{d0}}, {{a0}}, 2, {24 << 8 | 7}, -1")
    np.testing.assert_array_equal(segmented, value[LANE // 8 * 8 + 2])
    body = "shfl.sync.up.b32 {d0}|%p1, {a0}, 3, 0, -1; selp.b32 {d1}, 1, 0, %p1;"
    np.testing.assert_array_equal(lanes(body, value, outputs=2)[1], LANE >= 3)


def test_votes_match_redux():
    body = """
and.b32 %r5, {a0}, 3; setp.eq.u32 %p1, %r5, 1;
vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1;
selp.b32 %r6, 1, 0, %p2; selp.b32 %r7, 2, 0, %p3; or.b32 {d0}, %r6, %r7;
match.any.sync.b32 {d1}, %r5, -1;
redux.sync.max.s32 {d2}, {a1}, -1;
"""
    negative = (-LANE - 1).astype(np.int32).view(U32)
    a, b, c = lanes(body, ID, negative, outputs=3)
    assert (a == 1).all()
    np.testing.assert_array_equal(b, [0x11111111 << (i % 4) for i in range(32)])
    assert (c == 0xFFFFFFFF).all()
    assert (lanes("redux.sync.add.u32 {d0}, {a0}, -1;", ID) == 496).all()
    assert (lanes("redux.sync.xor.b32 {d0}, {a0}, -1;", ID) == 0).all()


def test_elect_picks_one_lane():
    body = "elect.sync %r5|%p1, -1; selp.b32 {d0}, 1, 0, %p1; mov.b32 {d1}, {a0};"
    chosen, _ = lanes(body, ID, outputs=2)
    assert chosen.sum() == 1


def test_special_registers():
    out = np.zeros((2, 2, 64), U32)
    text = kernel(
        """
mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %nctaid.x;
mov.u32 %r5, %laneid; mov.u32 %r6, %warpid; mov.u32 %r7, %lanemask_lt; popc.b32 %r7, %r7;
mad.lo.u32 %r8, %r2, 32, %r1; mad.lo.u32 %r9, %r3, 64, %r8;
ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd1, %r9, 4, %rd1;
mad.lo.u32 %r10, %r6, 100, %r5; mad.lo.u32 %r10, %r4, 1000, %r10;
st.global.u32 [%rd1], %r10; st.global.u32 [%rd1+512], %r7;
""",
        ["u64"],
    )
    run(text, [out], grid=2, block=(32, 2))
    for warp in range(2):
        np.testing.assert_array_equal(out[0, 0, 32 * warp :][:32], 2000 + 100 * warp + LANE)
    np.testing.assert_array_equal(out[1, 0, :32], LANE)


# -- memory of lanes -----------------------------------------------------------------------------
SHARED = ".shared .align 16 .b8 buf[1024];"


def test_vector_loads_and_sign_extension():
    data = np.arange(-64, 64, dtype=np.int8)
    out = np.zeros((32, 4), np.int32)
    text = kernel(
        """
mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1;
ld.global.v4.s8 {%rs1, %rs2, %rs3, %rs4}, [%rd2];
cvt.s32.s16 %r2, %rs1; cvt.s32.s16 %r3, %rs2; cvt.s32.s16 %r4, %rs3; cvt.s32.s16 %r5, %rs4;
ld.param.u64 %rd1, [p1]; mad.wide.u32 %rd2, %r1, 16, %rd1;
st.global.v4.b32 [%rd2], {%r2, %r3, %r4, %r5};
""",
        ["u64", "u64"],
    )
    run(text, [data, out])
    np.testing.assert_array_equal(out.reshape(-1), data)


@pytest.mark.parametrize(
    ("address", "message"),
    [(4 * 32, r"out of bounds: bytes .128, 132. of array"), (2, "misaligned"),
     (-4, "no global allocation")],
)  # fmt: skip
def test_bad_global_accesses(address, message):
    body = f"ld.param.u64 %rd1, [p0]; ld.global.u32 %r1, [%rd1+{address}];"
    text = kernel(body, ["u64"])
    with pytest.raises(PtxRuntimeError, match=message) as caught:
        run(text, [np.zeros(32, U32)])
    assert "ld.global.u32" in text.split("\n")[caught.value.line - 1]


def test_uninitialized_global_memory():
    text = kernel("ld.param.u64 %rd1, [p0]; ld.global.u32 %r1, [%rd1];", ["u64"])
    array = np.zeros(32, U32)
    run(text, [array])
    with pytest.raises(PtxRuntimeError, match="never written"):
        run(text, [array], uninitialized=[array])


def test_pointer_offsets():
    array = np.arange(8, dtype=U32)
    out = np.zeros(1, U32)
    text = kernel(
        "ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; ld.global.u32 %r1, [%rd1];"
        "st.global.u32 [%rd2], %r1;",
        ["u64", "u64"],
    )
    run(text, [Pointer(array, 12), out], block=1)
    assert out[0] == 3


def test_shared_memory_starts_poisoned():
    for body, message in (
        ("ld.shared.u32 %r2, [buf];", "never written"),
        ("st.shared.u8 [buf], 1; ld.shared.u16 %r2, [buf];", "never written"),
        ("ld.shared.u32 %r2, [buf+1024];", "out of bounds"),
        ("ld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [buf+4];", "misaligned"),
    ):
        with pytest.raises(PtxRuntimeError, match=message):
            run(kernel(body.replace("u8 [buf], 1", "u8 [buf], %rs1"), shared=SHARED), [])


def test_local_memory_is_private_and_poisoned():
    body = """
.local .align 4 .b8 stack[64];
mov.u32 %r5, stack; st.local.u32 [%r5+4], {a0}; ld.local.u32 {d0}, [%r5+4];
"""
    np.testing.assert_array_equal(lanes(body, ID), LANE)
    with pytest.raises(PtxRuntimeError, match="never written"):
        lanes(".local .align 4 .b8 s[64]; mov.u32 %r5, s; ld.local.u32 {d0}, [%r5];", ID)


def test_generic_addresses():
    body = """
mov.u64 %rd5, buf; cvta.shared.u64 %rd6, %rd5; isspacep.shared %p1, %rd6;
selp.b32 %r5, 1, 0, %p1; mad.wide.u32 %rd7, {a0}, 4, %rd6; st.u32 [%rd7], %r5;
cvta.to.shared.u64 %rd8, %rd7; ld.shared.u32 {d0}, [%rd8];
"""
    from ptx_machine import testing

    # buf is a module variable: lanewise has no place for it, a function variable serves as well.
    assert (lanes(".shared .align 16 .b8 buf[128];" + body, ID) == 1).all()
    assert testing.SEEDS


def test_atomics_are_atomic():
    counter = np.zeros(2, U32)
    text = kernel(
        """
mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [p0];
atom.global.add.u32 %r2, [%rd1], 1; atom.global.max.u32 %r3, [%rd1+4], %r1;
red.global.add.u32 [%rd1], 2;
""",
        ["u64"],
    )
    run(text, [counter], block=96, grid=2)
    assert counter.tolist() == [2 * 96 * 3, 95]


def test_cas_and_float_atomics():
    data = np.array([0, 0x40000000], U32)
    text = kernel(
        """
ld.param.u64 %rd1, [p0]; atom.global.cas.b32 %r2, [%rd1], 0, 5;
mov.b32 %r3, 0f3F800000; red.global.add.f32 [%rd1+4], %r3;
""",
        ["u64"],
    )
    run(text, [data], block=4)
    assert data.tolist() == [5, np.float32(6).view(U32)]


def test_read_only_constants():
    table = ".const .align 4 .b32 t[4] = {3, 1, 4, 1};"
    out = np.zeros(1, U32)
    body = "ld.const.u32 %r1, [t+8]; ld.param.u64 %rd1, [p0]; st.global.u32 [%rd1], %r1;"
    run(kernel(body, ["u64"], shared=table), [out], block=1)
    assert out[0] == 4


def test_unknown_kernel_name():
    with pytest.raises(PtxError, match="no kernel"):
        run(kernel(""), [], kernel="other")
