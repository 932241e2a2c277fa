"""Trials of a sweep in a SQLite file that several workers share. The only file with Optuna."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.build.locks import Lock
from jaxmed.build.sweep_space import Dimension
from jaxmed.evaluation.sweep_ranking import Trial
from jaxmed.training.faults import disk_fault
from jaxmed.types import UserError

try:
    import optuna
    import sqlalchemy
    from optuna.trial import TrialState
except ImportError as error:  # an extra
    raise UserError("sweep.py needs Optuna: make setup EXTRAS=sweeps") from error

SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("asha", "median", "none")
STUDY_FILE = "study.db"
MOST_COMBINATIONS = 1000
"""Of a space whose every combination is looked at."""
STARTUP = 10
"""Trials of TPE that are drawn at random, before there is enough to learn from."""
DRAWS = 100
"""Tries to draw settings that no trial has."""
PATIENCE = 60
"""Seconds that one worker waits until another has written to the study."""

StorageFault = optuna.exceptions.StorageInternalError
"""The study could not be read or written, which is no fault of a trial."""

_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


class Study:
    """What was tried, and what is to be tried next; to be closed, or used in a `with` statement.

    Args:
        folder: holds study.db and locks/.
        space: of the search.
        sampler: one of `SAMPLERS`.
        pruner: one of `PRUNERS`; `asha` needs `set_first_rung` before the first score.
        seed: of the sampler, together with the number of trials: one that goes on does not repeat.
    """

    def __init__(
        self,
        folder: Path,
        space: Sequence[Dimension],
        *,
        sampler: str = "tpe",
        pruner: str = "asha",
        seed: int = 0,
    ):
        self._space, self._sampler, self._seed = space, sampler, seed
        self._pruner, self._first_rung = pruner, 0
        self._locks = folder / "locks"
        self._locks.mkdir(parents=True, exist_ok=True)
        self._held: dict[int, Lock] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self._alone():
            self._storage = _open_storage(folder)
            self._study = optuna.create_study(
                storage=self._storage,
                study_name="sweep",
                load_if_exists=True,
                direction="maximize",
                pruner=_make_pruner(pruner, 1),
            )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While one process looks and decides, others wait."""
        lock = Lock(self._locks / "study")
        lock.take(wait=True)
        try:
            yield
        finally:
            lock.free()

    def untried(self) -> list[dict[str, Any]] | None:
        """The combinations that no trial has, in order; None of a space with too many to list."""
        if math.prod(dimension.count for dimension in self._space) > MOST_COMBINATIONS:
            return None
        keys = [dimension.key for dimension in self._space]
        every = itertools.product(*(dimension.grid() for dimension in self._space))
        settings = [dict(zip(keys, values, strict=True)) for values in every]
        tried = self._tried()
        return [params for params in settings if _comparable(params) not in tried]

    def _tried(self) -> set[Any]:
        return {_comparable(trial.params) for trial in self._study.get_trials(deepcopy=False)}

    def _draw(self, number: int) -> dict[str, Any] | None:
        """Settings that no trial has, for a new one; None where all have been tried.

        The same settings once more would say nothing, since all trials have the same seed.
        """
        left = self.untried()
        if left is not None and (not left or self._sampler == "grid"):
            return left[0] if left else None
        tried = self._tried()
        for draw in range(DRAWS):
            seed = int(np.random.SeedSequence((self._seed, number, draw)).generate_state(1)[0])
            # A sampler that sees one place only is left for one that looks everywhere.
            name = self._sampler if draw == 0 else "random"
            drafts = optuna.create_study(direction="maximize", sampler=_make_sampler(name, seed))
            drafts.add_trials(self._study.get_trials(deepcopy=False))
            found = dict(self._suggest(drafts.ask()).params)
            if _comparable(found) not in tried:
                return found
            if left is not None:
                return left[int(np.random.default_rng(seed).integers(len(left)))]
        return None

    def _begin(self, params: Mapping[str, Any]) -> int:
        """A trial of these settings, there with all of them or not at all; its number."""
        distributions = self._suggest(optuna.trial.FixedTrial(dict(params))).distributions
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING, params=dict(params), distributions=distributions
            )
        )
        return len(self._study.get_trials(deepcopy=False)) - 1

    def claim(self, *, trials: int, at_once: int = 1) -> list[int]:
        """Numbers of trials that this process is to work on; none where nothing is left.

        First come those whose worker was lost, which nobody holds a lock of any more.

        Args:
            trials: of the whole study, whoever works on it.
            at_once: how many to train together.
        """
        with self._alone():
            found = self._study.get_trials(deepcopy=False)
            for trial in found:
                if trial.state is not TrialState.RUNNING:
                    continue
                group = self.group(trial.number)
                if not self._hold(group[0]):
                    continue
                running = self.running(group)  # now that no other worker can end them any more
                if not running:
                    self.release(group[0])
                    continue
                return running
            numbers: list[int] = []
            for _ in range(min(at_once, trials - len(found))):
                params = self._draw(len(found) + len(numbers))
                if params is None:
                    break
                numbers.append(self._begin(params))
            if len(numbers) > 1:
                self.note(numbers[0], group=numbers)  # of all of them, in one go
            if numbers:
                self._hold(numbers[0])
            return numbers

    def _hold(self, number: int) -> bool:
        """Whether this process can have a trial, or has it."""
        lock = Lock(self._locks / str(number))
        if number in self._held or not lock.take():
            return False
        self._held[number] = lock
        return True

    def close(self) -> None:
        """Let go of the database and of all trials; may be called twice."""
        for number in list(self._held):
            self.release(number)
        self._storage.remove_session()
        self._storage.engine.dispose()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def release(self, number: int) -> None:
        """Let others take a trial up."""
        self._held.pop(number).free()

    def _trial(self, number: int) -> Any:
        # Of a trial that another process began, which Optuna has no other way to go on with.
        found = self._study.get_trials(deepcopy=False)[number]
        return optuna.trial.Trial(self._study, found._trial_id)

    def _suggest(self, trial: Any) -> Any:
        """Give a trial a value of each key; the trial."""
        for dimension in self._space:
            key, low, high = dimension.key, dimension.low, dimension.high
            if dimension.choices:
                trial.suggest_categorical(key, dimension.names)
            elif dimension.is_whole:
                step = int(dimension.step)
                trial.suggest_int(key, int(low), int(high), step=step, log=dimension.log)
            else:
                apart = dimension.step or None
                with warnings.catch_warnings():  # that the last step ends before the range does
                    warnings.simplefilter("ignore")
                    trial.suggest_float(key, low, high, step=apart, log=dimension.log)
        return trial

    def params(self, number: int) -> dict[str, Any]:
        """What a trial tries."""
        return dict(self._study.get_trials(deepcopy=False)[number].params)

    def note(self, number: int, **facts: Any) -> None:
        """Keep facts that JSON can hold about a trial; not about one that is over."""
        if not self.running([number]):
            return  # told by a worker that was lost before it came to the rest of its group
        trial = self._trial(number)
        for name, fact in facts.items():
            trial.set_user_attr(name, fact)

    def facts(self, number: int) -> dict[str, Any]:
        """All facts that were noted of a trial."""
        return dict(self._study.get_trials(deepcopy=False)[number].user_attrs)

    def group(self, number: int) -> list[int]:
        """The trials that were begun together, in order; mostly the trial alone."""
        for trial in self._study.get_trials(deepcopy=False):
            if number in (group := trial.user_attrs.get("group", ())):
                return list(group)
        return [number]

    def running(self, numbers: Sequence[int]) -> list[int]:
        """Those of some trials that are not over."""
        found = self._study.get_trials(deepcopy=False)
        return [n for n in numbers if found[n].state is TrialState.RUNNING]

    def set_first_rung(self, steps: int) -> None:
        """Say after how many steps `asha` first compares trials; of a study the first word counts.

        So that all workers, and all who go on with it, compare trials after the same steps.
        """
        if self._first_rung:
            return
        with self._alone():
            known = self._study.user_attrs.get("first_rung")
            if known is None:
                self._study.set_user_attr("first_rung", steps)
        self._first_rung = known or steps
        self._study.pruner = _make_pruner(self._pruner, self._first_rung)

    def report(self, number: int, step: int, score: float) -> bool:
        """Note a score under way; whether the pruner would end the trial there.

        A step that was reported before, by a worker that was lost, keeps its score.
        """
        found = self._study.get_trials(deepcopy=False)[number]
        if step in found.intermediate_values or found.state is not TrialState.RUNNING:
            return False
        trial = self._trial(number)
        trial.report(score, step)
        return bool(trial.should_prune())

    def finish(self, number: int, score: float) -> None:
        """The score of the trial's best checkpoint."""
        self._study.tell(number, score, skip_if_finished=True)

    def prune(self, number: int) -> None:
        """It ended early; its score is the last that was reported."""
        self._study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)

    def fail(self, number: int, message: str) -> None:
        """It has no score, and why."""
        self.note(number, message=message)
        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def trials(self) -> list[Trial]:
        """All that were begun."""
        return [_as_trial(trial) for trial in self._study.get_trials(deepcopy=False)]

    def importance(self) -> tuple[dict[str, float], int | None]:
        """The share of the scores' spread that each key explains, the largest first.

        Functional ANOVA over a random forest (Hutter et al., An Efficient Approach for Assessing
        Hyperparameter Importance, ICML 2014). Where trials were pruned it is of the scores at the
        last step that all came to: those that were not are alike, and would say that what they
        share had not mattered.

        Returns:
            The shares, none where fewer than four trials have scores or all are the same; and the
            step, None where it is of the final scores.
        """
        found = self._study.get_trials(deepcopy=False)
        done = [t for t in found if t.state is TrialState.COMPLETE]
        pruned = [t for t in found if t.state is TrialState.PRUNED and t.intermediate_values]
        step = min((max(t.intermediate_values) for t in pruned), default=None)
        scored = done
        if step is not None:
            scored = [t for t in (*done, *pruned) if step in t.intermediate_values]
        scores = [t.value if step is None else t.intermediate_values[step] for t in scored]
        if len(scored) < 4 or len(set(scores)) < 2:
            return {}, step
        own = optuna.create_study(direction="maximize")
        own.add_trials(
            optuna.trial.create_trial(params=t.params, distributions=t.distributions, value=score)
            for t, score in zip(scored, scores, strict=True)
        )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(own, evaluator=evaluator)
        return {key: float(share) for key, share in shares.items()}, step


