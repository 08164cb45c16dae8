# SPDX-License-Identifier: Apache-2.0
"""The operations as JAX primitives, a folder each: shapes, reference, kernels and transformations.

The functions here take flat operands that the functional layer has already checked.
"""
