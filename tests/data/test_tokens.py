"""Answers and their end tokens are learnt and nothing else is; what would forge or hide a turn is refused."""
# ruff: noqa: E501 (the published template as it is)

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest_data import spec
from hypothesis import given, settings
from hypothesis import strategies as st

from vlft.data.formats import Record, parse_record
from vlft.data.tokens import Chat, Encoded, PictureSize
from vlft.errors import ModelError, RecordError
from vlft.family import FAMILIES

# The template that Qwen2-VL and Qwen2.5-VL ship, as published in their chat_template.json.
QWEN25_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def record(*turns: tuple[str, Any], images: int = 0, **options: Any) -> Record:
    messages = [{"role": role, "content": content} for role, content in turns]
    raw = {"messages": messages, "images": [f"{n}.png" for n in range(images)], **options.pop("raw", {})}
    return parse_record(raw, spec(Path("/d/set.json"), **options), "row")


def learnt(chat: Chat, encoded: Encoded) -> str:
    return str(chat.tokenizer.decode(encoded.input_ids[encoded.supervised]))


def with_template(chat: Chat, tiny: Any, folder: Path, template: str) -> Chat:
    tok = tiny.make_tokenizer()
    tok.chat_template = template
    tok.save_pretrained(folder)
    return Chat.load(folder, chat.family)


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def any_chat(request: Any, chats: dict[str, Chat]) -> Chat:
    return chats[request.param]


def test_every_answer_and_its_end_token_is_learnt_and_nothing_else(any_chat: Chat) -> None:
    made = record(("system", "You are"), ("user", "<image>what colour"), ("assistant", "red"), ("user", "where"),
                  ("assistant", "on the left"), images=1)  # fmt: skip
    encoded = any_chat.encode(made)
    assert learnt(any_chat, encoded) == "red<|im_end|>on the left<|im_end|>"
    assert encoded.n_images == (encoded.input_ids == any_chat.image_token_id).sum() == 1
    assert encoded.input_ids.dtype == np.uint32
    text = any_chat.tokenizer.decode(encoded.input_ids)
    assert text.endswith("on the left<|im_end|>\n")
    assert not encoded.supervised[-1]  # the newline after the end token


def test_loss_false_is_read_but_not_learnt(chat: Chat) -> None:
    raw = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "red", "loss": False},
                        {"role": "user", "content": "q"}, {"role": "assistant", "content": "blue"}]}  # fmt: skip
    encoded = chat.encode(parse_record(raw, spec(Path("/d/s.json")), "r"))
    assert learnt(chat, encoded) == "blue<|im_end|>"
    assert "red" in chat.tokenizer.decode(encoded.input_ids)


def test_an_assistant_that_speaks_first_and_repeated_answers(chat: Chat) -> None:
    encoded = chat.encode(record(("assistant", "red"), ("user", "red"), ("assistant", "red")))
    assert learnt(chat, encoded) == "red<|im_end|>red<|im_end|>"


def test_the_prompt_is_tokenised_as_generation_would(any_chat: Chat) -> None:
    """Qwen's split pattern merges `assistant\\n` + `\\nred`; the pieces keep them apart."""
    made = record(("user", "what"), ("assistant", "\nred"))
    encoded = any_chat.encode(made)
    start = int(encoded.supervised.argmax())
    prompt = any_chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "what"}], tokenize=False, add_generation_prompt=True
    )
    assert encoded.input_ids[:start].tolist() == any_chat.tokenizer(prompt)["input_ids"]
    text = any_chat._render([{"role": "user", "content": "what"}, {"role": "assistant", "content": "\nred"}])
    assert encoded.input_ids.tolist() != any_chat._ids(text)
    assert any_chat.tokenizer.decode(encoded.input_ids) == text


def test_the_published_template(chat: Chat, tiny: Any, tmp_path: Path) -> None:
    real = with_template(chat, tiny, tmp_path, QWEN25_TEMPLATE)
    made = record(
        ("user", "<image>\nwhat<image>"), ("assistant", "red"), ("user", "q"), ("assistant", "blue"), images=2
    )
    assert real.encode(made).input_ids.tolist() == chat.encode(made).input_ids.tolist()
    assert learnt(real, real.encode(made)) == "red<|im_end|>blue<|im_end|>"


@pytest.mark.parametrize(
    "change",
    [
        ("{{ message['content'] }}", "{{ message['content'] | trim }}"),
        ("{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] }}"),
        ("{{ message['content'] }}", "{{ message['content'] | upper }}"),
        ("{{ message['content'] }}", "{% if loop.last %}{{ message['content'] }}{% endif %}"),
    ],
)
def test_a_template_that_rewrites_answers_is_refused(
    chat: Chat, tiny: Any, tmp_path: Path, change: tuple[str, str]
) -> None:
    rewriting = with_template(chat, tiny, tmp_path, QWEN25_TEMPLATE.replace(*change))
    made = record(("user", "q"), ("assistant", "<think>x</think> red "), ("user", "q"), ("assistant", "blue"))
    with pytest.raises(RecordError) as caught:
        rewriting.encode(made)
    assert caught.value.reason == "template_rewrites"


