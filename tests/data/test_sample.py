"""Lengths, shrinking, the split, and one sample's arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest_data import image_record, picture, spec, text_record, write_jsonl

from vlft.data.index import Index, open_index
from vlft.data.ledger import LedgerEntry
from vlft.data.sample import Limits, build_sample, check_bad_fraction, fit, split
from vlft.data.tokens import Chat
from vlft.errors import DataError, RecordError

Build = Callable[..., Index]
LIMITS = Limits(min_pixels=56 * 56, max_pixels=1 << 20, max_seq_length=2048, on_too_long="shrink", factor=28)


def limits(**changes: Any) -> Limits:
    return dataclasses.replace(LIMITS, **changes)


# ------------------------------------------------------------------ fitting


def test_lengths_are_what_the_sample_really_has(build: Build, mixed: list[Any], chat: Chat) -> None:
    index = build(mixed)
    for lim in (LIMITS, limits(max_seq_length=120), limits(max_pixels=100 * 100)):
        fitted = fit(index, lim)
        for i in np.flatnonzero(fitted.usable).tolist():
            sample = build_sample(index, fitted, chat, i)
            assert len(sample.input_ids) == len(sample.labels) == fitted.length[i] <= lim.max_seq_length
            patches = sample.grid_thw.prod(axis=1)
            assert (patches.sum(), (patches**2).sum()) == (fitted.patches[i], fitted.patch_pairs[i])
            assert (sample.labels != -100).sum() == fitted.learnt[i]
            for (w, h), (t, gh, gw) in zip(sample.final_wh, sample.grid_thw.tolist(), strict=True):
                assert (t, gh * 14, gw * 14) == (1, h, w)
        assert fitted.usable.sum() + len(fitted.ledger) == len(index)


def test_sizes_equal_smart_resize_and_a_set_may_have_its_own_cap(tmp_path: Path, chat: Chat) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    picture(0, 500, 300).save(tmp_path / "a.png")
    path = write_jsonl(tmp_path / "set.jsonl", [image_record(0, "a.png")])
    specs = [spec(path), spec(path, name="small", max_pixels=100 * 100)]
    index = open_index(specs, chat, cache_dir=tmp_path / "c")
    fitted = fit(index, LIMITS)
    for i, cap in ((0, LIMITS.max_pixels), (1, 100 * 100)):
        h, w = smart_resize(300, 500, 28, LIMITS.min_pixels, cap)
        assert fitted.sizes(index, i) == [(w, h)]


@pytest.fixture
def long(build: Build, tmp_path: Path) -> Index:
    picture(0, 800, 600).save(tmp_path / "big.png")
    picture(1, 60, 60).save(tmp_path / "small.png")
    return build([
        image_record(0, "big.png"), image_record(1, "big.png", "small.png"), image_record(2, *["big.png"] * 3),
        image_record(3, "small.png", answer="red " * 400), text_record(4), text_record(5) | {"id": "long", "messages": [
            {"role": "user", "content": "q"}, {"role": "assistant", "content": "red " * 400}]},
    ])  # fmt: skip


def test_shrinking_is_the_least_that_fits(long: Index) -> None:
    fitted = fit(long, limits(max_seq_length=300))
    assert fitted.shrunk == 3
    assert fitted.usable.tolist() == [True, True, True, False, True, False]
    assert (fitted.length[fitted.usable] <= 300).all()
    assert fitted.length[0] > 250
    assert fitted.sizes(long, 1)[1] == (56, 56)  # below the cap: untouched
    areas = fitted.final_width * fitted.final_height
    assert areas.min() >= LIMITS.min_pixels
    assert {e.id for e in fitted.ledger} == {"r3", "long"}
    assert {e.reason for e in fitted.ledger} == {"too_long"}
    assert not any(e.counts_as_bad for e in fitted.ledger)
    free = fit(long, limits(max_seq_length=100_000))
    assert free.shrunk == 0
    assert free.usable.all()


def test_never_below_min_pixels(long: Index) -> None:
    tight = fit(long, limits(max_seq_length=300, min_pixels=400 * 400))
    # Three pictures of 400 x 400 need about 600 tokens.
    assert tight.usable.tolist() == [True, False, False, False, True, False]
    areas = tight.final_width * tight.final_height
    assert areas[0] >= 400 * 400


@pytest.mark.parametrize("budget", range(60, 420, 7))
def test_shrinking_holds_its_promises_at_every_length(long: Index, budget: int) -> None:
    fitted = fit(long, limits(max_seq_length=budget))
    assert (fitted.length[fitted.usable] <= budget).all()
    assert ((fitted.final_width * fitted.final_height) >= LIMITS.min_pixels).all()
    assert ((fitted.final_width % 28 == 0) & (fitted.final_height % 28 == 0)).all()


def test_drop_and_error(long: Index) -> None:
    dropped = fit(long, limits(max_seq_length=300, on_too_long="drop"))
    assert dropped.shrunk == 0
    assert dropped.usable.tolist() == [False, False, False, False, True, False]
    assert "800" not in dropped.ledger[0].message
    with pytest.raises(DataError, match=r"(line|record) 1: .*--max_seq_length 300"):
        fit(long, limits(max_seq_length=300, on_too_long="error"))
    fit(long, limits(max_seq_length=100_000, on_too_long="error"))


def test_bad_fraction() -> None:
    entries = [LedgerEntry("d", str(n), "image_missing", f"file {n}") for n in range(3)]
    check_bad_fraction(entries, 300, 0.01)
    check_bad_fraction([LedgerEntry("d", "x", "too_long", "m")] * 50, 100, 0.0)
    with pytest.raises(DataError, match=r"3 of 299 .*image_missing 3.*\n.*file 0"):
        check_bad_fraction(entries, 299, 0.01)


# ------------------------------------------------------------------ split


def test_several_questions_about_one_picture_stay_together(build: Build, tmp_path: Path) -> None:
    for n in range(30):
        picture(n, 30, 30).save(tmp_path / f"{n}.png")
    picture(3, 30, 30).save(tmp_path / "copy_of_3.png")
    records = [image_record(n, f"{n % 30}.png") for n in range(90)] + [image_record(90, "copy_of_3.png")]
    index = build(records)
    train, held = split(index, index.specs, 0.7)
    side = {int(i): "t" for i in train} | {int(i): "e" for i in held}
    assert sorted(side) == list(range(91))
    for n in range(30):
        assert len({side[n], side[n + 30], side[n + 60]}) == 1
    assert side[90] == side[3]
    assert 0 < len(held) < 60


def test_a_sample_keeps_its_side_whatever_is_added(tmp_path: Path, chat: Chat) -> None:
    def sides(records: list[Any], name: str, more: int = 0) -> dict[str, str]:
        specs = [spec(write_jsonl(tmp_path / f"{name}.jsonl", records))]
        specs += [spec(write_jsonl(tmp_path / f"more{n}.jsonl", [text_record(1000 + n)])) for n in range(more)]
        index = open_index(specs, chat, cache_dir=tmp_path / "c")
        train, held = split(index, specs, 0.8)
        return {index.sample_id(i): "t" for i in train.tolist()} | {index.sample_id(i): "e" for i in held.tolist()}

    few = sides([text_record(n) for n in range(100)], "a")
    many = sides([text_record(n) for n in reversed(range(400))], "b", more=2)
    assert all(many[key] == side for key, side in few.items())
    assert 5 < sum(side == "e" for side in few.values()) < 40


def test_forced_sides_ratios_and_max_samples(tmp_path: Path, chat: Chat) -> None:
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [text_record(100 * n + k) for k in range(50)]) for n in range(3)]
    specs = [spec(paths[0], split="train"), spec(paths[1], split="eval"), spec(paths[2], max_samples=20)]
    index = open_index(specs, chat, cache_dir=tmp_path / "c")
    train, held = split(index, specs, 0.5)
    assert set(range(50)) <= set(train.tolist())
    assert set(range(50, 100)) <= set(held.tolist())
    third = [i for i in (*train.tolist(), *held.tolist()) if i >= 100]
    assert len(third) == 20
    assert 3 < sum(i >= 100 for i in train) < 17  # the subset is drawn apart from the split
    assert len(split(index, specs[2:3] * 3, 1.0)[1]) == 0
    usable = np.ones(150, np.bool_)
    usable[third[:5]] = False
    again = np.concatenate(split(index, specs, 0.5, usable=usable))
    assert not set(third[:5]) & set(again.tolist())
    assert set(third[5:]) <= set(again.tolist())
    assert usable.sum() == 145  # the argument is not written to


# ------------------------------------------------------------------ one sample


def test_prompts_pictures_and_the_last_token_are_not_supervised(build: Build, tmp_path: Path, chat: Chat) -> None:
    picture(0, 100, 60).save(tmp_path / "a.png")
    index = build([image_record(0, "a.png", answer="red")])
    fitted = fit(index, LIMITS)
    sample = build_sample(index, fitted, chat, 0)
    taught = sample.labels != -100
    assert chat.tokenizer.decode(sample.labels[taught]) == "red<|im_end|>"
    assert np.array_equal(sample.labels[taught], sample.input_ids[1:][taught[:-1]])
    assert not taught[sample.input_ids == chat.image_token_id].any()
    assert not taught[-1]
    assert (sample.input_ids == chat.image_token_id).sum() == sample.grid_thw.prod() // 4


def test_boxes_are_written_for_the_final_size(build: Build, tmp_path: Path, chat: Chat) -> None:
    picture(0, 400, 300).save(tmp_path / "a.png")
    box = {"query": "<image>q", "response": "<bbox>", "images": ["a.png"], "objects": {"bbox": [[0, 30, 200, 300]]}}
    index = build([box])
    for cap in (1 << 20, 100 * 100):
        fitted = fit(index, limits(max_pixels=cap))
        sample = build_sample(index, fitted, chat, 0)
        ((w, h),) = sample.final_wh
        text = chat.tokenizer.decode(sample.labels[sample.labels != -100])
        assert text == f"[0, {round(h / 10)}, {w // 2}, {h}]<|im_end|>"
        assert len(sample.input_ids) <= fitted.length[0]
        assert sample.moved.unit is None


def test_a_file_that_changed_under_the_index(build: Build, tmp_path: Path, chat: Chat) -> None:
    box = {"query": "<image>q", "response": "<bbox>", "images": ["a.png"], "objects": {"bbox": [[0, 30, 200, 300]]}}
    picture(0, 400, 300).save(tmp_path / "a.png")
    index = build([box])
    (tmp_path / "set.jsonl").write_text("{" + " " * 300)
    with pytest.raises(RecordError):
        build_sample(index, fit(index, LIMITS), chat, 0)
