"""The index: everything that planning needs to know about every record, built once from headers and texts, in flat
memory.

One folder per data set under `<cache_dir>/index/`, named by a key of its content; it holds one raw array per field
(`_ARRAYS`) that is mapped, not read. Each sample's tokens, pictures and paths lie end to end in arenas (compressed
sparse rows).

Legend: N samples, I images, T tokens with ONE image token per picture.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from vlft.data import images
from vlft.data.formats import ImageRef, Record, parse_record
from vlft.data.ledger import LedgerEntry
from vlft.data.mixing import mix64
from vlft.data.registry import DatasetSpec
from vlft.data.sources import Chunk, RawRow, Source, open_source
from vlft.data.tokens import Chat, PictureSize
from vlft.errors import DataError, RecordError
from vlft.words import counted

INDEX_VERSION = 4
"""Raise it when the same data would be indexed otherwise by the code below."""
BOXED, HAS_BOXES = 1, 2
"""Bits of `flags`: the text must be written again with the final sizes; it speaks of places in the picture."""
LEARNT = np.uint32(1 << 31)
"""Bit of a stored token id: it is supervised."""
_INLINE, _PATH = "inline:", "path:"
_LONGEST_MESSAGE = 500
_LEFT_SECONDS = 24 * 3600
"""A half-built index to which nobody has written for so long is one whose builder was killed."""
_RETRY_SECONDS = 60
"""Age of an index from which failed downloads are tried again; the other ranks of a run open it sooner than that."""

_ARRAYS: dict[str, type[np.generic]] = {
    "offset": np.int64,  # (N,) place of the record in its file
    "length": np.int64,  # (N,) bytes of it
    "row": np.int64,  # (N,) line, record or row number from 0
    "n_tokens": np.int32,  # (N,)
    "n_learnt": np.int32,  # (N,) of them supervised
    "n_images": np.int32,  # (N,)
    "split_hash": np.uint64,  # (N,) of the pictures' contents, or of the text
    "text_hash": np.uint64,  # (N,) of the tokens, and which of them are supervised
    "flags": np.uint8,  # (N,)
    "width": np.int32,  # (I,) pixels after EXIF orientation
    "height": np.int32,  # (I,)
    "n_ref": np.int32,  # (I,) bytes of the picture's reference
    "tokens": np.uint32,  # arena of ids, bit 31: supervised
    "refs": np.uint8,  # arena of UTF-8 references
}
Array: TypeAlias = npt.NDArray[Any]


# ------------------------------------------------------------------ one chunk, in a worker


@dataclass(frozen=True)
class _Rejected:
    row: int
    id: str | None
    reason: str
    message: str
    watch: tuple[str, int, int] | None
    """The picture that failed as (path, time, size): the index is stale when it changes."""


@dataclass
class _Part:
    """What a chunk becomes."""

    arrays: dict[str, Array]
    rejected: list[_Rejected]
    rows: int
    records: int
    formats: dict[str, int]


@dataclass
class _Job:
    """What every worker of one data set knows."""

    spec: DatasetSpec
    source: Source
    chat: Chat
    cache_dir: Path
    allow_remote: bool

    @cached_property
    def probe(self) -> Any:
        """Size and hash of a file; kept, since many questions are asked about one picture."""
        return lru_cache(maxsize=8192)(_probe)


def _probe(source: images.Source) -> tuple[int, int, int]:
    return (*images.probe(source), images.content_hash(source))


class _Collector:
    def __init__(self, job: _Job) -> None:
        self.job = job
        self.lists: dict[str, list[Any]] = {name: [] for name in _ARRAYS}
        self.rejected: list[_Rejected] = []
        self.formats: dict[str, int] = {}

    def add(self, row: RawRow) -> None:
        """Index one record, or note why it cannot be used."""
        seen: list[images.Source] = []
        try:
            if isinstance(row.raw, RecordError):
                raise row.raw
            record = parse_record(row.raw, self.job.spec, str(row.row))
            self._index(row, record, seen)
        except RecordError as error:
            if error.reason == "unreachable":
                # Kept in the cache, it would be left out of every later run as well.
                raise DataError(f"{error} Then start again; nothing was written yet.") from None
            self._reject(row, error.reason, str(error), _watch(error, seen, self.job, row))
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
            # A shape that no reader foresaw: one record must not end a run, and must not vanish either.
            self._reject(row, "bad_record", f"the record cannot be read ({type(error).__name__}: {error}).", None)

    def _reject(self, row: RawRow, reason: str, message: str, watch: tuple[str, int, int] | None) -> None:
        short = message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + " ..."
        self.rejected.append(_Rejected(row.row, _own_id(row.raw), reason, short, watch))

    def _index(self, row: RawRow, record: Record, seen: list[images.Source]) -> None:
        sizes, hashes, refs = [], [], []
        for n, ref in enumerate(record.images):
            source = _resolve(ref, self.job)
            seen.append(source)
            width, height, digest = self.job.probe(source) if not isinstance(source, bytes) else _probe(source)
            sizes.append(PictureSize(width, height))
            hashes.append(digest)
            refs.append(f"{_INLINE}{n}" if isinstance(source, bytes) else f"{_PATH}{source}")
        encoded = self.job.chat.encode(record, sizes)
        lists = self.lists
        lists["offset"].append(row.offset)
        lists["length"].append(row.length)
        lists["row"].append(row.row)
        lists["n_tokens"].append(len(encoded.input_ids))
        lists["n_learnt"].append(np.count_nonzero(encoded.supervised))
        lists["n_images"].append(len(sizes))
        lists["split_hash"].append(_split_hash(record, hashes))
        lists["flags"].append(BOXED * encoded.boxed + HAS_BOXES * record.has_boxes)
        tokens = encoded.input_ids | np.where(encoded.supervised, LEARNT, np.uint32(0))
        lists["tokens"].append(tokens)
        lists["text_hash"].append(xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens).tobytes()))
        for size, text in zip(sizes, refs, strict=True):
            data = text.encode("utf-8", "surrogateescape")
            lists["width"].append(size.width)
            lists["height"].append(size.height)
            lists["n_ref"].append(len(data))
            lists["refs"].append(np.frombuffer(data, np.uint8))
        self.formats[record.format] = self.formats.get(record.format, 0) + 1

    def part(self, rows: int) -> _Part:
        arrays: dict[str, Array] = {}
        for name, kind in _ARRAYS.items():
            values = self.lists[name]
            if name in ("tokens", "refs"):
                arrays[name] = np.concatenate(values) if values else np.zeros(0, kind)
            else:
                arrays[name] = np.array(values, kind)
        records = len(self.lists["row"]) + len(self.rejected)
        return _Part(arrays, self.rejected, rows, records, self.formats)


def _own_id(raw: Any) -> str | None:
    own = raw.get("id") if isinstance(raw, dict) else None
    if not isinstance(own, str | int) or own == "":
        return None
    # Ids are written to files and terminals: no half surrogate pairs, no megabytes.
    return str(own)[:_LONGEST_MESSAGE].encode("utf-8", "replace").decode()


def _resolve(ref: ImageRef, job: _Job) -> images.Source:
    spec = job.spec
    return images.resolve(ref, spec.root, spec.allowed_roots, allow_remote=job.allow_remote, cache_dir=job.cache_dir)


def _watch(error: RecordError, seen: Sequence[images.Source], job: _Job, row: RawRow) -> tuple[str, int, int] | None:
    """The file whose change would make this record usable."""
    if not error.reason.startswith("image_") or error.reason in ("image_count", "image_in_answer"):
        return None
    if error.reason != "image_missing":
        return _stamp(str(seen[-1])) if seen and not isinstance(seen[-1], bytes) else None
    record = parse_record(row.raw, job.spec, str(row.row))
    if len(seen) >= len(record.images):
        return None
    ref = record.images[len(seen)]
    return _stamp(os.path.realpath(os.path.join(job.spec.root, os.path.expanduser(ref.value))))


def _stamp(path: str) -> tuple[str, int, int]:
    try:
        stat = os.stat(path)
    except OSError:
        return path, 0, -1
    return path, stat.st_mtime_ns, stat.st_size


def _split_hash(record: Record, hashes: Sequence[int]) -> int:
    if hashes:
        return xxhash.xxh3_64_intdigest(np.array(sorted(set(hashes)), np.uint64).tobytes())
    text = "\x1e".join(f"{turn.role}\x1f{turn.text}" for turn in record.turns)
    return xxhash.xxh3_64_intdigest(text.encode())


_JOB: _Job | None = None


def _start_worker(job: _Job) -> None:
    global _JOB
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a pool of threads does not survive a fork
    _JOB = job


def _work(chunk: Chunk) -> _Part:
    assert _JOB is not None
    return _index_chunk(_JOB, chunk)


def _index_chunk(job: _Job, chunk: Chunk) -> _Part:
    rows, count = job.source.read(chunk)
    collector = _Collector(job)
    for row in rows:
        collector.add(row)
    return collector.part(count)


# ------------------------------------------------------------------ building


def _parts(job: _Job, workers: int) -> Iterator[tuple[Chunk, _Part]]:
    """Chunks in order with what they became; a few at a time are in flight, so memory stays flat."""
    chunks = job.source.chunks()
    head = list(itertools.islice(chunks, 2))
    if workers <= 1 or len(head) < 2:  # a pool costs more than a small set
        for chunk in itertools.chain(head, chunks):
            yield chunk, _index_chunk(job, chunk)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    flying: deque[tuple[Chunk, Future[_Part]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job,)) as pool:
        try:
            for chunk in itertools.chain(head, chunks):
                flying.append((chunk, pool.submit(_work, chunk)))
                if len(flying) > 3 * workers:
                    done, future = flying.popleft()
                    yield done, future.result()
            while flying:
                done, future = flying.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise DataError(
                f"a process that indexed {job.spec.json_path} was killed, most likely for lack of memory; "
                "use fewer --num_workers."
            ) from None
        finally:
            for _, future in flying:
                future.cancel()


def _build(job: _Job, folder: Path, workers: int, progress: bool) -> None:
    """Write the index of one data set into `folder`, which is new."""
    from tqdm import tqdm

    rows = records = usable = 0
    formats: dict[str, int] = {}
    watch: list[tuple[str, int, int]] = []
    reasons: set[str] = set()
    spec, source = job.spec, job.source
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in _ARRAYS}
        ledger = stack.enter_context((folder / "ledger.jsonl").open("w", encoding="utf-8"))
        bar = stack.enter_context(
            tqdm(total=source.weight, desc=f"indexing {spec.name}", unit="", disable=not progress, unit_scale=True)
        )
        for chunk, part in _parts(job, workers):
            part.arrays["row"] += rows
            for name, file in files.items():
                part.arrays[name].tofile(file)
            for item in part.rejected:
                place = f"{source.word} {item.row + rows + 1}"
                message = f"{source.path.name}, {place}: {item.message}"
                entry = LedgerEntry(spec.name, item.id if item.id is not None else place, item.reason, message)
                ledger.write(json.dumps(entry.json(), ensure_ascii=True) + "\n")
                reasons.add(item.reason)
                if item.watch is not None and len(watch) < 10_000:
                    watch.append(item.watch)
            rows += part.rows
            records += part.records
            usable += len(part.arrays["row"])
            for name, count in part.formats.items():
                formats[name] = formats.get(name, 0) + count
            bar.update(chunk.weight)
    meta: dict[str, Any] = {"total": records, "usable": usable, "formats": formats, "watch": watch}
    meta |= {"retry": "remote_failed" in reasons, "built": time.time()}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _key(job: _Job) -> str:
    spec = job.spec
    state = {
        "version": INDEX_VERSION,
        "chat": job.chat.fingerprint(),
        "source": job.source.digest(),
        "spec": spec.model_dump(
            mode="json", include={"format", "system", "columns", "tags", "box_format", "allowed_roots"}
        ),
        "root": str(spec.root),
        "remote": job.allow_remote,
        "max_image_pixels": images.MAX_IMAGE_PIXELS,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(state, sort_keys=True).encode())


def _is_current(folder: Path) -> bool:
    """The folder is whole, and no picture that was missing or broken has changed since."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if meta["retry"] and time.time() - meta["built"] > _RETRY_SECONDS:
        return False
    return all(list(_stamp(path)) == [path, time, size] for path, time, size in meta["watch"])


