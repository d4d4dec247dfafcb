"""Whole models: the mixer contract end to end, decoding in place, precision, and inputs that are refused."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

import samba_lm
from samba_lm import zoo
from samba_lm.config import (
    Attention,
    GatedLinearAttention,
    GatedParallel,
    Mamba,
    MegaS6,
    ModelConfig,
    Parallel,
    Retention,
    SelfExtend,
    SwiGLU,
)
from samba_lm.errors import UserError
from samba_lm.model import SambaLM
from samba_lm.state import State

MLP = SwiGLU(width=24)
STACKS = {
    "samba": (Mamba(), MLP, Attention(heads=4, kv_heads=2, window=7), MLP) * 2,
    "samba-sc": (Mamba(), MLP, Attention(heads=4, window=7, short_conv=4), MLP),
    "mamba-swa-mlp": (Mamba(), Attention(heads=4, window=7), MLP),
    "mamba": (Mamba(),) * 3,
    "llama": (Attention(heads=4), MLP) * 2,
    "mistral": (Attention(heads=4, kv_heads=1, window=7), MLP) * 2,
    "sliding-gla": (GatedLinearAttention(heads=2), MLP, Attention(heads=4, window=7), MLP),
    "sliding-retnet": (Retention(heads=2), MLP, Attention(heads=4, window=7), MLP),
    "mega-s6": (MegaS6(z_dim=8, chunk=9), MLP),
    "mlp2-swa-mlp": (SwiGLU(width=64), MLP, Attention(heads=4, window=7), MLP),
    "self-extend": (SelfExtend(heads=4, group=3, neighbor_window=8), MLP),
    "parallel": (Parallel(attention=Attention(heads=4, window=7)), MLP) * 2,
    "gated": (GatedParallel(attention=Attention(heads=4, kv_heads=2, window=7, short_conv=4)), MLP) * 2,
}


def make(name: str, dtype: torch.dtype = torch.float64) -> SambaLM:
    config = ModelConfig(name=name, d_model=32, vocab_size=50, layers=STACKS[name])
    model = SambaLM(config)
    model.reset_parameters(seed=1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    if dtype == torch.bfloat16:  # the way it is trained: fp32 parameters, bf16 compute
        model.compute_dtype = dtype
        return model
    return model.to(dtype)


def gradients(model: SambaLM, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad((logits.double() * weight).sum(), list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def read(
    model: SambaLM, ids: torch.Tensor, cuts: list[int], segments: torch.Tensor | None
) -> tuple[torch.Tensor, State]:
    state, outs, start = None, [], 0
    for stop in (*cuts, ids.shape[1]):
        part = None if segments is None else segments[:, start:stop]
        logits, state = model(ids[:, start:stop], state, part)
        outs.append(logits)
        start = stop
    assert state is not None
    return torch.cat(outs, dim=1), state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STACKS)
def test_full_is_chunked_is_stepwise_and_packed_is_apart(name: str, dtype: torch.dtype) -> None:
    model = make(name, dtype)
    # Gradients of deep bf16 models carry the rounding of every layer, in another order each way.
    scale = 8.0 if dtype == torch.bfloat16 else 10.0
    ids = torch.randint(0, 50, (2, 31))
    for segments in (None, torch.tensor([[0] * 5 + [1] * 20 + [4] * 6, [-1] * 3 + [2] * 9 + [-1] * 2 + [3] * 17])):
        valid = torch.ones(2, 31, dtype=torch.bool) if segments is None else segments >= 0
        expected, state = read(model, ids, [], segments)
        expected = expected * valid[..., None]
        expected_grads = gradients(model, expected)
        for cuts in ([2, 9, 24], list(range(1, 31))):
            logits, other = read(model, ids, cuts, segments)
            logits = logits * valid[..., None]
            assert_close(logits, expected, f"logits, {len(cuts)} cuts", dtype, scale)
            for key, grad in gradients(model, logits).items():
                assert_close(grad, expected_grads[key], f"gradient of {key}", dtype, scale)
            assert torch.equal(other.position, state.position)
        if segments is not None:
            for row in range(2):
                for document in segments[row].unique()[segments[row].unique() >= 0]:
                    where = segments[row] == document
                    alone, _ = model(ids[row : row + 1, where])
                    assert_close(expected[row, where], alone[0], f"document {document} of row {row}", dtype, scale)


@pytest.mark.parametrize("name", STACKS)
def test_step_in_place_equals_forward(name: str) -> None:
    model = make(name)
    ids = torch.randint(0, 50, (3, 25))
    expected, _ = model(ids)
    _, state = model(ids[:, :4])
    fork = state.fork()
    for t in range(4, 25):
        assert_close(model.step(ids[:, t], state), expected[:, t].detach(), f"position {t}")
    again, _ = model(ids[:, 4:], fork)  # the fork did not move
    assert_close(again.detach(), expected[:, 4:].detach(), "fork")


def test_step_follows_the_weights_after_training() -> None:
    """Whatever decoding may keep between tokens must not outlive an optimizer step."""
    model = make("mamba", torch.float32)
    ids = torch.randint(0, 50, (1, 9))
    model.step(ids[:, 0], model.init_state(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model(ids)[0].square().sum().backward()
    optimizer.step()
    state = model.init_state(1)
    for t in range(9):
        logits = model.step(ids[:, t], state)
    assert_close(logits, model(ids)[0][:, -1].detach(), "step after training", scale=10)


@pytest.mark.parametrize("name", [name for name in STACKS if name not in ("llama", "self-extend")])
def test_a_state_keeps_nothing_else_alive(name: str) -> None:
    """Not even as the memory behind a view: what it holds is what nbytes says."""
    model = make(name)
    with torch.no_grad():
        _, state = model(torch.randint(0, 50, (1, 500)))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for s in state.layers for t in s.values()}
    assert sum(storages.values()) <= state.nbytes()


def test_bad_tokens_to_step_are_named() -> None:
    model = make("samba")
    with pytest.raises(UserError, match="token id 50 is outside"):
        model.step(torch.tensor([50]), model.init_state(1))
    with pytest.raises(UserError, match="holds 1 sequences but input_ids has 2 rows"):
        model.step(torch.tensor([1, 2]), model.init_state(1))


def test_state_rows_of_different_lengths_decode_together() -> None:
    model = make("samba")
    a, b = torch.randint(0, 50, (1, 19)), torch.randint(0, 50, (1, 3))
    ids, segments = torch.zeros(2, 19, dtype=torch.int64), torch.full((2, 19), -1)
    ids[0], ids[1, 16:], segments[0], segments[1, 16:] = a, b, 0, 0
    _, state = model(ids, None, segments)
    token = torch.tensor([7, 9])
    logits = model.step(token, state)
    for row, prompt in ((0, a), (1, b)):
        alone, _ = model(torch.cat((prompt, token[row].view(1, 1)), 1))
        assert_close(logits[row], alone[0, -1].detach(), f"row {row}")
    assert state.position.tolist() == [20, 4]


def test_select_repeats_and_reorders_rows() -> None:
    model = make("samba")
    ids = torch.randint(0, 50, (2, 11))
    _, state = model(ids)
    picked = state.select([1, 0, 1])
    logits = model.step(torch.tensor([3, 3, 3]), picked)
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[1])
    assert state.batch == 2


def test_bf16_compute_keeps_fp32_where_it_matters() -> None:
    model = make("samba", torch.bfloat16)
    logits, state = model(torch.randint(0, 50, (1, 9)))
    assert logits.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert state.layers[0]["ssm"].dtype == torch.float32
    assert state.layers[2]["k"].dtype == torch.bfloat16
    logits.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_ten_million_tokens_in() -> None:
    """Where a sequence stands does not change what its window computes: same logits at position 0 and 10 million."""
    config = ModelConfig(name="t", d_model=32, vocab_size=50, layers=(Attention(heads=2, window=8), MLP) * 2)
    model = SambaLM(config)
    model.reset_parameters(0)
    ids = torch.randint(0, 50, (1, 40))
    near, _ = model(ids)
    _, state = model(ids[:, :16])
    state.cursor.position.fill_(10_000_016)
    far, _ = model(ids[:, 16:], state)
    # The keys rotated for the old positions leave the window of each of the two layers after 7 tokens.
    assert_close(far[:, 14:].detach(), near[:, 30:].detach(), "logits", torch.float32, scale=10)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[3, 50]]), "token id 50 is outside the vocabulary of 50"),
        (torch.tensor([[-1, 2]]), "token id -1 is outside"),
        (torch.zeros(1, 0, dtype=torch.int64), r"int64 \[batch >= 1, length >= 1\]"),
        (torch.zeros(0, 3, dtype=torch.int64), r"int64 \[batch >= 1, length >= 1\]"),
        (torch.zeros(4, dtype=torch.int64), r"int64 \[batch >= 1, length >= 1\]"),
        (torch.zeros(1, 2), "not torch.float32"),
    ],
)
def test_bad_input_is_named(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("samba")(ids)


def test_a_state_of_another_batch_is_refused() -> None:
    model = make("mamba")
    with pytest.raises(UserError, match="holds 3 sequences but input_ids has 1 rows"):
        model(torch.zeros(1, 2, dtype=torch.int64), model.init_state(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "layers is empty"),
        ({"layers": [{"kind": "mambo"}]}, r"layers\[0\] has unknown kind 'mambo'. Did you mean 'mamba'"),
        ({"layers": [{"kind": "attention", "heads": 5}]}, "heads=5 does not divide d_model=32"),
        ({"layers": [{"kind": "attention", "heads": 4, "kv_heads": 3}]}, "kv_heads=3 does not divide heads=4"),
        ({"layers": [{"kind": "attention", "heads": 4, "window": 0}]}, "window=0 must be at least 1"),
        ({"layers": [{"kind": "attention", "heads": 4, "windw": 9}]}, "Did you mean 'window'"),
        ({"layers": [{"kind": "attention", "heads": 32}]}, "even head dim"),
        ({"layers": [{"kind": "mamba", "dt_rank": 0}]}, "dt_rank=0 must be at least 1"),
        (
            {"layers": [{"kind": "parallel", "attention": {"heads": 5}}]},
            "attention: heads=5 does not divide d_model=32",
        ),
        ({"layers": [{"kind": "parallel", "attention": {"heads": 4, "windw": 9}}]}, "windw = 9.*mean 'window'"),
        ({"layers": [{"kind": "gated", "attention": {"heads": 4}, "mamba": {"state": 0}}]}, "mamba: state=0 must be"),
        ({"layers": [{"kind": "gated", "attention": {"heads": 4}, "gate_rank": 0}]}, "gate_rank=0 must be at least 1"),
        ({"layers": [{"kind": "gated", "mamba": {}}]}, "attention is missing"),
        ({"layers": [{"kind": "attention", "heads": 4, "rope_base": -1}]}, "rope_base=-1.0 must be above 0"),
        ({"norm_eps": 0}, "norm_eps=0.0 must be above 0"),
        ({"layers": 5}, "layers must be a list"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"vocab_size": 2**62}, "more than any machine holds"),
        ({"layers": [{"kind": "gla", "heads": 2, "expand_k": 1e-30}]}, "heads=2 does not divide the key width 0"),
        ({"layers": [{"kind": "self_extend", "heads": 4, "group": 10**30}]}, "more than any model can use"),
        ({"d_model": 0}, "d_model=0 must be at least 1"),
        ({"d_modl": 32}, "Did you mean 'd_model'"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_a_bad_config_is_one_clear_line(change: dict[str, object], message: str) -> None:
    good = {"name": "t", "d_model": 32, "vocab_size": 50, "layers": [{"kind": "mamba"}]}
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig.from_dict({**good, **change})
    assert "\n" not in str(caught.value)


def test_config_survives_json() -> None:
    for name in zoo.names():
        config = zoo.get(name)
        assert ModelConfig.from_dict(config.to_dict()) == config


def test_public_names() -> None:
    model = samba_lm.create("samba-micro", seed=3)
    logits, state = model(torch.tensor([[1, 2, 3]]))
    assert logits.shape == (1, 3, 320)
    assert state.batch == 1


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("packed", [False, True])
def test_hidden_states_are_the_features(name: str, packed: bool) -> None:
    model = make(name)
    ids = torch.randint(0, 50, (2, 40))
    segments = torch.tensor([[0] * 15 + [1] * 25, [-1] * 4 + [0] * 36]) if packed else None
    assert torch.equal(model.hidden_states(ids, segments), model.features(ids, None, segments)[0])


@pytest.mark.parametrize("name", ["samba-tiny", "mamba-tiny", "llama-tiny"])
def test_a_model_computes_under_autocast(name: str) -> None:
    model, ids = samba_lm.create(name), torch.randint(0, 256, (2, 40))
    expected, _ = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, state = model(ids)
        logits.float().square().mean().backward()
        with torch.no_grad():
            model(ids[:, :1], state)
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
