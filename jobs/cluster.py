"""A cluster on this machine: Ray head with a token, MLflow server with a password, S3 server. For `make cluster`.

python jobs/cluster.py up            starts what is not there and prints addresses and the line that submits a job
python jobs/cluster.py up --metrics  with Prometheus and a Pushgateway (make cluster METRICS=1); needs Debian's packages
                                     of these names. No Grafana: Debian has none. Its panels are in
                                     infra/monitoring/grafana, for a Grafana of your own or the one on Kubernetes
python jobs/cluster.py status        what runs; exit code 3 if something has ended
python jobs/cluster.py down          stops what it started, by pid, and nothing else

Secrets, logs, MLflow's database and artifacts stay in .cluster; the bucket is in memory, and empty after a stop.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/cluster.py` puts only jobs/ on the path

import tyro

from flam_core.errors import EnvironmentFault
from services.console import run_program, table
from services.local import LocalSettings, bring_up, running, take_down
from services.local.cluster import ENV_FILE


@dataclass(frozen=True, kw_only=True)
class Arguments(LocalSettings):
    """What `jobs/cluster.py` takes."""

    command: tyro.conf.Positional[Literal["up", "status", "down"]]
    """Start what is not there; look; stop what was started."""


def main(arguments: Arguments) -> None:
    """Do it."""
    folder = Path(arguments.folder).absolute()
    if arguments.command == "down":
        if not running(folder):
            print(f"nothing was started from {folder}")
        take_down(folder)
        return
    if arguments.command == "up":
        bring_up(arguments, Path(os.environ.get("FLAM_HOME", ".")))
    parts = running(folder)
    if not parts:
        raise EnvironmentFault(f"no cluster was started from {folder}", fix="make cluster")
    stands = {one.name: "runs" if one.alive else f"HAS ENDED: see {one.log}" for one in parts}
    table("cluster", {one.name: f"{one.url}  pid {one.pid}  {stands[one.name]}" for one in parts})
    if not all(one.alive for one in parts):
        raise EnvironmentFault("a part of the cluster has ended", fix="make cluster-down, then make cluster.")
    _explain(folder, {one.name: one.url for one in parts})


def _explain(folder: Path, urls: dict[str, str]) -> None:
    python = Path(sys.executable)
    root = Path(__file__).resolve().parents[1]
    print("\nWhat opens it (the file is readable by you alone):")
    print(f"  source {shlex.quote(str(folder / ENV_FILE))}")
    print("\nTo train on it: put a data set into its bucket, and submit a job (the same line again resumes it)")
    print(f"  {python} jobs/ingest.py --world grid --out s3://flam/grid --size 48 --episodes 100")
    print(
        f"  {python.with_name('ray')} job submit --address {urls['ray']} --working-dir {shlex.quote(str(root))}"
        " -- python jobs/train.py smoke --data s3://flam/grid --storage s3://flam/runs"
    )
    print("\nIs all well?")
    print(f"  {python} jobs/doctor.py --data s3://flam/grid --storage s3://flam/runs --security")


if __name__ == "__main__":
    run_program(Arguments, main, description=__doc__ or "")
