"""Right RGB, bit for bit as Hugging Face's PIL processor; sizes from headers; nothing from outside the roots."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest_data import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vlft.data import images
from vlft.data.formats import ImageRef
from vlft.data.images import content_hash, decode, probe, resolve, smart_resize_batch
from vlft.errors import RecordError


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def refused(reason: str) -> Any:
    class Check:
        def __enter__(self) -> None:
            self.context = pytest.raises(RecordError)
            self.caught = self.context.__enter__()

        def __exit__(self, *args: Any) -> Any:
            handled = self.context.__exit__(*args)
            assert self.caught.value.reason == reason, str(self.caught.value)
            return handled

    return Check()


# ------------------------------------------------------------------ sizes


@settings(max_examples=400, deadline=None)
@given(
    h=st.integers(1, 5000), ratio=st.floats(0.006, 190), factor=st.sampled_from([28, 32]),
    low=st.integers(1, 200_000), more=st.integers(0, 2_000_000),
)  # fmt: skip
def test_smart_resize_equals_hugging_face(h: int, ratio: float, factor: int, low: int, more: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    w = max(1, round(h * ratio))
    if max(h, w) > 200 * min(h, w):
        return
    ours = smart_resize_batch(np.array([h]), np.array([w]), factor, low, low + more)
    assert (int(ours[0][0]), int(ours[1][0])) == smart_resize(h, w, factor, low, low + more)


# ------------------------------------------------------------------ pixels


def processor() -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 200 * 200}, do_normalize=False, do_rescale=False
    )


def hugging_face(image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
    """Pixels (3, H, W) that the processor's patches were cut from, and (W, H)."""
    out = processor()(images=[image], return_tensors="np")
    _, gh, gw = out["image_grid_thw"][0].tolist()
    patches = out["pixel_values"].reshape(gh // 2, gw // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    return patches.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, gh * 14, gw * 14), (gw * 14, gh * 14)


def palette() -> Image.Image:
    return picture(5, 90, 61).quantize(16)


def transparent_palette() -> bytes:
    return encoded(palette(), transparency=bytes(range(0, 256, 16)))


CASES = {
    "rgb": lambda: encoded(picture(1, 130, 95)),
    "jpeg": lambda: encoded(picture(2, 301, 222), "JPEG"),
    "enlarged": lambda: encoded(picture(3, 20, 31)),
    "rgba": lambda: encoded(picture(4, 90, 61).convert("RGBA").rotate(30, fillcolor=(9, 9, 9, 0))),
    "la": lambda: encoded(Image.merge("LA", [picture(4, 90, 61).convert("L"), picture(6, 90, 61).convert("L")])),
    "grey": lambda: encoded(picture(5, 90, 61).convert("L")),
    "bilevel": lambda: encoded(picture(5, 90, 61).convert("1")),
    "palette": lambda: encoded(palette()),
    "palette with transparency": transparent_palette,
    "gif with transparency": lambda: encoded(palette(), "GIF", transparency=3),
    "rgb with a transparent colour": lambda: encoded(Image.new("RGB", (80, 60), (1, 2, 3)), transparency=(1, 2, 3)),
    "cmyk": lambda: encoded(picture(6, 90, 61).convert("CMYK"), "JPEG"),
    "webp": lambda: encoded(picture(7, 90, 61), "WEBP", lossless=True),
    "ycbcr tiff": lambda: encoded(picture(7, 90, 61), "TIFF"),
    "bmp": lambda: encoded(picture(8, 90, 61), "BMP"),
}


@pytest.mark.parametrize("name", CASES)
def test_pixels_equal_hugging_faces_processor_bit_for_bit(name: str) -> None:
    data = CASES[name]()
    theirs, size = hugging_face(Image.open(io.BytesIO(data)))
    ours = decode(data, size)
    assert ours.dtype == np.uint8
    assert ours.flags.c_contiguous
    assert np.array_equal(ours, theirs.astype(np.uint8))
    assert probe(data) == Image.open(io.BytesIO(data)).size


def test_transparency_is_white_paper() -> None:
    data = encoded(Image.new("RGBA", (60, 60), (0, 0, 0, 0)))
    assert decode(data, (56, 56)).min() == 255


def corners(array: np.ndarray) -> list[int]:
    return [int(array[0, y, x]) for y in (2, -3) for x in (2, -3)]


def quarters(mode: str = "RGB") -> Image.Image:
    """112 wide, 56 high, four grey quarters."""
    grey = np.repeat(np.repeat(np.array([[10, 80], [150, 220]], np.uint8), 28, 0), 56, 1)
    return Image.fromarray(grey).convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    data = encoded(quarters(), format, exif=exif, **options)
    right = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    size = probe(data)
    assert size == right.size == ((56, 112) if orientation > 4 else (112, 56))
    expected = np.asarray(right.convert("RGB")).transpose(2, 0, 1)
    assert corners(decode(data, size, expect_wh=size)) == corners(expected)


def test_exif_behind_the_pixels_of_a_png() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(quarters())
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    late = data[:-12] + chunk + data[-12:]
    assert probe(late) == (56, 112)
    assert decode(late, (56, 112), expect_wh=(56, 112)).shape == (3, 112, 56)


def test_probing_decodes_nothing(monkeypatch: Any) -> None:
    from PIL import ImageFile

    def load(self: Any) -> None:
        raise AssertionError("decoded")

    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        data = encoded(quarters(), format)
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", load)
            assert probe(data) == (112, 56)


def test_damaged_exif_is_no_reason_to_lose_a_picture() -> None:
    data = encoded(quarters(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff garbage")
    assert decode(data, (112, 56), expect_wh=probe(data)).shape == (3, 56, 112)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 56 * 56).reshape(56, 56).astype(np.uint16)
    for data in (encoded(Image.fromarray(ramp)), encoded(Image.fromarray(ramp), "TIFF")):
        out = decode(data, (56, 56))
        assert np.abs(out[0].astype(int) - np.round(ramp / 257)).max() <= 1
        assert (out[0] == out[2]).all()
    for deep in (ramp.astype(np.int32), ramp.astype(np.float32), (ramp / 65535).astype(np.float32)):
        out = decode(encoded(Image.fromarray(deep), "TIFF"), (56, 56))
        assert np.abs(out[0].astype(int) - np.round(ramp / 257)).max() <= 1
    low = (ramp // 257).astype(np.int32)
    assert np.array_equal(decode(encoded(Image.fromarray(low), "TIFF"), (56, 56))[0], low)


def test_sixteen_bits_a_channel() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    for kind, channels in ((2, 3), (6, 4)):
        deep = np.random.default_rng(0).integers(0, 65536, (56, 56, channels), np.uint16)
        deep[..., 3:] = 65535
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
        header = struct.pack(">IIBBBBB", 56, 56, 16, kind, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        out = decode(data, (56, 56)).transpose(1, 2, 0).astype(int)
        assert np.abs(out - deep[..., :3] / 257).max() <= 1


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_animated_files_give_their_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (60, 60), c) for c in ((200, 0, 0), (0, 200, 0))]
    data = encoded(
        frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})
    )
    out = decode(data, (56, 56))
    assert out[0].mean() > 150 > 50 > out[1].mean()


