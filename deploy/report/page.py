"""Renders the report's data as one HTML page that needs no network and no script."""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from deploy.report.data import ReportData
from deploy.report.gantt import TONES
from deploy.report.tables import versions
from deploy.report.text import number, visible
from deploy.report.view import make_view


@cache
def environment() -> Environment:
    """The templates. Everything is escaped: prompts, responses, errors and settings are other people's text."""
    made = Environment(
        loader=PackageLoader("deploy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"visible": visible, "number": number}
    made.globals |= {"tones": TONES, "versions": versions}
    return made


def render(data: ReportData) -> str:
    return environment().get_template("report.html").render(view=make_view(data), live=None).lstrip()
