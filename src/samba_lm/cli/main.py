"""The ``samba-lm`` command: a static table of commands, and the one place where errors become messages.

Only what stands here and in ``errors.py`` is imported for ``--help`` and ``--version``; a command's module, and with it
torch, is imported when that command is run.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import NamedTuple

from samba_lm import __version__
from samba_lm.errors import UserError, did_you_mean, one_line


class Command(NamedTuple):
    """A row of the table: the words typed, one line of help, and the module whose ``main(argv)`` runs it."""

    name: str
    help: str
    module: str


COMMANDS = (
    Command("models", "list the architectures, or draw one: models NAME", "samba_lm.cli.models"),
    Command("data prepare", "turn text files into token shards", "samba_lm.cli.data"),
    Command("data show", "count the tokens of shards and decode an excerpt", "samba_lm.cli.data"),
    Command("data chat", "look at conversations as they are learnt, or prepare them", "samba_lm.cli.data_chat"),
    Command("data verify", "check shards for damage", "samba_lm.cli.data"),
    Command("train", "train a model from a recipe, or resume", "samba_lm.cli.train"),
    Command("estimate", "memory and time of a training run, before it begins", "samba_lm.cli.estimate"),
    Command("export", "one model's folder from a run, also while it goes on", "samba_lm.cli.export"),
    Command("study", "train and measure many recipes unattended, and make tables", "samba_lm.cli.study"),
    Command("lora merge", "add an adapter, ours or peft's, to its model", "samba_lm.cli.lora"),
    Command("generate", "continue a prompt of any length", "samba_lm.cli.generate"),
    Command("context save", "read a text of any length into a file to go on from", "samba_lm.cli.context"),
    Command("context show", "tell what contexts' files hold, and check them", "samba_lm.cli.context"),
    Command("ask", "ask about a context or a text", "samba_lm.cli.ask"),
    Command("chat", "talk with a checkpoint, its state kept between turns", "samba_lm.cli.chat"),
    Command("serve", "answer OpenAI's clients over HTTP", "samba_lm.cli.serve"),
    Command("eval perplexity", "measure perplexity against context length", "samba_lm.cli.eval_perplexity"),
    Command("eval passkey", "measure what is found again in long texts: a key", "samba_lm.cli.eval_recall"),
    Command("eval phonebook", "measure what is found again: a phonebook's numbers", "samba_lm.cli.eval_recall"),
    Command("eval harness", "measure tasks of lm-evaluation-harness", "samba_lm.cli.eval_harness"),
    Command("eval entropy", "measure how widely attention and Mamba look, by block", "samba_lm.cli.eval_entropy"),
    Command("eval summarize", "score summaries of long texts by ROUGE", "samba_lm.cli.eval_summarize"),
    Command("report", "one HTML page that compares the models of a folder's results", "samba_lm.cli.report"),
    Command("convert from-official", "read a checkpoint of the paper's reference code", "samba_lm.cli.convert"),
    Command("convert from-transformers", "read a transformers Llama, Mistral or Mamba", "samba_lm.cli.convert"),
    Command("convert to-transformers", "write a transformers Llama, Mistral or Mamba", "samba_lm.cli.convert"),
    Command("demo", "a minute with the model that comes along, or four trained here", "samba_lm.cli.demo"),
    Command("bench", "time the operations and whole models", "samba_lm.cli.bench"),
)

_ABOUT = "Train, evaluate and run Samba hybrid language models (arXiv 2406.07522)."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (by default this process's) and return its exit code.

    0: done. 1: a defect of samba-lm (with a traceback). 2: something to correct, told in one line on stderr; with
    ``SAMBA_LM_TRACEBACK=1`` the traceback comes before it. 130: interrupted. 141: the reader of our output went away.
    """
    _prepare_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _one_shows_help(words):
            _dispatch(words)
        sys.stdout.flush()  # a closed pipe must show here, not after the handlers are gone
        return 0
    except KeyboardInterrupt:
        print("samba-lm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # what rich makes of it, with an exit code of its own
            return 141
        raise
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = for_people(error)
        if message is None:
            raise
        if os.environ.get("SAMBA_LM_TRACEBACK", "") not in ("", "0"):
            import traceback

            traceback.print_exc()
        if _is_to_tell(error, message):
            print(f"samba-lm: error: {one_line(message)}", file=sys.stderr)
        if isinstance(error, OSError) and error.filename is None:
            _drop_stdout()  # it may be what could not be written
        return 2


def _one_shows_help(argv: list[str]) -> contextlib.AbstractContextManager[object]:
    """Of processes that torchrun started only the first shows the help that was asked of all."""
    first = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
    if first or not {"-h", "--help"} & set(argv):
        return contextlib.nullcontext()
    return contextlib.redirect_stdout(io.StringIO())


def _is_to_tell(error: BaseException, message: str) -> bool:
    """Whether no other of the processes that torchrun started, if it did, has told the same."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from samba_lm.train.parallel import first_to_tell

    topic = None
    if isinstance(error, UserError):
        topic = error.topic
        time.sleep(error.patience)
    return first_to_tell(topic or message)


def _prepare_streams() -> None:
    """Make stdout and stderr safe to write to: where they are closed, and where their encoding lacks a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_stdout() -> None:
    """Send what is left for stdout nowhere: the interpreter flushes it once more on its way out."""
    if sys.__stdout__ is not None and sys.stdout is sys.__stdout__:  # a caller's own stream is the caller's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help(COMMANDS, "samba-lm COMMAND [OPTIONS]"))
        return
    if argv[0] in ("-V", "--version"):
        print(f"samba-lm {__version__}")
        return
    word = argv[0]
    rows = [row for row in COMMANDS if row.name.split()[0] == word]
    if not rows:
        known = {row.name.split()[0] for row in COMMANDS}
        kind = "option" if word.startswith("-") else "command"
        near = did_you_mean(word, known | {"--help", "--version"} if kind == "option" else known)
        raise UserError(f"Unknown {kind} {word!r}.{near} See `samba-lm --help`.")
    parts = [row.name.partition(" ")[2] for row in rows]
    if parts != [""]:
        if len(argv) == 1 or argv[1] in ("-h", "--help"):
            print(_help(rows, f"samba-lm {word} COMMAND [OPTIONS]"))
            return
        if argv[1] not in parts:
            near = did_you_mean(argv[1], parts)
            raise UserError(f"Unknown command '{word} {argv[1]}'.{near} See `samba-lm {word} --help`.")
    if os.environ.get("SAMBA_LM_PLUGINS"):
        from samba_lm.plugins import load_plugins

        load_plugins()
    row = rows[0] if parts == [""] else rows[parts.index(argv[1])]
    importlib.import_module(row.module).main(argv[1:])


def _help(rows: Sequence[Command], usage: str) -> str:
    """The commands' table, folded to the terminal's width."""
    width = max(30, shutil.get_terminal_size().columns)
    indent = max(len(row.name) for row in rows) + 4
    # On a narrow terminal the help stands under the name, not beside it.
    beside = width >= indent + 30
    lines = [
        *textwrap.wrap(f"usage: {usage}", width, subsequent_indent="  "),
        "",
        *textwrap.wrap(_ABOUT, width),
        "",
        "commands:",
    ]
    for row in rows:
        if beside:
            filled = textwrap.fill(row.help, width, initial_indent=" " * indent, subsequent_indent=" " * indent)
            lines.append(f"  {row.name}".ljust(indent) + filled[indent:])
        else:
            lines += [f"  {row.name}", *textwrap.wrap(row.help, width, initial_indent="    ", subsequent_indent="    ")]
    closing = "`samba-lm COMMAND --help` explains a command's options; `samba-lm --version` prints the version."
    return "\n".join([*lines, "", *textwrap.wrap(closing, width)])


def for_people(error: BaseException) -> str | None:
    """Return the message for an error that the user can mend, or None for a defect of ours."""
    if isinstance(error, UserError):
        return str(error)
    from samba_lm.memory import ran_out

    if ran_out(error):
        # PyTorch's: what was asked for and how much is free; its advice that follows is about its own settings.
        told = one_line(str(error)).partition(" Including")[0].rstrip(".")[:240]
        return (
            f"Out of memory ({told or 'no details'}). Lower the batch size, the sequence length or the prefill chunk, "
            "or choose a smaller model. `samba-lm estimate RECIPE` tells what training takes, and what would fit."
        )
    if isinstance(error, OSError):
        # Of a rename, the second name is the one that was asked for; the first may be a temporary file of ours.
        path = error.filename if error.filename2 is None else error.filename2
        where = "" if path is None else f" {_shortened(path)}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"The disk is full: could not write{where}. Free some space and run the same command again."
        if isinstance(error, FileNotFoundError) and where:
            return f"No such file or folder:{where}. Check the path."
        if isinstance(error, PermissionError) and where:
            return f"No permission for{where}. Choose a path you may use, or change its permissions."
        if where:
            return f"{error.strerror}:{where}. Give another path."
    return None


def _shortened(path: object, limit: int = 120) -> str:
    text = os.fsdecode(path) if isinstance(path, bytes) else str(path)
    return text if len(text) <= limit else text[:limit] + "..."
