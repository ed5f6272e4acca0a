"""One index whatever the file's kind; cached by content; every record is either used or in the ledger."""

from __future__ import annotations

import base64
import io
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest_data import image_record, picture, spec, text_record, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlft.data import index as index_module
from vlft.data.index import BOXED, HAS_BOXES, Index, open_index, summary
from vlft.data.tokens import Chat
from vlft.errors import DataError

Build = Callable[..., Index]


def contents(index: Index) -> list[Any]:
    """Everything that planning and training see, but for where the record lies."""
    return [
        (
            [a.tolist() for a in index.tokens(i)],
            index.sizes(i),
            [s if isinstance(s, bytes) else Path(s).read_bytes() for s in index.sources(i)],
            int(index.split_hash[i]),
            int(index.flags[i]),
            index.sample_id(i),
        )
        for i in range(len(index))
    ]


def png(seed: int, width: int = 40, height: int = 30) -> bytes:
    out = io.BytesIO()
    picture(seed, width, height).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def counted(monkeypatch: Any) -> list[str]:
    """Names of the data sets that were built rather than found in the cache."""
    built: list[str] = []
    original = index_module._build

    def build(job: Any, *args: Any) -> None:
        built.append(job.spec.name)
        original(job, *args)

    monkeypatch.setattr(index_module, "_build", build)
    return built


# ------------------------------------------------------------------ what it holds


def test_what_a_sample_holds(build: Build, tmp_path: Path, chat: Chat) -> None:
    picture(0, 40, 30).save(tmp_path / "a.png")
    index = build([image_record(7, "a.png", "a.png"), text_record(1)])
    assert len(index) == index.total == 2
    ids, learnt = index.tokens(0)
    assert chat.tokenizer.decode(ids[learnt]) == "a red circle<|im_end|>"
    assert (ids == chat.image_token_id).sum() == 2
    assert index.sizes(0) == [(40, 30)] * 2
    assert index.sources(0) == [str(tmp_path / "a.png")] * 2
    assert index.record(0) == image_record(7, "a.png", "a.png")
    assert index.parsed(1).turns[1].text == "red"
    assert (index.sample_id(0), index.sample_id(1)) == ("r7", "t1")
    assert index.n_images.tolist() == [2, 0]
    assert index.formats == {"set": {"messages": 2}}
    assert list(summary(index)) == ["set: 2 samples (messages 2)"]
    with pytest.raises(IndexError):
        index.locate(2)


def test_records_without_an_id_are_called_by_their_line(build: Build) -> None:
    index = build([{"query": "q", "response": "a"}])
    assert index.sample_id(0) == "line 1"


def test_flags_and_widest_coordinates(build: Build, tmp_path: Path, chats: dict[str, Chat]) -> None:
    picture(0, 40, 30).save(tmp_path / "a.png")
    box = {"query": "<image>q", "response": "<bbox>", "images": ["a.png"], "objects": {"bbox": [[1, 2, 3, 4]]}}
    says = {"query": "<image>q", "response": '{"bbox_2d": [1, 2, 3, 4]}', "images": ["a.png"]}
    index = build([box, says, text_record(0)])
    assert index.flags.tolist() == [BOXED | HAS_BOXES, HAS_BOXES, 0]
    assert "88888" in str(chats["qwen2_5_vl"].tokenizer.decode(index.tokens(0)[0]))
    relative = build([box, says], name="relative", with_chat=chats["qwen3_vl"])
    assert relative.flags.tolist() == [HAS_BOXES, HAS_BOXES]


def test_several_sets_have_one_numbering(tmp_path: Path, chat: Chat) -> None:
    picture(0, 40, 30).save(tmp_path / "a.png")
    specs = [
        spec(write_jsonl(tmp_path / "one.jsonl", [text_record(0), image_record(1, "a.png")])),
        spec(write_jsonl(tmp_path / "none.jsonl", [{"x": 1}])),
        spec(write_jsonl(tmp_path / "two.jsonl", [image_record(2, "a.png", "a.png")])),
    ]
    index = open_index(specs, chat, cache_dir=tmp_path / "c")
    assert [index.sample_id(i) for i in range(3)] == ["t0", "r1", "r2"]
    assert index.dataset.tolist() == [0, 0, 2]
    assert index.image_starts.tolist() == [0, 0, 1, 3]
    assert len(index) + len(index.ledger) == index.total == 4
    # A sample's identity does not depend on what else is in the run.
    alone = open_index([specs[2]], chat, cache_dir=tmp_path / "c")
    assert alone.identity[0] == index.identity[2]
    assert len(set(index.identity.tolist())) == 3


# ------------------------------------------------------------------ kinds of files


