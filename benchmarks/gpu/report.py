"""Results of the GPU program as one JSON object and as Markdown tables.

    python3 -m benchmarks.gpu.report results-gpu/results.json
    python3 -m benchmarks.gpu.report first/results.json second/results.json --write docs/results.md

Of several files, the sections of a later one take the place of those of an earlier one. A file may hold "notes", a
list of paragraphs by hand, which are printed below the run they belong to.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from utils.args import make_parser
from utils.errors import run
from utils.files import read_json, write_atomic

Record = Mapping[str, Any]

_HIDDEN = ("section", "name", "where", "passed", "error", "skipped")
_DIGITS = 3  # a median of some runs is not known better
_PERCENT = re.compile(r"(^|_)(share|mfu)(_|$)")
_WORDS = {
    "gb_per_s": "GB/s", "per_s": "per second", "us": "µs", "gb": "GB", "tflops": "TFLOP/s", "db": "dB", "mfu": "MFU",
    "gpt": "GPT", "vq": "VQ", "tf32": "TF32", "fid": "FID", "psnr": "PSNR",
}  # fmt: skip
_LONGEST = 240  # characters of a cell


def summary(out: Path, device: torch.device) -> dict[str, Any]:
    """The records of `out`/records.jsonl under what they were measured with."""
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    command = " ".join(["python3 -m benchmarks.gpu", *sys.argv[1:]])
    return {"environment": environment(device), "command": command, "records": records}


def environment(device: torch.device) -> dict[str, Any]:
    """Day, hardware, driver, versions and commit; None where something cannot be told."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "memory_gb": round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1) if cuda else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _said("git", "describe", "--always", "--dirty"),
        "day": datetime.now(timezone.utc).date().isoformat(),
    }


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown(*runs: Mapping[str, Any]) -> str:
    """Checks and measurements of one or several results of `summary`: what failed first, then tables by section."""
    newest = _newest(runs)
    records = [record for found in newest.values() for record in found[1]]
    checks = [record for record in records if "passed" in record]
    failed = [record for record in checks if not record["passed"]]
    devices = dict.fromkeys(run["environment"]["device"] for run in runs)
    lines = [f"# GPU results: {', '.join(devices)}", ""]
    for number, run_ in enumerate(runs, 1):
        sections = [name for name, (whose, _) in newest.items() if whose == number]
        lines += _header(run_, f"Run {number}" if len(runs) > 1 else "", sections if len(runs) > 1 else [])
    lines += [f"{len(checks) - len(failed)} of {len(checks)} checks passed.", ""]
    lines += [f"- **failed**: {r['section']}: {r['name']}: {_cell(r.get('error') or _values(r))}" for r in failed]
    for section, (number, found) in newest.items():
        lines += ["", f"## {section}" + (f" (run {number})" if len(runs) > 1 else ""), "", *_section(found)]
    return "\n".join(lines) + "\n"


def _newest(runs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, list[Record]]]:
    """The number of the run that a section is from, counted from 1, and the section's records."""
    found: dict[str, tuple[int, list[Record]]] = {}
    for number, results in enumerate(runs, 1):
        for section in dict.fromkeys(record["section"] for record in results["records"]):
            found[section] = number, [record for record in results["records"] if record["section"] == section]
    return found


def _header(results: Mapping[str, Any], name: str, sections: Sequence[str]) -> list[str]:
    """Where and how a run was made, and which sections are shown of it."""
    facts = ", ".join(f"{_heading(key)} {value}" for key, value in results["environment"].items() if value)
    shown = f" Sections: {', '.join(sections) or 'none, all were measured again later'}." if name else ""
    lines = [f"{name}: {facts}." + shown if name else f"{facts}.", "", f"`{results['command']}`", ""]
    return [*lines, *(f"{note}\n" for note in results.get("notes", []))]


