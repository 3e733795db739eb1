"""What every rank of a test world imports: done once in the fork server, so that a world starts in a fraction of a second instead of seconds."""

from __future__ import annotations

from mswift.runtime import cpu

cpu.install(force=True)

# the first optimizer brings the first of these, a config much of transformers with it
import torch._dynamo  # noqa: E402, F401
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config  # noqa: E402, F401
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402, F401

import mswift.commands.session  # noqa: E402
import mswift.data  # noqa: E402
import mswift.engines.megatron  # noqa: E402
import mswift.train.checkpoint  # noqa: E402, F401
