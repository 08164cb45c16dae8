# SPDX-License-Identifier: Apache-2.0
"""The sm_120f GEMM kernels: their PTX and host code run on the PTX machine, against float64."""

import dataclasses
import functools
import re

import ml_dtypes
import numpy as np
import oracle
import pytest
from ptx_machine import GlobalMemory, PtxError
from ptx_machine.host import record_launches, run_object

import kernel_objects
from jax_nvfp4.config import GemmProblem, scratch_bytes, select, serves, sm120
from jax_nvfp4.config.quantize import X_DTYPES, Mode, OutFormat, select_quantize

F32 = np.float32
DTYPES = (F32, ml_dtypes.bfloat16, np.float16)  # by out_dtype and bias_dtype
OUT_F32, OUT_BF16, OUT_F16 = range(3)
PINGPONG, STREAM_16, STREAM_64 = W4A4 = sm120.CONFIGS[:3]
WEIGHT_ONLY_BF16, WEIGHT_ONLY_F16 = sm120.CONFIGS[3:]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a kernel.

    Attributes:
        m, n, k: the problem.
        num_sms: CTAs at most; few, so that the persistent loop goes round.
        split_k: ways to split K.
        out: output dtype.
        bias: bias dtype, or -1.
        x_stride, w_stride: 1 for scales per row, 0 for scalars; x_stride -1: no scale of x.
    """

    m: int
    n: int
    k: int
    num_sms: int = 2
    split_k: int = 1
    out: int = OUT_BF16
    bias: int = -1
    x_stride: int = 0
    w_stride: int = 0


def swizzle(scales, rows):
    """128x4 order of (rows, columns) scale bytes; rows that pad the tile are NaN."""
    columns = scales.shape[1]
    tiles = np.full((-(-rows // 128), columns // 4, 32, 4, 4), 0x7F, np.uint8)
    r, c = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    tiles[r // 128, c // 4, r % 32, r % 128 // 32, c % 4] = scales
    return tiles.reshape(-1)


def unswizzle(scales, rows, columns):
    """The inverse of `swizzle`."""
    tiles = scales.reshape(-1, -(-columns // 4), 32, 4, 4)
    r, c = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return tiles[r // 128, c // 4, r % 32, r % 128 // 32, c % 4]


def operand(values, stored_rows, scaling):
    """(data, scales, global scale, dequantized float64) of a matrix as the kernels read it."""
    rows, k = values.shape
    codes, bits, g = oracle.quantize(values, scaling)
    k_pad = -(-k // 64) * 64
    data = np.zeros((stored_rows, k_pad), np.uint8)
    data[:rows, : codes.shape[1]] = codes
    scales = np.zeros((rows, k_pad // 16), np.uint8)
    scales[:, : bits.shape[1]] = bits
    g = np.asarray(g, np.float32).reshape(-1)
    exact = oracle.block_values(codes, bits)[:, :k]
    return oracle.pack(data), swizzle(scales, rows), g, exact * g.astype(np.float64)[:, None]


class Problem:
    """The arrays of a case, from values by the oracle's quantizer to what y should be.

    Args:
        case: the call.
        config: decides whether x is quantized or stays 16-bit.
        seed: of the values.
        bad_row: a row of x to put a NaN into.
        bad_column: a row of w to put a NaN into.
    """

    def __init__(self, case, config=PINGPONG, seed=0, bad_row=None, bad_column=None):
        rng = np.random.default_rng([case.m, case.n, case.k, seed])
        self.case = case
        # Rows and blocks of different sizes: a scale taken from elsewhere shows.
        x = rng.standard_normal((case.m, case.k)) * np.exp2(rng.integers(-3, 4, (case.m, 1)))
        blocks = np.exp2(rng.integers(-2, 3, (case.m, -(-case.k // 16))))
        x *= np.repeat(blocks, 16, axis=1)[:, : case.k]
        w = rng.standard_normal((case.n, case.k)) * np.exp2(rng.integers(-6, -1, (case.n, 1)))
        if bad_row is not None:
            x[bad_row, case.k // 2] = np.nan
        if bad_column is not None:
            w[bad_column, case.k // 3] = np.nan
        stored = -(-case.n // 128) * 128
        x_scaling = "token" if case.x_stride == 1 else "tensor"
        w_scaling = "token" if case.w_stride == 1 else "tensor"
        if config in W4A4:
            self.x, self.sfx, self.x_scale, x_exact = operand(x.astype(F32), case.m, x_scaling)
            if case.x_stride < 0:
                x_exact = x_exact / self.x_scale.astype(np.float64)[:, None]
                self.x_scale = None
        else:
            x16 = np.pad(x, [(0, 0), (0, -case.k % 64)]).astype(config.x_dtype)
            self.x, self.sfx, self.x_scale = x16, None, None
            x_exact = x16[:, : case.k].astype(np.float64)
        self.w, self.sfw, self.w_scale, w_exact = operand(w.astype(F32), stored, w_scaling)
        self.bias, bias = None, None
        if case.bias >= 0:
            self.bias = rng.standard_normal(case.n).astype(DTYPES[case.bias])
            bias = self.bias.astype(np.float64)
        self.w_values = w_exact
        self.exact, self.magnitude = oracle.linear(x_exact, w_exact, bias)

    def run(self, config, schedule_seed=0):
        """y of the config's kernel: its host code, its launches on the PTX machine."""
        c = self.case
        y = np.full((c.m, c.n), np.nan, DTYPES[c.out])
        problem = GemmProblem(c.m, c.n, c.k, "sm_120f", config.x_dtype)
        needed = scratch_bytes(config, problem, c.split_k, c.num_sms)
        scratch = np.full(needed, 0xFF, np.uint8) if needed else None
        pointers = (self.x, self.sfx, self.w, self.sfw, self.x_scale, self.w_scale, self.bias, y)
        pointers = [None if p is None or not p.size else p for p in pointers]
        integers = (c.m, c.n, c.k, c.x_stride, c.w_stride, c.bias, c.out, c.split_k, c.num_sms)
        run_object(
            kernel_objects.folder() / f"{config.name}.o",
            ptx(config),
            [*pointers, scratch, *integers],
            uninitialized=[a for a in (scratch,) if a is not None],
            schedule_seed=schedule_seed,
        )
        return y

    def check(self, config, schedule_seed=0):
        """Runs, holds y to the oracle and returns it."""
        y = self.run(config, schedule_seed)
        oracle.assert_linear_close(y, self.exact, self.magnitude, self.case.k)
        return y


