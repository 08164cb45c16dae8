# SPDX-License-Identifier: Apache-2.0
"""Checkpoints into models that know nothing of NVFP4."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama import DTYPE, LINEN_NAMES, NNX_NAMES, VOCAB, LinenLlama, NnxLlama, weights

import jax_nvfp4 as nvfp4
from jax_nvfp4.products.kernel import Nvfp4Kernel

IDS = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (2, 5)))
_quantize = jax.jit(nvfp4.quantize)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A ModelOpt folder, and the values that its tensors stand for."""
    tensors, values = {}, {}
    for name, array in weights().items():
        array = jnp.asarray(array, DTYPE)
        if "proj" in name:
            array = _quantize(array)
            tensors[name.replace(".weight", ".input_scale")] = jnp.float32(2.0**-8)
        tensors[name] = array
        values[name] = np.asarray(
            array.dequantize() if isinstance(array, nvfp4.Nvfp4Tensor) else array, np.float32
        )
    folder = tmp_path_factory.mktemp("modelopt")
    nvfp4.save_checkpoint(folder, tensors)
    return folder, values


def nnx_model():
    """(fn, abstract params) of the nnx Llama."""
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxLlama(nnx.Rngs(0))))
    return lambda state, ids: nnx.merge(graph, state)(ids), state


def linen_model():
    """(fn, abstract params) of the linen Llama."""
    model = LinenLlama()
    return model.apply, jax.eval_shape(model.init, jax.random.key(0), IDS)


def assert_equal_to_rounding(found, expected):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.abs(found - expected).max() <= 2**-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("model", "names"), [(nnx_model, NNX_NAMES), (linen_model, LINEN_NAMES)], ids=["nnx", "linen"]
)
def test_modelopt_checkpoint_runs_in_an_unmodified_model(checkpoint, tmp_path, model, names):
    folder, values = checkpoint
    fn, abstract = model()
    run, like, report = nvfp4.convert(fn, abstract, IDS, activation_scale=None)
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(like))
    assert {leaf.why for leaf in report.left} >= {"looked up (gather)", "matches '*lm_head*'"}
    params = nvfp4.load_params(folder, like=like, names=names)
    assert jax.tree.structure(params) == jax.tree.structure(like)
    found = jax.jit(run)(params, IDS)

    # The dense model on the values of the checkpoint, which bfloat16 does not hold: each product
    # in float32.
    plain = tmp_path / "dense.safetensors"
    nvfp4.save_checkpoint(tmp_path, {k: jnp.asarray(v, DTYPE) for k, v in values.items()})
    del plain
    dense = nvfp4.load_params(tmp_path, like=abstract, names=names)
    assert jax.tree.map(lambda a: a.shape, dense) == jax.tree.map(lambda a: a.shape, abstract)
    assert_equal_to_rounding(found, jax.jit(fn)(dense, IDS))


def test_static_scales_come_from_the_checkpoint(checkpoint):
    folder, _ = checkpoint
    fn, abstract = nnx_model()
    run, like, _ = nvfp4.convert(fn, abstract, IDS, activation_scale="static", repack=False)
    params = nvfp4.load_params(folder, like=like, names=NNX_NAMES)
    leaf = params["layers"][1]["down"]["kernel"]
    leaf = getattr(leaf, "value", leaf)
    assert leaf.input_scale == 2.0**-8
    y = leaf.kernel.weight
    x = jnp.ones((1, y.shape[-1]), DTYPE)
    assert nvfp4.linear(x, y, activation_scale=leaf.input_scale).shape == (1, y.shape[-2])
    assert jax.eval_shape(run, params, IDS).shape == (*IDS.shape, VOCAB)


