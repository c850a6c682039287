"""The CPU quota of this process's control groups (``docker run --cpus 1.5``).

A quota hides no core: all threads are throttled together when the quota of a period is used up.
Source: Linux kernel, Documentation/admin-guide/cgroup-v2.rst ("cpu.max") and scheduler/sched-bwc.rst (version 1).
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_SYSTEM = Path("/")


def cpu_quota(root: Path = _SYSTEM) -> float | None:
    """The quota in cores, or None without a limit: the lowest quota of the nested groups.

    Args:
        root: folder that holds ``proc`` and ``sys``.
    """
    quotas = [quota for folder in _groups(root) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the groups that may limit this process: its own group and all parents."""
    group_paths = _group_paths(root)
    for line in _lines(root / "proc/self/mountinfo"):
        mounted, _, file_system = line.partition(" - ")
        fields, kind = mounted.split(" "), file_system.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        version_2 = kind[0] == "cgroup2"
        if not version_2 and not (kind[0] == "cgroup" and "cpu" in kind[2].split(",")):
            continue
        mount_root, mount = _unescaped(fields[3]), root / _unescaped(fields[4]).lstrip("/")
        path = group_paths.get("" if version_2 else "cpu")
        if path is None:
            continue
        # In a container, the mount's root may be the container's group, while the path is that of the host.
        inside = (
            path.removeprefix(mount_root) if mount_root != "/" and f"{path}/".startswith(f"{mount_root}/") else path
        )
        parts = [part for part in inside.split("/") if part]
        if ".." in parts:  # outside the mount
            parts = []
        yield from (mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def _group_paths(root: Path) -> dict[str, str]:
    """Path of this process's group by controller; "" is the key of version 2."""
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def _quota(folder: Path) -> float | None:
    """The quota of one group in cores, or None."""
    period = ["100000"]
    limit = _words(folder / "cpu.max")
    if not limit:
        limit, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us") or period
    elif len(limit) > 1:
        period = limit[1:]
    with suppress(ValueError, IndexError):  # "max", or no such files
        quota, length = int(limit[0]), int(period[0])
        if quota > 0 and length > 0:
            return quota / length
    return None


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    """A path of mountinfo, where a space is escaped as backslash 040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
