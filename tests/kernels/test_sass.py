# SPDX-License-Identifier: Apache-2.0
"""Rules that the machine code of every Blackwell kernel keeps; no interpreter of PTX can see them.

- No loop over elected threads around a tcgen05, TMA or multicast instruction (`BRA.U.ANY` behind
  `ELECT`): ptxas writes one where it does not know that what selects the instruction is uniform,
  and such loops cost more than the instructions.
- No memory barrier of the whole GPU (`MEMBAR.*.GPU`, some 700 cycles), but where it is named here.
"""

import functools
import re

import pytest

import kernel_objects

BLACKWELL = ("sm_100f", "sm_103a", "sm_120f")
KERNELS = [k for op in ("gemm", "quantize") for k in kernel_objects.kernels(op, BLACKWELL)]

LAST_CLUSTER_BARRIER = 1
"""Before a CTA leaves: what others of the cluster wrote to its memory has to have arrived."""
SPLIT_K = 2
"""Partial sums in the memory of another CTA: their arrival, and that their place is free again."""
GRID_BARRIER = 2
"""An amax that all CTAs of the grid exchange through global memory: before and after."""


def gpu_barriers(kernel: dict) -> int:
    """The barriers of the whole GPU that a kernel is allowed."""
    config = kernel["config"]
    if kernel["op"] == "quantize":
        return GRID_BARRIER if "grid" in kernel["name"] else 0
    if kernel["arch"] == "sm_120f" or "weight_only" in kernel["name"]:
        return 0
    return LAST_CLUSTER_BARRIER + (SPLIT_K if config.get("split_k", 1) > 1 else 0)


@functools.cache
def sass(name: str) -> tuple[str, ...]:
    """The instructions of a kernel, in their order, with their operands."""
    text = kernel_objects.sass(name)
    return tuple(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text, re.MULTILINE))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k["name"])
def test_no_loops_over_elected_threads_and_no_gpu_wide_barriers(kernel: dict) -> None:
    instructions = sass(kernel["name"])
    assert len(instructions) > 100
    loops = [i for i in instructions if "BRA.U.ANY" in i]
    assert not loops, f"{len(loops)} loops over elected threads: something selecting is not uniform"
    barriers = [i for i in instructions if re.search(r"MEMBAR\.\S*GPU", i)]
    assert len(barriers) == gpu_barriers(kernel), barriers


@pytest.mark.parametrize(
    "kernel", [k for k in KERNELS if k["arch"] == "sm_100f" and "2cta" in k["name"]],
    ids=lambda k: k["name"],
)  # fmt: skip
def test_a_stage_is_short(kernel: dict) -> None:
    """From the wait for a stage to its commit: four MMAs, their scales, and little else."""
    instructions = sass(kernel["name"])
    first = next(i for i, text in enumerate(instructions) if "UTCOMMA" in text)
    start = max(i for i in range(first) if "SYNCS.PHASECHK" in instructions[i])
    end = next(i for i in range(first, len(instructions)) if "UTCBAR" in instructions[i])
    assert end - start <= 70


# What NVIDIA's own block-scaled kernels of the same tiles compile to (CUTLASS's persistent
# block-scaled GEMMs, read from their PTX): descriptors of operands and of scales (PTX ISA, "tcgen05
# Shared Memory Descriptor") and of the instruction ("tcgen05 Instruction Descriptor").
OPERANDS, SCALES = 0x4000404000010000, 0x0000400800010000
OPERANDS_K96 = 0x40104040  # the upper half
CONSTANTS = {
    "gemm_sm100f_2cta_t256x256": (OPERANDS, SCALES, 0x10400480),
    "gemm_sm100f_2cta_t256x256_c2x2": (OPERANDS, SCALES, 0x10400480),
    "gemm_sm100f_2cta_t256x128": (OPERANDS, SCALES, 0x10200480),
    "gemm_sm100f_swap_t32": (OPERANDS, SCALES, 0x08080480),
    "gemm_sm103a_2cta_t256x256": (OPERANDS_K96, 0x90400480),
    "gemm_sm103a_2cta_t256x256_c2x2": (OPERANDS_K96, 0x90400480),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_descriptors_are_those_of_nvidias_kernels(name: str) -> None:
    ptx = (kernel_objects.folder() / f"{name}.ptx").read_text()
    for constant in CONSTANTS[name]:
        signed = constant - (1 << 32) if 1 << 31 <= constant < 1 << 32 else constant
        assert re.search(rf"[ -]{constant}\b|[ ]{signed}\b", ptx), hex(constant)
