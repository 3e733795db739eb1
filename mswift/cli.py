"""The program: a table of verbs, their help, and the way from a command line to a command."""

from __future__ import annotations

import os
import pkgutil
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mswift import __version__, launch
from mswift.config import CONFIGS, Config, read_command, warnings_for
from mswift.config.fields import nearest, shown
from mswift.config.help import NARROWEST, flags_help, paragraphs
from mswift.errors import ConfigError, MswiftError
from mswift.log import is_main_process


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb of the program.

    Args:
        summary: one line for the list. run: the function ``module:name`` that runs it. example: of its use.
        check: the function that finds what is wrong before a process is started or torch imported; gets the config and the number of processes.
    """

    summary: str
    run: str
    example: str
    check: str


VERBS: dict[str, Verb] = {
    "sft": Verb(
        "Fine-tune a model on conversations or instructions",
        "mswift.commands.sft:sft",
        "--model Qwen/Qwen2.5-0.5B-Instruct --dataset data.jsonl",
        "mswift.commands.sft:check",
    ),
    "pt": Verb(
        "Train on plain text, every token of it",
        "mswift.commands.sft:sft",
        "--model Qwen/Qwen2.5-0.5B --dataset text.txt --tuner_type full",
        "mswift.commands.sft:check",
    ),
    "infer": Verb(
        "Talk to a model, or answer the rows of a file",
        "mswift.commands.infer:infer",
        "--adapters output/Qwen2.5-0.5B-Instruct",
        "mswift.commands.infer:check",
    ),
    "export": Verb(
        "Write a model in another form",
        "mswift.commands.export:export",
        "--adapters output/Qwen2.5-0.5B-Instruct --merge_lora true --output_dir merged",
        "mswift.commands.export:check",
    ),
    "merge-lora": Verb(
        "Merge an adapter into its model (export --merge_lora true)",
        "mswift.commands.export:export",
        "--adapters output/Qwen2.5-0.5B-Instruct",
        "mswift.commands.export:check",
    ),
    "verify": Verb(
        "Say whether two models are equal, tensor by tensor",
        "mswift.commands.verify:verify",
        "--model A --against B",
        "mswift.commands.verify:check",
    ),
    "data": Verb(
        "Show rows as the model sees them, token by token",
        "mswift.commands.data:data",
        "--model Qwen/Qwen2.5-0.5B-Instruct --dataset data.jsonl",
        "mswift.commands.data:check",
    ),
}
"""In the order of ``mswift --help``."""

NOT_YET = ("rlhf", "deploy", "rollout", "eval", "sample", "app", "web-ui")
LAUNCH_VARIABLES = {
    "NPROC_PER_NODE": "Processes on this machine; 1 if not set. Each takes one GPU, or its share of the cores.",
    "NNODES, NODE_RANK": "Number of machines, and which one this is (from 0). Start the same command on each.",
    "MASTER_ADDR, MASTER_PORT": "Address of machine 0 and a free port on it; on one machine a free port is found.",
    "srun": "Under srun every task becomes one process; none of the above is needed.",
    "CUDA_VISIBLE_DEVICES": "GPUs that may be used.",
    "OMP_NUM_THREADS": "Threads of one process on the CPU; cores / processes if not set.",
    launch.KEEP_MALLOC: "1 leaves the memory allocator of the C library as it is (by default it keeps freed memory, which is faster).",
}
OTHER_VARIABLES = {
    "USE_HF": "0 downloads from ModelScope instead of Hugging Face, where --use_hf is not given.",
    "HF_HOME": "Folder for downloads from Hugging Face.",
    "LOG_LEVEL": "DEBUG, INFO, WARNING or ERROR.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for an error that the user can mend, 130 after Ctrl-C.

    Args:
        argv: words after ``mswift``. None: those of this process, which may then be replaced by one with the right environment (see
            `mswift.launch`); with `argv` given it is not, and several processes run as children.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _main(words, replace=argv is None)
        if code and argv is None and launch.under_agent():
            launch.leave_at_once(code)
        return code
    except KeyboardInterrupt:
        if is_main_process() and not launch.under_agent():
            print("interrupted", file=sys.stderr)
        return 130


def program(usage: str, words: Sequence[str]) -> int:
    """A program of ``converters/``: a verb with some of its flags given; `usage` is said above the verb's own help.

    Args:
        words: verb and flags that come before those of the command line.
    """
    if not {"--help", "-h"}.isdisjoint(sys.argv[1:]):
        print(usage)
    sys.argv[1:] = [*words, *("--output_dir" if word == "--output" else word for word in sys.argv[1:])]
    return main()


def _main(words: list[str], *, replace: bool) -> int:
    launch.follow_agent()
    try:
        text = _help(words)
        if text is not None:
            return _show(text)
        verb = find_verb(words[0])
        parsed = read_command(verb, words[1:], os.environ)
        os.environ.update(parsed.env)
        launch.check_processes(parsed.config, os.environ)
        where = launch.topology(os.environ)
        if where.kind in ("single", "agent"):  # workers and the tasks of srun do it in the command, where one speaks for all
            pkgutil.resolve_name(VERBS[verb].check)(parsed.config, where.world)
        plan = launch.plan(verb, words[1:], os.environ, cpu_count(), python=_python(), glibc=_has_glibc())
        if plan is not None and (plan.required or replace):
            return launch.execute(plan, replace=replace)
    except MswiftError as error:
        return launch.report(error, on_all_ranks=True)
    if is_main_process():
        for line in (*launch.advice(os.environ), *parsed.notes, *warnings_for(parsed.config)):
            print(line, file=sys.stderr)
    return run_command(pkgutil.resolve_name(VERBS[verb].run), parsed.config)


def run_command(command: Callable[[Config], None], config: Config) -> int:
    """Run a command; an error that the user can mend becomes one line and an exit code, any other keeps its traceback."""
    try:
        command(config)
    except MswiftError as error:
        return launch.report(error)
    except Exception:
        if launch.under_agent():
            time.sleep(1)  # a peer's failure may be the cause: then the agent reports that one and ends this process before it prints
        raise
    return 0


def find_verb(word: str) -> str:
    """The verb that a word means; ``_`` and ``-`` are equal.

    Raises:
        ConfigError: there is none, with the nearest name.
    """
    verb = word.replace("_", "-")
    if verb in VERBS:
        return verb
    if verb in NOT_YET:
        raise ConfigError(f"mswift {verb} is not supported yet; there are {', '.join(VERBS)}")
    near = nearest(verb, list(VERBS))
    suggestion = f"did you mean mswift {near}?" if near else f"wanted one of {', '.join(VERBS)}"
    raise ConfigError(f"{shown(word)} is not a verb of mswift; {suggestion}")


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _has_glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError, OSError):
        return False


def _python() -> tuple[str, ...]:
    """The interpreter; without the working directory on its path if it is not on ours (a console script)."""
    return (sys.executable,) if sys.path[:1] in ([""], [os.getcwd()]) else (sys.executable, "-P")


def _show(text: str) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it exits
    return 0


def _help(words: Sequence[str]) -> str | None:
    """What to print if the words ask for help or the version; None if they ask for a command."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 140)
    if not words or words[0] in ("--help", "-h", "help"):
        return verb_help(find_verb(words[1]), width) if len(words) > 1 else program_help(width)
    if words[0] in ("--version", "-V"):
        return f"mswift {__version__}"
    if not {"--help", "-h"}.isdisjoint(words[1:]):
        return verb_help(find_verb(words[0]), width)
    return None


