# SPDX-License-Identifier: Apache-2.0
"""Blackwell data-center GPUs (sm_100, sm_103): GEMM configs and which one serves which problem.

Two designs of one kernel for e2m1 activations (`kind`). "swap": the weight is the MMA's M side
(128 rows for each CTA) and the tokens a narrow N side; a cluster of up to eight CTAs may split K.
"2cta": tcgen05.mma over two CTAs, 256 tokens by 128 or 256 rows of the weight. Stages are as many
as shared memory holds. sm_103 runs these kernels too; where its longer MMAs pay, it has its own.
The performance model behind the table is in `kernels/NOTES.md`; no row has been measured.

"weight_only", for few rows of 16-bit activations, is sm_120's kernel: mma.sync is on every arch.

Gated weights have twins of all but the one for float16.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax_nvfp4.config.gemm import sm120
from jax_nvfp4.config.gemm.blackwell import gated_configs, gated_rules
from jax_nvfp4.config.gemm.types import GemmConfig, GemmProblem, Rule
from jax_nvfp4.integers import ceil_div

MAX_SPLIT_K = 8
"""CTAs that may split K: the largest cluster that every GPU is sure to schedule."""

_REFERENCE_SMS = 148
"""Multiprocessors that batch-invariant calls assume: their split may not depend on the GPU."""


def _config(
    suffix: str, kind: str, tile_m: int, tile_n: int, stages: int, **rest: Any
) -> GemmConfig:
    swap = kind == "swap"
    return GemmConfig(
        name=f"gemm_sm100f_{suffix}",
        arch="sm_100f",
        kind=kind,
        x_dtype="e2m1",
        tile_m=tile_m,
        tile_n=tile_n,
        tile_k=256,
        stages=stages,
        swap_ab=swap,
        split_k=MAX_SPLIT_K if swap else 1,
        **rest,
    )


SWAP_32 = _config("swap_t32", "swap", 32, 128, 8)
SWAP_64 = _config("swap_t64", "swap", 64, 128, 6)
SWAP_128 = _config("swap_t128", "swap", 128, 128, 5)
TWO_CTA_128 = _config("2cta_t256x128", "2cta", 256, 128, 6, cluster_m=2)
TWO_CTA_256 = _config("2cta_t256x256", "2cta", 256, 256, 5, cluster_m=2)
TWO_CTA_256_C4 = _config("2cta_t256x256_c2x2", "2cta", 256, 256, 5, cluster_m=2, cluster_n=2)

TWO_CTA_256_K96, TWO_CTA_256_C4_K96 = (
    dataclasses.replace(c, name=c.name.replace("sm100f", "sm103a"), arch="sm_103a")
    for c in (TWO_CTA_256, TWO_CTA_256_C4)
)
"""The same with MMAs of 96 along K, which compute capability 10.3 has: 1.5 times the rate."""

W4A4 = (
    SWAP_32,
    SWAP_64,
    SWAP_128,
    TWO_CTA_128,
    TWO_CTA_256,
    TWO_CTA_256_C4,
    TWO_CTA_256_K96,
    TWO_CTA_256_C4_K96,
)

WEIGHT_ONLY = tuple(
    dataclasses.replace(
        config, name=config.name.replace("sm120f", "sm100f"), arch="sm_100f", ctas_per_sm=2
    )
    for config in sm120.WEIGHT_ONLY
)
"""sm_120's kernels for 16-bit x, two CTAs on each multiprocessor."""

PLAIN = (*W4A4, *WEIGHT_ONLY)

CONFIGS = (*PLAIN, *gated_configs(PLAIN))


def _tiles(config: GemmConfig, problem: GemmProblem) -> int:
    """Output tiles of a problem: one CTA's (swap) or one pair's."""
    return ceil_div(problem.m, config.tile_m) * ceil_div(problem.n, config.tile_n)


