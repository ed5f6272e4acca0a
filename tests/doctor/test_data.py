"""Every fault of the data is found, and in clean data none: the two data sets of tests/doctor_data.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doctor_data import (
    ALONE,
    FAULTS,
    Set,
    ask,
    clean,
    exact_leak,
    form,
    outside_box,
    photo,
    pixels_for_model,
    scaled_leak,
)

from vlft.commands import read_doctor
from vlft.doctor.examine import examine
from vlft.doctor.findings import Finding
from vlft.doctor.languages import tells_languages
from vlft.doctor.page import Checkup, render

Tiny = Callable[..., Path]


def look(made: Set, model: Path, **more: Any) -> Checkup:
    words = {"look": "data", "num_workers": 0, "cache_dir": made.folder / "cache", **made.words, **more}
    argv = ["--model_name_or_path", str(model), "--dataset_config_path", str(made.write())]
    for name, value in words.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return examine(read_doctor(argv))


def kinds(found: Checkup) -> set[tuple[str, str]]:
    return {(one.grade, one.check) for one in found.findings}


def the(found: Checkup, check: str) -> Finding:
    (one,) = [one for one in found.findings if one.check == check]
    return one


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_clean_data_has_no_finding(tiny: Tiny, tmp_path: Path, family: str) -> None:
    found = look(clean(tmp_path), tiny(family))
    assert [(one.check, one.text) for one in found.findings] == []
    assert found.counts[0][:1] + found.counts[0][2:7] == ("train", "80", "0", "80", "0", "80")
    assert [label for label, _, _ in found.figures] == ["Records", "Left out", "Train", "Held out", "Looked into"]
    assert found.figures[-1][1:] == ("120", "samples, 120 pictures")
    assert [title for title, _ in found.sheet] == ["train, trains", "held, held out"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_alone(tiny: Tiny, tmp_path: Path, fault: Callable[[Set], None]) -> None:
    """It gives its findings and nothing else."""
    if fault.__name__ == "other_languages" and not tells_languages():
        pytest.skip("needs py3langid for languages of one script")
    made = clean(tmp_path)
    fault(made)
    found = look(made, tiny("qwen2_5_vl"))
    assert kinds(found) == FAULTS[fault], [one.text for one in found.findings]


def test_all_faults_at_once(tiny: Tiny, tmp_path: Path) -> None:
    """They do not hide each other, whatever the number of workers."""
    made = clean(tmp_path, 140)
    together = [fault for fault in FAULTS if fault not in ALONE]
    for fault in together:
        fault(made)
    wanted = {check for fault in together for _, check in FAULTS[fault]}
    wanted -= {"leak_exact"}  # its picture is scaled afterwards
    here = look(made, tiny("qwen2_5_vl"))
    assert wanted <= {one.check for one in here.findings}
    there = look(made, tiny("qwen2_5_vl"), num_workers=2)
    assert [(f.grade, f.check, f.text, f.examples) for f in here.findings] == [
        (f.grade, f.check, f.text, f.examples) for f in there.findings
    ]
    assert all(one.text.endswith(".") for one in here.findings), "each is a sentence"


def test_reasons_are_those_of_training(tiny: Tiny, tmp_path: Path) -> None:
    """What the ledger of a run would say, to the word."""
    from vlft.data.index import open_index
    from vlft.data.registry import read_registry
    from vlft.data.tokens import Chat
    from vlft.family import FAMILIES

    made = clean(tmp_path)
    for fault in FAULTS:
        if fault.__name__ in ("empty_answer", "bad_json", "too_few_pictures"):
            fault(made)
    found = look(made, tiny("qwen2_5_vl"))
    chat = Chat.load(tiny("qwen2_5_vl"), FAMILIES["qwen2_5_vl"])
    ledger = open_index(read_registry(made.write()), chat, cache_dir=tmp_path / "other").ledger
    said = {example for one in found.findings for example in one.examples}
    assert len(ledger) == 3
    assert {f"{entry.id}: {entry.message}" for entry in ledger} == said


def test_a_leak_is_shown_with_both_pictures(tiny: Tiny, tmp_path: Path) -> None:
    made = clean(tmp_path)
    scaled_leak(made)
    one = the(look(made, tiny("qwen2_5_vl")), "leak")
    assert one.examples == ("held (held.jsonl, line 3) is held out, train (train.jsonl, line 3) trains",)
    assert [shot.caption for shot in one.shots] == ["trains", "held out"]
    assert one.text.startswith("1 of 40 (2.5%) held-out samples")


def test_every_question_about_a_leaked_picture_counts(tiny: Tiny, tmp_path: Path) -> None:
    made = clean(tmp_path)
    scaled_leak(made)
    made.sets["held"] += [ask(f"q{i}", f"question {i}", f"answer {i}", "held2.jpg") for i in range(4)]
    one = the(look(made, tiny("qwen2_5_vl")), "leak")
    assert one.text.startswith("5 of 44 (11.4%) held-out samples")
    assert len(one.examples) == 1, "one pair of pictures"


def test_few_leaks_of_many_are_a_warning(tiny: Tiny, tmp_path: Path) -> None:
    made = clean(tmp_path)
    for i in range(120):
        made.sets["held"].append(ask(f"more-{i}", f"what is {i}", f"more {i}", made.save(f"m{i}.jpg", photo(3000 + i))))
    exact_leak(made)
    assert kinds(look(made, tiny("qwen2_5_vl"))) == {("warning", "leak_exact")}


def test_pictures_of_one_form_are_no_copies(tiny: Tiny, tmp_path: Path) -> None:
    """Their hashes are near, their numbers differ."""
    made = clean(tmp_path)
    for i in range(6):
        made.save(f"train{i}.jpg", form(i), quality=90)
        made.save(f"held{i}.jpg", form(100 + i), quality=90)
    assert kinds(look(made, tiny("qwen2_5_vl"))) == set()
    made.save("held3.jpg", form(2).resize((640, 800)), quality=70)
    assert kinds(look(made, tiny("qwen2_5_vl"))) == {("warning", "image_changed")}, "the index knows another size"
    assert kinds(look(made, tiny("qwen2_5_vl"), cache_dir=tmp_path / "new")) == {("error", "leak")}


def test_boxes_by_the_family_s_convention(tiny: Tiny, tmp_path: Path) -> None:
    """900 of 1000 is inside for one family, and outside a picture of 320 pixels for the other."""
    made = clean(tmp_path)
    outside_box(made)
    assert kinds(look(made, tiny("qwen3_vl"))) == set()
    one = the(look(made, tiny("qwen2_5_vl")), "box_outside")
    assert one.examples == ("train (train.jsonl, line 5)",)
    assert "pixels of the resized picture" in one.text
    assert len(one.shots[0].marks) == 1, "it is drawn"


def test_a_wrong_box_format_is_named(tiny: Tiny, tmp_path: Path) -> None:
    made = clean(tmp_path)
    pixels_for_model(made)
    text = the(look(made, tiny("qwen2_5_vl")), "box_outside").text
    assert '"box_format": "pixels"' in text
    made.specs["train"]["box_format"] = "pixels"
    assert kinds(look(made, tiny("qwen2_5_vl"))) == {("note", "shrunk")}


def test_the_sample_is_the_same_and_told(tiny: Tiny, tmp_path: Path) -> None:
    made = clean(tmp_path)
    scaled_leak(made)
    one = look(made, tiny("qwen2_5_vl"), sample_limit=100)
    text = the(one, "sampled").text
    assert text.startswith("pictures and texts of 100 of 120 (83.3%) samples were looked into")
    assert "with a chance of 75%" in text, "40 of 40 held out, 60 of 80 that train"
    again = look(made, tiny("qwen2_5_vl"), sample_limit=100)
    assert [f.text for f in one.findings] == [f.text for f in again.findings]
    assert ("error", "leak") in kinds(look(made, tiny("qwen2_5_vl"), sample_limit=0))


def test_the_page_says_it_all(tiny: Tiny, tmp_path: Path) -> None:
    made = clean(tmp_path)
    scaled_leak(made)
    made.sets["train"][0]["messages"][1]["content"] = "<script>alert(1)</script> & more"
    checkup = look(made, tiny("qwen2_5_vl"))
    page = render(checkup)
    assert '<h1 class="no">No-go</h1>' in page
    assert "<script" not in page
    shots = sum(len(found) for _, found in checkup.sheet) + 2
    assert page.count("data:image/jpeg;base64,") == shots == 18
    assert "train.jsonl, line 3) trains" in page
    assert "<b>1 error, 0 warnings and 0 notes</b>" in page
