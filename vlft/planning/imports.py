"""The libraries that a plan needs, without what they load in vain: nearly all of the time of a plan goes into imports.

What is left out here can be neither left out nor made lazy by the libraries' own switches. It is put back where it was
as soon as the one import is done. Where the libraries are loaded already, nothing happens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SCAN = "create_import_structure_from_path"


def import_libraries() -> None:
    """PyTorch, and of transformers what every model needs: under a second less than as they come."""
    if "transformers.modeling_utils" in sys.modules:
        return
    from transformers import utils

    # For the names of its models, transformers reads their thousand files; and once more for the package of models,
    # because its cache has 128 places. The package's file stands for its folder, whose names came last into the cache.
    scan = getattr(utils.import_utils, _SCAN, None)
    with _in_place_of(utils.import_utils, _SCAN, lambda path: scan and scan(_folder(path))):
        import transformers.models
    # The losses of object detection match boxes with SciPy, which is half a second; no plan computes a loss.
    with _in_place_of(utils, "is_scipy_available", lambda: False):
        import transformers.loss.loss_utils  # noqa: F401


def _folder(path: Any) -> Any:
    """The key under which transformers' cache has it: a `Path`, where the package asks with its file's name."""
    return Path(path).parent if str(path).endswith("__init__.py") else path


@contextmanager
def _in_place_of(module: Any, name: str, other: Any) -> Iterator[None]:
    """`other` under a name of a module; nothing where another version of it has no such name."""
    if (before := getattr(module, name, None)) is None:
        yield
        return
    setattr(module, name, other)
    try:
        yield
    finally:
        setattr(module, name, before)
