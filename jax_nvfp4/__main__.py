# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_nvfp4`."""

import sys

from jax_nvfp4.cli import main

if __name__ == "__main__":
    sys.exit(main())
