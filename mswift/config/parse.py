"""From a command line and a YAML or JSON file to a config; every error is one line that names the flag or the file.

Two steps: `_given` collects what was given as (name, raw value, label), `_Reader` gives each its meaning: a flag of the command, an old name, a
flag of ms-swift that changes nothing here, one that is not supported yet, or a mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

from mswift.config import aliases
from mswift.config.configs import Config, DataConfig, ExportConfig, InferConfig, PtConfig, SftConfig, VerifyConfig
from mswift.config.fields import Flag, nearest, plain, shown
from mswift.config.known import NOT_YET, SWITCHES_OFF
from mswift.config.saved import apply_saved
from mswift.errors import ConfigError

CONFIGS: dict[str, type[Config]] = {
    "sft": SftConfig,
    "pt": PtConfig,
    "infer": InferConfig,
    "export": ExportConfig,
    "merge-lora": ExportConfig,
    "verify": VerifyConfig,
    "data": DataConfig,
}
PRESETS: dict[str, dict[str, str]] = {"merge-lora": {"merge_lora": "true"}}
_FILE_ENDINGS = (".yaml", ".yml", ".json")


class _Given(NamedTuple):
    """One setting as it was given: `raw` is a list of texts from the command line, or a value from a file."""

    name: str
    raw: Any
    label: str
    from_file: bool


@dataclass(frozen=True, slots=True)
class Parsed:
    """A config and how it came about.

    Args:
        config: checked. given: flags that were given, in a file or on the command line. notes: one line for the user each.
        env: environment variables of the file's ENV block that were not set yet.
    """

    config: Config
    given: frozenset[str]
    notes: tuple[str, ...]
    env: dict[str, str]


@overload
def parse_command(verb: Literal["sft", "pt"], argv: Sequence[str]) -> SftConfig: ...
@overload
def parse_command(verb: Literal["infer"], argv: Sequence[str]) -> InferConfig: ...
@overload
def parse_command(verb: Literal["export", "merge-lora"], argv: Sequence[str]) -> ExportConfig: ...
def parse_command(verb: str, argv: Sequence[str]) -> Config:
    """The checked config of a command, as from ``mswift VERB ARGV...``.

    Raises:
        ConfigError: unknown verb or flag, wrong value, settings that do not go together.
    """
    return read_command(verb, argv, {}).config


def read_command(verb: str, argv: Sequence[str], environ: Mapping[str, str]) -> Parsed:
    """Like `parse_command`, with what the command line program has to say and do besides.

    Args:
        verb: a key of `CONFIGS`. argv: what follows it: an optional file, then flags. environ: only ``USE_HF`` is read.

    Raises:
        ConfigError: as for `parse_command`.
    """
    config_class = CONFIGS[verb]
    given, env, notes = _given(argv, environ, config_class)
    reader = _Reader(verb, config_class.flags())
    for item in given:
        reader.take(item)
    use_hf = {**env, **environ}.get("USE_HF")
    if use_hf and "use_hf" not in reader.values:
        reader.values["use_hf"] = reader.flags["use_hf"].read(use_hf, "USE_HF in the environment")
    preset = {name: reader.flags[name].read(value, name) for name, value in PRESETS.get(verb, {}).items()}
    values, saved_notes = apply_saved(config_class, {**preset, **reader.values})
    config = config_class.from_flat(values)
    config.check()
    return Parsed(config, frozenset(reader.values), (*notes, *reader.notes(), *saved_notes), env)


def _given(argv: Sequence[str], environ: Mapping[str, str], config_class: type[Config]) -> tuple[list[_Given], dict[str, str], list[str]]:
    """Settings in the order in which they count, the ENV block's new variables, and notes."""
    rest = list(argv[1:] if argv[:1] == ["--config"] else argv)
    if not rest or rest[0].startswith("--") or not rest[0].lower().endswith(_FILE_ENDINGS):
        return list(_from_argv(rest)), {}, []
    path = Path(rest[0])
    content = _load_file(path)
    block = content.pop("ENV", None)
    wanted = _environment(block, path)
    new = {name: value for name, value in wanted.items() if name not in environ}
    kept = [name for name, value in wanted.items() if environ.get(name, value) != value]
    notes = [f"{path}: ENV {name} is {wanted[name]}, but the environment already has {environ[name]}, which wins" for name in kept]
    return [*_from_file(content, path, config_class), *_from_argv(rest[1:])], new, notes


