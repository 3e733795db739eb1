"""How processes start: a plan made from the environment (pure), then one exec; and the agent that watches the processes of a node.

`plan` answers what this process has to become before it may import torch: a worker with the right environment (glibc reads its allocator settings
at start, so they need a new process image), or, with ``NPROC_PER_NODE`` or ``NNODES``, the agent (``python -m mswift.launch``). The agent is
torchrun's own, made quiet: one error line, the worker's exit code, and no process left behind.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NoReturn

from mswift.config import Config, DataConfig, ExportConfig, SftConfig
from mswift.errors import LaunchError, MswiftError
from mswift.log import rank
from mswift.parallel.layout import ParallelLayout

if TYPE_CHECKING:
    import psutil
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

AGENT_PID = "MSWIFT_AGENT_PID"
KEEP_MALLOC = "MSWIFT_KEEP_MALLOC"
_PAGES = "GLIBC_TUNABLES"
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(8 * 2**30),
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
    _PAGES: "glibc.malloc.hugetlb=1",
}
"""Freed memory is kept, and lies in large pages where the system gives them to who asks (glibc 2.35 and newer)."""
_CONVERTERS = ("export",)
"""Verbs that allocate every weight and fill one at a time: large pages would be touched for the head of each."""
PRODUCT_CACHES = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
"""Compiled products that torch and oneDNN each keep: 0.3 MiB for every shape that ever came by, 1024 of them unless told otherwise."""
_DEFAULT_PORT = 29500
_SLURM_PORTS = range(10000, 30000)
_SLURM_SPECIAL_STEPS = 2**32 - 16  # batch script, interactive shell and the like have step ids from here on


@dataclass(frozen=True, slots=True)
class Topology:
    """How many processes a run has, and what this process is among them.

    Args:
        kind: ``single`` (the only process), ``worker`` (torchrun or alike gave it a rank), ``slurm`` (srun started it, no rank yet),
            ``agent`` (it has to start the processes of this node).
        local: processes on this node. nodes: number of nodes. node_rank: which one this is. world: processes in all.
    """

    kind: Literal["single", "worker", "slurm", "agent"]
    world: int = 1
    local: int = 1
    nodes: int = 1
    node_rank: int = 0


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What this process has to become.

    Args:
        argv: command of the new process image. env: variables to set for it, on top of those that are set.
        port: TCP port that has to be free on this machine. required: False if only speed depends on it.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    port: int | None = None
    required: bool = True


def plan(
    verb: str,
    argv: Sequence[str],
    environ: Mapping[str, str],
    cpu_count: int,
    *,
    python: Sequence[str] = (sys.executable,),
    glibc: bool = True,
) -> LaunchPlan | None:
    """What ``mswift VERB ARGV...`` has to become before it runs; None if it can run as it is. Pure: reads and changes nothing else.

    Args:
        cpu_count: cores that this process may use. python: the interpreter and its options.
        glibc: whether the C library is glibc, whose allocator settings are then set.

    Raises:
        LaunchError: the launch variables are incomplete or contradict each other.
    """
    where = topology(environ)
    env = _environment(where, environ, cpu_count, glibc)
    if verb in _CONVERTERS:
        env.pop(_PAGES, None)
    program = ("-m", "mswift.cli", verb, *argv)
    if where.kind == "agent":
        options, port = _agent_options(where, environ)
        command = (*python, "-m", "mswift.launch", *options, "--no_python", *python, "-u", *program)
        return LaunchPlan(command, env, port)
    if where.kind == "slurm":
        return LaunchPlan((*python, *program), env | _slurm_variables(where, environ))
    return LaunchPlan((*python, *program), env, required=False) if env else None


def check_processes(config: Config, environ: Mapping[str, str]) -> None:
    """Raise before anything starts if the processes do not fit the parallel sizes, or the batch does not fit the processes.

    Raises:
        LayoutError, ConfigError, LaunchError: with every factor.
    """
    where = topology(environ)
    if isinstance(config, ExportConfig) and config.export.dry_run:
        return  # one process imagines the others
    if isinstance(config, DataConfig):
        if where.world > 1:
            raise LaunchError(f"mswift data runs in one process, got {where.world}; leave NPROC_PER_NODE and srun out")
        return
    layout = ParallelLayout(world=where.world, **config.parallel.sizes())
    if isinstance(config, SftConfig):
        config.train.resolve_global_batch_size(layout.dp)


def topology(environ: Mapping[str, str]) -> Topology:
    """Read the launch variables: ``RANK`` first, then ``NPROC_PER_NODE`` and ``NNODES``, then those of srun.

    Raises:
        LaunchError: a variable is missing or is no number, or srun and ``NPROC_PER_NODE`` contradict each other.
    """
    if "RANK" in environ:
        world, number = _number(environ, "WORLD_SIZE", 1), _number(environ, "RANK", 0, lowest=0)
        if number >= world:
            raise LaunchError(f"RANK is {number} in the environment, wanted less than WORLD_SIZE, which is {world}; start all ranks with torchrun")
        return Topology("worker", world, _number(environ, "LOCAL_WORLD_SIZE", 1))
    tasks = _srun_tasks(environ)
    if "NPROC_PER_NODE" in environ or "NNODES" in environ:
        return _agent_topology(environ, tasks)
    if tasks > 1:
        return Topology("slurm", tasks, _slurm_local_size(environ, tasks), _slurm_nodes(environ), _number(environ, "SLURM_NODEID", 0, lowest=0))
    return Topology("single")


def advice(environ: Mapping[str, str]) -> list[str]:
    """A line for who asked Slurm for several tasks and then started one process, in the batch script or an interactive shell."""
    tasks = environ.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in environ and tasks not in ("", "1") and topology(environ).kind == "single" and _srun_tasks(environ) == 1:
        return [f"this Slurm job has {tasks} tasks, but mswift runs as one process: start it with srun to use them all"]
    return []


def _srun_tasks(environ: Mapping[str, str]) -> int:
    """Tasks that srun started together with this one; 1 without srun. A batch script has SLURM_PROCID too, but no step of its own."""
    if "SLURM_PROCID" not in environ or _number(environ, "SLURM_STEP_ID", _SLURM_SPECIAL_STEPS, lowest=0) >= _SLURM_SPECIAL_STEPS:
        return 1
    return _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))


def _agent_topology(environ: Mapping[str, str], tasks: int) -> Topology:
    local = _number(environ, "NPROC_PER_NODE", 1)
    nodes = _number(environ, "NNODES", _slurm_nodes(environ) if tasks > 1 else 1)
    if tasks not in (1, nodes):
        raise LaunchError(
            f"NPROC_PER_NODE or NNODES is set, but srun started {tasks} tasks for {nodes} node(s): start one task a node "
            "(--ntasks-per-node=1), or unset them so that every task becomes one process"
        )
    if nodes == 1:
        return Topology("agent" if local > 1 else "single", local, local)
    node_rank = _number(environ, "NODE_RANK", _number(environ, "SLURM_NODEID", -1, lowest=0), lowest=0)
    if node_rank < 0:
        raise LaunchError(f"NNODES is {nodes}, but NODE_RANK is not set; set it to 0..{nodes - 1}, another number on each node")
    if node_rank >= nodes:
        raise LaunchError(f"NODE_RANK is {node_rank}, wanted 0..{nodes - 1} for NNODES={nodes}")
    return Topology("agent", local * nodes, local, nodes, node_rank)


def _number(environ: Mapping[str, str], name: str, default: int, lowest: int = 1) -> int:
    text = environ.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"\d{1,12}", text) or int(text) < lowest:
        raise LaunchError(f"{name} is {text!r} in the environment, wanted a whole number of at least {lowest}")
    return int(text)


def _environment(where: Topology, environ: Mapping[str, str], cpu_count: int, glibc: bool) -> dict[str, str]:
    """Variables that a worker needs before it starts and that are not set yet."""
    cores = max(1, cpu_count // where.local)
    wanted = {
        "OMP_NUM_THREADS": str(_number(environ, "SLURM_CPUS_PER_TASK", cores) if where.kind == "slurm" else cores),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        **PRODUCT_CACHES,
    }
    if where.local > 1:
        wanted["TOKENIZERS_PARALLELISM"] = "false"
    if glibc and environ.get(KEEP_MALLOC, "0") in ("", "0"):
        wanted |= MALLOC
    return {name: value for name, value in wanted.items() if name not in environ}


def _agent_options(where: Topology, environ: Mapping[str, str]) -> tuple[list[str], int | None]:
    """torchrun's options, and the port that this node has to offer."""
    options = ["--nproc_per_node", str(where.local)]
    if where.nodes == 1 and "MASTER_PORT" not in environ:
        return [*options, "--standalone", "--local_addr", "127.0.0.1"], None
    port = _number(environ, "MASTER_PORT", _DEFAULT_PORT)
    address = environ.get("MASTER_ADDR", "127.0.0.1" if where.nodes == 1 else _slurm_first_node(environ))
    if not address:
        raise LaunchError(f"NNODES is {where.nodes}, but MASTER_ADDR is not set; set it to the address of the node with NODE_RANK 0")
    options += ["--nnodes", str(where.nodes), "--node_rank", str(where.node_rank), "--master_addr", address, "--master_port", str(port)]
    return options, port if where.node_rank == 0 else None


