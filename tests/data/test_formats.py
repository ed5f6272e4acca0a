"""Every row of formats.md, table 3a, and what is refused."""
# ruff: noqa: E501 (records as one line each, as in their files)

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from conftest_data import picture, spec
from PIL import Image

from vlft.data.formats import (
    BoxPart,
    ImagePart,
    ImageRef,
    Record,
    RefPart,
    TextPart,
    detect_format,
    image_ref,
    parse_record,
)
from vlft.errors import RecordError


def read(raw: Any, **options: Any) -> Record:
    return parse_record(raw, spec(Path("/data/set.json"), **options), "row")


def shape(record: Record) -> list[tuple[str, list[str]]]:
    """Turns as (role, parts), pictures as `#0`."""
    return [(t.role, [f"#{p.image}" if isinstance(p, ImagePart) else p.text for p in t.parts]) for t in record.turns]


def paths(record: Record) -> list[str]:
    return [ref.value for ref in record.images]


def png() -> bytes:
    out = io.BytesIO()
    picture(0, 8, 8).save(out, "PNG")
    return out.getvalue()


ASK = ("user", ["#0", "\nwhat"])
SAY = ("assistant", ["red"])
B64 = base64.b64encode(png()).decode()
MESSAGES = [{"role": "user", "content": "<image>\nwhat"}, {"role": "assistant", "content": "red"}]
BLOCK_TAIL = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}


def blocks(*pictures: Any) -> list[Any]:
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": "\nwhat"}]}, BLOCK_TAIL]


ROWS: list[tuple[str, Any]] = [
    ("llava", {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}]}),
    ("llava", {"image": ["a.png"], "conversations": [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}]}),
    ("messages", {"messages": MESSAGES, "images": ["a.png"]}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}], "images": ["a.png"]}),
    ("openai", {"messages": blocks({"type": "image", "image": "a.png"})}),
    ("openai", {"messages": blocks({"type": "image", "path": "a.png"})}),
    ("openai", {"messages": blocks({"type": "image", "url": "file:///a.png"})}),
    ("openai", {"messages": blocks({"type": "image", "base64": B64})}),
    ("openai_image_url", {"messages": blocks({"type": "image_url", "image_url": {"url": "a.png"}})}),
    ("openai_image_url", {"messages": blocks({"type": "image_url", "image_url": "a.png"})}),
    ("hf_columns", {"messages": blocks({"type": "image"}), "images": [{"bytes": png(), "path": None}]}),
    ("hf_columns", {"messages": blocks({"type": "image", "index": 0}), "images": ["a.png"]}),
    ("hf_columns", {"prompt": "\nwhat", "completion": "red", "images": ["a.png"]}),
    ("hf_columns", {"prompt": [{"role": "user", "content": "\nwhat"}], "completion": [BLOCK_TAIL], "images": ["a.png"]}),
    ("prefix_suffix", {"image": "a.png", "prefix": "\nwhat", "suffix": "red"}),
    ("texts", {"images": [picture(0, 8, 8)], "texts": [{"user": "\nwhat", "assistant": "red"}]}),
    ("query_response", {"query": "<image>\nwhat", "response": "red", "images": ["a.png"]}),
    ("alpaca", {"instruction": "<image>", "input": "what", "output": "red", "images": ["a.png"]}),
    ("grounding", {"messages": MESSAGES, "images": ["a.png"], "objects": {"ref": [], "bbox": []}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "raw"), ROWS)
def test_every_row_is_recognised_and_reads_the_same(name: str, raw: Any) -> None:
    assert detect_format(raw) == name
    record = read(raw)
    assert record.format == name
    assert shape(record) == [ASK, SAY]
    assert len(record.images) == 1
    assert read(raw, format=name) == record


def test_llama_factory_columns_and_tags() -> None:
    raw = {
        "conv": [{"who": "U", "said": "<image>what"}, {"who": "B", "said": "red"}, {"who": "TOOL", "said": "7"}, {"who": "B", "said": "x"}],
        "pics": ["a.png"],
        "sys": "Be brief.",
    }  # fmt: skip
    record = read(
        raw,
        columns={"messages": "conv", "images": "pics", "system": "sys"},
        tags={
            "role_tag": "who",
            "content_tag": "said",
            "user_tag": "U",
            "assistant_tag": "B",
            "observation_tag": "TOOL",
        },
    )
    assert [t.role for t in record.turns] == ["system", "user", "assistant", "tool", "assistant"]
    assert paths(record) == ["a.png"]


