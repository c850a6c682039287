"""The wrappers of Nsight Systems and Nsight Compute: the commands that they build, and the tables that they read.

The tools' output here is in the format of their documentation; recordings of real runs, if there are any, are in
tests/recorded.
"""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import ncu_profile
import nsight
import nsys_profile
import pytest
from child_processes import run
from tiny_models import write_hf_folder

from numba_atomflow.convert import convert

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "recorded"

NSYS_STATS = """\
Generating SQLite file decode.sqlite from decode.nsys-rep
Processing [decode.sqlite] with [/opt/nsys/reports/cuda_gpu_kern_sum.py]...
Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name
30.0,3000,30,100.0,90.0,80,120,1.5,attention
70.0,7000,20,350.0,340.0,300,400,2.5,"void project<(int)3072, (bool)1>(float *)"

"""
NSYS_EMPTY = (
    "Processing [d.sqlite] with [cuda_gpu_kern_sum.py]...\nSKIPPED: d.sqlite does not contain CUDA kernel data.\n"
)

STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
NCU_COLUMNS = {
    "ID": "",
    "Process ID": "",
    "Kernel Name": "",
    "Block Size": "block",
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "byte",
    "dram__bytes_write.sum": "Kbyte",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "%",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "%",
    "launch__registers_per_thread": "register/thread",
    STALLED.format("long_scoreboard"): "inst",
    STALLED.format("barrier"): "inst",
    STALLED.format("selected"): "inst",
    STALLED.format("barrier_not_issued"): "inst",
}


def ncu_page(*rows: tuple[object, ...]) -> str:
    lines = [list(NCU_COLUMNS), list(NCU_COLUMNS.values()), *rows]
    text = "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    return f"==PROF== Connected to process 77\n{text}\n"


def ncu_rows(*names: str) -> str:
    return ncu_page(
        (0, 77, names[0], "(256, 1, 1)", "10,000", "2,000,000", "1.5", "80.5", "20", "64", "9.5", "3", "1", "99"),
        (1, 77, names[1], "(256, 1, 1)", "20,000", "4,000,000", "1.5", "90.5", "30", "64", "7.5", "5", "1", "99"),
        (2, 77, names[2], "(256, 1, 1)", "5,000", "n/a", "1.5", "10", "5", "32", "n/a", "1", "1", "99"),
        (3, 77, names[3], "(256, 1, 1)", "1,000", "1,000", "1.5", "1", "5", "16", "2", "1", "1", "99"),
    )


PLAIN = ncu_rows("project", "project", "attend", "combine")
RENAMED = ncu_rows("layer.0.qkv", "layer.1.qkv", "layer.0.attention", "layer.0.attention")
MUST_READ = {"layer.0.qkv": 2.9e6, "layer.1.qkv": 2.9e6, "layer.0.attention": 1000.0, "sample": 0.0}


# --- Nsight Systems --------------------------------------------------------------------------------------------------


def test_nsys_records_only_the_decode_range_and_every_node_of_the_graph() -> None:
    command = nsys_profile.profile_command("/opt/nsys", Path("out"), ["child.py", "--depth", "3"])
    assert command[:3] == ["/opt/nsys", "profile", "--output=out"]
    assert {"--cuda-graph-trace=node", "--capture-range=nvtx", "--nvtx-capture=decode"} <= set(command)
    assert command[-4:] == [sys.executable, "child.py", "--depth", "3"]


def test_the_table_of_nsys_is_read() -> None:
    first, second = nsys_profile.parse_kernels(NSYS_STATS)
    assert first == nsys_profile.KernelSummary("attention", 30, 3000.0, 100.0, 90.0)
    assert second.name == "void project<(int)3072, (bool)1>(float *)"
    text = nsys_profile.table([first, second], 10)
    assert [line.split()[-4:] for line in text.splitlines()[1:3]] == [
        ["70.0%", "2.0", "0.35", "0.34"],
        ["30.0%", "3.0", "0.10", "0.09"],
    ]
    assert text.endswith("kernels take 1.0 us a token\n")


@pytest.mark.parametrize(("text", "said"), [(NSYS_EMPTY, "does not contain CUDA kernel data"), ("", "says no more")])
def test_a_timeline_without_kernels_is_an_error(text: str, said: str) -> None:
    with pytest.raises(nsight.ToolError, match=said):
        nsys_profile.parse_kernels(text)


