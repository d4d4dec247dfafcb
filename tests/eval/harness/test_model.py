"""lm-evaluation-harness's own classes as the peer: our class gives their scores on the same weights."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from samba_lm.checkpoint import create, save
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.convert.transformers import to_transformers
from samba_lm.errors import UserError
from samba_lm.model import SambaLM
from samba_lm.tokenizer import ByteTokenizer

pytest.importorskip("lm_eval", reason="needs lm_eval (pip install 'samba-lm[harness]')")
pytestmark = pytest.mark.filterwarnings("ignore")

LLAMA = (Attention(heads=2), SwiGLU(width=32)) * 2
MAMBA = (Mamba(state=4),) * 2
EXAMPLES = "\n\n".join(f"Question: How much is {i} and {i}?\nAnswer: {2 * i}" for i in range(12))


def make(layers: tuple, vocab_size: int = 257) -> SambaLM:
    config = ModelConfig(
        name="tiny", d_model=32, vocab_size=vocab_size, layers=layers, max_context=2048, tie_embeddings=True
    )
    model = create(config, seed=3)
    with torch.no_grad():
        model.embedding.mul_(8)  # so that a random model prefers something
    return model


def requests(kind: str, arguments: list[tuple]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=i, metadata=("test", i, 1))
        for i, each in enumerate(arguments)
    ]


def pairs() -> list[tuple[str, str]]:
    """With examples before them, alone, with a space at the end, one after another word, and after nothing."""
    draw = random.Random(0)
    words = ["sky", "sea", "tree", "stone", "cat", "dog", "blue", "green", "fish", "bird"]
    found = []
    for i in range(8):
        question = f"Question: {' '.join(draw.choices(words, k=12))}?\nAnswer:"
        context = f"{EXAMPLES}\n\n{question}" if i % 2 else question
        found += [(context, f" {draw.choice(words)}{' é' * (j % 2)}") for j in range(4)]
        found += [(context, f" {letter}") for letter in "ABCD"]
    return [*found, ("The sea is ", "blue"), ("", "A text without a context"), ("x", "y")]


@pytest.mark.slow
@pytest.mark.parametrize("layers", [LLAMA, MAMBA], ids=["llama", "mamba"])
def test_scores_are_those_of_the_harness_on_transformers(layers: tuple, tmp_path: Path, offline: None) -> None:
    pytest.importorskip("accelerate", reason="the harness's class for transformers needs accelerate")
    from lm_eval.models.huggingface import HFLM

    from samba_lm.eval.harness.model import HarnessLM

    model = make(layers)
    to_transformers(model, tmp_path / "theirs", ByteTokenizer())
    theirs = HFLM(pretrained=str(tmp_path / "theirs"), device="cpu", dtype="float32", batch_size=4)
    ours = HarnessLM(model, ByteTokenizer())
    asked = pairs()
    expected = theirs.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    found = ours.loglikelihood(requests("loglikelihood", asked))
    assert [greedy for _, greedy in found] == [bool(greedy) for _, greedy in expected]
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=2e-3)
    # With a limit, texts are cut as the harness cuts them.
    texts = [(f"{EXAMPLES} {EXAMPLES}"[: 700 + 77 * i],) for i in range(3)]
    for limit in (None, 100):
        theirs._max_length = limit or 2048
        ours = HarnessLM(model, ByteTokenizer(), max_length=limit)
        expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
        assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) == pytest.approx(expected, rel=1e-5)
        expected = theirs.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
        found = ours.loglikelihood(requests("loglikelihood", asked))
        assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=2e-3)
    theirs._max_length = 2048
    options = {"until": ["e", "\n\n"], "max_gen_toks": 24, "do_sample": False}
    prompts = [(f"{EXAMPLES}\n\nQuestion: {i}?", options) for i in range(6)]
    expected = theirs.generate_until(requests("generate_until", prompts), disable_tqdm=True)
    assert HarnessLM(model, ByteTokenizer()).generate_until(requests("generate_until", prompts)) == expected


def test_answers_are_written_as_a_task_asks(offline: None) -> None:
    from samba_lm.eval.harness.model import HarnessLM
    from samba_lm.generation.api import generate

    model, tokenizer = make(MAMBA), ByteTokenizer()
    lm = HarnessLM(model, tokenizer, max_gen_toks=9)
    prompts = [(f"{EXAMPLES}\n{i}", {"until": "\n"}) for i in range(5)] + [("", {"max_gen_toks": 4})]
    expected = [generate(model, tokenizer, text, temperature=0.0, max_tokens=9, stop=("\n",)) for text, _ in prompts]
    expected[-1] = generate(model, tokenizer, "", temperature=0.0, max_tokens=4)
    assert lm.generate_until(requests("generate_until", prompts)) == expected
    drawn = {"do_sample": True, "temperature": 5.0, "top_k": 50, "max_gen_toks": 20}
    first, second = lm.generate_until(requests("generate_until", [("The same", drawn)] * 2))
    assert first != second
    assert HarnessLM(model, tokenizer).generate_until(requests("generate_until", [("The same", drawn)])) == [first]


def test_answers_to_every_kind_of_request_are_kept(tmp_path: Path, offline: None) -> None:
    from samba_lm.eval.harness.answers import Answers
    from samba_lm.eval.harness.model import HarnessLM

    def ask(lm: HarnessLM) -> list[Any]:
        return [
            lm.loglikelihood(requests("loglikelihood", pairs())),
            lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("A text",), ("",), ("x" * 99,)])),
            lm.generate_until(requests("generate_until", [("Once", {"max_gen_toks": 5}), ("", {"max_gen_toks": 4})])),
        ]

    expected = ask(HarnessLM(make(MAMBA), ByteTokenizer(), max_length=50))
    lm = HarnessLM(make(MAMBA), ByteTokenizer(), max_length=50)
    with Answers(tmp_path / "a", {}) as lm.answers:
        assert ask(lm) == expected
    with torch.no_grad():
        lm.samba.embedding.fill_(torch.nan)  # which can answer nothing
    with Answers(tmp_path / "a", {}) as lm.answers:
        assert ask(lm) == expected


def test_full_attention_reads_what_it_can_hold() -> None:
    from samba_lm.eval.harness.model import HarnessLM

    model = make(LLAMA)
    lm = HarnessLM(model, ByteTokenizer(), max_length=50)
    (cut,) = lm.loglikelihood(requests("loglikelihood", [("x" * 500, "abc")]))
    (same,) = HarnessLM(model, ByteTokenizer()).loglikelihood(requests("loglikelihood", [("x" * 48, "abc")]))
    assert cut[0] == pytest.approx(same[0])
    with pytest.raises(UserError, match="at most 50"):
        lm.loglikelihood(requests("loglikelihood", [("x", "a" * 60)]))
    with pytest.raises(UserError, match="holds 50"):
        lm.generate_until(requests("generate_until", [("x", {"max_gen_toks": 50})]))
    assert HarnessLM(model, ByteTokenizer()).max_length == 2048
    assert HarnessLM(make(MAMBA), ByteTokenizer()).max_length > 1 << 30


def test_chat_templates(tmp_path: Path) -> None:
    from samba_lm.eval.harness.model import HarnessLM

    folder = tmp_path / "model"
    save(make(MAMBA), folder, ByteTokenizer())
    said = [{"role": "user", "content": "<|endoftext|>?"}]
    with pytest.raises(UserError, match="no chat template"):
        HarnessLM(str(folder), device="cpu").apply_chat_template(said)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}bot:{% endif %}"
        "{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}"
    )
    lm = HarnessLM(str(folder), device="cpu")
    assert lm.tok_encode("a<|endoftext|>")[1:] != [256], "special tokens of a plain text are text"
    text = lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "user: Hi<|endoftext|>bot:"
    assert lm.tok_encode(text) == [*b"user: Hi", 256, *b"bot:"]
    assert lm.chat_template(True) == (folder / "chat_template.jinja").read_text()
    with pytest.raises(UserError, match="refuses these messages: no"):
        lm.apply_chat_template(said * 2)
    bare = HarnessLM(make(MAMBA), ByteTokenizer())
    assert lm.tokenizer_name != bare.tokenizer_name
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match="not valid Jinja"):
        HarnessLM(str(folder), device="cpu")


def test_newer_versions_of_the_harness_find_the_class_by_an_entry_point() -> None:
    from lm_eval.api.registry import get_model

    from samba_lm.eval.harness.model import HarnessLM

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    for name, place in project["entry-points"]["lm_eval.models"].items():
        found = EntryPoint(name, place, "lm_eval.models").load()
        assert found is HarnessLM
        assert found is get_model(name)


def test_mistakes_are_told(tmp_path: Path) -> None:
    from samba_lm.eval.harness.model import HarnessLM

    with pytest.raises(UserError, match="no tokenizer"):
        HarnessLM(make(MAMBA))
    with pytest.raises(UserError, match="expected float32 or bfloat16"):
        HarnessLM("samba-tiny", dtype="float8")
    for option in ("batch_size", "max_length", "chunk"):
        with pytest.raises(UserError, match=f"{option}=-1"):
            HarnessLM(make(MAMBA), ByteTokenizer(), **{option: "-1"})
    with pytest.raises(UserError, match="nothing-there"):
        HarnessLM(str(tmp_path / "nothing-there"))


@pytest.mark.slow
def test_the_harness_s_own_command_knows_the_model(tmp_path: Path, offline: None) -> None:
    """Both ways of docs/evaluation.md: our module in front of the command, and a task file of ours named to it."""
    from samba_lm.eval.harness.tasks import TASKS, write_task

    save(make(MAMBA), tmp_path / "model", ByteTokenizer())
    (tmp_path / "data" / "piqa").mkdir(parents=True)
    rows = [{"goal": f"Count to {i}", "sol1": "one", "sol2": "two", "label": i % 2} for i in range(6)]
    (tmp_path / "data" / "piqa" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_task(TASKS["piqa"], tmp_path / "data", tmp_path / "tasks")
    results = []
    for i, command in enumerate(("samba_lm.eval.harness", "lm_eval")):
        words = ["run", "--model", "samba_lm", "--model_args", f"pretrained={tmp_path / 'model'}"]
        words += ["--tasks", str(tmp_path / "tasks" / "piqa.yaml"), "--batch_size", "auto"]
        words += ["--output_path", str(tmp_path / f"out{i}.json")]
        done = subprocess.run([sys.executable, "-m", command, *words], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = tmp_path.glob(f"out{i}*.json")
        results.append(json.loads(file.read_text())["results"]["piqa"])
    assert results[0] == results[1]
    assert {"acc,none", "acc_norm,none"} <= results[0].keys()
