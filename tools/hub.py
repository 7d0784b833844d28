"""Saving a model in the hub's format, checking what was saved, and pushing it: what the push tools share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

RELEASED = "FoundationVision/LlamaGen"
_HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError)


def add_hub_args(parser: argparse.ArgumentParser, repo_id: str) -> None:
    """Where the model goes."""
    group = parser.add_argument_group("hub")
    group.add_argument("--repo-id", help=f"repository of the hub to push to; the default is {repo_id}")
    group.add_argument("--output-dir", type=Path, default=Path("hf_models"), help="a folder for the model goes in here")
    group.add_argument(
        "--push", action=argparse.BooleanOptionalAction, default=True, help="push it; --no-push writes the folder alone"
    )


def publish(model: Any, repo_id: str, args: argparse.Namespace) -> Path:
    """Write `model` to a folder, check that it comes back bit for bit, and push it with --push. Returns the folder.

    Raises:
        ValueError: when the hub refuses or cannot be reached; the folder stays.
    """
    folder = args.output_dir / repo_id.split("/")[-1]
    model.save_pretrained(folder)
    _require_equal(model, type(model).from_pretrained(folder), str(folder))
    print(f"the model is in {folder}, checked by loading it again")
    if args.push:
        try:
            model.push_to_hub(repo_id)
            _require_equal(model, type(model).from_pretrained(repo_id), repo_id)
        except _HUB_ERRORS as error:
            raise ValueError(
                f"could not push to {repo_id} ({_first_line(error)}); log in with `hf auth login`, check that you may "
                f"write there or give --repo-id; the model is in {folder}"
            ) from error
        print(f"pushed to https://huggingface.co/{repo_id}")
    return folder


def _require_equal(model: Any, loaded: Any, place: str) -> None:
    other = loaded.state_dict()
    for name, value in model.state_dict().items():
        if not torch.equal(value, other[name].to(value.dtype)):
            raise ValueError(f"{place} does not hold the weights that were saved: {name} differs")


def released(file: str) -> str:
    """The local path of a file of the released models, downloaded if need be.

    Raises:
        ValueError: when it cannot be had.
    """
    try:
        return hf_hub_download(RELEASED, file)
    except _HUB_ERRORS as error:
        raise ValueError(
            f"could not download {file} of {RELEASED} ({_first_line(error)}); give the path of a local file"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
