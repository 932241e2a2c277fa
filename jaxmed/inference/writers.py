"""Write predictions for image files: tables, boxes and masks, in the files' own geometry."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.data.images import Image, write_mask, write_mask_rows
from jaxmed.training.processes import gather_json, is_first
from jaxmed.types import count_of


class FileTable:
    """A CSV with a line a file.

    Args:
        path: to write to.
    """

    def __init__(self, path: Path):
        self.path = path
        self._rows: dict[int, dict[str, str]] = {}

    def add(self, index: int, name: str, values: Mapping[str, str]) -> None:
        """Note more columns of one file, the index-th of all."""
        self._rows.setdefault(index, {"file": name}).update(values)

    def close(self) -> None:
        """Write what all processes noted; of nothing, nothing."""
        rows = dict(sorted((i, row) for i, row in gather_json(list(self._rows.items()))))
        if not rows or not is_first():
            return
        _note_replaced(self.path)
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows.values())


OTHER_COLUMNS = {
    *("file", "prediction", "decision", "calibrated", "set", "distance", "unfamiliar"),
    *("entropy", "mutual_information"),
}
"""Of predictions.csv, beside the classes."""


class ProbabilityWriter:
    """predictions.csv: one line a file with the predicted class and one probability a class.

    Args:
        table: predictions.csv.
        class_names: columns; one that another column is called has "probability of" before it.
        multilabel: whether several classes may hold at once; they are then joined by "+".
        decide: probabilities (cases, classes) -> what a `Decided` of `jaxmed.evaluation.decisions`
            has. It adds the columns `decision`, its probability as `calibrated`, and `set`, the
            classes of the conformal set; of several labels at once `decision`, joined likewise,
            and `calibrated/CLASS` for each.
    """

    def __init__(
        self,
        table: FileTable,
        class_names: Sequence[str],
        *,
        multilabel: bool,
        decide: Callable[[np.ndarray], Any] | None = None,
    ):
        self._table = table
        self._names = class_names
        self._multilabel = multilabel
        self._decide = decide

    def add(self, index: int, name: str, image: Image, probabilities: np.ndarray) -> str:
        """Note one file, the index-th of all; returns what to say of it."""
        if self._multilabel:
            prediction = self._join(np.asarray(probabilities) > 0.5)
        else:
            prediction = self._names[int(probabilities.argmax())]
        row = {"prediction": prediction}
        for own, probability in zip(self._names, probabilities, strict=True):
            column = f"probability of {own}" if own in OTHER_COLUMNS else own
            row[column] = f"{probability:.6f}"
        if self._decide is not None:
            row |= self._decided_cells(self._decide(np.asarray(probabilities)[None]))
        self._table.add(index, name, row)
        told = f"{prediction or 'none'} ({probabilities.max():.3f})"
        other = row.get("decision", prediction) != prediction
        return f"{told}, decided {row['decision'] or 'none'}" if other else told

    def _decided_cells(self, decided: Any) -> dict[str, str]:
        """Of one case."""
        if self._multilabel:
            pairs = zip(self._names, decided.probabilities[0], strict=True)
            calibrated = {f"calibrated/{name}": f"{p:.6f}" for name, p in pairs}
            return {"decision": self._join(decided.predicted[0]), **calibrated}
        chosen = int(decided.predicted[0])
        return {
            "decision": self._names[chosen],
            "calibrated": f"{decided.probabilities[0, chosen]:.6f}",
            "set": self._join(decided.sets[0]),
        }

    def _join(self, holds: np.ndarray) -> str:
        return "+".join(n for n, on in zip(self._names, holds, strict=True) if on)

    def close(self) -> Path:
        """The table is written by who made it, for it may hold more."""
        return self._table.path


def _note_replaced(path: Path) -> None:
    if path.exists():
        print(f"note: {path} of an earlier prediction is replaced")


class BoxWriter:
    """detections.json: COCO results, a list of boxes with the name of their file.

    `bbox` is [x, y, width, height] of a picture, whose array axes are (y, x); of a volume it is
    [x, y, z, width, height, depth] along the axes of its RAS array, in voxels.

    Args:
        folder: to write to.
        class_names: kinds of object.
        score_threshold: of the boxes that are counted for the reader; all are written.
        probability: scores -> the share of boxes scored so that find an object, where it is known.
    """

    def __init__(
        self,
        folder: Path,
        class_names: Sequence[str],
        *,
        score_threshold: float = 0.3,
        probability: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self._probability = probability
        self._path = folder / "detections.json"
        self._names = class_names
        self._threshold = score_threshold
        self._boxes: list[dict[str, Any]] = []

    def add(self, index: int, name: str, image: Image, prediction: dict[str, np.ndarray]) -> str:
        """Note the boxes of one file, the index-th of all; returns what to say of it."""
        low, high = np.split(prediction["boxes"], 2, axis=-1)
        order = slice(None, None, -1) if low.shape[-1] == 2 else slice(None)
        corners = np.concatenate([low[:, order], (high - low)[:, order]], axis=-1)
        scores, labels = prediction["scores"], prediction["labels"]
        for box, score, label in zip(corners.tolist(), scores.tolist(), labels, strict=True):
            self._boxes.append(
                {
                    "file_name": name,
                    "image_id": index + 1,
                    "category_id": int(label) + 1,
                    "category": self._names[int(label)],
                    "bbox": [round(v, 3) for v in box],
                    "score": round(score, 6),
                }
            )
        if self._probability is not None and len(scores):
            own = self._boxes[-len(scores) :]
            for noted, right in zip(own, self._probability(scores).tolist(), strict=True):
                noted["probability"] = round(right, 6)
        sure = int((prediction["scores"] >= self._threshold).sum())
        return f"{count_of(sure, 'object')} scored {self._threshold:.3g} or more"

    def close(self) -> Path:
        """Write the file, of what all processes predicted."""
        boxes = sorted(gather_json(self._boxes), key=lambda box: box["image_id"])
        if is_first():
            _note_replaced(self._path)
            self._path.write_text(json.dumps(boxes, indent=1) + "\n", encoding="utf-8")
        return self._path


class MaskWriter:
    """One mask a file, with the file's name, in its own format and geometry."""

    def __init__(self, folder: Path, class_names: Sequence[str], *, instances: bool):
        self._folder = folder
        self._names = class_names
        self._instances = instances

    def add(self, index: int, name: str, image: Image, mask: np.ndarray) -> str:
        """Write the mask of one file; returns what to say of it."""
        del index
        counts = self._count(mask)
        written = write_mask(self._folder / name, mask, image, names=self._stored_names)
        return f"{self._tell(counts, mask.size)} -> {written}"

    def add_rows(
        self, name: str, image: Image, rows: Iterable[np.ndarray], *, shape: Sequence[int]
    ) -> str:
        """Write the mask of one large file as its rows come; returns what to say of it.

        Args:
            name: of the file.
            image: a region of it, for the format and geometry.
            rows: (rows, columns) of the mask, in order.
            shape: (rows, columns) of the whole.
        """
        counts = np.zeros((), np.int64)

        def counted() -> Iterator[np.ndarray]:
            nonlocal counts
            for part in rows:
                own = self._count(part)
                counts = np.asarray(np.maximum(counts, own) if self._instances else counts + own)
                yield part

        few = np.uint8 if len(self._names) <= 256 else np.uint16
        written = write_mask_rows(
            self._folder / name,
            counted(),
            image,
            shape=shape,
            dtype=np.uint32 if self._instances else few,
            names=self._stored_names,
        )
        return f"{self._tell(counts, shape[0] * shape[1])} -> {written}"

    @property
    def _stored_names(self) -> Sequence[str]:
        """Numbers of instances have no names."""
        return () if self._instances else self._names

    def _count(self, mask: np.ndarray) -> np.ndarray:
        """Voxels of each class; of instances the highest number."""
        if self._instances:
            return np.asarray(mask.max(initial=0))
        return np.bincount(mask.ravel(), minlength=len(self._names))

    def _tell(self, counts: np.ndarray, voxels: int) -> str:
        if self._instances:
            return count_of(int(counts), "instance")
        shares = counts[1:] / voxels
        return ", ".join(f"{n} {s:.1%}" for n, s in zip(self._names[1:], shares, strict=True))

    def close(self) -> Path:
        """Nothing is left to write."""
        return self._folder
