# SPDX-License-Identifier: Apache-2.0
"""Asynchronous copies of the PTX machine: swizzles, bounds, transaction counts, groups, fences."""

import numpy as np
import pytest
from ptx_machine import GlobalMemory, PtxRuntimeError, TensorMap
from ptx_machine.descriptor import decode, encode
from ptx_machine.testing import SEEDS, kernel, run

U32 = np.uint32
SHARED = (
    ".shared .align 1024 .b8 tile[16384];\n.shared .align 128 .b8 other[4096];\n"
    ".shared .align 8 .b64 bar[2];"
)
LOAD = "cp.async.bulk.tensor.{}d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
MULTICAST = LOAD.format(2).replace("::cta", "::cluster") + ".multicast::cluster"
HEAD = """
mov.u32 %r1, %tid.x; mov.u32 %r2, bar; mov.u32 %r3, tile; setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster; bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r2], {bytes};
"""
WAIT = "W: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @%p2 bra D; bra W; D:\n"
# Copies {words} words of the tile, as they lie, to the array p1.
DUMP = """
mov.b32 %r4, %r1;
LOOP: setp.ge.u32 %p3, %r4, {words}; @%p3 bra OUT;
mad.lo.u32 %r5, %r4, 4, %r3; ld.shared.u32 %r6, [%r5];
ld.param.u64 %rd1, [p1]; mad.wide.u32 %rd2, %r4, 4, %rd1; st.global.u32 [%rd2], %r6;
add.u32 %r4, %r4, 32; bra LOOP; OUT: mov.b32 %r4, 0;
"""


def fill(text, **values):
    for key, value in values.items():
        text = text.replace("{" + key + "}", str(value))
    return text


