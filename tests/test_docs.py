"""The documents say what the code does: written pages are up to date, and what is named exists."""

import re
import runpy
from pathlib import Path

import pytest

from distrl.config import known_keys
from distrl.objectives import options, recipe_names
from distrl.staleness import Admission, Choice, Outstanding

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
PACKAGES = ("distrl", "actors", "learners", "deploy")
FOLDERS = (*PACKAGES, "tests", "docs", "examples", "benchmarks", "requirements", ".ci")
SECTIONS = {key.split(".")[0] for key in known_keys() if "." in key}


def page(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(text: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def headings(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def defines(source: str, name: str) -> bool:
    return bool(re.search(rf"^\s*(?:async def|def|class) {name}\b|^\s*{name}\b.*=", source, re.MULTILINE))


def test_the_page_of_the_config_is_what_the_script_writes() -> None:
    script = runpy.run_path(str(ROOT / "docs/write_config.py"))
    assert script["PAGE"].read_text() == script["render"](), "run python docs/write_config.py"


def test_the_page_of_the_config_has_every_key_and_every_option() -> None:
    named = set(code((ROOT / "docs/config.md").read_text()))
    assert {key for key in known_keys() if key not in SECTIONS} <= named
    assert {option for recipe in recipe_names() for option in options(recipe)} <= named


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    text = path.read_text()
    prose = re.sub(r"`[^`\n]*`", "", text)  # code may look like a link
    links = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r"(?:src|href|srcset)=\"([^\"]+)\"", text)
    dead = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in headings(target.read_text())):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_every_file_test_module_and_key_that_is_named_exists(path: Path) -> None:
    missing = [name for name in code(path.read_text()) if not exists(name)]
    assert missing == []


def exists(name: str) -> bool:
    """Whether a name in backticks is there, if it is that of a file, a test, a module or a key; other words pass."""
    if re.fullmatch(r"test_\w+", name):
        return any(defines(file.read_text(), name) for file in ROOT.glob("tests/**/test_*.py"))
    if re.fullmatch(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*(?:::\w+)?", name):
        file, _, test = name.partition("::")
        return (ROOT / file).exists() and (not test or defines((ROOT / file).read_text(), test))
    first, *rest = name.split("=")[0].split(".")
    if first in PACKAGES and rest and all(re.fullmatch(r"\w+", part) for part in rest):
        return is_in_code([first, *rest])
    if (
        first in SECTIONS
        and len(rest) == 1
        and rest[0].isidentifier()
        and rest[0] not in ("json", "jsonl", "yaml", "py", "parquet")
    ):
        return f"{first}.{rest[0]}" in known_keys()
    return True


def is_in_code(parts: list[str]) -> bool:
    """Whether a dotted name is a module, or something that its module defines."""
    for length in range(len(parts), 0, -1):
        module = ROOT.joinpath(*parts[:length])
        file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
        if file.exists():
            return all(defines(file.read_text(), part) for part in parts[length:])
    return False


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tests/test_docs.py::test_nothing", False),
        ("actors/nothing.py", False),
        ("distrl.staleness.Admission.choose", True),
        ("distrl.staleness.nothing", False),
        ("test_of_nothing", False),
        ("train.nothing", False),
        ("train.steps=3", True),
        ("ledger.sqlite", True),
        ("run.json", True),
    ],
)
def test_a_name_that_is_not_there_would_be_found(name: str, expected: bool) -> None:
    assert exists(name) == expected


def test_the_example_of_the_staleness_page_is_what_the_rules_give() -> None:
    rules = Admission(max_staleness=2, tickets_per_step=2)

    def choose(step: int, deadlines: dict[int, int], *ready: int) -> Choice:
        return rules.choose([Outstanding(i, d - 2, i in ready) for i, d in deadlines.items()], step)

    assert rules.window == 6
    assert [rules.oldest_step_for(n, 0) for n in range(7)] == [0] * 6 + [1]
    assert choose(0, dict.fromkeys(range(6), 2), 1, 2) == Choice((1, 2), ())
    assert [rules.oldest_step_for(n, 1) for n in (4, 5)] == [1, 1]
    second = {0: 2, 3: 2, 4: 2, 5: 2, 6: 3, 7: 3}
    assert choose(1, second, 6, 7) == Choice((), (0, 3, 4, 5))
    assert choose(1, second, 3, 4, 6, 7) == Choice((3, 4), ())
    assert not rules.may_issue(outstanding=4, ready=2)
    third = {0: 2, 5: 2, 6: 3, 7: 3}
    assert choose(2, third, 5, 6, 7) == Choice((), (0,))
    assert choose(2, third, 0, 5, 6, 7) == Choice((0, 5), ())
