# SPDX-License-Identifier: Apache-2.0
"""Barriers, mbarriers, clusters and deadlocks of the PTX machine."""

import numpy as np
import pytest
from ptx_machine import DeadlockError, PtxError, PtxRuntimeError
from ptx_machine.testing import SEEDS, kernel, run

U32 = np.uint32
SHARED = ".shared .align 16 .b8 buf[1024];\n.shared .align 8 .b64 bar[4];"

EXCHANGE = """
mov.u32 %r1, %tid.x; mov.u32 %r2, buf; mad.lo.u32 %r3, %r1, 4, %r2;
st.shared.u32 [%r3], %r1;
{barrier}
xor.b32 %r4, %r1, 32; mad.lo.u32 %r5, %r4, 4, %r2; ld.shared.u32 %r6, [%r5];
ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.u32 [%rd2], %r6;
"""


def exchange(barrier, seed):
    out = np.zeros(64, U32)
    text = kernel(EXCHANGE.replace("{barrier}", barrier), ["u64"], shared=SHARED)
    run(text, [out], block=64, schedule_seed=seed)
    np.testing.assert_array_equal(out, np.arange(64) ^ 32)


@pytest.mark.parametrize("barrier", ["bar.sync 0;", "barrier.sync.aligned 3, 64;"])
def test_barrier_orders_the_exchange(barrier):
    for seed in SEEDS:
        exchange(barrier, seed)


def test_a_missing_barrier_shows():
    with pytest.raises(PtxRuntimeError, match="never written"):
        for seed in SEEDS:
            exchange("", seed)


RACES = {
    # What each of two warps does after a barrier; both touch the same words.
    "write-read": "@%p1 st.shared.u32 [%r5], %r1; @!%p1 ld.shared.u32 %r6, [%r5];",
    "write-write": "st.shared.u32 [%r5], %r1;",
    "read-write": "@%p1 ld.shared.u32 %r6, [%r5]; @!%p1 st.shared.u32 [%r5], %r1;",
}


@pytest.mark.parametrize("name", RACES)
def test_unordered_accesses_are_errors_under_every_schedule(name):
    body = """
mov.u32 %r1, %tid.x; mov.u32 %r2, buf; and.b32 %r3, %r1, 31; mad.lo.u32 %r5, %r3, 4, %r2;
setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.u32 [%r5], %r1; bar.sync 0;
"""
    text = kernel(body + RACES[name], shared=SHARED)
    for seed in SEEDS:
        with pytest.raises(PtxRuntimeError, match="no synchronization between"):
            run(text, [], block=64, schedule_seed=seed)
    run(text, [], block=64, races=False)
    # A barrier between the two, or disjoint words, and all is well.
    first, _, second = RACES[name].partition("; ")
    if second:
        ordered = kernel(body + first + "; bar.sync 0; " + second, shared=SHARED)
        run(ordered, [], block=64)
    apart = body.replace("and.b32 %r3, %r1, 31", "mov.b32 %r3, %r1").replace("@%p1 st", "st")
    run(kernel(apart + RACES[name], shared=SHARED), [], block=64)


def test_mbarrier_used_before_its_initialization_is_ordered():
    body = """
mov.u32 %r1, %tid.x; mov.u32 %r2, bar; setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared.b64 [%r2], 64; mbarrier.arrive.shared.b64 %rd3, [%r2];
"""
    for seed in SEEDS:
        with pytest.raises(PtxRuntimeError, match=r"no synchronization since|no mbarrier"):
            run(kernel(body, shared=SHARED), [], block=64, schedule_seed=seed)


def test_arrive_then_sync():
    body = """
mov.u32 %r1, %tid.x; mov.u32 %r2, buf; setp.ge.u32 %p1, %r1, 32; @%p1 bra CONSUMER;
mad.lo.u32 %r3, %r1, 4, %r2; st.shared.u32 [%r3], %r1; bar.arrive 1, 64; bra DONE;
CONSUMER: bar.sync 1, 64; sub.u32 %r4, %r1, 32; mad.lo.u32 %r3, %r4, 4, %r2;
ld.shared.u32 %r5, [%r3]; ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r4, 4, %rd1;
st.global.u32 [%rd2], %r5;
DONE: mov.b32 %r9, 0;
"""
    for seed in SEEDS:
        out = np.full(32, 99, U32)
        run(kernel(body, ["u64"], shared=SHARED), [out], block=64, schedule_seed=seed)
        np.testing.assert_array_equal(out, np.arange(32))


