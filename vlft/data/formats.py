"""Records: every shape that the field writes conversations in, read into one typed form. Nothing is parsed again later.

Reader names and the rows of formats.md, table 3a:

    llava 1 · messages 2 · sharegpt 3 · openai 4 · openai_image_url 5 · hf_columns 6 · prefix_suffix 7 · texts 8
    query_response, alpaca 9 · grounding 10 (any of 1, 2, 9 plus `objects`)

Conventions: `<image>` in a text stands for the next picture of the record. Pictures without any `<image>` in the record
go to the start of the first user turn, in order (what LLaVA's successors, swift and TRL do). `<image>` more or fewer
times than there are pictures is an error of the record. A picture may stand anywhere but in an answer.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from urllib.parse import unquote, urlparse

from vlft.errors import RecordError

if TYPE_CHECKING:
    from vlft.data.registry import DatasetSpec

Role = Literal["system", "user", "assistant", "tool"]
Unit = Literal["pixels", "norm1000", "norm1", "model"]
Style = Literal["family", "json", "marked"]


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    image: int
    """Index into `Record.images`."""


@dataclass(frozen=True)
class BoxPart:
    """A box (x1, y1, x2, y2) or a point (x, y) in a picture."""

    numbers: tuple[float, ...]
    unit: Unit
    """pixels of the original picture, thousandths, fractions, or already in the model's convention."""
    style: Style
    """How it is written: the family's template, a JSON list, or `<|box_start|>(x,y),(x,y)<|box_end|>`."""
    image: int | None
    """Index into `Record.images`; None if the record has several pictures and does not say which."""
    layout: str = ""
    """`[{}, {}]`: written so, with the numbers in their places; empty: as `style` says."""


@dataclass(frozen=True)
class RefPart:
    """The name of a referred object, written by the family's template."""

    text: str


Part: TypeAlias = TextPart | ImagePart | BoxPart | RefPart


@dataclass(frozen=True)
class ImageRef:
    """Where a picture is: a path (relative or absolute, as written), a URL, or the encoded file itself."""

    kind: Literal["path", "url", "bytes"]
    value: str = ""
    data: bytes = b""


@dataclass(frozen=True)
class Turn:
    role: Role
    parts: tuple[Part, ...]
    loss: bool = True
    """False: an answer that is read but not learnt (`"loss": false`)."""

    @property
    def text(self) -> str:
        return "".join(p.text for p in self.parts if isinstance(p, TextPart | RefPart))


@dataclass(frozen=True)
class Record:
    """One conversation. `images` are in the order in which the conversation shows them."""

    id: str
    format: str
    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...]
    has_boxes: bool
    """The text speaks of places in the picture, which move with it (vlft.data.moved)."""


@dataclass
class _Draft:
    """A record between its reader and `_assemble`: messages as (role, content, loss), pictures as written."""

    messages: list[tuple[Role, Any, bool]]
    images: list[Any] = field(default_factory=list)


# ------------------------------------------------------------------ which format

FORMATS = (
    "llava",
    "messages",
    "sharegpt",
    "openai",
    "openai_image_url",
    "hf_columns",
    "prefix_suffix",
    "texts",
    "query_response",
    "alpaca",
    "grounding",
)


def detect_format(raw: Any) -> str:
    """The name of the reader for `raw`, one of `FORMATS`.

    Raises:
        RecordError: `bad_record` (not an object), `unknown_format` (no reader knows these keys).
    """
    if not isinstance(raw, Mapping):
        raise RecordError("bad_record", f"the record is {_kind(raw)}; expected an object.")
    if isinstance(raw.get("objects"), Mapping):
        return "grounding"
    return _conversation_format(raw)


def _conversation_format(raw: Mapping[str, Any]) -> str:
    if "conversations" in raw:
        return "sharegpt" if "images" in raw else "llava"
    if "messages" in raw:
        return _messages_format(raw)
    for keys, name in (
        (("prompt", "completion"), "hf_columns"),
        (("prefix", "suffix"), "prefix_suffix"),
        (("texts",), "texts"),
        (("query", "response"), "query_response"),
        (("messages", "response"), "query_response"),
        (("instruction", "output"), "alpaca"),
    ):
        if all(key in raw for key in keys):
            return name
    keys_found = ", ".join(map(str, list(raw)[:12])) or "none"
    raise RecordError(
        "unknown_format", f"no record format has these keys: {keys_found}; see docs/data.md for the formats."
    )


