# SPDX-License-Identifier: Apache-2.0
"""Exported CuTe DSL objects run with their own host code on the PTX machine."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
from ptx_machine import GlobalMemory, Pointer, PtxError, descriptor
from ptx_machine.host import encode_tiled, record_launches, run_object

pytest.importorskip("cutlass")

# A kernel with a tensor map, a cluster and dynamic shared memory: out = 2 * in, tile by tile.
PROGRAM = """
import sys
import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Float32
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_ptr

TILE = (16, 32)


@cute.kernel
def kernel(atom: cute.CopyAtom, source: cute.Tensor, out: cute.Pointer, m: Int32, n: Int32):
    tid, _, _ = cute.arch.thread_idx()
    bx, by, _ = cute.arch.block_idx()
    smem = cutlass.utils.SmemAllocator()
    bar = smem.allocate_array(cutlass.Int64, 1)
    tile = smem.allocate_tensor(Float32, cute.make_layout(TILE, stride=(TILE[1], 1)), 128)
    if tid == 0:
        cute.arch.mbarrier_init(bar, 1)
    cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    tiles = cute.local_tile(source, TILE, (None, None))
    s, g = cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(tile, 0, 2), cute.group_modes(tiles, 0, 2)
    )
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    if warp == 0:
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bar, 4 * TILE[0] * TILE[1])
        cute.copy(atom, g[(None, by, bx)], s, tma_bar_ptr=bar)
    cute.arch.mbarrier_wait(bar, 0)
    result = cute.make_tensor(out, cute.make_layout((m, n), stride=(n, 1)))
    row = by * TILE[0] + tid // TILE[1]
    column = bx * TILE[1] + tid % TILE[1]
    for i in cutlass.range_constexpr(4):
        r = row + 4 * i
        if r < m and column < n:
            result[r, column] = tile[tid // TILE[1] + 4 * i, tid % TILE[1]] * 2.0


@cute.jit
def host(x: cute.Pointer, y: cute.Pointer, m: Int32, n: Int32, stream: cuda.CUstream):
    n4 = cute.assume(n, divby=4)
    source = cute.make_tensor(x, cute.make_layout((m, n4), stride=(n4, 1)))
    layout = cute.make_layout(TILE, stride=(TILE[1], 1))
    load = cpasync.CopyBulkTensorTileG2SOp()
    atom, tensor = cpasync.make_tiled_tma_atom(load, source, layout, TILE)
    grid = (cute.ceil_div(n, TILE[1]), cute.ceil_div(m, TILE[0]), 1)
    kernel(atom, tensor, y, m, n).launch(grid=grid, block=(128, 1, 1), stream=stream)


def pointer(align):
    return make_ptr(Float32, 1024, cute.AddressSpace.gmem, assumed_align=align)


compiled = cute.compile(host, pointer(16), pointer(4), Int32(64), Int32(64), cuda.CUstream(0))
compiled.export_to_c(file_path=sys.argv[1], file_name="twice", function_prefix="twice")
"""


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """(object path, PTX) of the kernel above; compiled in a process of its own, as the target is
    an environment variable that is read once."""
    folder = tmp_path_factory.mktemp("twice")
    (folder / "twice_kernel.py").write_text(PROGRAM)
    environment = os.environ | {
        "CUTE_DSL_ARCH": "sm_90a", "CUTE_DSL_KEEP": "ptx", "CUTE_DSL_DUMP_DIR": str(folder),
        "CUTE_DSL_DISABLE_FILE_CACHING": "1",
    }  # fmt: skip
    subprocess.run(
        [sys.executable, str(folder / "twice_kernel.py"), str(folder)],
        env=environment, check=True, cwd=folder,
    )  # fmt: skip
    (ptx,) = folder.glob("*.ptx")
    return folder / "twice.o", ptx.read_text()


@pytest.mark.parametrize(("m", "n"), [(16, 32), (50, 72), (1, 4)])
def test_kernel_with_its_host_code(twice, m, n):
    x = np.random.default_rng(0).standard_normal((m, n)).astype(np.float32)
    for seed in range(3):
        y = np.zeros((m, n), np.float32)
        machines = run_object(*twice, [x, y, m, n], uninitialized=[y], schedule_seed=seed)
        np.testing.assert_array_equal(y, 2 * x)
        assert len(machines) == 1
        assert machines[0].instructions_run > 100


def test_recorded_launch(twice):
    x = np.zeros((50, 72), np.float32)
    (recorded,) = record_launches(*twice, [x, x.copy(), 50, 72, None], GlobalMemory())
    assert recorded.grid == (3, 4, 1)
    assert recorded.block == (128, 1, 1)
    assert recorded.cluster == (1, 1, 1)
    assert 128 in [len(p) for p in recorded.params]


def test_host_code_passes_pointers_through(twice):
    x = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    storage = np.zeros(16 * 32 + 1, np.float32)
    run_object(*twice, [x, Pointer(storage, 4), 16, 32])
    np.testing.assert_array_equal(storage[1:].reshape(16, 32), 2 * x)


def test_output_too_small_is_out_of_bounds(twice):
    x = np.zeros((16, 32), np.float32)
    with pytest.raises(PtxError, match="out of bounds"):
        run_object(*twice, [x, np.zeros((15, 32), np.float32), 16, 32])


def test_argument_count(twice):
    with pytest.raises(ValueError, match="takes 5 arguments"):
        run_object(*twice, [1, 2])


def encoded(*, kind=13, dims=(640, 96), strides=(320,), box=(256, 32), address=4096, swizzle=3):
    """What ``cuTensorMapEncodeTiled`` writes, decoded again."""
    raw = ctypes.create_string_buffer(128)
    ints, longs = ctypes.c_uint32 * len(dims), ctypes.c_uint64 * len(dims)
    encode_tiled(
        ctypes.addressof(raw), kind, len(dims), address, longs(*dims), longs(*strides),
        ints(*box), ints(*[1] * len(dims)), 0, swizzle, 0,
    )  # fmt: skip
    return descriptor.decode(raw.raw)


def test_tensor_map_of_the_driver():
    # CUtensorMapDataType has other codes than the 128 bytes: 13 is four bits, 9 bfloat16.
    tensor = encoded()
    assert tensor.element_type == "16u4_align8b" and tensor.swizzle == "128B"
    assert (tensor.dims, tensor.strides, tensor.box) == ((640, 96), (320,), (256, 32))
    assert tensor.address == 4096
    halves = encoded(kind=9, box=(32, 2, 2), dims=(160, 3, 5), strides=(320, 960), swizzle=2)
    assert halves.element_type == "bfloat16" and halves.swizzle == "64B"
    assert halves.dims == (160, 3, 5)


@pytest.mark.parametrize(
    "wrong",
    [{"strides": (312,)}, {"address": 4104}, {"box": (512, 32)}, {"kind": 99}, {"dims": (641, 96)}],
    ids=str,
)
def test_tensor_map_that_the_driver_refuses(wrong):
    with pytest.raises(ValueError, match="tensor map"):
        encoded(**wrong)
