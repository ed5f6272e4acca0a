"""Where raw records lie: JSON lists, JSONL, Parquet and Hugging Face `datasets` folders, each read at random by
(offset, length).

A source cuts itself into chunks for the workers, reads a chunk, and reads one record again later. For text files a
location is a byte range; for tables it is (chunk << 32 | row, 0).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from vlft.data.patience import patient
from vlft.errors import DataError, RecordError

_CHUNK_BYTES = 1 << 20
_CHUNK_RECORDS = 1000
_WINDOW = 8 << 20
_WHOLE_FILE_HASH = 4 << 30
_EDGE = 1 << 20
_pread = patient(os.pread)


@dataclass(frozen=True)
class Chunk:
    """A piece of work. `weight` is in the unit of `Source.weight`."""

    number: int
    start: int
    end: int
    weight: int
    borders: npt.NDArray[np.int64] | None = None
    """(n, 2) byte offset and length of each record, where only a parser can find them."""


@dataclass(frozen=True)
class RawRow:
    row: int
    """Counts lines or records of the chunk from 0."""
    offset: int
    length: int
    raw: Any
    """The record, or the RecordError that reading it gave."""


class Source(Protocol):
    path: Path
    word: str
    """What a row is called: line, record, row."""
    weight: int
    """Size of the whole, for the progress bar."""

    def digest(self) -> str: ...
    def chunks(self) -> Iterator[Chunk]: ...
    def read(self, chunk: Chunk) -> tuple[Iterable[RawRow], int]: ...
    def record(self, offset: int, length: int) -> Any: ...


def open_source(path: Path, tables: Path) -> Source:
    """The source at `path`, by its content rather than its suffix.

    Args:
        tables: where Parquet files are unpacked for random access.
    Raises:
        DataError: the file is empty or of no known kind.
    """
    if path.is_dir():
        return _open_folder(path, tables)
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder; correct json_path.")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            while not head.removeprefix(b"\xef\xbb\xbf").strip() and (more := file.read(4096)):
                head = more
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the file and its rights.") from None
    if head.startswith(b"PAR1"):
        return ParquetSource(path, (path,), tables)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16; convert it to UTF-8.")
    if head.startswith(b"\x1f\x8b"):
        raise DataError(f"{path} is compressed; unpack it.")
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[":
        return JsonListSource(path)
    if first == b"{":
        return JsonLinesSource(path)
    if not first:
        raise DataError(f"{path} is empty; expected a JSON list, JSONL or Parquet.")
    raise DataError(f"{path} begins with {head[:20]!r}; expected a JSON list, JSONL or Parquet.")


def _open_folder(path: Path, tables: Path) -> Source:
    if (path / "dataset_dict.json").exists():
        parts = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise DataError(f"{path} holds several sets ({parts}); name one of them as json_path.")
    if (path / "state.json").exists():
        return ArrowFolderSource(path)
    files = tuple(sorted(path.glob("*.parquet")))
    if files:
        return ParquetSource(path, files, tables)
    raise DataError(
        f"{path} is neither a saved Hugging Face data set nor a folder of Parquet files; give one of these or a file."
    )


def file_digest(path: Path) -> str:
    """Hash of a file's content; of size, time and both ends beyond 4 GiB."""
    stat = path.stat()
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        if stat.st_size <= _WHOLE_FILE_HASH:
            while block := file.read(_EDGE):
                digest.update(block)
        else:
            digest.update(f"{stat.st_size} {stat.st_mtime_ns} ".encode() + file.read(_EDGE))
            file.seek(-_EDGE, os.SEEK_END)
            digest.update(file.read(_EDGE))
    return digest.hexdigest()


def _parse(data: bytes) -> Any:
    """One JSON value, or the RecordError of reading it."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        return RecordError("bad_json", f"not valid JSON: {error}; repair it.")


class _TextSource:
    """What JSON lists and JSONL share: byte ranges of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weight = path.stat().st_size

    def digest(self) -> str:
        return file_digest(self.path)

    @cached_property
    def _fd(self) -> int:
        return patient(os.open)(self.path, os.O_RDONLY)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "weight": self.weight}  # a descriptor means nothing in another process

    def record(self, offset: int, length: int) -> Any:
        try:
            raw = _parse(_pread(self._fd, length, offset))
        except OSError as error:
            raise RecordError("unreachable", f"{self.path} cannot be read: {error}; look at its disk.") from None
        if isinstance(raw, RecordError):
            raise raw
        return raw


class JsonLinesSource(_TextSource):
    word = "line"

    def chunks(self) -> Iterator[Chunk]:
        with self.path.open("rb") as file:
            start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
            number = 0
            while start < self.weight:
                file.seek(min(start + _CHUNK_BYTES, self.weight))
                file.readline()
                end = file.tell()
                yield Chunk(number, start, end, end - start)
                start, number = end, number + 1

    def read(self, chunk: Chunk) -> tuple[list[RawRow], int]:
        """The rows of a chunk, and how many lines it has; blank lines are no records."""
        data = _pread(self._fd, chunk.end - chunk.start, chunk.start)
        rows: list[RawRow] = []
        at = 0
        lines = data.split(b"\n")
        if lines[-1] == b"":
            lines.pop()
        for n, line in enumerate(lines):
            if line.strip():
                rows.append(RawRow(n, chunk.start + at, len(line), _parse(line)))
            at += len(line) + 1
        return rows, len(lines)


