"""``mswift data``: rows as the model sees them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mswift.commands import session as sessions
from mswift.commands.session import check_data, check_template, check_writable, find_model, load_tokenizer, reading, template_for
from mswift.config import DataConfig
from mswift.errors import DataError
from mswift.log import get_logger

logger = get_logger(__name__)


def check(config: DataConfig, world: int) -> None:
    """Find what is wrong with names, files and model without torch; writes nothing.

    Raises:
        MswiftError: with what to change.
    """
    from mswift.conversion.directories import check_tokenizer
    from mswift.conversion.hub import local_model

    check_template(config.template)
    directory = local_model(config.model.model)
    if directory is not None:
        check_tokenizer(directory)
    check_data(config)
    if config.inspect.html:
        check_writable(Path(config.inspect.html).expanduser().absolute().parent, "--html")


def data(config: DataConfig) -> None:
    """Show the first rows of ``--dataset``: in the terminal, as a page, or as JSON lines.

    Raises:
        MswiftError: anything that the user can put right; a row that the template refuses is shown with the reason, unless it refuses all of them.
    """
    from mswift.data.inspect import first_rows, inspect_rows, to_html, to_json
    from mswift.data.loading import ReadSettings
    from mswift.data.rows import listed

    sessions.quiet_libraries()
    values = reading(config)
    settings = ReadSettings(
        values["columns"] or {}, auto=values["auto"], strict=values["strict"], max_bad_share=values["max_bad_share"], use_hf=values["use_hf"]
    )
    rows, lines = first_rows(config.data.dataset, settings, config.inspect.inspect)
    for line in lines:
        logger.info("%s", line)
    tokenizer = load_tokenizer(find_model(config.model, weights=False), trust_remote_code=config.model.trust_remote_code)
    template = template_for(tokenizer, config.template)
    shown = inspect_rows(rows, template, config.data.max_length)
    refused = [str(one) for one in shown if isinstance(one, DataError)]
    if len(refused) == len(shown):
        raise DataError(f"none of the {len(rows)} rows can be used: {listed(refused)}; mend them, or give another --template")
    if config.inspect.html:
        page = Path(config.inspect.html).expanduser()
        page.write_text(to_html(shown, f"{config.model.model}: {', '.join(config.data.dataset)}"), encoding="utf8")
        num_shown = sum(not isinstance(one, DataError) for one in shown)
        print(f"{num_shown} training rows of {len(rows)} rows in {page}")
    elif config.inspect.json:
        for one in shown:
            print(f"error: {one}" if isinstance(one, DataError) else to_json(one), file=sys.stderr if isinstance(one, DataError) else sys.stdout)
    else:
        _print(shown)


def _print(shown: Sequence[object]) -> None:
    from rich.console import Console

    from mswift.data.inspect import Shown, legend, to_terminal

    console = Console(highlight=False, soft_wrap=True)
    console.print(legend())
    for one in shown:
        console.print()
        console.print(to_terminal(one) if isinstance(one, Shown) else f"[bold red]error:[/] {one}", markup=not isinstance(one, Shown))
