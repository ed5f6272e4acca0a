"""A pinned loss curve for every strategy: what unit tests miss (a wrong mask, rate or order) moves these numbers.

If a change moves them on purpose, say why in the commit and write the new ones down:

    python tests/test_curves.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import command, metrics, train, write_data

RATES = {"learning_rate_llm": 2e-3, "learning_rate_vit": 1e-3, "learning_rate_projector": 1e-3}
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", RATES),
    "full without ViT": ("full", {"train_vit": False, **RATES, "learning_rate_vit": None}),
    "vit_only": ("vit_only", {**RATES, "learning_rate_llm": None}),
    "partial_llm_full_vit": ("partial_llm_full_vit", {"llm_frozen_layers": 2, **RATES}),
    "lora": ("lora", {"learning_rate_llm": 2e-3}),
    "lora_llm_full_vit": ("lora_llm_full_vit", RATES),
    "qlora": ("qlora", {"learning_rate_llm": 2e-3}),
    "qlora with ViT": ("qlora", {"train_vit": True, **RATES}),
}
CURVES: dict[str, list[float]] = {
    "full": [6.4987, 5.9182, 5.1775, 4.4900, 4.0661, 3.9451],
    "full without ViT": [6.4987, 5.9913, 5.1050, 4.5044, 4.1744, 3.9309],
    "vit_only": [6.4987, 6.2201, 6.5447, 6.1878, 6.2580, 6.1647],
    "partial_llm_full_vit": [6.4987, 6.0409, 6.0529, 5.5671, 5.3448, 5.1948],
    "lora": [6.4987, 6.6767, 6.5096, 6.4362, 6.0370, 5.7695],
    "lora_llm_full_vit": [6.4987, 6.1523, 6.3051, 5.8800, 5.7547, 5.6708],
    "qlora": [6.5546, 6.9575, 6.6406, 6.5904, 6.1656, 5.8941],
    "qlora with ViT": [6.5546, 6.3174, 6.4984, 5.9177, 5.8305, 5.5079],
}


def curve(model: Path, folder: Path, case: str) -> list[float]:
    strategy, options = STRATEGIES[case]
    registry = write_data(folder, 24)
    words = command(
        model, registry, folder / case.replace(" ", "_"), strategy, max_steps=6, mixed_precision="no", **options
    )
    train(words)
    return [line["loss"] for line in metrics(folder / case.replace(" ", "_"))]


@pytest.mark.parametrize("case", STRATEGIES)
def test_the_curve_is_as_written_down(tiny: Callable[..., Path], tmp_path: Path, case: str) -> None:
    assert curve(tiny(), tmp_path, case) == pytest.approx(CURVES[case], rel=2e-3)


@pytest.mark.parametrize("case", ["full", "lora_llm_full_vit", "qlora"])
def test_transformers_own_layers_give_the_same_curve(tiny: Callable[..., Path], tmp_path: Path, case: str) -> None:
    """`--reference`, over 50 steps in fp32."""
    strategy, _ = STRATEGIES[case]
    registry = write_data(tmp_path, 24)
    dropout = {"lora_dropout": 0} if strategy != "full" else {}  # the two draw other masks
    found = []
    for reference in (False, True):
        folder = tmp_path / f"reference_{reference}"
        train(
            command(
                tiny(), registry, folder, strategy, max_steps=50, mixed_precision="no", reference=reference, **dropout
            )
        )
        found.append([line["loss"] for line in metrics(folder)])
    assert len(found[0]) == 50
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][0] != found[0][24] != found[0][49]


if __name__ == "__main__":
    from vlft.testing.tiny import make_checkpoint

    with tempfile.TemporaryDirectory() as work:
        model = make_checkpoint("qwen2_5_vl", Path(work) / "base")
        found = {case: curve(model, Path(work) / "data", case) for case in STRATEGIES}
    for case, values in found.items():
        print(f'    "{case}": [{", ".join(f"{v:.4f}" for v in values)}],')
