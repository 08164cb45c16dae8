# SPDX-License-Identifier: Apache-2.0
"""`dot_general`, `einsum` and `@` with an NVFP4 kernel.

Values are such that NVFP4 and bfloat16 hold them exactly, as kernels and as activations: the
products must be those of the dense kernel, bit for bit.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_nvfp4 as nvfp4

RNG = np.random.default_rng(0)


def exact(*shape, dtype=jnp.float32):
    """Blocks, rows and tensors have amax 2688, 1344 or 672: global scales are powers of two."""
    values = RNG.choice([2688, 1344, 672], shape) * RNG.choice([-1, 1], shape)
    return jnp.asarray(values, dtype)


def assert_equal(y, expected):
    assert y.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(y, np.float64), expected)


# ---- Forms --------------------------------------------------------------------------------------

# (experts, d, heads, dim), contracted over d and dim, which are 5 * 4 = 20: not whole blocks.
W = exact(3, 5, 2, 4)
KERNEL = nvfp4.quantize_kernel(W, (1, 3), batch=0)
FORMS = (
    "bedc,edhc->beh",  # a batch axis of the weight is one of the product
    "bdc,edhc->beh",  # each expert takes all of x
    "bedc,edhc->bh",  # the sum over experts
    "cdbe,edhc->hbe",  # any order
    "bdhc,edhc->hbe",  # a free axis of the weight is a batch axis of the product
    "becdh,edhc->eb",  # ... or a contracted one, too
    "edhc,bdec->heb",  # the weight first
    "bbdce,edhc->bhe",  # a diagonal of x
    "bedcx,edhc->beh",  # x alone is summed over x
    "...dc,edhc->...eh",
    "edhc,...edc",  # an implied result
)


def operand(form):
    """An array for the operand that is not the weight."""
    sizes = {"e": 3, "d": 5, "h": 2, "c": 4, "b": 2, "x": 2}
    (labels,) = (s for s in form.split("->")[0].split(",") if s != "edhc")
    return exact(*(sizes[a] for a in labels.replace("...", "bx" if "->" in form else "b")))


@pytest.mark.parametrize("form", FORMS)
def test_einsum_is_that_of_the_dense_kernel(form):
    x, first = operand(form), form.startswith("edhc")
    weight = nvfp4.repack(KERNEL, "reference") if "bh" in form else KERNEL
    operands = (weight, x) if first else (x, weight)
    activation = "token" if "bedcx" not in form else None
    y = jax.jit(functools.partial(nvfp4.einsum, form, activation_scale=activation))(*operands)
    dense = (W, x) if first else (x, W)
    assert_equal(y, np.einsum(form, *(np.asarray(a, np.float64) for a in dense)))


def test_shapes_of_every_form_are_those_of_lax():
    """Each way to pair the axes of x with a weight's, on each side."""
    w = jax.eval_shape(lambda: KERNEL)
    dense = jax.ShapeDtypeStruct(W.shape, W.dtype)
    checked = 0
    for batch in ((), (0,), (2,), (2, 0), (0, 2)):
        for contracting in itertools.permutations((1, 3, *([0] if 0 not in batch else []))):
            if not {1, 3} <= set(contracting):
                continue
            paired = [*contracting, *batch]
            for order in list(itertools.permutations(range(len(paired) + 1)))[::17]:
                sizes = [*(W.shape[a] for a in paired), 7]
                x = jax.ShapeDtypeStruct([sizes[i] for i in order], jnp.bfloat16)
                of_x = [order.index(i) for i in range(len(paired))]
                count = len(contracting)
                dims = ((of_x[:count], contracting), (of_x[count:], batch))
                swapped = ((contracting, of_x[:count]), (batch, of_x[count:]))
                for lhs, rhs, numbers in ((x, w, dims), (w, x, swapped)):
                    y = jax.eval_shape(
                        functools.partial(nvfp4.dot_general, dimension_numbers=numbers), lhs, rhs
                    )
                    plain = [dense if a is w else x for a in (lhs, rhs)]
                    expected = jax.eval_shape(
                        functools.partial(lax.dot_general, dimension_numbers=numbers), *plain
                    )
                    assert y.shape == expected.shape, numbers
                    checked += 1
    assert checked > 60


