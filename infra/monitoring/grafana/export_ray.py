"""Writes the Grafana dashboards that come with the installed Ray into a folder: `python export_ray.py FOLDER`.

Ray makes them when a head starts, for a Grafana on the same machine. This is for one elsewhere, and of the version
of Ray that is installed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ray.dashboard.modules.metrics import grafana_dashboard_factory as factory  # Ray has no public name for them

DASHBOARDS = {
    "ray-core": factory.generate_default_grafana_dashboard,
    "ray-data": factory.generate_data_grafana_dashboard,
    "ray-train": factory.generate_train_grafana_dashboard,
    "ray-serve": factory.generate_serve_grafana_dashboard,
}


def main(folder: Path) -> None:
    """Write them."""
    for name, generate in DASHBOARDS.items():
        content, uid = generate()
        json.loads(content)  # better here than as an empty page in Grafana
        (folder / f"{name}.json").write_text(content)
        print(f"{folder / name}.json: {uid}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
