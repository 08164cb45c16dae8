# SPDX-License-Identifier: Apache-2.0
"""What only the GEMM kernels of sm_100 and sm_103 do: clusters that take over tiles, a table."""

import dataclasses
import re

import pytest
from gemm_blackwell import F32, Case, Problem, label, ptx_of

import kernel_objects
from jax_nvfp4.config import GemmProblem, configs, serves
from jax_nvfp4.config.gemm import sm100
from jax_nvfp4.config.gemm.select import select

W4A4 = sm100.W4A4
OF_SM_100 = [c for c in W4A4 if c.arch == "sm_100f"]  # sm_103a's walk over tiles is the same code


@pytest.mark.parametrize(("resident", "seed"), [(1, 0), (2, 1), (16, 2)])
@pytest.mark.parametrize("config", OF_SM_100, ids=label)
def test_clusters_that_take_over_tiles(config, resident, seed):
    """Six tiles or more, more or fewer clusters at once than the host code reckons with."""
    m, n = (3 * config.tile_m - 2, 4 * 128 - 9) if config.swap_ab else (2 * 256 - 5, 3 * 256 - 8)
    case = Case(m, n * config.cluster_n, 128, sms=2 * config.cluster_m, resident=resident)
    problem = Problem(config, case)
    problem.check(problem.run(seed))


@pytest.mark.parametrize("config", OF_SM_100, ids=label)
def test_clusters_that_wait_for_a_place(config):
    """The chip holds fewer clusters than its multiprocessors would: the rest start later."""
    m, n = 2 * config.tile_m, 2 * config.tile_n * config.cluster_n
    problem = Problem(config, Case(m, n, 64, sms=64, resident=1))
    problem.check(problem.run())


PROBLEMS = [
    (m, n, k)
    for m in (1, 16, 32, 33, 64, 100, 128, 129, 256, 257, 1000, 4096, 100_000)
    for n, k in [(1, 1), (128, 4096), (4096, 4096), (8192, 28672), (57344, 8192), (24576, 1536)]
]


