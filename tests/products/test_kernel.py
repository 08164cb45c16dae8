# SPDX-License-Identifier: Apache-2.0
"""Nvfp4Kernel: an NVFP4 weight in the shape of the array it came from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import jax_nvfp4 as nvfp4
import jax_nvfp4.params  # registers the weights with flax.serialization

RNG = np.random.default_rng(0)
# (layers, d, heads, experts, dim): contracted over d and dim, in stacks of layers and experts.
W = jnp.asarray(RNG.standard_normal((2, 8, 3, 2, 6)), jnp.float32)
KERNEL = nvfp4.quantize_kernel(W, contracting=(1, 4), batch=(0, 3))


def assert_same(a, b):
    assert a.axes == b.axes and a.shape == b.shape
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left.astype(jnp.float32), right.astype(jnp.float32))


def test_each_matrix_has_the_bits_of_quantize():
    assert (KERNEL.shape, KERNEL.ndim, KERNEL.size) == (W.shape, W.ndim, W.size)
    assert (KERNEL.batch, KERNEL.free, KERNEL.contracting) == ((0, 3), (2,), (1, 4))
    values = KERNEL.dequantize()
    for layer in range(2):
        for expert in range(2):
            one = nvfp4.quantize(W[layer, :, :, expert].transpose(1, 0, 2).reshape(3, 48))
            same = KERNEL.weight.data[layer, expert], KERNEL.weight.block_scale[layer, expert]
            np.testing.assert_array_equal(same[0], one.data)
            np.testing.assert_array_equal(same[1].view(jnp.uint8), one.block_scale.view(jnp.uint8))
            assert KERNEL.weight.global_scale[layer, expert] == one.global_scale
            expected = one.dequantize().reshape(3, 8, 6).transpose(1, 0, 2)
            np.testing.assert_array_equal(values[layer, :, :, expert], expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_it_keeps_the_dtype_and_counts_its_bytes(dtype):
    kernel = nvfp4.quantize_kernel(W[0, :, :, 0].astype(dtype), (0, 2))
    assert kernel.dtype == kernel.T.dtype == nvfp4.repack(kernel).dtype == dtype
    assert kernel.dequantize().dtype == jnp.float32
    assert kernel.nbytes == 3 * 24 + 3 * 3 + 4


def test_axes_may_count_from_the_end_and_k_runs_in_their_order():
    w = W[0, :, :, 0]
    assert_same(nvfp4.quantize_kernel(w, (0, -1)), nvfp4.quantize_kernel(w, (0, 2)))
    swapped = nvfp4.quantize_kernel(w, (2, 0))
    matrix = nvfp4.quantize(w.transpose(1, 2, 0).reshape(3, 48))
    np.testing.assert_array_equal(swapped.weight.data, matrix.data)
    expected = matrix.dequantize().reshape(3, 6, 8).transpose(2, 0, 1)
    np.testing.assert_array_equal(swapped.dequantize(), expected)


@pytest.mark.parametrize("shape", [(), (2, 2), (2, 2, 3)])
def test_global_scales_are_given_for_all_for_each_matrix_or_for_each_row(shape):
    given = jnp.asarray(RNG.uniform(0.001, 0.002, shape), jnp.float32)
    kernel = nvfp4.quantize_kernel(W, (1, 4), (0, 3), global_scale=given)
    of_one = given[1, 0] if shape else given
    one = nvfp4.quantize_kernel(W[1, :, :, 0], (0, 2), global_scale=of_one)
    assert_same(kernel[1, ..., 0, :], one)


def test_scales_of_tokens_are_one_for_each_row():
    kernel = nvfp4.quantize_kernel(W, (1, 4), (0, 3), scaling="token")
    assert kernel.weight.global_scale.shape == (2, 2, 3)
    row = nvfp4.quantize(W[1, :, 2, 0].reshape(48))
    np.testing.assert_array_equal(kernel.dequantize()[1, :, 2, 0], row.dequantize().reshape(8, 6))


def test_transposes_leave_the_parts():
    dense = np.asarray(KERNEL.dequantize())
    np.testing.assert_array_equal(KERNEL.T.dequantize(), dense.T)
    order = (3, 1, 0, 4, 2)
    for kernel in (KERNEL.transpose(*order), KERNEL.transpose(order)):
        np.testing.assert_array_equal(kernel.dequantize(), dense.transpose(order))
        assert kernel.weight is KERNEL.weight
    assert_same(KERNEL.T.T, KERNEL)
    with pytest.raises(ValueError, match="permutation of 5 axes"):
        KERNEL.transpose(0, 1)


@pytest.mark.parametrize(
    "index",
    [
        1,
        -1,
        slice(1, 2),
        (..., 1, slice(None)),
        (0, ..., slice(0, 1), slice(None)),
        (1, ..., 0, slice(None)),
    ],
)
@pytest.mark.parametrize("arch", [None, "sm_90a"])
def test_indices_take_matrices_of_a_stack(index, arch):
    kernel = nvfp4.repack(KERNEL, arch) if arch else KERNEL
    np.testing.assert_array_equal(
        kernel[index].dequantize(), np.asarray(KERNEL.dequantize())[index]
    )


def test_indices_may_be_traced_and_arrays():
    stack = nvfp4.quantize_kernel(W[:, :, :, 0], (1, 3), 0)
    one = jax.jit(lambda kernel, i: kernel[i])(stack, 1)
    np.testing.assert_array_equal(one.dequantize(), stack.dequantize()[1])
    some = stack[jnp.asarray([1, 0, 1])]
    np.testing.assert_array_equal(some.dequantize(), stack.dequantize()[jnp.asarray([1, 0, 1])])
    assert len(stack) == 2 and [k.shape for k in stack] == [(8, 3, 6)] * 2


@pytest.mark.parametrize(
    ("index", "error", "match"),
    [
        (2, IndexError, "index 2 is out of range for axis 0 of size 2"),
        ((0, 1), TypeError, r"axis 1 .* cannot be indexed; its batch axes \(0, 3\) can"),
        ((0,) * 6, IndexError, "too many indices"),
        ("0", TypeError, "integers and slices"),
        (None, TypeError, "integers and slices"),
        (True, TypeError, "integers and slices"),
        ((..., ...), IndexError, "single ellipsis"),
        (jnp.asarray([0, 1]), TypeError, "integers and slices"),
    ],
)
def test_other_indices_are_refused(index, error, match):
    with pytest.raises(error, match=match):
        KERNEL[index]


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"contracting": ()}, ValueError, "one axis or more"),
        ({"contracting": 5}, ValueError, "different axes of an array of 5"),
        ({"contracting": (1, 1)}, ValueError, "different axes"),
        ({"contracting": 1, "batch": (0, 1)}, ValueError, "none of which is in batch"),
        ({"contracting": 1, "global_scale": jnp.ones(7)}, ValueError, r"got shape \(7,\)"),
        ({"contracting": 1, "scaling": "row"}, ValueError, "scaling"),
    ],
)
def test_what_cannot_be_quantized_is_refused(how, error, match):
    with pytest.raises(error, match=match):
        nvfp4.quantize_kernel(W, **how)
    with pytest.raises(TypeError, match="int32"):
        nvfp4.quantize_kernel(jnp.ones((16, 2), jnp.int32))


def test_scan_and_vmap_take_off_batch_axes_and_put_them_back():
    dense = KERNEL.dequantize()
    _, again = jax.lax.scan(lambda c, kernel: (c, kernel), 0, KERNEL)
    assert_same(again, KERNEL)
    _, values = jax.lax.scan(lambda c, kernel: (c, kernel.dequantize()), 0, KERNEL)
    np.testing.assert_array_equal(values, dense)
    one_layer = jax.vmap(lambda kernel: kernel.dequantize())(KERNEL)
    np.testing.assert_array_equal(one_layer, dense)

    def shapes(kernel):
        seen.append((kernel.shape, kernel.batch))
        return kernel

    seen = []
    assert_same(jax.vmap(jax.vmap(shapes))(KERNEL), KERNEL)
    assert seen == [((8, 3, 6), ())]
    quantize = functools.partial(nvfp4.quantize_kernel, contracting=(0, 3), batch=2)
    mapped = jax.vmap(quantize)(W)
    np.testing.assert_array_equal(mapped.dequantize(), dense)


def test_stacked_kernels_are_a_kernel():
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), KERNEL[0], KERNEL[1])
    np.testing.assert_array_equal(stack.dequantize(), KERNEL.dequantize())


def test_repack_takes_it_alone_and_in_trees():
    tree = {"layer": {"kernel": KERNEL, "bias": jnp.ones(3)}}
    repacked = nvfp4.repack(tree, "sm_90a")["layer"]["kernel"]
    assert repacked.weight.arch == "sm_90a" and repacked.shape == KERNEL.shape
    assert repacked.weight.shape == (2, 2, 3, 48)
    np.testing.assert_array_equal(repacked.dequantize(), KERNEL.dequantize())
    back = nvfp4.repack(repacked, "reference")
    np.testing.assert_array_equal(back.dequantize(), KERNEL.dequantize())


@pytest.mark.parametrize("arch", [None, "sm_90a"])
def test_flax_serialization(arch):
    kernel = nvfp4.repack(KERNEL, arch) if arch else KERNEL
    tree = {"kernel": kernel}
    zeros = jax.tree.map(jnp.zeros_like, tree)
    restored = serialization.from_bytes(zeros, serialization.to_bytes(tree))
    assert_same(restored["kernel"], kernel)
    parts = serialization.to_state_dict(tree)["kernel"]["weight"]
    assert set(parts) == {"data", "block_scale", "global_scale"}


def test_export_carries_it():
    exported = jax.export.export(jax.jit(lambda k: k.dequantize()))(KERNEL)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(KERNEL), KERNEL.dequantize())


def test_other_leaves_than_arrays():
    abstract = jax.eval_shape(lambda: KERNEL)
    assert abstract.shape == W.shape and abstract.dtype == jnp.float32
    assert "(2, 8, 3, 2, 6)" in repr(KERNEL) and "(2, 8, 3, 2, 6)" in repr(abstract)
    repr(jax.tree.map(lambda _: None, KERNEL))
    assert jax.tree.structure(KERNEL) == jax.tree.structure(abstract)
    divided = jax.tree.map(lambda a: a[..., :1, :] if a.ndim > 2 else a, KERNEL)
    assert divided.shape == (2, 8, 1, 2, 6)
    one = nvfp4.quantize_kernel(W[0, 0], (2,))
    with pytest.raises(ValueError, match="only the first of them may be divided"):
        jax.tree.map(lambda a: a[..., :1, :] if a.ndim > 1 else a, one).dequantize()
