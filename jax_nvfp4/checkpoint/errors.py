# SPDX-License-Identifier: Apache-2.0
"""The error of a checkpoint that cannot be trusted."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, inconsistent or of a kind that is not supported.

    The message names the file, and the tensor where there is one.
    """
