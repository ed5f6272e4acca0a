"""Pictures: sizes from headers, right RGB at the final size, and nothing from outside the allowed folders.

Legend: H, W height and width in pixels.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import os
import stat
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from vlft.data.formats import ImageRef
from vlft.data.patience import DELAYS, passes, patient
from vlft.errors import RecordError

P = ParamSpec("P")
T = TypeVar("T")
Source: TypeAlias = str | Path | bytes
"""A path that was checked, or the encoded file itself."""

MAX_IMAGE_PIXELS = 178_956_970
"""Pixels of the stored picture above which it is refused as a decompression bomb: twice Pillow's warning limit, as
Pillow.
"""
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "MPO", "PPM", "ICO", "TGA", "PCX",
    "SGI", "QOI",
)  # fmt: skip
"""Formats that are pictures and nothing else: for EPS, Pillow would start Ghostscript on a stranger's program."""
MAX_ASPECT = 200
"""Longer side by shorter side; Qwen-VL's processors refuse more."""
MAX_DOWNLOAD = 64 * 2**20
"""Bytes of a remote picture."""
_EDGE = 32 * 1024
_ORIENTATION = 0x0112


# ------------------------------------------------------------------ where a picture is


def resolve(
    ref: ImageRef,
    root: Path,
    allowed_roots: Sequence[Path],
    *,
    allow_remote: bool = False,
    cache_dir: Path | None = None,
) -> Source:
    """The file of a picture, after the checks; bytes for an embedded one.

    Raises:
        RecordError: `path_outside_root` (after links and `..`), `image_missing`, `remote_refused`, `remote_failed`.
    """
    if ref.kind == "bytes":
        return ref.data
    if ref.kind == "url":
        if not allow_remote or cache_dir is None:
            raise RecordError("remote_refused", f"{ref.value} is remote; download it, or pass --allow_remote_images.")
        return fetch(ref.value, cache_dir)
    path = os.path.realpath(os.path.join(root, os.path.expanduser(ref.value)))
    if not path.startswith(_real_roots(root, *allowed_roots)):
        raise RecordError(
            "path_outside_root", f"{ref.value} leads to {path}, outside {root}; add its folder to 'allowed_roots'."
        )
    if not _is_file(path):
        found = "is no file" if os.path.exists(path) else "does not exist"
        raise RecordError("image_missing", f"{path} {found}; check 'image_root' in the registry.")
    return path


@lru_cache(maxsize=64)
def _real_roots(*roots: Path) -> tuple[str, ...]:
    """With a separator at the end: /data must not admit /data2."""
    real = [os.path.realpath(root) for root in roots]
    return tuple(root if root.endswith(os.sep) else root + os.sep for root in real)


def fetch(url: str, cache_dir: Path, *, timeout: float = 20.0, max_bytes: int = MAX_DOWNLOAD) -> str:
    """Download once; the file's path in the cache.

    Args:
        timeout: seconds without an answer.
        max_bytes: larger files are refused.
    Raises:
        RecordError: `remote_failed`.
    """
    folder = Path(cache_dir) / "remote"
    target = folder / xxhash.xxh3_128_hexdigest(url.encode())
    if target.exists():
        return str(target)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "vlft"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            data = answer.read(max_bytes + 1)
            missing = getattr(answer, "length", None) or 0
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise RecordError("remote_failed", f"{url} cannot be downloaded: {error}; check the address.") from None
    if len(data) > max_bytes:
        raise RecordError("remote_failed", f"{url} has more than {max_bytes} bytes; download a smaller copy.")
    if missing:  # read(n) takes a connection that breaks off for the end; half a picture would stay in the cache
        raise RecordError("remote_failed", f"{url} broke off {missing} bytes before its end; try again.")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{target.name}.{os.getpid()}.part"
    part.write_bytes(data)
    os.replace(part, target)  # whole or absent: a run that is killed here leaves no half picture behind
    return str(target)


# ------------------------------------------------------------------ headers


