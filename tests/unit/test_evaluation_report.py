"""What the report holds."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from flam_core.evaluation.evaluate import Evaluation, evaluate
from flam_core.evaluation.pictures import curves_png, horizon_png, rollout_gif, rollout_png, slots_png
from flam_core.evaluation.report import verdict, write_report
from flam_core.evaluation.rollout import evaluate_rollouts
from flam_core.evaluation.stats import error_key
from tests.evaluation_fixture import CONFIG, Copier, Oracle, context, grid_clips, noise, small_flam, stub

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(small_flam(), grid_clips(6, 1), grid_clips(6, 2), grid_clips(6, 3), CONFIG, 0, grid_clips(4, 4, 12))


def documented_keys() -> set[str]:
    """First column of the tables in docs/metrics.md that name a whole key of metrics.json, but for standard errors."""
    of_json, _, _ = DOCS.read_text().partition("## What Prometheus gets")
    keys = re.findall(r"^\| `([a-z0-9_/@<>]+[a-z0-9>])` \|", of_json, re.MULTILINE)
    return {key for key in keys if "_se" not in key}


def general(key: str) -> str:
    """A key as the documentation writes it."""
    at = "@<entity>" if key.startswith(("probe/", "action_probe/", "leakage")) else "@k"
    return re.sub(r"^(slots|actions|leakage)/\d+/", r"\1/<i>/", re.sub(r"@\d+$", at, key))


def test_every_key_is_documented_and_every_documented_key_exists(evaluation: Evaluation, tmp_path: Path) -> None:
    write_report(tmp_path, evaluation.rollouts, evaluation.metrics, {}, evaluation.notes, evaluation.estimates)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == evaluation.metrics
    assert list(written) == sorted(written)
    weights_missing = {key for key in documented_keys() if key.startswith(("lpips/", "fvd/"))}
    assert len(weights_missing) == 12
    # The grid's actions are classes, and the model's latent actions are not discrete.
    values_missing = {"action_probe/r2", "action_probe/r2@<entity>", "actions/perplexity"}
    plain = {general(key) for key in written if "_se@" not in key and not key.endswith("_se")}
    assert plain == documented_keys() - weights_missing - values_missing
    for source in ("rollout", "copy", "shuffled", "ceiling"):
        assert {f"{source}/{name}@{k}" for name in ("psnr", "ssim") for k in (1, 2, 3)} <= set(written)


def test_spreads_are_written_beside_the_numbers(evaluation: Evaluation, tmp_path: Path) -> None:
    write_report(tmp_path, evaluation.rollouts, evaluation.metrics, {}, evaluation.notes, evaluation.estimates)
    metrics, rows = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("metrics", "intervals"))
    assert {"rollout/psnr@1", "delta_psnr/prior@3", "dci/i", "action_probe/gain", "leakage", "horizon/psnr@5"} <= set(
        rows
    )
    for key, row in rows.items():
        assert set(row) == {"mean", "se", "low", "high", "n"}
        assert row["mean"] == metrics[key]
        assert row["se"] == metrics[error_key(key)]
        assert row["n"] in (4, 6)
        assert row["low"] <= row["high"]
    assert set(metrics) == set(rows) | {error_key(key) for key in rows} | {k for k in metrics if k.startswith("slots/")}


def test_report_is_self_contained_and_escapes_what_it_shows(evaluation: Evaluation, tmp_path: Path) -> None:
    info = {"recipe": '<script>alert("x")</script>', "a & b": "multigrid"}
    page = write_report(tmp_path / "deep" / "er", evaluation.rollouts, evaluation.metrics, info, ["<i>odd</i>"])
    assert sorted(p.name for p in page.parent.iterdir()) == [
        *("curves.png", "failures.png", "horizon.png", "intervals.json", "metrics.json", "report.html"),
        *("rollout.gif", "rollout.png", "slots.png"),
    ]
    text = page.read_text()
    assert text.count("data:image/") == 6
    text = re.sub(r"data:image/(png|gif);base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//|url\(|@import|<link|<script|<i>", text)
    assert set(re.findall(r'src="([^"]*)"', text)) == {""}
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in text
    assert "<td>a &amp; b</td>" in text
    assert "&lt;i&gt;odd&lt;/i&gt;" in text
    for key in (
        "rollout/psnr@1",
        "rollout/psnr@3",
        "copy/psnr@3",
        "shuffled/psnr@3",
        "ceiling/psnr",
        "dci/d",
        "leakage",
    ):
        assert f"<code>{key}</code>" in text
    assert "In use" in text


def test_report_without_ground_truth_or_masks_says_so(tmp_path: Path) -> None:
    for name in ("slots.png", "horizon.png"):
        (tmp_path / name).write_bytes(b"of an earlier report")
    result = evaluate_rollouts(context(stub(Oracle, factors=1), noise()))
    text = write_report(tmp_path, result, result.metrics, {}, ["No DCI: no positions."]).read_text()
    assert "D, C and I are missing" in text
    assert "No DCI: no positions." in text
    assert not (tmp_path / "slots.png").exists()
    assert not (tmp_path / "horizon.png").exists()
    assert "What each slot looks at" not in text


def test_nothing_is_written_if_a_number_is_not_finite(evaluation: Evaluation, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path / "r", evaluation.rollouts, evaluation.metrics | {"dci/d": float("nan")}, {})
    assert not (tmp_path / "r").exists()


def test_verdict_tells_what_the_numbers_say() -> None:
    perfect = evaluate_rollouts(context(stub(Oracle), noise()))
    said = " ".join(verdict(perfect, perfect.metrics))
    assert "better than repeating" in said
    assert "the latent actions matter" in said
    copier = evaluate_rollouts(context(stub(Copier), noise()))
    said = " ".join(verdict(copier, copier.metrics))
    assert "no better or worse than repeating" in said
    assert "do not seem to matter" in said
    blurred = copier.metrics | {"rollout/psnr@3": 99.0, "rollout/ssim@3": -0.5}
    assert "blurs" in " ".join(verdict(copier, blurred))


def test_pictures_open_and_are_equal_for_equal_results(evaluation: Evaluation) -> None:
    film = Image.open(io.BytesIO(rollout_gif(evaluation.rollouts)))
    assert getattr(film, "n_frames", 1) == 4
    assert film.width > 4 * 224
    for first, second in (
        (rollout_png(evaluation.rollouts), rollout_png(evaluation.rollouts)),
        (slots_png(evaluation.rollouts), slots_png(evaluation.rollouts)),
        (curves_png(evaluation.metrics), curves_png(evaluation.metrics)),
        (horizon_png(evaluation.metrics), horizon_png(evaluation.metrics)),
    ):
        assert first == second
        assert b"matplotlib.org" not in first
        assert Image.open(io.BytesIO(first)).width > 500
