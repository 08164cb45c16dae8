# SPDX-License-Identifier: Apache-2.0
"""GEMM problems and configs, and the table of each architecture that maps one to the other."""
