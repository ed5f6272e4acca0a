"""Policies and rules: what ships is valid, a file's mistakes are told at once, and words refuse what they should."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from vlft.augmentation.policy import Policy, names, problem_of, read_policy
from vlft.augmentation.rules import KINDS, default_rules, refused
from vlft.errors import ConfigError


def written(folder: Path, text: str) -> str:
    path = folder / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_policy(written(folder, text))
    return list(caught.value.problems)


def test_what_ships_is_valid_and_crosses_to_a_worker() -> None:
    assert names() == ["photometric", "geometric", "document"]
    made = [read_policy(name) for name in names()]
    assert [bool(policy.geometric) for policy in made] == [False, True, True]
    assert not any("Flip" in op.name for op in made[2].geometric), "a page is never mirrored"
    for policy in made:
        again: Policy = pickle.loads(pickle.dumps(policy))
        assert again == policy
        assert again.digest == policy.digest
    assert len({policy.digest for policy in made}) == 3


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    text = "ops:\n  - RandomVerticalFlip: {p: 0.5}\n  - RandomGrayscale\n  - RandomGaussianBlur: {kernel_size: [3, 3], "
    text += "sigma: [0.1, 2.0]}\nfit: true\nrules: {counting: null, dogs: {refuse: [crop], words: [dog*, 狗]}}\n"
    policy = read_policy(written(tmp_path, text))
    assert [op.name for op in policy.geometric] == ["RandomVerticalFlip"]
    assert [op.name for op in policy.photometric] == ["RandomGrayscale", "RandomGaussianBlur"]
    assert policy.fit
    assert "counting" not in {rule.name for rule in policy.rules}
    assert refused(policy.rules, "Doggies?") == {"crop": "dogs ('Dog')"}
    assert refused(policy.rules, "有狗吗") == {"crop": "dogs ('狗')"}
    changed = read_policy(written(tmp_path, text.replace("2.0", "2.5")))
    assert changed.digest != policy.digest


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    text = """
fitt: true
fit: maybe
rules: {sides: {refuse: [mirrors], words: [left]}, nothing: null, more: {refuse: [crop]}, bad: {refuse: [any],
        words: ["/(/"]}}
ops:
  - RandomHorizontlFlip
  - RandomElasticTransform: {p: 1.0}
  - RandomCrop: {size: [10, 10]}
  - RandomAffine: {degres: 5.0}
  - RandomAffine: {degrees: 5.0, padding_mode: zeros}
  - RandomResizedCrop: {size: [32, 32]}
  - RandomMosaic
  - Normalize: {mean: 0.5, std: 0.5}
  - ColorJitter: {brightness: [-3.0, 1.0]}
  - RandomDissolving
  - 7
"""
    found = problems(tmp_path, text)
    wanted = [
        "unknown key 'fitt' (the nearest is 'fit')",
        "'fit': found 'maybe'", "refuses 'mirrors'", "rule 'nothing' is not there",
        "rule 'more' has no 'words'", "rule 'bad' has an expression", "op 1 (RandomHorizontlFlip): kornia.augmentation",
        "op 2 (RandomElasticTransform): it moves", "op 3 (RandomCrop): would change", "no argument 'degres'",
        "'padding_mode' is not used", "'size' is the picture's own", "op 7 (RandomMosaic): it moves",
        "op 8 (Normalize): gives values",
        "op 9 (ColorJitter): Kornia refuses it", "op 10 (RandomDissolving): downloads",
        "op 11: found 7",
    ]  # fmt: skip
    missing = [text for text in wanted if not any(text in one for one in found)]
    assert not missing, "\n".join(found)
    assert len(found) == len(wanted), "\n".join(found)
    assert all(one.endswith((".", "?")) for one in found), "\n".join(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b", "holds no mapping"),
        ("ops: []", "no list of ops"),
        ("ops: {RandomGrayscale: {}}", "no list of ops"),
        ("ops: [RandomGrayscale]\nops: [RandomGrayscale]", "written twice"),
        ("ops: [", "not valid YAML"),
        ("ops: [RandomGrayscale]\nrules: 3", "are no mapping"),
        ("ops: [{RandomGrayscale: {p: 3.0}}]", "'p' is 3.0"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    assert said in "\n".join(problems(tmp_path, text))


def test_a_name_that_is_none() -> None:
    assert problem_of("photometric") == ""
    assert "the nearest is 'geometric'" in problem_of("geometrik")


REFUSED: list[tuple[str, str]] = [
    ("Is the dog on the left?", "mirror turn crop shift"),
    ("左边的人在做什么", "mirror turn crop shift"),
    ("What is above the table?", "turn crop shift"),
    ("桌子上方有什么", "turn crop shift"),
    ("Is the picture mirrored?", "any"),
    ("图片是镜像的吗", "any"),
    ("Turn it clockwise", "any"),
    ("顺时针旋转多少度", "any"),
    ("What time does the clock show?", "any"),
    ("Read the sign", "mirror turn crop"),
    ("What does the text say", "mirror turn crop"),
    ("请识别图中的文字", "mirror turn crop"),
    ("请read一下", "mirror turn crop"),
    ("Transcribe this document with OCR", "mirror turn crop"),
    ("How many dogs are there?", "crop"),
    ("图中有几只狗", "crop"),
    ("Сколько собак", "mirror turn crop shift"),
    ("¿Dónde está?", "mirror turn crop shift"),
    ("The copyright of a bright photo", ""),
    ("这是什么东西", ""),
    ("What colour is the dog?", ""),
    ("already threaded", ""),
]


@pytest.mark.parametrize(("text", "kinds"), REFUSED)
def test_words_refuse_movements(text: str, kinds: str) -> None:
    found = set(refused(tuple(default_rules().values()), text))
    assert found - {"any"} >= set(kinds.split()) - {"any"}
    assert ("any" in found) == ("any" in kinds)
    if not kinds:
        assert not found


def test_the_page_lists_every_rule_kind_and_policy() -> None:
    page = (Path(__file__).parents[2] / "docs/augmentation.md").read_text(encoding="utf-8")
    wanted: list[Any] = [*(f"`{name}`" for name in (*default_rules(), *KINDS, *names()))]
    assert not [name for name in wanted if name not in page]