def test_barrier_reduction():
    body = """
mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 40;
barrier.red.popc.u32 %r2, 0, %p1; barrier.red.and.pred %p2, 0, %p1;
selp.b32 %r3, 1000, 0, %p2; add.u32 %r2, %r2, %r3;
ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.u32 [%rd2], %r2;
"""
    out = np.zeros(64, U32)
    run(kernel(body, ["u64"]), [out], block=64)
    assert (out == 40).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mov.u32 %r1, %warpid; setp.eq.u32 %p1, %r1, 0; @%p1 bar.sync 1, 64;", "deadlock"),
        ("bar.sync 1, 40;", "multiple of the warp size"),
        ("bar.sync 16;", "not in 0..15"),
        ("mov.u32 %r1, %warpid; add.u32 %r1, %r1, 1; mul.lo.u32 %r1, %r1, 64; bar.sync 1, %r1;",
         "disagree"),
        ("mov.u32 %r1, %laneid; setp.lt.u32 %p1, %r1, 5; @%p1 bar.sync 0;", "inactive lanes"),
        ("L: bra L;", "no progress"),
    ],
)  # fmt: skip
def test_barrier_mistakes(body, message, monkeypatch):
    monkeypatch.setattr("ptx_machine.machine.LIVELOCK_INSTRUCTIONS", 20000)
    with pytest.raises(PtxRuntimeError, match=message):
        run(kernel(body), [], block=64)


# -- mbarriers -----------------------------------------------------------------------------------
INIT = """
mov.u32 %r1, %tid.x; mov.u32 %r2, bar; mov.u32 %r3, buf; setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared.b64 [%r2], COUNT; bar.sync 0;
"""
WAIT = """
WAIT%N: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], PARITY; @%p2 bra DONE%N; bra WAIT%N; DONE%N:
"""


def wait(parity, n=0):
    return WAIT.replace("PARITY", str(parity)).replace("%N", str(n))


def test_phases_alternate():
    # 64 arrivals a phase; three phases; a value written before each arrival is seen after.
    body = INIT.replace("COUNT", "64")
    for phase in range(3):
        body += f"""
add.u32 %r4, %r1, {100 * phase}; mad.lo.u32 %r5, %r1, 4, %r3; st.shared.u32 [%r5], %r4;
mbarrier.arrive.shared.b64 %rd3, [%r2];
{wait(phase & 1, phase)}
xor.b32 %r6, %r1, 32; mad.lo.u32 %r6, %r6, 4, %r3; ld.shared.u32 %r7, [%r6];
ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.u32 [%rd2+{256 * phase}], %r7;
bar.sync 0;
"""
    for seed in SEEDS:
        out = np.zeros((3, 64), U32)
        run(kernel(body, ["u64"], shared=SHARED), [out], block=64, schedule_seed=seed)
        np.testing.assert_array_equal(out, (np.arange(64) ^ 32) + 100 * np.arange(3)[:, None])


def test_wait_on_the_preceding_phase_returns_at_once():
    # Parity 1 names the phase before the first: a fresh barrier has completed it.
    run(kernel(INIT.replace("COUNT", "1") + wait(1), shared=SHARED), [], block=32)


def test_state_token_and_test_wait():
    body = (
        INIT.replace("COUNT", "32")
        + """
mbarrier.arrive.shared.b64 %rd3, [%r2];
T: mbarrier.test_wait.shared.b64 %p2, [%r2], %rd3; @!%p2 bra T;
"""
    )
    run(kernel(body, shared=SHARED), [], block=32)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (INIT.replace("COUNT", "16") + "mbarrier.arrive.shared.b64 %rd3, [%r2];"
         "mbarrier.arrive.shared.b64 %rd3, [%r2], 17;", "17 arrivals"),
        (INIT.replace("COUNT", "0"), "count 0"),
        (INIT.replace("COUNT", "33") + "mbarrier.arrive.shared.b64 %rd3, [%r2];" + wait(0),
         "deadlock"),
        ("mov.u32 %r2, bar; mbarrier.arrive.shared.b64 %rd3, [%r2];", "no mbarrier"),
        (INIT.replace("COUNT", "1") + "ld.shared.u64 %rd4, [%r2];", "an mbarrier object"),
        (INIT.replace("COUNT", "1") + "@%p1 st.shared.u64 [%r2], %rd1;", "over an mbarrier"),
        (INIT.replace("COUNT", "1") + "@%p1 mbarrier.init.shared.b64 [%r2], 1;", "live mbarrier"),
        (INIT.replace("COUNT", "1") + "@%p1 mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r2], 16;",
         "unsettled transaction count"),
        (INIT.replace("COUNT", "1") + wait(2), "parity 2"),
        ("mov.u32 %r2, bar; mbarrier.init.shared.b64 [%r2+4], 1;", "8-byte aligned"),
    ],
    ids=lambda v: v[-24:] if isinstance(v, str) else None,
)  # fmt: skip
def test_mbarrier_mistakes(body, message):
    with pytest.raises(PtxRuntimeError, match=message):
        run(kernel(body, shared=SHARED), [], block=32)


