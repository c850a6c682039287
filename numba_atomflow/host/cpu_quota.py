"""How much of the processor the control groups of a container leave to this process (``docker run --cpus 1.5``).

A quota takes no core away: all stay visible, and threads on them are stopped, all at once, when their time is used up.
Source: Linux kernel, Documentation/admin-guide/cgroup-v2.rst ("cpu.max") and scheduler/sched-bwc.rst (version 1).
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_SYSTEM = Path("/")


def cpu_quota(root: Path = _SYSTEM) -> float | None:
    """Cores' worth of time that this process may use, or None without a limit.

    Groups are nested, and each may have a limit: the least one counts.

    Args:
        root: folder that holds ``proc`` and ``sys``.
    """
    quotas = [quota for folder in _groups(root) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the groups that may limit this process: its own, and each that this one is in."""
    own = _own_groups(root)
    for line in _lines(root / "proc/self/mountinfo"):
        mounted, _, file_system = line.partition(" - ")
        fields, kind = mounted.split(" "), file_system.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        version_2 = kind[0] == "cgroup2"
        if not version_2 and not (kind[0] == "cgroup" and "cpu" in kind[2].split(",")):
            continue
        shown, mount = _unescaped(fields[3]), root / _unescaped(fields[4]).lstrip("/")
        path = own.get("" if version_2 else "cpu")
        if path is None:
            continue
        # A container may see its own group alone as the top of the mount, and still be told the path on the host.
        inside = path.removeprefix(shown) if shown != "/" and (path + "/").startswith(shown + "/") else path
        parts = [part for part in inside.split("/") if part]
        if ".." in parts:  # outside of what is mounted here
            parts = []
        yield from (mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def _own_groups(root: Path) -> dict[str, str]:
    """Path of this process's group by controller; that of version 2 by ""."""
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def _quota(folder: Path) -> float | None:
    """The limit that one group sets, in cores."""
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
    """A path of mountinfo, which writes a space as backslash 040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
