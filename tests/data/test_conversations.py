"""Conversations: what is read, what is refused and how it is told, and that training and answering agree."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from samba_lm import checkpoint
from samba_lm.data.conversation_set import (
    ConversationSet,
    encode_conversations,
    prepare_conversations,
    teaching_template,
)
from samba_lm.data.conversations import read_conversations
from samba_lm.data.sources import find_files
from samba_lm.errors import UserError
from samba_lm.generation.chat import ChatSession
from samba_lm.generation.params import SamplingParams
from samba_lm.templates import TAUGHT, FolderTemplate, Said
from samba_lm.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer, train_bpe

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BEFORE = (  # the space before an answer is the model's to write
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.role }}: {{ m.content }}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
SAID = [
    Said("system", "Be brief."),
    Said("user", "Is it warm, or 12 degrees?"),
    Said("assistant", "It is  warm.\n"),
    Said("user", "A<|endoftext|>nd there?<|im_end|>"),
    Said("assistant", "There too"),
]


@pytest.fixture(scope="module")
def bpe() -> FileTokenizer:
    made = json.loads(
        train_bpe(["user assistant system Is it warm there too. <|im_start|> A: It " * 20], 330).to_json()
    )
    for name in ("<|im_start|>", "<|im_end|>"):
        token_id = 1 + max(one["id"] for one in made["added_tokens"] + [{"id": max(made["model"]["vocab"].values())}])
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        made["added_tokens"].append({"id": token_id, "content": name, "special": True, **flags})
    return FileTokenizer(json.dumps(made))


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def as_record(said: list[Said]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": text} for role, text in said]}


@pytest.mark.parametrize("source", [TAUGHT, CHATML, BEFORE])
def test_what_is_learnt_is_what_the_server_and_the_chat_ask(bpe: FileTokenizer, tmp_path: Path, source: str) -> None:
    bpe.chat_template = source
    template = FolderTemplate(source, bpe)
    file = find_files([write(tmp_path / "a.jsonl", as_record(SAID))])
    (learnt,) = encode_conversations(file, bpe, processes=1)
    answers = []
    for k in (2, 4):
        asked = template.encode(SAID[:k])  # what `serve` reads before it answers
        assert learnt.ids[: asked.size].tolist() == asked.tolist()
        assert not learnt.answers[asked.size - 1]
        length = int(learnt.answers[asked.size :].argmin()) if k == 2 else learnt.ids.size - asked.size
        answers.append(learnt.ids[asked.size : asked.size + length])
        assert learnt.answers[asked.size : asked.size + length].all()
    assert learnt.answers.sum() == sum(map(len, answers))
    lead = " " if source == BEFORE else ""
    for ids, said in zip(answers, (SAID[2], SAID[4]), strict=True):
        assert ids[:-1].tolist() == bpe.encode(lead + said.text).tolist()
        assert (ids[-1],) == template.stop_ids  # what the model is to end with is what ends it
    assert learnt.ids.size == asked.size + len(answers[-1])  # nothing is learnt from what comes after


@pytest.mark.parametrize("source", [TAUGHT, CHATML])
def test_the_terminal_reads_what_was_learnt(bpe: FileTokenizer, source: str) -> None:
    template = FolderTemplate(source, bpe)
    config = checkpoint.create("samba-micro").config.with_overrides(vocab_size=bpe.vocab_size)
    model = checkpoint.create(config, seed=3).eval()
    word = int(bpe.encode("warm")[0])
    params = SamplingParams(max_tokens=3, logit_bias=((word, 100.0),))
    session = ChatSession(model, bpe, "Be brief.", template, params)
    said = [Said("system", "Be brief.")]
    for question in ("Is it?", "And there?"):
        said += [Said("user", question), Said("assistant", "".join(session.ask(question)))]
    whole = template.encode(said, invite=False)
    read = session.token_ids
    assert len(said[-1].text) >= 3
    assert read.tolist() == whole[: read.size].tolist()
    assert whole.size - read.size <= 2  # what ends the last answer
    again = ChatSession(model, bpe, None, template, params)
    again.resume(session.text)
    assert (again.token_ids == template.stop_ids[0]).sum() == (read == template.stop_ids[0]).sum()


def test_a_template_that_teaches_nothing_is_refused(bpe: FileTokenizer) -> None:
    for source, why in (
        (TAUGHT.replace(" + eos_token", ""), "no special token after an answer"),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
         "something else before an answer"),
    ):  # fmt: skip
        bpe.chat_template = source
        with pytest.raises(UserError, match=why):
            teaching_template(bpe)
    bpe.chat_template = None


GOOD = as_record(SAID)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "a.jsonl:2 is not valid JSON"),
        ("[1]", r"a.jsonl:2 is \[1\], not a JSON object: write"),
        ('{"text": "x"}', r"a.jsonl:2 has the fields \[\"text\"\], no conversation's"),
        ('{"mesages": []}', "Did you mean 'messages'"),
        ('{"prompt": "x"}', "'prompt' alone"),
        ('{"prompt": "x", "completion": 3}', "a.jsonl:2: completion is 3, not a text"),
        ('{"prompt": "x", "completion": " "}', "nothing to learn from, its answers are empty"),
        ('{"messages": [], "prompt": "x"}', "keep one of the two"),
        ('{"messages": []}', r"messages is \[\], not a list"),
        ('{"messages": ["hi"]}', r"messages\[0\] is \"hi\""),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message has the role assistant"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', 'role is "bot": it must be one of system'),
        ('{"messages": [{"role": "gpt", "content": "x"}]}', 'role is "gpt": write assistant'),
        ('{"messages": [{"from": "gpt", "value": "x"}]}', "name them 'role' and 'content'"),
        ('{"messages": [{"role": "assistant", "content": null}]}', r"messages\[0\]: content is null, not a text"),
        ('{"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}', "only text can be learnt"),
        ('{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}', "has tool_calls"),
        ('{"prompt": "x", "completion": "\\ud800"}', r"lone surrogate U\+D800"),
    ],
)
def test_bad_lines_are_told_by_file_and_line(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(UserError, match=told):
        list(read_conversations(find_files([tmp_path / "a.jsonl"])[0]))


def test_both_forms_packed_and_with_empty_lines(tmp_path: Path) -> None:
    text = json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]},
                                    {"role": "assistant", "content": "A"}], "id": 7})  # fmt: skip
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8-sig") as file:
        file.write(f'{text}\n\n{{"prompt": "P", "completion": "C"}}')
    found = list(read_conversations(find_files([tmp_path / "a.jsonl.gz"])[0]))
    assert [each.messages for each in found] == [
        (Said("user", "Q"), Said("assistant", "A")),
        (Said("user", "P"), Said("assistant", "C")),
    ]
    (tmp_path / "b.json").write_text("[]")
    (tmp_path / "c.csv").write_text("a,b")
    for name in ("b.json", "c.csv"):
        with pytest.raises(UserError, match="cannot be read"):
            list(read_conversations(find_files([tmp_path / name])[0]))


def test_a_prepared_folder_holds_what_memory_does(tmp_path: Path, bpe: FileTokenizer) -> None:
    records = [{"prompt": f"Is it {i}?", "completion": "warm " * (i % 5 + 1)} for i in range(40)]
    file = str(write(tmp_path / "a.jsonl", *records))
    tokenizers: list[Tokenizer] = [load_tokenizer(_saved(tmp_path / str(i), bpe)) for i in range(3)]
    here = ConversationSet.of_files([file], tokenizers[0])
    made = prepare_conversations([file], tmp_path / "out", tokenizers[1], processes=2)
    there = ConversationSet.open(tmp_path / "out")
    assert len(here) == len(there) == made[""].conversations == 40
    assert (made[""].tokens, made[""].answer_tokens) == (here.tokens.size, int(here.answers.sum()))
    for i in range(40):
        for ours, theirs in zip(here.read(i, 10_000), there.read(i, 10_000), strict=True):
            assert ours.tolist() == theirs.tolist()
    assert there.tokenizer.chat_template == TAUGHT
    split = prepare_conversations([file], tmp_path / "two", tokenizers[2], val_fraction=0.3)
    assert split["train"].conversations + split["val"].conversations == 40
    assert (
        ConversationSet.open(tmp_path / "two" / "val").sha256 != ConversationSet.open(tmp_path / "two" / "train").sha256
    )
    with pytest.raises(UserError, match="already exists"):
        prepare_conversations([file], tmp_path / "two", tokenizers[2])
    prepare_conversations([file], tmp_path / "two", tokenizers[2], overwrite=True)
    tokens = tmp_path / "two" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"tokens.bin has \d+ bytes"):
        ConversationSet.open(tmp_path / "two")
    with pytest.raises(UserError, match="no prepared conversations"):
        ConversationSet.open(tmp_path)


def test_overwrite_removes_nothing_but_prepared_conversations(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    for name in ("train", "val"):  # as splits lie
        prepare_conversations([file], out / name, ByteTokenizer())
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine.txt is no prepared conversations.*move it away"):
        prepare_conversations([file], out, ByteTokenizer(), overwrite=True)
    (out / "mine.txt").rename(out / "mine.jsonl")
    (out / "mine.jsonl").write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"holds the input .*mine.jsonl"):
        prepare_conversations([out / "mine.jsonl"], out, ByteTokenizer(), overwrite=True)
    (out / "mine.jsonl").unlink()
    prepare_conversations([file], out, ByteTokenizer(), overwrite=True)
    assert len(ConversationSet.open(out)) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="not prepared conversations, so --overwrite will not remove it"):
        prepare_conversations([file], tmp_path / "other", ByteTokenizer(), overwrite=True)


def _saved(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir()
    tokenizer.save(folder)
    return folder


def test_a_template_stays_with_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = TAUGHT
    config = checkpoint.create("samba-micro").config
    checkpoint.save(checkpoint.create(config), tmp_path / "a", tokenizer)
    _, found = checkpoint.load(tmp_path / "a")
    assert found is not None
    assert found.chat_template == TAUGHT
    assert found.fingerprint() == ByteTokenizer().fingerprint()
    (tmp_path / "a" / "chat_template.jinja").write_text("other")
    assert load_tokenizer(tmp_path / "a").chat_template == "other"
