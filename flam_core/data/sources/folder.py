"""A folder of video files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flam_core.data.sources.base import FittedSource, Recording, make_clips, recording
from flam_core.data.videos import VideoOptions, cut_video, find_videos


@dataclass(frozen=True)
class FolderSource(FittedSource):
    """A folder of video files, one episode each, in the order of their paths."""

    folder: Path
    video: VideoOptions
    licence: str

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def description(self) -> str:
        return f"videos in {self.name}"

    def recordings(self, clip_frames: int) -> Iterator[Recording]:
        """See `Source.recordings`."""
        for path in find_videos(self.folder):
            # A file name need not be text; what does not decode is written out, as Parquet and JSON want UTF-8.
            episode = os.fsencode(path.relative_to(self.folder).as_posix()).decode("utf-8", "backslashreplace")
            yield recording(episode, make_clips(episode, cut_video(path, self.video, clip_frames), None))
