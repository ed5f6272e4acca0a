"""How well boxes written in an answer cover those of the reference: IoU, precision, recall."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from vlft.boxes import Box, iou, parse
from vlft.metrics import Prediction, library, share

_optimize = library("scipy.optimize", "box_iou")

HIT = 0.5
"""A matched pair with this IoU counts for precision and recall."""


def _overlap(made: Box, wanted: Box) -> float:
    """IoU; 1 for the very same corners, even without area; 0 for different labels, where both have one."""
    labels = [" ".join(box.label.casefold().split()) for box in (made, wanted)]
    if all(labels) and labels[0] != labels[1]:
        return 0.0
    return 1.0 if made[:4] == wanted[:4] else iou(made, wanted)


def match(made: Sequence[Box], wanted: Sequence[Box]) -> list[float]:
    """IoU of each pair of the one-to-one matching with the largest sum (Kuhn 1955, by scipy); pairs apart left out."""
    if not made or not wanted:
        return []
    table = [[_overlap(one, other) for other in wanted] for one in made]
    rows, columns = _optimize.linear_sum_assignment(table, maximize=True)
    pairs = [table[i][j] for i, j in zip(rows.tolist(), columns.tolist(), strict=True)]
    return [overlap for overlap in pairs if overlap > 0]


def evaluate(predictions: Sequence[Prediction]) -> dict[str, float]:
    """`iou`, `precision`, `recall` over the boxes of all records, and `with_boxes`; each in 0..1.

    `iou` is the mean over the references' boxes, one without a partner counts 0; precision and recall count pairs of
    IoU 0.5 (Everingham et al. 2010, PASCAL VOC). Where every answer is one box, recall is the usual Acc@0.5. Prediction
    and reference use the same units, so no picture's size is needed. Boxes match across labels only if one has none.
    `with_boxes` is the share of records whose reference holds a box; where it is 0, so is all the rest.
    """
    if not predictions:
        return {}
    pairs = [(parse(p.prediction), parse(p.reference)) for p in predictions]
    made, wanted = sum(len(m) for m, _ in pairs), sum(len(w) for _, w in pairs)
    found = [overlap for m, w in pairs for overlap in match(m, w)]
    hits = sum(overlap >= HIT for overlap in found)
    return {
        "iou": share(fsum(found), wanted),
        "precision": share(hits, made),
        "recall": share(hits, wanted),
        "with_boxes": share(sum(bool(w) for _, w in pairs), len(pairs)),
    }