def test_inval_gives_the_memory_back():
    body = (
        INIT.replace("COUNT", "1")
        + """
bar.sync 0; @%p1 mbarrier.inval.shared.b64 [%r2]; bar.sync 0; @%p1 st.shared.u64 [%r2], 7;
"""
    )
    run(kernel(body.replace("[%r2], 7", "[%r2], %rd9"), shared=SHARED), [], block=32)


def test_deadlock_report_names_the_waiting_warp():
    text = kernel(INIT.replace("COUNT", "33") + wait(0), shared=SHARED)
    with pytest.raises(DeadlockError, match=r"CTA \(0, 0, 0\) warp 0 .*33 of 33 arrivals pending"):
        run(text, [], block=32)


# -- clusters ------------------------------------------------------------------------------------
def test_distributed_shared_memory():
    body = """
mov.u32 %r1, %tid.x; mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, buf;
mad.lo.u32 %r4, %r1, 4, %r3; mad.lo.u32 %r5, %r2, 100, %r1; st.shared.u32 [%r4], %r5;
barrier.cluster.arrive.release; barrier.cluster.wait.acquire;
xor.b32 %r6, %r2, 1; mapa.shared::cluster.u32 %r7, %r4, %r6; ld.shared::cluster.u32 %r8, [%r7];
{last}
ld.param.u64 %rd1, [p0]; mad.lo.u32 %r9, %r2, 32, %r1; mad.wide.u32 %rd2, %r9, 4, %rd1;
st.global.u32 [%rd2], %r8;
"""
    sync = "barrier.cluster.arrive; barrier.cluster.wait;"
    for seed in SEEDS:
        out = np.zeros((2, 32), U32)
        text = kernel(body.replace("{last}", sync), ["u64"], shared=SHARED)
        run(text, [out], grid=2, cluster=(2, 1, 1), schedule_seed=seed)
        np.testing.assert_array_equal(out, np.arange(32) + np.array([[100], [0]]))
    with pytest.raises(PtxRuntimeError, match="has exited"):
        for seed in range(40):
            text = kernel(body.replace("{last}", ""), ["u64"], shared=SHARED)
            run(text, [np.zeros(64, U32)], grid=2, cluster=(2, 1, 1), schedule_seed=seed)


def test_shared_window_of_another_cta_needs_cluster_space():
    body = """
mov.u32 %r3, buf; mov.u32 %r2, %cluster_ctarank; xor.b32 %r2, %r2, 1;
mapa.shared::cluster.u32 %r4, %r3, %r2; st.shared.u32 [%r4], %r2;
"""
    with pytest.raises(PtxRuntimeError, match="outside of this CTA's window"):
        run(kernel(body, shared=SHARED), [], grid=2, cluster=(2, 1, 1))


def test_remote_arrive():
    # Rank 1 arrives on rank 0's barrier; rank 0 waits for it.
    body = (
        INIT.replace("COUNT", "1")
        + """
fence.mbarrier_init.release.cluster; barrier.cluster.arrive; barrier.cluster.wait;
mov.u32 %r5, %cluster_ctarank; setp.eq.u32 %p3, %r5, 1; mov.b32 %r9, 0;
mapa.shared::cluster.u32 %r6, %r2, %r9; and.pred %p4, %p1, %p3;
@%p4 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];
@%p3 bra END;
"""
        + wait(0)
        + "END: barrier.cluster.arrive; barrier.cluster.wait;"
    )
    for seed in SEEDS:
        run(kernel(body, shared=SHARED), [], grid=2, cluster=(2, 1, 1), schedule_seed=seed)


def test_cluster_barrier_mistakes():
    with pytest.raises(PtxRuntimeError, match="wait without arrive"):
        run(kernel("barrier.cluster.wait;"), [], grid=2, cluster=(2, 1, 1))
    with pytest.raises(PtxError, match="rank 2"):
        text = kernel("mapa.shared::cluster.u32 %r2, 1024, 2; ld.shared::cluster.u32 %r3, [%r2];")
        run(text, [], grid=2, cluster=(2, 1, 1))