# ------------------------------------------------------------------ what is refused


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(b"")
    ) + chunk(b"IEND", b"")  # fmt: skip


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image_unreadable"),
        (b"not a picture", "image_unreadable"),
        (b"<svg></svg>", "image_unreadable"),
        (encoded(picture(0, 30, 30))[:20], "image_unreadable"),
        (png_header(20_000, 20_000), "image_bomb"),
        (png_header(60_000, 60_000), "image_bomb"),
        (png_header(402, 2), "image_aspect"),
        (png_header(1, 300), "image_aspect"),
    ],
)
def test_headers_that_are_refused(data: bytes, reason: str) -> None:
    with refused(reason):
        probe(data)


def test_limits_can_be_set_and_one_pixel_high_is_fine_within_them() -> None:
    with refused("image_bomb"):
        probe(encoded(picture(0, 30, 30)), max_image_pixels=800)
    assert probe(encoded(picture(0, 200, 1))) == (200, 1)
    assert decode(encoded(picture(0, 200, 1)), (812, 28)).shape == (3, 28, 812)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_files_have_a_size_but_no_pixels(format: str) -> None:
    data = encoded(picture(0, 200, 200), format)
    cut = data[: len(data) // 2]
    with pytest.raises(RecordError) as caught:
        decode(cut, (56, 56))
    assert caught.value.reason in ("image_truncated", "image_unreadable")


@settings(max_examples=150, deadline=None)
@given(
    where=st.floats(0, 1),
    junk=st.binary(min_size=1, max_size=40),
    format=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP"]),
)
def test_damage_gives_a_record_error_or_a_picture_and_nothing_else(where: float, junk: bytes, format: str) -> None:
    data = bytearray(encoded(picture(0, 40, 30), format))
    at = int(where * (len(data) - 1))
    data[at : at + len(junk)] = junk
    try:
        size = probe(bytes(data))
        assert decode(bytes(data), (56, 56)).shape == (3, 56, 56)
        assert min(size) > 0
    except RecordError as error:
        if not error.reason.startswith("image_"):
            raise


def test_a_picture_that_was_replaced_since_it_was_indexed() -> None:
    with refused("image_changed"):
        decode(encoded(picture(0, 40, 30)), (56, 56), expect_wh=(30, 40))


# ------------------------------------------------------------------ paths, hashes, remote


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for folder in ("root", "root2", "other"):
        (tmp_path / folder).mkdir()
        picture(1, 30, 30).save(tmp_path / folder / "a.png")
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "other" / "a.png")
    (tmp_path / "root" / "within.png").symlink_to(tmp_path / "root" / "a.png")
    return tmp_path


