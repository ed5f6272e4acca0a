"""A resume is exact: stop anywhere, go on, and nothing but "perf" differs from the run that was not stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import command, final_weights, ledger, metrics, train, write_data
from safetensors.torch import load_file

from vlft import checkpoint as checkpoints
from vlft import train as story
from vlft.errors import CheckpointError, ConfigError


class Stop(BaseException):
    """Raised in the middle of a run, as a kill would end it."""


@pytest.fixture
def stop_before(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """stop_before(n): the run dies before its step n (0-based), after everything earlier was written."""
    real = story.train_step

    def arm(n: int) -> None:
        def dying(job: Any, step: Any) -> Any:
            if step.number == n:
                raise Stop
            return real(job, step)

        monkeypatch.setattr(story, "train_step", dying)

    yield arm
    monkeypatch.setattr(story, "train_step", real)


CASES = [
    ("lora_llm_full_vit", {"use_data_augmentation": True, "num_workers": 0}),
    ("lora_llm_full_vit", {"augmentation": "geometric", "num_workers": 2}),
    ("full", {"num_workers": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    ("qlora", {"train_vit": True, "num_workers": 0}),
]


@pytest.mark.parametrize(("strategy", "more"), CASES)
def test_a_resume_across_an_epoch_border_is_bit_equal(
    tiny: Callable[..., Path], tmp_path: Path, stop_before: Any, strategy: str, more: dict[str, Any]
) -> None:
    """5 steps an epoch; saved at 3 and 6, stopped before step 7 and again before step 11."""
    registry = write_data(tmp_path, 20)
    options = {"epochs": 3, "max_steps": None, "save_steps": 3, "learning_rate_llm": 1e-3, **more}
    words = lambda out, **x: command(tiny(), registry, tmp_path / out, strategy, **options, **x)  # noqa: E731
    train(words("whole"))
    for stop, resume in ((7, {}), (11, {"resume_from_checkpoint": "latest"})):
        stop_before(stop)
        with pytest.raises(Stop):
            train(words("cut", **resume))
        assert len(metrics(tmp_path / "cut")) == stop
    stop_before(10**9)
    train(words("cut", resume_from_checkpoint="latest"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert len(metrics(tmp_path / "cut")) == 15
    whole, cut = final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[n], cut[n]) for n in whole)
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (tmp_path / "whole/model" / name).exists():
            a, b = (load_file(tmp_path / run / "model" / name) for run in ("whole", "cut"))
            assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_number_of_workers_changes_nothing(tiny: Callable[..., Path], tmp_path: Path, workers: int) -> None:
    registry = write_data(tmp_path, 20)
    for out, n in (("a", 1), ("b", workers)):
        options = {"num_workers": n, "use_data_augmentation": True, "learning_rate_llm": 1e-3}
        train(command(tiny(), registry, tmp_path / out, "lora_llm_full_vit", **options))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_latest_with_none_starts_fresh(tiny: Callable[..., Path], tmp_path: Path) -> None:
    words = command(
        tiny(), write_data(tmp_path), tmp_path / "out", "lora", resume_from_checkpoint="latest", max_steps=2
    )
    train(words)
    assert len(metrics(tmp_path / "out")) == 2


def test_a_finished_run_says_that_nothing_is_left(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so at its start and at its end, and writes its result anew."""
    registry, resume = write_data(tmp_path, 4), ["--resume_from_checkpoint", "latest"]
    words = command(tiny(), registry, tmp_path / "out", "lora", max_steps=1)
    train(words)
    said = capsys.readouterr().out
    shape = "fp32 on cpu: 1 step of 4 samples (4 a forward x 1 forward x 1 process)"
    assert f"{shape}, from the start.\n" in said
    assert "\ntrained llm by lora for 1 step in " in said
    shutil.rmtree(tmp_path / "out" / "model")
    train([*words, *resume])
    said = capsys.readouterr().out
    assert f"{shape}, all done before.\n" in said
    assert "\nthis run is at its last step, 1; nothing was left to train.\n" in said
    assert "\ntrained " not in said
    assert (tmp_path / "out/model/adapter_config.json").exists()
    train([*command(tiny(), registry, tmp_path / "out", "lora", max_steps=2), *resume])
    said = capsys.readouterr().out
    assert ", going on after step 1.\n" in said
    assert "\ntrained llm by lora for 2 steps, the last 1 of them in " in said


