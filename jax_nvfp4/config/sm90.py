# SPDX-License-Identifier: Apache-2.0
"""GEMM configs of Hopper (sm_90a) and the table that chooses among them."""

from jax_nvfp4.config._types import GemmConfig, GemmProblem, Rule

TILE_K = 128


def _config(kind: str, x_dtype: str, tile_m: int, tile_n: int, stages: int, ctas: int) -> GemmConfig:
    short = {"bfloat16": "bf16", "float16": "f16"}[x_dtype]
    return GemmConfig(
        name=f"gemm_sm90a_{kind}_{short}_{tile_m}x{tile_n}",
        arch="sm_90a",
        kind=kind,
        x_dtype=x_dtype,
        tile_m=tile_m,
        tile_n=tile_n,
        tile_k=TILE_K,
        stages=stages,
        swap_ab=True,
        split_k=8,
        warpgroups=2,
        ctas_per_sm=ctas,
    )


CONFIGS: tuple[GemmConfig, ...] = tuple(
    config
    for x_dtype in ("bfloat16", "float16")
    for config in (
        _config("stream", x_dtype, 8, 128, 8, 2),
        _config("stream", x_dtype, 16, 128, 8, 2),
        _config("stream", x_dtype, 64, 128, 4, 2),
        _config("tile", x_dtype, 128, 256, 4, 1),
    )
)

RULES: tuple[Rule, ...] = ()


def scratch_bytes(config: GemmConfig, problem: GemmProblem, split_k: int, num_sms: int) -> int:
    """No kernel of this architecture needs scratch memory."""
    return 0
