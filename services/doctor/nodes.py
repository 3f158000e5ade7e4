"""The Ray cluster: its nodes, what runs on them, and whether they can talk to one another."""

from __future__ import annotations

import platform
import socket
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
from ray._private.worker import global_worker  # Ray has no public name for where its files are
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from services.doctor.finding import Finding, attempt, last_line, note, ok, red
from services.doctor.node import NodeReport, report, versions
from services.training.cluster import check_resources
from services.training.settings import TrainSettings

_remote: Any = ray.remote
_SECONDS = 90.0
_CLOCK_SECONDS = 5.0
_DISK_SHARE = 0.05
"""Ray refuses to spill objects to a disk that is fuller than 95 %."""
_BUSY = "Look again when they are free."
_INSTALL = "Install the same pins on all nodes: pip install -c constraints.txt -e '.[service]'."


def examine_nodes(storage: str, tracking: str) -> list[Finding]:
    """Of all nodes that are alive."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    dead = len(ray.nodes()) - len(alive)
    cpus, gpus = (ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU"))
    counted = f"{len(alive)} alive with {cpus:g} CPUs and {gpus:g} GPUs"
    findings = [
        note("nodes", f"{counted}, {dead} lost", "Look at why in the dashboard.") if dead else ok("nodes", counted)
    ]
    reports: list[tuple[dict[str, Any], NodeReport, float]] = []
    here: Any = global_worker.node
    files = here.get_session_dir_path()
    for node in alive:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked = time.time()
        try:
            task: Any = _remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(report)
            answer: NodeReport = ray.get(task.remote(files, storage, tracking), timeout=_SECONDS)
        except (RayError, GetTimeoutError) as error:
            findings.append(red(f"node {node['NodeManagerAddress']}", last_line(error), _INSTALL))
            continue
        # What ran meanwhile cannot be the clock's fault: only how far it lies outside of the time of the question.
        skew = max(asked - answer.clock, answer.clock - time.time(), 0.0)
        reports.append((node, answer, skew))
    if reports:
        findings += [
            _python(reports),
            _versions(reports),
            _clocks(reports),
            _shared_memory(reports),
            _disks(reports),
            _reach(reports, "storage from each node", "storage", storage),
            _reach(reports, "MLflow from each node", "tracking", tracking),
        ]
    return findings


def examine_room(settings: TrainSettings) -> Finding:
    """CPUs for Ray Data beside the workers, and GPUs."""

    def look() -> Finding:
        check_resources(settings)
        cpus = ray.cluster_resources().get("CPU", 0)
        return ok(
            "CPUs left for the feed", f"{settings.workers} workers of {settings.worker_cpus:g} of {cpus:g} logical CPUs"
        )

    return attempt("CPUs left for the feed", look)


def examine_gpus(wanted: bool) -> Finding:
    """Whether Ray's GPUs are PyTorch's, all of them on each node that has some."""
    having = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
    if not having:
        if wanted:
            return red("GPUs", "the cluster has none", "Leave out --gpu, or add GPU nodes.")
        return ok("GPUs", "none, and none asked for: training runs on CPUs")
    seen = Counter[str]()
    for node in having:
        count = int(node["Resources"]["GPU"])
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        try:
            task: Any = _remote(num_cpus=0, num_gpus=count, max_retries=0, scheduling_strategy=here)(_gpus)
            found: list[str] = ray.get(task.remote(), timeout=_SECONDS)
        except GetTimeoutError:
            return note("GPUs", f"some of {node['NodeManagerAddress']} are in use", _BUSY)
        except RayError as error:
            return red("GPUs", f"{node['NodeManagerAddress']}: {last_line(error)}", _INSTALL)
        if len(found) < count:
            return red(
                "GPUs",
                f"Ray gives out {count} GPUs of {node['NodeManagerAddress']}, and PyTorch sees {len(found) or 'none'}",
                "Install the CUDA build of torch there, and check the driver: nvidia-smi.",
            )
        seen.update(found)
    return ok("GPUs", "; ".join(f"{count} of {kind}" for kind, count in sorted(seen.items())))


def _gpus() -> list[str]:
    """What each of this task's GPUs is, after a computation on it."""
    import torch
    from torch.cuda import nccl

    if not torch.cuda.is_available():
        return []
    version: Any = nccl.version()
    software = f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, version))}"
    for index in range(torch.cuda.device_count()):
        torch.zeros(1, device=f"cuda:{index}").add_(1).cpu()
    return [f"{torch.cuda.get_device_name(index)}, {software}" for index in range(torch.cuda.device_count())]


