"""FSDP2: vlft's engine over `fully_shard` with two gloo processes. Through Accelerate it runs on a GPU (tests/gpu)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import command, distance, final_weights, metrics, start, train, write_data
from safetensors.torch import load_file

from vlft.errors import ConfigError

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def words(model: Path, registry: Path, out: Path, strategy: str, **more: Any) -> list[str]:
    options = {"max_steps": 6, "learning_rate_llm": 1e-4, "mixed_precision": "no", "save_steps": 3} | more
    return command(model, registry, out, strategy, **options)


CUT = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize("unit", [1, None])
@pytest.mark.parametrize("strategy", ["full", "lora_llm_full_vit", "partial_llm_full_vit", "qlora"])
def test_two_processes_end_with_the_weights_of_one(
    tiny: Callable[..., Path], tmp_path: Path, strategy: str, unit: int | None
) -> None:
    """`unit`: every layer is one by itself, or all of a tower are one."""
    registry = write_data(tmp_path, 21)
    options = {"lora_dropout": 0.0} if "lora" in strategy else {}
    fixed = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    train(words(tiny(), registry, tmp_path / "one", strategy, **options, **fixed))
    out = tmp_path / "two"
    line = words(tiny(), registry, out, strategy, **CUT, **options, **fixed)
    start(line, processes=2, fault={"kind": "fsdp_on_cpu", "unit": unit}, **FSDP)
    assert distance(final_weights(tmp_path / "one"), final_weights(out)) < 1e-5
    for a, b in zip(metrics(tmp_path / "one"), metrics(out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    (file,) = (out / "model").glob("*model.safetensors")
    one, two = load_file(tmp_path / "one/model" / file.name), load_file(file)
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[n].float(), two[n].float(), atol=1e-4) for n in one)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_a_resume_under_it(tiny: Callable[..., Path], tmp_path: Path, fused: bool) -> None:
    """`fused`: the optimizer steps before its norm is read, as on a GPU."""
    registry, out = write_data(tmp_path, 21), tmp_path / "two"
    fixed = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    train(words(tiny(), registry, tmp_path / "one", "full", **fixed))
    for more in ({"max_steps": 3}, {"resume_from_checkpoint": "latest"}):
        line = words(tiny(), registry, out, "full", **(CUT | fixed | more))
        start(line, processes=2, fault={"kind": "fsdp_on_cpu", "fused": fused}, **FSDP)
    assert distance(final_weights(tmp_path / "one"), final_weights(out)) < 1e-5
    for a, b in zip(metrics(tmp_path / "one"), metrics(out), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_cpu_is_refused_with_the_reason(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="FSDP2 needs a GPU"):
        train(words(tiny(), write_data(tmp_path), tmp_path / "out", "full"))
