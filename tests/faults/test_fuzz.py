"""Whatever stands in a record, a picture or a file: no crash, no silent drop, used + ledger = total.

`VLFT_FUZZ=10000 pytest tests/faults/test_fuzz.py` tries so many mutants, others each time; without it some hundreds,
always the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from faults.mutants import PICTURES, RECORDS, Mutant, dumped, mutant, spoil_file, spoil_line, spoil_record
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from vlft.data.collate import Row
from vlft.data.loader import step_loader
from vlft.data.plan import Plan
from vlft.data.prepare import Data, DataOptions, prepare_data
from vlft.data.registry import read_registry
from vlft.data.sample import BY_TOKENS
from vlft.errors import ConfigError, DataError
from vlft.family import FAMILIES
from vlft.grids import Layout

MUTANTS = int(os.environ.get("VLFT_FUZZ", "600"))
BATCH = 200
"""Mutants of one run."""
FILES = 25
"""Files spoilt as a whole for each batch."""
CONTROLS = 12
"""Good records among the mutants of each data set: nothing that stands beside them may hurt them."""
PAGE = Path(__file__).parents[2] / "docs" / "data.md"
REASONS = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8").partition("## The ledger")[2], re.M))

pytestmark = pytest.mark.timeout(300 + MUTANTS)


@dataclass
class Count:
    """What became of all mutants so far."""

    records: int = 0
    pictures: int = 0
    files: int = 0
    refused: int = 0
    """Files that were refused as a whole."""
    used: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    unforeseen: Counter[str] = field(default_factory=Counter)
    """Exceptions behind `bad_record` that no check foresaw."""

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {n}" for reason, n in self.reasons.most_common())
        unforeseen = ", ".join(f"{n} x {what}" for what, n in self.unforeseen.most_common())
        return (
            f"\n{self.records} mutated records, {self.pictures} mutated pictures, {self.files} mutated files "
            f"({self.refused} refused as a whole): {self.used} samples used, {self.reasons.total()} in the ledger "
            f"({reasons}); caught by the last net: {unforeseen or 'none'}"
        )


def fuzzed(examples: int, test: Callable[[Random], None]) -> None:
    """Run `test` with many seeds."""

    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        derandomize="VLFT_FUZZ" not in os.environ, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(seed=st.integers(0, 2**64 - 1))
    def run(seed: int) -> None:
        test(Random(seed))

    run()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each family a folder with tokenizer and template."""
    from vlft.testing.tiny import make_tokenizer

    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        make_tokenizer(family).save_pretrained(folder)
    return folders


# ------------------------------------------------------------------ one run over some data sets


def options(folder: Path, models: dict[str, Path], rng: Random) -> DataOptions:
    family = rng.choice(list(FAMILIES))
    return DataOptions(
        registry=folder / "registry.json", names=None, folder=models[family], family=FAMILIES[family],
        layout=Layout(merge=2, patch=16 if family == "qwen3_vl" else 14), min_pixels=56 * 56, max_pixels=200 * 200,
        max_seq_length=400, on_too_long=rng.choice(("shrink", "drop")), train_split_ratio=rng.choice((0.5, 0.9)),
        max_bad_fraction=1.0, allow_remote_images=False, cache_dir=folder / "cache", seed=0, global_batch=8,
        train_batch_size=4, eval_batch_size=4, rows_per_rank=2, rank=0, world_size=1,
        num_workers=rng.choice((0, 0, 0, 1)), pin_memory=False, progress=False,
    )  # fmt: skip


def used_and_not(data: Data) -> tuple[list[int], list[Any]]:
    """(samples that an epoch used, and one over the held-out side; ledger of all others)."""
    o = data.options
    held_out = data._held_out
    plans = [data.plan]
    if len(held_out):
        sets = data.index.dataset[held_out]
        plans.append(Plan(held_out, sets, [1.0] * len(data.index.specs), seed=0, global_batch=o.global_batch))
    steps = [
        step
        for plan in plans
        for step in step_loader(
            data.index, data.fitted, plan, data.chat, rank=0, world_size=1, seed=0, start_step=0,
            total_steps=plan.steps_per_epoch, costs=BY_TOKENS, rows_per_rank=2, token_budget=1600,
            num_workers=o.num_workers,
        )
    ]  # fmt: skip
    used: list[int] = []
    for row in (row for step in steps for row in step.rows if row.sample_ids):
        used += row.sample_ids
        check_row(row, data, o)
    failures = [failure for step in steps for failure in step.failures]
    assert len(data.account(failures)) == len(failures)
    return used, [*data.ledger, *failures]


