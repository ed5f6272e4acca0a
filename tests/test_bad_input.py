"""Every kind of bad input, as a table: one clear sentence, the right exit code, and no other sample is lost.

Each `Case` spoils one thing of a run that is good otherwise. docs/bad-input.md is the same table in words:
`VLFT_WRITE_DOCS=1 pytest tests/test_bad_input.py -k page` writes it anew.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import command, ledger, metrics

PAGE = Path(__file__).parent.parent / "docs" / "bad-input.md"
LONGEST = 400
"""Characters of a problem's sentence, the work folder's own path not counted."""
ADVICE = re.compile(
    r"\b(give|use|leave|leave it out|correct|check|choose|add|remove|repair|raise|lower|write|make|set|see|crop|scale|"
    r"download|install|delete|replace|rename|convert|unpack|switch|copy|pass|fill|move|put|start|go on)\b"
    # Showing what would be right is an advice too.
    r"|expected|did you mean|the nearest is|should be|takes one|lists all|they have|are written|installed:|commands:|"
    r"supported:|has \w+\.$",
    re.IGNORECASE,
)
RED, GREEN, BLUE, WHITE, GREY = (220, 40, 40), (40, 200, 60), (50, 70, 220), (255, 255, 255), (128, 128, 128)
TOY = {"json_path": "toy.jsonl", "image_root": "images"}
SPOILT = "r3"
"""Id of the record that the cases about one record or picture change."""


# ---------------------------------------------------------------------------------------------------------------------
# A good run, and what can be spoilt of it


def halves(left: tuple[int, int, int] = RED, right: tuple[int, int, int] = BLUE, size: int = 64) -> Image.Image:
    """Two colours side by side: shows a turned or mirrored picture."""
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[:, : size // 2], pixels[:, size // 2 :] = left, right
    return Image.fromarray(pixels)


@dataclass
class Work:
    """A run of six records (one without a picture, one with two), held as plain objects until `argv` writes it."""

    folder: Path
    model: Path
    finished: Path
    """A finished run of the strategy `lora`, saved at steps 1 and 2. Read only."""
    patch: pytest.MonkeyPatch
    options: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    """Stand after the options."""
    whole: list[str] | None = None
    """The whole command line, instead of options and words."""
    spec: dict[str, Any] = field(default_factory=lambda: dict(TOY))
    registry: str | None = None
    data: bytes | None = None
    strategy: str | None = "lora"
    then: Callable[[], None] = lambda: None
    """Runs after the first good run, where a case needs two."""
    twice: bool = False

    def __post_init__(self) -> None:
        self.images = self.folder / "images"
        self.images.mkdir()
        self.records: list[Any] = []
        for i in range(6):
            names = [f"r{i}-{k}.png" for k in range((1, 1, 2, 1, 1, 0)[i])]
            for name in names:
                halves().save(self.images / name)
            question = "<image>" * len(names) + "what colour is the picture"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"red and blue {i}"}]
            self.records.append({"id": f"r{i}", "messages": turns, "images": names})

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = self.records[3]
        return record

    @property
    def picture(self) -> Path:
        return self.images / "r3-0.png"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def argv(self) -> list[str]:
        text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in self.records)
        (self.folder / "toy.jsonl").write_bytes(
            text.encode("utf-8", "surrogateescape") if self.data is None else self.data
        )
        registry = self.folder / "registry.json"
        registry.write_text(self.registry or json.dumps({"datasets": {"toy": self.spec}}))
        if self.whole is not None:
            return self.whole
        good = {"per_device_train_batch_size": 3, "max_steps": None, "epochs": 1, "max_bad_fraction": 0.5}
        words = command(self.model, registry, self.output, self.strategy or "lora", **{**good, **self.options})
        if self.strategy is None:
            at = words.index("--tuning_strategy")
            del words[at : at + 2]
        return words + self.words

    def take_over(self) -> None:
        """Make the finished run's folder this one's, as if it had run here."""
        shutil.copytree(self.finished, self.folder, dirs_exist_ok=True)
        for state in self.output.glob("checkpoints/*/state.json"):
            state.write_text(state.read_text().replace(str(self.finished), str(self.folder)))

    def own_model(self) -> Path:
        """A copy of the checkpoint to spoil."""
        self.model = Path(shutil.copytree(self.model, self.folder / "model"))
        return self.model


Spoil = Callable[[Work], Any]


def option(**options: Any) -> Spoil:
    return lambda w: w.options.update(options)


def words(*more: str) -> Spoil:
    return lambda w: w.words.extend(more)


def strategy(name: str | None, **options: Any) -> Spoil:
    def spoil(w: Work) -> None:
        w.strategy = name
        w.options |= options

    return spoil


def yaml(text: str | bytes | None) -> Spoil:
    """The run's options from a file with this text."""

    def spoil(w: Work) -> None:
        path = w.folder / "run.yaml"
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        w.words += ["--config", str(path)]

    return spoil


def policy(text: str) -> Spoil:
    """A file of --augmentation with this text."""

    def spoil(w: Work) -> None:
        (w.folder / "policy.yaml").write_text(text)
        w.options["augmentation"] = str(w.folder / "policy.yaml")

    return spoil


def registry(text: str) -> Spoil:
    return lambda w: setattr(w, "registry", text)


def entry(**keys: Any) -> Spoil:
    return lambda w: w.spec.update(keys)


def data(content: bytes, **keys: Any) -> Spoil:
    def spoil(w: Work) -> None:
        w.data = content
        w.spec |= keys

    return spoil


def replaced(value: Any) -> Spoil:
    """Another record in the place of r3; a text is written as it is."""

    def spoil(w: Work) -> None:
        w.records[3] = value

    return spoil


def record(**keys: Any) -> Spoil:
    return lambda w: w.record.update(keys)


def turns(*pairs: tuple[str, Any], **keys: Any) -> Spoil:
    return record(messages=[{"role": role, "content": text} for role, text in pairs], **keys)


def asked(question: Any, answer: Any = "red and blue", **keys: Any) -> Spoil:
    return turns(("user", question), ("assistant", answer), **keys)


def picture(made: Image.Image | bytes, name: str = "r3-0.png", **save: Any) -> Spoil:
    """The picture of r3 replaced by a file."""

    def spoil(w: Work) -> None:
        w.record["images"] = [name]
        if isinstance(made, bytes):
            (w.images / name).write_bytes(made)
        else:
            made.save(w.images / name, **save)

    return spoil


