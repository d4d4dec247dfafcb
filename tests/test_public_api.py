"""The public names: what ``import samba_lm`` promises, and that it costs nothing."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import samba_lm

PUBLIC = {
    "ByteTokenizer",
    "LayerSpec",
    "Mixer",
    "ModelConfig",
    "SambaLM",
    "Span",
    "UserError",
    "create",
    "generate",
    "load",
    "load_tokenizer",
    "quantize",
    "register_architecture",
    "register_mixer",
    "save",
    "stream",
}


def test_the_promise() -> None:
    assert set(samba_lm.__all__) == PUBLIC
    assert set(dir(samba_lm)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_is_the_thing_at_its_home(name: str) -> None:
    assert getattr(samba_lm, name) is getattr(importlib.import_module(samba_lm._HOMES[name]), name)


def test_no_room_bears_a_public_name() -> None:
    # Importing a submodule sets it on the package: a room called generate would replace the function.
    assert not PUBLIC & {module.name for module in pkgutil.iter_modules(samba_lm.__path__)}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'samba_lm' has no attribute 'generat'"):
        _ = samba_lm.generat


def test_importing_the_package_imports_nothing_else() -> None:
    script = "import sys; before = set(sys.modules); import samba_lm; print(*(set(sys.modules) - before))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in ran.stdout.split()}
    assert loaded - {"samba_lm"} <= set(sys.stdlib_module_names)
