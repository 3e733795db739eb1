"""The settings of a run as a table that fits a screen: what was changed and what matters, the rest as a count."""

from __future__ import annotations

from typing import NamedTuple

from mswift.config.configs import Config
from mswift.config.fields import plain

_IMPORTANT = """
model torch_dtype device dataset val_dataset split_dataset_ratio max_length system tuner_type target_modules lora_rank lora_alpha
tensor_model_parallel_size pipeline_model_parallel_size num_train_epochs max_steps micro_batch_size global_batch_size recompute_granularity
learning_rate lr_scheduler_type warmup_ratio output_dir save_steps resume_from_checkpoint adapters result_path max_batch_size max_new_tokens
temperature merge_lora packing cached_dataset
"""
IMPORTANT = frozenset(_IMPORTANT.split())


class Row(NamedTuple):
    """One line of the table; `value` is text, as one would type it."""

    section: str
    name: str
    value: str
    is_default: bool


def table_rows(config: Config) -> list[Row]:
    """All settings, in the order of sections; a secret is shown as ``(set)``."""
    flat, changed, effective = config.to_flat(secrets=True), config.changed(), config.effective()
    rows = []
    for name, flag in config.flags().items():
        if flag.secret and flat[name]:
            value = "(set)"
        else:
            value = plain(flat[name]) if name in changed else plain(effective[name]) if name in effective else flag.shown_default()
        rows.append(Row(flag.section, name, value.replace("\n", "\\n"), name not in changed))
    return rows


def format_table(config: Config, *, width: int = 100, max_lines: int = 40) -> str:
    """The table as text without a final newline: changed settings are marked ``*``; at most `max_lines` lines of `width` characters.

    Settings at their default are shown where they matter and give way first when there is no room.
    """
    rows = table_rows(config)
    hidden = {name for names, _ in config.idle() for name in names}
    changed = [row for row in rows if not row.is_default]
    kept = [row for row in rows if not row.is_default or (row.name in IMPORTANT and row.name not in hidden)]
    room = max_lines - 2
    if len(kept) > room:
        kept = changed
    body = [_line(row, "" if before and before.section == row.section else row.section, width) for before, row in zip([None, *kept], kept)]
    if len(body) > room:
        body = [*body[: room - 1], f"  ... {len(body) - room + 1} more changed settings: see args.json"]
    rest = len(rows) - len(kept)
    head = f"mswift {config.verb}: settings (* = not the default)"
    return "\n".join([head, *body, f"  {rest} more at their default: mswift {config.verb} --help lists them"])


def _line(row: Row, section: str, width: int) -> str:
    text = f"  {section:<11}{' ' if row.is_default else '*'} {row.name:<38} {row.value}"
    return text if len(text) <= width else f"{text[: width - 3]}..."
