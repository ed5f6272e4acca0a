"""A conversation as token ids, with the loss on every answer and its end token and on nothing else, by construction.

The chat template is rendered once as it is and once with unique marks around each answer. Without its marks the second
must equal the first, or the record is refused: a template that rewrites answers would put the loss in the wrong place.
The text is then cut at the marks and tokenised in pieces, as generation would see it (prompt | answer and end token |
rest): Qwen's split pattern merges `assistant\\n` and `\\nanswer` into one `\\n\\n` otherwise, which no generation ever
produces.

Legend: T tokens with ONE image token per picture (the index stores these), I images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from vlft.data.formats import BoxPart, ImagePart, Part, Record, RefPart, TextPart, Turn
from vlft.errors import ModelError, RecordError
from vlft.family import Family

# Part of the fingerprint: raise it when the same record would get other tokens from the code below.
TOKENS_VERSION = 1
# A coordinate outside the picture by up to this part of its side is rounding and is clamped; more is a wrong
# `box_format`.
_BOX_SLACK = 0.01


@dataclass(frozen=True)
class PictureSize:
    """Sizes of one picture in pixels: as stored (after EXIF orientation) and as the model sees it; 0 where unknown."""

    width: int
    height: int
    final_width: int = 0
    final_height: int = 0

    @property
    def final(self) -> tuple[int, int]:
        """(width, height) as the model sees it."""
        return self.final_width, self.final_height


@dataclass(frozen=True)
class Encoded:
    input_ids: npt.NDArray[np.uint32]
    """(T,) one image token per picture."""
    supervised: npt.NDArray[np.bool_]
    """(T,) the token is part of an answer that is learnt, or its end token."""
    n_images: int
    boxed: bool
    """The text depends on the pictures' final sizes: without them it was written with the widest coordinates."""


