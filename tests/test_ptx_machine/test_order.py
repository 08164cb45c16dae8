# SPDX-License-Identifier: Apache-2.0
"""Fences and orderings that the PTX machine demands: each program once right, once without one."""

import numpy as np
import pytest
from ptx_machine import PtxRuntimeError, TensorMap
from ptx_machine.testing import SEEDS, kernel, run

U32 = np.uint32
SHARED = ".shared .align 128 .b8 buf[4096];\n.shared .align 8 .b64 bar[4];"


def both(good, without, match, launch):
    """Runs a program under every seed, then the same without one instruction, which must fail."""
    for seed in SEEDS:
        launch(good, seed)
    assert good.count(without) == 1, without
    bad = good.replace(without, "")
    for seed in SEEDS:
        with pytest.raises(PtxRuntimeError, match=match):
            launch(bad, seed)


# -- vector clocks ---------------------------------------------------------------------------------
UNRELATED = """
mov.u32 %r1, %tid.x; mov.u32 %r2, buf; mov.u32 %r9, %warpid; and.b32 %r3, %r1, 31;
mad.lo.u32 %r5, %r3, 4, %r2;
setp.eq.u32 %p1, %r9, 0; setp.eq.u32 %p2, %r9, 1; setp.ge.u32 %p3, %r9, 1;
@%p1 st.shared.u32 [%r5], %r1;
bar.sync 0;
@%p1 ld.shared.u32 %r6, [%r5];
@%p1 bar.arrive 2, 64; @%p2 bar.sync 2, 64;
@%p3 bar.sync 1, 64;
@%p2 st.shared.u32 [%r5], %r1;
"""


def test_a_wait_for_somebody_else_orders_nothing():
    """Warp 1 overwrites what warp 0 reads; its barrier with warp 2 says nothing about warp 0."""

    def launch(text, seed):
        run(kernel(text, shared=SHARED), [], block=96, schedule_seed=seed)

    both(UNRELATED, "@%p1 bar.arrive 2, 64; @%p2 bar.sync 2, 64;", "no synchronization", launch)


def test_order_goes_through_other_warps():
    """Warp 0 writes, tells warp 1, which tells warp 2, which reads."""
    text = """
mov.u32 %r1, %laneid; mov.u32 %r2, buf; mov.u32 %r9, %warpid; mad.lo.u32 %r5, %r1, 4, %r2;
setp.eq.u32 %p1, %r9, 0; setp.eq.u32 %p2, %r9, 1; setp.eq.u32 %p3, %r9, 2;
@%p1 st.shared.u32 [%r5], %r1; @%p1 bar.arrive 1, 64;
@%p2 bar.sync 1, 64; @%p2 bar.arrive 2, 64;
@%p3 bar.sync 2, 64; @%p3 ld.shared.u32 %r6, [%r5];
"""
    for seed in SEEDS:
        run(kernel(text, shared=SHARED), [], block=96, schedule_seed=seed)


# -- async proxy -----------------------------------------------------------------------------------
PROXY = """
mov.u32 %r1, %tid.x; mov.u32 %r2, buf; setp.eq.u32 %p1, %r1, 32; mad.lo.u32 %r3, %r1, 4, %r2;
st.shared.u32 [%r3], %r1;
FENCE_HERE bar.sync 0; FENCE_THERE
ld.param.u64 %rd1, [p0];
@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 256;
@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;
"""


@pytest.mark.parametrize("place", ["FENCE_HERE", "FENCE_THERE"])
def test_generic_writes_need_a_proxy_fence_before_a_bulk_store(place):
    """By the writers before the barrier, or by the issuer after it: one of the two."""
    text = PROXY.replace(place, "fence.proxy.async.shared::cta;")
    text = text.replace("FENCE_HERE", "").replace("FENCE_THERE", "")

    def launch(text, seed):
        out = np.zeros(64, U32)
        run(kernel(text, ["u64"], shared=SHARED), [out], block=64, schedule_seed=seed)
        np.testing.assert_array_equal(out, np.arange(64))

    both(text, "fence.proxy.async.shared::cta;", "no fence.proxy.async between", launch)


