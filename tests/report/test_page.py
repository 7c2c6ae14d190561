"""The page: what other people wrote is text on it, it needs nothing from outside, and it can be read without seeing."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from deploy.report.data import read_run
from deploy.report.page import render
from deploy.report.text import duration, number, visible
from deploy.report.write import write_report
from tests.report.runs import MadeRun, fail, finish, make_run

SHOWN = "</script><script>alert('x')</script> & \\u202egnp.exe \\x00"
"""tests.report.runs.ATTACK as a reader sees it."""
VOID = {"meta", "link", "path", "br", "i"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; raises on a tag that is not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(name="attacked", scope="module")
def attacked_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a run in which the model, the grader and the error all try to write markup."""
    made = make_run(tmp_path_factory.mktemp("attack"), attack=True)
    fail(made, "StageError: </style><img src=x onerror=alert(1)>")
    return Page(write_report(made.dir.path).page.read_text())


def test_nothing_that_a_model_writes_becomes_markup(attacked: Page) -> None:
    assert not {"script", "img", "iframe", "object", "embed", "form", "base"} & set(attacked.tags)
    assert not [name for _, name, _ in attacked.attributes if name.startswith("on")]
    assert attacked.open == []
    # Twelve samples, each with a response and a reason; the last cause of two drop reasons.
    assert attacked.text.count(SHOWN) == 12 * 2 + 2
    assert "StageError: </style><img src=x onerror=alert(1)>" in attacked.text
    assert "\u202e" not in attacked.text
    assert "\x00" not in attacked.text


def test_a_browser_is_told_to_run_and_to_load_nothing(attacked: Page) -> None:
    policies = [value for tag, name, value in attacked.attributes if tag == "meta" and name == "content"]
    assert any(value.startswith("default-src 'none'; style-src 'unsafe-inline'") for value in policies)


def test_the_page_is_one_file_that_names_no_other(made: MadeRun) -> None:
    finish(made)
    html = write_report(made.dir.path).page.read_text()
    page = Page(html)
    assert not re.findall(r"https?:|//\w|@import|url\(", html)
    links = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert links == ["data:,"]


def test_the_same_run_gives_the_same_page(made: MadeRun) -> None:
    first, second = (render(read_run(made.dir.path, clock=lambda: 5000.0)) for _ in range(2))
    assert first == second


def test_every_drawing_is_told_in_words(tmp_path: Path) -> None:
    made = make_run(tmp_path, metrics=[{"entropy": 2.0 - s / 4, "ess": 0.5} for s in range(4)])
    html = render(read_run(made.dir.path))
    drawings = re.findall(r"<svg [^>]*>", html)
    labels = [re.search(r'role="img" aria-label="([^"]+)"', d) for d in drawings]
    assert len(drawings) >= 15
    assert all(labels)
    words = [label.group(1) for label in labels if label]
    assert "entropy: 2 at step 1, 1.25 at step 4, between 1.25 and 2" in words
    assert "0 steps: 6 rollouts (25.0\N{NO-BREAK SPACE}%); 1 steps: 18 rollouts (75.0\N{NO-BREAK SPACE}%)" in words
    assert any(w.startswith("Generation: 12 spans, busy ") for w in words)
    assert all("scope=" in th for th in re.findall(r"<th[^e][^>]*>", html))


def test_what_is_not_recorded_is_said_in_its_place(made: MadeRun) -> None:
    html = render(read_run(made.dir.path))
    for column in ("entropy", "kl_reference", "ess"):
        assert f"Not recorded: the steps of this run have no {column}." in html


def test_a_long_run_is_drawn_by_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.report.charts.MOST_POINTS", 3)
    html = render(read_run(make_run(tmp_path, 7).dir.path))
    assert "Each point is the mean of 3 steps." in html
    # Steps 1 to 3, 4 to 6, and 7 alone; the gradient's norm of step s is 2 + s.
    assert re.findall(r"<title>(step [257]: [479])</title>", html)[:3] == ["step 2: 4", "step 5: 7", "step 7: 9"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.64355, "0.644"),
        (1920, "1,920"),
        (4.2e-7, "4.2e-07"),
        (-0.0025, "\N{MINUS SIGN}0.0025"),
        (1234.5, "1,234"),
        (12_345_678.0, "1.23e+07"),
        (float("nan"), "\N{EN DASH}"),
        (None, "\N{EN DASH}"),
    ],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.076, "0.076 s"), (59.2, "59 s"), (127.1, "2 min 7 s"), (11_100, "3 h 5 min"), (187_300, "2 d 4 h")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == text


def test_a_long_response_loses_its_middle() -> None:
    shown = visible("a" * 500 + "b" * 500, longest=400)
    assert shown == "a" * 300 + "\n[… 600 characters left out, samples.parquet has them …]\n" + "b" * 100
