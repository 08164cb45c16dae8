# SPDX-License-Identifier: Apache-2.0
"""Every Hopper GEMM on the PTX machine, against float64.

The host code of the compiled object encodes the tensor map and picks the launch; the PTX machine
runs it. The output starts poisoned and has a guard behind it.
"""

import functools
import itertools

import ml_dtypes
import numpy as np
import pytest
from ptx_machine.host import record_launches, run_object
from ptx_machine.memory import GlobalMemory

import kernel_objects
from jax_nvfp4.config import GemmProblem, configs
from jax_nvfp4.config.gemm.select import select
from jax_nvfp4.config.gemm.sm90 import RULES, scratch_bytes
from jax_nvfp4.layout import sm90

CONFIGS = configs("sm_90a")
NAMES = [c.name for c in CONFIGS]
OUT = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
UNIT = (2.0**-23, 2.0**-7, 2.0**-10)
X_DTYPE = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
MAGNITUDE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
GUARD = 64


@functools.cache
def ptx_of(name):
    return (kernel_objects.folder() / f"{name}.ptx").read_text()


def dequantized(data, scale_bits):
    """e2m1 * block_scale, float64 (n, k)."""
    codes = np.stack([data & 15, data >> 4], axis=-1).reshape(data.shape[0], -1)
    values = np.where(codes & 8, -1.0, 1.0) * MAGNITUDE[codes & 7]
    return values * np.repeat(scale_bits.view(ml_dtypes.float8_e4m3fn).astype(np.float64), 16, 1)


