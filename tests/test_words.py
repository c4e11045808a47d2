"""Tests for README.md and docs/: length, links, and that every command would be accepted."""

import dataclasses
import functools
import os
import pathlib
import re
import shlex
from collections.abc import Iterator

import pytest

import dmpo_jax
from dmpo_jax import storage
from dmpo_jax.commands import COMMANDS
from dmpo_jax.config import configs, files, parsing
from dmpo_jax.config.recipes import RECIPES
from dmpo_jax.objectives import OBJECTIVES

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EASY = [README, ROOT / "docs" / "getting_started.md"]
WORDS = 30  # of a sentence
# Commands as pages write them, and scripts that pass their flags on to one.
CALL = re.compile(
    r"(?:dmpo-jax (?P<name>\w+)|python launch/(?P<script>\w+)\.py"
    r"|launch/(?:tpu/train\.sh|gke/xpk\.sh|slurm/train\.sbatch))(?P<rest>(?:[ \n].*)?)$",
    re.DOTALL,
)


OPTION = re.compile(r"(?:--config\.)?(?P<path>[a-z_]+(?:\.[a-z_0-9]+)+)(?:=(?P<value>\S+))?")


def name_of(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str, languages: str) -> list[str]:
    return re.findall(rf"^```(?:{languages})\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> Iterator[str]:
    """Paragraphs and list items, without code blocks, tables, headings and link targets."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#", "!["))]
    for part in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", "\n".join(lines)):
        part = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", part)
        yield re.sub(r"`[^`]*`", "code", part)


def sentences(text: str) -> Iterator[str]:
    for part in prose(text):
        yield from re.split(r"(?<=[.!?])\s+", " ".join(part.split()))


def long_ones(text: str) -> list[str]:
    return [sentence for sentence in sentences(text) if len(sentence.split()) > WORDS]


def commands(text: str) -> Iterator[tuple[str, str, bool]]:
    """(command, its flags, whether it is complete) of a page's code blocks and inline code.

    Inline code and lines with "..." leave flags out.
    """
    for block in blocks(text, "bash|sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                if match := CALL.search(part):
                    rest = match["rest"]
                    yield match["name"] or match["script"] or "train", rest, "..." not in rest
    for code in re.findall(
        r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M)
    ):
        if (match := CALL.match(code)) and match["name"] != "COMMAND":
            yield match["name"] or match["script"] or "train", match["rest"], False


@functools.cache
def parse(name: str, rest: str, complete: bool) -> None:
    """Raises ValueError as the command line would; incomplete ones may lack what is required."""
    command = COMMANDS[name]
    argv = [word for word in shlex.split(rest, comments=True) if "..." not in word]
    if "--help" in argv:
        return
    interface = command.interface
    if not complete:
        interface = dataclasses.replace(interface, required=(), config=interface.config or "")
    config, options = parsing.parse([name, *argv], interface)
    if complete:
        command.check(config, options)


def test_the_readme_is_one_screen():
    assert len(README.read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", EASY, ids=name_of)
def test_sentences_are_short(page):
    assert not long_ones(page.read_text())


def test_a_long_sentence_is_found():
    easy = "One two. " * 40 + "\n\n| " + "cell " * 40 + "|\n\n- a\n- [b](c.md)\n"
    assert not long_ones(easy)
    assert long_ones("word " * 31)
    assert long_ones(f"- Short.\n- {'word ' * 31}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    relative = {link for link in links if not re.match(r"\w+:", link)}
    broken = set()
    for link in relative:
        path, _, anchor = link.partition("#")
        file = pathlib.Path(os.path.normpath(page.parent / path)) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.add(link)
    assert not broken


def anchors(page: pathlib.Path) -> set[str]:
    """Of headings, as code hosts and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_would_be_accepted(page, monkeypatch):
    """Real commands, real configs, real leaves and values; nothing is run."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(storage, "check_filesystem", lambda path: None)  # packages of gs://, s3://
    wrong = []
    for name, rest, complete in commands(page.read_text()):
        try:
            parse(name, rest, complete)
        except (ValueError, KeyError) as error:
            wrong.append(f"{name}{rest}: {error!r}")
    assert not wrong, "\n".join(wrong)


def test_wrong_commands_are_found(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = "```bash\n{}\n```"
    for line in (
        "dmpo-jax trane --config=sdxl_dmpo:debug",
        "dmpo-jax train --config=sdxl_dpo:debug",
        "python launch/train.py --config=configs/sdxl_dmpo.py:debug \\\n  --config.train.stepz=3",
        "dmpo-jax train --config=sdxl_dmpo:debug --config.train.steps=many",
        "dmpo-jax encode --model=m --out=o",
        "pip install -e . && dmpo-jax sample --model=m --prompts=p --out=o --guidence_scale=3",
    ):
        ((name, rest, complete),) = commands(page.format(line))
        with pytest.raises((ValueError, KeyError)):
            parse(name, rest, complete)


def test_inline_options_exist():
    """`train.steps=500` or `--config.train.steps` in a page is a leaf, and takes the value."""
    known = configs.declared()
    sections = {path.rpartition(".")[0] for path in known}
    wrong, given = [], {}
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", page.read_text()):
            match = OPTION.fullmatch(code)
            if not match or match["path"].partition(".")[0] not in sections:
                continue
            if match["path"].endswith((".py", ".md", ".safetensors")):
                continue
            path, value = match["path"], match["value"]
            if path not in known and not (path in sections and not value):
                wrong.append(f"{name_of(page)}: {code}")
            elif value and not re.search(r"[A-Z/]", value):
                given[f"--config.{path}={value}"] = None
    assert not wrong, "\n".join(wrong)
    parse("train", " ".join(given), complete=False)  # names the first that is refused


def test_pages_name_every_config_recipe_and_objective():
    """A new one cannot be left out of the pages that list them."""
    docs = ROOT / "docs"
    listed = set(re.findall(r"`(\w+)`", (docs / "formulas.md").read_text()))
    assert listed >= {*RECIPES, *OBJECTIVES}
    tree = (docs / "architecture.md").read_text()
    assert not [name for name in files.shipped() if name not in tree and "digits" not in name]


def test_troubleshooting_quotes_real_messages():
    """Every part between "..." of a quoted message is in the package's code."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = page.partition("| message |")[2].partition("## ")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    quoted += re.findall(r"^> (.*)$", page, re.MULTILINE)
    code = "\n".join(file.read_text() for file in (ROOT / "dmpo_jax").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # strings over several lines
    assert len(quoted) > 20
    parts = [part.strip() for message in quoted for part in message.split("...")]
    assert not [part for part in parts if part not in code]


def test_every_page_is_in_the_sites_menu():
    menu = set(re.findall(r"[:-] (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert menu == pages, f"mkdocs.yml, nav: add {pages - menu}, take out {menu - pages}"


def test_the_python_reference_names_what_exists():
    """mkdocstrings leaves out a member that does not exist, without a word."""
    page = (ROOT / "docs" / "python_reference.md").read_text()
    named = re.findall(
        r"^::: ([\w.]+)\n(?:    options:\n      members: \[(.*)\])?", page, re.MULTILINE
    )
    assert len(named) == page.count(":::")
    missing = []
    for module, members in named:
        if names := re.findall(r"\w+", members):
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
            defined = set(re.findall(r"^(?:class|def) (\w+)", source, re.MULTILINE))
            missing += [f"{module}.{name}" for name in names if name not in defined]
    assert not missing


def test_ci_runs_the_readmes_own_command():
    (command,) = re.findall(r'bash -c "(.* pytest)"', (ROOT / ".ci" / "run").read_text())
    assert command in blocks(README.read_text(), "bash")[-1]


def test_versions_are_said_alike():
    """In files of other tools, which cannot read setup.py."""
    setup = (ROOT / "setup.py").read_text()
    (ruff,) = re.findall(r'"ruff==([\d.]+)"', setup)
    assert f"rev: v{ruff}\n" in (ROOT / ".pre-commit-config.yaml").read_text()
    (docs,) = re.findall(r"pip install (\".*\")", (ROOT / ".github/workflows/docs.yml").read_text())
    assert all(f'"{package}"' in setup for package in shlex.split(docs))
    assert f"\nversion: {dmpo_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
