# SPDX-License-Identifier: Apache-2.0
"""`calibrate` sees what each weight is multiplied with; static scales and files made of that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_nvfp4 as nvfp4

D = 32
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.bfloat16)


PARAMS = {
    "in": normal(D, D),
    "stack": normal(2, D, D) / 8,
    "experts": normal(3, D, D),
    "norm": normal(D),
}
BATCHES = [normal(4, D), normal(2, D) * 2]


def model(p, x):
    @jax.checkpoint
    def layer(x, w):
        return jnp.tanh(x @ w), None

    x = x @ p["in"] * p["norm"]
    x, _ = lax.scan(layer, x, p["stack"])
    return jnp.einsum("td,edf->etf", x, p["experts"])


@pytest.fixture(scope="module")
def calibration():
    return nvfp4.calibrate(model, PARAMS, BATCHES)


def inputs_of_each():
    """The inputs of `in`, of both layers of `stack`, and of `experts`, all batches as rows."""
    rows = [[], [], [], []]
    for x in BATCHES:
        rows[0].append(x)
        x = x @ PARAMS["in"] * PARAMS["norm"]
        for i in range(2):
            rows[1 + i].append(x)
            x = jnp.tanh(x @ PARAMS["stack"][i])
        rows[3].append(x)
    return [np.asarray(jnp.concatenate(r), np.float64) for r in rows]


def test_statistics_are_those_of_the_inputs(calibration):
    first, layer0, layer1, last = inputs_of_each()
    expected = {
        "in": first,
        "stack": np.stack([layer0, layer1]),
        "experts": last,  # its axis is one of the rows
    }
    assert set(calibration) == set(expected)
    for name, x in expected.items():
        seen = calibration[name]
        np.testing.assert_allclose(seen.mean_square, (x**2).mean(-2), rtol=0.02, err_msg=name)
        np.testing.assert_allclose(seen.amax, np.abs(x).max((-2, -1)), rtol=0.01, err_msg=name)


def test_static_scales_in_one_line(calibration):
    run, params, _ = nvfp4.convert(
        model, PARAMS, BATCHES[0], activation_scale="static", calibration=calibration
    )
    for name, leaf in params.items():
        if name != "norm":
            expected = nvfp4.global_scale(calibration[name].amax[..., None], "token")
            np.testing.assert_array_equal(leaf.input_scale, expected)
    # The first product of the program is that of `linear` with the scale.
    only = {"in": PARAMS["in"]}
    run, params, _ = nvfp4.convert(
        lambda p, x: x @ p["in"],
        only,
        BATCHES[0],
        activation_scale="static",
        calibration=calibration,
    )
    weight, scale = params["in"].kernel.weight, params["in"].input_scale
    expected = nvfp4.linear(BATCHES[0], weight, activation_scale=scale)
    np.testing.assert_array_equal(
        np.asarray(run(params, BATCHES[0]), np.float32), np.asarray(expected, np.float32)
    )


def test_static_without_statistics_is_refused(calibration):
    with pytest.raises(ValueError, match="needs a calibration of each weight; experts has none"):
        nvfp4.convert(model, PARAMS, BATCHES[0], activation_scale="static")
    wrong = calibration.renamed(lambda name: {"stack": "experts"}.get(name))
    with pytest.raises(ValueError, match=r"calibration of experts must have the shape \(32,\)"):
        nvfp4.convert(model, PARAMS, BATCHES[0], activation_scale="static", calibration=wrong)


def test_the_file_gives_the_same(calibration, tmp_path):
    path = tmp_path / "statistics.npz"
    calibration.renamed(lambda name: f"model.{name}.weight").save(path)
    loaded = nvfp4.Calibration.load(path)
    assert set(loaded) == {f"model.{name}.weight" for name in calibration}
    for name, seen in calibration.items():
        again = loaded[f"model.{name}.weight"]
        np.testing.assert_array_equal(again.mean_square, seen.mean_square)
        np.testing.assert_array_equal(again.amax, seen.amax)


def test_what_is_no_calibration_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be named \*\.npz"):
        nvfp4.Calibration({}).save(tmp_path / "file.txt")
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    with pytest.raises(ValueError, match="not a calibration file"):
        nvfp4.Calibration.load(tmp_path / "other.npz")
    np.savez(tmp_path / "bad.npz", **{"w:mean_square": np.array([np.nan]), "w:amax": np.array(1.0)})
    with pytest.raises(ValueError, match="statistics of w are NaN"):
        nvfp4.Calibration.load(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match="an input of w is NaN or infinite"):
        bad = jnp.full((2, D), jnp.nan, jnp.bfloat16)
        nvfp4.calibrate(lambda p, x: x @ p["w"], {"w": PARAMS["in"]}, [bad])
    with pytest.raises(ValueError, match="at least one batch"):
        nvfp4.calibrate(model, PARAMS, [])
