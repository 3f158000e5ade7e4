"""Where episodes come from: a built-in world, other people's data, or Python. An ingest sees all as clips, in order."""

from flam_core.data.sources.arrays import AnyEpisode, IteratorSource, WorldSource
from flam_core.data.sources.base import Recording, Setting, Source
from flam_core.data.sources.choose import SourceFlags, choose_source
from flam_core.data.sources.folder import FolderSource
from flam_core.data.sources.lerobot import LeRobotSource
from flam_core.data.sources.parquet import ParquetColumns, ParquetSource
from flam_core.data.sources.webdataset import WebDatasetSource

__all__ = [
    "AnyEpisode",
    "FolderSource",
    "IteratorSource",
    "LeRobotSource",
    "ParquetColumns",
    "ParquetSource",
    "Recording",
    "Setting",
    "Source",
    "SourceFlags",
    "WebDatasetSource",
    "WorldSource",
    "choose_source",
]
