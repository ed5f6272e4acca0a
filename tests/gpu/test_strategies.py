"""Every strategy on a real GPU in bf16 against the CPU in fp32. Skipped where there is no GPU; run by hand on one:

python -m pytest tests/gpu -n 4
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import command, metrics, start, write_data

from vlft.models import attention
from vlft.models.forward import PackedVLM
from vlft.models.kernels import block as blocks
from vlft.models.load import open_checkpoint, source_of
from vlft.testing.conformance import example_row
from vlft.testing.tiny import FAMILIES, make_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("vit_only", {}),
    ("partial_llm_full_vit", {}),
    ("lora", {"lora_dropout": 0.0}),
    ("lora_llm_full_vit", {"lora_dropout": 0.0}),
    ("qlora", {"lora_dropout": 0.0}),
    ("qlora", {"lora_dropout": 0.0, "train_vit": True}),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("strategy", "options"), STRATEGIES)
def test_the_loss_curve_equals_the_cpus_within_bf16_noise(
    tmp_path: Path, family: str, strategy: str, options: dict[str, Any]
) -> None:
    model = make_checkpoint(family, tmp_path / "base")
    registry = write_data(tmp_path)
    curves = {}
    for device, extra, env in (
        ("gpu", {"mixed_precision": "bf16"}, {}),
        ("cpu", {"mixed_precision": "no"}, {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}),
    ):
        out = tmp_path / device
        # At the default rates the tiny model would hardly move; much above these, bf16's noise grows with the steps.
        rates = {f"learning_rate_{p}": 4e-4 for p in ("llm", "vit", "projector")}
        if strategy == "vit_only":
            del rates["learning_rate_llm"]
        if strategy in ("lora", "qlora") and "train_vit" not in options:
            rates = {"learning_rate_llm": 4e-4}
        words = command(model, registry, out, strategy, max_steps=6, **rates, **options, **extra)
        start(words, **env)
        curves[device] = [line["loss"] for line in metrics(out)]
    print(family, strategy, options, {k: [round(x, 4) for x in v] for k, v in curves.items()})
    # Each step has other samples, so a curve need not fall within six; equal to the CPU's is what it must be.
    assert curves["gpu"] == pytest.approx(curves["cpu"], rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_variable_length_flash_attention_runs_in_both_towers(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the whole row at once, or by the kernel for short windows; never segment by segment."""
    model = make_checkpoint(family, tmp_path / "base", dtype="bfloat16")
    source = source_of(open_checkpoint(str(model)), "bf16", torch.device("cuda", 0))
    hf = source.load()
    calls = {"llm": 0, "vit": 0}
    flash, windows = blocks.attend, blocks.attend_windows

    def attend(*args: Any, causal: bool, **how: Any) -> attention.Attended:
        attended = flash(*args, causal=causal, **how)
        assert attended.graph is None
        calls["llm" if causal else "vit"] += 1
        return attended

    def attend_windows(*args: Any) -> torch.Tensor:
        calls["vit"] += 1
        return windows(*args)

    monkeypatch.setattr(blocks, "attend", attend)
    monkeypatch.setattr(blocks, "attend_windows", attend_windows)
    packed = PackedVLM(hf, source.parts, source.config.image_token_id)
    row = {k: v.cuda() if torch.is_tensor(v) and k != "image_grid_thw" else v for k, v in example_row(source).items()}
    packed(**row).sum().backward()
    assert calls == {"llm": 3, "vit": 3}
