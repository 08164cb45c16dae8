# SPDX-License-Identifier: Apache-2.0
"""A quantize kernel's first use on a device: its bits on a small matrix are the reference's.

As for `linear` (`ops/linear/trial.py`), and there is no second kernel: pure JAX takes its place.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_nvfp4.config import Scaling
from jax_nvfp4.ops import device
from jax_nvfp4.ops.quantize.plan import QuantizePlan
from jax_nvfp4.ops.quantize.reference import reference

SHAPE = (37, 272)

Call = Callable[[jax.Array, jax.Array | None, QuantizePlan], tuple[jax.Array, jax.Array, jax.Array]]
"""Carries out a plan that writes row-major scales."""


def usable(chosen: QuantizePlan, x_dtype: str, call: Call) -> bool:
    """Whether a plan's kernel gives the right bits on this machine's GPU."""
    name = chosen.config.name
    if name in device.limits(chosen.config.arch).unusable:
        return False
    if not device.to_be_tried(chosen.config.arch):
        return True
    if (fault := fault_of(chosen, x_dtype, call)) is None:
        return True
    device.pass_over(name, fault)
    return False


@functools.cache
def fault_of(chosen: QuantizePlan, x_dtype: str, call: Call) -> str | None:
    """What is wrong with a plan's kernel on this machine's GPU, if anything."""
    return device.apart(lambda: _try(chosen, x_dtype, call))


def _try(chosen: QuantizePlan, x_dtype: str, call: Call) -> str | None:
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(jnp.dtype(x_dtype))
    given: Any = None
    if chosen.scaling.given:
        given = np.abs(x.astype(np.float32)).max(-1 if chosen.scaling.per_row else None)
        given = np.asarray(given / 2688 if chosen.scaling.scale_given else given, np.float32)
    found, fault = device.run_on_gpu(lambda x, given: call(x, given, chosen), x, given)
    if fault is not None:
        return fault
    plain = {Scaling.STATIC_ROWS: Scaling.STATIC, Scaling.AMAX_ROWS: Scaling.AMAX}
    scaling = plain.get(chosen.scaling, chosen.scaling)
    expected = device.run_on_host(functools.partial(reference, scaling=scaling), x, given)
    wrong = sum(
        int(np.sum(part.reshape(-1).view(np.uint8) != right.reshape(-1).view(np.uint8)))
        for part, right in zip(found, expected, strict=True)
    )
    return f"it is wrong: {wrong} bytes differ from what pure JAX gives" if wrong else None
