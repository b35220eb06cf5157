"""Explain Hydra's errors in one line, with the closest names of options."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from horsehuman.errors import closest, one_line
from horsehuman.runtime import configs_dir

#: Exceptions that Hydra raises for wrong options.
HYDRA_ERRORS = (HydraException, OmegaConfBaseException, ValueError)


def explain(error: Exception) -> str:
    """Describe an error of Hydra in one line, with the closest names for a typo.

    An ``OSError`` is that of a run folder that cannot be created.
    A ``ValueError`` that neither Hydra nor OmegaConf raised is raised again.
    """
    if isinstance(error, ValueError) and not isinstance(error, OmegaConfBaseException):
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not {"hydra", "omegaconf"} & set(Path(raised_in).parts):
            raise error
    if not isinstance(error, HYDRA_ERRORS):
        return one_line(error)
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        near = closest(choice, error.options)
        return f"{group}={choice} is not known{near}: use {' | '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read as OPTION=VALUE: put a value with special characters "
            "into double quotes, and the whole into single ones"
        )
    if found := re.search(r"Could not (?:override|append to config|delete)[^']*'@?([^'=]+)", text):
        key = found[1].lstrip("+~")
        names = option_names()
        if "append" in found[0] and key in names[""]:
            return f"{key} is an option already: drop the + before it"
        for choice, own in sorted(names.items(), key=lambda item: "experiment" in item[0]):
            if choice and key in own:
                return f"there is no option {key} here: it comes with {choice}"
        near = closest(key, set().union(*names.values()))
        return f"there is no option {key}{near}: --help lists all"
    return text


def option_names() -> dict[str, set[str]]:
    """Names of groups and options: those of the default config (under ""), and of each choice."""
    with hydra.initialize_config_dir(str(configs_dir()), version_base="1.3"):
        names = {"": flat_names(hydra.compose("train"))}
    names[""] |= {folder.name for folder in configs_dir().iterdir() if folder.is_dir()}
    for path in sorted(configs_dir().glob("*/*.yaml")):
        group = path.parent.name
        node = OmegaConf.load(path)
        if not path.read_text().startswith("# @package _global_"):
            node = OmegaConf.create({group: node})
        names[f"{group}={path.stem}"] = flat_names(node)
    return names


def flat_names(config: Any) -> set[str]:
    """Names of all options of a config, with dots."""
    pending: dict[str, Any] = {str(key): config._get_node(key) for key in config}
    names = set()
    while pending:
        name, node = pending.popitem()
        names.add(name)
        if isinstance(node, DictConfig) and not node._is_none():
            keys = [str(key) for key in node if key not in ("_target_", "defaults")]
            pending |= {f"{name}.{key}": node._get_node(key) for key in keys}
    return names
