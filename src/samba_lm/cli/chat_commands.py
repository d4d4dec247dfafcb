"""What can be typed besides messages: /save, /fork, /stats and the others, and their completion by Tab."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from samba_lm.cli.chat_room import Conversation, Room
from samba_lm.config import Attention, ModelConfig
from samba_lm.contexts.file import FORMAT
from samba_lm.contexts.info import title_of
from samba_lm.errors import UserError, did_you_mean, one_line
from samba_lm.files import write_text
from samba_lm.generation.params import SamplingParams
from samba_lm.train.progress import count


class Command(NamedTuple):
    """A row of the table."""

    argument: str
    help: str
    run: Callable[[Room, str], None]


SETTINGS = {
    field.name: getattr(SamplingParams(), field.name)
    for field in dataclasses.fields(SamplingParams)
    if field.name not in ("stop_ids", "logit_bias")
}
"""What /set changes, with the value that it has by itself."""
_NONE = {"top_k": "all", "max_tokens": "unlimited", "stop": "none"}
_SWITCH = {"on": True, "off": False, "true": True, "false": False}
_COMMAND = re.compile(r"(/[a-z?]*)(?:\s(.*))?", re.DOTALL)


def is_command(text: str) -> bool:
    """Whether a line asks for something; a path with several slashes is a message."""
    return _COMMAND.fullmatch(text) is not None


def run_command(text: str, room: Room) -> None:
    """Do what a line asks for. Raises UserError for what is no command, or not as it should be."""
    match = _COMMAND.fullmatch(text)
    assert match is not None, text
    word, argument = match[1], (match[2] or "").strip()
    if word not in COMMANDS:
        raise UserError(
            f"{word} is not a command.{did_you_mean(word, COMMANDS)} A message may begin with / after a space."
        )
    command = COMMANDS[word]
    if "\0" in argument:
        raise UserError(f"{word} was given a zero byte: leave it out.")
    if argument and not command.argument:
        raise UserError(f"{word} takes nothing after it, and was given {argument[:40]!r}.")
    if not argument and command.argument and not command.argument.startswith("["):
        raise UserError(f"{word} needs a {_WORDS[command.argument]}")
    command.run(room, argument)


_WORDS = {"FILE": "file: such as talk.txt, or talk.ctx for the state.", "NAME": "name: /forks lists them."}


def _help(room: Room, argument: str) -> None:
    room.view.table([(f"{word} {row.argument}".rstrip(), row.help) for word, row in COMMANDS.items()])
    room.view.table(
        [
            ("\\", "at the end of a line: the message goes on in the next"),
            ("```", "alone in a line begins and ends a message of several lines"),
            ("Alt-Enter", "a line break in the line"),
        ]
    )


def _quit(room: Room, argument: str) -> None:
    room.left = True


def _reset(room: Room, argument: str) -> None:
    room.session.reset()
    room.view.note("the conversation is forgotten")


def _retry(room: Room, argument: str) -> None:
    """Try in a copy, so that a try that fails leaves the old answer."""
    before = room.current
    trial = before.session.fork()
    message = trial.undo()
    trial.params = trial.params.replace(seed=(trial.params.seed + 1) % 2**64)  # the same seed gives the same answer
    room.conversations[room.name] = Conversation(trial, before.context)
    kept = False
    try:
        kept = room.answer(lambda on_progress: trial.ask(message, on_progress))
    finally:
        if not kept:
            room.conversations[room.name] = before
    if trial.params.temperature == 0:
        room.view.note("at temperature 0 an answer is always the same: /set temperature 1")


def _undo(room: Room, argument: str) -> None:
    message = one_line(room.session.undo())
    room.view.note(f"taken back: {message if len(message) <= 60 else message[:57] + '...'}")


def _fork(room: Room, argument: str) -> None:
    name = room.check_name(argument) if argument else room.free_name("fork")
    before = room.name
    room.conversations[name] = Conversation(room.session.fork(), room.current.context)
    room.name = name
    room.view.note(f"this is {name!r}, a copy: /switch {before} goes back")


def _switch(room: Room, argument: str) -> None:
    room.switch(argument)
    room.view.note(f"this is {argument!r}: {_position(room.current)}")


def _forks(room: Room, argument: str) -> None:
    room.view.table(
        [
            (f"{'*' if name == room.name else ' '} {name}", _position(conversation))
            for name, conversation in room.conversations.items()
        ]
    )


def _drop(room: Room, argument: str) -> None:
    room.find(argument)
    if argument == room.name:
        raise UserError(f"{argument!r} is where you are: /switch to another first, or /reset.")
    del room.conversations[argument]
    room.view.note(f"{argument!r} is forgotten")


def _position(conversation: Conversation) -> str:
    session = conversation.session
    turns = f"{session.turns} turn{'' if session.turns == 1 else 's'}"
    return f"{turns}, {session.reader.lengths[0]:,} tokens, {_bytes(session.reader.state.nbytes())}"


def _save(room: Room, argument: str) -> None:
    path = _path(argument)
    if path.suffix != ".ctx":
        if path.is_dir():
            raise UserError(f"{path} is a folder: give a file in it, such as {path / 'talk.txt'}.")
        if path.exists() and _is_context(path):
            raise UserError(f"{path} is a context, which a text would replace: give another name.")
        write_text(path, room.session.text)
        room.view.note(f"written to {path}")
        return
    from samba_lm.contexts.snapshot import Snapshot, save
    from samba_lm.contexts.token_hash import TokenHash

    session, context = room.session, room.current.context
    read = (TokenHash() if context is None else context.read).add(session.token_ids)
    title = title_of(path) if context is None or not context.title else f"{title_of(path)[:90]} ({context.title[:90]})"
    save(path, Snapshot.of(session.standing(), read, title), room.model, room.tokenizer)
    room.view.note(f"the state after {read.tokens:,} tokens is in {path} ({_bytes(path.stat().st_size)})")


def _load(room: Room, argument: str) -> None:
    path = _path(argument)
    _check_file(path)
    if _is_context(path):
        from samba_lm.contexts.snapshot import load

        snapshot = load(path, room.model, room.tokenizer)
        session = room.session.begin(snapshot.reader(), None)
        where = room.enter(Conversation(session, snapshot), path.stem)
        room.view.note(f"it goes on after {snapshot.tokens:,} tokens of {snapshot.title!r}; no words are in it{where}")
        return
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} cannot be read; convert the file first.") from None
    session = room.session.fork()
    context = room.current.context
    with room.reading(0 if context is None else context.tokens) as on_progress:
        session.resume(text, on_progress)
    where = room.enter(Conversation(session, context), path.stem)
    after = "" if context is None else f" after {context.tokens:,} tokens of {context.title!r}"
    room.view.note(f"read {session.token_ids.size:,} tokens of {path}{after}{where}")


def _context(room: Room, argument: str) -> None:
    context = room.current.context
    if not argument:
        told = "no context: /context FILE" if context is None else f"{context.tokens:,} tokens of {context.title!r}"
        room.view.note(told)
        return
    path = _path(argument)
    _check_file(path)
    if _is_context(path):
        from samba_lm.contexts.snapshot import load

        snapshot = load(path, room.model, room.tokenizer)
    else:
        from samba_lm.contexts.reading import read_file

        with path.open("rb") as file, room.reading() as on_progress:
            snapshot = read_file(room.model, room.tokenizer, file, title_of(path), on_progress=on_progress)
    session = room.session.begin(snapshot.reader(), room.session.system)
    where = room.enter(Conversation(session, snapshot), path.stem)
    room.view.note(f"about {snapshot.tokens:,} tokens of {snapshot.title!r}{where}")


def _system(room: Room, argument: str) -> None:
    session = room.session
    if not argument:
        room.view.note("no system text" if session.system is None else f"system: {session.system}")
        return
    session.system = None if argument == '""' else argument
    if session.system is None:
        room.view.note("no system text from now on")
    else:
        room.view.note(f"it will stand before the {'next' if session.turns else 'first'} message")


def _set(room: Room, argument: str) -> None:
    params = room.session.params
    words = re.split(r"\s*=\s*|\s+", argument, maxsplit=1)
    name, value = words[0], words[1] if len(words) > 1 else ""
    if not argument:
        room.view.table([(name, _shown(name, params)) for name in SETTINGS])
        return
    if name not in SETTINGS:
        raise UserError(f"{name[:40]!r} is no setting.{did_you_mean(name, SETTINGS)}")
    if value:
        room.session.params = params = params.replace(**{name: _value(name, value)})
    room.view.note(f"{name} = {_shown(name, params)}")


def _shown(name: str, params: SamplingParams) -> str:
    value = getattr(params, name)
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(map(repr, value)) or _NONE[name]
    return _NONE[name] if value is None else str(value)


def _value(name: str, text: str) -> object:
    """A setting's value from what was typed. Raises UserError for what is of another kind."""
    if name == "stop":
        return () if text == _NONE[name] else (text.replace(r"\n", "\n"),)
    if name in _NONE and text == _NONE[name]:
        return None
    kind = "number"
    default = SETTINGS[name]
    try:
        if isinstance(default, bool):
            kind = "switch, on or off"
            return _SWITCH[text.lower()]
        if isinstance(default, float):
            return float(text)
        kind = "whole number" + (f", or {_NONE[name]}" if name in _NONE else "")
        return int(text)
    except (KeyError, ValueError):
        raise UserError(f"{name} = {text[:40]!r} is no {kind}.") from None