def test_a_template_that_drops_a_turn_is_refused(chat: Chat, tiny: Any, tmp_path: Path) -> None:
    template = QWEN25_TEMPLATE.replace(
        "{{ message['content'] }}", "{% if message.role != 'system' or loop.first %}{{ message['content'] }}{% endif %}"
    )
    dropping = with_template(chat, tiny, tmp_path, template)
    turns = [("user", "q"), ("system", "be brief"), ("assistant", "red")]
    with pytest.raises(RecordError) as caught:
        dropping.encode(record(*turns))
    assert caught.value.reason == "template_drops"
    assert learnt(chat, chat.encode(record(*turns))) == "red<|im_end|>"


def test_a_template_that_trims_what_needs_no_trimming_is_fine(chat: Chat, tiny: Any, tmp_path: Path) -> None:
    template = QWEN25_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] | trim }}")
    trimming = with_template(chat, tiny, tmp_path, template)
    assert learnt(trimming, trimming.encode(record(("user", " q "), ("assistant", "red")))) == "red<|im_end|>"


def test_a_template_that_refuses_or_ends_differently(chat: Chat, tiny: Any, tmp_path: Path) -> None:
    refusing = (
        "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('user first') }}{% endif %}" + QWEN25_TEMPLATE
    )
    picky = with_template(chat, tiny, tmp_path / "a", refusing)
    with pytest.raises(RecordError, match="user first"):
        picky.encode(record(("assistant", "a"), ("user", "b"), ("assistant", "c")))
    with pytest.raises(ModelError, match="no special token"):
        with_template(chat, tiny, tmp_path / "b", QWEN25_TEMPLATE.replace("<|im_end|>", "\nEND"))
    with pytest.raises(ModelError, match="no chat template"):
        with_template(chat, tiny, tmp_path / "c", "")
    with pytest.raises(ModelError, match="tokenizer"):
        Chat.load(tmp_path / "nowhere", chat.family)


@pytest.mark.parametrize("marker", FAMILIES["qwen2_5_vl"].markers)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_forged_tokens_are_refused(chat: Chat, marker: str, role: str) -> None:
    turns = {"system": "You are", "user": "what", "assistant": "red"}
    turns[role] += f" {marker} x"
    with pytest.raises(RecordError) as caught:
        chat.encode(record(*turns.items()))
    assert caught.value.reason == "special_token"


@pytest.mark.parametrize(
    ("turns", "images", "reason"),
    [
        ([("user", "q")], 0, "no_answer"),
        ([("user", "q"), ("assistant", "")], 0, "empty_answer"),
        ([("user", "q"), ("assistant", " \n")], 0, "empty_answer"),
        ([("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "")], 0, "empty_answer"),
        ([("user", "<image>q"), ("assistant", "see <image>")], 2, "image_in_answer"),
    ],
)
def test_conversations_that_teach_nothing(chat: Chat, turns: Any, images: int, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        chat.encode(record(*turns, images=images))
    assert caught.value.reason == reason


def test_a_template_that_drops_pictures_of_a_turn(chat: Chat, tiny: Any, tmp_path: Path) -> None:
    template = QWEN25_TEMPLATE.replace(
        "content['type'] == 'image'", "message.role == 'user' and content['type'] == 'image'"
    )
    dropping = with_template(
        chat, tiny, tmp_path, template.replace(" or 'image' in content or 'image_url' in content", "")
    )
    with pytest.raises(RecordError) as caught:
        dropping.encode(record(("system", "<image>x"), ("user", "q"), ("assistant", "a"), images=1))
    assert caught.value.reason == "image_count"


plain = st.text(st.characters(codec="utf-8", exclude_characters="|"), max_size=30)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(plain, plain.filter(lambda t: bool(t.strip()))), min_size=1, max_size=3))
def test_whatever_is_said_only_the_answers_are_learnt(chats: dict[str, Chat], turns: list[tuple[str, str]]) -> None:
    chat = chats["qwen3_vl"]
    flat = [
        (role, text.replace("<image>", "").replace("<video>", ""))
        for q, a in turns
        for role, text in (("user", q), ("assistant", a))
    ]
    if any(role == "assistant" and not text.strip() for role, text in flat):
        return
    encoded = chat.encode(record(*flat))
    assert learnt(chat, encoded) == "".join(f"{text}<|im_end|>" for role, text in flat if role == "assistant")
    assert chat.tokenizer.decode(encoded.input_ids) == chat._render([{"role": r, "content": t} for r, t in flat])


def test_truncation_in_tokenizer_json_is_not_applied(chat: Chat, tiny: Any, tmp_path: Path) -> None:
    tok = tiny.make_tokenizer()
    tok.backend_tokenizer.enable_truncation(5)
    tok.backend_tokenizer.enable_padding(length=50)
    tok.save_pretrained(tmp_path)
    made = record(("user", "what colour is it"), ("assistant", "red " * 30 + "blue"))
    assert Chat.load(tmp_path, chat.family).encode(made).input_ids.tolist() == chat.encode(made).input_ids.tolist()


def test_fingerprint_follows_tokenizer_template_and_family(chats: dict[str, Chat], tiny: Any, tmp_path: Path) -> None:
    prints = [c.fingerprint() for c in chats.values()]
    assert len(set(prints)) == 3
    chat = chats["qwen2_5_vl"]
    assert pickle.loads(pickle.dumps(chat)).fingerprint() == chat.fingerprint()
    assert with_template(chat, tiny, tmp_path, QWEN25_TEMPLATE).fingerprint() != chat.fingerprint()


# ------------------------------------------------------------------ boxes


def boxed(text: str, **options: Any) -> Record:
    return record(("user", "<image>where"), ("assistant", text), images=1, **options)


ROW10 = {"objects": {"ref": ["the dog"], "bbox": [[10, 20, 50, 100], [50, 100]]}}
SIZE = [PictureSize(100, 200, 56, 112)]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen2_vl", "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(100,100),(500,500)<|box_end|>"
                     "<|box_start|>(500,500)<|box_end|>"),
        ("qwen2_5_vl", "the dog[6, 11, 28, 56][28, 56]"),
        ("qwen3_vl", "the dog[100, 100, 500, 500][500, 500]"),
    ],
)  # fmt: skip
def test_row_10_in_each_familys_convention(chats: dict[str, Chat], family: str, expected: str) -> None:
    chat = chats[family]
    encoded = chat.encode(boxed("<ref-object><bbox><bbox>", raw=ROW10), SIZE)
    assert learnt(chat, encoded) == expected + "<|im_end|>"
    assert encoded.boxed == (family == "qwen2_5_vl")


