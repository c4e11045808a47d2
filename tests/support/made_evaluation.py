"""A made-up evaluation, and its page."""

import numpy as np
from etils import epath
from PIL import Image

from dmpo_jax.evaluation.report import write_report
from dmpo_jax.evaluation.statistics import compare, correct

EVIL = "</script><script>alert('x')</script> & \"cat\" <!--"
CATEGORIES = ("Animals", "Arts & Crafts")


def make_rows(out, count, models, categories):
    """Rows by whose scores the models gain -1, 0, 1, 2, ...; each image has its own colour."""
    rows = []
    for i in range(count):
        images = {model: f"images/{model}/{i:05}.png" for model in models}
        for side, file in enumerate(images.values()):
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (640 if i == 0 else 40, 30), (i, 100 * side, 0)).save(out / file)
        scores = {model: 20.0 + (i - 1) * place for place, model in enumerate(models)}
        category = categories[i % len(categories)] if categories else None
        prompt = EVIL if i == 0 else f"prompt no. {i}"
        row = {"number": i, "prompt": prompt, "category": category, "seed": 7 + i}
        rows.append({**row, "images": images, "scores": {"second": scores, "judge": scores}})
    return rows


def make_result(rows, models, categories, estimand):
    """Returns the result of an evaluation of the rows."""

    def entries(model, chosen):
        found = {}
        for scorer in ("second", "judge"):
            base, policy = (
                np.array([row["scores"][scorer][m] for row in chosen]) for m in (models[0], model)
            )
            found[scorer] = compare(base, policy, np.arange(len(base)), estimand="like_these")
        correct(list(found.values()))
        return found

    about = {"version": "1", "temperature": None, "uses_prompt": True}
    return {
        "baseline": models[0],
        "models": {model: {"folder": f"runs/{model}"} for model in models},
        "scorers": {
            "second": {**about, "independent": True, "primary": False},
            "judge": {**about, "independent": False, "primary": True},
        },
        "comparisons": {
            model: {
                "overall": entries(model, rows),
                "categories": {
                    name: entries(model, [row for row in rows if row["category"] == name])
                    for name in categories
                },
            }
            for model in models[1:]
        },
        "agreement": [{"a": "second", "b": "judge", "spearman": None}],
        "diversity": {model: {"distance": 0.25} for model in models},
        "protocol": {"steps": 20},
        "estimand": estimand,
        "prompts": len(rows),
        "images_per_prompt": 1,
    }


def write(
    out,
    count=6,
    models=("base", "<tuned> 1%"),
    categories=CATEGORIES,
    estimand="like_these",
    **changes,
):
    """Writes images and a page of `count` rows; returns the page's path."""
    out = epath.Path(out)
    rows = make_rows(out, count, models, categories)
    result = make_result(rows, models, categories, estimand)

    def open_image(path):
        with Image.open(out / path) as image:
            return np.asarray(image)

    return write_report(out, result, rows, open_image, **changes)
