# SPDX-License-Identifier: Apache-2.0
"""`shardings`: the parts of NVFP4 weights lie where the dense weights would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import this_machine
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_nvfp4 as nvfp4

MESH = AbstractMesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def of(quantize, *shape):
    """An abstract weight."""
    return jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, jnp.float32))


def kernel(*shape, arch=None, **axes):
    def quantize(w):
        quantized = nvfp4.quantize_kernel(w, **axes)
        return nvfp4.repack(quantized, arch) if arch else quantized

    return of(quantize, *shape)


def specs(weight, spec):
    placed = nvfp4.shardings(weight, MESH, spec)
    assert jax.tree.structure(placed) == jax.tree.structure(weight)
    leaves = jax.tree.leaves(placed)
    assert all(isinstance(leaf, NamedSharding) and leaf.mesh == MESH for leaf in leaves)
    return [tuple(leaf.spec) for leaf in leaves]


@pytest.mark.parametrize(
    ("weight", "spec", "data", "scale"),
    [
        (kernel(128, 8), P("x", "y"), ("y", "x"), ()),
        (kernel(128, 8), P(None, "y"), ("y", None), ()),
        (kernel(128, 8), None, (None, None), ()),
        # Five blocks cannot be halved, nor can 7 rows; an entry is cut to what divides.
        (kernel(80, 7), P("x", "y"), (None, None), ()),
        (kernel(80, 6), P(None, ("x", "y")), ("x", None), ()),
        (kernel(72, 8), P("x", None), (None, None), ()),  # 4.5 blocks
        # Several axes are rows, or columns: (d, heads, dim) and (heads, dim, d).
        (kernel(128, 4, 16), P("x", "y"), ("y", "x"), ()),
        (kernel(4, 16, 8, contracting=(0, 1)), P("y", None, "x"), ("x", "y"), ()),
        (kernel(64, 2, 4), P(None, "x", "y"), (("x", "y"), None), ()),
        # Stacks; the global scale lies with their axes.
        (kernel(4, 64, 8, contracting=1, batch=0), P("y", "x"), ("y", None, "x"), ("y",)),
        (kernel(64, 4, 8, contracting=0, batch=1), P(None, "y", "x"), ("y", "x", None), ("y",)),
        (kernel(64, 8, scaling="token"), P("x", "y"), ("y", "x"), ("y",)),
        # Repacked: whole tiles of 128 rows, and no columns.
        (kernel(128, 256, arch="sm_90a"), P("y", "x"), ("x", None), ()),
        (kernel(128, 256, arch="sm_100f"), P(None, ("x", "y")), ("x", None), ()),
        (kernel(128, 96, arch="sm_90a"), P("y", "x"), (None, None), ()),
        (kernel(128, 8, arch="reference"), P("x", "y"), ("y", "x"), ()),
        # (N, K), as the weight is.
        (of(nvfp4.quantize, 8, 128), P("x", "y"), ("x", "y"), ()),
    ],
)
def test_parts_lie_where_the_array_would(weight, spec, data, scale):
    of_data, of_block_scale, of_global_scale = specs(weight, spec)
    entry = [(e,) if isinstance(e, str) else e for e in data]
    assert [(e,) if isinstance(e, str) else e for e in of_data] == entry
    assert [(e,) if isinstance(e, str) else e for e in of_block_scale][: len(data)] == entry
    assert all(e is None for e in of_block_scale[len(data) :])
    assert [e if isinstance(e, tuple) else (e,) for e in of_global_scale if e] == [
        (e,) for e in scale
    ]


def test_trees_and_prefixes_of_specs():
    params = {"a": {"kernel": kernel(64, 8), "bias": jax.ShapeDtypeStruct((8,), jnp.float32)}}
    tree = nvfp4.shardings(params, MESH, {"a": {"kernel": P("x"), "bias": P("y")}})
    assert tree["a"]["bias"] == NamedSharding(MESH, P("y"))
    assert tree["a"]["kernel"].weight.data.spec == P(None, ("x",))
    whole = nvfp4.shardings(params, MESH, P())
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(whole))


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        (P("x", None, "y"), ValueError, r"3 entries for the 2 axes of shape \(64, 8\)"),
        (P("z"), ValueError, r"names \['z'\]; the mesh has the axes"),
        ("x", TypeError, "must be a PartitionSpec; got str"),
    ],
)
def test_bad_specs_are_refused(spec, error, match):
    with pytest.raises(error, match=match):
        nvfp4.shardings({"k": kernel(64, 8)}, MESH, {"k": spec})


@this_machine.each_mesh()
@pytest.mark.parametrize("arch", [None, "sm_90a"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_product_on_a_mesh_is_that_of_one_device(sizes, arch, kind):
    mesh = this_machine.mesh(sizes, kind)
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 2, 128)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 8, 64)), jnp.float32)
    stack = nvfp4.quantize_kernel(w, 1, 0)
    stack = nvfp4.repack(stack, arch) if arch else stack
    product = jax.jit(lambda x, k: nvfp4.einsum("ebd,edhc->ebhc", x, k))
    expected = product(x, stack)
    for spec in (P("x", None, "y"), P(None, "x", "y")):
        placed = jax.device_put(stack, nvfp4.shardings(stack, mesh, spec))
        with jax.set_mesh(mesh):
            y = product(jax.device_put(x, NamedSharding(mesh, P(None, "x"))), placed)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@this_machine.each_mesh()
def test_a_part_in_shard_map_is_a_kernel_of_its_own_shape(sizes):
    mesh = this_machine.mesh(sizes)
    parts = sizes[1]
    w = jnp.asarray(np.random.default_rng(0).standard_normal((64, 4, 16)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((8, 64)), jnp.float32)
    heads = nvfp4.quantize_kernel(w)
    specs = jax.tree.map(lambda s: s.spec, nvfp4.shardings(heads, mesh, P(None, "y")))

    def product(x, part):
        assert part.shape == (64, 4 // parts, 16)
        return nvfp4.einsum("bd,dnh->bnh", x, part)

    divided = jax.shard_map(product, mesh=mesh, in_specs=(P(), specs), out_specs=P(None, "y"))
    y = jax.jit(divided)(x, heads)
    np.testing.assert_allclose(y, nvfp4.einsum("bd,dnh->bnh", x, heads), rtol=1e-5, atol=1e-5)
