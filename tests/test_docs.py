"""What README, docs and experiments say: commands, options, links and files that exist, within their lengths."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from slimsam_jax.__main__ import PROGRAMS
from slimsam_jax.compression import options as compress_options

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [
    page for page in sorted((ROOT / "experiments").rglob("*.md")) if page.name != "LOG.md"
]  # a journal: as it was
LOG = "experiments/LOG.md"
LENGTHS = {"README.md": 120, "experiments/README.md": 150}
# Of the next house, which docs/adding/ describes: folders, files, names in files. What is there must leave this set.
COMING: set[str] = set()
PARTS = ("slimsam_jax", "converters", "experiments", "tests", "docs")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def split(page: Path) -> tuple[str, str]:
    """Prose and code of a page: what stands outside and inside of fences."""
    parts: tuple[list[str], list[str]] = ([], [])
    inside = False
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        else:
            parts[inside].append(line)
    return "\n".join(parts[0]), "\n".join(parts[1])


def commands() -> list[tuple[str, ...]]:
    """(module, argument, ...) of every command of ours, in blocks and within lines: by `python -m` or `slimsam`."""
    found = set()
    for page in PAGES:
        prose, code = split(page)
        typed = code.replace("\\\n", " ").splitlines()
        for line in typed + re.findall(r"`((?:python -m|slimsam) [^`]+)`", prose.replace("\n", " ")):
            for command in re.findall(r"python -m ([^\"&]+)", line):
                module, *rest = shlex.split(command, comments=True)
                if module.partition(".")[0] in PARTS:
                    found.add((module, *rest))
            for command in re.findall(r"(?<![\w/.-])slimsam ([^\"&]+)", line):
                name, *rest = shlex.split(command, comments=True)
                if name in PROGRAMS:
                    found.add((PROGRAMS[name][0], *rest))
                else:
                    assert name == "--help" or name.isupper(), f"slimsam has no {name}"
    return sorted(found)


@functools.cache
def help_of(module: str, *subcommand: str) -> str:
    said, arguments = io.StringIO(), sys.argv
    sys.argv = [module, *subcommand, "--help"]
    try:
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = arguments
    assert not ended.value.code, f"{module} {subcommand} --help fails"
    return said.getvalue()


def test_there_are_commands_to_check():
    found = commands()
    assert len(found) > 30
    assert (
        "slimsam_jax.predict",
        *shlex.split("--model slim --image truck.jpg --point 500,375 --out mask.png"),
    ) in found


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", sorted({module for module, *_ in commands()}))
def test_commands_exist_with_their_options(module):
    for _, *arguments in (command for command in commands() if command[0] == module):
        options = {argument.partition("=")[0] for argument in arguments if re.match(r"--\w", argument)}
        known = help_of(module)
        if arguments and re.search(rf"[{{,]{re.escape(arguments[0])}[,}}]", known):
            known = help_of(module, arguments[0])
        missing = {option for option in options if not re.search(rf"{option}(?![\w-])", known)}
        assert not missing, f"python -m {module} {' '.join(arguments)}: no {missing}"


@pytest.mark.parametrize("name", ["CutOptions", "ImageOptions", "RunOptions", "DeviceOptions"])
def test_tables_of_options_leave_none_out(name):
    pytest.importorskip("mkdocs")
    table = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["fields_of"]("options", name)
    own = vars(compress_options)[name].__annotations__
    assert set(re.findall(r"\| `--([\w-]+)`", table)) == {field.replace("_", "-") for field in own}
    assert "Path(" not in table


def test_every_page_is_in_the_sites_list():
    """Where `mkdocs build --strict` ends otherwise. README is the front page; docs/hooks.py adds notebooks."""
    listed = re.findall(r"(?m)^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text())
    pages = {name_of(page).removeprefix("docs/") for page in PAGES} - {"README.md"}
    pages |= {f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    assert {page for page in pages if "tables/" not in page} == set(listed) - {"index.md", LOG}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link, _, anchor in re.findall(r"\]\(([^)#\s:]*)(#([^)\s]+))?\)", re.sub("`[^`]*`", "", split(page)[0])):
        there = (page.parent / link).resolve() if link else page
        if "docs/api/" in there.as_posix():
            continue  # made by the site
        assert there.exists(), f"{name_of(page)} links to {link}"
        assert not anchor or anchor in anchors(there), f"{name_of(page)} links to {link}#{anchor}"


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"(?m)^#+ (.*)$", split(page)[0])
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def named_in(page: Path) -> set[str]:
    """Paths that stand as code in a page, and "NAME in path"; NAME.py is the reader's, so its folder counts."""
    text = " ".join(page.read_text().split())
    path = rf"`((?:{'|'.join(PARTS)})/[^`\s]*)`"
    paths = {re.sub(r"\bNAME\.py$", "", found) for found in re.findall(path, text)}
    return paths | {f"{name} in {place}" for name, place in re.findall(rf"`([A-Z]+)` in {path}", text)}


def is_there(named: str) -> bool:
    name, _, path = named.rpartition(" in ")
    there = ROOT / path
    return there.exists() and (not name or bool(re.search(rf"(?m)^{name}\b", there.read_text())))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_named_exists(page):
    assert not {named for named in named_in(page) if not is_there(named)} - COMING


def test_what_is_to_come_is_named_and_not_there_yet():
    assert not {named for named in COMING if is_there(named)}
    assert set().union(*map(named_in, PAGES)) >= COMING


@pytest.mark.parametrize("page", LENGTHS)
def test_lengths(page):
    assert len((ROOT / page).read_text().splitlines()) <= LENGTHS[page]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_names_a_place_of_one_machine(page):
    """/data stands for a reader's own."""
    places = re.findall(r"(?<![\w.~/])/(?!data\b)\w+/\w+", page.read_text())
    assert not [
        place for place in places if Path(place).parts[1] in ("home", "root", "tmp", "work", "usr", "opt", "mnt")
    ]
