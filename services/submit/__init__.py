"""Jobs for a Ray cluster, checked before they are sent (Ray Jobs)."""

from services.submit.job import Submission, submit
from services.submit.upload import UPLOAD_LIMIT_MIB, check_upload, uploaded_files

__all__ = ["UPLOAD_LIMIT_MIB", "Submission", "check_upload", "submit", "uploaded_files"]
