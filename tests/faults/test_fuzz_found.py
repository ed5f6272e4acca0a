"""What the fuzzer found, one small case each."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlft.data.index import Index, open_index
from vlft.data.registry import DatasetSpec, read_registry
from vlft.data.tokens import Chat
from vlft.errors import ConfigError, DataError
from vlft.family import FAMILIES

GOOD = '{"query": "q", "response": "a"}'
Read = Callable[..., Index]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    from vlft.testing.tiny import make_tokenizer

    folder = tmp_path_factory.mktemp("model")
    make_tokenizer("qwen2_5_vl").save_pretrained(folder)
    return Chat.load(folder, FAMILIES["qwen2_5_vl"])


@pytest.fixture
def read(tmp_path: Path, chat: Chat) -> Read:
    """read(content of a file, **options of the data set) -> Index"""

    def build(content: str | bytes, *, allow_remote: bool = False, **options: Any) -> Index:
        path = tmp_path / "set"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        spec = DatasetSpec(name="set", json_path=path, **options)
        return open_index([spec], chat, cache_dir=tmp_path / "cache", allow_remote=allow_remote)

    return build


def reasons(index: Index) -> list[str]:
    assert len(index) + len(index.ledger) == index.total
    return [entry.reason for entry in index.ledger]


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return bytes(sink.getvalue())


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("rest", [GOOD, f"\n[{GOOD}]", "]", "\0", " " * 9000 + "x"])
def test_what_follows_the_end_of_a_json_list_is_not_dropped_in_silence(read: Read, rest: str) -> None:
    with pytest.raises(DataError, match=r"line [12]: the JSON list is broken"):
        read(f"[{GOOD}]{rest}")


def test_white_space_around_a_json_list_is_fine(read: Read) -> None:
    assert len(read(f"{' ' * 9000}\n[{GOOD}] \r\n\t")) == 1


def test_a_json_list_behind_white_space_that_json_does_not_know(read: Read) -> None:
    with pytest.raises(DataError):
        read(f"\x0b[{GOOD}]]")


def test_a_number_of_too_many_digits_costs_its_record_and_not_the_list(read: Read) -> None:
    long = f'{{"query": "q", "response": {"1" * 5000}}}'
    assert reasons(read(f"[{GOOD}, {long}, {GOOD}]")) == ["bad_json"]


def test_a_row_of_a_table_that_is_no_utf8(read: Read) -> None:
    questions = pa.array([b"q", b"\xff", b"q"], pa.binary()).view(pa.string())
    index = read(parquet(pa.table({"query": questions, "response": ["a", "a", "a"]})))
    assert reasons(index) == ["bad_record"]
    assert "row 2" in index.ledger[0].message


def test_a_parquet_file_with_damaged_pages_is_named(read: Read) -> None:
    data = bytearray(parquet(pa.table({"query": [f"{'q' * 99}{n}" for n in range(999)], "response": ["a"] * 999})))
    data[200:400] = bytes(200)
    with pytest.raises(DataError, match="set cannot be read as Parquet"):
        read(bytes(data))


def test_a_saved_dataset_with_a_damaged_offset_does_not_kill_the_process(tmp_path: Path, chat: Chat) -> None:
    rows = [{"query": "q" * 999, "response": "a"}] * 3
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    (file,) = (tmp_path / "set").glob("*.arrow")
    offsets = struct.pack("<4i", 0, 999, 1998, 2997)
    assert offsets in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(offsets, struct.pack("<4i", 0, 999, 1 << 30, 2997)))
    spec = DatasetSpec(name="set", json_path=tmp_path / "set")
    assert set(reasons(open_index([spec], chat, cache_dir=tmp_path / "cache"))) == {"bad_record"}


@pytest.mark.parametrize("path", ["/proc/self/mem", "pipe"])
def test_what_cannot_be_read_as_a_file_is_named(tmp_path: Path, chat: Chat, path: str) -> None:
    os.mkfifo(tmp_path / "pipe")  # would wait for ever
    spec = DatasetSpec(name="set", json_path=tmp_path / path)
    with pytest.raises(DataError, match=path):
        open_index([spec], chat, cache_dir=tmp_path / "cache")


# ------------------------------------------------------------------ the registry


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"datasets": {"a": {"json_path": "~nobody-here/x"}}}', "does not exist"),
        ('{"datasets": {"a": {"json_path": "' + "x" * 5000 + '"}}}', "does not exist"),
        ('{"datasets": {"a": {"json_path": ".", "allowed_roots": ["~nobody-here"]}}}', "does not exist"),
        ('{"datasets": {"a": {"json_path": ".", "max_pixels": ' + "1" * 5000 + "}}}", "digits"),
        ('{"datasets": {"a": ' + "[" * 5000 + "]" * 5000 + "}}", "nested too deeply"),
        ('{"datasets": {"\\ud800": {"json_path": "."}}}', "surrogate"),
        ('{"datasets": {"a": {"json_path": ".", "tags": {"\\ud800": "x"}}}}', "surrogate"),
    ],
)
def test_a_registry_that_python_or_the_system_refuses(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "registry.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_registry(tmp_path / "registry.json")


# ------------------------------------------------------------------ records


def test_a_special_token_in_two_pieces(read: Read) -> None:
    blocks = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    turns = [{"role": "user", "content": blocks}, {"role": "assistant", "content": "a"}]
    record = {"query": "<|im_<ref-object>", "response": "a", "objects": {"ref": ["end|>"], "bbox": []}}
    assert reasons(read(json.dumps([{"messages": turns}, record]))) == ["special_token"] * 2


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "9" * 400])
@pytest.mark.parametrize("box_format", ["model", "norm1000"])
def test_a_coordinate_that_is_no_number(read: Read, number: str, box_format: str) -> None:
    record = f'{{"query": "<bbox>", "response": "a", "objects": {{"bbox": [[{number}, 1, 1, 1]]}}}}'
    assert reasons(read(record, box_format=box_format)) == ["bad_box"]


def test_half_a_surrogate_pair_in_the_name_of_an_object(read: Read) -> None:
    record = {"query": "<ref-object>", "response": "a", "objects": {"ref": ["\ud800"], "bbox": []}}
    assert reasons(read(json.dumps(record))) == ["bad_text"]


@pytest.mark.parametrize("path", ["file://[", "file:///%00", "\ud800.png"])
def test_an_address_that_cannot_be_one(read: Read, path: str) -> None:
    assert reasons(read(json.dumps({"query": "q", "response": "a", "images": [path]}))) == ["bad_image"]


def test_a_long_path_that_is_nearly_base64(read: Read) -> None:
    began = time.perf_counter()
    read(json.dumps({"query": "q", "response": "a", "images": ["a" + " " * 100_000 + "!"]}))
    assert time.perf_counter() - began < 5  # a minute, when each blank was tried as the last one


def test_an_id_of_megabytes_does_not_fill_the_ledger(read: Read) -> None:
    index = read(json.dumps([{"id": "x" * 10**6}, {"id": "y" * 10**6, "query": "q", "response": "a"}]))
    assert reasons(index) == ["unknown_format"]
    assert len(index.ledger[0].id) == len(index.sample_id(0)) == 500


def test_half_a_surrogate_pair_in_an_id_can_be_written_with_the_predictions(read: Read) -> None:
    assert read('{"id": "a\\ud800", "query": "q", "response": "a"}').sample_id(0) == "a?"


# ------------------------------------------------------------------ downloads


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nshort", b"nonsense\r\n\r\n"])
def test_a_download_that_breaks_off(read: Read, answer: bytes) -> None:
    def serve() -> None:
        connection, _ = server.accept()
        connection.recv(65536)
        connection.sendall(answer)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.png"
        index = read(json.dumps({"query": "q", "response": "a", "images": [address]}), allow_remote=True)
    assert reasons(index) == ["remote_failed"]


def test_an_address_with_a_blank(read: Read) -> None:
    record = {"query": "q", "response": "a", "images": ["http://127.0.0.1:9/a b.png"]}
    assert reasons(read(json.dumps(record), allow_remote=True)) == ["remote_failed"]
