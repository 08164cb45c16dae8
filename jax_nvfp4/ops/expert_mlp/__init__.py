# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture: route, multiply, activate, multiply, combine."""