def _section(records: Sequence[Record]) -> list[str]:
    """A table for each kind of measurement, a list of the single ones, and what was checked or left out."""
    measured = [record for record in records if "skipped" not in record and _shown(record)]
    checks = [record for record in records if "passed" in record]
    lines, single = [], []
    for group in _groups(record for record in measured if "passed" not in record):
        if len(group) > 1:
            lines += [*_table(group), ""]
        else:
            single += group
    if single:
        lines += [*(f"- {record['name']}: {_values(record)}" for record in single), ""]
    if checks:
        lines += ["| check | result | values |", "|---|---|---|"]
        lines += [
            f"| {_cell(r['name'])} | {'passed' if r['passed'] else '**failed**'} | {_values(r)} |" for r in checks
        ]
        lines.append("")
    for record in (record for record in records if "skipped" in record):
        values = f" ({_values(record)})" if _shown(record) else ""
        lines.append(f"- {record['name']}{values}: left out: {_cell(record['skipped'])}")
    return lines[:-1] if lines and not lines[-1] else lines


def _groups(records: Iterable[Record]) -> list[list[Record]]:
    """Records of one table: they have the same values, or most of them and names that begin with the same words.

    The words are those in front of the first comma or colon.
    """
    groups: list[list[Record]] = []
    for record in records:
        group = next((group for group in groups if _alike(group[0], record)), None)
        if group is None:
            groups.append([record])
        else:
            group.append(record)
    return groups


def _alike(first: Record, second: Record) -> bool:
    one, two = _shown(first).keys(), _shown(second).keys()
    return one == two or (_stem(first) == _stem(second) and 2 * len(one & two) >= len(one | two))


def _stem(record: Record) -> str:
    return re.split(r"[,:]", record["name"])[0]


def _table(records: Sequence[Record]) -> list[str]:
    """One line a record and one column a value; names stand in front where they differ."""
    keys = list(dict.fromkeys(key for record in records for key in _shown(record)))
    rows = [[_heading(key) for key in keys], ["---"] * len(keys)]
    rows += [[_value(key, record[key]) if key in record else "" for key in keys] for record in records]
    names = [record["name"] for record in records]
    if len(set(names)) == 1:
        return [f"{names[0]}:", "", *(f"| {' | '.join(row)} |" for row in rows)]
    return [f"| {' | '.join([_cell(first), *row])} |" for first, row in zip(["what", "---", *names], rows)]


def _shown(record: Record) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _HIDDEN}


def _values(record: Record) -> str:
    """All values in one line."""
    return ", ".join(f"{_heading(key)} {_value(key, value)}" for key, value in _shown(record).items())


def _heading(key: str) -> str:
    """A value's name for people: ``ms_per_image`` is "ms per image", ``copy_gb_per_s`` "copy GB/s"."""
    for part, word in _WORDS.items():
        key = re.sub(rf"(^|_){part}(?=_|$)", rf"\g<1>{word}", key)
    return key.replace("_", " ")


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, float) and _PERCENT.search(key):
        return f"{100 * value:.2f} %" if 0.99 < value < 1 else f"{rounded(100 * value)} %"
    if isinstance(value, float):
        return rounded(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 100_000 else str(value)
    if isinstance(value, (list, tuple)):
        return "; ".join(_value(key, part) for part in value)
    if isinstance(value, Mapping):
        return "; ".join(f"{part} {_value(key, one)}" for part, one in value.items())
    return _cell(value)


def rounded(value: float, digits: int = _DIGITS) -> str:
    """`value` with so many digits that count: 1.87, 0.0331, 12,300; 1.2e-07 where the number is very small."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        return f"{value:.{digits - 1}e}"
    kept = round(value, digits - 1 - size)
    size = math.floor(math.log10(abs(kept)))  # 99.96 is 100 now
    return f"{kept:,.{max(digits - 1 - size, 0)}f}"


def _cell(value: Any) -> str:
    """Text that fits into a cell of a table."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("results", type=Path, nargs="+", help="results.json of one or several runs, the oldest first")
    flags.add_argument("--write", type=Path, help="the file to write; default: print")
    return flags


def main() -> None:
    """Write the tables of results that are there."""
    args = parser().parse_args()
    text = markdown(*(read_json(path) for path in args.results))
    if args.write:
        write_atomic(args.write, lambda file: file.write(text.encode()))
    else:
        print(text, end="")


if __name__ == "__main__":
    run(main)
