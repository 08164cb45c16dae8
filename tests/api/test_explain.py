# SPDX-License-Identifier: Apache-2.0
"""`explain`: the plan of a call of `linear`, for any architecture and without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4 as nvfp4
from jax_nvfp4.config import ARCHES, GemmProblem, Scaling, select
from jax_nvfp4.config.limits import TYPICAL, Limits
from jax_nvfp4.ops.linear.plan import ONE_CALL_ELEMENTS, plan
from jax_nvfp4.ops.linear.spec import LinearSpec

N, K = 384, 1000


@pytest.fixture(scope="module")
def weight():
    w = np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)
    return nvfp4.quantize(w)


def x_of(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((*shape, K), dtype)


def short(arch):
    return arch.replace("sm_103a", "sm_100f").replace("_", "")


@pytest.mark.parametrize("m", [1, 48, 4096])
@pytest.mark.parametrize("arch", ARCHES)
def test_the_kernels_of_an_arch(weight, arch, m):
    found = nvfp4.explain(x_of(m), weight, arch=arch)
    x_dtype = "bfloat16" if arch == "sm_90a" else "e2m1"
    config, split = select(GemmProblem(m, N, 1024, arch, x_dtype), TYPICAL[arch].num_sms)
    assert found.kernels == (f"quantize_{short(arch)}_rows_bf16", config.name)
    assert (found.arch, found.split_k) == (arch, split)
    assert found.calls == (1 if m * K <= ONE_CALL_ELEMENTS else 2)
    text = str(found)
    for part in (*found.kernels, arch, f"({m}, {K})", f"({N}, {K})", found.reason):
        assert part in text
    assert ("1 custom call:" in text) == (found.calls == 1)
    assert f"split in {split}" in text if split > 1 else "not split" in text


@pytest.mark.parametrize("arch", ["sm_100f", "sm_120f"])
def test_weight_only_of_many_rows_is_xla_s(weight, arch):
    few, many = (nvfp4.explain(x_of(m), weight, activation_scale=None, arch=arch) for m in (9, 65))
    assert (few.calls, len(few.kernels)) == (1, 1) and "weight_only" in few.kernels[0]
    assert (many.calls, many.kernels, many.arch) == (0, (), "reference")
    assert "65 rows" in many.reason and "without custom calls" in str(many)


@pytest.mark.parametrize("m", [1, 48, 200])
@pytest.mark.parametrize("arch", ARCHES)
def test_the_activation_is_in_the_epilogue(weight, arch, m):
    gated = nvfp4.gate_up(weight, weight)
    for scale in ("token", None):
        found = nvfp4.explain(
            x_of(m), gated, activation_scale=scale, activation=nvfp4.GeGLU(), arch=arch
        )
        if found.gemm is None:  # many rows of 16-bit x on Blackwell
            assert (scale, m > 64, arch != "sm_90a") == (None, True, True)
            continue
        assert found.gemm.epilogue == "gated" and not found.activation_by_xla
        assert (found.gemm_n, found.gemm_out_dtype) == (2 * N, "bfloat16")
        assert "The activation is in the kernel's epilogue." in str(found)
        plain = nvfp4.explain(x_of(m), gated, activation_scale=scale, arch=arch)
        assert found.gemm.name.replace("_gated", "") == plain.gemm.name
        assert (found.split_k, found.calls) == (plain.split_k, plain.calls)


def test_how_x_is_quantized(weight):
    kinds = {}
    for name, scale in {
        "token": "token",
        "tensor": "tensor",
        "static": 0.5,
        "abstract": jax.ShapeDtypeStruct((), jnp.float32),
    }.items():
        found = nvfp4.explain(x_of(2, 24), weight, activation_scale=scale, arch="sm_90a")
        kinds[name] = found.quantize.config.kind
        assert found.m == 48
    assert kinds == {"token": "rows", "tensor": "grid", "static": "flat", "abstract": "flat"}


def test_batch_invariance_and_bias(weight):
    found = [
        nvfp4.explain(
            x_of(m), weight, jnp.ones(N), batch_invariant=True, out_dtype="float32", arch="sm_100f"
        )
        for m in (1, 64, 300)
    ]
    assert len({(plan.gemm, plan.split_k) for plan in found}) == 1
    assert found[0].spec == LinearSpec(None, N, K, Scaling.TOKEN, True, "float32", True)


def test_weights_that_are_repacked(weight):
    hopper = nvfp4.repack(weight, "sm_90a")
    assert nvfp4.explain(x_of(3), hopper, arch="sm_90a").arch == "sm_90a"
    with pytest.raises(ValueError, match=r"repacked for sm_90a, whose order sm_100f"):
        nvfp4.explain(x_of(3), hopper, arch="sm_100f")
    family = nvfp4.explain(x_of(3), nvfp4.repack(weight, "sm_100f"), arch="sm_103a")
    assert family.arch == "sm_103a"
    plain = nvfp4.explain(x_of(3), nvfp4.repack(weight, "reference"), arch="sm_90a")
    assert plain.calls == 0 and "order that no kernel reads" in plain.reason


def test_nothing_is_computed_and_parts_may_be_abstract(weight):
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weight)
    given = nvfp4.explain(x_of(5), weight, arch="sm_120f")
    assert nvfp4.explain(x_of(5), abstract, arch="sm_120f") == given
    x = jnp.ones((5, K), jnp.bfloat16)
    assert nvfp4.explain(x, abstract, arch="sm_120f") == given
    jax.jit(lambda x, w: nvfp4.explain(x, w, arch="sm_120f") and x).trace(x, weight)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks what a CPU runs")
def test_on_a_cpu(weight):
    found = nvfp4.explain(x_of(3), weight)
    assert (found.arch, found.calls) == ("reference", 0)
    assert "cpu" in found.reason and "name an arch" in found.reason
    empty = nvfp4.explain(x_of(0), weight, arch="sm_90a")
    assert empty.calls == 0


def test_errors_are_those_of_linear(weight):
    with pytest.raises(ValueError, match=r"x has K = 7 .*K = 1000"):
        nvfp4.explain(jnp.ones((2, 7)), weight)
    with pytest.raises(TypeError, match=r"x must be .*int32"):
        nvfp4.explain(jax.ShapeDtypeStruct((2, K), jnp.int32), weight)
    with pytest.raises(ValueError, match=r"arch must be one of .*'sm_80'"):
        nvfp4.explain(x_of(2), weight, arch="sm_80")


def test_the_plan_follows_the_limits():
    spec = LinearSpec("sm_100f", 4096, 8192, Scaling.TOKEN, False, "bfloat16", False)
    splits = {
        sms: plan(spec, 8, "bfloat16", arch="sm_100f", limits=Limits(num_sms=sms)).split_k
        for sms in (16, 148)
    }
    assert splits[16] < splits[148]


@pytest.mark.parametrize("arch", ARCHES)
def test_every_reason_is_a_sentence(arch):
    spec = LinearSpec(arch, 4096, 4096, Scaling.TOKEN, False, "bfloat16", False)
    for m in (1, 16, 64, 128, 256, 1024, 8192):
        reason = plan(spec, m, "bfloat16", arch=arch, limits=TYPICAL[arch]).reason
        assert not reason[0].islower() and reason.endswith(".") and len(reason.split()) > 10
