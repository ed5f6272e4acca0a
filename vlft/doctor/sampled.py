"""What the looked-into samples say: pictures that cannot be decoded, boxes, texts, and the contact sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from vlft.doctor import contents, copies, languages
from vlft.doctor.contents import Seen
from vlft.doctor.findings import Finding, Grade, Shot
from vlft.doctor.looked import Sampled
from vlft.doctor.records import ENOUGH, EXAMPLES, find, left_out, share
from vlft.doctor.shots import captioned, shot

_OTHER_MIX = 0.3
"""Distance of two mixes of languages from which it is told."""
_OTHER_SCRIPT = 0.05
_SHEET = 8
"""Pictures of each data set and side on the contact sheet."""
_MOST_SHEET = 96


def check_sampled(s: Sampled) -> Iterator[Finding]:
    """What part was looked into, and what that means."""
    looked, total = len(s.chosen.ids), len(s.data.used)
    if looked == total:
        return
    sides = ((s.chosen.train, s.data.train), (s.chosen.held_out, s.data.held_out))
    train, held = (len(some) / max(1, len(every)) for some, every in sides)
    text = (
        f"pictures and texts of {share(looked, total)} samples were looked into, chosen by a hash: all that is said "
        "of decoding, near duplicates, boxes and languages is of these, and a leak shows with a chance of "
        f"{train * held:.0%}; give --sample_limit 0 for all."
    )
    yield find("note", "sampled", text)


def check_decoding(s: Sampled) -> Iterator[Finding]:
    """Pictures and records that the loader would stumble over in the middle of a run."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in s.seen:
        if one.failed:
            groups.setdefault((s.data.name_of(one.sample), one.failed[0]), []).append(one.failed[1])
    bad = sum(map(len, groups.values()))
    most = s.data.options.max_bad_fraction
    if bad > most * len(s.seen):
        text = (
            f"{share(bad, len(s.seen))} samples that were looked into cannot be decoded, more than --max_bad_fraction "
            f"{most:g}, at which training stops; repair them or raise it."
        )
        yield find("error", "bad_fraction", text)
    for (dataset, reason), messages in groups.items():
        yield left_out(dataset, reason, messages)


# ---------------------------------------------------------------------------------------------------------------------
# Boxes and texts


def check_boxes(s: Sampled) -> Iterator[Finding]:
    """Boxes that are trained on as they are written, and lie outside or have no area."""
    for n, spec in enumerate(s.data.index.specs):
        mine = [one for one in s.seen if one.boxes and int(s.data.index.dataset[one.sample]) == n]
        bad = [one for one in mine if one.outside]
        if bad:
            yield _outside(s, spec.name, mine, bad)
        empty = [one for one in mine if one.empty]
        if empty:
            text = (
                f"{share(len(empty), len(mine))} samples of {spec.name} with boxes have one without an area (x2 not "
                "above x1, or y2 not above y1); write them as x1, y1, x2, y2."
            )
            yield find("warning", "box_empty", text, [s.data.place(one.sample) for one in empty[:EXAMPLES]])


def _outside(s: Sampled, name: str, mine: Sequence[Seen], bad: Sequence[Seen]) -> Finding:
    count = sum(one.outside for one in bad)
    convention = s.data.chat.family.box_convention
    meant = "thousandths of the picture" if convention == "relative1000" else "pixels of the resized picture"
    advice = "correct them"
    if sum(one.as_pixels for one in bad) == count:
        advice = 'they fit the stored pictures, so give the data set the registry key "box_format": "pixels"'
    text = (
        f"{share(len(bad), len(mine))} samples of {name} with boxes have one outside the picture ({count} boxes, read "
        f"as {s.data.chat.family.title} does, in {meant}); {advice}."
    )
    spelled = [one for one in bad if one.spelled]
    grade: Grade = "error" if len(spelled) > s.data.options.max_bad_fraction * len(mine) else "warning"
    shots = [shot(s.data, one.sample, 0, s.data.place(one.sample), marked=True) for one in bad[:EXAMPLES]]
    examples = tuple(s.data.place(one.sample) for one in bad[:EXAMPLES])
    return Finding(grade, "data", "box_outside", text, examples=examples, shots=tuple(x for x in shots if x))


