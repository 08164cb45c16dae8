# SPDX-License-Identifier: Apache-2.0
"""The public `concatenate` and `gate_up`: one weight of the rows of several."""

from collections.abc import Sequence

import jax.numpy as jnp

from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight


def concatenate(weights: Sequence[Nvfp4Tensor | RepackedWeight]) -> Nvfp4Tensor:
    """Joins weights that multiply the same x, such as those of q, k and v, into one.

    Bits stay as they are: each part keeps its global scale, so that the product of the whole is
    that of the parts side by side. `split_rows` takes it apart again.

    Args:
        weights: of shapes (..., N_i, K), with the same K and the same leading axes. Repacked ones
            are put back into canonical order first.

    Returns:
        A weight (..., sum(N_i), K) with one global scale for each row.

    Raises:
        TypeError: a part is not an NVFP4 weight.
        ValueError: there is no part, shapes do not go together, or a part is gated.
    """
    parts = [_canonical(f"weights[{i}]", weight) for i, weight in enumerate(weights)]
    if not parts:
        raise ValueError("concatenate needs at least one weight; got none")
    return _joined([f"weights[{i}]" for i in range(len(parts))], parts, gated=False)


def gate_up(gate: Nvfp4Tensor | RepackedWeight, up: Nvfp4Tensor | RepackedWeight) -> Nvfp4Tensor:
    """Joins a gate and an up projection into one gated weight.

    Args:
        gate: (..., I, K); leading axes are those of stacked layers or of experts.
        up: of gate's shape.

    Returns:
        A gated weight of logical shape (..., 2I, K), rows [gate; up], each half with the global
        scale that it had. `linear` takes it with `activation=SwiGLU()` or `GeGLU()`; without one
        its product is (..., 2I). A mesh may divide its rows once it is repacked, not before.

    Raises:
        TypeError: one of them is not an NVFP4 weight.
        ValueError: their shapes differ, or one is itself gated.
    """
    parts = [_canonical("gate", gate), _canonical("up", up)]
    if parts[0].shape != parts[1].shape:
        raise ValueError(
            f"gate and up must have the same shape; got {parts[0].shape} and {parts[1].shape}"
        )
    return _joined(["gate", "up"], parts, gated=True)


def split_rows(weight: Nvfp4Tensor | RepackedWeight) -> tuple[Nvfp4Tensor, ...]:
    """The inverse of `concatenate` and `gate_up`.

    Args:
        weight: (..., N, K), whole: not a device's part. Not traced, where its parts had one global
            scale for each matrix and are to have it again.

    Returns:
        Its parts; a weight that was not put together is its only part. A part whose rows have one
        and the same global scale has one for each matrix; any other keeps one for each row.

    Raises:
        ValueError: the weight has not the rows of its parts.
    """
    weight = _canonical("weight", weight)
    if not weight.parts:
        return (weight,)
    if sum(weight.parts) != weight.shape[-2]:
        raise ValueError(
            f"a weight of parts {weight.parts} must have {sum(weight.parts)} rows to be taken "
            f"apart; got the shape {weight.shape}"
        )
    parts, start = [], 0
    for rows in weight.parts:
        at = slice(start, start + rows)
        scale = weight.global_scale
        if scale.ndim == weight.ndim - 1:
            scale = scale[..., at]
            if rows and bool((scale == scale[..., :1]).all()):
                scale = scale[..., 0]
        data, block_scale = weight.data[..., at, :], weight.block_scale[..., at, :]
        parts.append(Nvfp4Tensor(data, block_scale, scale, k=weight.k, dtype=weight.dtype))
        start += rows
    return tuple(parts)


def _canonical(name: str, weight: Nvfp4Tensor | RepackedWeight) -> Nvfp4Tensor:
    if not isinstance(weight, Nvfp4Tensor | RepackedWeight):
        raise TypeError(
            f"{name} must be an Nvfp4Tensor or a RepackedWeight; got {type(weight).__name__}"
        )
    weight = weight.canonical() if isinstance(weight, RepackedWeight) else weight
    weight.check()
    if weight.ndim < 2:
        raise ValueError(f"{name} must have shape (..., N, K); got {weight.shape}")
    return weight


def _joined(names: Sequence[str], parts: Sequence[Nvfp4Tensor], gated: bool) -> Nvfp4Tensor:
    """One weight of all rows; `names` are what errors call the parts."""
    *lead, _, k = parts[0].shape
    for name, part in zip(names, parts, strict=True):
        if part.gated:
            raise ValueError(f"{name} is gated: its rows belong together in pairs")
        if (*part.shape[:-2], part.k) != (*lead, k):
            raise ValueError(
                f"{name} must have shape {(*lead, 'N', k)}, as {names[0]} of shape "
                f"{parts[0].shape}; got {part.shape}"
            )

    def rows_of(part: Nvfp4Tensor) -> tuple[int, ...]:
        return part.parts or (part.shape[-2],)

    def scale_of(part: Nvfp4Tensor) -> jnp.ndarray:
        scale = part.global_scale
        if scale.ndim < part.ndim - 1:  # a scalar, or one for each matrix
            scale = scale.reshape(*scale.shape, *[1] * (part.ndim - 1 - scale.ndim))
        return jnp.broadcast_to(scale, part.shape[:-1])

    return Nvfp4Tensor(
        jnp.concatenate([part.data for part in parts], axis=-2),
        jnp.concatenate([part.block_scale for part in parts], axis=-2),
        jnp.concatenate([scale_of(part) for part in parts], axis=-1),
        k=k,
        parts=tuple(rows for part in parts for rows in rows_of(part)),
        gated=gated,
        dtype=jnp.result_type(*(part.dtype for part in parts)),
    )