@pytest.mark.parametrize("arch", [None, "sm_90a"])
@pytest.mark.parametrize("kernel_first", [False, True])
def test_dot_general_takes_the_kernel_on_either_side(kernel_first, arch):
    kernel = nvfp4.repack(KERNEL, arch) if arch else KERNEL
    x = exact(4, 3, 2, 5)  # c, e, b, d
    if kernel_first:
        dims = (((3, 1), (0, 3)), ((0,), (1,)))
        y = nvfp4.dot_general(kernel, x, dims)
        expected = lax.dot_general(W, x, dims, precision="highest")
    else:
        dims = (((3, 0), (1, 3)), ((1,), (0,)))
        y = nvfp4.dot_general(x, kernel, dims)
        expected = lax.dot_general(x, W, dims, precision="highest")
    assert_equal(y, np.asarray(expected, np.float64))


def test_canonical_and_repacked_weights_stand_for_arrays_n_k():
    w, x = exact(6, 40), exact(3, 40)
    for weight in (nvfp4.quantize(w), nvfp4.repack(nvfp4.quantize(w), "sm_90a")):
        y = nvfp4.einsum("mk,nk->mn", x, weight)
        assert_equal(y, np.asarray(x, np.float64) @ np.asarray(w, np.float64).T)


MATMULS = (
    ((5,), (5, 2), 0),
    ((4, 5), (5,), 0),
    ((4, 5), (5, 2), 0),
    ((7, 4, 5), (5, 2), 0),
    ((3, 4, 5), (3, 5, 2), 1),
    ((1, 4, 5), (3, 5, 2), 1),
    ((3, 4, 5), (1, 5, 2), 1),
    ((5,), (3, 5, 2), 1),
    ((2, 1, 4, 5), (3, 5, 2), 1),
)


@pytest.mark.parametrize(("of_x", "of_w", "contracting"), MATMULS)
def test_matmul_is_that_of_numpy(of_x, of_w, contracting):
    x, w = np.asarray(exact(*of_x)), exact(*of_w)
    kernel = nvfp4.quantize_kernel(w, contracting, tuple(range(len(of_w) - 2)))
    assert_equal(x @ kernel, np.matmul(x, np.asarray(w)))
    if len(of_x) == len(of_w) == 2:
        assert_equal(kernel.T @ x.T, np.asarray(w).T @ x.T)
        assert_equal(kernel.T @ x[0], np.asarray(w).T @ x[0])
    if len(of_x) == len(of_w) == 3:
        swap = functools.partial(np.swapaxes, axis1=1, axis2=2)
        assert_equal(kernel.transpose(0, 2, 1) @ swap(x), swap(np.matmul(x, np.asarray(w))))


# ---- Quantization of the activations ------------------------------------------------------------


@pytest.mark.parametrize("activation", ["token", "tensor", 0.002, None])
def test_a_plain_product_is_linear(activation):
    x = jnp.asarray(RNG.standard_normal((4, 40)), jnp.float32)
    kernel = nvfp4.quantize_kernel(jnp.asarray(RNG.standard_normal((40, 6)), jnp.float32))
    expected = nvfp4.linear(x, kernel.weight, activation_scale=activation)
    dims = (((1,), (0,)), ((), ()))
    y = nvfp4.dot_general(x, kernel, dims, activation_scale=activation)
    np.testing.assert_array_equal(y, expected)
    if activation == "token":
        np.testing.assert_array_equal(x @ kernel, expected)


@pytest.mark.parametrize("activation", ["token", "tensor", 0.002])
def test_each_matrix_of_a_stack_is_multiplied_as_linear_does(activation):
    x = jnp.asarray(RNG.standard_normal((3, 4, 40)), jnp.float32)
    kernel = nvfp4.quantize_kernel(jnp.asarray(RNG.standard_normal((3, 40, 6)), jnp.float32), 1, 0)
    y = nvfp4.einsum("emk,ekn->emn", x, kernel, activation_scale=activation)
    for e in range(3):
        if activation == "tensor":  # one scale for all of x: the rows of all matrices in one call
            of_all = nvfp4.linear(x.reshape(12, 40), kernel[e].weight, activation_scale="tensor")
            np.testing.assert_allclose(y[e], of_all[4 * e : 4 * e + 4], rtol=1e-6, atol=1e-6)
        else:
            expected = nvfp4.linear(x[e], kernel[e].weight, activation_scale=activation)
            np.testing.assert_array_equal(y[e], expected)