def _stats(room: Room, argument: str) -> None:
    session, context = room.session, room.current.context
    config, timing = room.model.config, session.timing
    tokens = session.reader.lengths[0]
    limit = "however much is read" if config.constant_state else f"it grows, up to {config.max_context:,} tokens"
    size = room.model.dtype.itemsize
    rows = [
        ("conversation", f"{room.name}: {session.turns} turn{'' if session.turns == 1 else 's'}"),
        ("tokens read", f"{tokens:,}"),
        ("of the context", "0" if context is None else f"{context.tokens:,} ({context.title})"),
        ("state", f"{_bytes(session.reader.state.nbytes())}, {limit}"),
    ]
    if config.n_mixers and config.constant_state:
        rows.append(("full attention", f"{_bytes(full_attention_bytes(config, tokens, size))} in a model of this size"))
    if timing.prompt_tokens:
        rows += [
            ("last message", f"{timing.prompt_tokens:,} tokens, {_speed(timing.prompt_tokens, timing.read_seconds)}"),
            (
                "last answer",
                f"{timing.new_tokens:,} tokens, {_speed(timing.new_tokens - 1, timing.decode_seconds)}",
            ),
        ]
    others = len(room.conversations) - 1
    if others:
        held = sum(each.session.reader.state.nbytes() for each in room.conversations.values())
        rows.append(("all forks", f"{others + 1} conversations, {_bytes(held)} of states"))
    room.view.table(rows)


