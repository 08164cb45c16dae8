# SPDX-License-Identifier: Apache-2.0
"""From a problem to a config: walks the arch's table."""

import importlib
from types import ModuleType

from jax_nvfp4.config.arches import ARCHES, runnable_arches
from jax_nvfp4.config.gemm.types import GemmConfig, GemmProblem, Rule

# sm_103a walks the table of its family, in which it finds rows of its own.
_MODULES = {"sm_90a": "sm90", "sm_100f": "sm100", "sm_103a": "sm100", "sm_120f": "sm120"}


def _module(arch: str) -> ModuleType:
    if arch not in _MODULES:
        raise ValueError(f"arch {arch!r} has no kernels; kernels exist for {', '.join(ARCHES)}")
    return importlib.import_module(f"jax_nvfp4.config.gemm.{_MODULES[arch]}")


def configs(arch: str) -> tuple[GemmConfig, ...]:
    """Every GEMM config that is compiled for `arch`."""
    return tuple(c for c in _module(arch).CONFIGS if c.arch == arch)


def _takes(rule: Rule, problem: GemmProblem, num_sms: int) -> bool:
    """A row of a table takes a problem, and the GPU runs its kernel."""
    return (
        rule.config.arch in runnable_arches(problem.arch)
        and rule.config.x_dtype == problem.x_dtype
        and rule.config.epilogue == problem.epilogue
        and rule.config.grouped == (problem.groups > 0)
        and rule.when(problem, num_sms)
    )


def rule_for(
    problem: GemmProblem, num_sms: int, unusable: frozenset[str] = frozenset()
) -> Rule | None:
    """The row of the arch's table that serves a problem; None where none does.

    There is one for each plain problem whose x is e2m1 (Blackwell) or 16-bit (Hopper). Blackwell's
    kernels for 16-bit x are for few rows. Hopper has grouped ones.

    Args:
        problem: the call.
        num_sms: multiprocessors of the device.
        unusable: names of kernels to pass over.
    """
    rules = (r for r in _module(problem.arch).RULES if r.config.name not in unusable)
    return next((rule for rule in rules if _takes(rule, problem, num_sms)), None)


def select(problem: GemmProblem, num_sms: int) -> tuple[GemmConfig, int]:
    """The config that serves a problem, and the number of ways to split K.

    Raises:
        ValueError: no row of the arch's table takes the problem.
    """
    rule = rule_for(problem, num_sms)
    if rule is None:
        raise ValueError(f"no kernel config takes {problem}")
    return rule.config, rule.split_k(problem, num_sms)


def serves(problem: GemmProblem, num_sms: int) -> bool:
    """The arch's table has a row for a problem."""
    return rule_for(problem, num_sms) is not None


def scratch_bytes(config: GemmConfig, problem: GemmProblem, split_k: int, num_sms: int) -> int:
    """Bytes of scratch memory that the kernel of `config` needs for `problem`."""
    return _module(config.arch).scratch_bytes(config, problem, split_k, num_sms)