def test_store_async_counts_its_bytes():
    body = (
        INIT.replace("COUNT", "1")
        + """
@%p1 mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r2], BYTES;
bar.sync 0; mad.lo.u32 %r5, %r1, 4, %r3;
st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r5], %r1, [%r2];
"""
        + wait(0)
        + """
xor.b32 %r6, %r1, 1; mad.lo.u32 %r6, %r6, 4, %r3; ld.shared.u32 %r7, [%r6];
ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.u32 [%rd2], %r7;
"""
    )
    for seed in SEEDS:
        out = np.zeros(32, U32)
        text = kernel(body.replace("BYTES", "128"), ["u64"], shared=SHARED)
        run(text, [out], schedule_seed=seed)
        np.testing.assert_array_equal(out, np.arange(32) ^ 1)
    with pytest.raises(DeadlockError, match="transaction count 4"):
        text = kernel(body.replace("BYTES", "132"), ["u64"], shared=SHARED)
        run(text, [np.zeros(32, U32)])


def test_grid_barrier_by_atomics():
    # Every CTA counts itself in and spins until all have: needs co-resident CTAs.
    body = """
mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [p0]; setp.ne.u32 %p1, %r1, 0; @%p1 bra END;
atom.add.release.gpu.global.u32 %r2, [%rd1], 1;
SPIN: ld.acquire.gpu.global.u32 %r3, [%rd1]; setp.lt.u32 %p2, %r3, 4; @%p2 bra SPIN;
END: bar.sync 0;
"""
    counter = np.zeros(1, U32)
    run(kernel(body, ["u64"]), [counter], grid=4, block=64)
    assert counter[0] == 4


RED_ASYNC = """
mov.u32 %r1, %tid.x; mov.u32 %r2, bar; mov.u32 %r3, buf; setp.eq.u32 %p1, %r1, 0;
mov.u32 %r5, %cluster_ctarank; xor.b32 %r6, %r5, 1;
@%p1 mbarrier.init.shared.b64 [%r2], 1; @%p1 st.shared.u32 [%r3], 1000;
fence.mbarrier_init.release.cluster;
@%p1 mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r2], BYTES;
barrier.cluster.arrive; barrier.cluster.wait;
mapa.shared::cluster.u32 %r7, %r2, %r6; mapa.shared::cluster.u32 %r8, %r3, %r6;
red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.NAME.u32 [%r8], %r1, [%r7];
W: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra W;
ld.shared.u32 %r9, [%r3]; ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r5, 4, %rd1;
@%p1 st.global.u32 [%rd2], %r9; barrier.cluster.arrive; barrier.cluster.wait;
"""


@pytest.mark.parametrize(
    ("name", "expected"), [("add", 1000 + 31 * 16), ("max", 1000), ("min", 0), ("and", 0)]
)
def test_reduction_into_another_cta_counts_its_bytes(name, expected):
    """Four bytes for each of 32 lanes, on the mbarrier next to the word."""
    text = RED_ASYNC.replace("NAME", name)
    for seed in SEEDS:
        out = np.zeros(2, U32)
        run(kernel(text.replace("BYTES", "128"), ["u64"], shared=SHARED), [out], grid=2,
            cluster=(2, 1, 1), schedule_seed=seed)  # fmt: skip
        assert out.tolist() == [expected] * 2
    with pytest.raises(DeadlockError, match="transaction count 4"):
        run(kernel(text.replace("BYTES", "132"), ["u64"], shared=SHARED), [out], grid=2,
            cluster=(2, 1, 1))  # fmt: skip


# Counts the CTAs whose work this one does: its own, then those of clusters that never start.
LAUNCH_CONTROL = """
mov.u32 %r1, %tid.x; mov.u32 %r2, bar; mov.u32 %r3, buf; setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster; bar.sync 0;
mov.u32 %r10, %ctaid.x; mov.u32 %r11, %ctaid.y; mov.b32 %r12, 0; ld.param.u64 %rd1, [p0];
NEXT:
@%p1 mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r2], 16;
@%p1 clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%r3], [%r2];
mad.lo.u32 %r13, %r11, 5, %r10; mad.wide.u32 %rd2, %r13, 4, %rd1;
@%p1 atom.global.add.u32 %r14, [%rd2], 1;
W: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], %r12; @!%p2 bra W;
ld.shared.b128 %rq0, [%r3];
clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p3, %rq0;
@!%p3 bra DONE;
clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {%r10, %r11, %r15, %r16}, %rq0;
fence.proxy.async.shared::cta; bar.sync 0; xor.b32 %r12, %r12, 1; bra NEXT;
DONE: mov.b32 %r9, 0;
"""  # noqa: E501


@pytest.mark.parametrize("resident", [1, 3, 160])
def test_launch_control_hands_out_every_cluster_once(resident):
    for seed in SEEDS:
        counts = np.zeros((2, 5), U32)
        run(kernel(LAUNCH_CONTROL, ["u64"], shared=SHARED), [counts], grid=(5, 2, 1), block=64,
            schedule_seed=seed, resident_clusters=resident)  # fmt: skip
        assert (counts == 1).all()