def _split(tiles: int, k: int, num_sms: int) -> int:
    """Ways to split K: doubled while the CTAs fit the chip and each keeps two stages of K.

    Pairs of CTAs always find their places. Larger clusters leave some multiprocessors of each GPC
    unused, and a cluster without a place would start when the others are done: so they are held to
    seven eighths of the chip (16 clusters of 8 on 148 multiprocessors).
    """
    split = 1
    while split < MAX_SPLIT_K and ceil_div(k, 256) >= 4 * split:
        if 2 * split * tiles > (num_sms if split == 1 else num_sms * 7 // 8):
            break
        split *= 2
    return split


def _split_swap(config: GemmConfig) -> Callable[[GemmProblem, int], int]:
    return lambda p, num_sms: _split(_tiles(config, p), p.k, num_sms)


def _split_invariant(problem: GemmProblem, num_sms: int) -> int:
    return _split(ceil_div(problem.n, SWAP_128.tile_n), problem.k, _REFERENCE_SMS)


def _split_weight_only(problem: GemmProblem, num_sms: int) -> int:
    """Splits of K that give each multiprocessor its two CTAs, with eight stages of K at least."""
    tiles = sm120.tiles(WEIGHT_ONLY[0], problem)
    return max(1, min(MAX_SPLIT_K, 2 * num_sms // tiles, ceil_div(problem.k, 256) // 8))


def _one(problem: GemmProblem, num_sms: int) -> int:
    return 1


def _clusters_pay_k96(problem: GemmProblem, num_sms: int) -> bool:
    """Whether clusters of two pairs are ahead, with 4 cycles for every 5 and 7/8 of the chip."""
    tiles, pairs = _tiles(TWO_CTA_256, problem), max(num_sms // 2, 1)
    waves, waves_of_clusters = ceil_div(tiles, pairs), ceil_div(tiles, max(pairs * 7 // 16 * 2, 1))
    return problem.m > 256 and problem.n > 256 and 4 * waves_of_clusters <= 5 * waves


# On sm_103 both its own rows and those of sm_100f count.
RULES: tuple[Rule, ...] = (
    Rule(
        lambda p, sms: p.batch_invariant,
        SWAP_128,
        _split_invariant,
        "One config and a split from (n, k) alone: the weight is read once up to 128 tokens, as "
        "in decoding, and a 128x128 tile still reaches a large share of the MMA rate beyond.",
    ),
    Rule(
        lambda p, sms: p.m <= 32,
        SWAP_32,
        _split_swap(SWAP_32),
        "Bound by the weight's bytes: the narrowest token tile leaves shared memory to eight "
        "stages, 144 KB of weight in flight on each multiprocessor; K is split to use them all.",
    ),
    Rule(
        lambda p, sms: p.m <= 64,
        SWAP_64,
        _split_swap(SWAP_64),
        "Still bound by the weight's bytes; 64 tokens in one tile read the weight once.",
    ),
    Rule(
        lambda p, sms: p.m <= 128 or (p.m <= 256 and 4 * _tiles(TWO_CTA_128, p) <= sms),
        SWAP_128,
        _split_swap(SWAP_128),
        "128 tokens in one tile read the weight once; up to 256 tokens also where pairs would "
        "leave half of the chip idle, because only the swap configs split K.",
    ),
    Rule(
        lambda p, sms: 2 * _tiles(TWO_CTA_128, p) <= sms,
        TWO_CTA_128,
        _one,
        "Tiles of half the size are done in one wave: more of the chip works, although each tile "
        "loads more bytes for an MMA. Two waves of them take longer than one of the larger tiles.",
    ),
    Rule(
        _clusters_pay_k96,
        TWO_CTA_256_C4_K96,
        _one,
        "MMAs of 96 along K have 1.5 times the rate, and L2 is the limit: a pair would ask it for "
        "108 bytes a cycle, clusters that share x for 81. So they pay as soon as those that fit, "
        "on 7/8 of the chip, need no more than 5 waves for 4 of pairs.",
    ),
    Rule(
        lambda p, sms: p.m > 256 and _tiles(TWO_CTA_256, p) >= 4 * (sms // 2) and p.n > 256,
        TWO_CTA_256_C4,
        _one,
        "Bound by the MMA rate: clusters of two pairs share x, 54 bytes a cycle for each CTA "
        "rather than 72, which no longer nears what L2 delivers. Four waves or more, so that the "
        "multiprocessors that larger clusters leave unused, and their tail, do not show.",
    ),
    Rule(
        lambda p, sms: True,
        TWO_CTA_256_K96,
        _one,
        "As the next row; with MMAs of 96 along K not bound by their rate, but by L2.",
    ),
    Rule(
        lambda p, sms: True,
        TWO_CTA_256,
        _one,
        "The largest tile with the smallest cluster: the tail of a few waves wastes least.",
    ),
)


RULES += tuple(
    Rule(
        lambda p, sms: p.m <= 64 and not p.batch_invariant,
        config,
        _split_weight_only,
        "Reads the weight's 0.56 bytes an element where dequantizing to bf16 first moves 4.56. "
        "Instructions expand the codes, so that at most about half of the memory's bandwidth is to "
        "be expected. Each further 16 rows read the weight from L2 once more. Above 64 rows XLA's "
        "dot of the dequantized weight, on tcgen05, is the better one; a batch-invariant call is "
        "left to it for each m.",
    )
    for config in WEIGHT_ONLY
)

RULES += gated_rules(RULES)


def scratch_bytes(config: GemmConfig, problem: GemmProblem, split_k: int, num_sms: int) -> int:
    """Bytes of scratch memory that a call needs.

    With e2m1 activations none: the partial sums of a split K meet in distributed shared memory, so
    that nothing is left in global memory to be initialized or reset.
    """
    if config.kind == "weight_only":
        return sm120.scratch_bytes(config, problem, split_k, num_sms)
    return 0