@functools.cache
def ptx(config):
    return (kernel_objects.folder() / f"{config.name}.ptx").read_text()


# Names say what a case is there for; all are ragged unless they say otherwise.
CASES = {
    PINGPONG: {
        "one-stage-part": Case(5, 8, 16),
        "one-full-tile-above-all-stages": Case(128, 128, 896),
        "four-tiles-on-one-cta": Case(130, 200, 704, num_sms=1, out=OUT_F16, bias=OUT_F32,
                                      x_stride=1, w_stride=1),
        "three-waves": Case(300, 264, 320, x_stride=1, bias=OUT_BF16),
        "odd-rows-f32": Case(3, 67, 128, out=OUT_F32, bias=OUT_BF16),
        "odd-rows-f16": Case(130, 129, 640, num_sms=3, out=OUT_F16, bias=OUT_F16, x_stride=-1,
                             w_stride=1),
        "split": Case(40, 130, 1152, split_k=3, bias=OUT_F16, x_stride=1),
        "split-uneven-on-one-cta": Case(260, 140, 700, num_sms=1, split_k=4, out=OUT_F32,
                                        bias=OUT_BF16, x_stride=1, w_stride=1),
        "split-with-empty-parts": Case(7, 20, 384, split_k=8, out=OUT_F16, bias=OUT_F32),
        "sweeps-of-row-tiles": Case(2100, 136, 64, num_sms=3, out=OUT_F16, w_stride=1),
    },
    STREAM_16: {
        "one-stage-part": Case(1, 64, 48),
        "full-tiles-above-all-stages": Case(16, 256, 2560, num_sms=3),
        "eight-tiles-on-one-cta": Case(17, 129, 700, num_sms=1, out=OUT_F16, bias=OUT_F32,
                                       x_stride=1, w_stride=1),
        "rows-of-two-scale-tiles": Case(150, 40, 80, num_sms=4, bias=OUT_F16, x_stride=1),
        "f32": Case(3, 67, 320, out=OUT_F32, bias=OUT_BF16, w_stride=1),
        "split": Case(5, 67, 4000, num_sms=3, split_k=3, bias=OUT_BF16, x_stride=-1, w_stride=1),
        "split-with-empty-parts": Case(20, 130, 384, split_k=4, out=OUT_F32, x_stride=1),
    },
    STREAM_64: {
        "one-stage-part": Case(2, 10, 16),
        "full-tiles-above-all-stages": Case(64, 128, 1792),
        "six-tiles-on-one-cta": Case(130, 129, 704, num_sms=1, out=OUT_F16, bias=OUT_F32,
                                     x_stride=1, w_stride=1),
        "f32": Case(33, 67, 320, out=OUT_F32, bias=OUT_BF16, w_stride=1),
        "split": Case(100, 67, 2048, num_sms=3, split_k=3, bias=OUT_F16, x_stride=1, w_stride=1),
    },
    WEIGHT_ONLY_BF16: {
        "one-stage-part": Case(1, 64, 48, x_stride=-1),
        "full-tiles-above-all-stages": Case(16, 256, 1792, num_sms=3, x_stride=-1),
        "waves-on-one-cta": Case(25, 129, 700, num_sms=1, out=OUT_F16, bias=OUT_F32, x_stride=-1,
                                 w_stride=1),
        "f32": Case(9, 67, 320, out=OUT_F32, bias=OUT_BF16, x_stride=-1, w_stride=1),
        "split": Case(5, 67, 2100, num_sms=3, split_k=3, bias=OUT_BF16, x_stride=-1, w_stride=1),
    },
    WEIGHT_ONLY_F16: {
        "full-tiles-above-all-stages": Case(16, 256, 1792, num_sms=3, out=OUT_F16, x_stride=-1),
        "waves-on-one-cta": Case(25, 129, 700, num_sms=1, bias=OUT_F32, x_stride=-1, w_stride=1),
        "split": Case(8, 67, 2100, num_sms=3, split_k=3, out=OUT_F32, x_stride=-1, w_stride=1),
    },
}  # fmt: skip


