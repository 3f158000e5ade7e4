"""Storage: local folders and S3-compatible buckets behind one face, `pyarrow.fs`.

Whatever is read or written lies at a *location*: a path, or `s3://bucket/prefix`. Endpoint and keys come from the usual
AWS environment variables, `AWS_ENDPOINT_URL` among them, which pyarrow by itself would ignore. A request to a bucket
that fails for a reason that passes is sent again, for FLAM_STORAGE_RETRY_SECONDS (120) at most, and counted.
"""

from services.storage.cache import BlockCache, shared_cache
from services.storage.location import Location, endpoint, resolve
from services.storage.objects import download, exists, read_bytes, write_bytes
from services.storage.retry import CHAOS_SHARE

__all__ = [
    "CHAOS_SHARE",
    "BlockCache",
    "Location",
    "download",
    "endpoint",
    "exists",
    "read_bytes",
    "resolve",
    "shared_cache",
    "write_bytes",
]
