"""Plugins: found by their metadata, imported only when asked for by name.

`find` reads entry points and imports nothing, so a broken plugin that nobody asked for costs nothing (practice seen in
PyCQA/flake8, src/flake8/plugins/finder.py). `load_strategy` imports one class and checks that it keeps the contract of
`vlft.strategy`. Every message names the distribution and its version: that is what the user can upgrade or remove.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from vlft.config import RunConfig
from vlft.errors import StrategyError
from vlft.rivals import nearest
from vlft.strategy import Strategy, StrategyConfig

STRATEGIES = "vlft.strategies"
METRICS = "vlft.metrics"


@dataclass(frozen=True)
class Found:
    """One entry point, not imported yet."""

    name: str
    value: str
    """`module:attribute`."""
    distribution: str
    version: str
    others: tuple[Found, ...] = ()
    """The same name claimed by other distributions: using it is refused, because either could be meant."""

    @property
    def source(self) -> str:
        return f"{self.distribution} {self.version}"


def find(group: str) -> dict[str, Found]:
    """Every plugin of a group by name, in alphabetical order, without importing any.

    A distribution that is listed twice on `sys.path` (an editable install beside its build) counts once: the first
    one is the one that `import` would find.
    """
    claims: dict[str, list[Found]] = {}
    for entry in entry_points(group=group):
        found = Found(entry.name, entry.value, *_distribution(entry))
        rivals = claims.setdefault(entry.name, [])
        if not any(_same_project(found, other) for other in rivals):
            rivals.append(found)
    return {
        name: Found(first.name, first.value, first.distribution, first.version, tuple(others))
        for name, (first, *others) in sorted(claims.items())
    }


def load_strategy(name: str) -> tuple[type[Strategy], Found]:
    """Import the strategy called `name` and check that it keeps the contract.

    Raises:
        StrategyError: unknown (with the nearest name), claimed twice, cannot be imported (the cause is kept as
            `__cause__`), or not a strategy.
    """
    found = _named(STRATEGIES, name, "tuning strategy")
    cls = _import(found, "strategy")
    if problem := broken_promise(cls):
        raise StrategyError(f"Strategy '{name}' of {found.source} ({found.value}) {problem}; ask its author for a fix.")
    return cast("type[Strategy]", cls), found


def load_metric(name: str) -> tuple[Callable[..., dict[str, float]], Found]:
    """Import the evaluation script that is installed under `name`.

    Raises:
        StrategyError: as in `load_strategy`.
    """
    found = _named(METRICS, name, "evaluation script")
    function = _import(found, "evaluation script")
    if not callable(function):
        raise StrategyError(
            f"Evaluation script '{name}' of {found.source} ({found.value}) is not a function; ask its author for a fix."
        )
    return cast("Callable[..., dict[str, float]]", function), found


@dataclass(frozen=True)
class Health:
    """One line of `vlft plugins`."""

    group: str
    found: Found
    state: str
    """ok, broken or conflict."""
    detail: str


def inspect() -> list[Health]:
    """Import every plugin, one by one, and say how each fares: one that fails hides no other."""
    report: list[Health] = []
    for group, load in ((STRATEGIES, load_strategy), (METRICS, load_metric)):
        for name, found in find(group).items():
            try:
                loaded, _ = load(name)
            except StrategyError as error:
                state = "conflict" if found.others else "broken"
                report.append(Health(group, found, state, str(error)))
            else:
                report.append(Health(group, found, "ok", (loaded.__doc__ or "").strip().split("\n")[0]))
    return report


def _distribution(entry: EntryPoint) -> tuple[str, str]:
    """Name and version. A dist-info with broken METADATA has neither, and must not take the others down."""
    try:
        assert entry.dist is not None
        name, version = entry.dist.name, entry.dist.version
    except Exception:
        name = version = ""
    return name or "an unnamed distribution", version or "?"


def _same_project(one: Found, other: Found) -> bool:
    def normal(name: str) -> str:
        return name.lower().replace("_", "-").replace(".", "-")

    return normal(one.distribution) == normal(other.distribution)


def _named(group: str, name: str, what: str) -> Found:
    plugins = find(group)
    if name not in plugins:
        raise StrategyError(f"There is no {what} '{name}'{nearest(name, plugins)}; installed: {', '.join(plugins)}.")
    found = plugins[name]
    if found.others:
        claims = " and ".join(f"{one.source} ({one.value})" for one in (found, *found.others))
        raise StrategyError(f"The {what} '{name}' is claimed by {claims}; uninstall all but one of them.")
    return found


def _import(found: Found, what: str) -> Any:
    try:
        return EntryPoint(found.name, found.value, group="").load()
    except StrategyError:  # the plugin says itself what is missing and how to install it
        raise
    # SystemExit too: a script that calls sys.exit() when imported would end vlft without a word.
    except (Exception, SystemExit) as error:
        raise StrategyError(
            f"The {what} '{found.name}' of {found.source} ({found.value}) cannot be imported: "
            f"{type(error).__name__}: {error}; reinstall or update {found.distribution}."
        ) from error


def broken_promise(cls: Any) -> str:
    """What `cls` lacks of the `Strategy` protocol, as the end of a sentence; empty when it is fine."""
    if not isinstance(cls, type):
        return f"is no class but {type(cls).__name__}"
    config = getattr(cls, "Config", None)
    if not (isinstance(config, type) and issubclass(config, StrategyConfig)):
        return "has no 'Config' that derives from vlft.StrategyConfig"
    missing = [name for name in ("prepare_model", "param_groups") if not callable(getattr(cls, name, None))]
    if missing:
        return f"lacks {' and '.join(f'{name}()' for name in missing)}"
    if config.rates is StrategyConfig.rates:
        return "does not say which parts it trains: its Config must override rates()"
    # A second --seed would be read by two owners; whoever wins, the other is ignored in silence.
    clash = sorted(config.model_fields.keys() & RunConfig.model_fields.keys())
    if clash:
        return f"redefines core options ({', '.join(clash)})"
    return ""
