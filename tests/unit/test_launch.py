"""Launch plans as pure functions of the environment, and the agent with real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mswift
from mswift.config import parse_command
from mswift.errors import ConfigError, LaunchError, LayoutError
from mswift.launch import KEEP_MALLOC, MALLOC, PRODUCT_CACHES, Topology, advice, check_port, check_processes, first_host, plan, topology
from mswift.runtime.precision import cpu_multiplies_bf16

PY = ("python3", "-P")
ARGS = ("--model", "m")
PROGRAM = (*PY, "-m", "mswift.cli", "sft", *ARGS)
FIXED = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **PRODUCT_CACHES}
READY = {"OMP_NUM_THREADS": "2", **FIXED, **MALLOC}
NEW_SHAPES = """
import ctypes, torch

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info

def mib_after(shapes):
    for rows in shapes:
        torch.mm(torch.zeros(rows, 48, dtype=torch.bfloat16), torch.zeros(64, 48, dtype=torch.bfloat16).t())
    return (libc.mallinfo2().uordblks + libc.mallinfo2().hblkhd) / 2**20

before = mib_after(range(1, 200))
print(mib_after(range(200, 400)) - before)
"""
SRUN = {
    "SLURM_STEP_ID": "3",
    "SLURM_JOB_ID": "120007",
    "SLURM_NTASKS": "99",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu[007-010,12],login",
}


def make(environ: dict[str, str], cores: int = 8, *, glibc: bool = True):
    return plan("sft", ARGS, environ, cores, python=PY, glibc=glibc)


def test_one_process_restarts_once_for_its_allocator() -> None:
    made = make({})
    assert made is not None
    assert made.argv == PROGRAM
    assert made.env == {"OMP_NUM_THREADS": "8", **FIXED, **MALLOC}
    assert (made.required, made.port) == (False, None)
    assert make(made.env) is None
    assert make(READY) is None


def test_a_conversion_has_no_large_pages() -> None:
    made = plan("export", ARGS, {}, 8, python=PY)
    assert made is not None
    assert set(make({}).env) - set(made.env) == {"GLIBC_TUNABLES"}  # type: ignore[union-attr]
    own = plan("export", ARGS, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, 8, python=PY)
    assert own is not None
    assert "GLIBC_TUNABLES" not in own.env


def test_what_is_set_stays() -> None:
    made = make({"OMP_NUM_THREADS": "3", "MALLOC_TOP_PAD_": ""})
    assert made is not None
    assert made.env == FIXED | {name: value for name, value in MALLOC.items() if name != "MALLOC_TOP_PAD_"}
    own = make({"LRU_CACHE_CAPACITY": "4096", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"})
    assert own is not None
    assert set(own.env) == {"OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", *MALLOC}
    kept = make({KEEP_MALLOC: "1"})
    assert kept is not None
    assert set(kept.env) == {"OMP_NUM_THREADS", *FIXED}
    musl = make({"OMP_NUM_THREADS": "3", **FIXED}, glibc=False)
    assert musl is None


@pytest.mark.skipif(not cpu_multiplies_bf16(), reason="bf16 products are no compiled ones on this processor")
def test_products_of_ever_new_shapes_take_no_more_memory() -> None:
    made = make({"OMP_NUM_THREADS": "1"})
    assert made is not None
    grown = {}
    for name, env in (("launched", made.env), ("plain", {key: value for key, value in made.env.items() if key not in PRODUCT_CACHES})):
        outer = {key: value for key, value in os.environ.items() if key not in PRODUCT_CACHES}
        done = subprocess.run([sys.executable, "-c", NEW_SHAPES], env={**outer, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        grown[name] = float(done.stdout)
    assert grown["launched"] < 10 < 50 < grown["plain"]


def test_several_processes_on_one_node() -> None:
    made = make({"NPROC_PER_NODE": "4"})
    assert made is not None
    assert made.argv == (
        *(*PY, "-m", "mswift.launch", "--nproc_per_node", "4", "--standalone", "--local_addr", "127.0.0.1"),
        *("--no_python", *PY, "-u", "-m", "mswift.cli", "sft", *ARGS),
    )
    assert made.env == {"OMP_NUM_THREADS": "2", **FIXED, "TOKENIZERS_PARALLELISM": "false", **MALLOC}
    assert (made.required, made.port) == (True, None)
    worker = {"NPROC_PER_NODE": "4", "RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", **made.env}
    assert make(worker) is None


def test_a_fixed_port_is_tested_on_the_node_that_offers_it() -> None:
    one = make({"NPROC_PER_NODE": "2", "MASTER_PORT": "1234"})
    assert one is not None
    assert one.argv[4:14] == ("--nproc_per_node", "2", "--nnodes", "1", "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", "1234")
    assert one.port == 1234
    two = make({"NPROC_PER_NODE": "2", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host"})
    assert two is not None
    assert two.argv[4:14] == ("--nproc_per_node", "2", "--nnodes", "2", "--node_rank", "1", "--master_addr", "host", "--master_port", "29500")
    assert two.port is None
    first = make({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "host"})
    assert first is not None
    assert (first.port, first.argv[4:6]) == (29500, ("--nproc_per_node", "1"))


def test_srun_tasks_become_ranks() -> None:
    made = make(SRUN)
    assert made is not None
    assert made.argv == PROGRAM
    assert {name: made.env[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "10010",
    }
    assert made.env["OMP_NUM_THREADS"] == "2"
    assert make({**SRUN, **made.env}) is None
    other = make({**SRUN, "SLURM_CPUS_PER_TASK": "6", "MASTER_ADDR": "here", "MASTER_PORT": "7"})
    assert other is not None
    assert (other.env["OMP_NUM_THREADS"], other.env["MASTER_ADDR"], other.env["MASTER_PORT"]) == ("6", "here", "7")


def test_every_task_of_a_job_finds_the_same_place() -> None:
    places = set()
    for task in range(8):
        made = make({**SRUN, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % 4), "SLURM_NODEID": str(task // 4)})
        assert made is not None
        assert made.env["RANK"] == str(task)
        places.add((made.env["MASTER_ADDR"], made.env["MASTER_PORT"]))
    assert len(places) == 1
    next_step = make({**SRUN, "SLURM_STEP_ID": "4"})
    assert next_step is not None
    assert next_step.env["MASTER_PORT"] == "10011"


def test_a_batch_script_is_one_process_and_is_told_so() -> None:
    batch = {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    assert topology(batch) == Topology("single")
    assert advice(batch) == ["this Slurm job has 99 tasks, but mswift runs as one process: start it with srun to use them all"]
    assert topology({**batch, "SLURM_STEP_ID": str(2**32 - 6), "SLURM_STEP_NUM_TASKS": "4"}) == Topology("single")
    assert topology({**batch, "NPROC_PER_NODE": "2"}) == Topology("agent", 2, 2)
    assert advice(SRUN) == advice({}) == advice({**batch, "NPROC_PER_NODE": "2"}) == []


def test_one_srun_task_a_node_with_several_processes_each() -> None:
    environ = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "NPROC_PER_NODE": "4"}
    assert topology(environ) == Topology("agent", world=8, local=4, nodes=2, node_rank=1)
    made = make(environ)
    assert made is not None
    assert made.argv[4:12] == ("--nproc_per_node", "4", "--nnodes", "2", "--node_rank", "1", "--master_addr", "gpu007")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE is 'two' in the environment, wanted a whole number of at least 1"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE is '0' in the environment, wanted a whole number of at least 1"),
        ({"NNODES": "1:4"}, "NNODES is '1:4' in the environment, wanted a whole number of at least 1"),
        ({"NNODES": "2"}, "NNODES is 2, but NODE_RANK is not set; set it to 0..1, another number on each node"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK is 2, wanted 0..1 for NNODES=2"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "NNODES is 2, but MASTER_ADDR is not set; set it to the address of the node with NODE_RANK 0"),
        (
            {**SRUN, "NPROC_PER_NODE": "4"},
            "NPROC_PER_NODE or NNODES is set, but srun started 8 tasks for 2 node(s): start one task a node (--ntasks-per-node=1), "
            "or unset them so that every task becomes one process",
        ),
        (
            {name: value for name, value in SRUN.items() if "NODELIST" not in name},
            "srun did not say which nodes there are (SLURM_JOB_NODELIST is not set); set MASTER_ADDR to the first node",
        ),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2' in the environment, wanted a whole number of at least 1"),
    ],
)
def test_environments_that_cannot_start(environ: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        make(environ)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-010,12],login", "gpu007"),
        ("gpu[3,5-9]", "gpu3"),
        ("rack[1-2]-node[01-04],x", "rack1-node01"),
        ("a-b-[01-02].cluster", "a-b-01.cluster"),
    ],
)
def test_first_host(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first
    assert first_host(f"{nodelist},zzz") == first


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 256))
def test_plans_are_settled_after_one_step(local: int, nodes: int, cores: int) -> None:
    environ = {"NPROC_PER_NODE": str(local), "NNODES": str(nodes), "NODE_RANK": str(nodes - 1), "MASTER_ADDR": "h"}
    made = plan("sft", ARGS, environ, cores)
    assert made is not None
    assert 1 <= int(made.env["OMP_NUM_THREADS"]) <= max(1, cores // local)
    world = {"RANK": "0", "WORLD_SIZE": str(local * nodes), "LOCAL_WORLD_SIZE": str(local)} if local * nodes > 1 else {}
    assert topology(environ).world == local * nodes
    assert plan("sft", ARGS, {**environ, **made.env, **world}, cores) is None


def test_processes_that_do_not_fit_are_found_before_the_start() -> None:
    config = parse_command("sft", ["--model", "m", "--dataset", "d", "--tp", "2", "--pp", "2", "--micro_batch_size", "3"])
    with pytest.raises(LayoutError) as layout:
        check_processes(config, {"NPROC_PER_NODE": "2"})
    assert "tp(2) x pp(2) x cp(1) = 4 does not divide 2 process(es)" in str(layout.value)
    assert "NPROC_PER_NODE=4" in str(layout.value)
    with pytest.raises(ConfigError, match=r"micro_batch_size\(3\) x data parallel\(2\) = 6; the nearest above is 18$"):
        check_processes(config, {"NPROC_PER_NODE": "4", "NNODES": "2", "NODE_RANK": "0"})
    config.train.global_batch_size = 12
    check_processes(config, {"NPROC_PER_NODE": "4", "NNODES": "2", "NODE_RANK": "0"})
    check_processes(config, {"RANK": "7", "WORLD_SIZE": "16"})


def test_a_taken_port() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(LaunchError) as caught:
            check_port(port)
    assert (
        str(caught.value) == f"port {port} (MASTER_PORT) is in use by another program; set MASTER_PORT to a free one, or on one node leave it unset"
    )
    check_port(port)
    with pytest.raises(LaunchError, match="cannot be used"):
        check_port(70000)


# A stand-in for the command, put in place by sitecustomize so that the launcher itself runs unchanged.
COMMAND = """
import os, sys, time, types
from pathlib import Path

