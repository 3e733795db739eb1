"""What vLLM makes of a model directory. Run by the interpreter of vLLM's own environment, which has no mswift.

``python vllm_program.py DIRECTORY '[[token ids], ...]' NEW_TOKENS [ADAPTER [TARGETS]]`` prints one line of JSON: for every prompt the
log-probability of each of its tokens but the first, and the greedy answer's token ids. TARGETS: a JSON list of the only modules that may be adapted.
"""

import importlib.metadata
import json
import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
_version = importlib.metadata.version
# The CPU build is published as vllm-cpu, and vLLM looks for "cpu" in the version of a package vllm to know what it was built for.
importlib.metadata.version = lambda name: f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)


def open_model(directory: str, **options: object):  # type: ignore[no-untyped-def]
    from vllm import LLM

    return LLM(directory, dtype="float32", enforce_eager=True, max_model_len=128, enable_prefix_caching=False, **options)


def main(directory: str, prompts: list[list[int]], new_tokens: int, adapter: str | None = None, targets: list[str] | None = None) -> list[dict]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    lora = {} if adapter is None else {"enable_lora": True, "max_lora_rank": 16, "lora_target_modules": targets}
    llm = open_model(directory, **lora)
    settings = SamplingParams(temperature=0, max_tokens=new_tokens, prompt_logprobs=0, ignore_eos=True)
    request = None if adapter is None else LoRARequest("adapter", 1, adapter)
    found = []
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False, lora_request=request)
    for prompt, output in zip(prompts, outputs):
        scores = [entry[token].logprob for token, entry in zip(prompt[1:], output.prompt_logprobs[1:])]
        found.append({"log_probs": scores, "answer": list(output.outputs[0].token_ids)})
    return found


if __name__ == "__main__":
    directory, prompts, new_tokens, *rest = sys.argv[1:]
    print(json.dumps(main(directory, json.loads(prompts), int(new_tokens), *rest[:1], *map(json.loads, rest[1:]))))
