"""A machine on which Triton compiles nothing: found out once, said in one line, and everything runs without."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlft import compiler
from vlft.models import attention, attention_by_cudnn
from vlft.models.kernels import pointwise
from vlft.optim import rounded
from vlft.setup import kernels_sentence

ASKED = (compiler.trouble, pointwise.kernels, attention._short, rounded._on_gpu)


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    for one in ASKED:
        one.cache_clear()
    yield
    for one in ASKED:
        one.cache_clear()


def test_the_kernel_adds() -> None:
    """In Triton's interpreter, which interprets a whole process."""
    pytest.importorskip("triton")
    script = "from vlft.compiler.on_gpu import one_and_one; print(one_and_one('cpu'))"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2.0", done.stderr[-2000:]


def failing(error: Exception) -> Any:
    def launch(*_: Any, **__: Any) -> float:
        raise error

    return launch


def test_without_triton_nobody_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "vlft.compiler.on_gpu", raising=False)  # which a GPU's tests have loaded before
    assert "triton" in compiler.trouble()
    assert [one() for one in ASKED[1:]] == [None, None, None]


def test_a_first_launch_that_fails_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton says it on a machine without a compiler."""
    pytest.importorskip("triton")
    error = RuntimeError("Failed to find C compiler.\n Please specify via CC environment variable.")
    monkeypatch.setattr(compiler, "try_one", failing(error))
    assert compiler.trouble().startswith("RuntimeError: Failed to find C compiler. Please specify")
    assert [one() for one in ASKED[1:]] == [None, None, None]


def test_it_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def launch() -> float:
        asked.append(1)
        return 2.0

    monkeypatch.setattr(compiler, "try_one", launch)
    assert compiler.trouble() == ""
    for one in ASKED:
        one()
    assert len(asked) == 1


def test_a_wrong_sum_is_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "try_one", lambda: 1.0)
    assert compiler.trouble() == "a kernel that adds 1 to 1 gave 1.0"


@pytest.mark.parametrize("before", [None, "/somewhere"])
def test_without_a_compiler_what_another_machine_compiled_does_not_count(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    seen = []

    def launch() -> float:
        seen.append(os.environ.get("TRITON_CACHE_DIR"))
        return 2.0

    monkeypatch.setattr(compiler, "try_one", launch)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    if before:
        monkeypatch.setenv("TRITON_CACHE_DIR", before)
    for there in ("sh", "no-such-compiler"):
        monkeypatch.setenv("CC", there)
        compiler.trouble.cache_clear()
        compiler.trouble()
    assert seen[0] == before
    assert seen[1] not in (None, before)
    assert os.environ.get("TRITON_CACHE_DIR") == before


def test_the_start_of_a_run_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(items: list[str]) -> list[str]:
        return [*items, "of another machine"]

    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(compiler, "try_one", lambda: 2.0)
    assert kernels_sentence(cpu, gather) == []
    assert kernels_sentence(gpu, list) == []
    line, of_attention = kernels_sentence(gpu, gather)
    assert "(of another machine)" in line
    assert of_attention.startswith("attention runs by PyTorch's flash kernels, since cuDNN's cannot be had (of another")
    compiler.trouble.cache_clear()
    monkeypatch.setattr(compiler, "try_one", failing(OSError("no ptxas")))
    (line,) = kernels_sentence(gpu, list)
    assert line.startswith("Triton cannot compile kernels here (OSError: no ptxas): norms, ")
    assert "\n" not in line


@pytest.mark.parametrize("broken", [AssertionError("Found 2 libcudnn.so.x"), AttributeError("x"), RuntimeError("x")])
def test_a_package_of_cudnn_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch, broken: Exception) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(backend_version=failing(broken)))
    attention_by_cudnn.trouble.cache_clear()
    try:
        assert attention_by_cudnn.trouble() == f"{type(broken).__name__}: {broken}"
    finally:
        attention_by_cudnn.trouble.cache_clear()


def test_an_attention_that_cudnn_does_not_build_is_flashs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said once for a shape; but what had no memory is tried again."""
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace())
    shape = attention_by_cudnn.Shape(
        8, 256, 0, 4, 4, 8, 0.1, False, torch.bfloat16, torch.device("cpu"), False
    )  # fmt: skip
    monkeypatch.setattr(attention_by_cudnn, "_build", failing(torch.OutOfMemoryError("full")))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            attention_by_cudnn.graph(shape, backward=True)
    monkeypatch.setattr(attention_by_cudnn, "_build", failing(TypeError("no such option")))
    with pytest.warns(UserWarning, match=r"\(TypeError: no such option\); PyTorch's flash kernels run instead"):
        assert attention_by_cudnn.graph(shape, backward=True) is None
    assert attention_by_cudnn.graph(shape, backward=True) is None
    attention_by_cudnn.graph.cache_clear()


def test_windows_then_go_backward_by_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "try_one", failing(RuntimeError("no compiler")))
    monkeypatch.setattr(
        torch.ops.aten, "_flash_attention_backward", lambda d, q, k, v, *_, **__: (q + d, k + d, v + d), raising=False
    )
    q, k, v, d = torch.randn(4, 16, 2, 8)
    borders = torch.tensor([0, 8, 16], dtype=torch.int32)
    flash = (torch.zeros(2, 16), None, None, borders, 8, 0.3, False)
    found = attention.attend_backward(attention.Attended(q, (q, k, v), flash), d)
    assert torch.equal(found[2], v + d)


def test_it_is_asked_after_the_launcher_was_imported() -> None:
    """A module of the package takes the place of a function of its name."""
    pytest.importorskip("triton")
    script = "import vlft.compiler.launch; from vlft import compiler; print(compiler.trouble())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "not callable" not in done.stdout