def at(tree: Path, path: str, *allowed: Path) -> Any:
    return resolve(ImageRef("path", path), tree / "root", allowed)


def test_paths_inside_the_root(tree: Path) -> None:
    for path in ("a.png", "./a.png", "x/../a.png", "within.png", str(tree / "root" / "a.png")):
        assert at(tree, path) == str(tree / "root" / "a.png")


@pytest.mark.parametrize(
    "path", ["../other/a.png", "../root2/a.png", "link.png", "{tree}/other/a.png", "/etc/passwd", "x/../../other/a.png"]
)
def test_paths_that_leave_the_root(tree: Path, path: str) -> None:
    with refused("path_outside_root"):
        at(tree, path.format(tree=tree))
    if "etc" not in path and "root2" not in path:
        assert at(tree, path.format(tree=tree), tree / "other") == str(tree / "other" / "a.png")


def test_missing_files_and_folders(tree: Path) -> None:
    for path in ("b.png", "", ".", "x" * 300):
        with refused("path_outside_root" if path in ("", ".") else "image_missing"):
            at(tree, path)
    (tree / "root" / "sub").mkdir()
    with refused("image_missing"):
        at(tree, "sub")


def test_equal_pictures_hash_equally_wherever_they_are(tree: Path) -> None:
    data = (tree / "root" / "a.png").read_bytes()
    assert content_hash(data) == content_hash(str(tree / "other" / "a.png"))
    big = os.urandom(100_000)
    assert content_hash(big) == content_hash(bytes(big))
    assert content_hash(big) != content_hash(big[:-1])
    assert content_hash(big) != content_hash(big[:-1] + bytes([big[-1] ^ 1]))


def test_remote_only_by_the_flag_once_and_with_a_cap(tmp_path: Path, monkeypatch: Any) -> None:
    served = (tmp_path / "a.png").absolute()
    picture(1, 30, 30).save(served)
    ref = ImageRef("url", "http://host/a.png")
    with refused("remote_refused"):
        resolve(ref, tmp_path, ())
    calls = []

    def urlopen(request: Any, timeout: float) -> Any:
        calls.append(timeout)
        return served.open("rb")

    monkeypatch.setattr(images.urllib.request, "urlopen", urlopen)
    first = resolve(ref, tmp_path, (), allow_remote=True, cache_dir=tmp_path / "cache")
    assert probe(first) == (30, 30)
    assert resolve(ref, tmp_path, (), allow_remote=True, cache_dir=tmp_path / "cache") == first
    assert len(calls) == 1
    with refused("remote_failed"):
        images.fetch("http://host/b.png", tmp_path / "cache", max_bytes=10)

    def broken(request: Any, timeout: float) -> Any:
        raise TimeoutError("too slow")

    monkeypatch.setattr(images.urllib.request, "urlopen", broken)
    with refused("remote_failed"):
        images.fetch("http://host/c.png", tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "remote").iterdir())) == 1
