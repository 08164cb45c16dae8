# SPDX-License-Identifier: Apache-2.0
"""GEMM configs of Hopper (sm_90a) and the table that chooses among them.

Kinds: "small_m" and "tile" CTAs work through tiles, one after the other, and store each from
registers; "intra_split_k" CTAs have one tile, and groups of their warpgroups divide its columns.

Figures in the reasons were measured on an H100 (132 multiprocessors) with weights that were not in
the L2 cache.
"""

from collections.abc import Callable

from jax_nvfp4.config.gemm.types import GemmConfig, GemmProblem, Rule

When = Callable[[GemmProblem, int], bool]
Split = Callable[[GemmProblem, int], int]

TILE_K = 128
_SHORT = {"bfloat16": "bf16", "float16": "f16"}


def _config(
    kind: str, x_dtype: str, tile_m: int, tile_n: int, stages: int, **rest: int
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

CONFIGS: tuple[GemmConfig, ...] = (
    *_intra_split_k("bfloat16"),
    *_whole("bfloat16", (8, 16)),
    *_BETWEEN,
    _intra_split_k("float16")[1],
    *_whole("float16", (16,)),
)


def _named(kind_and_tile: str, x_dtype: str) -> GemmConfig:
    kind, _, tile = kind_and_tile.rpartition("_")
    name = f"gemm_sm90a_{kind}_{_SHORT[x_dtype]}_{tile}"
    return next(c for c in CONFIGS if c.name == name)


def _tiles(problem: GemmProblem, tile_m: int, tile_n: int) -> int:
    """Tiles of a problem; weights are padded to 128 rows."""
    rows = -(-problem.n // 128) * 128
    return -(-problem.m // tile_m) * -(-rows // tile_n)


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
    narrow = -(-_tiles(problem, 128, 128) // num_sms)
    wide = -(-_tiles(problem, 128, 256) // num_sms)
    return 1.8 * wide < narrow


def _many(waves: int) -> When:
    """Whether tiles of 64 rows are more than so many for each multiprocessor, or many and short."""

    def many(problem: GemmProblem, num_sms: int) -> bool:
        tiles = -(-problem.n // 128) * 2
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


def _rules(x_dtype: str) -> tuple[Rule, ...]:
    def rule(when: When, name: str, split: Split, reason: str) -> Rule:
        return Rule(when, _named(name, x_dtype), split, reason)

    rules = [
        rule(_invariant(16), "small_m_16x64", _invariant_split, _ORDER),
        rule(_invariant(32), "small_m_32x128", _invariant_split, _ORDER),
        rule(_invariant(64), "small_m_64x128", _invariant_split, _ORDER),
        rule(_invariant(None, _wide_wins), "tile_128x256", _invariant_split, _ORDER),
        rule(_invariant(None), "tile_128x128", _invariant_split, _ORDER),
    ]
    if x_dtype == "bfloat16":
        rules.insert(0, rule(_invariant(8), "small_m_8x64", _invariant_split, _ORDER))
        rules += [
            rule(
                _rows(8, _many(3)),
                "small_m_8x64",
                _whole_k,
                "many or short tiles: CTAs that go on to the next tile load it while they store"
                " (24576x1536: 11.0 us, intra_split_k 13.5; 57344x8192: 92 us, 97; 28672x4096:"
                " 24.8 us, 26.0)",
            ),
            rule(
                _rows(8),
                "intra_split_k_8x64",
                _split_to_fill(8, 64, 2),
                "eight warps for 64 rows keep up with memory on every multiprocessor; clusters of"
                " two fit everywhere, larger ones leave multiprocessors idle",
            ),
            rule(
                _rows(16, _many(3)),
                "small_m_16x64",
                _whole_k,
                "as for 8 rows (28672x4096: 25.1 us, intra_split_k 27.1)",
            ),
            rule(_rows(16), "intra_split_k_16x64", _split_to_fill(16, 64, 2), "as for 8 rows"),
            rule(
                _rows(32, _one_wave(64)),
                "intra_split_k_32x64",
                _split_to_fill(32, 64, 2),
                "sixteen warps hide the decode (8192x8192: 17.1 us, small_m_32x128 19.0)",
            ),
            rule(
                _rows(32),
                "small_m_32x128",
                _whole_k,
                "more tiles than multiprocessors: two CTAs overlap one's stores with the other's"
                " loads (28672x4096: 29.8 us, intra_split_k_32x64 35.2)",
            ),
            rule(
                _rows(128, lambda p, sms: _tiles(p, 64, 64) <= sms),
                "intra_split_k_64x64",
                _split_to_fill(64, 64, 2),
                "the most multiprocessors, and the least to exchange (64 rows: 4096x4096 7.2 us,"
                " intra_split_k_64x128 split in 3 9.0; 6144x4096 9.8, 10.4; 8192x28672 63, 62;"
                " 128 rows: 4096x4096 10.0, 10.7)",
            ),
            rule(
                _rows(64, _one_wave(128)),
                "intra_split_k_64x128",
                _whole_k,
                "sixteen warps hide the decode, on one tile for each multiprocessor",
            ),
            rule(
                _rows(64, _one_wave(192)),
                "tile_64x192",
                _whole_k,
                "one tile for each multiprocessor (24576x1536: 13.4 us, small_m_64x128 14.8)",
            ),
            rule(
                _rows(64),
                "small_m_64x128",
                _whole_k,
                "as for 32 rows (28672x4096: 30.2 us, intra_split_k_64x128 33.2)",
            ),
        ]
    else:
        rules += [
            rule(
                _rows(16, _many(3)), "small_m_16x64", _whole_k, "as bfloat16; decoding costs more"
            ),
            rule(_rows(16), "intra_split_k_16x64", _split_to_fill(16, 64, 2), "as bfloat16"),
            rule(
                _rows(32),
                "small_m_32x128",
                _split_to_fill(32, 128, 2),
                "x is read once for 128 rows of the weight",
            ),
            rule(
                _rows(64),
                "small_m_64x128",
                _split_to_fill(64, 128, 2),
                "x is read once for 128 rows of the weight",
            ),
        ]
    if x_dtype == "float16":
        rules.append(
            rule(
                _rows(128, lambda p, sms: 2 * _tiles(p, 64, 128) <= sms),
                "small_m_64x128",
                _split_to_fill(64, 128, 2),
                "two tiles of 64 rows fill more multiprocessors than one of 128"
                " (4096x4096: 11.5 us, 14.7)",
            )
        )
    else:
        rules += [
            rule(
                _rows(128, lambda p, sms: 2 * _tiles(p, 64, 192) <= sms),
                "tile_64x192",
                _split_to_fill(64, 192, 2),
                "the same where tiles of 128 would be too many (6144x4096: 14.2 us, 128x128 15.0)",
            ),
            rule(
                lambda p, sms: 2 * _tiles(p, 128, 192) <= sms < 2 * _tiles(p, 128, 128),
                "tile_128x192",
                _split_to_fill(128, 192, 2),
                "K split over two CTAs fills the multiprocessors (6144x4096, 256 rows: 22.0 us,"
                " 128x128 23.4)",
            ),
            rule(
                lambda p, sms: _tiles(p, 128, 192) <= sms < _tiles(p, 128, 128),
                "tile_128x192",
                _whole_k,
                "one tile for each multiprocessor (24576x1536, 128 rows: 18.5 us, 128x256 20.0)",
            ),
        ]
    rules += [
        rule(
            _wide_wins,
            "tile_128x256",
            _whole_k,
            "fewest bytes from the L2 cache for a product (28672x4096, 2048 rows: 602 us,"
            " 128x128 700)",
        ),
        rule(
            _rows(None),
            "tile_128x128",
            _split_to_fill(128, 128, 3),
            "fewer waves, or a wave that is fuller, than with 128x256",
        ),
    ]
    return tuple(rules)


RULES: tuple[Rule, ...] = tuple(r for x_dtype in _SHORT for r in _rules(x_dtype))
"""First match of a problem's x_dtype wins; each row says why."""


def scratch_bytes(config: GemmConfig, problem: GemmProblem, split_k: int, num_sms: int) -> int:
    """No kernel of this architecture needs scratch memory."""
    return 0
