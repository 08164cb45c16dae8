# SPDX-License-Identifier: Apache-2.0
"""The gated activations that the tests of kernels launch."""

import numpy as np

SIGMOID_OF_TANH = 2 * np.sqrt(2 / np.pi)
ACTIVATIONS = (
    (np.inf, 1.0, 0.0, 0.0),
    (7.0, 1.702, 0.0, 1.0),
    (10.0, 1.0, 0.0, 0.0),
    (np.inf, SIGMOID_OF_TANH, SIGMOID_OF_TANH * 0.044715, 0.0),
)
"""limit, alpha, cubic, beta: SwiGLU, gpt-oss's, DeepSeek-V4's, and GeGLU by its tanh form."""