# Warp 0 asks for answers into one slot; all three warps read them.
ANSWERS = """
mov.u32 %r1, %tid.x; mov.u32 %r2, bar; mov.u32 %r3, buf; setp.eq.u32 %p1, %r1, 0;
mov.u32 %r9, %warpid; setp.eq.u32 %p4, %r9, 1; setp.eq.u32 %p5, %r9, 2;
setp.eq.u32 %p6, %r9, 0;
@%p1 mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster; bar.sync 0;
mov.b32 %r12, 0;
NEXT:
ASKER @%p1 mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r2], 16;
@%p1 clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%r3], [%r2];
W: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], %r12; @!%p2 bra W;
ld.shared.b128 %rq0, [%r3];
clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p3, %rq0;
@%p5 FENCE2 @%p4 FENCE1 @%p6 FENCE0
@!%p3 bra DONE;
bar.sync 0; xor.b32 %r12, %r12, 1; bra NEXT;
DONE: mov.b32 %r9, 0;
"""  # noqa: E501
RELEASE = "fence.proxy.async.shared::cta;"


def answers(asker="", **fences):
    text = ANSWERS.replace("ASKER", asker)
    for name in ("FENCE0", "FENCE1", "FENCE2"):
        text = text.replace(name, fences.get(name, RELEASE))
    return kernel(text, shared=SHARED)


@pytest.mark.parametrize("reader", [0, 1, 2])
def test_readers_of_an_answer_release_it_to_the_async_proxy(reader):
    """Each of them, whoever was the last to read, and the one that asks too."""
    left_out = f"FENCE{reader}"
    for seed in SEEDS:
        run(answers(), [], grid=4, block=96, resident_clusters=1, schedule_seed=seed)
        bad = answers(**{left_out: "mov.b32 %r8, 0;"})
        with pytest.raises(PtxRuntimeError, match=rf"warp {reader} read .*no fence.proxy.async"):
            run(bad, [], grid=4, block=96, resident_clusters=1, schedule_seed=seed)


def test_the_fence_of_who_asks_for_the_next_answer_serves_all():
    none = dict.fromkeys(("FENCE0", "FENCE1", "FENCE2"), "mov.b32 %r8, 0;")
    for seed in SEEDS:
        text = answers(RELEASE, **none)
        run(text, [], grid=4, block=96, resident_clusters=1, schedule_seed=seed)


def test_a_fence_of_one_warp_does_not_serve_the_others():
    """Only warp 0 fences, before the barrier: warp 1's words are not visible to the async proxy."""
    fence = "@!%p2 fence.proxy.async.shared::cta;"
    text = PROXY.replace("FENCE_HERE", "setp.ge.u32 %p2, %r1, 32; " + fence)
    text = text.replace("FENCE_THERE", "")
    for seed in SEEDS:
        with pytest.raises(PtxRuntimeError, match="that warp 1 wrote through the generic proxy"):
            run(kernel(text, ["u64"], shared=SHARED), [np.zeros(64, U32)], block=64,
                schedule_seed=seed)  # fmt: skip


GLOBAL_PROXY = """
mov.u32 %r1, %tid.x; mov.u32 %r2, buf; mov.u32 %r4, bar; setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared.b64 [%r4], 1; fence.mbarrier_init.release.cluster;
ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.u32 [%rd2], %r1;
fence.proxy.async;
bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r4], 256;
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd1], 256, [%r4];
WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r4], 0; @!%p2 bra WAIT;
mad.lo.u32 %r3, %r1, 4, %r2; ld.shared.u32 %r5, [%r3]; st.global.u32 [%rd2+256], %r5;
"""


def test_generic_writes_of_global_memory_need_a_proxy_fence_before_a_bulk_load():
    def launch(text, seed):
        out = np.zeros(128, U32)
        run(kernel(text, ["u64"], shared=SHARED), [out], block=64, schedule_seed=seed)
        np.testing.assert_array_equal(out[64:], np.arange(64))

    both(GLOBAL_PROXY, "fence.proxy.async;", "no fence.proxy.async between", launch)


# -- mbarrier initialization -----------------------------------------------------------------------
def test_copies_need_the_initialization_fenced():
    def launch(text, seed):
        out = np.zeros(128, U32)
        run(kernel(text, ["u64"], shared=SHARED), [out], block=64, schedule_seed=seed)

    match = "no fence.mbarrier_init or fence.proxy.async since its initialization"
    text = GLOBAL_PROXY.replace("fence.proxy.async;", "").replace("st.global.u32 [%rd2], %r1;", "")
    both(text, "fence.mbarrier_init.release.cluster;", match, launch)