def test_bf16_checkpoint_gives_the_kernels_of_convert(tmp_path):
    tensors = {name: jnp.asarray(array, DTYPE) for name, array in weights().items()}
    nvfp4.save_checkpoint(tmp_path, tensors)
    fn, abstract = nnx_model()
    dense = nvfp4.load_params(tmp_path, like=abstract, names=NNX_NAMES)
    _, converted, _ = nvfp4.convert(fn, dense, IDS)
    _, like, _ = nvfp4.convert(fn, abstract, IDS)
    loaded = nvfp4.load_params(tmp_path, like=like, names=NNX_NAMES)
    assert jax.tree.structure(loaded) == jax.tree.structure(converted)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(converted), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_fused_rows_keep_their_scales(tmp_path):
    q, k = (jnp.asarray(np.random.default_rng(i).standard_normal((16, 32)), DTYPE) for i in (1, 2))
    tensors = {"q.weight": _quantize(q), "k.weight": _quantize(k * 8)}
    nvfp4.save_checkpoint(tmp_path, tensors)
    abstract = {"qk": jax.ShapeDtypeStruct((32, 32), DTYPE)}
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 32)), DTYPE)
    run, like, _ = nvfp4.convert(lambda p, x: x @ p["qk"], abstract, x, activation_scale=None)
    params = nvfp4.load_params(tmp_path, like=like, names={"qk": ["q.weight", "k.weight"]})
    expected = jnp.concatenate([tensors[n].dequantize() for n in ("q.weight", "k.weight")]).T
    assert_equal_to_rounding(run(params, x), (x.astype(jnp.float32) @ expected).astype(DTYPE))


def kernel(shape, contracting=0):
    """A converted, abstract leaf."""
    leaf = jax.ShapeDtypeStruct(shape, DTYPE)
    return jax.eval_shape(lambda w: nvfp4.quantize_kernel(w, contracting), leaf)


@pytest.mark.parametrize(
    ("like", "names", "message"),
    [
        ({"w": kernel((16, 32))}, {"w": "b.weight"}, "no tensor 'b.weight'"),
        ({"w": kernel((16, 32))}, {}, "names has no name for w"),
        ({"w": kernel((32, 16))}, {"w": "a.weight"}, r"\(32, 16\) does not fit w"),
        ({"w": jax.ShapeDtypeStruct((8, 8), DTYPE)}, {"w": "a.weight"}, "does not fit w"),
        ({"w": jax.ShapeDtypeStruct((4, 4), DTYPE)}, {"w": "square.weight"}, "as it is and trans"),
        ({"w": kernel((16, 16))}, {"w": "scaled.weight"}, "pre_quant_scale"),
        ({"w": jax.ShapeDtypeStruct((32, 16), DTYPE)}, {"w": "x.{}.{}.{}.weight"}, "stacked axes"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, like, names, message):
    tensors = {"a.weight": jnp.ones((32, 16), DTYPE), "square.weight": jnp.ones((4, 4), DTYPE)}
    tensors["scaled.weight"] = _quantize(jnp.ones((16, 16), DTYPE))
    tensors["scaled.pre_quant_scale"] = jnp.ones(16, DTYPE)
    from safetensors.numpy import save_file

    nvfp4.save_checkpoint(tmp_path, tensors) if "scaled" in str(names) else save_file(
        {k: np.asarray(v) for k, v in tensors.items() if "scaled" not in k},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ValueError, match=message):
        nvfp4.load_params(tmp_path, like=like, names=names)


def test_axes_in_names_say_the_order(tmp_path):
    square = jnp.arange(16, dtype=DTYPE).reshape(4, 4)
    nvfp4.save_checkpoint(tmp_path, {"w": square})
    like = {"w": jax.ShapeDtypeStruct((4, 4), DTYPE)}
    for axes, expected in (((0, 1), square), ((1, 0), square.T)):
        params = nvfp4.load_params(tmp_path, like=like, names={"w": ("w", axes)})
        np.testing.assert_array_equal(np.asarray(params["w"]), np.asarray(expected))
    assert not isinstance(params["w"], Nvfp4Kernel)
