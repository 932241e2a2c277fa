"""A trained run, ready to predict."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxmed.build.checks import check_fits, check_numbers
from jaxmed.build.config import config_of_run, flatten, read_run
from jaxmed.build.experiment import Experiment
from jaxmed.build.members import read_members, setting_of_best
from jaxmed.build.workdir import has_checkpoints
from jaxmed.data.formats.common import as_supported
from jaxmed.data.sources.base import make_example
from jaxmed.inference.export import expand_arrays
from jaxmed.inference.predictor import Predictor, check_finite
from jaxmed.inference.standalone.contents import WEIGHTS, Contents, ModelError
from jaxmed.preprocessing.spatial import convertible
from jaxmed.training.checkpoints import restore_members, restore_variables
from jaxmed.training.state import evaluated_step
from jaxmed.types import DatasetInfo, UserError, count_of


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A trained network, ready to predict.

    Attributes:
        experiment: everything built from the run's config.
        variables: of the network; of models trained together with the models along the first axis.
        info: of the data that it was trained on.
        step: of the weights; of several models the latest.
        sha256: of the weights that predict.
        run: the content of config.json.
        chosen: places of the models that predict together: those of the setting with the best
            validation scores; empty where one model was trained.
        best: "score", "step" and "diverged" of each of the models, as in a `TrainState`; empty
            likewise.
    """

    experiment: Experiment
    variables: Any
    info: DatasetInfo
    step: int
    sha256: str
    run: dict[str, Any]
    chosen: tuple[int, ...] = ()
    best: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @cached_property
    def predict(self) -> Predictor:
        """Examples -> (example, prediction on its preprocessed grid)."""
        return self.predict_with(self.chosen)

    def predict_with(self, members: Sequence[int], *, uncertain: bool = False) -> Predictor:
        """The same by some of the models that were trained together.

        Args:
            members: their places; none where a single one was trained.
            uncertain: see `Experiment.predictor`.
        """
        own = take_members(self.variables, members) if members else self.variables
        return self.experiment.predictor(own, members=members, uncertain=uncertain)

    def predict_image(self, image: np.ndarray, *, spacing: np.ndarray | None = None) -> Any:
        """What the network makes of one image, on the image's own grid.

        Args:
            image: (*spatial, channels), as `jaxmed.data.images.read_image` gives it, or (*spatial).
                Other types become uint8, int16 or float32, the first that holds all their values.
            spacing: (ndim,) mm a voxel; needed where the run resamples (data.spacing).

        Returns:
            Probabilities (classes,); or a dict of boxes ([low..., high...] in the order of the
            array's axes), scores and labels; or a mask (*spatial).

        Raises:
            UserError: the image is not of the kind that the run takes, or its spacing is missing or
                none.
        """
        image, _ = as_supported(np.asarray(image), Path("image"))
        if spacing is None and (trained := tuple(self.experiment.config.data.spacing)):
            raise UserError(f"give spacing, in mm: the run resamples to {trained}")
        if image.ndim == self.info.ndim and (self.info.ndim == 2 or image.shape[-1] not in (3, 4)):
            image = image[..., None]
        if image.ndim != self.info.ndim + 1:
            raise UserError(
                f"image has shape {image.shape}; the network was trained on {self.info.ndim} "
                "spatial axes: give (*spatial, channels)"
            )
        sides = np.asarray(np.ones(self.info.ndim) if spacing is None else spacing)
        if sides.shape != (self.info.ndim,) or not ((sides > 0) & np.isfinite(sides)).all():
            raise UserError(
                f"spacing is {spacing}; expected {self.info.ndim} positive numbers of mm"
            )
        check_image(self, image, "image")
        example = self.experiment.prepare(make_example(image, index=0, spacing=spacing))
        [(example, raw)] = self.predict([example])
        return self.experiment.task.restore(check_finite(raw), example)


def load_run(workdir: str | Path, config: ConfigDict | None = None) -> TrainedRun:
    """The best checkpoint of a run.

    Args:
        workdir: of the run.
        config: the run's, perhaps with overrides; None reads it.
    """
    workdir = Path(workdir)
    run = read_run(workdir)
    info = dict(run["data"]["info"])
    info["class_names"] = tuple(info["class_names"])
    data_info = DatasetInfo(**info)
    config = config_of_run(run) if config is None else config
    check_numbers(config)
    check_fits(config, data_info)
    members = read_members(run)
    own = {key for member in members for key in member.changes}
    _check_same_network(workdir, run, config, own)
    experiment = Experiment(config, data_info, run["data"]["class_counts"], members)
    exported = _read_exported(workdir)
    if not members:
        variables, step = exported or restore_variables(workdir / "checkpoints")
        sha256 = parameters_sha256(variables["params"])
        return TrainedRun(experiment, variables, data_info, step, sha256, run)
    best = restore_members(workdir / "checkpoints") if exported is None else exported[0]
    if evaluated_step(best) < 0:
        raise UserError(
            f"{workdir}: its models were not evaluated yet; go on with training, which chooses "
            "their best weights"
        )
    variables = best.pop("variables")
    try:
        chosen = setting_of_best(members, best)
    except UserError as error:
        raise UserError(f"{workdir}: {error}") from error
    step = int(best["step"][chosen].max())
    sha256 = parameters_sha256(take_members(variables, chosen)["params"])
    return TrainedRun(experiment, variables, data_info, step, sha256, run, tuple(chosen), best)


