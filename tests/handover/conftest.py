"""A finished run that the tests of handing over share."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import command, train, write_data

from vlft.testing import make_checkpoint

LICENSED = """---
license: other
license_name: qwen-research
license_link: LICENSE
---
# A base
"""


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("toy"), 24)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, registry: Path) -> Path:
    """Adapters and a trained vision tower after 3 steps, with evaluations and two checkpoints."""
    folder = tmp_path_factory.mktemp("handover")
    base = make_checkpoint("qwen2_5_vl", folder / "base")
    (base / "README.md").write_text(LICENSED)
    words = command(
        base, registry, folder / "charts", "lora_llm_full_vit", max_steps=3, save_steps=2, eval_steps=2,
        train_split_ratio=0.8, eval_dataset_scripts="toy:exact_match", max_pixels=100352, lora_dropout=0,
    )  # fmt: skip
    train(words)
    return folder / "charts"
