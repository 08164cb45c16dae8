# SPDX-License-Identifier: Apache-2.0
"""Every Hopper GEMM on the PTX machine, against float64.

The host code of the compiled object encodes the tensor map and picks the launch; the PTX machine
runs it. The output starts poisoned and has a guard behind it.
"""

import functools
import itertools

import ml_dtypes
import numpy as np
import oracle
import pytest
from gates import ACTIVATIONS
from ptx_machine.host import record_launches, run_object
from ptx_machine.memory import GlobalMemory
from sweep import sample

import kernel_objects
from jax_nvfp4.config import GemmProblem, configs
from jax_nvfp4.config.gemm.select import select
from jax_nvfp4.config.gemm.sm90 import RULES, scratch_bytes
from jax_nvfp4.layout.orders import order

ORDER = order("sm_90a")
CONFIGS = configs("sm_90a")
NAMES = [c.name for c in CONFIGS]
GROUPED = [c for c in CONFIGS if c.grouped]
INVARIANT = [c for c in GROUPED if c.k_groups == 1]
GATED = [c for c in CONFIGS if c.epilogue == "gated" and not c.grouped]
PLAIN = [c for c in CONFIGS if c.epilogue == "plain" and not c.grouped]
OUT = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
UNIT = (2.0**-23, 2.0**-7, 2.0**-10)
X_DTYPE = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
GUARD = 64


@functools.cache
def ptx_of(name):
    return (kernel_objects.folder() / f"{name}.ptx").read_text()


def dequantized(data, scale_bits):
    """e2m1 * block_scale, float64 (..., n, k)."""
    return oracle.block_values(oracle.unpack(data), scale_bits)


def groups_of(sizes, m):
    """The rows of each group: (begin, end), sums cut at m, negative sizes none."""
    ends = np.minimum(np.cumsum(np.maximum(sizes, 0)), m)
    return list(zip([0, *ends[:-1]], ends, strict=True))