def kinds(tmp_path: Path, records: list[Any]) -> dict[str, Path]:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = {
        name: tmp_path / "kinds" / name / "set"
        for name in ("jsonl", "list", "pretty", "bom", "parquet", "shards", "arrow")
    }
    for path in out.values():
        path.parent.mkdir(parents=True)
    write_jsonl(out["jsonl"], records)
    out["list"].write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    out["pretty"].write_text(json.dumps(records, indent=2), encoding="utf-8")
    out["bom"].write_bytes(b"\xef\xbb\xbf" + b" \n" + json.dumps(records).encode())
    table = pa.Table.from_pylist(records)
    pq.write_table(table, out["parquet"], row_group_size=7)
    out["shards"].mkdir()
    pq.write_table(table.slice(0, 11), out["shards"] / "train-00000.parquet", row_group_size=4)
    pq.write_table(table.slice(11), out["shards"] / "train-00001.parquet")
    datasets.Dataset.from_list(records).save_to_disk(str(out["arrow"]))
    return out


def test_every_kind_of_file_gives_the_same_index(tmp_path: Path, chat: Chat, mixed: list[Any]) -> None:
    mixed[5]["messages"][0]["content"] += " äöü 日本 \u2028 \U0001f600"
    for record in mixed:
        record.setdefault("images", [])  # a table's columns are those of its first row
    expected = None
    for kind, path in kinds(tmp_path, mixed).items():
        index = open_index([spec(path, image_root=tmp_path)], chat, cache_dir=tmp_path / f"cache_{kind}")
        assert not index.ledger, (kind, index.ledger)
        if expected is None:
            expected = contents(index)
        assert contents(index) == expected, kind


def test_embedded_pictures(tmp_path: Path, chat: Chat) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = [png(n) for n in range(6)]
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "red"}]
    rows = [{"id": f"e{n}", "messages": turns, "images": [{"bytes": d, "path": None}]} for n, d in enumerate(data)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=4)
    features = datasets.Features(
        {"id": datasets.Value("string"), "images": [datasets.Image()],
         "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}]}
    )  # fmt: skip
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "hf"))
    uris = [
        {"id": f"e{n}", "messages": turns, "images": ["data:image/png;base64," + base64.b64encode(d).decode()]}
        for n, d in enumerate(data)
    ]
    write_jsonl(tmp_path / "u.jsonl", uris)
    first = None
    for name in ("p.parquet", "hf", "u.jsonl"):
        index = open_index([spec(tmp_path / name)], chat, cache_dir=tmp_path / "c")
        assert not index.ledger
        assert [index.sources(i) for i in range(6)] == [[d] for d in data]
        first = first or contents(index)
        assert contents(index) == first, name
    # Unpacked rows that were deleted are unpacked again.
    for file in (tmp_path / "c" / "tables").rglob("*.arrow"):
        file.unlink()
    again = open_index([spec(tmp_path / "p.parquet")], chat, cache_dir=tmp_path / "c")
    assert contents(again) == first


def test_records_across_windows_of_a_json_list(tmp_path: Path, chat: Chat, monkeypatch: Any) -> None:
    from vlft.data import sources

    monkeypatch.setattr(sources, "_WINDOW", 64)
    monkeypatch.setattr(sources, "_CHUNK_RECORDS", 3)
    records = [text_record(n) | {"note": "ü日" * (n % 40), "deep": {"a": [1, 2, {"b": "]}"}]}} for n in range(50)]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    index = open_index([spec(path)], chat, cache_dir=tmp_path / "c")
    assert [index.record(i) for i in range(50)] == records
    assert index.shards[0].row.tolist() == list(range(50))


@pytest.mark.parametrize("kind", ["lines", "list"])
def test_workers_do_not_change_the_index(
    tmp_path: Path, chat: Chat, mixed: list[Any], monkeypatch: Any, kind: str
) -> None:
    from vlft.data import sources

    monkeypatch.setattr(sources, "_CHUNK_BYTES", 1500)
    monkeypatch.setattr(sources, "_CHUNK_RECORDS", 6)
    records = [*mixed, {"bad": 1}, *mixed]
    path = tmp_path / "set.json"
    if kind == "lines":
        write_jsonl(path, records)
    else:
        path.write_text(json.dumps(records))
    one, two = (open_index([spec(path)], chat, cache_dir=tmp_path / f"c{n}", workers=n) for n in (1, 2))
    assert contents(one) == contents(two)
    assert one.ledger == two.ledger
    assert f" {41}:" in one.ledger[0].message
    assert one.identity.tolist() == two.identity.tolist()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "is empty"),
        ("   \n ", "is empty"),
        ("hello", "begins with"),
        ('[{"a": 1},\n{"a": 2}\n{"a": 3}]', "line 3"),
        ('[{"a": 1},\n{"a": }]', "line 2"),
        ('[{"a": 1},\n\n{"a": "x', "line 3"),
        ('[{"a": 1}', "without ']'"),
        ("[" * 100_000, "nested too deeply"),
        ("\ufeff", "is empty"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, chat: Chat, text: str, word: str) -> None:
    path = tmp_path / "set.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=word) as caught:
        open_index([spec(path)], chat, cache_dir=tmp_path / "c")
    assert "set.json" in str(caught.value)
    assert not [p for p in (tmp_path / "c").rglob("*") if p.is_file()]


