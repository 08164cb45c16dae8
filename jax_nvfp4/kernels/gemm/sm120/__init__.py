# SPDX-License-Identifier: Apache-2.0
"""The GEMMs of workstation Blackwell (sm_120f)."""
