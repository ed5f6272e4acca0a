"""The conformance kit catches what it promises to catch, in a sentence that names the thing."""

from __future__ import annotations

import importlib
import itertools
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlft import VlftError
from vlft.testing import check_strategy

# A strategy that keeps its word: the projector trains. Each test below changes one thing.
GOOD = """
from vlft import ParamGroup, StrategyConfig

class Config(StrategyConfig):
    def rates(self):
        return {"projector": 1e-3}

class Good:
    Config = Config

    def __init__(self, config):
        self.config = config

    def prepare_model(self, source):
        self.parts = source.parts
        model = source.load()
        for name, p in model.named_parameters():
            p.requires_grad_(self.trains(name))
        return model

    def trains(self, name):
        return self.parts.part_of(name) == "projector"

    def named(self, model):
        return tuple(n for n, p in model.named_parameters() if p.requires_grad)

    def param_groups(self, model):
        return [ParamGroup(name="projector", parameters=self.named(model), part="projector")]
"""
_numbers = itertools.count()

Module = Callable[[str], Any]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    """`module(code)`: an importable module of GOOD and `code`; the kit imports it in a process of its own, too."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def make(code: str) -> Any:
        name = f"strategy_under_test_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(GOOD + textwrap.dedent(code))
        importlib.invalidate_caches()
        return importlib.import_module(name)

    return make


def _refused(cls: Any, folder: Path, match: str, family: str = "qwen2_5_vl") -> None:
    with pytest.raises(VlftError, match=match):
        check_strategy(cls, folder / "work", families=[family])


def test_the_good_one_passes(module: Module, tmp_path: Path) -> None:
    check_strategy(module("").Good, tmp_path / "work")


def test_a_trained_parameter_in_no_group(module: Module, tmp_path: Path) -> None:
    bad = module(
        """
        class Bad(Good):
            def trains(self, name):
                return super().trains(name) or name.endswith("norm.weight")
            def named(self, model):
                return tuple(n for n in super().named(model) if super(Bad, self).trains(n))
        """
    ).Bad
    _refused(
        bad, tmp_path, r"'Bad' broke its contract: model\.language_model.*norm\.weight.* trains but is in no group"
    )


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (
            '[{"params": list(model.parameters()), "lr": 1e-4}]',
            "param_groups gave a dict; give vlft.ParamGroup objects",
        ),
        (
            '[ParamGroup(name="projector", parameters=tuple(model.parameters()), part="projector")]',
            "the group 'projector' holds a Parameter; give names",
        ),
    ],
)
def test_groups_that_are_none(module: Module, tmp_path: Path, groups: str, said: str) -> None:
    """As PyTorch's optimizers take them."""
    bad = module(
        f"""
        class Bad(Good):
            def param_groups(self, model):
                return {groups}
        """
    ).Bad
    _refused(bad, tmp_path, said)


def test_a_parameter_in_two_groups(module: Module, tmp_path: Path) -> None:
    bad = module(
        """
        class Bad(Good):
            def param_groups(self, model):
                more = ParamGroup(name="more", parameters=self.named(model)[:1], part="projector")
                return [*super().param_groups(model), more]
        """
    ).Bad
    _refused(bad, tmp_path, r"model\.visual\.merger\.\S+ is in more than one group")


def test_a_frozen_parameter_in_a_group(module: Module, tmp_path: Path) -> None:
    bad = module(
        """
        class Bad(Good):
            def named(self, model):
                return (*super().named(model), "lm_head.weight")
        """
    ).Bad
    _refused(bad, tmp_path, r"lm_head\.weight is in a group but frozen")


def test_a_name_that_the_model_does_not_have(module: Module, tmp_path: Path) -> None:
    bad = module(
        """
        class Bad(Good):
            def named(self, model):
                return (*super().named(model), "vision_tower.weight")
        """
    ).Bad
    _refused(bad, tmp_path, r"vision_tower\.weight is in a group but not in the model")


def test_a_part_that_does_not_exist(module: Module, tmp_path: Path) -> None:
    bad = module(
        """
        class Bad(Good):
            def param_groups(self, model):
                return [ParamGroup(name="merger", parameters=self.named(model), part="merger")]
        """
    ).Bad
    _refused(bad, tmp_path, r"unknown parts merger \(known: llm, vit, projector, head\)")


def test_nothing_trains(module: Module, tmp_path: Path) -> None:
    bad = module(
        """
        class Bad(Good):
            def trains(self, name):
                return False
            def param_groups(self, model):
                return []
        """
    ).Bad
    _refused(bad, tmp_path, "nothing trains")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_vision_tower_that_peft_froze_again(module: Module, tmp_path: Path, family: str) -> None:
    """The classic: unfreeze the tower, then call get_peft_model, which freezes all that is no adapter."""
    bad = module(
        """
        class BadConfig(StrategyConfig):
            def rates(self):
                return {"llm": 1e-4, "vit": 1e-5}

        class Bad(Good):
            Config = BadConfig
            def prepare_model(self, source):
                import peft
                self.parts = source.parts
                model = source.load()
                for p in model.get_submodule(source.parts.vit).parameters():
                    p.requires_grad_(True)
                return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
            def param_groups(self, model):
                vit = tuple(n for n in self.named(model) if self.parts.part_of(n) == "vit")
                llm = tuple(n for n in self.named(model) if self.parts.part_of(n) == "llm")
                found = [ParamGroup("llm", llm, "llm"), ParamGroup("vit", vit, "vit")]
                return [group for group in found if group.parameters]
        """
    ).Bad
    _refused(bad, tmp_path, "promise to train 'vit', but no group holds any of it", family)


