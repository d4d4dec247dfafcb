"""Recipes whose rows are made: they train, continue bit for bit, and tell what does not fit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import softplus

from samba_lm import checkpoint
from samba_lm.checkpoint import create, save
from samba_lm.cli.main import main
from samba_lm.config import Attention, LayerSpec, Mamba, MegaS6, ModelConfig, SelfExtend
from samba_lm.data.loader import Batch
from samba_lm.data.passkey import FILLER
from samba_lm.errors import UserError
from samba_lm.loss import IGNORE_INDEX
from samba_lm.mixers.base import Mixer
from samba_lm.mixers.mamba import S6, lasting
from samba_lm.model import SambaLM
from samba_lm.nn.init import Init
from samba_lm.span import Span
from samba_lm.tokenizer import ByteTokenizer, train_bpe
from samba_lm.train.data import open_data
from samba_lm.train.metrics import read_metrics
from samba_lm.train.parallel import connect
from samba_lm.train.prepare import make_optimizer, prepare_model
from samba_lm.train.recipe import Recipe, TrainSection
from samba_lm.train.run import train
from samba_lm.train.slow_channels import slow_channels
from samba_lm.train.step import on_device, train_step
from samba_lm.train.stretched import parts, stretched

PASSKEY = {"lengths": [320, 640], "lm_weight": 0.5}
SMALL = ModelConfig(name="tiny", d_model=16, vocab_size=257, layers=(Mamba(state=4), Attention(heads=2, window=16)))


def recipe(out: Path, data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    settings = {"steps": 4, "batch_size": 2, "length": 640, "device": "cpu", "save_every": 1, "keep": 9, **fields}
    data = {"tokenizer": "byte", "passkey": PASSKEY} if data is None else data
    model = model or {"name": "samba-micro", "overrides": {"d_model": 16}}
    return Recipe.from_dict({"model": model, "data": data, "train": {"out": str(out), **settings}})


@pytest.mark.parametrize("micro", [None, 1])
def test_a_run_continues_bit_for_bit_over_a_change_of_length(tmp_path: Path, micro: int | None) -> None:
    whole = train(recipe(tmp_path / "whole", micro_batch=micro))
    for steps in (1, 2, 3):
        told = [True] + [False] * (steps - 1)
        first = train(recipe(tmp_path / f"{steps}", micro_batch=micro), stop=told.pop)
        assert first.steps == steps
        part = train(recipe(tmp_path / f"{steps}", micro_batch=micro))
        assert part.steps == whole.steps == 4
        assert part.tokens == whole.tokens == 4 * 2 * 640
        before, after = (load_file(run.folder / "model.safetensors") for run in (whole, part))
        assert all(torch.equal(before[name], after[name]) for name in before)
    told_lengths = [(each["step"], each["length"]) for each in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert told_lengths == [(1, 320), (4, 640)]
    model, tokenizer = checkpoint.load(whole.folder)
    assert isinstance(tokenizer, ByteTokenizer)
    assert model.config.vocab_size == 320


def test_other_rows_are_refused_and_more_steps_are_not(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(recipe(run, steps=1))
    for change in ({"lengths": [640]}, {"lm_weight": 0.4}, {"apart": 0.5}, {"review": 0.5}, None):
        data = {"tokenizer": "byte", "passkey": PASSKEY | change} if change else {"tokenizer": "byte", "phonebook": {}}
        with pytest.raises(UserError, match=r"was trained with data\.passkey(\.[lar]\w+)? = "):
            train(recipe(run, data))
    assert train(recipe(run, steps=2)).steps == 2


def test_a_changed_filler_is_other_data(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("The sea is salt. The tears are too.")
    data = {"tokenizer": "byte", "passkey": {"filler": str(book)}}
    train(recipe(tmp_path / "run", data, steps=1))
    book.write_text("The sea is sweet.")
    with pytest.raises(UserError, match=r"was trained on data \w+ \(another filler\), but data\.passkey is"):
        train(recipe(tmp_path / "run", data, steps=2))


def test_a_phonebook_fine_tunes_a_checkpoint_with_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_bpe(["Ann Lee: 6123456789\n" * 9], 300)
    save(create(SMALL.with_overrides(vocab_size=320)), tmp_path / "base", tokenizer)
    (tmp_path / "first").write_text("Ann\nBob\nCy\nDora\nEve\n" * 2)
    (tmp_path / "last").write_text("".join(f"Name{chr(65 + i)}\n" for i in range(26)))
    data: dict[str, Any] = {"phonebook": {"names": [str(tmp_path / "first"), str(tmp_path / "last")]}}
    result = train(recipe(tmp_path / "run", data, {"init_from": str(tmp_path / "base")}, steps=1))
    _, kept = checkpoint.load(result.folder)
    assert kept is not None
    assert kept.fingerprint() == tokenizer.fingerprint()
    data["tokenizer"] = "byte"
    with pytest.raises(UserError, match=r"has another tokenizer than data\.phonebook: take"):
        train(recipe(tmp_path / "again", data, {"init_from": str(tmp_path / "base")}, steps=1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"passkey": {}}, "give data.tokenizer"),
        ({"passkey": {}, "tokenizer": "bpe:300"}, "would be trained on text, and there is none"),
        ({"passkey": {}, "tokenizer": "byte", "val": "x"}, "made rows have no validation"),
        ({"passkey": {}, "tokenizer": "byte", "phonebook": {}}, "passkey and phonebook are both given"),
        ({"passkey": {"lengths": [300]}, "tokenizer": "byte"}, "300 does not divide train.length = 640"),
        ({"passkey": {"lengths": [640], "review": 0.5}, "tokenizer": "byte"}, "there is but one: give lengths"),
        ({"passkey": {"lengths": [64]}, "tokenizer": "byte"}, "length 64 is too short"),
        ({"passkey": {"shares": [1]}, "tokenizer": "byte"}, "0 lengths but 1 shares"),
        ({"passkey": {"length": [1]}, "tokenizer": "byte"}, "Did you mean 'lengths'"),
        ({"passkey": {"filler": "none.txt"}, "tokenizer": "byte"}, "There is no file none.txt"),
        ({"phonebook": {"names": ["none.txt"]}, "tokenizer": "byte"}, "There is no file none.txt"),
    ],
)
def test_mistakes(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(recipe(tmp_path / "run", data))


def shards(folder: Path, tokenizer: str = "byte") -> str:
    text = folder / "text.txt"
    text.write_text("The ship was on the sea, and the sea was on the map. " * 200)
    assert main(["data", "prepare", str(text), "--tokenizer", tokenizer, "--out", str(folder / "shards")]) == 0
    return str(folder / "shards")


def test_made_rows_take_turns_with_text_and_the_run_continues_bit_for_bit(tmp_path: Path) -> None:
    data: dict[str, Any] = {"train": shards(tmp_path), "passkey": {"lengths": [320, 640], "share": 0.5}}
    data["val"] = data["train"]
    mixed = recipe(tmp_path / "whole", data)
    loader = open_data(mixed).loader
    made = [bool((loader.batch(step).targets == IGNORE_INDEX).any()) for step in range(4)]
    assert made == [False, True, False, True]
    assert [tuple(loader.batch(step).input_ids.shape) for step in (1, 3)] == [(4, 320), (2, 640)]
    whole = train(mixed)
    train(recipe(tmp_path / "part", data), stop=[True].pop)
    part = train(recipe(tmp_path / "part", data))
    before, after = (load_file(run.folder / "model.safetensors") for run in (whole, part))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert whole.val_loss == part.val_loss
    with pytest.raises(UserError, match=r"A share of 0\.2 of 4 steps is none: raise data\.passkey\.share"):
        train(recipe(tmp_path / "rare", data | {"passkey": {"share": 0.2}}))
    (tmp_path / "other").mkdir()
    train_bpe(["sea and ship"] * 9, 300).save(tmp_path / "other")
    with pytest.raises(UserError, match=r"is not what data\.train = .* was made with: leave it out"):
        train(recipe(tmp_path / "wrong", data | {"tokenizer": str(tmp_path / "other")}))


def test_slow_channels_begin_slow_and_the_others_as_always(tmp_path: Path) -> None:
    model = create("samba-micro", seed=1)
    before = [p.clone() for p in model.parameters()]
    slow_channels(model, 0.25, seed=3)
    changed = [name for (name, p), q in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, q)]
    assert [name.rpartition(".")[2] for name in changed] == ["dt_bias"]
    steps = torch.nn.functional.softplus(dict(model.named_parameters())[changed[0]].detach().double())
    assert ((steps[-32:] > 0.99e-6) & (steps[-32:] < 1.01e-3)).all()
    assert steps[:-32].min() > 0.99e-3
    assert (steps[-32:].log10().std() - 3 / 12**0.5).abs() < 0.2
    section = {"name": "samba-micro", "overrides": {"d_model": 16}, "slow_channels": 0.5}
    made, _ = checkpoint.load(train(recipe(tmp_path, None, section, steps=1, lr=1e-9)).folder)
    biases = next(p for name, p in made.named_parameters() if name.endswith("dt_bias"))
    assert (torch.nn.functional.softplus(biases) < 1.1e-3).sum() >= 16


def test_how_a_model_began_cannot_be_changed_later(tmp_path: Path) -> None:
    data, section = {"tokenizer": "byte", "passkey": PASSKEY}, {"name": "samba-micro", "overrides": {"d_model": 16}}
    train(recipe(tmp_path, data, section, steps=1))
    with pytest.raises(UserError, match=r"trained with model\.slow_channels = 0\.0, not 0\.5"):
        train(recipe(tmp_path, data, section | {"slow_channels": 0.5}, steps=2))
    for key, value in (("slow_channels", 0.5), ("overrides", {"norm_eps": 1.0})):
        with pytest.raises(UserError, match=f"{key} is of new models, and init_from = 'x' brings one"):
            recipe(tmp_path, data, {"init_from": "x", key: value})


def read(layer: S6, told: list[torch.Tensor], times: list[float]) -> torch.Tensor:
    """The scan's state after inputs [E], each to be read as if it came so many times."""
    rows = torch.stack(told)[None]
    span = replace(Span.of(1, len(told), rows.device, None, None), times=torch.tensor([times]))
    _, tensors = layer(rows, None, layer.init_tensors(1, rows.device, rows.dtype), span)
    return tensors["ssm"]


