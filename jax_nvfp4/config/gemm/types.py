# SPDX-License-Identifier: Apache-2.0
"""The frozen types of GEMM problems, configs and the rows of a selection table."""

import dataclasses
import math
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Gate:
    """A gated epilogue: `gate * sigmoid(gate * (alpha + cubic * gate^2)) * (up + beta)`.

    Attributes:
        limit: clamps the gate from above, and up from both sides, before.
        alpha: of the sigmoid's argument.
        cubic: likewise; the tanh form of gelu is `alpha = 2 * sqrt(2 / pi)` and
            `cubic = alpha * 0.044715`, since `(1 + tanh(z)) / 2 = sigmoid(2 * z)`.
        beta: added to up.
    """

    limit: float = math.inf
    alpha: float = 1.0
    cubic: float = 0.0
    beta: float = 0.0


@dataclasses.dataclass(frozen=True)
class GemmProblem:
    """A GEMM call: `y (m, n) = alpha * x (m, k) @ w (n, k).T + bias`.

    Attributes:
        m: rows of x, 0 or more.
        n: rows of the weight (output features), logical.
        k: the reduction length, logical.
        arch: a name of `ARCHES`: that of the GPU, the most specific one.
        x_dtype: element type of the x operand: "e2m1", "bfloat16" or "float16".
        batch_invariant: the config may depend on (n, k) alone.
        epilogue: what is done with the products: "plain", or "gated" where each two rows of the
            weight, a gate and an up row, have one output (n counts both).
        groups: sizes of groups that divide the rows of x, each with a weight of its own; 0: none.
    """

    m: int
    n: int
    k: int
    arch: str
    x_dtype: str
    batch_invariant: bool = False
    epilogue: str = "plain"
    groups: int = 0


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """How one compiled GEMM kernel works. One config is one kernel in the extension.

    Attributes:
        name: the kernel's C identifier, unique over all archs.
        arch: a name of `ARCHES`.
        kind: the design, e.g. "small_m" or "pingpong" (the arch's module lists them).
        x_dtype: element type of the x operand: "e2m1", "bfloat16" or "float16".
        tile_m: rows of x in a CTA's output tile (a pair's tile for 2-CTA kernels).
        tile_n: rows of the weight in it.
        tile_k: elements of K in one pipeline stage.
        cluster_m: CTAs of a cluster along M.
        cluster_n: CTAs of a cluster along N.
        stages: depth of the shared-memory pipeline.
        swap_ab: the weight is the MMA's M-side operand.
        split_k: largest number of ways in which K may be split (1: never).
        warpgroups: warpgroups of a CTA that run MMAs.
        k_groups: into how many groups they divide, each with a part of the CTA's stages along K.
        ctas_per_sm: CTAs that a multiprocessor holds at a time.
        epilogue: as a problem's.
        grouped: the rows of x are in groups, each with a weight of its own.
    """

    name: str
    arch: str
    kind: str
    x_dtype: str
    tile_m: int
    tile_n: int
    tile_k: int
    cluster_m: int = 1
    cluster_n: int = 1
    stages: int = 1
    swap_ab: bool = False
    split_k: int = 1
    warpgroups: int = 1
    k_groups: int = 1
    ctas_per_sm: int = 1
    epilogue: str = "plain"
    grouped: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
    """A row of a selection table: the first row whose `when` holds gives the config.

    Attributes:
        when: a predicate over the problem and the number of multiprocessors.
        config: the config the row selects.
        split_k: number of ways to split K, a function of the problem and the number of
            multiprocessors (of (n, k) alone where the problem is batch-invariant).
        reason: why this config wins here.
    """

    when: Callable[[GemmProblem, int], bool]
    config: GemmConfig
    split_k: Callable[[GemmProblem, int], int]
    reason: str