class Case:
    """A problem, its arguments and its float64 result."""

    def __init__(
        self, config, m, n, k, *, out=0, bias=None, per_row=True, x_scale=True, seed=0,
        sizes=None, weights=None, offset=0,
    ):  # fmt: skip
        rng = np.random.default_rng(seed)
        self.gated = config.epilogue == "gated"
        n += n % 2 if self.gated else 0
        self.config, self.m, self.n, self.out, self.bias_dtype = config, m, n, out, bias
        self.columns = n // 2 if self.gated else n
        self.k = -(-k // 64) * 64
        if config.grouped and sizes is None:  # as if there were no groups
            sizes = [m]
        self.sizes = None if sizes is None else np.array(sizes, np.int32)
        self.offset = np.array([offset], np.int32)
        self.groups = weights or (1 if sizes is None else len(sizes))
        self.activation = ACTIVATIONS[seed % len(ACTIVATIONS)]
        self.data = rng.integers(0, 256, (self.groups, n, self.k // 2), np.uint8)
        self.scale_bits = rng.integers(0x20, 0x50, (self.groups, n, self.k // 16), np.uint8)
        self.x = np.zeros((m, self.k), X_DTYPE[config.x_dtype])
        self.x[:, :k] = rng.standard_normal((m, k))
        rows, columns = (m, n) if per_row else (1, 1)
        self.stride = int(per_row)
        self.x_scale = rng.uniform(0.5, 2, rows).astype(np.float32) if x_scale else None
        self.w_scale = rng.uniform(0.001, 0.01, (self.groups, columns)).astype(np.float32)
        if self.gated and per_row:  # a gate and an up have scales of their own
            self.w_scale[:, : n // 2] *= 10
        self.bias = (
            None if bias is None else rng.standard_normal((self.groups, n)).astype(OUT[bias])
        )
        count = m * self.columns
        self.y = np.frombuffer(b"\xcd" * (count + GUARD) * OUT[out].itemsize, OUT[out]).copy()

    def arguments(self, split, sms=132):
        parts = [
            ORDER.pack(d, s.view(ml_dtypes.float8_e4m3fn), gated=self.gated)
            for d, s in zip(self.data, self.scale_bits, strict=True)
        ]
        self.packed, self.scales = (np.stack(p) for p in zip(*parts, strict=True))
        w_scale = self.w_scale
        if self.gated and self.stride:
            w_scale = ORDER.gated.interleave(w_scale, -1)
        x_stride = -1 if self.x_scale is None else self.stride
        bias_dtype = -1 if self.bias is None else self.bias_dtype
        size_count = 0 if self.sizes is None else len(self.sizes)
        # fmt: off
        return [self.x, None, self.packed, self.scales, self.x_scale, w_scale, self.bias,
                self.y, None, self.sizes, self.offset, self.m, self.n, self.k, x_stride,
                self.stride, bias_dtype, self.out, split, sms, size_count, self.groups,
                w_scale.shape[1], *self.activation]
        # fmt: on

    def run(self, split=1, seed=0, sms=132):
        name = self.config.name
        # What may not be touched before the kernel before has ended, if the launch is programmatic.
        previous = [self.y] if self.x_scale is None else [self.x, self.x_scale, self.y]
        if self.sizes is not None:
            previous += [self.sizes, self.offset]
        run_object(
            kernel_objects.folder() / f"{name}.o",
            ptx_of(name),
            self.arguments(split, sms),
            uninitialized=[self.y],
            previous=[a for a in previous if a.size],
            schedule_seed=seed,
        )
        return self.result()

    def result(self):
        count = self.m * self.columns
        assert self.y[count:].tobytes() == b"\xcd" * GUARD * self.y.itemsize
        return self.y[:count].reshape(self.m, self.columns)

    def products(self, group, rows):
        """The products of some rows and a group's weight, and sum |x||w|, scaled; with the bias."""
        x, w = self.x[rows].astype(np.float64), dequantized(self.data, self.scale_bits)[group]
        alpha = np.broadcast_to(self.w_scale[group].astype(np.float64), (len(x), self.n))
        if self.x_scale is not None:
            scale = self.x_scale[rows] if self.stride else self.x_scale
            alpha = alpha * scale.astype(np.float64)[:, None]
        bias = 0 if self.bias is None else self.bias[group].astype(np.float64)
        return alpha * (x @ w.T) + bias, alpha * (np.abs(x) @ np.abs(w).T)

    def exact(self, group, rows):
        """The outputs of some rows in float64, and how far float32 steps may be from them."""
        z, size = self.products(group, rows)
        error = 2.0**-18 * size
        if not self.gated:
            return z, error
        limit, alpha, cubic, beta = self.activation
        gate, up = z[:, : self.columns], z[:, self.columns :]
        # The sums, and one rounding more.
        error = error + 2.0**-23 * np.abs(z)
        gate_error, up_error = error[:, : self.columns], error[:, self.columns :]
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        share = 1 / (1 + np.exp(-gate * (alpha + cubic * gate**2)))
        # The slope of gate * share is at most 1.13. The exponential and the reciprocal are good to
        # 2^-22, the exponent to 2^-22 of itself, and e^-z / (1 + e^-z) * z is below 0.3.
        reach = np.abs(up) + abs(beta)
        error = 1.13 * gate_error * reach + np.abs(gate) * up_error
        return gate * share * (up + beta), error + 2.0**-21 * np.abs(gate) * reach

    def check(self, y):
        """`|y - y64| <= ulp / 2 + 2^-18 * sum |x||w|`, elementwise; rows in no group are zero."""
        if self.sizes is None:
            return self.check_rows(y, 0, slice(0, self.m))
        used = np.zeros(self.m, bool)
        for number, (begin, end) in enumerate(groups_of(self.sizes, self.m)):
            group = number - self.offset[0]
            if 0 <= group < self.groups and begin < end:
                self.check_rows(y, group, slice(begin, end))
                used[begin:end] = True
        assert not y[~used].view(np.uint8).any()

    def check_rows(self, y, group, rows):
        exact, error = self.exact(group, rows)
        # Half a unit in the last place is at most half of UNIT times the value's power of two.
        bound = np.exp2(np.floor(np.log2(np.maximum(np.abs(exact), 1e-30)))) * UNIT[self.out] / 2
        difference = np.abs(y[rows].astype(np.float64) - exact)
        assert (difference <= bound + error).all(), (difference - bound - error).max()


def name_of(config):
    return config.name


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


@pytest.mark.parametrize("config", PLAIN, ids=name_of)
def test_matches_float64(config):
    for seed, (case, split) in sample(list(enumerate(some_cases(config))), 2, PLAIN.index(config)):
        case.check(case.run(split, seed))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("config", PLAIN, ids=name_of)
@pytest.mark.parametrize("out", [1, 2])
def test_a_bias_that_outweighs_the_product_is_rounded_once(config, out):
    """A bias on a tie of the output's dtype: the product, however small, decides which way."""
    for split in {1, config.split_k}:
        case = Case(config, 5, 136, 512, out=out, bias=0)
        rng = np.random.default_rng(out)
        case.x_scale *= np.logspace(-10, -3, 5, dtype=np.float32)
        case.bias[0] = 1 + UNIT[out] * (rng.integers(0, 100, 136) + 0.5)
        case.check(case.run(split))


@pytest.mark.parametrize("config", PLAIN, ids=name_of)
def test_bad_blocks_stay_in_their_columns(config):
    """A NaN scale makes its row of the weight NaN; zero and negative scales are exact."""
    case = Case(config, 3, 70, 128, seed=9)
    bits = case.scale_bits[0]
    bits[:, 1] = 0
    bits[5, 2] = 0xB8
    bits[[7, 64], 3] = 0x7F
    y = case.run()
    assert np.isnan(y[:, [7, 64]]).all()
    good = np.delete(np.arange(70), [7, 64])
    bits[[7, 64], 3] = 0
    clean = Case(config, 3, 70, 128, seed=9)
    clean.data, clean.scale_bits = case.data, case.scale_bits
    np.testing.assert_array_equal(y[:, good], clean.run()[:, good])
    clean.check(clean.result())


PERSISTENT = [c for c in PLAIN if c.k_groups == 1 and c.tile_m <= 64]


@pytest.mark.parametrize("config", PERSISTENT, ids=name_of)
def test_persistent_ctas_work_through_all_tiles(config):
    """More tiles than CTAs: the ring goes on from tile to tile."""
    case = Case(config, config.tile_m + 2, 260, 320, out=1, bias=0)
    arguments = case.arguments(1, sms=1)
    path = kernel_objects.folder() / f"{config.name}.o"
    launch = record_launches(path, ptx_of(config.name), arguments, GlobalMemory())
    assert launch[0].grid == (config.ctas_per_sm, 1, 1)
    run_object(path, ptx_of(config.name), arguments, uninitialized=[case.y])
    y = case.result()
    case.check(y)
    # With multiprocessors for all tiles, where more stages may be in use, the bits are the same.
    other = Case(config, config.tile_m + 2, 260, 320, out=1, bias=0)
    np.testing.assert_array_equal(y, other.run())


@pytest.mark.parametrize(("m", "n"), [(0, 16), (16, 0), (0, 0)])
def test_empty_outputs_launch_nothing(m, n):
    path = kernel_objects.folder() / f"{NAMES[0]}.o"
    arguments = Case(PLAIN[0], 1, 1, 1).arguments(1)
    arguments[11:13] = m, n
    assert record_launches(path, ptx_of(NAMES[0]), arguments, GlobalMemory()) == []


@pytest.mark.parametrize("config", PLAIN[::4], ids=name_of)
def test_no_columns_give_the_bias(config):
    case = Case(config, 3, 40, 0, bias=0)
    arguments = case.arguments(1)
    arguments[0], arguments[2], arguments[3] = (np.zeros(1024, np.uint8) for _ in range(3))
    path = kernel_objects.folder() / f"{config.name}.o"
    run_object(path, ptx_of(config.name), arguments, uninitialized=[case.y])
    np.testing.assert_array_equal(case.result(), np.broadcast_to(case.bias[0], (3, 40)))


@pytest.mark.parametrize("config", GATED, ids=name_of)
def test_gated_epilogue_matches_float64(config):
    """Each activation, halves that are no whole tile, and values beyond the limit."""
    tile, splits = config.tile_m, config.split_k
    cases = [
        (Case(config, tile + 1, 2 * 67, 190, out=1, bias=0, seed=1), 1),
        (Case(config, 3, 2 * (config.tile_n // 2 + 68), 320, out=2, x_scale=False, seed=2), splits),
        (Case(config, 2, 2 * 20, 640, out=0, bias=1, per_row=False, seed=3), splits),
        (Case(config, 5, 2 * 32, 512, out=1, bias=2, seed=4), 1),
    ]
    cases[0][0].w_scale *= 50
    for seed, (case, split) in enumerate(cases if config is GATED[0] else cases[::2]):
        case.check(case.run(split, seed))
    gate = cases[0][0].products(0, slice(None))[0][:, :67]
    assert (gate > 7).any() and (gate < 7).any()


@pytest.mark.parametrize("config", [GATED[0], GATED[-1]], ids=name_of)
def test_nan_passes_through_the_clamps(config):
    """A NaN in a row of x, and in a gate's or an up's scales; zeros and infinities besides."""
    case = Case(config, 4, 2 * 24, 128, out=1, seed=1)
    case.x[1, 5] = np.nan
    case.scale_bits[0, [3, 24 + 7], 2] = 0x7F
    case.x[2] = 0
    case.x[3, 0] = np.inf
    y = case.run().astype(np.float64)
    assert np.isnan(y[1]).all() and np.isnan(y[:, [3, 7]]).all()
    good = np.delete(np.arange(24), [3, 7])
    assert (y[2, good] == 0).all()
    limit, alpha, _, beta = case.activation
    w = np.delete(dequantized(case.data, case.scale_bits)[0][:, 0].reshape(2, 24), [3, 7], axis=1)
    saturated = (w[0] > 0) & (w[1] != 0)
    expected = limit / (1 + np.exp(-alpha * limit)) * (np.sign(w[1]) * limit + beta)
    np.testing.assert_allclose(y[3, good][saturated], expected[saturated], rtol=2.0**-8)


def group_cases(config):
    """Groups of all kinds: empty, of a part of a tile, of more than one; rows in none."""
    tile, splits = config.tile_m, config.split_k
    sizes = [0, 3, 0, tile + 1, -5, 2]
    yield Case(config, tile + 10, 2 * 65, 190, out=1, bias=0, sizes=sizes, seed=1), 1
    # A sum beyond m; the weights of groups 1 and 2 of 5.
    yield Case(config, 9, 2 * 32, 320, out=2, sizes=[4, 1, 2, 9, 3], weights=2, offset=1), splits
    # Nothing is theirs; one scale for a whole weight.
    yield Case(config, 5, 40, 64, sizes=[2, 3], weights=1, offset=2, bias=2, per_row=False), splits
    # More groups than a warp looks at together, the last with rows too.
    many = np.zeros(300, np.int32)
    many[[0, 127, 128, 250, 299]] = 1, 2, 3, 1, 2
    yield Case(config, 11, 64, 64, out=1, sizes=many, x_scale=False, seed=2), 1


@pytest.mark.parametrize("config", GROUPED, ids=name_of)
def test_groups_match_float64(config):
    # All cases for one config of each way to schedule.
    everything = config in (GROUPED[0], INVARIANT[0])
    runs = list(enumerate(itertools.islice(group_cases(config), 4 if everything else 2)))
    for seed, (case, split) in runs if everything else sample(runs, 2, GROUPED.index(config)):
        case.check(case.run(split, seed))


@pytest.mark.parametrize("config", [GROUPED[0], INVARIANT[0], INVARIANT[-1]], ids=name_of)
def test_what_no_group_uses_is_not_looked_at(config):
    """NaN in unused weights, scales, biases and rows, and in other groups' rows, goes nowhere."""
    sizes = [0, 2, 0, 3, 0]
    clean = Case(config, 8, 2 * 36, 192, out=1, bias=0, sizes=sizes, seed=3)
    expected = clean.run()
    case = Case(config, 8, 2 * 36, 192, out=1, bias=0, sizes=sizes, seed=3)
    for unused in (0, 2, 4):
        case.scale_bits[unused], case.w_scale[unused], case.bias[unused] = 0x7F, np.nan, np.nan
    case.x[5:], case.x_scale[5:] = np.nan, np.nan
    case.x[1] = np.nan
    y = case.run(config.split_k) if config.k_groups > 1 else case.run()
    case.sizes[:] = 0
    assert np.isnan(y[1].astype(np.float32)).all()
    if config.k_groups == 1:
        np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(expected, 1, 0))
    assert not y[5:].view(np.uint8).any()
    assert not case.run().view(np.uint8).any()


@pytest.mark.parametrize("config", INVARIANT[::4], ids=name_of)
def test_a_group_has_the_bits_of_a_product_by_itself(config):
    """Each group's rows as the kernel for ungrouped rows computes them, however K is split."""
    alone = next(c for c in CONFIGS if c.name == config.name.replace("grouped_", ""))
    sizes = [config.tile_m + 2, 0, 5]
    for split in (1, config.split_k):
        whole = Case(config, sum(sizes), 2 * 36, 1088, out=1, bias=0, sizes=sizes, seed=split)
        y = whole.run(split)
        for group, (begin, end) in enumerate(groups_of(sizes, whole.m)):
            if begin == end:
                continue
            one = Case(alone, end - begin, 2 * 36, 1088, out=1, bias=0, seed=split)
            one.x, one.x_scale = whole.x[begin:end], whole.x_scale[begin:end]
            for name in ("data", "scale_bits", "w_scale", "bias"):
                setattr(one, name, getattr(whole, name)[[group]])
            np.testing.assert_array_equal(one.run(split), y[begin:end])


@pytest.mark.parametrize("config", INVARIANT[:1], ids=name_of)
def test_few_ctas_work_through_all_groups(config):
    sizes = [2, config.tile_m + 1, 0, 1, *[0] * 130, 3]
    case = Case(config, config.tile_m + 9, 2 * 68, 320, out=1, sizes=sizes)
    y = case.run(sms=1)
    case.check(y)
    other = Case(config, config.tile_m + 9, 2 * 68, 320, out=1, sizes=sizes)
    np.testing.assert_array_equal(y, other.run())


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