def _open_one(
    spec: DatasetSpec, chat: Chat, cache_dir: Path, workers: int, allow_remote: bool, progress: bool
) -> Shard:
    base = cache_dir / "index"
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in spec.name)
    source = open_source(spec.json_path, cache_dir / "tables")
    job = _Job(spec, source, chat, cache_dir, allow_remote)
    key = _key(job)
    folder = base / f"{name}-{key}"
    if not _is_current(folder):
        base.mkdir(parents=True, exist_ok=True)
        _remove_left(base, name)
        made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=base))
        try:
            _build(job, made, workers, progress)
            _publish(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return Shard(folder, spec, source)


def _remove_left(base: Path, name: str) -> None:
    """What builders that were killed left."""
    for left in (*base.glob(f".{glob.escape(name)}-*"), *base.glob(".old-*")):
        with contextlib.suppress(OSError):  # another process may remove it, or finish it
            if time.time() - max(path.stat().st_mtime for path in (*left.iterdir(), left)) > _LEFT_SECONDS:
                shutil.rmtree(left)


def _publish(made: Path, folder: Path) -> None:
    """Put a finished index in its place; of two processes that built the same one, either's will do."""
    for _ in range(10):
        try:
            os.replace(made, folder)
            return
        except OSError:
            if _is_current(folder):
                return
            with tempfile.TemporaryDirectory(prefix=".old-", dir=folder.parent) as old, contextlib.suppress(OSError):
                os.replace(folder, Path(old) / "index")  # readers that have it open keep their mapping
    raise DataError(f"{folder} cannot be replaced by a newer index; remove it.")


def open_index(
    specs: Sequence[DatasetSpec],
    chat: Chat,
    *,
    cache_dir: Path,
    workers: int = 1,
    allow_remote: bool = False,
    progress: bool = False,
) -> Index:
    """The index of some data sets, from the cache where their content, options, tokenizer and template are unchanged.

    Args:
        cache_dir: indices, remote pictures and unpacked tables go here. Two processes may build at once.
        workers: processes that read, check and tokenise.
        progress: show a bar.
    Raises:
        DataError: a whole file cannot be read. Records that cannot be used are in `Index.ledger`.
    """
    shards = [_open_one(spec, chat, Path(cache_dir), workers, allow_remote, progress) for spec in specs]
    return Index(shards, Path(cache_dir), allow_remote)


# ------------------------------------------------------------------ reading


def _mapped(path: Path, kind: type[np.generic]) -> Array:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, kind)
    return np.memmap(path, kind, mode="r")


