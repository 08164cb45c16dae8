# SPDX-License-Identifier: Apache-2.0
"""sm_120 and sm_121 (RTX 5090, RTX PRO 6000, DGX Spark): configs, selection table, scratch.

Three designs, `kernels/NOTES.md` has the arithmetic behind the choice:

`pingpong`: 128x128 output tiles, two groups of four warps that take turns, one multiplying while
the other writes its tile out. Bound by the tensor cores.

`small_m`: 64 rows of the weight against up to 16 or 64 rows of x, operands swapped, nearly all of
the shared memory a queue of weight tiles in flight. Bound by memory.

`weight_only`: small_m for 16-bit x; the weight's codes are expanded in registers.

Gated weights have twins of all but the one for float16.
"""

from collections.abc import Callable

from jax_nvfp4.config.gemm.blackwell import GATED_HALF_TILE, gated_configs, gated_rules
from jax_nvfp4.config.gemm.types import GemmConfig, GemmProblem, Rule
from jax_nvfp4.integers import ceil_div, round_up

SHARED_BYTES = 99 * 1024
"""Shared memory a CTA can have on sm_120 (CUDA programming guide, compute capabilities)."""

PINGPONG = GemmConfig(
    name="gemm_sm120f_pingpong_t128x128",
    arch="sm_120f",
    kind="pingpong",
    x_dtype="e2m1",
    tile_m=128,
    tile_n=128,
    tile_k=128,
    stages=5,
    split_k=8,
)

SMALL_M_16 = GemmConfig(
    name="gemm_sm120f_small_m_t16x64",
    arch="sm_120f",
    kind="small_m",
    x_dtype="e2m1",
    tile_m=16,
    tile_n=64,
    tile_k=256,
    stages=8,
    swap_ab=True,
    split_k=8,
)

SMALL_M_64 = GemmConfig(
    name="gemm_sm120f_small_m_t64x64",
    arch="sm_120f",
    kind="small_m",
    x_dtype="e2m1",
    tile_m=64,
    tile_n=64,
    tile_k=256,
    stages=5,
    swap_ab=True,
    split_k=8,
)

WEIGHT_ONLY = tuple(
    GemmConfig(
        name=f"gemm_sm120f_weight_only_{short}_t16x64",
        arch="sm_120f",
        kind="weight_only",
        x_dtype=x_dtype,
        tile_m=16,
        tile_n=64,
        tile_k=256,
        stages=5,
        swap_ab=True,
        split_k=8,
    )
    for short, x_dtype in (("bf16", "bfloat16"), ("f16", "float16"))
)

PLAIN = (PINGPONG, SMALL_M_16, SMALL_M_64, *WEIGHT_ONLY)

CONFIGS = (*PLAIN, *gated_configs(PLAIN))


def tiles(config: GemmConfig, problem: GemmProblem) -> int:
    """Output tiles of a problem; along n they come from the weight, which is padded to 128 rows."""
    rows_n = round_up(problem.n, 128)
    return ceil_div(problem.m, config.tile_m) * ceil_div(rows_n, config.tile_n)


def _fill(config: GemmConfig, want: int, min_k_tiles: int) -> Callable[[GemmProblem, int], int]:
    """Splits of K that bring the tiles to `want` CTAs, each with `min_k_tiles` stages at least."""

    def split_k(problem: GemmProblem, num_sms: int) -> int:
        work = max(1, tiles(config, problem))
        depth = ceil_div(problem.k, config.tile_k) // min_k_tiles
        return max(1, min(config.split_k, min(want, num_sms) // work, depth))

    return split_k


def _whole(problem: GemmProblem, num_sms: int) -> int:
    return 1


RULES: tuple[Rule, ...] = (
    Rule(
        when=lambda p, num_sms: p.batch_invariant,
        config=PINGPONG,
        split_k=_whole,
        reason="One config and no split for every m, so that a row's sum always runs in the same "
        "order. It costs most at m=1 and small n: n=4096 gives 32 tiles, whose CTAs take in "
        "weights at the rate of their MMAs, about 40% of the memory's.",
    ),
    Rule(
        when=lambda p, num_sms: p.m <= SMALL_M_16.tile_m,
        config=SMALL_M_16,
        split_k=_fill(SMALL_M_16, want=64, min_k_tiles=8),
        reason="Bound by reading the weight. 64 CTAs with 88 KB each in flight saturate 1.8 TB/s "
        "with a latency of a microsecond twice over, and n >= 4096 gives them without a split; "
        "only below that is K split, and only where each part still fills the pipeline once, "
        "because the second launch of a split costs as much as reading 3 MB.",
    ),
    Rule(
        when=lambda p, num_sms: p.m <= SMALL_M_64.tile_m,
        config=SMALL_M_64,
        split_k=_fill(SMALL_M_64, want=64, min_k_tiles=8),
        reason="Still bound by reading the weight: a 128-row tile would spend half of its MMAs on "
        "padding. x is read again from L2 by each CTA, as many bytes as the weight's.",
    ),
    Rule(
        when=lambda p, num_sms: True,
        config=PINGPONG,
        split_k=_fill(PINGPONG, want=1 << 30, min_k_tiles=16),
        reason="Bound by the tensor cores. Where the tiles are fewer than half of the SMs, K is "
        "split so that idle ones work, in parts of 2048 or longer so that the partial sums, "
        "2 x 4 bytes an output and part, stay small beside the operands.",
    ),
)


RULES += tuple(
    Rule(
        when=lambda p, num_sms: p.m <= 64 and not p.batch_invariant,
        config=config,
        split_k=_fill(config, want=64, min_k_tiles=8),
        reason="Reads the weight's 0.56 bytes an element where dequantizing to bf16 first moves "
        "4.56. Each further 16 rows read the weight from L2 once more; above 64 rows the MMAs and "
        "L2 take what that saves, and XLA's dot of the dequantized weight has the better tiles. "
        "A batch-invariant call is left to XLA for each m, as it would change kernels with m.",
    )
    for config in WEIGHT_ONLY
)

RULES += gated_rules(RULES)


def partial_ld(config: GemmConfig, n: int) -> int:
    """Row length, in float32, of the partial sums of a split.

    n rounded up to 16 bytes; the rows of a gated weight as it is packed.
    """
    if config.epilogue == "gated":
        return 2 * round_up(n // 2, GATED_HALF_TILE)
    return round_up(n, 4)


def scratch_bytes(config: GemmConfig, problem: GemmProblem, split_k: int, num_sms: int) -> int:
    """Bytes of scratch for a problem: float32 (split_k, m, partial_ld), none without a split."""
    return 4 * split_k * problem.m * partial_ld(config, problem.n) if split_k > 1 else 0
