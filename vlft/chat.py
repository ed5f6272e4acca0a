"""`vlft chat`: ask a model about pictures in the terminal; the answer is printed as it is written.

Tokens and pixels are made as training makes them: the model's own chat template, cut before each answer, and pictures
at the size that the model folder's limits give. AutoProcessor, which wants torchvision, is not needed.

T tokens, I pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlft import export
from vlft.data import images
from vlft.data.tokens import Chat
from vlft.errors import ConfigError, ModelError, RecordError, VlftError
from vlft.evaluate import decoding
from vlft.models.load import Checkpoint, PictureFacts, open_checkpoint, pixel_limits, processor_settings
from vlft.rebuild import is_run
from vlft.tracking import RunFolder
from vlft.vision.patches import cut_patches, normalisation_table

END = ("", "/exit")
PICTURE = "/image"
USAGE = "/image takes the path of one picture: /image PATH."
HELP = "a question a line; /image PATH adds a picture to the next one; an empty line or /exit ends"


def chat(
    model: str,
    question: str | None = None,
    pictures: Iterable[Path] = (),
    *,
    max_new_tokens: int = 512,
    system: str | None = None,
    temperature: float = 0.0,
) -> None:
    """Print the answer to `question`, or answer questions from stdin until it ends.

    In a conversation, what is wrong with a line is printed, and the next line is read.

    Args:
        model: run folder, result (adapter or whole), Hugging Face folder or hub name.
        pictures: shown with the first question.
        temperature: 0 is greedy.
    Raises:
        ModelError: the model cannot be loaded.
        RecordError: a picture cannot be used.
        ConfigError: a question holds a special token.
    """
    talk = Conversation(Talker.load(model), system)
    talk.show(pictures)
    if question is not None:
        talk.ask(question, max_new_tokens, temperature)
        return
    terminal = sys.stdin.isatty()
    if terminal:
        print(HELP)
    for line in _lines(terminal):
        try:
            if line.split()[0] != PICTURE:
                talk.ask(line, max_new_tokens, temperature)
            elif path := line.removeprefix(PICTURE).strip():
                talk.show([Path(path).expanduser()])
            else:
                print(USAGE, file=sys.stderr, flush=True)
        except VlftError as error:
            print(error, file=sys.stderr, flush=True)


def _lines(terminal: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        if line in END:
            return
        yield line


# ---------------------------------------------------------------------------------------------------------------------
# A model that talks
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Talker:
    """A whole model with what turns text and pictures into its inputs."""

    model: Any
    chat: Chat
    facts: PictureFacts
    limits: tuple[int, int]
    """Smallest and largest area of a picture, in pixels."""

    @classmethod
    def load(cls, name: str) -> Talker:
        """The model of a run, a result, a folder or a hub name, on the GPU if there is one; adapters are merged.

        Raises:
            ModelError: it cannot be loaded.
        """
        folder = Path(name)
        found = open_checkpoint(str(RunFolder(folder).model) if is_run(folder) else name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = export.whole_model(found, device)
        return cls(model.eval(), Chat.load(found.folder, found.family), found.pictures, limits(found))

    def see(self, path: Path) -> Tensor:
        """(3, H, W) uint8: the picture at the size that the model sees.

        Raises:
            RecordError: it cannot be used.
        """
        if not path.is_file():
            raise RecordError("image_missing", f"{path}: there is no such file; check the path.")
        width, height = images.probe(path)
        low, high = self.limits
        rows, columns = images.smart_resize_batch(height, width, self.facts.layout.factor, low, high)
        return torch.from_numpy(images.decode(path, (int(columns), int(rows)), expect_wh=(width, height)))

    def patches(self, pictures: list[Tensor]) -> dict[str, Tensor]:
        """`pixel_values` and `image_grid_thw` (I, 3) of pictures; nothing for none."""
        if not pictures:
            return {}
        f, device = self.facts, self.model.device
        mean_std = normalisation_table(f.mean, f.std, f.rescale_factor)
        values = cut_patches(pictures, mean_std, f.patch_size, f.merge_size, f.temporal_patch_size)
        return {"pixel_values": values.to(device), "image_grid_thw": self.grid(pictures).to(device)}

    def grid(self, pictures: list[Tensor]) -> Tensor:
        side = self.facts.patch_size
        return torch.tensor([(1, p.shape[1] // side, p.shape[2] // side) for p in pictures])


def limits(checkpoint: Checkpoint) -> tuple[int, int]:
    """Smallest and largest picture of a model folder, in pixels, as its image processor reads them.

    Raises:
        ModelError: the folder does not say.
    """
    low, high = pixel_limits(processor_settings(checkpoint.folder))
    try:
        return int(low), int(high)  # what is absent is told below
    except (TypeError, ValueError):
        raise ModelError(
            f"{checkpoint.folder} does not say how large pictures may be (preprocessor_config.json: size or "
            "max_pixels); copy the checkpoint's processor files again."
        ) from None


@dataclass
class Conversation:
    """Turns so far, as messages, as text and as tokens."""

    talker: Talker
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    """(I) pictures of all turns."""
    ids: list[int] = field(default_factory=list)
    """(T) with one token for each picture."""
    _text: str = ""
    """What `ids` are the tokens of."""
    _new: list[Tensor] = field(default_factory=list)

    def show(self, paths: Iterable[Path]) -> None:
        """Add pictures to the next question.

        Raises:
            RecordError: one cannot be used.
        """
        self._new += [self.talker.see(path) for path in paths]

    def ask(self, question: str, max_new_tokens: int = 512, temperature: float = 0.0, *, silent: bool = False) -> str:
        """Print the answer while it is written, and remember it.

        Raises:
            ConfigError: the question holds a special token.
        """
        from transformers import TextStreamer

        self.prompt(question)
        talker, tokenizer = self.talker, self.talker.chat.tokenizer
        streamer = None if silent else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = torch.tensor([self._long()], device=talker.model.device)
        with torch.no_grad():
            out = talker.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer,
                mm_token_type_ids=(ids == talker.chat.image_token_id).int(), **talker.patches(self.seen),
                max_new_tokens=max_new_tokens, pad_token_id=talker.chat.pad_token_id, **decoding(temperature),
            )  # fmt: skip
        talker.model.model.rope_deltas = None  # of this length; the next question is longer
        written: list[int] = out[0, ids.shape[1] :].tolist()
        self.remember(written)
        return str(tokenizer.decode(written, skip_special_tokens=True))

    def prompt(self, question: str) -> None:
        """Add the question and make the tokens up to where the answer begins."""
        chat = self.talker.chat
        if found := next((m for m in chat.family.markers if m in question), None):
            raise ConfigError(f"the question holds the special token {found}, which would forge a turn; leave it out.")
        if "<image>" in question:
            raise ConfigError(
                "the question holds <image>; leave it out: pictures of --image stand before the question."
            )
        if not self.messages and self.system:
            self.messages.append({"role": "system", "content": self.system})
        parts = [{"type": "image"} for _ in self._new]
        content: Any = [*parts, {"type": "text", "text": question}] if parts else question
        self.messages.append({"role": "user", "content": content})
        self.seen, self._new = [*self.seen, *self._new], []
        text = str(chat.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True))
        if not text.startswith(self._text):  # a template that rewrites earlier turns
            self.ids, self._text = [], ""
        self.ids += self._encode(text.removeprefix(self._text))
        self._text = text

    def remember(self, written: list[int]) -> None:
        """The tokens of an answer; its end token belongs to the template."""
        tokenizer, end = self.talker.chat.tokenizer, self.talker.chat.end_token_id
        answer = written[: written.index(end)] if end in written else written
        text = str(tokenizer.decode(answer))
        self.messages.append({"role": "assistant", "content": text})
        self.ids, self._text = [*self.ids, *answer], self._text + text

    def _encode(self, text: str) -> list[int]:
        return list(self.talker.chat.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def _long(self) -> list[int]:
        """The tokens with each picture's token repeated as often as the model sees it."""
        grid = self.talker.grid(self.seen)
        counts = iter((grid.prod(-1) // self.talker.facts.merge_size**2).tolist() if self.seen else [])
        image = self.talker.chat.image_token_id
        return [i for token in self.ids for i in ([token] * next(counts) if token == image else [token])]
