"""Each faster piece beside what it stands for: microseconds, and the share of the memory's bandwidth. JSON lines.

    python bench/kernel_times.py                                # on a GPU: Qwen2.5-VL-3B, a row of 8 documents
    python bench/kernel_times.py --device cpu --scale 0.01      # does it work?

`plain` is the same function in PyTorch alone (pointwise.py), PEFT's module under autocast, or the kernels that stood
there before; `times` is how much longer that takes. `difference` is between the two results, relative. `share` is the
bytes that must be moved (each input read once, each output written once) over time and the data sheet's bandwidth; it
is left out for what is bound by arithmetic. Without a GPU both sides run the plain functions.

Not kernels.py: transformers would take that for the package of this name.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import workload  # noqa: F401  (puts this checkout first)
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from vlft.models import attention
from vlft.models.kernels import four_bit, pointwise
from vlft.models.kernels.pointwise import Drop
from vlft.models.kernels.product import Products
from vlft.planning.gpus import here

KIND = torch.bfloat16
DROP = Drop(0.05, 2**61 + 12345)
RANK = 64


@dataclass
class Case:
    name: str
    fast: Callable[[], Any]
    plain: Callable[[], Any]
    moved: int = 0
    """bytes, where memory is what limits it"""


def plain(name: str) -> Any:
    """The function of pointwise.py past its kernel."""
    return getattr(pointwise, name).__wrapped__


def size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class Sizes:
    """Of a row of documents: patches of the vision tower, tokens of the language model."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.device = given.device
        self.patches, self.tokens = (max(128, int(n * given.scale)) // 64 * 64 for n in (27_000, 7_300))
        narrow = 1.0 if given.scale == 1.0 else 0.1
        self.vision, self.inner_vision = int(1280 * narrow) // 16 * 16, int(3456 * narrow) // 64 * 64
        self.vocabulary = int(151_936 * narrow)
        self.language, self.inner_language = int(2048 * narrow) // 64 * 64, int(11008 * narrow) // 64 * 64

    def rand(self, *shape: int, kind: torch.dtype = KIND) -> Tensor:
        return torch.randn(*shape, device=self.device).to(kind)


def memory_bound(s: Sizes) -> Iterator[Case]:
    towers = (("vision", s.patches, s.vision, s.inner_vision), ("language", s.tokens, s.language, s.inner_language))
    for tower, rows, width, inner in towers:
        x, branch, d = (s.rand(rows, width) for _ in range(3))
        weight = s.rand(width)

        def case(name: str, args: Callable[[], tuple[Any, ...]], moved: int, tower: str = tower, **more: Any) -> Case:
            fast = getattr(pointwise, name)
            return Case(f"{name} {tower}", lambda: fast(*args(), **more), lambda: plain(name)(*args(), **more), moved)

        yield case("norm", lambda a=(x, branch, weight): (*a, None, 1e-6, KIND), 4 * size(x))
        yield case("norm_backward", lambda a=(d, x, weight, None, 1e-6, d): a, 4 * size(x), trains=True)
        values, d_out = s.rand(rows, 2 * inner), s.rand(rows, inner)
        yield case("activate", lambda a=values: (a, "silu_gated"), 3 * size(d_out))
        # On copies, since it works in place: three passes more over three values each, read and written.
        copied = lambda a=(values, d_out): (a[0].clone(), a[1].clone(), "silu_gated")  # noqa: E731
        of_biases = KIND if tower == "vision" else None
        yield case("activate_backward", copied, 12 * size(d_out), sums=of_biases)
        yield case("column_sums", lambda a=values: (a, KIND), size(values))
        if tower == "language":
            low, a_rd = s.rand(rows, RANK), s.rand(RANK, inner)
            yield case("dropout", lambda a=x: (a, DROP), 2 * size(x))
            yield case("product_dropped", lambda a=(low, a_rd): (*a, DROP), size(low, a_rd, d_out))
            norm = lambda a=(x, weight): (a[0], None, a[1], None, 1e-6, KIND, DROP)  # noqa: E731
            yield case("norm", norm, 3 * size(x), "language, dropped in passing")
    for name, heads, kv_heads, each, rows in (
        ("vision", 16, 16, s.vision // 16, s.patches), ("language", 16, 2, max(16, s.language // 16), s.tokens),
    ):  # fmt: skip
        qkv, cos, sin = s.rand(rows, heads + 2 * kv_heads, each), s.rand(rows, each), s.rand(rows, each)
        parts = [part.contiguous() for part in qkv.split([heads, kv_heads, kv_heads], 1)]
        cos, sin, more = cos.float(), sin.float(), (None, None, 1e-6)
        forward = (qkv, cos, sin, heads, kv_heads, *more)
        backward = (*parts, cos, sin, None, *more)
        for function, args in (("rotate", forward), ("rotate_backward", backward)):
            fast, slow = partial(getattr(pointwise, function), *args), partial(plain(function), *args)
            yield Case(f"{function} {name}", fast, slow, 2 * size(qkv) + size(cos, sin))


def losses(s: Sizes) -> Iterator[Case]:
    """Of the learnt tokens, a tenth of all."""
    logits = s.rand(s.tokens // 10, s.vocabulary)
    labels = torch.randint(s.vocabulary, (len(logits),), device=s.device)
    sums = plain("cross_entropy")(logits, labels)[1]
    fast, slow = (partial(one, logits, labels) for one in (pointwise.cross_entropy, plain("cross_entropy")))
    yield Case("cross_entropy", fast, slow, size(logits))

    def back(function: Callable[..., Tensor]) -> Tensor:
        # On a copy, since it works in place: a pass more that reads and writes.
        return function(logits.clone(), labels, sums, torch.ones_like(sums))

    fast, slow = (partial(back, one) for one in (pointwise.cross_entropy_backward, plain("cross_entropy_backward")))
    yield Case("cross_entropy_backward", fast, slow, 4 * size(logits))


def four_bits(s: Sizes) -> Iterator[Case]:
    """A weight of NF4, against bitsandbytes' own kernels."""
    from bitsandbytes import functional as bnb

    weight = s.rand(s.inner_language, s.language)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    out = torch.empty_like(weight)

    def fast() -> Tensor:
        four_bit.dequantize(packed, state, out)
        return out

    yield Case("NF4 to bf16", fast, partial(bnb.dequantize_4bit, packed, state), size(packed, state.absmax, out))


def windows(s: Sizes) -> Iterator[Case]:
    """Against rotation and flash attention as kernels of their own."""
    heads, each = 16, s.vision // 16
    qkv = s.rand(s.patches, 3 * heads, each)
    cos, sin = (s.rand(s.patches, each // 2).float().repeat(1, 2) for _ in range(2))  # a head's halves turn alike
    d_out = s.rand(s.patches, heads, each)
    borders = torch.arange(0, s.patches + 1, 64, dtype=torch.int32, device=s.device)
    scale = each**-0.5

    def apart(*, learns: bool = False) -> Any:
        turned = pointwise.rotate(qkv, cos, sin, heads, heads, None, None, 1e-6)
        return attention.attend(*turned, borders, 64, scale, causal=False, learns=learns)

    def apart_back() -> Tensor:
        d = attention.attend_backward(apart(learns=True), d_out)
        return pointwise.rotate_backward(*d, cos, sin, None, None, None, 1e-6)[0]

    def at_once_back() -> Tensor:
        return attention.attend_windows_backward(d_out, qkv, cos, sin, borders, scale)

    has = attention.has_windows(qkv, heads, borders, 64, causal=False)
    at_once = lambda: attention.attend_windows(qkv, cos, sin, borders, scale)  # noqa: E731
    moved = size(qkv, d_out, cos, sin)
    yield Case("windows", at_once if has else lambda: apart().out, lambda: apart().out, moved)
    yield Case(
        "windows_backward (plain: both ways)", at_once_back if has else apart_back, apart_back, moved + size(qkv)
    )


def by_flash(function: Callable[[], Any]) -> Any:
    """Of PyTorch's kernels, wherever it would be cuDNN's."""
    before, attention.SHORT = attention.SHORT, 2**31
    try:
        return function()
    finally:
        attention.SHORT = before


def attentions(s: Sizes) -> Iterator[Case]:
    """Of eight segments, against PyTorch's flash kernels."""
    towers = (("vision", s.patches, s.vision, 16, 16), ("language", s.tokens, s.language, 16, 2))
    for tower, rows, width, heads, kv_heads in towers:
        each = max(16, width // heads)
        q, d_out = s.rand(rows, heads, each), s.rand(rows, heads, each)
        k, v = s.rand(rows, kv_heads, each), s.rand(rows, kv_heads, each)
        borders = torch.linspace(0, rows, 9, device=s.device).int()
        longest, causal = int(borders.diff().max()), kv_heads < heads
        attend = partial(attention.attend, q, k, v, borders, longest, each**-0.5, causal=causal)

        def forward(attend: Any = attend) -> Tensor:
            out: Tensor = attend(learns=False).out
            return out

        def both_ways(attend: Any = attend, d_out: Tensor = d_out) -> Tensor:
            return torch.cat([d.flatten() for d in attention.attend_backward(attend(learns=True), d_out)])

        yield Case(f"attention {tower}", forward, partial(by_flash, forward))
        yield Case(f"attention {tower}, both ways", both_ways, partial(by_flash, both_ways))


def products(s: Sizes) -> Iterator[Case]:
    """Adapters' products with their dropout, forward and backward, plain and over 4-bit weights, against PEFT."""
    import peft

    columns, rows = s.language, s.inner_language
    for name, four_bits in (("LoRA", False), ("LoRA over NF4", True)):
        layers = nn.ModuleDict({n: nn.Linear(columns, rows, bias=False, dtype=KIND) for n in ("gate", "up")})
        if four_bits:
            import bitsandbytes as bnb

            for n, layer in layers.items():
                four = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compute_dtype=KIND)
                four.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                layers[n] = four
        options = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["gate", "up"], lora_dropout=DROP.probability)
        model = peft.get_peft_model(layers, options).to(s.device).train()
        modules = [model.base_model.model[n] for n in ("gate", "up")]
        x, d_out = s.rand(s.tokens, columns), s.rand(s.tokens, 2 * rows)
        group = Products(modules)
        with torch.no_grad():
            for target, p, _ in group.hold(KIND, torch.device(s.device)):
                target.copy_(p)

        def ours(group: Any = group, x: Tensor = x, d_out: Tensor = d_out) -> Tensor:
            weights, gradients = group.weights(KIND, x.device), {}
            drop = weights.drop(DROP.seed)
            dropped = x if drop is None else pointwise.dropout(x, drop)
            _, low = weights.forward(x, dropped)
            found = weights.backward(x, dropped, low, d_out, drop, gradients)
            assert found is not None
            return found

        def theirs(modules: Any = modules, x: Tensor = x, d_out: Tensor = d_out) -> Tensor:
            x = x.detach().requires_grad_()
            with torch.autocast(x.device.type, KIND):
                out = torch.cat([module(x) for module in modules], -1)
            out.backward(d_out)
            assert x.grad is not None
            return x.grad

        yield Case(f"{name}, gate and up, both ways", ours, theirs)


def difference(a: Any, b: Any) -> float:
    a, b = (next(t for t in (x if isinstance(x, tuple) else (x,)) if isinstance(t, Tensor)) for x in (a, b))
    return float((a.float() - b.float()).norm() / b.float().norm())


def seconds(function: Callable[[], Any]) -> float:
    found: float = Timer("f()", globals={"f": function}).blocked_autorange(min_run_time=0.1).median
    return found


def measure(case: Case, bandwidth: float) -> dict[str, Any]:
    away = difference(case.fast(), case.plain())
    fast, slow = seconds(case.fast), seconds(case.plain)
    line = {"kernel": case.name, "us": round(fast * 1e6, 1), "plain_us": round(slow * 1e6, 1)}
    line |= {"times": round(slow / fast, 2), "difference": float(f"{away:.2g}")}
    return line | ({"share": round(case.moved / fast / bandwidth, 3)} if case.moved and bandwidth else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=float, default=1.0, help="of the row; below 1 the widths are a tenth, too")
    parser.add_argument("--only", default="", help="names that begin so")
    parser.add_argument("--root", type=Path, help="not used: all benches on a machine are called alike (cards.sh)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    sizes, bandwidth, gpu = Sizes(given), 0.0, "cpu"
    if given.device == "cuda":
        card = here()
        assert card is not None, "no GPU is there; give --device cpu"
        gpu, bandwidth = card.name, card.bandwidth
    with (given.out / "kernels.jsonl").open("a") as file:
        for make in (memory_bound, losses, four_bits, windows, attentions, products):
            for case in make(sizes):
                if not case.name.startswith(given.only):
                    continue
                try:
                    line = measure(case, bandwidth)
                except Exception as error:  # one piece that fails takes no other with it
                    line = {"kernel": case.name, "error": f"{type(error).__name__}: {error}"[:300]}
                text = json.dumps(line | {"gpu": gpu, "torch": torch.__version__})
                print(text, flush=True)
                file.write(text + "\n")


if __name__ == "__main__":
    main()
