"""The model card: what a version is, of what it was made, what its factors do, how good it is, where it fails."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from flam_core.evaluation.evaluate import Evaluation
from flam_core.evaluation.image import psnr
from flam_core.evaluation.stats import error_key
from flam_core.steering.microscope import MICROSCOPE_FILE

if TYPE_CHECKING:
    from services.training.prepare import Prepared

TAGGED = (
    *("rollout/psnr@1", "rollout/psnr@10", "copy/psnr@1", "copy/psnr@10", "ceiling/psnr"),
    *("dci/d", "dci/c", "dci/i", "action_probe/visible_accuracy", "action_probe/others_gain", "leakage", "slots/used"),
    *("actions/bits", "actions/usage", "horizon/psnr@50"),
)
"""Of the many metrics, those that a version's tags and card show."""


def model_card(prepared: Prepared, measured: Evaluation, lineage: dict[str, str]) -> str:
    """In Markdown; `rollout.png`, `failures.png`, with slots `slots.png`, and `microscope.html` lie beside it."""
    config, manifest = prepared.config, prepared.manifest
    name = f"flam-{prepared.data_name}"
    return f"""# {name}

A factored latent action world model (FLAM) with {config.model.factors} factors and {config.model.latent} latent
actions, trained without action labels by the run `{prepared.run_id}`.

- Data: {manifest.name}: {manifest.source}; licence {manifest.licence}; {manifest.frames} frames of
  {manifest.frame_size[0]}x{manifest.frame_size[1]}; manifest sha256 `{manifest.sha256}`
- Settings: recipe `{config.recipe}`, config sha256 `{config.sha256()}`, seed {config.seed}
- Made by: {"; ".join(f"{key.replace('_', ' ')} {value}" for key, value in lineage.items())}

```python
import flam_core
model = flam_core.load("models:/{name}@candidate")
```

## What it predicts

![truth, prediction, error and masks of held-out clips](rollout.png)

Measured on held-out episodes, with standard errors over episodes (docs/metrics.md says what each number means; the
run's metrics.json has all of them):

| metric | value | standard error |
|---|---|---|
{_metrics(measured)}
{_notes(measured)}
## What each factor seems to move

{_factors(measured)}{_microscope(prepared)}
## Where it fails

The held-out clips that it predicts worst:

{_failures(measured)}

![the worst clips](failures.png)

It knows nothing of what its data never show, and rollouts drift: the metrics above say how far they hold.

## The settings in full

```json
{json.dumps({"tokenizer": config.tokenizer.__dict__, "model": config.model.__dict__}, indent=2)}
```
"""


def _metrics(measured: Evaluation) -> str:
    rows = []
    for key in TAGGED:
        if key in measured.metrics:
            error = measured.metrics.get(error_key(key))
            rows.append(f"| `{key}` | {measured.metrics[key]:.4f} | {'' if error is None else f'{error:.4f}'} |")
    return "\n".join(rows)


def _notes(measured: Evaluation) -> str:
    return "".join(f"\n- {note}" for note in measured.notes) + ("\n" if measured.notes else "")


def _factors(measured: Evaluation) -> str:
    """A row for each slot, by what was measured of it."""
    found = measured.metrics
    slots = sorted(
        {int(key.split("/")[1]) for key in found if key.startswith("slots/") and key.split("/")[1].isdigit()}
    )
    if not slots:
        return "This model has no slots: its latent actions act on the whole frame.\n"
    rows = [
        "| slot | in use | entity | share of what moves | share of all patches | PSNR lost without its action | bits |",
        "|---|---|---|---|---|---|---|",
    ]
    for i in slots:
        cells = [
            "yes" if found.get(f"slots/{i}/used") else "no",
            _cell(found, f"slots/{i}/entity", "{:.0f}"),
            _cell(found, f"slots/{i}/moving_share", "{:.0%}"),
            _cell(found, f"slots/{i}/mask_share", "{:.0%}"),
            _cell(found, f"slots/{i}/effect_db", "{:.2f} dB"),
            _cell(found, f"actions/{i}/bits", "{:.1f}"),
        ]
        rows.append(f"| {i} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n\nEntities are numbered as in the data set's ground truth, where it has any.\n"


def _microscope(prepared: Prepared) -> str:
    if prepared.config.model.latent in ("none", "true"):
        return ""
    return f"\n[{MICROSCOPE_FILE}]({MICROSCOPE_FILE}) shows in films what each can be told to do.\n"


def _cell(found: dict[str, float], key: str, shape: str) -> str:
    return shape.format(found[key]) if key in found else "-"


def _failures(measured: Evaluation) -> str:
    rollouts = measured.rollouts
    errors = rollouts.errors["rollout"]
    return "\n".join(f"- `{rollouts.ids[i]}`: {float(psnr(errors[i].mean())):.1f} dB" for i in rollouts.worst)
