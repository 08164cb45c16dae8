# SPDX-License-Identifier: Apache-2.0
"""Every way in which a GEMM kernel ends: each output dtype with each bias dtype, kind of scale,
rows of y that vectors fit and rows that they do not, all rows of a tile, each split of K.

Half of the rows have products far below their bias, which lies on ties of the output's dtype: the
product, however small, decides which way the one rounding goes. Every architecture's configs.
"""

import functools
import re

import ml_dtypes
import numpy as np
import oracle
import pytest
from gemm_blackwell import NO_GROUPS, NO_GROUPS_NO_GATE
from ptx_machine.host import run_object
from sweep import SWEEP, sample

import kernel_objects
from jax_nvfp4.config import ARCHES, GemmProblem, configs, scratch_bytes
from jax_nvfp4.config.gemm import sm100
from jax_nvfp4.layout import swizzle
from jax_nvfp4.layout.orders import order

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)  # by out_dtype and bias_dtype
UNIT = (2.0**-23, 2.0**-7, 2.0**-10)
NONE, F32 = -1, 0
GUARD = 32


@functools.cache
def ptx_of(name):
    return (kernel_objects.folder() / f"{name}.ptx").read_text()


def random_codes(rng, rows, k):
    """(packed codes, block scale bits, values of code * block_scale)."""
    codes = rng.integers(0, 16, (rows, k), np.uint8)
    bits = rng.integers(0x28, 0x48, (rows, k // 16)).astype(np.uint8)
    return oracle.pack(codes), bits, oracle.block_values(codes, bits)


class Call:
    """One call of a kernel: its arrays, and what y should be.

    Args:
        config: the kernel's.
        m, n, k: the problem; k is a multiple of 64.
        split: ways to split K.
        out: output dtype.
        bias: bias dtype, or -1.
        x_stride: 1 for a scale of each row of x, 0 for one, -1 for none.
        w_stride: 1 for a scale of each row of w, 0 for one.
    """

    def __init__(self, config, m, n, k, split, out, bias, x_stride, w_stride):
        self.config, self.m, self.n, self.k = config, m, n, k
        rng = np.random.default_rng([m, n, k, split, out, bias + 1, x_stride + 1, w_stride])
        w, w_bits, w_values = random_codes(rng, n, k)
        packed = order(config.arch).pack(w, w_bits.view(ml_dtypes.float8_e4m3fn))
        self.w, self.sfw = (np.ascontiguousarray(p) for p in packed)
        if config.x_dtype == "e2m1":
            self.x, bits, x_values = random_codes(rng, m, k)
            self.sfx = np.ascontiguousarray(swizzle.swizzle(bits)).reshape(-1)
        else:
            self.x = rng.standard_normal((m, k)).astype(config.x_dtype)
            self.sfx, x_values = None, self.x.astype(np.float64)
        self.x_scale = None
        if x_stride >= 0:
            self.x_scale = rng.uniform(0.5, 2, m if x_stride else 1).astype(np.float32)
            self.x_scale[1::2] *= 1e-6
        self.w_scale = rng.uniform(0.001, 0.004, n if w_stride else 1).astype(np.float32)
        self.bias = None
        if bias == F32 and out != F32:
            ties = 1 + UNIT[out] * (rng.integers(0, 100, n) + 0.5)
            self.bias = (rng.choice([-1, 1], n) * ties).astype(np.float32)
        elif bias != NONE:
            self.bias = rng.standard_normal(n).astype(DTYPES[bias])
        self.integers = [m, n, k, x_stride, w_stride, bias, out, split]
        alpha = np.ones((1, 1)) if self.x_scale is None else self.x_scale.astype(np.float64)
        alpha = alpha.reshape(-1, 1) * self.w_scale.astype(np.float64)
        exact, magnitude = oracle.linear(x_values, w_values)
        self.exact = alpha * exact + (0 if self.bias is None else self.bias.astype(np.float64))
        self.magnitude = alpha * magnitude
        self.dtype = np.dtype(DTYPES[out])

    def run(self, seed=0):
        """y; what lies behind it has to stay as it is."""
        config, split = self.config, self.integers[-1]
        sms = config.cluster_m * config.cluster_n * split
        y = np.frombuffer(b"\xcd" * (self.m * self.n + GUARD) * self.dtype.itemsize, self.dtype)
        y = y.copy()
        problem = GemmProblem(self.m, self.n, self.k, config.arch, config.x_dtype)
        needed = scratch_bytes(config, problem, split, sms)
        scratch = np.empty(needed, np.uint8) if needed else None
        arrays = [self.x, self.sfx, self.w, self.sfw, self.x_scale, self.w_scale, self.bias, y]
        run_object(
            kernel_objects.folder() / f"{config.name}.o",
            ptx_of(config.name),
            [*arrays, scratch, *NO_GROUPS, *self.integers, sms, *NO_GROUPS_NO_GATE],
            uninitialized=[a for a in (y, scratch) if a is not None],
            schedule_seed=seed,
            num_sms=sms,
            resident_clusters=1,
        )
        assert y[self.m * self.n :].tobytes() == b"\xcd" * GUARD * y.itemsize
        return y[: self.m * self.n].reshape(self.m, self.n)

    def check(self, seed=0):
        oracle.assert_linear_close(self.run(seed), self.exact, self.magnitude, self.k)


# sm_100f's kernels for 16-bit x are sm_120f's. Gated and grouped ones have tests of their own.
CONFIGS = [
    c
    for arch in ARCHES
    for c in configs(arch)
    if arch != "sm_103a" and c not in sm100.WEIGHT_ONLY and c.epilogue == "plain" and not c.grouped
]


def splits(config):
    """Ways to split K: each of Hopper's is a kernel of its own, elsewhere it is a number."""
    return range(1, (config.split_k if config.arch == "sm_90a" else min(config.split_k, 2)) + 1)


# Behind its last product a Hopper kernel for float16 x is the one for bfloat16; in those of 128x128
# tiles one comparison is elsewhere.
BY_NAME = {c.name: c for c in CONFIGS}
TWINS = {
    c.name: c.name.replace("_f16_", "_bf16_")
    for c in CONFIGS
    if c.arch == "sm_90a" and c.x_dtype == "float16" and (c.tile_m, c.tile_n) != (128, 128)
}
RUNS = [
    pytest.param(c, split, id=f"{c.name}-{split}")
    for c in CONFIGS
    if c.name not in TWINS
    for split in splits(c)
]


def ends(name):
    """What each entry of a kernel's PTX does behind its last product, whatever the registers."""
    for entry in ptx_of(name).split(".visible .entry")[1:]:
        text = entry[entry.rindex("wgmma.wait_group") :]
        text = re.sub(r"\w+_param_", "param_", re.sub(r"[%$]\w+", "%", text))
        instructions = (line.strip() for line in text.splitlines())
        yield [line for line in instructions if line.endswith(";")]


@pytest.mark.parametrize("name", TWINS)
def test_kernels_for_float16_end_as_those_for_bfloat16(name):
    """The same instructions in the same order, so that the runs below do for both."""
    mine, others = list(ends(name)), list(ends(TWINS[name]))
    assert mine == others
    assert len(mine) == len(splits(BY_NAME[name])) == len(splits(BY_NAME[TWINS[name]]))
    assert all(any(line.startswith("st.global") for line in end) for end in mine)


@pytest.mark.parametrize(("config", "split"), RUNS)
def test_each_way_to_end(config, split):
    """In a sample each output dtype, and each bias dtype with another one from kernel to kernel."""
    m, n = config.tile_m, max(config.tile_n * config.cluster_n, 128)
    k = 64 if config.arch != "sm_90a" else 128
    turn = CONFIGS.index(config) + split
    pairs = [((bias + 1 + shift) % 3, bias) for shift in range(3) for bias in (NONE, 0, 1, 2)]
    for out, bias in pairs if SWEEP else pairs[turn % 3 * 4 :][:4]:
        odd = (out + bias) % 2
        x_stride, w_stride = (out + bias + 1) % 3 - 1, (bias + 1) // 2 % 2
        call = Call(config, m, n - odd, k * split, split, out, bias, x_stride, w_stride)
        call.check(seed=out + 3 * odd)
    # A scale of its own for each row, whatever the row; vectors, and one element after the other.
    for out, columns in sample(((0, n), (1, n - 1), (2, n)), 2, turn):
        Call(config, m, columns, k * split, split, out, F32, 1, 1).check()


SM100 = [c for c in CONFIGS if c.kind in ("swap", "2cta")]


@pytest.mark.parametrize("config", SM100, ids=[c.name for c in SM100])
def test_one_cluster_takes_many_tiles(config):
    """More tiles for a cluster than it has places for answers about the next one, and two laps."""
    for split in splits(config):
        m, n = 3 * config.tile_m - 3, 3 * config.tile_n * config.cluster_n - 40
        call = Call(config, m, n, 64 * split, split, 1, NONE, 1, 0)
        for seed in sample(range(3), 3, split):
            call.check(seed)
