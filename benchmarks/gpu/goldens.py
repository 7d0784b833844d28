"""The published numbers on this device: the golden tests of tests/, with all their inputs and models moved there.

The tests are those of the CPU, at ten times their tolerances; TF32 is off. Numbers that come from torch's global
generator are left out on a GPU, whose generator is another one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.context import Context

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    *("autoregressive/models/test_gpt.py", "autoregressive/models/test_generate.py"),
    *("autoregressive/models/test_sampling.py", "autoregressive/models/test_rope.py"),
    *("autoregressive/models/test_condition.py", "autoregressive/models/test_text_condition.py"),
    *("tokenizer/test_vq_model.py", "tokenizer/test_quantizer.py", "tokenizer/test_vqgan.py"),
    *("tokenizer/test_losses.py", "tokenizer/test_discriminators.py", "tokenizer/test_lpips.py"),
]
TINY_FILES = [FILES[3], FILES[7]]
TOLERANCE = 10.0  # times that of the tests on the CPU
LARGE = ("full_size", "gpt_b_", "vqgan_imagenet", "vqgan_openimage")  # in the names of tests that take seconds
LARGE_S, RESERVE_S = 15.0, 5.0  # seconds that must be left for a test of `LARGE`, and for another one


def run(context: Context) -> None:
    """Run the golden tests, one check for each kind of golden, then the Inception network against TensorFlow."""
    with exact_float32():
        with context.attempt("golden tests"):
            run_tests(context)
        with context.attempt("inception"):
            if context.has_time("inception", RESERVE_S):
                check_inception(context)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Products and convolutions in full float32 inside."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def run_tests(context: Context) -> None:
    """Run the golden tests on the device; a kind of golden passes if none of its tests fails."""
    import pytest

    plugin = OnDevice(context)
    files = [str(ROOT / "tests" / name) for name in (TINY_FILES if context.tiny else FILES)]
    options = ["-q", "--override-ini=addopts=", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={ROOT}"]
    with plugin.everything_there():
        code = pytest.main([*options, *files], plugins=[plugin])
    context.check("golden tests were collected", code in (0, 1) and bool(plugin.outcomes), exit_code=int(code))
    for kind, outcomes in plugin.outcomes.items():
        failed = {name: text for name, outcome, text in outcomes if outcome == "failed"}
        skipped = {name: text for name, outcome, text in outcomes if outcome == "skipped"}
        passed = len(outcomes) - len(failed) - len(skipped)
        if failed or passed:
            values = {"passed_tests": passed, "skipped_tests": skipped, "failed": failed}
            context.check(kind, not failed, **values, tolerance_factor=TOLERANCE)
        else:
            context.record(kind, skipped="; ".join(sorted(set(skipped.values()))))


class OnDevice:
    """A pytest plugin: keeps the tests of goldens alone, runs them on the device, and notes how each ended.

    `outcomes`: kind of golden -> (name of the golden, "passed", "failed" or "skipped", why) of each of its tests.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.outcomes: dict[str, list[tuple[str, str, str]]] = defaultdict(list)

    @contextmanager
    def everything_there(self) -> Iterator[None]:
        """Stored inputs are moved to the device; results are compared on the CPU, with the wider tolerance."""
        from tests import golden

        load, recipe, compare = golden.Case.load, golden.recipe_weights, golden._compare_tensor

        def load_there(name: str) -> golden.Case:
            case = load(name)
            case.tensors = {key: value.to(self.context.device) for key, value in case.tensors.items()}
            case.entry = wider(case.entry)
            return case

        def recipe_here(template: dict[str, Tensor], *args: Any, **named: Any) -> dict[str, Tensor]:
            return recipe({key: value.cpu() for key, value in template.items()}, *args, **named)

        def compare_here(where: str, got: Any, want: Tensor, entry: dict[str, Any]) -> None:
            with torch.device("cpu"):
                compare(where, torch.as_tensor(got).detach().cpu(), want.cpu(), entry)

        changed = {"recipe_weights": recipe_here, "_compare_tensor": compare_here}
        with mock.patch.multiple(golden, **changed), mock.patch.object(golden.Case, "load", load_there):
            yield

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Drop the tests that compare with no golden, and the one of names and shapes alone; the large ones go last."""
        items[:] = [item for item in items if (entry := _entry(item)) is not None and entry["kind"] != "keys"]
        items.sort(key=_is_large)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Leave out what cannot be equal here, and what there is no time for."""
        import pytest

        if self.context.seconds_left < (LARGE_S if _is_large(item) else RESERVE_S):
            pytest.skip("no time was left")
        if self.context.device.type == "cuda" and _is_seeded(item):
            pytest.skip("the numbers are from the CPU's generator")

    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool:
        """Run the test with everything it makes on the device."""
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        with torch.device(self.context.device):
            pyfuncitem.obj(**arguments)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the end of a test, or why it did not begin."""
        if report.when != "call" and report.passed:
            return
        properties = dict(report.user_properties)
        why = "" if report.passed else _reason(report)
        self.outcomes[properties.get("kind", "unknown kind")].append((report.nodeid, report.outcome, why))

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Tell the reports which kind of golden this is."""
        if (entry := _entry(item)) is not None:
            item.user_properties.append(("kind", entry["kind"]))


def wider(value: Any) -> Any:
    """A golden's index entry, or a part of it, with every "atol" and "rtol" in it multiplied by `TOLERANCE`."""
    if not isinstance(value, dict):
        return value
    return {key: TOLERANCE * part if key in ("atol", "rtol") else wider(part) for key, part in value.items()}


def _entry(item: pytest.Item) -> dict[str, Any] | None:
    """The index entry of a test's golden; None for a test without one."""
    from tests import golden

    name = getattr(getattr(item, "callspec", None), "params", {}).get("case")
    return golden._entries().get(name) if isinstance(name, str) else None


def _is_large(item: pytest.Item) -> bool:
    return any(word in item.name for word in LARGE)


def _is_seeded(item: pytest.Item) -> bool:
    entry = _entry(item)
    return entry is not None and "seed" in json.dumps(entry.get("params", {}))


def _reason(report: pytest.TestReport) -> str:
    """The last line of a failure, or why a test was skipped."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).splitlines()[0][:300]


def check_inception(context: Context) -> None:
    """The Inception network of the fixture graph against what TensorFlow computed with it, at 1e-3 of the largest."""
    from evaluations.inception import Inception

    folder = ROOT / "tests/goldens/evaluator"
    if not (folder / "tf_outputs.npz").is_file():
        context.record("inception", skipped=f"there is no {folder / 'tf_outputs.npz'}")
        return
    network = Inception(folder / "inception_2048.pb", context.device)
    with np.load(folder / "pictures.npz") as images, np.load(folder / "tf_outputs.npz") as expected:
        for name in ("odd",) if context.tiny else ("odd", "sq299", "big"):
            found = network(torch.from_numpy(images[name]))
            for layer in ("pool", "spatial"):
                want = torch.from_numpy(expected[f"{name}_{layer}"])
                difference = float((found[layer].cpu() - want).abs().max() / want.abs().max())
                context.check(f"inception {name} {layer}", difference < 1e-3, largest_relative_difference=difference)
