# SPDX-License-Identifier: Apache-2.0
"""Runs of the Blackwell GEMM kernels on the PTX machine, held to a float64 oracle.

Operands are the bytes that the same architecture's quantize kernels write: x in the GEMM's order,
the weight in the canonical one, which `layout.orders` then repacks as at run time.
"""

import dataclasses
import functools

import ml_dtypes
import numpy as np
import oracle
from ptx_machine import GlobalMemory
from ptx_machine.host import record_launches, run_object

import kernel_objects
from jax_nvfp4.config import GemmProblem, runnable_arches, scratch_bytes
from jax_nvfp4.config.enums import OutFormat, Scaling
from jax_nvfp4.config.quantize import (
    X_DTYPES,
    quantize_scratch_bytes,
    select_quantize,
)
from jax_nvfp4.layout import swizzle
from jax_nvfp4.layout.orders import order

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)  # by out_dtype and bias_dtype
F32, BF16, F16 = range(3)
UNIT = (2.0**-23, 2.0**-7, 2.0**-10)
NAN_SCALE = 0x7F
SEEDS = (0, 1, 2)
"""Orders of warps and copies that each case runs in."""
QUANTIZE_SMS = 4
SHARED_BYTES = {"sm_100f": 227 * 1024, "sm_103a": 227 * 1024, "sm_120f": 99 * 1024}
"""Shared memory that a CTA can have (CUDA programming guide, compute capabilities)."""

