"""Engines and precisions that only a GPU has: fp16 with its scaler, ZeRO in bf16, augmentation and pinned memory.

python -m pytest tests/gpu -n 8
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import command, final_weights, metrics, start, write_data

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RATES = {f"learning_rate_{p}": 4e-4 for p in ("llm", "vit", "projector")}


def test_fp16_follows_the_cpus_curve(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path)
    start(command(tiny(), registry, tmp_path / "gpu", "full", mixed_precision="fp16", max_steps=8, **RATES))
    cpu = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    start(command(tiny(), registry, tmp_path / "cpu", "full", mixed_precision="no", max_steps=8, **RATES), **cpu)
    gpu, cpu_curve = ([line["loss"] for line in metrics(tmp_path / out)] for out in ("gpu", "cpu"))
    print("fp16", gpu, cpu_curve)
    # The scaler starts high and skips steps until it fits, so only the first loss and the fall are the same.
    assert gpu[0] == pytest.approx(cpu_curve[0], rel=0.01)
    assert gpu[-1] < gpu[0]


@pytest.mark.parametrize("layout", [None, "zero2", "zero3"])
@pytest.mark.parametrize("strategy", ["full", "qlora"])
def test_a_layout_trains_saves_and_resumes_in_bf16(
    tiny: Callable[..., Path], tmp_path: Path, layout: str | None, strategy: str
) -> None:
    registry = write_data(tmp_path)
    rates = RATES if strategy == "full" else {"learning_rate_llm": 4e-4, "lora_dropout": 0.0}
    model = tiny(dtype="bfloat16")

    def go(out: str, **more: Any) -> None:
        options = {"deepspeed": layout, "save_steps": 3, "lr_scheduler_type": "constant", "warmup_steps": 0}
        start(command(model, registry, tmp_path / out, strategy, **(options | {"max_steps": 6} | rates | more)))

    go("whole")
    go("cut", max_steps=3)
    go("cut", resume_from_checkpoint="latest")
    whole, cut = ([line["loss"] for line in metrics(tmp_path / out)] for out in ("whole", "cut"))
    card = json.loads((tmp_path / "whole" / "run_card.json").read_text())
    print(layout, strategy, card["distributed_type"], whole, cut)
    assert card["distributed_type"] == ("DEEPSPEED" if layout else "NO")
    assert whole == pytest.approx(cut, rel=0.01)
    a, b = final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")
    assert a.keys() == b.keys()


@pytest.mark.parametrize("kind", ["photometric", "geometric"])
def test_augmentation_on_the_device_is_seeded(tiny: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    registry = write_data(tmp_path)
    for out in ("a", "b"):
        options = {"augmentation": kind, "num_workers": 2, "mixed_precision": "no"}
        start(command(tiny(), registry, tmp_path / out, "lora_llm_full_vit", lora_dropout=0.0, **options))
    losses = [[line["loss"] for line in metrics(tmp_path / out)] for out in ("a", "b")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
