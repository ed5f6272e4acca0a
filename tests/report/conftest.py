"""One run folder for all of the report's tests; who changes something makes a run of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import write_run


@pytest.fixture(scope="session")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "lora-64", steps=240)


@pytest.fixture(scope="session")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("report") / "full-vit", steps=240, seed=3, floor=0.33, good=1.0,
        tuning_strategy="vit_only", learning_rate_vit=1e-5, lora_rank=None,
    )  # fmt: skip
