"""Reading a recipe, and what to say when it is at fault.

A recipe is one YAML file; the command line adds dotted overrides:

    config = load_config("configs/quickstart.yaml", ["training.steps=50"])
    validate_or_raise(config)

`load_config` refuses what the types refuse (unknown keys, wrong types, values out of bounds) and
`validate_or_raise` what only several fields, the files or the model can tell (`config/rules.py`). Either
raises one `ConfigError` that names every fault it can see.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_dppo.config import Config, FinalAnswerReward, MathReward
from megatron_dppo.config.rules import RULES, Rule, broken_rules
from megatron_dppo.files import replacing


class ConfigError(ValueError):
    """A config that cannot run; `faults` holds one line for each thing to mend, `sections` what could be read of it."""

    def __init__(self, source: str, faults: Sequence[str], sections: Mapping[str, BaseModel] | None = None):
        self.faults, self.sections = list(faults), dict(sections or {})
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {fault}" for fault in self.faults)]))


def load_config(path: Path | str, overrides: Sequence[str] = (), rules: Sequence[Rule] = RULES) -> Config:
    """Reads a recipe and applies `key.path=value` overrides, values parsed as YAML.

    Raises ConfigError naming every unknown key (with the nearest known one), wrong type and value out of
    bounds, and with them every one of `rules` that is broken among the sections that could be read.
    """
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        where = "" if Path(path).is_absolute() else f" (from {Path.cwd()})"
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}{where}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"is not YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(raw, dict):
        raise ConfigError(str(path), [f"got {type(raw).__name__}, expected a mapping of sections"])
    faults = [fault for override in overrides if (fault := _apply_override(raw, override))]
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        faults += [_type_fault(item) for item in error.errors()]
    else:
        if not faults:
            return config
    sections = _readable_sections(raw)
    raise ConfigError(str(path), faults + broken_rules(sections, rules), sections)


def check_config(config: Config, rules: Sequence[Rule] = RULES) -> list[str]:
    """Every fault that the types cannot see: between fields, of files, of the model and its tokenizer."""
    return broken_rules(sections_of(config), rules)


def sections_of(config: Config) -> dict[str, Any]:
    """By name, as rules take them."""
    return {name: getattr(config, name) for name in Config.model_fields}


def validate_or_raise(config: Config, rules: Sequence[Rule] = RULES) -> None:
    """Raises ConfigError naming every fault of `check_config`."""
    faults = check_config(config, rules)
    if faults:
        raise ConfigError(f"config of run {config.run.name!r}", faults)


def save_config(config: Config, path: Path | str) -> None:
    """Writes the config as YAML that `load_config` reads back to an equal one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML's own keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _apply_override(raw: dict[str, Any], override: str) -> str | None:
    """Sets one `key.path=value` in place; returns the fault, if any."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        return f"override {override!r}: expected key.path=value, as in training.steps=50"
    try:
        value = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        return f"override {override!r}: the value is not YAML: {' '.join(str(error).split())}"
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            return f"override {override!r}: {parent} is a value, not a section"
    node[leaf] = value
    return None


def _readable_sections(raw: Mapping[str, Any]) -> dict[str, BaseModel]:
    """The sections that are valid once unknown keys are dropped: their rules are checked all the same."""
    sections: dict[str, BaseModel] = {}
    for name, field in Config.model_fields.items():
        if name in ("reward", "resume"):  # no rule reads them
            continue
        value = raw.get(name, {})
        kind = field.annotation
        assert isinstance(kind, type) and issubclass(kind, BaseModel)
        if isinstance(value, dict):
            known = {key: item for key, item in value.items() if key in kind.model_fields}
            try:
                sections[name] = kind.model_validate(known)
            except ValidationError:
                continue
    return sections


def _type_fault(error: Mapping[str, Any]) -> str:
    """One line for one pydantic error, in terms of the YAML's keys."""
    loc = [str(part) for part in error["loc"] if part not in ("final_answer", "math")]  # pydantic's union tags
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(loc)}"
    if error["type"] == "missing":
        return f"{key}: missing, a value is required"
    return f"{key}: got {error['input']!r}, {error['msg'][0].lower()}{error['msg'][1:]}"


def _nearest(loc: Sequence[str]) -> str:
    """ ", did you mean ...?" for an unknown key; empty where nothing is near."""
    known = list(_known_keys(Config, ""))
    siblings = [key for key in known if key.rpartition(".")[0] == ".".join(loc[:-1])]
    for candidates in (siblings, known):
        by_last = {key.rpartition(".")[2]: key for key in reversed(candidates)}
        if match := difflib.get_close_matches(loc[-1], by_last, n=1, cutoff=0.6):
            return f", did you mean {by_last[match[0]]}?"
    return f", known keys there: {', '.join(key.rpartition('.')[2] for key in siblings)}" if siblings else ""


def _known_keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """Every dotted key, sections and leaves."""
    for name, field in section.model_fields.items():
        yield prefix + name
        kinds = (FinalAnswerReward, MathReward) if name == "reward" else (field.annotation,)
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _known_keys(kind, f"{prefix}{name}.")
