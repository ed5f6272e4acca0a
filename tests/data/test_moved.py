"""Text and picture move together: for every family, way of writing and epoch, and never against what a text says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest_data import image_record, spec
from PIL import Image

from vlft import boxes
from vlft.augmentation.policy import Policy, read_policy
from vlft.data.collate import collate
from vlft.data.formats import parse_record
from vlft.data.index import Index
from vlft.data.loader import decode_sample, eval_steps, step_loader
from vlft.data.moved import Mover, spare_tokens, with_places
from vlft.data.plan import Plan
from vlft.data.sample import Costs, Fitted, Limits, Sample, build_sample, fit, room_to_move
from vlft.data.tokens import Chat
from vlft.vision.augment import augment_row
from vlft.vision.patches import split_pictures

Build = Callable[..., Index]
MOVES = """
ops:
  - RandomHorizontalFlip: {p: 0.5}
  - RandomAffine: {degrees: 2.0, translate: [0.1, 0.1], scale: [0.8, 1.1], p: 0.8}
  - RandomResizedCrop: {scale: [0.7, 1.0], ratio: [0.9, 1.1], p: 0.5}
"""
WIDTH, HEIGHT = 420, 280
BOX = (150, 80, 250, 200)
"""Pixels of the stored picture: a black rectangle on white."""


@pytest.fixture
def moves(tmp_path: Path) -> Policy:
    (tmp_path / "moves.yaml").write_text(MOVES)
    return read_policy(str(tmp_path / "moves.yaml"))


def draw_box(path: Path, box: tuple[int, int, int, int] = BOX, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    pixels = np.full((size[1], size[0], 3), 255, np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 0
    Image.fromarray(pixels).save(path)


def limits(chat: Chat) -> Limits:
    factor = 32 if chat.family.model_type == "qwen3_vl" else 28
    return Limits(56 * 56, 300 * 300, 2048, "shrink", factor)


def written(style: str, chat: Chat, final: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A record about BOX, and its data set's options."""
    relative = chat.family.box_convention == "relative1000"
    ends = (1000, 1000) if relative else final
    own = [round(n / (WIDTH, HEIGHT)[k % 2] * ends[k % 2]) for k, n in enumerate(BOX)]
    answers: dict[str, tuple[str, dict[str, Any]]] = {
        "keyed": (json.dumps([{"bbox_2d": own, "label": "thing"}]), {}),
        "tight": (json.dumps([{"bbox_2d": own}], separators=(",", ":")), {}),
        "marked": (f"<|box_start|>({own[0]},{own[1]}),({own[2]},{own[3]})<|box_end|>", {}),
        "bare": (str(own), {"box_format": "model"}),
        "pixels": (json.dumps({"bbox_2d": list(BOX)}), {"box_format": "pixels"}),
    }
    if style == "objects":
        raw = {"query": "<image>find it", "response": "<bbox>", "images": ["a.png"], "objects": {"bbox": [list(BOX)]}}
        return raw, {}
    answer, options = answers[style]
    return image_record(0, "a.png", answer=answer), options


def text_of(sample: Sample, chat: Chat) -> str:
    return str(chat.tokenizer.decode(sample.labels[sample.labels != -100]))


