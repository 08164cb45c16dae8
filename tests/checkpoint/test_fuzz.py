# SPDX-License-Identifier: Apache-2.0
"""A seeded sample of damaged checkpoints; `fuzz.py` says how to try a million."""

import fuzz


def test_damaged_checkpoints_load_to_what_they_hold_or_are_refused():
    with fuzz.tries() as try_number:
        outcomes = [try_number(number) for number in range(1500)]
    assert outcomes.count("loaded") > 150
    assert outcomes.count("refused") > 500