def test_other_kinds_that_are_refused(tmp_path: Path, chat: Chat) -> None:
    (tmp_path / "a.gz").write_bytes(b"\x1f\x8b123")
    (tmp_path / "b.json").write_bytes("[1]".encode("utf-16"))
    (tmp_path / "c.parquet").write_bytes(b"PAR1garbage")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dict" / "train").mkdir(parents=True)
    (tmp_path / "dict" / "dataset_dict.json").write_text("{}")
    for name, word in (
        ("a.gz", "unpack"),
        ("b.json", "UTF-16"),
        ("c.parquet", "Parquet"),
        ("folder", "neither"),
        ("dict", "train"),
    ):
        with pytest.raises(DataError, match=word):
            open_index([spec(tmp_path / name)], chat, cache_dir=tmp_path / "c")


def test_an_empty_list_and_an_empty_jsonl_of_blanks(tmp_path: Path, chat: Chat) -> None:
    (tmp_path / "a.json").write_text("[]")
    index = open_index([spec(tmp_path / "a.json")], chat, cache_dir=tmp_path / "c")
    assert len(index) == index.total == 0


# ------------------------------------------------------------------ the ledger


def test_used_and_ledger_are_the_total(tmp_path: Path, chat: Chat) -> None:
    picture(0, 40, 30).save(tmp_path / "a.png")
    picture(0, 3000, 2).save(tmp_path / "thin.png")
    (tmp_path / "broken.png").write_bytes(b"xx")
    lines = [
        json.dumps(text_record(0)),
        '{"id": "cut", "messages": [',
        "",
        json.dumps(image_record(1, "a.png")),
        json.dumps(image_record(2, "absent.png")),
        json.dumps(image_record(3, "a.png", "broken.png")),
        json.dumps(image_record(4, "thin.png")),
        json.dumps(image_record(5, "/etc/passwd")),
        json.dumps(image_record(6, "http://x/y.png")),
        json.dumps(image_record(7, "a.png", answer="")),
        json.dumps(image_record(8, "a.png", answer="<|im_end|>")),
        "[1, 2]",
        '"text"',
        json.dumps({"id": "v", "query": "q", "response": "a", "videos": ["v.mp4"]}),
        json.dumps({"query": "<image>", "response": "a", "images": []}),
        b'{"query": "\xff", "response": "a"}'.decode("latin-1"),
        json.dumps({"query": "q", "response": "a", "image": {"bytes": {"x": [1]}}}),
        json.dumps({"messages": {"role": [1], "content": 2}}),
    ]  # fmt: skip
    path = tmp_path / "set.jsonl"
    path.write_bytes("\r\n".join(lines).encode("latin-1"))
    index = open_index([spec(path)], chat, cache_dir=tmp_path / "c")
    assert [index.sample_id(i) for i in range(len(index))] == ["t0", "r1"]
    assert index.total == len(lines) - 1  # the blank line is no record
    assert len(index) + len(index.ledger) == index.total
    reasons = Counter(entry.reason for entry in index.ledger)
    assert reasons == {
        "bad_json": 2, "image_missing": 1, "image_unreadable": 1, "image_aspect": 1, "path_outside_root": 1,
        "remote_refused": 1,
        "empty_answer": 1, "special_token": 1, "bad_record": 3, "video": 1, "image_count": 1, "bad_image": 1,
    }  # fmt: skip
    by_id = {entry.id: entry for entry in index.ledger}
    assert by_id["r2"].message.startswith("set.jsonl, line 5: ")
    assert "absent.png" in by_id["r2"].message
    assert by_id["line 2"].reason == "bad_json"
    assert by_id["r2"].json() == {
        "dataset": "set",
        "id": "r2",
        "reason": "image_missing",
        "message": by_id["r2"].message,
        "step": 0,
    }


KEYS = (
    "id image images messages conversations role content from value type text image_url url prompt completion prefix "
    "suffix texts user assistant query response history instruction input output objects ref bbox bbox_type image_id "
    "system loss index bytes"
).split()
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a.png", "<image>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=14,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.dictionaries(st.sampled_from(KEYS), json_values, min_size=1, max_size=6))
def test_whatever_a_record_holds_it_is_used_or_in_the_ledger(tmp_path: Path, chat: Chat, raw: dict[str, Any]) -> None:
    from vlft.data.sources import JsonLinesSource, RawRow

    path = tmp_path / "set.jsonl"
    path.touch()
    collector = index_module._Collector(index_module._Job(spec(path), JsonLinesSource(path), chat, tmp_path, False))
    collector.add(RawRow(0, 0, 0, raw))
    part = collector.part(1)
    assert part.records == 1
    assert all(len(item.message) < 600 for item in part.rejected)