@pytest.mark.parametrize(
    ("box_format", "family", "expected"),
    [
        ("pixels", "qwen3_vl", '{"bbox_2d": [100, 100, 500, 500]} <|box_start|>(100,100)<|box_end|>'),
        ("pixels", "qwen2_5_vl", '{"bbox_2d": [6, 11, 28, 56]} <|box_start|>(6,11)<|box_end|>'),
        ("norm1000", "qwen2_5_vl", '{"bbox_2d": [1, 2, 3, 11]} <|box_start|>(1,2)<|box_end|>'),
        ("norm1000", "qwen2_vl", '{"bbox_2d": [10, 20, 50, 100]} <|box_start|>(10,20)<|box_end|>'),
        ("model", "qwen2_5_vl", '{"bbox_2d": [10, 20, 50, 100]} <|box_start|>(10,20)<|box_end|>'),
    ],
)
def test_inline_boxes_are_converted(chats: dict[str, Chat], box_format: Any, family: str, expected: str) -> None:
    text = '{"bbox_2d": [10, 20, 50, 100]} <|box_start|>(10,20)<|box_end|>'
    encoded = chats[family].encode(boxed(text, box_format=box_format), SIZE)
    assert learnt(chats[family], encoded) == expected + "<|im_end|>"


def test_without_final_sizes_the_widest_coordinates_stand_in(chat: Chat) -> None:
    made = boxed("<bbox>", raw={"objects": {"bbox": [[0, 0, 99, 199]]}})
    widest = chat.encode(made, [PictureSize(100, 200)])
    assert widest.boxed
    for final in ((28, 28), (56, 112), (980, 1960)):
        assert len(chat.encode(made, [PictureSize(100, 200, *final)]).input_ids) <= len(widest.input_ids)
    # Thousandths do not depend on the final size: exact from the start.
    assert "88888" in chat.tokenizer.decode(widest.input_ids)


@pytest.mark.parametrize(
    ("box", "box_format"), [([0, 0, 300, 10], "pixels"), ([-50, 0, 1, 1], "pixels"), ([0, 0, 1100, 5], "norm1000")]
)
def test_coordinates_outside_the_picture_are_refused(chat: Chat, box: list[int], box_format: Any) -> None:
    with pytest.raises(RecordError, match="box_format"):
        chat.encode(boxed("<bbox>", raw={"objects": {"bbox": [box]}}, box_format=box_format), SIZE)


def test_rounding_at_the_border_is_clamped(chats: dict[str, Chat]) -> None:
    chat = chats["qwen3_vl"]
    encoded = chat.encode(boxed("<bbox>", raw={"objects": {"bbox": [[-0.5, 0, 100.9, 201]]}}), SIZE)
    assert learnt(chat, encoded) == "[0, 0, 1000, 1000]<|im_end|>"


def test_fractions(chats: dict[str, Chat]) -> None:
    objects = {"objects": {"bbox": [[0.1, 0.25, 0.5, 1.0]], "bbox_type": "norm1"}}
    for family, expected in (("qwen3_vl", "[100, 250, 500, 1000]"), ("qwen2_5_vl", "[6, 28, 28, 112]")):
        assert learnt(chats[family], chats[family].encode(boxed("<bbox>", raw=objects), SIZE)).startswith(expected)


def test_an_inline_box_among_several_pictures_is_ambiguous(chat: Chat) -> None:
    made = record(("user", "<image><image>where"), ("assistant", '{"point_2d": [1, 2]}'), images=2, box_format="pixels")
    with pytest.raises(RecordError) as caught:
        chat.encode(made, SIZE * 2)
    assert caught.value.reason == "bad_box"
