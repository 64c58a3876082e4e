"""How many processors this process may use: the smallest of the machine's count, the affinity and the cgroup's quota.

`os.cpu_count()` counts the processors of the machine. In a container with a quota of one processor on a machine with 64, the
process would start 64 threads for one processor.
"""

import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def processors(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int:
    """At least 1. A quota of 1.5 processors counts as 2. cgroups, own: where Linux lists quotas and this process's groups."""
    limits = [os.cpu_count() or 1, len(os.sched_getaffinity(0))]
    limits += [max(1, math.ceil(quota)) for quota in _quotas(cgroups, own)]
    return min(limits)


def _quotas(cgroups: Path, own: Path) -> list[float]:
    """Quotas, in processors, of this process's cgroup and of the groups above it; empty if there is none."""
    try:
        lines = own.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    found = []
    # In a container, /proc may name a path of the host. The group is then the root that the container sees.
    for line in [*lines, "0::/", "0:cpu:/"]:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups if not controllers else cgroups / "cpu"
        folder = root / path.strip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            quota = _quota_v1(group) if controllers else _quota_v2(group)
            if quota is not None:
                found.append(quota)
    return found


def _quota_v2(group: Path) -> float | None:
    """`cpu.max` contains "QUOTA PERIOD" in microseconds, or "max PERIOD"."""
    try:
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(group: Path) -> float | None:
    """`cpu.cfs_quota_us` is -1 without a quota."""
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text(encoding="ascii"))
        period = int((group / "cpu.cfs_period_us").read_text(encoding="ascii"))
        return None if quota <= 0 else quota / period
    except (OSError, ValueError, ZeroDivisionError):
        return None
