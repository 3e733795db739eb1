"""Answers do not depend on the layout: several gloo processes answer as one does, and all of them say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import RankError, run_distributed
from tests.parity.cases import options_of
from tests.tiny import make_checkpoint

LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "pp2-vpp2": {"pp": 2, "vpp": 2},
}
PROMPTS = [[5, 17, 99, 203, 41], list(range(40, 60)), [7, 7, 300]]


def answers(rank: int, world: int, checkpoint: Path, sizes: dict[str, int], adapter: bool = False) -> list[Any]:
    """Token ids of: a padded batch, a drawn batch, one prompt, and a second turn on the cache of the first; then text and size of the cache."""
    import torch

    from mswift.commands.session import load_tokenizer
    from mswift.engines.megatron_model import BuildSettings, MegatronModel
    from mswift.parallel.groups import make_groups
    from mswift.parallel.layout import ParallelLayout
    from mswift.rollout.generate import Generator
    from mswift.rollout.sampling import Sampling
    from mswift.rollout.settings import GenerationSettings
    from mswift.runtime.device import select
    from mswift.tuners.lora import LoraSettings

    runtime = select("cpu")
    groups = make_groups(ParallelLayout(world=world, **sizes))
    model = MegatronModel(BuildSettings(checkpoint, dtype="float32"), groups, runtime)
    if adapter:
        model.add_lora(LoraSettings(rank=2))
        for name, module in model.adapters():
            if module.kind == "row":  # whole on every rank
                torch.nn.init.normal_(module.lora_b, 0.0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    generator = Generator(model, load_tokenizer(checkpoint))
    greedy = GenerationSettings(max_new_tokens=10)
    hot = GenerationSettings(Sampling(temperature=1.2, top_p=0.9, repetition_penalty=1.2), max_new_tokens=10)
    batch = [answer.token_ids for answer in generator.generate(PROMPTS, greedy)]
    ended = GenerationSettings(max_new_tokens=10, stop_token_ids=(batch[0][2],), stop_words=("zzz",))
    first = generator.generate(PROMPTS[:1], greedy)[0]
    second = generator.generate([[*PROMPTS[0], *first.token_ids, 9, 8]], greedy)[0]
    return [
        batch,
        [answer.token_ids for answer in generator.generate(PROMPTS, hot, seeds=[1, 2, 3])],
        first.token_ids,
        second.token_ids,
        [answer.token_ids for answer in generator.generate(PROMPTS, ended)],
        second.text,
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("generation") / "model")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[Any]:
    return run_distributed(answers, 1, checkpoint, {})[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_of_every_layout_gives_the_answers_of_one_process(layout: str, checkpoint: Path, expected: list[Any]) -> None:
    sizes = LAYOUTS[layout]
    ranks = run_distributed(answers, sizes.get("tp", 1) * sizes.get("pp", 1), checkpoint, sizes, timeout=120)
    assert all(rank == ranks[0] for rank in ranks)
    assert ranks[0] == expected
    assert expected[0] != expected[1]
    assert expected[2] == expected[0][0]


def test_copies_that_share_experts_go_step_by_step(tmp_path: Path) -> None:
    family, changes = options_of("qwen3_moe/plain")
    checkpoint = make_checkpoint(tmp_path / "model", family, **changes)
    one = run_distributed(answers, 1, checkpoint, {})[0]
    ranks = run_distributed(answers, 2, checkpoint, {"ep": 2}, timeout=120)
    assert ranks == [one, one]
    with pytest.raises(RankError, match="use expert or tensor parallelism alone"):
        run_distributed(answers, 2, checkpoint, {"ep": 2, "tp": 2}, timeout=120)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_layers_with_a_state_answer_alike_in_every_layout(layout: str, tmp_path: Path) -> None:
    """A pipeline stage without such a layer must not keep a part of what was computed when the others cannot."""
    kinds = ["linear_attention", "linear_attention", "full_attention", "full_attention"]
    checkpoint = make_checkpoint(tmp_path / "model", "qwen3_5_text", layer_types=kinds)
    ranks = run_distributed(answers, 2, checkpoint, LAYOUTS[layout], timeout=120)
    assert ranks[0] == ranks[1] == run_distributed(answers, 1, checkpoint, {})[0]


def test_an_adapter_answers_alike_on_two_ranks(checkpoint: Path, expected: list[Any]) -> None:
    alone = run_distributed(answers, 1, checkpoint, {}, True)[0]
    ranks = run_distributed(answers, 2, checkpoint, {"tp": 2}, True, timeout=120)
    assert ranks == [alone, alone]
    assert alone != expected


@pytest.mark.parametrize("case", ["deepseek_v3/plain", "llama4_text/plain"])
def test_latent_attention_and_chunks_answer_alike_on_two_ranks(case: str, tmp_path: Path) -> None:
    kind, changes = options_of(case)
    directory = make_checkpoint(tmp_path / "model", kind, **changes)
    alone = run_distributed(answers, 1, directory, {}, True)[0]
    assert run_distributed(answers, 2, directory, {"tp": 2}, True, timeout=120) == [alone, alone]
