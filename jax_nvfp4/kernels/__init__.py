# SPDX-License-Identifier: Apache-2.0
"""The CuTeDSL kernels and their ahead-of-time build. Nothing at run time imports this package."""
