# SPDX-License-Identifier: Apache-2.0
"""Small CuTe DSL programs of other kinds than this project's kernels, against NumPy."""

import os
import subprocess
import sys

import numpy as np
import pytest
from ptx_machine import PtxRuntimeError
from ptx_machine.host import run_object

pytest.importorskip("cutlass")

PROGRAM = """
import sys
import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_ptr
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op


@dsl_user_op
def load_remote(pointer, *, loc=None, ip=None):
    address = pointer.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip)
    return Float32(llvm.inline_asm(
        T.f32(), [address], "ld.shared::cluster.f32 $0, [$1];", "=f,r", has_side_effects=True,
        is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip))


def vector(pointer, count):
    return cute.make_tensor(pointer, cute.make_layout(count))


@cute.kernel
def elementwise_kernel(x: cute.Pointer, y: cute.Pointer, n: Int32):
    tid, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    i = block * 128 + tid
    if i < n:
        value = vector(x, n)[i]
        vector(y, n)[i] = cute.math.exp(value) / (1.0 + value * value)


@cute.jit
def elementwise(x: cute.Pointer, y: cute.Pointer, n: Int32, stream: cuda.CUstream):
    elementwise_kernel(x, y, n).launch(
        grid=(cute.ceil_div(n, 128), 1, 1), block=(128, 1, 1), stream=stream)


@cute.kernel
def transpose_kernel(x: cute.Pointer, y: cute.Pointer, n: Int32):
    # n x n in tiles of 32 x 32, by cp.async into rows of 36 words.
    tid, _, _ = cute.arch.thread_idx()
    bx, by, _ = cute.arch.block_idx()
    smem = cutlass.utils.SmemAllocator()
    tile = smem.allocate_tensor(Float32, cute.make_layout((32, 32), stride=(36, 1)), 16)
    atom = cute.make_copy_atom(
        cpasync.CopyG2SOp(), Float32, num_bits_per_copy=128)
    row, column = tid // 8, tid % 8 * 4
    for i in cutlass.range_constexpr(2):
        at = cute.assume((by * 32 + row + 16 * i) * n + bx * 32 + column, divby=4)
        source = cute.make_tensor(x + at, cute.make_layout(4))
        place = cute.assume((row + 16 * i) * 36 + column, divby=4)
        target = cute.make_tensor(tile.iterator + place, cute.make_layout(4))
        cute.copy(atom, source, target)
    cute.arch.cp_async_commit_group()
    cute.arch.cp_async_wait_group(0)
    cute.arch.sync_threads()
    lane, first = tid % 32, tid // 32
    out = cute.make_tensor(y, cute.make_layout((n, n), stride=(n, 1)))
    for i in cutlass.range_constexpr(8):
        out[bx * 32 + first + 4 * i, by * 32 + lane] = tile[lane, first + 4 * i]


@cute.jit
def transpose(x: cute.Pointer, y: cute.Pointer, n: Int32, stream: cuda.CUstream):
    tiles = n // 32
    transpose_kernel(x, y, cute.assume(n, divby=32)).launch(
        grid=(tiles, tiles, 1), block=(128, 1, 1), stream=stream)


@cute.kernel
def cluster_sum_kernel(x: cute.Pointer, y: cute.Pointer, n: Int32):
    # Four CTAs of a cluster sum a row: warps by shuffles, CTAs through distributed shared memory.
    tid, _, _ = cute.arch.thread_idx()
    rank, row, _ = cute.arch.block_idx()
    smem = cutlass.utils.SmemAllocator()
    parts = smem.allocate_tensor(Float32, cute.make_layout(4), 16)
    total = Float32(0.0)
    values = vector(x + row * n, n)
    i = rank * 128 + tid
    while i < n:
        total += values[i]
        i += 512
    total = cute.arch.warp_reduction_sum(total)
    if tid % 32 == 0:
        parts[tid // 32] = total
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
    if rank == 0:
        if tid == 0:
            answer = Float32(0.0)
            for peer in cutlass.range_constexpr(4):
                for warp in cutlass.range_constexpr(4):
                    there = cute.arch.map_dsmem_ptr(parts.iterator + warp, peer)
                    answer += load_remote(there)
            vector(y + row, 1)[0] = answer
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()


@cute.jit
def cluster_sum(x: cute.Pointer, y: cute.Pointer, n: Int32, stream: cuda.CUstream):
    cluster_sum_kernel(x, y, n).launch(
        grid=(4, 3, 1), block=(128, 1, 1), cluster=(4, 1, 1), stream=stream)


@cute.kernel
def histogram_kernel(x: cute.Pointer, y: cute.Pointer, n: Int32):
    # Counts of integers modulo 64: atomics on shared memory, then on global memory.
    tid, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    smem = cutlass.utils.SmemAllocator()
    counts = smem.allocate_tensor(Int32, cute.make_layout(64), 16)
    if tid < 64:
        counts[tid] = 0
    cute.arch.sync_threads()
    i = block * 128 + tid
    if i < n:
        cute.arch.atomic_add((counts.iterator + vector(x, n)[i] % 64).llvm_ptr, Int32(1))
    cute.arch.sync_threads()
    if tid < 64:
        cute.arch.atomic_add((y + tid).llvm_ptr, counts[tid])


@cute.jit
def histogram(x: cute.Pointer, y: cute.Pointer, n: Int32, stream: cuda.CUstream):
    histogram_kernel(x, y, n).launch(
        grid=(cute.ceil_div(n, 128), 1, 1), block=(128, 1, 1), stream=stream)


name, folder = sys.argv[1:3]
dtype = Int32 if name == "histogram" else Float32
pointers = [make_ptr(dtype, 1024, cute.AddressSpace.gmem, assumed_align=16) for _ in range(2)]
compiled = cute.compile(globals()[name], *pointers, Int32(64), cuda.CUstream(0))
compiled.export_to_c(file_path=folder, file_name="program", function_prefix="program")
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Compiles one of the programs: (object path, PTX)."""
    cache = {}

    def build(name, arch):
        if (name, arch) not in cache:
            folder = tmp_path_factory.mktemp(f"{name}_{arch}")
            (folder / "programs.py").write_text(PROGRAM)
            environment = os.environ | {
                "CUTE_DSL_ARCH": arch, "CUTE_DSL_KEEP": "ptx", "CUTE_DSL_DUMP_DIR": str(folder),
                "CUTE_DSL_DISABLE_FILE_CACHING": "1",
            }  # fmt: skip
            command = [sys.executable, str(folder / "programs.py"), name, str(folder)]
            done = subprocess.run(
                command, env=environment, cwd=folder, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            (ptx,) = folder.glob("*.ptx")
            cache[name, arch] = folder / "program.o", ptx.read_text()
        return cache[name, arch]

    return build


ARCHES = pytest.mark.parametrize("arch", ["sm_90a", "sm_100f", "sm_120f"])
RNG = np.random.default_rng(0)


@ARCHES
def test_elementwise(program, arch):
    x, y = RNG.standard_normal(300).astype(np.float32), np.empty(300, np.float32)
    for seed in range(3):
        run_object(*program("elementwise", arch), [x, y, 300], uninitialized=[y],
                   schedule_seed=seed)  # fmt: skip
        np.testing.assert_allclose(y, np.exp(x) / (1 + x * x), rtol=1e-5)


@ARCHES
def test_transpose_through_shared_memory(program, arch):
    x, y = RNG.standard_normal((64, 64)).astype(np.float32), np.empty((64, 64), np.float32)
    library, text = program("transpose", arch)
    for seed in range(3):
        run_object(library, text, [x, y, 64], uninitialized=[y], schedule_seed=seed)
        np.testing.assert_array_equal(y, x.T)
        with pytest.raises(PtxRuntimeError, match=r"no synchronization|still being written"):
            assert text.count("bar.sync") == 1
            run_object(library, text.replace("bar.sync", "// bar.sync"), [x, y, 64],
                       schedule_seed=seed)  # fmt: skip


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100f"])
def test_sum_over_a_cluster(program, arch):
    x, y = RNG.standard_normal((3, 1000)).astype(np.float32), np.empty(3, np.float32)
    library, text = program("cluster_sum", arch)
    for seed in range(3):
        run_object(library, text, [x, y, 1000], uninitialized=[y], schedule_seed=seed)
        np.testing.assert_allclose(y, x.astype(np.float64).sum(axis=1), rtol=1e-4, atol=1e-4)


@ARCHES
def test_histogram_by_atomics(program, arch):
    x = RNG.integers(0, 1000, 500).astype(np.int32)
    for seed in range(3):
        y = np.zeros(64, np.int32)
        run_object(*program("histogram", arch), [x, y, 500], schedule_seed=seed)
        np.testing.assert_array_equal(y, np.bincount(x % 64, minlength=64))
