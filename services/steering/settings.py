"""What `jobs/generate.py` takes, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from flam_core.errors import SettingsError
from flam_core.steering.generate import check_steps
from flam_core.steering.scene import Feedback

Mode = Literal["reconstruct", "edit", "free", "transfer", "replay"]


@dataclass(frozen=True)
class GenerateSettings:
    """What is made of what."""

    model: tyro.conf.Positional[str]
    """models:/NAME/VERSION, models:/NAME@ALIAS, or the folder of a model or a run."""
    mode: Mode = "reconstruct"
    """"reconstruct": the clip again, by the actions inferred from it. "edit": the same, with other actions for --slot.
    "free": futures from the learned prior. "transfer": the actions of --from_clip in the scene of the clip. "replay":
    what --actions recorded."""
    clip: str | None = None
    """A video file or a picture, of any size, for the scene, here or s3://...; default: a clip of the data set."""
    data: str | None = None
    """A data set: a folder or s3://bucket/prefix. Default: what a registered version was trained on."""
    clip_index: int = 0
    """Which clip of its held-out episodes."""
    from_clip: str | None = None
    """Whose actions "transfer" and "edit" take: a video file, or the number of another clip of the data set."""
    slot: int | None = None
    """The one that "edit" changes: its actions are drawn from the learned prior, if --code, --toward or --from_clip do
    not say otherwise."""
    code: int | None = None
    """"edit": take this discovered code at each step (see microscope.html)."""
    toward: Literal["up", "right", "down", "left", "still"] | None = None
    """"edit": move the slot this way, by the latent action that does so from where it stands."""
    steps: int | None = None
    """Default: 20, or as many as the clip allows."""
    samples: int | None = None
    """Futures that "free" gives; default: 4."""
    context: int = 1
    """True frames that are given."""
    seed: int = 0
    """Of what is drawn; of future number i it is seed + i."""
    feedback: Feedback = "frames"
    """What a step builds on: the drawn frame, read again, or the predicted slots, which drift sooner."""
    actions: str | None = None
    """"replay": the actions.json to take, here or s3://.... Its clip is the frames.npz beside it, if none is given."""
    fps: float | None = None
    """Frames a second that a video file is read at; default: all of its frames."""
    show_fps: float = 4.0
    """Steps a second of the film that is written: 0.1 to 100, which is as fast as a GIF goes."""
    tracking: str | None = None
    """MLflow's address; default MLFLOW_TRACKING_URI, else an SQLite file beside the outputs."""
    out: str = "outputs/generated"
    """Folder for video.mp4, video.gif, strip.png, actions.json and frames.npz."""

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_steps(self.steps)
        bounds = (("context", 1, 64), ("samples", 1, 16), ("clip_index", 0, 1_000_000), ("seed", 0, 2**53 - 1))
        for name, least, most in bounds:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise SettingsError(f"{name} = {value}", fix=f"Choose {least} to {most}.")
        if self.fps is not None and not 0 < self.fps <= 120:
            raise SettingsError(f"fps = {self.fps}", fix="Choose a rate above 0 and up to 120 frames a second.")
        # A GIF shows a frame for 1 to 65535 hundredths of a second.
        if not 0.1 <= self.show_fps <= 100:
            raise SettingsError(f"show_fps = {self.show_fps}", fix="Choose 0.1 to 100 steps a second.")
        self._check_mode()

    def _check_mode(self) -> None:
        """What each mode needs, and what it has no use for."""
        for name, needed_by, taken_by in (
            ("slot", ("edit",), ("edit",)),
            ("code", (), ("edit",)),
            ("toward", (), ("edit",)),
            ("from_clip", ("transfer",), ("edit", "transfer")),
            ("actions", ("replay",), ("replay",)),
            ("samples", (), ("free",)),
            ("steps", (), ("reconstruct", "edit", "free", "transfer")),
        ):
            given = getattr(self, name) is not None
            if not given and self.mode in needed_by:
                raise SettingsError(f"--mode {self.mode} needs --{name}", fix=f"Add --{name}.")
            if given and self.mode not in taken_by:
                raise SettingsError(
                    f"--mode {self.mode} has no use for --{name}",
                    fix=f"Leave it out, or choose --mode {' or '.join(taken_by)}.",
                )
        said = [f"--{name}" for name in ("code", "toward", "from_clip") if getattr(self, name) is not None]
        if self.mode == "edit" and len(said) > 1:
            raise SettingsError(f"{' and '.join(said)} each say what the slot does", fix="Give one of them.")
