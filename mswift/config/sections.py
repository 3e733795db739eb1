"""The sections of a run's settings: names and defaults are ms-swift's (v4) where it is not wrong.

Where we differ: the folder of a run does not change from run to run (``add_version`` false), code from the hub does not run unasked
(``trust_remote_code`` false), models come from Hugging Face (``use_hf`` true), nothing is recomputed unasked, and a rank that stops answering
is noticed after half an hour rather than 208 days (``ddp_timeout``).
"""

# ruff: noqa: RUF009  (`option` makes a dataclasses.field, with a factory for lists and dicts)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mswift.config.fields import Limits, option
from mswift.config.splits import PipelineSplit, parse_stages
from mswift.errors import ConfigError

_SHARE = Limits(low=0, high=1)
_POSITIVE = Limits(low=1)
_NOT_NEGATIVE = Limits(low=0)
_SIZE_PATTERN = r"\d+(\.\d+)?\s*([KMGT]i?)?B"
DEFAULT_GLOBAL_BATCH_SIZE = 16


@dataclass(kw_only=True, slots=True)
class ModelSection:
    """Which model, from where, in which precision."""

    model: str = option("", "Hub id or directory of a Hugging Face checkpoint", auto="required", metavar="MODEL")
    model_revision: str | None = option(None, "Branch, tag or commit on the hub", auto="the hub's main branch")
    torch_dtype: Literal["bfloat16", "float32"] | None = option(None, "Precision of weights and arithmetic", auto="the checkpoint's own")
    trust_remote_code: bool = option(False, "Run Python code that comes with the checkpoint")
    allow_unknown_config: bool = option(False, "Go on although config.json has fields that may change the model and are not understood")
    use_hf: bool = option(True, "Download from Hugging Face (false: ModelScope); without the flag, USE_HF=0 in the environment says the same")
    hub_token: str | None = option(
        None, "Token for private or gated repositories; never written to a file", auto="the login of the hub's own tool", secret=True
    )


@dataclass(kw_only=True, slots=True)
class DataSection:
    """Which rows, and how they are cut to length."""

    dataset: list[str] = option(
        [], "Training data: files, folders or hub ids; NAME:subset takes one subset, NAME#500 500 rows, NAME@0.7 a share", metavar="DATA ..."
    )
    val_dataset: list[str] = option([], "Rows to evaluate on (sft) or to answer (infer); same form as --dataset", metavar="DATA ...")
    split_dataset_ratio: float = option(0.0, "Share of the training rows that is held out for evaluation", low=0, below=1)
    data_seed: int = option(42, "Seed of the order of rows and of the split", low=0)
    dataset_shuffle: bool = option(True, "Shuffle the rows; with NAME#N false takes the first N")
    max_length: int | None = option(None, "Longest sequence in tokens", auto="the model's own limit", limits=_POSITIVE)
    truncation_strategy: Literal["delete", "left", "right", "split"] = option(
        "delete", "What to do with a longer row: leave it out, cut it at one end, or cut it into several"
    )
    dataset_num_proc: int = option(1, "Processes that turn rows into tokens", limits=_POSITIVE)
    strict: bool = option(False, "Stop at the first bad row instead of leaving it out and reporting it")
    columns: dict[str, str] = option({}, "Names of columns in the data -> names that mswift knows")
    disable_auto_column_mapping: bool = option(False, "Take only the names that mswift knows, and not prompt, answer, ... for them")
    max_bad_rows_ratio: float = option(0.01, "Share of rows that may be left out because something is wrong with them", limits=_SHARE)
    interleave_prob: list[str] = option([], "Share of each entry of --dataset in an epoch, as @ in their names", auto="all rows", metavar="X ...")
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = option(
        "first_exhausted", "With shares an epoch ends when one source is through, or when all are"
    )
    streaming: bool = option(False, "Read rows while training instead of before it; for data that is too large to be held")
    shuffle_buffer_size: int = option(1000, "With streaming: rows that are held to be shuffled, over all processes", limits=_POSITIVE)
    custom_dataset_info: list[str] = option([], "JSON files that describe data sets by name", metavar="FILE ...")
    external_plugins: list[str] = option([], "Python files to run first, which may register data sets", metavar="FILE ...")

    def shares(self) -> list[float]:
        """The numbers of ``--interleave_prob``.

        Raises:
            ConfigError: one is no number above 0.
        """
        try:
            numbers = [float(text) for text in self.interleave_prob]
        except ValueError:
            numbers = [0.0]
        if not all(0 < number < float("inf") for number in numbers):
            raise ConfigError(f"--interleave_prob: got {' '.join(self.interleave_prob)}, wanted numbers above 0 such as 0.7 0.3")
        return numbers