# --- Nsight Compute --------------------------------------------------------------------------------------------------


def test_ncu_counts_only_the_decode_range() -> None:
    command = ncu_profile.profile_command("/opt/ncu", Path("out"), ["child.py"])
    assert command[:2] == ["/opt/ncu", "--export=out"]
    assert {"--nvtx", "--nvtx-include=decode", "--section=WarpStateStats"} <= set(command)
    (metrics,) = [part for part in command if part.startswith("--metrics=")]
    assert {"dram__bytes_read.sum", "gpu__time_duration.sum"} <= set(metrics.removeprefix("--metrics=").split(","))
    assert command[-2:] == [sys.executable, "child.py"]
    assert "--print-nvtx-rename=kernel" in ncu_profile.read_command("ncu", Path("r"), renamed=True)


def test_the_raw_page_of_ncu_is_read_in_base_units() -> None:
    first, _, third, _ = ncu_profile.kernel_runs(ncu_profile.parse_raw(PLAIN), ncu_profile.parse_raw(RENAMED))
    assert (first.label, first.kernel) == ("layer.0.qkv", "project")
    assert first.seconds == pytest.approx(10e-6)
    assert first.dram_read == 2e6
    assert first.dram_written == 1500
    assert (first.dram, first.sm, first.occupancy, first.registers) == (80.5, 20.0, None, 64)
    assert first.stalls == {"long_scoreboard": 9.5, "barrier": 3.0}
    assert third.dram_read is None
    assert third.stalls == {"barrier": 1.0}


def test_kernels_are_summed_by_op_and_compared_with_compulsory_traffic() -> None:
    runs = ncu_profile.kernel_runs(ncu_profile.parse_raw(PLAIN), ncu_profile.parse_raw(RENAMED))
    qkv, attention = ncu_profile.by_kind(runs, MUST_READ)
    assert (qkv.kind, qkv.count, qkv.kernels) == ("qkv", 2, ["project"])
    assert qkv.dram_read == 3e6
    assert qkv.must_read == 2.9e6
    assert qkv.stalls == {"long_scoreboard": 8.5, "barrier": 4.0}
    assert (attention.count, attention.kernels) == (1, ["attend", "combine"])
    assert attention.seconds == pytest.approx(6e-6)  # both kernels of the op
    lines = ncu_profile.table([qkv, attention]).splitlines()
    assert lines[1].split()[:6] == ["qkv", "2", "15.00", "3.000", "2.900", "1.034"]
    assert "long_scoreboard 8.5, barrier 4.0" in lines[1]


def test_without_ranges_kernels_go_by_their_own_names() -> None:
    page = ncu_profile.parse_raw(PLAIN)
    rows = ncu_profile.by_kind(ncu_profile.kernel_runs(page, page), {})
    assert [(row.kind, row.count, row.must_read) for row in rows] == [
        ("project", 2, None),
        ("attend", 1, None),
        ("combine", 1, None),
    ]


@pytest.mark.parametrize("text", ["", "==WARNING== No kernels were profiled.\n", ncu_page()])
def test_a_report_without_kernels_is_an_error(text: str) -> None:
    with pytest.raises(nsight.ToolError, match="holds no GPU kernels"):
        ncu_profile.parse_raw(text)


# --- the complete scripts, with fake tools ---------------------------------------------------------------------------

