"""Every command as a user who may not write its folder: one line that names it, before compiling.

Root may write everywhere, so a second user runs them.
"""

import os
import pathlib
import shutil
import tempfile

import pytest

from tests.support.every_job import JOBS, make_given
from tests.support.forked import Forked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root"),
]
NOBODY = 65534


@pytest.fixture(scope="module")
def given():
    """In a folder that another user may enter, as pytest's may not be."""
    folder = pathlib.Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield make_given(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def refused(given):
    """(job, out) -> what nobody is told, in a line, without having compiled anything."""
    home = given.folder / "home"
    (home / "cache").mkdir(parents=True)
    for folder in (home, home / "cache"):
        os.chown(folder, NOBODY, NOBODY)
    environment = {"HOME": str(home), "JAX_COMPILATION_CACHE_DIR": str(home / "cache")}
    with Forked(home, given.environment() | environment) as forked:

        def run(job, out):
            name, *flags = given.command(job, out)
            status, said = forked.start(name, flags, NOBODY).end()
            assert status == 1, said
            assert not list((home / "cache").iterdir()), "it has compiled"
            # TFDS's command says more, of what it does.
            *others, line = said.splitlines()
            assert job == "tfds" or not others, said
            assert "Traceback" not in said
            return line

        yield run


@pytest.mark.parametrize("job", JOBS)
def test_a_folder_that_may_not_be_written_is_named(job, given, refused):
    theirs = given.folder / f"theirs_{job}"
    theirs.mkdir(mode=0o755)
    assert str(theirs) in refused(job, theirs)
    assert str(theirs) in refused(job, theirs / "new")
    assert not list(theirs.iterdir())


@pytest.mark.parametrize("job", JOBS)
def test_an_input_that_may_not_be_read_is_named(job, given, refused):
    out = given.folder / f"out_{job}"
    out.mkdir()
    os.chown(out, NOBODY, NOBODY)
    given.command(job, out)  # has it made
    file = given.reads(job)
    before = file.stat().st_mode
    file.chmod(0)
    try:
        line = refused(job, out)
    finally:
        file.chmod(before)
    assert str(file) in line or str(file.parent) in line
    assert "ermission denied" in line
