"""Finding a checkpoint: what is fetched from the hub."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from vlft.models.load import open_checkpoint
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
