"""What a sweep searches: values of each setting, and the points that they span."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, TypeVar

import tyro

from flam_core.config import Config
from flam_core.errors import SettingsError
from flam_core.variants import apply_variant

ValueT = TypeVar("ValueT")


def _comma(metavar: str, parse: Callable[[str], Any], show: Callable[[Any], str]) -> Any:
    """How tyro reads and shows a tuple in one word, `2,4,8`."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: tuple(parse(part.strip()) for part in words[0].split(",") if part.strip()),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda values: [",".join(show(value) for value in values)],
    )


Levels = tuple[int, ...]
Ints = Annotated[tuple[int, ...], _comma("INT,INT,...", int, str)]
Floats = Annotated[tuple[float, ...], _comma("FLOAT,FLOAT,...", float, lambda value: f"{value:g}")]
LevelLists = Annotated[
    tuple[Levels, ...],
    _comma(
        "8x8x8,5x5x5x5,...",
        lambda word: tuple(int(level) for level in word.split("x")),
        lambda levels: "x".join(map(str, levels)),
    ),
]


@dataclass(frozen=True)
class Point:
    """One choice of each setting that is searched."""

    factors: int
    """K."""
    codebook: int
    """Codes of the discrete latent action; 0: a Gaussian one."""
    latent_width: int
    """Total width of the latent actions."""
    beta: float
    """Weight of the KL; of no effect on discrete latent actions."""
    fsq: Levels
    """FSQ levels of the tokenizer."""

    @property
    def name(self) -> str:
        """Such as `k4-gaussian-w64-b0.0002-fsq8x8x8`."""
        latent = f"vq{self.codebook}" if self.codebook else "gaussian"
        return f"k{self.factors}-{latent}-w{self.latent_width}-b{self.beta:g}-fsq{'x'.join(map(str, self.fsq))}"

    def config(self, base: Config, seed: int) -> Config:
        """The base with this point's values. Raises SettingsError if they do not go together."""
        found = replace(base, tokenizer=replace(base.tokenizer, fsq_levels=self.fsq), seed=seed)
        model = replace(found.model, factors=self.factors, latent_width=self.latent_width)
        found = replace(found, model=model, loss=replace(found.loss, beta=self.beta))
        if not self.codebook:
            return found
        discrete = apply_variant(found, "flam-vq")
        return replace(discrete, model=replace(discrete.model, codebook=self.codebook))

    @property
    def values(self) -> dict[str, int | float | str]:
        """For Optuna and for tables: of each setting a number or a word."""
        return asdict(self) | {"fsq": "x".join(map(str, self.fsq))}


@dataclass(frozen=True)
class Space:
    """The values that are searched, `2,4,8`. None: the recipe's own."""

    factors: Ints = (2, 4, 8)
    """K: slots, each with its own latent action."""
    codebook: Ints = (0,)
    """Codes of the discrete latent action; 0: a Gaussian one."""
    latent_width: Ints = ()
    """Total width of the latent actions; none: as much for each slot as in the recipe."""
    beta: Floats = ()
    """Weights of the KL; none: the recipe's. Discrete latent actions have no KL, and take the first alone."""
    fsq: LevelLists = ()
    """FSQ levels of the tokenizer, `8x8x8,5x5x5x5`; none: the recipe's."""

    def __post_init__(self) -> None:
        if not self.factors or min(self.factors) < 1:
            raise SettingsError(f"factors = {_said(self.factors)}", fix="Give numbers of 1 or more: --factors 2,4,8.")
        if not self.codebook or min(self.codebook) < 0 or 1 in self.codebook:
            raise SettingsError(
                f"codebook = {_said(self.codebook)}",
                fix="Give 0 for Gaussian latent actions and sizes of 2 or more: --codebook 0,4,8.",
            )
        if any(value < 1 for value in self.latent_width):
            raise SettingsError(f"latent_width = {_said(self.latent_width)}", fix="Give numbers of 1 or more.")
        if any(not value >= 0 for value in self.beta):
            raise SettingsError(f"beta = {_said(self.beta)}", fix="Give numbers of 0 or more.")
        for name in ("factors", "codebook", "latent_width", "beta", "fsq"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise SettingsError(f"{name} = {_said(values)} has one twice", fix="Name each value once.")

    def choices(self, base: Config) -> dict[str, tuple[Any, ...]]:
        """The values of each setting. Of `latent_width` () where it follows from the factors."""
        return {
            "factors": self.factors,
            "codebook": self.codebook,
            "latent_width": self.latent_width,
            "beta": self.beta or (base.loss.beta,),
            "fsq": self.fsq or (base.tokenizer.fsq_levels,),
        }

    def point(self, base: Config, **chosen: Any) -> Point:
        """The point of these values, of which some say nothing beside others: discrete latent actions have no beta."""
        width = chosen.get("latent_width") or chosen["factors"] * base.model.action_dim
        beta = self.choices(base)["beta"][0] if chosen["codebook"] else chosen["beta"]
        return Point(chosen["factors"], chosen["codebook"], width, beta, tuple(chosen["fsq"]))

    def points(self, base: Config) -> list[Point]:
        """All, each once. Raises SettingsError, naming the point, if one cannot be."""
        choices = {name: values or (None,) for name, values in self.choices(base).items()}
        found = dict.fromkeys(
            self.point(base, **dict(zip(choices, values, strict=True)))
            for values in itertools.product(*choices.values())
        )
        for point in found:
            try:
                point.config(base, base.seed)
            except SettingsError as error:
                raise SettingsError(f"point {point.name}: {error.what}", fix=error.fix) from error
        return list(found)


def tokenizers(points: Sequence[Point], base: Config) -> Iterator[tuple[Levels, Config]]:
    """The FSQ levels that occur, each with the config of the run that trains their tokenizer and nothing else."""
    for levels in dict.fromkeys(point.fsq for point in points):
        alone = replace(base, tokenizer=replace(base.tokenizer, fsq_levels=levels))
        yield levels, replace(alone, flam_stage=replace(alone.flam_stage, steps=0))


def _said(values: Sequence[Any]) -> str:
    return ",".join(map(str, values)) or "nothing"
