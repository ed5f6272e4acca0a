"""What a GPU has: memory, bandwidth, arithmetic. By name for those that are not here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlft.errors import ConfigError
from vlft.models.peaks import known_gpus, peak_flops, plain_name
from vlft.rivals import nearest

GIB = 2**30

# GiB of memory as sold, and GB/s of its bandwidth, from the data sheets that vlft/models/peaks.py lists.
_MEMORY: dict[str, tuple[float, float]] = {
    "gb200": (186, 8000), "b200": (180, 8000), "gh200": (96, 4000), "h200": (141, 4800), "h200 nvl": (141, 4800),
    "h100": (80, 3350), "h100 nvl": (94, 3900), "h100 pcie": (80, 2000), "h100 hbm2e": (80, 2000), "h800": (80, 3350),
    "h800 pcie": (80, 2000), "h20": (96, 4000), "a100": (80, 2039), "a100 pcie": (80, 1935), "a800": (80, 2039),
    "a800 pcie": (80, 1935), "a30": (24, 933), "a40": (48, 696), "a10": (24, 600), "a10g": (24, 600), "l4": (24, 300),
    "l40": (48, 864), "l40s": (48, 864), "rtx a6000": (48, 768), "rtx 6000 ada generation": (48, 960),
    "rtx 5090": (32, 1792), "rtx 5080": (16, 960), "rtx 4090": (24, 1008), "rtx 4080": (16, 717),
    "rtx 3090": (24, 936), "rtx 3080": (10, 760), "v100": (32, 900), "v100 pcie": (32, 900), "v100s pcie": (32, 1134),
    "t4": (16, 320),
}  # fmt: skip
_HOPPER = ("h100", "h200", "h800", "h20", "gh200")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*gi?b\b", re.IGNORECASE)


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: float
    """bytes that a process can have"""
    bandwidth: float
    """bytes/s"""
    peak: float
    """FLOP/s of dense products in bf16"""
    by_cudnn: bool = False
    """Attention runs so there (`vlft.models.attention_by_cudnn`)."""


def by_name(text: str) -> Gpu:
    """`RTX 4090 24GB`, `H100`, `A100 40GB`: a size in the text goes before the table's.

    Raises:
        ConfigError: no such GPU is known; the message lists those that are.
    """
    size = _SIZE.search(text)
    name = plain_name(_SIZE.sub(" ", text).strip())
    if name not in _MEMORY:
        known = ", ".join(sorted(_MEMORY))
        raise ConfigError(f"--gpu {text}: this GPU is not known here{nearest(name, _MEMORY)}; known: {known}.")
    memory, bandwidth = _MEMORY[name]
    peak = peak_flops(name, "bfloat16") or peak_flops(name, "float16")
    assert peak is not None
    return Gpu(text, usable(float(size[1]) if size else memory), bandwidth * 1e9, peak, name.startswith(_HOPPER))


def usable(sold: float) -> float:
    """Bytes of a card sold with so many GB: drivers keep 1 to 2%, and a maker's GB may be 10^9."""
    return sold * GIB * 0.985


def here() -> Gpu | None:
    """The GPU at hand."""
    import torch

    from vlft.models import attention_by_cudnn

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    _, total = torch.cuda.mem_get_info()
    bandwidth = _MEMORY.get(plain_name(name), (0, 1000))[1]
    peak = peak_flops(name, "bfloat16") or peak_flops(name, "float16") or 100e12
    device = torch.device("cuda", torch.cuda.current_device())
    return Gpu(name, float(total), bandwidth * 1e9, peak, attention_by_cudnn.available(device))


assert set(_MEMORY) == set(known_gpus())
