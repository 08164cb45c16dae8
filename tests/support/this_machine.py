# SPDX-License-Identifier: Apache-2.0
"""What the machine that runs the tests has."""

import types
from collections.abc import Callable

import jax
import jax.export
import pytest

from jax_nvfp4.ops.device import local_arch


def arches() -> tuple[str, ...]:
    """Architectures whose repacked weights run here: a CPU runs every order, a GPU its own.

    Of a GPU, not "reference": that asks for the pure-JAX path, which sums in another order.
    """
    if jax.default_backend() == "cpu":
        return ("reference", "sm_90a", "sm_100f", "sm_120f")
    return (local_arch(),)


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export` must be told on a GPU: JAX vouches for no custom call but its own."""
    calls = ("jax_nvfp4_quantize", "jax_nvfp4_gemm", "jax_nvfp4_linear")
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in calls]


def mesh_sizes() -> tuple[tuple[int, int], ...]:
    """Sizes of the meshes with axes x and y that the devices here make; none of a single one."""
    count = jax.device_count()
    if count >= 8:
        return ((2, 4),)
    if count >= 4:
        return ((2, 2),)
    return ((2, 1), (1, 2)) if count >= 2 else ()


def mesh(
    sizes: tuple[int, int] | None, kind: jax.sharding.AxisType = jax.sharding.AxisType.Auto
) -> jax.sharding.Mesh:
    """A mesh of one of `mesh_sizes`; skips the test where there is none."""
    if sizes is None:
        pytest.skip("needs several devices")
    devices = jax.devices()[: sizes[0] * sizes[1]]
    return jax.make_mesh(sizes, ("x", "y"), axis_types=(kind,) * 2, devices=devices)


def each_mesh() -> pytest.MarkDecorator:
    """Runs a test, or a fixture's tests, on each mesh: parameter `sizes`."""
    return pytest.mark.parametrize("sizes", mesh_sizes() or (None,), ids=str)


def tests_of(module: types.ModuleType) -> dict[str, Callable[..., None]]:
    """The tests of a module, to be collected in another one, under names that are its own.

    By the names they have, tests of two modules would take each other's place.
    """
    suffix = module.__name__.removeprefix("test_")
    return {
        f"{name}__{suffix}": test
        for name, test in vars(module).items()
        if name.startswith("test_") and callable(test)
    }
