"""Asks a model folder questions about pictures and counts the exact answers, with Hugging Face's own classes.

`AutoProcessor` wants torchvision, which the demo does without; the tokenizer and the PIL image processor load alone, so
they are put together here by hand, as anybody may do who uses the result of a training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image


@dataclass(frozen=True)
class Asked:
    """One picture, one question, and the answer that counts as right."""

    picture: Image.Image
    kind: str
    question: str
    answer: str


class Answerer:
    """A model folder, ready to be asked. Answers are greedy, so they are the same every time."""

    def __init__(self, folder: Path | str) -> None:
        from transformers import AutoModelForImageTextToText, AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def _inputs(self, batch: Sequence[Asked]) -> dict[str, torch.Tensor]:
        seen = self.image_processor([asked.picture for asked in batch], return_tensors="pt")
        merge = self.image_processor.merge_size**2
        texts = []
        for asked, grid in zip(batch, seen["image_grid_thw"], strict=True):
            content = [{"type": "image"}, {"type": "text", "text": asked.question}]
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            texts.append(text.replace("<|image_pad|>", "<|image_pad|>" * (int(grid.prod()) // merge)))
        read = self.tokenizer(texts, padding=True, return_tensors="pt")
        kinds = (read["input_ids"] == self.model.config.image_token_id).int()  # M-RoPE asks which tokens are picture
        return {**{key: read[key] for key in ("input_ids", "attention_mask")}, "mm_token_type_ids": kinds, **seen}

    @torch.no_grad()
    def __call__(self, questions: Sequence[Asked], batch_size: int = 50) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(questions), batch_size):
            inputs: dict[str, Any] = self._inputs(questions[start : start + batch_size])
            out = self.model.generate(**inputs, max_new_tokens=6, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return answers


def exact_match(folder: Path | str, questions: Sequence[Asked]) -> tuple[float, list[str]]:
    """The share of questions that the model in `folder` answers exactly, and its answers."""
    answers = Answerer(folder)(questions)
    right = sum(answer == asked.answer for answer, asked in zip(answers, questions, strict=True))
    return right / len(questions), answers
