# SPDX-License-Identifier: Apache-2.0
"""Every GEMM kernel of the Blackwell architectures, its host code and PTX run on the PTX machine.

From the bytes that the quantize kernels write to y, held to a float64 oracle. `gemm_blackwell` has
the cases, and what they have to cover.
"""

import dataclasses
import re

import ml_dtypes
import numpy as np
import oracle
import pytest
from gemm_blackwell import (
    BF16,
    F16,
    F32,
    NAN_SCALE,
    PROPERTIES,
    SEEDS,
    SHARED_BYTES,
    UNIT,
    Case,
    Problem,
    cases,
    cluster_size,
    has_no,
    label,
    launches,
    ptx_of,
    quantize,
    quantize_by_kernel,
    random_values,
    runs,
)
from ptx_machine.memory import TensorMemory
from sweep import SWEEP

import kernel_objects
from jax_nvfp4.config import GemmProblem, runnable_arches, serves
from jax_nvfp4.config.enums import OutFormat
from jax_nvfp4.config.gemm import sm100, sm120
from jax_nvfp4.config.gemm.select import select
from jax_nvfp4.layout import swizzle
from jax_nvfp4.layout.orders import order

CONFIGS = (*sm100.PLAIN, *sm120.PLAIN)  # gated ones: test_gated_blackwell.py
DISTINCT = [c for c in CONFIGS if c not in sm100.WEIGHT_ONLY]
"""Those whose PTX no other one has: sm_120f's kernels for 16-bit x are sm_100f's, too."""
SPLITS = [(config, split) for config in DISTINCT for split in sorted({1, config.split_k})]
EXECUTED = [
    config
    for config in (*sm100.PLAIN, *sm120.PLAIN[:3])
    if config not in (sm100.TWO_CTA_256, sm100.TWO_CTA_256_K96)
]
EPILOGUES = [(c, split) for c, split in SPLITS if c.arch != "sm_103a"]  # its are those of sm_100f


@pytest.mark.parametrize("arch", ["sm_100f", "sm_120f"])
@pytest.mark.parametrize("scaling", ["tensor", "token", "unit"])
@pytest.mark.parametrize("out_format", [OutFormat.OPERAND, OutFormat.LINEAR])
def test_operands_are_what_the_quantize_kernels_write(arch, scaling, out_format):
    """By the oracle, with padding and a bad block among them."""
    for m, k in ((70, 330), (1, 1), (5, 40), (130, 64)):
        values = random_values(m, k, 0, bad_row=m // 2)
        written = quantize_by_kernel(arch, values, scaling, out_format)
        for made, kernels in zip(quantize(values, scaling, out_format)[:3], written, strict=True):
            assert (made.shape, made.dtype) == (kernels.shape, kernels.dtype)
            assert np.array_equal(made.view(np.uint8), kernels.view(np.uint8))


@pytest.mark.parametrize(("config", "case"), runs(DISTINCT), ids=label)
def test_matches_the_oracle(config, case):
    """All that is padding is poison, which changes no bit; nor does another schedule.

    The machine finds a missing synchronization under any schedule, so one is enough but for a case
    of each kernel.
    """
    turn = list(cases(config)).index(case)
    seeds = SEEDS if SWEEP or turn == 0 else (SEEDS[turn % len(SEEDS)],)
    problem = Problem(config, cases(config)[case])
    first = None
    for seed in seeds:
        problem.poison = seed == seeds[-1]
        y = problem.check(problem.run(seed)).view(np.uint8)
        first = y if first is None else first
        assert np.array_equal(y, first), f"schedule seed {seed}"


@pytest.mark.parametrize("named", PROPERTIES)
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_the_cases_have_each_property(config, named):
    held = [name for name, case in cases(config).items() if PROPERTIES[named](config, case)]
    assert bool(held) != (named in has_no(config)), held


@pytest.mark.sampled(3)
@pytest.mark.parametrize("out", [BF16, F16])
@pytest.mark.parametrize(("config", "split"), EPILOGUES, ids=label)
def test_a_bias_that_outweighs_the_product_is_rounded_once(config, out, split):
    """A bias on a tie of y's dtype: the product, however small, decides which way."""
    for n in (136, 75):  # rows of y that are stored whole, and element by element
        m = config.tile_m - 3  # so that each element of a thread has a row of y
        case = Case(m, n, 600, sms=split, split=split, out=out, bias=F32, w_scaling="token")
        problem = Problem(config, case)
        rng = np.random.default_rng(out)
        size = np.logspace(-10, -3, n, dtype=np.float32) / np.float32(300)
        problem.w_scale = problem.w_scale * size
        problem.w_values = problem.w_values * size.astype(np.float64)[:, None]
        problem.bias[:] = 1 + UNIT[out] * (rng.integers(0, 100, n) + 0.5)
        problem.check(problem.run())
        # The check can fail: without the rounding to odd each product below 2^-25 is lost.
        plain, count = re.subn(r"\bfma\.r[mp]\.f32", "fma.rn.f32", ptx_of(config.name))
        assert count >= 2
        y = problem.run(ptx=plain)
        try:
            problem.check(y)
        except AssertionError:
            continue
        raise AssertionError("a sum that is rounded twice passes the check")


@pytest.mark.parametrize("config", DISTINCT, ids=label)
def test_a_bad_block_stays_in_its_row_and_column(config):
    """A NaN makes its own row or column of y NaN and leaves the bits of the others."""
    case = Case(20, 72, 320, sms=4, out=F32, x_scaling="token", w_scaling="token")
    good = Problem(config, case).run()
    bad = Problem(config, case, bad_row=9, bad_column=50).run()
    hit = (np.arange(20) == 9)[:, None] | (np.arange(72) == 50)
    assert np.isnan(bad[hit]).all()
    assert np.array_equal(bad[~hit], good[~hit])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("config", "split"), SPLITS, ids=label)
