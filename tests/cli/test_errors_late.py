"""What is wrong and shows only once torch is there: still one line, exit code 2, nothing written; under two processes as well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from tests.cli.conftest import Lab
from tests.cli.program import Worker, assert_one_line, contents, environment
from tests.tiny import make_checkpoint

Words = list[str]
CASES: dict[str, tuple[Callable[[Lab], Words], tuple[str, ...]]] = {}


def case(*wanted: str) -> Callable[[Callable[[Lab], Words]], Callable[[Lab], Words]]:
    """A function that prepares a folder and returns a command line, and texts that the line of its error has to hold."""

    def add(prepare: Callable[[Lab], Words]) -> Callable[[Lab], Words]:
        CASES[prepare.__name__] = (prepare, wanted)
        return prepare

    return add


@case("m/config.json is not a valid llama config", "Field 'hidden_size' expected int, got str (value: 'big')", "mend it, or download it again")
def config_of_the_wrong_type(lab: Lab) -> Words:
    lab.config(hidden_size="big")
    return lab.sft()


@case("m/config.json is not a valid llama config", "mend it, or download it again")
def config_without_heads(lab: Lab) -> Words:
    lab.config(num_attention_heads=0)
    return lab.sft()


@case("m/config.json is not a valid nonsense config", "nonsense", "mend it, or download it again")
def config_of_an_unknown_type(lab: Lab) -> Words:
    lab.config(model_type="nonsense")
    return lab.sft()


class Code:
    """Whoever unpickles this makes a file in the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@case("m/pytorch_model.bin is a pickle that asks for posix.system", "only tensors are read (weights_only)", "take it as safetensors")
def pickle_with_code(lab: Lab) -> Words:
    (lab.model / "model.safetensors").unlink()
    torch.save({"w": torch.ones(2), "x": Code(lab.folder / "made")}, lab.model / "pytorch_model.bin")
    return lab.sft()


@case("hidden_act is 'gelu', wanted 'silu' for llama")
def activation_of_another_family(lab: Lab) -> Words:
    lab.config(hidden_act="gelu")
    return lab.sft()


@case("rotary type 'proportional' is not supported exactly", "wanted one of default, linear, llama3, yarn")
def rotary_that_is_not_supported(lab: Lab) -> Words:
    lab.config(rope_parameters={"rope_type": "proportional", "factor": 2.0, "rope_theta": 1e4})
    return lab.sft()


@case("cannot load m: 18 tensors (model.layers.4.", "missing from the checkpoint", "must describe one model")
def more_layers_than_weights(lab: Lab) -> Words:
    lab.config(num_hidden_layers=6)
    return lab.export()


@case("model.embed_tokens.weight has shape (331, 72), the model wants (100, 72)", "must describe one model")
def weights_of_another_shape(lab: Lab) -> Words:
    lab.config(vocab_size=100)
    return lab.sft()


@case("m/tokenizer.json is not JSON", "download or copy it again")
def broken_tokenizer(lab: Lab) -> Words:
    (lab.model / "tokenizer.json").write_text('{"a')
    return lab.sft()


@case("m has no usable tokenizer (", "wanted tokenizer.json and tokenizer_config.json", "download them again")
def tokenizer_of_another_kind(lab: Lab) -> Words:
    (lab.model / "tokenizer.json").write_text('{"a": 1}')
    return lab.sft()


@case(
    "m/config.json: 2 field(s) that may change the model are not understood (sinks = 4, residual_multiplier = 0.3)",
    "--allow_unknown_config true",
)
def unknown_config_fields(lab: Lab) -> Words:
    lab.config(sinks=4, residual_multiplier=0.3)
    return lab.sft()


@case("m/config.json: architectures Qwen2MoeForCausalLM and model_type llama are of different families (", "mend it")
def architecture_of_another_family(lab: Lab) -> Words:
    lab.config(architectures=["Qwen2MoeForCausalLM"])
    return lab.sft()


@case("m has no chat template", "take the chat (Instruct) model, give --template NAME (such as chatml), or put a chat_template.jinja")
def missing_template(lab: Lab) -> Words:
    (lab.model / "chat_template.jinja").unlink()
    return lab.sft()


@case("the chat template of m is broken at line 2: ", "mend it in its chat_template.jinja (or tokenizer_config.json)")
def broken_template(lab: Lab) -> Words:
    (lab.model / "chat_template.jinja").write_text("{% for message in messages %}\n{{ message['content'] }\n{% endfor %}")
    return lab.sft()


@case("--device cuda: torch finds no CUDA device here", "use --device cpu")
def no_gpu(lab: Lab) -> Words:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    return lab.sft("--device", "cuda")


@case("--ddp_backend nccl: it joins GPUs, and this run is on the CPU", "use gloo")
def backend_of_a_gpu(lab: Lab) -> Words:
    return lab.sft("--ddp_backend", "nccl", "--device", "cpu")


@case("--target_modules: got 'w9', wanted one of all-linear, all-embedding, q_proj")
def unknown_target(lab: Lab) -> Words:
    return lab.sft("--target_modules", "w9")


@case("--target_modules: q_proj is one layer with k_proj, v_proj", "name all of them")
def part_of_a_target(lab: Lab) -> Words:
    return lab.sft("--target_modules", "q_proj")


