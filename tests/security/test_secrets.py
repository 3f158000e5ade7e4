"""No secret is in the repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from detect_secrets.core.scan import scan_file
from detect_secrets.settings import transient_settings

REPOSITORY = Path(__file__).resolve().parents[2]
# Those that know a secret by its form. Detectors of entropy would find each sha256 that a result is named by.
FORMS = (
    "AWSKeyDetector",
    "AzureStorageKeyDetector",
    "BasicAuthDetector",
    "GitHubTokenDetector",
    "GitLabTokenDetector",
    "JwtTokenDetector",
    "NpmDetector",
    "OpenAIDetector",
    "PrivateKeyDetector",
    "PypiTokenDetector",
    "SlackDetector",
    "StripeDetector",
)
PLUGINS = {"plugins_used": [{"name": name} for name in FORMS]}


def found_in(path: Path) -> list[str]:
    with transient_settings(PLUGINS):
        return [f"{one.type} in line {one.line_number}" for one in scan_file(str(path))]


def test_no_tracked_file_has_one() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    files = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    found = {
        str(path.relative_to(REPOSITORY)): secrets for path in files if path.is_file() and (secrets := found_in(path))
    }
    assert len(files) > 300
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        'key = "AKIA' + 'QWERTYUIOPASDFGH"',
        "-----BEGIN RSA " + "PRIVATE KEY-----",
        'token = "ghp_' + "a1B2" * 9 + '"',
        "address = https://admin:" + "hunter2hunter2@mlflow.example.com",
    ],
)
def test_what_looks_like_one_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "settings.py").write_text(f"{line}\n")
    assert found_in(tmp_path / "settings.py")
