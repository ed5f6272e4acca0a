"""Copies that layers use in place of parameters notice each change of what they are from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packed_rows import Example, packed_row
from torch import nn

from vlft.models.forward import PackedVLM
from vlft.models.kernels.block import Block
from vlft.models.kernels.held import Sources
from vlft.models.load import open_checkpoint, source_of

TARGETS = r".*(language_model\.layers\..*_proj|visual\.blocks\..*qkv)"


def sources(block: Block) -> Iterator[Any]:
    """What held copies are made from and by, module by module."""
    for p in (product for group in block.groups() for product in group.each):
        yield from (p.base.weight, p.base.weight.data_ptr(), p.base.weight.requires_grad, p.base.bias)
        yield p.base.weight.dtype
        for adapter in p.adapters():
            yield from (adapter.a_rD, adapter.b_Or, adapter.scale, adapter.a_rD.requires_grad)
    for norm in block.norms():
        yield from (norm.weight, norm.bias, norm.weight.requires_grad)


def packed_model(folder: Path) -> tuple[PackedVLM, dict[str, Any]]:
    source = source_of(open_checkpoint(str(folder)), "no", torch.device("cpu"))
    torch.manual_seed(0)
    options: dict[str, Any] = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False}
    model: Any = peft.get_peft_model(source.load(), peft.LoraConfig(**options))
    model.add_adapter("other", peft.LoraConfig(**options | {"r": 2, "lora_alpha": 5}))
    packed = PackedVLM(model, source.parts, source.config.image_token_id)
    packed.installed.holds = True
    row = packed_row([Example("qwen2_5_vl", source, [(1, 4, 6)], 0), Example("qwen2_5_vl", source, [], 1)])
    return packed, row


def blocks_of(packed: PackedVLM) -> list[Block]:
    return [layer.vlft_block for layer in packed.installed.layers]  # type: ignore[misc]


def seen(packed: PackedVLM) -> list[Any]:
    found = [source for block in blocks_of(packed) for source in sources(block)]
    return [id(one) if isinstance(one, torch.Tensor) else one for one in found]


def one(packed: PackedVLM) -> Any:
    return packed.hf.model.language_model.layers[1].self_attn.v_proj


def replaced(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(p.detach() * 1.5, requires_grad=p.requires_grad)


def _weight(packed: PackedVLM) -> None:
    one(packed).base_layer.weight = replaced(one(packed).base_layer.weight)


def _bias(packed: PackedVLM) -> None:
    one(packed).base_layer.bias = None


def _adapter_weight(packed: PackedVLM) -> None:
    one(packed).lora_A["default"].weight = replaced(one(packed).lora_A["default"].weight)


def _adapter_module(packed: PackedVLM) -> None:
    new = nn.Linear(4, one(packed).lora_B["default"].out_features, bias=False)
    one(packed).lora_B["default"] = new


def _adapters(packed: PackedVLM) -> None:
    old = one(packed).lora_A
    one(packed).lora_A = nn.ModuleDict(
        {name: nn.Linear(m.in_features, m.out_features, False) for name, m in old.items()}
    )


def _scaling(packed: PackedVLM) -> None:
    one(packed).scaling["default"] *= 3


def _all_scalings(packed: PackedVLM) -> None:
    one(packed).scaling = {name: scale * 3 for name, scale in one(packed).scaling.items()}


def _norm(packed: PackedVLM) -> None:
    layer: Any = packed.installed.language[1]
    layer.input_layernorm.weight = replaced(layer.input_layernorm.weight)


def _values(packed: PackedVLM) -> None:
    one(packed).base_layer.weight.data = one(packed).base_layer.weight.data * 1.5


def _cast(packed: PackedVLM) -> None:
    one(packed).base_layer.bfloat16()


CHANGES: dict[str, Callable[[PackedVLM], Any]] = {
    "another weight": _weight,
    "no bias any more": _bias,
    "another adapter's weight": _adapter_weight,
    "another module in an adapter": _adapter_module,
    "other adapters": _adapters,
    "a scale": _scaling,
    "all scales": _all_scalings,
    "a cast in place": _cast,
    "other values at another place": _values,
    "another norm's weight": _norm,
    "frozen": lambda packed: one(packed).requires_grad_(False),
    "thawed": lambda packed: one(packed).base_layer.requires_grad_(True),
    "merged": lambda packed: one(packed).merge(),
    "switched off": lambda packed: one(packed).enable_adapters(False),
    "another that is active": lambda packed: one(packed).set_adapter("other"),
    "both active": lambda packed: one(packed).set_adapter(["default", "other"]),
    "deleted": lambda packed: one(packed).delete_adapter("default"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_noticed_and_its_result_is_that_without_copies(tiny: Callable[..., Path], change: str) -> None:
    packed, row = packed_model(tiny())
    with torch.no_grad():
        packed(**row)
        held = packed.installed.held
        assert held is not None
        assert packed(**row).equal(packed(**row))
        assert packed.installed.held is held, "nothing has changed"
        plain = seen(packed)
        CHANGES[change](packed)
        assert plain != seen(packed)
        found = packed(**row)
        assert packed.installed.held is not held
        held = packed.installed.held
        packed(**row)
        assert packed.installed.held is held
        packed.installed.holds = False
        assert packed(**row).equal(found)


def test_adapters_merged_and_then_switched_off_are_taken_out_of_the_weights(tiny: Callable[..., Path]) -> None:
    packed, row = packed_model(tiny())
    with torch.no_grad():
        with packed.model.disable_adapter():  # type: ignore[operator]
            plain = packed(**row)
        for _ in range(2):
            for module in packed.modules():
                if isinstance(module, peft.tuners.lora.LoraLayer):
                    module.merge()
            merged = packed(**row)
            with packed.model.disable_adapter():  # type: ignore[operator]
                assert packed(**row).allclose(plain, atol=1e-5)
            assert not merged.allclose(plain, atol=1e-3)
            assert packed(**row).allclose(merged, atol=1e-5)


def test_a_weight_that_lies_nowhere_is_never_the_same(tiny: Callable[..., Path]) -> None:
    packed, _ = packed_model(tiny())
    blocks = blocks_of(packed)
    assert Sources(blocks).same()
    base = one(packed).base_layer
    weight = base.weight
    del base.weight
    base.weight = weight.detach().clone()
    assert not Sources(blocks).same()


@pytest.mark.parametrize("master", [False, True])
def test_what_would_be_held_is_what_is_held(tiny: Callable[..., Path], master: bool) -> None:
    """`Products.copied`, by which a plan counts, against the tensors that `hold` makes."""
    packed, _ = packed_model(tiny())
    kind, device = (torch.bfloat16 if master else torch.float32), torch.device("cpu")
    found = 0
    for group in (group for block in blocks_of(packed) for group in block.groups()):
        expected, fresh = group.copied(kind, device, lambda p: p.dtype)
        group.hold(kind, device)
        held = group._held
        assert held is not None
        own = {p.base.weight.data_ptr() for p in group.each}
        sizes = [p.weight_OD.nbytes for p in held._pieces or [] if p.weight_OD.data_ptr() not in own]
        assert fresh == (0 if held._pieces is not None else group.fresh_pieces(kind, device)[0].weight_OD.nbytes)
        adapters = held.low.a_RD.nbytes + held.low.b_OR.nbytes if held.low is not None else 0
        assert expected == sum(sizes) + adapters
        found += len(sizes)
    assert found > 0
