"""The printed settings fit a screen and hide no change."""

from __future__ import annotations

from mswift.config import SftConfig, format_table, parse_command, table_rows

BASE = ["--model", "org/m", "--dataset", "d.jsonl"]


def test_rows_hold_every_flag_once() -> None:
    config = parse_command("sft", [*BASE, "--lora_rank", "4", "--hub_token", "hf_x"])
    rows = table_rows(config)
    assert [row.name for row in rows] == list(SftConfig.flags())
    by_name = {row.name: row for row in rows}
    assert by_name["lora_rank"] == ("tuner", "lora_rank", "4", False)
    assert by_name["learning_rate"] == ("optim", "learning_rate", "0.0001", True)
    assert by_name["output_dir"].value == "output/m"
    assert by_name["hub_token"] == ("model", "hub_token", "(set)", False)


def test_a_plain_run_shows_what_matters() -> None:
    text = format_table(parse_command("sft", BASE))
    lines = text.splitlines()
    assert lines[0] == "mswift sft: settings (* = not the default)"
    assert "  model      * model                                  org/m" in lines
    assert any("learning_rate" in line and "*" not in line for line in lines)
    assert "adam_beta1" not in text
    assert len(lines) <= 40
    assert lines[-1].endswith("more at their default: mswift sft --help lists them")


def test_full_training_does_not_show_lora() -> None:
    text = format_table(parse_command("sft", [*BASE, "--tuner_type", "full"]))
    assert "lora_rank" not in text
    assert "1e-05" in text


def test_it_fits_whatever_is_set() -> None:
    flags = SftConfig.flags()
    config = SftConfig.from_flat(
        {name: 7 for name, flag in flags.items() if flag.kind == "int" and flag.default != 7}
        | {"model": "x" * 300, "system": "a\nb", "dataset": ["d"] * 99}
    )
    text = format_table(config, width=80, max_lines=20)
    lines = text.splitlines()
    assert len(lines) == 20
    assert max(map(len, lines)) <= 80
    assert lines[-2].strip().endswith("more changed settings: see args.json")
    assert "a\\nb" in format_table(config)
    assert all("*" in line for line in lines[1:-2])
