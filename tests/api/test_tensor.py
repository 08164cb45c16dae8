# SPDX-License-Identifier: Apache-2.0
"""Nvfp4Tensor and RepackedWeight as values: construction, properties, pytree behavior."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import this_machine

import jax_nvfp4 as nvfp4

DATA = np.zeros((4, 16), np.uint8)
SCALE = np.zeros((4, 2), ml_dtypes.float8_e4m3fn)
ONE = np.float32(1)


def test_what_is_imported_late_is_listed():
    assert {*nvfp4.__all__, "nnx"} <= set(dir(nvfp4))
    assert all(hasattr(nvfp4, name) for name in dir(nvfp4))


def test_shapes_and_bytes():
    t = nvfp4.quantize(jnp.ones((3, 5, 100)))
    assert (t.shape, t.ndim) == ((3, 5, 100), 3)
    assert t.data.shape == (3, 5, 56) and t.block_scale.shape == (3, 5, 7)
    assert t.nbytes == 3 * 5 * (56 + 7) + 4
    big = nvfp4.quantize(jnp.ones((256, 256)))
    assert big.nbytes == 256 * 256 * 0.5625 + 4
    assert nvfp4.repack(big, "sm_90a").nbytes == big.nbytes


def test_size_and_dtype_are_those_of_what_was_quantized():
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        t = nvfp4.quantize(jnp.ones((3, 5, 100), dtype))
        for form in (t, nvfp4.repack(t, "sm_90a"), nvfp4.repack(t, "sm_100f").canonical()):
            assert (form.size, form.dtype) == (1500, dtype)
            assert f"dtype={jnp.dtype(dtype).name}" in repr(form)
            assert jax.eval_shape(lambda w: w, form).dtype == dtype
    assert nvfp4.Nvfp4Tensor(DATA, SCALE, ONE).dtype == jnp.bfloat16  # as of a checkpoint
    assert nvfp4.Nvfp4Tensor(DATA, SCALE, ONE, dtype="float32").dtype == jnp.float32


def test_the_dtype_is_exported():
    t = nvfp4.repack(nvfp4.quantize(jnp.ones((4, 32), jnp.float16)), "sm_90a")
    blob = jax.export.export(jax.jit(lambda w: w))(t).serialize()
    assert jax.export.deserialize(blob).call(t).dtype == jnp.float16


def test_construction_from_parts():
    t = nvfp4.Nvfp4Tensor(DATA, SCALE, ONE)
    assert t.shape == (4, 32) and t.global_scale.dtype == jnp.float32
    assert nvfp4.Nvfp4Tensor(DATA, SCALE.view(np.uint8), 1.0).block_scale.dtype == jnp.float8_e4m3fn
    assert nvfp4.Nvfp4Tensor(DATA, SCALE, ONE, k=30).dequantize().shape == (4, 30)


@pytest.mark.parametrize(
    "make,error,message",
    [
        (
            lambda: nvfp4.Nvfp4Tensor(DATA.astype(np.int8), SCALE, ONE),
            TypeError,
            "data must be uint8.*int8",
        ),
        (
            lambda: nvfp4.Nvfp4Tensor(DATA, SCALE.astype(np.float32), ONE),
            TypeError,
            "block_scale must be float8_e4m3fn.*float32",
        ),
        (
            lambda: nvfp4.Nvfp4Tensor(DATA, SCALE, np.float16(1)),
            TypeError,
            "global_scale must be float32, got float16",
        ),
        (
            lambda: nvfp4.Nvfp4Tensor(DATA, SCALE[:, :1], ONE),
            ValueError,
            r"block_scale must have shape \(4, 2\).*got \(4, 1\)",
        ),
        (
            lambda: nvfp4.Nvfp4Tensor(DATA, SCALE, np.ones(3, np.float32)),
            ValueError,
            r"leading axes of \(4,\); got shape \(3,\)",
        ),
        (
            lambda: nvfp4.Nvfp4Tensor(DATA, SCALE, np.ones((4, 16), np.float32)),
            ValueError,
            "leading axes",
        ),
        (
            lambda: nvfp4.Nvfp4Tensor(DATA, SCALE, ONE, k=40),
            ValueError,
            "24 bytes along its last axis for k = 40",
        ),
        (lambda: nvfp4.Nvfp4Tensor(np.uint8(3), SCALE, ONE), ValueError, "at least one axis"),
        (
            lambda: nvfp4.Nvfp4Tensor(DATA, SCALE, ONE, dtype=jnp.int8),
            TypeError,
            "dtype, which the values came from, must be bfloat16.*; got int8",
        ),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_pytree():
    t = nvfp4.quantize(jnp.ones((4, 32)), scaling="token")
    leaves, tree = jax.tree.flatten(t)
    assert [leaf.dtype for leaf in leaves] == [jnp.uint8, jnp.float8_e4m3fn, jnp.float32]
    assert jax.tree.unflatten(tree, leaves).shape == t.shape
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(t)]
    assert paths == [".data", ".block_scale", ".global_scale"]
    for (path, _), name in zip(
        jax.tree_util.tree_leaves_with_path({"up": t}),
        ("data", "block_scale", "global_scale"),
        strict=True,
    ):
        assert "/".join(step.key for step in path) == f"up/{name}" and path[-1].name == name
    assert jax.tree.map(lambda a: a.shape, t).data == (4, 16)
    w = nvfp4.repack(t, "sm_90a")
    assert "shape=(4, 32)" in repr(t) and "shape=(4, 32), arch='sm_90a'" in repr(w)
    assert (w.ndim, w.global_scale.shape) == (2, (4,))
    for holder in (t, w):
        assert repr(jax.tree.map(lambda a: None, holder)).startswith(type(holder).__name__)


@pytest.mark.parametrize("arch", ["canonical", "reference", "sm_90a"])
def test_copies(arch):
    t = nvfp4.quantize(np.random.default_rng(0).standard_normal((4, 40)).astype(np.float32))
    w = t if arch == "canonical" else nvfp4.repack(t, arch)
    for same in (
        copy.copy(w),
        copy.deepcopy(w),
        pickle.loads(pickle.dumps(w)),
        dataclasses.replace(w, global_scale=w.global_scale),
    ):
        assert jax.tree.structure(same) == jax.tree.structure(w) and same.shape == (4, 40)
        np.testing.assert_array_equal(same.dequantize(), t.dequantize())


def _cast(dtype, kinds=jnp.generic):
    return lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, kinds) else a


ROWS = ("canonical", "reference")
TILES = ("sm_90a", "sm_100f")
CHANGED = [
    (ROWS + TILES, _cast(jnp.bfloat16), TypeError, "data of .* array of uint8; got bfloat16.*cast"),
    (
        ROWS + TILES,
        _cast(jnp.bfloat16, jnp.floating),
        TypeError,
        "_scale of .*; got bfloat16.*cast",
    ),
    (ROWS + TILES, lambda a: None, TypeError, "data of .* array of uint8; got NoneType"),
    (ROWS, lambda a: a[:20] if a.shape == (48, 40) else a, ValueError, r"\(20, 40\)"),
    (TILES, lambda a: a[:100] if a.ndim > 1 else a, ValueError, r"got \(100, 64\)"),
    (ROWS + TILES, lambda a: a if a.ndim else jnp.ones(7), ValueError, r"got shape \(7,\)"),
]


@pytest.mark.parametrize(
    "arch,change,error,message", [(arch, *case) for arches, *case in CHANGED for arch in arches]
)
def test_parts_that_a_tree_map_has_changed_are_refused(arch, change, error, message):
    t = nvfp4.quantize(jnp.ones((48, 80)))
    changed = jax.tree.map(change, t if arch == "canonical" else nvfp4.repack(t, arch))
    for use in (lambda w: nvfp4.linear(jnp.ones((2, 80)), w), lambda w: w.dequantize()):
        with pytest.raises(error, match=message):
            use(changed)


@pytest.mark.parametrize("scaling", ["tensor", "token"])
def test_orbax_saves_and_restores(tmp_path, scaling):
    t = nvfp4.quantize(
        np.random.default_rng(0).standard_normal((40, 70)).astype(np.float32), scaling=scaling
    )
    state = {
        "canonical": t,
        "repacked": nvfp4.repack(t, this_machine.arches()[-1]),
        "bias": jnp.ones(3),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(
            np.atleast_1d(a).view(np.uint8), np.atleast_1d(b).view(np.uint8)
        )
    x = jnp.ones((2, 70))
    np.testing.assert_array_equal(
        nvfp4.linear(x, restored["repacked"]), nvfp4.linear(x, state["canonical"])
    )