def _read_exported(workdir: Path) -> tuple[dict[str, Any], int] | None:
    """What weights.safetensors holds: variables and their step, or the models' `best`.

    None where a run has checkpoints, or no such file.
    """
    if has_checkpoints(workdir) or not (workdir / WEIGHTS).is_file():
        return None
    try:
        arrays = Contents(workdir).weights()
        description = Contents(workdir).description()
    except ModelError as error:
        raise UserError(str(error)) from error
    step = int(description["step"])
    best = {name: arrays.pop(name) for name in list(arrays) if name.startswith("best/")}
    variables = jax.tree.map(np.asarray, expand_arrays(arrays))
    if not best:
        return variables, step
    named = {name.removeprefix("best/"): value for name, value in best.items()}
    return {"variables": variables, **named}, step


def is_of_run(path: Path, sha256: str, run: TrainedRun) -> bool:
    """Whether what was fixed on `val` and kept in a file is of the run's weights; told if not."""
    if sha256 == run.sha256:
        return True
    print(f"note: {path} is of other weights and not used; make it with evaluate.py --split=val")
    return False


def tell_diverged(run: TrainedRun) -> list[str]:
    """A sentence for each model that diverged."""
    told = []
    for place, member in enumerate(run.experiment.members):
        step, kept = int(run.best["diverged"][place]), int(run.best["step"][place])
        if step:
            left = f"its weights of step {kept} are used" if kept else "it has no weights to use"
            told.append(f"{member.name} had diverged by step {step}; {left}")
    return told


def take_members(variables: Any, members: Sequence[int]) -> Any:
    """The variables of some models, along the first axis; of a single one without that axis."""
    places = members[0] if len(members) == 1 else np.asarray(members)
    return jax.tree.map(lambda x: x[places], variables)


def _check_same_network(
    workdir: Path, run: dict[str, Any], config: ConfigDict, own: Collection[str]
) -> None:
    """Refuse overrides that the trained weights do not fit, or of what models have of their own."""
    trained, now = flatten(run["config"]), flatten(config)
    keys = [k for k in now if k.startswith("model.") or k == "data.channels"]
    for key in own:
        if trained[key] != now[key]:
            raise UserError(f"{key} is {now[key]!r}; each model in {workdir} has its own value")
    for key in keys:
        before = trained.get(key, now[key])
        if key not in ("model.init", "model.dtype", "model.remat") and before != now[key]:
            raise UserError(
                f"{key} is {now[key]!r}; the network in {workdir} was trained with {before!r} and "
                "cannot be changed"
            )


def check_image(run: TrainedRun, image: np.ndarray, where: str) -> None:
    """Refuse an image whose numbers cannot mean what those of the training images did.

    One value that is not finite would spread over all the network sees of the image.

    Colours are not made gray unless the run was told to (data.channels). Grays saved as colours,
    as viewers do, are gray.

    Where all images are scaled by the training set's own mean and deviation, deeper pixels than
    the network ever saw would saturate it, and 8-bit ones be all alike to it, without a word.

    Raises:
        UserError: naming the image.
    """
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise UserError(f"{where}: holds NaN or infinite values; repair it or leave it out")
    several = image.shape[-1] > 1 and (image[..., :1] != image[..., 1:3]).any()
    if several and run.info.channels == 1 and "data.channels" in run.run["planned"]:
        found = "is coloured" if image.ndim == 3 else f"has {image.shape[-1]} channels"
        raise UserError(
            f"{where}: {found}; the run was trained on gray images: convert the image, or "
            "train with --config.data.channels=1, which makes all images gray"
        )
    found, wanted = image.shape[-1], run.info.channels
    if not convertible(found, wanted, ndim=image.ndim - 1):
        raise UserError(
            f"{where}: has {count_of(found, 'channel')}; the run was trained on {wanted}: give the "
            "same ones in one file"
        )
    trained = run.run["data"]["dtypes"]
    if run.experiment.config.data.normalization != "dataset":
        return
    deeper = trained == ["uint8"] and image.dtype != np.uint8
    if deeper or (image.dtype == np.uint8 and "uint8" not in trained):
        raise UserError(
            f"{where}: its values are {image.dtype}, {image.min():g} to {image.max():g}; the run "
            f"was trained on {', '.join(trained)} and scales by that set's mean: convert the "
            "image, or train with --config.data.normalization=zscore"
        )


def parameters_sha256(params: Any) -> str:
    """A digest of all parameters, in the order of their names."""
    content = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        content.update(jax.tree_util.keystr(path).encode())
        content.update(np.ascontiguousarray(leaf).tobytes())
    return content.hexdigest()
