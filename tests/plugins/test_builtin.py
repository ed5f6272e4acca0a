"""The built-in strategies: the conformance kit over options and families, exactly what moves, what is quantised, and
that the result loads and merges in the documented ways.

What should train is written out here a second time, by names, so that the strategies' own helpers are not their judge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, BitsAndBytesConfig

from vlft import VlftError, discovery, export
from vlft.models.attention import plain_attention
from vlft.models.forward import PackedVLM, base_model
from vlft.models.load import Source, cast, is_quantised, open_checkpoint, source_of
from vlft.optim import build_optimizer
from vlft.proof import check_groups
from vlft.testing import FAMILIES, check_strategy, make_checkpoint
from vlft.testing.conformance import example_row

LAYERS = 3
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

CASES: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("full", {"train_vit": False}),
    ("full", {"train_vit": False, "train_projector": False}),
    ("full", {"train_llm": False}),
    ("vit_only", {}),
    ("vit_only", {"train_projector": False}),
    ("vit_only", {"train_vit": False}),
    ("vit_only", {"train_llm": True}),
    ("partial_llm_full_vit", {}),
    ("partial_llm_full_vit", {"llm_frozen_layers": 0}),
    ("partial_llm_full_vit", {"llm_frozen_layers": 2, "train_vit": False}),
    ("partial_llm_full_vit", {"llm_frozen_layers": LAYERS, "train_projector": False}),
    ("lora", {}),
    ("lora", {"train_vit": True}),
    ("lora", {"train_projector": True}),
    ("lora", {"lora_target_modules": ("q_proj", "gate_proj"), "lora_rank": 4, "use_rslora": True}),
    ("lora_llm_full_vit", {}),
    ("lora_llm_full_vit", {"train_vit": False}),
    ("lora_llm_full_vit", {"train_projector": False, "lora_dropout": 0.0}),
    ("qlora", {}),
    ("qlora", {"train_vit": True}),
    ("qlora", {"train_projector": True, "lora_target_modules": ("down_proj",), "lora_rank": 8}),
]


@pytest.mark.parametrize("name", ["lora", "lora_llm_full_vit", "qlora"])
def test_an_adapter_strategy_without_adapters_is_refused(name: str) -> None:
    """What it would leave is a quantised or plain model that no adapter describes."""
    cls, _ = discovery.load_strategy(name)
    with pytest.raises(ValueError, match="choose the strategy vit_only"):
        cls.Config(train_llm=False, train_vit=True)


def _title(case: tuple[str, dict[str, Any]]) -> str:
    return " ".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


each_case = pytest.mark.parametrize("case", CASES, ids=_title)
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(family, tie=False)`: a tiny model, made once."""
    made: dict[tuple[str, bool], Path] = {}

    def make(family: str, tie: bool = False) -> Path:
        if (family, tie) not in made:
            made[family, tie] = make_checkpoint(family, tmp_path_factory.mktemp(family), tie=tie, layers=LAYERS)
        return made[family, tie]

    return make