@case("run/checkpoint-4 holds other trained tensors than this run", "--lora_rank 8 --target_modules all-linear")
def resume_with_other_targets(lab: Lab) -> Words:
    lab.copy("run")
    return lab.sft("--resume_from_checkpoint", "auto", "--target_modules", "o_proj", output="run")


def garbage(lab: Lab, name: str) -> Words:
    """The newest checkpoint with other bytes in a file, as many as before."""
    path = lab.copy("run") / "checkpoint-4" / "resume" / "state" / name
    path.write_bytes(b"\xff" * path.stat().st_size)
    return lab.sft("--resume_from_checkpoint", "auto", output="run")


@case("checkpoint run/checkpoint-4 is damaged: it cannot be read", "--resume_from_checkpoint run/checkpoint-2")
def resume_from_garbage(lab: Lab) -> Words:
    return garbage(lab, "__0_0.distcp")


@case("checkpoint run/checkpoint-4 is damaged: it cannot be read", "--resume_from_checkpoint run/checkpoint-2")
def resume_from_a_garbled_index(lab: Lab) -> Words:
    return garbage(lab, ".metadata")


@case("checkpoint run/checkpoint-4 is damaged: it cannot be read", "--resume_from_checkpoint run/checkpoint-2")
def resume_from_garbled_settings(lab: Lab) -> Words:
    return garbage(lab, "common.pt")


@case("run/checkpoint-4: ", "adapted modules (model.layers.3.", "are not in this llama model", "give its own base")
def adapter_of_a_deeper_model(lab: Lab) -> Words:
    make_checkpoint(lab.folder / "shallow", num_hidden_layers=3)
    return lab.export(model="shallow")


@case("the adapter of model.layers.0.mlp.gate_proj has A (8, 72), B (48, 8), its weight is (96, 72)", "give its own --model")
def adapter_of_a_narrower_model(lab: Lab) -> Words:
    make_checkpoint(lab.folder / "wide", intermediate_size=96)
    lab.copy("run")
    return lab.sft("--adapters", "run/checkpoint-4", model="wide")


@pytest.mark.parametrize("name", CASES)
def test_one_line_after_torch(name: str, lab: Lab, heavy: Worker) -> None:
    prepare, wanted = CASES[name]
    words = prepare(lab)
    before = contents(lab.folder)
    outcome = heavy.run(words, lab.folder)
    assert_one_line(outcome, *wanted)
    assert outcome.out == ""
    assert contents(lab.folder) == before


def test_all_rows_too_long(lab: Lab, heavy: Worker) -> None:
    """The one error that leaves a file: the list of the rows."""
    words = lab.sft("--max_length", "5")
    before = contents(lab.folder)
    outcome = heavy.run(words, lab.folder)
    wanted = ("all 24 rows exceed max_length 5 (shortest 27, longest 60 tokens)", "raise --max_length to at least 27", "out/dropped_rows.txt")
    assert_one_line(outcome, *wanted)
    assert set(contents(lab.folder)) - set(before) == {"out", "out/dropped_rows.txt"}
    listed = (lab.folder / "out" / "dropped_rows.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [f"rows.jsonl:{number}" for number in range(1, 25)]
    # and the folder is free for another try
    assert heavy.run(lab.sft("--max_length", "30", "--max_steps", "1"), lab.folder).code == 0
    assert "rows.jsonl:2\ttoo long" in (lab.folder / "out" / "dropped_rows.txt").read_text()


def test_a_note_may_come_before(lab: Lab, heavy: Worker) -> None:
    """Where the model was named by the adapter and not by the user, a line says so."""
    words = [word for word in adapter_of_a_deeper_model(lab) if word not in ("--load_args", "false")]
    outcome = heavy.run(words, lab.folder)
    assert_one_line(outcome, "are not in this llama model", notes=1)
    assert outcome.err.startswith("from run/checkpoint-4/args.json: torch_dtype float32")


@pytest.mark.parametrize("name", ["resume_from_garbage", "adapter_of_a_narrower_model"])
def test_two_processes_say_it_once(name: str, lab: Lab) -> None:
    prepare, wanted = CASES[name]
    words, mark = prepare(lab), uuid.uuid4().hex
    before = contents(lab.folder)
    process = start(words, lab, mark)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(text in err for text in wanted), err
    assert contents(lab.folder) == before
    assert not processes_of(mark)


def start(words: Words, lab: Lab, mark: str) -> subprocess.Popen[str]:
    """Two processes of ``mswift WORDS``, recognisable by `mark` in their environment."""
    env = environment(NPROC_PER_NODE="2", MSWIFT_TEST_MARK=mark)
    command = [sys.executable, "-m", "mswift.cli", *words]
    return subprocess.Popen(command, cwd=lab.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def processes_of(mark: str, patience: float = 5.0) -> list[int]:
    """Processes with this mark that are still there after `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                found += [process.pid] if process.environ().get("MSWIFT_TEST_MARK") == mark else []
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def test_leftover_processes_would_be_seen() -> None:
    mark = uuid.uuid4().hex
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], env=environment(MSWIFT_TEST_MARK=mark), stdin=subprocess.PIPE)
    assert processes_of(mark, patience=0.0) == [sleeper.pid]
    os.kill(sleeper.pid, signal.SIGKILL)
    sleeper.wait()
    assert not processes_of(mark)