def _name(source: Source) -> str:
    return f"an embedded picture of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _stream(source: Source) -> IO[bytes]:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that are there, extensions like pillow-heif's included."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[Any]:
    """The picture as Pillow opens it (headers only), its errors as RecordError."""
    from PIL import Image, UnidentifiedImageError

    name = _name(source)
    try:
        with warnings.catch_warnings():
            # Our own limit applies; Pillow's warning would count a merely large picture as a bomb.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with _stream(source) as stream, Image.open(stream, formats=_formats()) as picture:
                yield picture
    except RecordError:
        raise
    except FileNotFoundError:
        raise RecordError(
            "image_missing", f"{name} does not exist; it was there when the data was indexed: put it back."
        ) from None
    except Image.DecompressionBombError as error:
        what = str(error).partition(", could be")[0]
        raise RecordError("image_bomb", f"{name}: {what}; scale it down.") from None
    except UnidentifiedImageError:
        raise RecordError(
            "image_unreadable", f"{name} is no picture in a format that Pillow knows; replace it."
        ) from None
    except Exception as error:
        if passes(error):
            raise  # for `_patiently`
        # Pillow's plugins raise struct.error, zlib.error and more on damaged files: one file must not end a run.
        raise RecordError(
            "image_unreadable", f"{name} cannot be read: {type(error).__name__}: {error}; replace it."
        ) from None


