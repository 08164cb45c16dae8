# SPDX-License-Identifier: Apache-2.0
"""GEMM configs of Hopper (sm_90a) and the table that chooses among them.

Kinds: "small_m" and "tile" CTAs work through tiles, one after the other, and store each from
registers; "intra_split_k" CTAs have one tile, and groups of their warpgroups divide its columns.

Figures in the reasons were measured on an H100 (132 multiprocessors) with weights that were not in
the L2 cache.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jax_nvfp4.config.gemm.types import GemmConfig, GemmProblem, Rule
from jax_nvfp4.integers import ceil_div, round_up

When = Callable[[GemmProblem, int], bool]
Split = Callable[[GemmProblem, int], int]

TILE_K = 128
_SHORT = {"bfloat16": "bf16", "float16": "f16"}


def _config(
    kind: str, x_dtype: str, tile_m: int, tile_n: int, stages: int, **rest: Any
) -> GemmConfig:
    return GemmConfig(
        name=f"gemm_sm90a_{kind}_{_SHORT[x_dtype]}_{tile_m}x{tile_n}",
        arch="sm_90a",
        kind=kind,
        x_dtype=x_dtype,
        tile_m=tile_m,
        tile_n=tile_n,
        tile_k=TILE_K,
        stages=stages,
        swap_ab=True,
        **rest,
    )


def _intra_split_k(x_dtype: str) -> tuple[GemmConfig, ...]:
    """Configs whose warpgroups divide K: the fastest for few rows, a sum's order of their own."""
    return (
        _config(
            "intra_split_k", x_dtype, 8, 64, 12, split_k=2, warpgroups=2, k_groups=2, ctas_per_sm=2
        ),
        _config(
            "intra_split_k", x_dtype, 16, 64, 12, split_k=2, warpgroups=2, k_groups=2, ctas_per_sm=2
        ),
        _config("intra_split_k", x_dtype, 32, 64, 16, split_k=2, warpgroups=4, k_groups=4),
        _config("intra_split_k", x_dtype, 64, 64, 10, split_k=2, warpgroups=2, k_groups=2),
        _config("intra_split_k", x_dtype, 64, 128, 8, warpgroups=4, k_groups=2),
    )


def _whole(x_dtype: str, smallest: tuple[int, ...]) -> tuple[GemmConfig, ...]:
    """Configs whose warpgroups each sum over all of a CTA's columns, in the same order in all.

    Where CTAs crowd on the multiprocessors the kernel uses four of six stages (28672x4096, 1 row:
    24.8 us, with five 26.3, with six 27.4, with three 25.3); a CTA of up to 16 rows needs six where
    it is by itself (4096x7168, split in 2: 9.1 us, with four 10.2).
    """
    return (
        *(
            _config("small_m", x_dtype, rows, 64, 6, split_k=2, warpgroups=1, ctas_per_sm=4)
            for rows in smallest
        ),
        _config("small_m", x_dtype, 32, 128, 4, split_k=2, warpgroups=2, ctas_per_sm=2),
        _config("small_m", x_dtype, 64, 128, 4, split_k=2, warpgroups=2, ctas_per_sm=2),
        _config("tile", x_dtype, 128, 128, 5, split_k=3, warpgroups=2),
        _config("tile", x_dtype, 128, 256, 4, split_k=2, warpgroups=2),
    )


# Tiles of 192 rows, for the numbers of tiles that 128 and 256 divide badly over multiprocessors.
_BETWEEN = (
    _config("tile", "bfloat16", 64, 192, 5, split_k=2, warpgroups=3),
    _config("tile", "bfloat16", 128, 192, 4, split_k=2, warpgroups=3),
)

_PLAIN: tuple[GemmConfig, ...] = (
    *_intra_split_k("bfloat16"),
    *_whole("bfloat16", (8, 16)),
    *_BETWEEN,
    _intra_split_k("float16")[1],
    *_whole("float16", (16,)),
)


def _named(
    kind_and_tile: str, x_dtype: str, epilogue: str = "plain", grouped: bool = False
) -> GemmConfig:
    """The config of a name without dtype and prefix, or its twin for gated or grouped weights."""
    kind, _, tile = kind_and_tile.rpartition("_")
    rest = f"{kind}_{_SHORT[x_dtype]}_{tile}"
    config = next(c for c in _PLAIN if c.name == f"gemm_sm90a_{rest}")
    prefix = ("grouped_" if grouped else "") + ("" if epilogue == "plain" else f"{epilogue}_")
    name = f"gemm_sm90a_{prefix}{rest}"
    return dataclasses.replace(config, name=name, epilogue=epilogue, grouped=grouped)