class Case:
    """A problem, its arguments and its float64 result."""

    def __init__(self, config, m, n, k, *, out=0, bias=None, per_row=True, x_scale=True, seed=0):
        rng = np.random.default_rng(seed)
        self.config, self.m, self.n, self.out, self.bias_dtype = config, m, n, out, bias
        self.k = -(-k // 64) * 64
        self.data = rng.integers(0, 256, (n, self.k // 2), np.uint8)
        self.scale_bits = rng.integers(0x20, 0x50, (n, self.k // 16), np.uint8)
        self.x = np.zeros((m, self.k), X_DTYPE[config.x_dtype])
        self.x[:, :k] = rng.standard_normal((m, k))
        rows, columns = (m, n) if per_row else (1, 1)
        self.stride = int(per_row)
        self.x_scale = rng.uniform(0.5, 2, rows).astype(np.float32) if x_scale else None
        self.w_scale = rng.uniform(0.001, 0.01, columns).astype(np.float32)
        self.bias = None if bias is None else rng.standard_normal(n).astype(OUT[bias])
        self.y = np.frombuffer(b"\xcd" * (m * n + GUARD) * OUT[out].itemsize, OUT[out]).copy()

    def arguments(self, split):
        self.packed, self.scales = sm90.pack(self.data, self.scale_bits)
        x_stride = -1 if self.x_scale is None else self.stride
        bias_dtype = -1 if self.bias is None else self.bias_dtype
        # fmt: off
        return [self.x, None, self.packed, self.scales, self.x_scale, self.w_scale, self.bias,
                self.y, None, self.m, self.n, self.k, x_stride, self.stride, bias_dtype,
                self.out, split, 132]
        # fmt: on

    def run(self, split=1, seed=0):
        name = self.config.name
        # What may not be touched before the kernel before has ended, if the launch is programmatic.
        previous = [self.y] if self.x_scale is None else [self.x, self.x_scale, self.y]
        run_object(
            kernel_objects.folder() / f"{name}.o",
            ptx_of(name),
            self.arguments(split),
            uninitialized=[self.y],
            previous=[a for a in previous if a.size],
            schedule_seed=seed,
        )
        assert self.y[self.m * self.n :].tobytes() == b"\xcd" * GUARD * self.y.itemsize
        return self.y[: self.m * self.n].reshape(self.m, self.n)

    def check(self, y):
        """`|y - y64| <= ulp / 2 + 2^-18 * sum |x||w|`, elementwise."""
        x, w = self.x.astype(np.float64), dequantized(self.data, self.scale_bits)
        alpha = np.broadcast_to(self.w_scale.astype(np.float64), (self.m, self.n))
        if self.x_scale is not None:
            alpha = alpha * self.x_scale.astype(np.float64)[:, None]
        exact, size = alpha * (x @ w.T), alpha * (np.abs(x) @ np.abs(w).T)
        if self.bias is not None:
            exact = exact + self.bias.astype(np.float64)
        # Half a unit in the last place is at most half of UNIT times the value's power of two.
        bound = np.exp2(np.floor(np.log2(np.maximum(np.abs(exact), 1e-30)))) * UNIT[self.out] / 2
        error = np.abs(y.astype(np.float64) - exact)
        assert (error <= bound + 2.0**-18 * size).all(), error.max()


def some_cases(config):
    """Ragged and whole shapes, for each way to split, cycling through the other arguments."""
    tile = config.tile_m
    shapes = [
        (1, 1, 1),
        (tile + 1, 130, 190),
        (3, 2 * config.tile_n + 44, 500),
        (min(tile, 20), 136, 1100),
        (2 * tile + 3 if tile <= 64 else 5, 256, 256),
    ]
    splits = itertools.cycle(range(1, config.split_k + 1))
    for i, (m, n, k) in enumerate(shapes):
        options = {
            "out": i % 3,
            "bias": (None, 0, 1, 2)[(i + tile) % 4],
            "per_row": i % 2 == 0,
            "x_scale": i != 3,
            "seed": i,
        }
        yield Case(config, m, n, k, **options), next(splits)
    # Two laps of the ring, and a part of K without columns. Each way to split is a kernel.
    for split in range(1, config.split_k + 1):
        k = 2 * split * config.stages * config.tile_k
        yield Case(config, 2, 64, k, out=1, x_scale=False), split
        yield Case(config, 3, 40, 64, out=2), split
        # Each group and each CTA stores some of a tile's rows.
        yield Case(config, tile, 40, 640, out=split % 3, bias=0), split


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_launches(config):
    """Programmatic behind the quantize kernel alone; few CTAs get a multiprocessor each."""
    path = kernel_objects.folder() / f"{config.name}.o"
    for x_scale in (True, False):
        for n in (config.tile_n, 132 * config.tile_n + 1):
            case = Case(config, 1, n, 64, x_scale=x_scale)
            memory = GlobalMemory()
            (one,) = record_launches(path, ptx_of(config.name), case.arguments(1), memory)
            assert one.overlaps == x_scale
            alone = 2 * (one.dynamic_smem + 1024) > 228 * 1024
            assert alone == (config.ctas_per_sm == 1 or n == config.tile_n)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_matches_float64(config):
    for seed, (case, split) in enumerate(some_cases(config)):
        case.check(case.run(split, seed))


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
@pytest.mark.parametrize("out", [1, 2])
def test_a_bias_that_outweighs_the_product_is_rounded_once(config, out):
    """A bias on a tie of the output's dtype: the product, however small, decides which way."""
    for split in {1, config.split_k}:
        case = Case(config, 5, 136, 512, out=out, bias=0)
        rng = np.random.default_rng(out)
        case.x_scale *= np.logspace(-10, -3, 5, dtype=np.float32)
        case.bias[:] = 1 + UNIT[out] * (rng.integers(0, 100, 136) + 0.5)
        case.check(case.run(split))


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_bad_blocks_stay_in_their_columns(config):
    """A NaN scale makes its row of the weight NaN; zero and negative scales are exact."""
    case = Case(config, 3, 70, 128, seed=9)
    case.scale_bits[:, 1] = 0
    case.scale_bits[5, 2] = 0xB8
    case.scale_bits[[7, 64], 3] = 0x7F
    y = case.run()
    assert np.isnan(y[:, [7, 64]]).all()
    good = np.delete(np.arange(70), [7, 64])
    case.scale_bits[[7, 64], 3] = 0
    clean = Case(config, 3, 70, 128, seed=9)
    clean.data, clean.scale_bits = case.data, case.scale_bits
    np.testing.assert_array_equal(y[:, good], clean.run()[:, good])
    clean.check(clean.y[: 3 * 70].reshape(3, 70))


PERSISTENT = [c for c in CONFIGS if c.k_groups == 1 and c.tile_m <= 64]


@pytest.mark.parametrize("config", PERSISTENT, ids=[c.name for c in PERSISTENT])
def test_persistent_ctas_work_through_all_tiles(config):
    """More tiles than CTAs: the ring goes on from tile to tile."""
    case = Case(config, config.tile_m + 2, 260, 320, out=1, bias=0)
    arguments = case.arguments(1)
    arguments[-1] = 1  # one multiprocessor
    path = kernel_objects.folder() / f"{config.name}.o"
    launch = record_launches(path, ptx_of(config.name), arguments, GlobalMemory())
    assert launch[0].grid == (config.ctas_per_sm, 1, 1)
    run_object(path, ptx_of(config.name), arguments, uninitialized=[case.y])
    y = case.y[: case.m * case.n].reshape(case.m, case.n)
    case.check(y)
    # With multiprocessors for all tiles, where more stages may be in use, the bits are the same.
    other = Case(config, config.tile_m + 2, 260, 320, out=1, bias=0)
    np.testing.assert_array_equal(y, other.run())


@pytest.mark.parametrize(("m", "n"), [(0, 16), (16, 0), (0, 0)])
def test_empty_outputs_launch_nothing(m, n):
    path = kernel_objects.folder() / f"{NAMES[0]}.o"
    one = np.zeros(256, np.uint8)
    arguments = [one, None, one, one, None, one, None, one, None, m, n, 64, -1, 0, -1, 0, 1, 132]
    assert record_launches(path, ptx_of(NAMES[0]), arguments, GlobalMemory()) == []


@pytest.mark.parametrize("config", CONFIGS[::4], ids=NAMES[::4])
def test_no_columns_give_the_bias(config):
    case = Case(config, 3, 40, 0, bias=0)
    arguments = case.arguments(1)
    arguments[0], arguments[2], arguments[3] = (np.zeros(1024, np.uint8) for _ in range(3))
    path = kernel_objects.folder() / f"{config.name}.o"
    run_object(path, ptx_of(config.name), arguments, uninitialized=[case.y])
    y = case.y[: 3 * 40].reshape(3, 40)
    np.testing.assert_array_equal(y, np.broadcast_to(case.bias, (3, 40)))


SHAPES = [
    (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (57344, 8192),
    (8192, 28672), (7168, 16384), (24576, 1536), (4096, 7168), (1, 1), (127, 63), (100_000, 16),
]  # fmt: skip


@pytest.mark.parametrize("x_dtype", X_DTYPE)
@pytest.mark.parametrize("invariant", [False, True])
def test_table_takes_every_problem(x_dtype, invariant):
    for (n, k), m, sms in itertools.product(SHAPES, (0, 1, 7, 8, 9, 33, 65, 5000), (78, 132)):
        problem = GemmProblem(m, n, k, "sm_90a", x_dtype, invariant)
        config, split = select(problem, sms)
        assert config.x_dtype == x_dtype
        assert 1 <= split <= config.split_k
        assert scratch_bytes(config, problem, split, sms) == 0


@pytest.mark.parametrize("x_dtype", X_DTYPE)
def test_invariant_rows_have_one_order_of_sums(x_dtype):
    """Whatever m: the same split, and no config whose warpgroups divide K."""
    for n, k in SHAPES:
        chosen = [
            select(GemmProblem(m, n, k, "sm_90a", x_dtype, True), sms)
            for m in (1, 8, 9, 16, 17, 64, 65, 300, 9000)
            for sms in (78, 132)
        ]
        assert len({split for _, split in chosen}) == 1
        assert {config.k_groups for config, _ in chosen} == {1}


def test_each_config_is_chosen_and_each_rule_has_a_reason():
    assert {rule.config.name for rule in RULES} == set(NAMES)
    assert all(len(rule.reason) > 10 for rule in RULES)
