"""The evaluations during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optax

from jaxmed.build.experiment import Experiment
from jaxmed.build.members import rows_of
from jaxmed.data.cache import Cached
from jaxmed.evaluation.evaluate import plain_scores, predict_cases, score_cases
from jaxmed.training.processes import gather_rows, share_of
from jaxmed.training.sharding import Lifted
from jaxmed.training.state import TrainState
from jaxmed.types import NotFiniteError, Source


class Validation:
    """Scores of the validation part during training, of each model on its own."""

    def __init__(
        self,
        experiment: Experiment,
        lifted: Lifted,
        source: Source,
        split: Mapping[str, Sequence[int]],
    ):
        self._experiment, self._lifted = experiment, lifted
        self._split = split
        # Every evaluation, and each of several models, looks at the same cases.
        room = int(experiment.config.data.cache_gb * 2**30) // 8
        self._source = Cached(source, max_bytes=room)
        self._ready = Cached(self._source, max_bytes=room, transform=experiment.prepare)

    def __call__(self, state: TrainState) -> Any:
        """Scores by name, or of models trained together a list of them, None for a diverged one."""
        members = self._experiment.members
        if not members:
            return self._score(self._lifted.variables_of(state), ())
        return [
            self._score(self._lifted.variables_of(state, place), (place,))
            for place in range(len(members))
        ]

    def _score(self, variables: Any, places: Sequence[int]) -> dict[str, float | None] | None:
        """Scores of one model; None where it has diverged, and others are trained with it.

        Raises:
            NotFiniteError: it has diverged, and is trained alone.
        """
        if places and not np.isfinite(float(optax.tree.norm(variables))):
            return None
        try:
            return self._scored(variables, places)
        except NotFiniteError:
            if not places:
                raise
            return None

    def _scored(self, variables: Any, places: Sequence[int]) -> dict[str, float | None]:
        experiment, task = self._experiment, self._experiment.quick_task
        fold = experiment.members[places[0]].fold if places else None
        cases = predict_cases(
            experiment.predictor(variables, members=places),
            task,
            self._source,
            share_of(rows_of(self._split, "val", fold)),
            prepare=lambda example: self._ready[int(example["index"])],
        )
        return plain_scores(task, gather_rows(score_cases(cases, task)))
