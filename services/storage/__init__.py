"""Storage: local folders and S3-compatible buckets behind one face, `pyarrow.fs`.

Whatever is read or written lies at a *location*: a path, or `s3://bucket/prefix`. Endpoint and keys come from the usual
AWS environment variables, `AWS_ENDPOINT_URL` among them, which pyarrow by itself would ignore.
"""

from services.storage.location import Location, resolve
from services.storage.objects import download, exists, read_bytes, write_bytes

__all__ = ["Location", "download", "exists", "read_bytes", "resolve", "write_bytes"]