def test_a_promised_part_that_does_not_train(module: Module, tmp_path: Path) -> None:
    bad = module(
        """
        class BadConfig(StrategyConfig):
            def rates(self):
                return {"llm": 1e-4, "projector": 1e-3}

        class Bad(Good):
            Config = BadConfig
        """
    ).Bad
    _refused(bad, tmp_path, "promise to train 'llm', but no group holds any of it")


def test_a_trained_part_that_was_not_promised(module: Module, tmp_path: Path) -> None:
    bad = module(
        """
        class Bad(Good):
            def trains(self, name):
                return super().trains(name) or "visual.patch_embed" in name
            def param_groups(self, model):
                parts = {}
                for n in self.named(model):
                    parts.setdefault(self.parts.part_of(n), []).append(n)
                return [ParamGroup(part, tuple(names), part) for part, names in parts.items()]
        """
    ).Bad
    _refused(bad, tmp_path, r"trains 'vit', which Config\.rates\(\) does not name")


def test_a_group_under_another_part_than_it_lies_in(module: Module, tmp_path: Path) -> None:
    """It would get that part's rate in silence."""
    bad = module(
        """
        class BadConfig(StrategyConfig):
            def rates(self):
                return {"llm": 1e-4}

        class Bad(Good):
            Config = BadConfig
            def param_groups(self, model):
                return [ParamGroup(name="all", parameters=self.named(model), part="llm")]
        """
    ).Bad
    _refused(bad, tmp_path, r"grouped under llm, lies in projector")


def test_a_strategy_that_fails_by_itself_is_named(module: Module, tmp_path: Path) -> None:
    bad = module(
        """
        class Bad(Good):
            def param_groups(self, model):
                raise KeyError("visual")
        """
    ).Bad
    _refused(bad, tmp_path, r"Bad on qwen2_5_vl: KeyError: 'visual'")


def test_a_detached_part(module: Module, tmp_path: Path) -> None:
    """Trainable, grouped, promised, and yet no gradient arrives: only a real step shows it."""
    bad = module(
        """
        class Bad(Good):
            def prepare_model(self, source):
                model = super().prepare_model(source)
                tower = model.get_submodule(source.parts.vit)
                def cut(module, args, out):
                    out.pooler_output = out.pooler_output.detach()
                    return out
                tower.register_forward_hook(cut)
                # The LLM must train for there to be a backward pass at all.
                norm = model.get_submodule(source.parts.norm)
                norm.weight.requires_grad_(True)
                return model
            def param_groups(self, model):
                names = self.named(model)
                llm = tuple(n for n in names if self.parts.part_of(n) == "llm")
                projector = tuple(n for n in names if n not in llm)
                return [ParamGroup("llm", llm, "llm"), ParamGroup("projector", projector, "projector")]

        class BadConfig(StrategyConfig):
            def rates(self):
                return {"llm": 1e-4, "projector": 1e-3}
        Bad.Config = BadConfig
        """
    ).Bad
    _refused(
        bad,
        tmp_path,
        r"'projector' should train, but no gradient reached any of its \d+ parameters \(first: model\.visual",
    )


def test_a_frozen_weight_that_moves(module: Module, tmp_path: Path) -> None:
    """A forward that writes into a weight that the optimizer never sees."""
    bad = module(
        """
        class Bad(Good):
            def prepare_model(self, source):
                model = super().prepare_model(source)
                head = model.get_submodule(source.parts.head)
                def drift(module, args):
                    if module.training:
                        module.weight.data.mul_(0.5)
                head.register_forward_pre_hook(drift)
                return model
        """
    ).Bad
    _refused(bad, tmp_path, r"frozen weights moved in step 1: lm_head\.weight")


def test_a_result_that_is_not_what_was_trained(module: Module, tmp_path: Path) -> None:
    """An Exporter that saves nothing of the training: merging gives the base model back."""
    bad = module(
        """
        class Bad(Good):
            def export(self, model, state, folder):
                (folder / "nothing.txt").write_text("")
            def merge(self, folder, base):
                from transformers import AutoModelForImageTextToText
                return AutoModelForImageTextToText.from_pretrained(base)
        """
    ).Bad
    _refused(bad, tmp_path, r"Bad on Qwen2\.5-VL: the saved and merged model's losses differ")


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_heavy_imports_at_the_top(module: Module, tmp_path: Path, package: str) -> None:
    bad = module(f"import {package}\nclass Bad(Good):\n    class Config(Config): pass\n")
    _refused(bad.Bad, tmp_path, rf"{bad.__name__} cannot be read by `--help`.*import heavy packages inside methods")


def test_no_config(module: Module, tmp_path: Path) -> None:
    _refused(
        module("class Bad(Good):\n    Config = dict\n").Bad,
        tmp_path,
        r"no 'Config' that derives from vlft\.StrategyConfig",
    )