def test_tokens_that_stand_for_many_leave_the_state_that_many_leave() -> None:
    """A key, then 40 tokens of filler that last 6 times as long, and 240 of them; a fast channel among slow ones."""
    torch.manual_seed(0)
    layer = S6(inner=8, rank=2, state=4, conv=4).double()
    layer.reset_parameters(Init(SMALL, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        layer.selection.dt_bias.copy_(torch.tensor([-9.0, -9, -8, -8, -7, -7, 0, 1]))  # steps of 1e-4 to 1e-3; 0.7, 1.3
    key, filler = torch.randn(2, 8).double()
    first, ones = [key, key, filler, filler, filler], [1.0] * 5
    long = read(layer, first + [filler] * 240, ones + [1.0] * 240)
    short = read(layer, first + [filler] * 40, ones + [1.0] * 40)
    stretched_ = read(layer, first + [filler] * 40, ones + [6.0] * 40)
    for slow in range(6):
        assert (stretched_ - long)[0, slow].norm() < 0.02 * long[0, slow].norm()
        assert (short - long)[0, slow].norm() > 0.5 * long[0, slow].norm()
    torch.testing.assert_close(stretched_[0, 6:], long[0, 6:])  # they have forgotten all that was 40 tokens ago


def test_no_step_becomes_longer_than_a_tenth_or_shorter() -> None:
    delta = torch.linspace(-12, 4, 200).double()[None, :, None].requires_grad_()
    bias = torch.tensor([0.5, -1.0]).double()
    before, once = (softplus(each + bias) for each in (delta, lasting(delta, bias, torch.ones(1, 200).double())))
    torch.testing.assert_close(once, before, rtol=1e-12, atol=0)
    times = torch.full((1, 200), 50.0).double()
    after = softplus(lasting(delta, bias, times) + bias)
    assert (after >= before * (1 - 1e-12)).all()
    assert (after <= torch.maximum(before, torch.tensor(0.1).double()) * (1 + 1e-12)).all()
    small = before < 1e-3
    torch.testing.assert_close(after[small], 50 * before[small], rtol=0.03, atol=0)
    after.sum().backward()
    assert delta.grad is not None
    assert delta.grad.isfinite().all()
    assert lasting(delta.detach().bfloat16(), bias.float(), times.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("kept", ["none", "selective", "full"])
def test_a_stretched_step_counts_forward_and_backward_and_no_longer(kept: str) -> None:
    """Whatever is made again for backward; each micro-batch with its own rows' numbers."""
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    times = torch.ones(2, 24)
    times[0, 3:20], times[1, 8:] = 30.0, 7.0
    found = []
    for make in (kept, "none"):
        model = create(SMALL, seed=0).double()
        settings = TrainSection(steps=1, batch_size=2, micro_batch=1, length=24, activation_checkpointing=make)
        prepare_model(model, settings, connect("cpu"))
        model.train()
        batch = Batch(ids, ids.roll(-1, 1), None, times)
        train_step(model, make_optimizer(model, settings), batch, settings, connect("cpu"), step=1)
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


def test_attention_sees_of_a_stretched_row_what_it_would_of_the_long_one() -> None:
    """A run that stands for more tokens than windows reach one after another is one that they do not look across."""
    times = torch.ones(3, 24)
    times[0, 4:14] = 3.0  # 30 tokens, no more than two windows of 16 reach: 15 + 15
    times[1, 4:14], times[1, 18:22] = 4.0, 8.0  # 40, and 32
    times[2, :] = 100.0
    numbers = parts(times, 30)
    assert numbers[0].unique().tolist() == [0]
    assert numbers[1].tolist() == [0] * 11 + [1] * 10 + [2] * 3  # the 8th token of 4 makes 32, the 4th of 8 does
    assert numbers[2].tolist() == [1] * 24
    near, far, states = Attention(heads=2, window=16), Attention(heads=2), Mamba(state=4)
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    for layers, expected in (((near, states, near), numbers), ((near, states, far), None), ((states,), None)):
        config = ModelConfig(name="two", d_model=16, vocab_size=257, layers=layers)
        model = create(config, seed=0).double()
        batch = stretched(Batch(ids, ids, None, times), model)
        assert (batch.apart is None) if expected is None else torch.equal(batch.apart, expected)
        assert stretched(Batch(ids, ids, None), model).apart is None
        given = stretched(Batch(ids, ids, None, times, ids % 2), model).apart  # the loader's own parts besides
        assert given is not None
        assert torch.equal(given, ids % 2 if expected is None else expected + ids % 2)
    # Attention alone does not learn of times; what is in another part it cannot tell.
    model = create(ModelConfig(name="two", d_model=16, vocab_size=257, layers=(near, near)), seed=0).double()
    assert stretched(Batch(ids, ids, None, times, ids % 2), model).apart is None  # it has nothing else
    told = model.hidden_states(ids, times=times, apart=numbers)
    other = torch.where(numbers == numbers[:, -1:], ids, 7)
    torch.testing.assert_close(model.hidden_states(other, times=times, apart=numbers)[1, 21:], told[1, 21:])
    assert not torch.allclose(model.hidden_states(other, times=times)[1, 21:], told[1, 21:])


@pytest.mark.parametrize(
    "mixer",
    [
        Attention(heads=2, window=16),
        Attention(heads=2),
        SelfExtend(heads=2, group=3, neighbor_window=7),
        MegaS6(z_dim=4, chunk=12, state=4),
    ],
)
def test_every_attention_keeps_to_the_parts(mixer: LayerSpec) -> None:
    """What stands in another part changes nothing; Mega's states go on all the same, so of it: the parts matter."""
    model = create(ModelConfig(name="one", d_model=16, vocab_size=257, layers=(mixer,)), seed=0).double()
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    other, apart = ids.clone(), (torch.arange(40)[None] >= 15).long()
    other[:, :10] = 7
    told, again = (model.hidden_states(each, apart=apart)[:, 15:] for each in (ids, other))
    if isinstance(mixer, MegaS6):
        assert not torch.allclose(told, model.hidden_states(ids)[:, 15:])
        assert stretched(Batch(ids, ids, None, torch.full((1, 40), 2.0)), model).apart is not None
    else:
        torch.testing.assert_close(again, told, rtol=0, atol=1e-12)


def test_a_mixer_that_says_nothing_of_itself_has_states() -> None:
    class Own(Mixer):
        pass

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = Own()

    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert stretched(Batch(ids, ids, None, None, ids), cast("SambaLM", Model())).apart is ids


def test_padding_in_the_midst_of_stretched_rows_is_as_padding_at_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model = create(SMALL, seed=0).double()
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    segments, times = torch.zeros(1, 40, dtype=torch.int64), torch.ones(1, 40)
    times[:, 5:30] = 9.0
    hole = torch.arange(40)[None].remainder(4) == 2
    order = hole.to(torch.int8).argsort(dim=1, stable=True)
    segments = torch.where(hole, -1, segments)
    apart = parts(times, 15)
    assert apart.max() == 1
    spans: list[Span] = []
    run = SambaLM.run

    def spied(self: SambaLM, ids: torch.Tensor, state: None, span: Span) -> Any:
        spans.append(span)
        return run(self, ids, state, span)

    monkeypatch.setattr(SambaLM, "run", spied)
    whole = model.hidden_states(ids, segments, times=times, apart=apart)
    seen = spans[0].seen
    assert seen is not None
    assert (seen.diff() >= 0).all()  # which kernels count on
    packed = model.hidden_states(
        *(t.gather(1, order) for t in (ids, segments)), None, None, *(t.gather(1, order) for t in (times, apart))
    )
    torch.testing.assert_close(whole[~hole], packed[:, : int((~hole).sum())][0])


def test_the_stretch_of_a_step_is_drawn_from_the_seed_and_the_step(tmp_path: Path) -> None:
    data = {"tokenizer": "byte", "passkey": PASSKEY | {"stretch": 64.0}}
    loader = open_data(recipe(tmp_path, data)).loader
    drawn = []
    for step in range(4):
        batch, second = loader.batch(step), loader.batch(step, rank=1, world=2)
        assert batch.stretch is not None
        assert second.stretch is not None
        assert torch.equal(second.stretch, batch.stretch[len(batch.stretch) // 2 :])
        drawn.append(batch.stretch.max().item())
        for ids, times in zip(batch.input_ids, batch.stretch, strict=True):
            filler = ByteTokenizer().decode(ids[times == drawn[-1]].tolist())
            rest = ByteTokenizer().decode(ids[times == 1].tolist())
            assert re.fullmatch(rf"(?:(?:{'|'.join(map(re.escape, FILLER))})[ \n]?)*", filler)
            assert re.fullmatch(
                r"There is an important.*\nThe pass key is.*key\.\nWhat is the.*\d{5}\n?", rest, re.DOTALL
            )
    assert len(set(drawn)) == 4
    assert all(1 <= each <= 64 for each in drawn)
    plain = open_data(recipe(tmp_path)).loader
    assert plain.batch(0).stretch is None
    assert torch.equal(plain.batch(1).input_ids, loader.batch(1).input_ids)
    whole = train(recipe(tmp_path / "whole", data))
    train(recipe(tmp_path / "part", data), stop=[True].pop)
    part = train(recipe(tmp_path / "part", data))
    before, after = (load_file(run.folder / "model.safetensors") for run in (whole, part))
    assert all(torch.equal(before[name], after[name]) for name in before)
    unstretched = load_file(train(recipe(tmp_path / "plain")).folder / "model.safetensors")
    assert not all(torch.equal(before[name], unstretched[name]) for name in before)
    with pytest.raises(UserError, match="stretch"):
        recipe(tmp_path, {"tokenizer": "byte", "passkey": {"stretch": 0.5}})
    with pytest.raises(UserError, match="stretch"):  # a phonebook has no filler
        recipe(tmp_path, {"tokenizer": "byte", "phonebook": {"stretch": 2.0}})


def test_what_the_model_looks_at_without_waiting_stays_where_it_is() -> None:
    """All numbers of tokens go to the device but the segments, which a GPU would be waited for."""
    ids = torch.zeros(1, 4, dtype=torch.int64)
    moved = on_device(Batch(ids, ids, ids, ids.float(), ids), torch.device("meta"))
    assert moved.segments is ids
    there = (moved.input_ids, moved.targets, moved.stretch, moved.apart)
    assert all(t is not None and t.device.type == "meta" for t in there)
