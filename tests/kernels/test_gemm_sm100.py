# SPDX-License-Identifier: Apache-2.0
"""The sm_100f GEMM kernels: their PTX and host code run on the PTX machine, against float64."""

import re

import ml_dtypes
import numpy as np
import oracle
import pytest
from gemm_sm100_cases import (
    BY_NAME,
    DTYPES,
    NAN_SCALE,
    Operand,
    check,
    gemm,
    operand,
    random_operand,
)
from ptx_machine.host import run_object

import kernel_objects
from jax_nvfp4.config import GemmProblem, select, serves, sm100
from jax_nvfp4.config.quantize import (
    X_DTYPES,
    Mode,
    OutFormat,
    quantize_scratch_bytes,
    select_quantize,
)

SWAPS = tuple(name for name, c in BY_NAME.items() if c.kind == "swap")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", BY_NAME)
def test_waves_of_tiles(name, seed):
    """More tiles than clusters, K above one stage, ragged everywhere, padding scales NaN."""
    config = BY_NAME[name]
    m, n = 2 * config.tile_m - 21, (config.cluster_n + 1) * config.tile_n - 59
    sms = config.cluster_m * config.cluster_n
    check(config, m, n, 336, seed=seed, sms=sms, padding=NAN_SCALE)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("resident", [1, 2, 16])
@pytest.mark.parametrize("name", ["swap_t32", "pair_t256x128"])
def test_clusters_that_take_over_tiles(name, resident, seed):
    """Twelve tiles, more or fewer clusters at once than the host code reckons with."""
    config = BY_NAME[name]
    m, n = (3 * 32 - 2, 4 * 128 - 9) if config.swap_ab else (2 * 256 - 5, 6 * 128 - 8)
    sms = 2 * config.cluster_m
    check(config, m, n, 128, seed=seed, sms=sms, resident=resident, bias=None)


@pytest.mark.parametrize("name", ["swap_t64", "pair_t256x256"])
def test_clusters_that_wait_for_a_place(name):
    """The chip holds fewer clusters than its multiprocessors would: the rest start later."""
    config = BY_NAME[name]
    check(config, 2 * config.tile_m, 2 * config.tile_n, 64, sms=64, resident=1)


@pytest.mark.parametrize("name", BY_NAME)
def test_one_full_tile(name):
    """No edge is clipped, and the other clusters of the grid have nothing to do."""
    config = BY_NAME[name]
    check(config, config.tile_m, config.tile_n, 256, sms=16, bias=2)


@pytest.mark.parametrize("name", BY_NAME)
def test_k_beyond_all_stages(name):
    config = BY_NAME[name]
    check(config, 40, 136, 256 * config.stages + 272, bias=None)


@pytest.mark.parametrize("name", ["swap_t64", "pair_t256x128"])
@pytest.mark.parametrize("k", [1, 16, 64, 250])
def test_k_below_one_stage(name, k):
    check(BY_NAME[name], 9, 40, k, x_scale="one", w_scale="one", bias=0)


@pytest.mark.parametrize("out", range(3), ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("n", [128, 75])
def test_output_types(name, out, n):
    """Also with rows of y that TMA cannot store."""
    bias, x_scale = (None, 2, 1)[out], (None, "one", "rows")[out]
    check(BY_NAME[name], 33, n, 64, out=out, bias=bias, x_scale=x_scale)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("split", [2, 4, 8])
@pytest.mark.parametrize("name", SWAPS)
def test_split_k(name, split, seed):
    """Two tiles for each cluster, shares of K of different lengths."""
    config = BY_NAME[name]
    check(config, config.tile_m - 3, 210, 64 * 37, split=split, sms=split, seed=seed)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1024, 4096), (50, 640, 2560), (128, 512, 2048), (300, 900, 512)]
)
def test_what_the_table_selects(m, n, k):
    """Config, split and grid as on a B200."""
    config, split = select(GemmProblem(m, n, k, "sm_100f", "e2m1"), 148)
    check(config, m, n, k, split=split, sms=148, resident=148)


def test_split_k_with_empty_shares():
    """Fewer stages of K than CTAs to share them."""
    check(sm100.SWAP_32, 20, 100, 512, split=8, sms=8)