REMOTE = """
mov.u32 %r1, %tid.x; mov.u32 %r4, bar; mov.u32 %r5, %cluster_ctarank; setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared.b64 [%r4], 2;
fence.mbarrier_init.release.cluster;
ARRIVE barrier.cluster.wait;
mapa.shared::cluster.u32 %r6, %r4, 0; mapa.shared::cluster.u32 %r7, %r4, 1;
@%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];
@%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r7];
WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r4], 0; @!%p2 bra WAIT;
barrier.cluster.arrive; barrier.cluster.wait;
"""


def test_remote_arrival_needs_the_initialization_released():
    """With a relaxed arrival at the cluster barrier, only the fence hands the mbarrier over."""

    def launch(text, seed):
        run(kernel(text, shared=SHARED), [], block=32, grid=2, cluster=(2, 1, 1),
            schedule_seed=seed)  # fmt: skip

    relaxed = REMOTE.replace("ARRIVE", "barrier.cluster.arrive.relaxed;")
    both(relaxed, "fence.mbarrier_init.release.cluster;", "no synchronization since", launch)
    released = REMOTE.replace("ARRIVE", "barrier.cluster.arrive.release;")
    for seed in SEEDS:
        launch(released.replace("fence.mbarrier_init.release.cluster;", ""), seed)
    with pytest.raises(PtxRuntimeError, match=r"no synchronization since|no mbarrier"):
        for seed in SEEDS:
            launch(relaxed.replace("barrier.cluster.arrive.relaxed; barrier.cluster.wait;", ""),
                   seed)  # fmt: skip


# CTA 0 writes its shared memory and arrives at a barrier of CTA 1, which waits and reads it.
TO_ANOTHER_CTA = """
mov.u32 %r1, %tid.x; mov.u32 %r2, buf; mov.u32 %r4, bar; mov.u32 %r5, %cluster_ctarank;
setp.eq.u32 %p1, %r1, 0; setp.eq.u32 %p2, %r5, 0; setp.ne.u32 %p3, %r5, 0;
@%p1 mbarrier.init.shared.b64 [%r4], 32; fence.mbarrier_init.release.cluster;
barrier.cluster.arrive; barrier.cluster.wait;
mad.lo.u32 %r6, %r1, 4, %r2;
mapa.shared::cluster.u32 %r7, %r4, 1; mapa.shared::cluster.u32 %r8, %r6, 0;
@%p2 st.shared.u32 [%r6], %r1;
FENCE
@%p2 mbarrier.arrive.ARRIVAL.shared::cluster.b64 _, [%r7];
@%p2 bra DONE;
LOOP: mbarrier.try_wait.parity.WAIT.shared::cta.b64 %p4, [%r4], 0; @!%p4 bra LOOP;
AFTER
ld.shared::cluster.u32 %r9, [%r8];
DONE: barrier.cluster.arrive; barrier.cluster.wait;
"""


def to_another_cta(arrival, wait, fence="", after="", scopes=True):
    text = TO_ANOTHER_CTA.replace("ARRIVAL", arrival).replace("WAIT", wait)
    text = kernel(text.replace("FENCE", fence).replace("AFTER", after), shared=SHARED)
    for seed in SEEDS:
        run(text, [], block=32, grid=2, cluster=(2, 1, 1), schedule_seed=seed, scopes=scopes)


RESTRICTED = (
    "fence.release.sync_restrict::shared::cta.cluster;",
    "fence.acquire.sync_restrict::shared::cluster.cluster;",
)


@pytest.mark.parametrize(
    "sides",
    [
        ("release.cluster", "acquire.cluster"),
        ("relaxed.cluster", "acquire.cluster", "fence.acq_rel.cluster;"),
        ("relaxed.cluster", "acquire.cluster", "fence.release.cluster;"),
        ("relaxed.cluster", "acquire.cluster", RESTRICTED[0]),
        ("relaxed.cluster", "relaxed.cluster", *RESTRICTED),
        ("release.cluster", "relaxed.cluster", "", "fence.acquire.cluster;"),
    ],
)
def test_scopes_that_reach_another_cta(sides):
    to_another_cta(*sides)


