"""What others put on modules inside a layer runs, or the layer says that it keeps its own forward."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload, ModelHook, add_hook_to_module, attach_execution_device_hook
from packed_rows import Example, packed_row
from runs import FSDP_ON_CPU, command, start, write_data
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from vlft.models.forward import PackedVLM
from vlft.models.kernels import memory_for
from vlft.models.load import open_checkpoint, source_of
from vlft.testing.tiny import FAMILIES
from vlft_strategies.lora import Lora
from vlft_strategies.qlora import QLora

OF_LLM = "model.language_model.layers.1"


def loaded(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """A source, a model, and a row for it."""
    source = source_of(open_checkpoint(str(folder)), "no", torch.device("cpu"))
    torch.manual_seed(0)
    family = source.checkpoint.family.model_type
    row = packed_row(
        [Example(family, source, grids, seed) for seed, grids in enumerate([[(1, 4, 6)], [], [(1, 2, 4)]])]
    )
    return source, source.load(), row


def packed_of(model: nn.Module, source: Any, **options: Any) -> PackedVLM:
    return PackedVLM(model, source.parts, source.config.image_token_id, **options).train()


def halved(_: Any, __: Any, out: Tensor) -> Tensor:
    return 0.5 * out


def wrapped(module: Any, before: Any, x: Tensor) -> Tensor:
    return 0.5 * before(x)  # type: ignore[no-any-return]


def forward_of_the_instance(module: Any) -> None:
    module.forward = partial(wrapped, module, module.forward)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


class HalfHook(ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return 0.5 * output


def bound(module: Any) -> None:
    module.forward = MethodType(lambda self, x: 0.5 * type(self).forward(self, x), module)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward hook": (lambda m: m.register_forward_hook(halved), "a forward hook on mlp.down_proj"),
    "forward pre-hook": (
        lambda m: m.register_forward_pre_hook(lambda _, x: (0.5 * x[0],)), "a forward hook on mlp.down_proj",
    ),
    "backward hook": (
        lambda m: m.register_full_backward_hook(lambda _, d, __: (0.5 * d[0],)), "a backward hook on mlp.down_proj",
    ),
    "backward pre-hook": (
        lambda m: m.register_full_backward_pre_hook(lambda _, d: (0.5 * d[0],)), "a backward hook on mlp.down_proj",
    ),
    "parametrization": (
        lambda m: parametrize.register_parametrization(m, "weight", Half()), "a parametrization of mlp.down_proj",
    ),
    "weight norm": (parametrizations.weight_norm, "a parametrization of mlp.down_proj"),
    "forward": (forward_of_the_instance, "another forward on mlp.down_proj"),
    "method": (bound, "another forward on mlp.down_proj"),
    "accelerate's other hooks": (lambda m: add_hook_to_module(m, HalfHook()), "another forward on mlp.down_proj"),
    "accelerate's offloading": (lambda m: add_hook_to_module(m, CpuOffload("cpu")), "another forward on mlp.down_proj"),
}  # fmt: skip


def same(found: PackedVLM, expected: PackedVLM, row: dict[str, Any]) -> None:
    for packed in (found, expected):
        packed.zero_grad()
    a, b = found(**row), expected(**row)
    assert torch.allclose(a, b, atol=1e-5)
    a.sum().backward()
    b.sum().backward()
    theirs = dict(expected.named_parameters())
    for name, p in found.named_parameters():
        assert (p.grad is None) == (theirs[name].grad is None)
        if p.grad is not None:
            assert float((p.grad - theirs[name].grad).norm()) <= 1e-4 * float(theirs[name].grad.norm()), name


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_put_on_a_module_inside_runs(tiny: Callable[..., Path], change: str, late: bool) -> None:
    source, model, row = loaded(tiny())
    _, other, _ = loaded(tiny())
    put, reason = CHANGES[change]
    put(other.get_submodule(f"{OF_LLM}.mlp.down_proj"))
    reference = packed_of(other, source, reference=True)
    inside = model.get_submodule(f"{OF_LLM}.mlp.down_proj")
    if late:
        packed = packed_of(model, source)
        packed.memory = memory_for(packed.installed, 512, "low", None)
        assert len(packed.installed.layers) == 6
        put(inside)
        with pytest.warns(UserWarning, match=f"1 layers keep transformers' forward after all: {reason}"):
            packed(**row)
        assert [len(layers) for layers in packed.memory.towers] == [len(keeps) for keeps in packed.memory.now] == [3, 2]
    else:
        put(inside)
        packed = packed_of(model, source)
    assert len(packed.installed.layers) == 5
    assert str(packed.installed).endswith(f"1 keep transformers' forward: {reason}")
    same(packed, reference, row)


@pytest.mark.parametrize("late", [False, True])
def test_the_last_layer_falls_back_with_all_its_rows(tiny: Callable[..., Path], late: bool) -> None:
    source, model, row = loaded(tiny())
    _, other, _ = loaded(tiny())
    for one in (other, model)[: 1 if late else 2]:
        one.get_submodule("model.language_model.layers.2.mlp").register_forward_hook(halved)
    packed, reference = packed_of(model, source), packed_of(other, source, reference=True)
    if late:
        assert packed.reads_rows
        model.get_submodule("model.language_model.layers.2.mlp").register_forward_hook(halved)
        with pytest.warns(UserWarning, match="a forward hook on mlp"):
            packed(**row)
    assert not packed.reads_rows
    same(packed, reference, row)


@pytest.mark.parametrize("late", [False, True])
def test_a_layer_whose_own_forward_was_put_over(tiny: Callable[..., Path], late: bool) -> None:
    """Its hooks run; what lies over its forward would not, or would be called with what it does not know."""
    source, model, row = loaded(tiny())
    _, other, _ = loaded(tiny())

    def half(module: Any, before: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        assert "read_S" not in options
        return 0.5 * before(hidden_states, **options)  # type: ignore[no-any-return]

    def put(one: Any) -> None:
        last = one.get_submodule("model.language_model.layers.2")
        last.forward = partial(half, last, last.forward)

    put(other)
    if not late:
        put(model)
    packed, reference = packed_of(model, source), packed_of(other, source, reference=True)
    if late:
        put(model)
        with pytest.warns(UserWarning, match="another forward on the layer"):
            packed(**row)
    assert packed.installed.left == {"another forward on the layer": 1}
    same(packed, reference, row)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", [None, Lora, QLora])
def test_hooks_that_only_move_change_nothing(tiny: Callable[..., Path], family: str, strategy: Any) -> None:
    """accelerate puts them on every module of a model that is loaded in 4 bits on a GPU with a device map."""
    source, model, row = loaded(tiny(family))
    if strategy is not None:
        model = strategy(strategy.Config(lora_rank=4, lora_dropout=0.0)).prepare_model(source)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attach_execution_device_hook(base, "cpu")
    assert "forward" in base.get_submodule(OF_LLM).__dict__
    assert "forward" in base.get_submodule(f"{OF_LLM}.input_layernorm").__dict__
    packed = packed_of(model, source)
    packed(**row).sum().backward()
    assert len(packed.installed.layers) == 6
    assert not packed.installed.left


def test_hooks_that_hand_out_hidden_states_are_idle(tiny: Callable[..., Path]) -> None:
    """transformers leaves them on every layer and attention once somebody has asked for them, an evaluation say."""
    source, model, row = loaded(tiny())
    ids = row["input_ids_T"][:, -4:]
    model(input_ids=ids, output_attentions=True, output_hidden_states=True)
    assert any(m._forward_hooks for m in model.get_submodule(OF_LLM).modules())
    packed = packed_of(model, source)
    packed(**row)
    assert len(packed.installed.layers) == 6


def test_a_model_may_be_wrapped_twice(tiny: Callable[..., Path]) -> None:
    source, model, row = loaded(tiny())
    first = packed_of(model, source)(**row)
    again = packed_of(model, source)
    assert torch.equal(again(**row), first)
    assert len(again.installed.layers) == 6


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero3", "fsdp"])
def test_hooks_of_sharding_engines_are_no_reason(tiny: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    """They come between installing and the first forward; FSDP2 changes the layers' classes, too."""
    more: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 2}
    how: dict[str, Any] = {}
    if layout == "zero3":
        more["deepspeed"] = "zero3"
    else:
        how = FSDP_ON_CPU
    words = command(tiny(), write_data(tmp_path, 8), tmp_path / "out", "lora_llm_full_vit", **more)
    done = start(words, processes=2, **how)
    assert "6 layers as one operation each; " in done.stdout
    assert "after all" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Classes


