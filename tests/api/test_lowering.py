# SPDX-License-Identifier: Apache-2.0
"""Which kernels a graph for an NVIDIA GPU calls, by the weight's architecture; needs no GPU."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4 as nvfp4
import kernel_objects
from jax_nvfp4.config import GemmProblem, Scaling
from jax_nvfp4.config.gemm.select import select
from jax_nvfp4.config.limits import TYPICAL
from jax_nvfp4.ops import device
from jax_nvfp4.ops.linear.cuda import cuda as linear_on_gpu
from jax_nvfp4.ops.linear.spec import LinearSpec

N, K = 512, 1024
BLACKWELL = ("sm_100f", "sm_120f")


@pytest.fixture
def kernels_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package as it is with the extension, which a machine without a GPU need not have."""
    for name in ("device", "linear.cuda", "quantize.cuda"):
        module = importlib.import_module(f"jax_nvfp4.ops.{name}")
        monkeypatch.setattr(module, "custom_calls", kernel_objects.custom_calls())
    # The GPU that a graph is planned for is the weight's, whatever this machine has.
    monkeypatch.setattr(device, "_cuda_device", lambda: None)


def calls(arch: str, m: int, dtype: str = "bfloat16", **options: object) -> list[tuple[str, ...]]:
    """(target, kernels in their order, any split of K) of the custom calls of `linear`."""
    w = np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)
    packed = nvfp4.repack(nvfp4.quantize(w), arch)
    traced = jax.jit(lambda x: nvfp4.linear(x, packed, **options)).trace(jnp.zeros((m, K), dtype))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found = []
    for line in text.splitlines():
        if match := re.search(r"custom_call @jax_nvfp4_(\w+)\(", line):
            kernels = re.findall(r'kernel = "(\w+)"', line)
            split = re.findall(r"split_k = (\d+)", line)
            found.append((match[1], *sorted(kernels, key=lambda name: "gemm" in name), *split))
    return found


@pytest.mark.parametrize("m", [1, 33, 64, 128, 512, 513, 4096])
@pytest.mark.parametrize("arch", BLACKWELL)
def test_quantized_activations(kernels_built_in: None, arch: str, m: int) -> None:
    """One call quantizes and multiplies, for many rows two; the table says by which config.

    One scale for the tensor and one per token are the same for one row: no exchange is needed.
    """
    config, split = select(GemmProblem(m, N, K, arch, "e2m1"), TYPICAL[arch].num_sms)
    short = arch.replace("_", "")
    tensor = "rows" if m == 1 else "grid"
    for scaling, kind in (("token", "rows"), ("tensor", tensor), (0.5, "flat")):
        found = calls(arch, m, activation_scale=scaling)
        quantize = f"quantize_{short}_{kind}_bf16"
        if m <= 512:
            assert found == [("linear", quantize, config.name, str(split))]
        else:
            assert found == [("quantize", quantize), ("gemm", config.name, str(split))]


@pytest.mark.parametrize("arch", ["sm_90a", *BLACKWELL])
def test_layers_that_share_x_quantize_it_once_where_that_is_long(
    kernels_built_in: None, arch: str
) -> None:
    """By what XLA leaves of the custom calls of two layers."""
    rng = np.random.default_rng(0)
    layers = [
        nvfp4.repack(nvfp4.quantize(rng.standard_normal((N, K)).astype(np.float32)), arch)
        for _ in range(2)
    ]
    spec = LinearSpec(arch, N, K, Scaling.TOKEN, False, "bfloat16", False)

    def both(x: jax.Array) -> list[jax.Array]:
        operands = [(w.data, w.block_scale, w.global_scale) for w in layers]
        return [y for w in operands for y in linear_on_gpu(x, *w, spec=spec)]

    for m, expected in ((512, ["linear"] * 2), (513, ["gemm", "gemm", "quantize"])):
        # The targets are there on the CPU too, to be compiled and not to be run.
        text = jax.jit(both).lower(jnp.zeros((m, K), jnp.bfloat16)).compile().as_text()
        found = re.findall(r'custom_call_target="jax_nvfp4_(\w+)"', text)
        assert sorted(found) == expected


@pytest.mark.parametrize(("dtype", "short"), [("bfloat16", "bf16"), ("float16", "f16")])
@pytest.mark.parametrize("arch", BLACKWELL)
def test_weight_only(kernels_built_in: None, arch: str, dtype: str, short: str) -> None:
    """Few rows by the kernel; many, and a batch-invariant call, by XLA's dot."""
    kernel = f"gemm_{arch.replace('_', '')}_weight_only_{short}_t16x64"
    for m in (1, 64):
        ((target, name, _),) = calls(arch, m, dtype, activation_scale=None)
        assert (target, name) == ("gemm", kernel)
    assert calls(arch, 65, dtype, activation_scale=None) == []
    assert calls(arch, 1, dtype, activation_scale=None, batch_invariant=True) == []


@pytest.mark.parametrize("arch", BLACKWELL)
def test_batch_invariant(kernels_built_in: None, arch: str) -> None:
    chosen = {calls(arch, m, batch_invariant=True)[0][2:] for m in (1, 64, 300)}
    assert len(chosen) == 1


@pytest.mark.parametrize("arch", BLACKWELL)
def test_no_rows(kernels_built_in: None, arch: str) -> None:
    assert calls(arch, 0) == []
