"""Optional packages: whether they are there, and the one line for the user when they are not."""

from __future__ import annotations

import importlib.util
from functools import cache

from megatron.core.errors import UserError


@cache
def installed(package: str) -> bool:
    """Whether `import package` would find something; nothing is imported."""
    return importlib.util.find_spec(package) is not None


def require(setting: str, package: str, otherwise: str) -> None:
    """Raise `UserError` when `package` is not installed.

    Args:
        setting: What asks for it, e.g. `--attention-backend triton`.
        package: Its import name.
        otherwise: What to do instead of installing it, e.g. `use --attention-backend auto`.
    """
    if not installed(package):
        raise UserError(f"{setting} needs the package {package}, which is not installed; install it or {otherwise}")
