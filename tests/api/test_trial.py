# SPDX-License-Identifier: Apache-2.0
"""The first use of a kernel: what is wrong, or does not run, is passed over. No GPU is needed."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_nvfp4.config import OutFormat, Scaling, configs
from jax_nvfp4.config.limits import TYPICAL
from jax_nvfp4.config.quantize import select_quantize
from jax_nvfp4.ops import device
from jax_nvfp4.ops.linear import trial
from jax_nvfp4.ops.linear.plan import plan
from jax_nvfp4.ops.linear.reference import reference
from jax_nvfp4.ops.linear.spec import LinearSpec
from jax_nvfp4.ops.quantize import trial as quantize_trial
from jax_nvfp4.ops.quantize.plan import QuantizePlan
from jax_nvfp4.ops.quantize.reference import reference as quantize_reference

ARCH = "sm_120f"


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Stands for a GPU: this CPU, on which nothing was passed over yet."""
    monkeypatch.delenv("JAX_NVFP4_CHECK", raising=False)
    monkeypatch.setattr(device, "runs_here", lambda arch: True)
    monkeypatch.setattr(device, "gpu", lambda: jax.local_devices(backend="cpu")[0])
    monkeypatch.setattr(device, "_unusable", {})
    device._warn_once.cache_clear()
    trial._fault.cache_clear()


def decided(arch=ARCH, m=3, scaling=Scaling.TOKEN, groups=0, invariant=False):
    """Decides as a call does, with what was passed over so far."""
    spec = LinearSpec(None, 512, 512, scaling, False, "bfloat16", invariant)
    limits = device.Limits(TYPICAL[arch].num_sms, frozenset(device._unusable))
    return plan(spec, m, "bfloat16", arch=arch, limits=limits, groups=groups)


class Kernels:
    """Carries plans out by the reference, with a fault in some kernels; counts what is tried."""

    def __init__(self, wrong=(), broken=()):
        self.wrong, self.broken, self.tried = wrong, broken, []

    def __call__(self, operands, chosen, groups):
        name = chosen.gemm.name
        self.tried.append(name)
        if name in self.broken:
            raise jax.errors.JaxRuntimeError("INTERNAL: out of clusters\nmore")
        if groups.sizes is None:
            (y,) = reference(*operands.flat(), spec=chosen.spec)
        else:
            first = chosen.m - trial.GROUPS + 1
            parts = []
            for g, rows in enumerate([slice(0, first), slice(first, first + 1)]):
                w = [part[g] for part in operands.weight]
                given = operands.scale_or_amax
                given = given if given is None or not given.ndim else given[rows]
                one = [operands.x[rows], *w, *([] if given is None else [given])]
                parts += reference(*one, spec=chosen.spec)
            y = jnp.concatenate(parts)
        return y.at[-1, -1].mul(jnp.float32(1.5)) if name in self.wrong else y


def test_a_kernel_that_is_right_is_tried_once():
    kernels = Kernels()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert trial.usable(decided, kernels, per_row=False) == decided()
    assert kernels.tried == [decided().gemm.name]


@pytest.mark.parametrize("fault", ["wrong", "broken"])
def test_another_kernel_takes_the_place_of_a_faulty_one(fault):
    first = decided().gemm.name
    kernels = Kernels(**{fault: (first,)})
    words = "it is wrong: a result differs by" if fault == "wrong" else "out of clusters"
    with pytest.warns(RuntimeWarning, match=f"passes over its kernel {first} on cpu.*{words}"):
        chosen = trial.usable(decided, kernels, per_row=False)
    assert chosen.gemm is not None and chosen.gemm.name != first
    assert kernels.tried == [first, chosen.gemm.name]
    # Inside of a trace, too; and now it is known.
    jax.make_jaxpr(lambda x: trial.usable(decided, kernels, per_row=False) and x)(1.0)
    assert len(kernels.tried) == 2


