# SPDX-License-Identifier: Apache-2.0
"""Faults in the sm_120f GEMM kernels, their selection, and their machine code."""

import re

import pytest
from gemm_blackwell import Case, Problem, label, ptx_of
from ptx_machine import PtxError

import kernel_objects
from jax_nvfp4.config import GemmProblem, scratch_bytes, serves
from jax_nvfp4.config.gemm import sm120
from jax_nvfp4.config.gemm.select import select

CONFIGS = sm120.PLAIN
PINGPONG, SMALL_M_16, SMALL_M_64 = W4A4 = CONFIGS[:3]
WEIGHT_ONLY_BF16, WEIGHT_ONLY_F16 = CONFIGS[3:]


MUTATIONS = {
    "rows' scales from other lanes": (r"\{0,1\}, (\{%r\d+\}, \{0,\d\};)", r"{0,0}, \1"),
    "columns' scales from other lanes": (r"\{0,1\};", "{0,0};"),
    "phases not told apart": (r"(xor\.b32 \s*%r\d+, (%r\d+), )%r\d+;", r"\g<1>\g<2>;"),
    "more bytes expected": (r"(mov\.b32 \s*%r\d+, )(18432|12288|19456);", r"\g<1>\g<2>0;"),
    "stages not given back": (r"mbarrier\.arrive\.shared\.b64[^;]*;", ""),
    "chunks not permuted": (r"xor\.b32( \s*%r\d+, %r\d+, (32|64));", r"add.s32\1;"),
}


@pytest.mark.parametrize("config", W4A4, ids=label)
@pytest.mark.parametrize("fault", MUTATIONS)
def test_a_fault_in_the_kernel_is_seen(config, fault):
    """The checks above can fail: each of these mutations of the PTX is caught."""
    mutated, count = re.subn(*MUTATIONS[fault], ptx_of(config.name))
    assert count
    problem = Problem(config, Case(40, 40, 256 * 10))
    with pytest.raises((PtxError, AssertionError)):
        problem.check(problem.run(ptx=mutated))


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_as_many_tiles_as_a_word_has_bits(config):
    """A row of y of more than 31 times 128 columns: tiles are counted, not marked in a word."""
    problem = Problem(config, Case(1, 31 * 128 + 9, 16, sms=16))
    problem.check(problem.run())


PROBLEMS = [
    (m, n, k)
    for m in (1, 16, 17, 64, 65, 128, 129, 256, 1000, 4096, 100_000)
    for n, k in [(1, 1), (128, 4096), (4096, 4096), (8192, 28672), (57344, 8192), (24576, 1536)]
]


@pytest.mark.parametrize("num_sms", [170, 188, 48])
def test_selection(num_sms):
    chosen = set()
    for m, n, k in PROBLEMS:
        problem = GemmProblem(m, n, k, "sm_120f", "e2m1")
        config, split_k = select(problem, num_sms)
        chosen.add(config)
        assert 1 <= split_k <= config.split_k
        assert split_k == 1 or -(-k // config.tile_k) >= config.stages * split_k
        needed = scratch_bytes(config, problem, split_k, num_sms)
        assert needed == (4 * split_k * m * (-(-n // 4) * 4) if split_k > 1 else 0)
    assert chosen == set(W4A4)


def test_selection_for_16_bit_x():
    """A kernel for few rows; many rows, and the batch-invariant promise, are XLA's."""
    for config in (WEIGHT_ONLY_BF16, WEIGHT_ONLY_F16):
        for m, n, k in PROBLEMS:
            problem = GemmProblem(m, n, k, "sm_120f", config.x_dtype)
            if m <= 64:
                assert serves(problem, 188)
                chosen, split_k = select(problem, 188)
                assert chosen == config
                assert split_k == 1 or -(-k // config.tile_k) >= config.stages * split_k
            else:
                assert not serves(problem, 188)
        assert not serves(GemmProblem(1, 8, 64, "sm_120f", config.x_dtype, True), 188)


def test_batch_invariant_selection_depends_on_the_weight_alone():
    for n, k in {(n, k) for _, n, k in PROBLEMS}:
        choices = {
            select(GemmProblem(m, n, k, "sm_120f", "e2m1", batch_invariant=True), num_sms)
            for m, _, _ in PROBLEMS
            for num_sms in (48, 170, 188)
        }
        assert len(choices) == 1


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_machine_code(config):
    """Block-scaled MMAs and TMA in the machine code."""
    code = kernel_objects.sass(config.name)
    scaled, bf16 = r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\.UE4M3\.4X", r"HMMA\.16816\.F32\.BF16"
    mma, count, loads = {
        PINGPONG: (scaled, 2 * 4 * 8, 4),
        SMALL_M_16: (scaled, 4 * 2, 4),
        SMALL_M_64: (scaled, 4 * 8, 4),
        WEIGHT_ONLY_BF16: (bf16, 4 * 4 * 2, 3),
        WEIGHT_ONLY_F16: (r"HMMA\.16816\.F32 ", 4 * 4 * 2, 3),
    }[config]
    assert len(re.findall(mma, code)) == count
    assert len(re.findall(r"UTMALDG\.[23]D", code)) == loads
    assert re.search(r"LDSM\.16\.M88\.4", code)