@dataclass(kw_only=True, slots=True)
class PackingSection:
    """Rows end to end instead of side by side, and tokens that were made before."""

    packing: bool = option(False, "Put rows into packs of one length; a batch counts packs, and no row sees another one")
    packing_length: int | None = option(None, "Tokens of a pack", auto="as --max_length", limits=_POSITIVE)
    packing_strategy: Literal["binpack", "sequential"] = option("binpack", "Waste least, or fill one pack after the other")
    padding_free: bool = option(False, "Put the rows of a micro batch end to end, without padding")
    cached_dataset: list[str] = option([], "Training rows from mswift export --to_cached_dataset; DIR#500 takes 500", metavar="DIR ...")
    cached_val_dataset: list[str] = option([], "The same for evaluation", metavar="DIR ...")


@dataclass(kw_only=True, slots=True)
class TemplateSection:
    """How messages become tokens; without ``template`` the checkpoint's own chat template says it."""

    template: str | None = option(None, "Chat template by name, such as qwen3, llama3, chatml or alpaca", auto="the checkpoint's own")
    system: str | None = option(None, "System message for rows that have none", auto="the template's own")
    loss_scale: str = option(
        "default", "Answers that count: default (all), last_round or all (every token); with + and weights: hermes, react, ..., a JSON file"
    )
    response_prefix: str | None = option(None, "Text that every answer of infer begins with", auto="none")
    agent_template: str | None = option(
        None, "Tools as text, for a template that writes none: hermes, react_en, qwen_en and more", auto="the template's own"
    )
    enable_thinking: bool | None = option(None, "Switch of hybrid thinking models", auto="the template's own")
    add_non_thinking_prefix: bool = option(True, "Where a prompt opens the reasoning, train answers without any to close it first")
    disable_ignore_empty_think: bool = option(False, "Train hybrid thinking models on empty reasoning too")


@dataclass(kw_only=True, slots=True)
class TunerSection:
    """Which weights are trained."""

    tuner_type: Literal["lora", "full"] = option("lora", "Train a LoRA adapter or every weight")
    target_modules: list[str] = option(
        ["all-linear"], "Layers that get LoRA: all-linear, all-router, all-embedding, or names such as q_proj v_proj lm_head", metavar="NAME ..."
    )
    lora_rank: int = option(8, "Rank of the adapter", limits=_POSITIVE)
    lora_alpha: int = option(32, "The adapter is scaled by alpha / rank", limits=_POSITIVE)
    lora_dropout: float = option(0.05, "Dropout before the adapter", low=0, below=1)
    use_rslora: bool = option(False, "Scale by alpha / sqrt(rank)")
    use_dora: bool = option(False, "DoRA: the rows of adapted weights have magnitudes of their own")
    adapters: list[str] = option([], "PEFT adapter to go on training", metavar="DIR ...")


@dataclass(kw_only=True, slots=True)
class QuantSection:
    """QLoRA: the frozen weights under an adapter kept in few bits."""

    quant_method: Literal["bnb"] | None = option(None, "Keep frozen linear layers quantised as bitsandbytes does; needs --quant_bits", auto="none")
    quant_bits: int | None = option(None, "4 (nf4) or 8 (int8, a factor for each row)", auto="none", limits=_POSITIVE)
    bnb_4bit_quant_type: Literal["nf4"] = option("nf4", "Values of 4 bits")
    bnb_4bit_use_double_quant: bool = option(True, "With 4 bits: the magnitudes of blocks in 8 bits as well")
    bnb_4bit_compute_dtype: Literal["bfloat16", "float32"] | None = option(None, "Precision of products", auto="as --torch_dtype")


