# SPDX-License-Identifier: Apache-2.0
"""The Blackwell GEMM kernels with a gated activation in their epilogue, on the PTX machine.

Against float64, from the bytes of a repacked gated weight. All that is padding is poison: rows that
pad a half of the weight have NaN for codes' scales and for global scales.
"""

import dataclasses
import functools
import re

import ml_dtypes
import numpy as np
import oracle
import pytest
from gates import ACTIVATIONS
from gemm_blackwell import NAN_SCALE, NO_GROUPS, label, poisoned, ptx_of
from ptx_machine.host import record_launches, run_object
from ptx_machine.memory import GlobalMemory
from sweep import sample

import kernel_objects
from jax_nvfp4.config import GemmProblem, configs, scratch_bytes, serves
from jax_nvfp4.config.gemm.select import select
from jax_nvfp4.layout import swizzle
from jax_nvfp4.layout.orders import order

ORDER = order("sm_120f")  # of all Blackwell architectures
ARCHES = ("sm_100f", "sm_103a", "sm_120f")
CONFIGS = [c for arch in ARCHES for c in configs(arch) if c.epilogue == "gated"]
WEIGHT_ONLY = [c for c in CONFIGS if c.kind == "weight_only" and c.arch != "sm_120f"]
DISTINCT = [c for c in CONFIGS if c not in WEIGHT_ONLY]  # sm_100f's are sm_120f's
EPILOGUES = [c for c in DISTINCT if c.arch != "sm_103a"]  # its are those of sm_100f
SPLITS = [(c, split) for c in EPILOGUES for split in sorted({1, min(2, c.split_k)})]
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)  # by out_dtype and bias_dtype
F32, BF16, F16 = range(3)
NONE = -1
GUARD = 32


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a gated kernel.

    Attributes:
        m, half, k: rows of x, columns of y, columns of x; k is a multiple of 64.
        split: ways to split K.
        out: output dtype.
        bias: bias dtype, or -1.
        x_stride: 1 for a scale of each row of x, 0 for one, -1 for none.
        w_stride: 1 for a scale of each row of w, 0 for one.
        activation: which of `ACTIVATIONS`.
        sizes: standard deviations of gates and of ups, about; the scales of the weight follow.
        sms: multiprocessors that the host code is told of.
    """

    m: int
    half: int
    k: int
    split: int = 1
    out: int = BF16
    bias: int = NONE
    x_stride: int = 1
    w_stride: int = 1
    activation: int = 0
    sizes: tuple[float, float] = (4.0, 4.0)
    sms: int = 1


def gated(gate, up, limit, alpha, cubic, beta):
    """The activation in float64; NaN passes through the clamps."""
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate / (1 + np.exp(-gate * (alpha + cubic * gate**2))) * (up + beta)


class Call:
    """The arrays of a case, and what y should be."""

    def __init__(self, config, case):
        self.config, self.case = config, case
        m, n, k = case.m, 2 * case.half, case.k
        rng = np.random.default_rng([m, n, k, case.out, case.bias + 1, case.activation])
        self.codes = rng.integers(0, 16, (n, k), np.uint8)
        self.w_bits = rng.integers(0x28, 0x48, (n, k // 16)).astype(np.uint8)
        if config.x_dtype == "e2m1":
            codes = rng.integers(0, 16, (m, k), np.uint8)
            self.x, self.x_bits = oracle.pack(codes), rng.integers(0x28, 0x48, (m, k // 16))
            self.x_bits = self.x_bits.astype(np.uint8)
        else:
            self.x, self.x_bits = rng.standard_normal((m, k)).astype(config.x_dtype), None
        self.x_scale = None
        if case.x_stride >= 0:
            self.x_scale = rng.uniform(0.5, 2, m if case.x_stride else 1).astype(np.float32)
        w_values, x_values = self.values()
        size = np.sqrt(k * (x_values**2).mean() * (w_values**2).mean())
        self.w_scale = np.float32([case.sizes[0] / size])
        if case.w_stride:
            parts = np.repeat(np.float64(case.sizes), case.half)
            self.w_scale = (rng.uniform(0.5, 2, n) * parts / size).astype(np.float32)
        self.bias = None
        if case.bias != NONE:
            self.bias = rng.standard_normal(n).astype(DTYPES[case.bias])

    def values(self):
        """Codes times block scales of the weight and of x, float64."""
        w_values = oracle.block_values(self.codes, self.w_bits)
        if self.x_bits is None:
            return w_values, self.x.astype(np.float64)
        return w_values, oracle.block_values(oracle.unpack(self.x), self.x_bits)

    def packed(self):
        """(codes, block scales, global scales) of the weight, their padding poisoned."""
        n = 2 * self.case.half
        bits = self.w_bits.view(ml_dtypes.float8_e4m3fn)
        w, sfw = ORDER.pack(oracle.pack(self.codes), bits, gated=True)
        padding = ORDER.gated.interleave(np.ones(n, bool), -1) == 0
        w, sfw = np.array(w), np.array(sfw).reshape(-1)
        w[padding] = 0xFF
        spread = np.repeat(padding[:, None], sfw.size // len(padding), 1).astype(np.uint8)
        sfw[swizzle.swizzle(spread).reshape(-1) != 0] = NAN_SCALE
        w_scale = self.w_scale
        if self.case.w_stride:
            w_scale = np.where(padding, np.float32(np.nan), ORDER.gated.interleave(w_scale, -1))
        return w, sfw, w_scale

    def arguments(self):
        """Those of the host function, and y and scratch, which the kernel finds uninitialized."""
        c, config = self.case, self.config
        itemsize = np.dtype(DTYPES[c.out]).itemsize
        y = np.frombuffer(b"\xcd" * (c.m * c.half + GUARD) * itemsize, DTYPES[c.out]).copy()
        problem = GemmProblem(c.m, 2 * c.half, c.k, config.arch, config.x_dtype, epilogue="gated")
        needed = scratch_bytes(config, problem, c.split, c.sms)
        scratch = np.empty(needed, np.uint8) if needed else None
        sfx = None
        if self.x_bits is not None:
            sfx = np.ascontiguousarray(swizzle.swizzle(self.x_bits)).reshape(-1)
            sfx = poisoned(sfx, c.m)
        w, sfw, w_scale = self.packed()
        x_stride = -1 if self.x_scale is None else c.x_stride
        pointers = [self.x, sfx, w, sfw, self.x_scale, w_scale, self.bias, y, scratch, *NO_GROUPS]
        integers = [c.m, 2 * c.half, c.k, x_stride, c.w_stride, c.bias, c.out, c.split, c.sms]
        # The activation of a call is Float32.
        activation = [float(np.float32(v)) for v in ACTIVATIONS[c.activation]]
        return [*pointers, *integers, 0, 0, 0, *activation], y, scratch

    def run(self, seed=0, ptx=None):
        """y; what lies behind it has to stay as it is."""
        c, config = self.case, self.config
        arguments, y, scratch = self.arguments()
        # What the kernel before may have written, where launches overlap.
        previous = [*arguments[:2], self.x_scale, y] if config.kind in ("2cta", "swap") else []
        run_object(
            kernel_objects.folder() / f"{config.name}.o",
            ptx or ptx_of(config.name),
            arguments,
            uninitialized=[a for a in (y, scratch) if a is not None],
            schedule_seed=seed,
            num_sms=c.sms,
            resident_clusters=1,
            previous=[a for a in previous if a is not None and a.size],
        )
        assert y[c.m * c.half :].tobytes() == b"\xcd" * GUARD * y.itemsize
        return y[: c.m * c.half].reshape(c.m, c.half)

    def arms(self):
        """Exact gates and ups, and how far their float32 sums may be from them."""
        w_values, x_values = self.values()
        alpha = np.ones((1, 1)) if self.x_scale is None else self.x_scale.astype(np.float64)
        alpha = alpha.reshape(-1, 1) * self.w_scale.astype(np.float64)
        exact, magnitude = oracle.linear(x_values, w_values)
        z = alpha * exact + (0 if self.bias is None else self.bias.astype(np.float64))
        # The sums, and one rounding more.
        spread = 2.0**-18 * alpha * magnitude + 2.0**-23 * np.abs(z)
        return np.split(z, 2, axis=1), np.split(spread, 2, axis=1)

    def check(self, y):
        """Half a unit in the last place, and what the sums' errors and the activation's make."""
        z, spread = self.arms()
        of = [np.float64(np.float32(v)) for v in ACTIVATIONS[self.case.activation]]
        limit, beta = of[0], of[3]
        # The exponential and the reciprocal are good to 2^-22, the exponent to 2^-22 of itself, and
        # e^-z / (1 + e^-z) * z is below 0.3: 2^-21, of which the helper has twice as much.
        reach = np.minimum(np.abs(z[1]), limit) + abs(beta)
        size = np.where(z[0] > limit, limit, np.abs(z[0])) * reach / 2
        with np.errstate(over="ignore"):
            oracle.assert_activated_close(y, lambda g, u: gated(g, u, *of), z, spread, scale=size)
        return y


def cases(config):
    """Halves that are whole tiles and others, parts whose scales differ 1000-fold, all limits."""
    tm, tn = config.tile_m, config.tile_n * config.cluster_n
    split = config.split_k
    return [
        Case(tm + 1, 67, 192, out=BF16, bias=F32, activation=1, sizes=(8, 8)),
        Case(3, tn // 2 + 68, 320, split=split, out=F16, x_stride=-1, activation=2,
             sizes=(20, 0.02)),
        Case(2, 20, 640, split=split, out=F32, bias=BF16, x_stride=0, w_stride=0, activation=3),
        Case(5, 32, 512, out=BF16, bias=F16, sizes=(0.005, 5)),
        Case(tm, tn // 2, 256, out=F16, bias=F16, activation=1, sizes=(3, 0.003)),
        Case(tm - 1, 1, 64, out=F32, activation=2, sizes=(0.02, 20)),
        Case(2, 3, 128, split=min(2, split), out=F32, bias=F32, activation=0),
    ]  # fmt: skip


@pytest.mark.parametrize("config", DISTINCT, ids=label)
def test_matches_float64(config):
    """In a sample, each case with one of a few kernels."""
    turn = DISTINCT.index(config)
    for seed, case in sample(list(enumerate(cases(config))), 3, turn):
        call = Call(config, dataclasses.replace(case, sms=max(case.split, config.cluster_m)))
        call.check(call.run(seed))


def test_the_cases_have_each_property():
    """Clamps that are met and that are not, on both sides; scales that differ 1000-fold."""
    gates, ups = Call(DISTINCT[0], cases(DISTINCT[0])[0]).arms()[0]
    assert (gates > 7).any() and (gates < 7).any()
    assert (ups > 7).any() and (ups < -7).any() and (np.abs(ups) < 7).any()
    ratios = [case.sizes[0] / case.sizes[1] for case in cases(DISTINCT[0])]
    assert max(ratios) >= 1000 and min(ratios) <= 1 / 1000
    assert {case.activation for case in cases(DISTINCT[0])} == set(range(len(ACTIVATIONS)))


@pytest.mark.parametrize(("config", "split"), SPLITS, ids=label)
def test_each_way_to_end(config, split):
    """Output and bias dtypes, rows of y that vectors fit and that they do not, splits of K."""
    turn = SPLITS.index((config, split))
    half = max(config.tile_n * config.cluster_n // 2, 64)
    pairs = [(out, bias) for out in range(3) for bias in (NONE, F32, BF16, F16)]
    for i, (out, bias) in sample(list(enumerate(pairs)), 5, turn):
        case = Case(
            config.tile_m - i % 2,
            half - (out + bias) % 2,
            64 * split * (1 + i % 2),
            split=split,
            out=out,
            bias=bias,
            x_stride=i % 3 - 1,
            w_stride=(i + split) % 2,
            activation=i % len(ACTIVATIONS),
            sizes=((2, 2), (5, 0.005))[i % 2],
            sms=max(split, config.cluster_m),
        )
        call = Call(config, case)
        call.check(call.run(seed=i))


@pytest.mark.parametrize(("config", "split"), SPLITS, ids=label)
def test_nan_passes_through_the_clamps(config, split):
    """A NaN in a row of x, and in a gate's or an up's scales, reaches its own outputs alone."""
    case = Case(4, 24, 128 * split, split=split, activation=1, sms=max(split, config.cluster_m))
    good = Call(config, case)
    bad = Call(config, case)
    bad.w_bits[[3, 24 + 7], 2] = NAN_SCALE
    if bad.x_bits is None:
        bad.x[1, 5] = np.nan
    else:
        bad.x_bits[1, 3] = NAN_SCALE
    y = bad.run().astype(np.float32)
    hit = (np.arange(4) == 1)[:, None] | np.isin(np.arange(24), [3, 7])
    assert np.isnan(y[hit]).all()
    assert np.array_equal(y[~hit], good.run().astype(np.float32)[~hit])


@pytest.mark.parametrize("config", EPILOGUES, ids=label)
def test_many_tiles_for_a_cta(config):
    """Four tiles or more; in a sweep under several schedules, which give the same bits."""
    turn = EPILOGUES.index(config)
    m, half = config.tile_m + 1, config.tile_n * config.cluster_n // 2 + 70
    call = Call(config, Case(m, half, 64, bias=F32, activation=1, sms=config.cluster_m))
    runs = [call.check(call.run(seed)).view(np.uint16) for seed in sample(range(3), 3, turn)]
    assert all(np.array_equal(y, runs[0]) for y in runs)


@pytest.mark.parametrize("config", [DISTINCT[0], DISTINCT[-1]], ids=label)
def test_the_checks_can_fail(config):
    """Gates taken for ups, a clamp or the factor of the sigmoid left out: each is seen."""
    call = Call(config, dataclasses.replace(cases(config)[0], sms=config.cluster_m))
    faults = (
        (r"\bmin\.NaN\.f32 u, u, [^;]*;", ""),
        (r"\bmul\.rn\.f32 g, g, z;", ""),
        (r"\bfma\.rn\.f32 ([gu]), ", lambda m: f"fma.rn.f32 {'ug'['gu'.index(m[1])]}, "),
    )
    for pattern, by in faults:
        text, count = re.subn(pattern, by, ptx_of(config.name))
        assert count
        with pytest.raises(AssertionError):
            call.check(call.run(ptx=text))


@pytest.mark.parametrize("config", CONFIGS, ids=label)
@pytest.mark.parametrize(("m", "half"), [(0, 20), (5, 0)])
def test_an_empty_output_launches_nothing(config, m, half):
    arguments, *_ = Call(config, Case(5, 24, 64)).arguments()
    arguments[11:13] = m, 2 * half
    path = kernel_objects.folder() / f"{config.name}.o"
    assert record_launches(path, ptx_of(config.name), arguments, GlobalMemory()) == []


@functools.cache
def twin(config):
    """The plain config that a gated one is of."""
    name = config.name.replace("_gated", "")
    return next(c for c in configs(config.arch) if c.name == name)


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_a_gated_config_is_its_plain_twin(config):
    """But for the epilogue; the kernel needs no stack, and launches as the twin does."""
    assert dataclasses.replace(config, name=twin(config).name, epilogue="plain") == twin(config)
    entries = {k["name"]: k for k in kernel_objects.manifest()["kernels"]}
    mine, theirs = entries[config.name], entries[twin(config).name]
    assert mine["stack_bytes"] == mine["local_bytes"] == 0
    assert mine["launch"] == theirs["launch"]
    assert mine["registers"] * mine["launch"]["threads"] * config.ctas_per_sm <= 65536


PROBLEMS = [
    (m, n, k)
    for m in (1, 16, 17, 33, 64, 65, 128, 129, 256, 257, 1000, 4096, 100_000)
    for n, k in [(128, 64), (128, 4096), (4096, 4096), (8192, 28672), (57344, 8192), (24576, 1536)]
]


@pytest.mark.parametrize(("arch", "sms"), [("sm_100f", 148), ("sm_103a", 148), ("sm_120f", 188)])
@pytest.mark.parametrize("x_dtype", ["e2m1", "bfloat16", "float16"])
@pytest.mark.parametrize("invariant", [False, True])
def test_a_gated_call_gets_the_twin_of_a_plain_one(arch, sms, x_dtype, invariant):
    for m, n, k in PROBLEMS:
        plain = GemmProblem(m, n, k, arch, x_dtype, invariant)
        problem = dataclasses.replace(plain, epilogue="gated")
        assert serves(problem, sms) == (serves(plain, sms) and x_dtype != "float16")
        if serves(problem, sms):
            config, split = select(problem, sms)
            assert config.epilogue == "gated"
            assert (twin(config), split) == select(plain, sms)