# Groups have few rows or many; configs for numbers of tiles that fill a wave have no use.
_GROUPED_BFLOAT16 = (
    "intra_split_k_8x64",
    "intra_split_k_16x64",
    "small_m_8x64",
    "small_m_16x64",
    "small_m_32x128",
    "small_m_64x128",
    "tile_128x128",
    "tile_128x256",
)
_GROUPED_FLOAT16 = ("small_m_16x64", "small_m_64x128", "tile_128x128")

CONFIGS: tuple[GemmConfig, ...] = (
    *_PLAIN,
    *(
        dataclasses.replace(c, name=c.name.replace("sm90a_", "sm90a_gated_"), epilogue="gated")
        for c in _PLAIN
        if c.x_dtype == "bfloat16"
    ),
    *(
        _named(name, "bfloat16", epilogue, True)
        for epilogue in ("plain", "gated")
        for name in _GROUPED_BFLOAT16
    ),
    *(_named(name, "float16", "plain", True) for name in _GROUPED_FLOAT16),
)
"""Gated weights, which are for activations in the epilogue, have kernels for bfloat16 x alone."""


def _tiles(problem: GemmProblem, tile_m: int, tile_n: int) -> int:
    """Tiles of a problem, at most; weights are padded to 128 rows."""
    rows = round_up(problem.n, 128)
    groups = min(problem.m, max(problem.groups, 1))
    # Each group may have a tile that is not full.
    return (groups + (problem.m - groups) // tile_m) * ceil_div(rows, tile_n)


def _split_to_fill(tile_m: int, tile_n: int, most: int) -> Split:
    """As many ways as leave each multiprocessor one CTA, and each CTA four stages."""

    def split(problem: GemmProblem, num_sms: int) -> int:
        fill = num_sms // max(1, _tiles(problem, tile_m, tile_n))
        return max(1, min(fill, most, problem.k // (4 * TILE_K)))

    return split


def _whole_k(problem: GemmProblem, num_sms: int) -> int:
    return 1


def _invariant_split(problem: GemmProblem, num_sms: int) -> int:
    """Of (n, k) alone."""
    return 2 if problem.n <= 8192 and problem.k >= 8 * TILE_K else 1


def _wide_wins(problem: GemmProblem, num_sms: int) -> bool:
    """Whether tiles of 128 x 256 take less time than tiles of 128 x 128.

    A wide one takes 1.8 times a narrow one's; waves of CTAs are counted in whole.
    """
    narrow = ceil_div(_tiles(problem, 128, 128), num_sms)
    wide = ceil_div(_tiles(problem, 128, 256), num_sms)
    return 1.8 * wide < narrow


def _many(waves: int) -> When:
    """Whether tiles of 64 rows are more than so many for each multiprocessor, or many and short."""

    def many(problem: GemmProblem, num_sms: int) -> bool:
        tiles = ceil_div(problem.n, 128) * 2 * max(1, min(problem.m, problem.groups))
        return tiles > waves * num_sms or (tiles > 2 * num_sms and problem.k <= 2048)

    return many


def _one_wave(tile_n: int) -> When:
    """Whether tiles of so many rows of the weight, and all rows of x, are one for each SM."""
    return lambda p, sms: _tiles(p, max(p.m, 1), tile_n) <= sms


def _rows(most: int | None, more: When | None = None) -> When:
    """At most so many rows of x (any number: None), and `more`."""
    return lambda p, sms: (most is None or p.m <= most) and (more is None or more(p, sms))


def _invariant(most: int | None, more: When | None = None) -> When:
    rows = _rows(most, more)
    return lambda p, sms: p.batch_invariant and rows(p, sms)


_ORDER = (
    "order of sums: columns in rising order in each of the parts that (n, k) set, then the parts;"
    " the same in every config but intra_split_k, so that results for a row are the same bits"
)


class _Row(NamedTuple):
    """A row of a table, for any dtype of x: `Rule` with the config's name for the config."""

    when: When
    config: str
    split_k: Split
    reason: str


_INVARIANT_8 = _Row(_invariant(8), "small_m_8x64", _invariant_split, _ORDER)
_INVARIANT = (
    _Row(_invariant(16), "small_m_16x64", _invariant_split, _ORDER),
    _Row(_invariant(32), "small_m_32x128", _invariant_split, _ORDER),
    _Row(_invariant(64), "small_m_64x128", _invariant_split, _ORDER),
    _Row(_invariant(None, _wide_wins), "tile_128x256", _invariant_split, _ORDER),
    _Row(_invariant(None), "tile_128x128", _invariant_split, _ORDER),
)
"""Batch-invariant calls."""

_FEW_BFLOAT16 = (
    _Row(
        _rows(8, _many(3)),
        "small_m_8x64",
        _whole_k,
        "many or short tiles: CTAs that go on to the next tile load it while they store"
        " (24576x1536: 11.0 us, intra_split_k 13.5; 57344x8192: 92 us, 97; 28672x4096:"
        " 24.8 us, 26.0)",
    ),
    _Row(
        _rows(8),
        "intra_split_k_8x64",
        _split_to_fill(8, 64, 2),
        "eight warps for 64 rows keep up with memory on every multiprocessor; clusters of"
        " two fit everywhere, larger ones leave multiprocessors idle",
    ),
    _Row(
        _rows(16, _many(3)),
        "small_m_16x64",
        _whole_k,
        "many or short tiles, as for 8 rows (28672x4096: 25.1 us, intra_split_k 27.1)",
    ),
    _Row(
        _rows(16),
        "intra_split_k_16x64",
        _split_to_fill(16, 64, 2),
        "eight warps for 64 rows keep up with memory, as for 8 rows of x",
    ),
    _Row(
        _rows(32, _one_wave(64)),
        "intra_split_k_32x64",
        _split_to_fill(32, 64, 2),
        "sixteen warps hide the decode (8192x8192: 17.1 us, small_m_32x128 19.0)",
    ),
    _Row(
        _rows(32),
        "small_m_32x128",
        _whole_k,
        "more tiles than multiprocessors: two CTAs overlap one's stores with the other's"
        " loads (28672x4096: 29.8 us, intra_split_k_32x64 35.2)",
    ),
    _Row(
        _rows(128, lambda p, sms: _tiles(p, 64, 64) <= sms),
        "intra_split_k_64x64",
        _split_to_fill(64, 64, 2),
        "busies the most multiprocessors and exchanges the fewest sums (us, and those of"
        " intra_split_k_64x128 split in 3; 64 rows: 4096x4096 7.2, 9.0; 6144x4096 9.8, 10.4;"
        " 8192x28672 63, 62; 128 rows: 4096x4096 10.0, 10.7)",
    ),
    _Row(
        _rows(64, _one_wave(128)),
        "intra_split_k_64x128",
        _whole_k,
        "sixteen warps hide the decode, on one tile for each multiprocessor",
    ),
    _Row(
        _rows(64, _one_wave(192)),
        "tile_64x192",
        _whole_k,
        "one tile for each multiprocessor (24576x1536: 13.4 us, small_m_64x128 14.8)",
    ),
    _Row(
        _rows(64),
        "small_m_64x128",
        _whole_k,
        "more tiles than multiprocessors, as for 32 rows (28672x4096: 30.2 us,"
        " intra_split_k_64x128 33.2)",
    ),
)
"""Up to 64 rows; up to 128 where K is split over all multiprocessors."""

_FEW_FLOAT16 = (
    _Row(
        _rows(16, _many(3)),
        "small_m_16x64",
        _whole_k,
        "many or short tiles, as in bfloat16, although decoding costs more",
    ),
    _Row(
        _rows(16),
        "intra_split_k_16x64",
        _split_to_fill(16, 64, 2),
        "eight warps for 64 rows keep up with memory, as in bfloat16",
    ),
    _Row(
        _rows(32),
        "small_m_32x128",
        _split_to_fill(32, 128, 2),
        "x is read once for 128 rows of the weight",
    ),
    _Row(
        _rows(64),
        "small_m_64x128",
        _split_to_fill(64, 128, 2),
        "x is read once for 128 rows of the weight",
    ),
)
"""Up to 64 rows of float16, of which there are fewer kernels."""

_BETWEEN_FLOAT16 = (
    _Row(
        _rows(128, lambda p, sms: 2 * _tiles(p, 64, 128) <= sms),
        "small_m_64x128",
        _split_to_fill(64, 128, 2),
        "two tiles of 64 rows fill more multiprocessors than one of 128 (4096x4096: 11.5 us, 14.7)",
    ),
)
"""Up to 128 rows."""

_BETWEEN_BFLOAT16 = (
    _Row(
        _rows(128, lambda p, sms: 2 * _tiles(p, 64, 192) <= sms),
        "tile_64x192",
        _split_to_fill(64, 192, 2),
        "a wave of tiles of 192 where those of 128 are too many (6144x4096: 14.2 us, 128x128 15.0)",
    ),
    _Row(
        lambda p, sms: 2 * _tiles(p, 128, 192) <= sms < 2 * _tiles(p, 128, 128),
        "tile_128x192",
        _split_to_fill(128, 192, 2),
        "K split over two CTAs fills the multiprocessors (6144x4096, 256 rows: 22.0 us,"
        " 128x128 23.4)",
    ),
    _Row(
        lambda p, sms: _tiles(p, 128, 192) <= sms < _tiles(p, 128, 128),
        "tile_128x192",
        _whole_k,
        "one tile for each multiprocessor (24576x1536, 128 rows: 18.5 us, 128x256 20.0)",
    ),
)
"""Numbers of tiles that 192 rows of the weight divide best."""

_MANY = (
    _Row(
        _wide_wins,
        "tile_128x256",
        _whole_k,
        "fewest bytes from the L2 cache for a product (28672x4096, 2048 rows: 602 us, 128x128 700)",
    ),
    _Row(
        _rows(None),
        "tile_128x128",
        _split_to_fill(128, 128, 3),
        "fewer waves, or a wave that is fuller, than with 128x256",
    ),
)
"""All else."""

_ROWS = {
    "bfloat16": (_INVARIANT_8, *_INVARIANT, *_FEW_BFLOAT16, *_BETWEEN_BFLOAT16, *_MANY),
    "float16": (*_INVARIANT, *_FEW_FLOAT16, *_BETWEEN_FLOAT16, *_MANY),
}
"""The tables of plain weights, by the dtype of x."""


def _rules(x_dtype: str, epilogue: str = "plain") -> tuple[Rule, ...]:
    return tuple(
        Rule(row.when, _named(row.config, x_dtype, epilogue), row.split_k, row.reason)
        for row in _ROWS[x_dtype]
    )


def _mean(most: float, more: When | None = None) -> When:
    """At most so many rows for each group, and `more`."""
    return lambda p, sms: p.m <= most * p.groups and (more is None or more(p, sms))


def _invariant_mean(most: float, more: When | None = None) -> When:
    mean = _mean(most, more)
    return lambda p, sms: p.batch_invariant and mean(p, sms)


def _grouped_rules(x_dtype: str, epilogue: str) -> tuple[Rule, ...]:
    """By the mean of the groups' rows: what is known without their sizes.

    Where rows are assigned at random, a tile of twice the mean holds nearly all groups, each of
    which then reads its weight once.
    """

    def rule(when: When, name: str, split: Split, reason: str) -> Rule:
        return Rule(when, _named(name, x_dtype, epilogue, True), split, reason)

    tiles: tuple[tuple[str, float], ...]
    if x_dtype == "float16":
        tiles = (("small_m_16x64", 10.0), ("small_m_64x128", 64.0))
    else:
        tiles = (
            ("small_m_8x64", 4.0),
            ("small_m_16x64", 10.0),
            ("small_m_32x128", 22.0),
            ("small_m_64x128", 64.0),
        )
    wide = x_dtype == "bfloat16"
    rules = [rule(_invariant_mean(mean), name, _invariant_split, _ORDER) for name, mean in tiles]
    if wide:
        when = _invariant(None, _wide_wins)
        rules.append(rule(when, "tile_128x256", _invariant_split, _ORDER))
    rules.append(rule(_invariant(None), "tile_128x128", _invariant_split, _ORDER))
    for name, mean in tiles:
        if name in ("small_m_8x64", "small_m_16x64") and wide:
            few = name.replace("small_m", "intra_split_k")
            rows = 8 if few.endswith("8x64") else 16
            rules += [
                rule(
                    _mean(mean, _many(3)),
                    name,
                    _whole_k,
                    "more tiles than CTAs: those that go on to the next tile load it as they store",
                ),
                rule(
                    _mean(mean),
                    few,
                    _split_to_fill(rows, 64, 2),
                    "few tiles: eight warps for 64 rows of the weight keep up with memory",
                ),
            ]
        else:
            rules.append(
                rule(_mean(mean), name, _whole_k, "nearly all groups are one tile, twice the mean")
            )
    if wide:
        reason = "fewest bytes from the L2 cache for a product"
        rules.append(rule(_wide_wins, "tile_128x256", _whole_k, reason))
    reason = "fewer waves, or a wave that is fuller, than with 128x256"
    rules.append(rule(_rows(None), "tile_128x128", _whole_k, reason))
    return tuple(rules)


RULES: tuple[Rule, ...] = (
    *(r for x_dtype in _SHORT for r in _rules(x_dtype)),
    # A gated weight is as long as a plain one of as many rows, and stores half as much.
    *_rules("bfloat16", "gated"),
    *_grouped_rules("bfloat16", "plain"),
    *_grouped_rules("bfloat16", "gated"),
    *_grouped_rules("float16", "plain"),
)
"""First match of a problem's x_dtype wins; each row says why."""


def scratch_bytes(config: GemmConfig, problem: GemmProblem, split_k: int, num_sms: int) -> int:
    """No kernel of this architecture needs scratch memory."""
    return 0
