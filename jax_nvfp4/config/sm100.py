# SPDX-License-Identifier: Apache-2.0
"""Blackwell data-center GPUs (sm_100, sm_103): GEMM configs and which one serves which problem."""

from jax_nvfp4.config._types import GemmConfig, GemmProblem, Rule


def _config(suffix: str, **fields: object) -> GemmConfig:
    return GemmConfig(
        name=f"gemm_sm100f_{suffix}", arch="sm_100f", x_dtype="e2m1", tile_k=256, **fields
    )


SWAP_32 = _config("swap_t32", kind="swap", tile_m=32, tile_n=128, stages=8, swap_ab=True, split_k=8)
SWAP_64 = _config("swap_t64", kind="swap", tile_m=64, tile_n=128, stages=6, swap_ab=True, split_k=8)
SWAP_128 = _config("swap_t128", kind="swap", tile_m=128, tile_n=128, stages=5, swap_ab=True, split_k=8)
PAIR_128 = _config("pair_t256x128", kind="pair", tile_m=256, tile_n=128, cluster_m=2, stages=6)
PAIR_256 = _config("pair_t256x256", kind="pair", tile_m=256, tile_n=256, cluster_m=2, stages=5)
PAIR_256_C4 = _config("pair_t256x256_c2x2", kind="pair", tile_m=256, tile_n=256, cluster_m=2, cluster_n=2, stages=5)

CONFIGS = (SWAP_32, SWAP_64, SWAP_128, PAIR_128, PAIR_256, PAIR_256_C4)
RULES = ()


def scratch_bytes(config: GemmConfig, problem: GemmProblem, split_k: int, num_sms: int) -> int:
    """Scratch memory of a call: none, partial sums meet in distributed shared memory."""
    return 0
