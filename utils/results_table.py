"""A table of results that several runs may write into: one CSV with everything, and a Markdown copy for people."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.files import write_atomic


def append_row(path: str | Path, row: Mapping[str, Any], shown: Sequence[str]) -> Path:
    """Add `row` to the CSV at `path`, and write the columns `shown` of all rows to the ``.md`` beside it.

    Columns that the table does not have yet are added, empty in older rows. Both files are whole at every moment, and
    of several processes that append at once each adds its row. Returns the Markdown file.

    Raises:
        ValueError: when the file at `path` is no CSV with a header.
    """
    path = Path(path)
    if path.suffix != ".csv":
        raise ValueError(f"the table must be a .csv file, found {path}")
    with _locked(path):
        columns, rows = read_table(path)
        columns += [name for name in row if name not in columns]
        rows.append({name: _cell(value) for name, value in row.items()})
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(path, lambda file: file.write(text.getvalue().encode()))
        markdown = markdown_table([name for name in shown if name in columns], rows)
        write_atomic(path.with_suffix(".md"), lambda file: file.write(markdown.encode()))
    return path.with_suffix(".md")


def read_table(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a table; both empty when there is none."""
    path = Path(path)
    if not path.is_file():
        return [], []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        columns = list(reader.fieldnames or [])
    if not columns or any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} is not a table of results: expected a header and rows as long as it; move it away")
    return columns, rows


def markdown_table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """The named columns of all rows as a Markdown table."""
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "".join(f"| {' | '.join(_escaped(cell) for cell in line)} |\n" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of the table; waits for others. The lock's file stays, as removing it would not be safe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def commit_of(folder: str | Path) -> str:
    """The commit that the code in `folder` is of, with "+changes" where files differ from it; "unknown" without git."""
    git = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+changes" if changed else commit
