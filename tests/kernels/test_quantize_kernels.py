# SPDX-License-Identifier: Apache-2.0
"""Every quantize kernel on the PTX machine, against the oracle, bit for bit.

The host code of the compiled object picks the kernel and its launch, and the PTX machine runs it.
Outputs start poisoned, have to be written whole, and nothing past them; scratch memory starts with
arbitrary contents.
"""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
import quantize_cases as cases
from ptx_machine import Pointer
from ptx_machine.host import run_object

import kernel_objects
from jax_nvfp4.config.enums import OutFormat, Scaling
from jax_nvfp4.config.limits import TYPICAL
from jax_nvfp4.config.quantize import (
    KIND_OF_SCALING,
    QUANTIZE_CONFIGS,
    X_DTYPES,
    quantize_configs,
    quantize_scratch_bytes,
    select_quantize,
)
from jax_nvfp4.ops.quantize.cuda import call
from jax_nvfp4.ops.quantize.plan import plan

GUARD = 64
POISON = 0xCD
FEW_SMS = 5  # no room for a cluster: a "grid" kernel's CTAs meet in scratch memory
SCALINGS = {
    "flat": (Scaling.STATIC, Scaling.STATIC_ROWS, Scaling.AMAX, Scaling.AMAX_ROWS),
    "rows": (Scaling.TOKEN,),
    "grid": (Scaling.TENSOR,),
}
NOT_ARITHMETIC = {"mov", "ld", "st", "cvt", "setp", "selp"}
GIVEN = (Scaling.STATIC, Scaling.STATIC_ROWS)
AMAX = (Scaling.AMAX, Scaling.AMAX_ROWS)


@functools.cache
def ptx_of(name):
    return (kernel_objects.folder() / f"{name}.ptx").read_text()