class JsonListSource(_TextSource):
    word = "record"

    def chunks(self) -> Iterator[Chunk]:
        """Borders of the records, found by the C scanner without keeping what it reads."""
        borders: list[tuple[int, int]] = []
        number = 0
        for border in _list_borders(self.path):
            borders.append(border)
            if len(borders) == _CHUNK_RECORDS:
                yield self._chunk(number, borders)
                borders, number = [], number + 1
        if borders:
            yield self._chunk(number, borders)

    @staticmethod
    def _chunk(number: int, borders: list[tuple[int, int]]) -> Chunk:
        start, end = borders[0][0], sum(borders[-1])
        return Chunk(number, start, end, end - start, np.array(borders, np.int64))

    def read(self, chunk: Chunk) -> tuple[list[RawRow], int]:
        assert chunk.borders is not None
        data = _pread(self._fd, chunk.end - chunk.start, chunk.start)
        rows = []
        for n, (offset, length) in enumerate(chunk.borders.tolist()):
            at = offset - chunk.start
            rows.append(RawRow(n, offset, length, _parse(data[at : at + length])))
        return rows, len(rows)


class _Window:
    """A sliding view of a file as latin-1 text, so that positions in it are positions in bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb")
        self.base = 0
        self.text = ""
        self.ended = False

    def more(self, drop: int) -> None:
        """Forget the first `drop` characters and read on; at least as much as is kept, so that growth stays linear."""
        self.base += drop
        self.text = self.text[drop:]
        data = self.file.read(max(_WINDOW, len(self.text)))
        self.ended = not data
        self.text += data.decode("latin-1")

    def fail(self, at: int, what: str) -> DataError:
        line = 1
        with self.path.open("rb") as file:
            left = self.base + at
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                line += block.count(b"\n")
                left -= len(block)
        return DataError(f"{self.path}, line {line}: the JSON list is broken: {what}; repair the file.")


_SPACE = " \t\r\n"


def _skip(window: _Window, at: int) -> int:
    """The position of the next character that is no white space; the window is filled as needed."""
    while True:
        while at < len(window.text) and window.text[at] in _SPACE:
            at += 1
        if at < len(window.text) or window.ended:
            return at
        window.more(at)
        at = 0


def _list_borders(path: Path) -> Iterator[tuple[int, int]]:
    """(byte offset, length) of each item of a JSON list.

    Raises:
        DataError: naming file and line where the list is broken.
    """
    window = _Window(path)
    window.more(0)
    at = _skip(window, 3 if window.text.startswith("\xef\xbb\xbf") else 0)
    if window.text[at : at + 1] != "[":
        raise window.fail(at, f"found {window.text[at : at + 1]!r}, expected '['")
    at = _skip(window, at + 1)
    if window.text[at : at + 1] == "]":
        _check_end(window, at + 1)
        return
    # int refuses more than 4300 digits, which would cost the whole file; the record itself is parsed later.
    decoder = json.JSONDecoder(parse_int=float)
    while True:
        at, end = _item(window, at, decoder)
        yield window.base + at, end - at
        at = _skip(window, end)
        mark = window.text[at : at + 1]
        if mark == "]":
            _check_end(window, at + 1)
            return
        if mark != ",":
            raise window.fail(at, f"found {mark!r}, expected ',' or ']'" if mark else "it ends without ']'")
        at = _skip(window, at + 1)
        if at > _WINDOW:
            window.more(at)
            at = 0


def _check_end(window: _Window, at: int) -> None:
    """Nothing but white space may follow a list: records behind it would be lost in silence."""
    at = _skip(window, at)
    if at < len(window.text):
        raise window.fail(at, f"found {window.text[at : at + 20]!r} behind its ']'")


def _item(window: _Window, at: int, decoder: json.JSONDecoder) -> tuple[int, int]:
    """(start, end) in the window of the item at `at`; more is read while the item reaches the window's end."""
    while True:
        try:
            _, end = decoder.raw_decode(window.text, at)
            if end < len(window.text) or window.ended:
                return at, end
        except RecursionError:
            raise window.fail(at, "its objects are nested too deeply") from None
        except json.JSONDecodeError as error:
            if window.ended:
                raise window.fail(error.pos, error.msg) from None
        window.more(at)
        at = 0


# ------------------------------------------------------------------ tables