@dataclass
class Chat:
    """Tokenizer and chat template of one checkpoint. Cheap to send to another process: it is loaded there again."""

    folder: Path
    family: Family
    tokenizer: Any = field(repr=False)

    @classmethod
    def load(cls, folder: Path, family: Family) -> Chat:
        """Compose from a local model folder; torchvision is not needed (AutoProcessor would want it).

        Raises:
            ModelError: no usable tokenizer or chat template, or a special token of the family is missing.
        """
        from transformers import AutoTokenizer

        try:
            # Said, not left out: transformers would ask the terminal whether to run a tokenizer's own code.
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare exceptions
            what = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
            raise ModelError(
                f"{folder} has no tokenizer that can be loaded: {what}; "
                "copy the checkpoint's tokenizer files beside it."
            ) from error
        chat = cls(Path(folder), family, tokenizer)
        chat._check()
        # A tokenizer.json may carry both; they would cut or fill up texts here in silence.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return chat

    def __reduce__(self) -> tuple[Any, tuple[Path, Family]]:
        return (Chat.load, (self.folder, self.family))

    def _check(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ModelError(
                f"{self.folder} has no chat template (chat_template.jinja or tokenizer_config.json); add it."
            )
        if not hasattr(self.tokenizer, "backend_tokenizer"):
            raise ModelError(f"{self.folder} has no fast tokenizer (tokenizer.json); convert it.")
        if self.tokenizer.convert_tokens_to_ids(self.family.image_token) in (None, self.tokenizer.unk_token_id):
            raise ModelError(
                f"the tokenizer of {self.folder} has no token {self.family.image_token}; copy the "
                "checkpoint's tokenizer files beside it."
            )
        _ = self.end_token

    # -------------------------------------------------------------- ids

    @cached_property
    def image_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(self.family.image_token))

    def token_id(self, token: str) -> int:
        """Id of a token; of the unknown one where it is none."""
        found = self.tokenizer.convert_tokens_to_ids(token)
        return int(found if found is not None else self.pad_token_id)

    @cached_property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)

    @cached_property
    def end_token(self) -> str:
        """The special token that the template writes after an answer, whatever the tokenizer calls its end token."""
        probe = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\ue000answer\ue001"}]
        try:
            _, _, rest = self._render(probe).partition("\ue001")
        except RecordError as error:
            what = str(error).rstrip(".")
            raise ModelError(f"{self.folder}: {what}; copy the checkpoint's chat_template.jinja again.") from None
        special = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        for token in special:
            if rest.startswith(token):
                return str(token)
        raise ModelError(
            f"the chat template of {self.folder} writes no special token after an answer; found {rest[:20]!r}, "
            "use another one."
        )

    @cached_property
    def end_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(self.end_token))

    def fingerprint(self) -> str:
        """Hash of everything that decides which tokens a record becomes."""
        state = (self.tokenizer.backend_tokenizer.to_str(), str(self.tokenizer.chat_template), repr(self.family))
        digest = xxhash.xxh3_128(str(TOKENS_VERSION).encode())
        for text in state:
            digest.update(f"{len(text)}:".encode())
            digest.update(text.encode())
        return digest.hexdigest()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids) if text else []

    def _render(self, messages: list[dict[str, Any]]) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, TypeError) as error:
            raise RecordError("template_refuses", f"the chat template refuses the conversation: {error}.") from None

    # -------------------------------------------------------------- records

    def encode(self, record: Record, sizes: Sequence[PictureSize] | None = None) -> Encoded:
        """Token ids of a record and which of them are learnt.

        Args:
            record: the conversation.
            sizes: one for each picture. Without final sizes, coordinates that depend on them are written with the most
                digits they can have, so that the length is an upper bound.
        Raises:
            RecordError: `special_token`, `empty_answer`, `no_answer`, `nothing_learnt`, `image_in_answer`,
                `image_count`, `template_refuses`, `template_rewrites`, `template_drops`, `bad_box`.
        """
        self._check_record(record)
        writer = _Writer(self.family, sizes)
        turns = [(turn, [writer.write(part) for part in turn.parts]) for turn in record.turns]
        real = self._render([_message(turn, texts) for turn, texts in turns])
        spans = self._spans(real, turns)
        _check_all_said(real, turns)
        ids: list[int] = []
        learnt: list[bool] = []
        at = 0
        answers = [turn for turn in record.turns if turn.role == "assistant"]
        for (start, end), turn in zip(spans, answers, strict=True):
            for piece, supervised in ((real[at:start], False), (real[start:end], turn.loss)):
                new = self._ids(piece)
                ids += new
                learnt += [supervised] * len(new)
            at = end
        rest = self._ids(real[at:])
        ids_T = np.array(ids + rest, np.uint32)
        self._check_images(ids_T, record)
        return Encoded(ids_T, np.array(learnt + [False] * len(rest), np.bool_), len(record.images), writer.boxed)

    def _check_record(self, record: Record) -> None:
        answers = [turn for turn in record.turns if turn.role == "assistant"]
        if not answers:
            raise RecordError(
                "no_answer", "the conversation has no assistant turn, so there is nothing to learn; add one."
            )
        if not any(turn.loss for turn in answers):
            raise RecordError(
                "nothing_learnt", 'every answer has "loss": false, so there is nothing to learn; remove one.'
            )
        for turn in record.turns:
            # Literal structural tokens would forge turns or pictures; one in two parts is whole again in the template.
            text = "".join(part.text if isinstance(part, TextPart | RefPart) else "\n" for part in turn.parts)
            if "<|" in text and (found := next((m for m in self.family.markers if m in text), None)):
                raise RecordError("special_token", f"a text holds the special token {found}; remove or escape it.")
        for turn in answers:
            if any(isinstance(part, ImagePart) for part in turn.parts):
                raise RecordError(
                    "image_in_answer", "an answer holds a picture, which the model cannot write; move it."
                )
            if not any(isinstance(p, BoxPart) for p in turn.parts) and not turn.text.strip():
                raise RecordError("empty_answer", "an answer is empty; remove the turn or fill it.")

    def _spans(self, real: str, turns: list[tuple[Turn, list[str | None]]]) -> list[tuple[int, int]]:
        """(start, end) of each answer in `real`, its end token included.

        Source: the idea of marking and rebuilding is from this project's traps.md, 'Assistant spans'.
        """
        nonce = 0
        while f"\ue000{nonce}:" in real:
            nonce += 1
        marks: list[tuple[str, str]] = []
        said: list[str] = []
        messages = []
        for turn, texts in turns:
            if turn.role == "assistant":
                opening, closing = (f"\ue000{nonce}:{len(marks)}{side}\ue001" for side in "<>")
                marks.append((opening, closing))
                said.append("".join(text for text in texts if text is not None))
                texts = [opening, *texts, closing]
            messages.append(_message(turn, texts))
        return self._find(real, self._render(messages), marks, said)

    def _find(self, real: str, marked: str, marks: list[tuple[str, str]], said: list[str]) -> list[tuple[int, int]]:
        rebuilt: list[str] = []
        spans: list[tuple[int, int]] = []
        length = 0
        rest = marked
        for (opening, closing), text in zip(marks, said, strict=True):
            before, found_open, rest = rest.partition(opening)
            answer, found_close, rest = rest.partition(closing)
            if not found_open or not found_close or answer != text:
                raise RecordError(
                    "template_rewrites", "the chat template drops or rewrites an answer; use another one."
                )
            rebuilt += [before, answer]
            start = length + len(before)
            length = start + len(answer)
            if not rest.startswith(self.end_token):
                raise RecordError("template_rewrites", f"the template does not end an answer with {self.end_token}.")
            spans.append((start, length + len(self.end_token)))
        if "".join(rebuilt) + rest != real:
            raise RecordError(
                "template_rewrites",
                "the chat template changes an answer (white space, thinking tags), so its tokens cannot be told apart; "
                "write the answer as the template leaves it.",
            )
        return spans

    def _check_images(self, ids_T: npt.NDArray[np.uint32], record: Record) -> None:
        found = int((ids_T == self.image_token_id).sum())
        if found != len(record.images):
            raise RecordError(
                "image_count",
                f"the chat template shows {found} pictures of {len(record.images)}; move them to a user turn.",
            )


