# SPDX-License-Identifier: Apache-2.0
"""The planted faults: every rule changes one place, and the machine or the result shows it."""

import numpy as np
import pytest
from ptx_machine import PtxError, TensorMap
from ptx_machine.mutate import RULES, mutants, sample
from ptx_machine.testing import kernel, run

SHARED = (
    ".shared .align 128 .b8 tile[1024];\n.shared .align 128 .b8 out[1024];\n"
    ".shared .align 8 .b64 bar;"
)
# Four tiles of 8 x 32 bytes: load, wait, complement into another buffer, store.
PIPELINE = """
mov.u32 %r1, %tid.x;
mov.u32 %r2, bar;
mov.u32 %r3, tile;
mov.u32 %r4, out;
setp.eq.u32 %p1, %r1, 0;
mov.b32 %r5, 1;
@%p1 mbarrier.init.shared.b64 [%r2], %r5;
fence.mbarrier_init.release.cluster;
bar.sync 0;
mov.b32 %r6, 0;
mov.b32 %r7, 0;
mov.b64 %rd5, p0;
cvta.param.u64 %rd5, %rd5;
mov.b64 %rd6, p1;
cvta.param.u64 %rd6, %rd6;
mov.b32 %r8, 256;
LOOP:
mul.lo.u32 %r9, %r6, 8;
@%p1 mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r2], %r8;
@%p1 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r3], [%rd5, {%r7, %r9}], [%r2];
and.b32 %r10, %r6, 1;
WAIT:
mbarrier.try_wait.parity.shared.b64 %p2, [%r2], %r10;
@!%p2 bra WAIT;
mad.lo.u32 %r11, %r1, 4, %r3;
ld.shared.u32 %r12, [%r11];
not.b32 %r12, %r12;
mad.lo.u32 %r13, %r1, 4, %r4;
st.shared.u32 [%r13], %r12;
fence.proxy.async.shared::cta;
bar.sync 0;
@%p1 cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd6, {%r7, %r9}], [%r4];
@%p1 cp.async.bulk.commit_group;
@%p1 cp.async.bulk.wait_group.read 0;
add.u32 %r6, %r6, 1;
setp.lt.u32 %p3, %r6, 4;
@%p3 bra LOOP;
"""  # noqa: E501
TEXT = kernel(PIPELINE, ["tensormap", "tensormap"], shared=SHARED)
SOURCE = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8)


def outcome(text, seeds=range(6)):
    """ "ok", "wrong", or the message of the error that a schedule shows."""
    for seed in seeds:
        target = np.zeros((32, 32), np.uint8)
        maps = [TensorMap(a, (32, 32), (32,), (32, 8)) for a in (SOURCE, target)]
        try:
            run(text, maps, block=64, schedule_seed=seed)
        except PtxError as error:
            return str(error)
        if not np.array_equal(target, 255 - SOURCE):
            return "wrong"
    return "ok"


@pytest.fixture(autouse=True)
def _short_livelock(monkeypatch):
    monkeypatch.setattr("ptx_machine.machine.LIVELOCK_INSTRUCTIONS", 20000)


def test_the_original_is_right():
    assert outcome(TEXT) == "ok"


EQUIVALENT = (
    "setp.eq.u32 %p1, %r1, 1;",  # thread 1 leads and not thread 0
    "setp.lt.u32 %p3, %r6, 5;",  # one more tile, out of bounds
    "setp.le.u32 %p3, %r6, 4;",
)
FAULTS = [m for m in mutants(TEXT) if m.after not in EQUIVALENT]


@pytest.mark.parametrize("mutant", FAULTS, ids=lambda m: f"{m.rule}-{m.line}")
def test_every_planted_fault_shows(mutant):
    changed = [
        i for i, (a, b) in enumerate(
            zip(TEXT.split("\n"), mutant.text.split("\n"), strict=True), 1
        ) if a != b
    ]  # fmt: skip
    assert changed == [mutant.line]
    assert outcome(mutant.text) != "ok", mutant


def test_sample_spreads_over_the_rules():
    found = {m.rule for m in mutants(TEXT)}
    assert len(found) >= 10
    chosen = sample(TEXT, len(found))
    assert {m.rule for m in chosen} == found
    assert sample(TEXT, 5, seed=1) == sample(TEXT, 5, seed=1)
    assert set(found) <= set(RULES)


def test_rules_of_the_tensor_core():
    text = "\n".join([
        "tcgen05.cp.cta_group::1.32x128b.warpx4 [%r1+4], %rd1;",
        "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16 [%r1], %rd1, %rd2, %r2, "
        "[%r3], [%r4], %p1;",
        "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r1, %r2;",
        "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1"
        ".f32.ue4m3 {%r1}, {%r2}, {%r3}, {%r4}, {%r5}, {%rs1, %rs2}, {%r6}, {%rs3, %rs4};",
        "@%p2 bra NEXT;",
    ])  # fmt: skip
    found = {}
    for mutant in mutants(text):
        found.setdefault(mutant.rule, []).append(mutant.after)
    assert any("[%r1+8]" in after for after in found["scale_column"])
    assert any("[%r4+1]" in after for after in found["scale_column"])
    assert any("xor.b16 %rs4" in after for after in found["scale_column"])
    assert len(found["leak_tmem"]) == 1
    assert "not.pred %p1" in found["accumulate_flag"][0]
