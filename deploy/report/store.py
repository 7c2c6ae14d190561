"""The report's data on disk: one Parquet file per table, and the facts. A live page reads the same files."""

from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from deploy.report.data import FORMAT, Facts, ReportData
from deploy.report.files import read_json
from deploy.report.timeline import Window
from deploy.run_dir import write_json
from distrl.errors import RunError


def write_data(data: ReportData, directory: Path) -> dict[str, Path]:
    """Writes every table and `facts.json`; each file is the old one or the new one, never half.

    Returns:
        The Parquet file of each table.
    """
    directory.mkdir(exist_ok=True)
    paths = {name: directory / f"{name}.parquet" for name in data.tables()}
    for name, table in data.tables().items():
        aside = paths[name].with_name(paths[name].name + ".partial")
        pq.write_table(table, aside)
        aside.replace(paths[name])
    write_json(directory / "facts.json", {"format": FORMAT, **asdict(data.facts)})
    return paths


def read_data(directory: Path) -> ReportData:
    """What `write_data` wrote.

    Raises:
        RunError: a newer distrl wrote it, or facts.json is damaged.
    """
    facts = read_json(directory / "facts.json")
    if (found := facts.pop("format", 0)) > FORMAT:
        raise RunError(
            f"report {directory / 'facts.json'}: format must be at most {FORMAT}, got {found}; "
            "use the distrl that wrote it, or write the report again"
        )
    window = facts.pop("window")
    tables = {
        name: pq.read_table(directory / f"{name}.parquet")
        for name in ("steps", "evaluations", "tickets", "timeline", "samples")
    }
    return ReportData(facts=Facts(**facts, window=None if window is None else Window(**window)), **tables)
