"""A study's file: what is refused, and how it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from samba_lm.errors import UserError
from samba_lm.study.study import FILE, StudyData, check_recipes, read_study

SHIPPED = Path(__file__).parents[2] / "recipes" / "paper-small"


def test_the_shipped_study_is_whole() -> None:
    study, recipes = read_study(SHIPPED)
    check_recipes(study, recipes)
    sizes = {}
    for run in study.runs:
        config = recipes[run.name].model.config(8192)
        assert config.vocab_size == 8192
        sizes[run.name] = config.parameters()
        assert recipes[run.name].train.tokens_per_step * recipes[run.name].train.total_steps > 1e6
    # What is compared has the same size, within 2%; Table 6 takes heads away, as the paper does.
    apart = {run.name: sizes[run.name] / sizes["samba"] - 1 for run in study.runs if run.groups != ("Table 6",)}
    assert max(map(abs, apart.values())) < 0.02, apart
    shared = {recipe.train.model_copy(update={"out": "x"}).model_dump_json() for recipe in recipes.values()}
    assert len(shared) == 1
    assert study.sweep is not None
    assert len(study.sweep.lrs) >= 3
    assert {path.stem for path in SHIPPED.glob("*.toml")} - {"base", "study"} == set(recipes)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("lrs = [1e-3, 4e-3]", "lrs = [1e-3]", ["sweep.lrs", "at least 2"]),
        ('lr_from = "samba"', 'lr_from = "smba"', ["mamba", "lr_from = 'smba'", "Did you mean 'samba'"]),
        ('lr_from = "samba"', 'lr_from = "mamba"', ["lr_from = 'mamba'", "no learning rate of its own"]),
        ('lr_from = "samba"', 'lr_from = "samba"\nlr = 1.0', ["both given"]),
        ('name = "llama"', 'name = "samba"', ["two of the runs", "'samba'"]),
        ('name = "llama"', 'name = "../x"', ["runs[1].name", "'../x'", "letters"]),
        ('reference = "samba"', 'reference = "sambo"', ["reference", "Did you mean 'samba'"]),
        ("lengths = [32, 64, 128]", "lengths = [1]", ["evaluations[0]", "at least one, each of 2"]),
        ("lengths = [32, 64, 128]", 'protocol = "prefixx"\nlengths = [32]', ["protocol", "prefixx"]),
        ("max_length_growing = 64", 'protocol = "last-stride"\nmax_length_growing = 64', ["max_length_growing"]),
        ("max_length_growing = 64", 'apart = ["a"]', ["evaluations[0]", "apart", "use prefix or stream"]),
        ("max_length_growing = 64", 'protocol = "stream"\ndocuments = "every"\napart = ["a"]', ['documents = "same"']),
        ('columns = ["size", "4K"]', 'columns = ["size"]', ["'samba'", "2 figures for 1 columns"]),
        ('group = "Table 3"', 'group = "Table 4"', ["no run is of group 'Table 4'", "Did you mean 'Table 3'"]),
        ('evaluation = "windows"', 'evaluation = "window"', ["Did you mean 'windows'"]),
        ("lr = 4e-3", "lr = -1", ["runs[1].lr", "greater than 0"]),
        ('recipe = "llama.toml"', 'recipe = "gone.toml"', ["No recipe at", "gone.toml"]),
        ("[sweep]", "[swep]", ["swep", "Did you mean 'sweep'"]),
    ],
)
def test_mistakes_are_told_in_one_line(study: Path, old: str, new: str, words: list[str]) -> None:
    path = study / FILE
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_study(study)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_a_folder_without_a_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no study\.toml"):
        read_study(tmp_path)
    with pytest.raises(UserError, match="No study at"):
        read_study(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    ("names", "max_tokens", "said"), [(4, None, ""), (3, None, "4 document"), (1, 300, "2 document")]
)
def test_each_document_measured_has_a_name(study: Path, names: int, max_tokens: int | None, said: str) -> None:
    """Of fewer names, documents would be left out of all tables; of more, tables would be empty."""
    path = study / FILE
    more = f'protocol = "prefix"\napart = {["x"] * names}\n' + (f"max_tokens = {max_tokens}" if max_tokens else "")
    path.write_text(path.read_text(encoding="utf-8").replace("max_length_growing = 64", more), encoding="utf-8")
    read, recipes = read_study(study)
    if not said:
        StudyData().check(read, recipes, {"samba"})
        return
    with pytest.raises(UserError, match=f"apart has {names} name.*{said}"):
        StudyData().check(read, recipes, {"samba"})


def test_missing_data_and_another_tokenizer_are_told_before_anything_runs(study: Path, tmp_path: Path) -> None:
    from samba_lm.data.shards import ShardWriter
    from samba_lm.tokenizer import train_bpe

    read, recipes = read_study(study)
    StudyData().check(read, recipes, {"samba"})
    other = tmp_path / "bpe"
    other.mkdir()
    tokenizer = train_bpe(["one two three " * 50], 300)
    with ShardWriter(other, tokenizer) as writer:
        writer.append(tokenizer.encode("one two three"), end=True, text_bytes=13)
        writer.close()
    for folder, words in ((tmp_path / "gone", "Evaluation windows.*samba-lm data prepare"), (other, "tokenizer")):
        text = (study / FILE).read_text(encoding="utf-8")
        data = read.evaluations[0].data
        (study / FILE).write_text(text.replace(data, str(folder)), encoding="utf-8")
        changed, _ = read_study(study)
        with pytest.raises(UserError, match=words):
            StudyData().check(changed, recipes, {"samba"})
        (study / FILE).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "word"), [("[data.passkey]", "data.passkey"), ("[model]\ninit_from = 'x'", "init_from")]
)
def test_what_a_study_does_not_train(study: Path, line: str, word: str) -> None:
    base = (study / "base.toml").read_text(encoding="utf-8")
    if "model" in line:
        text = "\n".join(each for each in base.replace("[model]", line).splitlines() if "overrides" not in each)
    else:
        text = "\n".join(each for each in base.splitlines() if not each.startswith("val")) + f"\n{line}\n"
    (study / "base.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"Run samba: its recipe has .*{word}.*samba-lm train"):
        check_recipes(*read_study(study))


def test_a_sweep_needs_a_validation_set(study: Path) -> None:
    base = (study / "base.toml").read_text(encoding="utf-8")
    (study / "base.toml").write_text("\n".join(line for line in base.splitlines() if not line.startswith("val")))
    with pytest.raises(UserError, match=r"Run samba: .*data\.val"):
        check_recipes(*read_study(study))
