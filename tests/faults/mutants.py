"""Valid records of every format and valid pictures of many kinds, and ways to spoil them, all drawn from a Random."""

from __future__ import annotations

import base64
import copy
import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from PIL import Image

# ------------------------------------------------------------------ valid pictures


def _noise(rng: Random, width: int, height: int, channels: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (height, width, channels), np.uint8)


def _rgb(rng: Random) -> Image.Image:
    return Image.fromarray(_noise(rng, rng.randint(20, 90), rng.randint(20, 90), 3))


def _deep(rng: Random) -> Image.Image:
    return Image.fromarray(np.random.default_rng(rng.getrandbits(32)).integers(0, 65536, (40, 50), np.uint16))


def _exif(rng: Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = rng.randint(1, 8)
    exif[0x010F] = "a camera"
    return exif.tobytes()


def _frames(rng: Random) -> dict[str, Any]:
    return {"save_all": True, "append_images": [_rgb(rng).resize((40, 40)), _rgb(rng).resize((40, 40))], "duration": 5}


def _save(picture: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def _transparent_palette(rng: Random) -> bytes:
    return _save(_rgb(rng).convert("P", palette=Image.Palette.ADAPTIVE), "PNG", transparency=rng.randrange(256))


PICTURES: dict[str, Callable[[Random], bytes]] = {
    "png": lambda rng: _save(_rgb(rng), "PNG"),
    "png-alpha": lambda rng: _save(_rgb(rng).convert("RGBA"), "PNG"),
    "png-grey-alpha": lambda rng: _save(_rgb(rng).convert("LA"), "PNG"),
    "png-palette": _transparent_palette,
    "png-16": lambda rng: _save(_deep(rng), "PNG"),
    "png-1": lambda rng: _save(_rgb(rng).convert("1"), "PNG"),
    "png-exif": lambda rng: _save(_rgb(rng), "PNG", exif=_exif(rng)),
    "apng": lambda rng: _save(_rgb(rng).resize((40, 40)), "PNG", **_frames(rng)),
    "jpeg": lambda rng: _save(_rgb(rng), "JPEG"),
    "jpeg-grey": lambda rng: _save(_rgb(rng).convert("L"), "JPEG"),
    "jpeg-cmyk": lambda rng: _save(_rgb(rng).convert("CMYK"), "JPEG"),
    "jpeg-exif": lambda rng: _save(_rgb(rng), "JPEG", exif=_exif(rng)),
    "jpeg-progressive": lambda rng: _save(_rgb(rng), "JPEG", progressive=True),
    "gif": lambda rng: _save(_rgb(rng).convert("P"), "GIF"),
    "gif-frames": lambda rng: _save(_rgb(rng).resize((40, 40)), "GIF", **_frames(rng)),
    "webp": lambda rng: _save(_rgb(rng), "WEBP"),
    "webp-alpha": lambda rng: _save(_rgb(rng).convert("RGBA"), "WEBP", lossless=True),
    "webp-exif": lambda rng: _save(_rgb(rng), "WEBP", exif=_exif(rng)),
    "webp-frames": lambda rng: _save(_rgb(rng).resize((40, 40)), "WEBP", **_frames(rng)),
    "tiff": lambda rng: _save(_rgb(rng), "TIFF", compression="tiff_lzw", exif=_exif(rng)),
    "tiff-cmyk": lambda rng: _save(_rgb(rng).convert("CMYK"), "TIFF"),
    "tiff-float": lambda rng: _save(_rgb(rng).convert("F"), "TIFF"),
    "tiff-16": lambda rng: _save(_deep(rng), "TIFF"),
    "bmp": lambda rng: _save(_rgb(rng), "BMP"),
    "ppm": lambda rng: _save(_rgb(rng), "PPM"),
    "avif": lambda rng: _save(_rgb(rng), "AVIF"),
    "ico": lambda rng: _save(_rgb(rng).resize((32, 32)), "ICO"),
    "jpeg2000": lambda rng: _save(_rgb(rng), "JPEG2000"),
}

# ------------------------------------------------------------------ spoilt pictures


def _cut(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _flip(rng: Random, data: bytes) -> bytes:
    out = bytearray(data)
    # Headers are a small part of a file and the larger part of what can go wrong.
    end = rng.choice((len(out), min(64, len(out)), min(400, len(out))))
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        out[rng.randrange(end)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(out)


def _zero(rng: Random, data: bytes) -> bytes:
    start = rng.choice((0, 0, rng.randrange(len(data))))
    length = rng.choice((1, 4, 16, 64, len(data)))
    return data[:start] + bytes(min(length, len(data) - start)) + data[start + length :]


def _remove(rng: Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice((1, 2, 7, 100)) :]


def _repeat(rng: Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start : start + rng.choice((1, 4, 50, 1000))] * rng.choice((2, 3, 30)) + data[start:]


def _append(rng: Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0", rng.randbytes(rng.choice((1, 100, 5000))), data, b"PK\x03\x04"))


def _splice(rng: Random, data: bytes) -> bytes:
    other = PICTURES[rng.choice(list(PICTURES))](rng)
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _claims(rng: Random, data: bytes) -> bytes:
    """A file whose header claims another size than its pixels have, with right check sums."""
    del data
    side = rng.choice((0, 1, 2, 300, 5000, 65535, 100_000, 2**31 - 1))
    other = rng.choice((side, 1, 40, 201))
    header = struct.pack(">II", side, other) + bytes((rng.choice((1, 8, 16)), rng.choice((0, 2, 3, 4, 6)), 0, 0, 0))
    pixels = zlib.compress(bytes(rng.choice((0, 100, 100_000))))
    png = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")
    low = struct.pack("<HH", side & 0xFFFF, other & 0xFFFF)
    gif = _save(Image.new("P", (30, 30)), "GIF")
    bmp = _save(Image.new("RGB", (30, 30)), "BMP")
    signed = struct.pack("<ii", side, rng.choice((other, -other)))
    ppm = f"P{rng.randint(1, 6)} {side} {other} {rng.choice((0, 1, 255, 65535, 70000))}\n".encode() + bytes(300)
    return rng.choice((png, gif[:6] + low + gif[10:], bmp[:18] + signed + bmp[26:], ppm))


def _chunks(rng: Random, data: bytes) -> bytes:
    """Odd chunks in a PNG, with right check sums; EXIF and compressed texts among them."""
    del data
    png = PICTURES[rng.choice(("png", "png-palette", "png-16"))](rng)
    kind = rng.choice(
        (b"eXIf", b"zTXt", b"iTXt", b"tEXt", b"iCCP", b"acTL", b"fcTL", b"tRNS", b"PLTE", b"gAMA", b"pHYs")
    )
    text = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  9\n" + rng.randbytes(9).hex().encode())
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="' + rng.choice((b"6", b"x", b"99", b"")) + b'"/>'
    body = rng.choice((b"", rng.randbytes(rng.choice((1, 4, 26, 300))), text, xmp, bytes(26), b"MM\0*" + bytes(8)))
    extra = _chunk(kind, body)
    at = rng.choice((33, len(png) - 12, len(png)))  # behind the header, behind the pixels, behind the end
    return png[:at] + extra + png[at:]


def _broken_exif(rng: Random, data: bytes) -> bytes:
    del data
    entry = struct.pack(">HHI", 0x0112, rng.choice((3, 4, 2, 5, 7, 99)), rng.choice((1, 0, 2, 2**31)))
    values = rng.choice((b"\0\6\0\0", b"\0\x63\0\0", b"\xff\xff\xff\xff", b"\0\0\0\0"))
    count = struct.pack(">H", rng.choice((1, 2, 0, 65535)))
    tiff = b"MM\0*" + struct.pack(">I", rng.choice((8, 0, 7, 2**32 - 1))) + count + entry + values + b"\0\0\0\0"
    exif = rng.choice((b"Exif\0\0" + tiff, b"Exif\0\0" + _flip(rng, tiff), b"Exif\0\0", rng.randbytes(40)))
    kind = rng.choice(("JPEG", "PNG", "WEBP"))
    return _save(_rgb(rng), kind, exif=exif)


def _other(rng: Random, data: bytes) -> bytes:
    """No picture at all, or one of a kind that nobody expects in training data."""
    del data
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40"/>'
    magic = (b"8BPS\0\1", b"SIMPLE", b"DDS ", b"qoif", b"\0\0\1\0", b"\0\0\2\0", b"icns", b"MThd", b"BLP2", b"\x1f\x9d")
    return rng.choice((b"", b"\0", eps, svg, b"GIF89a", b"not a picture", rng.choice(magic) + rng.randbytes(200)))


SPOIL_PICTURE: dict[str, Callable[[Random, bytes], bytes]] = {
    "cut": _cut,
    "flip": _flip,
    "zero": _zero,
    "remove": _remove,
    "repeat": _repeat,
    "append": _append,
    "splice": _splice,
    "claims": _claims,
    "chunks": _chunks,
    "exif": _broken_exif,
    "other": _other,
    "suffix": lambda rng, data: data,  # nothing but the wrong suffix
}

# ------------------------------------------------------------------ valid records

WORDS = ("red", "a blue circle", "Zwölf Stück", "数字は三", "left of it", "7", "yes\nno", "\U0001f600 well")


def _say(rng: Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))


def _from_human(rng: Random, pictures: list[Any]) -> list[Any]:
    turns = [{"from": "human", "value": "<image>\n" * len(pictures) + _say(rng)}, {"from": "gpt", "value": _say(rng)}]
    return turns + [{"from": "human", "value": _say(rng)}, {"from": "gpt", "value": _say(rng)}] * rng.randrange(2)


def _messages(rng: Random, pictures: list[Any]) -> list[Any]:
    system = [{"role": "system", "content": _say(rng)}] * rng.randrange(2)
    learnt = {"role": "assistant", "content": _say(rng)} | ({"loss": True} if rng.randrange(2) else {})
    return [*system, {"role": "user", "content": "<image>" * len(pictures) + _say(rng)}, learnt]


def _blocks(rng: Random, pictures: list[dict[str, Any]]) -> list[Any]:
    asked = [*pictures, {"type": "text", "text": _say(rng)}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": _say(rng)}]}]


def _openai(rng: Random, pictures: list[Any]) -> dict[str, Any]:
    key = rng.choice(("image", "path", "url"))
    return {"messages": _blocks(rng, [{"type": "image", key: p} for p in pictures])}


def _image_url(rng: Random, pictures: list[Any]) -> dict[str, Any]:
    wrap = rng.choice((lambda p: {"url": p}, lambda p: p))
    return {"messages": _blocks(rng, [{"type": "image_url", "image_url": wrap(p)} for p in pictures])}


def _hf_blocks(rng: Random, pictures: list[Any]) -> dict[str, Any]:
    index = rng.randrange(2)
    places = [{"type": "image"} | ({"index": n} if index else {}) for n in range(len(pictures))]
    return {"messages": _blocks(rng, places), "images": pictures}


def _hf_prompt(rng: Random, pictures: list[Any]) -> dict[str, Any]:
    if rng.randrange(2):
        return {"prompt": _say(rng), "completion": _say(rng), "images": pictures}
    prompt, completion = ({"role": r, "content": _say(rng)} for r in ("user", "assistant"))
    return {"prompt": [prompt], "completion": [completion], "images": pictures}


def _grounding(rng: Random, pictures: list[Any]) -> dict[str, Any]:
    kind = rng.choice((None, "real", "norm1"))
    end = 1.0 if kind == "norm1" else 19
    boxes = [sorted(rng.uniform(0, end) for _ in range(4)) for _ in range(2)] if pictures else []
    objects: dict[str, Any] = {"ref": ["the dog"], "bbox": [[*b[:2], *b[2:]] for b in boxes]}
    objects |= {"bbox_type": kind} if kind else {}
    objects |= {"image_id": [rng.randrange(len(pictures)) for _ in boxes]} if boxes and rng.randrange(2) else {}
    question, answer = "<image>" * len(pictures) + "where is <ref-object>", " and ".join(["it: <bbox>"] * len(boxes))
    if rng.randrange(2):
        return {"query": question, "response": answer or "no", "images": pictures, "objects": objects}
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer or "no"}]
    return {"messages": turns, "images": pictures, "objects": objects}


def _inline_boxes(rng: Random, pictures: list[Any]) -> dict[str, Any]:
    answer = '[{"bbox_2d": [1, 2, 13.5, 14], "label": "x"}, {"point_2d": [5, 6]}] <|box_start|>(1,2),(3,4)<|box_end|>'
    turns = [
        {"role": "user", "content": "<image>" * len(pictures) + _say(rng)},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": turns, "images": pictures}


RECORDS: dict[str, Callable[[Random, list[Any]], dict[str, Any]]] = {
    "llava": lambda rng, p: {"image": p[0] if len(p) == 1 else p, "conversations": _from_human(rng, p)},
    "messages": lambda rng, p: {"messages": _messages(rng, p), "images": p},
    "sharegpt": lambda rng, p: {"conversations": _from_human(rng, p), "images": p, "system": _say(rng)},
    "openai": _openai,
    "openai_image_url": _image_url,
    "hf_columns": _hf_blocks,
    "hf_columns, prompt": _hf_prompt,
    "prefix_suffix": lambda rng, p: {"image": p, "prefix": _say(rng), "suffix": _say(rng)},
    "texts": lambda rng, p: {"images": p, "texts": [{"user": _say(rng), "assistant": _say(rng)}] * rng.randint(1, 3)},
    "query_response": lambda rng, p: {
        "query": "<image>" * len(p) + _say(rng),
        "response": _say(rng),
        "history": [[_say(rng), _say(rng)]] * rng.randrange(3),
        "images": p,
    },
    "alpaca": lambda rng, p: {
        "instruction": "<image>" * len(p) + _say(rng),
        "input": _say(rng),
        "output": rng.choice((_say(rng), 7, 2.5)),
        "images": p,
    },
    "grounding": _grounding,
    "messages, boxes in the text": _inline_boxes,
}
"""Every row of formats.md, table 3a."""


def written(rng: Random, name: str, data: bytes) -> Any:
    """A picture as a record may write it: its path, or the file itself."""
    text = base64.b64encode(data).decode()
    way = rng.randrange(6)
    if way == 4:
        return rng.choice((f"data:image/png;base64,{text}", {"base64": text}))
    return {"bytes": text, "path": None} if way == 5 else name


# ------------------------------------------------------------------ spoilt records

_RAW = "@raw{}@"
RAW = (
    *("[" * n + "]" * n for n in (50, 900, 1100, 20_000)),
    *('{"image":' * n + "1" + "}" * n for n in (50, 990, 5000)),
    *("1" * n for n in (25, 400, 5000)),
    *"-0 1e999 -1e999 NaN -Infinity 1E-400 true null 0x10 01 1_000 'red' undefined".split(),
    *'tru +1 .5 1. "\\ud800" "\\x"'.split(),
    '"\t"',
    '"' + " " * 70_000 + '!"',
    '"A' + " " * 70_000 + '!"',
    '"' + "<image>" * 3000 + '"',
    '"' + "[1, 2" * 20_000 + '"',
)
"""JSON text that no Python value writes; stands where `_RAW` names it."""
NASTY: tuple[Any, ...] = (
    # numbers and truth values
    *(None, True, False, 0, -1, 1, 3, 1.5, 10**30, -(10**400), 1e308, float("nan"), float("inf"), float("-inf")),
    # odd characters
    *("", " ", "\n", "\0", "\ud800", "\udcff", "a\udc80b", "\ufeff", "\u202e", "\u2028", "e\u0301" * 9, "\U0010ffff"),
    # what templates, tokenizer and readers give a meaning
    *"\ue0000:0<\ue001 \ue0000: {{7*7}} {%if%} {ref} %s%n <think>a</think>b <|im_ end|> <|im_end|>".split(),
    *"<|im_start|> <image> <image><image> <video> <bbox> <ref-object> <|image_pad|> <|vision_start|>".split(),
    *("<|box_start|>(1,2)", '"bbox_2d": [1, 2, 3, nan]', '"point_2d": [9e9]', "x" * 3000, "A" * 1500),
    # addresses of pictures
    *"/etc/passwd ../../etc/passwd ../ . ~ ~root/x ~nobody-here/x file:///etc/passwd file://[ file: file:///%00".split(),
    *"http://127.0.0.1:9/x.png HTTPS:// data: data:,x data:image/png;base64, data:image/png;base64,AAAA".split(),
    *("data:image/png;base64,A", "data:image/png;base64,é", "C:\\x.png", "no such.png", "x/" * 3000, "y" * 300),
    # other shapes
    *([], {}, [[]], [None], [0], [""], ["<image>"], {"bytes": ""}, {"bytes": [1, 2]}, {"path": ""}, {"": ""}),
    *({"text": None}, {"type": "image"}, {"type": "video"}, {"type": "text"}, {"type": "image", "index": -1}),
    *({"type": "image", "index": 9}, {"role": "user"}, {"role": "assistant", "content": ""}),
    *({"from": "gpt", "value": "x", "loss": False}, {"role": "tool", "content": "x"}, {"role": "user", "content": []}),
    *({"role": "system", "content": "s"}, [1, 2, 3, 4], [1e400, 0, 0, 0], [float("nan")] * 4, [True] * 4),
    *([-5, -5, 10**9, 10**9], {"ref": "x", "bbox": {}}),
    *(_RAW.format(n) for n in range(len(RAW))),
)
KEYS = (
    "id image images messages conversations role content from value type text image_url url prompt completion prefix "
    "suffix texts user assistant query response history instruction input output objects ref bbox bbox_type image_id "
    "system loss index bytes path base64 video videos tool_calls"
).split()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside `value`."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            waiting.append(node[key])
    return found


def _spoil_text(rng: Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    nasty = rng.choice([n for n in NASTY if isinstance(n, str) and not n.startswith("@raw")])
    return rng.choice((text[:at] + nasty + text[at:], text[:at], text[at:], text * 2, text.upper(), nasty, text[::-1]))


def _spoil_value(rng: Random, value: Any) -> Any:
    way = rng.randrange(5)
    if way == 0:
        return rng.choice(([value], {"text": value}, [value, value], {"bytes": value}, str(value)))
    if way > 1 and isinstance(value, str):
        return _spoil_text(rng, value)
    if way > 1 and isinstance(value, int | float):
        return rng.choice((-value, value * 1000, value * 10**20, str(value)))
    if way > 1 and isinstance(value, list):
        return rng.choice((value * 2, value[::-1], value[1:], [*value, rng.choice(NASTY)], value * 40))
    return copy.deepcopy(rng.choice(NASTY))


def spoil_record(rng: Random, record: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What was done, and the record with it done to it, one to three times."""
    names = []
    out: dict[str, Any] = copy.deepcopy(record)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        where, key = rng.choice(_places(out) or [(out, "x")])
        name = rng.choice(("value", "value", "value", "drop", "rename", "add", "swap", "merge"))
        if name == "value":
            where[key] = _spoil_value(rng, where.get(key) if isinstance(where, dict) else where[key])
        elif name == "drop":
            where.pop(key) if isinstance(where, list) else where.pop(key, None)
        elif name == "rename" and isinstance(where, dict) and key in where:
            where[rng.choice((rng.choice(KEYS), key.upper(), f"{key} ", f"{key}\0", ""))] = where.pop(key)
        elif name == "add":
            target = where if isinstance(where, dict) else out
            target[rng.choice(KEYS)] = copy.deepcopy(rng.choice(NASTY))
        elif name == "swap" and key in (where if isinstance(where, dict) else range(len(where))):
            other, its_key = rng.choice(_places(out))
            where[key], other[its_key] = copy.deepcopy(other[its_key]), copy.deepcopy(where[key])
        elif name == "merge":
            out |= RECORDS[rng.choice(list(RECORDS))](rng, [])
        names.append(name)
    return "+".join(names), out


def dumped(rng: Random, record: Any) -> bytes:
    """The record as JSON text in UTF-8, half surrogates written as they are where `rng` says so."""
    text = json.dumps(record, ensure_ascii=bool(rng.randrange(2)))
    for n, raw in enumerate(RAW):
        text = text.replace(f'"{_RAW.format(n)}"', raw).replace(_RAW.format(n), "raw")
    if rng.randrange(12) == 0 and text.endswith("}"):  # a key twice
        text = f'{text[:-1]}, "{rng.choice(list(record) or ["id"])}": {json.dumps(rng.choice(("x", None, [], {})))}}}'
    return text.encode("utf-8", "surrogatepass")


def spoil_line(rng: Random, line: bytes) -> bytes:
    """The text of a record with some of its bytes wrong."""
    at = rng.randrange(len(line))
    end = at + rng.choice((1, 2, 10, 100))
    way = rng.randrange(10)
    if way == 0:
        return line[:at]
    if way == 1:
        return line[at:]
    if way == 2:
        return line[:at] + bytes([line[at] ^ 1 << rng.randrange(8)]) + line[at + 1 :]
    if way == 3:
        return line[:at] + line[end:]
    if way == 4:
        odd = (
            b"\0",
            b"\0" * 9,
            b"\xff",
            b"\xc3",
            b"\xed\xa0\x80",
            b"\xf4\x90\x80\x80",
            b"\x1b[31m",
            b"\r",
            b"\x0b",
            b"\n",
        )
        return line[:at] + rng.choice(odd) + line[at:]
    if way == 5:
        return (
            line[:at]
            + rng.choice((b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u", b"\\ud800", b"//"))
            + line[at:]
        )
    if way == 6:
        return line + rng.choice((b",", b"}", line, b" " * 200_000, b"\0", b" null", b"\r", b"\x85", b"\xc2\xa0"))
    if way == 7:
        return (
            rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b" " * 50_000, b"\t", b"\0", b"[", b"\x1f\x8b", b"PAR1")) + line
        )
    if way == 8:
        text = line.decode("utf-8", "replace")
        return text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7")), "replace")
    return line[:at] + line[at:end] * rng.choice((2, 3, 500)) + line[end:]


def spoil_file(rng: Random, data: bytes) -> bytes:
    """A file of records with some of its bytes wrong, wherever they lie."""
    ways = [spoil_line, *(SPOIL_PICTURE[name] for name in ("cut", "flip", "zero", "remove", "repeat", "append"))]
    return rng.choice(ways)(rng, data)


# ------------------------------------------------------------------ mutants


@dataclass(frozen=True)
class Mutant:
    """A record of which something is wrong, as it stands in a file, with the picture that it brings."""

    what: str
    line: bytes
    file: tuple[str, bytes] | None = None
    """Name and content."""


def mutant(rng: Random, name: str, pool: dict[str, bytes]) -> Mutant:
    """A mutant of a valid record about pictures of `pool`: its values, its text or its picture are spoilt."""
    kind = rng.choice(list(RECORDS))
    way = rng.choice(("record", "record", "text", "picture", "picture"))
    if way == "picture":
        return _picture_mutant(rng, name, kind)
    names = rng.choices(list(pool), k=rng.choice((0, 1, 1, 1, 2, 3)))
    record = {"id": name} | RECORDS[kind](rng, [written(rng, p, pool[p]) for p in names])
    if way == "record":
        done, record = spoil_record(rng, record)
        return Mutant(f"{kind}: {done}", dumped(rng, record))
    return Mutant(f"{kind}: text", spoil_line(rng, dumped(rng, record)))


def _picture_mutant(rng: Random, name: str, kind: str) -> Mutant:
    picture, done = rng.choice(list(PICTURES)), rng.choice(list(SPOIL_PICTURE))
    data = SPOIL_PICTURE[done](rng, PICTURES[picture](rng))
    suffix = rng.choice(("png", "jpg", "gif", "webp", "tif", "txt")) if done == "suffix" else picture.partition("-")[0]
    file = f"{name}.{suffix}"
    record = {"id": name} | RECORDS[kind](rng, [written(rng, file, data)])
    return Mutant(f"{kind}: {picture}, {done}", json.dumps(record).encode(), (file, data))
