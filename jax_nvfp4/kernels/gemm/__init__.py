# SPDX-License-Identifier: Apache-2.0
"""The GEMM kernels, a room for each architecture."""
