"""Scores of several predictors over objects: their table, their files, and contact sheets.

A table is predictor -> metric -> one score an object, the same objects and metrics everywhere.
"""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

Table = dict[str, dict[str, np.ndarray]]

# Heading, digits after the point, and whether less is better.
METRICS = {"psnr": ("PSNR dB", 2, False), "ssim": ("SSIM", 4, False), "lpips": ("LPIPS", 4, True)}
SHEET_VIEWS = 6
MARGIN = 4


def means(table: Table) -> dict[str, dict[str, float]]:
    """Every predictor's metrics averaged over the objects."""
    return {
        name: {metric: float(np.mean(values)) for metric, values in row.items()}
        for name, row in table.items()
    }


def format_table(table: Table) -> str:
    """The means as lines of text, one a predictor."""
    averages = means(table)
    metrics = _metrics(averages)
    width = max(len(name) for name in averages)
    lines = [" " * width + "".join(f"{METRICS[metric][0]:>10}" for metric in metrics)]
    for name, row in averages.items():
        cells = "".join(f"{row[metric]:>10.{METRICS[metric][1]}f}" for metric in metrics)
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines)


def against(table: Table, model: str, baselines: tuple[str, ...]) -> dict[str, float]:
    """How the model compares with the better baseline, metric by metric.

    `psnr_gain` in dB, and, where LPIPS is there, `lpips_ratio` (less than 1 is better).
    """
    averages = means(table)
    best = max(averages[name]["psnr"] for name in baselines)
    compared = {"psnr_gain": averages[model]["psnr"] - best}
    if "lpips" in averages[model]:
        least = min(averages[name]["lpips"] for name in baselines)
        compared["lpips_ratio"] = averages[model]["lpips"] / least
    return compared


def write_csv(path: Path, table: Table, names: list[str]) -> None:
    """One line an object and predictor: object, predictor, then the metrics in full precision."""
    metrics = _metrics(table)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["object", "predictor", *metrics])
        for place, name in enumerate(names):
            for predictor, row in table.items():
                writer.writerow([name, predictor, *(float(row[m][place]) for m in metrics)])


def write_json(path: Path, table: Table, names: list[str], about: dict[str, Any]) -> None:
    """`about`, the means, and every object's scores, as one JSON object."""
    objects = [
        {
            "name": name,
            "scores": {
                predictor: {metric: float(values[place]) for metric, values in row.items()}
                for predictor, row in table.items()
            },
        }
        for place, name in enumerate(names)
    ]
    content = about | {"means": means(table), "objects": objects}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sheet(
    prediction: UInt8[np.ndarray, "t h w 3"], truth: UInt8[np.ndarray, "t h w 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """The input view, then six views around the object: predicted above, true below."""
    chosen = np.arange(SHEET_VIEWS) * len(truth) // SHEET_VIEWS
    above, below = list(prediction[chosen]), list(truth[chosen])
    blank = np.full_like(truth[0], 255)
    return _grid([[truth[0], *above], [blank, *below]])


def write_sheet(folder: Path, place: int, name: str, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes a sheet as `<place>_<name>.png`, with what a file name cannot hold left out."""
    from PIL import Image

    stem = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:60]
    Image.fromarray(pixels).save(folder / f"{place:03d}_{stem}.png")


def _metrics(table: dict[str, Any]) -> list[str]:
    """The table's metrics in their usual order."""
    there = next(iter(table.values()))
    return [metric for metric in METRICS if metric in there]


def _grid(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Pictures side by side with a grey margin between them."""
    margin = ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0))
    padded = [[np.pad(cell, margin, constant_values=200) for cell in row] for row in rows]
    return np.concatenate([np.concatenate(row, axis=1) for row in padded], axis=0)