def _messages_format(raw: Mapping[str, Any]) -> str:
    messages = raw["messages"]
    blocks = [
        block
        for message in (messages if isinstance(messages, Sequence) else ())
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        for block in message["content"]
        if isinstance(block, Mapping)
    ]
    if any(block.get("type") == "image_url" for block in blocks):
        return "openai_image_url"
    if blocks:
        return "hf_columns" if "images" in raw else "openai"
    return "messages"


def parse_record(raw: Any, spec: DatasetSpec, row_id: str) -> Record:
    """Read one raw record of any format.

    Args:
        raw: the record as JSON, Parquet or `datasets` gives it.
        spec: its data set: format, column and tag names, system prompt, box format.
        row_id: the record's identity if it has no `id` of its own.
    Raises:
        RecordError: with the reason; the message does not repeat which record it is.
    """
    if spec.columns:
        raw = _rename(raw, spec.columns)
    name = spec.format if spec.format != "auto" else detect_format(raw)
    if not isinstance(raw, Mapping):
        raise RecordError("bad_record", f"the record is {_kind(raw)}; expected an object.")
    _refuse_video(raw)
    inner = name if name != "grounding" else _conversation_format(raw)
    draft = _READERS[inner](raw, spec)
    system = raw.get("system") or spec.system
    if system and not any(role == "system" for role, _, _ in draft.messages):
        draft.messages.insert(0, ("system", _text(system, "system"), True))
    located = raw.get("objects")
    objects = _Objects.read(located, spec) if isinstance(located, Mapping) else None
    turns, images = _assemble(draft, spec, objects)
    own_id = raw.get("id")
    return Record(
        id=row_id if own_id is None or own_id == "" else str(own_id),
        format=name,
        turns=turns,
        images=images,
        has_boxes=_speaks_of_places(turns),
    )


def _rename(raw: Any, columns: Mapping[str, str]) -> Any:
    """`raw` with LLaMA-Factory's standard column names, taken from the file's own."""
    if not isinstance(raw, Mapping):
        return raw
    out = {key: value for key, value in raw.items() if key not in columns.values()}
    standard = {"prompt": "instruction", "query": "input", "response": "output"} if "messages" not in columns else {}
    for name, own in columns.items():
        if own in raw:
            out[standard.get(name, name)] = raw[own]
        elif name in ("messages", "prompt", "response"):
            raise RecordError("column_missing", f"there is no column '{own}' (registry: columns.{name}).")
    return out


# ------------------------------------------------------------------ readers

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "system",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "tool_response": "tool",
}
_TAG_ROLES: dict[str, Role] = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "tool",
    "function_tag": "assistant",
}


def _read_chat(raw: Mapping[str, Any], spec: DatasetSpec) -> _Draft:
    """Rows 1 to 6: a list of messages under `conversations` or `messages`."""
    key = "conversations" if "conversations" in raw else "messages"
    messages = raw.get(key)
    if isinstance(messages, Mapping):  # a Parquet column of structs read as a struct of columns
        messages = _rows_of_columns(messages)
    if not isinstance(messages, list):
        raise RecordError("bad_record", f"'{key}' is {_kind(messages)}; expected a list of messages.")
    return _Draft([_read_message(m, spec, n) for n, m in enumerate(messages)], _images(raw))