class Trained:
    """A strategy's model after some steps of the real forward and optimizer."""

    def __init__(self, name: str, options: dict[str, Any], base: Path, steps: int = 2) -> None:
        cls, _ = discovery.load_strategy(name)
        config = cls.Config(**options)
        self.source: Source = source_of(open_checkpoint(str(base)), "no", torch.device("cpu"))
        self.strategy: Any = cls(config)  # type: ignore[call-arg]
        torch.manual_seed(0)
        self.model: nn.Module = self.strategy.prepare_model(self.source)
        groups = self.strategy.param_groups(self.model)
        check_groups(self.model, groups, name, self.source.parts, config.rates(), self.source.tied_head)
        cast(self.model, self.source.compute_dtype)
        self.packed = PackedVLM(self.model, self.source.parts, self.source.config.image_token_id).train()
        self.before = {n: t.detach().clone() for n, t in self.model.state_dict().items()}
        optimizer = build_optimizer(self.model, groups, config.rates(), 0.01)
        for step in range(steps):
            self.packed(**example_row(self.source, seed=step)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    @property
    def moved(self) -> set[str]:
        now = self.model.state_dict()
        assert set(now) == set(self.before)
        return {n for n, t in now.items() if not torch.equal(t, self.before[n])}

    def save(self, folder: Path) -> Path:
        limits = {"min_pixels": 3136, "max_pixels": 50176}
        wanted = export.needed(self.strategy, self.model, self.source)
        whole = {n: p.detach() for n, p in self.model.named_parameters() if n in wanted}
        export.save_result(self.strategy, self.model, self.source, whole, folder, facts={}, **limits)
        return folder


def _part(name: str) -> str:
    if re.search(r"visual\.(merger|deepstack_merger_list)\.", name):
        return "projector"
    if ".visual." in name:
        return "vit"
    return "head" if re.search(r"(^|\.)lm_head\.", name) else "llm"


def _should_move(strategy: str, options: dict[str, Any], name: str, *, tie: bool) -> bool:
    """Whether the weight called `name` trains, from the strategies' descriptions in the README."""
    part = _part(name)
    vit = options.get("train_vit", strategy in ("full", "vit_only", "partial_llm_full_vit", "lora_llm_full_vit"))
    if part in ("vit", "projector"):
        beside_frozen = strategy not in ("lora", "qlora")
        return bool(vit if part == "vit" else options.get("train_projector", vit or beside_frozen))
    if not options.get("train_llm", strategy != "vit_only"):
        return False
    if "lora" in strategy:
        return ".lora_A." in name or ".lora_B." in name
    embeds = "embed_tokens" in name or (part == "head" and tie)
    if strategy == "partial_llm_full_vit":
        layer = re.search(r"language_model\.layers\.(\d+)\.", name)
        return int(layer[1]) >= options.get("llm_frozen_layers", LAYERS // 2) if layer else not embeds
    return True


def _check_moves(strategy: str, options: dict[str, Any], base: Path, *, tie: bool) -> None:
    trained = Trained(strategy, options, base)
    # state_dict also holds what bitsandbytes keeps beside a packed weight: none of it may move.
    expected = {n for n in trained.before if _should_move(strategy, options, n, tie=tie)}
    assert expected
    assert trained.moved == expected


@each_family
@each_case
def test_exactly_the_promised_weights_move(
    case: tuple[str, dict[str, Any]], family: str, checkpoint: Callable[..., Path]
) -> None:
    """Every promised weight differs after two steps; every other is equal bit for bit."""
    _check_moves(*case, checkpoint(family), tie=False)


@pytest.mark.parametrize("case", [c for c in CASES if c[1] in ({}, {"llm_frozen_layers": 0})], ids=_title)
def test_exactly_the_promised_weights_move_with_a_tied_head(
    case: tuple[str, dict[str, Any]], checkpoint: Callable[..., Path]
) -> None:
    """As Qwen's 2B and 3B models have it: embeddings that stay keep the head, embeddings that train move it."""
    _check_moves(*case, checkpoint("qwen2_5_vl", tie=True), tie=True)


@each_case
def test_conforms(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    cls, _ = discovery.load_strategy(case[0])
    check_strategy(cls, tmp_path, options=case[1])


def test_adapters_sit_on_every_llm_linear_and_nowhere_else(checkpoint: Callable[..., Path]) -> None:
    """Qwen2.5-VL's vision tower has linears of the same names (`gate_proj`)."""
    trained = Trained("lora", {}, checkpoint("qwen2_5_vl"), steps=0)
    adapted = {n.split(".lora_A")[0] for n, _ in trained.model.named_parameters() if ".lora_A." in n}
    assert adapted == {f"base_model.model.{name}" for name in _decoder_linears()}


def test_unknown_target_modules_are_named_with_those_there_are(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(VlftError, match=r"names qkv, which.*they have down_proj, gate_proj, k_proj"):
        Trained("lora", {"lora_target_modules": ("q_proj", "qkv")}, checkpoint("qwen2_5_vl"))


def test_more_frozen_layers_than_there_are(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(VlftError, match=r"--llm_frozen_layers is 4, but this model's LLM has 3 layers"):
        Trained("partial_llm_full_vit", {"llm_frozen_layers": 4}, checkpoint("qwen2_vl"))


# ---------------------------------------------------------------------------------------------------------------------
# What is quantised


def _decoder_linears() -> set[str]:
    layer = [f"self_attn.{n}" for n in ATTENTION] + [f"mlp.{n}" for n in MLP]
    return {f"model.language_model.layers.{i}.{name}" for i in range(LAYERS) for name in layer}


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("train_vit", [False, True], ids=["frozen_vit", "train_vit"])
@each_family
def test_qlora_quantises_exactly_the_decoder_linears(
    family: str, train_vit: bool, tie: bool, checkpoint: Callable[..., Path]
) -> None:
    from bitsandbytes.nn import Linear4bit

    trained = Trained("qlora", {"train_vit": train_vit}, checkpoint(family, tie), steps=0)
    modules = dict(base_model(trained.model).named_modules())
    # PEFT keeps the quantised layer inside its own.
    kinds = {n.removesuffix(".base_layer"): m for n, m in modules.items() if isinstance(m, nn.Linear)}
    quantised = {n for n, m in kinds.items() if isinstance(m, Linear4bit)}
    assert quantised == _decoder_linears()
    assert {n.removesuffix(".base_layer") for n, m in modules.items() if is_quantised(m)} == quantised
    whole = {n for n in kinds if not n.endswith(("default",))} - quantised
    assert {_part(f"x.{n}.") for n in whole} == {"vit", "projector", "head"}
    packed = {n for n, p in trained.model.named_parameters() if not p.is_floating_point()}
    assert packed == {f"base_model.model.{n}.base_layer.weight" for n in quantised}
    for name in quantised:
        layer = modules[f"{name}.base_layer"]
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested, "double quantisation"


# ---------------------------------------------------------------------------------------------------------------------
# The result, as the README says to load it


@torch.no_grad()
def _logits(model: nn.Module, source: Source) -> Tensor:
    """(T, V) of a plain Hugging Face forward over one sample with a picture."""
    row = example_row(source, seed=7)
    start = int(row["cu_seqlens"][1])
    ids = row["input_ids_T"][:, start:]
    hf: Any = model
    hf.eval()
    out = hf(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == source.config.image_token_id).int(),
        pixel_values=row["pixel_values"],
        image_grid_thw=row["image_grid_thw"],
    )
    base_model(hf).model.rope_deltas = None
    logits: Tensor = out.logits[0].float()
    return logits


def _trained_logits(trained: Trained) -> Tensor:
    with plain_attention(base_model(trained.model)):
        return _logits(trained.model, trained.source)


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


RESULTS = [
    ("full", {}),
    ("full", {"train_vit": False}),
    ("vit_only", {}),
    ("partial_llm_full_vit", {}),
    ("lora", {}),
    ("lora_llm_full_vit", {}),
    ("qlora", {"train_vit": True}),
]


@each_family
@pytest.mark.parametrize("case", RESULTS, ids=_title)
def test_result_loads_in_the_documented_way(
    case: tuple[str, dict[str, Any]], family: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """`AutoModelForImageTextToText` for weights, `PeftModel` for an adapter: the trained tower comes with both."""
    base = checkpoint(family)
    trained = Trained(*case, base)
    folder = trained.save(tmp_path / "model")
    if "lora" not in case[0]:
        loaded = AutoModelForImageTextToText.from_pretrained(folder)
    else:
        quantised = json.loads((folder / "vlft.json").read_text())["quantization"]
        config = (
            BitsAndBytesConfig(**{k: v for k, v in quantised.items() if "4bit" in k or "skip" in k})
            if quantised
            else None
        )
        onto = AutoModelForImageTextToText.from_pretrained(base, quantization_config=config)
        loaded = peft.PeftModel.from_pretrained(onto, str(folder))
        for module in loaded.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # bitsandbytes would compute in bf16 on CPUs that can, whatever dtype the layer asks for.
                module.support_avx512bf16_for_cpu = False
    expected = _trained_logits(trained)
    assert _difference(_logits(loaded, trained.source), expected) < 1e-4
    # The two steps did change something: else the comparison above would prove nothing.
    untouched = AutoModelForImageTextToText.from_pretrained(base)
    assert _difference(_logits(untouched, trained.source), expected) > 1e-3
    assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoTokenizer.from_pretrained(base))
    # Inference resizes as training did: at most 50176 pixels here.
    processor = AutoImageProcessor.from_pretrained(folder)
    assert dict(processor.size) == {"shortest_edge": 3136, "longest_edge": 50176}
    for side, low, high in ((900, 40000, 50176), (20, 3136, 8000)):
        (grid,) = processor([Image.new("RGB", (side, side))], return_tensors="pt")["image_grid_thw"].tolist()
        assert low <= grid[1] * grid[2] * processor.patch_size**2 <= high


@each_family
def test_qlora_merges_onto_what_it_trained_on_or_onto_the_original(
    family: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    trained = Trained("qlora", {"train_vit": True}, checkpoint(family))
    folder = trained.save(tmp_path / "model")
    said = export.merge(folder, tmp_path / "trained")
    assert "dequantised NF4 base, as trained" in said
    expected = _trained_logits(trained)
    onto_trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "trained")
    assert not any(is_quantised(m) for m in onto_trained.modules())
    assert _difference(_logits(onto_trained, trained.source), expected) < 1e-4

    said = export.merge(folder, tmp_path / "original", "original")
    assert "logits differ" in said
    onto_original = AutoModelForImageTextToText.from_pretrained(tmp_path / "original")
    assert _difference(_logits(onto_original, trained.source), expected) > 1e-3
    # Only the LLM's linears differ between the two, by the rounding to 4 bits.
    other = onto_original.state_dict()
    differ = {n for n, t in onto_trained.state_dict().items() if not torch.equal(t, other[n])}
    assert differ == {f"{name}.weight" for name in _decoder_linears()}


def test_merging_a_whole_model_says_that_there_is_nothing_to_merge(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Trained("vit_only", {}, checkpoint("qwen2_vl")).save(tmp_path / "model")
    with pytest.raises(VlftError, match="already a whole model"):
        export.merge(folder, tmp_path / "merged")
