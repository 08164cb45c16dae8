# SPDX-License-Identifier: Apache-2.0
"""Orders of codes and scales in memory: pure index maps, both ways."""
