# SPDX-License-Identifier: Apache-2.0
"""Compiles a block-scaled GEMM of NVIDIA's cudnn-frontend for the PTX machine, with no GPU.

    CUTE_DSL_ARCH=sm_120f CUTE_DSL_KEEP=ptx python tests/support/cudnn_gemm.py FOLDER KERNEL DTYPE

writes gemm.o and gemm.h into FOLDER: `y[m, n] = x[m, k] w[n, k]^T`, NVFP4 times NVFP4 to a CuTe DSL
type such as "Float32". The exported function takes pointers to x, w, the swizzled scales of both, y
and a float32 for the largest |y| (which KERNEL may leave alone), then m, n, k.

KERNEL is a tile config of the package's graph compiler ("CONFIG_sm120_..."), which writes a CuTe
DSL program for a graph and a GPU; a description of a GPU stands for the GPU. Or it is "amax", with
tile and cluster ("amax_256x128_2x1"): the package's kernel that gives the largest |y| as well.
"""

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Int32, Int64, cute

# (compute capability, shared memory of a CTA in bytes) by the family of kernels.
GPUS = {"sm100": ((10, 0), 232448), "sm103": ((10, 3), 232448), "sm120": ((12, 0), 101376)}


def graph_of(cudnn: ModuleType, dtype: str) -> Any:
    """A graph of one product. Its kernel takes other extents as well."""
    types, m, n, k = cudnn.data_type, 256, 256, 512
    single = types.FLOAT
    graph = cudnn.pygraph(
        io_data_type=single, compute_data_type=single, intermediate_data_type=single
    )

    def operand(name: str, rows: int, transposed: bool) -> Any:
        def matrix(name: str, columns: int, **options: Any) -> Any:
            dim, stride = [rows, columns], [columns, 1]
            order = -1 if transposed else 1
            return graph.tensor(
                name=name, dim=[1, *dim[::order]], stride=[rows * columns, *stride[::order]],
                **options,
            )  # fmt: skip

        data = matrix(name, k, data_type=types.FP4_E2M1)
        scale = matrix(
            f"scale_{name}", k // 16, data_type=types.FP8_E4M3,
            reordering_type=cudnn.tensor_reordering.F8_128x4,
        )  # fmt: skip
        block = [16, 1] if transposed else [1, 16]
        return graph.block_scale_dequantize(data, scale, block_size=block)

    product = graph.matmul(operand("x", m, False), operand("w", n, True))
    product.set_output(True).set_data_type(
        {"Float32": types.FLOAT, "BFloat16": types.BFLOAT16, "Float16": types.HALF}[dtype]
    )
    return graph


def generated(config: str, dtype: str, folder: str) -> Callable[..., None]:
    """The host function of the program that cudnn-frontend writes for a tile config."""
    family = config.split("_")[1]
    capability, shared = GPUS[family]
    gpu = SimpleNamespace(
        compute_capability=capability,
        sm_count=2,
        shared_memory_per_block_optin=shared,
        oversized_shared_memory_per_block=0,
        l2_cache_bytes=2**25,
        device_name=family,
    )
    tree = "sm120" if family == "sm120" else "sm100"
    os.environ["CUDNN_FRONTEND_GEMM_ARCH_FAMILY"] = tree
    os.environ["CUDNN_FRONTEND_GEMM_KERNEL_CACHE"] = folder
    import cudnn
    import cudnn.gemm.frost
    from cudnn.frost.device import build_device

    hosts = []
    with (
        build_device(0),
        mock.patch("cudnn.frost.device.device_info", lambda ordinal: gpu),
        mock.patch("cudnn.frost.device.is_available", lambda: True),
        # Instead of compiling it: it is traced below, under a host function of pointers.
        mock.patch("cudnn.frost.compiled_cache.compile_cached", lambda h, *_, **o: hosts.append(h)),
    ):
        from cudnn.gemm.frost.tile_config import by_name

        compiler = importlib.import_module(f"cudnn.gemm.frost.{tree}.compiler")
        compiler.jit_from_cudnn_graph(graph_of(cudnn, dtype), by_name(config))
    (host,) = hosts

    def gemm(x: Any, w: Any, sfx: Any, sfw: Any, y: Any, amax: Any, mnk: Any, stream: Any) -> None:
        m, n, k = (Int64(extent) for extent in mnk)
        pairs, one = cute.assume(k // 2, divby=16), Int64(1)
        shape = (
            m, n, k, one, pairs, one, m * pairs, pairs, one, n * pairs, n, one, m * n
        )  # fmt: skip
        scales = cute.make_layout((1, 1, 1))
        host(
            shape,
            matrix(x, m, pairs),
            matrix(w, n, pairs),
            cute.make_tensor(sfx, scales),
            cute.make_tensor(sfw, scales),
            matrix(y, m, n),
            stream,
        )

    return gemm


def amax_kernel(name: str) -> Callable[..., None]:
    """The host function of the package's kernel with an amax."""
    from cudnn.gemm.cutedsl.dense.amax import dense_blockscaled_gemm_persistent_amax as module

    tile, cluster = (tuple(map(int, pair.split("x"))) for pair in name.split("_")[1:])
    kernel = module.Sm100BlockScaledPersistentDenseGemmKernel(16, tile, cluster)

    def gemm(x: Any, w: Any, sfx: Any, sfw: Any, y: Any, amax: Any, mnk: Any, stream: Any) -> None:
        m, n, k = mnk
        k = cute.assume(k, divby=32)
        one = cute.make_layout((1,))
        kernel(
            matrix(x, m, k),
            matrix(w, n, k),
            cute.make_tensor(sfx, one),
            cute.make_tensor(sfw, one),
            matrix(y, m, cute.assume(n, divby=8)),
            cute.make_tensor(amax, one),
            2,  # persistent clusters: several tiles for each
            stream,
        )

    return gemm


def matrix(pointer: cute.Pointer, rows: Any, columns: Any) -> cute.Tensor:
    """A row-major matrix, in a batch of one."""
    return cute.make_tensor(
        pointer, cute.make_layout((rows, columns, 1), stride=(columns, 1, rows * columns))
    )


def export(folder: str, kernel: str, dtype: str) -> None:
    """Compiles a kernel and writes its object and header."""
    packed = not kernel.startswith("amax")
    gemm = generated(kernel, dtype, folder) if packed else amax_kernel(kernel)

    @cute.jit
    def host(
        x: cute.Pointer, w: cute.Pointer, sfx: cute.Pointer, sfw: cute.Pointer, y: cute.Pointer,
        amax: cute.Pointer, m: Int32, n: Int32, k: Int32, stream: cuda.CUstream,
    ):  # fmt: skip
        gemm(x, w, sfx, sfw, y, amax, (m, n, k), stream)

    data = cutlass.Float4E2M1FNx2 if packed else cutlass.Float4E2M1FN
    types = [data] * 2 + [cutlass.Float8E4M3FN] * 2 + [getattr(cutlass, dtype), cutlass.Float32]
    pointers = [
        cute.runtime.make_ptr(t, 1024, cute.AddressSpace.gmem, assumed_align=16) for t in types
    ]
    compiled = cute.compile(host, *pointers, *[Int32(128)] * 3, cuda.CUstream(0))
    compiled.export_to_c(file_path=folder, file_name="gemm", function_prefix="gemm")


if __name__ == "__main__":
    export(*sys.argv[1:])