def load_tile(tensor, coordinates, *, seed=0, wait=WAIT, expect=None):
    """The tile's bytes in shared memory after a tensor load, in address order."""
    rank = len(tensor.dims)
    coordinate = ", ".join(str(c) for c in coordinates)
    body = (
        HEAD
        + f"""
mov.b64 %rd5, p0; cvta.param.u64 %rd5, %rd5;
@%p1 {LOAD.format(rank)} [%r3], [%rd5, {{{coordinate}}}], [%r2];
"""
        + wait
        + DUMP
    )
    out = np.zeros(tensor.box_bytes, np.uint8)
    text = kernel(
        fill(body, bytes=expect or tensor.box_bytes, words=tensor.box_bytes // 4),
        ["tensormap", "u64"],
        shared=SHARED,
    )
    run(text, [tensor, out], schedule_seed=seed)
    return out


def map2(array, box, element_type="uint8", **options):
    rows, columns = array.shape
    return TensorMap(
        array, (columns, rows), (array.strides[0],), box, element_type=element_type, **options
    )


def test_plain_tile():
    data = np.arange(64 * 128, dtype=np.uint32).astype(np.uint8).reshape(64, 128)
    for seed in SEEDS:
        out = load_tile(map2(data, (32, 8)), (16, 5), seed=seed)
        np.testing.assert_array_equal(out.reshape(8, 32), data[5:13, 16:48])


# 16-byte chunk c of row r lies at chunk c ^ pattern(r). The pattern by hand, by mode: a line of
# 128 bytes holds 1, 2 or 4 rows of 128, 64 or 32 bytes; the chunk index is xored with the number of
# the line modulo 8, 4 or 2.
SWIZZLES = [
    ("32B", 32, lambda row: row // 4 % 2),
    ("64B", 64, lambda row: row // 2 % 4),
    ("128B", 128, lambda row: row % 8),
]


@pytest.mark.parametrize(("mode", "width", "pattern"), SWIZZLES, ids=["32B", "64B", "128B"])
def test_swizzles(mode, width, pattern):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (32, 256)).astype(np.uint8)
    out = load_tile(map2(data, (width, 32), swizzle=mode), (width, 0)).reshape(32, -1, 16)
    source = data[:, width : 2 * width].reshape(32, -1, 16)
    for row in range(32):
        for chunk in range(width // 16):
            np.testing.assert_array_equal(out[row, chunk ^ pattern(row)], source[row, chunk])


def test_32_byte_atoms():
    data = np.random.default_rng(0).integers(0, 256, (8, 128)).astype(np.uint8)
    out = load_tile(map2(data, (128, 8), swizzle="128B_ATOM_32B"), (0, 0)).reshape(8, 4, 32)
    for row in range(8):
        for atom in range(4):
            np.testing.assert_array_equal(
                out[row, atom ^ (row % 4)], data[row, 32 * atom : 32 * atom + 32]
            )


@pytest.mark.parametrize("fill_mode", ["zero", "nan"])
def test_out_of_bounds_elements(fill_mode):
    data = np.arange(6 * 8, dtype=np.float32).reshape(6, 8) + 1
    tensor = TensorMap(
        data, (8, 6), (32,), (8, 4), element_type="float32", fill=fill_mode
    )  # fmt: skip
    out = load_tile(tensor, (-3, 4)).view(np.float32).reshape(4, 8)
    expected = np.zeros((4, 8), np.float32) if fill_mode == "zero" else np.full((4, 8), np.nan)
    expected[:2, 3:] = data[4:6, :5]
    np.testing.assert_array_equal(out, expected)


def test_element_strides_and_rank_three():
    data = np.arange(4 * 6 * 32, dtype=np.uint16).reshape(4, 6, 32)
    tensor = TensorMap(data, (32, 6, 4), (64, 384), (16, 4, 2), (2, 1, 1), element_type="uint16")
    out = load_tile(tensor, (4, 1, 2)).view(np.uint16).reshape(2, 4, 8)
    np.testing.assert_array_equal(out, data[2:4, 1:5, 4:20:2])


def test_packed_fp4():
    data = np.random.default_rng(0).integers(0, 256, (16, 64)).astype(np.uint8)
    tensor = TensorMap(data, (128, 16), (64,), (64, 8), element_type="16u4_align8b")
    out = load_tile(tensor, (32, 3)).reshape(8, 32)
    np.testing.assert_array_equal(out, data[3:11, 16:48])


def test_padded_fp4():
    # align16b: sixteen elements take eight bytes and leave the next eight alone.
    data = np.random.default_rng(0).integers(0, 256, (8, 64)).astype(np.uint8)
    tensor = TensorMap(data, (128, 8), (64,), (128, 8), element_type="16u4_align16b",
                       swizzle="128B")  # fmt: skip
    out = load_tile(tensor, (0, 0)).reshape(8, 8, 16)
    for row in range(8):
        for group in range(8):
            chunk = out[row, group ^ row]
            np.testing.assert_array_equal(chunk[:8], data[row, 8 * group : 8 * group + 8])


def test_reading_before_the_wait_is_an_error():
    data = np.zeros((8, 32), np.uint8)
    with pytest.raises(PtxRuntimeError, match=r"still being written|exits while"):
        for seed in SEEDS:
            load_tile(map2(data, (32, 8)), (0, 0), seed=seed, wait="")


@pytest.mark.parametrize(("expect", "message"), [(272, "deadlock"), (240, "count -16")])
def test_wrong_transaction_counts(expect, message):
    data = np.zeros((8, 32), np.uint8)
    with pytest.raises(PtxRuntimeError, match=message):
        for seed in SEEDS:
            load_tile(map2(data, (32, 8)), (0, 0), seed=seed, expect=expect)


def test_multicast_reaches_every_cta_of_the_mask():
    data = np.random.default_rng(0).integers(0, 256, (8, 32)).astype(np.uint8)
    body = (
        HEAD
        + """
barrier.cluster.arrive; barrier.cluster.wait;
mov.u32 %r9, %cluster_ctarank; setp.eq.and.u32 %p4, %r9, 0, %p1; mov.b16 %rs1, 3;
mov.b64 %rd5, p0; cvta.param.u64 %rd5, %rd5;
@%p4 TENSOR_LOAD [%r3], [%rd5, {0, 0}], [%r2], %rs1;
"""
        + WAIT
        + """
mad.lo.u32 %r5, %r1, 4, %r3; ld.shared.u32 %r6, [%r5]; mad.lo.u32 %r7, %r9, 64, %r1;
ld.param.u64 %rd1, [p1]; mad.wide.u32 %rd2, %r7, 4, %rd1; st.global.u32 [%rd2], %r6;
add.u32 %r5, %r5, 128; ld.shared.u32 %r6, [%r5]; st.global.u32 [%rd2+128], %r6;
"""
    )
    out = np.zeros((2, 256), np.uint8)
    body = body.replace("TENSOR_LOAD", MULTICAST)
    text = kernel(fill(body, bytes=256), ["tensormap", "u64"], shared=SHARED)
    for seed in SEEDS:
        run(text, [map2(data, (32, 8)), out], grid=2, cluster=(2, 1, 1), schedule_seed=seed)
        np.testing.assert_array_equal(out, np.broadcast_to(data.reshape(-1), (2, 256)))


STORE = """
mov.u32 %r1, %tid.x; mov.u32 %r3, tile; setp.eq.u32 %p1, %r1, 0;
mad.lo.u32 %r4, %r1, 4, %r3; add.u32 %r5, %r1, 1; st.shared.u32 [%r4], %r5;
{fence} bar.sync 0;
mov.b64 %rd5, p0; cvta.param.u64 %rd5, %rd5;
@%p1 cp{reduce}.async.bulk.tensor.2d.global.shared::cta{op}.tile.bulk_group [%rd5, {2, 1}], [%r3];
@%p1 cp.async.bulk.commit_group;
{wait}
"""
FENCE = "fence.proxy.async.shared::cta;"
STORE_WAIT = "@%p1 cp.async.bulk.wait_group.read 0;"


def store(array, *, fence=FENCE, wait=STORE_WAIT, op="", seed=0):
    tensor = TensorMap(array, (6, 5), (array.strides[0],), (4, 8), element_type="uint32")
    body = fill(STORE, fence=fence, wait=wait, reduce=".reduce" if op else "", op=op)
    run(kernel(body, ["tensormap"], shared=SHARED), [tensor], schedule_seed=seed)


def test_store_clips_at_the_bounds():
    for seed in SEEDS:
        array = np.zeros((5, 8), U32)
        store(array, seed=seed)
        expected = np.zeros((5, 8), U32)
        expected[1:5, 2:6] = (np.arange(32).reshape(8, 4) + 1)[:4]
        np.testing.assert_array_equal(array, expected)


def test_reduction():
    array = np.full((5, 8), 100, U32)
    store(array, op=".add")
    assert array[1, 2:6].tolist() == [101, 102, 103, 104]
    assert array[0].tolist() == [100] * 8


def test_missing_proxy_fence():
    with pytest.raises(PtxRuntimeError, match=r"warp 0 wrote .* no fence.proxy.async"):
        store(np.zeros((5, 8), U32), fence="")


def test_exit_with_a_store_that_still_reads():
    with pytest.raises(PtxRuntimeError, match="exits while"):
        for seed in range(20):
            store(np.zeros((5, 8), U32), wait="", seed=seed)


def test_bulk_copy_there_and_back():
    data = np.arange(256, dtype=np.uint8)
    out = np.zeros(256, np.uint8)
    body = (
        HEAD
        + """
ld.param.u64 %rd5, [p0]; ld.param.u64 %rd6, [p1];
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd5], 256, [%r2];
"""
        + WAIT
        + """
@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd6], [%r3], 256;
@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;
"""
    )
    text = kernel(fill(body, bytes=256), ["u64", "u64"], shared=SHARED)
    for seed in SEEDS:
        out[:] = 0
        run(text, [data, out], schedule_seed=seed)
        np.testing.assert_array_equal(out, data)
    with pytest.raises(PtxRuntimeError, match="multiples of 16"):
        run(text.replace("[%r3], 256;", "[%r3], 252;"), [data, out])


CP_ASYNC = """
mov.u32 %r1, %tid.x; mov.u32 %r3, tile; mad.lo.u32 %r4, %r1, 16, %r3;
ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 16, %rd1;
setp.lt.u32 %p1, %r1, 20; selp.b32 %r5, 16, 4, %p1;
cp.async.cg.shared.global [%r4], [%rd2], 16, %r5; cp.async.commit_group;
{wait} bar.sync 0; xor.b32 %r6, %r1, 1; mad.lo.u32 %r6, %r6, 16, %r3;
ld.shared.v4.u32 {%r7, %r8, %r9, %r10}, [%r6];
ld.param.u64 %rd1, [p1]; mad.wide.u32 %rd2, %r1, 16, %rd1;
st.global.v4.u32 [%rd2], {%r7, %r8, %r9, %r10};
"""


def test_cp_async_with_zero_fill():
    data = np.arange(128, dtype=U32).reshape(32, 4) + 1
    expected = data.copy()
    expected[20:, 1:] = 0
    for seed in SEEDS:
        out = np.zeros((32, 4), U32)
        text = kernel(fill(CP_ASYNC, wait="cp.async.wait_group 0;"), ["u64", "u64"], shared=SHARED)
        run(text, [data, out], schedule_seed=seed)
        np.testing.assert_array_equal(out, expected[np.arange(32) ^ 1])
    with pytest.raises(PtxRuntimeError, match="still being written"):
        for seed in SEEDS:
            run(kernel(fill(CP_ASYNC, wait=""), ["u64", "u64"], shared=SHARED), [data, out],
                schedule_seed=seed)  # fmt: skip


def test_cp_async_arrives_on_an_mbarrier():
    body = (
        """
mov.u32 %r1, %tid.x; mov.u32 %r2, bar; mov.u32 %r3, tile; setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared.b64 [%r2], 32; bar.sync 0;
ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1; mad.lo.u32 %r4, %r1, 4, %r3;
cp.async.ca.shared.global [%r4], [%rd2], 4;
cp.async.mbarrier.arrive.noinc.shared.b64 [%r2];
"""
        + WAIT
        + "ld.shared.u32 %r5, [%r4]; ld.param.u64 %rd1, [p1];"
        + """
mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.u32 [%rd2], %r5;
"""
    )
    data = np.arange(32, dtype=U32) * 7
    for seed in SEEDS:
        out = np.zeros(32, U32)
        run(kernel(body, ["u64", "u64"], shared=SHARED), [data, out], schedule_seed=seed)
        np.testing.assert_array_equal(out, data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box": (24, 8)}, "not 16's multiple"),
        ({"box": (64, 8), "swizzle": "32B"}, "spans 32"),
        ({"box": (32, 300)}, "not in"),
        ({"box": (32, 8), "strides": (40,)}, "multiple of 16"),
        ({"box": (32, 8), "fill": "nan"}, "NaN fill"),
        ({"box": (32,)}, "rank 2"),
    ],
)
def test_tensor_maps_are_validated(options, message):
    values = {"array": np.zeros((8, 64), np.uint8), "dims": (64, 8), "strides": (64,)}
    with pytest.raises(ValueError, match=message):
        TensorMap(**{**values, **options})


def test_descriptor_round_trip():
    tensor = TensorMap(
        np.zeros((4, 6, 32), np.uint16), (32, 6, 4), (64, 384), (16, 4, 2),
        element_type="bfloat16", swizzle="32B",
    )  # fmt: skip
    tensor.place(GlobalMemory(), "array")
    back = decode(encode(tensor))
    for name in ("dims", "strides", "box", "element_strides", "element_type", "swizzle", "fill",
                 "address"):  # fmt: skip
        assert getattr(back, name) == getattr(tensor, name), name


def test_misaligned_shared_address():
    data = np.zeros((8, 32), np.uint8)
    body = (
        HEAD
        + """
mov.b64 %rd5, p0; add.u32 %r3, %r3, 64;
@%p1 TENSOR_LOAD [%r3], [%rd5, {0, 0}], [%r2];
"""
    )
    body = body.replace("TENSOR_LOAD", LOAD.format(2))
    with pytest.raises(PtxRuntimeError, match="128-byte aligned"):
        run(kernel(fill(body, bytes=256), ["tensormap"], shared=SHARED), [map2(data, (32, 8))])


@pytest.mark.parametrize("swizzle", ["none", "64B"])
def test_gather_of_four_rows(swizzle):
    """One column coordinate and four rows; a row out of bounds reads as zeros."""
    source = np.random.default_rng(0).integers(0, 256, (16, 128)).astype(np.uint8)
    tensor = map2(source, (64, 1), swizzle=swizzle)
    rows = (3, 15, 0, 77)
    coordinate = ", ".join(str(c) for c in (32, *rows))
    load = LOAD.format(2).replace(".tile", ".tile::gather4")
    body = HEAD + f"""
mov.b64 %rd5, p0; cvta.param.u64 %rd5, %rd5;
@%p1 {load} [%r3], [%rd5, {{{coordinate}}}], [%r2];
"""  # fmt: skip
    expected = np.zeros((4, 64), np.uint8)
    expected[:3] = source[list(rows[:3]), 32:96]
    if swizzle == "64B":  # address bits 4 and 5 are xored with bits 7 and 8
        flat, moved = expected.reshape(-1), np.zeros(256, np.uint8)
        for at in range(256):
            moved[at ^ ((at >> 7 & 3) << 4)] = flat[at]
        expected = moved.reshape(4, 64)
    for seed in SEEDS:
        out = np.zeros(256, np.uint8)
        text = fill(body + WAIT + DUMP, bytes=256, words=64)
        run(kernel(text, ["tensormap", "u64"], shared=SHARED), [tensor, out], schedule_seed=seed)
        np.testing.assert_array_equal(out, expected.reshape(-1))
