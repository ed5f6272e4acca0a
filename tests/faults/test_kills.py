"""kill -9 at any moment: the same command goes on, and nothing in the end tells that it was ever killed.

`VLFT_SOAK=1 pytest tests/faults/test_kills.py` (make soak) kills a hundred times and more, without it some times. The
number is the seed of the moments.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from runs import command, distance, environment, final_weights, launched, ledger, metrics, train, write_data

from vlft import checkpoint

SOAK = bool(os.environ.get("VLFT_SOAK"))
STEPS, SAVE_STEPS, EVAL_STEPS = (18, 2, 3) if SOAK else (6, 2, 3)
SECONDS = 0.04
"""Pause at each forward and at each thing that is done to a file, in the part that a kill aims at."""
WITHIN = {"anywhere": 9.0, "start": 1.5, "index": 0.3, "step": 0.4, "save": 0.7, "evaluation": 0.5, "hand-over": 0.6}
"""About how long each part of a run takes: a kill comes at some moment of that."""
TRUNCATED = ("r2", "r7", "r11", "r22")
"""Records with a picture whose header is whole and whose pixels are not, so that the ledger grows in training."""

pytestmark = pytest.mark.timeout(7200 if SOAK else 300)


def words(model: Path, registry: Path, out: Path, strategy: str = "full", **more: Any) -> list[str]:
    options: dict[str, Any] = {
        "max_steps": STEPS, "save_steps": SAVE_STEPS, "eval_steps": EVAL_STEPS, "train_split_ratio": 0.75,
        "use_data_augmentation": True, "max_bad_fraction": 0.5, "mixed_precision": "no", "learning_rate_llm": 1e-4,
    }  # fmt: skip
    return command(model, registry, out, strategy, **options | more, resume_from_checkpoint="latest")


def write_some_broken(folder: Path) -> Path:
    registry = write_data(folder, 32)
    for line in map(json.loads, (folder / "toy.jsonl").read_text().splitlines()):
        if line["id"] in TRUNCATED and line["images"]:
            picture = folder / "images" / line["images"][-1]
            picture.write_bytes(picture.read_bytes()[: picture.stat().st_size // 2])
    return registry


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """The moment of a kill: so long after a part of the run is entered for the nth time."""

    part: str
    nth: int
    delay: float

    @classmethod
    def first(cls, rng: Random, part: str) -> Aim:
        """Early in the part, the first time: the kill certainly lands there."""
        return cls(part, 1, rng.uniform(0, 0.4 * WITHIN[part]))

    @classmethod
    def draw(cls, rng: Random, part: str) -> Aim:
        nth = rng.randint(1, {"step": 5, "save": 3, "evaluation": 2}.get(part, 1))
        return cls(part, nth, rng.uniform(0, WITHIN[part]))


@dataclass
class Chain:
    """One run that is killed again and again."""

    line: list[str]
    folder: Path
    processes: int = 1
    landed: Counter[str] = field(default_factory=Counter)
    left_out: int = 0
    """Kills for which the run was too quick."""
    lost: int = 0
    """Most steps that a kill cost."""

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def survive(self, aims: Sequence[Aim]) -> None:
        """The kills, one after the other, then the rest of the run."""
        for number, aim in enumerate(aims):
            if aim.part == "index":  # which is built once: it needs a cache that was lost
                shutil.rmtree(self.folder / "cache", ignore_errors=True)
            if (where := self._run(number, aim)) is None:
                self.left_out += 1
            else:
                self.landed[where] += 1
                self._count_lost_steps()
        assert self._run(len(aims), None) is None

    def _run(self, number: int, aim: Aim | None) -> str | None:
        """The part that the kill met; None: the run came to its end."""
        told, log = self.folder / f"told-{number}", self.folder / f"log-{number}"
        slow = aim.part if aim and aim.part != "anywhere" else None
        fault = {"kind": "told", "path": str(told), "seconds": SECONDS if aim else 0.0, "slow": slow}
        argv, env = launched(self.line, self.processes, fault)
        with log.open("wb") as out:
            child = subprocess.Popen(
                argv, env=environment(**env), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        end = time.monotonic() + 200
        try:
            while child.poll() is None and not (aim and self._reached(told, aim)):
                assert time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.002)
            if aim:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(aim.delay)
        finally:
            kill(child)
        if child.returncode != -signal.SIGKILL:
            assert child.returncode == 0, f"{aim}\n{log.read_text()[-5000:]}"
            return None
        return told.read_text().split()[-1] if told.exists() else "start"

    @staticmethod
    def _reached(told: Path, aim: Aim) -> bool:
        return aim.part == "anywhere" or (told.exists() and told.read_text().split().count(aim.part) >= aim.nth)

    def _count_lost_steps(self) -> None:
        text = (self.out / "metrics.jsonl").read_text() if (self.out / "metrics.jsonl").exists() else ""
        done = max((json.loads(line)["step"] for line in text.splitlines(True) if line.endswith("\n")), default=0)
        saved = [int(folder.name.removeprefix("step-")) for folder in checkpoint.complete(self.out / "checkpoints")]
        self.lost = max(self.lost, done - max(saved, default=0))


def kill(child: subprocess.Popen[bytes]) -> None:
    """SIGKILL to all processes of a run at once. torchrun gives each rank a session of its own."""
    if child.poll() is not None:
        return
    os.killpg(child.pid, signal.SIGSTOP)  # it may start no more
    family = descendants(child.pid)
    for pid in (*family, child.pid):
        with suppress(ProcessLookupError):
            os.killpg(os.getpgid(pid), signal.SIGKILL)
    child.wait()
    end = time.monotonic() + 20
    while any(alive(pid) for pid in family):
        assert time.monotonic() < end
        time.sleep(0.005)


def descendants(pid: int) -> list[int]:
    found = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for one in map(int, (task / "children").read_text().split()):
                found += [one, *descendants(one)]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------------


def assert_untouched(whole: Path, chain: Chain, *, bits: bool = True) -> None:
    """The result of a chain is that of the run that nobody disturbed."""
    a, b = final_weights(whole), final_weights(chain.out)
    if bits:
        assert all(torch.equal(a[n], b[n]) for n in a)
        assert (chain.out / "metrics.jsonl").read_text().count("\n") == (whole / "metrics.jsonl").read_text().count(
            "\n"
        )
        for kind in ("train", "eval"):
            assert metrics(chain.out, kind) == metrics(whole, kind)
        for file in (whole / "model").glob("*.safetensors"):
            assert file.read_bytes() == (chain.out / "model" / file.name).read_bytes()
    assert distance(a, b) < 1e-5
    assert ledger(chain.out) == ledger(whole)
    assert chain.lost <= SAVE_STEPS
    assert [
        str(p) for p in chain.out.rglob("*") if p.name.startswith(".") or p.suffix in (".writing", ".cutting")
    ] == []


def report(chains: Sequence[Chain], seconds: float, capsys: pytest.CaptureFixture[str]) -> None:
    landed = sum((chain.landed for chain in chains), Counter[str]())
    where = ", ".join(f"{part} {n}" for part, n in landed.most_common())
    with capsys.disabled():
        print(
            f"\n{landed.total()} kills survived ({where}) in {seconds:.0f} s and {len(chains)} runs of "
            f"{chains[0].processes} process(es); at most {max(chain.lost for chain in chains)} steps were done again"
        )


@pytest.fixture(scope="module")
def undisturbed(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """undisturbed(strategy) -> folder with registry and data, and `out` of a run that nobody disturbed."""
    made: dict[str, Path] = {}

    def get(strategy: str) -> Path:
        if strategy not in made:
            folder = made[strategy] = tmp_path_factory.mktemp(strategy)
            registry = write_some_broken(folder)
            train(words(tiny(), registry, folder / "out", strategy))
            assert {line["step"] > 0 for line in ledger(folder / "out")} == {True}
        return made[strategy]

    return get


PARTS = ("start", "index", "step", "save", "evaluation", "hand-over")
"""`hand-over` comes last: a run that is killed there has nothing left to train."""


@pytest.mark.slow
def test_some_kills(
    tiny: Callable[..., Path], tmp_path: Path, undisturbed: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, began, rng = undisturbed("full"), time.monotonic(), Random(1)
    line = words(tiny(), whole / "registry.json", tmp_path / "out", cache_dir=tmp_path / "cache", num_workers=2)
    chain = Chain(line, tmp_path)
    chain.survive([Aim.first(rng, part) for part in PARTS])
    assert_untouched(whole / "out", chain)
    report([chain], time.monotonic() - began, capsys)
    assert chain.landed.total() == len(PARTS)


@pytest.mark.slow
def test_some_kills_of_two_processes(
    tiny: Callable[..., Path], tmp_path: Path, undisturbed: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, began, rng = undisturbed("full"), time.monotonic(), Random(2)
    two = {"per_device_train_batch_size": 2, "cache_dir": tmp_path / "cache"}
    chain = Chain(words(tiny(), whole / "registry.json", tmp_path / "out", **two), tmp_path, processes=2)
    chain.survive([Aim.first(rng, part) for part in ("save", "step")])
    assert_untouched(whole / "out", chain, bits=False)
    assert json.loads((tmp_path / "out/run_card.json").read_text())["world_size"] == 2
    report([chain], time.monotonic() - began, capsys)
    assert chain.landed.total() == 2


@pytest.mark.skipif(not SOAK, reason="VLFT_SOAK=1: half an hour")
@pytest.mark.parametrize(("processes", "kills"), [(1, 100), (2, 20)])
def test_soak(
    tiny: Callable[..., Path],
    tmp_path: Path,
    undisturbed: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    processes: int,
    kills: int,
) -> None:
    """Runs of two strategies, with and without data workers, until there were so many kills."""
    seed, began = os.environ["VLFT_SOAK"], time.monotonic()
    strategies = ("full", "lora_llm_full_vit")
    wholes = {strategy: undisturbed(strategy) for strategy in strategies}

    def chain(name: str, strategy: str, **more: Any) -> Chain:
        folder = tmp_path / name
        more |= {"cache_dir": folder / "cache", "per_device_train_batch_size": 4 // processes}
        folder.mkdir()
        return Chain(
            words(tiny(), wholes[strategy] / "registry.json", folder / "out", strategy, **more), folder, processes
        )

    alike = {strategy: folder / "out" for strategy, folder in wholes.items()}
    if processes > 1:  # their sums have another order than those of one, but always the same
        for strategy in strategies:
            whole = chain(strategy, strategy)
            whole.survive([])
            if strategy == "full":  # the other one's dropout is drawn by row
                assert_untouched(wholes[strategy] / "out", whole, bits=False)
            alike[strategy] = whole.out

    def run(number: int) -> Chain:
        rng, strategy = Random(f"{seed} {processes} {number}"), strategies[number // 2 % 2]
        killed = chain(str(number), strategy, num_workers=2 * (number % 2))
        parts = rng.choices(("anywhere", *PARTS[:-1]), k=9)
        killed.survive([Aim.draw(rng, part) for part in (*parts, "hand-over")])
        assert_untouched(alike[strategy], killed)
        return killed

    chains: list[Chain] = []
    with ThreadPoolExecutor(2 // processes) as pool:
        while sum(one.landed.total() for one in chains) < kills:
            chains += pool.map(run, range(len(chains), len(chains) + 2))
            report(chains, time.monotonic() - began, capsys)