def label(config):
    """A short name of a config for test ids."""
    return config.name.removeprefix("gemm_sm120f_")


RUNS = [pytest.param(c, case, id=f"{label(c)}-{name}")
        for c, cases in CASES.items() for name, case in cases.items()]  # fmt: skip
KINDS = [pytest.param(c, id=label(c)) for c in sm120.CONFIGS]


@pytest.mark.parametrize(("config", "case"), RUNS)
def test_matches_the_oracle(config, case):
    """Three orders of warps and copies: within the bound, and the same bits."""
    problem = Problem(case, config)
    first = problem.check(config)
    for seed in (1, 2):
        again = problem.run(config, schedule_seed=seed)
        assert np.array_equal(first.view(np.uint8), again.view(np.uint8)), f"schedule seed {seed}"


@pytest.mark.parametrize("config", KINDS[:3])
def test_from_the_quantize_kernel_to_y(config):
    """x goes through the quantize kernel of this arch, whose bytes the GEMM takes as they are."""
    case = Case(40, 72, 400, bias=OUT_F32, x_stride=1)
    problem = Problem(case)
    x = np.random.default_rng(1).standard_normal((case.m, case.k)).astype(ml_dtypes.bfloat16)
    quantize = select_quantize("sm_120f", "bfloat16", Mode.TOKEN)
    data = np.full_like(problem.x, 0xCD)
    scales = np.full_like(problem.sfx, 0xCD)
    g = np.full(case.m, np.nan, np.float32)
    given = np.full(1, np.nan, np.float32)
    run_object(
        kernel_objects.folder() / f"{quantize.name}.o",
        (kernel_objects.folder() / f"{quantize.name}.ptx").read_text(),
        [x, given, data, scales, g, None, case.m, case.k, X_DTYPES.index("bfloat16"), Mode.TOKEN,
         OutFormat.OPERAND, 4],
    )  # fmt: skip
    problem.x, problem.sfx, problem.x_scale = data, scales, g
    values = oracle.dequantize(*oracle.quantize(x, "token"), k=case.k)
    w = problem.w_values
    problem.exact, problem.magnitude = oracle.linear(values, w, problem.bias)
    problem.check(config)


