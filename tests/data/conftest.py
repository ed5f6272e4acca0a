"""Checkpoint folders (tokenizer and template only) and small data sets for the tests of the data layer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlft.data.index import Index, open_index
from vlft.data.tokens import Chat
from vlft.family import FAMILIES

sys.path.insert(0, str(Path(__file__).parent))

from conftest_data import image_record, picture, spec, text_record, write_jsonl


@pytest.fixture(scope="session")
def tiny() -> Any:
    from vlft.testing import tiny as module

    return module


@pytest.fixture(scope="session")
def chats(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chat]:
    """A Chat of each family."""
    out = {}
    for family in tiny.FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        tiny.make_tokenizer(family).save_pretrained(folder)
        out[family] = Chat.load(folder, FAMILIES[family])
    return out


@pytest.fixture(scope="session")
def chat(chats: dict[str, Chat]) -> Chat:
    return chats["qwen2_5_vl"]


@pytest.fixture
def build(tmp_path: Path, chat: Chat) -> Callable[..., Index]:
    """build(records, **spec options) -> Index over a JSONL file in tmp_path."""

    def make(
        records: list[Any], *, name: str = "set", workers: int = 1, with_chat: Chat | None = None, **options: Any
    ) -> Index:
        path = write_jsonl(tmp_path / f"{name}.jsonl", records)
        return open_index([spec(path, **options)], with_chat or chat, cache_dir=tmp_path / "cache", workers=workers)

    return make


@pytest.fixture
def mixed(tmp_path: Path) -> list[Any]:
    """40 records with 0 to 3 pictures of many sizes; the pictures are drawn into tmp_path."""
    rng = np.random.default_rng(0)
    records: list[Any] = []
    for n in range(40):
        names = []
        for k in range(n % 4):
            names.append(f"p{n}_{k}.png")
            w, h = rng.integers(30, 300, 2).tolist()
            picture(n * 7 + k, w, h).save(tmp_path / names[-1])
        records.append(image_record(n, *names) if names else text_record(n))
    return records
