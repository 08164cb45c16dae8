# SPDX-License-Identifier: Apache-2.0
"""One kernel to compile ahead of time: what a kernel module hands to the build."""

import dataclasses
import keyword
from collections.abc import Callable
from typing import Any, Literal

from jax_nvfp4.config import ARCHES

Op = Literal["quantize", "gemm"]
OPS: tuple[Op, ...] = ("quantize", "gemm")

# C types of the host functions' parameters, in order. The extension calls each kernel of an op
# through one signature, so a kernel that strays from it would read the wrong registers.
POINTER, INT, FLOAT, STREAM = "void *", "int32_t ", "float ", "cudaStream_t "
ABI: dict[Op, tuple[tuple[str, str], ...]] = {
    "quantize": (
        *(
            (POINTER, p)
            for p in ("x", "scale_or_amax", "data", "block_scale", "global_scale", "scratch")
        ),
        *((INT, p) for p in ("m", "k", "x_dtype", "scaling", "out_format", "num_sms")),
        (STREAM, "stream"),
    ),
    "gemm": (
        *((POINTER, p) for p in ("x", "sfx", "w", "sfw", "x_scale", "w_scale", "bias", "y")),
        *((POINTER, p) for p in ("scratch", "group_sizes", "group_offset")),
        *((INT, p) for p in ("m", "n", "k", "x_scale_stride", "w_scale_stride")),
        *((INT, p) for p in ("bias_dtype", "out_dtype", "split_k", "num_sms")),
        *((INT, p) for p in ("size_count", "group_count", "w_scale_group_stride")),
        *((FLOAT, p) for p in ("limit", "alpha", "cubic", "beta")),
        (STREAM, "stream"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a launch asks for that the machine code does not say.

    Attributes:
        threads: threads of a CTA.
        dynamic_shared_bytes: shared memory of a CTA, in bytes.
        tmem_columns: columns of tensor memory that a CTA allocates.
        cluster_ctas: CTAs of a cluster, at most.
    """

    threads: int
    dynamic_shared_bytes: int
    tmem_columns: int = 0
    cluster_ctas: int = 1


@dataclasses.dataclass(frozen=True)
class KernelVariant:
    """A kernel for one architecture and config, ready for `cute.compile(host, *args)`.

    Attributes:
        name: C identifier of the kernel, unique over all architectures.
        op: the operation; all kernels of an op have the same host signature.
        arch: a name of `jax_nvfp4.config.ARCHES`.
        config: the frozen dataclass instance the kernel was specialized for.
        host: the `@cute.jit` host function.
        args: example arguments of `host` (fake pointers, integers, a fake stream).
        launch: what its launches ask for, for the manifest; None: not said.

    Raises:
        ValueError: a name that is no C identifier, or an unknown op or arch.
        TypeError: a config that is no dataclass instance.
    """

    name: str
    op: Op
    arch: str
    config: Any
    host: Callable[..., Any]
    args: tuple[Any, ...]
    launch: Launch | None = None

    def __post_init__(self) -> None:
        if not (self.name.isascii() and self.name.isidentifier()) or keyword.iskeyword(self.name):
            raise ValueError(f"kernel name {self.name!r} is not a C identifier")
        if self.op not in OPS:
            raise ValueError(f"kernel {self.name}: op {self.op!r} is none of {', '.join(OPS)}")
        if self.arch not in ARCHES:
            known = ", ".join(ARCHES)
            raise ValueError(f"kernel {self.name}: arch {self.arch!r} is none of {known}")
        if not dataclasses.is_dataclass(self.config) or isinstance(self.config, type):
            raise TypeError(f"kernel {self.name}: config {self.config!r} is no dataclass instance")