FAKE_TOOL = """#!{python}
import pathlib, subprocess, sys
arguments = sys.argv[1:]
if sys.executable in arguments:
    at = arguments.index(sys.executable)
    subprocess.run(arguments[at:], check=True)
    (out,) = [a.partition("=")[2] for a in arguments[:at] if a.startswith(("--output=", "--export="))]
    pathlib.Path(out + "{ending}").write_text("recorded")
else:
    (report,) = [a for a in arguments if "{ending}" in a]
    assert pathlib.Path(report.partition("=")[2] or report).read_text() == "recorded"
    page = ".renamed" if "--print-nvtx-rename=kernel" in arguments else ".plain"
    sys.stdout.write(pathlib.Path(__file__ + page).read_text())
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced")
    write_hf_folder(folder / "hf")
    return convert(folder / "hf", folder / "tiny.safetensors")


def fake_tool(folder: Path, ending: str, plain: str, renamed: str = "") -> Path:
    """A tool that runs the program under it, writes a report, and prints the given page."""
    tool = folder / "tool"
    tool.write_text(FAKE_TOOL.format(python=sys.executable, ending=ending))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    (folder / "tool.plain").write_text(plain)
    (folder / "tool.renamed").write_text(renamed)
    return tool


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run(
        [sys.executable, str(ROOT / "scripts" / name), *(str(argument) for argument in arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )


def test_nsys_profile_from_model_to_table(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvtx", reason="nvtx names ranges: pip install '.[profile]'")
    tool = fake_tool(tmp_path, ".nsys-rep", NSYS_STATS)
    done = run_script("nsys_profile.py", checkpoint, "-n", 4, "--depth", 5, "-o", tmp_path / "d", "--nsys", tool)
    assert done.returncode == 0, done.stderr
    assert "void project" in done.stdout
    assert "kernels take 2.0 us a token" in done.stdout  # four, and one op by op
    again = run_script("nsys_profile.py", "--read", tmp_path / "d.nsys-rep", "--nsys", tool, "--json")
    assert [kernel["instances"] for kernel in json.loads(again.stdout)["kernels"]] == [30, 20]


def test_ncu_profile_from_model_to_table(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvtx", reason="nvtx names ranges: pip install '.[profile]'")
    tool = fake_tool(tmp_path, ".ncu-rep", PLAIN, RENAMED)
    done = run_script("ncu_profile.py", checkpoint, "-o", tmp_path / "d", "--ncu", tool, "--json")
    assert done.returncode == 0, done.stderr
    qkv, attention = json.loads(done.stdout)["kernels"]
    ops = {op["name"]: op["bytes"] for op in json.loads((tmp_path / "d.ops.json").read_text())}
    assert qkv["must_read"] == ops["layer.0.qkv"] > 0
    assert attention["must_read"] == ops["layer.0.attention"]


def test_a_missing_tool_is_one_sentence(tmp_path: Path) -> None:
    for script, option in (("nsys_profile.py", "--nsys"), ("ncu_profile.py", "--ncu")):
        done = run_script(script, option, tmp_path / "none")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {tmp_path / 'none'} was not found: install Nsight")
        assert len(done.stderr.splitlines()) == 1


def test_a_tool_that_fails_says_why(tmp_path: Path) -> None:
    pytest.importorskip("nvtx", reason="nvtx names ranges: pip install '.[profile]'")
    tool = fake_tool(tmp_path, ".nsys-rep", "")
    done = run_script("nsys_profile.py", "no-such-model", "-o", tmp_path / "d", "--nsys", tool)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: tool failed with exit code 1: ")
    assert not list(tmp_path.glob("*.nsys-rep"))


# --- recordings of real runs -----------------------------------------------------------------------------------------


def recorded(name: str) -> str:
    path = RECORDED / name
    if not path.exists():
        pytest.skip(f"tests/recorded/{name} has not been recorded on a GPU yet")
    return path.read_text()


def test_a_recorded_table_of_nsys() -> None:
    rows = nsys_profile.parse_kernels(recorded("nsys_cuda_gpu_kern_sum.csv"))
    assert rows
    for row in rows:
        assert row.instances > 0
        assert row.mean_ns * row.instances == pytest.approx(row.total_ns, rel=0.01)


def test_a_recorded_page_of_ncu() -> None:
    pages = [ncu_profile.parse_raw(recorded(f"ncu_{name}.csv")) for name in ("raw", "renamed")]
    ops = {op["name"]: op["bytes"] for op in json.loads(recorded("ncu_ops.json"))}
    rows = ncu_profile.by_kind(ncu_profile.kernel_runs(*pages), ops)
    projections = [row for row in rows if row.kind in ("qkv", "o", "gate_up", "down", "vocabulary")]
    assert len(projections) == 5
    for row in projections:
        assert row.dram_read == pytest.approx(row.must_read, rel=0.05)
        assert row.stalls
        assert row.occupancy
        assert 0 < row.dram <= 100