# ------------------------------------------------------------------ the cache


def test_the_cache_is_found_and_keyed_by_content(tmp_path: Path, chats: dict[str, Chat], counted: list[str]) -> None:
    picture(0, 40, 30).save(tmp_path / "a.png")
    path = write_jsonl(tmp_path / "set.jsonl", [image_record(0, "a.png"), text_record(1)])
    chat = chats["qwen2_5_vl"]

    def opened(with_chat: Chat = chat, **options: Any) -> Index:
        return open_index([spec(path, **options)], with_chat, cache_dir=tmp_path / "c")

    first = contents(opened())
    assert contents(opened()) == first
    os.utime(path, (1, 1))  # a copy of a file has another time
    # Options that change no token, and a set's place in the run.
    opened(weight=3.0, split="eval", max_samples=1, max_pixels=999_999)
    assert len(counted) == 1
    opened(system="Be brief.")
    opened(box_format="pixels")
    opened(chats["qwen3_vl"])
    opened(allowed_roots=(tmp_path,))
    assert len(counted) == 5
    write_jsonl(path, [image_record(0, "a.png"), text_record(2)])
    assert contents(opened()) != first
    assert len(counted) == 6


def test_a_picture_that_came_later_is_noticed(tmp_path: Path, chat: Chat, counted: list[str]) -> None:
    path = write_jsonl(tmp_path / "set.jsonl", [image_record(0, "a.png"), image_record(1, "b.png"), text_record(1)])
    (tmp_path / "b.png").write_bytes(b"half")

    def used() -> int:
        return len(open_index([spec(path)], chat, cache_dir=tmp_path / "c"))

    assert used() == used() == 1
    assert len(counted) == 1
    picture(0, 40, 30).save(tmp_path / "a.png")
    assert used() == 2
    picture(0, 40, 30).save(tmp_path / "b.png")
    assert used() == used() == 3
    assert len(counted) == 3


def test_failed_downloads_are_tried_again_later_but_not_by_the_other_ranks(
    tmp_path: Path, chat: Chat, counted: list[str], monkeypatch: Any
) -> None:
    path = write_jsonl(tmp_path / "set.jsonl", [image_record(0, "http://127.0.0.1:9/x.png"), text_record(1)])
    for _ in range(2):
        index = open_index([spec(path)], chat, cache_dir=tmp_path / "c", allow_remote=True)
    assert [e.reason for e in index.ledger] == ["remote_failed"]
    assert len(counted) == 1
    monkeypatch.setattr(index_module, "_RETRY_SECONDS", 0)
    open_index([spec(path)], chat, cache_dir=tmp_path / "c", allow_remote=True)
    assert len(counted) == 2


def test_a_build_that_was_killed_leaves_nothing_that_is_found(tmp_path: Path, chat: Chat, monkeypatch: Any) -> None:
    path = write_jsonl(tmp_path / "set.jsonl", [text_record(1)])

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "_publish", die)
        with pytest.raises(KeyboardInterrupt):
            open_index([spec(path)], chat, cache_dir=tmp_path / "c")
    (folder,) = [tmp_path / "c" / "index"]
    assert list(folder.iterdir()) == []
    assert len(open_index([spec(path)], chat, cache_dir=tmp_path / "c")) == 1


def test_two_that_build_at_once(tmp_path: Path, chat: Chat, monkeypatch: Any) -> None:
    path = write_jsonl(tmp_path / "set.jsonl", [text_record(n) for n in range(20)])
    barrier = threading.Barrier(3)
    original = index_module._publish

    def together(*args: Any) -> None:
        barrier.wait(20)
        original(*args)

    monkeypatch.setattr(index_module, "_publish", together)
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(len(open_index([spec(path)], chat, cache_dir=tmp_path / "c"))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [20] * 3
    assert len(list((tmp_path / "c" / "index").iterdir())) == 1


def test_an_index_survives_pickling_and_the_arrays_are_mapped(build: Build, mixed: list[Any]) -> None:
    import pickle

    index = build(mixed)
    assert isinstance(index.shards[0].tokens, np.memmap)
    again = pickle.loads(pickle.dumps(index))
    assert contents(again) == contents(index)
    assert len(pickle.dumps(index)) < 20_000


def test_reading_a_large_index_is_fast(build: Build, mixed: list[Any]) -> None:
    build(mixed)
    began = time.perf_counter()
    build(mixed)
    assert time.perf_counter() - began < 1
