# SPDX-License-Identifier: Apache-2.0
"""The GEMMs of data-center Blackwell (sm_100f, sm_103a)."""
