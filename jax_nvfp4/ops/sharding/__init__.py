# SPDX-License-Identifier: Apache-2.0
"""How the operations are divided over the devices of a mesh."""