def _from_argv(argv: Sequence[str]) -> Iterator[_Given]:
    name, label, values = "", "", list[str]()
    for token in argv:
        if not re.match(r"--[A-Za-z]", token):
            if not name:
                raise ConfigError(f"got {shown(token)}, wanted a flag such as --model, or a file that ends in .yaml, .yml or .json, first")
            values.append(token)
            continue
        if name:
            yield _Given(name, values, label, from_file=False)
        label, equals, value = token.partition("=")
        name, values = label[2:].replace("-", "_"), [value] if equals else []
        label = label if label.isprintable() else shown(label)
    if name:
        yield _Given(name, values, label, from_file=False)


def _load_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file."""
    try:
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path} cannot be read: {reason}; check its name") from error
    content = _load_json(text, path) if path.suffix.lower() == ".json" else _load_yaml(text, path)
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path}: got {shown(content)}, wanted flags and values such as 'learning_rate: 1e-4'")
    return content


def _load_json(text: str, path: Path) -> Any:
    import json

    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error


def _load_yaml(text: str, path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f", line {mark.line + 1}" if mark else ""
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error).splitlines()[0]
        raise ConfigError(f"{path}{where}: not YAML: {problem}; wanted lines such as 'learning_rate: 1e-4'") from error


def _environment(block: Any, path: Path) -> dict[str, str]:
    if block is None:
        return {}
    if not isinstance(block, dict) or any(isinstance(value, list | dict) for value in block.values()):
        raise ConfigError(f"{path}: ENV: got {shown(block)}, wanted names and values such as 'OMP_NUM_THREADS: 2'")
    return {str(name): plain(value) for name, value in block.items() if value is not None}


def _from_file(content: Mapping[str, Any], path: Path, config_class: type[Config]) -> Iterator[_Given]:
    """Settings of a file, in its order; a section's name may hold a mapping of its flags. null is "not set"."""
    for key, value in content.items():
        if key not in config_class.sections() or not isinstance(value, dict):
            yield from _file_item(key, value, str(path))
            continue
        for name, inner in value.items():
            flag = config_class.flags().get(str(name).replace("-", "_"))
            if flag is not None and flag.section != key:
                raise ConfigError(f"{path}: {key}: {name} belongs to section {flag.section}; move it there")
            yield from _file_item(str(name), inner, f"{path}: {key}")


def _file_item(name: str, value: Any, where: str) -> Iterator[_Given]:
    if value is not None:
        yield _Given(name.replace("-", "_"), value, f"{where}: {name if name.isprintable() else shown(name)}", from_file=True)