def test_rows_do_not_depend_on_the_batch(config, split):
    """A row has the same bits alone, among others, and at any place of a larger batch."""
    case = Case(150, 72, 1088, sms=split, split=split, out=F32, x_scaling="token")
    whole = Problem(config, case)
    y = whole.run()
    values = random_values(case.m, case.k, 0)
    for rows in (np.random.default_rng(0).permutation(case.m)[:40], np.array([140])):
        part = Problem(config, dataclasses.replace(case, m=len(rows)))
        if config.x_dtype == "e2m1":
            arch = runnable_arches(config.arch)[-1]
            part.x, part.sfx, part.x_scale = quantize_by_kernel(
                arch, values[rows], "token", OutFormat.OPERAND
            )
        else:
            part.x, part.x_scale = whole.x[rows], whole.x_scale[rows]
        assert np.array_equal(part.run(), y[rows])


@pytest.mark.parametrize("config", DISTINCT, ids=label)
def test_every_code_times_every_scale(config):
    """Each product of a code and a scale, on either side, with 1: exact."""
    scales = np.arange(NAN_SCALE)  # row r has scale r
    products = oracle.block_values(
        np.tile(np.arange(16, dtype=np.uint8), (len(scales), 1)), scales[:, None]
    )

    def table(arch, layout):
        data = np.zeros((len(scales), 32), np.uint8)
        data[:, :8] = oracle.pack(np.arange(16, dtype=np.uint8)[None])
        return layout(arch, data, scales.astype(np.uint8)[:, None])

    def ones(arch, layout):
        codes = np.zeros((16, 64), np.uint8)
        codes[np.arange(16), np.arange(16)] = 2
        return layout(arch, oracle.pack(codes), np.full((16, 1), 0x38, np.uint8))

    def as_x(arch, data, bits):
        return data, swizzle.swizzle(np.pad(bits, [(0, 0), (0, 3)])).reshape(-1)

    def as_weight(arch, data, bits):
        bits = np.pad(bits, [(0, 0), (0, 3)]).view(ml_dtypes.float8_e4m3fn)
        data, bits = order(arch).pack(data, bits)
        return np.ascontiguousarray(data), np.ascontiguousarray(bits).reshape(-1)

    problem = Problem(config, Case(16, len(scales), 64, out=F32, x_scaling="unit"))
    if config.x_dtype == "e2m1":
        problem.x, problem.sfx = ones(config.arch, as_x)
    else:
        problem.x = np.eye(16, 64).astype(config.x_dtype)
    problem.w, problem.sfw = table(config.arch, as_weight)
    problem.w_scale = np.ones(1, np.float32)
    assert np.array_equal(problem.run(), products.T.astype(np.float32))
    if config.x_dtype == "e2m1":
        problem = Problem(config, Case(len(scales), 16, 64, out=F32, x_scaling="unit"))
        problem.x, problem.sfx = table(config.arch, as_x)
        problem.w, problem.sfw = ones(config.arch, as_weight)
        problem.w_scale = np.ones(1, np.float32)
        assert np.array_equal(problem.run(), products.astype(np.float32))


@pytest.mark.parametrize("config", [c for c in DISTINCT if c not in sm100.W4A4], ids=label)
@pytest.mark.parametrize("split", [1, 2])
def test_without_k_y_is_the_bias(config, split):
    """The kernels of tcgen05 are never called without k."""
    case = Case(5, 40, 0, split=split, out=F32, bias=BF16, x_scaling="unit")
    problem = Problem(config, case)
    assert np.array_equal(problem.run(), np.tile(problem.bias.astype(np.float32), (5, 1)))


@pytest.mark.parametrize("config", CONFIGS, ids=label)
@pytest.mark.parametrize(("m", "n"), [(0, 40), (5, 0), (0, 0)])
def test_an_empty_output_launches_nothing(config, m, n):
    for split in {1, config.split_k}:
        assert launches(config, Case(m, n, 64, split=split, sms=148)) == []