@pytest.mark.parametrize(
    "sides",
    [
        ("release.cta", "acquire.cluster"),
        ("release.cluster", "acquire.cta"),
        ("relaxed.cluster", "acquire.cluster"),
        ("relaxed.cluster", "acquire.cluster", "fence.acq_rel.cta;"),
        ("relaxed.cluster", "acquire.cluster", RESTRICTED[1]),
        ("release.cluster", "relaxed.cluster"),
        ("release.cluster", "relaxed.cluster", "", RESTRICTED[0]),
        ("release.cluster", "relaxed.cluster", "", "fence.acquire.cta;"),
    ],
)
def test_a_scope_or_a_fence_that_does_not_reach_another_cta_is_a_race(sides):
    with pytest.raises(PtxRuntimeError, match=r"no synchronization between|never written"):
        to_another_cta(*sides)


def test_scopes_may_count_as_wide_enough():
    to_another_cta("release.cta", "acquire.cta", scopes=False)


def test_a_restricted_fence_says_nothing_of_global_memory():
    body = (
        TO_ANOTHER_CTA.replace("@%p2 st.shared.u32 [%r6], %r1;", "@%p2 st.global.u32 [%rd2], %r1;")
        .replace("ld.shared::cluster.u32 %r9, [%r8];", "ld.global.u32 %r9, [%rd2];")
        .replace("ARRIVAL", "relaxed.cluster")
        .replace("WAIT", "acquire.cluster")
        .replace("AFTER", "")
    )
    address = "ld.param.u64 %rd1, [p0]; mov.u32 %r20, %tid.x; mad.wide.u32 %rd2, %r20, 4, %rd1;"
    for seed in SEEDS:
        for fence in ("fence.release.cluster;", RESTRICTED[0]):
            text = kernel(address + body.replace("FENCE", fence), ["u64"], shared=SHARED)
            out = np.zeros(32, U32)

            def launch(text=text, out=out, seed=seed):
                run(text, [out], block=32, grid=2, cluster=(2, 1, 1), schedule_seed=seed)

            if fence == RESTRICTED[0]:
                with pytest.raises(PtxRuntimeError, match="no synchronization between"):
                    launch()
            else:
                launch()


def test_relaxed_cluster_barrier_orders_no_data():
    text = """
mov.u32 %r1, %tid.x; mov.u32 %r3, buf; mov.u32 %r2, %cluster_ctarank; mad.lo.u32 %r4, %r1, 4, %r3;
st.shared.u32 [%r4], %r1;
fence.acq_rel.cluster;
barrier.cluster.arrive.relaxed; barrier.cluster.wait;
xor.b32 %r6, %r2, 1; mapa.shared::cluster.u32 %r7, %r4, %r6; ld.shared::cluster.u32 %r8, [%r7];
barrier.cluster.arrive; barrier.cluster.wait;
"""

    def launch(text, seed):
        run(kernel(text, shared=SHARED), [], block=32, grid=2, cluster=(2, 1, 1),
            schedule_seed=seed)  # fmt: skip

    both(text, "fence.acq_rel.cluster;", "no synchronization between|never written", launch)


# -- global memory ---------------------------------------------------------------------------------
# CTA 0 writes 32 words and raises a flag; CTA 1 waits for it and reads them.
FLAG = """
mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 0; setp.eq.u32 %p2, %r1, 0;
ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; mad.wide.u32 %rd3, %r1, 4, %rd1;
@!%p1 bra READER;
st.global.u32 [%rd3], %r1;
bar.sync 0;
{signal}
bra DONE;
READER: @!%p2 bra JOIN;
SPIN: {poll} setp.eq.u32 %p3, %r3, 0; @%p3 bra SPIN; {after}
JOIN: bar.sync 0;
ld.global.u32 %r4, [%rd3]; add.u32 %r4, %r4, 1; st.global.u32 [%rd3+256], %r4;
DONE: mov.b32 %r9, 0;
"""
ACQUIRE = "ld.acquire.gpu.global.u32 %r3, [%rd2];"
RELAXED = "ld.relaxed.gpu.global.u32 %r3, [%rd2];"
FENCE = "fence.acq_rel.gpu;"
SIGNALS = {
    # name: (signal, poll, after, whether it orders)
    "release-acquire": ("@%p2 st.release.gpu.global.u32 [%rd2], 1;", ACQUIRE, "", True),
    "atomic-release": ("@%p2 red.release.gpu.global.add.u32 [%rd2], 1;", ACQUIRE, "", True),
    "fences": (FENCE + "@%p2 st.relaxed.gpu.global.u32 [%rd2], 1;", RELAXED, FENCE, True),
    "membar-volatile": ("membar.gl; @%p2 st.volatile.global.u32 [%rd2], 1;",
                        "ld.volatile.global.u32 %r3, [%rd2];", "membar.gl;", True),
    "no-release": ("@%p2 st.relaxed.gpu.global.u32 [%rd2], 1;", ACQUIRE, "", False),
    "no-acquire": ("@%p2 st.release.gpu.global.u32 [%rd2], 1;", RELAXED, "", False),
    "release-of-the-cta": ("@%p2 st.release.cta.global.u32 [%rd2], 1;", ACQUIRE, "", False),
    "acquire-of-the-cta": ("@%p2 st.release.gpu.global.u32 [%rd2], 1;",
                           "ld.acquire.cta.global.u32 %r3, [%rd2];", "", False),
    "fence-of-the-cta": ("fence.acq_rel.cta; @%p2 st.relaxed.gpu.global.u32 [%rd2], 1;", ACQUIRE,
                         "", False),
    "fence-behind-the-flag": ("@%p2 st.relaxed.gpu.global.u32 [%rd2], 1;" + FENCE, ACQUIRE, "",
                              False),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNALS)
