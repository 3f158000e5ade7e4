"""What a measure is: a name, what it needs, and a function from the context to numbers.

Another one is added by writing such a function and listing it in `evaluate.MEASURES` and `config.Measured`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flam_core.config_evaluation import Measured
from flam_core.evaluation.context import Context, Need
from flam_core.evaluation.stats import Estimate, flat


@dataclass(frozen=True)
class Findings:
    """What a measure found.

    estimates: numbers with their spread over episodes. values: numbers without one. notes: sentences for people, such
    as why a number is missing.
    """

    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """Keys as in docs/metrics.md: means, their standard errors, and values."""
        return flat(self.estimates) | dict(self.values)


@dataclass(frozen=True)
class Measure:
    """A plug-in of the evaluation.

    title: as in the note that says why it is missing. run: raises DataError where the data do not allow it; that, too,
    becomes a note.
    """

    name: Measured
    title: str
    needs: tuple[Need, ...]
    run: Callable[[Context], Findings]
