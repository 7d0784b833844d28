"""The evaluator: its lines, its files, what it says of the sets, and that nothing depends on how it was run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations import inception_weights
from evaluations.c2i import evaluation
from evaluations.c2i.evaluator import main, parser
from evaluations.inception import Inception
from evaluations.metrics import frechet_distance_of_features, inception_score, precision_recall
from tests.commands import shell
from tests.evaluations.test_features import ColourNetwork
from tests.golden import FOLDER
from utils.errors import run
from utils.files import sha256_of

GRAPH = FOLDER / "evaluator" / "inception_2048.pb"
NAMES = ["Inception Score", "FID", "sFID", "Precision", "Recall"]


@pytest.fixture(scope="module")
def pictures() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "evaluator" / "pictures.npz") as stored:
        return {"ref": stored["ref"][:24], "sample": stored["sample"][:32]}


@pytest.fixture
def sets(tmp_path, monkeypatch, pictures) -> tuple[Path, Path]:
    monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path / "cache"))
    return save_sets(tmp_path, pictures)


def save_sets(folder: Path, pictures: dict[str, np.ndarray]) -> tuple[Path, Path]:
    np.savez(folder / "ref.npz", pictures["ref"])
    np.savez(folder / "a.npz.samples.npz", pictures["sample"])
    return folder / "ref.npz", folder / "a.npz.samples.npz"


class Counting(ColourNetwork):
    """A cheap network that counts what it sees, and may be called Inception."""

    label, comparable = "colours abc", True
    seen = 0

    def __call__(self, pictures):
        self.seen += len(pictures)
        return super().__call__(pictures)


@pytest.fixture
def cheap(monkeypatch) -> Counting:
    network = Counting()
    monkeypatch.setattr(evaluation, "load_network", lambda *_: network)
    monkeypatch.setattr(evaluation, "find_weights", lambda _: GRAPH)
    return network


def evaluate(*words: object) -> dict:
    return evaluation.evaluate(parser().parse_args([str(word) for word in words]))


def close(got: dict, want: dict, tolerance: float) -> None:
    assert got["metrics"] == pytest.approx(want["metrics"], rel=tolerance)


# --- the whole command with the real network


@pytest.fixture(scope="module")
def real(tmp_path_factory, pictures) -> tuple[Path, Path, dict]:
    """Sets and the report of one process, with the fixture's weights in the place of the published ones."""
    folder = tmp_path_factory.mktemp("real")
    reference, samples = save_sets(folder, pictures)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_weights, "SHA256", sha256_of(GRAPH))
        report = evaluate(reference, samples, "--weights", GRAPH, "--no-cache", "--device", "cpu")
    return reference, samples, report


def test_metrics_equal_those_of_all_features_in_memory(real, pictures):
    network = Inception(GRAPH)
    reference, samples = (network(torch.from_numpy(pictures[name])) for name in ("ref", "sample"))
    want = [
        inception_score(samples["probabilities"]),
        frechet_distance_of_features(reference["pool"], samples["pool"]),
        frechet_distance_of_features(reference["spatial"], samples["spatial"]),
        *precision_recall(reference["pool"], samples["pool"]),
    ]
    assert list(real[2]["metrics"]) == NAMES
    assert list(real[2]["metrics"].values()) == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_two_processes_equal_one(real, tmp_path):
    """And unknown weights, which these are for a process of its own, are never said to give an FID."""
    reference, samples, one = real
    out = tmp_path / "two.json"
    flags = ["--weights", GRAPH, "--no-cache", "--device", "cpu", "--batch-size", 7, "--json", out, "--no-txt"]
    said = shell.run("evaluations/c2i/evaluator.py", reference, samples, *flags, processes=2)
    two = json.loads(out.read_text())
    assert two["run"]["processes"] == 2
    assert list(two["metrics"].values()) == pytest.approx(list(one["metrics"].values()), rel=1e-5)
    assert not {"FID", "sFID"} & set(two["metrics"]) and not two["comparable_with_published_fid"]
    assert not re.search(r"^s?FID", said, re.MULTILINE)
    assert "so the distances are no FID and compare with nothing" in said
    assert said.count("Computing evaluations...") == 1


