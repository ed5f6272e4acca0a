"""A launch by its short key is the one that Triton's own search would have made."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import hollow_gpu
hollow_gpu.install()
import torch
from vlft.compiler.launch import Launch
from vlft.models import attention_on_gpu
from vlft.models.kernels import on_gpu
from vlft.models.kernels.pointwise import Drop
from dataclasses import replace
from vlft.optim import on_gpu as optim
from vlft.optim import rounded
from vlft.optim.remainder import keep_remainder, remainder_of

direct, searched = 0, 0
real = Launch.__call__

def twice(self, *args, **kwargs):
    # Once as it is, once with nothing known.
    global direct, searched
    known = dict(self._known)
    real(self, *args, **kwargs)
    direct += self._known == known and bool(known)
    searched += self._known != known
    mine = hollow_gpu.LAUNCHES[-1]
    self._known.clear()
    real(self, *args, **kwargs)
    self._known |= known
    assert hollow_gpu.LAUNCHES[-1] == mine, (hollow_gpu.LAUNCHES[-1], mine)

Launch.__call__ = twice

def row(n, kind, width, shift=0):
    # `shift` numbers behind an aligned place.
    return torch.zeros(n * width + shift, dtype=kind)[shift:].view(n, width)

for kind in (torch.bfloat16, torch.float32):
    for n in (1, 7, 16):
        for width in (32, 24):
            for shift in (0, 1):
                x, d = row(n, kind, width, shift), row(n, kind, width)
                weight = torch.ones(width)
                on_gpu.norm(x, None, weight, None, 1e-6, kind)
                on_gpu.norm(x, d, weight, weight, 1e-5, kind)
                for trains in (False, True):
                    on_gpu.norm_backward(d, x, weight, None, 1e-6, d, trains=trains)
                    on_gpu.norm_backward(d, x, weight, weight, 1e-6, None, trains=trains)
                drop = Drop(0.05, 2**40 + n)
                on_gpu.norm(x, d, weight, None, 1e-6, kind, drop)
                on_gpu.norm(x, None, weight, None, 1e-6, kind, drop, plain=False)
                on_gpu.dropout(x, drop)
                on_gpu.product_dropped(row(n, kind, 8), row(8, kind, width), drop)
                on_gpu.column_sums(x, kind)
                on_gpu.column_sums(x[:, 1:], torch.float32)
                on_gpu.activate(x, "gelu")
                on_gpu.activate(x, "gelu", drop)
                labels = torch.zeros(n, dtype=torch.int64)
                _, sums = on_gpu.cross_entropy(x, labels)
                on_gpu.cross_entropy_backward(x, labels, sums, sums)
                optim.add_up(x.view(-1), d.view(-1), n)
                if width % 2 == 0:
                    on_gpu.activate(x, "silu_gated")
                    on_gpu.activate_backward(x, d[:, : width // 2].contiguous(), "silu_gated", sums=kind)
                    on_gpu.activate_backward(x, d[:, : width // 2].contiguous(), "silu_gated", drop, plain=False)
    for n in (1, 16, 33):
        q, k = torch.zeros(n, 4, 8, dtype=kind), torch.zeros(n, 2, 8, dtype=kind)
        cos, head = torch.zeros(n, 8), torch.ones(8)
        qkv = torch.zeros(n, 8, 8, dtype=kind)
        for weights in ((None, None), (head, head)):
            on_gpu.rotate(qkv, cos, cos, 4, 2, *weights, 1e-6)
            on_gpu.rotate_backward(q, k, k, cos, cos, qkv if weights[0] is not None else None, *weights, 1e-6)
        borders = torch.tensor([0, n], dtype=torch.int32)
        half = torch.float16 if kind == torch.float32 else kind  # as `varlen_available`
        q, many = q.to(half), torch.zeros(n, 12, 8, dtype=half)
        attention_on_gpu.windows(many, cos, cos, borders, 0.1)
        attention_on_gpu.windows_backward(q, many, cos, cos, borders, 0.1)

for states in ("bf16", "8bit", "fp32"):
    for kind in (torch.bfloat16, torch.float32):
        for size in (5000, 4999):
            w = torch.nn.Parameter(torch.ones(size, dtype=torch.float32 if states == "fp32" else torch.bfloat16))
            optimizer = rounded.KernelAdamW([w], states)
            facts = rounded.facts(optimizer.param_groups[0], 1)
            job = rounded.Job(w.data, torch.ones(size, dtype=kind), optimizer._fresh(w), facts, 3)
            optim.update([job], torch.tensor(1.0), torch.tensor(0.0))
            optim.update([job], None)
            if states == "fp32":
                keep_remainder(w)
                optim.update([replace(job, p=w.data, remainder=remainder_of(w))], None)

print(direct, searched, "forms", len({form for form, _ in hollow_gpu.LAUNCHES}))
assert direct > 50, "the short way is taken"
assert searched > 20
"""


@pytest.mark.slow
def test_every_kernel_is_launched_in_the_form_and_with_what_triton_would_choose(tmp_path: Path) -> None:
    """Of all sizes, and from addresses that no vector can be loaded from, in changing order. None computes in fp64."""
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "bench"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    compiled = [*tmp_path.rglob("*.ptx")]
    assert len(compiled) > 40
    assert [path.stem for path in compiled if ".f64" in path.read_text()] == []


KERNELS = [path for path in (Path(__file__).parents[1] / "vlft").rglob("*.py") if "@triton.jit" in path.read_text()]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.relative_to(path.parents[2])))
def test_no_constant_of_a_kernel_is_one_of_fp64(path: Path) -> None:
    """Below the smallest normal number of fp32 it is one to Triton 3.6, and takes what it meets along."""
    numbers = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    assert [x for x in numbers if isinstance(x, float) and 0.0 < abs(x) < 2.0**-126] == []
