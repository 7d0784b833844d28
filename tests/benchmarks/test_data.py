"""The data benchmark on a few images."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import data


@pytest.mark.parametrize("views", [1, 10])
def test_the_last_line_is_one_json_object(views, tmp_path, monkeypatch, capsys):
    flags = ["--images", "40", "--views", str(views), "--tokens", "576", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["data.py", *flags])
    monkeypatch.setattr(data.torch, "set_num_threads", lambda _: None)
    data.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["speedup"] == pytest.approx(result["packed"]["warm"] / result["files"]["warm"], abs=0.01)
    assert result["files"]["files"] == 80 and result["packed"]["files"] == 14 * 3 + 2  # 14 shards of up to 3 images
    assert result["files"]["megabytes"] > 40 * views * 576 * 8 / 1e6
    assert list(tmp_path.iterdir()) == []


def test_reading_stops_after_the_seconds_given():
    assert data.samples_per_second(list(range(10)), iter(lambda: 0, 1), seconds=0.01) > 0


def test_both_layouts_hold_the_same_codes(tmp_path):
    data.write_both(tmp_path, images=20, views=2, tokens=5)
    one, two = (data.open_codes(tmp_path / layout) for layout in ("files", "packed"))
    assert type(one) is not type(two)
    for i in range(20):
        assert (one.view(i, 1)[0] == two.view(i, 1)[0]).all() and one.view(i, 0)[1] == two.view(i, 0)[1]