def _patiently(function: Callable[Concatenate[Source, P], T]) -> Callable[Concatenate[Source, P], T]:
    """Wait for a network file system that is away; after that, the picture is `unreachable`."""
    trying = patient(function)

    @functools.wraps(function)
    def reaching(source: Source, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return trying(source, *args, **kwargs)
        except OSError as error:
            if not passes(error):
                raise
            text = (
                f"{_name(source)} could not be reached for {sum(DELAYS):.0f} s: {error}; look at its disk or network."
            )
            raise RecordError("unreachable", text) from None

    return reaching


@_patiently
def _is_file(path: Source) -> bool:
    """As os.path.isfile, which says no where a network file system is only away."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        if passes(error):
            raise
        return False


@_patiently
def probe(source: Source, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels after EXIF orientation, from headers alone.

    Raises:
        RecordError: `image_unreadable`, `image_missing`, `image_empty`, `image_bomb`, `image_aspect`.
    """
    with _opened(source) as picture:
        width, height = picture.size
        _check_size(width, height, _name(source), max_image_pixels)
        # 5 to 8 of the EXIF orientations lie on their side. Pillow turns TIFF itself, and says so in the size.
        on_side = picture.format != "TIFF" and _orientation(picture, source) in (5, 6, 7, 8)
        return (height, width) if on_side else (width, height)


def _orientation(picture: Any, source: Source) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or it is damaged (the picture itself is fine then)."""
    from PIL import Image

    try:
        if picture.format == "PNG" and not _png_exif_follows(source):
            # PNG's own getexif decodes the whole picture to look behind its pixels.
            return int(Image.Image.getexif(picture).get(_ORIENTATION, 1))
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _png_exif_follows(source: Source) -> bool:
    """A PNG has EXIF or XMP behind its pixels, where opening it does not look."""
    pixels_seen = False
    with _stream(source) as stream:
        stream.seek(8)
        while len(head := stream.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind in (b"IEND", b"fcTL") and pixels_seen:
                return False
            pixels_seen |= kind == b"IDAT"
            if pixels_seen and kind == b"eXIf":
                return True
            if pixels_seen and kind in (b"tEXt", b"zTXt", b"iTXt"):
                word = stream.read(min(length, 21))
                if word == b"Raw profile type exif" or word.startswith(b"XML:com.adobe.xmp"):
                    return True
                stream.seek(-len(word), os.SEEK_CUR)
            stream.seek(length + 4, os.SEEK_CUR)
    return False


def _check_size(width: int, height: int, name: str, max_image_pixels: int) -> None:
    if width < 1 or height < 1:
        raise RecordError("image_empty", f"{name} is {width} x {height} pixels; replace it.")
    if width * height > max_image_pixels:
        raise RecordError(
            "image_bomb", f"{name} has {width * height} pixels, more than {max_image_pixels}; scale it down."
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RecordError(
            "image_aspect",
            f"{name} is {width} x {height}: one side is more than {MAX_ASPECT} times the other; crop it.",
        )


@_patiently
def content_hash(source: Source) -> int:
    """64-bit hash of (size, first 32 KiB, last 32 KiB): equal files always hash equally, whatever they are called."""
    with _stream(source) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        digest = xxhash.xxh3_64(size.to_bytes(8, "little") + stream.read(_EDGE))
        stream.seek(max(0, size - _EDGE))
        digest.update(stream.read(_EDGE))
    return digest.intdigest()


# ------------------------------------------------------------------ pixels


@_patiently
def decode(
    source: Source,
    size_wh: tuple[int, int],
    *,
    expect_wh: tuple[int, int] | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> npt.NDArray[np.uint8]:
    """The picture as right RGB at its final size.

    The order (orientation, RGB, resize) and the filter are those of Hugging Face's Qwen2VLImageProcessorPil, whose
    pixels this equals bit for bit.

    Args:
        size_wh: final (width, height).
        expect_wh: (width, height) that the index knows; another size is refused, since the plan was made for this one.
    Returns:
        (3, H, W) uint8.
    Raises:
        RecordError: as `probe`, `image_truncated` and `image_changed`.
    """
    from PIL import Image

    with _opened(source) as picture:
        _check_size(picture.width, picture.height, _name(source), max_image_pixels)
        rgb = to_rgb(_upright(_loaded(picture, source), source))
        if expect_wh is not None and rgb.size != tuple(expect_wh):
            raise RecordError(
                "image_changed",
                f"{_name(source)} is {rgb.width} x {rgb.height} pixels, not the {expect_wh[0]} x {expect_wh[1]} of the "
                "index; it was replaced since: delete the cache folder.",
            )
        resized = rgb.resize(size_wh, resample=Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(resized, np.uint8).transpose(2, 0, 1))


def _loaded(picture: Any, source: Source) -> Any:
    """The first frame, decoded."""
    if getattr(picture, "is_animated", False):
        picture.seek(0)
    try:
        picture.load()
    except OSError as error:
        if passes(error):
            raise
        raise RecordError("image_truncated", f"{_name(source)} cannot be decoded: {error}; replace it.") from None
    return picture


def _upright(picture: Any, source: Source) -> Any:
    """`ImageOps.exif_transpose` without its writing of EXIF back, which fails on damaged EXIF."""
    from PIL import Image

    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(_orientation(picture, source))
    if turn is None:
        return picture
    turned = picture.transpose(turn)
    if "transparency" in picture.info:
        turned.info["transparency"] = picture.info["transparency"]
    return turned


def to_rgb(picture: Any) -> Any:
    """RGB as Hugging Face's `convert_to_rgb` makes it (transparency on white), and right for 16 bits and floats.

    Pillow clips 16-bit grey to 255 when it converts it, which leaves a white sheet; here it is scaled.
    """
    from PIL import Image

    if picture.mode.startswith("I") or picture.mode == "F":
        return _from_deep_grey(picture)
    if "A" in picture.getbands() or "a" in picture.getbands() or picture.info.get("transparency") is not None:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")


def _from_deep_grey(picture: Any) -> Any:
    """16-bit or float grey as 8-bit RGB: 0..65535 becomes 0..255.

    32-bit and float files that hold 8-bit values (0..255, or 0..1 for floats) keep their range.
    """
    from PIL import Image

    grey = np.asarray(picture, np.float64)
    top = float(np.nanmax(grey, initial=0.0))
    if picture.mode == "F" and top <= 1.0:
        scale = 255.0
    elif picture.mode in ("F", "I") and top <= 255.0:
        scale = 1.0
    else:
        scale = 255.0 / 65535.0
    grey8 = np.nan_to_num(grey * scale).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey8, "L").convert("RGB")


# ------------------------------------------------------------------ sizes

IntArray: TypeAlias = npt.NDArray[np.int64]


def smart_resize_batch(
    height: npt.ArrayLike, width: npt.ArrayLike, factor: int, min_pixels: npt.ArrayLike, max_pixels: npt.ArrayLike
) -> tuple[IntArray, IntArray]:
    """Final (heights, widths) of many pictures, equal to `smart_resize` of transformers' Qwen2-VL processor.

    Args:
        height, width: pixels after EXIF orientation.
        factor: both final sides are multiples of it (patch size x merge size).
        min_pixels, max_pixels: limits of the final area, for all or for each.
    """
    h, w = np.asarray(height, np.float64), np.asarray(width, np.float64)
    low, high = np.asarray(min_pixels, np.float64), np.asarray(max_pixels, np.float64)
    # np.round is Python's round: halves go to the even number.
    h_bar, w_bar = np.round(h / factor) * factor, np.round(w / factor) * factor
    area = h_bar * w_bar
    big, small = area > high, area < low
    beta = np.sqrt((h * w) / high)
    h_bar = np.where(big, np.maximum(factor, np.floor(h / beta / factor) * factor), h_bar)
    w_bar = np.where(big, np.maximum(factor, np.floor(w / beta / factor) * factor), w_bar)
    beta = np.sqrt(low / (h * w))
    h_bar = np.where(small & ~big, np.ceil(h * beta / factor) * factor, h_bar)
    w_bar = np.where(small & ~big, np.ceil(w * beta / factor) * factor, w_bar)
    return h_bar.astype(np.int64), w_bar.astype(np.int64)