# What ends the pointers and the numbers of a GEMM without groups of rows and without a gate.
NO_GROUPS = (None, None)
NO_GROUPS_NO_GATE = (0, 0, 0, 1.0, 1.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a GEMM kernel.

    Attributes:
        m, n, k: the problem.
        sms: multiprocessors that the host code is told of; few, so that the persistent loop goes
            round.
        split: ways to split K.
        out: output dtype.
        bias: bias dtype, or -1.
        x_scaling: global scale of x: "tensor", "token" (one for each row) or "unit" (given as 1,
            and not passed on).
        w_scaling: that of the weight: "tensor" or "token".
        resident: clusters that run at the same time; by default as many as `sms` hold.
    """

    m: int
    n: int
    k: int
    sms: int = 1
    split: int = 1
    out: int = BF16
    bias: int = -1
    x_scaling: str = "tensor"
    w_scaling: str = "tensor"
    resident: int | None = None


@functools.cache
def ptx_of(name):
    return (kernel_objects.folder() / f"{name}.ptx").read_text()


def stages(config, case):
    """Pipeline stages that K takes."""
    return -(-case.k // config.tile_k)


def cluster_size(config, case):
    """CTAs of a cluster: on sm_100 a split of the swap configs is one, too."""
    return config.cluster_m * config.cluster_n * (case.split if config.kind == "swap" else 1)


def resident(config, case):
    """Clusters that run at the same time."""
    places = case.sms * config.ctas_per_sm // cluster_size(config, case)
    return case.resident or max(places, 1)


def tiles(config, case):
    """Tiles along m and along n; a cluster's, where it has one together."""
    columns = case.n if config.kind in ("2cta", "swap") else (
        -(-case.n // 128) * 128  # a stream kernel walks over the padded weight
    )  # fmt: skip
    per_n = config.tile_n * config.cluster_n
    return -(-case.m // config.tile_m), -(-columns // per_n)


def cases(config):
    """The calls that each test of a config runs, by what they are there for.

    Sizes are ragged unless a name says otherwise.
    """
    tm, tn, tk, full = config.tile_m, config.tile_n, config.tile_k, config.stages + 1
    found = {
        "part-of-a-stage": Case(5, 24, 40, sms=16),
        "one-element": Case(1, 1, 1, out=F32, x_scaling="unit"),
        "one-full-tile": Case(tm, tn, 2 * tk, sms=16, out=F16, bias=F16),
        "above-all-stages": Case(7, 40, tk * full + 24, bias=F32, x_scaling="token"),
        "waves": Case(tm + tm // 2 + 1, tn * (config.cluster_n + 1) - 56, 330, bias=BF16,
                      x_scaling="token", w_scaling="token"),
        "waves-of-odd-rows": Case(tm + 3, max(tn * config.cluster_n, 128) + 7, 200, out=F32,
                                  bias=F32, x_scaling="unit", w_scaling="token"),
        "odd-rows": Case(tm - 3, 67, tk + 46, out=F16, bias=F32, x_scaling="unit"),
        "aligned-rows": Case(tm - 5, 56, 200, out=F32, bias=BF16, x_scaling="token"),
    }  # fmt: skip
    if config.kind in ("2cta", "swap") and config.cluster_n == 1:
        # Eight tiles of the MMA's N side make a band of the raster.
        beyond = 1 if tn == 256 else tm + 9
        m, n = (8 * tm + 5, 210) if config.swap_ab else (beyond, 8 * tn + 40)
        found["second-band-of-tiles"] = Case(m, n, 64, sms=2, out=F16, bias=F16)
    if config.kind == "pingpong":
        found["second-sweep-of-row-tiles"] = Case(2100, 136, 64, sms=3, out=F16, w_scaling="token")
    if config.split_k > 1:
        # Of sm_100's swap configs a cluster splits K, and its size is a power of two.
        three, swap = (4, True) if config.kind == "swap" else (3, False)
        found |= {
            "split": Case(tm - 3, 136, 2 * tk * config.stages + 40, split=2, sms=2 if swap else 1,
                          bias=F32, x_scaling="token", w_scaling="token"),
            "split-uneven": Case(tm + 2, 130, tk * (three + 3) - 6, split=three, sms=three,
                                 out=F16, bias=F16, x_scaling="unit"),
            "split-most": Case(9, 56, tk * 11 - 40, split=8, sms=8, out=F32, bias=BF16,
                               w_scaling="token"),
            "split-with-empty-parts": Case(20, 67, tk * 3, split=8, sms=8, x_scaling="token"),
        }  # fmt: skip
    if config.arch == "sm_103a":
        # All but the MMAs is sm_100f's code: smaller runs around them.
        found.pop("second-band-of-tiles", None)
        found["waves-of-odd-rows"] = dataclasses.replace(found["waves-of-odd-rows"], m=3)
    return found


PROPERTIES = {
    "one tile": lambda c, p: tiles(c, p)[0] == 1 and p.n <= c.tile_n * c.cluster_n,
    "one full tile": lambda c, p: (p.m, p.n) == (c.tile_m, c.tile_n),
    "several tiles along m": lambda c, p: tiles(c, p)[0] > 1,
    "several tiles along n": lambda c, p: tiles(c, p)[1] > 1,
    "waves": lambda c, p: np.prod(tiles(c, p)) >= 3 * resident(c, p),
    "ragged m": lambda c, p: p.m > c.tile_m and p.m % c.tile_m,
    "ragged n": lambda c, p: p.n > c.tile_n and p.n % c.tile_n,
    "ragged k": lambda c, p: p.k > c.tile_k and p.k % 16,
    "k below a stage": lambda c, p: p.k < c.tile_k,
    "k above all stages": lambda c, p: p.split == 1 and stages(c, p) > c.stages,
    "rows of y of 16 bytes": lambda c, p: p.n * np.dtype(DTYPES[p.out]).itemsize % 16 == 0,
    "other rows of y": lambda c, p: p.n * np.dtype(DTYPES[p.out]).itemsize % 16,
    "clusters": lambda c, p: cluster_size(c, p) > 1,
    "split": lambda c, p: p.split == 2,
    "largest split": lambda c, p: p.split > 1 and p.split == c.split_k,
    "parts above all stages": lambda c, p: p.split > 1 and stages(c, p) > p.split * c.stages,
    "parts of unequal length": lambda c, p: p.split > 1 and stages(c, p) % p.split,
    "empty parts": lambda c, p: stages(c, p) < p.split,
    "several tiles, split": lambda c, p: p.split > 1 and tiles(c, p)[1] > 1,
    "x scale per row": lambda c, p: p.x_scaling == "token",
    "one x scale": lambda c, p: p.x_scaling == "tensor",
    "no x scale": lambda c, p: p.x_scaling == "unit",
    "w scale per row": lambda c, p: p.w_scaling == "token",
    "one w scale": lambda c, p: p.w_scaling == "tensor",
    "no bias": lambda c, p: p.bias < 0,
    **{f"bias {d}": lambda c, p, i=i: p.bias == i for i, d in enumerate(X_DTYPES)},
    **{f"y {d}": lambda c, p, i=i: p.split == 1 and p.out == i for i, d in enumerate(X_DTYPES)},
    **{f"y {d}, split": lambda c, p, i=i: p.split > 1 and p.out == i
       for i, d in enumerate(X_DTYPES)},
}  # fmt: skip
"""What the cases of each config have to show."""


def has_no(config):
    """Names of `PROPERTIES` that no call of a config can have."""
    out = set()
    if config.split_k == 1:
        out |= {name for name in PROPERTIES if "split" in name or "parts" in name}
    if config.kind not in ("2cta", "swap"):
        out.add("clusters")
    return out


def runs(configs):
    """(config, name of a case) of some configs."""
    return [(config, name) for config in configs for name in cases(config)]


def label(value):
    """A test's id for a config, or for anything else."""
    return getattr(value, "name", str(value)).removeprefix("gemm_")


# ---- Operands ------------------------------------------------------------------------------------


def quantize(values, scaling, out_format):
    """By the oracle: (data, block scales, global scale, dequantized float64)."""
    given = 1.0 if scaling == "unit" else None
    codes, bits, g = oracle.quantize(values, "tensor" if scaling == "unit" else scaling, given)
    g = np.asarray(g, np.float32).reshape(-1)
    exact = oracle.dequantize(codes, bits, g if len(g) > 1 else g[0], values.shape[1])
    if out_format == OutFormat.OPERAND:
        codes = np.pad(codes, [(0, 0), (0, -codes.shape[1] % 64)])
        bits = np.pad(bits, [(0, 0), (0, codes.shape[1] // 16 - bits.shape[1])])
        bits = np.ascontiguousarray(swizzle.swizzle(bits)).reshape(-1)
    return oracle.pack(codes), bits, g, exact


def quantize_by_kernel(arch, values, scaling, out_format):
    """(data, block scales, global scale), as the quantize kernel of `arch` writes them."""
    m, k = values.shape
    if not values.size:
        return *(np.zeros((m, 0), np.uint8) for _ in range(2)), np.ones(1, np.float32)
    of_kernel = {"unit": Scaling.STATIC, "token": Scaling.TOKEN, "tensor": Scaling.TENSOR}[scaling]
    x_dtype = np.dtype(values.dtype).name
    config = select_quantize(arch, x_dtype, of_kernel)
    if out_format == OutFormat.OPERAND:
        blocks = -(-k // 64) * 4
        scales = np.full(-(-m // 128) * 128 * blocks, 0xCD, np.uint8)
    else:
        blocks = -(-k // 16)
        scales = np.full((m, blocks), 0xCD, np.uint8)
    data = np.full((m, blocks * 8), 0xCD, np.uint8)
    g = np.full(m if of_kernel == Scaling.TOKEN else 1, np.nan, np.float32)
    scratch = np.full(quantize_scratch_bytes(config, QUANTIZE_SMS) or 16, 0xCD, np.uint8)
    run_object(
        kernel_objects.folder() / f"{config.name}.o",
        ptx_of(config.name),
        [values, np.ones(1, np.float32), data, scales, g, scratch, m, k, X_DTYPES.index(x_dtype),
         of_kernel, out_format, QUANTIZE_SMS],
    )  # fmt: skip
    return data, scales, g


def random_values(rows, k, side, bad_row=None):
    """bf16 (rows, k); rows and blocks of different sizes, so that a scale from elsewhere shows."""
    rng = np.random.default_rng([rows, k, side])
    values = rng.standard_normal((rows, k)) * np.exp2(rng.integers(-3, 4, (rows, 1)) - 4 * side)
    values *= np.repeat(np.exp2(rng.integers(-2, 3, (rows, -(-k // 16)))), 16, axis=1)[:, :k]
    if bad_row is not None:
        values[bad_row, k // 2] = np.nan
    return values.astype(ml_dtypes.bfloat16)


@functools.lru_cache(maxsize=32)
def activations(arch, m, k, scaling, bad_row=None):
    """(data, swizzled scales, global scale, dequantized float64) of random x."""
    values, out_format = random_values(m, k, 0, bad_row), OutFormat.OPERAND
    written = quantize_by_kernel(arch, values, scaling, out_format)
    return *written, quantize(values, scaling, out_format)[-1]


@functools.lru_cache(maxsize=32)
def weight(arch, n, k, scaling, bad_row=None):
    """(repacked data, scales, global scale, dequantized float64) of a random weight."""
    values, out_format = random_values(n, k, 1, bad_row), OutFormat.LINEAR
    data, scales, g = quantize_by_kernel(arch, values, scaling, out_format)
    exact = quantize(values, scaling, out_format)[-1]
    packed = order(arch).pack(data, scales.view(ml_dtypes.float8_e4m3fn))
    data, scales = (np.ascontiguousarray(p) for p in packed)
    return data, scales.reshape(-1), g, exact


def poisoned(scales, rows):
    """Swizzled scales with NaN in the rows that pad the last tile of 128."""
    columns = scales.size // (-(-rows // 128) * 128)
    padding = np.zeros((-(-rows // 128) * 128, columns), np.uint8)
    padding[rows:] = NAN_SCALE
    return np.where(swizzle.swizzle(padding).reshape(-1), padding.dtype.type(NAN_SCALE), scales)


class Problem:
    """The arrays of a case, and what y should be.

    Args:
        config: decides the arch, and whether x is quantized or stays 16-bit.
        case: the call.
        bad_row: a row of x to put a NaN into.
        bad_column: a row of the weight to put a NaN into.
    """

    def __init__(self, config, case, bad_row=None, bad_column=None):
        self.config, self.case = config, case
        m, n, k = case.m, case.n, case.k
        family = runnable_arches(config.arch)[-1]
        if config.x_dtype == "e2m1":
            made = activations(family, m, k, case.x_scaling, bad_row)
            self.x, self.sfx, self.x_scale, self.x_values = made
        else:
            x = random_values(m, k, 0, bad_row).astype(config.x_dtype)
            self.x, self.x_values = np.pad(x, [(0, 0), (0, -k % 64)]), x.astype(np.float64)
            rows = m if case.x_scaling == "token" else 1
            self.x_scale = np.random.default_rng(m).uniform(0.5, 2, rows).astype(np.float32)
            self.sfx = None
            if case.x_scaling != "unit":
                self.x_values *= self.x_scale.astype(np.float64)[:, None]
        if case.x_scaling == "unit":
            self.x_scale = None
        made = weight(family, n, k, case.w_scaling, bad_column)
        self.w, self.sfw, self.w_scale, self.w_values = made
        self.bias = None
        if case.bias >= 0:
            rng = np.random.default_rng(n)
            self.bias = (5 * rng.standard_normal(n)).astype(DTYPES[case.bias])
        self.poison = False

    def run(self, seed=0, ptx=None, coverage=None):
        """y of the kernel: its host code, and its launches on the PTX machine.

        `ptx` replaces the kernel's own; `coverage` collects the lines that were executed.
        """
        config, c = self.config, self.case
        y = np.empty((c.m, c.n), DTYPES[c.out])
        y.view(np.uint8)[...] = 0xAB
        problem = GemmProblem(c.m, c.n, c.k, config.arch, config.x_dtype)
        needed = scratch_bytes(config, problem, c.split, c.sms)
        scratch = np.empty(needed, np.uint8) if needed else None
        x_stride = -1 if self.x_scale is None else int(c.x_scaling == "token")
        w, sfx, sfw = self.w, self.sfx, self.sfw
        if self.poison:
            w = w.copy()
            w[c.n :] = 0xFF
            sfw = poisoned(sfw, c.n)
            sfx = None if sfx is None else poisoned(sfx, c.m)
        pointers = (self.x, sfx, w, sfw, self.x_scale, self.w_scale, self.bias, y, scratch)
        pointers += NO_GROUPS
        # What the kernel before may have written, where launches overlap; y's memory was its, too.
        previous = [self.x, sfx, self.x_scale, y] if config.kind in ("2cta", "swap") else []
        previous = [a for a in previous if a is not None and a.size]
        run_object(
            kernel_objects.folder() / f"{config.name}.o",
            ptx or ptx_of(config.name),
            [*(None if p is None or not p.size else p for p in pointers),
             c.m, c.n, c.k, x_stride, int(c.w_scaling == "token"), c.bias, c.out, c.split, c.sms,
             *NO_GROUPS_NO_GATE],
            uninitialized=[a for a in (y, scratch) if a is not None],
            schedule_seed=seed,
            num_sms=c.sms,
            resident_clusters=resident(config, c),
            previous=previous,
            coverage=coverage,
        )  # fmt: skip
        return y

    def check(self, y):
        """Holds y to the oracle and returns it."""
        exact, magnitude = oracle.linear(self.x_values, self.w_values, self.bias)
        oracle.assert_linear_close(y, exact, magnitude, self.case.k)
        return y


def launches(config, case):
    """What the host code launches for a case, operands aside."""
    one = np.zeros(1 << 16, np.uint8)
    pointers = [one, one, one, one, None, one, None, one, one]
    integers = [case.m, case.n, case.k, -1, 0, -1, case.out, case.split, case.sms]
    path = kernel_objects.folder() / f"{config.name}.o"
    arguments = [*pointers, *NO_GROUPS, *integers, *NO_GROUPS_NO_GATE]
    return record_launches(path, ptx_of(config.name), arguments, GlobalMemory())