def test_llama_factory_alpaca_columns() -> None:
    record = read({"q": "what", "more": "is it", "a": "red"}, columns={"prompt": "q", "query": "more", "response": "a"})
    assert shape(record) == [("user", ["what\nis it"]), SAY]


def test_system_prompts_record_first_then_registry() -> None:
    own = {
        "messages": [
            {"role": "system", "content": "own"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ]
    }
    assert shape(read(own, system="registry"))[0] == ("system", ["own"])
    key = {"query": "q", "response": "a", "system": "key"}
    assert shape(read(key, system="registry"))[0] == ("system", ["key"])
    assert shape(read({"query": "q", "response": "a"}, system="registry"))[0] == ("system", ["registry"])


def test_history_and_per_message_loss() -> None:
    record = read({"query": "c", "response": "d", "history": [["a", "b"]]})
    assert [t.text for t in record.turns] == ["a", "b", "c", "d"]
    raw = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": False}]}
    assert [t.loss for t in read(raw).turns] == [True, False]
    for own, learnt in (
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"train": False}, False),
        ({"train": True}, True),
    ):
        answer = {"role": "assistant", "content": "a", **own}
        assert read({"messages": [raw["messages"][0], answer]}).turns[1].loss is learnt


def test_many_pictures_keep_their_places() -> None:
    raw = {"messages": [{"role": "user", "content": "<image>a<image>"}, {"role": "assistant", "content": "x"},
                        {"role": "user", "content": "b<image>"}, {"role": "assistant", "content": "y"}], "images": ["1", "2", "3"]}  # fmt: skip
    record = read(raw)
    assert shape(record)[0][1] == ["#0", "a", "#1"]
    assert shape(record)[2][1] == ["b", "#2"]


def test_index_blocks_reorder_pictures_to_their_appearance() -> None:
    order = [{"type": "image", "index": 1}, {"type": "image", "index": 0}, {"type": "image", "index": 1}]
    record = read({"messages": blocks(*order), "images": ["a", "b"]})
    assert paths(record) == ["b", "a", "b"]
    assert shape(record)[0][1][:3] == ["#0", "#1", "#2"]


def test_pictures_that_no_text_places_go_to_the_first_user_turn() -> None:
    raw = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
           "images": ["1", "2"]}  # fmt: skip
    assert shape(read(raw))[1] == ("user", ["#0", "#1", "q"])


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ([], "bad_record"),
        ("text", "bad_record"),
        ({}, "unknown_format"),
        ({"a": 1}, "unknown_format"),
        ({"messages": "hello"}, "bad_record"),
        ({"messages": ["hello"]}, "bad_record"),
        ({"messages": [{"role": "user"}]}, "bad_record"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown_role"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tool_calls"),
        ({"messages": [{"role": "user", "content": None}]}, "bad_record"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}]}, "bad_record"),
        ({"messages": [{"role": "user", "content": "x", "loss": "yes"}]}, "bad_record"),
        ({"messages": [{"role": "user", "content": "x", "weight": 0.5}]}, "bad_record"),
        ({"messages": [{"role": "user", "content": "x", "train": "false"}]}, "bad_record"),
        ({"messages": MESSAGES}, "image_count"),
        ({"messages": MESSAGES, "images": ["a", "b"]}, "image_count"),
        ({"messages": [{"role": "user", "content": "<image><image>"}], "images": ["a"]}, "image_count"),
        ({"messages": [{"role": "assistant", "content": "a"}], "images": ["a"]}, "no_user_turn"),
        ({"messages": MESSAGES, "images": [""]}, "bad_image"),
        ({"messages": MESSAGES, "images": [3]}, "bad_image"),
        ({"messages": MESSAGES, "images": [{"bytes": None, "path": None}]}, "bad_image"),
        ({"messages": MESSAGES, "images": ["data:image/png,abc"]}, "bad_image"),
        ({"messages": MESSAGES, "images": ["data:image/png;base64,&&&"]}, "bad_image"),
        ({"messages": MESSAGES, "images": ["a\0b"]}, "bad_image"),
        ({"messages": MESSAGES, "images": ["a"], "videos": ["v.mp4"]}, "video"),
        ({"video": "v.mp4", "conversations": []}, "video"),
        ({"messages": [{"role": "user", "content": "<video>what"}]}, "video"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]}, "video"),
        ({"prompt": 3.5, "completion": []}, "no reason: numbers are texts"),
        ({"query": "a\ud800", "response": "b"}, "bad_text"),
        ({"instruction": ["x"], "output": "y"}, "bad_record"),
        ({"query": "q", "response": "a", "history": ["x"]}, "bad_record"),
    ],
)
def test_what_is_refused(raw: Any, reason: str) -> None:
    if reason.startswith("no reason"):
        read(raw)
        return
    with pytest.raises(RecordError) as caught:
        read(raw)
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 300


