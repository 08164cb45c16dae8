# SPDX-License-Identifier: Apache-2.0
"""Checkpoints into models that know nothing of NVFP4."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from llama import (
    DTYPE,
    LINEN_NAMES,
    NNX_NAMES,
    VOCAB,
    LinenLlama,
    NnxLlama,
    assert_equal_to_rounding,
    weights,
)

import jax_nvfp4 as nvfp4
from jax_nvfp4.conversion.convert import path_of
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

    # The dense model on the values of the checkpoint, rounded to bfloat16.
    nvfp4.save_checkpoint(tmp_path, {k: jnp.asarray(v, DTYPE) for k, v in values.items()})
    dense = nvfp4.load_params(tmp_path, like=abstract, names=names)
    assert jax.tree.map(lambda a: a.shape, dense) == jax.tree.map(lambda a: a.shape, abstract)
    assert_equal_to_rounding(found, jax.jit(fn)(dense, IDS))


def megatron(path, leaf):
    """Where a dense leaf lies on the mesh axis x: outputs divided first, and then inputs."""
    name = next(str(part) for part in map(last_name, path) if str(part) in DIVIDED)
    axes = [None] * len(leaf.shape)
    axes[DIVIDED[name]] = "x"
    return P(*axes)


DIVIDED = {"q": -1, "k": -1, "v": -1, "o": -2, "gate": -1, "up": -1, "gate_up": -1, "down": -2}


def last_name(key):
    return getattr(key, "key", getattr(key, "name", None))


@pytest.mark.parametrize(
    ("model", "names"), [(nnx_model, NNX_NAMES), (linen_model, LINEN_NAMES)], ids=["nnx", "linen"]
)
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_a_decoder_divided_over_two_devices_equals_one_device(checkpoint, model, names):
    folder, _ = checkpoint
    fn, abstract = model()
    run, like, report = nvfp4.convert(fn, abstract, IDS, activation_scale="static")
    one = nvfp4.load_params(folder, like=like, names=names)

    mesh = jax.sharding.Mesh(jax.devices()[:2], "x")
    chosen = {leaf.path for leaf in report.quantized}
    specs = jax.tree_util.tree_map_with_path(
        lambda path, leaf: megatron(path, leaf) if path_of(path) in chosen else P(), abstract
    )
    places = nvfp4.shardings(like, mesh, specs)
    like = jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), like, places
    )
    two = nvfp4.load_params(folder, like=like, names=names)
    jax.tree.map(np.testing.assert_array_equal, two, one)
    divided = [a for a in jax.tree.leaves(two) if not a.sharding.is_fully_replicated]
    assert all(a.addressable_shards[0].data.nbytes == a.nbytes // 2 for a in divided)
    # Codes and block scales of all; three blocks of 16 columns (o) are no two halves.
    assert len(divided) == 2 * sum("o" not in leaf.path for leaf in report.quantized)
    found = jax.jit(run)(two, jax.device_put(IDS, jax.NamedSharding(mesh, P())))
    assert found.sharding.device_set == set(mesh.devices.flat)
    assert_equal_to_rounding(found, jax.jit(run)(one, IDS))


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


@pytest.mark.parametrize("options", [{"tied": "copy"}, {"fuse": True}], ids=str)
def test_tied_and_joined_leaves_are_loaded_as_convert_makes_them(tmp_path, options):
    shapes = {"table": (48, 32), "k": (32, 2, 8), "q": (32, 32)}
    rng = np.random.default_rng(4)
    dense = {n: jnp.asarray(rng.standard_normal(s, np.float32), DTYPE) for n, s in shapes.items()}
    files = {n: jnp.asarray(w if n == "table" else w.reshape(32, -1).T) for n, w in dense.items()}
    nvfp4.save_checkpoint(tmp_path, files)

    def fn(p, ids):
        x = p["table"][ids]
        k = jnp.einsum("td,dhk->thk", x, p["k"]).reshape(-1, 16)
        return jnp.concatenate([k, x @ p["q"]], -1), x @ p["table"].T

    ids = jnp.arange(3)
    convert = functools.partial(nvfp4.convert, fn, where=lambda path, use: True)
    run, expected, _ = convert(dense, ids, **options)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), dense)
    _, like, _ = convert(abstract, ids, **options)
    loaded = nvfp4.load_params(tmp_path, like=like, names={n: n for n in shapes})
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert len(jax.tree.leaves(loaded)) == (10 if "tied" in options else 4)
    assert [y.shape for y in jax.eval_shape(run, loaded, ids)] == [(3, 48), (3, 48)]
    if "fuse" in options:
        with pytest.raises(ValueError, match="shares its kernel with other leaves"):
            nvfp4.load_params(tmp_path, like=like, names={"table": "table", "k": "k"})


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
        # Not abstract: without a word it would keep the ones.
        ({"w": jnp.ones((2, 2))}, {"v": "a"}, "names has 'v', .* no leaf of like; paths are 'w'"),
        ({"w": {"k": jnp.ones((2, 2))}}, {"w.k": "a", "w.*.k": "b"}, r"names has 'w\.\*\.k'"),
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


@pytest.mark.parametrize("search", [None, "4over6"])
def test_a_stacked_tensor_is_quantized_matrix_by_matrix(tmp_path, search):
    """As `convert` does it: each layer of the stack with a global scale of its own."""
    w = np.random.default_rng(2).standard_normal((3, 32, 32), np.float32)
    w *= np.array([1, 100, 0.01], np.float32)[:, None, None]
    nvfp4.save_checkpoint(tmp_path, {"layers": jnp.asarray(w.swapaxes(1, 2), DTYPE)})
    params = {"w": jnp.asarray(w, DTYPE)}

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    x = jnp.ones((2, 32), DTYPE)
    how = {"activation_scale": None, "search": search}
    run, expected, _ = nvfp4.convert(fn, params, x, **how)
    found = nvfp4.load_params(tmp_path, like=expected, names={"w": "layers"}, search=search)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    np.testing.assert_array_equal(jax.jit(run)(found, x), jax.jit(run)(expected, x))
    with pytest.raises(ValueError, match="search must be None"):
        nvfp4.load_params(tmp_path, like=expected, names={"w": "layers"}, search="best")
