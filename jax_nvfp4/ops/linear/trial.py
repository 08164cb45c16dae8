# SPDX-License-Identifier: Apache-2.0
"""A kernel's first use on a device: it multiplies a few tiles, and is held to the reference.

That is for kernels which have never run on hardware of their kind: one that does not launch there,
or is wrong, is passed over, with a warning, for the next that serves the call, and last for pure
JAX. It happens while a program is lowered, once in a process, and never when it runs.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_nvfp4.activations import SwiGLU
from jax_nvfp4.config import GemmConfig, OutFormat, Scaling
from jax_nvfp4.config.limits import Limits
from jax_nvfp4.config.quantize import BLOCK
from jax_nvfp4.integers import ceil_div
from jax_nvfp4.ops import device
from jax_nvfp4.ops.linear.plan import LinearPlan
from jax_nvfp4.ops.linear.reference import reference
from jax_nvfp4.ops.linear.spec import Groups, LinearSpec, Operands
from jax_nvfp4.ops.quantize.plan import plan as plan_quantize

GROUPS = 2
_TOLERANCE = 2.0**-8
"""Of the result's root mean square. One wrong element of the hundreds in a sum shows; what the
order of a sum and approximations of an activation change is far less.
"""

Multiply = Callable[[Operands, LinearPlan, Groups], jax.Array]
"""Carries out a plan."""


def usable(decide: Callable[[], LinearPlan], multiply: Multiply, *, per_row: bool) -> LinearPlan:
    """The first plan whose kernels are right on this machine's GPU.

    Args:
        decide: makes the plan, without the kernels that the device's limits call unusable.
        multiply: carries out a plan.
        per_row: the scale or amax of x that is given, if any, is one for each row.
    """
    while True:
        chosen = decide()
        if chosen.gemm is None or not device.to_be_tried(chosen.arch):
            return chosen
        if (fault := fault_of(chosen, multiply, per_row=per_row)) is None:
            return chosen
        device.pass_over(chosen.gemm.name, fault)


def fault_of(chosen: LinearPlan, multiply: Multiply, *, per_row: bool) -> str | None:
    """What is wrong with a plan's kernels on this machine's GPU, if anything.

    Args:
        chosen: the plan; it has a kernel.
        multiply: as for `usable`.
        per_row: likewise.
    """
    return _fault(_few_tiles(chosen), multiply, per_row)


def plan_of(gemm: GemmConfig, split_k: int, limits: Limits) -> LinearPlan:
    """A plan that runs a kernel, of some problem that the kernel takes.

    Args:
        gemm: the kernel.
        split_k: in how many parts it is to split K.
        limits: of the device.
    """
    codes = gemm.x_dtype == "e2m1"
    gated = gemm.epilogue == "gated"
    scaling = Scaling.TOKEN if codes else Scaling.NONE
    activation = SwiGLU(limit=2.0) if gated else None
    spec = LinearSpec(None, 0, 0, scaling, False, "float32", False, gated, activation)
    x_dtype = "bfloat16" if codes else gemm.x_dtype
    quantize = None
    if codes:
        quantize = plan_quantize(
            scaling,
            (gemm.tile_m, 4 * gemm.tile_k),
            x_dtype,
            per_row=False,
            arch=gemm.arch,
            limits=limits,
            out_format=OutFormat.for_gemm(gemm.x_dtype),
        )
    return LinearPlan(
        spec, 1, x_dtype, gemm.arch, limits.num_sms, "", gemm, split_k, quantize, one_call=codes
    )


def _few_tiles(chosen: LinearPlan) -> LinearPlan:
    """The same kernels for a problem of a few tiles, none of them full."""
    gemm = chosen.gemm
    assert gemm is not None
    spec = dataclasses.replace(
        chosen.spec,
        arch=None,
        n=2 * gemm.tile_n + 24,
        k=(2 * chosen.split_k + 1) * max(gemm.tile_k, 128) - 2 * BLOCK,
        has_bias=False,
        out_dtype="float32",
    )
    return dataclasses.replace(chosen, spec=spec, m=gemm.tile_m + 3, reason="")


@functools.cache
def _fault(trial: LinearPlan, multiply: Multiply, per_row: bool) -> str | None:
    return device.apart(lambda: _try(trial, multiply, per_row))


def _try(trial: LinearPlan, multiply: Multiply, per_row: bool) -> str | None:
    gemm = trial.gemm
    assert gemm is not None
    parts, groups = _operands(trial, per_row)
    whole = parts[0] if groups.sizes is None else _joined(parts)
    y, fault = device.run_on_gpu(lambda x, groups: multiply(x, trial, groups), whole, groups)
    if fault is not None:
        return fault
    of_part = functools.partial(reference, spec=trial.spec)
    expected = np.concatenate([device.run_on_host(of_part, *part.flat())[0] for part in parts])
    difference = np.max(np.abs(y - expected))
    if difference <= _TOLERANCE * np.sqrt(np.mean(np.square(expected))):
        return None
    return f"it is wrong: a result differs by {difference:.3g} from what pure JAX gives"


def _operands(trial: LinearPlan, per_row: bool) -> tuple[list[Operands], Groups]:
    """Random operands, of each group its own, and the groups, if any."""
    spec, gemm = trial.spec, trial.gemm
    assert gemm is not None
    rng = np.random.default_rng(0)
    blocks = ceil_div(spec.k, BLOCK)
    x = rng.standard_normal((trial.m, spec.k)).astype(jnp.dtype(trial.x_dtype))
    amax = np.abs(x.astype(np.float32)).max(-1 if per_row else None)
    given = np.asarray(amax / 2688 if spec.scaling == Scaling.STATIC else amax, np.float32)
    sizes = [trial.m] if not gemm.grouped else [trial.m - 1, *[1] * (GROUPS - 1)]
    parts, row = [], 0
    for size in sizes:
        rows = slice(row, row + size)
        row += size
        scale = rng.uniform(0.5, 2.0, (spec.n, blocks)).astype(ml_dtypes.float8_e4m3fn)
        parts.append(
            Operands(
                x[rows],
                rng.integers(0, 256, (spec.n, blocks * BLOCK // 2), np.uint8),
                scale,
                np.float32(rng.uniform(0.01, 0.02)),
                None,
                (given[rows] if per_row else given) if spec.scaling.given else None,
            )
        )
    if not gemm.grouped:
        return parts, Groups(None, None)
    return parts, Groups(jnp.asarray(sizes, jnp.int32), jnp.zeros(1, jnp.int32))


def _joined(parts: list[Operands]) -> Operands:
    """The operands of all groups: rows one behind another, weights on a leading axis."""
    given = parts[0].scale_or_amax
    data, block_scale, w_scale = (
        np.stack(values) for values in zip(*(part.weight for part in parts), strict=True)
    )
    return Operands(
        np.concatenate([part.x for part in parts]),
        data,
        block_scale,
        w_scale,
        None,
        np.concatenate([p.scale_or_amax for p in parts])
        if given is not None and given.ndim
        else given,
    )
