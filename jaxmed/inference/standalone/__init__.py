"""What predicts with an exported model where jaxmed is not installed.

An artefact holds a copy of this folder as `jaxmed_predict`. Arrays need jax and NumPy alone (or
onnxruntime in place of jax); image files need nibabel or imageio, instances SciPy. Nothing here
may import the rest of jaxmed, so what jaxmed does with other libraries is written here once more,
and every export compares the two.

From Python, with the artefact's path in `sys.path`:

    from jaxmed_predict import load
    model = load("model.zip")
    model.predict(array, spacing=(1.0, 1.0, 2.5))
"""

from .model import Model, ModelError, load

__all__ = ["Model", "ModelError", "load"]
