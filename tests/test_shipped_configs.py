"""Every shipped configuration parses, is in the wheel, and owns only its own numbers."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from vlft.config import bundled, deepspeed_path
from vlft.engine.zero import OWNED, read_config
from vlft.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
ZERO = sorted((ROOT / "ds_configs").glob("*.json"))
LAUNCH = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", ZERO, ids=lambda p: p.stem)
def test_a_deepspeed_file_leaves_the_batch_the_precision_and_the_clipping_to_vlft(path: Path) -> None:
    assert not set(json.loads(path.read_text())) & set(OWNED)
    assert read_config(path)["zero_optimization"]["stage"] in (2, 3)
    assert deepspeed_path(path.stem) == deepspeed_path(f"./configs/{path.stem}.json") == path


@pytest.mark.parametrize("path", LAUNCH, ids=lambda p: p.stem)
def test_an_accelerate_file_owns_processes_only(path: Path) -> None:
    known = {"compute_environment", "distributed_type", "use_cpu", "num_machines", "num_processes"}
    found = yaml.safe_load(path.read_text())
    # FSDP has no file of DeepSpeed's kind: what is sharded and offloaded stands with the launcher.
    sharding = found.pop("fsdp_config", {})
    assert set(sharding) <= {"fsdp_version", "fsdp_reshard_after_forward", "fsdp_offload_params"}
    assert set(found) <= known
    assert path.stem in bundled("accelerate_configs", ".yaml")


def test_a_number_that_vlft_owns_is_refused_in_a_deepspeed_file(tmp_path: Path) -> None:
    zero = {"stage": 2, "compute_grad_norm": False}
    wrong = {"zero_optimization": zero, "gradient_clipping": 0.5, "bf16": {"enabled": True}}
    (tmp_path / "mine.json").write_text(json.dumps(wrong))
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "mine.json")
    assert len(caught.value.problems) == 3
    fine = {"zero_optimization": {"stage": 3}, "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
    (tmp_path / "mine.json").write_text(json.dumps(fine))
    assert read_config(tmp_path / "mine.json") == {"zero_optimization": {"stage": 3}}


def test_a_way_in_which_weights_go_before_they_are_read_is_refused(tmp_path: Path) -> None:
    zero = {"stage": 3, "stage3_module_granularity_threshold": 1}
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(ConfigError, match=r"stage3_module_granularity_threshold.*leave it out"):
        read_config(tmp_path / "mine.json")
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": zero | {"stage": 2}}))
    read_config(tmp_path / "mine.json")


def test_the_wheel_holds_them_all(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for path in (*ZERO, *LAUNCH):
        assert f"vlft/{path.parent.name}/{path.name}" in names
    assert any(name.startswith("vlft_strategies/") for name in names)
    assert not any(name.startswith(("tests/", "demo/")) for name in names)