def _check_all_said(real: str, turns: list[tuple[Turn, list[str | None]]]) -> None:
    """No turn is lost: some templates pass over a system turn in the middle, or roles that they do not know."""
    at = 0
    for turn, texts in turns:
        for text in texts:
            wanted = text.strip() if text else ""
            found = real.find(wanted, at)
            if found < 0:
                raise RecordError(
                    "template_drops", f"the chat template leaves out what a {turn.role} turn says; reorder the turns."
                )
            at = found + len(wanted)


def _message(turn: Turn, texts: Sequence[str | None]) -> dict[str, Any]:
    """A turn for the template; None stands for a picture. A plain text stays a string: some templates know nothing
    else.
    """
    if all(text is not None for text in texts):
        return {"role": turn.role, "content": "".join(text for text in texts if text is not None)}
    content = [{"type": "image"} if text is None else {"type": "text", "text": text} for text in texts]
    return {"role": turn.role, "content": content}


# ------------------------------------------------------------------ boxes


@dataclass
class _Writer:
    """Writes parts as text in the family's conventions."""

    family: Family
    sizes: Sequence[PictureSize] | None
    boxed: bool = False

    def write(self, part: Part) -> str | None:
        """The text of a part; None for a picture."""
        if isinstance(part, TextPart):
            return part.text
        if isinstance(part, ImagePart):
            return None
        if isinstance(part, RefPart):
            return self.family.ref_template.format(ref=part.text)
        return self._layout(part, self._convert(part))

    def _layout(self, box: BoxPart, numbers: Sequence[str]) -> str:
        if box.layout:
            return box.layout.format(*numbers)
        if box.style == "json":
            return "[" + ", ".join(numbers) + "]"
        if box.style == "family" and len(numbers) == 4:
            return self.family.box_template.format(**dict(zip(("x1", "y1", "x2", "y2"), numbers, strict=True)))
        if box.style == "marked" or "<|box_start|>" in self.family.box_template:
            points = ",".join(f"({x},{y})" for x, y in zip(numbers[::2], numbers[1::2], strict=True))
            return f"<|box_start|>{points}<|box_end|>"
        return "[" + ", ".join(numbers) + "]"

    def _convert(self, box: BoxPart) -> list[str]:
        """Coordinates in the family's convention, as written."""
        if box.unit == "model":
            return [f"{n:g}" if n != int(n) else str(int(n)) for n in box.numbers]
        if box.unit == "norm1000" and self.family.box_convention == "relative1000":
            return [str(round(self._clamp(n, 1000.0))) for n in box.numbers]
        if box.image is None:
            raise RecordError(
                "bad_box", "a box does not say in which of the pictures it is; use 'objects' with 'image_id'."
            )
        size = self.sizes[box.image] if self.sizes is not None else PictureSize(0, 0)
        relative = self._relative(box, size)
        if self.family.box_convention == "relative1000":
            return [str(round(r * 1000)) for r in relative] if relative is not None else ["1000"] * len(box.numbers)
        self.boxed = True
        if relative is None or not size.final_width:
            return ["88888"] * len(box.numbers)  # no final side has more digits: 200:1 at the pixel caps in use
        ends = (size.final_width, size.final_height)
        return [str(round(r * ends[n % 2])) for n, r in enumerate(relative)]

    def _relative(self, box: BoxPart, size: PictureSize) -> list[float] | None:
        """Coordinates as fractions of the picture; None while its size is unknown."""
        if box.unit == "pixels" and not size.width:
            return None
        scale = {"norm1": (1.0, 1.0), "norm1000": (1000.0, 1000.0)}.get(
            box.unit, (float(size.width), float(size.height))
        )
        return [self._clamp(n, scale[i % 2]) / scale[i % 2] for i, n in enumerate(box.numbers)]

    @staticmethod
    def _clamp(value: float, end: float) -> float:
        slack = max(_BOX_SLACK * end, 1.0 if end > 1 else 0.0)
        if not -slack <= value <= end + slack:
            raise RecordError(
                "bad_box",
                f"a coordinate is {value:g}, outside the picture (0 to {end:g}); check 'box_format' in the registry.",
            )
        return min(max(value, 0.0), end)
