"""Augmentations one after another, and augmentations that take place only sometimes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmed.types import Augment, Number, UserError

DeviceExample = dict[str, jax.Array]


def compose(*augments: Augment | None) -> Augment:
    """Apply augmentations in the order given; None holds a place and does nothing.

    Each has a key of its own, made from its place in the list, so that switching one off or adding
    one at the end leaves what the others draw as it was.

    >>> from jaxmed.augmentation.spatial import flip
    >>> from jaxmed.augmentation.intensity import gamma
    >>> augment = compose(flip(axes=(1,)), gamma(probability=0.3))
    >>> image = jnp.arange(12.0).reshape(3, 4, 1)
    >>> same = [augment(jax.random.key(7), {"image": image})["image"] for _ in range(2)]
    >>> bool((same[0] == same[1]).all())  # one key, one result
    True
    """

    def apply(key: jax.Array, example: DeviceExample) -> DeviceExample:
        for place, augment in enumerate(augments):
            if augment is not None:
                example = augment(jax.random.fold_in(key, place), example)
        return example

    return apply


def random_apply(augment: Augment, *, probability: Number) -> Augment:
    """Apply an augmentation to a part of the examples.

    Under `vmap` a `lax.cond` becomes a `select` that computes both sides anyway, so this selects
    from the start: a rare augmentation costs as much as a frequent one.

    Args:
        augment: what to apply.
        probability: of an example being changed, 0 to 1; may be traced.

    Raises:
        UserError: if the probability is outside 0 to 1.
    """
    check_probability(probability)
    always = not isinstance(probability, jax.Array) and probability == 1

    def apply(key: jax.Array, example: DeviceExample) -> DeviceExample:
        decide, draw = jax.random.split(key)
        if always:
            return augment(draw, example)
        chosen = jax.random.bernoulli(decide, probability)
        changed = augment(draw, example)
        # What an augmentation hands through untouched needs no select.
        return {
            name: value if value is example[name] else jnp.where(chosen, value, example[name])
            for name, value in changed.items()
        }

    return apply


def check_probability(probability: Number) -> None:
    """Refuse what is not a probability; of a traced one nobody can tell."""
    if not isinstance(probability, jax.Array) and not 0 <= probability <= 1:
        raise UserError(f"augmentation: probability is {probability}; set it from 0 to 1")


def check_range(name: str, bounds: tuple[float, float], *, least: float = -float("inf")) -> None:
    """Refuse a (low, high) pair that is out of order, or not above `least`."""
    low, high = bounds
    if not least < low <= high:
        above = "" if least == -float("inf") else f" and above {least:g}"
        raise UserError(f"augmentation: {name} is ({low}, {high}); set (low, high) in order{above}")
