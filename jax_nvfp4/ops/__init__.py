# SPDX-License-Identifier: Apache-2.0
"""The operations as JAX primitives, a folder each: shapes, reference, kernels and transformations.

In each folder `api` is what users call: it checks what they gave. All below it takes flat operands
that are checked already.
"""