def encoded(made: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    made.save(out, kind)
    return out.getvalue()


def truncated(w: Work) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    whole = encoded(Image.fromarray(noise))
    w.picture.write_bytes(whole[: len(whole) // 2])


def bad_checksum(w: Work) -> None:
    whole = bytearray(w.picture.read_bytes())
    at = whole.index(b"IDAT")
    whole[at + 8] ^= 0xFF
    w.picture.write_bytes(bytes(whole))


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header promises side x side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def outside(w: Work) -> Path:
    path = w.folder / "secret.png"
    halves().save(path)
    return path


def linked_outside(w: Work) -> None:
    w.picture.unlink()
    w.picture.symlink_to(outside(w))


def dots_outside(w: Work) -> None:
    outside(w)
    w.record["images"] = ["../secret.png"]


def absolute_outside(w: Work) -> None:
    w.record["images"] = [str(outside(w))]


def changed_afterwards(w: Work) -> None:
    """The index of a first run is in the cache when the picture is replaced."""
    w.twice = True
    w.then = lambda: halves(size=96).save(w.picture)


def gone_afterwards(w: Work) -> None:
    w.twice = True
    w.then = w.picture.unlink


def animated() -> bytes:
    out = io.BytesIO()
    frames = [halves(RED, BLUE), halves(GREEN, GREEN)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


def rotated() -> bytes:
    """Stored with red above blue; EXIF says that the top of the scene is at the right (orientation 8)."""
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 8
    halves().transpose(Image.Transpose.ROTATE_270).save(out, "JPEG", quality=95, exif=exif)
    return out.getvalue()


def deep_grey() -> Image.Image:
    return Image.fromarray(np.full((64, 64), 128 * 257, np.uint16))


def transparent() -> Image.Image:
    made = halves(RED, RED).convert("RGBA")
    made.paste((0, 0, 0, 0), (32, 0, 64, 64))
    return made


def palette() -> Image.Image:
    return halves().convert("P", palette=Image.Palette.ADAPTIVE)


def at_min(w: Work) -> None:
    w.options |= {"max_seq_length": 40}


def long_record(question_words: int = 400, size: int = 64) -> Spoil:
    def spoil(w: Work) -> None:
        asked("<image>" + "what colour " * question_words)(w)
        halves(size=size).save(w.picture)

    return spoil


def both(*spoils: Spoil) -> Spoil:
    def spoil(w: Work) -> None:
        for one in spoils:
            one(w)

    return spoil


def model_path(name: str) -> Spoil:
    return lambda w: setattr(w, "model", Path(name) if name.startswith("/") else name)


def model_file(name: str, change: Callable[[bytes], bytes] | None) -> Spoil:
    """A file of the checkpoint rewritten, or removed by None."""

    def spoil(w: Work) -> None:
        path = w.own_model() / name
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))

    return spoil


def in_json(**keys: Any) -> Callable[[bytes], bytes]:
    return lambda old: json.dumps(json.loads(old) | keys).encode()


def without_template(w: Work) -> None:
    folder = w.own_model()
    for path in folder.glob("chat_template*"):
        path.unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))


def without_tokenizer(w: Work) -> None:
    for path in w.own_model().glob("tokenizer*"):
        path.unlink()


def without_weight(w: Work) -> None:
    from safetensors.torch import load_file, save_file

    path = w.own_model() / "model.safetensors"
    tensors = load_file(path)
    del tensors[sorted(n for n in tensors if "down_proj" in n)[0]]
    save_file(tensors, path, {"format": "pt"})


def pickled(w: Work) -> None:
    import torch
    from safetensors.torch import load_file

    path = w.own_model() / "model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


def wrong_shape(w: Work) -> None:
    from safetensors.torch import load_file, save_file

    path = w.own_model() / "model.safetensors"
    tensors = load_file(path)
    name = sorted(n for n in tensors if "down_proj" in n)[0]
    tensors[name] = tensors[name][:-8].contiguous()
    save_file(tensors, path, {"format": "pt"})


def template(change: Callable[[str], str]) -> Spoil:
    def spoil(w: Work) -> None:
        path = w.own_model() / "chat_template.jinja"
        path.write_text(change(path.read_text()))

    return spoil


def output_used(w: Work) -> None:
    w.output.mkdir()
    (w.output / "notes.txt").write_text("mine")


def output_is_a_file(w: Work) -> None:
    w.output.write_text("mine")


def swapped(old: str, new: str) -> Spoil:
    """Another path in the command line, relative to the work folder."""

    def spoil(w: Work) -> None:
        w.whole = [str(w.folder / new) if word == str(w.folder / old) else word for word in w.argv()]

    return spoil


def resuming(change: Callable[[Path], Any] = lambda out: None, wanted: str = "latest", **options: Any) -> Spoil:
    """The finished run, changed, and gone on with; `{out}` in `wanted` is its folder."""

    def spoil(w: Work) -> None:
        w.take_over()
        change(w.output)
        w.options |= {"resume_from_checkpoint": wanted.format(out=w.output), "epochs": 2, "save_steps": 1, **options}

    return spoil


