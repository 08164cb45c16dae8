# SPDX-License-Identifier: Apache-2.0
"""Corners of the formats and of rows in every kernel that the quantize objects hold.

An object has a kernel for each way to load, to spread rows over threads and to write, and the
compiler unrolls the 16 elements of a block in all of them: what one of them does right, another may
do wrong. Those for sm_120f are the same PTX as those for sm_100f.
"""

import itertools
import re

import mutation
import numpy as np
import pytest
import quantize_cases as cases

from jax_nvfp4.config.enums import OutFormat, Scaling
from jax_nvfp4.config.quantize import QUANTIZE_CONFIGS

tests = mutation.module_of("test_quantize_kernels")
CONFIGS = [c for c in QUANTIZE_CONFIGS if c.arch != "sm_120f"]
GRIDS = [c for c in CONFIGS if c.kind == "grid"]
KERNELS = pytest.mark.parametrize("config", CONFIGS, ids=[c.name for c in CONFIGS])
OPERAND, LINEAR, VALUES = OutFormat.OPERAND, OutFormat.LINEAR, OutFormat.VALUES
TINY = np.float32(2.0**-100)


def variants(config):
    """(scaling, format, whether by vectors, multiprocessors) for each kernel, but for long rows."""
    few, formats = {"flat": 132, "rows": 1, "grid": 3}[config.kind], (OPERAND, VALUES)
    if config.kind == "flat":  # given, and amax given: the same kernel for a tensor and for rows
        kinds = zip(tests.SCALINGS["flat"], (OPERAND, VALUES, VALUES, OPERAND), strict=True)
    else:
        kinds = [
            (scaling, out_format)
            for scaling in tests.SCALINGS[config.kind]
            for out_format in formats
        ]
    for scaling, out_format in kinds:
        for vector, sms in dict.fromkeys([(True, 132), (True, few), (False, few)]):
            yield scaling, out_format, vector, sms


def quantize(config, x, variant, g=None, seed=0, **options):
    """One run of a kernel, held to the oracle."""
    scaling, out_format, vector, sms = variant
    x = x.astype(cases.DTYPES[config.x_dtype])
    if scaling in tests.AMAX:
        g = tests.given_scales(np.random.default_rng(seed), x, scaling, bad=False)
    elif scaling in tests.GIVEN:
        g = np.full(1 if scaling == Scaling.STATIC else len(x), 1 if g is None else g, np.float32)
    tests.check(
        config, x, scaling, out_format, g, offset=0 if vector else 1, seed=seed, sms=sms, **options
    )