def program_help(width: int) -> str:
    """The text of ``mswift --help``."""
    return "\n".join(
        [
            "usage: mswift VERB [FILE.yaml] --flag value ...",
            "",
            *textwrap.wrap(
                "A Hugging Face checkpoint and a data set to a trained, exported and answering model, on Megatron-core.",
                max(width, NARROWEST),
                break_on_hyphens=False,
            ),
            "",
            "Verbs (mswift VERB --help lists the flags of one)",
            paragraphs({name: verb.summary for name, verb in VERBS.items()}, width),
            "",
            "Examples",
            f"  mswift sft {VERBS['sft'].example}",
            "  NPROC_PER_NODE=2 mswift sft run.yaml --tensor_model_parallel_size 2",
            "",
            "Launch: from the environment",
            paragraphs(LAUNCH_VARIABLES, width),
            "",
            "Other environment variables",
            paragraphs(OTHER_VARIABLES, width),
        ]
    )


def verb_help(verb: str, width: int) -> str:
    """The text of ``mswift VERB --help``: every flag with its choices and its default."""
    intro = (
        "Values follow their flag: --flag value, --flag=value, lists as --flag a b; true/false flags may stand alone; the last one wins. "
        "- and _ are equal. A FILE.yaml or .json holds flags as keys, by section or flat, and may set environment variables under ENV; flags after "
        "it win. Names that ms-swift has used are understood. Defaults stand in [ ]."
    )
    return "\n".join(
        [
            f"usage: mswift {verb} [FILE.yaml] --flag value ...",
            "",
            VERBS[verb].summary,
            f"  mswift {verb} {VERBS[verb].example}",
            "",
            *textwrap.wrap(intro, max(width, NARROWEST), break_on_hyphens=False),
            "",
            flags_help(CONFIGS[verb], width),
            "",
            "Launch: from the environment",
            paragraphs(LAUNCH_VARIABLES, width),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
