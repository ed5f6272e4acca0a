"""The scripts in examples/, run by bash with stand-ins for the launchers: vlft's own parser reads what reaches it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import environment, metrics, write_data
from torch.distributed.run import get_args_parser

from vlft import discovery
from vlft.config import Run, global_batch
from vlft.parse import parse

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))
JOBS = sorted(EXAMPLES.glob("slurm/*.sbatch"))

# Writes down its words, one a line. As `srun` it may save a checkpoint, and ends as it is told.
STAND_IN = """#!/bin/bash
printf '%s\\n' "$(basename "$0")" "$@" "PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-}" -end- >> "$CALLS"
case "$(basename "$0") $1" in
    "scontrol show") printf 'node1\\nnode2\\n' ;;
    srun*) if [ -n "$SAVES" ]; then mkdir -p "$SAVES"; fi; exit "$ENDS" ;;
esac
"""


class Ran:
    """A script that ran: its exit code and the words of every command that it started."""

    def __init__(self, script: Path, folder: Path, *words: str, saves: str = "", ends: int = 0) -> None:
        stand_ins = folder / "bin"
        stand_ins.mkdir(exist_ok=True)
        for name in ("accelerate", "srun", "scontrol"):
            (stand_ins / name).write_text(STAND_IN)
            (stand_ins / name).chmod(0o755)
        slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
        slurm |= {"SLURM_CPUS_PER_TASK": "64", "CALLS": str(folder / "calls"), "SAVES": saves, "ENDS": str(ends)}
        path = os.pathsep.join([str(stand_ins), os.environ["PATH"]])
        env = {"PATH": path, "HOME": str(folder), **slurm}
        (folder / "calls").write_text("")
        done = subprocess.run(["bash", str(script), *words], cwd=folder, env=env, capture_output=True, text=True)
        assert not done.stderr
        self.code = done.returncode
        self.calls = [call.splitlines() for call in (folder / "calls").read_text().split("-end-\n") if call]

    def launch(self) -> list[str]:
        """The words of the one command that starts vlft, without what the stand-in added."""
        (found,) = [call for call in self.calls if "vlft" in call]
        return found[:-1]


def parsed(launch: list[str]) -> Run:
    words = launch[launch.index("vlft") + 1 :]
    run = parse(words, start=False)
    flags = {word.removeprefix("--").removeprefix("no-") for word in words if word.startswith("--")}
    assert flags <= run.config.model_fields_set | run.options.model_fields_set, "every flag reached an option"
    assert not run.notes
    return run


def test_one_script_a_strategy() -> None:
    own = {name for name, found in discovery.find(discovery.STRATEGIES).items() if found.distribution == "vlft"}
    assert {path.stem for path in SCRIPTS} == own
    assert len(JOBS) == 2
    assert all(os.access(path, os.X_OK) for path in SCRIPTS + JOBS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_has_the_guide_s_options(script: Path, tmp_path: Path) -> None:
    launch = Ran(script, tmp_path, "--resume_from_checkpoint", "latest").launch()
    assert launch[:4] == ["accelerate", "launch", "-m", "vlft"]
    run = parsed(launch)
    config = run.config
    assert config.tuning_strategy == script.stem
    assert config.output_dir == Path("output") / script.stem
    assert config.resume_from_checkpoint == "latest", "more options may follow"
    assert (global_batch(config, 1), config.max_seq_length, config.use_wandb) == (16, 2048, True)
    assert config.deepspeed == ("zero3" if script.stem == "full" else "zero2")
    _check_rates(run)


def _check_rates(run: Run) -> None:
    adapters = "lora" in run.config.tuning_strategy
    low, high = (1e-4, 2e-4) if adapters else (1e-5, 5e-5)
    for part, rate in run.rates.items():
        assert getattr(run.config, f"learning_rate_{part}") == rate, "said, not left to the default"
        assert (low <= rate <= high) if part == "llm" else (1e-4 <= rate <= 2e-4)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_call_in_a_script_s_comment(script: Path, tmp_path: Path) -> None:
    (line,) = re.findall(rf"^#     examples/{script.name} (.*)$", script.read_text(), flags=re.MULTILINE)
    assert parsed(Ran(script, tmp_path, *line.split()).launch())


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_trains_a_tiny_model(script: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """As it stands: the real launcher, the script's DeepSpeed and Weights & Biases (offline); only paths are others."""
    registry, out = write_data(tmp_path, 20, counts=(1,)), tmp_path / "out"
    changed = {"MODEL": str(tiny()), "OUTPUT": str(out), "DATASET": "toy", "FROZEN_LAYERS": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    more = ["--dataset_config_path", str(registry), "--cache_dir", str(tmp_path / "cache"), "--num_workers", "0"]
    done = subprocess.run(
        ["bash", str(script), *more, "--max_steps", "2", "--no-report"], cwd=tmp_path, capture_output=True, text=True,
        env=environment(PATH=path, WANDB_DIR=str(tmp_path), WANDB_SILENT="true", **changed), timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    card = json.loads((out / "run_card.json").read_text())
    assert (card["strategy"], card["distributed_type"]) == (script.stem, "DEEPSPEED")
    assert [line["step"] for line in metrics(out)] == [1, 2]
    assert (out / "model" / "vlft.json").exists()
    assert list(tmp_path.rglob("*.wandb"))


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_a_slurm_job(job: Path, tmp_path: Path) -> None:
    launch = Ran(job, tmp_path).launch()
    run = parsed(launch)
    assert run.config.resume_from_checkpoint == "latest"
    _check_rates(run)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", job.read_text(), flags=re.MULTILINE))
    nodes, gpus = int(options["nodes"]), int(options["gpus-per-node"])
    assert global_batch(run.config, nodes * gpus) == 16
    assert options["ntasks-per-node"] == "1"
    assert "requeue" in options

    # Time to save: SIGTERM comes early enough, and nothing kills before it is over.
    name, seconds = options["signal"].split("@")
    assert name == "TERM"
    patience = int(Ran(job, tmp_path).calls[-1][-1].removeprefix("PET_SHUTDOWN_TIMEOUT="))
    assert 30 < patience < int(seconds)

    torchrun = get_args_parser().parse_args(launch[launch.index("torchrun") + 1 :])
    assert torchrun.nproc_per_node == "gpu"
    assert torchrun.module
    assert torchrun.training_script == "vlft"
    if nodes == 1:
        assert torchrun.standalone
    else:
        assert (torchrun.nnodes, torchrun.rdzv_backend, torchrun.rdzv_id) == ("2", "c10d", "4711")
        assert torchrun.rdzv_endpoint == "node1:24711"
        assert f"--wait={patience}" in launch


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("ends", "saves", "again"),
    [(0, True, False), (1, True, True), (1, False, False)],
    ids=["finished", "stopped after a save", "failed without one"],
)
def test_a_slurm_job_goes_on_only_if_it_got_further(
    job: Path, tmp_path: Path, ends: int, saves: bool, again: bool
) -> None:
    output = Path("output") / str(parsed(Ran(job, tmp_path).launch()).config.output_dir.name)
    (tmp_path / output / "checkpoints" / "step-000200").mkdir(parents=True)
    new = str(output / "checkpoints" / "step-000317") if saves else ""
    ran = Ran(job, tmp_path, saves=new, ends=ends)
    assert ran.code == ends
    assert (["scontrol", "requeue", "4711"] in [call[:3] for call in ran.calls]) is again


def test_the_page_names_every_script() -> None:
    page = (EXAMPLES / "README.md").read_text()
    assert set(re.findall(r"\]\(([\w/]+\.sh)\)", page)) == {path.name for path in SCRIPTS}
    assert all(f"(slurm/{path.name})" in page for path in JOBS)