def flip_byte(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(bytes(whole))


def merging(change: Callable[[Work, Path], Any] = lambda w, model: None) -> Spoil:
    """`vlft merge` of the finished run's result, changed."""

    def spoil(w: Work) -> None:
        w.take_over()
        result = w.output / "model"
        w.whole = ["merge", str(result), "--output_dir", str(w.folder / "merged")]
        change(w, result)

    return spoil


def merge_used(w: Work, model: Path) -> None:
    del model
    (w.folder / "merged").mkdir()
    (w.folder / "merged" / "notes.txt").write_text("mine")


def merge_whole(w: Work, model: Path) -> None:
    del model
    assert w.whole is not None
    w.whole[1] = str(w.model)


def adapter_json(**keys: Any) -> Callable[[Work, Path], Any]:
    def change(w: Work, model: Path) -> None:
        del w
        path = model / "adapter_config.json"
        path.write_bytes(in_json(**keys)(path.read_bytes()))

    return change


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def script(text: str | None, dataset: str = "toy", **options: Any) -> Spoil:
    def spoil(w: Work) -> None:
        path = w.folder / "my_metric.py"
        if text is not None:
            path.write_text(text)
        w.options |= {"eval_dataset_scripts": f"{dataset}:{path}", **options}

    return spoil


def missing(package: str) -> Callable[[Work], None]:
    return lambda w: w.patch.setitem(sys.modules, package, None)


# ---------------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Case:
    name: str
    wrong: str
    """What is wrong, in words for the page."""
    spoil: Spoil
    says: tuple[str, ...] = ()
    """Parts of the sentence: the place, what was found, what to do."""
    exit: int = 0
    reason: str = ""
    """Of the spoilt record's line in the ledger; the run goes on with all others."""
    colours: tuple[tuple[float, float, tuple[int, int, int]], ...] = ()
    """(x, y, RGB) at fractions of the spoilt picture's width and height, as the model gets it."""
    problems: int = 1
    loads: bool = False
    """The weights must be looked at to see it."""


LEFT_RIGHT = ((0.2, 0.5, RED), (0.8, 0.5, BLUE))

TABLE: dict[str, list[Case]] = {
    "Command line": [
        Case("unknown flag", "a flag that is not there", words("--learning_rate_vti", "1e-5"),
             ("--learning_rate_vti is not an option", "the nearest is 'learning_rate_vit'"), exit=2),
        Case("rival flag", "a flag of another project", words("--vit_lr", "1e-5"),
             ("--vit_lr is not an option of vlft", "--learning_rate_vit"), exit=2),
        Case("flag twice", "a flag written twice", words("--epochs", "2"),
             ("--epochs is given twice", "leave one out"), exit=2),
        Case("no value", "a flag without its value", words("--max_steps"),
             ("--max_steps needs a value", "give a whole number above 0"), exit=2),
        Case("empty value", "an empty value, as from an unset shell variable", words("--dataset_names", ""),
             ("--dataset_names has an empty value", "give one or more words"), exit=2),
        Case("two values", "two values where one is taken", words("--seed", "1", "2"),
             ("--seed takes one value", "give a whole number"), exit=2),
        Case("wrong type", "a word for a number", option(epochs="many"),
             ("--epochs is 'many'", "give a number above 0"), exit=2),
        Case("out of range", "a number out of range", option(train_split_ratio=1.5),
             ("--train_split_ratio is '1.5'", "give a number above 0 and at most 1"), exit=2),
        Case("no such choice", "a choice that is not there", option(on_too_long="shrnk"),
             ("--on_too_long is 'shrnk'", "the nearest is 'shrink'", "give one of shrink, drop, error"), exit=2),
        Case("several at once", "three mistakes in one command",
             both(option(epochs=0, train_split_ratio=2), words("--learning_rate_vti", "1")),
             ("3 problems", "--epochs", "--train_split_ratio", "--learning_rate_vti"), exit=2, problems=3),
        Case("contradiction", "two options against each other", option(min_pixels=9000, max_pixels=4000),
             ("--min_pixels is 9000, above max_pixels 4000", "raise --max_pixels"), exit=2),
        Case("switch with a value", "a value after a switch", words("--no-use_wandb", "please"),
             ("--no-use_wandb takes no value", "leave that out"), exit=2),
        Case("project without tracker", "an option of a tracker that is off", option(wandb_project="mine"),
             ("--wandb_project is given, but nothing is logged there", "add --use_wandb or leave it out"), exit=2),
        Case("answers without scripts", "how answers are generated, where none are", option(eval_limit=5),
             ("--eval_limit is 5, but no answers are generated", "add --eval_dataset_scripts or leave it out"), exit=2),
        Case("word before options", "a word before the first option", lambda w: w.argv() and setattr(
             w, "whole", ["train", "now", *w.argv()]),
             ("'now' stands before the first option", "options are written --name value"), exit=2),
        Case("unknown command", "a command that is not there", lambda w: setattr(w, "whole", ["trian", *w.argv()]),
             ("'trian' is not a command", "the nearest is 'train'"), exit=2),
        Case("unknown augmentation", "an augmentation policy that is not there", option(augmentation="geometrik"),
             ("--augmentation geometrik: there is no such policy or file", "the nearest is 'geometric'"), exit=2),
        Case("wrong augmentation", "a file of augmentation with two mistakes",
             policy("ops:\n  - RandomFlip\n  - RandomCrop: {size: [8, 8]}\n"),
             ("op 1 (RandomFlip): kornia.augmentation has no such op", "op 2 (RandomCrop): would change"),
             exit=2, problems=2),
        Case("unknown deepspeed name", "a DeepSpeed configuration that is not there", option(deepspeed="zer9"),
             ("--deepspeed zer9: there is no such file", "give a path or a bundled name"), exit=2),
    ],
    "Strategy": [
        Case("no strategy", "no strategy", strategy(None),
             ("--tuning_strategy is missing", "give a word"), exit=2),
        Case("unknown strategy", "a strategy that is not there", strategy("qlorra"),
             ("--tuning_strategy 'qlorra' is unknown", "the nearest is 'qlora'"), exit=2),
        Case("option of another strategy", "an option of another strategy", strategy("full", lora_rank=8),
             ("--lora_rank belongs to lora", "full does not use it: leave it out"), exit=2),
        Case("rate for a frozen part", "a rate for a part that does not train", option(learning_rate_vit=1e-5),
             ("--learning_rate_vit is given, but lora", "keeps the vit frozen", "leave it out or add --train_vit"),
             exit=2),
        Case("nothing trains", "every part switched off",
             both(strategy("full"), words("--no-train_llm", "--no-train_vit", "--no-train_projector")),
             ("--tuning_strategy full: no part is left to train", "switch on one of train_llm"), exit=2),
        Case("too many frozen layers", "more frozen layers than the model has",
             strategy("partial_llm_full_vit", llm_frozen_layers=99),
             ("--llm_frozen_layers is 99, but this model's LLM has 2 layers", "give fewer"), exit=1),
        Case("unknown target modules", "adapters on modules that are not there",
             option(lora_target_modules="q_porj"),
             ("--lora_target_modules names q_porj", "they have", "q_proj"), exit=1, loads=True),
        Case("bitsandbytes missing", "qlora without bitsandbytes",
             both(strategy("qlora"), missing("bitsandbytes")),
             ("qlora needs bitsandbytes", "pip install 'vlft[qlora]'"), exit=1),
    ],
    "YAML": [
        Case("YAML missing", "a file that is not there", yaml(None),
             ("run.yaml: there is no such file", "check the path"), exit=2),
        Case("YAML broken", "no YAML", yaml("epochs: [1"), ("run.yaml is not valid YAML", "correct it"), exit=2),
        Case("YAML empty", "an empty file", yaml(""),
             ("run.yaml holds no options", "write one 'name: value' a line"), exit=2),
        Case("YAML list", "a list", yaml("- epochs\n"),
             ("run.yaml holds no options", "write one 'name: value' a line"), exit=2),
        Case("YAML binary", "bytes that are no text", yaml(b"\x89PNG\xff\xfe"),
             ("run.yaml cannot be read", "give a YAML file"), exit=2),
        Case("YAML unknown key", "a key that is not there", yaml("epocs: 1\n"),
             ("run.yaml: epocs is not an option", "the nearest is 'epochs'"), exit=2),
        Case("YAML key twice", "a key written twice", yaml("seed: 1\nseed: 2\n"),
             ("run.yaml is not valid YAML", "seed is written twice", "correct it"), exit=2),
        Case("YAML wrong type", "a truth value for a number", yaml("warmup_steps: yes\n"),
             ("run.yaml: warmup_steps is 'True'", "give a whole number"), exit=2),
        Case("YAML of a later vlft", "a layout of another version", yaml("schema: 99\nseed: 1\n"),
             ("run.yaml: schema is 99", "use the vlft it is from"), exit=2),
    ],
    "Registry": [
        Case("registry missing", "a registry that is not there",
             swapped("registry.json", "/nowhere/registry.json"),
             ("--dataset_config_path /nowhere/registry.json: there is no such file", "give the registry"), exit=2),
        Case("registry broken", "no JSON", registry('{"datasets": {'),
             ("--dataset_config_path", "is not valid JSON", "correct it"), exit=2),
        Case("registry without datasets", "no data sets", registry("[]"),
             ("--dataset_config_path", 'has no "datasets"', "write"), exit=2),
        Case("registry empty", "an empty table of data sets", registry('{"datasets": {}}'),
             ("registry.json", "at least one data set"), exit=2),
        Case("dataset twice", "the same name twice",
             registry('{"datasets": {"toy": {"json_path": "toy.jsonl"}, "toy": {"json_path": "toy.jsonl"}}}'),
             ("registry.json has the key 'toy' twice", "rename or remove one"), exit=2),
        Case("registry unknown key", "a key that is not there", entry(image_rot="images"),
             ("registry.json: data set 'toy'", "unknown key 'image_rot'", "did you mean 'image_root'?"), exit=2),
        Case("registry rival key", "a key of another project", entry(sample_ratio=0.5),
             ("unknown key 'sample_ratio'", "did you mean 'weight'?"), exit=2),
        Case("registry bad value", "a value out of range", entry(weight=-1),
             ("data set 'toy', key 'weight'", "greater than or equal to 0"), exit=2),
        Case("registry unknown format", "a record format that is not there", entry(format="lava"),
             ("data set 'toy', key 'format'", "did you mean 'llava'?"), exit=2),
        Case("unknown dataset", "a data set that is not there", option(dataset_names="tyo"),
             ("--dataset_names: there is no dataset 'tyo'", "the nearest is 'toy'"), exit=2),
        Case("data file missing", "a data file that is not there", entry(json_path="tyo.jsonl"),
             ("data set 'toy', key 'json_path'", "tyo.jsonl does not exist", "check"), exit=2),
        Case("image folder missing", "a folder of images that is not there", entry(image_root="pictures"),
             ("data set 'toy', key 'image_root'", "pictures does not exist", "check"), exit=2),
        Case("data set's max_pixels too small", "a pixel limit below the smallest size", entry(max_pixels=800),
             ("data set 'toy', key 'max_pixels'", "800", "3136", "raise"), exit=2),
    ],
    "Data file": [
        Case("list broken", "a JSON list that breaks off", data(b'[{"messages": []},\n {"messages": '),
             ("toy.jsonl, line 2: the JSON list is broken", "repair the file"), exit=3),
        Case("file empty", "an empty file", data(b""),
             ("toy.jsonl is empty", "expected a JSON list, JSONL or Parquet"), exit=3),
        Case("no records", "an empty list", data(b"[]"),
             ("no sample is left to train on: of 0 records", "add records"), exit=3),
        Case("another kind of file", "a CSV file", data(b"image,text\na.png,hello\n"),
             ("toy.jsonl begins with", "expected a JSON list, JSONL or Parquet"), exit=3),
        Case("UTF-16", "another encoding", data('{"messages": []}'.encode("utf-16")),
             ("toy.jsonl is UTF-16", "convert it to UTF-8"), exit=3),
        Case("compressed", "a compressed file", data(gzip.compress(b"{}")),
             ("toy.jsonl is compressed", "unpack it"), exit=3),
        Case("Parquet broken", "a Parquet file that breaks off", data(b"PAR1" + b"\0" * 40),
             ("toy.jsonl cannot be read as Parquet", "repair"), exit=3),
        Case("folder of something else", "a folder that is no data set", entry(json_path="images"),
             ("images is neither a saved Hugging Face data set nor a folder of Parquet files", "give"), exit=3),
        Case("too many bad", "more than --max_bad_fraction of the records unusable",
             both(replaced("{broken"), option(max_bad_fraction=0.01)),
             ("1 of 6 records cannot be used (bad_json 1)", "--max_bad_fraction 0.01", "repair them or raise it",
              "toy.jsonl, line 4"), exit=3),
        Case("too many bad in the run", "the same, seen when pictures are decoded",
             both(truncated, option(max_bad_fraction=0.01)),
             ("1 of 6 records cannot be used (image_truncated 1)", "repair them or raise it", "r3-0.png"),
             exit=3, loads=True),
    ],
    "Record": [
        Case("line broken", "a line that is no JSON", replaced('{"messages": ['),
             ("toy.jsonl, line 4", "not valid JSON", "repair"), reason="bad_json"),
        Case("line not UTF-8", "a line in another encoding", replaced('{"id": "r3", "x": "\udcff\udcfe"}'),
             ("toy.jsonl, line 4", "not valid JSON", "repair"), reason="bad_json"),
        Case("no object", "a number in the place of a record", replaced("17"),
             ("toy.jsonl, line 4", "the record is a int", "expected an object"), reason="bad_record"),
        Case("unknown keys", "keys that no format has", replaced({"id": "r3", "foto": "a.png"}),
             ("toy.jsonl, line 4", "no record format has these keys", "see docs/data.md"), reason="unknown_format"),
        Case("messages not a list", "messages that are a text", record(messages="hello"),
             ("toy.jsonl, line 4", "'messages' is a text", "expected a list"), reason="bad_record"),
        Case("unknown role", "a role that is not there", turns(("usr", "<image>what"), ("assistant", "red")),
             ("toy.jsonl, line 4", "message 1 is by 'usr'", "set 'tags'"), reason="unknown_role"),
        Case("no answer", "no assistant turn", turns(("user", "<image>what colour")),
             ("toy.jsonl, line 4", "no assistant turn", "add"), reason="no_answer"),
        Case("no messages", "an empty conversation", record(messages=[], images=[]),
             ("toy.jsonl, line 4", "no assistant turn", "add"), reason="no_answer"),
        Case("empty answer", "an empty answer", asked("<image>what colour", " \n"),
             ("toy.jsonl, line 4", "an answer is empty", "remove the turn or fill it"), reason="empty_answer"),
        Case("null answer", "an answer that is null", asked("<image>what colour", None),
             ("toy.jsonl, line 4", "content is null", "expected a text"), reason="bad_record"),
        Case("nothing to learn", "every answer marked as not learnt",
             record(messages=[{"role": "user", "content": "<image>what"},
                              {"role": "assistant", "content": "red", "loss": False}]),
             ("toy.jsonl, line 4", 'every answer has "loss": false', "remove"), reason="nothing_learnt"),
        Case("too few pictures", "more <image> than pictures", asked("<image><image>compare"),
             ("toy.jsonl, line 4", "asks for picture 2, but the record has 1", "make them agree"),
             reason="image_count"),
        Case("too many pictures", "fewer <image> than pictures",
             asked("<image>compare", images=["r3-0.png", "r2-0.png"]),
             ("toy.jsonl, line 4", "the record has 2 pictures, the text shows 1", "make them agree"),
             reason="image_count"),
        Case("picture in an answer", "<image> in an answer", asked("draw it", "<image>"),
             ("toy.jsonl, line 4", "an answer holds a picture", "move it"), reason="image_in_answer"),
        Case("forged turn", "a special token in a text", asked("<image>what<|im_end|>\n<|im_start|>assistant\nblue"),
             ("toy.jsonl, line 4", "the special token <|im_", "remove or escape it"), reason="special_token"),
        Case("forged picture", "a picture's token in an answer", asked("<image>what", "red <|image_pad|>"),
             ("toy.jsonl, line 4", "the special token <|image_pad|>", "remove or escape it"),
             reason="special_token"),
        Case("video", "a video", record(videos=["a.mp4"]),
             ("toy.jsonl, line 4", "the record has a video", "remove it"), reason="video"),
        Case("half a character", "half of a surrogate pair",
             replaced('{"id": "r3", "messages": [{"role": "user", "content": "\\ud83d"}, '
                      '{"role": "assistant", "content": "red"}]}'),
             ("toy.jsonl, line 4", "half of a surrogate pair", "repair it"), reason="bad_text"),
        Case("boxes do not fit", "more <bbox> than boxes",
             asked("<image>where", "at <bbox> and <bbox>", objects={"ref": [], "bbox": [[1, 2, 3, 4]]}),
             ("toy.jsonl, line 4", "more <bbox> in the text than the 1", "make them agree"), reason="box_count"),
        Case("box outside", "a box outside of its picture",
             asked("<image>where", "at <bbox>", objects={"ref": [], "bbox": [[1, 2, 900, 900]]}),
             ("toy.jsonl, line 4", "outside", "check"), reason="bad_box"),
        Case("assistant first", "an assistant turn at the start",
             turns(("assistant", "hello"), ("user", "<image>what"), ("assistant", "red"))),
        Case("two user turns", "two user turns in a row",
             turns(("user", "<image>look"), ("user", "what colour"), ("assistant", "red"))),
        Case("number as answer", "an answer that is a number", asked("<image>how many", 3)),
    ],
    "Picture": [
        Case("picture missing", "a picture that is not there", record(images=["nowhere.png"]),
             ("toy.jsonl, line 4", "nowhere.png does not exist", "check 'image_root'"), reason="image_missing"),
        Case("picture is a folder", "a folder in the place of a picture",
             both(lambda w: (w.images / "sub").mkdir(), record(images=["sub"])),
             ("toy.jsonl, line 4", "sub is no file", "check 'image_root'"), reason="image_missing"),
        Case("dots lead out", "a path that leaves image_root by ..", dots_outside,
             ("toy.jsonl, line 4", "../secret.png leads to", "add its folder to 'allowed_roots'"),
             reason="path_outside_root"),
        Case("link leads out", "a symbolic link that leaves image_root", linked_outside,
             ("toy.jsonl, line 4", "r3-0.png leads to", "add its folder to 'allowed_roots'"),
             reason="path_outside_root"),
        Case("absolute path", "an absolute path elsewhere", absolute_outside,
             ("toy.jsonl, line 4", "secret.png", "add its folder to 'allowed_roots'"), reason="path_outside_root"),
        Case("remote picture", "an address without --allow_remote_images",
             record(images=["https://example.org/a.png"]),
             ("toy.jsonl, line 4", "https://example.org/a.png is remote", "pass --allow_remote_images"),
             reason="remote_refused"),
        Case("bad address", "an address that does not answer, with --allow_remote_images",
             both(record(images=["http://127.0.0.1:9/a.png"]), option(allow_remote_images=True)),
             ("toy.jsonl, line 4", "http://127.0.0.1:9/a.png cannot be downloaded", "check"),
             reason="remote_failed"),
        Case("no path", "an empty path", record(images=[""]),
             ("toy.jsonl, line 4", "a picture's path is empty", "fill it or remove the picture"), reason="bad_image"),
        Case("no picture", "a file that is no picture", picture(b"<html>404</html>"),
             ("toy.jsonl, line 4", "r3-0.png is no picture", "replace"), reason="image_unreadable"),
        Case("empty picture", "a file of zero bytes", picture(b""),
             ("toy.jsonl, line 4", "r3-0.png is no picture", "replace"), reason="image_unreadable"),
        Case("truncated picture", "a picture that breaks off", truncated,
             ("toy.jsonl, line 4", "r3-0.png cannot be decoded", "replace"), reason="image_truncated"),
        Case("damaged picture", "a picture with a flipped byte", bad_checksum,
             ("toy.jsonl, line 4", "r3-0.png cannot be decoded", "replace"), reason="image_truncated"),
        Case("thin picture", "1 pixel high and 300 wide", picture(Image.new("RGB", (300, 1), RED)),
             ("toy.jsonl, line 4", "r3-0.png is 300 x 1", "crop it"), reason="image_aspect"),
        Case("long picture", "sides 1 to 250", picture(Image.new("RGB", (4, 1000), RED)),
             ("toy.jsonl, line 4", "r3-0.png is 4 x 1000", "crop it"), reason="image_aspect"),
        Case("bomb", "a small file that unpacks to 225 megapixels", picture(bomb(15000)),
             ("toy.jsonl, line 4", "225000000 pixels", "scale it down"), reason="image_bomb"),
        Case("huge bomb", "one that unpacks to 10 gigapixels", picture(bomb(100_000)),
             ("toy.jsonl, line 4", "10000000000 pixels", "scale it down"), reason="image_bomb"),
        Case("bad base64", "a data URI that is no base64",
             record(images=["data:image/png;base64,%%%%"]),
             ("toy.jsonl, line 4", "base64 cannot be decoded", "repair"), reason="bad_image"),
        Case("base64 of no picture", "base64 of something else",
             record(images=["data:image/png;base64," + base64.b64encode(b"hello").decode()]),
             ("toy.jsonl, line 4", "an embedded picture of 5 bytes is no picture", "replace"),
             reason="image_unreadable"),
        Case("picture changed", "a picture replaced since it was indexed", changed_afterwards,
             ("toy.jsonl, line 4", "r3-0.png is 96 x 96 pixels, not the 64 x 64 of the index",
              "delete the cache folder"), reason="image_changed"),
        Case("picture gone", "a picture removed since it was indexed", gone_afterwards,
             ("toy.jsonl, line 4", "r3-0.png does not exist", "put it back"), reason="image_missing"),
        Case("16-bit", "16 bits a channel: scaled to 8", picture(deep_grey()), colours=((0.5, 0.5, GREY),)),
        Case("palette", "a palette", picture(palette(), "r3.gif"), colours=LEFT_RIGHT),
        Case("CMYK", "CMYK", picture(halves().convert("CMYK"), "r3.jpg", quality=95), colours=LEFT_RIGHT),
        Case("RGBA", "transparent on the right: white there", picture(transparent()),
             colours=((0.2, 0.5, RED), (0.8, 0.5, WHITE))),
        Case("EXIF", "lying on its side by EXIF: turned upright", picture(rotated(), "r3.jpg"), colours=LEFT_RIGHT),
        Case("animated", "an animation: its first frame", picture(animated(), "r3.gif"), colours=LEFT_RIGHT),
        Case("bilevel", "black and white, 1 bit", picture(Image.new("1", (64, 64), 1)), colours=((0.5, 0.5, WHITE),)),
    ],
    "Length": [
        Case("text too long", "a text that no shrinking makes short enough",
             both(long_record(), option(max_seq_length=200)),
             ("toy.jsonl, line 4", "more than --max_seq_length 200",
              "pictures of --min_pixels would still be too many tokens", "raise"),
             reason="too_long"),
        Case("dropped", "a large picture under --on_too_long drop",
             both(long_record(1, 800), option(max_seq_length=200, on_too_long="drop")),
             ("toy.jsonl, line 4", "more than --max_seq_length 200", "raise"), reason="too_long"),
        Case("shrunk", "a large picture under --on_too_long shrink: made smaller",
             both(long_record(1, 800), option(max_seq_length=200)), colours=LEFT_RIGHT),
        Case("stopped", "a large picture under --on_too_long error",
             both(long_record(1, 800), option(max_seq_length=200, on_too_long="error")),
             ("toy.jsonl, line 4", "more than --max_seq_length 200", "--on_too_long error", "raise"), exit=3),
        Case("all too long", "no sample is short enough", option(max_seq_length=5),
             ("no sample is left to train on", "6 are longer than --max_seq_length 5", "raise"), exit=3),
    ],
    "Model": [
        Case("model missing", "a folder that is not there", model_path("/nowhere/model"),
             ("--model_name_or_path /nowhere/model: there is no such folder", "give a folder or a hub name"),
             exit=2),
        Case("model is a file", "a file", model_path(__file__),
             ("--model_name_or_path", "is a file", "give the folder that it lies in"), exit=2),
        Case("misnamed model", "a name of older guides", model_path("Qwen/Qwen2.5-7B-VL-Chat"),
             ("there is no such model, older guides misname it", "give Qwen/Qwen2.5-VL-7B-Instruct"), exit=2),
        Case("misspelt hub name", "a hub name that cannot be had, here without network",
             model_path("Qwen/Qwen2.5-VL-7B-Instrct"),
             ("there is no folder Qwen/Qwen2.5-VL-7B-Instrct here", "the hub was not asked (HF_HUB_OFFLINE is set)",
              "unset it, or give a local folder"), exit=4),
        Case("no model folder", "a folder without config.json", model_file("config.json", None),
             ("model has no config.json", "give"), exit=4),
        Case("config broken", "a config.json that is no JSON", model_file("config.json", lambda old: old[:50]),
             ("config.json cannot be read as JSON", "copy"), exit=4),
        Case("unsupported model", "another kind of model", model_file("config.json", in_json(model_type="llava")),
             ("is of type 'llava'", "supported: qwen2_vl (Qwen2-VL), qwen2_5_vl (Qwen2.5-VL), qwen3_vl (Qwen3-VL)"),
             exit=4),
        Case("wrong vision config", "a config.json whose vision part is no object",
             model_file("config.json", in_json(vision_config=7)),
             ("config.json", "vision_config", "copy"), exit=4),
        Case("wrong text config", "a config.json whose text part is nonsense",
             model_file("config.json", in_json(text_config={"hidden_size": "wide"})),
             ("config.json", "copy"), exit=4),
        Case("no weights", "no weights", model_file("model.safetensors", None),
             ("has no weights in safetensors", "copy them"), exit=4, loads=True),
        Case("weights pickled", "weights in a pickle alone", pickled,
             ("has no weights in safetensors", "only pytorch_model.bin", "save_pretrained"), exit=4, loads=True),
        Case("weights truncated", "weights that break off", model_file("model.safetensors", lambda old: old[:90000]),
             ("the model in", "cannot be loaded", "copy"), exit=4, loads=True),
        Case("weight missing", "weights of which one is missing", without_weight,
             ("the model in", "has no weights for", "down_proj", "copy its files again"), exit=4, loads=True),
        Case("weight of another shape", "a weight of another shape than config.json says", wrong_shape,
             ("the model in", "down_proj", "copy"), exit=4, loads=True),
        Case("no tokenizer", "no tokenizer", without_tokenizer,
             ("the tokenizer of model has no token <|image_pad|>", "copy the checkpoint's tokenizer files"), exit=4),
        Case("tokenizer broken", "a tokenizer.json that breaks off",
             model_file("tokenizer.json", lambda old: old[:900]),
             ("model has no tokenizer that can be loaded", "copy"), exit=4),
        Case("no preprocessor", "no preprocessor_config.json", model_file("preprocessor_config.json", None),
             ("model has no preprocessor_config.json", "copy the checkpoint's processor files"), exit=4),
        Case("preprocessor broken", "a preprocessor_config.json of nonsense",
             model_file("preprocessor_config.json", in_json(size=[1, 2], min_pixels="small")),
             ("preprocessor_config.json", "copy"), exit=4),
        Case("no template", "no chat template", without_template,
             ("model has no chat template", "add it"), exit=4),
        Case("tokenizer of another layout", "a tokenizer.json that holds something else",
             model_file("tokenizer.json", lambda old: b'{"version": "1.0"}'),
             ("model has no tokenizer that can be loaded", "copy"), exit=4),
        Case("template broken", "a chat template that is no Jinja", template(lambda old: "{% for %}"),
             ("model", "chat template", "copy"), exit=4),
        Case("template rewrites", "a chat template that changes answers",
             template(lambda old: old.replace("{{ message['content'] }}", "{{ message['content'] | upper }}")),
             ("6 of 6 records cannot be used (template_rewrites 6)", "repair them or raise it", "chat template"),
             exit=3),
        Case("max_pixels too small", "--max_pixels below the checkpoint's smallest size", option(max_pixels=1000),
             ("--max_pixels is 1000, below the 3136", "raise it or give --min_pixels"), exit=2),
    ],
    "Output folder and machine": [
        Case("output used", "an output folder that holds something", output_used,
             ("--output_dir", "out is not empty", "give --resume_from_checkpoint latest"), exit=2),
        Case("output is a file", "a file", output_is_a_file,
             ("--output_dir", "out is a file", "choose another name"), exit=2),
        Case("output below a file", "a folder that cannot be made",
             both(lambda w: (w.folder / "file").write_text(""), swapped("out", "file/out")),
             ("--output_dir", "cannot be made", "file is no folder", "choose another"), exit=2),
        Case("cache is a file", "a cache folder that cannot be made",
             lambda w: w.options.update(cache_dir=w.picture),
             ("--cache_dir", "cannot be made", "r3-0.png is no folder", "choose another"), exit=2),
        Case("fp16 on the CPU", "fp16 without a GPU", option(mixed_precision="fp16"),
             ("--mixed_precision fp16 needs a GPU", "use bf16 or no"), exit=2),
        Case("wandb missing", "--use_wandb without wandb", both(missing("wandb"), option(use_wandb=True)),
             ("--use_wandb needs wandb", "pip install 'vlft[wandb]'"), exit=2),
        Case("DeepSpeed missing", "--deepspeed without DeepSpeed",
             both(missing("deepspeed"), option(deepspeed="zero2")),
             ("--deepspeed needs DeepSpeed", "pip install 'vlft[deepspeed]'"), exit=2),
    ],
    "Resume": [
        Case("no such checkpoint", "a folder that is not there", resuming(wanted="{out}/checkpoints/step-000009"),
             ("--resume_from_checkpoint", "step-000009: there is no such folder", "give a checkpoint's folder"),
             exit=2),
        Case("no checkpoint", "a folder that is no checkpoint", resuming(wanted="{out}/model"),
             ("model is not a complete checkpoint", "complete ones in this run", "step-000002", "give"), exit=6),
        Case("interrupted save", "a checkpoint whose save was interrupted",
             resuming(lambda out: (out / "checkpoints/step-000002/state.json").unlink(),
                      wanted="{out}/checkpoints/step-000002"),
             ("step-000002 is not a complete checkpoint", "step-000001", "give"), exit=6),
        Case("checkpoint altered", "a checkpoint with a flipped byte",
             resuming(lambda out: flip_byte(out / "checkpoints/step-000002/weights-000-00.safetensors")),
             ("weights-000-00.safetensors is missing, truncated or altered",
              "--resume_from_checkpoint", "step-000001"), exit=6),
        Case("checkpoint truncated", "a checkpoint that breaks off",
             resuming(lambda out: cut(out / "checkpoints/step-000002/optimizer-000-00.safetensors")),
             ("optimizer-000-00.safetensors is missing, truncated or altered", "step-000001"), exit=6),
        Case("state broken", "a state.json that breaks off",
             resuming(lambda out: cut(out / "checkpoints/step-000002/state.json")),
             ("state.json cannot be read", "step-000001"), exit=6),
        Case("state without its keys", "a state.json of another layout",
             resuming(lambda out: (out / "checkpoints/step-000002/state.json").write_text('{"files": {}}')),
             ("state.json cannot be read", "step-000001"), exit=6),
        Case("another strategy", "another strategy than the checkpoint's",
             both(strategy("lora_llm_full_vit"), resuming()),
             ("--tuning_strategy was 'lora' and is now 'lora_llm_full_vit'", "start a new --output_dir"), exit=6,
             problems=5),
        Case("another rate", "another rate than the checkpoint's", resuming(learning_rate_llm=3e-4),
             ("--learning_rate_llm was 0.0001 and is now 0.0003", "go on with the old value"), exit=6),
        Case("another global batch", "another global batch than the checkpoint's",
             resuming(per_device_train_batch_size=2),
             ("--per_device_train_batch_size 2", "global batch of 3", "give"), exit=6),
    ],
    "Merge": [
        Case("merge of a whole model", "a whole model", merging(merge_whole),
             ("is already a whole model: there is nothing to merge", "use it"), exit=4),
        Case("merge into a used folder", "an output folder that holds something", merging(merge_used),
             ("--output_dir", "merged is not an empty folder", "give a new one"), exit=2),
        Case("merge of nothing", "a folder that is not there",
             merging(lambda w, model: shutil.rmtree(model)),
             ("MODEL out has no result yet", "use 'vlft export out"), exit=2),
        Case("adapter truncated", "an adapter that breaks off",
             merging(lambda w, model: cut(model / "adapter_model.safetensors")),
             ("the adapter in", "cannot be loaded", "copy"), exit=4, loads=True),
        Case("adapter without its base", "a base that is no longer there",
             merging(adapter_json(base_model_name_or_path="/gone/base")),
             ("adapter_config.json", "/gone/base", "base_model_name_or_path"), exit=4),
        Case("adapter that names no base", "an adapter_config.json without a base",
             merging(adapter_json(base_model_name_or_path=None)),
             ("adapter_config.json", "base_model_name_or_path", "give"), exit=4),
        Case("adapter config broken", "an adapter_config.json that breaks off",
             merging(lambda w, model: cut(model / "adapter_config.json")),
             ("adapter_config.json cannot be read as JSON", "copy"), exit=4),
        Case("facts broken", "a vlft.json that breaks off",
             merging(lambda w, model: cut(model / "vlft.json")),
             ("vlft.json cannot be read as JSON", "copy"), exit=4),
    ],
    "Evaluation": [
        Case("script missing", "a script that is not there", script(None),
             ("--eval_dataset_scripts toy: there is no script", "my_metric.py", "check the path"), exit=2),
        Case("unknown metric", "a metric that is not there", option(eval_dataset_scripts="toy:exact_mach"),
             ("there is no script 'exact_mach'", "the nearest is 'exact_match'"), exit=2),
        Case("script for no dataset", "a data set that is not there",
             script("def evaluate(p): return {}", dataset="tyo"),
             ("--eval_dataset_scripts: there is no dataset 'tyo'", "the nearest is 'toy'"), exit=2),
        Case("script broken", "a script that cannot be imported", script("import nothing_like_this"),
             ("--eval_dataset_scripts", "my_metric.py cannot be used: ModuleNotFoundError", "correct it"), exit=2),
        Case("script without evaluate", "a script without `evaluate`", script("def score(p): return {}"),
             ("--eval_dataset_scripts", "my_metric.py has no function evaluate(predictions)", "add it"), exit=2),
        Case("nothing held out", "a metric of a data set that only trains", script("def evaluate(p): return {}"),
             ("--eval_dataset_scripts names toy, which has no held-out samples", "lower --train_split_ratio"),
             exit=2),
        Case("script fails", "a script that fails on the answers",
             both(registry(json.dumps({"datasets": {"toy": TOY, "held": TOY | {"split": "eval", "max_samples": 1}}})),
                  script("def evaluate(p): return {'score': 1 / (len(p) - 1)}", dataset="held")),
             ("--eval_dataset_scripts held: my_metric failed on answers made up for a trial: ZeroDivisionError",
              "correct it"),
             exit=2),
        Case("script without numbers", "a script that answers no numbers",
             both(registry(json.dumps({"datasets": {"toy": TOY, "held": TOY | {"split": "eval", "max_samples": 1}}})),
                  script("def evaluate(p): return 0.5", dataset="held")),
             ("--eval_dataset_scripts held: my_metric failed on answers made up for a trial: TypeError", "correct it"),
             exit=2),
    ],
}  # fmt: skip
CASES = [case for cases in TABLE.values() for case in cases]


# ---------------------------------------------------------------------------------------------------------------------
# The test


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen2_5_vl", layers=2)


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder at finished/out; its data's folder has another path than that of the case that copies it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        work = Work(folder, model, folder, patch)
        work.options |= {"save_steps": 1}
        assert vlft(work.argv()) == 0
    shutil.rmtree(folder / "cache")
    shutil.rmtree(folder / "images")
    return folder


def vlft(argv: list[str]) -> int:
    """The command in this process, which saves the seconds of an import."""
    from accelerate.state import AcceleratorState

    from vlft.cli import main

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return main(argv)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every load of a model's weights."""
    from vlft import export
    from vlft.models import load

    seen: list[str] = []
    real = load.load_hf

    def spy(folder: Path, *args: Any, **options: Any) -> Any:
        seen.append(str(folder))
        return real(folder, *args, **options)

    monkeypatch.setattr(load, "load_hf", spy)
    monkeypatch.setattr(export, "load_hf", spy)
    return seen


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray[Any, Any]]:
    """(3, H, W) pixels of every picture that a run decoded, by file name."""
    from vlft.data import images

    seen: dict[str, np.ndarray[Any, Any]] = {}
    real = images.decode

    def spy(source: Any, *args: Any, **options: Any) -> Any:
        pixels = real(source, *args, **options)
        seen[Path(source).name if isinstance(source, str) else "bytes"] = pixels
        return pixels

    monkeypatch.setattr(images, "decode", spy)
    return seen


