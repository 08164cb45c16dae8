# SPDX-License-Identifier: Apache-2.0
"""`convert`: any JAX function of params, with its weights in NVFP4."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_nvfp4.calibration import Calibration, InputStatistics
from jax_nvfp4.conversion.analysis import Analyzer, Layout, Record
from jax_nvfp4.conversion.program import Converted, LeafPlan, Traced, nbytes
from jax_nvfp4.conversion.report import LeafReport, Report
from jax_nvfp4.conversion.selection import Path, Where, decide, join
from jax_nvfp4.conversion.view import Leaf, View, whole
from jax_nvfp4.numerics import dynamic_scales
from jax_nvfp4.ops.checks import ActivationScale
from jax_nvfp4.ops.concatenate import concatenate
from jax_nvfp4.ops.device import local_arch
from jax_nvfp4.ops.repack import repack as repack_weight
from jax_nvfp4.products.axes import KernelAxes
from jax_nvfp4.products.kernel import Nvfp4Kernel, quantize_kernel
from jax_nvfp4.products.leaf import ConvertedLeaf, JoinedLeaf, is_converted
from jax_nvfp4.tensor import FLOATS


def convert(
    fn: Callable[..., Any],
    params: Any,
    *example_args: Any,
    where: Where | None = None,
    activation_scale: ActivationScale | Literal["static"] = "token",
    batch_invariant: bool = False,
    search: str | None = None,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    tied: Literal["copy"] | None = None,
    fuse: bool = False,
    arch: str | None = None,
    repack: bool = True,
    donate: bool = False,
) -> tuple[Converted, Any, Report]:
    """Puts the weights of a function into NVFP4: of any model, as it is.

    The function is traced on shapes. A leaf of its params that meets nothing but products, always
    summed over the same axes, becomes an NVFP4 kernel; the function that is returned runs the same
    program with NVFP4 products in these places. Any other leaf stays, and the report says why.

    A leaf is followed through casts, transposes, reshapes, sharding constraints, indices and slices
    of leading axes, and into `jit`, `remat`, `scan`, `while_loop`, `cond`, `custom_jvp`,
    `custom_vjp` and `shard_map`. Sharding constraints of a weight are dropped: an NVFP4 weight
    stays where its user put it.

    Args:
        fn: `fn(params, *args)`, of arrays; other arguments by `functools.partial`.
        params: any pytree: of Flax, an nnx state or module, of Equinox, of Haiku, a dict. Leaves
            are arrays of JAX or NumPy, in memory or mapped from a file, or `ShapeDtypeStruct`s,
            whose kernels are then abstract too. They are quantized one by one.
        *example_args: arguments, or their `ShapeDtypeStruct`s.
        where: given the path of a leaf as strings and its `Use` (shape, dtype, contracting,
            primitives), whether to quantize it. None leaves alone what the command `quantize`
            does: embeddings, norms, output heads and routers, and K that 16 does not divide.
        activation_scale: as of `linear`, for all products; or "static": each weight has the scale
            of its largest input in the calibration, or, where params are abstract, the one that
            `load_params` finds in a checkpoint.
        batch_invariant: as of `linear`.
        search: as of `quantize`.
        calibration: from `calibrate`, or its file. With a search, the mean square of each input
            channel is the `importance` of its column.
        tied: "copy" quantizes a copy of a leaf that meets products and something else (a tied
            embedding), beside the dense leaf; None leaves it alone.
        fuse: joins the weights that multiply one and the same array (those of q, k and v, of gate
            and up) in one, which takes one product; their global scales stay.
        arch: of the repacked weights; that of this machine's default device if None.
        repack: False keeps the weights in canonical order, as on disk.
        donate: deletes each leaf that is a `jax.Array` once its kernel is made, so that device
            memory peaks at the NVFP4 model and one leaf. The given params are then of no use.

    Returns:
        (fn, params, report): the converted function, which takes the converted params in the place
        of the given ones and returns what `fn` does, of the same tree, shapes and dtypes; and a
        `Report`, whose `str` is a table.

    Raises:
        ValueError: an option has an unknown value, or no leaf was converted.
        TypeError: params or an argument hold NVFP4 weights already.
    """
    if tied not in (None, "copy"):
        raise ValueError(f'tied must be None or "copy"; got {tied!r}')
    if isinstance(calibration, str | os.PathLike):
        calibration = Calibration.load(calibration)
    static = isinstance(activation_scale, str) and activation_scale == "static"
    keyed, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_converted)
    leaves = [leaf for _, leaf in keyed]
    paths = [path_of(path) for path, _ in keyed]
    for path, leaf in zip(paths, leaves, strict=True):
        if is_converted(leaf):
            raise TypeError(f"{'.'.join(path)} is converted already; got {leaf}")
    shapes = [abstract(leaf) for leaf in leaves]
    records = analyze(Traced(fn, tree, shapes), shapes, example_args)
    plans = decide(paths, shapes, records, where, tied)
    if fuse:
        plans = join(plans, records)
    target = (local_arch() if arch is None else arch) if repack else None
    make = functools.partial(_converted, search=search, static=static)
    converted = []
    for plan, leaf in zip(plans, leaves, strict=True):
        seen = None if calibration is None else calibration.get(plan.name)
        own = None if plan.joined else target
        result = leaf if plan.layout is None else make(plan, leaf, seen, arch=own)
        in_memory = isinstance(leaf, jax.Array)
        if plan.layout and (donate or not in_memory):
            # Dispatch is asynchronous: the copies of all leaves would be on the device at once.
            jax.block_until_ready(result)
        if donate and plan.layout and not plan.keeps_dense and in_memory:
            leaf.delete()
        converted.append(result)
    _join_kernels(plans, converted, target)
    pairs = zip(plans, converted, strict=True)
    report = Report(tuple(_report(plan, leaf) for plan, leaf in pairs if plan.is_array))
    if not report.quantized:
        raise ValueError(f"no leaf of the params can be converted:\n{report}")
    scaling: Any = None if static else activation_scale  # a static scale goes with its leaf
    run = Converted(fn, tree, plans, scaling, batch_invariant)
    return run, jax.tree.unflatten(tree, converted), report


def path_of(path: Sequence[Any]) -> Path:
    """The path of a leaf as strings: keys, names and indices, without Flax's own last `value`."""
    names = [str(_key_name(key)) for key in path]
    if len(names) > 1 and names[-1] == "value" and isinstance(path[-1], jax.tree_util.GetAttrKey):
        names.pop()
    return tuple(names)


