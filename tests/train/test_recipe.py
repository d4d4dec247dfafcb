from __future__ import annotations

from pathlib import Path

import pytest

from samba_lm.errors import UserError
from samba_lm.train.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_whole(path: Path) -> None:
    recipe = Recipe.from_toml(path)
    assert recipe.train.total_steps > 0
    assert recipe.model.config(4096).parameters() > 0
    assert recipe.train.out == f"runs/{path.stem}"


def test_both_recipes_are_shipped() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} >= {"samba-tiny", "samba-421m"}


def test_the_papers_recipe() -> None:
    recipe = Recipe.from_toml(RECIPES / "samba-421m.toml")
    train = recipe.train
    assert train.tokens_per_step == 2_097_152
    assert train.total_steps == 9537
    assert (train.lr, train.lr * train.min_lr_ratio) == (4e-4, pytest.approx(4e-5))
    assert (train.betas, train.weight_decay, train.clip, train.decay_all) == ((0.9, 0.95), 0.1, 1.0, True)
    config = recipe.model.config(32_000)
    assert 420e6 < config.parameters() < 423e6
    assert not recipe.data.documents


def test_auto_vocabulary_is_rounded_up() -> None:
    assert Recipe().model.config(257).vocab_size == 320
    assert Recipe().model.config(320).vocab_size == 320


def test_overrides_reach_the_config(tmp_path: Path) -> None:
    recipe = Recipe.from_toml(write(tmp_path, "[model]\noverrides = {norm_eps = 1e-6, tie_embeddings = false}\n"))
    config = recipe.model.config(100)
    assert (config.norm_eps, config.tie_embeddings) == (1e-6, False)


def test_tokens_become_whole_steps() -> None:
    recipe = Recipe.from_dict({"train": {"tokens": 1001, "batch_size": 2, "length": 50}})
    assert recipe.train.total_steps == 11


def test_round_trip_and_differences() -> None:
    recipe = Recipe.from_dict({"train": {"steps": 5, "betas": [0.8, 0.9]}})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    other = Recipe.from_dict({"train": {"steps": 5, "betas": [0.8, 0.99]}, "data": {"documents": True}})
    assert other.differences(recipe.to_dict()) == {
        "data.documents": (True, False),
        "train.betas": ([0.8, 0.99], [0.8, 0.9]),
    }


def test_fields_that_recipes_learned_later_had_their_defaults() -> None:
    recipe = Recipe.from_dict({"data": {"passkey": {"share": 0.5}}})
    before = recipe.to_dict()
    del before["model"]["slow_channels"], before["data"]["passkey"]["stretch"]
    assert recipe.differences(before) == {}
    del before["data"]["passkey"]["share"]
    assert recipe.differences(before) == {"data.passkey.share": (0.5, 1.0)}
    before["data"]["passkey"] = None
    assert recipe.differences(before).keys() == {"data.passkey"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nlearning_rate = 1\nlrr = 2\n", ["train.", "unknown key"]),
        ("[train]\nlrr = 2\n", ["train.lrr", "Did you mean 'lr'"]),
        ("[trian]\nlr = 2\n", ["trian", "Did you mean 'train'"]),
        ('[train]\nlr = "fast"\n', ["train.lr", "'fast'", "number"]),
        ("[train]\nlr = -1\n", ["train.lr", "-1", "greater than 0"]),
        ("[train]\nsteps = 1.5\n", ["train.steps", "1.5"]),
        ("[train]\nsteps = true\n", ["train.steps", "True"]),
        ("[train]\nsteps = 0\n", ["train.steps", "greater than or equal to 1"]),
        ("[train]\nsteps = 3\ntokens = 5\n", ["steps = 3", "tokens = 5", "keep one"]),
        ("[train]\nbatch_size = 6\nmicro_batch = 4\n", ["micro_batch = 4", "batch_size = 6"]),
        ("[train]\nbetas = [0.9, 1.5]\n", ["betas", "1.5"]),
        ('[train]\ndtype = "float16"\n', ["train.dtype", "float16", "bfloat16"]),
        (
            "[train]\nactivation_checkpointing = true\n",
            ["activation_checkpointing = True", "'none', 'selective' or 'full'"],
        ),
        ("[train\n", ["not valid TOML", "line 1"]),
    ],
)
def test_bad_recipes_are_told_in_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        Recipe.from_toml(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message, message


def test_missing_folder_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No recipe at"):
        Recipe.from_toml(tmp_path / "none.toml")
    with pytest.raises(UserError, match="is a folder"):
        Recipe.from_toml(tmp_path)
    (tmp_path / "x.toml").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match="not UTF-8 at byte 3"):
        Recipe.from_toml(tmp_path / "x.toml")


def test_a_run_needs_a_length() -> None:
    with pytest.raises(UserError, match=r"train\.steps nor train\.tokens"):
        _ = Recipe().train.total_steps


def test_unknown_model_and_field() -> None:
    with pytest.raises(UserError, match="Did you mean 'samba-tiny'"):
        Recipe.from_dict({"model": {"name": "samba-tinny"}}).model.config(100)
    with pytest.raises(UserError, match="d_modle"):
        Recipe.from_dict({"model": {"overrides": {"d_modle": 3}}}).model.config(100)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[train]\nsteps = 3\n", encoding="utf-8-sig")
    assert Recipe.from_toml(path).train.steps == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("[train]\nsteps = " + "9" * 5000, "is not valid TOML"),
        ('[train]\nout = "a\\u0000"', "names no folder"),
        ('[train]\nout = ""', "names no folder"),
        (f'[train]\nout = "runs/{"a" * 300}"', "longer than 255 bytes"),
    ],
    ids=["deep", "digits", "nul", "empty", "long"],
)
def test_what_no_recipe_holds(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        Recipe.from_toml(path)
    assert "\n" not in str(caught.value)
