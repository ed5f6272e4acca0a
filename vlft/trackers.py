"""Weights & Biases, TensorBoard and trackio beside metrics.jsonl, through Accelerate's trackers. Only the main process.

One that cannot start ends the run before it begins: what was asked for would silently be missing. One that fails later,
when the network is down at night, must not: its lines are lost (metrics.jsonl has them), and people are told once.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

from vlft.errors import ConfigError

SCHEMA = 1
PATIENCE = 10
"""Failures in a row after which a tracker is left alone: each may have waited for a network."""
TABLE_ROWS = 32
"""Predictions of one data set that a table shows."""
PICTURE_HEIGHT = 256
"""Pixels. A sample's pictures stand side by side in one."""


class Trackers:
    """Those that were asked for: start, log, close. Without any, all of it does nothing."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        project: str | None,
        run_name: str | None,
        done_steps: int,
        options: Mapping[str, Any],
        rates: Callable[[], Mapping[str, float]] = dict,
        thumbnails: Callable[[], Mapping[tuple[str, str], Sequence[Path]]] = dict,
    ) -> None:
        """Nothing is begun before `start`.

        Args:
            names: of "wandb", "tensorboard", "trackio".
            folder: the run folder.
            project: at wandb and in trackio; None: "vlft".
            run_name: there; None: as they choose.
            done_steps: steps that an earlier part of the run has logged; 0 for a run that begins.
            options: shown as the run's configuration.
            rates: name of an optimizer group -> its learning rate now; logged with every train line.
            thumbnails: (data set, id) -> files of small pictures.
        """
        self.names, self.folder, self.project, self.run_name = tuple(names), folder, project or "vlft", run_name
        self.done_steps, self.options, self.rates, self.thumbnails = done_steps, dict(options), rates, thumbnails
        self.warn: Callable[[str], None] = print
        """Tells people that a tracker failed."""
        self._running: dict[str, Any] = {}
        self._failures: dict[str, int] = {}
        self._told: set[str] = set()

    @property
    def known(self) -> Path:
        """Which runs at the trackers are this one, so that a resume goes on with them."""
        return self.folder / "trackers.json"

    def start(self) -> None:
        """Begin all of them, or go on with the runs of an earlier part of this run. Call on the main process.

        Raises:
            ConfigError: a package is missing, or a tracker cannot start (no account, no network, a full disk).
        """
        known = json.loads(self.known.read_text()) if self.done_steps and self.known.exists() else {}
        begin = {"wandb": self._wandb, "trackio": self._trackio, "tensorboard": self._tensorboard}
        # TensorBoard comes last: it writes into the run folder, which must stay empty if another one cannot start.
        for name in [name for name in begin if name in self.names]:
            if importlib.util.find_spec(name) is None:
                raise ConfigError(f"--report_to {name} needs {name}: pip install 'vlft[{name}]', or leave it out.")
            try:
                self._running[name] = begin[name](known.get(name, {}))
            except Exception as error:
                advice = "; WANDB_MODE=offline needs no network" if name == "wandb" else ""
                raise ConfigError(
                    f"--report_to {name} cannot start: {type(error).__name__}: {error}; correct that, or leave it "
                    f"out{advice}."
                ) from error
        self._remember(known)

    def _wandb(self, known: Mapping[str, str]) -> WandBTracker:
        more = {"id": known["id"], "resume": "allow"} if known else {}
        tracker = WandBTracker(known.get("project", self.project), **({"name": self.run_name} | more))
        tracker.start()
        tracker.store_init_configuration(self.options)
        return tracker

    def _trackio(self, known: Mapping[str, str]) -> TrackioTracker:
        # trackio finds a run by its name.
        how = {"name": known["name"], "resume": "allow"} if known else {"name": self.run_name}
        tracker = TrackioTracker(known.get("project", self.project), config=self.options, **how)
        tracker.start()
        return tracker

    def _tensorboard(self, known: Mapping[str, str]) -> TensorBoardTracker:  # noqa: ARG002  (it knows by the folder)
        # What an earlier part of the run wrote after its last save is hidden: those steps come again.
        purge = self.done_steps + 1 if self.done_steps else None
        tracker = TensorBoardTracker("tensorboard", self.folder, purge_step=purge)
        tracker.start()
        # Not as `hparams`, which takes no lists and makes a folder of its own with every start.
        text = "\n".join(f"    {name}: {value}" for name, value in self.options.items())
        tracker.log({"options": text}, step=self.done_steps)
        return tracker

    def _remember(self, known: Mapping[str, Any]) -> None:
        found: dict[str, Any] = {"schema": SCHEMA} | dict(known)
        if "wandb" in self._running:
            run = self._running["wandb"].run
            found["wandb"] = {"id": run.id, "name": run.name, "project": run.project, "url": run.url}
        if "trackio" in self._running:
            run = self._running["trackio"].run
            found["trackio"] = {"name": run.name, "project": run.project}
        if len(found) > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.known.write_text(json.dumps(found, indent=2))

    def log(self, line: Mapping[str, Any]) -> None:
        """Send one line of metrics.jsonl, and the rate of every optimizer group with it."""
        if not self._running:
            return
        flat = flattened(line)
        if line["kind"] == "train":
            flat |= {f"learning_rate_group/{name}": rate for name, rate in self.rates().items()}
        step = int(line["step"])
        self._try(lambda tracker: tracker.log(flat, step=step), self._running)

    def predictions(self, step: int, dataset: str, rows: Iterable[Any]) -> None:
        """Show generated answers of a data set as a table at wandb: those that have small pictures, then the first.

        Args:
            rows: with `id`, `question`, `reference` and `prediction`.
        """
        if "wandb" not in self._running:
            return

        def send(tracker: WandBTracker) -> None:
            import wandb

            pictures = self.thumbnails()
            some = sorted(rows, key=lambda row: (dataset, row.id) not in pictures)[:TABLE_ROWS]
            data = []
            for row in some:
                picture = side_by_side(pictures.get((dataset, row.id), ()))
                shown = None if picture is None else wandb.Image(picture)
                data.append([row.id, shown, row.question, row.reference, row.prediction])
            columns = ["id", "pictures", "question", "reference", "prediction"]
            tracker.log_table(f"predictions/{dataset}", columns=columns, data=data, step=step)

        self._try(send, ["wandb"])

    def close(self, exit_code: int = 0) -> None:
        """Send what is left. `exit_code`: 0, or wandb shows the run as failed."""

        def finish(tracker: Any) -> None:
            if isinstance(tracker, WandBTracker):
                tracker.run.finish(exit_code=exit_code)
            else:
                tracker.finish()

        self._try(finish, self._running)
        self._running.clear()

    def _try(self, work: Callable[[Any], None], names: Iterable[str]) -> None:
        for name in list(names):
            try:
                work(self._running[name])
                self._failures[name] = 0
            except Exception as error:  # whatever a tracker or the network raises
                self._failures[name] = self._failures.get(name, 0) + 1
                self._tell(name, error)

    def _tell(self, name: str, error: Exception) -> None:
        if name not in self._told:
            self._told.add(name)
            self.warn(
                f"WARNING: {name} failed ({type(error).__name__}: {error}); the run goes on, and what it misses is in "
                "metrics.jsonl."
            )
        if self._failures[name] >= PATIENCE:
            self.warn(f"WARNING: {name} failed {PATIENCE} times in a row and gets nothing any more.")
            del self._running[name]


def flattened(line: Mapping[str, Any]) -> dict[str, float | str]:
    """A line of metrics.jsonl with slashes for its mappings: numbers and words, without what is null.

    "loss" becomes "train/loss"; "eval/..." stays; {"perf": {"step_seconds": 1.0}} becomes "perf/step_seconds".
    """
    flat: dict[str, Any] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{k}": v for k, v in value.items()}
        elif key not in ("schema", "kind", "step"):
            flat[key if key.startswith("eval/") else f"{line['kind']}/{key}"] = value
    return {key: value for key, value in flat.items() if isinstance(value, int | float | str)}


def side_by_side(paths: Sequence[Path]) -> Any | None:
    """One PIL picture of several, at most `PICTURE_HEIGHT` high; None of none."""
    from PIL import Image

    if not paths:
        return None
    pictures = []
    for path in paths:
        with Image.open(path) as file:
            picture = file.convert("RGB")
        picture.thumbnail((4 * PICTURE_HEIGHT, PICTURE_HEIGHT))
        pictures.append(picture)
    whole = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    at = 0
    for picture in pictures:
        whole.paste(picture, (at, 0))
        at += picture.width
    return whole