def _rows_of_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = list(columns)
    if not all(isinstance(columns[n], list) for n in names):
        raise RecordError(
            "bad_record", f"the messages are an object with the keys {', '.join(names)}; expected a list."
        )
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _read_message(message: Any, spec: DatasetSpec, number: int) -> tuple[Role, Any, bool]:
    where = f"message {number + 1}"
    if not isinstance(message, Mapping):
        raise RecordError("bad_record", f"{where} is {_kind(message)}; expected an object.")
    role_key = spec.tags.get("role_tag") or ("role" if "role" in message else "from")
    content_key = spec.tags.get("content_tag") or ("content" if "content" in message else "value")
    if role_key not in message or content_key not in message:
        raise RecordError(
            "bad_record",
            f"{where} has the keys {', '.join(map(str, message))}; expected '{role_key}' and '{content_key}'.",
        )
    if message.get("tool_calls"):
        raise RecordError(
            "tool_calls", f"{where} holds structured 'tool_calls'; write the call into the content as text."
        )
    return _role(message[role_key], spec, where), message[content_key], _is_learnt(message, where)


def _is_learnt(message: Mapping[str, Any], where: str) -> bool:
    """By `loss` or `train`, true or false, or by OpenAI's `weight`, 0 or 1."""
    learnt = True
    for key, expected in (("loss", "true or false"), ("train", "true or false"), ("weight", "0 or 1")):
        value = message.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise RecordError("bad_record", f"{where}: '{key}' is {value!r}; expected {expected}.")
        learnt = learnt and bool(value)
    return learnt


def _role(word: Any, spec: DatasetSpec, where: str) -> Role:
    for tag, role in _TAG_ROLES.items():
        if spec.tags.get(tag) == word:
            return role
    if isinstance(word, str) and word.lower() in _ROLES:
        return _ROLES[word.lower()]
    raise RecordError("unknown_role", f"{where} is by {word!r}; known roles: {', '.join(_ROLES)} (or set 'tags').")


def _read_columns(raw: Mapping[str, Any], spec: DatasetSpec) -> _Draft:
    """Row 6: `images` beside `messages`, or beside `prompt` and `completion` (texts or lists of messages)."""
    if "messages" in raw:
        return _read_chat(raw, spec)
    messages: list[tuple[Role, Any, bool]] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = _required(raw, key)
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and "type" not in value[0]:
            messages += [_read_message(m, spec, n) for n, m in enumerate(value)]
        else:
            messages.append((_ROLES[role], value, True))
    return _Draft(messages, _images(raw))


def _read_pair(question: str, answer: str) -> Callable[[Mapping[str, Any], DatasetSpec], _Draft]:
    """Row 7: two texts under the keys `question` and `answer`."""

    def read(raw: Mapping[str, Any], spec: DatasetSpec) -> _Draft:
        del spec
        messages: list[tuple[Role, Any, bool]] = [
            ("user", _text(_required(raw, question), question), True),
            ("assistant", _text(_required(raw, answer), answer), True),
        ]
        return _Draft(messages, _images(raw))

    return read


def _read_texts(raw: Mapping[str, Any], spec: DatasetSpec) -> _Draft:
    """Row 8: `texts`, a list of {"user", "assistant"}."""
    del spec
    texts = _required(raw, "texts")
    if isinstance(texts, Mapping):
        texts = _rows_of_columns(texts)
    if not isinstance(texts, list) or not all(isinstance(t, Mapping) for t in texts):
        raise RecordError("bad_record", f"'texts' is {_kind(texts)}; expected a list of objects.")
    messages: list[tuple[Role, Any, bool]] = []
    for pair in texts:
        messages.append(("user", _text(_required(pair, "user"), "user"), True))
        messages.append(("assistant", _text(_required(pair, "assistant"), "assistant"), True))
    return _Draft(messages, _images(raw))


def _read_query(raw: Mapping[str, Any], spec: DatasetSpec) -> _Draft:
    """Row 9: query/response/history (swift) or instruction/input/output/history (alpaca)."""
    del spec
    messages: list[tuple[Role, Any, bool]] = []
    for pair in raw.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RecordError("bad_record", f"'history' holds {pair!r}; expected pairs of a question and an answer.")
        messages += [("user", _text(pair[0], "history"), True), ("assistant", _text(pair[1], "history"), True)]
    if "query" in raw:
        question, answer = _text(raw["query"], "query"), _text(_required(raw, "response"), "response")
    else:
        more = raw.get("input")
        question = _text(_required(raw, "instruction"), "instruction") + (f"\n{_text(more, 'input')}" if more else "")
        answer = _text(_required(raw, "output"), "output")
    return _Draft([*messages, ("user", question, True), ("assistant", answer, True)], _images(raw))