def check_texts(s: Sampled) -> Iterator[Finding]:
    """Placeholders that stay text, and questions and answers in different scripts."""
    left = [one for one in s.seen if one.placeholder]
    if left:
        kinds = ", ".join(sorted({one.placeholder for one in left}))
        text = (
            f"{share(len(left), len(s.seen))} samples hold {kinds} as plain text, which shows the model nothing; "
            "remove it, or give the pictures as a list beside the text."
        )
        yield find("warning", "placeholder", text, [s.data.place(one.sample) for one in left[:EXAMPLES]])
    other = [one for one in s.seen if one.other_script]
    if len(other) > _OTHER_SCRIPT * len(s.seen):
        text = (
            f"{share(len(other), len(s.seen))} samples ask in one script and answer in another; right for translation "
            "and transcription, otherwise the model learns to change the language."
        )
        yield find("note", "other_script", text, [s.data.place(one.sample) for one in other[:EXAMPLES]])


def mixes(s: Sampled) -> dict[str, tuple[Counter[str], Counter[str], Counter[str]]]:
    """Data set -> languages of its questions, of its answers, of its held-out answers."""
    found = {}
    for n, name in enumerate(s.data.names):
        ids, held = (a[s.data.index.dataset[a] == n] for a in (s.chosen.ids, s.chosen.held_out))
        found[name] = (
            contents.mixes(s.seen, ids, "asked"), contents.mixes(s.seen, ids, "answered"),
            contents.mixes(s.seen, held, "asked"),
        )  # fmt: skip
    return found


def check_languages(s: Sampled) -> Iterator[Finding]:
    """What is held out is asked in other languages than what trains."""
    train, held = (contents.mixes(s.seen, ids, "asked") for ids in (s.chosen.train, s.chosen.held_out))
    for mix in (train, held):
        mix.pop(languages.SHORT, None)
    if min(train.total(), held.total()) < ENOUGH:
        return
    if (apart := languages.apart(train, held)) > _OTHER_MIX:
        text = (
            f"questions that train and those held out are in different languages ({apart:.0%} of them: {_said(train)} "
            f"against {_said(held)}), so that evaluations measure something else; hold out a part of each."
        )
        yield find("warning", "languages", text)


def _said(mix: Counter[str]) -> str:
    return ", ".join(f"{name} {n / mix.total():.0%}" for name, n in mix.most_common(3))


CHECKS = (check_sampled, check_decoding, copies.check_same_pictures, check_boxes, check_texts, check_languages)


def examine(s: Sampled) -> list[Finding]:
    return [finding for check in CHECKS for finding in check(s)]


def contact_sheet(s: Sampled) -> list[tuple[str, list[Shot]]]:
    """(data set and side, pictures with question and answer): the first by the hash that chose the sample."""
    sheet = []
    broken = {one.sample for one in s.seen if one.failed}
    each = max(1, min(_SHEET, _MOST_SHEET // max(1, 2 * len(s.data.names))))
    for n, name in enumerate(s.data.names):
        for side, ids in (("trains", s.chosen.train), ("held out", s.chosen.held_out)):
            mine = ids[(s.data.index.dataset[ids] == n) & (s.data.index.n_images[ids] > 0)]
            order = mine[np.argsort(s.data.index.identity[mine], kind="stable")]
            shots: list[Shot] = []
            for i in order.tolist():
                if len(shots) == each:
                    break
                if i not in broken and (one := captioned(s.data, i)):
                    shots.append(one)
            if shots:
                sheet.append((f"{name}, {side}", shots))
    return sheet
