"""Whole steps: the same whatever the workers and ranks; failures are reported, never swapped; a resume starts right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest_data import image_record, picture

from vlft.data import images
from vlft.data.collate import Row, collate, empty_row, sample_seed
from vlft.data.index import Index
from vlft.data.loader import Step, eval_steps, step_loader
from vlft.data.plan import Plan, place
from vlft.data.sample import Costs, Fitted, Limits, build_sample, fit, split
from vlft.data.tokens import Chat

Build = Callable[..., Index]


class Setup:
    def __init__(self, index: Index, chat: Chat) -> None:
        self.index, self.chat = index, chat
        self.fitted: Fitted = fit(index, Limits(56 * 56, 200 * 200, 2048, "shrink", 28))
        self.train, self.held = split(index, index.specs, 0.8, usable=self.fitted.usable)
        self.plan = Plan(self.train, index.dataset[self.train], [1.0], seed=3, global_batch=8)

    def steps(
        self, rank: int = 0, world: int = 1, start: int = 0, total: int = 6, workers: int = 0, **options: Any
    ) -> list[Step]:
        defaults: dict[str, Any] = {"rows_per_rank": 2, "token_budget": 600, "costs": Costs(token=1.0, patch=0.25)}
        loader = step_loader(
            self.index, self.fitted, self.plan, self.chat, rank=rank, world_size=world, seed=3, start_step=start,
            total_steps=total, num_workers=workers, **defaults | options,
        )  # fmt: skip
        return list(loader)


@pytest.fixture
def setup(build: Build, mixed: list[Any], chat: Chat) -> Setup:
    return Setup(build(mixed), chat)


def same(a: list[Step], b: list[Step]) -> bool:
    def facts(step: Step) -> Any:
        return step.number, step.epoch, step.failures, step.supervised_tokens, step.samples, len(step.rows)

    return [facts(s) for s in a] == [facts(s) for s in b] and all(
        r.same_as(q) for x, y in zip(a, b, strict=True) for r, q in zip(x.rows, y.rows, strict=True)
    )


def ids_of(steps: list[Step]) -> list[int]:
    return [i for step in steps for row in step.rows for i in row.sample_ids]


def test_a_row_is_what_the_design_says(setup: Setup) -> None:
    chat = setup.chat
    for step in setup.steps():
        assert step.samples == len(ids_of([step]))
        assert step.supervised_tokens == sum(int((r.labels_T != -100).sum()) for r in step.rows)
        for row in step.rows:
            total = row.input_ids_T.shape[1]
            assert row.input_ids_T.shape == row.labels_T.shape == (1, total)
            assert row.position_ids_4T.shape == (4, 1, total)
            assert row.cu_seqlens.dtype == torch.int32
            assert row.cu_seqlens[-1] == total
            pixels = int((row.image_grid_thw.prod(dim=1) * 3 * 14 * 14).sum()) if len(row.image_grid_thw) else 0
            assert row.pixels_u8.shape == (pixels,)
            assert row.pixels_u8.dtype == torch.uint8
            assert (row.input_ids_T == chat.image_token_id).sum() * 4 == row.image_grid_thw.prod(dim=1).sum()
            starts = row.cu_seqlens[:-1].long()
            assert (row.position_ids_4T[:, 0, starts] == 0).all()
            assert (row.labels_T[0, row.cu_seqlens[1:].long() - 1] == -100).all()


def test_pictures_of_a_row_are_hugging_faces(setup: Setup) -> None:
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 200 * 200}, do_normalize=False, do_rescale=False
    )
    step = next(s for s in setup.steps() if len(s.rows[0].image_grid_thw) > 1)
    row = step.rows[0]
    paths = [path for i in row.sample_ids for path in setup.index.sources(i)]
    theirs = processor(images=[Image.open(str(p)) for p in paths], return_tensors="pt")
    assert torch.equal(theirs["image_grid_thw"], row.image_grid_thw)
    at = first = 0
    for _, gh, gw in row.image_grid_thw.tolist():
        ours = row.pixels_u8[at : at + 3 * gh * gw * 196].view(3, gh // 2, 2, 14, gw // 2, 2, 14)
        patches = theirs["pixel_values"][first : first + gh * gw].view(gh // 2, gw // 2, 2, 2, 3, 2, 14, 14)[
            :, :, :, :, :, 0
        ]
        assert torch.equal(ours.permute(1, 4, 2, 5, 0, 3, 6).float(), patches.float())
        at, first = at + 3 * gh * gw * 196, first + gh * gw


def test_workers_do_not_change_the_steps(setup: Setup) -> None:
    assert same(setup.steps(workers=0), setup.steps(workers=2))


def test_a_resume_starts_at_its_step_and_decodes_nothing_before(setup: Setup, monkeypatch: Any) -> None:
    whole = setup.steps()
    seen: list[Any] = []
    original = images.decode
    monkeypatch.setattr(images, "decode", lambda source, *a, **k: (seen.append(source), original(source, *a, **k))[1])
    rest = setup.steps(start=4)
    assert same(whole[4:], rest)
    assert [s.number for s in rest] == [4, 5]
    assert len(seen) == sum(len(r.image_grid_thw) for s in rest for r in s.rows)


def test_ranks_are_balanced_by_the_costs_that_are_given(setup: Setup) -> None:
    fitted = setup.fitted
    rows: dict[Costs, list[Any]] = {}
    for costs in (Costs(), Costs(learnt=50.0, patch=0.1), Costs(patch_pair=1.0)):
        shares = [setup.steps(rank, 2, costs=costs) for rank in range(2)]
        rows[costs] = [[[list(row.sample_ids) for row in share[k].rows] for share in shares] for k in range(4)]
        for k, placed in enumerate(rows[costs]):
            ids = setup.plan.members(*setup.plan.locate(k))
            expected = place(
                fitted.length[ids], fitted.patches[ids], fitted.cost(ids, costs), ranks=2, rows_per_rank=2,
                token_budget=600,
            )  # fmt: skip
            assert placed == [[ids[row].tolist() for row in rank] for rank in expected]
    assert len({str(placed) for placed in rows.values()}) == 3


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_steps_without_loss(setup: Setup, world: int) -> None:
    alone = setup.steps()
    shares = [setup.steps(rank, world) for rank in range(world)]
    for k, whole in enumerate(alone):
        parts = [share[k] for share in shares]
        assert sorted(ids_of(parts)) == sorted(ids_of([whole]))
        assert len({len(p.rows) for p in parts}) == 1
        assert sum(p.supervised_tokens for p in parts) == whole.supervised_tokens
        seeds = {
            i: s
            for step in parts
            for row in step.rows
            for i, s in zip(row.sample_ids, row.sample_seeds.tolist(), strict=False)
        }
        assert seeds == {
            i: s for row in whole.rows for i, s in zip(row.sample_ids, row.sample_seeds.tolist(), strict=True)
        }


def test_an_epoch_border(setup: Setup) -> None:
    per_epoch = setup.plan.steps_per_epoch
    steps = setup.steps(total=2 * per_epoch)
    assert sorted(ids_of(steps[:per_epoch])) == sorted(ids_of(steps[per_epoch:])) == setup.train.tolist()
    assert [s.epoch for s in steps] == [0] * per_epoch + [1] * per_epoch


def test_a_picture_that_does_not_decode_is_left_out_and_reported(setup: Setup, tmp_path: Path) -> None:
    before = setup.steps(total=setup.plan.steps_per_epoch)
    victim = next(i for i in setup.train.tolist() if setup.index.n_images[i] == 2)
    path = Path(str(setup.index.sources(victim)[1]))
    path.write_bytes(path.read_bytes()[:-200])
    for workers in (0, 2):
        steps = setup.steps(total=setup.plan.steps_per_epoch, workers=workers)
        (failure,) = [f for s in steps for f in s.failures]
        assert failure.reason == "image_truncated"
        assert failure.id == setup.index.sample_id(victim)
        assert path.name in failure.message
        assert failure.counts_as_bad
        hit = next(n for n, s in enumerate(steps) if s.failures)
        assert failure.step == steps[hit].number + 1
        assert sorted([*ids_of(steps), victim]) == sorted(ids_of(before))  # nothing was swapped in
        assert steps[hit].samples == before[hit].samples - 1
        assert steps[hit].supervised_tokens < before[hit].supervised_tokens
        assert same(steps[:hit] + steps[hit + 1 :], before[:hit] + before[hit + 1 :])


def test_a_picture_that_vanished_or_changed(setup: Setup) -> None:
    victims = [i for i in setup.train.tolist() if setup.index.n_images[i] == 1][:2]
    gone, other = (Path(str(setup.index.sources(i)[0])) for i in victims)
    gone.unlink()
    picture(0, 31, 57).save(other)
    steps = setup.steps(total=setup.plan.steps_per_epoch)
    assert {f.reason for s in steps for f in s.failures} == {"image_missing", "image_changed"}


def test_a_step_that_lost_everything_still_has_its_rows(build: Build, tmp_path: Path, chat: Chat) -> None:
    picture(0, 60, 60).save(tmp_path / "a.png")
    setup = Setup(build([image_record(n, "a.png") for n in range(8)], split="train"), chat)
    (tmp_path / "a.png").unlink()
    (step,) = setup.steps(total=1)
    assert len(step.failures) == 8
    assert step.samples == step.supervised_tokens == 0
    assert len(step.rows) >= 2
    assert all(row.same_as(empty_row(chat.pad_token_id)) for row in step.rows)


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_uses_every_held_out_sample_once(setup: Setup, world: int) -> None:
    shares = [
        list(
            eval_steps(
                setup.index,
                setup.fitted,
                setup.chat,
                setup.held,
                rank=r,
                world_size=world,
                batch_size=2,
            )
        )
        for r in range(world)
    ]
    assert sorted(i for share in shares for i in ids_of(share)) == setup.held.tolist()
    assert len({tuple(len(step.rows) for step in share) for share in shares}) == 1
    for step in shares[0]:
        for row in step.rows:
            assert len(row.dataset_ids) == len(row.sample_ids)
            assert set(row.dataset_ids) <= {0}


def test_empty_row() -> None:
    row = empty_row(7)
    assert row.input_ids_T.tolist() == [[7]]
    assert row.labels_T.tolist() == [[-100]]
    assert row.cu_seqlens.tolist() == [0, 1]
    assert row.position_ids_4T.shape == (4, 1, 1)
    assert row.supervised == 0
    assert row.sample_ids == ()
    assert collate([], [], image_token_id=1, pad_token_id=7).same_as(row)
    assert isinstance(row.to("cpu"), Row)


def test_seeds_are_of_the_sample_and_the_epoch(setup: Setup) -> None:
    sample = build_sample(setup.index, setup.fitted, setup.chat, 0)
    seeds = {sample_seed(sample.identity, s, e) for s in range(3) for e in range(3)}
    assert len(seeds) == 9
    assert all(-(2**63) <= s < 2**63 for s in seeds)
    row = collate([sample], [[]], image_token_id=setup.chat.image_token_id, pad_token_id=0, seed=3, epoch=1)
    assert row.sample_seeds.tolist() == [sample_seed(sample.identity, 3, 1)]


def test_positions_restart_in_each_sample(setup: Setup) -> None:
    samples = [build_sample(setup.index, setup.fitted, setup.chat, i) for i in (0, 4)]
    row = collate(samples, [[], []], image_token_id=setup.chat.image_token_id, pad_token_id=0)
    lengths = np.diff(row.cu_seqlens.numpy())
    expected = np.concatenate([np.arange(n) for n in lengths])
    assert (row.position_ids_4T[:, 0].numpy() == expected).all()  # text only: all four rows count


def test_steps_cross_processes_with_one_shared_buffer_each(setup: Setup) -> None:
    """Each shared tensor costs a file descriptor for as long as it lives; 64 rows of ten would exhaust them."""
    steps = setup.steps(workers=1, rows_per_rank=6)
    here = setup.steps(rows_per_rank=6)
    assert same(steps, here)
    for step in steps:
        assert len({row.pixels_u8.untyped_storage().data_ptr() for row in step.rows if len(row.pixels_u8)}) <= 1
        assert not any(row.input_ids_T.is_shared() for row in step.rows)
