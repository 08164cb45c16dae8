# SPDX-License-Identifier: Apache-2.0
"""Configs of the quantize kernels, and which of them serves a call."""

import dataclasses

from jax_nvfp4.config.arches import runnable_arches
from jax_nvfp4.config.enums import Scaling


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """How one compiled quantize kernel works.

    Attributes:
        name: the kernel's C identifier, unique over all archs.
        arch: a name of `ARCHES`.
        kind: the design, e.g. "rows" or "grid".
        x_dtype: "float32", "bfloat16" or "float16".
        threads: threads of a CTA.
        elements_per_thread: elements a thread quantizes at a time.
    """

    name: str
    arch: str
    kind: str
    x_dtype: str
    threads: int
    elements_per_thread: int


X_DTYPES = ("float32", "bfloat16", "float16")
"""Element types of x; the index is the `x_dtype` argument of the kernels."""


BLOCK = 16
"""Elements of a block: those that have a block scale in common."""
SHARED_ROW = 16384
"""The longest tensor of one row that is left to a "rows" kernel, faster than "grid" up to it."""
MAX_CTAS = 256
"""CTAs of a "grid" kernel, which starts one for each multiprocessor at most."""
GRID_MESSAGE_BYTES = 8
"""Scratch memory for the message from one CTA of a "grid" kernel to another."""

KIND_OF_SCALING = {
    Scaling.STATIC: "flat",
    Scaling.STATIC_ROWS: "flat",
    Scaling.TOKEN: "rows",
    Scaling.TENSOR: "grid",
    Scaling.AMAX: "flat",
    Scaling.AMAX_ROWS: "flat",
}

# Threads of a CTA, at most, and blocks that a thread holds, by kind: for 16-bit dtypes and for
# float32. A "rows" kernel has further shapes for few and for long rows.
_SHAPES = {
    "flat": ((256, 1), (256, 1)),
    "rows": ((512, 2), (512, 2)),
    "grid": ((1024, 2), (1024, 1)),
}
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def _configs() -> tuple[QuantizeConfig, ...]:
    return tuple(
        QuantizeConfig(
            name=f"quantize_{arch.replace('_', '')}_{kind}_{_SHORT[x_dtype]}",
            arch=arch,
            kind=kind,
            x_dtype=x_dtype,
            threads=shapes[x_dtype == "float32"][0],
            elements_per_thread=shapes[x_dtype == "float32"][1] * BLOCK,
        )
        for arch in ("sm_90a", "sm_100f", "sm_120f")
        for kind, shapes in _SHAPES.items()
        for x_dtype in X_DTYPES
    )


QUANTIZE_CONFIGS = _configs()
"""One config for each arch, kind and x dtype.

Kinds: "flat", the scale or amax is given; "rows", dynamic per row; "grid", dynamic per tensor.
"""


def quantize_configs(arch: str) -> tuple[QuantizeConfig, ...]:
    """The quantize configs that are compiled for `arch`."""
    return tuple(c for c in QUANTIZE_CONFIGS if c.arch == arch)


def select_quantize(arch: str, x_dtype: str, scaling: Scaling | int) -> QuantizeConfig:
    """The config that serves a call.

    Args:
        arch: a name of `ARCHES`; `sm_103a` runs the kernels of its family, `sm_100f`.
        x_dtype: a name of `X_DTYPES`.
        scaling: where the global scale comes from.

    Raises:
        ValueError: no kernel for this arch and dtype.
    """
    family = runnable_arches(arch)[-1]
    kind = KIND_OF_SCALING[Scaling(scaling)]
    for config in QUANTIZE_CONFIGS:
        if (config.arch, config.kind, config.x_dtype) == (family, kind, x_dtype):
            return config
    raise ValueError(f"no quantize kernel for arch {arch!r} and x dtype {x_dtype!r}")


def quantize_scratch_bytes(config: QuantizeConfig, num_sms: int) -> int:
    """Bytes of scratch memory that the kernel of `config` needs.

    Args:
        config: the kernel's config.
        num_sms: multiprocessors that the kernel may use, the `num_sms` it is called with.

    Raises:
        ValueError: no multiprocessor.
    """
    if num_sms < 1:
        raise ValueError(f"num_sms is {num_sms}, expected at least 1")
    return GRID_MESSAGE_BYTES * min(num_sms, MAX_CTAS) ** 2 if config.kind == "grid" else 0
