# SPDX-License-Identifier: Apache-2.0
"""What stands for a leaf of the dense params where a kernel alone does not."""

import dataclasses
from typing import Any

import jax

from jax_nvfp4.products.kernel import Nvfp4Kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvertedLeaf:
    """A leaf that is more than an NVFP4 kernel, a pytree.

    Attributes:
        kernel: what products take.
        dense: the leaf as it was, for what else the program does with it; None if nothing.
        input_scale: float32, the static global scale of the activations for each matrix (the sizes
            of the kernel's batch axes); None where activations are scaled otherwise.
    """

    kernel: Nvfp4Kernel
    dense: Any = None
    input_scale: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JoinedLeaf:
    """A leaf whose rows are in the kernel of another one, a pytree without arrays.

    Attributes:
        into: the name of that leaf.
    """

    into: str = dataclasses.field(metadata={"static": True})


def is_converted(node: Any) -> bool:
    """Whether a node of converted params stands for a leaf of the dense ones."""
    return isinstance(node, Nvfp4Kernel | ConvertedLeaf | JoinedLeaf)