def check_row(row: Row, data: Data, o: DataOptions) -> None:
    patches = int(row.image_grid_thw.prod(dim=1).sum())
    assert len(row.pixels_u8) == patches * 3 * o.layout.patch**2
    assert int((row.input_ids_T == data.chat.image_token_id).sum()) * o.layout.merge**2 == patches
    for n, i in enumerate(row.sample_ids):
        own = slice(int(row.cu_seqlens[n]), int(row.cu_seqlens[n + 1]))
        ids, learnt = row.input_ids_T[0, own], row.labels_T[0, own] != -100
        assert learnt.any()
        assert len(ids) <= o.max_seq_length
        # Nothing that a record says may begin or end a turn.
        turns = data.index.parsed(i).turns
        added = turns[0].role != "system" and o.family.model_type != "qwen3_vl"
        assert int((ids == data.chat.end_token_id).sum()) == len(turns) + added
        about = data.describe(i)
        assert f"{about.id} {about.question}".encode()  # both are written with the predictions


def check(data: Data, expected: set[str], count: Count) -> set[str]:
    """Every place of `expected` ("lines.jsonl, line 3") is used once or once in the ledger; returns those used."""
    used, ledger = used_and_not(data)
    good, bad = [data.index.place(i) for i in used], [entry.message.partition(": ")[0] for entry in ledger]
    assert [place for place, n in Counter(good + bad).items() if n > 1] == []
    assert {*good, *bad} == expected
    assert len(used) + len(ledger) == data.index.total
    assert {entry.reason for entry in ledger} <= REASONS
    for entry in ledger:
        assert len(json.dumps(entry.json())) < 20_000
        if entry.reason == "bad_record" and "cannot be read (" in entry.message:
            count.unforeseen[entry.message.partition("cannot be read (")[2][:70]] += 1
    count.used += len(used)
    count.reasons.update(entry.reason for entry in ledger)
    return set(good)


# ------------------------------------------------------------------ mutants among good records


def control(rng: Random, n: int, pool: dict[str, bytes]) -> dict[str, Any]:
    pictures = rng.sample(list(pool), n % 3)
    turns = [
        {"role": "user", "content": "<image>" * len(pictures) + "what"},
        {"role": "assistant", "content": f"red {n}"},
    ]
    return {"id": f"control-{n}", "messages": turns, "images": pictures}


def is_json(line: bytes) -> bool:
    """A list with this record in it can be cut into records: numbers and characters are the record's own affair."""
    try:
        json.loads(line.decode("latin-1"), parse_int=float)
    except (ValueError, RecursionError):
        return False
    return True


def as_row(m: Mutant) -> dict[str, Any]:
    """A mutant in a table's columns: its picture, or its text as what is asked."""
    pictures = [{"bytes": m.file[1], "path": None}] if m.file else []
    asked = None if m.line == b"" else m.line.decode("utf-8", "replace")[:3000]
    turns = [{"role": "user", "content": "what" if m.file else asked}, {"role": "assistant", "content": "red"}]
    return {"id": m.what, "messages": turns, "images": pictures}


def extras(rng: Random) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if box_format := rng.choice((None, None, "pixels", "norm1000", "model")):
        found["box_format"] = box_format
    if rng.randrange(3) == 0:
        found |= {"system": "Be brief.", "max_pixels": 100 * 100}
    return found


