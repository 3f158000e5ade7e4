"""Make films with a model: a clip again, one slot edited, futures, or the actions of one clip in another scene.

    python jobs/generate.py models:/flam-grid@champion --mode edit --slot 1 --toward left --out outputs/edit
    python jobs/generate.py outputs/latest --clip street.mp4
    python jobs/generate.py outputs/latest --mode free --clip picture.png --samples 4 --seed 7
    python jobs/generate.py outputs/latest --mode transfer --data data/grid --clip_index 3 --from_clip 0
    python jobs/generate.py outputs/latest --mode replay --actions outputs/edit/actions.json --out outputs/again

Writes video.mp4, video.gif, strip.png, actions.json and frames.npz (docs/generate.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/generate.py` puts only jobs/ on the path

from services.console import run_program, table
from services.steering import GenerateSettings, generate


def main(settings: GenerateSettings) -> None:
    """Make and write, and say where."""
    table(settings.model, generate(settings))


if __name__ == "__main__":
    run_program(GenerateSettings, main, description=__doc__ or "", keeps=False)