def _without_nulls(value: Any) -> Any:
    """Tables give every struct all fields of all rows; a field that is null was not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def _as_object(table: Any, *, ours: bool) -> Any:
    """The only row of a table or batch.

    Args:
        ours: vlft itself wrote it.
    Raises:
        RecordError: it holds a text that is no UTF-8, a date that Python does not know, or is damaged.
    """
    try:
        if not ours:
            table.validate(full=True)  # a damaged offset leads out of the file, and the process dies of it
        return _without_nulls(table.to_pylist()[0])
    except (ValueError, ArithmeticError) as error:  # Arrow's own errors about values are ValueErrors
        raise RecordError("bad_record", f"the row cannot be read: {error}; repair it.") from None


def _row(source: Source, place: int) -> Any:
    """A row of a table, or the RecordError that reading it gave."""
    try:
        return source.record(place, 0)
    except RecordError as error:
        return error


def _line(error: Exception) -> str:
    """Arrow's messages have several lines."""
    return " ".join(str(error).split()).rstrip(".")


class ParquetSource:
    """Parquet cannot be read at random, so each row group is unpacked once into an Arrow file that can be mapped."""

    word = "row"

    def __init__(self, path: Path, files: tuple[Path, ...], tables: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.files = path, files
        # Unpacked rows belong to one content of the files.
        self.tables = tables / xxhash.xxh3_128_hexdigest(self.digest().encode())
        self.groups: list[tuple[int, int, int]] = []  # (file, row group, rows)
        for n, file in enumerate(files):
            try:
                meta = pq.read_metadata(file)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{file} cannot be read as Parquet: {_line(error)}; repair the file.") from None
            self.groups += [(n, g, meta.row_group(g).num_rows) for g in range(meta.num_row_groups)]
        self.weight = sum(rows for _, _, rows in self.groups)
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def digest(self) -> str:
        return " ".join(file_digest(file) for file in self.files)

    def chunks(self) -> Iterator[Chunk]:
        for n, (_, _, rows) in enumerate(self.groups):
            yield Chunk(n, 0, rows, rows)

    def read(self, chunk: Chunk) -> tuple[Iterable[RawRow], int]:
        places = [chunk.number << 32 | n for n in range(chunk.end)]
        # One at a time: a row group's pictures together may be gigabytes.
        return (RawRow(n, place, 0, _row(self, place)) for n, place in enumerate(places)), chunk.end

    def _unpacked(self, number: int) -> Path:
        return self.tables / f"{number:05d}.arrow"

    def _unpack(self, number: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        target = self._unpacked(number)
        self.tables.mkdir(parents=True, exist_ok=True)
        file, group, _ = self.groups[number]
        try:
            table = pq.ParquetFile(self.files[file]).read_row_group(group, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self.files[file]} cannot be read as Parquet: row group {group + 1}: {_line(error)}; repair the file."
            ) from None
        part = target.with_suffix(f".{os.getpid()}.part")
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=64)
        os.replace(part, target)

    def record(self, offset: int, length: int) -> Any:
        import pyarrow as pa

        del length
        number, row = offset >> 32, offset & 0xFFFFFFFF
        if number not in self._open:
            if not self._unpacked(number).exists():
                self._unpack(number)
            reader = pa.ipc.open_file(pa.memory_map(str(self._unpacked(number))))
            # Batches have 64 rows but for a group's own chunk borders, so look the starts up.
            sizes = [reader.get_batch(n).num_rows for n in range(reader.num_record_batches)]
            self._open[number] = (reader, np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))
        reader, starts = self._open[number]
        n = int(np.searchsorted(starts, row, side="right")) - 1
        return _as_object(reader.get_batch(n).slice(row - int(starts[n]), 1), ours=True)


class ArrowFolderSource:
    """A folder of `datasets.Dataset.save_to_disk`; pictures stay encoded."""

    word = "row"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data: Any = None
        self.weight = len(self._load())

    def _load(self) -> Any:
        if self._data is None:
            try:
                import datasets
            except ImportError:
                raise DataError(
                    f"{self.path} is a Hugging Face data set; install 'vlft[datasets]' to read it."
                ) from None
            try:
                self._data = datasets.load_from_disk(str(self.path)).with_format("arrow")
            except Exception as error:
                raise DataError(f"{self.path} cannot be read as a Hugging Face data set: {error}.") from None
        return self._data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}

    def digest(self) -> str:
        parts = []
        for file in sorted(self.path.iterdir()):
            if file.suffix == ".json":
                parts.append(file_digest(file))
            elif file.is_file():
                parts.append(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}")
        return " ".join(parts)

    def chunks(self) -> Iterator[Chunk]:
        for n, start in enumerate(range(0, self.weight, _CHUNK_RECORDS)):
            end = min(start + _CHUNK_RECORDS, self.weight)
            yield Chunk(n, start, end, end - start)

    def read(self, chunk: Chunk) -> tuple[Iterable[RawRow], int]:
        places = range(chunk.start, chunk.end)
        return (RawRow(n, place, 0, _row(self, place)) for n, place in enumerate(places)), len(places)

    def record(self, offset: int, length: int) -> Any:
        del length
        return _as_object(self._load()[offset : offset + 1], ours=False)