def run_batch(mutants: list[Mutant], seed: int, models: dict[str, Path], folder: Path, count: Count) -> None:
    """Write three data sets of the mutants with good records between them, and run over these."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = Random(seed)
    pool = pictures(seed)
    for name, data in [*pool.items(), *(m.file for m in mutants if m.file)]:
        (folder / name).write_bytes(data)
    good = [control(rng, n, pool) for n in range(CONTROLS)]
    lines = [json.dumps(record).encode() for record in good]
    fine = set(lines)
    sets: dict[str, list[bytes]] = {"lines": lines[:1], "list": lines[:1]}  # the first decides what kind of file it is
    rows = good[:]
    for n, m in enumerate(mutants):
        between = lines[1 + n % (CONTROLS - 1)]
        sets["lines"] += [m.line, between] if n % 10 == 0 else [m.line]
        if is_json(m.line):
            sets["list"] += [m.line, between] if n % 10 == 0 else [m.line]
        rows.append(as_row(m))
    (folder / "lines.jsonl").write_bytes(b"\n".join(sets["lines"]))
    (folder / "list.json").write_bytes(b"[" + b",\n".join(sets["list"]) + b"]\n")
    as_bytes = [
        {**r, "images": [p if isinstance(p, dict) else {"bytes": pool[p], "path": p} for p in r["images"]]}
        for r in rows
    ]
    pq.write_table(pa.Table.from_pylist(as_bytes), folder / "table.parquet", row_group_size=50)
    registry = {
        p.stem: {"json_path": p.name} | extras(rng)
        for p in sorted(folder.glob("*.*"))
        if p.stem in ("lines", "list", "table")
    }
    (folder / "registry.json").write_text(json.dumps({"datasets": registry}))

    # A mutant may have a line break in it; blank lines are no records.
    file_lines = (folder / "lines.jsonl").read_bytes().split(b"\n")
    places = {f"lines.jsonl, line {n + 1}": line for n, line in enumerate(file_lines) if line.strip()}
    places |= {f"list.json, record {n + 1}": line for n, line in enumerate(sets["list"])}
    places |= {f"table.parquet, row {n + 1}": lines[n] if n < CONTROLS else b"" for n in range(len(rows))}
    used = check(prepare_data(options(folder, models, rng)), set(places), count)
    assert {place for place, line in places.items() if line in fine} <= used, "a good record was lost"


def pictures(seed: int) -> dict[str, bytes]:
    """Good pictures, one of each kind."""
    rng = Random(seed)
    return {f"good-{kind}.{kind.partition('-')[0]}": make(rng) for kind, make in PICTURES.items()}


def narrow(mutants: list[Mutant], fails: Callable[[list[Mutant]], bool]) -> list[Mutant]:
    """A small part of the mutants that still fails."""
    while len(mutants) > 1:
        half = len(mutants) // 2
        part = next((p for p in (mutants[:half], mutants[half:]) if fails(p)), None)
        if part is None:
            break
        mutants = part
    return mutants


def test_mutated_records_and_pictures(models: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    count = Count()

    def run(rng: Random) -> None:
        seed = rng.getrandbits(32)
        pool = pictures(seed)
        mutants = [mutant(rng, f"m{n}", pool) for n in range(BATCH)]

        def attempt(some: list[Mutant], into: Count) -> None:
            with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
                run_batch(some, seed, models, Path(folder), into)

        def fails(some: list[Mutant]) -> bool:
            try:
                attempt(some, Count())
            except Exception:
                return True
            return False

        try:
            attempt(mutants, count)
        except Exception as error:
            left = narrow(mutants, fails)
            shown = "\n".join(f"{m.what}: {m.line[:1500]!r} {m.file and m.file[1][:300]!r}" for m in left[:3])
            raise AssertionError(f"{len(left)} mutants, batch seed {seed}:\n{shown}") from error
        count.records += sum(m.file is None for m in mutants)
        count.pictures += sum(m.file is not None for m in mutants)

    fuzzed(-(-MUTANTS // BATCH), run)
    with capsys.disabled():
        print(count)


# ------------------------------------------------------------------ registries

TOLD = {
    "json_path": "a.jsonl", "image_root": ".", "format": "auto", "split": "train", "weight": 1.5, "max_samples": 3,
    "system": "s", "columns": {"messages": "conv"}, "tags": {"role_tag": "who", "content_tag": "said"},
    "max_pixels": 10_000, "box_format": "pixels", "allowed_roots": ["."], "dataset_class": "x",
}  # fmt: skip


def test_mutated_registries(tmp_path: Path) -> None:
    """Each is read, or refused in words."""
    (tmp_path / "a.jsonl").write_text('{"query": "q", "response": "a"}')
    registry = {"datasets": {"a": TOLD, "b": {"json_path": "a.jsonl"}}}

    def run(rng: Random) -> None:
        text = dumped(rng, spoil_record(rng, registry)[1]) if rng.randrange(3) else json.dumps(registry).encode()
        data = spoil_line(rng, text) if rng.randrange(3) == 0 else text
        note(repr(data[:2000]))
        (tmp_path / "registry.json").write_bytes(data)
        with contextlib.suppress(ConfigError):
            assert all(spec.json_path.exists() for spec in read_registry(tmp_path / "registry.json"))

    fuzzed(MUTANTS // 10, run)


# ------------------------------------------------------------------ files that are spoilt as a whole


def small_file(rng: Random, kind: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "parquet":
        rows = [control(rng, n, {}) | {"note": "x" * n} for n in range(0, CONTROLS, 3)]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink, compression=rng.choice(("none", "snappy")), row_group_size=3)
        return bytes(sink.getvalue())
    records = [{"id": f"r{n}"} | RECORDS[rng.choice(list(RECORDS))](rng, []) for n in range(5)]
    if kind == "list":
        return json.dumps(records, indent=rng.choice((None, 1)), ensure_ascii=False).encode()
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def saved(folder: Path) -> Path:
    """A folder of Hugging Face `datasets`; the file in it with the rows."""
    import datasets

    datasets.Dataset.from_list([control(Random(0), 3 * n, {}) for n in range(5)]).save_to_disk(str(folder))
    return next(folder.glob("*.arrow"))


def rows_of(path: Path) -> set[str] | None:
    """The records of a file by their places; None where it must be refused as a whole."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.is_dir():
        try:
            return {f"{path.name}, row {n + 1}" for n in range(len(datasets.load_from_disk(str(path))))}
        except Exception:  # of many kinds
            return None
    data = path.read_bytes()
    if data.startswith(b"PAR1"):
        try:
            file = pq.ParquetFile(path)
            rows = sum(file.read_row_group(n).num_rows for n in range(file.num_row_groups))
        except (OSError, pa.ArrowException):
            return None
        return {f"{path.name}, row {n + 1}" for n in range(rows)}
    text = data.removeprefix(b"\xef\xbb\xbf")
    if text.lstrip().startswith(b"["):
        try:
            found = json.loads(text.decode("latin-1"), parse_int=float)
        except (ValueError, RecursionError):
            return None
        return {f"{path.name}, record {n + 1}" for n in range(len(found))}
    if not text.lstrip().startswith(b"{"):
        return None
    return {f"{path.name}, line {n + 1}" for n, line in enumerate(text.split(b"\n")) if line.strip()}


