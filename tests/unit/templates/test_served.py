"""The files that an export gets for a named template: loaded by transformers, they serve what was trained, for every template that ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mswift.errors import ModelError
from mswift.templates import ChatTemplate, Conversation
from mswift.templates.named import find_template, table
from mswift.templates.served import chat_files, read_own_template
from tests.unit.templates.registry import plain_conversations, tokenizer_for

ASKED = [plain_conversations()[title].upto(-1) for title in ("one turn", "many turns", "unicode")]


def base_of(name: str, folder: Path) -> Any:
    """The tokenizer of a base model without a template, whose end token ends no turn."""
    tokenizer_for(name).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "</s>"}))
    return AutoTokenizer.from_pretrained(folder)


def add(files: dict[str, str], folder: Path) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf8")


@pytest.mark.parametrize("name", list(table()))
def test_the_files_serve_what_was_trained(name: str, tmp_path: Path) -> None:
    base = base_of(name, tmp_path)
    template = ChatTemplate(base, chat_template=find_template(name).text)
    prompts, stops = [template.encode_prompt(asked) for asked in ASKED], template.stop_token_ids
    add(chat_files(tmp_path, template), tmp_path)
    served = AutoTokenizer.from_pretrained(tmp_path)
    for asked, prompt in zip(ASKED, prompts, strict=True):
        assert served.apply_chat_template(list(asked.messages), add_generation_prompt=True, return_dict=True)["input_ids"] == prompt
    assert sorted(json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]) == stops
    end = template.end_token
    assert served.eos_token == (end if end and "eos_token" not in template.template_text else "</s>")
    again = ChatTemplate(served)
    assert (again.stop_token_ids, again.end_of_turn) == (stops if served.eos_token == "</s>" else [i for i in stops if i != 1], template.end_of_turn)
    assert chat_files(tmp_path, again) == {}, "a second time there is nothing to change"


def test_what_a_file_says_besides_is_kept_and_the_own_template_changes_what_generation_stops_at_only(tmp_path: Path) -> None:
    base_of("chatml", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>", "lstrip": true}, "bos_token": "<s>"}')
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": 1}')
    template = ChatTemplate(AutoTokenizer.from_pretrained(tmp_path), chat_template=find_template("chatml").text)
    files = chat_files(tmp_path, template)
    assert set(files) == {"chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"}
    assert json.loads(files["special_tokens_map.json"]) == {"eos_token": {"content": "<|im_end|>", "lstrip": True}, "bos_token": "<s>"}
    end = template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads(files["generation_config.json"]) == {"temperature": 0.5, "eos_token_id": [end, 1]}
    (tmp_path / "chat_template.jinja").write_text(template.template_text)
    assert read_own_template(tmp_path) == template.template_text
    assert set(chat_files(tmp_path, template)) == {"generation_config.json"}


def test_without_a_generation_config_the_ids_of_the_config_go_on_and_a_broken_one_is_said(tmp_path: Path) -> None:
    template = ChatTemplate(base_of("chatml", tmp_path), chat_template=find_template("chatml").text)
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": null, "hidden_size": 8}')
    end = template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads(chat_files(tmp_path, template)["generation_config.json"]) == {"bos_token_id": 0, "eos_token_id": [end, 1]}
    assert template.encode_prompt(Conversation(ASKED[0].messages))
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"generation_config.json holds no JSON object; mend it, or download it again$"):
        chat_files(tmp_path, template)
