"""Names as `torch.cuda.get_device_name()` prints them."""

from __future__ import annotations

import pytest

from vlft.models.peaks import peak_flops

NAMES = {
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 80GB HBM2e": 756,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H800": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA GH200 144G HBM3e": 989.4,
    "NVIDIA B200": 2250,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181.05,
    "NVIDIA L40S": 362.05,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA RTX 6000 Ada Generation": 364.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 4080": 97.5,
    "NVIDIA GeForce RTX 3090": 71,
    "GeForce RTX 3080": 59.5,
}


@pytest.mark.parametrize("name", NAMES)
def test_known(name: str) -> None:
    for dtype in ("bf16", "fp16", "bfloat16", "torch.float16"):
        assert peak_flops(name, dtype) == pytest.approx(NAMES[name] * 1e12)
    assert peak_flops(name, "fp32") is None
    assert peak_flops(name, "no") is None


@pytest.mark.parametrize(
    ("name", "tera"), [("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112)]
)
def test_before_bf16(name: str, tera: float) -> None:
    assert peak_flops(name, "fp16") == tera * 1e12
    assert peak_flops(name, "bf16") is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3080 Ti",
        "AMD Instinct MI300X",
        "NVIDIA A1000",
        "cpu",
        "",
    ],
)
def test_unknown_is_no_guess(name: str) -> None:
    assert peak_flops(name, "bf16") is None