def test_a_named_format_is_not_guessed() -> None:
    with pytest.raises(RecordError, match="prefix"):
        read({"query": "q", "response": "a"}, format="prefix_suffix")


def test_picture_values() -> None:
    raw = png()
    assert image_ref("a/b.png") == ImageRef("path", "a/b.png")
    assert image_ref("file:///a/b%20c.png") == ImageRef("path", "/a/b c.png")
    assert image_ref("https://x.y/z.png").kind == "url"
    for value in (
        f"data:image/png;base64,{B64}",
        {"bytes": raw},
        {"bytes": raw, "path": "x.png"},
        {"base64": B64},
        raw,
    ):
        assert image_ref(value) == ImageRef("bytes", data=raw)
    long = base64.b64encode(bytes(range(256)) * 8).decode()
    assert image_ref(long).kind == "bytes"
    assert image_ref({"bytes": None, "path": "x.png"}) == ImageRef("path", "x.png")
    for mode in ("RGB", "CMYK", "P", "LA", "F", "I;16"):
        kept = Image.open(io.BytesIO(image_ref(Image.new(mode, (4, 4))).data))
        assert kept.mode == mode


# ------------------------------------------------------------------ boxes


def boxes(record: Record) -> list[BoxPart]:
    return [p for t in record.turns for p in t.parts if isinstance(p, BoxPart)]


def test_row_10_keeps_boxes_and_refs_as_parts() -> None:
    raw = {
        "messages": [{"role": "user", "content": "<image><image>find <ref-object>"}, {"role": "assistant", "content": "<bbox> and <bbox>"}],
        "images": ["a", "b"],
        "objects": {"ref": ["the dog"], "bbox": [[1, 2, 3, 4], [5, 6]], "image_id": [1, 0]},
    }  # fmt: skip
    record = read(raw)
    assert record.has_boxes
    assert RefPart("the dog") in record.turns[0].parts
    assert boxes(record) == [BoxPart((1, 2, 3, 4), "pixels", "family", 1), BoxPart((5, 6), "pixels", "family", 0)]
    assert TextPart(" and ") in record.turns[1].parts


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ({"bbox": []}, "box_count"),
        ({"bbox": [[1, 2, 3, 4]] * 2}, "box_count"),
        ({"bbox": [[1, 2, 3]]}, "bad_box"),
        ({"bbox": [["a", 2, 3, 4]]}, "bad_box"),
        ({"bbox": [[1, 2, 3, 4]], "bbox_type": "norm2"}, "bad_box"),
        ({"bbox": [[1, 2, 3, 4]], "image_id": [1]}, "bad_box"),
        ({"bbox": [[1, 2, 3, 4]], "image_id": [0, 0]}, "bad_box"),
    ],
)
def test_objects_that_do_not_fit(objects: Any, reason: str) -> None:
    raw = {"query": "<image>q", "response": "<bbox>", "images": ["a"], "objects": objects}
    with pytest.raises(RecordError) as caught:
        read(raw)
    assert caught.value.reason == reason


def test_inline_boxes_are_parts_only_where_the_registry_says_what_they_mean() -> None:
    text = '[{"bbox_2d": [10, 20.5, 30, 40], "label": "x"}, {"point_2d": [5,6]}] <|box_start|>(1,2),(3,4)<|box_end|>'
    raw = {"query": "<image>q", "response": text, "images": ["a"]}
    plain = read(raw)
    assert plain.has_boxes
    assert not boxes(plain)
    found = boxes(read(raw, box_format="pixels"))
    assert [b.numbers for b in found] == [(10, 20.5, 30, 40), (5, 6), (1, 2, 3, 4)]
    assert [b.style for b in found] == ["json", "json", "marked"]
    assert {b.image for b in found} == {0}
    assert not boxes(read(raw, box_format="model"))


def test_a_box_that_cannot_be_read_among_converted_ones_is_refused_but_a_format_description_is_not() -> None:
    bad = {"query": "<image>q", "response": '{"bbox_2d": [1, 2, 3, four]}', "images": ["a"]}
    with pytest.raises(RecordError) as caught:
        read(bad, box_format="pixels")
    assert caught.value.reason == "bad_box"
    good = {
        "query": '<image>answer as {"bbox_2d": [x1, y1, x2, y2]}',
        "response": '{"bbox_2d": [1, 2, 3, 4]}',
        "images": ["a"],
    }
    assert len(boxes(read(good, box_format="pixels"))) == 1
