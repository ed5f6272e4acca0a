"""The data as training would read it: counts, what would be left out and why, duplicates, leaks, lengths.

Everything here works on the index's flat arrays, 40 bytes a record more; nothing is decoded.

Legend: N samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import xxhash

from vlft.data.index import Index, Shard, open_index
from vlft.data.ledger import LedgerEntry, check_bad_fraction
from vlft.data.mixing import mix64
from vlft.data.prepare import DataOptions, check_specs, fitted_of, nothing_left
from vlft.data.registry import read_registry
from vlft.data.sample import Fitted, split
from vlft.data.tokens import Chat
from vlft.doctor.findings import Finding, Grade
from vlft.errors import ConfigError, DataError

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
EXAMPLES = 3
MANY = 0.01
"""Share from which duplicates and leaks weigh more."""
_UPSCALED = 0.25
"""Share of pictures that the model sees larger than they are, from which it is told."""
_SHRUNK = 4.0
"""Stored pixels over the model's, from which small print is lost."""
_COMMON = 0.5
"""Share of one and the same answer from which it is told."""
ENOUGH = 50
"""Samples below which shares say nothing."""


def find(grade: Grade, check: str, text: str, examples: Sequence[str] = ()) -> Finding:
    return Finding(grade, "data", check, text, examples=tuple(examples))