@pytest.mark.parametrize("split", [1, 4])
def test_rows_do_not_depend_on_the_batch(split):
    """A row has the same bits alone, among others, and at any place of a larger batch."""
    rng = np.random.default_rng(3)
    n, k, m = 72, 1088, 150
    w = random_operand(rng, n, k, 128)
    codes, bits = rng.integers(0, 16, (m, k), np.uint8), rng.integers(0x28, 0x48, (m, k // 16))
    bits = bits.astype(np.uint8)
    scale = rng.uniform(0.5, 2, m).astype(np.float32)

    def run(rows):
        x = operand(codes[rows], bits[rows], len(rows))
        return gemm(sm100.SWAP_128, x, w, len(rows), n, k, x_scale=scale[rows], out=0,
                    split=split, sms=split)  # fmt: skip

    whole = run(np.arange(m))
    assert np.array_equal(run(np.array([140])), whole[140:141])
    order = rng.permutation(m)[:40]
    assert np.array_equal(run(order), whole[order])


def test_schedules_agree_bit_for_bit():
    results = [
        check(sm100.SWAP_64, 50, 140, 1300, split=4, sms=4, out=0, bias=None, data_seed=7, seed=s)
        for s in range(3)
    ]
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


@pytest.mark.parametrize("name", ["swap_t32", "pair_t256x256"])
def test_a_bad_block_stays_in_its_row(name):
    """A NaN scale makes its own row of y NaN and leaves the others as they were."""
    rng = np.random.default_rng(5)
    m, n, k = 30, 96, 320
    w = random_operand(rng, n, k, 128)
    codes = rng.integers(0, 16, (m, k), np.uint8)
    bits = rng.integers(0x28, 0x48, (m, k // 16)).astype(np.uint8)
    good = gemm(BY_NAME[name], operand(codes, bits, m), w, m, n, k)
    codes[11, 32:48], bits[11, 2] = 7, NAN_SCALE
    bad = gemm(BY_NAME[name], operand(codes, bits, m), w, m, n, k)
    others = np.arange(m) != 11
    assert np.isnan(bad[11].astype(np.float32)).all()
    assert np.array_equal(bad[others].view(np.uint16), good[others].view(np.uint16))


@pytest.mark.parametrize("name", ["swap_t32", "pair_t256x128"])
def test_from_the_quantizer_to_y(name):
    """Values, not codes: both operands quantized, activations by row."""
    rng = np.random.default_rng(9)
    m, n, k = 24, 130, 400
    x = rng.standard_normal((m, k)) * np.exp2(rng.integers(-8, 8, (m, 1)))
    w = rng.standard_normal((n, k)) / 20
    x_codes, x_bits, x_scale = oracle.quantize(x.astype(ml_dtypes.bfloat16), "token")
    w_codes, w_bits, w_scale = oracle.quantize(w.astype(ml_dtypes.bfloat16))
    y = gemm(BY_NAME[name], operand(x_codes, x_bits, m), operand(w_codes, w_bits, 256), m, n, k,
             x_scale=x_scale, w_scale=w_scale)  # fmt: skip
    values = (
        oracle.dequantize(x_codes, x_bits, x_scale),
        oracle.dequantize(w_codes, w_bits, w_scale),
    )
    oracle.assert_linear_close(y, *oracle.linear(*values), k)


@pytest.mark.parametrize("name", BY_NAME)
def test_from_the_quantize_kernel_to_y(name):
    """The bytes of both operands are those that this arch's quantize kernels write."""
    rng = np.random.default_rng(11)
    m, n, k = 40, 130, 400

    def quantize(values, mode, stored_rows):
        rows = len(values)
        config = select_quantize("sm_100f", "bfloat16", mode)
        data = np.full((stored_rows, 224), 0xCD, np.uint8)
        scales = np.full(-(-rows // 128) * 128 * 28, 0xCD, np.uint8)
        g = np.full(rows if mode == Mode.TOKEN else 1, np.nan, np.float32)
        given = np.ones(1, np.float32)
        scratch = np.full(max(quantize_scratch_bytes(config, rows, k, 4), 16), 0xCD, np.uint8)
        base = kernel_objects.folder() / config.name
        run_object(
            base.with_suffix(".o"),
            base.with_suffix(".ptx").read_text(),
            [values, given, data[:rows], scales, g, scratch, rows, k,
             X_DTYPES.index("bfloat16"), mode, OutFormat.OPERAND, 4],
        )  # fmt: skip
        data[rows:] = 0  # the weight's padding rows, which repack writes
        return data, scales, g

    x = (rng.standard_normal((m, k)) * np.exp2(rng.integers(-6, 6, (m, 1)))).astype(DTYPES[1])
    w = rng.standard_normal((n, k)).astype(DTYPES[1])
    x_data, x_scales, x_g = quantize(x, Mode.TOKEN, m)
    w_data, w_scales, w_g = quantize(w, Mode.TENSOR, 256)
    y = gemm(BY_NAME[name], Operand(x_data, x_scales, x), Operand(w_data, w_scales, w), m, n, k,
             x_scale=x_g, w_scale=w_g)  # fmt: skip
    values = [oracle.dequantize(*oracle.quantize(v, s)) for v, s in ((x, "token"), (w, "tensor"))]
    oracle.assert_linear_close(y, *oracle.linear(*values), k)


@pytest.mark.parametrize(("split", "sms"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("config", sm100.WEIGHT_ONLY, ids=lambda c: c.x_dtype)
def test_weight_only(config, split, sms):
    """16-bit activations, which the kernel of sm_120 multiplies with the same repacked weight."""
    rng = np.random.default_rng(4)
    m, n, k = 19, 200, 1344
    x = rng.standard_normal((m, k)).astype(DTYPES[1] if config.x_dtype == "bfloat16" else DTYPES[2])
    w = random_operand(rng, n, k, 256, NAN_SCALE)
    w_scale = rng.uniform(0.1, 0.4, n).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    unused = np.zeros(16, np.uint8)
    problem = GemmProblem(m, n, k, "sm_100f", config.x_dtype)
    y = gemm(config, Operand(x, unused, x), w, m, n, k, w_scale=w_scale, bias=bias, split=split,
             sms=sms, scratch=sm100.scratch_bytes(config, problem, split, sms))  # fmt: skip
    values = w.values * w_scale.astype(np.float64)[:, None]
    oracle.assert_linear_close(y, *oracle.linear(x.astype(np.float64), values, bias), k)


PROBLEMS = [
    (m, n, k)
    for m in (1, 16, 32, 33, 64, 100, 128, 129, 256, 257, 1000, 4096, 100_000)
    for n, k in [(1, 1), (128, 4096), (4096, 4096), (8192, 28672), (57344, 8192), (24576, 1536)]
]


def test_selection_of_weight_only():
    """Few rows of 16-bit activations, and the rest is left to XLA."""
    for m, n, k in PROBLEMS:
        for x_dtype in ("bfloat16", "float16"):
            problem = GemmProblem(m, n, k, "sm_100f", x_dtype)
            assert serves(problem, 148) == (m <= 64)
            if m <= 64:
                config, split = select(problem, 148)
                assert config in sm100.WEIGHT_ONLY and config.x_dtype == x_dtype
                assert 1 <= split <= 8 and (split == 1 or -(-k // 256) >= 8 * split)


@pytest.mark.parametrize("num_sms", [148, 160, 20])
def test_selection(num_sms):
    """Each problem gets a config that can run it: the token tile, the split, the cluster."""
    chosen = set()
    for m, n, k in PROBLEMS:
        problem = GemmProblem(m, n, k, "sm_100f", "e2m1")
        config, split = select(problem, num_sms)
        chosen.add(config)
        assert split in (1, 2, 4, 8) and split <= config.split_k
        assert split == 1 or -(-k // 256) >= 2 * split
        assert config is not sm100.SWAP_32 or m <= 32
        assert sm100.scratch_bytes(config, problem, split, num_sms) == 0
    if num_sms == 148:
        assert chosen == set(sm100.W4A4)


def test_batch_invariant_selection_depends_on_the_weight_alone():
    for n, k in {(n, k) for _, n, k in PROBLEMS}:
        choices = {
            select(GemmProblem(m, n, k, "sm_100f", "e2m1", batch_invariant=True), num_sms)
            for m, _, _ in PROBLEMS
            for num_sms in (20, 148, 160)
        }
        assert len(choices) == 1


@pytest.mark.parametrize("name", BY_NAME)
def test_machine_code(name):
    """Block-scaled MMAs and TMA in the machine code, and nothing spilled."""
    config = BY_NAME[name]
    (entry,) = [k for k in kernel_objects.manifest()["kernels"] if k["name"] == config.name]
    assert entry["stack_bytes"] == entry["local_bytes"] == 0
    assert entry["registers"] <= 255
    code = kernel_objects.sass(config.name)
    group = ".2CTA" if config.kind == "pair" else ""
    assert len(re.findall(rf"UTCOMMA{group}\.4X\b", code)) == 4
    assert len(re.findall(r"UTMALDG\.[23]D", code)) == 4
    assert bool(re.search(r"UTMALDG\.2D\.MULTICAST", code)) == (config.cluster_n > 1)
    assert len(re.findall(r"UTMASTG\.2D", code)) == (3 if config.kind == "pair" else 0)
    assert not re.search(r"\b(STL|LDL)\b", code)


@pytest.mark.parametrize("name", BY_NAME)
def test_one_thread_issues_each_asynchronous_copy(name):
    """Each TMA and tcgen05 instruction is behind an elect.sync: a warp would issue it 32 times."""
    lines = (kernel_objects.folder() / f"gemm_sm100f_{name}.ptx").read_text().splitlines()
    issued = [
        i
        for i, line in enumerate(lines)
        if re.search(r"cp\.async\.bulk\.(prefetch\.)?tensor|tcgen05\.(mma|cp|commit)", line)
    ]
    assert len(issued) >= 4 + 8 + 4 + 2
    for i in issued:
        block = lines[max(0, i - 14) : i]
        assert any("elect.sync" in line for line in block), lines[i]
