"""Steer a model's scenes in a browser, and serve the model to programs.

    python jobs/play.py models:/flam-grid@champion
    python jobs/play.py models:/flam-grid@champion --challenger models:/flam-grid@candidate
    python jobs/play.py outputs/latest --data data/grid --host 0.0.0.0 --port 8080

Prints the address to open. Who is not on this machine needs the token that it prints with it. docs/play.md has the
keys, the API and what to know of security.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/play.py` puts only jobs/ on the path

from services.console import run_program
from services.player.run import player, wait
from services.player.settings import Binding, PlayerSettings


@dataclass(frozen=True)
class Arguments:
    """What `jobs/play.py` takes."""

    settings: Annotated[PlayerSettings, tyro.conf.arg(name="")]
    binding: Annotated[Binding, tyro.conf.arg(name="")] = field(default_factory=Binding)


def main(arguments: Arguments) -> None:
    """Serve until told to end."""
    print(f"starting the player of {arguments.settings.model} ...", flush=True)
    with suppress(KeyboardInterrupt), player(arguments.settings, arguments.binding) as place:
        print(f"open {place.link}  (Ctrl-C ends it)", flush=True)
        wait()


if __name__ == "__main__":
    run_program(Arguments, main, description=__doc__ or "")