@dataclass(frozen=True)
class Records:
    """What training would have in its hands before the first step."""

    options: DataOptions
    chat: Chat
    index: Index
    fitted: Fitted
    train: Ints
    held_out: Ints

    @property
    def names(self) -> list[str]:
        return [spec.name for spec in self.index.specs]

    @property
    def used(self) -> Ints:
        return np.sort(np.concatenate([self.train, self.held_out]))

    @cached_property
    def is_held_out(self) -> npt.NDArray[np.bool_]:
        """(N,)"""
        mask = np.zeros(len(self.index), np.bool_)
        mask[self.held_out] = True
        return mask

    def name_of(self, i: int) -> str:
        return self.names[int(self.index.dataset[i])]

    def place(self, i: int) -> str:
        return f"{self.name_of(i)} ({self.index.place(i)})"

    @cached_property
    def hashes(self) -> tuple[Hashes, Hashes, Ints, Hashes]:
        """(N,) of all tokens, of those before the first learnt one, number of learnt ones, of the learnt ones."""
        whole, asked, learnt, said = [], [], [], []
        for i in range(len(self.index)):
            ids, supervised = self.index.tokens(i)
            first = int(np.argmax(supervised))
            whole.append(xxhash.xxh3_64_intdigest(ids.tobytes() + supervised.tobytes()))
            asked.append(xxhash.xxh3_64_intdigest(ids[:first].tobytes()))
            answer = ids[supervised]
            learnt.append(len(answer))
            said.append(xxhash.xxh3_64_intdigest(answer.tobytes()))
        return (
            np.array(whole, np.uint64), np.array(asked, np.uint64), np.array(learnt, np.int64),
            np.array(said, np.uint64),
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Reading, with a finding for each thing that would end a training


def read(options: DataOptions, chat: Chat) -> tuple[Records | None, list[Finding]]:
    """Registry, index, fit and split as `vlft.data.prepare` does them, going on where it would stop.

    Returns:
        None where there is nothing to look at.
    """
    o = options
    found: list[Finding] = []
    try:
        specs = read_registry(o.registry, o.names)
    except ConfigError as error:
        return None, [find("error", "registry", problem) for problem in error.problems]
    try:
        check_specs(o, specs)
    except ConfigError as error:
        found += [find("error", "registry", problem) for problem in error.problems]
    shards: list[Shard] = []
    for spec in specs:
        found += [find("note", "registry", note.rstrip(".") + ".") for note in spec.notes]
        try:
            one = open_index(
                [spec], chat, cache_dir=o.cache_dir, workers=max(1, o.num_workers),
                allow_remote=o.allow_remote_images, progress=o.progress,
            )  # fmt: skip
        except DataError as error:
            found.append(find("error", "unreadable", f"data set {spec.name}: {error}"))
            continue
        shards += one.shards
    if not shards:
        return None, found
    index = Index(shards, o.cache_dir, o.allow_remote_images)
    found += check_ledger(index.ledger, index.total, o.max_bad_fraction)
    try:
        fitted = fitted_of(o, index, chat)
    except DataError as error:
        return None, [*found, find("error", "too_long", str(error))]
    found += check_too_long(fitted.ledger)
    train, held_out = split(index, index.specs, o.train_split_ratio, usable=fitted.usable)
    if not len(train):
        found.append(find("error", "nothing_left", str(nothing_left(o, index, fitted, len(held_out)))))
    return Records(o, chat, index, fitted, train, held_out), found


def _by_reason(ledger: Sequence[LedgerEntry]) -> Iterator[tuple[str, str, list[LedgerEntry]]]:
    groups: dict[tuple[str, str], list[LedgerEntry]] = {}
    for entry in ledger:
        groups.setdefault((entry.dataset, entry.reason), []).append(entry)
    for (dataset, reason), entries in sorted(groups.items(), key=lambda item: -len(item[1])):
        yield dataset, reason, entries


def left_out(dataset: str, reason: str, messages: Sequence[str]) -> Finding:
    """Records that training would leave out for `reason`."""
    many = f"{len(messages):,} records" if len(messages) > 1 else "1 record"
    text = f"{many} of {dataset} would be left out ({reason}); repair them, each says how."
    return find("warning", reason, text, messages[:EXAMPLES])


def check_ledger(ledger: Sequence[LedgerEntry], total: int, max_bad_fraction: float) -> Iterator[Finding]:
    """Records that training would leave out, with the reasons that its ledger would hold."""
    try:
        check_bad_fraction(ledger, total, max_bad_fraction)
    except DataError as error:
        yield find("error", "bad_fraction", str(error).partition(" The first:")[0])
    for dataset, reason, entries in _by_reason(ledger):
        yield left_out(dataset, reason, [f"{e.id}: {e.message}" for e in entries])


def check_too_long(ledger: Sequence[LedgerEntry]) -> Iterator[Finding]:
    for dataset, reason, entries in _by_reason(ledger):
        yield left_out(dataset, reason, [f"{e.id}: {e.message}" for e in entries])


# ---------------------------------------------------------------------------------------------------------------------
# Checks over the arrays


def share(part: int, whole: int) -> str:
    """`3 of 120 (2.5%)`."""
    return f"{part:,} of {whole:,} ({part / whole:.1%})" if whole else f"{part:,}"


def check_held_out(data: Records) -> Iterator[Finding]:
    if len(data.held_out):
        return
    text = (
        "no sample is held out, so nothing tells when to stop; lower --train_split_ratio, or give a data set the "
        'registry key "split": "eval".'
    )
    yield find("warning", "no_held_out", text)


def _keys(data: Records, tokens: Hashes) -> Hashes:
    """(N,) equal where pictures and tokens are; a text-only sample's own hash holds its answer and is left out."""
    pictures = np.where(data.index.n_images > 0, data.index.split_hash, np.uint64(0))
    return mix64(pictures) ^ mix64(tokens, 1)


def check_duplicates(data: Records) -> Iterator[Finding]:
    """The same pictures, questions and answers more than once."""
    whole, _, _, _ = data.hashes
    keys = _keys(data, whole)[data.used]
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
    if not len(again):
        return
    pairs = [(int(data.used[order[n]]), int(data.used[order[n - 1]])) for n in again[:EXAMPLES]]
    extra, total = len(again), len(data.used)
    text = (
        f"{share(extra, total)} samples repeat another one, pictures and words alike, and count twice; remove them, "
        'or give the set a "weight" where it is meant.'
    )
    examples = [f"{data.place(a)} repeats {data.place(b)}" for a, b in pairs]
    yield find("warning" if extra > MANY * total else "note", "duplicates", text, examples)


def check_exact_leaks(data: Records) -> Iterator[Finding]:
    """Held-out samples whose pictures (or text), to the byte, also train: only the registry's `split` can do that."""
    if not len(data.held_out):
        return
    both = np.isin(data.index.split_hash[data.held_out], data.index.split_hash[data.train])
    leaked = data.held_out[both]
    if not len(leaked):
        return
    examples = []
    for i in leaked[:EXAMPLES].tolist():
        other = data.train[np.flatnonzero(data.index.split_hash[data.train] == data.index.split_hash[i])[0]]
        examples.append(f"{data.place(i)} is held out, {data.place(int(other))} trains")
    many = len(leaked) > MANY * len(data.held_out)
    text = (
        f"{share(len(leaked), len(data.held_out))} held-out samples show what also trains, to the byte, so that "
        'evaluations flatter the model; remove them from one side, or give both sets the same "split".'
    )
    yield find("error" if many else "warning", "leak_exact", text, examples)


def check_contradictions(data: Records) -> Iterator[Finding]:
    """One question about the same pictures with several answers."""
    whole, asked, _, _ = data.hashes
    questions, answers = _keys(data, asked)[data.used], whole[data.used]
    order = np.lexsort((answers, questions))
    same = questions[order][1:] == questions[order][:-1]
    differ = np.flatnonzero(same & (answers[order][1:] != answers[order][:-1])) + 1
    if not len(differ):
        return
    pairs = [(int(data.used[order[n - 1]]), int(data.used[order[n]])) for n in differ[:EXAMPLES]]
    text = (
        f"{share(len(differ), len(data.used))} samples ask what another one asks of the same pictures and learn "
        "another answer; right for "
        "captions, wrong for facts: keep one."
    )
    yield find("note", "contradictions", text, [f"{data.place(a)} and {data.place(b)}" for a, b in pairs])


def check_answers(data: Records, longest: int, scored: Sequence[str]) -> Iterator[Finding]:
    """Answers that evaluations cut off, and one answer that outweighs the rest.

    Args:
        longest: --eval_max_new_tokens.
        scored: data sets of --eval_dataset_scripts.
    """
    _, _, learnt, said = data.hashes
    for n, name in enumerate(data.names):
        mine = data.used[data.index.dataset[data.used] == n]
        if not len(mine):
            continue
        held = mine[data.is_held_out[mine]]
        cut = held[learnt[held] > longest]
        if len(cut) and name in scored:
            text = (
                f"{share(len(cut), len(held))} held-out answers of {name} are longer than --eval_max_new_tokens "
                f"{longest}, so that generated ones are cut off and score low; raise it to {int(learnt[cut].max())}."
            )
            yield find("warning", "answer_cut", text, [data.place(int(i)) for i in cut[:EXAMPLES]])
        answers, counts = np.unique(said[mine], return_counts=True)
        most = int(counts.max())
        if len(mine) >= ENOUGH and most > _COMMON * len(mine):
            i = int(mine[np.flatnonzero(said[mine] == answers[np.argmax(counts)])[0]])
            text = (
                f"{share(most, len(mine))} samples of {name} have one and the same answer, so that a model that "
                "always gives it looks good; balance the set, or look at more than accuracy."
            )
            yield find("note", "answer_common", text, [f"{data.place(i)}: {answer_of(data, i)}"])


def answer_of(data: Records, i: int) -> str:
    """What is learnt of sample `i`, in words, cut to a line."""
    ids, supervised = data.index.tokens(i)
    return line(str(data.chat.tokenizer.decode(ids[supervised].astype(np.int64), skip_special_tokens=True)))


def line(text: str, most: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def check_sizes(data: Records) -> Iterator[Finding]:
    """Pictures that the model sees much smaller or larger than they are."""
    index, fitted = data.index, data.fitted
    if not len(index.width):
        return
    stored = index.width.astype(np.int64) * index.height
    final = fitted.final_width * fitted.final_height
    owner = np.repeat(np.arange(len(index)), index.n_images)
    shrunk = np.flatnonzero(stored > _SHRUNK * final)
    if len(shrunk):
        worst = int(shrunk[np.argmax(stored[shrunk] / final[shrunk])])
        text = (
            f"{share(len(shrunk), len(stored))} pictures have more than {_SHRUNK:.0f} times the pixels that the model "
            "sees, and small print is lost; raise --max_pixels and --max_seq_length if it matters."
        )
        sizes = f"{index.width[worst]} x {index.height[worst]} becomes {fitted.final_width[worst]} x "
        yield find(
            "note", "shrunk", text, [f"{data.place(int(owner[worst]))}: {sizes}{fitted.final_height[worst]} pixels"]
        )
    small = int((stored < data.options.min_pixels).sum())
    if small > _UPSCALED * len(stored):
        text = (
            f"{share(small, len(stored))} pictures are smaller than --min_pixels {data.options.min_pixels} and are "
            "scaled up, which costs tokens and adds nothing; lower it if it was raised."
        )
        yield find("note", "upscaled", text)


def counts(data: Records) -> list[tuple[str, ...]]:
    """Rows for the page: data set, formats, records, left out, train, held out, pictures, median tokens."""
    rows: list[tuple[str, ...]] = []
    long = Counter(entry.dataset for entry in data.fitted.ledger)
    for n, shard in enumerate(data.index.shards):
        total = int(shard.meta["total"])
        train, held = (int((data.index.dataset[ids] == n).sum()) for ids in (data.train, data.held_out))
        mine = data.used[data.index.dataset[data.used] == n]
        formats = ", ".join(sorted(shard.meta["formats"])) or "none"
        tokens = f"{int(np.median(data.fitted.length[mine])):,}" if len(mine) else "–"
        rows.append(
            (
                shard.spec.name, formats, f"{total:,}", f"{total - len(shard) + long[shard.spec.name]:,}", f"{train:,}",
                f"{held:,}", f"{int(data.index.n_images[mine].sum()):,}", tokens,
            )
        )  # fmt: skip
    return rows


def examine(data: Records, longest: int, scored: Sequence[str]) -> list[Finding]:
    """Every check that decodes nothing."""
    if not len(data.used):
        return []
    checks = (check_held_out, check_duplicates, check_exact_leaks, check_contradictions, check_sizes)
    found = [finding for check in checks for finding in check(data)]
    return [*found, *check_answers(data, longest, scored)]