def _starts(lengths: Array) -> npt.NDArray[np.int64]:
    out = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, dtype=np.int64, out=out[1:])
    return out


@dataclass
class Shard:
    """The index of one data set; arrays are mapped on first use, in each process anew."""

    folder: Path
    spec: DatasetSpec
    source: Source
    _cache: dict[str, Array] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def __getattr__(self, name: str) -> Array:
        if name.startswith("_") or name.removesuffix("_starts") not in (*_ARRAYS, "token", "image", "ref"):
            raise AttributeError(name)
        if name not in self._cache:
            if name.endswith("_starts"):
                lengths = {"token_starts": "n_tokens", "image_starts": "n_images", "ref_starts": "n_ref"}[name]
                self._cache[name] = _starts(getattr(self, lengths))
            else:
                self._cache[name] = _mapped(self.folder / f"{name}.bin", _ARRAYS[name])
        return self._cache[name]

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def meta(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        return loaded


class Index:
    """All samples of all data sets under one numbering: those of the first set, then those of the second, and so on."""

    def __init__(self, shards: Sequence[Shard], cache_dir: Path, allow_remote: bool) -> None:
        self.shards = list(shards)
        self.cache_dir = cache_dir
        self.allow_remote = allow_remote
        self.starts = _starts(np.array([len(s) for s in self.shards], np.int64))
        self.ledger: list[LedgerEntry] = []
        for shard in self.shards:
            with (shard.folder / "ledger.jsonl").open(encoding="utf-8") as file:
                self.ledger += [LedgerEntry(**json.loads(line)) for line in file]

    def __getstate__(self) -> dict[str, Any]:
        # Workers map the arrays again and need no ledger.
        return {k: self.__dict__[k] for k in ("shards", "cache_dir", "allow_remote", "starts")} | {"ledger": []}

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def specs(self) -> list[DatasetSpec]:
        return [shard.spec for shard in self.shards]

    @property
    def total(self) -> int:
        """Records of all files: usable ones and those in the ledger."""
        return sum(int(shard.meta["total"]) for shard in self.shards)

    @property
    def formats(self) -> dict[str, dict[str, int]]:
        """For each data set the readers that were chosen, with the number of records."""
        return {shard.spec.name: dict(shard.meta["formats"]) for shard in self.shards}

    def _joined(self, name: str) -> Array:
        if len(self.shards) == 1:
            array: Array = getattr(self.shards[0], name)
            return array
        kind = _ARRAYS[name]
        return np.concatenate([np.zeros(0, kind), *(getattr(shard, name) for shard in self.shards)])

    @cached_property
    def dataset(self) -> npt.NDArray[np.int32]:
        """(N,) number of each sample's data set in `specs`."""
        return np.repeat(np.arange(len(self.shards), dtype=np.int32), np.diff(self.starts))

    @cached_property
    def n_images(self) -> npt.NDArray[np.int32]:
        """(N,) pictures of each sample."""
        return self._joined("n_images")

    @cached_property
    def n_tokens(self) -> npt.NDArray[np.int32]:
        """(N,) tokens of each sample, one for each picture."""
        return self._joined("n_tokens")

    @cached_property
    def n_learnt(self) -> npt.NDArray[np.int32]:
        """(N,) tokens of each sample that are learnt."""
        return self._joined("n_learnt")

    @cached_property
    def image_starts(self) -> npt.NDArray[np.int64]:
        """(N + 1,) borders of each sample's pictures in `width` and `height`."""
        return _starts(self.n_images)

    @cached_property
    def width(self) -> npt.NDArray[np.int32]:
        """(I,) pixels as stored, after EXIF orientation."""
        return self._joined("width")

    @cached_property
    def height(self) -> npt.NDArray[np.int32]:
        """(I,) pixels as stored, after EXIF orientation."""
        return self._joined("height")

    @cached_property
    def split_hash(self) -> npt.NDArray[np.uint64]:
        """(N,) equal for samples about the same pictures; of the text where there is none."""
        return self._joined("split_hash")

    @cached_property
    def text_hash(self) -> npt.NDArray[np.uint64]:
        """(N,) of each sample's tokens, and of which of them are supervised."""
        return self._joined("text_hash")

    @cached_property
    def flags(self) -> npt.NDArray[np.uint8]:
        """(N,) bits BOXED and HAS_BOXES."""
        return self._joined("flags")

    @cached_property
    def identity(self) -> npt.NDArray[np.uint64]:
        """(N,) of (name of the data set, row): the same whatever other sets are in the run."""
        parts = [
            mix64(shard.row.astype(np.uint64), xxhash.xxh3_64_intdigest(shard.spec.name.encode()))
            for shard in self.shards
        ]
        return np.concatenate([np.zeros(0, np.uint64), *parts])

    def warm(self) -> None:
        """Compute what workers look into before they fork, so that they share it instead of each making its own."""
        for name in ("dataset", "image_starts", "width", "height", "flags", "identity"):
            getattr(self, name)
        for shard in self.shards:
            for name in ("token_starts", "image_starts", "ref_starts"):
                getattr(shard, name)

    def locate(self, i: int) -> tuple[Shard, int]:
        """The shard of sample `i` and its place there."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        n = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.shards[n], i - int(self.starts[n])

    def record(self, i: int) -> Any:
        """The raw record of sample `i`, read again from its file."""
        shard, k = self.locate(i)
        return shard.source.record(int(shard.offset[k]), int(shard.length[k]))

    def parsed(self, i: int) -> Record:
        """The typed record of sample `i`."""
        shard, k = self.locate(i)
        return parse_record(self.record(i), shard.spec, f"{shard.source.word} {int(shard.row[k]) + 1}")

    def place(self, i: int) -> str:
        """Where sample `i` is, unique in its data set: `toy.jsonl, line 4`."""
        shard, k = self.locate(i)
        return f"{shard.source.path.name}, {shard.source.word} {int(shard.row[k]) + 1}"

    def sample_id(self, i: int) -> str:
        """The record's own `id`, or its line."""
        shard, k = self.locate(i)
        try:
            own = _own_id(self.record(i))
        except (RecordError, OSError):
            own = None
        return own if own is not None else f"{shard.source.word} {int(shard.row[k]) + 1}"

    def tokens(self, i: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """(T,) ids and which are supervised."""
        shard, k = self.locate(i)
        stored = np.asarray(shard.tokens[shard.token_starts[k] : shard.token_starts[k + 1]])
        return stored & ~LEARNT, (stored & LEARNT) != 0

    def sources(self, i: int) -> list[images.Source]:
        """Where the pictures of sample `i` are: checked paths, or bytes taken from the record.

        Raises:
            RecordError: the record no longer reads as it did.
        """
        shard, k = self.locate(i)
        refs = [self._ref(shard, n) for n in range(int(shard.image_starts[k]), int(shard.image_starts[k + 1]))]
        if not any(ref.startswith(_INLINE) for ref in refs):
            return [ref.removeprefix(_PATH) for ref in refs]
        record = self.parsed(i)
        return [
            record.images[int(ref.removeprefix(_INLINE))].data if ref.startswith(_INLINE) else ref.removeprefix(_PATH)
            for ref in refs
        ]

    @staticmethod
    def _ref(shard: Shard, n: int) -> str:
        start, end = int(shard.ref_starts[n]), int(shard.ref_starts[n + 1])
        return shard.refs[start:end].tobytes().decode("utf-8", "surrogateescape")

    def sizes(self, i: int) -> list[tuple[int, int]]:
        """(width, height) of the pictures of sample `i` as stored."""
        span = slice(int(self.image_starts[i]), int(self.image_starts[i + 1]))
        return list(zip(self.width[span].tolist(), self.height[span].tolist(), strict=True))


def summary(index: Index) -> Iterable[str]:
    """One line for each data set, for the start of a run: samples, readers, rejected records."""
    for shard in index.shards:
        readers = ", ".join(f"{name} {count}" for name, count in sorted(shard.meta["formats"].items())) or "none"
        rejected = int(shard.meta["total"]) - len(shard)
        ledger = f", {rejected} in the ledger" if rejected else ""
        blind = ", none of them with a picture" if len(shard) and not shard.n_images.any() else ""
        yield f"{shard.spec.name}: {counted(len(shard), 'sample')} ({readers}){blind}{ledger}"
