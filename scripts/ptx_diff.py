"""Whether a change leaves the machine code of the GPU kernels alone: PTX of the working tree against another revision.

    python scripts/ptx_diff.py HEAD~1                              # every kernel, every architecture
    python scripts/ptx_diff.py main --only 'qkv|attention' --arch sm_90
    python scripts/ptx_diff.py v0.1.0 --show 40                    # lines of each difference
    python scripts/ptx_diff.py HEAD --json

The kernels are those of the catalogue in tests/support/kernel_catalogue.py, which tests/ptx compiles. Names of symbols,
and the order of declarations, are left out of the comparison; a kernel with a new name is found by its code. No GPU is
needed. Where PTX differs, both are assembled: the order of instructions in PTX may change without changing the machine
code. The exit code is 1 if a kernel's machine code differs, or if a kernel has no counterpart.
"""

import argparse
import difflib
import gzip
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_against import ROOT, SideError, export
from ptx_dump import CAPABILITIES
from rich.console import Console
from rich.progress import Progress

from numba_atomflow import home
from numba_atomflow.files.atomic import write_whole
from numba_atomflow.ops.cuda.runtime.build import assemble, compilers
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.tables import render

DUMP = Path(__file__).with_name("ptx_dump.py")
Key = tuple[str, str]  # name of the kernel, architecture
Dump = dict[Key, str]


# --- comparing -------------------------------------------------------------------------------------------------------

_SYMBOL = re.compile(r"\b(?:_Z|_?cudapy|__cuda)[\w$]*|[\w$]*(?:NumbaEnv|cudapy)[\w$]*")
_TOP_LEVEL = re.compile(r"^\.(?:common|global|extern|visible \.(?:global|common|shared)|shared)\b")


def normalised(ptx: str, name: str) -> list[str]:
    """Lines of PTX without what may change: symbols are numbered in their order of use, declarations sorted.

    Args:
        name: of the kernel's entry in this PTX.
    """
    names: dict[str, str] = {}

    def numbered(match: re.Match[str]) -> str:
        return names.setdefault(match[0], f"symbol{len(names)}")

    ptx = re.sub(r"//[^\n]*", "", ptx)
    ptx = re.sub(rf"\b{re.escape(name)}(?=\b|_param_)", "kernel", ptx)
    lines = [line.rstrip() for line in ptx.splitlines() if line.strip()]
    declarations = [line for line in lines if _TOP_LEVEL.match(line)]
    code = [_SYMBOL.sub(numbered, line) for line in lines if not _TOP_LEVEL.match(line)]
    used = sorted(_SYMBOL.sub(numbered, line) for line in declarations if _is_used(line, names))
    unused = sorted(_SYMBOL.sub("unused", line) for line in declarations if not _is_used(line, names))
    return used + unused + code


def _is_used(declaration: str, names: Mapping[str, str]) -> bool:
    return all(symbol in names for symbol in _SYMBOL.findall(declaration))


def entry_name(ptx: str) -> str:
    """Name of the kernel in its PTX."""
    match = re.search(r"\.entry\s+([\w$]+)\(", ptx)
    if match is None:
        raise ValueError("PTX without a kernel")
    return match[1]


@dataclass(frozen=True)
class Difference:
    """A kernel whose PTX differs.

    Attributes:
        lines: how many of its PTX differ; diff: them, as a unified diff.
        same_machine_code: the assembler makes the same instructions of both.
        registers, code_bytes: before and after.
    """

    name: str
    architecture: str
    lines: int
    diff: list[str]
    same_machine_code: bool
    registers: tuple[int, int]
    code_bytes: tuple[int, int]


@dataclass(frozen=True)
class Comparison:
    """The outcome for every kernel.

    Attributes:
        identical: how many have the same PTX under the same name.
        renamed: [old name, new name, architecture] of those with the same PTX under another name.
        differ: those whose PTX differs. removed, added: those without a counterpart.
    """

    identical: int
    renamed: list[tuple[str, str, str]]
    differ: list[Difference]
    removed: list[Key]
    added: list[Key]

    @property
    def same(self) -> bool:
        """Whether the same instructions run."""
        return all(row.same_machine_code for row in self.differ) and not (self.removed or self.added)


