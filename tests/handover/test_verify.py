"""Merged equals trained equals reloaded, for every strategy and family; and `vlft verify` can tell when it does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from runs import command, train
from safetensors.torch import load_file, save_file

from vlft import export
from vlft.cli import main
from vlft.errors import MismatchError
from vlft.handover import export_model
from vlft.testing import FAMILIES
from vlft.verify import STORED, compare, verify

STRATEGIES = {
    "full": {},
    "vit_only": {},
    "partial_llm_full_vit": {"llm_frozen_layers": 1},
    "lora": {"lora_rank": 4},
    "lora_llm_full_vit": {"lora_rank": 4},
    "qlora": {"lora_rank": 4, "train_vit": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_merged_is_trained_is_reloaded(
    strategy: str, family: str, tiny: Callable[..., Path], registry: Path, tmp_path: Path
) -> None:
    """Logits within 1e-3 of their deviation and the same greedy text, in fp32 (qlora: on its NF4 base)."""
    base = tiny(family, tie=family == "qwen2_5_vl")
    out = tmp_path / "out"
    options = {"max_steps": 2, "learning_rate_vit": 1e-3, **STRATEGIES[strategy]}
    if strategy == "lora":
        del options["learning_rate_vit"]
    train(command(base, registry, out, strategy, **options))
    export_model(str(out), tmp_path / "whole")
    adapters = "lora" in strategy
    for model in (out / "model", tmp_path / "whole") if adapters else (out / "model",):
        gaps, step, _ = compare(str(model), out, samples=4, max_new_tokens=8)
        assert step == 2
        assert len(gaps) == 3
        assert all(g.tolerance.answers and g.holds for g in gaps), gaps
        assert all(g.same_answers == g.samples == 4 for g in gaps)
    # The comparison would see two steps of training: the base model itself does not pass.
    gaps, *_ = compare(str(base), out, samples=4, max_new_tokens=8)
    assert not gaps[0].holds
    assert gaps[0].largest > 5e-3


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def _spoil(folder: Path, part: str) -> str:
    """Change one weight tensor of a result by a tenth of its size; its name."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name in sorted(tensors):
            if part in name and tensors[name].ndim == 2:
                tensors[name] = tensors[name] * 1.1
                save_file(tensors, path, {"format": "pt"})
                return name
    raise AssertionError(part)


