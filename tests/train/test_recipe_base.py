"""Recipes that stand on another."""

from __future__ import annotations

from pathlib import Path

import pytest

from samba_lm.errors import UserError
from samba_lm.train.recipe import Recipe


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(files))}.toml"


def test_the_bases_values_stand_where_the_recipe_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", root="[model]\noverrides = {norm_eps = 1e-6}\n[train]\nlr = 1e-3\nclip = 2.0\n")
    path = write(
        tmp_path,
        recipe='base = "middle.toml"\n[model]\nname = "mamba-tiny"\noverrides = {tie_embeddings = false}\n',
        middle='base = "below/root.toml"\n[train]\nlr = 3e-3\nsteps = 7\n',
    )
    recipe = Recipe.from_toml(path)
    assert (recipe.train.lr, recipe.train.clip, recipe.train.steps) == (3e-3, 2.0, 7)
    assert recipe.model.name == "mamba-tiny"
    assert recipe.model.overrides == {"norm_eps": 1e-6, "tie_embeddings": False}


@pytest.mark.parametrize(
    ("section", "below", "above", "dropped"),
    [
        ("train", "steps = 9", "tokens = 500", "steps"),
        ("train", "tokens = 500", "steps = 9", "tokens"),
        ("data", 'tokenizer = "byte"\npasskey = {lm_weight = 0.5}', "phonebook = {}", "passkey"),
    ],
)
def test_of_two_that_exclude_each_other_the_recipes_own_stays(
    tmp_path: Path, section: str, below: str, above: str, dropped: str
) -> None:
    path = write(tmp_path, recipe=f'base = "b.toml"\n[{section}]\n{above}\n', b=f"[{section}]\n{below}\n")
    assert getattr(getattr(Recipe.from_toml(path), section), dropped) is None


def test_a_table_of_the_same_name_is_merged(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        recipe='base = "b.toml"\n[data]\npasskey = {lm_weight = 0.5}\n',
        b="[data.passkey]\nlengths = [64, 128]\n",
    )
    passkey = Recipe.from_toml(path).data.passkey
    assert passkey is not None
    assert (passkey.lengths, passkey.lm_weight) == ((64, 128), 0.5)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": 'base = "gone.toml"'}, ["a.toml", "base cannot be read", "gone.toml"]),
        ({"a": 'base = "a.toml"'}, ["a.toml", "leads back", "own base"]),
        ({"a": 'base = "b.toml"', "b": 'base = "./a.toml"'}, ["b.toml", "leads back to", "a.toml"]),
        ({"a": "base = 3"}, ["base = 3", "path of another recipe"]),
        ({"a": 'base = ""'}, ["base = ''"]),
        ({"a": 'base = "paper/samba-1.4b"'}, ["a.toml", "'paper/samba-1.4b'", "comes along", ".toml"]),
        ({"a": 'base = "b.toml"', "b": "[train\n"}, ["a.toml", "b.toml", "not valid TOML"]),
        ({"a": 'base = "b.toml"', "b": "[train]\nlrr = 2"}, ["a.toml", "train.lrr", "Did you mean 'lr'"]),
        ({"a": 'base = "b.toml"\ntrain = 3', "b": "[train]\nlr = 2"}, ["a.toml", "train = 3"]),
    ],
)
def test_bad_bases_are_told_in_one_line(tmp_path: Path, files: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        Recipe.from_toml(write(tmp_path, **files))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_base_that_comes_along_is_named_as_train_names_it(tmp_path: Path) -> None:
    path = write(tmp_path, a='base = "paper/samba-1.3b"\n[data.mixture.mine]\npath = "mine"\nweight = 1.0\n')
    recipe = Recipe.from_toml(path)
    assert (recipe.model.name, recipe.train.batch_size, [*recipe.data.mixture]) == ("samba-1.3b", 512, ["mine"])
    (tmp_path / "paper").mkdir()
    write(tmp_path / "paper", **{"samba-1.3b": "[train]\nlr = 1.0\n"})
    assert Recipe.from_toml(path).train.lr != 1.0, "a file is named with its ending"


def test_links_that_lead_in_a_circle_are_told(tmp_path: Path) -> None:
    (tmp_path / "one.toml").symlink_to("two.toml")
    (tmp_path / "two.toml").symlink_to("one.toml")
    with pytest.raises(UserError, match="base cannot be read"):
        Recipe.from_toml(write(tmp_path, a='base = "one.toml"'))
