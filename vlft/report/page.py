"""From the facts of one run or several to the page: what is said, in which order. How it looks is in report.html.j2."""

from __future__ import annotations

import base64
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from vlft import boxes
from vlft.report import charts
from vlft.report.charts import Chart, Series, compact
from vlft.report.read import Curve, Histogram, Picture, RunFacts, Shown, best_point, higher_is_better

_EXAMPLES = 3
"""Samples shown for each reason of the ledger."""
_MOST_SHOWN = 48
"""Samples of the gallery, as many of each data set: the page carries their pictures."""
_MOST_ROWS = 24
"""Rows of the table of evaluations."""
_MOST_CHIPS = 6
"""Boxes of one answer with a name beside them; more would hide the picture."""
_NOT_COMPARED = ("output_dir", "wandb_run_name")


@dataclass(frozen=True)
class Figure:
    """A key figure."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table of runs or steps: cells, and which of them are the best of their kind."""

    head: str
    cells: tuple[str, ...]
    best: tuple[bool, ...] = ()
    details: tuple[str, ...] = ()
    """Beside the cells, in small print."""
    note: str = ""


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    charts: tuple[Chart, ...]
    facts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mark:
    """A box on a picture, in the picture's own units, and where its name stands in hundredths."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    left: float
    top: float
    bottom: float
    name: str
    row: int
    """How many names of other answers stand below the picture's box before this one's."""


@dataclass(frozen=True)
class Answer:
    who: str
    text: str
    kind: str
    """Class of its boxes: "reference", "before", "after-1", ... by run."""
    short: str
    """Its name on the picture."""
    row: int = 0
    verdict: str = ""
    good: bool = False
    boxed: bool = False
    """Whether its boxes are drawn."""


@dataclass(frozen=True)
class Card:
    """A held-out sample as the gallery shows it."""

    dataset: str
    id: str
    question: str
    pictures: tuple[tuple[str, Picture, tuple[Mark, ...]], ...]
    """Its data as a URL, itself, its boxes."""
    answers: tuple[Answer, ...]
    note: str


def render(runs: Sequence[RunFacts]) -> str:
    """The page of one run, or of several side by side."""
    names = labels(runs)
    alone = len(runs) == 1
    kinds, cards = _cards(runs, names)
    context = {
        "alone": alone,
        "title": " and ".join(names) if len(runs) < 3 else f"{len(runs)} runs compared",
        "names": names,
        "runs": [_about(run, name, i) for i, (run, name) in enumerate(zip(runs, names, strict=True))],
        "figures": key_figures(runs[0]) if alone else (),
        "comparison": () if alone else _comparison(runs),
        "differing": () if alone else differing_options(runs),
        "evaluations": _evaluations(runs[0]) if alone else None,
        "sections": [s for s in _sections(runs, names) if s.charts],
        "kinds": kinds,
        "cards": cards,
        "data": _data_section(runs, names),
        "datasets": _datasets(runs, names),
        "ledgers": [(name, _reasons(run)) for run, name in zip(runs, names, strict=True)],
    }
    return template(Path(__file__).parent / "report.html.j2").render(context)


def template(path: Path) -> jinja2.Template:
    """A page's template; it may include this folder's. Whatever comes from data is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([path.parent, Path(__file__).parent]), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(path.name)


