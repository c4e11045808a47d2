"""Published weights give the published scores of ImageReward's four pictures.

    DMPO_JAX_WEIGHTS=FOLDER pytest tests/scoring/test_weights.py

FOLDER holds a folder for each kind of scorer, pickscore, hpsv2, ..., as `KIND:FOLDER/KIND` reads
it, those that you have; and images/{1,2,3,4}.webp, which are assets/images of
https://github.com/THUDM/ImageReward (Apache-2.0).
"""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from dmpo_jax.scoring import make_scorer

pytestmark = pytest.mark.weights
PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
# kind -> (scores, tolerance). ImageReward's are of its README; the others DiffSynth-Studio
# published for its ImageQualityMetric. They are cosines but for aesthetic's, and their
# preprocessing of HPSv2 is not known, hence the tolerance.
GOLDEN = {
    "imagereward": ((0.58116, 0.27453, -1.41318, -2.02957), 5e-3),
    "aesthetic": ((5.90086, 5.77657, 5.79986, 5.05205), 5e-2),
    "pickscore": ((0.207371, 0.204436, 0.206608, 0.194261), 1e-3),
    "hpsv2": ((0.267252, 0.254952, 0.248885, 0.243028), 5e-3),
    "hpsv21": ((0.232114, 0.202337, 0.197829, 0.192302), 5e-3),
    "clip-h": ((0.389464, 0.354455, 0.338614, 0.328784), 1e-3),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_scores_of_the_four_pictures(kind):
    place = os.environ.get("DMPO_JAX_WEIGHTS")
    if not place:
        pytest.skip("needs published weights: set DMPO_JAX_WEIGHTS to their folder")
    folder = pathlib.Path(place)
    if not (folder / kind).is_dir():
        pytest.skip(f"{folder} has no {kind}")
    scorer = make_scorer(f"{'clip' if kind == 'clip-h' else kind}:{folder / kind}")
    scorer.check([PROMPT])
    pictures = [Image.open(folder / "images" / f"{i}.webp").convert("RGB") for i in range(1, 5)]
    scores = np.concatenate([scorer(np.asarray(x)[None], [PROMPT]) for x in pictures])
    want, tolerance = GOLDEN[kind]
    if kind == "pickscore":
        scores = scores / 100  # exp(logit_scale) is within 1e-3 of it
    np.testing.assert_allclose(scores, want, atol=tolerance, rtol=0)
    assert list(np.argsort(scores)) == list(np.argsort(want))
