# SPDX-License-Identifier: Apache-2.0
"""The GEMM of Hopper (sm_90a)."""