def full_attention_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
    """What keys and values of ``tokens`` tokens take if every token mixer were full attention.

    With as many key/value heads as the model's own attention has, or the model's width where it has none.
    """
    parts = [part for spec in config.layers for part in spec.parts()]
    widths = [part.groups * part.head_dim(config.d_model) for part in parts if isinstance(part, Attention)]
    return 2 * tokens * config.n_mixers * (widths or [config.d_model])[0] * itemsize


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.1f} tokens/s" if tokens > 0 and seconds > 0 else "too few to time"


def _bytes(number: int) -> str:
    return count(number, "KMGT") + "B"


def _path(argument: str) -> Path:
    try:
        return Path(argument).expanduser()
    except RuntimeError:
        raise UserError(f"{argument[:60]} names a home that is not known here: write the path out.") from None


def _check_file(path: Path) -> None:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}: give a text, or a context's file (.ctx).")


def _is_context(path: Path) -> bool:
    if path.suffix == ".ctx":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return f'"format":"{FORMAT}"'.encode() in file.read(256)


COMMANDS = {
    "/help": Command("", "this list", _help),
    "/retry": Command("", "another answer to the last message", _retry),
    "/undo": Command("", "take the last message and its answer back", _undo),
    "/reset": Command("", "forget the conversation", _reset),
    "/save": Command("FILE", "write the conversation to a file; to a .ctx, its state", _save),
    "/load": Command("FILE", "go on with a saved conversation: a text, read again, or a .ctx, at once", _load),
    "/context": Command("[FILE]", "talk about a .ctx, or about a text, read now", _context),
    "/fork": Command("[NAME]", "go on in a copy; this one stays as it is", _fork),
    "/switch": Command("NAME", "go on in another conversation", _switch),
    "/forks": Command("", "list the conversations", _forks),
    "/drop": Command("NAME", "forget another conversation", _drop),
    "/system": Command("[TEXT]", 'what stands before the first (or next) message; "" for nothing', _system),
    "/set": Command("[NAME VALUE]", "how answers are drawn, such as: /set temperature 0.7", _set),
    "/stats": Command("", "tokens, state, speed", _stats),
    "/quit": Command("", "leave, as Ctrl-D does", _quit),
}


def complete(line: str, room: Room) -> list[str]:
    """The lines that a line's beginning may become by Tab: commands, their files, names and settings."""
    word, space, argument = line.partition(" ")
    if not word.startswith("/"):
        return []
    if not space:
        return [name + (" " if row.argument else "") for name, row in COMMANDS.items() if name.startswith(word)]
    command = COMMANDS.get(word)
    if command is None or not command.argument:
        return []
    before = f"{word} "
    if "FILE" in command.argument:
        return [before + each for each in _paths(argument)]
    if word == "/set":
        return [f"{before}{name} " for name in SETTINGS if name.startswith(argument)]
    if command.argument == "NAME":
        return [before + name for name in room.conversations if name.startswith(argument)]
    return []


def _paths(begun: str) -> list[str]:
    """What files and folders a path may become; hidden ones only where a dot was typed."""
    folder, name = os.path.split(begun)
    found = []
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            for entry in entries:
                if entry.name.startswith(name) and (name.startswith(".") or not entry.name.startswith(".")):
                    found.append(os.path.join(folder, entry.name) + ("/" if entry.is_dir() else ""))
    except (OSError, ValueError):
        return []
    return sorted(found)