def swizzled(bits):
    """Block scales (m, 4t) in the 128x4 order, rows padded to 128 with zeros."""
    m, columns = bits.shape
    out = np.zeros(-(-m // 128) * 128 * columns, np.uint8)
    n, k = np.meshgrid(np.arange(m), np.arange(columns), indexing="ij")
    tile = (n // 128) * (columns // 4) + k // 4
    out[tile * 512 + (n % 32) * 16 + (n % 128) // 32 * 4 + k % 4] = bits
    return out


def expected(x, scaling, out_format, g):
    """(data, block_scale, global_scale): flat arrays of uint8, or uint16 for bfloat16 values."""
    if scaling in GIVEN:
        given = g[0] if scaling == Scaling.STATIC else g
        codes, bits, reported = oracle.quantize(x, global_scale=given)
    elif scaling in AMAX:
        codes, bits, reported = expected_of_part(x, g)
    else:
        name = "token" if scaling == Scaling.TOKEN else "tensor"
        codes, bits, reported = oracle.quantize(x, scaling=name)
    reported = np.asarray(reported, np.float32).reshape(-1)
    if out_format == OutFormat.LINEAR:
        return oracle.pack(codes).reshape(-1), bits.reshape(-1), reported
    codes = np.pad(codes, [(0, 0), (0, -codes.shape[1] % 64)])
    bits = np.pad(bits, [(0, 0), (0, codes.shape[1] // 16 - bits.shape[1])])
    if out_format == OutFormat.OPERAND:
        return oracle.pack(codes).reshape(-1), swizzled(bits), reported
    values = oracle.block_values(codes, bits).astype(ml_dtypes.bfloat16).reshape(-1)
    return one_nan(values.view(np.uint16)), np.zeros(0, np.uint8), reported


def expected_of_part(x, amax):
    """Codes, scale bits and global scale of x as a part of a tensor, or of rows, with an amax."""
    m, k = x.shape
    whole = np.zeros((m + 1, -(-k // 16) * 16 + 16), np.float32)
    whole[:m, :k] = x
    scaling = "tensor" if len(amax) == 1 else "token"
    if len(amax) == 1:
        whole[m, -1] = amax[0]
    else:
        whole[:m, -1] = amax
    codes, bits, reported = oracle.quantize(whole, scaling=scaling)
    return codes[:m, :-16], bits[:m, :-1], reported if len(amax) == 1 else reported[:m]


def one_nan(values):
    """The bits of bfloat16 values, all NaNs alike."""
    return np.where(np.isnan(values.view(ml_dtypes.bfloat16)), np.uint16(0x7FC0), values)


def check(config, x, scaling, out_format, g=None, offset=0, seed=0, sms=132, coverage=None):
    """Quantizes on the PTX machine and compares all outputs with the oracle's.

    Args:
        config: the kernel.
        x: (m, k) of the config's dtype.
        scaling: a Scaling.
        out_format: an OutFormat.
        g: the given global scales, or amaxes, float32.
        offset: elements by which x is away from a 16-byte aligned address.
        seed: of the schedule and of the scratch memory's contents.
        sms: multiprocessors that the kernel is told of.
        coverage: takes up the PTX lines that run.
    """
    m, k = x.shape
    want = expected(x, scaling, out_format, g)
    elements = np.concatenate([np.zeros(offset, x.dtype), x.reshape(-1)])
    given = np.asarray([np.nan] if g is None else g, np.float32)
    outputs = [np.full(w.nbytes + GUARD, POISON, np.uint8) for w in want]
    scratch_bytes = quantize_scratch_bytes(config, sms)
    scratch = np.random.default_rng(seed).integers(0, 256, scratch_bytes + 8, dtype=np.uint8)
    if seed % 2:
        scratch[:] = seed >> 1  # the tags that the CTAs find are all alike
    run_object(
        kernel_objects.folder() / f"{config.name}.o",
        ptx_of(config.name),
        [
            Pointer(elements, offset * x.itemsize),
            None if g is None else given,
            *outputs,
            scratch if scratch_bytes else None,
            m,
            k,
            X_DTYPES.index(config.x_dtype),
            int(scaling),
            int(out_format),
            sms,
        ],
        uninitialized=outputs,
        schedule_seed=seed,
        num_sms=sms,
        resident_clusters=256,  # a cooperative launch: all of the grid
        coverage=coverage,
    )
    where = f"{config.name} {scaling!r} {out_format!r} {x.shape} offset {offset} seed {seed}"
    for name, got, right in zip(("data", "scale", "global scale"), outputs, want, strict=True):
        assert (got[right.nbytes :] == POISON).all(), f"{where}: {name} written past its end"
        got = got[: right.nbytes].view(right.dtype)
        if right.dtype == np.uint16:
            got = one_nan(got)
        got, right = got.view(np.uint8), right.view(np.uint8)
        wrong = np.flatnonzero(got != right)
        assert not len(wrong), (
            f"{where}: {len(wrong)} of {len(right)} bytes of {name} differ, at {wrong[:8]}: "
            f"{got[wrong[:8]]} instead of {right[wrong[:8]]}"
        )


def given_scales(rng, x, scaling, bad):
    """Global scales or amaxes for a scaling, unusable ones too if `bad`; None if dynamic."""
    m = len(x)
    if scaling in AMAX:
        magnitude = np.abs(x.astype(np.float32))
        magnitude[~(np.isfinite(magnitude) & (magnitude >= np.float32(2.0**-100)))] = 0
        own = magnitude.max(1) if scaling == Scaling.AMAX_ROWS else magnitude.max().reshape(1)
        other = rng.choice(
            np.array([0, 2.0**-100, 1e-20, 0.37, 5, 1e9, 3e38], np.float32), len(own)
        )
        return np.maximum(own, other)
    if scaling not in GIVEN:
        return None
    pool = np.array(cases.GLOBAL_SCALES + (cases.BAD_GLOBAL_SCALES if bad else ()), np.float32)
    return rng.choice(pool, 1 if scaling == Scaling.STATIC else m)


KERNELS = [pytest.param(config, id=config.name) for config in QUANTIZE_CONFIGS]
NUMERIC = ("all_codes", "ties", "scale_ties", "outlier", "tiny", "nan", "inf", "uniform_bits")


@pytest.mark.parametrize("config", KERNELS)
def test_corners_of_the_formats(config):
    rng = np.random.default_rng(1)
    for i, case in enumerate(NUMERIC):
        x = cases.make(case, config.x_dtype)
        x = x[rng.permutation(len(x))[:24]]
        for scaling in SCALINGS[config.kind]:
            g = given_scales(rng, x, scaling, bad=i % 2)
            check(config, x, scaling, OutFormat((i + int(scaling)) % 3), g, seed=i)


@pytest.mark.parametrize("config", [c for c in KERNELS if c.values[0].kind == "grid"])
def test_corners_in_rows_of_whole_blocks(config):
    """The second pass by a table, in blocks that the table serves and in others."""
    rng = np.random.default_rng(6)
    for i, case in enumerate((*NUMERIC, "rows_of_all_sizes", "largest", "negative_zeros")):
        x = cases.make(case, config.x_dtype).reshape(-1)
        x = np.resize(x, -(-x.size // 1024) * 1024).reshape(-1, 16)
        x = x[rng.permutation(len(x))[: 16 * 32]].reshape(-1, 64)
        for out_format in (OutFormat.OPERAND, (OutFormat.LINEAR, OutFormat.VALUES)[i % 2]):
            check(config, x, Scaling.TENSOR, out_format, seed=i, sms=1 + i % 3)


# Rows that start off 16-byte boundaries (k = 17, 100 of float32 is on them), rows shorter than a
# block, more than one scale tile, padded and exact multiples of 16, 64 and 128.
SHAPES = ((1, 1), (2, 7), (3, 17), (5, 64), (4, 100), (129, 24), (33, 129), (6, 520))


@pytest.mark.parametrize("config", KERNELS)
def test_shapes(config):
    rng = np.random.default_rng(2)
    for i, (m, k) in enumerate(SHAPES):
        x = rng.standard_normal((m, k)).astype(cases.DTYPES[config.x_dtype])
        for out_format in (OutFormat.OPERAND, (OutFormat.LINEAR, OutFormat.VALUES)[i // 2 % 2]):
            for scaling in SCALINGS[config.kind]:
                g = given_scales(rng, x, scaling, bad=False)
                sms = (132, 2)[i % 2]
                check(config, x, scaling, out_format, g, offset=i % 2, seed=i, sms=sms)


# (m, k, multiprocessors): every shape of threads, one and several chunks.
ROWS = (
    (3, 4104, 7),  # two CTAs share a row
    (1, 9000, 132),  # five CTAs share a row
    (9, 200, 4),  # several rows of a CTA
    (2, 8704, 1),  # one row of a CTA
    (1, 8712, 8),  # few rows
    (2, 16640, 1),  # long rows of the 16-bit dtypes
    (2, 16640, 4),  # two CTAs share a row, in two parts
    (1, 32776, 1),  # a row that is longer than the registers
    (1, 16387, 1),  # the same, element by element
)


@pytest.mark.parametrize("config", [c for c in KERNELS if c.values[0].kind == "rows"])
def test_long_rows(config):
    rng = np.random.default_rng(3)
    for seed, (m, k, sms) in enumerate(ROWS):
        x = rng.standard_normal((m, k)).astype(cases.DTYPES[config.x_dtype])
        x[0, 40] = np.inf
        x[-1, k // 2], x[-1, k // 2 ^ 1] = 37.5, np.nan
        check(config, x, Scaling.TOKEN, OutFormat.OPERAND, seed=seed, sms=sms)


# (m, k, multiprocessors, seeds): CTAs that meet in scratch memory, one to several chunks each.
GRIDS = (
    (40, 520, 3, 6),
    (12, 2049, FEW_SMS, 2),
    (1, 70000, 2, 1),
    (6, 6600, 1, 1),  # one CTA
    (130, 256, 3, 4),  # rows of whole blocks
    (82, 2048, 1, 1),  # the same, more chunks than their blocks' amax is kept of
    (70, 900, 132, 2),  # a cluster
)


@pytest.mark.parametrize("config", [c for c in KERNELS if c.values[0].kind == "grid"])
def test_grids(config):
    rng = np.random.default_rng(4)
    for m, k, sms, seeds in GRIDS:
        x = rng.standard_normal((m, k)).astype(cases.DTYPES[config.x_dtype])
        for seed in range(seeds):
            row, column = rng.integers(m), 2 * rng.integers(k // 2)
            x[row, column], x[row, column + 1] = 9 + seed, (np.nan, np.inf)[seed % 2]
            check(config, x, Scaling.TENSOR, OutFormat(seed % 3), seed=seed, sms=sms)


@pytest.mark.parametrize("config", [c for c in KERNELS if "sm90a_grid_bf16" in c.id])
def test_stale_messages(config):
    """Scratch memory as an earlier launch left it, whatever the tags were."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((40, 520)).astype(cases.DTYPES[config.x_dtype])
    for tag in (0, 1, 2, 3, 254, 255):
        check(config, x, Scaling.TENSOR, OutFormat.LINEAR, seed=2 * tag + 1, sms=4)


@pytest.mark.parametrize("config", KERNELS)
def test_every_rounding_is_spelled_out(config):
    """No approximation, no flushing, nothing that ptxas may contract."""
    allowed = {
        "mul.rn.f32",
        "fma.rn.f32",
        "rcp.rn.f32",
        "div.rn.f32",
        "mul.rn.bf16x2",
        "min.f32",
        "max.f32",
        "abs.f32",
        "max.NaN.xorsign.abs.f32",
        "max.NaN.xorsign.abs.f16x2",
        "max.NaN.xorsign.abs.bf16x2",
    }
    text = ptx_of(config.name)
    used = set(re.findall(r"(?<![\w.%])([a-z]+\.[\w.]*(?:f32|f16x2|bf16x2))(?=\s)", text))
    arithmetic = {op for op in used if op.split(".")[0] not in NOT_ARITHMETIC}
    assert arithmetic <= allowed, sorted(arithmetic - allowed)
    assert ("cvt.rn.satfinite.e2m1x2.f32" in text) == (config.arch != "sm_90a")
    assert "cvt.rn.satfinite.e4m3x2.f32" in text
    assert "ld.global.nc.v4.b32" in text


@pytest.mark.parametrize("config", KERNELS)
def test_nothing_spills(config):
    (entry,) = (k for k in kernel_objects.manifest()["kernels"] if k["name"] == config.name)
    assert entry["local_bytes"] == entry["stack_bytes"] == 0
    assert entry["registers"] * config.threads <= 65536


def test_selection():
    for arch in ("sm_90a", "sm_100f", "sm_120f"):
        assert len({c.name for c in quantize_configs(arch)}) == 9
        for x_dtype in X_DTYPES:
            for scaling in KIND_OF_SCALING:
                config = select_quantize(arch, x_dtype, scaling)
                assert (config.arch, config.x_dtype) == (arch, x_dtype)
                assert scaling in SCALINGS[config.kind]
    assert select_quantize("sm_103a", "float32", 0).arch == "sm_100f"
    with pytest.raises(ValueError, match=r"sm_80.*float32"):
        select_quantize("sm_80", "float32", 0)


def test_scratch():
    for config in QUANTIZE_CONFIGS:
        size = quantize_scratch_bytes(config, 132)
        assert size == (132 * 132 * 8 if config.kind == "grid" else 0)
        with pytest.raises(ValueError, match="num_sms is 0"):
            quantize_scratch_bytes(config, 0)


@pytest.mark.parametrize(
    ("scaling", "given", "m", "k", "of_kernel"),
    [
        (Scaling.TENSOR, None, 5, 64, Scaling.TENSOR),
        (Scaling.TENSOR, None, 1, 64, Scaling.TOKEN),  # the amax of one row is that of the tensor
        (Scaling.TENSOR, None, 1, 2**15, Scaling.TENSOR),
        (Scaling.TOKEN, None, 5, 64, Scaling.TOKEN),
        (Scaling.STATIC, (), 5, 64, Scaling.STATIC),
        (Scaling.STATIC, (5,), 5, 64, Scaling.STATIC_ROWS),
        (Scaling.AMAX, (), 5, 64, Scaling.AMAX),
        (Scaling.AMAX, (5,), 5, 64, Scaling.AMAX_ROWS),
    ],
)
def test_scalings_of_the_primitive(scaling, given, m, k, of_kernel):
    chosen = plan(
        scaling,
        (m, k),
        "bfloat16",
        per_row=given == (m,),
        arch="sm_90a",
        limits=TYPICAL["sm_90a"],
        out_format=OutFormat.LINEAR,
    )
    assert chosen.scaling == of_kernel
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    scale = None if given is None else jax.ShapeDtypeStruct(given, jnp.float32)
    jaxpr = jax.make_jaxpr(functools.partial(call, chosen=chosen))(x, scale)
    (equation,) = (e for e in jaxpr.eqns if e.primitive.name == "ffi_call")
    assert dict(equation.params["attributes"])["scaling"] == of_kernel
    shapes = [(m, k // 2), (m, k // 16), (m,) * of_kernel.per_row]
    assert [a.shape for a in jaxpr.out_avals] == shapes
