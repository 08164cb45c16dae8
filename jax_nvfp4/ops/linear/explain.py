# SPDX-License-Identifier: Apache-2.0
"""The public `explain`: which kernels serve a call of `linear`, and why."""

import dataclasses
import math
from typing import Any

import jax
from jax.typing import ArrayLike, DTypeLike

from jax_nvfp4 import custom_calls
from jax_nvfp4.activations import Activation
from jax_nvfp4.config import ARCHES, REFERENCE, runnable_arches
from jax_nvfp4.ops import checks, device
from jax_nvfp4.ops.checks import ActivationScale
from jax_nvfp4.ops.linear.api import checked
from jax_nvfp4.ops.linear.plan import LinearPlan, plan
from jax_nvfp4.ops.linear.spec import LinearSpec
from jax_nvfp4.tensor import FLOAT_NAMES, Nvfp4Tensor, RepackedWeight


def explain(
    x: ArrayLike | jax.ShapeDtypeStruct,
    weight: Nvfp4Tensor | RepackedWeight,
    bias: ArrayLike | jax.ShapeDtypeStruct | None = None,
    *,
    activation: Activation | None = None,
    activation_scale: ActivationScale | jax.ShapeDtypeStruct = "token",
    out_dtype: DTypeLike | None = None,
    batch_invariant: bool = False,
    arch: str | None = None,
) -> LinearPlan:
    """Says what `linear` runs for these arguments; computes nothing.

    >>> print(nvfp4.explain(jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16), w, arch="sm_100f"))

    On a mesh it is the plan of the whole call; each device plans for its own part.

    Args:
        x: as for `linear`, or its shape and dtype.
        weight: as for `linear`; its parts may be shapes and dtypes.
        bias: as for `linear`, or its shape and dtype.
        activation: as for `linear`.
        activation_scale: as for `linear`, or the shape and dtype of a static scale.
        out_dtype: as for `linear`.
        batch_invariant: as for `linear`.
        arch: "sm_90a", "sm_100f", "sm_103a" or "sm_120f", to ask for a typical GPU of it, on any
            machine; "reference"; None for this machine's default device.

    Returns:
        The plan. `print` it; `kernels`, `calls`, `split_k`, `arch` and `reason` say the same to a
        program.

    Raises:
        TypeError: as `linear`.
        ValueError: as `linear`; or the arch is unknown, or does not read the weight's order.
    """
    how = (out_dtype, batch_invariant)
    spec, rows, x_dtype = _spec(x, weight, bias, activation, activation_scale, *how)
    arch, note = _here(spec) if arch is None else _named(spec, arch)
    chosen = plan(spec, rows, x_dtype, arch=arch, limits=device.limits(arch))
    if arch == REFERENCE and note:
        return dataclasses.replace(chosen, reason=note)
    if chosen.gemm is not None and note:
        return dataclasses.replace(chosen, reason=f"{chosen.reason} {note}")
    return chosen


def _spec(
    x: Any,
    weight: Any,
    bias: Any,
    activation: Any,
    activation_scale: Any,
    out_dtype: Any,
    batch_invariant: bool,
) -> tuple[LinearSpec, int, str]:
    """The spec of a call, the rows of x and its dtype; raises as `linear` does."""
    found = []

    def call(x: Any, weight: Any, bias: Any, scale: Any) -> None:
        scale = activation_scale if scale is None else scale
        found.append(checked(x, weight, bias, activation, scale, out_dtype, batch_invariant))

    def arrays(name: str, value: Any) -> Any:
        abstract = isinstance(value, jax.ShapeDtypeStruct)
        return value if abstract else checks.as_array(name, value, FLOAT_NAMES)

    is_abstract = isinstance(activation_scale, jax.ShapeDtypeStruct)
    jax.eval_shape(
        call,
        arrays("x", x),
        weight,
        None if bias is None else arrays("bias", bias),
        activation_scale if is_abstract else None,
    )
    ((operands, spec),) = found
    return spec, math.prod(operands.x.shape[:-1]), operands.x.dtype.name


def _here(spec: LinearSpec) -> tuple[str, str]:
    """The arch whose kernels this machine's default device runs, and why there are none."""
    local = jax.local_devices()[0]
    if local.platform != "gpu":
        return REFERENCE, (
            f"The default device is a {local.device_kind}, for which there are no kernels; name an "
            f"arch to see what a GPU runs, as explain(..., arch='sm_90a') for an H100, with a "
            f"weight that is not repacked, or repacked for it."
        )
    if spec.arch == REFERENCE:
        return REFERENCE, _IN_REFERENCE_ORDER
    arch = device.kernel_arch(spec.arch)
    if arch is None:
        wanted = spec.arch or device.local_arch()
        return REFERENCE, custom_calls.reason(wanted) if wanted != REFERENCE else ""
    return arch, ""


def _named(spec: LinearSpec, arch: str) -> tuple[str, str]:
    """The arch that the user names, and what keeps this machine from running its kernels."""
    if arch not in (*ARCHES, REFERENCE):
        raise ValueError(
            f"arch must be one of {', '.join((*ARCHES, REFERENCE))} (sm_90a: H100 and H200, "
            f"sm_100f: B200, sm_103a: B300, sm_120f: RTX 50, RTX PRO, DGX Spark); got {arch!r}"
        )
    if arch == REFERENCE:
        return arch, ""
    if spec.arch == REFERENCE:
        return REFERENCE, _IN_REFERENCE_ORDER
    if spec.arch is not None and spec.arch not in runnable_arches(arch):
        raise ValueError(
            f"the weight is repacked for {spec.arch}, whose order {arch} does not read; "
            f"repack it for {arch}"
        )
    missing = custom_calls.reason(arch)
    return arch, f"This installation cannot run it: {missing}." if missing else ""


_IN_REFERENCE_ORDER = (
    'The weight is repacked for "reference", an order that no kernel reads; ask with the weight '
    "before repack, or with repack(weight, arch=...)."
)
