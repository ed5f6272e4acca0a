"""`vlft eval`: the evaluation of a run for a finished model, or for any Hugging Face folder. Data parallel.

output_dir/
    metrics.json          the model, the options, the values by the keys of metrics.jsonl
    DATASET.jsonl         the answers, for the data sets of --eval_dataset_scripts
    ledger.json           samples that could not be used; no .jsonl, which a data set called ledger has

Files of an earlier evaluation are replaced; a folder that holds anything else is refused.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlft.batch import ToInputs
from vlft.config import SCHEMA, EvalOptions, evaluation_files
from vlft.data.collate import Row
from vlft.data.ledger import LedgerEntry
from vlft.data.prepare import Data, DataOptions
from vlft.engine import Engine, start_engine
from vlft.errors import ConfigError, StrategyError
from vlft.evaluate import Answers, Evaluation, does_not_fit, evaluate
from vlft.export import whole_model
from vlft.models.forward import PackedVLM
from vlft.models.load import Checkpoint, compute_dtype, open_checkpoint, picture_facts
from vlft.setup import load_metrics, same_data, shared_data_options, try_metrics
from vlft.terminal import figure, table
from vlft.tracking import run_card, write_json, write_predictions
from vlft.words import counted


@dataclass
class Judged:
    """A model and its data, ready to be evaluated."""

    engine: Engine
    packed: PackedVLM
    data: Data
    inputs: ToInputs
    ledger: list[LedgerEntry]

    def rows(self, datasets: Sequence[str], limit: int | None) -> Iterator[Row]:
        """Held-out rows of this rank; what cannot be decoded is remembered."""
        for step in self.data.eval_steps(datasets, limit):
            if step_failures := self.engine.gather(step.failures):
                self.ledger += self.data.account([replace(entry, step=0) for entry in step_failures])
            yield from step.rows


def main(options: EvalOptions) -> None:
    """Evaluate, write, and print a table.

    Raises:
        VlftError: as training does; nothing is written then.
        StrategyError: a script could not score; everything else is written.
    """
    began = time.monotonic()
    engine = start_engine(options.mixed_precision)
    if engine.shards_states:
        raise ConfigError("vlft eval is data parallel: every process holds the whole model; launch it with ddp.yaml.")
    try:
        scripts = load_metrics(engine, options.eval_dataset_scripts)
        judged = load(options, engine)
        try_metrics(engine, judged.data, scripts)
        answers = Answers(options.eval_max_new_tokens, options.eval_temperature, options.seed)
        found = evaluate(engine, judged.packed, judged.packed.model, judged.rows, judged.inputs, judged.data, scripts,
                         answers)  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise does_not_fit(error) from error
    engine.on_main(lambda: hand_over(options, judged, found, time.monotonic() - began))
    engine.close()
    if found.failed:
        failures = "; ".join(f"{name} could not score: {error.rstrip(': ')}" for name, error in found.failed.items())
        raise StrategyError(
            f"{failures}; all else is in {options.output_dir}: correct the script, then evaluate again."
        )


def load(options: EvalOptions, engine: Engine) -> Judged:
    checkpoint = open_checkpoint(options.model, trust_remote_code=options.trust_remote_code)
    pictures = picture_facts(checkpoint)
    data = same_data(engine, data_options(options, engine, checkpoint))
    model: Any = whole_model(checkpoint, str(engine.device))
    model.to(compute_dtype(engine.precision, model.config)).eval()
    packed = PackedVLM(model, checkpoint.family.parts, model.config.image_token_id).eval()
    return Judged(engine, packed, data, ToInputs(pictures, None, engine.device), list(data.ledger))


def data_options(options: EvalOptions, engine: Engine, checkpoint: Checkpoint) -> DataOptions:
    return shared_data_options(
        options, engine, checkpoint, picture_facts(checkpoint), global_batch=1, train_batch_size=1, rows_per_rank=1,
        eval_batch_size=options.per_device_eval_batch_size, use=options.split,
    )  # fmt: skip


def hand_over(options: EvalOptions, judged: Judged, found: Evaluation, seconds: float) -> None:
    """Write the files, beside what they replace until they are whole, and print the values."""
    folder = options.output_dir
    assert folder is not None  # `vlft.commands` fills it in, or refuses
    beside = folder / ".writing"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for dataset, made in found.made.items():
        write_predictions(beside / f"{dataset}.jsonl", made)
    write_json(beside / "ledger.json", {"schema": SCHEMA, "samples": [entry.json() for entry in judged.ledger]})
    facts = run_card(options=options.model_dump(mode="json"), values=found.values, failed=found.failed,
                     world_size=judged.engine.world_size, seconds=seconds)  # fmt: skip
    write_json(beside / "metrics.json", facts)
    new = {path.name for path in beside.iterdir()}
    for name in evaluation_files(folder) - new:
        (folder / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda one: one == "metrics.json"):  # it says what is there: last
        os.replace(beside / name, folder / name)
    beside.rmdir()
    print(
        table(
            ("metric", "value"),
            [(key.removeprefix("eval/"), figure(v)) for key, v in found.values.items()],
        )
    )
    if judged.ledger:
        print(f"{counted(len(judged.ledger), 'sample')} could not be used: {folder / 'ledger.json'}")
    print(f"answers and values: {folder}")