def test_verify_says_equal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path for path in run.rglob("*"))
    assert main(["verify", str(run / "model"), "--against", str(run), "--samples", "3", "--max_new_tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert said.count(" equal\n") == 3
    assert "trained - merged" in said
    assert "3 of 3" in said
    assert "equal means: largest 0.001, mean 0.0001, all answers.\n" in said
    assert f"{run / 'model'} says what step 3 of {run} says." in said
    assert sorted(path for path in run.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize("part", ["lora_B", "visual.blocks.1.mlp"])
def test_one_altered_weight_is_seen(part: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(run / "model", model)
    _spoil(model, part)
    words = ["verify", str(model), "--against", str(run), "--samples", "3", "--max_new_tokens", "4"]
    assert main(words) == MismatchError.exit_code == 10
    error = capsys.readouterr().err
    assert "(trained - merged, trained - reloaded)" in error
    assert "merged - reloaded" in error, "the table is shown, too"


def test_one_altered_weight_of_a_whole_model_in_16_bits(run: Path, tmp_path: Path) -> None:
    """bf16 rounds, and passes; a weight that is a tenth larger does not."""
    export_model(str(run), tmp_path / "whole", dtype="bfloat16")
    gaps, *_ = compare(str(tmp_path / "whole"), run, samples=5, max_new_tokens=4)
    assert all(g.holds for g in gaps), gaps
    assert not gaps[0].tolerance.answers
    assert gaps[0].mean > 1e-3, "16 bits do round"
    (close,) = [g for g in gaps if g.pair == "rounded - whole"]
    assert close.tolerance == STORED
    assert close.largest < 1e-6, "the same weights through the same forward"
    said = verify(str(tmp_path / "whole"), run, samples=3, max_new_tokens=4)
    assert "says what step 3" in said
    assert "equal means: largest 0.25, mean 0.025; for rounded - whole: largest 0.05, mean 0.005.\n" in said
    _spoil(tmp_path / "whole", "model.layers.0.self_attn.v_proj")
    _spoil(tmp_path / "whole", "visual.merger.mlp.0")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    tensors["lm_head.weight"] = torch.roll(tensors["lm_head.weight"], 1, 0)
    save_file(tensors, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match="does not say what step 3"):
        verify(str(tmp_path / "whole"), run, samples=3, max_new_tokens=4)


@pytest.mark.parametrize("rate", ["1e-4", "1e-7"])
def test_an_untrained_base_in_16_bits_does_not_pass(
    rate: str, run: Path, registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However little was trained: a difference, or the answer that it cannot be told."""
    base, out = run.parent / "base", tmp_path / "short"
    train(command(base, registry, out, "lora", max_steps=4, learning_rate_llm=rate, lora_rank=4))
    export_model(str(base), tmp_path / "plain", dtype="bfloat16")
    export_model(str(base), tmp_path / "exact")
    for model in ("plain", "exact"):
        words = ["verify", str(tmp_path / model), "--against", str(out), "--samples", "3", "--max_new_tokens", "4"]
        assert main(words) == 10
        said = capsys.readouterr().err
        assert ("cannot be told" in said) or ("does not say what step 4" in said)
    assert rate == "1e-4" or "cannot be told: it is about as far from what was trained" in said


@pytest.fixture
def another_precision() -> Iterator[None]:
    """Accelerate remembers the precision of a process, which a command has for itself."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("another_precision")
def test_a_whole_result_in_16_bits(registry: Path, run: Path, tmp_path: Path) -> None:
    """Trained in fp32 masters, written in the checkpoint's dtype, and loaded in it: its config says so."""
    base, out = tmp_path / "base", tmp_path / "out"
    export_model(str(run.parent / "base"), base, dtype="bfloat16")
    train(command(base, registry, out, "full", max_steps=2, mixed_precision="bf16"))
    assert json.loads((out / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(out / "model" / "model.safetensors").values()} == {torch.bfloat16}
    gaps, *_ = compare(str(out / "model"), out, samples=3, max_new_tokens=4)
    (close,) = [g for g in gaps if g.pair == "rounded - whole"]
    assert close.tolerance == STORED
    assert close.largest < 1e-6
    assert main(["verify", str(out), "--against", str(out), "--samples", "3"]) == 0


def test_a_step_whose_checkpoint_is_gone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("step-000002"))
    export_model(str(run), tmp_path / "early", checkpoint="step-000002")
    words = ["verify", str(tmp_path / "early"), "--against", str(tmp_path / "run"), "--samples", "2"]
    assert main(words) == 6
    assert "is of step 2, and" in (said := capsys.readouterr().err)
    assert "no longer has step-000002 (it has step-000003)" in said
    (tmp_path / "early" / "vlft.json").unlink()  # says nothing of a step
    assert main(words) == 10
    assert "does not say what step 3" in capsys.readouterr().err


def test_it_compares_with_the_step_that_the_result_has(run: Path, tmp_path: Path) -> None:
    export_model(str(run), tmp_path / "early", checkpoint="step-000002")
    gaps, step, _ = compare(str(tmp_path / "early"), run, samples=3, max_new_tokens=4)
    assert step == 2
    assert all(g.holds for g in gaps)
    # A result of another step, which says it is of this one, does not pass.
    export.merge(run / "model", tmp_path / "late")
    shutil.copyfile(tmp_path / "early" / "vlft.json", tmp_path / "late" / "vlft.json")
    gaps, step, _ = compare(str(tmp_path / "late"), run, samples=3, max_new_tokens=4)
    assert step == 2
    assert not gaps[0].holds


def test_not_a_number_does_not_pass(run: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(run / "model", model)
    tensors = load_file(model / "adapter_model.safetensors")
    name = next(name for name in tensors if "merger" in name)
    tensors[name] = tensors[name] * float("nan")
    save_file(tensors, model / "adapter_model.safetensors", {"format": "pt"})
    gaps, *_ = compare(str(model), run, samples=3, max_new_tokens=4)
    assert not any(g.holds for g in gaps)


def test_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run / "model"), "--against", str(run / "model")]) == 2
    assert "is no run folder (no run.yaml)" in capsys.readouterr().err
    assert main(["verify", str(run / "model")]) == 2
    assert "--against is missing" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("step-*"))
    assert main(["verify", str(run / "model"), "--against", str(tmp_path / "run")]) == 6
    assert "no longer has step-000003 (it has none)" in capsys.readouterr().err
