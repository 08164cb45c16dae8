# SPDX-License-Identifier: Apache-2.0
"""Faults planted into the PTX of each family of kernels: the machine reports them, or y is wrong.

A seeded sample of the faults that such kernels are prone to; `tests/support/mutation.py` plants
more of them, and other kinds, and runs all of the kernels' tests on each.
"""

import dataclasses
import functools
import random
import re

import mutation
import numpy as np
import pytest
from ptx_machine import mutate
from sweep import SWEEP

from jax_nvfp4.config import ARCHES, configs
from jax_nvfp4.config.enums import OutFormat
from jax_nvfp4.config.quantize import QUANTIZE_CONFIGS

KINDS = {
    "a dropped fence or wait": (
        "drop_wait", "wrong_parity", "drop_barrier", "drop_arrive", "drop_bulk_wait", "drop_fence",
        "drop_cluster_barrier", "drop_wgmma_wait", "drop_wgmma_fence",
    ),
    "a scope that does not reach the other CTA": ("narrow_scope",),
    "scales of a neighbor": ("scale_column", "drop_scale_copy"),
    "a wrong byte count": ("wrong_bytes",),
    "an off-by-one in a loop": ("loop_bound",),
    "the neighboring box": ("shift_coordinate",),
    "an output or its padding that is not written": ("drop_store",),
    "leaked tensor memory": ("leak_tmem",),
}  # fmt: skip
EACH = 2 if SWEEP else 1
"""Faults of each kind and kernel, at most."""
SEEDS = 4
"""Schedules, at most, that a fault must show under one of."""

CONFIGS = {c.name: c for c in (*QUANTIZE_CONFIGS, *(c for a in ARCHES for c in configs(a)))}
# (m, n, tiles of K, split, output dtype, bias dtype, stride of x's scales, of the weight's)
GEMMS = {
    "gemm_sm90a_intra_split_k_bf16_8x64": ((3, 67, 49, 2, 1, 0, 1, 1),),
    # A cluster of two CTAs that takes more tiles than there are places for answers.
    "gemm_sm100f_swap_t32": ((90, 250, 3, 2, 1, 0, 1, 1), (29, 100, 19, 1, 2, 1, -1, 0)),
    "gemm_sm100f_2cta_t256x128": ((300, 264, 3, 1, 1, 0, 1, 1), (40, 75, 9, 1, 2, 1, -1, 0)),
    "gemm_sm103a_2cta_t256x256": ((1300, 75, 1, 1, 1, 0, 1, 1), (5, 200, 9, 1, 2, 1, -1, 0)),
    "gemm_sm120f_small_m_t16x64": ((17, 129, 11, 1, 1, 0, 1, 1), (5, 67, 22, 2, 0, 1, -1, 0)),
    "gemm_sm120f_pingpong_t128x128": ((130, 200, 7, 1, 2, 0, 1, 1), (40, 67, 12, 2, 1, 1, -1, 0)),
}
# Kernel and its (m, k, multiprocessors): one for each shape of its threads.
QUANTIZE = {
    "quantize_sm90a_flat_f16": ((5, 40, 132), (3, 17, 132)),
    "quantize_sm100f_rows_bf16": ((3, 528, 132), (3, 1048, 1), (3, 1033, 132)),
    "quantize_sm120f_grid_f32": ((40, 136, 3), (3, 2049, 1), (5, 40, 132)),
}


def gemm_calls(name):
    """Runs of a GEMM kernel, each held to the oracle."""
    tests = mutation.module_of("test_gemm_outputs")
    for m, n, k_tiles, split, *rest in GEMMS[name]:
        call = tests.Call(CONFIGS[name], m, n, 64 * (k_tiles * CONFIGS[name].tile_k // 64), split,
                          *rest)  # fmt: skip
        yield call.check


def quantize_calls(name):
    """Runs of a quantize kernel, each held to the oracle bit for bit."""
    tests = mutation.module_of("test_quantize_kernels")
    config, rng = CONFIGS[name], np.random.default_rng(0)
    for seed, (m, k, sms) in enumerate(QUANTIZE[name]):
        x = rng.standard_normal((m, k)).astype(config.x_dtype)
        x[m - 1, k // 2] = 9
        for out_format in (OutFormat.OPERAND, OutFormat.VALUES):
            for scaling in tests.SCALINGS[config.kind]:
                g = tests.given_scales(rng, x, scaling, bad=False)
                yield functools.partial(
                    tests.check, config, x, scaling, out_format, g, seed=seed, sms=sms
                )


MATTERS = re.compile(r"\b(ld|st|cp\.async\.bulk\.(?!prefetch)|\w*mma|tcgen05|mbarrier\.arrive)")


def equivalent(name, mutant):
    """Whether a fault changes nothing that these runs could see."""
    index = mutant.line - 1
    if mutant.rule == "drop_cluster_barrier":
        # At the end another warp, which waits still, keeps the CTA's shared memory alive.
        return re.search(r"ret;|bra\.uni", "\n".join(mutant.lines[index + 1 : index + 5]))
    if mutant.rule == "loop_bound":
        # A loop over tiles, or over parts of rows, that runs once; one that spins until a message
        # comes, which is there or is asked for again; one that prefetches or waits for the last
        # stages, which nothing depends on.
        one_tile = "_intra_split_k_" in name and "setp.lt.s32" in mutant.before
        spins = "_grid_" in name and "setp.eq" in mutant.before
        start = index
        while not re.match(r"\s*\$\w+:", mutant.lines[start]):
            start -= 1
        idle = not MATTERS.search("\n".join(mutant.lines[start:index]))
        return one_tile or spins or idle or "_rows_" in name
    return False


def under(calls, seed):
    """The calls under another schedule."""
    return [dataclasses.replace(c, run=functools.partial(c.run, seed=seed)) for c in calls]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*GEMMS, *QUANTIZE])
def test_planted_faults_show(name, monkeypatch):
    monkeypatch.setattr("ptx_machine.machine.LIVELOCK_INSTRUCTIONS", 100_000)
    make = gemm_calls if name in GEMMS else quantize_calls
    with mutation.Substitution(name) as substitution:
        calls = [mutation.Call(f"call {i}", run) for i, run in enumerate(make(name))]
        calls = mutation.measured(substitution, calls)
        lines = set().union(*(c.lines for c in calls))
        survivors, planted = [], 0
        for kind, rules in KINDS.items():
            faults = [
                m
                for m in mutate.mutants(mutation.text_of(name), rules, lines)
                if not equivalent(name, m)
            ]
            for mutant in random.Random(kind).sample(faults, min(EACH, len(faults))):
                planted += 1
                # What one schedule hides, another one shows.
                if not any(
                    mutation.verdict(substitution, mutant, under(calls, seed))["killed"]
                    for seed in range(SEEDS)
                ):
                    survivors.append(f"{kind}: {mutant}")
    assert planted >= 2
    assert not survivors, "\n".join(survivors)
