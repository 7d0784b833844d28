"""Reads tests/goldens: inputs and outputs of the established LlamaGen system, to be matched number by number.

A test takes its cases with ``@golden.cases("gpt.train")``, builds the model, fills it with ``case.fill(model)`` and
ends with ``case.check(outputs)``, which compares every stored output and every expected plain number.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "goldens"
_UNCHANGED_NAMES = ("codebook_used", "num_batches_tracked", "initialized", "f")


@cache
def _entries() -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads((FOLDER / "index.json").read_text())["goldens"]}


def kinds() -> set[str]:
    """Every kind of golden in the index."""
    return {entry["kind"] for entry in _entries().values()}


def cases(*wanted: str) -> Callable:
    """Parametrize a test over all goldens of the given kinds; the test receives a `Case` named ``case``."""
    names = [name for name, entry in _entries().items() if entry["kind"] in wanted]
    assert names, f"no golden of kind {wanted}"
    return pytest.mark.parametrize("case", [pytest.param(name, id=name) for name in names], indirect=True)


@dataclass
class Case:
    """One golden. `tensors` holds its stored inputs, `outputs` its stored outputs."""

    name: str
    entry: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str) -> Case:
        entry = _entries()[name]
        stored = load_file(FOLDER / entry["file"]) if entry.get("file") else {}
        pick = lambda prefix: {k[len(prefix) :]: v for k, v in stored.items() if k.startswith(prefix)}  # noqa: E731
        return cls(name, entry, pick("in."), pick("out."))

    @property
    def config(self) -> dict[str, Any]:
        return self.entry["config"]

    @property
    def params(self) -> dict[str, Any]:
        return self.entry["params"]

    @property
    def expect(self) -> dict[str, Any]:
        return self.entry["expect"]

    def fill(self, model: nn.Module, role: str = "model") -> nn.Module:
        """Give `model` the weights of this golden (made by the recipe and checked by their fingerprint)."""
        source = self.entry["weights"][role]
        seed = source.get("recipe_base_seed", source.get("base_seed"))
        state = recipe_weights(model.state_dict(), seed, also_numbered=source.get("drop_keys", ()))
        if source.get("stored_dtype") == "float16":
            state = {k: v.half().float() if v.is_floating_point() else v for k, v in state.items()}
        elif "fingerprint_sha256" in source:
            assert fingerprint(state) == source["fingerprint_sha256"], f"{self.name}: the recipe gave other weights"
        model.load_state_dict(state)
        return model

    def check(self, outputs: Mapping[str, Any], skip: tuple[str, ...] = ()) -> None:
        """Compare with everything stored. Names in `skip` (a known upstream defect) are left out."""
        wanted = {*self.outputs, *self.expect} - set(skip)
        missing = wanted - set(outputs)
        assert not missing, f"{self.name}: the test computed no {sorted(missing)}"
        for name in sorted(set(self.outputs) - set(skip)):
            _compare_tensor(f"{self.name}.{name}", outputs[name], self.outputs[name], self.entry["outputs"][name])
        for name in sorted(set(self.expect) - set(skip)):
            _compare_plain(f"{self.name}.{name}", outputs[name], self.expect[name], self.entry["expect_tolerance"])


def recipe_weights(
    template: Mapping[str, Tensor], base_seed: int, also_numbered: Iterable[str] = ()
) -> dict[str, Tensor]:
    """The weight-fill recipe of the goldens: key number k gets normals of seed base_seed + k, scaled by its role.

    Keys in `also_numbered` take a number although the model at hand does not have them.
    """
    keys = sorted({*template, *also_numbered})
    return {key: _recipe_tensor(key, template[key], base_seed + k) for k, key in enumerate(keys) if key in template}


def _recipe_tensor(key: str, old: Tensor, seed: int) -> Tensor:
    last = key.rsplit(".", 1)[-1]
    if not old.is_floating_point() or last in _UNCHANGED_NAMES or "scaling_layer." in key:
        return old.detach().clone()
    z = np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(old.shape), dtype=np.float32)
    if last in ("bias", "running_mean", "loc"):
        z = np.float32(0.02) * z
    elif last in ("running_var", "scale") or old.ndim == 1:
        z = np.float32(1) + np.float32(0.02) * z
    else:
        z = z * np.float32(1 / math.sqrt(math.prod(old.shape[1:])))
        if any(part.startswith("lin") and part[3:].isdigit() for part in key.split(".")):
            z = np.abs(z)
    return torch.from_numpy(np.ascontiguousarray(z, dtype=np.float32).reshape(tuple(old.shape)))


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the raw little-endian bytes of all tensors in sorted key order."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(state[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _compare_tensor(where: str, got: Any, want: Tensor, entry: Mapping[str, Any]) -> None:
    got = torch.as_tensor(got).detach()
    assert tuple(got.shape) == tuple(want.shape), f"{where}: shape {tuple(got.shape)}, golden {tuple(want.shape)}"
    if want.dtype in (torch.float16, torch.float32, torch.float64, torch.bfloat16):
        difference = (got.double() - want.double()).abs()
        limit = entry["atol"] + entry["rtol"] * want.double().abs()
        same = (difference <= limit) | (got.double() == want.double())
        assert same.all(), f"{where}: {int((~same).sum())} values differ, by at most {difference[~same].max():.3g}"
    elif entry["atol"]:
        assert (got.long() - want.long()).abs().max() <= entry["atol"], where
    else:
        assert torch.equal(got.to(want.dtype), want), where


def _compare_plain(where: str, got: Any, want: Any, tolerance: Mapping[str, float]) -> None:
    if isinstance(want, dict):
        for key, value in want.items():
            _compare_plain(f"{where}.{key}", got[key], value, tolerance)
    elif isinstance(want, list):
        assert len(got) == len(want), f"{where}: {len(got)} entries, golden {len(want)}"
        for i, value in enumerate(want):
            _compare_plain(f"{where}[{i}]", got[i], value, tolerance)
    elif isinstance(want, float):
        limit = tolerance["atol"] + tolerance["rtol"] * abs(want)
        assert got == want or abs(float(got) - want) <= limit, f"{where}: {got}, golden {want}"
    else:
        assert got == want, f"{where}: {got!r}, golden {want!r}"
