# SPDX-License-Identifier: Apache-2.0
"""The product of rows, sorted by group, with the weight of their group."""