def compare(before: Dump, after: Dump) -> Comparison:
    """Match kernels by name, then those left over by code, or by the name that their code has elsewhere."""
    old = {key: normalised(ptx, entry_name(ptx)) for key, ptx in before.items()}
    new = {key: normalised(ptx, entry_name(ptx)) for key, ptx in after.items()}
    removed, added = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
    pairs = {key: key for key in old.keys() & new.keys()}
    new_names: dict[str, str] = {}
    renamed = []
    for key in removed:
        match = next((other for other in added if other[1] == key[1] and new[other] == old[key]), None)
        if match is not None:
            renamed.append((key[0], match[0], key[1]))
            new_names[key[0]] = match[0]
            added.remove(match)
    gone = [key for key in removed if (key[0], new_names.get(key[0]), key[1]) not in renamed]
    for key in list(gone):
        match = (new_names.get(key[0], ""), key[1])
        if match in added:
            pairs[key] = match
            gone.remove(key)
            added.remove(match)
    differ = [
        _difference(other, old[key], new[other], before[key], after[other])
        for key, other in sorted(pairs.items())
        if old[key] != new[other]
    ]
    return Comparison(len(pairs) - len(differ), renamed, differ, gone, added)


def _difference(key: Key, old: list[str], new: list[str], before: str, after: str) -> Difference:
    diff = list(difflib.unified_diff(old, new, "before", "after", lineterm="", n=2))
    changed = sum(line[0] in "+-" for line in diff[2:])
    (code, registers), (new_code, new_registers) = (machine_code(ptx, key[1]) for ptx in (before, after))
    return Difference(*key, changed, diff, code == new_code, (registers, new_registers), (len(code), len(new_code)))


def machine_code(ptx: str, architecture: str) -> tuple[bytes, int]:
    """Instructions that the assembler makes of a kernel, and its number of registers."""
    cubin, log = assemble(ptx, CAPABILITIES[architecture])
    registers = re.search(r"Used (\d+) registers", log)
    return elf_section(cubin, f".text.{entry_name(ptx)}"), int(registers[1]) if registers else 0


def elf_section(file: bytes, name: str) -> bytes:
    """A section of a 64-bit ELF file, such as a cubin (System V ABI, chapter 4).

    Raises:
        KeyError: it has no such section.
    """
    (start,) = struct.unpack_from("<Q", file, 40)
    size, count, names = struct.unpack_from("<HHH", file, 58)
    headers = [struct.unpack_from("<IIQQQQ", file, start + i * size) for i in range(count)]
    strings = headers[names][4]
    for offset, _, _, _, begin, length in headers:
        if file[strings + offset : file.index(b"\0", strings + offset)].decode() == name:
            return file[begin : begin + length]
    raise KeyError(name)


# --- compiling -------------------------------------------------------------------------------------------------------


