"""The command line: one file per command, and the only room that parses arguments.

Each command's module exposes ``main(argv: list[str]) -> None``, where ``argv`` is what follows the command's first
word: ``samba-lm train R.toml`` calls ``train.main(["R.toml"])``, and ``samba-lm data show DIR`` calls
``data.main(["show", "DIR"])``. A command parses with :func:`samba_lm.cli.parse.parse`, tells mistakes by raising
:class:`samba_lm.errors.UserError`, and writes ``--json`` files with :func:`samba_lm.cli.output.write_json`.
"""