def test_a_used_output_folder_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    words = command(tiny(), write_data(tmp_path), tmp_path / "out", "lora", max_steps=1)
    train(words)
    with pytest.raises(ConfigError, match="not empty"):
        train(words)


def test_options_that_would_change_the_run_are_refused_on_a_resume(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path)
    train(command(tiny(), registry, tmp_path / "out", "lora", max_steps=2))
    again = {"resume_from_checkpoint": "latest", "max_steps": 4}
    changed = {"learning_rate_llm": 3e-4, "lora_rank": 8, "seed": 7, "per_device_train_batch_size": 3}
    with pytest.raises(CheckpointError) as caught:
        train(command(tiny(), registry, tmp_path / "out", "lora", **again, **changed))
    said = str(caught.value)
    assert [name for name in ("learning_rate_llm", "lora_rank", "seed", "global batch") if name not in said] == [], said


def test_an_altered_checkpoint_is_found_and_the_one_before_offered(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path)
    train(command(tiny(), registry, tmp_path / "out", "lora", max_steps=4, save_steps=2))
    newest = tmp_path / "out/checkpoints/step-000004/weights-000-00.safetensors"
    whole = bytearray(newest.read_bytes())
    whole[-3] ^= 1
    newest.write_bytes(bytes(whole))
    again = {"resume_from_checkpoint": "latest", "max_steps": 5}
    with pytest.raises(CheckpointError, match=r"altered.*step-000002"):
        train(command(tiny(), registry, tmp_path / "out", "lora", **again))
    before = {"resume_from_checkpoint": str(tmp_path / "out/checkpoints/step-000002"), "max_steps": 4}
    train(command(tiny(), registry, tmp_path / "out", "lora", **before))
    assert [m["step"] for m in metrics(tmp_path / "out")] == [1, 2, 3, 4]


