# SPDX-License-Identifier: Apache-2.0
"""PTX that nobody here wrote: the NVFP4 GEMMs of NVIDIA's cudnn-frontend, against float64.

    pip install --no-deps -r tests/support/foreign.txt

brings them; `cudnn_gemm.py` compiles them. They share no code with the kernels of this project, nor
with CUTLASS's examples: they write instructions one by one, where those use atoms and layouts.
"""

import importlib.util
import re
from pathlib import Path

import foreign
import numpy as np
import pytest
from ptx_machine import PtxError
from ptx_machine.host import run_object

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("cudnn", "cutlass")),
    reason="cudnn-frontend and the CuTe DSL are not both there (see tests/support/foreign.txt)",
)

CASES = {
    # Launch control on all; on sm_100 and sm_103 each CTA, or pair of CTAs, has 128 or 256 rows.
    "mma-sync": ("sm_120f", "CONFIG_sm120_128x128x128_16x16x32_cluster1x1_warps4x2", "BFloat16"),
    "mma-sync-64x64": (
        "sm_120f", "CONFIG_sm120_64x64x128_16x16x32_cluster1x1_warps4x2", "Float32"),
    "tcgen05": ("sm_100f", "CONFIG_sm100_128x128x128_128x128x32_cluster1x1_1ctamma", "Float32"),
    "tcgen05-multicast": (
        "sm_100f", "CONFIG_sm100_128x128x128_128x128x32_cluster2x2_1ctamma", "BFloat16"),
    "tcgen05-pair": (
        "sm_100f", "CONFIG_sm100_128x256x128_128x256x32_cluster2x1_2ctamma", "BFloat16"),
    "tcgen05-k96": ("sm_103a", "CONFIG_sm103_128x128x384_128x128x48_cluster1x1_1ctamma", "Float32"),
    "tcgen05-k96-pair": (
        "sm_103a", "CONFIG_sm103_128x256x384_128x256x48_cluster2x1_2ctamma", "BFloat16"),
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    cache = {}

    def build(arch: str, kernel: str, dtype: str) -> tuple[Path, str]:
        key = arch, kernel, dtype
        if key not in cache:
            folder = tmp_path_factory.mktemp("cudnn")
            program = Path(foreign.__file__).with_name("cudnn_gemm.py")
            cache[key] = folder / "gemm.o", foreign.compiled(folder, arch, program, kernel, dtype)
        return cache[key]

    return build


def run(gemm, dtype, shape, **options):
    """Runs a kernel; returns y, the amax it gives, and the float64 operands."""
    m, n, k = shape
    rng = np.random.default_rng(0)
    (x, sfx, x64), (w, sfw, w64) = (foreign.block_scaled(rng, rows, k) for rows in (m, n))
    y, amax = np.zeros((m, n), foreign.DTYPES[dtype]), np.zeros(1, np.float32)
    run_object(*gemm, [x, w, sfx, sfw, y, amax, m, n, k], uninitialized=[y], **options)
    return y, amax[0], (x64, w64)


def with_ordered_answers(text: str) -> str:
    """The PTX with releases where warps that have read an answer of launch control arrive.

    Their arrivals are relaxed, which does not order the reads before the next answer.
    """
    return text.replace("mbarrier.arrive.relaxed.cluster.", "mbarrier.arrive.release.cluster.")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "shape", [(128, 128, 256), (200, 352, 416), (3, 40, 96), (72, 136, 1568)], ids=str
)
def test_product(compiled, name, shape):
    arch, _, dtype = CASES[name]
    path, text = compiled(*CASES[name])
    # Accumulators are handed over with tcgen05.fence::before_thread_sync alone, and scopes are the
    # CTA's where the other is meant.
    options = {} if arch == "sm_120f" else {"tensor_fences": False, "scopes": False}
    everything, few = {"resident_clusters": 160}, {"resident_clusters": 1}  # few: launch control
    ordered = with_ordered_answers(text)
    for seed, (ptx, resident) in enumerate([(text, everything), (ordered, few), (ordered, few)]):
        y, _, factors = run((path, ptx), dtype, shape, schedule_seed=seed, **resident, **options)
        foreign.check_product(y, factors)


def test_relaxed_arrivals_are_seen(compiled):
    path, text = compiled(*CASES["tcgen05"])
    with pytest.raises(PtxError, match=r"that warp \d read, with no synchronization.*try_cancel"):
        run((path, text), "Float32", (200, 352, 416), resident_clusters=1, tensor_fences=False)


SHAPE = (200, 352, 416)


def test_scopes_that_do_not_reach_the_other_cta_are_seen(compiled):
    """The epilogue of a pair hands its accumulators to the other CTA at the CTA's scope."""
    path, text = compiled(*CASES["tcgen05-pair"])
    # One resident pair, so that it computes a second tile in the same accumulators.
    gemm = path, with_ordered_answers(text)
    with pytest.raises(PtxError, match=r"tensor memory that warp \d of CTA rank 1 loaded: no sync"):
        run(gemm, "BFloat16", SHAPE, resident_clusters=1, tensor_fences=False)


@pytest.mark.parametrize("kernel", ["amax_128x128_1x1", "amax_256x128_2x1"])
def test_tensor_memory_freed_four_times_is_seen(compiled, kernel):
    """A kernel of the package whose four epilogue warps all free its tensor memory in the end."""
    # A pair's barrier before that expects one warp of four: a deadlock, where it is not in time.
    with pytest.raises(PtxError, match=r"dealloc of 512 columns at 0: no such|deadlock"):
        run(compiled("sm_100f", kernel, "BFloat16"), "BFloat16", SHAPE, scopes=False)


def test_tensor_memory_freed_once(compiled):
    """Freed by the warp that allocated it, the rest of that kernel is right."""
    path, text = compiled("sm_100f", "amax_128x128_1x1", "BFloat16")
    others = re.search(r"@(%p\d+) bra\s+\S+;\s+mov\S+\s[^;]*;\s+tcgen05\.alloc", text)[1]
    once = text.replace("\ttcgen05.dealloc", f"\t@!{others} tcgen05.dealloc")
    for seed in range(3):
        y, amax, factors = run((path, once), "BFloat16", SHAPE, schedule_seed=seed)
        foreign.check_product(y, factors)
        np.testing.assert_allclose(amax, np.abs(y.astype(np.float32)).max(), rtol=2.0**-8)