def dump(tree: Path, only: str, architectures: Sequence[str], jobs: int, step: Callable[[], None]) -> Dump:
    """PTX of a checkout's kernels, by `jobs` processes.

    Raises:
        SideError: the checkout cannot be compiled.
    """
    found: Dump = {}
    failed: list[str] = []

    def work(part: int) -> None:
        task = {"only": only, "architectures": list(architectures), "part": part, "parts": jobs}
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                [sys.executable, str(DUMP), str(tree), json.dumps(task)],
                env=os.environ | {"PYTHONPATH": str(tree)},
                cwd=tree,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                record = json.loads(line)
                found[record["name"], record["architecture"]] = record["ptx"]
                step()
            if process.wait():
                errors.seek(0)
                failed.append((errors.read().strip().splitlines() or ["no message"])[-1])

    threads = [threading.Thread(target=work, args=(part,), daemon=True) for part in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise SideError(f"The kernels of {tree} do not compile: {failed[0]}")
    return found


def revision_dump(
    revision: str, only: str, architectures: Sequence[str], jobs: int, step: Callable[[], None]
) -> tuple[str, Dump]:
    """Short commit and PTX of a revision. A dump of everything is kept in the folder of compiled code."""
    with tempfile.TemporaryDirectory() as folder:
        short = export(revision, Path(folder))
        versions = hashlib.sha256(compilers().encode()).hexdigest()[:8]
        kept = home.compiled() / f"ptx-{short}-{versions}.json.gz"
        if kept.exists():
            rows = json.loads(gzip.decompress(kept.read_bytes()))
            return short, {
                (name, arch): ptx for name, arch, ptx in rows if arch in architectures and re.search(only, name)
            }
        found = dump(Path(folder), only, architectures, jobs, step)
    if not only and set(architectures) == set(CAPABILITIES):
        kept.parent.mkdir(parents=True, exist_ok=True)
        data = json.dumps([[name, arch, ptx] for (name, arch), ptx in sorted(found.items())])
        write_whole(kept, gzip.compress(data.encode()), replace=True)
    return short, found


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="what to compare the working tree with: anything that git knows")
    parser.add_argument("--only", type=_expression, default="", metavar="REGEX", help="kernels whose name matches")
    parser.add_argument("--arch", action="append", choices=list(CAPABILITIES), help="may be repeated; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--show", type=int, default=12, metavar="N", help="lines per difference (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="a record on standard output")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; at least 1 process is needed")
    try:
        short, comparison = _run(options)
    except SideError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json_text(_record(short, comparison)))
    else:
        _print(short, comparison, options.show)
    return 0 if comparison.same else 1


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from error
    return text


def _run(options: argparse.Namespace) -> tuple[str, Comparison]:
    architectures = options.arch or list(CAPABILITIES)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("compiling the kernels of both sides", total=None)

        def step() -> None:
            progress.advance(task)

        short, before = revision_dump(options.revision, options.only, architectures, options.jobs, step)
        progress.reset(task, description=f"compiling the working tree, after {short}", total=len(before))
        after = dump(ROOT, options.only, architectures, options.jobs, step)
    if not before and not after:
        raise SideError(f"No kernel's name matches {options.only!r}.")
    return short, compare(before, after)


def _record(short: str, comparison: Comparison) -> dict[str, object]:
    return {
        "revision": short,
        "identical": comparison.identical,
        "renamed": [list(row) for row in comparison.renamed],
        "differ": [vars(difference) for difference in comparison.differ],
        "removed": [list(key) for key in comparison.removed],
        "added": [list(key) for key in comparison.added],
    }


def _print(short: str, comparison: Comparison, show: int) -> None:
    for difference in comparison.differ:
        if not difference.same_machine_code:
            print(f"\n{difference.name}, {difference.architecture}: {difference.lines} lines differ")
            print("\n".join(difference.diff[:show]))
    rows = [(f"{old} -> {new}", arch, "renamed, same PTX") for old, new, arch in comparison.renamed]
    rows += [(row.name, row.architecture, _outcome(row)) for row in comparison.differ]
    rows += [(name, arch, f"only in {short}") for name, arch in comparison.removed]
    rows += [(name, arch, "only in the working tree") for name, arch in comparison.added]
    if rows:
        print(render("table", ("kernel", "architecture", f"against {short}"), rows, text_columns=(0, 1, 2)))
    same = sum(row.same_machine_code for row in comparison.differ)
    print(
        f"{comparison.identical} kernels have identical PTX, {len(comparison.renamed)} under another name; "
        f"{same} have other PTX with identical machine code, {len(comparison.differ) - same} other machine code; "
        f"{len(comparison.removed)} only in {short}, {len(comparison.added)} new."
    )


def _outcome(row: Difference) -> str:
    if row.same_machine_code:
        return f"{row.lines} lines of PTX differ, machine code identical"
    (registers, new_registers), (size, new_size) = row.registers, row.code_bytes
    return (
        f"{row.lines} lines of PTX differ, machine code differs: "
        f"{registers} -> {new_registers} registers, {size} -> {new_size} bytes"
    )


if __name__ == "__main__":
    sys.exit(main())
