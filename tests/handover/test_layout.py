"""Exported files have the names of the published checkpoints, and vLLM's classes find every one of them.

vLLM renames by prefix before it loads (vllm/model_executor/models/, read in vllm-project/vllm at commit
002d181a55a03803d7d69547846630069d2378b8 for qwen2_vl.py and qwen2_5_vl.py, and in a later copy for qwen3_vl.py):

    Qwen2VLForConditionalGeneration.hf_to_vllm_mapper, Qwen2_5_VLForConditionalGeneration.hf_to_vllm_mapper
        # mapping for new names in checkpoint saved after transformers v4.52
        "model.language_model.": "language_model.model.", "model.visual.": "visual.",
        # mapping for original checkpoint
        "lm_head.": "language_model.lm_head.", "model.": "language_model.model.",
    Qwen3VLForConditionalGeneration.hf_to_vllm_mapper
        "model.visual.": "visual.", "lm_head.": "language_model.lm_head.",
        "model.language_model.": "language_model.model.",

So for Qwen2-VL and Qwen2.5-VL both layouts load, and vlft writes the published one; Qwen3-VL has one layout only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import command, train
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText

from vlft.handover import export_model
from vlft.testing import FAMILIES

PUBLISHED = json.loads((Path(__file__).parent / "published_layouts.json").read_text())
_TWO = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}
VLLM = {
    "qwen2_vl": _TWO,
    "qwen2_5_vl": _TWO,
    "qwen3_vl": {
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.language_model.": "language_model.model.",
    },
}


def _patterns(names: set[str]) -> set[str]:
    return {re.sub(r"\.(layers|blocks|deepstack_merger_list)\.\d+\.", r".\1.*.", name) for name in names}


def _names(folder: Path) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return set(json.loads(index.read_text())["weight_map"])
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def _in_vllm(name: str, family: str) -> str:
    """vllm.model_executor.models.utils.WeightsMapper: the first prefix that fits."""
    for prefix, new in VLLM[family].items():
        if name.startswith(prefix):
            return new + name.removeprefix(prefix)
    return name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_the_published_ones(family: str, tied: bool, tiny: Callable[..., Path], tmp_path: Path) -> None:
    export_model(str(tiny(family, tie=tied)), tmp_path / "out", max_shard_size="100KB")
    wanted = set(PUBLISHED[family]["keys"]) - {"lm_head.weight"} | (set() if tied else {"lm_head.weight"})
    assert PUBLISHED[family]["tied"] == ("lm_head.weight" not in PUBLISHED[family]["keys"])
    assert _patterns(_names(tmp_path / "out")) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_finds_every_name(family: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """What vLLM makes of the exported names are the modules of its classes: the LLM with its head, and the tower."""
    export_model(str(tiny(family)), tmp_path / "out")
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    # vLLM's classes hold `visual` and `language_model` (Qwen2ForCausalLM or Qwen3's: model, lm_head).
    modules = {
        name.replace("model.language_model.", "language_model.model.")
        .replace("model.visual.", "visual.")
        .replace("lm_head.", "language_model.lm_head.")
        for name, _ in model.named_parameters()
    }
    assert {_in_vllm(name, family) for name in _names(tmp_path / "out")} == modules
    # The newer names, as transformers has them in memory, would be found as well.
    assert {_in_vllm(name, family) for name, _ in model.named_parameters()} == modules


def test_what_a_run_writes(registry: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Not only exports: the result of a strategy that trains weights, and a merged adapter."""
    for strategy in ("vit_only", "lora"):
        train(command(tiny("qwen2_5_vl"), registry, tmp_path / strategy, strategy, max_steps=1))
        export_model(str(tmp_path / strategy), tmp_path / f"{strategy}-out")
        wanted = {*PUBLISHED["qwen2_5_vl"]["keys"], "lm_head.weight"}
        assert _patterns(_names(tmp_path / f"{strategy}-out")) == wanted
    assert _patterns(_names(tmp_path / "vit_only" / "model")) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_older_readers_find_the_positions(family: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """transformers 4's names beside transformers 5's, which reads both as one."""
    base = tiny(family)
    export_model(str(base), tmp_path / "out")
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["rope_scaling"]["mrope_section"] == text["rope_parameters"]["mrope_section"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"]
    before, after = AutoConfig.from_pretrained(base), AutoConfig.from_pretrained(tmp_path / "out")
    assert after.text_config.rope_parameters == before.text_config.rope_parameters
    ids = torch.arange(20, 40)[None]
    one, two = (AutoModelForImageTextToText.from_pretrained(p)(input_ids=ids).logits for p in (base, tmp_path / "out"))
    assert torch.equal(one, two)