# ---- Dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_x", "of_w", "preferred"),
    [
        ("bfloat16", "bfloat16", None),
        ("bfloat16", "float32", None),
        ("float16", "bfloat16", None),
        ("int32", "bfloat16", None),
        ("bfloat16", "bfloat16", "float32"),
    ],
)
@pytest.mark.parametrize("form", ["mk,kn->mn", "nk,kn->n"])
def test_dtypes_are_those_of_the_dense_product(of_x, of_w, preferred, form):
    x = jax.ShapeDtypeStruct((3, 16), of_x)
    w = jax.ShapeDtypeStruct((16, 3), of_w)

    def product(einsum, x, w):
        return einsum(form, x, w, preferred_element_type=preferred)

    expected = jax.eval_shape(functools.partial(product, jnp.einsum), x, w)
    y = jax.eval_shape(lambda x, w: product(nvfp4.einsum, x, nvfp4.quantize_kernel(w)), x, w)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)


# ---- Transformations ----------------------------------------------------------------------------


def test_gradient_is_straight_through():
    x = exact(2, 3, 5, 4)
    ct = jnp.asarray(RNG.integers(-4, 4, (2, 3, 2)), jnp.float32)

    def loss(x, kernel):
        return (nvfp4.einsum("bedc,edhc->beh", x, kernel) * ct).sum()

    dx = jax.jit(jax.grad(jax.checkpoint(loss)))(x, KERNEL)
    expected = np.einsum("beh,edhc->bedc", ct, np.asarray(W))
    np.testing.assert_allclose(dx, expected, rtol=1e-6)
    dw = jax.grad(loss, 1, allow_int=True)(x, KERNEL)
    assert all(
        leaf.dtype == jax.dtypes.float0 or not np.any(np.asarray(leaf, np.float32))
        for leaf in jax.tree.leaves(dw)
    )


def test_vmap_and_scan_over_stacked_kernels():
    w, x = exact(2, 16, 2, 8), exact(2, 3, 16)
    kernel = nvfp4.quantize_kernel(w, 1, 0)

    def product(x, kernel):
        return nvfp4.einsum("md,dnh->mnh", x, kernel)

    expected = np.einsum("lmd,ldnh->lmnh", np.asarray(x), np.asarray(w, np.float64))
    assert_equal(jax.vmap(product)(x, kernel), expected)
    _, y = jax.jit(lambda xs: lax.scan(lambda c, one: (c, product(*one)), 0, xs))((x, kernel))
    assert_equal(y, expected)
    last = np.einsum("md,ldnh->lmnh", np.asarray(x[0]), np.asarray(w, np.float64))
    assert_equal(jax.vmap(product, (None, 0))(x[0], kernel), last)


# ---- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x, k: nvfp4.einsum("bd,edhc->beh", x, k), ValueError,
         r"contract its axes \(1, 3\); this one contracts \(1,\) \(quantize it with contract"),
        (lambda x, k: nvfp4.einsum("bd,dd->b", x, k), ValueError, "with the NVFP4 weight"),
        (lambda x, k: nvfp4.einsum("bd,eddc->b", x, k), ValueError, "has a subscript twice"),
        (lambda x, k: nvfp4.einsum("bdc,edhc->beh", x, k), ValueError, "with the array"),
        (lambda x, k: nvfp4.einsum("bh,edhc->bedc", x[:, :2], k), ValueError, r"contracts \(2,\)"),
        (lambda x, k: nvfp4.einsum("bd,bd->b", x, x), TypeError, "neither is one"),
        (lambda x, k: nvfp4.einsum("edhc,edhc->e", k, k), TypeError, "both are"),
        (lambda x, k: nvfp4.einsum("b,bd,edhc->e", x, x, k), ValueError, "got 3 operands"),
        (lambda x, k: nvfp4.einsum("dc,edhc->eh", x, k), ValueError, "must have one size"),
        (lambda x, k: x[:, :2] @ k, ValueError, "was quantized for products"),
        (lambda x, k: nvfp4.dot_general(x, k, (((1,), (1, 3)), ((), ()))), ValueError,
         "no partner"),
        (lambda x, k: nvfp4.dot_general(x, k, (((2,), (1,)), ((), ()))), ValueError,
         "different axes of lhs, which has 2"),
        (lambda x, k: nvfp4.dot_general(x, k, (((1,), (1,)), ((), ())),
                                        preferred_element_type=jnp.int32), TypeError,
         "preferred_element_type must be"),
        (lambda x, k: jnp.ones((2, 5), complex) @ nvfp4.quantize_kernel(W[0, :, :, 0]),
         TypeError, "complex"),
    ],
)  # fmt: skip
def test_what_cannot_be_multiplied_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(jnp.ones((2, 5)), KERNEL)
