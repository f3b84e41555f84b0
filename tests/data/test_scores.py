"""Tables, files and contact sheets of scores."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from v3d_jax.data import scores

TABLE = {
    "model": {"psnr": np.array([20.0, 22.0]), "lpips": np.array([0.1, 0.2])},
    "repeated": {"psnr": np.array([15.0, 17.0]), "lpips": np.array([0.3, 0.3])},
    "nearest": {"psnr": np.array([18.0, 19.0]), "lpips": np.array([0.4, 0.4])},
}


def test_table_shows_the_means():
    lines = scores.format_table(TABLE).splitlines()
    assert lines[0].split() == ["PSNR", "dB", "LPIPS"]
    assert lines[1].split() == ["model", "21.00", "0.1500"]
    assert len({len(line) for line in lines}) == 1


def test_comparison_is_with_the_better_baseline_metric_by_metric():
    compared = scores.against(TABLE, "model", ("repeated", "nearest"))
    assert compared == pytest.approx({"psnr_gain": 21.0 - 18.5, "lpips_ratio": 0.15 / 0.3})
    without = {name: {"psnr": row["psnr"]} for name, row in TABLE.items()}
    assert list(scores.against(without, "model", ("repeated",))) == ["psnr_gain"]


def test_files_hold_every_score(tmp_path):
    names = ["a, with comma", "b"]
    scores.write_csv(tmp_path / "s.csv", TABLE, names)
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[0] == {
        "object": "a, with comma", "predictor": "model", "psnr": "20.0", "lpips": "0.1",
    }  # fmt: skip
    scores.write_json(tmp_path / "s.json", TABLE, names, {"seed": 3})
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["seed"] == 3
    assert content["means"]["nearest"]["psnr"] == 18.5
    assert content["objects"][1]["scores"]["model"]["lpips"] == 0.2


def test_sheet_shows_the_input_and_six_views_predicted_over_true(tmp_path):
    truth = np.arange(18, dtype=np.uint8)[:, None, None, None] * np.ones((1, 5, 7, 3), np.uint8)
    sheet = scores.sheet(truth + 100, truth)
    cell_h, cell_w = 5 + 2 * scores.MARGIN, 7 + 2 * scores.MARGIN
    assert sheet.shape == (2 * cell_h, 7 * cell_w, 3)
    centres = sheet[cell_h // 2 :: cell_h, cell_w // 2 :: cell_w, 0]
    assert centres.tolist() == [
        [0, 100, 103, 106, 109, 112, 115],
        [255, 0, 3, 6, 9, 12, 15],
    ]
    scores.write_sheet(tmp_path, 2, "../furniture/chair (red)", sheet)
    assert [path.name for path in tmp_path.iterdir()] == ["002_furniture-chair-red.png"]
    np.testing.assert_array_equal(Image.open(tmp_path / "002_furniture-chair-red.png"), sheet)
