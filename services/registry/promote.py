"""Promotion: measure challenger and champion on the same held-out episodes, decide, move the aliases."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch

import flam_core
from flam_core.config_evaluation import EvaluationConfig
from flam_core.config_json import from_dict
from flam_core.data.quarantine import MAX_BAD_SHARE, BadClip
from flam_core.errors import DataError, SettingsError
from services.feed import FeedSource
from services.registry.announce import announce, pushgateway
from services.registry.champion import CANDIDATE, CHAMPION, Champions, Version
from services.registry.gate import Decision, Margins, Measured, decide, latency_ms
from services.registry.versions import download
from services.training.data import open_sources, parse_data
from services.training.held_out import evaluate_on


@dataclass(frozen=True)
class Promotion:
    """What is to be decided."""

    tracking_uri: str
    name: str
    version: str | None = None
    """The challenger; None: the one with the alias `candidate`."""
    data: str | None = None
    """None: what the challenger was trained on."""
    manifest_sha256: str | None = None
    """That the data set must have."""
    seed: int = 0


def promote(promotion: Promotion, margins: Margins, *, dry_run: bool = False) -> tuple[Decision, str]:
    """Decide and, but for a dry run, do it; the decision, and where it is kept (with the challenger's run).

    Raises DataError if there is no challenger, or its data are not there or not those that were meant; EnvironmentFault
    if another promotion is under way. A Pushgateway (`announce.PUSHGATEWAY`) hears of the decision.
    """
    gateway = pushgateway()
    champions = Champions(promotion.tracking_uri, promotion.name)
    with champions.lock() as still_mine:
        challenger = _challenger(champions, promotion)
        champion = champions.by_alias(CHAMPION)
        if champion is not None and champion.version == challenger.version:
            raise SettingsError(
                f"version {challenger.version} of {promotion.name} is the champion already",
                fix="Train another, or name a challenger with --version.",
            )
        source = _source(champions, challenger, promotion)
        config = _evaluation_of(challenger)
        measured = [
            None if version is None else _measure(version, source, config, promotion)
            for version in (challenger, champion)
        ]
        assert measured[0] is not None
        decision = decide(measured[0], measured[1], margins, promotion.seed)
        content = {
            **decision.as_json(),
            "model": promotion.name,
            "manifest_sha256": source.manifest.sha256,
            "split": "test",
            "evaluation": asdict(config),
            "seed": promotion.seed,
            "margins": asdict(margins),
            "dry_run": dry_run,
            "metrics": {one.version: one.evaluation.metrics for one in measured if one is not None},
        }
        if dry_run:
            return decision, "not kept: a dry run"
        if decision.promoted:
            still_mine()
            champions.promote(challenger, champion)
        place = champions.record(decision, challenger, content)
    if gateway is not None and (trouble := announce(gateway, promotion.name, decision)) is not None:
        print(f"warning: {trouble}", flush=True)
    return decision, place


def roll_back(tracking_uri: str, name: str) -> tuple[str, str | None]:
    """Make the previous champion champion again; its version, and that of who was."""
    now, before = Champions(tracking_uri, name).roll_back()
    return now.version, before and before.version


def _challenger(champions: Champions, promotion: Promotion) -> Version:
    if promotion.version is not None:
        return champions.by_version(promotion.version)
    found = champions.by_alias(CANDIDATE)
    if found is None:
        raise DataError(
            f"{promotion.name} has no version with the alias {CANDIDATE}", fix="Train one, or give --version."
        )
    return found


def _source(champions: Champions, challenger: Version, promotion: Promotion) -> FeedSource:
    """The data set, which must be the one that was meant."""
    data = promotion.data or champions.data_of(challenger)
    if not data:
        raise DataError(f"the run of {challenger.address} does not say where its data lie", fix="Give --data.")
    sources = open_sources(parse_data(data), max_bad_share=MAX_BAD_SHARE)
    source = sources[0]
    meant = promotion.manifest_sha256 or (None if promotion.data else challenger.tags.get("manifest_sha256"))
    if meant is not None and source.manifest.sha256 != meant:
        raise DataError(
            f"the data set at {source.data} has changed: its manifest's sha256 is {source.manifest.sha256}, and "
            f"{meant} is asked for",
            fix="Bring the frozen one back, or name another with --data.",
        )
    return source


def _evaluation_of(version: Version) -> EvaluationConfig:
    """As its own run measured."""
    return from_dict(EvaluationConfig, json.loads(version.tags.get("evaluation", "{}")), "tag evaluation")


def _measure(version: Version, source: FeedSource, config: EvaluationConfig, promotion: Promotion) -> Measured:
    model = flam_core.load(download(version.address, promotion.tracking_uri))
    if torch.cuda.is_available():
        model.to("cuda")
    broken: list[BadClip] = []
    evaluation = evaluate_on(model, source, config, promotion.seed, on_broken=broken.append)
    return Measured(version.version, evaluation, latency_ms(model))
