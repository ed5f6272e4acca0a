"""What users of PEFT do to adapters after a model was made, against PEFT's own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packed_rows import Example, packed_row
from torch import nn

from vlft.models.forward import PackedVLM
from vlft.models.load import open_checkpoint, source_of

TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\..*_proj"
HOLDS = pytest.mark.parametrize("holds", [False, True])


def lora(dropout: float = 0.0, **more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, "lora_dropout": dropout, **more})


def fill(model: nn.Module) -> None:
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.1)


@pytest.fixture
def pair(tiny: Callable[..., Path]) -> tuple[PackedVLM, PackedVLM, dict[str, Any]]:
    """A model with one adapter, the same by transformers' and PEFT's own forwards, and a row for both."""
    source = source_of(open_checkpoint(str(tiny())), "no", torch.device("cpu"))
    made = []
    for reference in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(source.load(), lora())
        fill(model)
        made.append(PackedVLM(model, source.parts, source.config.image_token_id, reference=reference).train())
    family = source.checkpoint.family.model_type
    return made[0], made[1], packed_row([Example(family, source, grids, 0) for grids in ([(1, 4, 6)], [])])


def same(pair: tuple[PackedVLM, PackedVLM, dict[str, Any]]) -> None:
    """Losses, and which weights have which gradients."""
    found, expected, row = pair
    for packed in (found, expected):
        packed.zero_grad()
    a, b = found(**row), expected(**row)
    assert torch.allclose(a, b, atol=1e-5), float((a - b).abs().max())
    theirs = dict(expected.named_parameters())
    if not a.requires_grad:
        assert not b.requires_grad
        return
    a.sum().backward()
    b.sum().backward()
    for name, p in found.named_parameters():
        mine, other = (torch.zeros_like(p) if g is None else g for g in (p.grad, theirs[name].grad))
        assert float((mine - other).norm()) <= 1e-4 * float(other.norm()) + 1e-7, name


def both(pair: tuple[PackedVLM, PackedVLM, dict[str, Any]], do: Callable[[Any], Any]) -> None:
    for packed in pair[:2]:
        do(packed.model)


def layers_of(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "merged_adapters")]


def merge(*names: str) -> Callable[[Any], None]:
    def do(model: Any) -> None:
        for module in layers_of(model):
            module.merge(adapter_names=list(names))

    return do


@HOLDS
def test_merged_then_switched_off_then_on(pair: Any, holds: bool) -> None:
    """PEFT takes them out of the weights at the next forward, and they act from beside when they are on again."""
    pair[0].installed.holds = holds
    same(pair)
    both(pair, merge("default"))
    same(pair)
    both(pair, lambda model: model.base_model.disable_adapter_layers())
    same(pair)
    assert not any(module.merged for module in layers_of(pair[0].model))
    both(pair, lambda model: model.base_model.enable_adapter_layers())
    same(pair)


@HOLDS
def test_adapters_that_are_merged_one_after_the_other(pair: Any, holds: bool) -> None:
    both(pair, lambda model: model.add_adapter("second", lora()))
    both(pair, fill)
    both(pair, lambda model: model.base_model.set_adapter(["default", "second"]))
    pair[0].installed.holds = holds
    same(pair)
    for name in ("default", "second"):
        both(pair, merge(name))
        same(pair)
    both(pair, lambda model: [module.unmerge() for module in layers_of(model)])
    same(pair)


@HOLDS
@pytest.mark.parametrize("ran", [False, True])
def test_a_second_adapter_with_another_dropout(pair: Any, holds: bool, ran: bool) -> None:
    """Of 1, so that both give the same without the same random numbers: such layers run PEFT's own forward."""
    pair[0].installed.holds = holds
    if ran:
        same(pair)
    both(pair, lambda model: model.add_adapter("second", lora(dropout=1.0)))
    both(pair, fill)
    both(pair, lambda model: model.base_model.set_adapter(["default", "second"]))
    with pytest.warns(UserWarning, match="3 layers keep transformers' forward after all: adapters of one input with"):
        same(pair)
    assert len(pair[0].installed.layers) == 3
    same(pair)


@HOLDS
@pytest.mark.parametrize("ran", [False, True])
def test_the_second_adapter_s_dropout_is_that_of_both(pair: Any, holds: bool, ran: bool) -> None:
    """The first is gone: one dropout is left, another one than at the start."""
    pair[0].installed.holds = holds
    if ran:
        same(pair)
    both(pair, lambda model: model.add_adapter("second", lora(dropout=0.3)))
    both(pair, fill)
    both(pair, lambda model: model.base_model.set_adapter(["second"]))
    both(pair, lambda model: model.delete_adapter("default"))
    for packed in pair[:2]:
        packed.eval()
    same(pair)
    assert len(pair[0].installed.layers) == 6
    groups = [group for layer in pair[0].installed.language for group in layer.vlft_block.groups()]
    assert {group.dropout for group in groups} == {0.3}


@HOLDS
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}])
def test_a_later_adapter_of_another_kind(pair: Any, holds: bool, ran: bool, more: dict[str, Any]) -> None:
    pair[0].installed.holds = holds
    if ran:
        same(pair)
    one_layer = TARGETS.replace(r"\d+", "1")
    both(pair, lambda model: model.add_adapter("second", lora(target_modules=one_layer, **more)))
    both(pair, fill)
    both(pair, lambda model: model.base_model.set_adapter(["second"]))
    with pytest.warns(UserWarning, match="1 layers keep transformers' forward after all"):
        same(pair)
    assert len(pair[0].installed.layers) == 5


@HOLDS
@pytest.mark.parametrize("ran", [False, True])
def test_a_linear_module_that_is_wrapped_later(pair: Any, holds: bool, ran: bool) -> None:
    """An adapter on a tower that had none: other modules lie there than those that the operation was made of."""
    pair[0].installed.holds = holds
    if ran:
        same(pair)
    both(pair, lambda model: model.add_adapter("second", lora(target_modules=r".*visual\.blocks\.1\.attn\.qkv")))
    both(pair, fill)
    both(pair, lambda model: model.base_model.set_adapter(["default", "second"]))
    with pytest.warns(UserWarning, match="1 layers keep transformers' forward after all: another module"):
        same(pair)
    assert len(pair[0].installed.layers) == 5
