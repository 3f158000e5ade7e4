"""jobs -> services -> flam_core, and each outside system is spoken to by its own service alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from importlinter.cli import lint_imports

REPOSITORY = Path(__file__).resolve().parents[2]


def test_arrows_point_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert lint_imports(config_filename=str(REPOSITORY / "pyproject.toml"), no_cache=True) == 0


def test_reading_data_needs_no_torch() -> None:
    """Ray Data tasks import only what reads data: torch would cost each of them seconds and hundreds of megabytes."""
    import subprocess
    import sys

    code = "import sys, services.feed.read; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
