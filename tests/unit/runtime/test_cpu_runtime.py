"""The CPU runtime: when it refuses, what it supplies, which traps it closes, and every megatron call site that it serves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mswift.errors import ConfigError, LaunchError
from mswift.runtime import cpu
from mswift.runtime.precision import needs_wide, widen
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, open_batches, open_engine, open_model, train
from tests.tiny import make_checkpoint, write_rows

SITES = Path(__file__).with_name("served_sites.txt")


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def test_refuses_where_cuda_is_available_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "_mode", None)
    with pytest.raises(LaunchError, match="CUDA is available; use --device cuda, or --device cpu to insist"):
        cpu.install()
    assert not cpu.installed()


def test_installing_supplies_services_and_twice_is_once() -> None:
    out = in_new_process(
        "from mswift.runtime import cpu; cpu.install(); cpu.install(); import torch\n"
        "print(torch.cuda.current_device(), torch.zeros(2, device='cuda').device, torch.ones(1).cuda().device)\n"
        "print(torch.ones(1).type(), torch.ones(1, pin_memory=True).is_pinned(), isinstance(torch.cuda.Stream, type))\n"
        "print(torch.cuda.memory_allocated(), torch.compile.__module__)\n"
    )
    assert out.splitlines()[0] == "cpu cpu cpu"
    assert out.splitlines()[1] == "torch.cuda.FloatTensor False True"
    assert out.splitlines()[2] == "0 torch", "torch.compile was put back"


def test_an_untested_megatron_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from importlib import metadata; metadata.version = lambda name: '0.99.0'\n"
        "import logging; from mswift.runtime import cpu; said = []\n"
        "cpu.logger.warning = lambda text, *args: said.append(text % args); cpu.install(); print(said)"
    )
    assert "0.99.0 is not among the versions tested on CPU (0.16.1" in in_new_process(code)
    assert cpu.TESTED_MEGATRON_VERSIONS[0] == "0.16.1"


def test_products_of_stored_bf16_are_computed_in_fp32_and_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    out = in_new_process(
        "import torch; from mswift.runtime import cpu, precision; precision.cpu_multiplies_bf16 = lambda: False; cpu.install()\n"
        "a, b = torch.randn(5, 333).bfloat16(), torch.randn(7, 333).bfloat16()\n"
        "want = (a.float() @ b.float().t()).bfloat16()\n"
        "print(torch.equal(torch.matmul(a, b.t()), want), torch.equal(a @ b.t(), want), torch.equal(torch.nn.functional.linear(a, b), want))"
    )
    assert out == "True True True"
    bf16 = torch.ones(2, dtype=torch.bfloat16)
    monkeypatch.setattr("mswift.runtime.precision.cpu_multiplies_bf16", lambda: False)
    assert needs_wide(bf16)
    assert widen(bf16).dtype == torch.float32
    assert not needs_wide(bf16.float())
    monkeypatch.setattr("mswift.runtime.precision.cpu_multiplies_bf16", lambda: True)
    assert widen(bf16) is bf16


@pytest.mark.parametrize(
    ("settings", "tp", "vpp", "words"),
    [
        ({"multi_latent_attention": True}, 2, 1, "multi-latent attention with tensor parallelism"),
        ({"cross_entropy_loss_fusion": True}, 1, 1, "rounds the loss gradient to bf16"),
        ({"moe_grouped_gemm": True}, 1, 1, "needs a CUDA extension"),
        ({"overlap_p2p_comm": True, "batch_p2p_comm": True, "deallocate_pipeline_outputs": False}, 1, 2, "batch_p2p_comm off"),
        ({"overlap_p2p_comm": True, "batch_p2p_comm": False, "deallocate_pipeline_outputs": True}, 1, 2, "deallocate_pipeline_outputs off"),
    ],
)
def test_silent_traps_are_refused(settings: dict[str, bool], tp: int, vpp: int, words: str) -> None:
    with pytest.raises(ConfigError, match="on CPU: ") as caught:
        cpu.check_settings(settings, tp=tp, vpp=vpp)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_our_own_settings_pass_the_check() -> None:
    for pp, vpp in ((1, 1), (2, 1), (2, 2)):
        settings = cpu.transformer_settings(pp=pp, vpp=vpp)
        cpu.check_settings(settings, tp=2, vpp=vpp)
        assert settings["deallocate_pipeline_outputs"] is False
    assert cpu.transformer_settings(pp=2, vpp=2)["batch_p2p_comm"] is False


def uneven(rank: int, world: int) -> tuple[list[list[float]], list[float]]:
    """Collectives of unequal parts, which gloo does not have."""
    import torch.distributed as dist

    cpu.install(force=True)
    parts = [torch.zeros(size) for size in (1, 3)]
    dist.all_gather(parts, torch.full((1 + 2 * rank,), float(rank + 1)), group=dist.group.WORLD)
    out = torch.zeros(1 + 2 * rank)
    dist.reduce_scatter(out, [torch.ones(1), torch.full((3,), 2.0)], group=dist.group.WORLD)
    return [part.tolist() for part in parts], out.tolist()


def test_uneven_collectives() -> None:
    first, second = run_distributed(uneven, 2)
    assert first[0] == second[0] == [[1.0], [2.0, 2.0, 2.0]]
    assert first[1] == [2.0]
    assert second[1] == [4.0, 4.0, 4.0]


def served(rank: int, world: int, run: Run) -> set[tuple[str, str]]:
    with cpu.record_sites() as sites:
        engine = open_engine(run, world)
        train(engine, open_batches(run, engine), run, steps=2)
        engine.load_state(_round_trip(engine))
    return sites


def served_answering(rank: int, world: int, run: Run) -> set[tuple[str, str]]:
    from transformers import AutoTokenizer

    from mswift.rollout.generate import Generator
    from mswift.rollout.settings import GenerationSettings

    with cpu.record_sites() as sites:
        generator = Generator(open_model(run, world), AutoTokenizer.from_pretrained(run.checkpoint))
        generator.generate([[5, 6, 7], [8, 9]], GenerationSettings(max_new_tokens=3))
    return sites


def _round_trip(engine: object) -> dict:
    import tempfile

    import torch.distributed as dist

    from mswift.conversion.dist_checkpoint import load_state, save_state

    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name)
    save_state(engine.sharded_state(loading=False), Path(name[0]) / "state", "saving")  # type: ignore[attr-defined]
    return load_state(engine.sharded_state(loading=True), Path(name[0]) / "state")  # type: ignore[attr-defined]


def serve_everything(folder: Path) -> list[str]:
    """Runs that between them use all that training and answering use of megatron-core; what they were served, one line each."""
    model, rows = make_checkpoint(folder / "model"), write_rows(folder / "rows.jsonl")
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    sites: set[tuple[str, str]] = set()
    runs = [
        (2, Run(model, rows, tp=2, sequence_parallel=True, dtype="bfloat16", transformer=recompute)),
        (2, Run(model, rows, pp=2)),
        (2, Run(model, rows, pp=2, vpp=2)),
        (2, Run(model, rows, distributed_optimizer=True)),
        (1, Run(model, rows, lora={"rank": 2})),
    ]
    for world, run in runs:
        sites = sites.union(*run_distributed(served, world, run, timeout=120))
    for run in (Run(model, tp=2), Run(model, pp=2)):
        sites = sites.union(*run_distributed(served_answering, 2, run, timeout=120))
    return sorted(f"{what}\t{where}" for what, where in sites)


def test_every_call_site_that_is_served_is_listed(tmp_path: Path) -> None:
    """An upgrade of megatron-core that asks for a CUDA service in a new place shows here: look at it, then update the list."""
    found, known = serve_everything(tmp_path), SITES.read_text(encoding="utf8").splitlines()
    assert [site for site in found if site not in known] == [], "megatron-core was served at places that are not in the list"
    assert [site for site in known if site not in found] == [], "places in the list that are not served any more"