def jpeg_url(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def labels(runs: Sequence[RunFacts]) -> list[str]:
    """Names of the folders; with their parents, or numbered, where they are the same."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.root.resolve().parent.name}/{run.name}" for run in runs]
    return [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def final_loss(run: RunFacts) -> tuple[float, int] | None:
    """Mean train loss of the last steps, and of how many (a single step's is noise)."""
    values = run.curves.get("loss", Curve()).values
    last = max(1, min(20, len(values) // 10))
    return (sum(values[-last:]) / last, last) if values else None


def chosen_metric(run: RunFacts) -> tuple[str, bool] | None:
    """The curve that decides, and whether large is good: best.json's, else the first metric, else the first loss."""
    if run.best and run.best.metric in run.evals:
        return run.best.metric, run.best.higher
    keys = sorted(run.evals, key=lambda k: (k.endswith("/loss"), k))
    return (keys[0], higher_is_better(keys[0])) if keys else None


def eval_name(key: str) -> str:
    """`eval/invoices/exact_match/strict` in words: exact_match/strict on invoices."""
    figure, dataset = _figure_of(key)
    return f"{figure} on {dataset}"


def _figure_of(key: str) -> tuple[str, str]:
    """Figure and data set of a key of an eval line; a metric called like its script is told once."""
    _, dataset, *figure = key.split("/")
    return "/".join(figure[1:] if len(figure) == 2 and figure[0] == figure[1] else figure), dataset


def seconds(run: RunFacts) -> float:
    """Time of all steps, waits and evaluations."""
    parts = ("perf/step_seconds", "perf/data_wait_seconds")
    return run.eval_seconds + sum(sum(run.curves.get(key, Curve()).values) for key in parts)


def speed(run: RunFacts, what: str) -> float | None:
    """`what` ("tokens", "samples") a second over all steps, waits included."""
    spent = seconds(run) - run.eval_seconds
    total = sum(run.curves.get(what, Curve()).values)
    return total / spent if spent and total else None


def duration(spent: float) -> str:
    minutes, rest = divmod(round(spent), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{spent:.1f} s"


def _highest(run: RunFacts, key: str) -> float | None:
    return max(run.curves.get(key, Curve()).values, default=None)


def _not_used(run: RunFacts) -> int:
    return len(run.unused) or sum(run.data.unused.values())


def key_figures(run: RunFacts) -> list[Figure]:
    """The top row: what one looks at before anything else."""
    figures = []
    loss, first = final_loss(run), run.curves.get("loss", Curve()).values[:1]
    if loss:
        over = "last step" if loss[1] == 1 else f"mean of the last {loss[1]} steps"
        figures.append(Figure("Train loss", f"{loss[0]:.4g}", f"{over}; the first was {first[0]:.4g}"))
    chosen = chosen_metric(run)
    if chosen:
        curve = run.evals[chosen[0]]
        step, value = best_point(curve, higher=chosen[1])
        if run.best and run.best.metric == chosen[0]:
            step, value = run.best.step, run.best.value
        figures.append(Figure(f"Best {eval_name(chosen[0])}", f"{value:.4g}", f"at step {step:,}{_kept(run, step)}"))
    pace, mfu = speed(run, "tokens"), run.curves.get("perf/mfu", Curve()).values
    if pace:
        share = f"MFU {sum(mfu) / len(mfu):.0%}" if mfu else _waiting(run)
        figures.append(Figure("Tokens per second", compact(pace), share))
    memory = _highest(run, "perf/peak_memory_gib")
    if memory is not None:
        figures.append(Figure("Peak memory", f"{memory:.1f} GiB", str(run.card.get("device", ""))))
    epochs = run.curves.get("epoch", Curve()).values[-1:]
    if run.last_step:
        told = f"{run.last_step:,} steps" + (f", {epochs[0]:.3g} epochs" if epochs else "")
        figures.append(Figure("Duration", duration(seconds(run)), told))
    read = sum(a + b for a, b in run.data.datasets.values())
    of = f"of {read + _not_used(run):,}; reasons below" if read else "reasons below"
    figures.append(Figure("Samples not used", f"{_not_used(run):,}", of if _not_used(run) else "every sample is used"))
    return figures


def _kept(run: RunFacts, step: int) -> str:
    if step == 0:
        return ", before training"
    return ", kept" if step in run.checkpoints else ", no longer on disk" if run.checkpoints else ""


def _waiting(run: RunFacts) -> str:
    waited = sum(run.curves.get("perf/data_wait_seconds", Curve()).values)
    spent = seconds(run) - run.eval_seconds
    return f"{waited / spent:.1%} of the time waiting for data" if spent else ""


def _evaluations(run: RunFacts) -> dict[str, Any] | None:
    """Which checkpoint to take: a row for each evaluated step, a column for each figure, the best of each marked."""
    keys = sorted(run.evals, key=lambda k: (k.endswith("/loss"), k))
    steps = sorted({int(s) for key in keys for s in run.evals[key].steps})
    if not keys:
        return None
    values = {key: dict(zip(map(int, run.evals[key].steps), run.evals[key].values, strict=True)) for key in keys}
    chosen = chosen_metric(run)
    good = {key: chosen[1] if chosen and key == chosen[0] else higher_is_better(key) for key in keys}
    best = {key: best_point(run.evals[key], higher=good[key])[0] for key in keys if len(set(values[key].values())) > 1}
    forms = {key: _form(values[key].values()) for key in keys}
    if len(steps) > _MOST_ROWS:
        wanted = {steps[0], *best.values(), *[s for s in steps if s in run.checkpoints]}
        wanted |= set(steps[-max(1, _MOST_ROWS - len(wanted)) :])
        steps = [s for s in steps if s in wanted]
    rows = []
    for step in steps:
        cells = tuple(forms[k].format(values[k][step]) if step in values[k] else "–" for k in keys)
        note = "before training" if step == 0 else "on disk" if step in run.checkpoints else ""
        rows.append(Row(f"{step:,}", cells, tuple(best.get(k) == step for k in keys), note=note))
    return {"head": [_figure_of(k) for k in keys], "rows": rows}


def _form(values: Iterable[float]) -> str:
    """A format with as many decimals for all of them as make four digits of the largest."""
    most = max((abs(v) for v in values), default=0.0)
    whole = len(str(int(most)))
    return f"{{:,.{max(0, 4 - whole) if most >= 1 else 4}f}}" if most >= 0.01 or not most else "{:.3g}"


# ---------------------------------------------------------------------------------------------------------------------
# Several runs
# ---------------------------------------------------------------------------------------------------------------------


def differing_options(runs: Sequence[RunFacts]) -> list[Row]:
    """Options that are not the same in all of the runs, in the order of run.yaml; "–": the run has no such option."""
    keys = dict.fromkeys(key for run in runs for key in run.options)
    rows = []
    for key in keys:
        cells = tuple(_option(run.options[key]) if key in run.options else "–" for run in runs)
        if key not in _NOT_COMPARED and len(set(cells)) > 1:
            rows.append(Row(key, cells))
    return rows


def _option(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _comparison(runs: Sequence[RunFacts]) -> list[Row]:
    """Final and best figures of every run; the best of a row is marked where one is better."""
    rows = [_ranked("Train loss, last steps", runs, lambda r: _first(final_loss(r)), "{:.4g}", higher=False)]
    for key in sorted({k for run in runs for k in run.evals}, key=lambda k: (k.endswith("/loss"), k)):
        higher = next((r.best.higher for r in runs if r.best and r.best.metric == key), higher_is_better(key))
        curves = [r.evals.get(key) for r in runs]
        best = partial(_best_value, key=key, higher=higher)
        row = _ranked(f"Held-out {eval_name(key)}", runs, best, "{:.4f}", higher)
        details = [
            f"at step {best_point(c, higher=higher)[0]:,}; final {c.values[-1]:.4f}" if c else "" for c in curves
        ]
        rows.append(replace(row, details=tuple(details)))
    rows += [
        _ranked("Tokens per second", runs, lambda r: speed(r, "tokens"), "{:,.0f}", higher=True),
        _ranked("Peak memory, GiB", runs, lambda r: _highest(r, "perf/peak_memory_gib"), "{:.1f}", higher=False),
        Row("Duration", tuple(duration(seconds(r)) for r in runs)),
        Row("Steps", tuple(f"{r.last_step:,}" for r in runs)),
        Row("Samples not used", tuple(f"{_not_used(r):,}" for r in runs)),
    ]
    return rows


def _first(values: Sequence[float] | None) -> float | None:
    return values[0] if values else None


def _best_value(run: RunFacts, key: str, higher: bool) -> float | None:
    return best_point(run.evals[key], higher=higher)[1] if key in run.evals else None


def _ranked(
    head: str, runs: Sequence[RunFacts], value: Callable[[RunFacts], float | None], form: str, higher: bool
) -> Row:
    found = [value(run) for run in runs]
    known = [v for v in found if v is not None]
    best = (max(known) if higher else min(known)) if len(set(known)) > 1 else None
    cells = tuple("–" if v is None else form.format(v) for v in found)
    return Row(head, cells, tuple(v is not None and v == best for v in found))


# ---------------------------------------------------------------------------------------------------------------------
# Charts
# ---------------------------------------------------------------------------------------------------------------------


class _Drawer:
    """Draws what the runs have, with an id of its own for each chart."""

    def __init__(self, runs: Sequence[RunFacts], names: Sequence[str]) -> None:
        self.runs, self.names, self.made = runs, names, 0
        evals = [key.split("/")[1] for run in runs for key in run.evals]
        trained = [key.split("/", 1)[1] for run in runs for key in run.curves if key.startswith("dataset_loss/")]
        self.places = {name: i for i, name in enumerate(dict.fromkeys([*trained, *sorted(evals)]))}

    def uid(self) -> str:
        self.made += 1
        return f"chart-{self.made}"

    def one(self, title: str, key: str, **how: Any) -> list[Chart]:
        """A chart of one curve; of several runs over each other."""
        found = [(i, run.curves[key]) for i, run in enumerate(self.runs) if run.curves.get(key)]
        series = [Series(title if len(self.runs) == 1 else self.names[i], curve, i, i) for i, curve in found]
        return [charts.lines(self.uid(), title, series, **how)] if series else []

    def family(self, title: str, prefix: str, **how: Any) -> list[Chart]:
        """Curves `prefix/NAME` in one chart; a chart for each NAME where runs are compared."""
        keys = list(dict.fromkeys(key for run in self.runs for key in run.curves if key.startswith(prefix + "/")))
        if len(self.runs) > 1:
            return [
                c
                for key in keys
                for c in self.one(f"{title.split(' by ')[0]}: {key.removeprefix(prefix + '/')}", key, **how)
            ]
        series = []
        for i, key in enumerate(keys):
            name = key.removeprefix(prefix + "/")
            place = self.places.get(name, i) if prefix == "dataset_loss" else i
            series.append(Series(name, self.runs[0].curves[key], place, place))
        return [charts.lines(self.uid(), title, series, **how)] if series else []

    def evaluated(self, wanted: Callable[[str], bool]) -> list[Chart]:
        """A chart for each figure over the data sets; for each data set too where runs are compared."""
        keys = sorted({key for run in self.runs for key in run.evals if wanted(key)})
        if len(self.runs) > 1:
            return [self._over_runs(key) for key in keys]
        groups: dict[str, list[str]] = {}
        for key in keys:
            groups.setdefault(_figure_of(key)[0], []).append(key)
        return [self._over_datasets(figure, members) for figure, members in groups.items()]

    def _over_runs(self, key: str) -> Chart:
        higher = higher_is_better(key)
        series = [
            Series(self.names[i], run.evals[key], i, i, best_point(run.evals[key], higher=higher))
            for i, run in enumerate(self.runs)
            if run.evals.get(key)
        ]
        return charts.lines(self.uid(), f"Held-out {eval_name(key)}", series, note="ringed: the best")

    def _over_datasets(self, figure: str, keys: Sequence[str]) -> Chart:
        run = self.runs[0]
        higher = run.best.higher if run.best and run.best.metric in keys else higher_is_better(keys[0])
        series = [
            Series(name, run.evals[key], place, place, best_point(run.evals[key], higher=higher))
            for key, name in ((key, key.split("/")[1]) for key in keys)
            for place in (self.places[name],)
        ]
        series.sort(key=lambda s: s.tone)
        title = f"Held-out {figure}" if len(keys) > 1 else f"Held-out {eval_name(keys[0])}"
        return charts.lines(self.uid(), title, series, note="ringed: the best")


def _sections(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Section]:
    draw = _Drawer(runs, names)
    learning = [
        *draw.one("Train loss", "loss", noisy=True),
        *draw.family("Train loss by data set", "dataset_loss", noisy=True),
        *draw.evaluated(lambda key: key.endswith("/loss") and key.count("/") == 2),
        *draw.evaluated(lambda key: key.count("/") > 2),
    ]
    steps = [
        *draw.family("Learning rate by part", "learning_rate", zero=True),
        *draw.one("Gradient norm", "grad_norm", noisy=True, log=True, note="before clipping"),
        *draw.family("Gradient norm by part", "grad_norms", noisy=True, log=True, note="before clipping"),
    ]
    pace = [
        *draw.one("Tokens per second", "perf/tokens_per_second", noisy=True, zero=True),
        *draw.one("Samples per second", "perf/samples_per_second", noisy=True, zero=True),
        *draw.one("Model FLOPs utilisation", "perf/mfu", noisy=True, zero=True, note="share of the device's peak"),
        *draw.one("Peak memory, GiB", "perf/peak_memory_gib", zero=True),
    ]
    return [
        Section("learning", "Learning", tuple(learning), tuple(_per_run(runs, names, _not_scored))),
        Section("steps", "Rates and gradients", tuple(steps), tuple(_per_run(runs, names, _skips))),
        Section("speed", "Speed and memory", tuple(pace), tuple(_per_run(runs, names, _pace))),
    ]


def _per_run(runs: Sequence[RunFacts], names: Sequence[str], say: Callable[[RunFacts], str]) -> Iterable[str]:
    for run, name in zip(runs, names, strict=True):
        said = say(run)
        if said:
            yield said if len(runs) == 1 else f"{name}: {said[0].lower()}{said[1:]}"


def _not_scored(run: RunFacts) -> str:
    told = "; ".join(f"{name} ({error})" for name, error in run.failed.items())
    return f"Could not score: {told}." if told else ""


def _skips(run: RunFacts) -> str:
    if not run.skipped:
        return "Every step updated the weights." if run.last_step else ""
    told = ", ".join(f"{count} × {reason}" for reason, count in run.skipped.items())
    return f"Steps that did not update the weights: {told}."


def _pace(run: RunFacts) -> str:
    padding = run.curves.get("padding", Curve()).values
    pad = f" Padding: {sum(padding) / len(padding):.1%} of the tokens." if padding else ""
    evals = f" Evaluations took {duration(run.eval_seconds)}." if run.eval_seconds else ""
    waiting = _waiting(run)
    return f"{waiting[0].upper()}{waiting[1:]}.{pad}{evals}" if waiting else ""


# ---------------------------------------------------------------------------------------------------------------------
# Data and ledger
# ---------------------------------------------------------------------------------------------------------------------


def _data_section(runs: Sequence[RunFacts], names: Sequence[str]) -> Section:
    made = []
    tokens = {n: r.data.tokens for n, r in zip(names, runs, strict=True) if r.data.tokens}
    pictures = {n: r.data.pictures for n, r in zip(names, runs, strict=True) if r.data.pictures}
    if tokens:
        made.append(charts.histogram("chart-tokens", "Tokens of a sample", _once(tokens), unit="tokens"))
    if pictures:
        note = "as the model sees them"
        made.append(charts.histogram("chart-sizes", "Size of a picture", _once(pictures), unit="megapixels", note=note))
    counts = {n: dict(r.data.pictures_per_sample) for n, r in zip(names, runs, strict=True)}
    per_sample = {n: {_digits(k): float(v) for k, v in c.items()} for n, c in counts.items() if any(c.values())}
    if per_sample:
        made.append(charts.bars("chart-pictures", "Pictures of a sample", _alike(per_sample), unit="pictures"))
    return Section("data", "Data", tuple(made))


def _digits(word: str) -> str:
    """A number of pictures; what else stands there is not drawn as it is."""
    return word if word.rstrip("+").isascii() and word.rstrip("+").isdigit() else "other"


def _once(found: Mapping[str, Histogram]) -> Mapping[str, Histogram]:
    """One entry where all are the same: runs on the same data need one picture of it."""
    first = next(iter(found.values()))
    return {next(iter(found)): first} if all(h == first for h in found.values()) else found


def _alike(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    first = next(iter(found.values()))
    return {next(iter(found)): first} if all(c == first for c in found.values()) else found


def _datasets(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Row]:
    rows = []
    for run, name in zip(runs, names, strict=True):
        for dataset, (train, held_out) in run.data.datasets.items():
            unused = sum(entry.dataset == dataset for entry in run.unused)
            head = dataset if len(runs) == 1 else f"{name}: {dataset}"
            rows.append(Row(head, (f"{train:,}", f"{held_out:,}", f"{unused:,}")))
    return rows


def _reasons(run: RunFacts) -> list[dict[str, Any]]:
    """The ledger by reason, the most frequent first, with some examples."""
    groups: dict[str, list[Any]] = {}
    for entry in run.unused:
        groups.setdefault(entry.reason, []).append(entry)
    found = [{"reason": r, "count": len(g), "examples": g[:_EXAMPLES]} for r, g in groups.items()]
    if not found:
        found = [{"reason": r, "count": n, "examples": []} for r, n in run.data.unused.items() if n]
    return sorted(found, key=lambda f: (-int(str(f["count"])), str(f["reason"])))


# ---------------------------------------------------------------------------------------------------------------------
# Gallery
# ---------------------------------------------------------------------------------------------------------------------


def _cards(runs: Sequence[RunFacts], names: Sequence[str]) -> tuple[list[tuple[str, str]], list[Card]]:
    """The kinds of boxes that are drawn (class, words), and the samples, those of the first run first."""
    samples: dict[tuple[str, str], list[Shown | None]] = {}
    for i, run in enumerate(runs):
        for shown in run.gallery:
            samples.setdefault((shown.dataset, shown.id), [None] * len(runs))[i] = shown
    each = max(1, _MOST_SHOWN // max(1, len({dataset for dataset, _ in samples})))
    taken: Counter[str] = Counter()
    cards: list[Card] = []
    for (dataset, _), found in samples.items():
        taken[dataset] += 1
        if taken[dataset] <= each and len(cards) < _MOST_SHOWN:
            cards.append(_card(found, runs, names))
    drawn = {mark.kind for card in cards for _, _, marks in card.pictures for mark in marks}
    kinds = [("reference", "Reference"), ("before", _before(runs)), *_afters(runs, names)]
    return [kind for kind in kinds if kind[0] in drawn], cards


def _before(runs: Sequence[RunFacts]) -> str:
    step = next((r.before_step for r in runs if r.before_step is not None), 0)
    return "Before training" if step == 0 else f"Step {step:,}"


def _afters(runs: Sequence[RunFacts], names: Sequence[str]) -> list[tuple[str, str]]:
    words = []
    for i, run in enumerate(runs):
        best = " (best)" if run.best and run.best.step == run.after_step else ""
        step = "" if run.after_step is None else f"step {run.after_step:,}{best}"
        words.append((f"after-{i % 8 + 1}", step.capitalize() if len(runs) == 1 else f"{names[i]}, {step}"))
    return words


def _card(found: Sequence[Shown | None], runs: Sequence[RunFacts], names: Sequence[str]) -> Card:
    at, shown = next((i, s) for i, s in enumerate(found) if s is not None)
    answers = [Answer("Reference", shown.reference, "reference", "Reference")]
    before = next((s.before for s in found if s is not None and s.before is not None), None)
    if before is not None:
        answers.append(_judged(Answer(_before(runs), before, "before", "Before"), shown.reference))
    for i, ((kind, who), one) in enumerate(zip(_afters(runs, names), found, strict=True)):
        if one is not None and one.after is not None:
            short = "After" if len(runs) == 1 else names[i]
            answers.append(_judged(Answer(who, one.after, kind, short, i), shown.reference))
    pictures, note = [], ""
    boxed = any(boxes.parse(a.text) for a in answers)
    for picture in shown.pictures:
        marks: tuple[Mark, ...] = ()
        if len(shown.pictures) == 1:
            marks = tuple(m for a in answers for m in _marks(a, picture, runs[at].boxes))
        elif boxed:
            note = "Boxes are not drawn: the answer does not say which picture they are on."
        pictures.append((jpeg_url(picture.jpeg), picture, marks))
    drawn = {mark.kind for _, _, marks in pictures for mark in marks}
    answers = [replace(a, boxed=a.kind in drawn) for a in answers]
    return Card(shown.dataset, shown.id, shown.question, tuple(pictures), tuple(answers), note)


def _judged(answer: Answer, reference: str) -> Answer:
    """An answer with what can be said of it without a metric: the same words, or how well its boxes lie."""
    wanted, given = boxes.parse(reference), boxes.parse(answer.text)
    if answer.text.split() == reference.split():
        return replace(answer, verdict="same as the reference", good=True)
    if wanted and given:
        overlap = sum(max(boxes.iou(w, g) for g in given) for w in wanted) / len(wanted)
        return replace(answer, verdict=f"IoU {overlap:.2f}", good=overlap >= 0.5)
    return replace(answer, verdict="no box" if wanted else "")


def _marks(answer: Answer, picture: Picture, convention: str) -> list[Mark]:
    """Boxes of an answer that have an area on this picture."""
    if convention not in boxes.CONVENTIONS:
        return []
    right, low = boxes.ends(convention, (picture.width, picture.height))
    across, down = picture.width / right, picture.height / low
    found = [b for b in boxes.parse(answer.text) if b.area]
    marks = []
    for box in found:
        x1, x2 = (min(max(v * across, 0), picture.width) for v in (box.x1, box.x2))
        y1, y2 = (min(max(v * down, 0), picture.height) for v in (box.y1, box.y2))
        name = f"{answer.short}: {box.label}" if box.label else answer.short
        left, top, bottom = 100 * x1 / picture.width, 100 * y1 / picture.height, 100 * y2 / picture.height
        name = name if len(found) <= _MOST_CHIPS else ""
        marks.append(Mark(answer.kind, x1, y1, x2 - x1, y2 - y1, left, top, bottom, name, answer.row))
    return marks


# ---------------------------------------------------------------------------------------------------------------------
# The run itself
# ---------------------------------------------------------------------------------------------------------------------


def _about(run: RunFacts, name: str, place: int) -> dict[str, Any]:
    """Strategy, model, versions, proof: everything that is known about how the run was started."""
    card, options = run.card, run.options
    command = [str(word) for word in card.get("command") or ()] if isinstance(card.get("command"), list) else []
    dtypes = [str(d).removeprefix("torch.") for d in card.get("dtypes") or () if isinstance(card.get("dtypes"), list)]
    versions = card["versions"] if isinstance(card.get("versions"), dict) else {}
    facts = {
        "Model": options.get("model_name_or_path"), "Strategy": card.get("strategy") or options.get("tuning_strategy"),
        "From": card.get("distribution"), "Device": card.get("device"), "Processes": card.get("world_size"),
        "Distributed": card.get("distributed_type"), "Samples of a step": card.get("global_batch"),
        "Mixed precision": card.get("mixed_precision"), "Dtypes of the weights": ", ".join(dtypes),
        "Seed": card.get("seed"), "Git commit": card.get("git_commit"), "Folder": str(run.root.resolve()),
    }  # fmt: skip
    planned = options.get("max_steps")
    progress = f"step {run.last_step:,}" + (f" of {planned:,}" if isinstance(planned, int) and planned > 0 else "")
    return {
        "name": name, "tone": place % 8 + 1, "dash": charts.DASHES[place % len(charts.DASHES)],
        "dtypes": ", ".join(dtypes),
        "packages": [(p, versions[p]) for p in ("vlft", "torch") if p in versions],
        "model": str(options.get("model_name_or_path") or ""), "strategy": str(facts["Strategy"] or ""),
        "device": str(card.get("device") or ""), "progress": progress, "result": run.result,
        "facts": [(k, str(v)) for k, v in facts.items() if v not in (None, "")],
        "versions": [(str(k), str(v)) for k, v in versions.items()],
        "proved": [(part, *(f"{n:,}" for n in facts)) for part, facts in run.proved.items()],
        "command": _by_option(command), "options": [(k, _option(v)) for k, v in options.items()],
    }  # fmt: skip


def _by_option(words: Sequence[str]) -> list[str]:
    """The command as a shell reads it, cut before each option, so that a line never breaks inside one."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    return [shlex.join(group) for group in groups]
