# SPDX-License-Identifier: Apache-2.0
"""The benchmark: what is measured, how, and how it is reported."""