def sft(config):
    from mswift.errors import DataError
    rank, case = os.environ["RANK"], config.template.system
    if case == "all":
        raise DataError("data.jsonl is missing; wanted a file")
    if case == "one" and rank == "1":
        raise DataError("row 7 is bad")
    if case == "consequence":
        time.sleep(0.3 * (1 + int(rank)))
        raise DataError("the cause") if rank == "0" else RuntimeError("connection closed by peer")
    if case == "done":
        return
    Path(config.save.output_dir, rank).write_text(str(os.getpid()))
    time.sleep(60)

module = types.ModuleType("mswift.commands.sft")
module.sft = sft
module.check = lambda config, world: None
sys.modules[module.__name__] = module
"""


def start(folder: Path, case: str) -> subprocess.Popen[str]:
    (folder / "sitecustomize.py").write_text(COMMAND)
    root = str(Path(mswift.__file__).parents[1])
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_", "NNODES", "NODE_RANK", "RANK", "WORLD"))}
    env = {**clean, "PYTHONPATH": f"{folder}{os.pathsep}{root}", "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    argv = ["sft", "--model", "m", "--dataset", "d", "--system", case, "--output_dir", str(folder)]
    return subprocess.Popen(
        [sys.executable, "-m", "mswift.cli", *argv], env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("case", "code", "message"),
    [
        ("all", 2, "error: data.jsonl is missing; wanted a file\n"),
        ("one", 2, "error: row 7 is bad (rank 1)\n"),
        ("consequence", 2, "error: the cause\n"),
        ("done", 0, ""),
    ],
)
def test_two_processes_end_with_one_line(case: str, code: int, message: str, tmp_path: Path) -> None:
    out, err = (process := start(tmp_path, case)).communicate(timeout=60)
    assert (err, out) == (message, "")
    assert process.returncode == code


def running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("signals", "code", "message"),
    [
        ([signal.SIGTERM], 128 + signal.SIGTERM, "stopped by SIGTERM\n"),
        ([signal.SIGINT, signal.SIGINT], 130, "interrupted\n"),
        ([signal.SIGKILL], -signal.SIGKILL, ""),
    ],
)
def test_signals_leave_no_process_behind(signals: list[signal.Signals], code: int, message: str, tmp_path: Path) -> None:
    process = start(tmp_path, "wait")
    files = [tmp_path / "0", tmp_path / "1"]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.05)
    pids = [int(file.read_text()) for file in files]
    assert all(map(running, pids))
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err == message
    deadline = time.monotonic() + 10
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, pids))