def _key_name(key: Any) -> Any:
    """The key of a dict, the name of an attribute or the index of an item."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def abstract(leaf: Any) -> Any:
    """The shape and dtype of an array; any other leaf as it is."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if isinstance(leaf, jax.Array | np.ndarray):
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
    return leaf


def analyze(
    traced: Traced, leaves: Sequence[Any], example_args: Sequence[Any]
) -> dict[int | None, Record]:
    """What the program does with each leaf that could be a weight."""
    closed, _ = traced(example_args)
    analyzer = Analyzer()
    numbers = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]

    def run(*arrays: Any) -> list[Any]:
        operands = list(arrays)
        for place, number in enumerate(numbers):
            leaf = leaves[number]
            if leaf.dtype in FLOATS and len(leaf.shape) > 1 and 0 not in leaf.shape:
                operands[place] = View(
                    value=None,
                    dense=arrays[place],
                    leaf=Leaf(number, ""),
                    axes=whole(leaf.shape),
                    batch=(),
                    dtype=jnp.dtype(leaf.dtype),
                )
        results = analyzer.run(closed.jaxpr, closed.consts, operands)
        return analyzer.all_dense(results, "a result of the function")

    jax.eval_shape(run, *(v.aval for v in closed.jaxpr.invars))
    return analyzer.records


