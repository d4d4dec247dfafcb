"""Mixers and architectures of your own on the command line: modules that SAMBA_LM_PLUGINS names (docs/extending.md)."""

from __future__ import annotations

import importlib
import os
import sys

from samba_lm.errors import UserError

VARIABLE = "SAMBA_LM_PLUGINS"


def load_plugins() -> None:
    """Import the modules that the environment variable names, separated by commas, so that they can register.

    Modules are looked for where Python finds installed ones, then in the current folder. Raises UserError for a name
    that is none; whatever goes wrong inside a module is left to be seen as it is, with its traceback.
    """
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",")]
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in filter(None, names):
        _load(name)


def _load(name: str) -> None:
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{VARIABLE} = {name!r}: give the names of modules, such as my_mixer for ./my_mixer.py.")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only this module's own absence is the variable's fault; what the module imports in vain is not.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"{VARIABLE} = {name!r}: there is no such module, neither installed nor in {os.getcwd()}."
        ) from None