def _open_storage(folder: Path) -> Any:
    """The study's database, made where there was no sweep.

    Raises:
        UserError: it is damaged, or gone though its trials are there.
    """
    path = folder / STUDY_FILE
    lost = not path.exists() or (path.is_file() and not path.stat().st_size)
    if lost and any((folder / name).exists() for name in ("trials", "together")):
        how = "empty" if path.exists() else "gone"
        raise UserError(
            f"{path}: is {how}, and trials of its sweep are there; restore it from a copy, or use "
            "another --output"
        )
    try:
        return optuna.storages.RDBStorage(
            f"sqlite:///{path.absolute()}", engine_kwargs={"connect_args": {"timeout": PATIENCE}}
        )
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        if disk_fault(error):
            raise
        said = " ".join(str(getattr(error, "orig", error)).split())
        raise UserError(
            f"{path}: cannot be opened ({said}); restore it from a copy, or use another --output"
        ) from error


def _make_sampler(name: str, seed: int) -> Any:
    if name == "tpe":  # which takes trials that are under way for bad ones
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def _comparable(params: Mapping[str, Any]) -> tuple[Any, ...]:
    """The same for settings that differ by the rounding of their steps alone."""
    rounded = {key: f"{v:.9g}" if isinstance(v, float) else v for key, v in params.items()}
    return tuple(sorted(rounded.items()))


def _make_pruner(name: str, first_rung: int) -> Any:
    if name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=first_rung, reduction_factor=2)
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_min_trials=2)
    return optuna.pruners.NopPruner()


def _as_trial(found: Any) -> Trial:
    curve = {int(step): float(score) for step, score in found.intermediate_values.items()}
    facts = found.user_attrs
    last = max(curve) if curve else None
    score = found.value if found.state is TrialState.COMPLETE else None
    if found.state is TrialState.PRUNED and last is not None:
        score = curve[last]
    return Trial(
        number=found.number,
        state=_STATES[found.state],
        params=dict(found.params),
        score=score,
        low=facts.get("low"),
        high=facts.get("high"),
        cases=facts.get("cases"),
        seeds=tuple(facts.get("seeds", ())),
        step=facts.get("step", last),
        message=facts.get("message", ""),
        workdir=facts.get("workdir", ""),
        curve=curve,
    )