def test_flags_in_global_memory(name):
    signal, poll, after, orders = SIGNALS[name]
    body = FLAG.replace("{signal}", signal).replace("{poll}", poll).replace("{after}", after)
    text = kernel(body, ["u64", "u64"])
    for seed in SEEDS:
        data, flag = np.zeros(128, U32), np.zeros(1, U32)
        if orders:
            run(text, [data, flag], block=32, grid=2, schedule_seed=seed)
            np.testing.assert_array_equal(data[64:96], np.arange(32) + 1)
        else:
            with pytest.raises(PtxRuntimeError, match=r"read of global memory .* of another clus"):
                run(text, [data, flag], block=32, grid=2, schedule_seed=seed)


def test_reduction_through_scratch_needs_the_counter():
    """The last CTA to count itself in adds up everybody's partial sums."""
    text = """
mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1];
mad.lo.u32 %r3, %r2, 32, %r1; mad.wide.u32 %rd3, %r3, 4, %rd1; st.global.u32 [%rd3], %r3;
bar.sync 0;
atom.add.acq_rel.gpu.global.u32 %r4, [%rd2], 1;
setp.lt.u32 %p1, %r4, 96; @%p1 bra DONE;
mad.wide.u32 %rd4, %r1, 4, %rd1; ld.global.u32 %r5, [%rd4]; ld.global.u32 %r6, [%rd4+128];
ld.global.u32 %r7, [%rd4+256]; add.u32 %r5, %r5, %r6; add.u32 %r5, %r5, %r7;
DONE: mov.b32 %r9, 0;
"""
    for order, good in (("acq_rel", True), ("relaxed", False)):
        body = text.replace("acq_rel", order).replace("%r4, 96", "%r4, 64")
        for seed in SEEDS:
            data, counter = np.zeros(128, U32), np.zeros(1, U32)
            args = ([data, counter],)
            if good:
                run(kernel(body, ["u64", "u64"]), *args, block=32, grid=3, schedule_seed=seed)
            else:
                with pytest.raises(PtxRuntimeError, match="read of global memory"):
                    run(kernel(body, ["u64", "u64"]), *args, block=32, grid=3, schedule_seed=seed)


def test_writes_of_two_ctas_to_one_word():
    text = """
mov.u32 %r1, %ctaid.x; ld.param.u64 %rd1, [p0]; mul.lo.u32 %r1, %r1, FACTOR;
st.global.u32 [%rd1], %r1;
"""
    with pytest.raises(PtxRuntimeError, match="overwrite of global memory"):
        run(kernel(text.replace("FACTOR", "1"), ["u64"]), [np.full(1, 9, U32)], grid=2)
    # The same value twice is no race.
    run(kernel(text.replace("FACTOR", "0"), ["u64"]), [np.full(1, 9, U32)], grid=2)
    atomic = text.replace("FACTOR", "1").replace("st.global.u32", "red.relaxed.gpu.global.add.u32")
    run(kernel(atomic, ["u64"]), [np.zeros(1, U32)], grid=2)