def test_where_all_are_faulty_the_reference_serves():
    kernels = Kernels(wrong={c.name for c in configs(ARCH)})
    with pytest.warns(RuntimeWarning, match="passes over"):
        assert trial.usable(decided, kernels, per_row=False).gemm is None


def test_what_is_tried(monkeypatch):
    never = Kernels(wrong={decided().gemm.name})
    monkeypatch.setenv("JAX_NVFP4_CHECK", "0")
    assert trial.usable(decided, never, per_row=False) == decided()
    monkeypatch.delenv("JAX_NVFP4_CHECK")
    proven = functools.partial(decided, arch="sm_90a")
    assert trial.usable(proven, never, per_row=False).gemm is not None
    monkeypatch.setattr(device, "runs_here", lambda arch: False)  # lowering for another machine
    assert trial.usable(decided, never, per_row=False) == decided()
    assert not never.tried
    monkeypatch.setattr(device, "runs_here", lambda arch: True)
    monkeypatch.setenv("JAX_NVFP4_CHECK", "1")
    trial.usable(proven, never, per_row=False)
    assert never.tried == [proven().gemm.name]


@pytest.mark.parametrize(
    ("scaling", "per_row", "groups"),
    [
        (Scaling.TENSOR, False, 0),
        (Scaling.STATIC, False, 0),
        (Scaling.STATIC, True, 5),
        (Scaling.AMAX, False, 5),
        (Scaling.AMAX, True, 0),
    ],
)
def test_scalings_and_groups(scaling, per_row, groups):
    decide = functools.partial(decided, "sm_90a", scaling=scaling, groups=groups)
    assert decide().gemm.grouped == bool(groups)
    assert trial.fault_of(decide(), Kernels(), per_row=per_row) is None
    wrong = Kernels(wrong={decide().gemm.name})
    assert "it is wrong" in trial.fault_of(decide(), wrong, per_row=per_row)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100f", "sm_120f"])
def test_there_is_a_problem_for_each_kernel(arch):
    limits = TYPICAL[arch]
    for config in configs(arch):
        for split in {1, config.split_k}:
            chosen = trial.plan_of(config, split, limits)
            small = trial._few_tiles(chosen)
            assert small.gemm is config
            assert (small.gate is None) == (config.epilogue == "plain")
            operands, groups = trial._operands(small, False)
            assert (groups.sizes is not None) == config.grouped
            assert sum(len(part.x) for part in operands) == small.m > config.tile_m
            assert all(np.isfinite(part.x.astype(np.float32)).all() for part in operands)


def test_where_jax_has_no_cpu_the_gpu_stands_in(monkeypatch):
    here = jax.local_devices()[0]

    def none(backend=None):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(device, "gpu", lambda: here)
    monkeypatch.setattr(jax, "local_devices", none)
    assert device.host() is here


@pytest.mark.parametrize("scaling", [Scaling.TENSOR, Scaling.STATIC, Scaling.AMAX_ROWS])
def test_a_quantizer_that_is_wrong_gives_way_to_the_reference(scaling):
    config = select_quantize(ARCH, "bfloat16", scaling)
    chosen = QuantizePlan(config, scaling, OutFormat.LINEAR, 188)
    plain = Scaling.AMAX if scaling == Scaling.AMAX_ROWS else scaling

    def right(x, given, chosen):
        return tuple(quantize_reference(x, given, scaling=plain))

    def wrong(x, given, chosen):
        data, *scales = right(x, given, chosen)
        return data.at[-1, -1].add(jnp.uint8(1)), *scales

    assert quantize_trial.usable(chosen, "bfloat16", right)
    with pytest.warns(RuntimeWarning, match=f"{config.name}.*it is wrong: 1 bytes differ"):
        assert not quantize_trial.usable(chosen, "bfloat16", wrong)
    assert not quantize_trial.usable(chosen, "bfloat16", right)  # passed over from now on