def test_mutated_files(models: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    import datasets

    count = Count()
    good = [control(Random(0), 3 * n, {}) for n in range(CONTROLS)]
    datasets.disable_progress_bars()

    def run(rng: Random) -> None:
        for _ in range(FILES):
            with tempfile.TemporaryDirectory(dir=tmp_path) as name:
                folder = Path(name)
                (folder / "good.jsonl").write_text("".join(json.dumps(record) + "\n" for record in good))
                kind = rng.choice(("lines", "list", "parquet", "saved"))
                target = saved(folder / "file") if kind == "saved" else folder / "file"
                data = spoil_file(rng, target.read_bytes() if kind == "saved" else small_file(rng, kind))
                note(repr(data[:2000]))
                target.write_bytes(data)
                registry = {name: {"json_path": name} for name in ("good.jsonl", "file")}
                (folder / "registry.json").write_text(json.dumps({"datasets": registry}))
                expected = rows_of(folder / "file")
                count.files += 1
                if expected is None:
                    with pytest.raises(DataError):
                        prepare_data(options(folder, models, rng))
                    count.refused += 1
                else:
                    expected |= {f"good.jsonl, line {n + 1}" for n in range(CONTROLS)}
                    check(prepare_data(options(folder, models, rng)), expected, count)

    fuzzed(-(-MUTANTS // BATCH), run)
    with capsys.disabled():
        print(count)
