# SPDX-License-Identifier: Apache-2.0
"""A weight saved in one order is never taken for one in another: the same values, or an error."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import serialization, traverse_util

import jax_nvfp4 as nvfp4
from jax_nvfp4.layout.orders import order

# Where N and K are multiples of 256 every order has codes of one shape.
T = nvfp4.quantize(np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32))
FORMS = {
    "canonical": T,
    "reference": nvfp4.repack(T, "reference"),
    "sm_90a": nvfp4.repack(T, "sm_90a"),
    "sm_100f": nvfp4.repack(T, "sm_100f"),
}
ARCHES = ("reference", "sm_90a", "sm_100f", "sm_103a", "sm_120f")


def by_bytes(saved, template, _):
    return serialization.from_bytes({"w": template}, serialization.to_bytes({"w": saved}))["w"]


def by_state_dict(saved, template, path):
    """As many put Flax params into safetensors: names joined, every leaf an array."""
    flat = traverse_util.flatten_dict(serialization.to_state_dict({"w": saved}), sep="/")
    bits = {
        name: np.asarray(part).view(np.uint8) if part.dtype == jnp.float8_e4m3fn else part
        for name, part in flat.items()
    }
    safetensors.numpy.save_file({n: np.asarray(p) for n, p in bits.items()}, path / "file")
    loaded = {
        name: array.view(flat[name].dtype)
        for name, array in safetensors.numpy.load_file(path / "file").items()
    }
    state = traverse_util.unflatten_dict(loaded, sep="/")
    return serialization.from_state_dict({"w": template}, state)["w"]


def by_leaves(saved, template, _):
    """By a treedef that someone kept: only the parts are left to say what they are."""
    return jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(saved))


def by_orbax(saved, template, path):
    """Orbax casts to the dtype of the template."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "w", {"w": saved})
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"w": template})
        return checkpointer.restore(path / "w", abstract)["w"]


@pytest.mark.parametrize("way", [by_bytes, by_state_dict, by_leaves, by_orbax])
@pytest.mark.parametrize("saved,template", itertools.permutations(FORMS, 2))
def test_another_order_is_refused_or_right(tmp_path, way, saved, template):
    try:
        restored = way(FORMS[saved], FORMS[template], tmp_path).dequantize()
    except (TypeError, ValueError) as error:
        assert "block_scale" in str(error) or "shape" in str(error)
    else:
        np.testing.assert_array_equal(restored, T.dequantize())


@pytest.mark.parametrize("way", [by_bytes, by_state_dict, by_leaves])
def test_the_same_order_comes_back(tmp_path, way):
    for form in FORMS.values():
        template = jax.tree.map(jnp.zeros_like, form)
        np.testing.assert_array_equal(
            way(form, template, tmp_path).dequantize(), T.dequantize(), strict=True
        )


def test_no_two_orders_have_the_same_shapes():
    """Blackwell's arches share an order; interleaved rows are another one of each arch."""
    for n, k in ((128, 64), (256, 256), (512, 1024), (64, 64)):
        shapes = {
            order(arch).shapes(n, k, gated=gated)
            for arch in ("reference", "sm_90a", "sm_100f")
            for gated in (False, True)
        }
        assert len(shapes) == 6
        assert len({order(arch).shapes(n, k) for arch in ARCHES}) == 3


def test_importing_the_package_is_enough():
    """What `import jax_nvfp4` must bring: Flax's serialization, the lazy modules, the dispatch."""
    program = """
import jax_nvfp4 as nvfp4
from flax import serialization
w = nvfp4.repack(nvfp4.quantize(__import__("jax").numpy.ones((8, 32))), "reference")
assert serialization.from_bytes({"w": w}, serialization.to_bytes({"w": w}))["w"].shape == (8, 32)
nvfp4.linen.Nvfp4Dense, nvfp4.nnx.Nvfp4Linear, nvfp4.checkpoint.CheckpointError
"""
    subprocess.run([sys.executable, "-c", program], check=True)
