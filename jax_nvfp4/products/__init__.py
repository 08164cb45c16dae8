# SPDX-License-Identifier: Apache-2.0
"""Kernels that remember their axes, and their products: `dot_general`, `einsum`, `@`."""
