# SPDX-License-Identifier: Apache-2.0
"""Small PTX kernels for tests of single instructions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .machine import Machine, launch

REGISTERS = """
    .reg .pred %p<16>;
    .reg .b16 %rs<32>;
    .reg .b32 %r<300>;
    .reg .b64 %rd<64>;
    .reg .b128 %rq<4>;
"""


def kernel(
    body: str,
    params: Sequence[str] = (),
    *,
    shared: str = "",
    target: str = "sm_100a",
    threads: int = 0,
) -> str:
    """PTX of a kernel ``k``.

    Args:
        body: instructions; registers %p, %rs, %r, %rd and %rq are declared.
        params: PTX types of the parameters ("u64", "b8[128]", ...), named p0, p1, ...
        shared: declarations of module scope.
        target: the target.
        threads: writes ``.maxntid`` when not 0.
    """
    declared = []
    for i, kind in enumerate(params):
        if kind == "tensormap":
            declared.append(f".param .align 64 .b8 p{i}[128]")
        else:
            declared.append(f".param .{kind} p{i}")
    limit = f".maxntid {threads}, 1, 1\n" if threads else ""
    return (
        f".version 8.8\n.target {target}\n.address_size 64\n{shared}\n"
        f".visible .entry k(\n{', '.join(declared)}\n)\n{limit}{{\n{REGISTERS}\n{body}\nret;\n}}\n"
    )


_WIDTH = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}
_REGISTER = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}


def lanewise(
    body: str, inputs: Sequence[np.ndarray], outputs: Sequence[type], *, target: str = "sm_100a"
) -> list[np.ndarray]:
    """Runs instructions on 32 lanes.

    Args:
        body: instructions that read ``{a0}``, ``{a1}``, ... and write ``{d0}``, ``{d1}``, ...;
            these are replaced by registers of the right width.
        inputs: arrays of up to 32 values, padded with their first.
        outputs: NumPy types of the results.
        target: the target.

    Returns:
        One array of 32 values per output.
    """
    arrays, names, loads, stores = [], {}, [], []
    for i, values in enumerate(inputs):
        values = np.asarray(values)
        padded = np.full(32, values.flat[0], values.dtype)
        padded[: values.size] = values
        arrays.append(padded)
        size = values.dtype.itemsize
        register = f"{_REGISTER[size]}{20 + i}"
        names[f"a{i}"] = register
        loads.append(
            f"ld.param.u64 %rd1, [p{i}]; mad.wide.u32 %rd2, %r1, {size}, %rd1;\n"
            f"ld.global.{_WIDTH[size]} {register}, [%rd2];"
        )
    results = []
    for i, dtype in enumerate(outputs):
        size = np.dtype(dtype).itemsize
        results.append(np.zeros(32, dtype))
        register = f"{_REGISTER[size]}{10 + i}"
        names[f"d{i}"] = register
        stores.append(
            f"ld.param.u64 %rd1, [p{len(inputs) + i}]; mad.wide.u32 %rd2, %r1, {size}, %rd1;\n"
            f"st.global.{_WIDTH[size]} [%rd2], {register};"
        )
    for key, register in names.items():
        body = body.replace("{" + key + "}", register)
    text = kernel(
        "mov.u32 %r1, %tid.x;\n" + "\n".join(loads) + "\n" + body + "\n" + "\n".join(stores),
        ["u64"] * (len(inputs) + len(outputs)),
        target=target,
    )
    launch(text, grid=1, block=32, params=[*arrays, *results])
    return results


def run(text: str, params: Sequence, *, block: int = 32, **options: object) -> Machine:
    """Launches one kernel."""
    options.setdefault("grid", 1)
    return launch(text, block=block, params=params, **options)


SEEDS = range(6)
"""Schedules that a test of a race tries."""