def _slurm_variables(where: Topology, environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have told this task, from what srun told it; MASTER_ADDR and MASTER_PORT win if they are set."""
    address = environ.get("MASTER_ADDR") or _slurm_first_node(environ)
    if not address:
        raise LaunchError("srun did not say which nodes there are (SLURM_JOB_NODELIST is not set); set MASTER_ADDR to the first node")
    job = _number(environ, "SLURM_JOB_ID", 0, lowest=0) + _number(environ, "SLURM_STEP_ID", 0, lowest=0)
    return {
        "RANK": str(_number(environ, "SLURM_PROCID", 0, lowest=0)),
        "WORLD_SIZE": str(where.world),
        "LOCAL_RANK": str(_number(environ, "SLURM_LOCALID", 0, lowest=0)),
        "LOCAL_WORLD_SIZE": str(where.local),
        "MASTER_ADDR": address,
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_SLURM_PORTS[job % len(_SLURM_PORTS)]),
    }


def _slurm_nodes(environ: Mapping[str, str]) -> int:
    return _number(environ, "SLURM_STEP_NUM_NODES", _number(environ, "SLURM_NNODES", 1))


def _slurm_local_size(environ: Mapping[str, str], tasks: int) -> int:
    """Tasks on this node, from a list such as ``4(x2),3``; evenly spread where there is no list."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "")).split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID", 0, lowest=0)
    return max(1, counts[node]) if node < len(counts) else max(1, -(-tasks // _slurm_nodes(environ)))


def _slurm_first_node(environ: Mapping[str, str]) -> str:
    lists = (environ.get(name) for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"))
    return next((first_host(nodes) for nodes in lists if nodes), "")


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: ``gpu[007-010,12],login`` -> ``gpu007``."""
    depth, end = 0, len(nodelist)
    for position, character in enumerate(nodelist):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            end = position
            break
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodelist[:end].strip())


def check_port(port: int) -> None:
    """Raise if another program listens on a TCP port of this machine.

    Raises:
        LaunchError: it is taken, or this user may not have it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "is in use by another program" if taken else f"cannot be used: {error}"
            raise LaunchError(f"port {port} (MASTER_PORT) {reason}; set MASTER_PORT to a free one, or on one node leave it unset") from error


def execute(launch: LaunchPlan, *, replace: bool) -> int:
    """Become the planned process (`replace`), or run it as a child and return its exit code.

    Raises:
        LaunchError: the port is taken.
    """
    if launch.port is not None:
        check_port(launch.port)
    env = {**os.environ, **launch.env}
    if replace:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(launch.argv[0], launch.argv, env)
    return subprocess.run(launch.argv, env=env, check=False).returncode


def under_agent() -> bool:
    """Whether this process was started by our agent, which then speaks to the user for it."""
    return os.environ.get(AGENT_PID) == str(os.getppid())


def follow_agent() -> None:
    """Let the kernel end this worker when its agent dies, however it dies (Linux)."""
    if under_agent() and sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def report(error: MswiftError, *, on_all_ranks: bool = False) -> int:
    """Tell the user about an error in one line, once for a node, and return the exit code.

    Args:
        on_all_ranks: every rank has this same error, so rank 0 speaks for them.
    """
    line = " ".join(str(error).splitlines())
    if under_agent() and "TORCHELASTIC_ERROR_FILE" in os.environ:
        if rank():
            time.sleep(1)  # where every rank has this error, rank 0 is the one that the agent hears first
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w", encoding="utf8") as file:
            json.dump({"message": line, "timestamp": int(time.time()), "exit_code": error.exit_code}, file)
    elif rank() == 0 or not on_all_ranks:
        print(f"{f'[rank {rank()}] ' if rank() else ''}error: {line}", file=sys.stderr, flush=True)
    return error.exit_code


def leave_at_once(code: int) -> NoReturn:
    """End a worker whose error has been told: a thread of a library that still runs while the interpreter is taken down prints into it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def agent(argv: Sequence[str]) -> int:
    """Run the processes of this node to their end with torchrun's agent; the exit code is that of the first one that failed.

    Args:
        argv: arguments of torchrun.
    """
    import logging

    import psutil

    logging.disable(logging.CRITICAL)  # torchrun's log of every failed process; what the user needs is printed below
    os.environ[AGENT_PID] = str(os.getpid())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10")
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(list(argv)))
        return 0
    except ChildFailedError as failed:
        return _report_worker(failed)
    except SignalException as stopped:
        _ignore_signals()
        print("interrupted" if stopped.sigval == signal.SIGINT else f"stopped by {stopped.sigval.name}", file=sys.stderr)
        return 128 + stopped.sigval
    except (RendezvousError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return report(LaunchError(f"the processes did not find each other: {reason}; check MASTER_ADDR, MASTER_PORT, NNODES and NODE_RANK"))
    finally:
        _ignore_signals()
        _end(psutil.Process().children(recursive=True))


def cause_of(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """(rank, failure) of the first worker that failed by itself: not one that said nothing and was ended by the agent because of another."""

    def order(rank: int) -> tuple[bool, int, int]:
        failure = failures[rank]
        return failure.exitcode == -signal.SIGTERM and not os.path.isfile(failure.error_file), failure.timestamp, rank

    rank = min(failures, key=order)
    return rank, failures[rank]


def _report_worker(failed: ChildFailedError) -> int:
    """One line about the worker whose failure is the cause, and its exit code."""
    number, failure = cause_of(failed.failures)
    told = os.path.isfile(failure.error_file)
    if failure.exitcode < 0 and not told:
        reason = f"rank {number} was ended by {failure.signal_name()}"
        hint = "; the machine may be out of memory" if failure.exitcode == -signal.SIGKILL else ""
        print(f"error: {reason}{hint}", file=sys.stderr)
        return 128 - failure.exitcode
    if told:
        where = f" (rank {number})" if number else ""
        print(f"error: {failure.message}{where}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else int(failure.error_file_data.get("exit_code", MswiftError.exit_code))
    if failure.exitcode != 130:
        print(f"error: rank {number} ended with exit code {failure.exitcode}; what it said is above", file=sys.stderr)
    return failure.exitcode


def _ignore_signals() -> None:
    """From here on the agent only cleans up: a second Ctrl-C must not stop it half way."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)


def _end(children: list[psutil.Process]) -> None:
    """End what this agent started and torchrun left, as after a second Ctrl-C."""
    import psutil

    for end, timeout in ((psutil.Process.terminate, 3), (psutil.Process.kill, 1)):
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(child)
        _, children = psutil.wait_procs(children, timeout=timeout)


def _agent_program() -> int:
    try:
        return agent(sys.argv[1:])
    except KeyboardInterrupt:  # before torchrun has taken over the signals
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(_agent_program())