def test_a_kill_during_a_save_leaves_the_checkpoint_before_it(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlft import checkpoint

    registry = write_data(tmp_path)
    words = command(tiny(), registry, tmp_path / "out", "lora", max_steps=6, save_steps=2)
    real, saves = checkpoint.save_file, []

    def dying(*args: Any, **more: Any) -> None:
        saves.append(args)
        if len(saves) == 4:  # the optimizer's file of the second save
            raise Stop
        real(*args, **more)

    monkeypatch.setattr(checkpoint, "save_file", dying)
    with pytest.raises(Stop):
        train(words)
    monkeypatch.setattr(checkpoint, "save_file", real)
    root = tmp_path / "out/checkpoints"
    assert [p.name for p in checkpoint.complete(root)] == ["step-000002"]
    train([*words, "--resume_from_checkpoint", "latest"])
    assert [m["step"] for m in metrics(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]
    assert not list(root.glob(".writing*"))


def test_retention_keeps_the_newest(tiny: Callable[..., Path], tmp_path: Path) -> None:
    options = {"max_steps": 5, "save_steps": 1, "save_total_limit": 2}
    train(command(tiny(), write_data(tmp_path), tmp_path / "out", "lora", **options))
    assert sorted(p.name for p in (tmp_path / "out/checkpoints").iterdir()) == ["step-000004", "step-000005"]


def test_a_picture_that_breaks_during_the_run_goes_to_the_ledger_and_stays_there(
    tiny: Callable[..., Path], tmp_path: Path, stop_before: Any
) -> None:
    """Its header is read at the start, its pixels later: the truncated file is met in the middle of the run."""
    registry = write_data(tmp_path, 20)
    broken = tmp_path / "images" / "toy-4-0.png"
    broken.write_bytes(broken.read_bytes()[:-400])
    options = {"epochs": 2, "max_steps": None, "save_steps": 2, "max_bad_fraction": 0.2}
    words = lambda out, **x: command(tiny(), registry, tmp_path / out, "lora", **options | x)  # noqa: E731
    train(words("whole"))
    stop_before(7)
    with pytest.raises(Stop):
        train(words("cut"))
    stop_before(10**9)
    train(words("cut", resume_from_checkpoint="latest"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert ledger(tmp_path / "whole") == ledger(tmp_path / "cut")
    (entry,) = ledger(tmp_path / "whole")
    assert entry["id"] == "r4"
    assert sum(m["samples"] for m in metrics(tmp_path / "whole")) == 2 * 19
    shutil.rmtree(tmp_path / "cut")
    with pytest.raises(Exception, match=r"toy-4-0\.png"):
        train(words("strict", max_bad_fraction=0.01))


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint comes first, so that a failing script costs no step; a kill may fall between the two."""
    registry = write_data(tmp_path)
    options = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "train_split_ratio": 0.7}
    words = lambda out, **x: command(tiny(), registry, tmp_path / out, "lora", **options, **x)  # noqa: E731
    train(words("whole"))
    real = story.run_evaluation

    def dying(job: Any) -> None:
        raise Stop

    monkeypatch.setattr(story, "run_evaluation", dying)
    with pytest.raises(Stop):
        train(words("cut"))
    monkeypatch.setattr(story, "run_evaluation", real)
    train(words("cut", resume_from_checkpoint="latest"))
    assert metrics(tmp_path / "whole", "eval") == metrics(tmp_path / "cut", "eval")


def test_run_yaml_repeats_the_run(tiny: Callable[..., Path], tmp_path: Path) -> None:
    train(command(tiny(), write_data(tmp_path), tmp_path / "first", "lora_llm_full_vit", lora_rank=8))
    train(["--config", str(tmp_path / "first/run.yaml"), "--output_dir", str(tmp_path / "second")])
    assert metrics(tmp_path / "first") == metrics(tmp_path / "second")
    a, b = (json.loads((tmp_path / r / "run_card.json").read_text())["strategy"] for r in ("first", "second"))
    assert a == b == "lora_llm_full_vit"


def test_going_back_leaves_the_later_checkpoints_aside(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Otherwise `latest` would mean the course that was left."""
    registry, out = write_data(tmp_path, 20), tmp_path / "out"
    options = {"save_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    train(command(tiny(), registry, out, "lora", max_steps=3, **options))
    back = out / "checkpoints/step-000001"
    train(command(tiny(), registry, out, "lora", max_steps=2, resume_from_checkpoint=back, **options))
    found = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert found == ["left-1-step-000002", "left-1-step-000003", "step-000001", "step-000002"]
    assert [line["step"] for line in metrics(out)] == [1, 2]


def test_a_checkpoint_of_another_run_is_refused_beside_own_ones(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path, 20)
    for name in ("a", "b"):
        train(command(tiny(), registry, tmp_path / name, "lora", max_steps=2))
    other = tmp_path / "a/checkpoints/step-000002"
    with pytest.raises(CheckpointError, match="is of another run"):
        train(command(tiny(), registry, tmp_path / "b", "lora", max_steps=4, resume_from_checkpoint=other))


def test_other_data_are_noticed(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path, 20)
    train(command(tiny(), registry, tmp_path / "out", "lora", max_steps=2))
    lines = (tmp_path / "toy.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "toy.jsonl").write_text("".join(lines[:15]))
    with pytest.raises(CheckpointError, match="the data are not those"):
        train(command(tiny(), registry, tmp_path / "out", "lora", max_steps=4, resume_from_checkpoint="latest"))


def edited(registry: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The registry's data sets after `change`."""
    whole = json.loads(registry.read_text())
    change(whole["datasets"])
    registry.write_text(json.dumps(whole))


def test_what_the_samples_of_a_step_depend_on_is_noticed(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """How often a set is passed over, the words of an answer, and the numbers that the order is drawn from."""
    write_data(tmp_path, 12, name="a")
    registry, out = write_data(tmp_path, 12, name="b", seed=1), tmp_path / "out"

    def go(**more: Any) -> None:
        train(command(tiny(), registry, out, "lora", train_split_ratio=0.8, eval_steps=1000, save_steps=1, **more))

    def refused() -> None:
        with pytest.raises(CheckpointError, match="the data are not those"):
            go(max_steps=4, resume_from_checkpoint="latest")

    go(max_steps=1)
    go(max_steps=2, resume_from_checkpoint="latest")
    edited(registry, lambda sets: sets["a"].update(weight=3))
    refused()
    edited(registry, lambda sets: sets["a"].update(weight=1))
    go(max_steps=3, resume_from_checkpoint="latest")

    records, before = tmp_path / "a.jsonl", (tmp_path / "a.jsonl").read_text()
    records.write_text(before.replace("the picture is red", "the picture is blue"))
    refused()
    # A record more that is held out: none that trains is another one, but those of `b` have other numbers.
    for n in range(6):
        turns = [{"role": "user", "content": f"how many {n}"}, {"role": "assistant", "content": "square"}]
        records.write_text(before + json.dumps({"id": f"new{n}", "messages": turns, "images": []}) + "\n")
        refused()


def test_a_budget_of_other_data_leaves_none_of_these_out(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """It names samples by their numbers, and a fresh start by `latest` may have other data."""
    registry, out = write_data(tmp_path, 8), tmp_path / "out"
    words = command(tiny(), registry, out, "lora", max_steps=1, resume_from_checkpoint="latest", max_bad_fraction=0.5)
    out.mkdir()
    (out / "run_card.json").write_text("{}")
    for without in ([15], [3]):
        budget = {"schema": 1, "tokens": None, "patches": None, "without": without, "short": 0, "data": "another"}
        (out / "budget.json").write_text(json.dumps(budget))
        train(words)
        assert not [line for line in ledger(out) if line["reason"] == "out_of_memory"]
        for made in ("checkpoints", "model"):
            shutil.rmtree(out / made)


def test_a_result_without_checkpoints_is_not_replaced(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry, out = write_data(tmp_path, 8), tmp_path / "out"
    words = command(tiny(), registry, out, "lora", max_steps=1, resume_from_checkpoint="latest")
    train(words)
    train(words)  # to the end again, from the last checkpoint
    shutil.rmtree(out / "checkpoints")
    before = (out / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"holds a result \(model/\) and no checkpoint"):
        train(words)
    assert (out / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("damage", ["altered", "cut off"])
def test_a_best_checkpoint_that_was_damaged_does_not_become_the_result(
    tiny: Callable[..., Path], tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, out, real = write_data(tmp_path, 24), tmp_path / "out", story.hand_over

    def hand_over(job: Any) -> None:
        assert job.best.step < job.done_steps
        (file,) = (out / f"checkpoints/step-{job.best.step:06d}").glob("weights*")
        content = bytearray(file.read_bytes())
        content[-3] ^= 0x40
        file.write_bytes(content if damage == "altered" else content[: len(content) // 2])
        real(job)

    monkeypatch.setattr(story, "hand_over", hand_over)
    worse = {"metric_for_best": "toy/loss", "greater_is_better": "true", "learning_rate_llm": 1e-2}
    steps = {"max_steps": 3, "eval_steps": 1, "save_steps": 1, "save_total_limit": 5, "train_split_ratio": 0.7}
    with pytest.raises(CheckpointError, match=r"truncated or altered, and .*step-000001 is the best by .*move it away"):
        train(command(tiny(), registry, out, "lora", **worse, **steps))
    assert not (out / "model").exists()
    monkeypatch.undo()
    shutil.rmtree(out / "checkpoints/step-000001")
    train(command(tiny(), registry, out, "lora", **worse, **steps, resume_from_checkpoint="latest"))
    assert (out / "model").exists()


def saved(root: Path, step: int, keep: int = 3) -> Path:
    state: dict[str, Any] = {key: 0 for key in checkpoints._STATE if key != "step"}
    checkpoints.begin(root, step)
    files = checkpoints.write(root, step, 0, [("weights", "a", torch.ones(3))])
    return checkpoints.finish(root, step, files, state, keep)


def test_a_share_in_several_files_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is written while the tensors of the next are read; one tensor is larger than a file."""
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 100)
    sizes = {"weights": [3, 10, 10, 60, 1], "optimizer": [20, 20]}
    given = {stem: {f"{stem}{i}": torch.randn(n) for i, n in enumerate(many)} for stem, many in sizes.items()}
    checkpoints.begin(tmp_path, 1)
    files = checkpoints.write(tmp_path, 1, 0, ((stem, *pair) for stem, many in given.items() for pair in many.items()))
    assert [*files] == [*(f"weights-000-{i:02d}.safetensors" for i in range(3)),
                        *(f"optimizer-000-{i:02d}.safetensors" for i in range(2))]  # fmt: skip
    done = checkpoints.finish(tmp_path, 1, files, {key: 0 for key in checkpoints._STATE if key != "step"}, 3)
    checkpoints.read_state(done)
    for stem, many in given.items():
        found = checkpoints.load_tensors(done, stem)
        assert found.keys() == many.keys()
        assert all(torch.equal(found[name], value) for name, value in many.items())


def test_a_file_that_cannot_be_written_leaves_the_others_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading is collective: a rank that stopped in the middle would leave the others waiting."""
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 8)
    read = []

    def tensors() -> Iterator[tuple[str, str, torch.Tensor]]:
        for i in range(9):
            read.append(i)
            yield "weights", f"w{i}", torch.ones(2)

    # There is no folder: nobody has begun.
    with pytest.raises(CheckpointError, match="the checkpoint of step 1 could not be written"):
        checkpoints.write(tmp_path, 1, 0, tensors())
    assert read == [*range(9)]


def test_steps_of_seven_digits_come_after_those_of_six(tmp_path: Path) -> None:
    for step in (999_400, 999_600, 999_800, 1_000_000, 1_000_200):
        assert saved(tmp_path, step).exists()
    assert [checkpoints.step_of(p) for p in checkpoints.complete(tmp_path)] == [999_800, 1_000_000, 1_000_200]
    last = checkpoints.find("latest", tmp_path)
    assert last is not None
    assert last.name == "step-1000200"
    (last / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"before it: --resume_from_checkpoint .*step-1000000"):
        checkpoints.read_state(last)


def test_somebodys_copies_are_no_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2):
        saved(tmp_path, step)
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000001.bak")
    saved(tmp_path, 3, keep=1)
    assert [p.name for p in checkpoints.complete(tmp_path)] == ["step-000003"]
    (aside,) = checkpoints.set_aside(checkpoints.complete(tmp_path), 2)
    (aside / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.read_state(aside)


def test_a_half_deleted_checkpoint_is_not_in_the_way(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step-000001/state.json").unlink()
    assert checkpoints.complete(tmp_path) == []
    assert saved(tmp_path, 1) == checkpoints.complete(tmp_path)[0]


def test_fewer_steps_than_are_done_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry, out = write_data(tmp_path, 8), tmp_path / "out"
    train(command(tiny(), registry, out, "lora", max_steps=3))
    before = (out / "run.yaml").read_text()
    with pytest.raises(CheckpointError, match="is of step 3, beyond the 2 that --max_steps or --epochs ask for"):
        train(command(tiny(), registry, out, "lora", max_steps=2, resume_from_checkpoint="latest"))
    assert (out / "run.yaml").read_text() == before