def _converted(
    plan: LeafPlan,
    leaf: Any,
    seen: InputStatistics | None,
    *,
    search: str | None,
    static: bool,
    arch: str | None,
) -> Any:
    """What stands for a leaf: a kernel, and what goes with it."""
    assert plan.layout is not None
    batch, is_abstract = plan.layout.sizes, isinstance(leaf, jax.ShapeDtypeStruct)
    if seen is not None and seen.mean_square.shape != (*batch, plan.layout.k):
        raise ValueError(
            f"the calibration of {plan.name} must have the shape {(*batch, plan.layout.k)}, "
            f"(matrices..., K); got {seen.mean_square.shape}"
        )
    importance = seen.mean_square if seen is not None and search is not None else None
    make = functools.partial(make_kernel, layout=plan.layout, search=search, arch=arch)
    kernel = jax.eval_shape(make, leaf, importance) if is_abstract else make(leaf, importance)
    scale: Any = None
    if static:
        if seen is not None:
            scale = dynamic_scales(jnp.asarray(seen.amax))[1]
        elif is_abstract:
            scale = jax.ShapeDtypeStruct(batch, jnp.float32)
        else:
            raise ValueError(
                f'activation_scale="static" needs a calibration of each weight; {plan.name} has '
                f"none (calibration=nvfp4.calibrate(fn, params, batches))"
            )
    if scale is None and not plan.keeps_dense:
        return kernel
    return ConvertedLeaf(kernel, leaf if plan.keeps_dense else None, scale)


def _join_kernels(plans: Sequence[LeafPlan], converted: list[Any], arch: str | None) -> None:
    """Puts the kernels of leaves that share a weight into that of the first of them."""

    def joined(*weights: Any) -> Any:
        weight = concatenate(weights)
        weight = weight if arch is None else repack_weight(weight, arch)
        rows_and_columns = KernelAxes(weight.shape[-2:], free=(0,), contracting=(1,))
        return Nvfp4Kernel(weight, rows_and_columns)

    for i, plan in enumerate(plans):
        if plan.joined[:1] != (i,):
            continue
        kernels = [converted[j] for j in plan.joined]
        scale = kernels[0].input_scale if isinstance(kernels[0], ConvertedLeaf) else None
        weights = [k.kernel.weight if isinstance(k, ConvertedLeaf) else k.weight for k in kernels]
        is_abstract = isinstance(weights[0].data, jax.ShapeDtypeStruct)
        kernel = jax.eval_shape(joined, *weights) if is_abstract else jax.jit(joined)(*weights)
        converted[i] = kernel if scale is None else ConvertedLeaf(kernel, None, scale)
        for j in plan.joined[1:]:
            converted[j] = JoinedLeaf(plan.name)


@functools.partial(jax.jit, static_argnames=("layout", "search", "arch"))
def make_kernel(
    leaf: jax.Array,
    importance: jax.Array | None = None,
    *,
    layout: Layout,
    search: str | None,
    arch: str | None,
) -> Nvfp4Kernel:
    """Quantizes a leaf, and repacks it unless `arch` is None; compiled once for like leaves.

    Args:
        leaf: of the params.
        importance: (batch..., K) of a search.
        layout: of the leaf.
        search: as of `quantize`.
        arch: as of `repack`.
    """
    roles = [piece.role for piece in layout.pieces]
    batch = [place for place, role in enumerate(roles) if role == "batch"]
    rest = [place for place, role in enumerate(roles) if role != "batch"]
    options: dict[str, Any] = {} if search is None else {"search": search}

    def quantize(matrix: jax.Array, importance: jax.Array | None) -> Nvfp4Kernel:
        of_matrix = options if importance is None else options | {"importance": importance}
        contracting = [i for i, place in enumerate(rest) if roles[place] == "contracting"]
        return quantize_kernel(matrix, contracting, **of_matrix)

    for _ in batch:
        quantize = jax.vmap(quantize, in_axes=(0, None if importance is None else 0))
    order = [*batch, *rest]
    kernel = quantize(
        leaf.reshape([piece.size for piece in layout.pieces]).transpose(order), importance
    )
    kernel = kernel.transpose(*(order.index(place) for place in range(len(order))))
    return kernel if arch is None else repack_weight(kernel, arch)


def _report(plan: LeafPlan, result: Any) -> LeafReport:
    parts = jax.tree.leaves(result)
    return LeafReport(
        path=plan.path,
        shape=tuple(plan.leaf.shape),
        dtype=plan.leaf.dtype.name,
        bytes_before=nbytes(plan.leaf),
        bytes_after=sum(map(nbytes, parts)),
        quantized=plan.layout is not None,
        why=plan.why,
    )