@dataclass(slots=True)
class _Reader:
    """Gives settings their meaning; the last one given for a flag wins."""

    verb: str
    flags: dict[str, Flag]
    values: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    def take(self, given: _Given) -> None:
        """Read one setting.

        Raises:
            ConfigError: it is unknown, not supported, of another command, or its value is wrong.
        """
        name = given.name
        if name not in self.flags:
            translated = self._translate(given)
            if translated is None:
                return
            given, name = translated, translated.name
        if name in self.flags:
            self._set(self.flags[name], given)
        else:
            self._other(given)

    def _translate(self, given: _Given) -> _Given | None:
        """The setting under its present name; None if it asks for what happens anyway."""
        name = given.name
        if name in aliases.RENAMED:
            return self._rename(given, aliases.RENAMED[name])
        if name in aliases.SWITCHES:
            pair = aliases.SWITCHES[name][_switch(given)]
            return None if pair is None else self._rename(given, *pair, show_value=True)
        if name == "distributed_timeout_minutes":
            minutes = _one(given)
            if not re.fullmatch(r"\d+", str(minutes)):
                raise ConfigError(f"{given.label}: got {shown(minutes)}, wanted a whole number of minutes")
            return self._rename(given, "ddp_timeout", str(int(minutes) * 60), show_value=True)
        if name == "ckpt_dir":
            folder = str(_one(given))
            adapter = (Path(folder).expanduser() / "adapter_config.json").is_file()
            return self._rename(given, "adapters" if adapter else "model", folder)
        positive = self.flags.get(name.removeprefix("no_"))
        if positive is not None and positive.kind == "bool" and name.startswith("no_"):
            return _Given(positive.name, ["false" if _switch(given) else "true"], given.label, from_file=False)
        return given

    def _rename(self, given: _Given, name: str, text: str | None = None, *, show_value: bool = False) -> _Given:
        """The setting as one of flag `name`, with the value `text` instead of its own if there is one."""
        if name in self.flags:
            self.renamed[given.label] = f"--{name} {text}" if show_value else f"--{name}"
        return given._replace(name=name) if text is None else _Given(name, [text], given.label, from_file=False)

    def _set(self, flag: Flag, given: _Given) -> None:
        raw = given.raw if given.from_file else _command_value(flag, given)
        synonyms = aliases.VALUES.get(flag.name, {})
        unsupported = aliases.UNSUPPORTED_VALUES.get(flag.name, frozenset())
        items = [synonyms.get(plain(item), item) for item in (raw if isinstance(raw, list) else [raw])]
        for item in items:
            if isinstance(item, str) and item.split("+")[-1] in unsupported:
                raise ConfigError(f"{given.label}: {item} is not supported yet, wanted {flag.wanted()}")
        self.values[flag.name] = flag.read(items if isinstance(raw, list) else items[0], given.label)

    def _other(self, given: _Given) -> None:
        """A setting that is no flag of this command."""
        name, value = given.name, "true" if given.raw == [] else plain(given.raw).lower()
        if value in aliases.NEUTRAL.get(name, ()) or (name in SWITCHES_OFF and value in ("false", "0", "no")):
            return
        if name in aliases.NO_EFFECT:
            self.ignored[given.label] = aliases.NO_EFFECT[name]
            return
        owners = [config.verb for config in dict.fromkeys(CONFIGS.values()) if name in config.flags()]
        hint = aliases.HINTS.get(name)
        advice = f"; {hint}" if hint else ""
        if hint or name in NOT_YET or name in aliases.NEUTRAL:
            raise ConfigError(f"{given.label} is not supported yet{advice}")
        if owners:
            listed = f"{', '.join(owners[:-1])} and {owners[-1]}" if len(owners) > 1 else owners[0]
            raise ConfigError(f"{given.label} is a flag of mswift {listed}, not of mswift {self.verb}")
        names = {old: new for old, new in aliases.RENAMED.items() if new in self.flags} | {flag: flag for flag in self.flags}
        near = nearest(name, list(names))
        suggestion = f"; did you mean {'' if given.from_file else '--'}{names[near]}?" if near else f"; mswift {self.verb} --help lists all"
        raise ConfigError(f"{given.label} is not a flag of mswift {self.verb}{suggestion}")

    def notes(self) -> list[str]:
        """One line about old names, and one for every reason to ignore a flag."""
        lines = []
        if self.renamed:
            lines.append("read as: " + ", ".join(f"{old} -> {new}" for old, new in self.renamed.items()))
        for reason in dict.fromkeys(self.ignored.values()):
            labels = [label for label, why in self.ignored.items() if why == reason]
            lines.append(f"{', '.join(labels)} {'has' if len(labels) == 1 else 'have'} no effect: {reason}")
        return lines


def _command_value(flag: Flag, given: _Given) -> Any:
    """The value for a flag from the command line: a list for list flags, true for a bare switch, else the one text."""
    if flag.kind == "list" and given.raw:
        return given.raw
    if flag.kind == "bool" and not given.raw:
        return True
    if len(given.raw) != 1:
        got = f"{len(given.raw)} values ({shown(' '.join(given.raw))})" if given.raw else "nothing"
        raise ConfigError(f"{given.label}: got {got}, wanted {flag.wanted()}")
    return given.raw[0]


def _one(given: _Given) -> Any:
    if not isinstance(given.raw, list):
        return given.raw
    if len(given.raw) != 1:
        raise ConfigError(f"{given.label}: got {len(given.raw)} values, wanted one")
    return given.raw[0]


def _switch(given: _Given) -> bool:
    """The value of a true/false setting that is not a flag of ours; bare means true."""
    value = "true" if given.raw == [] else plain(_one(given)).lower()
    if value not in ("true", "false", "1", "0", "yes", "no"):
        raise ConfigError(f"{given.label}: got {shown(value)}, wanted true or false")
    return value in ("true", "1", "yes")