def second_block(config, x, fill):
    """x behind so many small values that threads hold it as the second of their blocks."""
    size = {"flat": (config.threads // 4, 48), "rows": (len(x), 544), "grid": (1, 2048)}
    small = np.random.default_rng(0).uniform(-fill, fill, size[config.kind])
    return np.concatenate([small, x], axis=0 if config.kind == "flat" else 1)


def two_blocks(config, variant):
    """Whether threads of a kernel hold two blocks."""
    return config.elements_per_thread == 32 and (config.kind != "rows" or variant[3] == 1)


def bad_block_with_the_largest(rng, position):
    """A row of three blocks: usual ones, one with an Inf or NaN and the largest, small ones."""
    row = rng.uniform(0.5, 3, 48) * rng.choice([-1, 1], 48)
    row[16 + (position + 5) % 16] = (np.nan, np.inf, -np.inf)[position % 3]
    row[16 + position] = 7.5 + position / 8
    row[32:] *= 2.0**-15  # a subnormal scale
    return row


def tiny_rows(rng):
    """Zeros, elements at 2**-100 and next to it, and those that count as zeros beside others."""
    signs = rng.choice(np.array([-1, 1], np.float32), (4, 48))
    rows = np.stack([np.zeros(48), np.full(48, TINY), np.full(48, TINY), np.full(48, TINY / 2)])
    rows[2, ::3] = np.nextafter(TINY, np.float32(0))
    rows[3, ::5] = 1.5 * TINY
    return rows.astype(np.float32) * signs


@KERNELS
def test_each_kernel_of_an_object(config):
    """Ties of block scales, each position of the largest in a block that is not finite, zeros."""
    ties = cases.CASES["scale_ties"](np.random.default_rng(7)).reshape(1, -1)
    executed = set()
    with np.errstate(all="ignore"):
        for seed, variant in enumerate(variants(config)):
            rng = np.random.default_rng(seed)
            options = {"seed": seed, "coverage": executed}
            quantize(config, np.vstack([ties, -ties]), variant, **options)
            bad = np.stack([bad_block_with_the_largest(rng, position) for position in range(16)])
            tiny = tiny_rows(rng)
            if config.kind != "grid":
                quantize(config, np.vstack([bad, tiny]), variant, g=2.0**-8, **options)
                quantize(config, tiny, variant, g=2.0**-104, **options)
                if two_blocks(config, variant):
                    quantize(config, second_block(config, bad, 1), variant, g=2.0**-8, **options)
                    x = second_block(config, tiny, 0)
                    quantize(config, x, variant, g=2.0**-104, **options)
                continue
            few = bad[seed % 4 :: 4] if variant[3] == 132 else bad  # a cluster takes its time
            for row in (*few, *tiny):
                quantize(config, row.reshape(1, -1), variant, **options)
            if two_blocks(config, variant):
                for row, fill in ((bad[seed % 8], 1), (bad[15 - seed % 8], 1), (tiny[1], 0)):
                    x = second_block(config, row.reshape(1, -1), fill)
                    quantize(config, x, variant, **options)
    text = tests.ptx_of(config.name).splitlines()
    starts = [i for i, line in enumerate(text, 1) if ".entry" in line] + [len(text)]
    idle = [
        i
        for i, (first, last) in enumerate(itertools.pairwise(starts))
        if not any(first < line < last for line in executed)
    ]
    # Those for long rows, and for rows of whole blocks, have tests of their own.
    assert len(idle) == (2 if config.x_dtype != "float32" and config.kind != "flat" else 0)


@pytest.mark.parametrize("config", GRIDS, ids=[c.name for c in GRIDS])
def test_rows_of_whole_blocks(config):
    """As above for rows of 64 columns: 16-bit ones have kernels of their own."""
    for i, out_format in enumerate((OPERAND, LINEAR)):
        rng = np.random.default_rng(i)
        rows = [bad_block_with_the_largest(rng, position) for position in range(16)]
        for seed, row in enumerate((*rows, *tiny_rows(rng))):
            x = np.append(row, row[:16]).reshape(1, -1)
            quantize(config, x, (Scaling.TENSOR, out_format, True, 3), seed=seed)


@pytest.mark.parametrize("config", GRIDS, ids=[c.name for c in GRIDS])
@pytest.mark.parametrize("vector", [True, False])
@pytest.mark.parametrize("out_format", [OPERAND, VALUES])
def test_zeros_in_several_chunks(config, out_format, vector):
    for k in (520, 512) if vector and out_format == OPERAND else (520,):
        x = np.zeros((66, k)) * np.random.default_rng(k).choice([-1.0, 1.0], (66, k))
        x[0, 3] = np.nan
        quantize(config, x, (Scaling.TENSOR, out_format, vector, 1))


@pytest.mark.parametrize("config", GRIDS, ids=[c.name for c in GRIDS])
def test_ctas_that_start_late(config):
    """They find a message of this launch where they look for an old one; the peer sends another."""
    text = tests.ptx_of(config.name).splitlines()
    starts = [i for i, line in enumerate(text, 1) if ".entry" in line]
    # In each kernel whose CTAs exchange messages there is a first one, and one for late peers.
    messages = [i for i, line in enumerate(text, 1) if "st.relaxed.gpu.global.b64" in line]
    late = set(messages[1::2])
    kernels = {sum(start < line for start in starts) for line in messages}
    assert len(kernels) == len(late) == len(messages) / 2
    for k, out_format, vector in (
        (520, OPERAND, True), (520, VALUES, True), (520, OPERAND, False), (520, VALUES, False),
        *(((512, OPERAND, True), (512, LINEAR, True)) if config.x_dtype != "float32" else ()),
    ):  # fmt: skip
        seen: set[bool] = set()
        for seed in range(40):
            x, executed = np.random.default_rng(seed).standard_normal((17, k)), set()
            variant = Scaling.TENSOR, out_format, vector, 4
            quantize(config, x, variant, seed=seed, coverage=executed)
            seen.add(bool(late & executed))
            if len(seen) == 2:
                break
        assert len(seen) == 2, "no CTA was late, or some always"


@KERNELS
def test_every_length_of_the_last_block(config):
    """Rows that end after each element, or group of elements that is loaded together."""
    rng = np.random.default_rng(8)
    step = 16 // np.dtype(cases.DTYPES[config.x_dtype]).itemsize
    for seed, variant in enumerate(variants(config)):
        # A thread's first block ends the row, then its second.
        shapes = [(2, 16)]
        if two_blocks(config, variant):
            second = {"flat": (config.threads // 16 + 4, 240), "rows": (2, 592), "grid": (9, 240)}
            shapes.append(second[config.kind])
        for m, k in shapes:
            for last in range(step, 16, step) if variant[2] else range(1, 16):
                quantize(config, rng.standard_normal((m, k + last)), variant, g=2.0**-9, seed=seed)


@KERNELS
def test_more_than_one_tile_of_scales(config):
    rng = np.random.default_rng(9)
    for seed, (scaling, out_format, vector, sms) in enumerate(variants(config)):
        if out_format == OPERAND:
            sms = 200 if sms == 132 else sms  # as many as rows: the kernel for few of them
            x = rng.standard_normal((130, 72))
            quantize(config, x, (scaling, out_format, vector, sms), g=2.0**-9, seed=seed)


def test_sm_120f_is_sm_100f():
    """The same PTX, but for the target."""
    for config in QUANTIZE_CONFIGS:
        if config.arch == "sm_120f":
            other = tests.ptx_of(config.name.replace("sm120f", "sm100f"))
            text = tests.ptx_of(config.name)
            assert re.search(r"^\.target sm_120f$", text, re.M)
            assert text.replace("sm_120f", "sm_100f") == other
