# SPDX-License-Identifier: Apache-2.0
"""The host function of a GEMM: the package's GEMM signature, taken from its table."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver as cuda
from cutlass import Float32, Int32, Uint8, cute
from cutlass.cute.runtime import make_ptr

from jax_nvfp4.kernels.gemm.arguments import (
    Activation,
    Groups,
    HostCall,
    Operands,
    Output,
    Problem,
)
from jax_nvfp4.kernels.variant import ABI, FLOAT, INT, POINTER, STREAM

_TYPES = {POINTER: cute.Pointer, INT: Int32, FLOAT: Float32, STREAM: cuda.CUstream}
_SIGNATURE = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=_TYPES[c_type])
        for c_type, name in ABI["gemm"]
    ]
)


def host_function(launch: Callable[[HostCall], None]) -> Callable[..., None]:
    """A host function that launches by `launch`, and launches nothing where y is empty.

    Args:
        launch: launches the kernels of a call whose m and n are positive.
    """

    @cute.jit
    def launch_if_any(call):
        if call.problem.m > 0 and call.problem.n > 0:
            launch(call)

    def host(*values):
        launch_if_any(_call(dict(zip(_SIGNATURE.parameters, values, strict=True))))

    # The compiler asks a function for its signature; that of the C function is made from it.
    host.__signature__ = _SIGNATURE
    return cute.jit(host, preprocess=False)


def _call(values: dict[str, Any]) -> HostCall:
    """The parameters of the host function, by what they are about."""

    def by_name(kind: type) -> Any:
        return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})

    groups = Groups(
        sizes=values["group_sizes"],
        offset=values["group_offset"],
        size_count=values["size_count"],
        count=values["group_count"],
        w_scale_stride=values["w_scale_group_stride"],
    )
    return HostCall(
        by_name(Operands),
        by_name(Output),
        values["scratch"],
        by_name(Problem),
        groups,
        by_name(Activation),
        values["split_k"],
        values["num_sms"],
        values["stream"],
    )


def example_args(x_dtype: Any = Uint8, scale_alignment: int = 4) -> tuple[Any, ...]:
    """Arguments that give the host function's parameters their types.

    Args:
        x_dtype: what x points to.
        scale_alignment: of x_scale and w_scale, in bytes.
    """
    elements = {
        "x": (x_dtype, 16),
        "x_scale": (Float32, scale_alignment),
        "w_scale": (Float32, scale_alignment),
        "group_sizes": (Int32, 4),
        "group_offset": (Int32, 4),
    }

    def pointer(name: str) -> Any:
        dtype, alignment = elements.get(name, (Uint8, 16))
        return make_ptr(dtype, 1024, cute.AddressSpace.gmem, assumed_align=alignment)

    examples = {
        POINTER: pointer,
        INT: lambda _: Int32(1),
        FLOAT: lambda _: Float32(1.0),
        STREAM: lambda _: cuda.CUstream(0),
    }
    return tuple(examples[c_type](name) for c_type, name in ABI["gemm"])