def test_selection_of_weight_only():
    """Few rows of 16-bit activations, and the rest is left to XLA."""
    for m, n, k in PROBLEMS:
        for x_dtype in ("bfloat16", "float16"):
            problem = GemmProblem(m, n, k, "sm_100f", x_dtype)
            assert serves(problem, 148) == (m <= 64)
            if m <= 64:
                config, split = select(problem, 148)
                assert config in sm100.WEIGHT_ONLY and config.x_dtype == x_dtype
                assert 1 <= split <= 8 and (split == 1 or -(-k // 256) >= 8 * split)
            assert not serves(GemmProblem(m, n, k, "sm_100f", x_dtype, True), 148)


@pytest.mark.parametrize("num_sms", [148, 160, 20])
def test_selection(num_sms):
    """Each problem gets a config that can run it: the token tile, the split, the cluster."""
    chosen = set()
    for m, n, k in PROBLEMS:
        problem = GemmProblem(m, n, k, "sm_100f", "e2m1")
        config, split = select(problem, num_sms)
        chosen.add(config)
        assert split in (1, 2, 4, 8) and split <= config.split_k
        assert split == 1 or -(-k // 256) >= 2 * split
        assert config is not sm100.SWAP_32 or m <= 32
        assert sm100.scratch_bytes(config, problem, split, num_sms) == 0
    if num_sms == 148:
        assert chosen == set(OF_SM_100)


@pytest.mark.parametrize("num_sms", [148, 160, 20])
def test_selection_for_sm_103(num_sms):
    """Its own kernel wherever sm_100 has a pair's of the same tile, and else what sm_100 has."""
    chosen = set()
    for m, n, k in PROBLEMS:
        for x_dtype, invariant in (("e2m1", False), ("e2m1", True), ("float16", False)):
            problem = GemmProblem(m, n, k, "sm_103a", x_dtype, invariant)
            family = dataclasses.replace(problem, arch="sm_100f")
            assert serves(problem, num_sms) == serves(family, num_sms)
            if serves(problem, num_sms):
                (config, split), expected = select(problem, num_sms), select(family, num_sms)
                chosen.add(config)
                if expected[0] in (sm100.TWO_CTA_256, sm100.TWO_CTA_256_C4):
                    assert config in configs("sm_103a") and split == 1
                    assert config.cluster_n == 1 or (m > 256 and n > 256)
                else:
                    assert (config, split) == expected
    if num_sms == 148:
        assert chosen > {c for c in W4A4 if c.arch == "sm_103a"}


@pytest.mark.parametrize("tiles", range(1, 14))
def test_each_end_of_k_of_sm_103(tiles):
    """Eight MMAs of 96 read three stages, twelve scale tiles of 64: K ends behind each of these."""
    problem = Problem(
        sm100.TWO_CTA_256_K96, Case(5, 24, 64 * tiles - 10, x_scaling="token", out=F32)
    )
    problem.poison = True
    problem.check(problem.run(tiles))


def test_batch_invariant_selection_depends_on_the_weight_alone():
    for n, k in {(n, k) for _, n, k in PROBLEMS}:
        choices = {
            select(GemmProblem(m, n, k, "sm_100f", "e2m1", batch_invariant=True), num_sms)
            for m, _, _ in PROBLEMS
            for num_sms in (20, 148, 160)
        }
        assert len(choices) == 1


@pytest.mark.parametrize("config", W4A4, ids=label)
def test_machine_code(config):
    """Block-scaled MMAs, copies of scales to tensor memory, and TMA in the machine code."""
    code = kernel_objects.sass(config.name)
    pair = config.kind == "2cta"
    if config.arch == "sm_103a":  # three stages; each scale tile of x goes with two of the weight
        assert len(re.findall(r"UTCOMMA\.2CTA\.BLOCK16 ", code)) == 8
        assert len(re.findall(r"UTCCP\.T\.S\.2CTA\.4x32dp128bit", code)) == 3 * 4 * (1 + 2)
        # One thread's, and ptxas knows it: it does not put a loop around each.
        assert "BRA.U.ANY" not in code[code.index("UTCCP") : code.rindex("UTCOMMA")]
    else:
        assert len(re.findall(rf"UTCOMMA{'.2CTA' if pair else ''}\.4X\b", code)) == 4
        tiles = 1 + (config.tile_n // 128 if pair else 1)
        assert len(re.findall(r"UTCCP\.", code)) == 4 * tiles
    assert len(re.findall(r"UTMALDG\.[23]D", code)) == 4
    assert bool(re.search(r"UTMALDG\.2D\.MULTICAST", code)) == (config.cluster_n > 1)
    assert bool(re.search(r"UTMALDG\.3D\.MULTICAST", code)) == pair  # both CTAs take B's scales
    assert len(re.findall(r"UTMASTG\.2D", code)) == (3 if pair else 0)
    assert re.search(r"UGETNEXTWORKID", code)  # cluster launch control


@pytest.mark.parametrize("config", sm100.WEIGHT_ONLY, ids=label)
def test_machine_code_of_weight_only(config):
    code = kernel_objects.sass(config.name)
    kind = r"HMMA\.16816\.F32\.BF16" if config.x_dtype == "bfloat16" else r"HMMA\.16816\.F32 "
    assert len(re.findall(kind, code)) == 4 * 4 * 2
    assert len(re.findall(r"UTMALDG\.[23]D", code)) == 3


@pytest.mark.parametrize("config", W4A4, ids=label)
def test_one_thread_issues_each_asynchronous_copy(config):
    """Each TMA and tcgen05 instruction is behind an elect.sync: a warp would issue it 32 times."""
    ptx = ptx_of(config.name)
    elected = [
        ptx.partition(f"bra \t{label};")[2].partition(f"{label}:")[0]
        for _, _, label in re.findall(
            # The compiler may put an instruction or two between.
            r"elect\.sync \t%r\d+\|(%p\d+), -1;(?:\n[^:\n]*){0,3}?"
            r"\n\s+not\.pred \t(%p\d+), \1;\s+@\2 bra \t(\$\w+);",
            ptx,
        )
    ]
    issue = r"cp\.async\.bulk\.(?:prefetch\.)?tensor|tcgen05\.(?:mma|cp|commit)"
    assert sum(len(re.findall(issue, block)) for block in elected) >= 4 + 8 + 4 + 2
    assert sum(len(re.findall(issue, block)) for block in elected) == len(re.findall(issue, ptx))
