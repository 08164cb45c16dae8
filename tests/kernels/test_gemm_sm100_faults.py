# SPDX-License-Identifier: Apache-2.0
"""Faults planted into the sm_100f GEMM's PTX: the machine reports them, or y is wrong."""

import numpy as np
import pytest
from gemm_sm100_cases import BY_NAME, check
from ptx_machine import PtxError, mutate

import kernel_objects

MUTANTS = 44
# Left out: proxy fences between reads of an answer about the next tile and the write of the fourth
# answer after it, and the barrier between warps that stage column scales: the machine tracks no
# read that a later write must not overtake, and in its schedules the staging is long done.
RULES = tuple(r for r in mutate.RULES if r not in ("drop_barrier", "drop_proxy_fence"))
SURVIVORS = 3
"""Faults in paths that these cases do not take, and in waits that another wait implies."""

CASES = {
    "swap_t32": (
        (40, 330, 2344, {"sms": 1, "padding": 0x7F}),
        (29, 200, 1400, {"out": 0, "bias": 0, "split": 2, "sms": 2}),
        (29, 100, 700, {"bias": 2, "split": 2, "sms": 2}),
        (29, 100, 700, {"out": 2, "split": 2, "sms": 2}),
        (32, 100, 64, {"out": 0}),
        (32, 100, 64, {"out": 2}),
    ),
    "pair_t256x128": (
        (300, 264, 600, {"sms": 2, "padding": 0x7F}),
        (40, 75, 64, {"out": 0, "bias": 0}),
        (40, 75, 64, {"out": 2, "bias": 2}),
        (33, 128, 320, {"out": 0}),
        (33, 128, 64, {"out": 2}),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_planted_faults_show(name, monkeypatch):
    monkeypatch.setattr("ptx_machine.machine.LIVELOCK_INSTRUCTIONS", 300_000)
    text = (kernel_objects.folder() / f"gemm_sm100f_{name}.ptx").read_text()

    def shows(ptx):
        for case in CASES[name]:
            m, n, k, options = case
            try:
                with np.errstate(invalid="ignore"):
                    check(BY_NAME[name], m, n, k, ptx=ptx, **options)
            except (PtxError, AssertionError):
                return True
        return False

    assert not shows(text)
    survivors = [m for m in mutate.sample(text, MUTANTS, rules=RULES) if not shows(m.text)]
    assert len(survivors) <= SURVIVORS, "\n".join(map(str, survivors))