@dataclass(kw_only=True, slots=True)
class ParallelSection:
    """How the model is split over processes; what is left over is data parallel."""

    tensor_model_parallel_size: int = option(1, "Processes that share each layer", limits=_POSITIVE)
    pipeline_model_parallel_size: int = option(1, "Stages of layers", limits=_POSITIVE)
    virtual_pipeline_model_parallel_size: int | None = option(None, "Virtual stages each pipeline process holds", auto="none", limits=_POSITIVE)
    context_parallel_size: int = option(1, "Processes that share each sequence", limits=_POSITIVE)
    expert_model_parallel_size: int = option(1, "Processes that the experts are spread over", limits=_POSITIVE)
    expert_tensor_parallel_size: int | None = option(
        None, "Processes that share each expert", auto="1 with experts spread, else as the layers", limits=_POSITIVE
    )
    sequence_parallel: bool = option(False, "Split activations between tensor-parallel layers along the sequence as well")
    decoder_first_pipeline_num_layers: int | None = option(None, "Layers of the first pipeline process", auto="even", limits=_POSITIVE)
    decoder_last_pipeline_num_layers: int | None = option(None, "Layers of the last pipeline process", auto="even", limits=_POSITIVE)
    account_for_embedding_in_pipeline_split: bool = option(False, "The embedding takes the place of a layer in the first stage")
    account_for_loss_in_pipeline_split: bool = option(False, "Head and loss take the place of a layer in the last stage")
    pipeline_model_parallel_layout: str | None = option(
        None, "Layers of every stage: E embedding, t layer, L loss, | between stages, as in Et*3|t*4|t*3L", auto="even", metavar="LAYOUT"
    )

    def sizes(self) -> dict[str, Any]:
        """The keyword arguments of `mswift.parallel.layout.ParallelLayout`, without ``world``.

        Raises:
            ConfigError: the layout of the stages is none.
        """
        text, pp = self.pipeline_model_parallel_layout, self.pipeline_model_parallel_size
        told = max(1, len(parse_stages(text)) // pp) if text is not None else 1
        return {
            "tp": self.tensor_model_parallel_size,
            "pp": pp,
            "vpp": self.virtual_pipeline_model_parallel_size or told,
            "cp": self.context_parallel_size,
            "ep": self.expert_model_parallel_size,
            "etp": self.expert_tensor_parallel_size,
            "split": PipelineSplit(
                self.decoder_first_pipeline_num_layers,
                self.decoder_last_pipeline_num_layers,
                self.account_for_embedding_in_pipeline_split,
                self.account_for_loss_in_pipeline_split,
                text,
            ),
        }


@dataclass(kw_only=True, slots=True)
class TrainSection:
    """How long, in which batches, and what is recomputed to save memory."""

    num_train_epochs: float = option(3.0, "Passes over the data; a fraction is allowed", above=0)
    max_steps: int | None = option(None, "Optimizer steps; wins over the epochs", auto="from the epochs", limits=_POSITIVE)
    micro_batch_size: int = option(1, "Sequences that one process computes at once", limits=_POSITIVE)
    global_batch_size: int | None = option(
        None,
        "Sequences of one optimizer step, over all processes",
        auto=f"{DEFAULT_GLOBAL_BATCH_SIZE}, or from the accumulation steps",
        limits=_POSITIVE,
    )
    gradient_accumulation_steps: int | None = option(
        None, "Micro batches of one optimizer step", auto="global / (micro x data parallel)", limits=_POSITIVE
    )
    dataloader_num_workers: int = option(0, "With streaming: processes beside each rank that read its rows; 0: a thread of it", low=0)
    seed: int = option(42, "Seed of new weights and of dropout", low=0)
    recompute_granularity: Literal["none", "selective", "full"] = option("none", "What is computed again in the backward pass, to save memory")
    recompute_method: Literal["uniform", "block"] = option("uniform", "With full: in even chunks, or the first layers only")
    mtp_num_layers: int | None = option(None, "Layers that predict further ahead, trained too: all of the model's", auto="none", limits=_POSITIVE)
    mtp_loss_scaling_factor: float = option(0.1, "Factor on the mean loss of those layers", limits=_NOT_NEGATIVE)
    recompute_num_layers: int = option(1, "With full: layers of a chunk (uniform), or layers that are recomputed (block)", limits=_POSITIVE)

    def resolve_global_batch_size(self, data_parallel: int) -> int:
        """Sequences of one optimizer step over all processes.

        Args:
            data_parallel: number of data-parallel replicas.

        Raises:
            ConfigError: the three batch flags contradict each other, or the batch is not a multiple of micro batch x replicas.
        """
        unit = self.micro_batch_size * data_parallel
        factors = f"micro_batch_size({self.micro_batch_size}) x data parallel({data_parallel})"
        if self.gradient_accumulation_steps is not None:
            accumulated = unit * self.gradient_accumulation_steps
            if self.global_batch_size not in (None, accumulated):
                raise ConfigError(
                    f"--global_batch_size is {self.global_batch_size}, but {factors} x gradient_accumulation_steps"
                    f"({self.gradient_accumulation_steps}) = {accumulated}; give one of the two flags"
                )
            return accumulated
        wanted = self.global_batch_size or DEFAULT_GLOBAL_BATCH_SIZE
        if wanted % unit:
            rest = "" if self.global_batch_size else " (the default)"
            raise ConfigError(
                f"--global_batch_size {wanted}{rest} is not a multiple of {factors} = {unit}; the nearest above is {-(-wanted // unit) * unit}"
            )
        return wanted


@dataclass(kw_only=True, slots=True)
class OptimSection:
    """AdamW and its learning rate."""

    learning_rate: float | None = option(None, "Highest learning rate", auto="1e-4 with lora, 1e-5 with full", above=0)
    min_lr: float = option(0.0, "Learning rate at the end", limits=_NOT_NEGATIVE)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = option("cosine", "How the learning rate falls after the warm-up")
    warmup_ratio: float = option(0.0, "Share of the steps in which the learning rate rises", limits=_SHARE)
    warmup_steps: int = option(0, "Steps in which it rises; wins over the ratio", limits=_NOT_NEGATIVE)
    weight_decay: float = option(0.1, "Decoupled weight decay", limits=_NOT_NEGATIVE)
    adam_beta1: float = option(0.9, "Decay of the mean of gradients", low=0, below=1)
    adam_beta2: float = option(0.95, "Decay of the mean of squared gradients", low=0, below=1)
    adam_epsilon: float = option(1e-8, "Added to the denominator", above=0)
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0 leaves them", limits=_NOT_NEGATIVE)
    use_distributed_optimizer: bool | None = option(None, "Spread the optimizer state over data-parallel processes", auto="decided by the engine")


@dataclass(kw_only=True, slots=True)
class SaveSection:
    """What is written, where, and what a run goes on from."""

    output_dir: str | None = option(None, "Folder of the run", auto="output/<model name>", metavar="DIR")
    add_version: bool = option(False, "Write into a new folder v0-<date> inside it")
    overwrite_output_dir: bool = option(False, "Start anew in a folder that holds checkpoints")
    save_steps: int = option(500, "Steps between checkpoints; the last step always has one", limits=_POSITIVE)
    save_total_limit: int | None = option(None, "Checkpoints to keep, the newest ones", auto="all", limits=_POSITIVE)
    resume_from_checkpoint: str | None = option(None, "auto (the newest, if any) or a checkpoint-N folder", auto="start anew", metavar="auto|DIR")
    max_shard_size: str = option("5GB", "Largest file of exported weights", pattern=_SIZE_PATTERN, wanted="a size such as 5GB or 500MB")
    merge_lora: bool = option(False, "Write the merged model as well, at the end")


@dataclass(kw_only=True, slots=True)
class LoggingSection:
    """What is reported, and how often."""

    logging_steps: int = option(5, "Steps between log lines", limits=_POSITIVE)
    eval_steps: int | None = option(None, "Steps between evaluations", auto="as --save_steps", limits=_POSITIVE)
    report_to: list[Literal["tensorboard"]] = option(["tensorboard"], "Where figures go besides logging.jsonl; none for nowhere")
    logging_first_step: bool = option(True, "Log the first step too")
    plot: bool = option(True, "Draw curves of the run as PNG files")


@dataclass(kw_only=True, slots=True)
class RuntimeSection:
    """Where it runs; how many processes there are comes from the environment (see Launch)."""

    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes CUDA where there is any")
    ddp_backend: Literal["gloo", "nccl"] | None = option(None, "How processes talk", auto="nccl with CUDA, else gloo")
    ddp_timeout: int = option(1800, "Seconds after which a process that does not answer is an error", limits=_POSITIVE)
    kernels: str = option(
        "auto", "Compiled kernels where they win, none of them (reference: plain torch), or those named, with commas", metavar="auto|reference|LIST"
    )


@dataclass(kw_only=True, slots=True)
class GenerationSection:
    """How answers are drawn."""

    max_new_tokens: int | None = option(None, "Longest answer in tokens", auto="2048, or what fits", limits=_POSITIVE)
    temperature: float | None = option(None, "0 always takes the likeliest token", auto="the model's own", limits=_NOT_NEGATIVE)
    top_p: float | None = option(None, "Draw from the likeliest tokens with this total probability", auto="the model's own", above=0, high=1)
    top_k: int | None = option(None, "Draw from this many likeliest tokens; 0 for all", auto="the model's own", limits=_NOT_NEGATIVE)
    repetition_penalty: float | None = option(None, "Above 1 makes repeated tokens less likely", auto="the model's own", above=0)
    seed: int | None = option(None, "Seed of the draws", auto="different every time", low=0)
    stop_words: list[str] = option([], "Texts that end an answer", auto="the model's end token only", metavar="TEXT ...")
    stream: bool | None = option(None, "Show tokens as they come", auto="true in a conversation")


@dataclass(kw_only=True, slots=True)
class InferSection:
    """What answers, and where the answers go."""

    adapters: list[str] = option([], "PEFT adapters on top of the model", metavar="DIR ...")
    result_path: str | None = option(None, "JSON lines file for the answers", auto="beside the adapter or the model", metavar="FILE")
    max_batch_size: int = option(1, "Prompts that are answered together", limits=_POSITIVE)
    load_args: bool = option(True, "Take model and template settings from args.json beside the adapter or the model")


@dataclass(kw_only=True, slots=True)
class VerifySection:
    """What a model is compared with."""

    against: str = option("", "The other model: a directory of a Hugging Face or a Megatron checkpoint", auto="required", metavar="DIR")
    num_tokens: int = option(64, "Random tokens whose logits are compared", limits=_POSITIVE)


@dataclass(kw_only=True, slots=True)
class ExportSection:
    """What is written from a model and its adapters."""

    adapters: list[str] = option([], "PEFT adapters on top of the model", metavar="DIR ...")
    merge_lora: bool = option(False, "Write the model with the adapters merged in")
    to_mcore: bool = option(False, "Write a Megatron checkpoint (torch_dist), or with --adapters a Megatron adapter")
    to_hf: bool = option(False, "Write a Hugging Face directory, from a Megatron checkpoint or another Hugging Face directory")
    to_cached_dataset: bool = option(False, "Write --dataset as tokens that sft reads with --cached_dataset")
    template_mode: Literal["train", "rlhf"] = option(
        "train", "With --to_cached_dataset: rows of one answer, or preference rows of which both answers stay together"
    )
    to_peft_format: bool = option(False, "Write the Megatron adapter of --mcore_adapter as a PEFT directory")
    mcore_adapter: str | None = option(None, "Megatron adapter to write in PEFT's form", auto="none", metavar="DIR")
    expert_lora_format: Literal["per-expert", "peft<0.19", "peft>=0.19", "vllm-3d"] | None = option(
        None, "How a PEFT directory holds the adapters of routed experts", auto="as the installed peft loads them"
    )
    resume: bool = option(False, "Go on with a conversion that was killed; finished files are kept")
    dry_run: bool = option(False, "Only say what each rank would hold and write, from the headers of a Hugging Face checkpoint")
    output_dir: str | None = option(None, "Folder to write", auto="<adapter or model>-merged, -mcore, -hf or -peft", metavar="DIR")
    exist_ok: bool = option(False, "Write into a folder that exists")
    max_shard_size: str = option("5GB", "Largest file of weights", pattern=_SIZE_PATTERN, wanted="a size such as 5GB or 500MB")
    load_args: bool = option(True, "Take model and template settings from args.json beside the adapter or the model")


@dataclass(kw_only=True, slots=True)
class InspectSection:
    """How rows are shown as the model sees them."""

    inspect: int = option(5, "Rows to show, from the first of --dataset on", limits=_POSITIVE)
    html: str | None = option(None, "Write a page with them to this file instead", auto="colours in the terminal", metavar="FILE")
    json: bool = option(False, "Print one JSON object a row instead: source, row, input_ids, weights, text")