# --- what it prints and writes


def test_the_established_lines_in_their_order(sets, cheap, capsys):
    report = evaluate(*sets)
    out = capsys.readouterr().out.splitlines()
    text = sets[1].with_name("a.npz.samples.txt")  # the suffix alone is replaced
    lines = [f"{name}: {report['metrics'][name]}" for name in NAMES]
    expected = [
        "computing reference batch activations...",
        "computing/reading reference batch statistics...",
        "computing sample batch activations...",
        "computing/reading sample batch statistics...",
        "Computing evaluations...",
        *lines,
        f"writing to {text}",
    ]
    assert [line for line in out if line in expected] == expected
    assert text.read_text().splitlines() == lines


def test_the_output_names_what_was_compared(sets, cheap, capsys):
    evaluate(*sets)
    out, err = capsys.readouterr()
    digest = sha256_of(sets[0])
    assert f"reference: {sets[0]} (sha256 {digest[:16]}, 24 pictures 64x64)" in out
    assert f"samples: {sets[1]} (32 pictures 64x64); labels unknown" in out
    assert "network: colours abc; pictures resized to 299x299 by TensorFlow-1 bilinear" in out
    assert "warning: 32 samples; published numbers use 50,000" in err
    report = json.loads(sets[1].with_name("a.npz.samples.evaluation.json").read_text())
    assert report["reference"]["sha256"] == digest and report["reference"]["pictures"] == 24
    assert report["samples"]["resolution"] == [64, 64] and report["samples"]["labels"] == "unknown"
    assert report["network"]["backend"] == "torch" and report["network"]["weights_sha256"] == sha256_of(GRAPH)
    assert report["comparable_with_published_fid"] and report["distances"] == "float32"
    assert any("published numbers use 50,000" in warning for warning in report["warnings"])


def test_files_where_they_are_asked_for(sets, cheap, tmp_path):
    evaluate(*sets, "--json", tmp_path / "x" / "out.json", "--no-txt")
    assert (tmp_path / "x" / "out.json").is_file()
    assert not list(tmp_path.glob("*.txt")) and not list(tmp_path.glob("*.evaluation.json"))


def test_folders_and_compressed_files_give_the_same_numbers(sets, cheap, pictures, tmp_path):
    want = evaluate(*sets)
    np.savez_compressed(tmp_path / "c.npz", pictures["sample"])
    (tmp_path / "folder").mkdir()
    for i, picture in enumerate(pictures["sample"]):
        Image.fromarray(picture).save(tmp_path / "folder" / f"{i:06d}.png")
    for samples in (tmp_path / "c.npz", f"{tmp_path / 'folder'}/"):
        close(evaluate(sets[0], samples), want, 1e-9)
    assert (tmp_path / "folder.txt").is_file() and (tmp_path / "folder.evaluation.json").is_file()


def test_the_batch_size_changes_nothing(sets, cheap):
    close(evaluate(*sets, "--batch-size", 5), evaluate(*sets), 1e-9)


def test_the_reference_is_measured_once(sets, cheap, pictures):
    first = evaluate(*sets)
    assert cheap.seen == 24 + 32
    again = evaluate(*sets)
    assert cheap.seen == 24 + 32 + 32
    close(again, first, 1e-9)
    assert again["reference"] == first["reference"]
    evaluate(*sets, "--no-cache")
    assert cheap.seen == 24 + 32 + 32 + 56
    cheap.label = "colours of other weights"  # another network has other statistics
    evaluate(*sets)
    assert cheap.seen == 24 + 32 + 32 + 56 + 56
    np.savez(sets[0], pictures["ref"][::-1])  # another file under the same name too
    changed = evaluate(*sets)
    assert cheap.seen == 24 + 32 + 32 + 56 + 56 + 56
    assert changed["reference"]["sha256"] != first["reference"]["sha256"]


def test_a_damaged_cache_is_measured_again(sets, cheap, tmp_path):
    first = evaluate(*sets)
    (kept,) = (tmp_path / "cache" / "references").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    close(evaluate(*sets), first, 1e-9)
    assert cheap.seen == 2 * (24 + 32)


