"""What is wrong and can be known before torch is imported: one line that says what was got, wanted and what to do; exit 2; nothing written."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable

import pytest

from tests.cli.conftest import Lab
from tests.cli.program import Worker, assert_one_line, contents

Words = list[str]
CASES: dict[str, tuple[Callable[[Lab], Words], tuple[str, ...], dict[str, str]]] = {}


def case(*wanted: str, **env: str) -> Callable[[Callable[[Lab], Words]], Callable[[Lab], Words]]:
    """A function that prepares a folder and returns a command line, and texts that the line of its error has to hold."""

    def add(prepare: Callable[[Lab], Words]) -> Callable[[Lab], Words]:
        CASES[prepare.__name__] = (prepare, wanted, env)
        return prepare

    return add


# Models


@case("model directory nothing/here/x does not exist", "give an existing directory or a hub id")
def missing_model(lab: Lab) -> Words:
    return lab.sft(model="nothing/here/x")


@case("model directory ./m2 does not exist")
def missing_model_of_an_export(lab: Lab) -> Words:
    return lab.export(model="./m2")


@case("model directory ./m2 does not exist", "give an existing directory")
def missing_model_of_infer(lab: Lab) -> Words:
    return ["infer", "--model", "./m2"]


@case("model directory empty is empty", "wanted config.json and model.safetensors")
def empty_model(lab: Lab) -> Words:
    (lab.folder / "empty").mkdir()
    return lab.sft(model="empty")


@case("model directory rows.jsonl is a file", "give the directory of a checkpoint")
def file_as_model(lab: Lab) -> Words:
    return lab.sft(model="rows.jsonl")


@case("model directory m has no config.json", "give the directory of a Hugging Face checkpoint")
def no_config(lab: Lab) -> Words:
    (lab.model / "config.json").unlink()
    return lab.sft()


@case("model directory run/checkpoint-4 has no config.json", "give it with --adapters")
def adapter_as_model(lab: Lab) -> Words:
    lab.copy("run")
    return lab.sft(model="run/checkpoint-4")


@case("m/model.safetensors is truncated or corrupt", "it has 777756 bytes, its header describes 777856", "download or copy it again")
def truncated_weights(lab: Lab) -> Words:
    path = lab.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return lab.sft()


@case("m/model.safetensors is truncated or corrupt", "do not hold its header")
def weights_shorter_than_their_header(lab: Lab) -> Words:
    path = lab.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return lab.export()


@case("m/model.safetensors is truncated or corrupt", "its header is not that of a safetensors file", "download or copy it again")
def corrupt_header(lab: Lab) -> Words:
    path = lab.model / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"\xff" * 32 + data[40:])
    return lab.sft()


@case("m/model.safetensors is a git-lfs pointer", "git lfs pull")
def lfs_pointer(lab: Lab) -> Words:
    (lab.model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 777856\n")
    return lab.sft()


@case("names 1 absent file (model-00001-of-00002.safetensors)", "download the model again")
def index_of_an_absent_file(lab: Lab) -> Words:
    (lab.model / "model.safetensors").unlink()
    (lab.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    return lab.sft()


@case("m/model.safetensors.index.json is not the index of a checkpoint", "download it again")
def broken_index(lab: Lab) -> Words:
    (lab.model / "model.safetensors").unlink()
    (lab.model / "model.safetensors.index.json").write_text('{"weight')
    return lab.sft()


@case("m/pytorch_model.bin is truncated or corrupt", "it is not a file of torch.save", "download or copy it again")
def other_weights_as_pickle(lab: Lab) -> Words:
    (lab.model / "model.safetensors").rename(lab.model / "pytorch_model.bin")
    return lab.sft()


@case("m/pytorch_model.bin is truncated or corrupt", "no whole zip archive", "download or copy it again")
def truncated_pickle(lab: Lab) -> Words:
    (lab.model / "model.safetensors").unlink()
    with zipfile.ZipFile(lab.model / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data/0", bytes(1000))
    path = lab.model / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-10])
    return lab.sft()


@case("m/pytorch_model.bin.index.json names 1 absent file (pytorch_model-00001-of-00002.bin)", "download the model again")
def index_of_an_absent_pickle(lab: Lab) -> Words:
    (lab.model / "model.safetensors").unlink()
    (lab.model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}))
    return lab.sft()


@case("architecture Qwen2AudioForCausalLM is not supported", "nearest supported: Qwen2", "take that, or another of the ")
def unknown_architecture(lab: Lab) -> Words:
    lab.config(architectures=["Qwen2AudioForCausalLM"])
    return lab.sft()


@case("weights quantised by 'quanto' are not read", "wanted one of awq, ", "or plain weights")
def unknown_quantisation(lab: Lab) -> Words:
    lab.config(quantization_config={"quant_method": "quanto", "weights": "int8"})
    return lab.sft()


@case("architectures None", "wanted a list with one, such as ", "mend it")
def no_architecture(lab: Lab) -> Words:
    lab.config(architectures=None)
    return lab.sft()


@case("m/config.json is not JSON", "line 1 column 20", "download or copy it again")
def broken_config(lab: Lab) -> Words:
    (lab.model / "config.json").write_text('{"architectures": ["Llama')
    return lab.sft()


@case("m/config.json holds a list", "wanted a JSON object")
def config_of_another_kind(lab: Lab) -> Words:
    (lab.model / "config.json").write_text("[]")
    return lab.export()


@case("m has no tokenizer", "tokenizer.json or", "download them too")
def missing_tokenizer(lab: Lab) -> Words:
    (lab.model / "tokenizer.json").unlink()
    return lab.sft()


@case("m is in float16", "wanted bfloat16 or float32", "give --torch_dtype")
def half_precision(lab: Lab) -> Words:
    lab.config(dtype="float16")
    words = lab.sft()
    at = words.index("--torch_dtype")
    return words[:at] + words[at + 2 :]


# Command lines and files of flags


@case("--learning_rat is not a flag of mswift sft", "did you mean --learning_rate?")
def unknown_flag(lab: Lab) -> Words:
    return lab.sft("--learning_rat", "1")


@case("'sftt' is not a verb", "did you mean mswift sft?")
def unknown_verb(lab: Lab) -> Words:
    return ["sftt"]


@case("--lora_rank: got 'many', wanted a whole number, at least 1")
def wrong_type(lab: Lab) -> Words:
    return lab.sft("--lora_rank", "many")


@case("--torch_dtype: float16 is not supported yet, wanted one of bfloat16, float32")
def wrong_choice(lab: Lab) -> Words:
    return lab.sft("--torch_dtype", "float16")


@case("c.yaml, line 2: not YAML", "wanted lines such as 'learning_rate: 1e-4'")
def yaml_syntax(lab: Lab) -> Words:
    (lab.folder / "c.yaml").write_text("model: [a\ndataset: b")
    return ["sft", "c.yaml"]


@case("c.yaml: lora_rnk is not a flag of mswift sft", "did you mean lora_rank?")
def yaml_unknown_key(lab: Lab) -> Words:
    (lab.folder / "c.yaml").write_text("model: m\ndataset: d\nlora_rnk: 3")
    return ["sft", "c.yaml"]


@case("c.yaml: lora_rank: got 'big', wanted a whole number, at least 1")
def yaml_wrong_type(lab: Lab) -> Words:
    (lab.folder / "c.yaml").write_text("model: m\ndataset: d\nlora_rank: big")
    return ["sft", "c.yaml"]


@case("c.yaml: got ['a', 'b'], wanted flags and values such as 'learning_rate: 1e-4'")
def yaml_list(lab: Lab) -> Words:
    (lab.folder / "c.yaml").write_text("- a\n- b")
    return ["sft", "c.yaml"]


@case("c.yaml cannot be read: No such file or directory", "check its name")
def yaml_missing(lab: Lab) -> Words:
    return ["sft", "c.yaml"]


# Data


@case("absent.jsonl: no such data file or directory (looked in ", "check --dataset and --val_dataset")
def missing_data(lab: Lab) -> Words:
    return lab.sft(dataset="absent.jsonl")


@case("absent.jsonl: no such data file or directory", "--val_dataset")
def missing_validation_data(lab: Lab) -> Words:
    return lab.sft("--val_dataset", "absent.jsonl")


@case("a.xlsx: cannot read .xlsx files", "wanted one of .jsonl", "convert it")
def data_of_another_kind(lab: Lab) -> Words:
    (lab.folder / "a.xlsx").write_text("a,b\n")
    return lab.sft(dataset="a.xlsx")


@case("a.csv: holds no rows; check --dataset")
def a_table_of_names_only(lab: Lab) -> Words:
    (lab.folder / "a.csv").write_text("query,response\n")
    return lab.sft(dataset="a.csv")


@case("rows.jsonl:25: messages[0].role is 'owl', wanted one of system, developer, user, assistant, tool")
def unknown_role(lab: Lab) -> Words:
    lab.rows('{"messages": [{"role": "owl", "content": "x"}]}')
    return lab.sft("--strict", "true")


@case("rows.jsonl:25: messages[1].tool_calls[0] calls 'f', but the row has no tools", "give its schema in the column tools")
def tool_call_without_schema(lab: Lab) -> Words:
    lab.rows('{"messages": [{"role": "user", "content": "x"}, {"role": "tool_call", "content": "{\\"name\\": \\"f\\"}"}]}')
    return lab.sft("--strict", "true")


@case("rows.jsonl:1: not UTF-8: byte 0xff at column 1 (byte 0 of the file)", "iconv -f UTF-16 -t UTF-8")
def another_encoding(lab: Lab) -> Words:
    (lab.folder / "rows.jsonl").write_bytes('{"query": "q"}'.encode("utf-16"))
    return lab.sft("--strict", "true")


@case("--columns: no source has the column 'text1'; check its name")
def column_that_no_source_has(lab: Lab) -> Words:
    return lab.sft("--columns", '{"text1": "query"}')


@case("1 of 1 rows cannot be used", "b.jsonl:1: response is missing, got the columns query", "--max_bad_rows_ratio")
def column_that_one_source_lacks(lab: Lab) -> Words:
    (lab.folder / "b.jsonl").write_text('{"query": "q"}\n')
    words = lab.sft()
    words.insert(words.index("rows.jsonl") + 1, "b.jsonl")
    return words


@case("1 of 2 entries of --dataset have a weight (@), wanted all or none")
def weight_of_one_entry_only(lab: Lab) -> Words:
    words = lab.sft()
    words.insert(words.index("rows.jsonl") + 1, "rows.jsonl@2")
    return words


@case("--interleave_prob: got 0.7 many, wanted numbers above 0 such as 0.7 0.3")
def share_that_is_no_number(lab: Lab) -> Words:
    return lab.sft("--interleave_prob", "0.7", "many")


@case("--streaming true does not go with --packing", "mswift export --to_cached_dataset true")
def packed_stream(lab: Lab) -> Words:
    return lab.sft("--streaming", "true", "--packing", "true")


@case("--streaming true does not go with --split_dataset_ratio", "--val_dataset")
def stream_that_holds_out_rows(lab: Lab) -> Words:
    return lab.sft("--streaming", "true", "--split_dataset_ratio", "0.1")


@case("--external_plugins p.py: ZeroDivisionError: division by zero; mend the file")
def plugin_that_fails(lab: Lab) -> Words:
    (lab.folder / "p.py").write_text("1 / 0")
    return lab.sft("--external_plugins", "p.py")


@case("--custom_dataset_info i.json: entry 1 has the keys tags, wanted dataset_path, hf_dataset_id or ms_dataset_id")
def description_without_a_place(lab: Lab) -> Words:
    (lab.folder / "i.json").write_text('[{"tags": []}]')
    return lab.sft("--custom_dataset_info", "i.json")


@case("rows.jsonl: holds no rows", "check --dataset")
def no_rows(lab: Lab) -> Words:
    (lab.folder / "rows.jsonl").write_text("")
    return lab.sft()


@case("rows.jsonl:25: not JSON: Expecting value at column 15", "wanted one JSON object a line")
def row_that_is_not_json(lab: Lab) -> Words:
    lab.rows('{"messages": [}')
    return lab.sft()


@case("rows.jsonl:25: a row is a JSON object, got list", 'wanted something like {"messages": [...]}')
def row_that_is_a_list(lab: Lab) -> Words:
    lab.rows("[1, 2]")
    return lab.sft()


@case("1 of 25 rows cannot be used, more than 1%", "rows.jsonl:25: no assistant turn to train on, got the roles user", "add one or remove the row")
def row_without_an_answer(lab: Lab) -> Words:
    lab.rows('{"messages": [{"role": "user", "content": "x"}]}')
    return lab.sft()


@case("error: rows.jsonl:121: no assistant turn to train on", "add one or remove the row")
def row_without_an_answer_strictly(lab: Lab) -> Words:
    lab.rows('{"messages": [{"role": "user", "content": "x"}]}', copies=5)
    return lab.sft("--strict", "true")


# Layouts and processes


@case("MLP width 48 by tp(5)", "tp5 pp1 dp1 (5 processes)", "choose sizes that divide", NPROC_PER_NODE="5")
def layout_of_the_mlp(lab: Lab) -> Words:
    return lab.sft("--tensor_model_parallel_size", "5")


@case("4 layers by pp(3) x vpp(1) = 3", "tp1 pp3 dp1 (3 processes)", "choose sizes that divide", NPROC_PER_NODE="3")
def layout_of_the_layers(lab: Lab) -> Words:
    return lab.sft("--pipeline_model_parallel_size", "3")


@case("4 layers - first(3) - last(2) = -1 by 1 other stage(s) of pp(3) x vpp(1) = 1", "tp1 pp3 (first 3, last 2) dp1", NPROC_PER_NODE="3")
def stages_of_unequal_size(lab: Lab) -> Words:
    ends = ("--decoder_first_pipeline_num_layers", "3", "--decoder_last_pipeline_num_layers", "2")
    return lab.sft("--pipeline_model_parallel_size", "3", *ends)


@case("4 layers by the 3 t of --pipeline_model_parallel_layout Ett|tL", "choose sizes that divide", NPROC_PER_NODE="2")
def stages_by_a_string(lab: Lab) -> Words:
    return lab.sft("--pipeline_model_parallel_size", "2", "--pipeline_model_parallel_layout", "Ett|tL")


@case("tp(2) x pp(2) x cp(1) = 4 does not divide 6 process(es)", "NPROC_PER_NODE=4", NPROC_PER_NODE="6")
def layout_of_the_world(lab: Lab) -> Words:
    return lab.sft("--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2")


@case("tp(2)", "does not divide 1 process(es)", "NPROC_PER_NODE=2")
def too_few_processes(lab: Lab) -> Words:
    return lab.sft("--tensor_model_parallel_size", "2")


@case("--global_batch_size 4 is not a multiple of micro_batch_size(3) x data parallel(1) = 3", "the nearest above is 6")
def batch_that_does_not_divide(lab: Lab) -> Words:
    return lab.sft("--micro_batch_size", "3")


@case("RANK is 'x' in the environment, wanted a whole number", RANK="x")
def rank_that_is_no_number(lab: Lab) -> Words:
    return lab.sft()


@case("NPROC_PER_NODE is 'two' in the environment, wanted a whole number of at least 1", NPROC_PER_NODE="two")
def processes_that_are_no_number(lab: Lab) -> Words:
    return lab.sft()


# Output folders and adapters


@case("--output_dir run holds another run (checkpoint-2, checkpoint-4, args.json)", "--resume_from_checkpoint auto", "--overwrite_output_dir true")
def folder_of_another_run(lab: Lab) -> Words:
    lab.copy("run")
    return lab.sft(output="run")


@case("--output_dir out is a file", "give a folder")
def file_as_output(lab: Lab) -> Words:
    (lab.folder / "out").write_text("mine")
    return lab.sft()


@case("--output_dir f/out:", "f is not a folder", "give another place")
def output_below_a_file(lab: Lab) -> Words:
    (lab.folder / "f").write_text("mine")
    return lab.sft(output="f/out")


@case("--output_dir /proc/out: /proc cannot be written to", "give another folder")
def output_that_cannot_be_written(lab: Lab) -> Words:
    return lab.sft(output="/proc/out")


@case("adapter directory absent does not exist", "adapter_config.json and adapter_model.safetensors")
def missing_adapter(lab: Lab) -> Words:
    return lab.sft("--adapters", "absent")


@case("adapter directory absent does not exist")
def missing_adapter_of_an_export(lab: Lab) -> Words:
    return lab.export(adapter="absent")


@case("adapter directory absent does not exist")
def missing_adapter_of_a_conversation(lab: Lab) -> Words:
    return ["infer", "--model", lab.model.name, "--adapters", "absent"]


@case("absent.jsonl: no such data file or directory", "check --dataset and --val_dataset")
def missing_questions(lab: Lab) -> Words:
    return ["infer", "--model", lab.model.name, "--val_dataset", "absent.jsonl"]


@case("--result_path rows.jsonl exists already", "remove it or give another file")
def answers_over_a_file(lab: Lab) -> Words:
    lab.copy("rows.jsonl")
    return ["infer", "--model", lab.model.name, "--val_dataset", "rows.jsonl", "--result_path", "rows.jsonl"]


@case("run/checkpoint-4/adapter_model.safetensors is truncated or corrupt", "download or copy it again")
def truncated_adapter(lab: Lab) -> Words:
    path = lab.copy("run") / "checkpoint-4" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    return lab.export()


@case("run/checkpoint-4/adapter_config.json is not the config of a LoRA adapter", "copy it again")
def broken_adapter_config(lab: Lab) -> Words:
    (lab.copy("run") / "checkpoint-4" / "adapter_config.json").write_text("{")
    return lab.export()


@case("--output_dir exported exists already", "give another folder, or --exist_ok true")
def export_to_an_existing_folder(lab: Lab) -> Words:
    (lab.folder / "exported").mkdir()
    (lab.folder / "exported" / "thesis.txt").write_text("mine")
    return lab.export()


@case("exported holds something other than a model", "choose another one")
def export_over_something_else(lab: Lab) -> Words:
    return [*export_to_an_existing_folder(lab), "--exist_ok", "true"]


@case("nothing to export", "give --adapters DIR", "--output_dir")
def export_of_nothing(lab: Lab) -> Words:
    lab.copy("m")
    return ["export", "--model", "m"]


# Checkpoints to go on from


def damage(lab: Lab, name: str, keep: int) -> Words:
    """The newest checkpoint with a file cut to `keep` bytes; without it where that is negative."""
    path = lab.copy("run") / "checkpoint-4" / "resume" / name
    path.unlink() if keep < 0 else path.write_bytes(path.read_bytes()[:keep])
    return lab.sft("--resume_from_checkpoint", "auto", output="run")


@case("--resume_from_checkpoint run/checkpoint-7: run/checkpoint-7/resume/resume.json is not there", "wanted a checkpoint-N folder")
def resume_from_nothing(lab: Lab) -> Words:
    return lab.sft("--resume_from_checkpoint", "run/checkpoint-7")


@case("m/resume/resume.json is not there", "wanted a checkpoint-N folder", "the newest in run is checkpoint-4")
def resume_from_a_model(lab: Lab) -> Words:
    lab.copy("run")
    return lab.sft("--resume_from_checkpoint", "m", output="run")


@case("run/checkpoint-4 is damaged: resume/state/__0_0.distcp has 1000 bytes, wanted ", "--resume_from_checkpoint run/checkpoint-2")
def resume_from_a_truncated_state(lab: Lab) -> Words:
    return damage(lab, "state/__0_0.distcp", 1000)


@case("run/checkpoint-4 is damaged: resume/state/common.pt is missing", "--resume_from_checkpoint run/checkpoint-2")
def resume_without_a_file(lab: Lab) -> Words:
    return damage(lab, "state/common.pt", -1)


@case("run/checkpoint-4 is damaged: resume/resume.json is not what mswift writes", "--resume_from_checkpoint run/checkpoint-2")
def resume_from_a_broken_document(lab: Lab) -> Words:
    return damage(lab, "resume.json", 30)


@case("run/checkpoint-4 was made with --lora_rank 8, got 4", "give the same, or start anew in another --output_dir")
def resume_with_another_rank(lab: Lab) -> Words:
    lab.copy("run")
    return lab.sft("--resume_from_checkpoint", "auto", "--lora_rank", "4", output="run")


@case("run/checkpoint-4 was made with --tuner_type lora, got full", "give the same")
def resume_with_another_tuner(lab: Lab) -> Words:
    lab.copy("run")
    return lab.sft("--resume_from_checkpoint", "auto", "--tuner_type", "full", output="run")


@case("run/checkpoint-4 was made with --use_distributed_optimizer false, got true", "give the same")
def resume_with_another_optimizer(lab: Lab) -> Words:
    lab.copy("run")
    return lab.sft("--resume_from_checkpoint", "auto", "--use_distributed_optimizer", "true", output="run")


@case("run/checkpoint-4 was made from another base model than --model", "give the one of its run (m)")
def resume_with_another_model(lab: Lab) -> Words:
    lab.copy("run")
    weights = lab.model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    return lab.sft("--resume_from_checkpoint", "auto", output="run")


@pytest.mark.parametrize("name", CASES)
def test_one_line_before_torch(name: str, lab: Lab, light: Worker) -> None:
    prepare, wanted, env = CASES[name]
    words = prepare(lab)
    before = contents(lab.folder)
    outcome = light.run(words, lab.folder, **env)
    assert_one_line(outcome, *wanted)
    assert outcome.out == ""
    assert contents(lab.folder) == before
    assert not outcome.torch


def test_the_other_worker_has_torch(lab: Lab, heavy: Worker) -> None:
    """Or `Outcome.torch` would say nothing."""
    outcome = heavy.run(["sftt"], lab.folder)
    assert_one_line(outcome, "'sftt' is not a verb")
    assert outcome.torch
