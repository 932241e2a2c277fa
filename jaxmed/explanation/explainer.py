"""All methods of attribution for one network, each compiled once for a shape of image."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage

from jaxmed.explanation import attribution, faithfulness, importance
from jaxmed.explanation.grad_cam import grad_cam, grad_cam_plus, hires_cam
from jaxmed.explanation.layers import Layer, apply_and_add
from jaxmed.explanation.targets import Target, What

Facts = dict[str, jax.Array]

METHODS = {
    "gradcam": "Grad-CAM",
    "gradcam++": "Grad-CAM++",
    "hirescam": "HiResCAM",
    "integrated_gradients": "integrated gradients",
    "smoothgrad": "SmoothGrad",
    "gradient": "gradient",
    "occlusion": "occlusion",
    "shapley": "Shapley values of superpixels",
}
"""Of attribution, with their names in words."""

OCCLUDED = {2: (8, 0.5), 3: (4, 0.75)}
"""Patches of occlusion a side, by dimensions, and how far the next is, in patches: 225 and 125 in
all. Of volumes half a patch would be 343."""

REGIONS = 32
"""Superpixels of an image, about; the program has room for half as many more."""


class Explainer:
    """Maps of what counts for a target, and their checks.

    Weights, image, baseline and target are arguments of compiled functions, so that another case,
    another class or random weights need no new compilation.

    Args:
        model: the network.
        target: see `jaxmed.explanation.targets`.
        layer: of Grad-CAM.
        batch_size: images that the network sees at a time.
    """

    def __init__(self, model: nn.Module, target: Target, *, layer: Layer, batch_size: int = 8):
        self.model = model
        self.target = target
        self.layer = layer
        self.batch_size = batch_size
        self._methods: dict[str, Callable[..., tuple[jax.Array, Facts]]] = {
            "gradcam": functools.partial(self._cam, grad_cam),
            "gradcam++": functools.partial(self._cam, grad_cam_plus),
            "hirescam": functools.partial(self._cam, hires_cam),
            "integrated_gradients": self._integrated,
            "smoothgrad": self._smooth,
            "gradient": self._gradient,
            "occlusion": self._occlusion,
            "shapley": self._shapley,
        }
        self._run = jax.jit(self._map, static_argnames="method")
        self._outputs = jax.jit(lambda v, image: self._apply(v, image))
        self._score = jax.jit(self.score)
        self._curves = jax.jit(self._deletion)
        self._channels = jax.jit(self._channel_values)

    def outputs(self, variables: Any, image: np.ndarray) -> Any:
        """Outputs of the network for one image, without a batch axis."""
        return jax.device_get(self._outputs(variables, image))

    def score(self, variables: Any, image: jax.Array, what: What) -> jax.Array:
        """Log-odds of the target for one image (*spatial, channels)."""
        return self.target(self._apply(variables, image), what)

    def probability(self, variables: Any, image: np.ndarray, what: What) -> float:
        """The same as a probability."""
        return float(jax.nn.sigmoid(self._score(variables, image, what)))

    def attribute(
        self, method: str, variables: Any, image: np.ndarray, baseline: np.ndarray, what: What
    ) -> tuple[np.ndarray, dict[str, float]]:
        """The map (*spatial) of a method, a key of `METHODS`, and what it tells of itself.

        Gradients are given by their size, all else with its sign: what is positive speaks for the
        target.
        """
        players = np.zeros(image.shape, np.int32)
        if method == "shapley":
            players = importance.region_players(image, regions=REGIONS)
            players = np.minimum(players, _room() - 1)
        found, facts = self._run(variables, image, baseline, what, players, method=method)
        return np.asarray(found), {key: float(value) for key, value in facts.items()}

    def curves(
        self,
        variables: Any,
        image: np.ndarray,
        baseline: np.ndarray,
        what: What,
        ranks: np.ndarray,
    ) -> np.ndarray:
        """Probabilities while the image turns into the baseline, (rankings, points)."""
        return jax.device_get(self._curves(variables, image, baseline, what, ranks))

    def channels(
        self, variables: Any, image: np.ndarray, baseline: np.ndarray, what: What
    ) -> np.ndarray:
        """Shapley values of the channels (channels,)."""
        return np.asarray(self._channels(variables, image, baseline, what))

    def _channel_values(
        self, variables: Any, image: jax.Array, baseline: jax.Array, what: What
    ) -> jax.Array:
        return importance.shapley_values(
            self._scorer(variables, what),
            image,
            baseline,
            jnp.asarray(importance.channel_players(image.shape)),
            jax.random.key(0),
            count=image.shape[-1],
            permutations=8,
            batch_size=self.batch_size,
        )

    def _apply(self, variables: Any, image: jax.Array) -> Any:
        return _first(self.model.apply(variables, image[None], train=False))

    def _map(
        self,
        variables: Any,
        image: jax.Array,
        baseline: jax.Array,
        what: What,
        players: jax.Array,
        *,
        method: str,
    ) -> tuple[jax.Array, Facts]:
        given = {"image": image, "baseline": baseline, "what": what, "players": players}
        return self._methods[method](variables, **given)

    def _scorer(self, variables: Any, what: What) -> attribution.Score:
        return lambda image: self.score(variables, image, what)

    def _gradient(self, variables: Any, *, image: Any, what: Any, **_: Any) -> Any:
        return jnp.abs(attribution.gradient(self._scorer(variables, what), image)).sum(-1), {}

    def _smooth(self, variables: Any, *, image: Any, what: Any, **_: Any) -> Any:
        found = attribution.smooth_gradient(
            self._scorer(variables, what), image, jax.random.key(0), batch_size=self.batch_size
        )
        return jnp.abs(found).sum(-1), {}

    def _integrated(self, variables: Any, *, image: Any, baseline: Any, what: Any, **_: Any) -> Any:
        found, facts = attribution.integrated_gradients(
            self._scorer(variables, what), image, baseline, batch_size=self.batch_size
        )
        return found.sum(-1), facts

    def _occlusion(self, variables: Any, *, image: Any, baseline: Any, what: Any, **_: Any) -> Any:
        sides = image.shape[:-1]
        patches, step = OCCLUDED[len(sides)]
        patch = [max(1, round(side / patches)) for side in sides]
        found = attribution.occlusion(
            self._scorer(variables, what),
            image,
            baseline,
            patch=patch,
            stride=[max(1, round(side * step)) for side in patch],
            batch_size=2 * self.batch_size,
        )
        return found, {}

    def _shapley(
        self, variables: Any, *, image: Any, baseline: Any, what: Any, players: Any
    ) -> Any:
        values = importance.shapley_values(
            self._scorer(variables, what),
            image,
            baseline,
            players,
            jax.random.key(0),
            count=_room(),
            permutations=8,
            batch_size=2 * self.batch_size,
        )
        return values[players[..., 0]], {}

    def _cam(
        self, cam: Callable[..., jax.Array], variables: Any, *, image: Any, what: Any, **_: Any
    ) -> Any:
        def score(added: jax.Array) -> tuple[jax.Array, jax.Array]:
            outputs, features = apply_and_add(
                self.model, variables, image[None], self.layer.name, added
            )
            return self.target(_first(outputs), what), features

        layer = ((1, *self.layer.shape[1:]), self.layer.dtype)
        return cam(score, layer, shape=image.shape[:-1]), {}

    def _deletion(
        self, variables: Any, image: jax.Array, baseline: jax.Array, what: What, ranks: jax.Array
    ) -> Any:
        score = self._scorer(variables, what)
        return faithfulness.deletion_curves(
            lambda x: jax.nn.sigmoid(score(x)), image, baseline, ranks, batch_size=self.batch_size
        )


def _first(outputs: Any) -> Any:
    """Outputs of the first image; those of a detector also hold the cells, which all share."""
    if not isinstance(outputs, dict):
        return outputs[0]
    return {key: outputs[key][0] for key in ("logits", "boxes")}


def _room() -> int:
    return REGIONS * 3 // 2


def dark_baseline(image: np.ndarray) -> np.ndarray:
    """The least value of each channel everywhere: air or black, as padding has it."""
    return np.broadcast_to(image.min(tuple(range(image.ndim - 1))), image.shape).copy()


def blurred_baseline(image: np.ndarray) -> np.ndarray:
    """The image without its details: a Gaussian blur of a tenth of each side."""
    spread = [side / 10 for side in image.shape[:-1]]
    blurred = scipy.ndimage.gaussian_filter(image, [*spread, 0], mode="nearest")
    return blurred.astype(image.dtype)


BASELINES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "blurred": blurred_baseline,
    "dark": dark_baseline,
}


def random_areas(
    explainer: Explainer, variables: Any, image: np.ndarray, baseline: np.ndarray, what: What
) -> np.ndarray:
    """Areas under the curves of deletion of random rankings, for `check_map`."""
    ranks = faithfulness.random_ranks(
        image.shape[:-1],
        tiles=faithfulness.TILES[image.ndim - 1],
        count=faithfulness.RANDOM_RANKINGS,
        seed=0,
    )
    return faithfulness.area_under(explainer.curves(variables, image, baseline, what, ranks))


def check_map(
    explainer: Explainer,
    method: str,
    found: np.ndarray,
    facts: dict[str, float],
    *,
    variables: Any,
    random: Any,
    image: np.ndarray,
    baseline: np.ndarray,
    what: What,
    areas: np.ndarray,
) -> dict[str, Any]:
    """Checks of one map, and as `failures` why it fails, if it does.

    Args:
        explainer: that made it.
        method: likewise.
        found: the map.
        facts: that came with it.
        variables: of the network.
        random: variables of the same network before any training.
        image: as the network sees it.
        baseline: as of the map.
        what: the target.
        areas: of `random_areas`.
    """
    of_random, _ = explainer.attribute(method, random, image, baseline, what)
    ranks = faithfulness.rank_tiles(found, tiles=faithfulness.TILES[found.ndim])
    deleted = explainer.curves(variables, image, baseline, what, ranks[None])
    inserted = explainer.curves(variables, baseline, image, what, ranks[None])
    checks: dict[str, Any] = {
        **facts,
        **faithfulness.compare_maps(found, of_random),
        "deletion": float(faithfulness.area_under(deleted)[0]),
        "deletion_random": float(areas.min()),
        "deletion_random_mean": float(areas.mean()),
        "insertion": float(faithfulness.area_under(inserted)[0]),
        "empty": float(not (found > 0).any()),
    }
    failures = faithfulness.find_failures(checks)
    return {**checks, "deletion_curve": deleted[0].tolist(), "failures": failures}
