"""Prefect's settings by name, from the sources and in the order that Prefect reads them, without importing Prefect."""

import os
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def setting(name: str) -> str | None:
    """The value that Prefect would read in this process for `name` (`PREFECT_...`); None when no source sets it.

    The environment comes first, then `.env`, `prefect.toml` and `pyproject.toml` of the current folder, then the active
    profile. A file that cannot be read is passed over: Prefect reports it when it is imported.
    """
    keys = name.removeprefix("PREFECT_").lower()
    sources = (lambda: os.environ.get(name),
               lambda: _dotenv().get(name),
               lambda: _nested(_toml(Path("prefect.toml")), keys),
               lambda: _nested(_toml(Path("pyproject.toml")).get("tool", {}).get("prefect", {}), keys),
               lambda: _profile().get(name))
    for source in sources:
        with suppress(AttributeError):   # a file has a table where a value should be, or the reverse
            if value := source():
                return str(value)
    return None


def _dotenv() -> dict[str, str | None]:
    if not Path(".env").is_file():
        return {}
    from dotenv import dotenv_values

    with suppress(OSError, ValueError):
        return {name.upper(): value for name, value in dotenv_values(".env").items()}
    return {}


def _toml(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return tomllib.loads(path.read_text(encoding="utf-8"))
    return {}


def _nested(table: Mapping[str, Any], keys: str) -> Any:
    """The value of a setting in nested tables: `server_api_auth_string` is `auth_string` in the table `server.api`."""
    if keys in table:
        return table[keys]
    for name, inner in table.items():
        if isinstance(inner, Mapping) and keys.startswith(f"{name}_"):
            value = _nested(inner, keys.removeprefix(f"{name}_"))
            if value is not None:
                return value
    return None


def _profile() -> dict[str, Any]:
    """The settings of Prefect's active profile."""
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    profiles = _toml(Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml")))
    active = os.environ.get("PREFECT_PROFILE") or profiles.get("active")
    settings: dict[str, Any] = profiles.get("profiles", {}).get(active, {})
    return settings
