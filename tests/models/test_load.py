"""Finding a checkpoint: what is fetched from the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants
from runs import environment

from vlft.errors import ModelError
from vlft.models.load import load_hf, open_checkpoint
from vlft.testing import make_checkpoint


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("adapter", [False, True], ids=["model", "adapter"])
def test_code_is_fetched_only_if_it_may_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: bool, adapter: bool
) -> None:
    """Without its Python files a checkpoint of the hub fails under --trust_remote_code, whatever else is there."""
    made = make_checkpoint("qwen2_5_vl", tmp_path / "base")
    fetched: list[str] = []

    def fetch(name: str, allow_patterns: list[str], **_: Any) -> str:
        files = ("config.json", "model.safetensors", "modeling_mine.py", "pytorch_model.bin")
        fetched.extend(file for file in files if any(fnmatch(file, pattern) for pattern in allow_patterns))
        return str(made)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    name = "owner/model"
    if adapter:
        (tmp_path / "adapter").mkdir()
        name = str(tmp_path / "adapter")
        settings = {"base_model_name_or_path": "owner/model"}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    assert open_checkpoint(name, trust_remote_code=trust).trust_remote_code is trust
    assert fetched == ["config.json", "model.safetensors", *(["modeling_mine.py"] if trust else [])]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("offline", "the hub was not asked (HF_HUB_OFFLINE is set); unset it"),
        ("refused", "the hub could not be reached (no connection); check the name and the network"),
        ("broken off", "the hub could not be reached (no connection); check the name and the network"),
        (404, "the hub did not give it (it answered 404); check the name, or accept its terms there and log in with "
              "'hf auth login'"),
        (503, "the hub did not give it (it answered 503); try again"),
    ],
)  # fmt: skip
def test_what_is_neither_here_nor_at_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str | int, said: str
) -> None:
    """The word may be a misspelt path: the sentence names both places, and no text of the client that is cut off."""

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            if isinstance(answer, int):
                self.send_response(answer)
                self.end_headers()

    monkeypatch.chdir(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = 9 if answer == "refused" else server.server_address[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", answer == "offline")
        with pytest.raises(ModelError) as caught:
            open_checkpoint("output/qlora")
        server.shutdown()
    assert str(caught.value) == f"there is no folder output/qlora here, and {said}, or give a local folder."


def test_what_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match=r"^there is no folder a/b/c here, and it is no name of the hub \(owner/name\); "
    ):
        open_checkpoint("a/b/c")


def test_what_the_hub_s_client_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(
        ModelError, match=r"did not give it \(\[Errno 28\] No space left on device\); mend that, or give"
    ):
        open_checkpoint("output/qlora")


LOADED = """
import sys
from contextlib import nullcontext
import torch
from transformers import modeling_utils
from vlft.config import deepspeed_path
from vlft.engine import start_engine
from vlft.models.load import without_zero3, load_hf, open_checkpoint, source_of

modeling_utils.prevent_arange_dtype_change = nullcontext  # of newer versions: as if it were an older one
engine = start_engine("bf16", deepspeed_path("zero3"), 1.0)
for folder in sys.argv[1:]:
    source = source_of(open_checkpoint(folder), "bf16", engine.device, sharded=True)
    cut = dict(source.load().named_buffers())
    with without_zero3():
        whole = dict(load_hf(source.checkpoint.folder, "cpu", dtype=torch.bfloat16).named_buffers())
    assert cut.keys() == whole.keys() and len(whole) > 1
    cut = {name: buffer.cpu() for name, buffer in cut.items()}
    same = {name for name in whole if cut[name].dtype == whole[name].dtype and torch.equal(cut[name], whole[name])}
    print("wrong:", *(whole.keys() - same))
"""


def test_what_a_model_works_out_is_as_precise_under_zero3(tmp_path: Path) -> None:
    """The frequencies of rotary embeddings were rounded to bf16, which turns a token at 1,000 by up to 1.2 radians
    more or less: DeepSpeed makes every number in the compute dtype while a model is built, not its weights alone."""
    made = [str(make_checkpoint(family, tmp_path / family)) for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")]
    port = str(20000 + os.getpid() % 20000)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [sys.executable, "-c", LOADED, *made]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(**alone), timeout=200, check=False)
    assert not done.returncode, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("wrong:")] == ["wrong:"] * len(made)


def test_memory_that_runs_out_is_not_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user was told to copy the model's files again."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    made = make_checkpoint("qwen2_5_vl", tmp_path / "base")
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_hf(made, "cpu")
