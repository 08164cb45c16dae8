# SPDX-License-Identifier: Apache-2.0
"""The nnx variables of NVFP4 weights and of static activation scales."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight


class QuantizedParam(nnx.Variable[jax.Array]):
    """A part of an NVFP4 kernel. Not an `nnx.Param`: `nnx.grad` must not differentiate codes."""


class QuantStat(nnx.Variable[jax.Array]):
    """A static activation scale, or the running amax that it follows from."""


def variables(weight: Nvfp4Tensor | RepackedWeight, metadata: Mapping[str, Any]) -> Any:
    """A weight with a variable for each part.

    Args:
        weight: with arrays as parts.
        metadata: of a kernel variable (in, out); its axis names are transposed for the codes and
            the block scales and left out for the global scale.
    """
    names = metadata.get("out_sharding")
    rest = {name: value for name, value in metadata.items() if name != "out_sharding"}

    def variable(path: Any, part: jax.Array) -> QuantizedParam:
        if names is None or path[-1].name == "global_scale":
            return QuantizedParam(part, **rest)
        return QuantizedParam(part, out_sharding=tuple(reversed(names)), **rest)

    return jax.tree_util.tree_map_with_path(variable, weight)


def arrays(weight: Any) -> Any:
    """The inverse of `variables`, metadata aside."""
    return jax.tree.map(
        lambda part: part[...], weight, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