def test_a_bulk_store_is_ordered_by_its_full_wait():
    """wait_group.read says that shared memory was read, not that global memory was written."""
    text = """
mov.u32 %r1, %tid.x; mov.u32 %r2, buf; mad.lo.u32 %r3, %r1, 4, %r2; setp.eq.u32 %p1, %r1, 0;
st.shared.u32 [%r3], %r1; fence.proxy.async.shared::cta; bar.warp.sync -1; ld.param.u64 %rd1, [p0];
@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 128;
@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0; bar.warp.sync -1;
mad.wide.u32 %rd2, %r1, 4, %rd1; ld.global.u32 %r4, [%rd2];
"""
    for seed in SEEDS:
        run(kernel(text, ["u64"], shared=SHARED), [np.zeros(32, U32)], schedule_seed=seed)
        with pytest.raises(PtxRuntimeError, match="that a bulk store of warp 0 wrote"):
            bad = text.replace("wait_group 0", "wait_group.read 0")
            run(kernel(bad, ["u64"], shared=SHARED), [np.zeros(32, U32)], schedule_seed=seed)


# -- programmatic dependent launch -----------------------------------------------------------------
DEPENDENT = """
mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; ld.param.u64 %rd3, [p2];
mad.wide.u32 %rd4, %r1, 4, %rd1; mad.wide.u32 %rd5, %r1, 4, %rd2; mad.wide.u32 %rd6, %r1, 4, %rd3;
ld.global.u32 %r2, [%rd5];
griddepcontrol.launch_dependents;
griddepcontrol.wait;
ld.global.u32 %r3, [%rd4]; add.u32 %r3, %r3, %r2; st.global.u32 [%rd6], %r3;
"""


def dependent(text, seed, previous=True):
    x, weight, y = np.arange(32, dtype=U32), np.ones(32, U32), np.zeros(32, U32)
    run(kernel(text, ["u64"] * 3, shared=SHARED), [x, weight, y], schedule_seed=seed,
        previous=[x] if previous else [])  # fmt: skip
    np.testing.assert_array_equal(y, x + 1)


def test_what_the_launch_before_writes_is_read_after_the_wait():
    """Weights may be read before it: nobody writes them."""
    both(DEPENDENT, "griddepcontrol.wait;", "read of .* before griddepcontrol.wait", dependent)
    early = DEPENDENT.replace("ld.global.u32 %r2, [%rd5];", "ld.global.u32 %r3, [%rd4];")
    with pytest.raises(PtxRuntimeError, match="the launch before may still write it"):
        dependent(early, 0)


def test_nothing_is_written_before_the_wait():
    """The launch before may still read the output's memory."""
    early = DEPENDENT.replace("griddepcontrol.launch_dependents;", "st.global.u32 [%rd6], %r2;")
    with pytest.raises(PtxRuntimeError, match=r"write to .* before griddepcontrol.wait"):
        dependent(early, 0, previous=False)
    # A kernel without the instruction is not launched early.
    dependent(early.replace("griddepcontrol.wait;", ""), 0, previous=False)


def test_one_warp_waits_for_all_that_synchronize_with_it():
    text = DEPENDENT.replace("griddepcontrol.wait;", "@%p1 griddepcontrol.wait; bar.sync 0;")
    text = text.replace("mov.u32 %r1, %tid.x;", "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32;")

    def launch(text, seed):
        x, weight, y = np.arange(64, dtype=U32), np.ones(64, U32), np.zeros(64, U32)
        run(kernel(text, ["u64"] * 3), [x, weight, y], schedule_seed=seed, previous=[x], block=64)

    both(text, "bar.sync 0;", "before griddepcontrol.wait", launch)


def test_tensor_copies_wait_for_the_launch_before():
    text = """
mov.u32 %r1, %tid.x; mov.u32 %r2, buf; mov.u32 %r4, bar; setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared.b64 [%r4], 1; fence.mbarrier_init.release.cluster; bar.warp.sync -1;
mov.b64 %rd1, p0; cvta.param.u64 %rd1, %rd1; mov.b32 %r5, 0;
griddepcontrol.wait;
@%p1 mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r4], 256;
@%p1 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r2], [%rd1, {%r5, %r5}], [%r4];
WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r4], 0; @!%p2 bra WAIT;
"""  # noqa: E501

    def launch(text, seed):
        source = np.zeros((8, 32), np.uint8)
        tensor = TensorMap(source, (32, 8), (32,), (32, 8))
        text = kernel(text, ["tensormap"], shared=SHARED)
        run(text, [tensor], schedule_seed=seed, previous=[source])

    both(text, "griddepcontrol.wait;", "copy from .* before griddepcontrol.wait", launch)


def test_previous_must_be_an_array_of_the_launch():
    with pytest.raises(ValueError, match="no parameter points to"):
        run(kernel("mov.b32 %r1, 0;"), [], previous=[np.zeros(4)])
