"""Peak arithmetic of GPUs, for MFU: dense tensor-core products of bf16 or fp16 that accumulate in fp32.

NVIDIA's data sheets print numbers "with sparsity", twice as large; GeForce's headline numbers accumulate in fp16.
Sources:

* Hopper, Blackwell: data sheets of H100, H200, H200 NVL, GH200, H20, DGX/HGX B200 and GB200 NVL72 (sparse / 2); the
  export variants H800, A800 have the arithmetic of H100, A100.
* Ampere: data sheets of A100, A30, A40, A10, RTX A6000; GA102 white paper v2.1 (table 2: RTX 3080, 3090).
  A10G: NVIDIA A10G data sheet for AWS, 70 TFLOP/s, not the 125 of A10.
* Ada: data sheets of L4, L40, L40S, RTX 6000 Ada; Ada white paper v2.1 (table 2: RTX 4090, 4080).
* RTX Blackwell: white paper v1.1 (RTX 5090, 5080).
* Volta, Turing: data sheets of V100, V100S, T4. They have no bf16.
"""

from __future__ import annotations

import re

_TERA = 1e12
# By what is left of the device's name after `plain_name`. TFLOP/s.
_BOTH: dict[str, float] = {
    "gb200": 2500,
    "b200": 2250,
    "gh200": 989.4,
    "h200": 989.4,
    "h200 nvl": 835.5,
    "h100": 989.4,
    "h100 nvl": 835.5,
    "h100 pcie": 756,
    "h100 hbm2e": 756,  # the name of the PCIe card in older drivers
    "h800": 989.4,
    "h800 pcie": 756,
    "h20": 148,
    "a100": 312,
    "a100 pcie": 312,
    "a800": 312,
    "a800 pcie": 312,
    "a30": 165,
    "a40": 149.7,
    "a10": 125,
    "a10g": 70,
    "l4": 121,
    "l40": 181.05,
    "l40s": 362.05,
    "rtx a6000": 154.8,
    "rtx 6000 ada generation": 364.2,
    "rtx 5090": 209.5,
    "rtx 5080": 112.6,
    "rtx 4090": 165.2,
    "rtx 4080": 97.5,
    "rtx 3090": 71,
    "rtx 3080": 59.5,
}
_FP16_ONLY: dict[str, float] = {"v100": 125, "v100 pcie": 112, "v100s pcie": 130, "t4": 65}


def plain_name(device_name: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `h100`, `Tesla V100-PCIE-16GB` -> `v100 pcie`. What matters stays: PCIe, NVL, MIG."""
    dropped = r"nvidia|tesla|geforce|graphics|sxm\d*|\d+gb?|hbm2|hbm3e?"
    words = re.split(r"[\s-]+", device_name.lower())
    return " ".join(word for word in words if not re.fullmatch(dropped, word))


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device; None where it is not known (a laptop's chip, a MIG slice, fp32, no GPU).

    Args:
        device_name: as `torch.cuda.get_device_name()` prints it.
        dtype: of the products: bf16, fp16, bfloat16, float16, with or without `torch.`.
    """
    kind = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}.get(dtype.removeprefix("torch."))
    if kind is None:
        return None
    known = _BOTH if kind == "bf16" else _BOTH | _FP16_ONLY
    found = known.get(plain_name(device_name))
    return None if found is None else found * _TERA


def known_gpus() -> list[str]:
    """By `plain_name`."""
    return [*_BOTH, *_FP16_ONLY]