def dark(picture: torch.Tensor) -> tuple[int, int, int, int]:
    """Bounds of what is black in a picture, (3, H, W) uint8."""
    black = picture[0] < 128
    rows, columns = torch.nonzero(black.any(1)).flatten(), torch.nonzero(black.any(0)).flatten()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@pytest.mark.parametrize("style", ["keyed", "tight", "marked", "bare", "pixels", "objects"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_taught_box_is_around_the_moved_thing(
    build: Build, chats: dict[str, Chat], tmp_path: Path, moves: Policy, family: str, style: str
) -> None:
    """Pixels after the device's warp against numbers in the labels: through tokens, for many epochs."""
    chat = chats[family]
    draw_box(tmp_path / "a.png")
    final = fit(build([image_record(0, "a.png")], with_chat=chat, name="size"), limits(chat))
    size = (int(final.final_width[0]), int(final.final_height[0]))
    raw, options = written(style, chat, size)
    index = build([raw], with_chat=chat, **options)
    fitted = fit(index, limits(chat), room_to_move(index, chat))
    untouched = text_of(build_sample(index, fitted, chat, 0), chat)
    texts = set()
    for epoch in range(12):
        sample = build_sample(index, fitted, chat, 0, Mover(moves, 1, epoch))
        assert len(sample.input_ids) <= fitted.length[0]
        row = collate(
            [sample], [decode_sample(sample)], image_token_id=chat.image_token_id, pad_token_id=0, epoch=epoch
        )
        patch = limits(chat).factor // 2
        pictures = list(split_pictures(row.pixels_u8, row.image_grid_thw, patch))
        (shown,) = augment_row(pictures, (), row.image_sample.tolist(), row.sample_seeds.tolist(), row.moves)
        assert shown.shape == pictures[0].shape
        text = text_of(sample, chat)
        ((x1, y1, x2, y2, _),) = boxes.parse(text)
        ends = (1000, 1000) if chat.family.box_convention == "relative1000" else size
        said = [n / ends[k % 2] * size[k % 2] for k, n in enumerate((x1, y1, x2, y2))]
        assert np.abs(np.array(said) - dark(shown)).max() < 4.5, (epoch, said, dark(shown))
        assert re.sub(r"\d+", "n", text) == re.sub(r"\d+", "n", untouched), "blanks and keys are as they were"
        texts.add(text)
    assert len(texts) > 6


def test_boxes_of_the_question_move_as_those_of_the_answer(
    build: Build, chats: dict[str, Chat], tmp_path: Path, moves: Policy
) -> None:
    chat = chats["qwen3_vl"]
    draw_box(tmp_path / "a.png")
    box = [round(1000 * n / (WIDTH, HEIGHT)[k % 2]) for k, n in enumerate(BOX)]
    record = image_record(0, "a.png", answer=json.dumps({"point_2d": [round(500 * 0.95), 500]}))
    record["messages"][0]["content"] = f'<image>what is at {{"bbox_2d": {box}}}'
    index = build([record], with_chat=chat)
    fitted = fit(index, limits(chat), room_to_move(index, chat))
    changed = 0
    for epoch in range(8):
        sample = build_sample(index, fitted, chat, 0, Mover(moves, 1, epoch))
        whole = chat.tokenizer.decode(sample.input_ids[sample.input_ids != chat.image_token_id])
        (x1, y1, x2, y2), (x, y) = boxes.places(whole)
        assert x1 - 20 < x < x2 + 20, "the point was in the box, and is"
        assert y1 < y < y2
        changed += [x1, y1, x2, y2] != box
    assert changed > 4


def place(records: list[Any], build: Build, tmp_path: Path, chat: Chat, **options: Any) -> tuple[Index, Fitted]:
    for name in ("a.png", "b.png"):
        draw_box(tmp_path / name)
    index = build(records, with_chat=chat, **options)
    return index, fit(index, limits(chat), room_to_move(index, chat))


STAY = [
    "is it on the left", "图片是镜像的吗", "what is [10, 20, 30, 40]", "go to (12, 30)", "x=10 y=20",
    "<point x='3' y='4'>dog</point>",
]  # fmt: skip


@pytest.mark.parametrize("question", STAY)
def test_what_a_text_forbids_stays(build: Build, tmp_path: Path, chat: Chat, moves: Policy, question: str) -> None:
    record = image_record(0, "a.png")
    record["messages"][0]["content"] = f"<image>{question}"
    index, fitted = place([record, image_record(1, "b.png", answer="red")], build, tmp_path, chat)
    found = [build_sample(index, fitted, chat, 0, Mover(moves, 1, epoch)).moved for epoch in range(12)]
    assert all(m.unit is None or "left" in question for m in found)
    # Small turns that lose nothing may be admitted beside a "left"; flips and crops may not.
    assert all(m.unit is None or abs(np.linalg.det(m.unit[:2, :2]) - 1) < 0.4 for m in found)
    assert all(m.unit is None or m.unit[0, 0] > 0 for m in found)
    assert all(m.why for m in found if m.unit is None)
    assert any(
        build_sample(index, fitted, chat, 1, Mover(moves, 1, epoch)).moved.unit is not None for epoch in range(6)
    )


def test_a_read_word_is_never_mirrored_and_a_count_never_cropped(
    build: Build, tmp_path: Path, chat: Chat, moves: Policy
) -> None:
    from vlft.augmentation.geometry import kinds

    asked = ["read the sign", "how many dogs are there"]
    records = [image_record(k, "a.png", answer="stop") for k in range(2)]
    for record, question in zip(records, asked, strict=True):
        record["messages"][0]["content"] = f"<image>{question}"
    index, fitted = place(records, build, tmp_path, chat)
    for i, refused in ((0, {"mirror", "turn", "crop"}), (1, {"crop"})):
        units = [build_sample(index, fitted, chat, i, Mover(moves, 1, epoch)).moved.unit for epoch in range(30)]
        assert not any(kinds(unit) & refused for unit in units if unit is not None)
        assert any(unit is not None for unit in units)


def test_several_pictures_move_alike_and_a_box_without_one_stays(
    build: Build, tmp_path: Path, chats: dict[str, Chat], moves: Policy
) -> None:
    """Thousandths need no picture; pixels of nobody knows which one cannot be followed."""
    answer = json.dumps({"bbox_2d": [100, 60, 200, 150]})
    for family, follows in (("qwen3_vl", True), ("qwen2_5_vl", False)):
        records = [image_record(0, "a.png", "b.png", answer=answer)]
        index, fitted = place(records, build, tmp_path, chats[family], name=family)
        found = [build_sample(index, fitted, chats[family], 0, Mover(moves, 1, epoch)) for epoch in range(8)]
        assert any(s.moved.unit is not None for s in found) == follows
        assert (len({text_of(s, chats[family]) for s in found}) > 1) == follows


def test_numbers_of_another_convention_stay(build: Build, tmp_path: Path, chat: Chat, moves: Policy) -> None:
    """Pixels of the original picture, written where those of the resized one belong: past its sides."""
    record = image_record(0, "a.png", answer=json.dumps({"bbox_2d": [10, 10, 4000, 3000]}))
    index, fitted = place([record], build, tmp_path, chat)
    for epoch in range(6):
        assert build_sample(index, fitted, chat, 0, Mover(moves, 1, epoch)).moved.unit is None


def test_a_box_that_leaves_is_no_draw(build: Build, tmp_path: Path, chats: dict[str, Chat], moves: Policy) -> None:
    """Boxes all over the picture: every taught one is inside, and as many as before."""
    chat = chats["qwen2_vl"]
    many = [[x, y, x + 150, y + 150] for x in (0, 400, 850) for y in (0, 400, 850)]
    record = image_record(0, "a.png", answer=json.dumps([{"bbox_2d": b} for b in many]))
    index, fitted = place([record], build, tmp_path, chat)
    for epoch in range(20):
        sample = build_sample(index, fitted, chat, 0, Mover(moves, 1, epoch))
        found = boxes.parse(text_of(sample, chat))
        assert len(found) == 9
        assert all(0 <= n <= 1000 for box in found for n in box[:4])
        assert all(box.x2 > box.x1 and box.y2 > box.y1 for box in found)


def test_the_plan_holds_room_for_wider_numbers(build: Build, tmp_path: Path, chats: dict[str, Chat]) -> None:
    chat = chats["qwen3_vl"]
    narrow = image_record(0, "a.png", answer=json.dumps({"bbox_2d": [1, 2, 30, 400]}))
    plain = image_record(1, "b.png", answer="12 and 3")
    index, fitted = place([narrow, plain], build, tmp_path, chat)
    before = fit(index, limits(chat))
    room = room_to_move(index, chat)
    # The digit of the key (2d) counts, too: an upper bound asks for no parsing. So does the number of the question.
    assert room[0] == 3 + 3 + 3 + 2 + 1 + 3
    assert room[1] == 0, "a sample without places has nothing that grows"
    assert (fitted.length - before.length).tolist() == room.tolist()
    assert (fitted.patches == before.patches).all()


def test_spare_tokens_count_runs_of_digits() -> None:
    tokens = np.array([9, 1, 2, 9, 1, 1, 1, 1, 9, 1, 2, 2, 9, 9], np.uint32)
    lengths = np.array([3, 7, 4], np.int32)
    assert spare_tokens(tokens, lengths, [1, 2]).tolist() == [2, 0 + 3, 2]
    assert spare_tokens(tokens[:0], lengths[:0], [1]).tolist() == []


def test_epoch_seed_and_identity_decide(build: Build, tmp_path: Path, chat: Chat, moves: Policy) -> None:
    index, fitted = place([image_record(k, "a.png", answer="red") for k in range(3)], build, tmp_path, chat)

    def units(mover: Mover) -> list[bytes | None]:
        found = [build_sample(index, fitted, chat, i, mover).moved.unit for i in range(3)]
        return [None if unit is None else unit.tobytes() for unit in found]

    assert units(Mover(moves, 1, 0)) == units(Mover(moves, 1, 0))
    assert len({*units(Mover(moves, 1, 0)), *units(Mover(moves, 1, 1)), *units(Mover(moves, 2, 0))}) > 6


def test_workers_and_a_resume_change_nothing_and_evaluation_stays(
    build: Build, tmp_path: Path, chat: Chat, moves: Policy
) -> None:
    answer = json.dumps({"bbox_2d": [60, 30, 110, 80]})
    records = [image_record(k, "a.png", answer=answer if k % 2 else "red") for k in range(12)]
    index, fitted = place(records, build, tmp_path, chat)
    ids = np.arange(12)
    plan = Plan(ids, index.dataset[ids], [1.0], seed=3, global_batch=4)

    def steps(start: int = 0, workers: int = 0) -> list[Any]:
        return list(step_loader(index, fitted, plan, chat, rank=0, world_size=1, seed=3, start_step=start,
                                total_steps=6, costs=Costs(), policy=moves, num_workers=workers))  # fmt: skip

    whole = steps()
    for other, at in ((steps(workers=2), 0), (steps(start=4), 4)):
        rows = [(a, b) for x, y in zip(whole[at:], other, strict=True) for a, b in zip(x.rows, y.rows, strict=True)]
        assert all(a.same_as(b) for a, b in rows)
    still = torch.eye(3, dtype=torch.float64)
    assert any(not torch.equal(unit, still) for step in whole for row in step.rows for unit in row.moves)
    held = list(eval_steps(index, fitted, chat, ids, rank=0, world_size=1))
    assert all(torch.equal(unit, still) for step in held for row in step.rows for unit in row.moves)


def test_without_a_policy_nothing_changes(build: Build, tmp_path: Path, chat: Chat) -> None:
    answer = json.dumps({"bbox_2d": [60, 30, 110, 80]})
    index, _ = place([image_record(0, "a.png", answer=answer)], build, tmp_path, chat)
    sample = build_sample(index, fit(index, limits(chat)), chat, 0)
    assert sample.moved.unit is None
    assert text_of(sample, chat) == answer + "<|im_end|>"


def test_bare_lists_are_boxes_only_where_the_registry_says_so() -> None:
    record = parse_record(image_record(0, "a.png", answer="[1, 2, 3, 4]"), spec(Path("/d/s.json")), "r")
    assert with_places(record, bare_boxes=False) is None
    assert with_places(record, bare_boxes=True) is not None