@pytest.fixture
def work(model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    monkeypatch.setenv("COLUMNS", "120")
    return Work(tmp_path, model, finished, monkeypatch)


def sentences(said: str, work: Work) -> list[str]:
    """The problems that vlft printed, without the path of the work folder."""
    _, head, text = said.rpartition("vlft: ")
    assert head, said
    lines = text.replace(f"{work.folder}{os.sep}", "").strip().split("\n")
    if not re.fullmatch(r"\d+ problems:", lines[0]):
        return ["\n".join(lines)]
    problems = [line.removeprefix("  * ") for line in lines[1:]]
    assert lines[0] == f"{len(problems)} problems:"
    return problems


def check_clear(sentence: str) -> None:
    """Short, without a traceback's traces, and with an advice; a list of examples may follow on indented lines."""
    first, *examples = sentence.split("\n")
    assert all(line.startswith("  ") for line in examples), sentence
    assert all(len(line) <= LONGEST for line in (first, *examples)), sentence
    assert ADVICE.search(sentence), f"no advice: {sentence}"
    assert not re.search(r"object at 0x|\bFile \"|<class '", sentence), sentence


def test_the_run_is_good_unspoilt(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlft(work.argv()) == 0, capsys.readouterr().err
    assert ledger(work.output) == []
    assert sum(line["samples"] for line in metrics(work.output)) == len(work.records)


def test_bad_records_that_share_an_id_are_all_counted(work: Work) -> None:
    """LLaVA's files give every conversation about a picture the same id; these two fail in different steps."""
    for n in (0, 1, 3):
        work.records[n]["id"] = "same"
        (work.images / f"r{n}-0.png").write_bytes(encoded(halves())[:80])
    work.options |= {"per_device_train_batch_size": 1, "epochs": 2}
    assert vlft(work.argv()) == 0
    entries = ledger(work.output)
    assert sorted(entry["message"][:17] for entry in entries) == [f"toy.jsonl, line {n}" for n in (1, 2, 4)]
    assert sum(line["samples"] for line in metrics(work.output)) == 2 * (len(work.records) - len(entries))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(
    case: Case,
    work: Work,
    capsys: pytest.CaptureFixture[str],
    loaded: list[str],
    decoded: dict[str, np.ndarray[Any, Any]],
) -> None:
    case.spoil(work)
    if work.twice:
        assert vlft(work.argv()) == 0
        work.then()
        shutil.rmtree(work.output)
    words = work.argv()
    before = sorted(work.output.rglob("*")) if work.output.is_dir() else None
    capsys.readouterr()
    loaded.clear()
    code = vlft(words)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert code == case.exit, out + err
    if case.exit:
        problems = sentences(err, work)
        assert len(problems) == case.problems, problems
        for problem in problems:
            check_clear(problem)
        told = " ".join(problems) if case.problems == 1 else err
        assert [part for part in case.says if part not in told] == [], told
        assert bool(loaded) == case.loads
        if not case.loads:
            assert (sorted(work.output.rglob("*")) if work.output.is_dir() else None) == before
        return
    entries = ledger(work.output)
    used = sum(line["samples"] for line in metrics(work.output))
    assert used + len(entries) == len(work.records)
    assert [entry["reason"] for entry in entries] == ([case.reason] if case.reason else []), entries
    for entry in entries:
        assert entry["id"] in (SPOILT, "line 4"), entry
        sentence = entry["message"].replace(f"{work.folder}{os.sep}", "")
        check_clear(sentence)
        assert "\n" not in sentence
        assert [part for part in case.says if part not in sentence] == [], sentence
    for x, y, colour in case.colours:
        pixels = decoded[work.record["images"][0]]
        found = pixels[:, int(y * pixels.shape[1]), int(x * pixels.shape[2])].astype(int)
        assert np.abs(found - colour).max() <= 12, found


def test_forty_kinds_and_no_name_twice() -> None:
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)


# ---------------------------------------------------------------------------------------------------------------------
# The page

HEAD = """# Bad input

What vlft says to input that is wrong, and what becomes of the run. `tests/test_bad_input.py` spoils a good run in each
of these ways and compares this page with its table.

Three things can happen:

* **exit N**: vlft stops with one sentence for each problem (all problems of a configuration at once) and this exit
  code; [errors.md](errors.md) explains the codes. Unless the weights had to be looked at, no model was loaded and
  nothing was written to the output folder.
* **ledger**: this record alone is left out, with this reason, as a line of `ledger.jsonl`; every other sample is used.
  More such records than `--max_bad_fraction` of all end the run with exit 3 (those that are only `too_long` do not
  count).
* **used**: unusual, but right: the sample is used.

The dots stand for what depends on the run, such as paths."""


def page() -> str:
    lines = [HEAD]
    for title, cases in TABLE.items():
        lines += ["", f"## {title}", "", "| what is wrong | what vlft says | result |", "|---|---|---|"]
        for case in cases:
            said = " … ".join(case.says) or "nothing"
            result = f"exit {case.exit}" if case.exit else f"ledger: `{case.reason}`" if case.reason else "used"
            cells = [re.sub(r"([|<>*])", r"\\\1", cell) for cell in (case.wrong, said)]
            lines.append(f"| {cells[0]} | {cells[1]} | {result} |")
    return "\n".join(lines) + "\n"


def test_the_page_says_the_same() -> None:
    if os.environ.get("VLFT_WRITE_DOCS"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page()