@pytest.mark.parametrize("config", KINDS)
def test_a_bad_block_stays_in_its_row_and_column(config):
    """A NaN makes its own row or column of y NaN and leaves the bits of the others."""
    case = Case(20, 72, 320, out=OUT_F32, x_stride=1 if config in W4A4 else -1, w_stride=1)
    good = Problem(case, config).run(config)
    bad = Problem(case, config, bad_row=9, bad_column=50).run(config)
    hit = (np.arange(20) == 9)[:, None] | (np.arange(72) == 50)
    assert np.isnan(bad[hit]).all()
    assert np.array_equal(bad[~hit], good[~hit])


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("split_k", [1, 2])
def test_without_k_y_is_the_bias(config, split_k):
    x_stride = 0 if config in W4A4 else -1
    case = Case(5, 40, 0, out=OUT_F32, bias=OUT_BF16, split_k=split_k, x_stride=x_stride)
    problem = Problem(case, config)
    y = problem.run(config)
    assert np.array_equal(y, np.tile(problem.bias.astype(np.float32), (5, 1)))


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize(("m", "n"), [(0, 40), (5, 0)])
def test_nothing_to_compute(config, m, n):
    for split_k in (1, 2):
        case = Case(m, n, 320, split_k=split_k, x_stride=0 if config in W4A4 else -1)
        assert Problem(case, config).run(config).shape == (m, n)


