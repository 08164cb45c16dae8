# SPDX-License-Identifier: Apache-2.0
"""PTX that nobody here wrote: CUTLASS's example kernels, compiled out of tree, against float64.

Set CUTLASS_EXAMPLES to the folder examples/python/CuTeDSL of a CUTLASS checkout to run this; the
examples are compiled into a temporary folder and are no part of this repository.
"""

import os
from pathlib import Path

import foreign
import ml_dtypes
import numpy as np
import pytest
from ptx_machine.host import run_object

EXAMPLES = os.environ.get("CUTLASS_EXAMPLES", "")
if not EXAMPLES:
    pytest.skip(
        "CUTLASS_EXAMPLES does not name CUTLASS's examples/python/CuTeDSL", allow_module_level=True
    )

# Compiles one example for pointers and run-time extents: argv is folder, file, class, arguments of
# its constructor (a Python expression), operand types, kind.
COMPILE = """
import importlib.util, os, sys
import cuda.bindings.driver as cuda
import cutlass, cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.runtime import make_ptr

folder, path, name, arguments, types, kind = sys.argv[1:7]
root = os.environ["CUTLASS_EXAMPLES"]
sys.path[:0] = [root, root + "/cute", os.path.dirname(os.path.join(root, path))]
spec = importlib.util.spec_from_file_location("example", os.path.join(root, path))
example = importlib.util.module_from_spec(spec)
sys.modules["example"] = example
spec.loader.exec_module(example)
gemm = getattr(example, name)(*eval(arguments))
ab, sf, c = (getattr(cutlass, t) for t in types.split(","))
LANES = 2  # persistent clusters: several tiles for each


def pointer(dtype):
    return make_ptr(dtype, 1024, cute.AddressSpace.gmem, assumed_align=16)


def matrices(a, b, c, m, n, k):
    k, n8 = cute.assume(k, divby=32), cute.assume(n, divby=8)
    return (
        cute.make_tensor(a, cute.make_layout((m, k, 1), stride=(k, 1, m * k))),
        cute.make_tensor(b, cute.make_layout((n, k, 1), stride=(k, 1, n * k))),
        cute.make_tensor(c, cute.make_layout((m, n8, 1), stride=(n8, 1, m * n8))),
    )


@cute.jit
def dense(a: cute.Pointer, b: cute.Pointer, c: cute.Pointer, m: Int32, n: Int32, k: Int32,
          stream: cuda.CUstream):
    gemm(*matrices(a, b, c, m, n, k), *(() if kind == "once" else (LANES,)), stream)


@cute.jit
def tensors(a: cute.Pointer, b: cute.Pointer, sfa: cute.Pointer, sfb: cute.Pointer,
            c: cute.Pointer, m: Int32, n: Int32, k: Int32, stream: cuda.CUstream):
    ta, tb, tc = matrices(a, b, c, m, n, k)
    one = cute.make_layout((1,))
    gemm(ta, tb, cute.make_tensor(sfa, one), cute.make_tensor(sfb, one), tc, LANES, stream)


@cute.jit
def pointers(a: cute.Pointer, b: cute.Pointer, sfa: cute.Pointer, sfb: cute.Pointer,
             c: cute.Pointer, m: Int32, n: Int32, k: Int32, stream: cuda.CUstream):
    from cutlass.cute.nvgpu import OperandMajorMode
    from cutlass.utils import LayoutEnum
    k, n = cute.assume(k, divby=32), cute.assume(n, divby=32)
    layouts = (OperandMajorMode.K, OperandMajorMode.K, LayoutEnum.ROW_MAJOR)
    gemm(a, b, sfa, sfb, c, layouts, (m, n, k, 1), LANES, stream)


extents = [Int32(128)] * 3
stream = cuda.CUstream(0)
if kind in ("dense", "once"):
    compiled = cute.compile(dense, pointer(ab), pointer(ab), pointer(c), *extents, stream)
else:
    host = tensors if kind == "tensors" else pointers
    operands = [pointer(t) for t in (ab, ab, sf, sf, c)]
    compiled = cute.compile(host, *operands, *extents, stream)
compiled.export_to_c(file_path=folder, file_name="example", function_prefix="example")
"""