_READERS: dict[str, Callable[[Mapping[str, Any], DatasetSpec], _Draft]] = {
    "llava": _read_chat,
    "messages": _read_chat,
    "sharegpt": _read_chat,
    "openai": _read_chat,
    "openai_image_url": _read_chat,
    "hf_columns": _read_columns,
    "prefix_suffix": _read_pair("prefix", "suffix"),
    "texts": _read_texts,
    "query_response": _read_query,
    "alpaca": _read_query,
}


def _images(raw: Mapping[str, Any]) -> list[Any]:
    """The record's own list of pictures, as written."""
    values: list[Any] = []
    for key in ("image", "images"):
        value = raw.get(key)
        if value is not None:
            values += list(value) if isinstance(value, list | tuple) else [value]
    return values


def _refuse_video(raw: Mapping[str, Any]) -> None:
    if raw.get("video") or raw.get("videos"):
        raise RecordError(
            "video", "the record has a video; vlft trains on images and text, remove it or leave it in the ledger."
        )


def _required(raw: Mapping[str, Any], key: str) -> Any:
    if key not in raw:
        raise RecordError("bad_record", f"there is no '{key}'; the record has {', '.join(map(str, raw))}.")
    return raw[key]


def _text(value: Any, key: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # counting sets write answers as numbers
    raise RecordError("bad_record", f"'{key}' is {_kind(value)}; expected a text.")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "a truth value"}
    return names.get(type(value), f"a {type(value).__name__}")


# ------------------------------------------------------------------ pictures

# Possessive: blanks of a long text that is none are not tried as the last ones again and again.
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]++={0,2}\s*+")