def test_rows_do_not_depend_on_the_batch():
    """The batch-invariant config: a row has the same bits alone and anywhere in a batch."""
    config, split_k = select(GemmProblem(1, 72, 1088, "sm_120f", "e2m1", batch_invariant=True), 170)
    whole = Problem(Case(150, 72, 1088, out=OUT_F32, x_stride=1, split_k=split_k))
    y = whole.run(config)
    rows = np.random.default_rng(0).permutation(150)[:40]
    for picked in (rows, np.array([140])):
        part = Problem(dataclasses.replace(whole.case, m=len(picked)))
        part.x, part.x_scale = whole.x[picked], whole.x_scale[picked]
        part.w, part.sfw, part.w_scale = whole.w, whole.sfw, whole.w_scale
        part.sfx = swizzle(unswizzle(whole.sfx, 150, 1088 // 16)[picked], len(picked))
        assert np.array_equal(part.run(config), y[picked])


MUTATIONS = {
    "rows' scales from other lanes": (r"\{0,1\}, (\{%r\d+\}, \{0,\d\};)", r"{0,0}, \1"),
    "columns' scales from other lanes": (r"\{0,1\};", "{0,0};"),
    "phases not told apart": (r"(xor\.b32 \s*%r\d+, (%r\d+), )%r\d+;", r"\g<1>\g<2>;"),
    "more bytes expected": (r"(mov\.b32 \s*%r\d+, )(18432|12288|19456);", r"\g<1>\g<2>0;"),
    "stages not given back": (r"mbarrier\.arrive\.shared\.b64[^;]*;", ""),
    "chunks not permuted": (r"xor\.b32( \s*%r\d+, %r\d+, (32|64));", r"add.s32\1;"),
}


@pytest.mark.parametrize("config", KINDS[:3])
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_in_the_kernel_is_seen(config, name, monkeypatch):
    """The checks above can fail: each of these mutations of the PTX is caught."""
    mutated, count = re.subn(*MUTATIONS[name], ptx(config))
    assert count
    monkeypatch.setitem(globals(), "ptx", lambda _: mutated)
    with pytest.raises((PtxError, AssertionError)):
        Problem(Case(40, 40, 256 * 10, num_sms=1)).check(config)


PROBLEMS = [
    (m, n, k)
    for m in (1, 16, 17, 64, 65, 128, 129, 256, 1000, 4096, 100_000)
    for n, k in [(1, 1), (128, 4096), (4096, 4096), (8192, 28672), (57344, 8192), (24576, 1536)]
]


@pytest.mark.parametrize("num_sms", [170, 188, 48])
def test_selection(num_sms):
    chosen = set()
    for m, n, k in PROBLEMS:
        problem = GemmProblem(m, n, k, "sm_120f", "e2m1")
        config, split_k = select(problem, num_sms)
        chosen.add(config)
        assert 1 <= split_k <= config.split_k
        assert split_k == 1 or -(-k // config.tile_k) >= config.stages * split_k
        needed = scratch_bytes(config, problem, split_k, num_sms)
        assert needed == (4 * split_k * m * (-(-n // 4) * 4) if split_k > 1 else 0)
    assert chosen == set(W4A4)


def test_selection_for_16_bit_x():
    """A kernel for few rows; many rows, and the batch-invariant promise, are XLA's."""
    for config in (WEIGHT_ONLY_BF16, WEIGHT_ONLY_F16):
        for m, n, k in PROBLEMS:
            problem = GemmProblem(m, n, k, "sm_120f", config.x_dtype)
            if m <= 64:
                assert serves(problem, 188)
                chosen, split_k = select(problem, 188)
                assert chosen == config
                assert split_k == 1 or -(-k // config.tile_k) >= config.stages * split_k
            else:
                assert not serves(problem, 188)
        assert not serves(GemmProblem(1, 8, 64, "sm_120f", config.x_dtype, True), 188)


def test_batch_invariant_selection_depends_on_the_weight_alone():
    for n, k in {(n, k) for _, n, k in PROBLEMS}:
        choices = {
            select(GemmProblem(m, n, k, "sm_120f", "e2m1", batch_invariant=True), num_sms)
            for m, _, _ in PROBLEMS
            for num_sms in (48, 170, 188)
        }
        assert len(choices) == 1


@pytest.mark.parametrize("config", KINDS)
def test_machine_code(config):
    """Block-scaled MMAs and TMA in the machine code, nothing spilled, within shared memory."""
    (entry,) = [k for k in kernel_objects.manifest()["kernels"] if k["name"] == config.name]
    assert entry["stack_bytes"] == entry["local_bytes"] == 0
    code = kernel_objects.sass(config.name)
    scaled, bf16 = r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\.UE4M3\.4X", r"HMMA\.16816\.F32\.BF16"
    mma, count, loads = {
        PINGPONG: (scaled, 2 * 4 * 8, 4),
        STREAM_16: (scaled, 4 * 2, 4),
        STREAM_64: (scaled, 4 * 8, 4),
        WEIGHT_ONLY_BF16: (bf16, 4 * 4 * 2, 3),
        WEIGHT_ONLY_F16: (r"HMMA\.16816\.F32 ", 4 * 4 * 2, 3),
    }[config]
    assert len(re.findall(mma, code)) == count
    assert len(re.findall(r"UTMALDG\.[23]D", code)) == loads
    assert re.search(r"LDSM\.16\.M88\.4", code)
    assert not re.search(r"\b(STL|LDL)\b", code)


@pytest.mark.parametrize("config", KINDS)
def test_shared_memory(config):
    problem = Problem(Case(1, 8, 64, x_stride=-1), config)
    y = np.zeros((1, 8), np.float32)
    arrays = [problem.x, problem.sfx, problem.w, problem.sfw, None, problem.w_scale, None, y, None]
    (launch,) = record_launches(
        kernel_objects.folder() / f"{config.name}.o",
        ptx(config),
        [*arrays, 1, 8, 64, -1, 0, -1, OUT_F32, 1, 188],
        GlobalMemory(),
    )
    assert launch.cluster == (1, 1, 1)
    assert 0.85 * sm120.SHARED_BYTES <= launch.dynamic_smem <= sm120.SHARED_BYTES