HOPPER = "cute/hopper/kernel/dense_gemm/"
B200 = "cute/blackwell/kernel/blockscaled_gemm/dense_blockscaled_gemm_persistent.py"
B200_CLASS = "Sm100BlockScaledPersistentDenseGemmKernel"
SM100 = "cute/blackwell/kernel/dense_gemm/"
DENSE = SM100 + "dense_gemm_persistent.py"
SCALED = "cute/blackwell/kernel/blockscaled_gemm/"
RTX = "cute/blackwell_geforce/kernel/blockscaled_gemm/dense_blockscaled_gemm_persistent_"
NVFP4, MXF8 = "Float4E2M1FN,Float8E4M3FN,", "Float8E4M3FN,Float8E8M0FNU,"
BF16 = "BFloat16,BFloat16,Float32"

CASES = {
    # name: (arch, file, class, constructor arguments, operand types, kind)
    "wgmma": ("sm_90a", HOPPER + "dense_gemm.py", "HopperWgmmaGemmKernel",
              "(cutlass.Float32, (128, 128), (1, 1))", BF16, "once"),
    "wgmma-persistent-cluster": (
        "sm_90a", HOPPER + "dense_gemm_persistent.py", "HopperWgmmaGemmPersistentKernel",
        "(cutlass.Float32, (128, 128), (2, 1), 1, True)", BF16, "dense"),
    "tcgen05-f16": ("sm_100f", DENSE, "PersistentDenseGemmKernel",
                    "(cutlass.Float32, False, (128, 128), (1, 1), True)", BF16, "dense"),
    "tcgen05-f16-pair": ("sm_100f", DENSE, "PersistentDenseGemmKernel",
                         "(cutlass.Float32, True, (256, 128), (2, 1), True)", BF16, "dense"),
    "tcgen05-nvfp4": ("sm_100f", B200, B200_CLASS, "(16, (128, 128), (1, 1))",
                      NVFP4 + "Float32", "pointers"),
    "tcgen05-nvfp4-n64": ("sm_100f", B200, B200_CLASS, "(16, (128, 64), (1, 1))",
                          NVFP4 + "Float32", "pointers"),
    "tcgen05-nvfp4-multicast": ("sm_100f", B200, B200_CLASS, "(16, (128, 256), (1, 2))",
                                NVFP4 + "Float32", "pointers"),
    "tcgen05-nvfp4-pair": ("sm_100f", B200, B200_CLASS, "(16, (256, 256), (2, 1))",
                           NVFP4 + "BFloat16", "pointers"),
    "tcgen05-nvfp4-pair-cluster": ("sm_100f", B200, B200_CLASS, "(16, (256, 128), (4, 2))",
                                   NVFP4 + "Float32", "pointers"),
    "tcgen05-nvfp4-pair-n192": ("sm_100f", B200, B200_CLASS, "(16, (256, 192), (2, 1))",
                                NVFP4 + "Float32", "pointers"),
    "tcgen05-mxf8": ("sm_100f", B200, B200_CLASS, "(32, (128, 128), (1, 1))",
                     MXF8 + "Float32", "pointers"),
    "tcgen05-f16-one-tile": ("sm_100f", SM100 + "dense_gemm.py", "DenseGemmKernel",
                             "(cutlass.Float32, True, (256, 128), (2, 1), True)", BF16, "once"),
    "tcgen05-f16-software-pipeline": (
        "sm_100f", SM100 + "dense_gemm_software_pipeline.py", "DenseGemmKernel",
        "(cutlass.Float32, False, (128, 64), (1, 1), True)", BF16, "once"),
    "tcgen05-f16-launch-control": (
        "sm_100f", SM100 + "dense_gemm_persistent_dynamic.py", "PersistentDenseGemmKernel",
        "(cutlass.Float32, True, (256, 128), (2, 1), True)", BF16, "once"),
    "tcgen05-f16-prefetch": (
        "sm_100f", SM100 + "dense_gemm_persistent_prefetch.py", "PersistentDenseGemmKernel",
        "(cutlass.Float32, False, (128, 128), (1, 1), True)", BF16, "dense"),
    "tcgen05-nvfp4-prefetch": (
        "sm_100f", SCALED + "dense_blockscaled_gemm_persistent_prefetch.py", B200_CLASS,
        "(16, (128, 128), (1, 1))", NVFP4 + "Float32", "tensors"),
    "tcgen05-nvfp4-k96": (
        "sm_103a", SCALED + "sm103_dense_blockscaled_gemm_persistent.py",
        "Sm103BlockScaledPersistentDenseGemmKernel", "(16, (128, 128), (1, 1), True)",
        NVFP4 + "Float32", "tensors"),
    "tcgen05-nvfp4-k96-pair": (
        "sm_103a", SCALED + "sm103_dense_blockscaled_gemm_persistent.py",
        "Sm103BlockScaledPersistentDenseGemmKernel", "(16, (256, 256), (2, 1), True)",
        NVFP4 + "Float32", "tensors"),
    "cp-async-mma-sync": (
        "sm_90a", "cute/ampere/kernel/dense_gemm/tensorop_gemm.py", "TensorOpGemm",
        "(cutlass.BFloat16, cutlass.Float32, cutlass.Float32, (2, 2, 1))", BF16, "once"),
    "mma-sync-bf16": (
        "sm_120f", "cute/blackwell_geforce/kernel/dense_gemm/dense_gemm.py", "Sm120GemmKernel",
        "(cutlass.Float32, (64, 64, 64))", BF16, "dense"),
    "mma-sync-nvfp4-pingpong": (
        "sm_120f", RTX + "pingpong.py", "Sm120BlockScaledGemmKernel",
        "(cutlass.Float32, 16, (128, 128, 128), (128, 128))", NVFP4 + "BFloat16", "tensors"),
    "mma-sync-nvfp4-cooperative": (
        "sm_120f", RTX + "cooperative.py", "Sm120BlockScaledGemmKernel",
        "(cutlass.Float32, 16, (128, 128, 128), (64, 32))", NVFP4 + "BFloat16", "tensors"),
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    cache = {}

    def build(name: str) -> tuple[Path, str]:
        if name not in cache:
            folder = tmp_path_factory.mktemp(name)
            program = folder / "build.py"
            program.write_text(COMPILE)
            arch, *arguments = CASES[name]
            cache[name] = folder / "example.o", foreign.compiled(folder, arch, program, *arguments)
        return cache[name]

    return build


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(128, 128, 256), (200, 352, 416)])
def test_example(compiled, name, shape):
    m, n, k = shape
    types, kind = CASES[name][4:]
    dtype = foreign.DTYPES[types.split(",")[2]]
    rng = np.random.default_rng(0)
    if kind in ("dense", "once"):
        operands = [rng.standard_normal((r, k)).astype(ml_dtypes.bfloat16) for r in (m, n)]
        values = [a.astype(np.float64) for a in operands]
    else:
        block = 16 if types.startswith(NVFP4) else 32
        (a, sfa, x), (b, sfb, w) = (foreign.block_scaled(rng, r, k, block) for r in (m, n))
        operands, values = [a, b, sfa, sfb], [x, w]
    for seed in range(4):
        c = np.zeros((m, n), dtype)
        run_object(
            *compiled(name), [*operands, c, m, n, k], uninitialized=[c], schedule_seed=seed,
            scopes=False,  # CUTLASS arrives at other CTAs' barriers at the CTA's scope
            # The cooperative example never waits for its last stores to read shared memory.
            strict_exit=not name.endswith("cooperative"),
        )  # fmt: skip
        foreign.check_product(c, values)