class Qwen2RMSNorm(nn.RMSNorm):
    """Of the right name, and not transformers'."""


class DoubleNorm(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x * self.weight


def replaced(layer: Any, name: str, make: Callable[[Any], Any]) -> None:
    parent, _, last = name.rpartition(".")
    owner = layer.get_submodule(parent)
    setattr(owner, last, make(getattr(owner, last)))


def subclassed(module: Any) -> Any:
    kind = type(module)
    module.__class__ = type(
        f"My{kind.__name__}", (kind,), {"forward": lambda self, *a, **k: kind.forward(self, *a, **k)}
    )
    return module


OTHERS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "norm": ("input_layernorm", DoubleNorm, "a DoubleNorm as norm"),
    "norm of a known name": (
        "post_attention_layernorm", lambda norm: Qwen2RMSNorm(len(norm.weight)), "a Qwen2RMSNorm as norm",
    ),
    "norm without bias": (
        "input_layernorm", lambda norm: nn.LayerNorm(len(norm.weight), bias=False),
        "a LayerNorm without weight or bias",
    ),
    "mlp": ("mlp", subclassed, "a MyQwen2MLP"),
    "attention": ("self_attn", subclassed, "a MyQwen2_5_VLAttention"),
    "activation": ("mlp.act_fn", lambda _: nn.ReLU(), "a ReLU where the configuration says silu"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_another_formula_keeps_its_forward(tiny: Callable[..., Path], other: str) -> None:
    source, model, row = loaded(tiny())
    _, plain, _ = loaded(tiny())
    name, make, reason = OTHERS[other]
    for one in (model, plain):
        replaced(one.get_submodule(OF_LLM), name, make)
    packed, reference = packed_of(model, source), packed_of(plain, source, reference=True)
    assert packed.installed.left == {reason: 1}
    same(packed, reference, row)


def test_a_layer_that_lacks_something_says_what(tiny: Callable[..., Path]) -> None:
    source, model, _ = loaded(tiny())
    del model.get_submodule(OF_LLM).mlp.up_proj
    assert packed_of(model, source).installed.left == {"a Qwen2MLP without up_proj": 1}


def test_a_mistake_of_ours_is_no_reason(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # By its place: the package has a function of that name.
    monkeypatch.setattr(sys.modules["vlft.models.kernels.install"], "Products", lambda modules, **_: modules.absent)
    source, model, _ = loaded(tiny())
    with pytest.raises(AttributeError, match="absent"):
        packed_of(model, source)