class _Rank:
    """One of those that add up numbers, as training workers add up gradients."""

    def address(self) -> str:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def add(self, address: str, rank: int, world: int, backend: str) -> tuple[float, float]:
        """The sum of all ranks' numbers, and the MB/s at which 32 MB were added up."""
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        device = torch.device("cuda" if backend == "nccl" else "cpu")
        dist.init_process_group(
            backend, init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        try:
            values = torch.full((8 << 20,), float(rank + 1), device=device)
            dist.all_reduce(values[:1].clone())  # the first one connects
            began = time.monotonic()
            dist.all_reduce(values)
            total = float(values[-1])
            return total, values.nbytes / 1e6 / (time.monotonic() - began)
        finally:
            dist.destroy_process_group()


def examine_collective() -> Finding:
    """Whether ranks on the cluster's nodes add up numbers: by NCCL, one on each GPU, if there are two, else by Gloo."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    alive = sum(node["Alive"] for node in ray.nodes())
    backend, world = ("nccl", gpus) if gpus >= 2 else ("gloo", max(alive, 2))
    what = f"all-reduce ({backend})"
    resources = {"num_gpus": 1} if backend == "nccl" else {"num_gpus": 0}
    made: Any = _remote(num_cpus=0, scheduling_strategy="SPREAD", **resources)(_Rank)
    ranks = [made.remote() for _ in range(world)]
    fix = "Nodes must reach one another on all ports (NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME choose the network)."
    started = False
    try:
        address = ray.get([one.address.remote() for one in ranks], timeout=_SECONDS)[0]
        started = True
        answers = ray.get(
            [one.add.remote(address, rank, world, backend) for rank, one in enumerate(ranks)], timeout=_SECONDS
        )
    except GetTimeoutError:
        if backend == "nccl" and not started:
            return note(what, f"{world} ranks got no GPU each in {_SECONDS:.0f} s: some are in use", _BUSY)
        return red(what, f"{world} ranks did not find one another in {_SECONDS:.0f} s", fix)
    except RayError as error:
        return red(what, last_line(error), fix)
    finally:
        for one in ranks:
            ray.kill(one)
    expected = world * (world + 1) / 2
    if any(total != expected for total, _ in answers):
        return red(what, f"the sum over {world} ranks is {answers[0][0]} and should be {expected}", fix)
    return ok(what, f"{world} ranks, {min(speed for _, speed in answers):.0f} MB/s")


Reports = Sequence[tuple[dict[str, Any], NodeReport, float]]


def _where(node: dict[str, Any], answer: NodeReport) -> str:
    return f"{node['NodeManagerAddress']} ({answer.host})"


def _python(reports: Reports) -> Finding:
    here = platform.python_version()
    odd = [f"{_where(node, one)}: {one.python}" for node, one, _ in reports if one.python != here]
    if not odd:
        return ok("Python", f"{here} here and on all nodes")
    same_minor = all(one.python.rpartition(".")[0] == here.rpartition(".")[0] for _, one, _ in reports)
    said = f"{here} here, {', '.join(odd)}"
    return (note if same_minor else red)("Python", said, "Use one Python everywhere: what Ray sends may not arrive.")


def _versions(reports: Reports) -> Finding:
    here = versions()
    odd = [
        f"{_where(node, one)}: {name} {found} (here {here[name]})"
        for node, one, _ in reports
        for name, found in one.versions.items()
        if found != here[name]
    ]
    if odd:
        return red("package versions", ", ".join(odd), _INSTALL)
    return ok("package versions", ", ".join(f"{name} {found}" for name, found in here.items()))


def _clocks(reports: Reports) -> Finding:
    worst, node, one = max(((skew, node, one) for node, one, skew in reports), key=lambda found: found[0])
    if worst > _CLOCK_SECONDS:
        return red("clocks of nodes", f"{_where(node, one)} is off by {worst:.0f} s", "Run an NTP client on all nodes.")
    return ok("clocks of nodes", f"within {worst:.1f} s of this one")


def _shared_memory(reports: Reports) -> Finding:
    small = [
        f"{_where(node, one)}: {one.shm_bytes / 1e9:.1f} GB for an object store of "
        f"{node['Resources'].get('object_store_memory', 0) / 1e9:.1f} GB"
        for node, one, _ in reports
        if one.shm_bytes < node["Resources"].get("object_store_memory", 0)
    ]
    if small:
        return red(
            "/dev/shm",
            ", ".join(small),
            "Make it larger (docker --shm-size, an emptyDir of medium Memory), or --object-store-memory smaller: "
            "Ray would keep objects on the disk.",
        )
    return ok("/dev/shm", f"{min(one.shm_bytes for _, one, _ in reports) / 1e9:.1f} GB at least")


def _disks(reports: Reports) -> Finding:
    full = [
        f"{_where(node, one)}: {one.disk_free_gb:.1f} GB ({one.disk_free:.0%})"
        for node, one, _ in reports
        if one.disk_free < _DISK_SHARE
    ]
    if full:
        return red("disk below Ray's files", f"free: {', '.join(full)}", "Free some: Ray stops at 95 % full.")
    return ok("disk below Ray's files", f"{min(one.disk_free_gb for _, one, _ in reports):.0f} GB free at least")


def _reach(reports: Reports, what: str, field: str, address: str) -> Finding:
    failed = [f"{_where(node, one)}: {getattr(one, field)}" for node, one, _ in reports if getattr(one, field)]
    if failed:
        return red(what, "; ".join(failed), "What opens it must be in the environment of `ray start` on each node.")
    return ok(what, address)
