# SPDX-License-Identifier: Apache-2.0
"""Faults planted into the sm_100f GEMM's PTX: the machine reports them, or y is wrong."""

import numpy as np
import pytest
from gemm_blackwell import BF16, F16, F32, Case, Problem
from ptx_machine import PtxError, mutate

import kernel_objects
from jax_nvfp4.config import sm100

MUTANTS = 44
# Left out: proxy fences between reads of an answer about the next tile and the write of the fourth
# answer after it, and the barrier between warps that stage column scales: the machine tracks no
# read that a later write must not overtake, and in its schedules the staging is long done.
RULES = tuple(r for r in mutate.RULES if r not in ("drop_barrier", "drop_proxy_fence"))
SURVIVORS = 3
"""Faults in paths that these cases do not take, and in waits that another wait implies."""

CASES = {
    sm100.SWAP_32: (
        Case(40, 330, 2344, bias=BF16, x_scaling="token", w_scaling="token"),
        Case(29, 200, 1400, split=2, sms=2, out=F32, bias=F32, x_scaling="token"),
        Case(29, 100, 700, split=2, sms=2, bias=F16, w_scaling="token"),
        Case(29, 100, 700, split=2, sms=2, out=F16, bias=BF16, x_scaling="token"),
        Case(32, 100, 64, sms=2, out=F32, bias=BF16, x_scaling="token"),
        Case(32, 100, 64, sms=2, out=F16, bias=BF16, w_scaling="token"),
    ),
    sm100.PAIR_128: (
        Case(300, 264, 600, sms=2, bias=BF16, x_scaling="token", w_scaling="token"),
        Case(40, 75, 64, sms=2, out=F32, bias=F32, x_scaling="token"),
        Case(40, 75, 64, sms=2, out=F16, bias=F16, w_scaling="token"),
        Case(33, 128, 320, sms=2, out=F32, bias=BF16, x_scaling="token"),
        Case(33, 128, 64, sms=2, out=F16, bias=BF16, w_scaling="token"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", CASES, ids=lambda c: c.name)
def test_planted_faults_show(config, monkeypatch):
    monkeypatch.setattr("ptx_machine.machine.LIVELOCK_INSTRUCTIONS", 300_000)
    text = (kernel_objects.folder() / f"{config.name}.ptx").read_text()

    def shows(ptx):
        for case in CASES[config]:
            problem = Problem(config, case)
            problem.poison = True
            try:
                with np.errstate(invalid="ignore"):
                    problem.check(problem.run(ptx=ptx))
            except (PtxError, AssertionError):
                return True
        return False

    assert not shows(text)
    survivors = [m for m in mutate.sample(text, MUTANTS, rules=RULES) if not shows(m.text)]
    assert len(survivors) <= SURVIVORS, "\n".join(map(str, survivors))
