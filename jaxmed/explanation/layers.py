"""Any layer of a Linen network, by the names of its modules, without a change to the network."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from jaxmed.types import UserError


@dataclasses.dataclass(frozen=True)
class Layer:
    """The output of one module.

    Attributes:
        name: names of the modules from the outermost one, such as `backbone/stage3_block1`; of a
            module that runs several times its n-th run has `#n` at the end, from 2 on.
        shape: (batch, *spatial, channels).
        dtype: of the output.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any


def list_layers(model: nn.Module, variables: Any, images: Any) -> list[Layer]:
    """The layers that have an array with spatial axes as output, in the order in which they end.

    Args:
        model: called as `model.apply(variables, images, train=False)`.
        variables: of the network.
        images: (batch, *spatial, channels), arrays or shapes.
    """
    found: list[Layer] = []

    def note(name: str, output: Any) -> Any:
        if isinstance(output, jax.Array) and output.ndim == len(images.shape):
            found.append(Layer(name, output.shape, output.dtype))
        return output

    jax.eval_shape(lambda v, x: _apply(model, v, x, note), variables, images)
    return found


def default_layer(layers: Sequence[Layer], *, grid: Sequence[int] | None = None) -> Layer:
    """The last layer that runs once, of the coarsest grid or of the one given.

    Of a residual network that is the one whose mean goes to the classifier, of a U-Net the bottom,
    of a detector the features of a level of its pyramid.
    """
    again = {layer.name.split("#")[0] for layer in layers if "#" in layer.name}
    once = [layer for layer in layers if layer.name not in again and "#" not in layer.name]
    # Dropout is no layer of its own outside training.
    once = [layer for layer in once if not layer.name.split("/")[-1].startswith("dropout")]
    # Nor is what is on its way to another grid, as the convolution within an up-sampling.
    grids = {layer.name: layer.shape[1:-1] for layer in layers}
    once = [x for x in once if grids.get(x.name.rpartition("/")[0], grids[x.name]) == grids[x.name]]
    wanted = min((x.shape[1:-1] for x in once), key=_voxels) if grid is None else tuple(grid)
    return [layer for layer in once if layer.shape[1:-1] == wanted][-1]


def find_layer(layers: Sequence[Layer], name: str) -> Layer:
    """The layer of a name.

    Raises:
        UserError: there is none.
    """
    names = {layer.name: layer for layer in layers}
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise UserError(f"--layer={name}: the network has no such layer; {meant}")
    return names[name]


def apply_and_add(
    model: nn.Module, variables: Any, images: jax.Array, layer: str, added: jax.Array
) -> tuple[Any, jax.Array]:
    """Run a network with `added` added to the output of a layer.

    The gradient with respect to `added` at zero is that with respect to the layer's output.

    Returns:
        the network's outputs, and the output of the layer.
    """
    seen: list[jax.Array] = []

    def add(name: str, output: Any) -> Any:
        if name != layer:
            return output
        seen.append(output)
        return output + added.astype(output.dtype)

    outputs = _apply(model, variables, images, add)
    return outputs, seen[0]


def _apply(model: nn.Module, variables: Any, images: Any, change: Callable[[str, Any], Any]) -> Any:
    """Run a network, the output of every module changed by `change(name, output)`."""
    runs: dict[str, int] = {}

    def intercept(
        following: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], context: Any
    ) -> Any:
        output = following(*args, **kwargs)
        name = "/".join(context.module.path)
        if context.method_name != "__call__" or not name:
            return output
        runs[name] = runs.get(name, 0) + 1
        return change(name if runs[name] == 1 else f"{name}#{runs[name]}", output)

    with nn.intercept_methods(intercept):
        return model.apply(variables, images, train=False)


def _voxels(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
