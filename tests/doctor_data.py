"""A data set without a fault, and every fault that `vlft doctor` looks for, each seeded by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS = "chart table picture colour shape circle square triangle number word left right above below red green".split()


def photo(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """Soft blobs, as unlike each other as photographs are."""
    rng = np.random.default_rng(seed)
    cells = rng.uniform(0, 255, (12, 16, 3)).astype(np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def form(seed: int) -> Image.Image:
    """One printed form with a number of its own: to the eye, all of these are one picture."""
    from PIL import ImageDraw, ImageFont

    page = Image.new("RGB", (800, 1000), "white")
    draw, small = ImageDraw.Draw(page), ImageFont.load_default(24)
    draw.text((50, 40), "ACME Corporation, Invoice", font=ImageFont.load_default(40), fill="black")
    for line in range(10):
        draw.text((50, 150 + line * 70), f"Item {line}, a description of it", font=small, fill="black")
    rng = np.random.default_rng(seed)
    for line in range(10):
        draw.text((620, 150 + line * 70), f"{rng.uniform(10, 999):.2f}", font=small, fill="black")
    return page


def ask(name: str, question: str, answer: str, *pictures: str) -> dict[str, Any]:
    return {
        "id": name,
        "messages": [
            {"role": "user", "content": "<image>" * len(pictures) + question},
            {"role": "assistant", "content": answer},
        ],
        "images": list(pictures),
    }


@dataclass
class Set:
    """Data sets on their way to a folder; a fault changes them."""

    folder: Path
    sets: dict[str, list[Any]] = field(default_factory=dict)
    specs: dict[str, dict[str, Any]] = field(default_factory=dict)
    words: dict[str, Any] = field(default_factory=dict)
    """Options of the command line."""

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def save(self, name: str, picture: Image.Image, **how: Any) -> str:
        picture.save(self.images / name, **how)
        return name

    def write(self) -> Path:
        """Write files and registry; returns the registry's path."""
        datasets = {}
        for name, records in self.sets.items():
            lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
            (self.folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            datasets[name] = {"json_path": f"{name}.jsonl", "image_root": "images", **self.specs.get(name, {})}
        path = self.folder / "registry.json"
        path.write_text(json.dumps({"datasets": datasets}))
        return path


def clean(folder: Path, n: int = 80) -> Set:
    """`n` records that train and 40 that are held out, each with a picture of its own: nothing to find."""
    made = Set(folder)
    made.images.mkdir(parents=True)
    for name, count, first in (("train", n, 0), ("held", 40, 1000)):
        records = []
        for i in range(count):
            word, other = WORDS[i % len(WORDS)], WORDS[(i // 16 + i) % len(WORDS)]
            picture = made.save(f"{name}{i}.jpg", photo(first + i), quality=90)
            question = f"{name}: what is the {word} in this picture and where is the {other}"
            records.append(ask(f"{name}-{i}", question, f"{name} number {i} is a {other} {word} on the left", picture))
        made.sets[name] = records
        made.specs[name] = {"split": "eval" if name == "held" else "train"}
    made.words = {"max_bad_fraction": 0.5}
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Faults: each changes a clean set


def _answer(record: dict[str, Any], text: str) -> None:
    record["messages"][1]["content"] = text


def empty_answer(s: Set) -> None:
    _answer(s.sets["train"][7], "  ")


def bad_json(s: Set) -> None:
    s.sets["train"][3] = '{"id": "train-3", '


def missing_picture(s: Set) -> None:
    s.sets["train"][5]["images"] = ["nowhere.jpg"]


def too_few_pictures(s: Set) -> None:
    s.sets["train"][12]["messages"][0]["content"] = "<image><image>compare them"


def special_token(s: Set) -> None:
    s.sets["train"][13]["messages"][0]["content"] = "<image>say <|im_end|>"


def too_long(s: Set) -> None:
    _answer(s.sets["train"][9], "the red circle " * 3000)


def too_many_bad(s: Set) -> None:
    empty_answer(s)
    s.words["max_bad_fraction"] = 0.001


def truncated(s: Set) -> None:
    """The header is right, so that only decoding tells."""
    path = s.images / "train11.jpg"
    path.write_bytes(path.read_bytes()[:-1500])


def many_truncated(s: Set) -> None:
    truncated(s)
    s.words["max_bad_fraction"] = 0.001


def one_repeats(s: Set) -> None:
    s.sets["train"].append(s.sets["train"][0] | {"id": "again"})


def many_repeat(s: Set) -> None:
    s.sets["train"] += [record | {"id": f"again-{n}"} for n, record in enumerate(s.sets["train"][60:70])]


def contradiction(s: Set) -> None:
    twin = json.loads(json.dumps(s.sets["train"][0]))
    _answer(twin, "something else on the right")
    s.sets["train"].append(twin | {"id": "other-answer"})


def exact_leak(s: Set) -> None:
    """The same bytes under another name."""
    (s.images / "held2.jpg").write_bytes((s.images / "train2.jpg").read_bytes())


def scaled_leak(s: Set) -> None:
    """Another size, another file."""
    s.save("held2.jpg", photo(2).resize((200, 150)), quality=60)


def shared_file(s: Set) -> None:
    """A held-out sample of two pictures, one of which also trains: their hashes as samples differ."""
    s.sets["held"][2] = ask("held-2", "compare these", "both are red", "train2.jpg", "held2.jpg")


def copies(s: Set) -> None:
    s.save("train20.jpg", photo(21).resize((250, 188)), quality=70)


def outside_box(s: Set) -> None:
    _answer(s.sets["train"][4], '{"bbox_2d": [10, 20, 900, 100], "label": "red"}')


def pixels_for_model(s: Set) -> None:
    """Pixels of the stored picture, which the model sees much smaller; the registry does not say so."""
    s.words["max_pixels"] = 12544
    for record in s.sets["train"][:6]:
        _answer(record, '{"bbox_2d": [200, 120, 310, 230], "label": "red"}')


def perhaps_box(s: Set) -> None:
    """Four numbers in brackets, which may be years."""
    _answer(s.sets["train"][14], "the years [2019, 2020, 2021, 2022]")


def empty_box(s: Set) -> None:
    _answer(s.sets["train"][15], '{"bbox_2d": [60, 20, 40, 100], "label": "red"}')


def converted_box(s: Set) -> None:
    s.specs["train"]["box_format"] = "pixels"
    outside_box(s)


def literal_image(s: Set) -> None:
    s.sets["train"][6]["messages"][0]["content"] = [
        {"type": "image", "image": "train6.jpg"},
        {"type": "text", "text": "<image>what is this"},
    ]
    del s.sets["train"][6]["images"]


def other_script(s: Set) -> None:
    for record in s.sets["train"][30:50]:
        record["messages"][0]["content"] = f"<image>这张图片里有什么颜色和形状的东西呢 {record['id']}"


def other_languages(s: Set) -> None:
    """What is held out is Chinese, answers included."""
    s.sets["held"] += [ask(f"h{i}", "", "", s.save(f"h{i}.jpg", photo(5000 + i))) for i in range(20)]
    for i, record in enumerate(s.sets["held"]):
        record["messages"][0]["content"] = f"<image>这张图片里有什么颜色和形状的东西呢，第{i}个"
        _answer(record, f"红色的圆形和绿色的方形，编号{i}")


def common_answer(s: Set) -> None:
    for record in s.sets["train"][:60]:
        _answer(record, "yes it is")


def cut_answer(s: Set) -> None:
    _answer(s.sets["held"][1], "the red circle is left of the green square " * 20)
    s.words |= {"eval_dataset_scripts": "held:exact_match", "eval_max_new_tokens": 40}


def nothing_held_out(s: Set) -> None:
    del s.sets["held"]


def scored_but_not_held_out(s: Set) -> None:
    s.words["eval_dataset_scripts"] = "train:exact_match"


def nothing_trains(s: Set) -> None:
    s.specs["train"]["split"] = "eval"


def small_print(s: Set) -> None:
    s.save("train8.jpg", photo(8, 3200, 2400), quality=80)


def upscaled(s: Set) -> None:
    s.words["min_pixels"] = 200_000


def wrong_limits(s: Set) -> None:
    s.words["max_pixels"] = 1000


def no_list(s: Set) -> None:
    s.specs["train"] |= {"json_path": "broken.json"}
    (s.folder / "broken.json").write_text('[{"id": 1},')


def wrong_key(s: Set) -> None:
    s.specs["train"]["image_folder"] = "images"


def only_part(s: Set) -> None:
    s.words["sample_limit"] = 50


FAULTS: dict[Callable[[Set], None], set[tuple[str, str]]] = {
    empty_answer: {("warning", "empty_answer")},
    bad_json: {("warning", "bad_json")},
    missing_picture: {("warning", "image_missing")},
    too_few_pictures: {("warning", "image_count")},
    special_token: {("warning", "special_token")},
    too_long: {("warning", "too_long")},
    too_many_bad: {("error", "bad_fraction"), ("warning", "empty_answer")},
    truncated: {("warning", "image_truncated")},
    many_truncated: {("error", "bad_fraction"), ("warning", "image_truncated")},
    one_repeats: {("note", "duplicates")},
    many_repeat: {("warning", "duplicates")},
    contradiction: {("note", "contradictions")},
    exact_leak: {("error", "leak_exact")},
    scaled_leak: {("error", "leak")},
    shared_file: {("error", "leak")},
    copies: {("note", "near_duplicates")},
    outside_box: {("error", "box_outside")},
    pixels_for_model: {("error", "box_outside"), ("note", "shrunk")},
    perhaps_box: {("warning", "box_outside")},
    empty_box: {("warning", "box_empty")},
    converted_box: {("warning", "bad_box")},
    literal_image: {("warning", "placeholder")},
    other_script: {("note", "other_script")},
    other_languages: {("warning", "languages")},
    common_answer: {("note", "answer_common")},
    cut_answer: {("warning", "answer_cut")},
    nothing_held_out: {("warning", "no_held_out")},
    scored_but_not_held_out: {("error", "not_held_out")},
    nothing_trains: {("error", "nothing_left")},
    small_print: {("note", "shrunk")},
    upscaled: {("note", "upscaled")},
    wrong_limits: {("error", "max_pixels")},
    no_list: {("error", "unreadable"), ("error", "nothing_left")},
    wrong_key: {("error", "registry")},
    only_part: {("note", "sampled")},
}
"""Fault -> grades and checks of all that is found, and nothing else."""
ALONE = {nothing_held_out, nothing_trains, wrong_limits, no_list, wrong_key, only_part, pixels_for_model, upscaled,
         other_languages, converted_box, scored_but_not_held_out, common_answer}  # fmt: skip
"""Faults that hide others."""