def image_ref(value: Any) -> ImageRef:
    """A picture as a record writes it: path, `file://`, URL, data URI, base64, {"bytes", "path"}, bytes, or a PIL
    image.

    Raises:
        RecordError: `bad_image`, if the value is none of these.
    """
    if isinstance(value, str):
        return _image_from_text(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return ImageRef("bytes", data=bytes(value))
    if isinstance(value, Mapping):
        return _image_from_object(value)
    if hasattr(value, "save") and hasattr(value, "getbands"):
        return ImageRef("bytes", data=_encode_pil(value))
    raise RecordError("bad_image", f"a picture is {_kind(value)}; expected a path, a URL, base64 or bytes.")


def _image_from_text(text: str) -> ImageRef:
    if not text.strip():
        raise RecordError("bad_image", "a picture's path is empty; fill it or remove the picture.")
    start = text[:16].lower()
    if start.startswith(("http://", "https://")):
        return ImageRef("url", text)
    if start.startswith("file://"):
        return _path_ref(_path_of(text))
    if start.startswith("data:"):
        head, comma, body = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise RecordError("bad_image", f"a data URI begins with '{head[:40]}'; expected 'data:image/...;base64,'.")
        return ImageRef("bytes", data=_decode_base64(body))
    # No file system takes a path of this length without a dot; JPEG's base64 begins with '/', like a path.
    if len(text) > 1024 and _BASE64.fullmatch(text):
        return ImageRef("bytes", data=_decode_base64(text))
    return _path_ref(text)


def _path_of(address: str) -> str:
    try:
        return unquote(urlparse(address).path)
    except ValueError as error:
        raise RecordError("bad_image", f"'{address[:80]}' is no address: {error}; correct it.") from None


def _path_ref(path: str) -> ImageRef:
    if "\0" in path:
        raise RecordError("bad_image", "a picture's path holds a NUL character.")
    try:
        path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise RecordError(
            "bad_image", "a picture's path holds half of a surrogate pair, which is no character; repair it."
        ) from None
    return ImageRef("path", path)


def _image_from_object(value: Mapping[str, Any]) -> ImageRef:
    if value.get("bytes"):
        return image_ref(value["bytes"]) if not isinstance(value["bytes"], str) else _base64_ref(value["bytes"])
    if value.get("base64"):
        return _base64_ref(value["base64"])
    for key in ("image", "path", "url", "image_url"):
        if value.get(key):
            return image_ref(value[key])
    raise RecordError(
        "bad_image", f"a picture is an object with the keys {', '.join(map(str, value)) or 'none'}, all empty."
    )


def _base64_ref(text: Any) -> ImageRef:
    if not isinstance(text, str):
        raise RecordError("bad_image", f"a picture's base64 is {_kind(text)}; expected a text.")
    return _image_from_text(text) if text.startswith("data:") else ImageRef("bytes", data=_decode_base64(text))


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError("bad_image", f"a picture's base64 cannot be decoded: {error}; repair it.") from None


def _encode_pil(picture: Any) -> bytes:
    """A PIL image as a lossless file; PNG has no CMYK, TIFF has."""
    import io

    out = io.BytesIO()
    picture.save(out, format="PNG" if picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "TIFF")
    return out.getvalue()


# ------------------------------------------------------------------ boxes

_NUMBER = r"-?\d+(?:\.\d+)?"
JSON_BOX = re.compile(rf'("(?:bbox_2d|point_2d)"\s*:\s*)\[\s*({_NUMBER}(?:\s*,\s*{_NUMBER})*)\s*\]')
MARKED_BOX = re.compile(
    rf"<\|box_start\|>\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)(?:\s*,\s*\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\))?<\|box_end\|>"
)
# Not the description of a format in a prompt ("bbox_2d": [x1, y1, x2, y2]).
_LEFT_OVER = re.compile(r'"(?:bbox_2d|point_2d)"\s*:[\s\[]*-?\d|<\|box_start\|>\(?\s*-?\d')
_PLACES = re.compile(
    r"bbox|point_2d|<\|box_start\|>|<\|quad_start\|>|<box>|<point|\[\s*\d+(?:\.\d+)?(?:\s*,\s*\d+(?:\.\d+)?){3}\s*\]"
)


@dataclass
class _Objects:
    """Row 10's `objects`, consumed in order by `<ref-object>` and `<bbox>`."""

    refs: list[str]
    boxes: list[tuple[float, ...]]
    images: list[int]
    unit: Unit
    refs_used: int = 0
    boxes_used: int = 0

    @classmethod
    def read(cls, raw: Mapping[str, Any], spec: DatasetSpec) -> _Objects:
        refs = [_encodable(_text(r, "objects.ref")) for r in raw.get("ref") or ()]
        boxes = [_numbers(b) for b in raw.get("bbox") or ()]
        kind = raw.get("bbox_type")
        units: dict[Any, Unit] = {"real": "pixels", "norm1": "norm1", None: spec.box_format or "pixels"}
        if kind not in units:
            raise RecordError("bad_box", f"'objects.bbox_type' is {kind!r}; expected 'real' or 'norm1'.")
        images = raw.get("image_id") or [0] * len(boxes)
        if len(images) != len(boxes) or not all(isinstance(i, int) and i >= 0 for i in images):
            raise RecordError("bad_box", f"'objects.image_id' is {images!r}; expected {len(boxes)} numbers from 0.")
        return cls(refs, boxes, list(images), units[kind])

    def next_ref(self) -> str:
        self.refs_used += 1
        if self.refs_used > len(self.refs):
            raise RecordError(
                "box_count",
                f"more <ref-object> in the text than the {len(self.refs)} in 'objects.ref'; make them agree.",
            )
        return self.refs[self.refs_used - 1]

    def next_box(self) -> tuple[tuple[float, ...], int]:
        self.boxes_used += 1
        if self.boxes_used > len(self.boxes):
            raise RecordError(
                "box_count", f"more <bbox> in the text than the {len(self.boxes)} in 'objects.bbox'; make them agree."
            )
        return self.boxes[self.boxes_used - 1], self.images[self.boxes_used - 1]

    def check_used(self) -> None:
        if self.boxes_used != len(self.boxes) or self.refs_used not in (0, len(self.refs)):
            raise RecordError(
                "box_count",
                f"the text has {self.boxes_used} <bbox> and {self.refs_used} <ref-object>, "
                f"'objects' {len(self.boxes)} and {len(self.refs)}; make them agree.",
            )


def _numbers(values: Any) -> tuple[float, ...]:
    # NaN is not below anything, and some whole numbers are too large for a float.
    good = isinstance(values, list | tuple) and all(isinstance(v, int | float) and abs(v) < 1e15 for v in values)
    if not good or len(values) not in (2, 4):
        raise RecordError("bad_box", f"a box is {values!r}; expected [x1, y1, x2, y2] or a point [x, y].")
    return tuple(float(v) for v in values)


def _split_boxes(text: str, unit: Unit) -> list[Part]:
    """Inline boxes of a text as parts of their own. Only called if the registry says what they mean."""
    parts: list[Part] = []
    at = 0
    found = sorted([*JSON_BOX.finditer(text), *MARKED_BOX.finditer(text)], key=lambda m: m.start())
    for match in found:
        marked = match.re is MARKED_BOX
        numbers = [g for g in match.groups() if g] if marked else match.group(2).split(",")
        head = text[at : match.start()] + ("" if marked else match.group(1))
        parts.append(TextPart(head))
        values = _numbers([float(n) for n in numbers])
        parts.append(BoxPart(values, unit, "marked" if marked else "json", None))
        at = match.end()
    parts.append(TextPart(text[at:]))
    for part in parts:
        # A coordinate that stays as it was among converted ones would teach nonsense in silence.
        if isinstance(part, TextPart) and (left := _LEFT_OVER.search(part.text)):
            raise RecordError("bad_box", f"a box near '{part.text[left.start() : left.start() + 40]}' cannot be read.")
    return [p for p in parts if not (isinstance(p, TextPart) and not p.text)]


def _speaks_of_places(turns: Sequence[Turn]) -> bool:
    parts = [part for turn in turns for part in turn.parts]
    return any(
        isinstance(p, BoxPart) or (isinstance(p, TextPart) and _PLACES.search(p.text) is not None) for p in parts
    )


# ------------------------------------------------------------------ one form

_PLACEHOLDER = re.compile(r"(<image>|<video>|<bbox>|<ref-object>)")


@dataclass
class _Assembly:
    """The pictures of a record while its turns are built."""

    given: list[Any]
    spec: DatasetSpec
    objects: _Objects | None
    images: list[ImageRef] = field(default_factory=list)
    origin: list[int] = field(default_factory=list)
    """For each of `images` its index in `given`, or -1 if a block brought it."""
    taken: int = 0
    placed: bool = False
    """Some block or `<image>` says where pictures go."""

    def take(self, index: int | None = None) -> ImagePart:
        self.placed = True
        if index is None:
            index = self.taken
            self.taken += 1
        if not 0 <= index < len(self.given):
            raise RecordError(
                "image_count",
                f"the text asks for picture {index + 1}, but the record has {len(self.given)}; make them agree.",
            )
        return self._add(image_ref(self.given[index]), index)

    def bring(self, value: Any) -> ImagePart:
        self.placed = True
        return self._add(image_ref(value), -1)

    def _add(self, ref: ImageRef, origin: int) -> ImagePart:
        self.images.append(ref)
        self.origin.append(origin)
        return ImagePart(len(self.images) - 1)


def _assemble(
    draft: _Draft, spec: DatasetSpec, objects: _Objects | None
) -> tuple[tuple[Turn, ...], tuple[ImageRef, ...]]:
    """Turns with typed parts, and the pictures in the order of their appearance."""
    state = _Assembly(draft.images, spec, objects)
    has_blocks = any(_is_image(b) for _, content, _ in draft.messages if isinstance(content, list) for b in content)
    turns = [
        Turn(role, tuple(_parts(content, state, placeholders=not has_blocks)), loss)
        for role, content, loss in draft.messages
    ]
    if draft.images and not state.placed:
        turns = _put_first(turns, state)
    unused = set(range(len(draft.images))) - set(state.origin)
    if unused:
        raise RecordError(
            "image_count",
            f"the record has {len(draft.images)} pictures, the text shows {len(set(state.origin) - {-1})}; make "
            "them agree.",
        )
    if objects is not None:
        objects.check_used()
    return tuple(_tie_boxes(turn, state) for turn in turns), tuple(state.images)


def _put_first(turns: list[Turn], state: _Assembly) -> list[Turn]:
    """Pictures that no text places go to the start of the first user turn."""
    for n, turn in enumerate(turns):
        if turn.role == "user":
            pictures = tuple(state.take() for _ in state.given)
            return [*turns[:n], Turn(turn.role, pictures + turn.parts, turn.loss), *turns[n + 1 :]]
    raise RecordError("no_user_turn", "the record has pictures but no user turn to put them in.")


def _tie_boxes(turn: Turn, state: _Assembly) -> Turn:
    """Boxes point to pictures in the order of appearance; an inline box belongs to the only picture there is."""
    parts: list[Part] = []
    for part in turn.parts:
        if isinstance(part, BoxPart):
            if part.style == "family" and part.unit != "model":
                if part.image not in state.origin:
                    raise RecordError(
                        "bad_box", f"a box is in picture {part.image} of 'image_id', which the text never shows."
                    )
                part = BoxPart(part.numbers, part.unit, part.style, state.origin.index(part.image))
            elif part.image is None and len(state.images) == 1:
                part = BoxPart(part.numbers, part.unit, part.style, 0)
        parts.append(part)
    return Turn(turn.role, tuple(parts), turn.loss)


def _parts(content: Any, state: _Assembly, *, placeholders: bool) -> list[Part]:
    if isinstance(content, str):
        return _text_parts(content, state, placeholders)
    if isinstance(content, int | float) and not isinstance(content, bool):
        return _text_parts(str(content), state, placeholders)
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise RecordError(
            "bad_record", f"a message's content is {_kind(content)}; expected a text or a list of blocks."
        )
    parts: list[Part] = []
    for block in content:
        parts += _block_parts(block, state, placeholders)
    return parts


def _is_image(block: Any) -> bool:
    return isinstance(block, Mapping) and block.get("type") in ("image", "image_url", "input_image")


def _block_parts(block: Any, state: _Assembly, placeholders: bool) -> list[Part]:
    if isinstance(block, str):
        return _text_parts(block, state, placeholders)
    if not isinstance(block, Mapping):
        raise RecordError("bad_record", f"a content block is {_kind(block)}; expected an object with a 'type'.")
    kind = block.get("type", "text" if "text" in block else None)
    if kind in ("text", "input_text"):
        return _text_parts(_text(block.get("text"), "text"), state, placeholders)
    if kind == "video" or kind == "video_url":
        _refuse_video({"video": True})
    if not _is_image(block):
        raise RecordError("bad_record", f"a content block has the type {kind!r}; expected text, image or image_url.")
    keys = ("image", "path", "url", "base64", "image_url", "bytes")
    if any(block.get(key) for key in keys):
        return [state.bring(block)]
    index = block.get("index")
    if index is not None and not isinstance(index, int):
        raise RecordError("bad_record", f"an image block has the index {index!r}; expected a number from 0.")
    return [state.take(index)]


def _text_parts(text: str, state: _Assembly, placeholders: bool) -> list[Part]:
    parts: list[Part] = []
    for piece in _PLACEHOLDER.split(_encodable(text)):
        if not piece:
            continue
        if piece == "<image>" and placeholders:
            parts.append(state.take())
        elif piece == "<video>" and placeholders:
            _refuse_video({"video": True})
        elif piece == "<bbox>" and state.objects is not None:
            numbers, image = state.objects.next_box()
            parts.append(BoxPart(numbers, state.objects.unit, "family", image))
        elif piece == "<ref-object>" and state.objects is not None:
            parts.append(RefPart(state.objects.next_ref()))
        elif state.spec.box_format in ("pixels", "norm1000"):
            parts += _split_boxes(piece, state.spec.box_format)
        else:
            parts.append(TextPart(piece))
    return parts


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecordError(
            "bad_text", "a text holds half of a surrogate pair, which is no character; repair it."
        ) from None
    return text
