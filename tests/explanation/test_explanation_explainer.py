import jax
import numpy as np
import pytest
from planted import planted_lesions, train_classifier

from jaxmed.explanation.explainer import BASELINES, METHODS, Explainer
from jaxmed.explanation.faithfulness import dilate, share_on
from jaxmed.explanation.layers import default_layer, list_layers
from jaxmed.explanation.targets import cell_of_box, class_target, log_odds

MARGIN = 2
"""Voxels, of an image 48 wide and lesions 8 to 13 across."""


def test_log_odds_are_the_logit_of_the_probability():
    logits = jax.random.normal(jax.random.key(0), (4, 3))
    p = jax.nn.softmax(logits)[:, 1]
    np.testing.assert_allclose(log_odds(logits, 1), np.log(p / (1 - p)), rtol=1e-4)
    np.testing.assert_allclose(log_odds(logits, 2, multilabel=True), logits[:, 2])


def test_the_cell_of_a_box_is_the_one_that_gave_it():
    boxes = np.array([[0, 0, 4, 4], [2, 2, 9, 9], [2, 2, 8, 8]], np.float32)
    logits = np.array([[0, 3], [1, 0], [0, 1]], np.float32)
    for label, best in ((1, 2), (0, 1)):
        box = np.array([2, 2, 8, 8], np.float32)
        assert cell_of_box(logits, boxes, box, label, shape=(8, 8)) == best


@pytest.mark.slow
def test_attribution_lies_on_the_lesion_of_a_trained_network_only():
    images, labels, causes = planted_lesions(1300)
    model, trained, random, accuracy = train_classifier(
        images[:1200], labels[:1200], images[1200:], labels[1200:]
    )
    assert accuracy > 0.95
    layer = default_layer(list_layers(model, trained, images[:1]))
    explainer = Explainer(model, class_target, layer=layer)
    cases = [row for row in range(1200, 1300) if labels[row]][:16]
    shares = {}
    for name, variables in (("trained", trained), ("random", random)):
        for method in METHODS:
            found = []
            for row in cases:
                baseline = BASELINES["blurred"](images[row])
                what = {"label": np.int32(1)}
                values, facts = explainer.attribute(method, variables, images[row], baseline, what)
                if name == "trained":
                    assert facts.get("gap", 0) <= 0.01
                on = dilate(causes[row], margin=MARGIN)
                found.append(share_on(values, on)["share"])
            shares[name, method] = np.mean(found)
            print(f"{name} {method}: {shares[name, method]:.2f} of it on the lesion")
    high = {method for (name, method), share in shares.items() if name == "trained" and share > 0.6}
    assert high >= {"integrated_gradients", "occlusion"}, shares
    # Far from it: an even map has .07.
    assert max(share for (name, _), share in shares.items() if name == "random") < 0.3, shares