@pytest.mark.sampled(3)
@pytest.mark.parametrize("x_dtype", ["e2m1", "bfloat16"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 384, 4096), (50, 300, 2560), (128, 260, 2048), (300, 450, 512)]
)
@pytest.mark.parametrize(("arch", "sms"), [("sm_100f", 148), ("sm_120f", 188)])
def test_what_the_table_selects(arch, sms, m, n, k, x_dtype):
    """Config, split and grid as on a B200 and an RTX PRO 6000."""
    wanted = GemmProblem(m, n, k, arch, x_dtype)
    assert serves(wanted, sms) == (x_dtype == "e2m1" or m <= 64)
    if serves(wanted, sms):
        config, split = select(wanted, sms)
        case = Case(m, n, k, sms=sms, split=split, bias=BF16, x_scaling="token")
        problem = Problem(config, case)
        problem.check(problem.run())


@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.parametrize("config", EXECUTED, ids=label)
def test_the_cases_execute_all_code(config):
    """All of the kernel's PTX runs in some case, but for a few instructions.

    Those are turns of loops that poll a barrier, which the machine does not need, and what the
    compiler made of the split epilogue for a cluster of no CTAs. The kernels for 16-bit x are the
    same on both architectures; of 256x256 tiles the one with larger clusters stands for both. Once
    the cases that ran suffice, the rest need not.
    """
    code = [
        (i, line.strip())
        for i, line in enumerate(ptx_of(config.name).splitlines(), 1)
        if re.match(r"\s*(@!?%\w+\s+)?[a-z]\S*\s*.*;$", line)
    ]
    essential = r"mbarrier|bulk|tcgen05|mma|launchcontrol|griddepcontrol|ldmatrix|cluster|elect"
    executed = set()
    for name, case in reversed(cases(config).items()):
        problem = Problem(config, case)
        try:
            problem.check(problem.run(len(SEEDS), coverage=executed))
        except Exception as error:
            error.add_note(f"{config.name}, {name}")
            raise
        left = [line for i, line in code if i not in executed]
        few = len(left) <= (60 if config.kind == "swap" else 5)
        if few and not any(re.search(essential, line) for line in left):
            return
    raise AssertionError(left)


@pytest.mark.parametrize("config", sm100.WEIGHT_ONLY, ids=label)
def test_kernels_for_16_bit_x_are_those_of_sm_120f(config):
    """The same PTX, but for the target, launched alike where as many CTAs find a place.

    What runs there need not run again.
    """
    other = next(c for c in sm120.WEIGHT_ONLY if c.x_dtype == config.x_dtype)
    fields = {"name": config.name, "arch": config.arch, "ctas_per_sm": config.ctas_per_sm}
    assert dataclasses.replace(other, **fields) == config
    text, theirs = ptx_of(config.name), ptx_of(other.name)
    assert re.search(r"^\.target sm_100f$", text, re.M)
    assert text.replace("sm_100f", "sm_120f") == theirs.replace(other.name, config.name)
    for case in cases(config).values():
        sms = case.sms * config.ctas_per_sm // other.ctas_per_sm
        one, two = launches(config, case), launches(other, dataclasses.replace(case, sms=sms))
        assert len(one) == len(two) >= 1
        for a, b in zip(one, two, strict=True):
            assert (a.kernel, a.grid, a.block, a.cluster) == (b.kernel, b.grid, b.block, b.cluster)
            assert (a.dynamic_smem, a.overlaps) == (b.dynamic_smem, b.overlaps)
            assert set(a.attributes) == set(b.attributes)


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_static_evidence(config, monkeypatch):
    """The manifest's figures are those of the machine code, of the launch and of a run."""
    (entry,) = [k for k in kernel_objects.manifest()["kernels"] if k["name"] == config.name]
    assert entry["config"]["stages"] == config.stages
    assert entry["stack_bytes"] == entry["local_bytes"] == 0
    assert entry["registers"] * entry["launch"]["threads"] <= 65536
    assert not re.search(r"\b(STL|LDL)\b", kernel_objects.sass(config.name))

    # A cluster of the size that is launched, and the largest one.
    for split in (1, config.split_k):
        case = Case(5, 24, 40, split=split, sms=148)
        launch = launches(config, case)[0]
        assert launch.block == (entry["launch"]["threads"], 1, 1)
        assert launch.dynamic_smem == entry["launch"]["dynamic_shared_bytes"]
        assert launch.cluster == (cluster_size(config, case), 1, 1)
    assert launch.cluster[0] == entry["launch"]["cluster_ctas"]

    columns = []
    allocate = TensorMemory.allocate
    monkeypatch.setattr(
        TensorMemory,
        "allocate",
        lambda memory, count, line: columns.append(count) or allocate(memory, count, line),
    )
    Problem(config, Case(5, 24, 40)).run()
    assert set(columns or [0]) == {entry["launch"]["tmem_columns"]}

    # Shared memory holds the stages, and no further one.
    expected = re.findall(
        r"expect_tx\.shared\.b64 %rd\d+, \[[^]]*\], (%r\d+);", ptx_of(config.name)
    )
    sizes = [
        int(re.search(rf"mov\.b32 \s*{register}, (\d+);", ptx_of(config.name))[1])
        for register in expected
    ]
    stage = max(sizes) // (2 if config.kind == "2cta" else 1)
    shared = launch.dynamic_smem
    limit = SHARED_BYTES[config.arch] // config.ctas_per_sm
    assert config.stages * stage <= shared <= limit
    if config.ctas_per_sm == 1:
        assert shared + stage > limit
