# SPDX-License-Identifier: Apache-2.0
"""Any JAX function with NVFP4 weights: its traced program, rewritten.

view       what a traced value knows of the leaf of the params that it comes from
rules      what each primitive does to a view
control    the primitives that hold programs: jit, scan, while, cond, custom rules, shard_map
interpret  runs a program on arrays and views
analysis   which leaves meet products alone, and over which axes
report     what became of each leaf, and why
convert    the function a user calls
"""
