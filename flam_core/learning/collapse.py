"""Says by name what goes wrong while a model trains: from the meters of the log lines, with the numbers and a way out.

Thresholds were set on recorded runs, healthy and collapsed ones (tests/unit/test_collapse.py, docs/devlog.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Any, Literal

from flam_core.config import Config, StageConfig

LOG_EVERY = 50
"""Steps between two log lines."""
_LINES = 3
"""Log lines whose median counts: one line is one batch, and batches differ."""
_SETTLED = 0.35
"""Share of a stage before which a model may know nothing. Runs that ended well began to learn after up to 0.19 of the
tokenizer's stage and 0.28 of FLAM's."""
_AFTER_BETA = 0.1
"""Share of the stage that the KL is given from when beta begins to count: it falls steeply there in every run."""
_AFTER_CODES = 0.05
"""Share of the stage that codes are given from when they begin to count: nobody chose them before."""
_DIVERGED_FROM = 0.1
"""Share of a stage before which the loss may jump about: warm-up."""
_ENDED = 0.25
"""A finding has ended when it has not held for this share of the stage. Shorter gaps are the noise of batches."""
_SILENT_NATS = 0.1
"""A KL below this tells the dynamics nothing. Collapsed slots have 0.005 to 0.05 nats, those in use 10 and more."""
_ALONE = 0.9
"""Share of all nats, or of all patches, with which a slot leaves the others nothing to do. The recorded run in which
one slot moved all three agents had 0.90 to 0.98; the largest share in runs that bound is 0.55."""
_POOR = 0.5
"""Share of the feature change (flam/explained) below which a model does not know what happens. The plateau lies at 0.25
to 0.40, from where agents *might* go; runs that left it end above 0.6."""
_POOR_WITHOUT_ACTIONS = 0.05
"""The same for a model without latent actions, which cannot do better than the plateau: below this, it copies."""
_RISE = 0.02
"""Rise of flam/explained over `_WINDOW` that is no plateau. Runs on the plateau rise by less, others by 0.1 or more."""
_WINDOW = 0.25
"""Share of the stage over which that rise is measured."""
_PARTS = 40
"""Parts of a stage over which flam/explained is averaged, so that the history is short however long the stage is."""
_DIVERGED = 3.0
"""How often its minimum the loss must be. Lines of a healthy run differ by a factor of up to 1.7."""
_LOST = 0.1
"""Share of the error of a flat or a copied frame that the error has risen to: three times nothing is noise."""
_PERPLEXITY = 1.5
"""Below this, nearly all transitions get one code; two codes in equal use give 2."""
_CODES = 0.1
"""Share of the codebook below which it is a waste. Of as many codes as there are transitions in a batch, if fewer."""
_FLAT_DB = 1.0
"""A tokenizer that beats frames painted in their mean colour by less than this has learnt nothing."""


class FindingName(StrEnum):
    """What can go wrong. docs/learning.md says of each what it looks like and what helped."""

    TOKENIZER_DEAD = "tokenizer-dead"
    POSTERIOR_COLLAPSE = "posterior-collapse"
    IDLE_ACTIONS = "idle-actions"
    CODEBOOK_COLLAPSE = "codebook-collapse"
    ONE_SLOT_TAKES_ALL = "one-slot-takes-all"
    PLATEAU = "plateau"
    DIVERGING = "diverging"


@dataclass(frozen=True)
class Finding:
    """Something that goes wrong: `said` holds the numbers, `fix` what to change."""

    name: FindingName
    said: str
    fix: str

    def __str__(self) -> str:
        return f"{self.name}: {self.said}. {self.fix}"


class CollapseWatch:
    """Watches the log lines of a run. `observe` each; it returns what began to go wrong with that line.

    A finding comes once when it begins, and again only if it has ended and come back.
    """

    def __init__(self, config: Config, workers: int = 1) -> None:
        """`workers`: ranks that share the global batch, since the meters are those of one rank's part."""
        self._config, self._model = config, config.model
        clips = max(1, config.flam_stage.batch_clips // workers)
        transitions = clips * (config.flam_stage.clip_frames - 1) * config.model.factors
        self._usable_codes = min(config.model.codebook, transitions)
        self._begin("tokenizer")

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Finding]:
        """What begins with this log line. `step`: steps done within the stage. metrics: the line's meters by name.

        Raises KeyError if a meter is missing that the config's findings are made from.
        """
        stage: Literal["tokenizer", "flam"] = "flam" if "flam/loss" in metrics else "tokenizer"
        if stage != self._stage:
            self._begin(stage)
        self._lines = [*self._lines, {key: float(metrics[key]) for key in self._keys()}][-_LINES:]
        self._remember(step)
        if len(self._lines) < _LINES:
            return []
        done = step / self._stage_config().steps
        found = self._in_tokenizer(done) if stage == "tokenizer" else self._in_flam(done)
        new = [finding for finding in found if finding.name not in self._held_at]
        self._held_at |= {finding.name: step for finding in found}
        ended = step - _ENDED * self._stage_config().steps
        self._held_at = {name: last for name, last in self._held_at.items() if last >= ended}
        return new

    @property
    def holding(self) -> frozenset[FindingName]:
        """The findings that have begun in this stage and not ended."""
        return frozenset(self._held_at)

    def state(self) -> dict[str, Any]:
        """All that `observe` remembers, as plain JSON values: some kilobytes at most."""
        return {
            "stage": self._stage,
            "lines": self._lines,
            "parts": self._parts,
            "lowest": self._lowest,
            "held_at": {str(name): step for name, step in self._held_at.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, so that a resumed run says what the unbroken one would have."""
        self._stage = state["stage"]
        self._lines = [dict(line) for line in state["lines"]]
        self._parts = [list(part) for part in state["parts"]]
        self._lowest = None if state["lowest"] is None else list(state["lowest"])
        self._held_at = {FindingName(name): step for name, step in state["held_at"].items()}

    def _begin(self, stage: Literal["tokenizer", "flam"]) -> None:
        self._stage = stage
        self._lines: list[dict[str, float]] = []
        self._parts: list[list[float]] = []  # number of the part, sum and count of flam/explained
        self._lowest: list[float] | None = None  # error and KL of the best line
        self._held_at: dict[FindingName, int] = {}

    def _stage_config(self) -> StageConfig:
        return self._config.tokenizer_stage if self._stage == "tokenizer" else self._config.flam_stage

    def _keys(self) -> list[str]:
        """The meters that the findings of this stage are made from."""
        if self._stage == "tokenizer":
            return ["tokenizer/loss", "tokenizer/psnr", "tokenizer/flat_psnr", "tokenizer/codes_used"]
        keys = ["flam/one_step", "flam/explained"]
        if self._model.latent == "gaussian":
            keys += ["flam/beta", "flam/kl", "flam/active_units", *self._each("flam/kl_slot")]
        if self._model.latent == "vq":
            keys += ["flam/codebook_perplexity", "flam/codes_used", *self._each("flam/codebook_perplexity_slot")]
        if self._model.state == "slots":
            keys += ["flam/largest_mask_share"]
        return keys

    def _each(self, key: str) -> list[str]:
        return [f"{key}_{i}" for i in range(self._model.factors)]

    def _now(self, key: str) -> float:
        return median(line[key] for line in self._lines)

    def _remember(self, step: int) -> None:
        """Take the newest line into what is kept beyond the last lines."""
        if self._stage == "tokenizer":
            error, kl = self._now("tokenizer/loss"), 0.0
        else:
            explained = self._lines[-1]["flam/explained"]
            part = step * _PARTS // self._stage_config().steps
            if not self._parts or self._parts[-1][0] != part:
                self._parts.append([part, 0.0, 0])
            self._parts[-1][1] += explained
            self._parts[-1][2] += 1
            error, kl = self._now("flam/one_step"), self._now("flam/kl") if self._model.latent == "gaussian" else 0.0
        if len(self._lines) == _LINES and (self._lowest is None or self._cost(error, kl) < self._cost(*self._lowest)):
            self._lowest = [error, kl]

    def _cost(self, error: float, kl: float) -> float:
        """The loss of a line *under today's beta*: that beta rises is no divergence."""
        return error + self._lines[-1].get("flam/beta", 0.0) * kl

    def _in_tokenizer(self, done: float) -> list[Finding]:
        psnr, flat, codes = (self._now(f"tokenizer/{key}") for key in ("psnr", "flat_psnr", "codes_used"))
        lost = 10 ** ((flat - psnr) / 10)
        found = self._diverging(done, lost, self._now("tokenizer/loss"), 0.0)
        if done >= _SETTLED and (psnr < flat + _FLAT_DB or codes <= 1):
            why = "all patches get one code" if codes <= 1 else f"{codes:.0f} codes are in use, to no effect"
            said = f"PSNR is {psnr:.1f} dB, where one mean colour for everything gives {flat:.1f} dB; {why}"
            found.append(self._finding(FindingName.TOKENIZER_DEAD, said))
        return found

    def _in_flam(self, done: float) -> list[Finding]:
        nats = self._nats()
        explained = self._now("flam/explained")
        found = []
        if self._model.latent == "gaussian":
            found += self._silent_latents(done, nats, explained)
        if self._model.latent == "vq" and done >= max(_SETTLED, self._config.loss.codebook_warmup + _AFTER_CODES):
            found += self._codebook(nats)
        plateau = self._plateau(done)
        found += self._one_slot(done, nats, bool(plateau)) + plateau
        kl = self._now("flam/kl") if self._model.latent == "gaussian" else 0.0
        return found + self._diverging(done, 1 - explained, self._now("flam/one_step"), kl)

    def _nats(self) -> list[float]:
        """What each latent action carries: its KL, or the entropy of its codes."""
        if self._model.latent == "gaussian":
            return [self._now(key) for key in self._each("flam/kl_slot")]
        if self._model.latent == "vq":
            return [math.log(max(1.0, self._now(key))) for key in self._each("flam/codebook_perplexity_slot")]
        return []

    def _kl_counts(self, done: float) -> bool:
        """Whether the KL has had its say: beta has counted for a while, or for half of the stage that is left."""
        start = self._config.loss.beta_warmup[0]
        return done >= max(_SETTLED, min(start + _AFTER_BETA, (start + 1) / 2))

    def _silent_latents(self, done: float, nats: list[float], explained: float) -> list[Finding]:
        active, total = self._now("flam/active_units"), sum(nats)
        if max(nats) < _SILENT_NATS:
            if not self._kl_counts(done):
                return []
            said = (
                f"no latent action has a KL above {max(nats):.2g} nats at beta {self._lines[-1]['flam/beta']:.2g} "
                f"(flam/explained {explained:.2f})"
            )
            return [self._finding(FindingName.POSTERIOR_COLLAPSE, said)]
        if done >= _SETTLED and active * self._model.latent_width < 1:  # not one dimension
            said = (
                f"the KL is {total:.3g} nats, but {active:.2%} of {self._model.latent_width} latent dimensions have a "
                "mean that varies: what happens does not change the actions"
            )
            return [self._finding(FindingName.IDLE_ACTIONS, said)]
        return []

    def _codebook(self, nats: list[float]) -> list[Finding]:
        perplexity, used = self._now("flam/codebook_perplexity"), self._now("flam/codes_used")
        said = f"{used:.0f} of {self._model.codebook} codes are in use, with a perplexity of {perplexity:.2f}"
        if perplexity < _PERPLEXITY or used < _CODES * self._usable_codes:
            return [self._finding(FindingName.CODEBOOK_COLLAPSE, said)]
        if max(nats) < _SILENT_NATS:
            said += f", but each slot keeps to its own (of one slot alone it is at most {math.exp(max(nats)):.2f})"
            return [self._finding(FindingName.IDLE_ACTIONS, said)]
        return []

    def _one_slot(self, done: float, nats: list[float], stuck: bool) -> list[Finding]:
        if self._model.factors == 1:
            return []
        total = sum(nats)
        counts = done >= _SETTLED if self._model.latent == "vq" else self._kl_counts(done)
        if counts and max(nats, default=0.0) > max(_SILENT_NATS, _ALONE * total):
            what = "slot" if self._model.state == "slots" else "latent action"
            said = (
                f"{what} {nats.index(max(nats))} of {self._model.factors} carries {max(nats) / total:.0%} of the "
                f"{total:.3g} nats that all actions have: a monolithic model in disguise, unless one thing moves here"
            )
            return [self._finding(FindingName.ONE_SLOT_TAKES_ALL, said)]
        # A slot that holds a large background is as it should be, as long as the model learns.
        if self._model.state == "slots" and stuck:
            share = self._now("flam/largest_mask_share")
            if share > _ALONE:
                said = f"one slot of {self._model.factors} claims {share:.0%} of all patches"
                return [self._finding(FindingName.ONE_SLOT_TAKES_ALL, said)]
        return []

    def _plateau(self, done: float) -> list[Finding]:
        poor = _POOR_WITHOUT_ACTIONS if self._model.latent == "none" else _POOR
        first = self._parts[-1][0] - _WINDOW * _PARTS
        # Four parts at least: of the two halves of fewer, batch noise is as large as a rise.
        recent = [part for part in self._parts if part[0] > first]
        recent = recent if len(recent) >= 4 else self._parts[-4:]
        if done < _SETTLED or len(recent) < 4:
            return []
        middle = len(recent) // 2
        early, late = _mean(recent[:middle]), _mean(recent[middle:])
        rise = 2 * (late - early)  # the halves' middles lie half a window apart
        if rise >= _RISE or late >= poor:
            return []
        copies = late < _POOR_WITHOUT_ACTIONS
        what = "no better than copying the frame" if copies else "the model knows what may happen, not what does"
        over = (recent[-1][0] - recent[0][0] + 1) / _PARTS
        said = f"flam/explained is {late:.2f}, {rise:+.3f} over the last {over:.0%} of the stage: {what}"
        return [self._finding(FindingName.PLATEAU, said)]

    def _diverging(self, done: float, lost: float, error: float, kl: float) -> list[Finding]:
        if done < _DIVERGED_FROM or lost < _LOST or self._lowest is None:
            return []
        loss, lowest = self._cost(error, kl), self._cost(*self._lowest)
        if loss <= _DIVERGED * lowest:
            return []
        said = (
            f"the loss is {loss:.3g}, {loss / max(lowest, 1e-12):.1f} times the {lowest:.3g} that it had come down to"
        )
        return [self._finding(FindingName.DIVERGING, said)]

    def _finding(self, name: FindingName, said: str) -> Finding:
        config, stage = self._config, self._stage
        calmer = _calmer(self._stage_config(), f"{stage}_stage")
        ways = {
            FindingName.TOKENIZER_DEAD: f"{calmer}; or --seed {config.seed + 1}",
            FindingName.POSTERIOR_COLLAPSE: _raise_kl(config),
            FindingName.IDLE_ACTIONS: _use_codes(config) if self._model.latent == "vq" else _leave_plateau(config),
            FindingName.CODEBOOK_COLLAPSE: _use_codes(config),
            FindingName.ONE_SLOT_TAKES_ALL: _share_out(config),
            FindingName.PLATEAU: _leave_plateau(config),
            FindingName.DIVERGING: calmer,
        }
        return Finding(name, said, f"Try {ways[name]}.")


def _mean(parts: list[list[float]]) -> float:
    return sum(part[1] for part in parts) / sum(part[2] for part in parts)


def _calmer(stage: StageConfig, name: str) -> str:
    clip = f" --{name}.clip_norm 0.5" if stage.clip_norm > 0.5 else ""
    return f"--{name}.learning_rate {stage.learning_rate / 2:g}{clip}"


def _raise_kl(config: Config) -> str:
    loss, model = config.loss, config.model
    return _try(
        (f"--loss.beta {loss.beta / 10:g}", loss.beta > 0),
        ("--loss.beta_warmup 0.5 0.9, so that the KL counts once actions are of use", loss.beta_warmup[0] < 0.5),
        ("--model.initial_log_variance -5, so that noise does not drown the mean", model.initial_log_variance > -5),
        ("--loss.free_bits 0.5, nats of each slot that cost nothing", loss.free_bits == 0),
        (f"what helps off a plateau, if it was on one: {_leave_plateau(config)}", True),
    )


def _use_codes(config: Config) -> str:
    model = config.model
    return _try(
        (
            "--loss.codebook_warmup 0.4, so that the dynamics learns to listen before actions are codes",
            config.loss.codebook_warmup < 0.4,
        ),
        (
            "--model.codebook_centring, so that slots do not keep to their own",
            not model.codebook_centring,
        ),
        ("--model.codebook_revival 0.1, which moves dead codes", model.codebook_revival == 0),
        ("--model.codebook_decay 0.99, by which codes follow what falls to them", model.codebook_decay is None),
        (f"--model.codebook {model.codebook // 2}", model.codebook >= 4),
        (_calmer(config.flam_stage, "flam_stage"), True),
    )


def _leave_plateau(config: Config) -> str:
    model, stage = config.model, config.flam_stage
    return _try(
        ("--model.aggregator_sharpness 3", model.state == "slots" and model.aggregator_sharpness < 3),
        *_bind(config),
        ("--flam_stage.learning_rate 1e-3", stage.learning_rate < 7e-4),
        (f"--flam_stage.steps {2 * stage.steps}", True),
    )


def _share_out(config: Config) -> str:
    model, slots, more = config.model, config.model.state == "slots", config.model.factors + 1
    open_bits = model.latent == "gaussian" and config.loss.free_bits == 0
    return _try(
        *_bind(config),
        ("--model.slot_focus 2, so that a slot reads one compact thing", slots and model.slot_focus < 2),
        ("--loss.free_bits 0.5, nats of each slot that cost nothing", open_bits),
        (f"a slot to spare: --model.factors {more} --model.latent_width {more * model.action_dim}", slots),
        (f"--seed {config.seed + 1}", True),
    )


def _bind(config: Config) -> list[tuple[str, bool]]:
    """What made every slot find an entity of its own (docs/devlog.md, 9 to 15)."""
    model, tokenizer, slots = config.model, config.tokenizer, config.model.state == "slots"
    return [
        (
            "--model.slot_start motion --slot_hold 0.3",
            slots and (model.slot_start == "random" or config.slot_hold == 0),
        ),
        ("--tokenizer.whitening 1.0", slots and (tokenizer.whitening is None or tokenizer.whitening < 1)),
        ("--model.slot_competition dual --model.slot_sharpness 8", slots and model.slot_competition != "dual"),
    ]


def _try(*ways: tuple[str, bool]) -> str:
    """The ways that are open: not taken by the config yet. The most likely first."""
    return "; or ".join(way for way, is_open in ways if is_open)
