"""Results of the GPU program as one JSON object and as Markdown tables."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def summary(out: Path, device: torch.device) -> dict[str, Any]:
    """The records of `out`/records.jsonl under what they were measured with."""
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return {"environment": environment(device), "command": " ".join(sys.argv), "records": records}


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, driver, versions and commit; None where something cannot be told."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "memory_gb": round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1) if cuda else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _said("git", "rev-parse", "--short", "HEAD"),
    }


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown(results: dict[str, Any]) -> str:
    """Checks and measurements, a table for each section."""
    facts = results["environment"]
    lines = [f"# GPU results: {facts['device']}", "", ", ".join(f"{k} {v}" for k, v in facts.items() if v), ""]
    failed = [r for r in results["records"] if r.get("passed") is False]
    checks = [r for r in results["records"] if "passed" in r]
    lines += [f"{len(checks) - len(failed)} of {len(checks)} checks passed.", ""]
    lines += [f"- failed: {r['section']}: {r['name']}: {r.get('error', _values(r))}" for r in failed]
    for section in dict.fromkeys(r["section"] for r in results["records"]):
        lines += ["", f"## {section}", "", *_table([r for r in results["records"] if r["section"] == section])]
    return "\n".join(lines) + "\n"


def _table(records: list[dict[str, Any]]) -> list[str]:
    """One line a record: name, and its values."""
    return ["| what | values |", "|---|---|", *(f"| {r['name']} | {_values(r)} |" for r in records)]


def _values(record: dict[str, Any]) -> str:
    hidden = {"section", "name", "where"}
    shown = {k: v for k, v in record.items() if k not in hidden}
    texts = (f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
    return ", ".join(texts).replace("\n", " ")