def test_statistics_in_the_file_take_the_place_of_those_of_its_pictures(sets, cheap, pictures, tmp_path):
    want = evaluate(*sets)
    seen = ColourNetwork()(torch.from_numpy(pictures["ref"]))
    arrays = {}
    for suffix, name in (("", "pool"), ("_s", "spatial")):
        rows = seen[name].double().numpy()
        arrays |= {f"mu{suffix}": rows.mean(0), f"sigma{suffix}": np.cov(rows, rowvar=False)}
    np.savez(tmp_path / "virtual.npz", arr_0=pictures["ref"][:10], **arrays)
    got = evaluate(tmp_path / "virtual.npz", sets[1])
    assert got["reference"]["stored_statistics"] and got["reference"]["pictures"] == 10
    for name in ("Inception Score", "FID", "sFID"):
        assert got["metrics"][name] == pytest.approx(want["metrics"][name], rel=1e-6)
    few, many = (ColourNetwork()(torch.from_numpy(pictures[n]))["pool"] for n in ("ref", "sample"))
    precision = precision_recall(few[:10], many)
    assert (got["metrics"]["Precision"], got["metrics"]["Recall"]) == precision


def test_bias_on_request(sets, cheap, capsys):
    report = evaluate(*sets, "--fid-infinity", "--fid-infinity-from", 12, "--bootstrap", 5)
    out = capsys.readouterr().out
    infinity, interval = report["bias"]["infinity"], report["bias"]["bootstrap"]
    assert infinity["from"] == 12 and infinity["distance"] < report["metrics"]["FID"]
    assert interval["low"] < report["metrics"]["FID"] < interval["high"]
    assert f"FID at infinitely many samples: {infinity['distance']} +- " in out
    assert f"FID, 95% bootstrap interval: {interval['low']} to" in out
    assert evaluate(*sets)["bias"] == {}


def test_splits_and_distances_as_asked_for(sets, cheap, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "precision_recall", lambda *_, half: asked.append(half) or (0.5, 0.5))
    report = evaluate(*sets, "--half-distances", "--shuffle-seed", 3)
    assert asked == [True] and report["distances"] == "float16"
    assert report["inception_score_splits"] == {"size": 5000, "shuffle_seed": 3, "splits": 1, "deviation": 0.0}


# --- bad input


def fails(*words: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        evaluate(*words)


def test_too_few_pictures(sets, cheap, pictures, tmp_path):
    np.savez(tmp_path / "few.npz", pictures["sample"][:3])
    fails(sets[0], tmp_path / "few.npz", match="few.npz holds 3 pictures; at least 4 are needed")
    fails(tmp_path / "few.npz", sets[1], match="few.npz holds 3 pictures; at least 4 are needed")


def test_pictures_that_were_scaled_to_one(sets, cheap, pictures, tmp_path):
    np.savez(tmp_path / "dark.npz", (pictures["sample"] / 255).astype(np.uint8))
    fails(sets[0], tmp_path / "dark.npz", match=r"no value above 1.*expected values 0\.\.255")


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"mu": np.zeros(8)}, "holds mu but not sigma, mu_s, sigma_s"),
        (
            {"mu": np.zeros(2048), "sigma": np.eye(2048, dtype=np.float32), "mu_s": np.zeros(4), "sigma_s": np.eye(4)},
            r"holds mu \(2048,\) .*, but the network \(colours abc\) has 8 features",
        ),
        (
            {"mu": np.full(8, np.nan), "sigma": np.eye(8), "mu_s": np.zeros(4), "sigma_s": np.eye(4)},
            "means and covariances must be finite",
        ),
    ],
)
def test_a_reference_that_does_not_fit(sets, cheap, pictures, tmp_path, arrays, reason):
    np.savez(tmp_path / "other.npz", arr_0=pictures["ref"], **arrays)
    fails(tmp_path / "other.npz", sets[1], match=reason)


def test_a_mistake_is_one_sentence_and_exit_code_2(sets, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluator.py", str(sets[0]), "gone.npz", "--weights", str(GRAPH)])
    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: there is no file gone.npz")
