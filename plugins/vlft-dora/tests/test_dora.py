from pathlib import Path

from vlft.testing import check_strategy
from vlft_dora import Dora


def test_conforms(tmp_path: Path) -> None:
    check_strategy(Dora, tmp_path)


def test_conforms_with_the_projector(tmp_path: Path) -> None:
    check_strategy(Dora, tmp_path, families=["qwen3_vl"], options={"dora_rank": 4, "train_projector": True})
