"""Measure what flam claims, beside others, in one run: ratios hold on a noisy machine, absolute numbers do not.

    python jobs/bench.py feed --json feed.json
    python jobs/bench.py feed --data data/clips --frames 10 --batch 64
    python jobs/bench.py feed --soak_minutes 30
    python jobs/bench.py order --json order.json
    python jobs/bench.py model --json model.json
    python jobs/bench.py model --recipes multigrid --clips 2 --no_compile
    python jobs/bench.py chaos --kills 20 --json chaos.json
    python jobs/bench.py overhead --json overhead.json
    python jobs/bench.py serve --json serve.json

docs/performance.md, docs/reliability.md and docs/play.md explain each number, and hold those that were measured.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/bench.py` puts only jobs/ on the path

from services.bench.chaos import ChaosBenchSettings, bench_chaos
from services.bench.feed import FeedBenchSettings, bench_feed
from services.bench.model import ModelBenchSettings, bench_model, rows
from services.bench.order import OrderBenchSettings, bench_order
from services.bench.overhead import OverheadSettings, bench_overhead
from services.bench.serve import ServeBenchSettings, bench_serve
from services.console import run_program, table


@dataclass(frozen=True)
class Feed:
    """Video from storage to the trainer."""

    json: Path | None = None
    """Where the numbers go, as JSON."""
    settings: Annotated[FeedBenchSettings, tyro.conf.arg(name="")] = field(default_factory=FeedBenchSettings)


@dataclass(frozen=True)
class Order:
    """The sample order by itself."""

    json: Path | None = None
    """Where the numbers go, as JSON."""
    settings: Annotated[OrderBenchSettings, tyro.conf.arg(name="")] = field(default_factory=OrderBenchSettings)


@dataclass(frozen=True)
class Model:
    """Training steps of both stages, and FLAM's beside a monolithic model's."""

    json: Path | None = None
    """Where the numbers go, as JSON."""
    settings: Annotated[ModelBenchSettings, tyro.conf.arg(name="")] = field(default_factory=ModelBenchSettings)


@dataclass(frozen=True)
class Chaos:
    """Runs that are killed and resized, beside one that is left alone."""

    json: Path | None = None
    """Where the numbers go, as JSON."""
    settings: Annotated[ChaosBenchSettings, tyro.conf.arg(name="")] = field(default_factory=ChaosBenchSettings)


@dataclass(frozen=True)
class Overhead:
    """A run's steps beside a bare PyTorch loop over the same batches."""

    json: Path | None = None
    """Where the numbers go, as JSON."""
    settings: Annotated[OverheadSettings, tyro.conf.arg(name="")] = field(default_factory=OverheadSettings)


@dataclass(frozen=True)
class Serve:
    """A player's answers, and the steps of a scene."""

    json: Path | None = None
    """Where the numbers go, as JSON."""
    settings: Annotated[ServeBenchSettings, tyro.conf.arg(name="")] = field(default_factory=ServeBenchSettings)


@dataclass(frozen=True)
class Arguments:
    """What `jobs/bench.py` takes."""

    what: tyro.conf.OmitSubcommandPrefixes[
        Annotated[Feed, tyro.conf.subcommand("feed")]
        | Annotated[Order, tyro.conf.subcommand("order")]
        | Annotated[Model, tyro.conf.subcommand("model")]
        | Annotated[Chaos, tyro.conf.subcommand("chaos")]
        | Annotated[Overhead, tyro.conf.subcommand("overhead")]
        | Annotated[Serve, tyro.conf.subcommand("serve")]
    ]


def main(arguments: Arguments) -> None:
    """Measure, print, write."""
    what = arguments.what
    result = measure(what)
    if what.json is not None:
        what.json.parent.mkdir(parents=True, exist_ok=True)
        what.json.write_text(json.dumps(result, indent=1) + "\n")
    shown = {key: value for key, value in result.items() if key != "table"}
    table(f"bench {type(what).__name__.lower()}", rows(result) if isinstance(what, Model) else flat(shown))


def measure(what: Feed | Order | Model | Chaos | Overhead | Serve) -> dict[str, Any]:
    """What was asked for, as plain JSON."""
    match what:
        case Feed():
            return bench_feed(what.settings)
        case Order():
            return bench_order(what.settings)
        case Model():
            return bench_model(what.settings)
        case Chaos():
            return bench_chaos(what.settings)
        case Overhead():
            return bench_overhead(what.settings)
        case Serve():
            return bench_serve(what.settings)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as rows of a table."""
    rows: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            rows |= flat(value, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return rows


if __name__ == "__main__":
    run_program(Arguments, main, description=__doc__ or "")
