"""The frame and the look that all HTML pages share: `base.html.j2` and `base.css`."""

import pathlib

import jinja2

HERE = pathlib.Path(__file__).parent


def templates(folder: pathlib.Path) -> jinja2.Environment:
    """Returns the templates of a folder, which may extend `base.html.j2`; all text is escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, HERE]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
