# SPDX-License-Identifier: Apache-2.0
"""Gated and grouped GEMM kernels on a GPU: against float64, against each other, poisoned, large."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from jax_nvfp4 import config
from jax_nvfp4 import custom_calls as ffi
from jax_nvfp4.config import Gate, GemmProblem, Scaling
from jax_nvfp4.config.quantize import select_quantize
from jax_nvfp4.layout.orders import order

if jax.default_backend() != "gpu" or "sm_90a" not in ffi.arches():
    pytest.skip("the default device is no GPU with sm_90a kernels", allow_module_level=True)

ARCH = "sm_90a"
SMS = jax.devices()[0].core_count
BUILT = [c for c in config.configs(ARCH) if c.name in ffi.kernels(ARCH)]
GATED = [c for c in BUILT if c.epilogue == "gated" and not c.grouped]
GROUPED = [c for c in BUILT if c.grouped]
SIGMOID_OF_TANH = 2 * np.sqrt(2 / np.pi)
GATES = (
    Gate(),
    Gate(limit=7.0, alpha=1.702, beta=1.0),
    Gate(alpha=SIGMOID_OF_TANH, cubic=SIGMOID_OF_TANH * 0.044715),
)


def name_of(c: config.GemmConfig) -> str:
    return c.name


@dataclasses.dataclass
class Weights:
    """Random weights of some groups: repacked, and their float64 values and scales."""

    parts: tuple[jax.Array, jax.Array]
    w_scale: np.ndarray
    bias: np.ndarray
    values: np.ndarray
    gated: bool

    @classmethod
    def random(cls, rng: Any, groups: int, n: int, k: int, gated: bool) -> "Weights":
        data = rng.integers(0, 256, (groups, n, k // 2), dtype=np.uint8)
        bits = rng.integers(0x20, 0x48, (groups, n, k // 16), dtype=np.uint8)
        scales = bits.view(ml_dtypes.float8_e4m3fn)
        packed = [order(ARCH).pack(d, s, gated=gated) for d, s in zip(data, scales, strict=True)]
        w_scale = rng.uniform(0.002, 0.02, (groups, n)).astype(np.float32)
        bias = rng.standard_normal((groups, n)).astype(np.float32)
        parts = tuple(jnp.asarray(np.stack(p)) for p in zip(*packed, strict=True))
        values = oracle.block_values(oracle.unpack(data), bits)
        return cls(parts, w_scale, bias, values, gated)

    def operands(self, group: int | None = None) -> dict[str, Any]:
        """Operands of all groups, or of one by itself."""
        w_scale = self.w_scale
        if self.gated:
            w_scale = order(ARCH).gated.interleave(w_scale, -1)
        all_of = {"w": self.parts[0], "sfw": self.parts[1], "w_scale": w_scale, "bias": self.bias}
        pick = (lambda a: a) if group is None else (lambda a: a[group])
        return {name: jnp.asarray(pick(a)) for name, a in all_of.items()}


def exact(x: np.ndarray, x_scale: np.ndarray, w: Weights, group: int, gate: Gate) -> Any:
    """y in float64, and how far float32 sums and an activation may be from it."""
    alpha = x_scale.astype(np.float64)[:, None] * w.w_scale[group].astype(np.float64)
    x64, values = x.astype(np.float64), w.values[group]
    z = alpha * (x64 @ values.T) + w.bias[group]
    error = 2.0**-18 * alpha * (np.abs(x64) @ np.abs(values).T)
    if not w.gated:
        return z, error
    error = error + 2.0**-23 * np.abs(z)
    (g, u), (ge, ue) = np.split(z, 2, axis=1), np.split(error, 2, axis=1)
    g, u = np.minimum(g, gate.limit), np.clip(u, -gate.limit, gate.limit)
    with np.errstate(over="ignore"):
        share = 1 / (1 + np.exp(-g * (gate.alpha + gate.cubic * g**2)))
    reach = np.abs(u) + abs(gate.beta)
    # The slope of g * share is at most 1.13; exponential and reciprocal are good to 2^-21 together.
    error = 1.13 * ge * reach + np.abs(g) * ue + 2.0**-21 * np.abs(g) * reach
    return g * share * (u + gate.beta), error


def assert_close(y: Any, expected: tuple[np.ndarray, np.ndarray]) -> None:
    value, error = expected
    bound = oracle.ulp(value, y.dtype) / 2 + error
    difference = np.abs(np.asarray(y).astype(np.float64) - value)
    assert (difference <= bound).all(), (difference - bound).max()


def groups_of(sizes: Any, m: int) -> list[tuple[int, int]]:
    ends = np.minimum(np.cumsum(np.maximum(np.asarray(sizes, np.int64), 0)), m)
    return list(zip([0, *ends[:-1]], ends, strict=True))


@functools.partial(jax.jit, static_argnames=("config", "split_k", "n", "out_dtype", "gate"))
def call(x: Any, x_scale: Any, operands: Any, groups: Any = None, **static: Any) -> jax.Array:
    return ffi.gemm_call(
        x, None, operands["w"], operands["sfw"], x_scale, operands["w_scale"], operands["bias"],
        num_sms=SMS, groups=groups, **static,
    )  # fmt: skip


def activations(rng: Any, m: int, k: int, dtype: str = "bfloat16") -> tuple[np.ndarray, np.ndarray]:
    x = rng.standard_normal((m, k)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return x, rng.uniform(0.5, 2, m).astype(np.float32)


def check_groups(y: Any, x: Any, x_scale: Any, w: Weights, sizes: Any, offset: int, gate: Gate):
    y, used = np.asarray(y), np.zeros(len(x), bool)
    for number, (begin, end) in enumerate(groups_of(sizes, len(x))):
        group = number - offset
        if begin < end and 0 <= group < len(w.values):
            rows = slice(begin, end)
            assert_close(y[rows], exact(x[rows], x_scale[rows], w, group, gate))
            used[rows] = True
    assert not y[~used].view(np.uint8).any()


@pytest.mark.parametrize("c", GATED, ids=name_of)
def test_each_gated_kernel(c: config.GemmConfig) -> None:
    rng = np.random.default_rng(0)
    for i, (m, half, k) in enumerate([(1, 64, 128), (c.tile_m + 3, 353, 1088), (70, 1856, 320)]):
        w = Weights.random(rng, 1, 2 * half, k, True)
        x, x_scale = activations(rng, m, k)
        for split in range(1, c.split_k + 1):
            static = {"config": c, "split_k": split, "n": 2 * half, "gate": GATES[i]}
            out = ("bfloat16", "float32", "float16")[i]
            y = call(x, x_scale, w.operands(0), out_dtype=out, **static)
            assert_close(np.asarray(y), exact(x, x_scale, w, 0, GATES[i]))


@pytest.mark.parametrize("c", GROUPED, ids=name_of)
def test_each_grouped_kernel(c: config.GemmConfig) -> None:
    """Groups of all kinds; sums of sizes below, at and beyond the rows; a part of the groups."""
    rng = np.random.default_rng(1)
    gated = c.epilogue == "gated"
    n, k = 2 * 232, 1088
    w = Weights.random(rng, 5, n, k, gated)
    tile = c.tile_m
    for i, (sizes, m, offset) in enumerate(
        [
            ([3, 0, tile + 2, 1, 2 * tile], 3 * tile + 20, 0),
            ([0, 0, -4, 0, 300], 140, 0),
            ([2, 5, 1, 0, 7, 9, 3, 3], 40, 2),
            ([1, 1, 1], 3, 7),
        ]
    ):
        x, x_scale = activations(rng, m, k, c.x_dtype)
        for split in range(1, c.split_k + 1):
            static = {"config": c, "split_k": split, "n": n, "gate": GATES[i % 3]}
            groups = (jnp.asarray(sizes, jnp.int32), jnp.asarray([offset], jnp.int32))
            y = call(x, x_scale, w.operands(), groups, out_dtype="bfloat16", **static)
            check_groups(y, x, x_scale, w, sizes, offset, GATES[i % 3])


def select(m: int, n: int, k: int, gated: bool, groups: int, invariant: bool = False) -> Any:
    epilogue = "gated" if gated else "plain"
    return config.select(GemmProblem(m, n, k, ARCH, "bfloat16", invariant, epilogue, groups), SMS)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m", [8, 100, 3000])
def test_batch_invariant_groups_have_the_bits_of_products_by_themselves(m: int, gated: bool):
    rng = np.random.default_rng(m)
    n, k, count = 1536, 1024, 6
    w = Weights.random(rng, count, n, k, gated)
    sizes = rng.multinomial(m, rng.dirichlet(np.ones(count)))
    x, x_scale = activations(rng, m, k)
    c, split = select(m, n, k, gated, count, invariant=True)
    static = {"n": n, "gate": GATES[1], "out_dtype": "bfloat16"}
    groups = (jnp.asarray(sizes, jnp.int32), jnp.zeros(1, jnp.int32))
    y = np.asarray(call(x, x_scale, w.operands(), groups, config=c, split_k=split, **static))
    for group, (begin, end) in enumerate(groups_of(sizes, m)):
        if begin < end:
            one, its_split = select(end - begin, n, k, gated, 0, invariant=True)
            assert its_split == split
            rows = slice(begin, end)
            alone = call(
                x[rows], x_scale[rows], w.operands(group), config=one, split_k=split, **static
            )
            np.testing.assert_array_equal(np.asarray(alone), y[rows])


@pytest.mark.parametrize("count", [1, 8, 128, 512])
def test_sizes_may_change_between_runs_of_one_program(count: int) -> None:
    """One executable, random sizes; what no group uses is poisoned with NaN."""
    rng = np.random.default_rng(count)
    m, n, k = 64, 256, 256
    w = Weights.random(rng, count, n, k, True)
    x, x_scale = activations(rng, m, k)
    for c, split in (select(m, n, k, True, count), select(m, n, k, True, count, invariant=True)):
        for trial in range(6):
            total = (m, m - 5, 1, 0, m, m + 9)[trial]
            sizes = rng.multinomial(total, rng.dirichlet(np.full(count, 0.3)))
            operands = w.operands()
            unused = jnp.asarray(sizes == 0)
            operands["w_scale"] = jnp.where(unused[:, None], jnp.nan, operands["w_scale"])
            of_group = unused.reshape(-1, *[1] * (operands["sfw"].ndim - 1))
            operands["sfw"] = jnp.where(of_group, jnp.uint8(255), operands["sfw"])
            poisoned, poisoned_scale = np.array(x), np.array(x_scale)
            poisoned[total:], poisoned_scale[total:] = np.nan, np.nan
            groups = (jnp.asarray(sizes, jnp.int32), jnp.zeros(1, jnp.int32))
            y = call(
                poisoned, poisoned_scale, operands, groups,
                config=c, split_k=split, n=n, gate=GATES[0], out_dtype="bfloat16",
            )  # fmt: skip
            check_groups(y, x, x_scale, w, sizes, 0, GATES[0])


def test_the_last_of_weights_beyond_two_gigabytes() -> None:
    rng = np.random.default_rng(4)
    n, k, count = 4096, 8192, 130
    w = Weights.random(rng, 1, n, k, False)
    last = {name: a.reshape(1, *a.shape[1:]) for name, a in w.operands().items()}
    whole = {
        name: jnp.concatenate([jnp.zeros((count - 1, *a.shape[1:]), a.dtype), a])
        for name, a in last.items()
    }
    assert whole["w"].nbytes > 2**31
    sizes = np.zeros(count, np.int32)
    sizes[-1] = 3
    x, x_scale = activations(rng, 3, k)
    c, split = select(3, n, k, False, count)
    groups = (jnp.asarray(sizes), jnp.zeros(1, jnp.int32))
    y = call(x, x_scale, whole, groups, config=c, split_k=split, n=n, out_dtype="float32")
    assert_close(np.asarray(y), exact(x, x_scale, w, 0, GATES[0]))


@pytest.mark.parametrize("scaling", [Scaling.TOKEN, Scaling.STATIC_ROWS])
def test_one_call_quantizes_and_multiplies(scaling: Scaling) -> None:
    rng = np.random.default_rng(5)
    m, n, k, count = 40, 512, 512, 8
    w = Weights.random(rng, count, n, k, True)
    x = rng.standard_normal((m, k)).astype(ml_dtypes.bfloat16)
    given = rng.uniform(1e-3, 2e-3, m).astype(np.float32)
    if scaling == Scaling.TOKEN:
        codes, bits, x_scale = oracle.quantize(x, scaling="token")
    else:
        codes, bits, x_scale = by_rows(x, given)
    values = oracle.block_values(codes, bits)
    sizes = rng.multinomial(m - 4, np.ones(count) / count)
    c, split = select(m, n, k, True, count)
    operands = w.operands()
    y = jax.jit(
        lambda x, sizes: ffi.linear_call(
            x, None if scaling == Scaling.TOKEN else jnp.asarray(given),
            *(operands[name] for name in ("w", "sfw", "w_scale", "bias")),
            quantize_config=select_quantize(ARCH, "bfloat16", scaling), scaling=scaling,
            gemm_config=c, split_k=split, n=n, out_dtype="bfloat16", num_sms=SMS, gate=GATES[2],
            groups=(sizes, jnp.zeros(1, jnp.int32)),
        )
    )(x, jnp.asarray(sizes, jnp.int32))  # fmt: skip
    check_groups(y, values, x_scale, w, sizes, 0, GATES[2])


def by_rows(x: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scale bits and global scales of rows that each have a given one."""
    parts = [oracle.quantize(row[None], global_scale=g) for row, g in zip(x, given, strict=True)]
    return *(np.concatenate([p[i] for p in parts]) for i in range(2)), given
