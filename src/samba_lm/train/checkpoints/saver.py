"""Writing OUT/step-N: each process its own pieces, in the background while training goes on, and then one rename.

No process speaks with another while it writes: which pieces are whose follows from the tensors' layout. Each process
writes its files, forces them to the disk, reads them back and leaves a note (``rank-3.json``) of their sizes and
checksums; the main one waits for all notes, writes what a folder has once, renames it, and only then deletes older
checkpoints. All processes must therefore see the same folder. While a save is open they tell each other after every
step, with one small sum, whether they are done and whether one failed.

Why not torch.distributed.checkpoint's writer, whose format this is: it plans with collectives (asynchronously from a
thread, in a second group), sends pickles for that, and gives no checksum. Its reader reads these folders.
"""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
from pathlib import Path

import torch

from samba_lm import checkpoint
from samba_lm.errors import UserError
from samba_lm.files import TMP_MARK, fsync_path, write_text
from samba_lm.model import SambaLM
from samba_lm.tensor_files import Piece, StoppedError, sha256, write_pieces
from samba_lm.tokenizer import Tokenizer
from samba_lm.train.checkpoints import manifest
from samba_lm.train.checkpoints.folder import prune, step_folder
from samba_lm.train.checkpoints.manifest import FileEntry, Manifest
from samba_lm.train.checkpoints.snapshot import Staging, pieces
from samba_lm.train.checkpoints.state import FILE as TRAINER
from samba_lm.train.checkpoints.state import TrainerState
from samba_lm.train.optim import optimizer_tensors
from samba_lm.train.parallel import Parallel
from samba_lm.train.together import ElsewhereError, together

LOOK_EVERY = 0.02
"""Seconds between two looks for the other processes' notes."""


class Saver:
    """Writes a run's checkpoints, one at a time."""

    def __init__(
        self, out: Path, tokenizer: Tokenizer | None, parallel: Parallel, *, keep: int, keep_every: int, timeout: float
    ) -> None:
        """``timeout``: seconds that the main process waits for the others' files when its own are written."""
        self.out, self.tokenizer, self.parallel = out, tokenizer, parallel
        self.keep, self.keep_every, self.timeout = keep, keep_every, timeout
        self._staging = Staging()
        self._open: _Write | None = None

    @property
    def in_background(self) -> bool:
        """Whether training goes on while files are written: a CPU's single process would gain nothing."""
        return self.parallel.world > 1 or self.parallel.device.type == "cuda"

    def save(self, model: SambaLM, optimizer: torch.optim.Optimizer, state: TrainerState) -> Path | None:
        """Write the run as it stands; returns the folder if it is complete already, else None and :meth:`poll` will.

        ``state.rng`` holds this process's generators alone. An earlier save is waited for. Raises UserError, on all
        processes, when a folder is there already or files cannot be written; checkpoints before are untouched then.
        """
        assert self._open is None, "wait() for the one before"
        folder = step_folder(self.out, state.step)
        write = _Write(self, folder, model, state)
        with together(self.parallel):
            if self.parallel.is_main:
                _make(folder, write.tmp)
        # The model's first: asking for them gives up what an evaluation left gathered.
        kinds = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}
        for kind, tensors in kinds.items():
            write.pieces[kind] = pieces(tensors, self.parallel)
        self._open = write
        if not self.in_background:
            write.run()
            return self.poll()
        joined = {f"{kind} {piece.name}": piece for kind, some in write.pieces.items() for piece in some}
        copies = self._staging.copy(list(joined.values()))
        write.pieces = {kind: [] for kind in kinds}
        for key, copy in zip(joined, copies, strict=True):
            write.pieces[key.partition(" ")[0]].append(copy)
        write.thread = threading.Thread(target=write.run, name=f"save {folder.name}", daemon=True)
        write.thread.start()
        return None

    def poll(self) -> Path | None:
        """Ask all processes how the open save stands: its folder, once, when it is complete; otherwise None.

        To be called by all processes at the same steps. Raises UserError on all when it failed on one of them.
        """
        write = self._open
        if write is None:
            return None
        done, error = write.done, write.error
        counts = torch.tensor([not done, error is not None])
        unfinished, failed = self.parallel.sum(counts).tolist()
        if failed:
            self.abandon()
            if error is not None:
                raise error
            raise ElsewhereError(f"{write.folder} could not be written by another process of this run.")
        if unfinished:
            return None
        if write.thread is not None:
            write.thread.join()  # done but for its last line; a process that ends meanwhile would abort
        self._open = None
        return write.folder

    def wait(self) -> Path | None:
        """:meth:`poll` until the open save, if there is one, is complete."""
        while self._open is not None:
            if (folder := self.poll()) is not None:
                return folder
            time.sleep(LOOK_EVERY)
        return None

    def finish(self) -> None:
        """Without asking the others, who may be gone: let the open save end, or give it up where it cannot."""
        if self._open is not None and self._open.thread is not None:
            self._open.thread.join()
        self._open = None

    def abandon(self) -> None:
        """Stop writing at once; what was written is cleared when the run goes on."""
        if self._open is not None:
            self._open.stop.set()
            if self._open.thread is not None:
                self._open.thread.join()
            self._open = None


class _Write:
    """One checkpoint on its way to the disk."""

    def __init__(self, saver: Saver, folder: Path, model: SambaLM, state: TrainerState) -> None:
        self.saver, self.folder, self.model, self.state = saver, folder, model, state
        self.tmp = folder.with_name(folder.name + TMP_MARK + "save")
        self.pieces: dict[str, list[Piece]] = {}
        self.thread: threading.Thread | None = None
        self.stop = threading.Event()
        self.error: UserError | None = None
        self.done = False

    def run(self) -> None:
        """Write; ends with ``done`` or with ``error``."""
        try:
            files = self._write_own()
            if self.saver.parallel.is_main:
                self._complete(files)
            else:
                self._leave_note(files)
            self.done = True
        except StoppedError:
            self.error = UserError(f"{self.folder} was not written: the run was stopped.")
        except UserError as error:
            self.error = error
        except OSError as error:
            self.error = _not_written(self.folder, error)
            self.error.__cause__ = error
        finally:
            if self.error is None and not self.done:  # a defect, which the thread's hook tells
                self.error = UserError(f"Could not write {self.folder}: see the error above.")
            if self.saver.parallel.is_main:
                shutil.rmtree(self.tmp, ignore_errors=True)  # renamed away, where all went well

    def _write_own(self) -> dict[str, FileEntry]:
        parallel, files = self.saver.parallel, {}
        for kind, some in self.pieces.items():
            name = f"{kind}.safetensors" if parallel.world == 1 else f"{kind}-{parallel.rank:05d}.safetensors"
            if not some:
                continue
            # One key only where a reader may expect safetensors' own bytes: it writes several in any order.
            metadata = checkpoint.weights_metadata(self.model.config) if kind == "model" else None
            sharded = parallel.world > 1
            written = write_pieces(self.tmp / name, some, metadata, sharded=sharded, stopped=self.stop.is_set)
            if sha256(self.tmp / name, from_disk=True, stopped=self.stop.is_set) != written.sha256:
                raise UserError(
                    f"{self.tmp / name} reads back other bytes than were written: check the disk. "
                    "The checkpoints before it are untouched."
                )
            files[name] = FileEntry.of(written)
        return files

    def _leave_note(self, files: dict[str, FileEntry]) -> None:
        note = {"files": {name: entry.model_dump() for name, entry in files.items()}, "rng": self.state.rng}
        path = self.tmp / _note(self.saver.parallel.rank)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(note), encoding="utf-8")
        partial.replace(path)  # the last thing done here: who reads it may rename the folder at once

    def _complete(self, files: dict[str, FileEntry]) -> None:
        checkpoint.write_config(self.model, self.tmp, self.saver.tokenizer)
        rng = dict(self.state.rng)
        deadline = time.monotonic() + self.saver.timeout
        for rank in range(1, self.saver.parallel.world):
            note = self._wait_for_note(rank, deadline)
            files |= {name: FileEntry.model_validate(entry) for name, entry in note["files"].items()}
            rng |= note["rng"]
        state = self.state.model_copy(update={"rng": rng})
        write_text(self.tmp / TRAINER, state.model_dump_json(indent=2) + "\n")
        for path in self.tmp.iterdir():
            if path.name not in files:
                fsync_path(path)
                files[path.name] = FileEntry(size=path.stat().st_size, sha256=sha256(path))
        listed = Manifest(files=dict(sorted(files.items())))
        manifest.check_sizes(self.tmp, listed.files)
        write_text(self.tmp / manifest.FILE, listed.model_dump_json(indent=1) + "\n")
        fsync_path(self.tmp)
        # Not atomic_folder: that would replace a folder of the same name, which a step's never is.
        self.tmp.rename(self.folder)
        fsync_path(self.folder.parent)
        prune(self.saver.out, self.saver.keep, self.saver.keep_every)

    def _wait_for_note(self, rank: int, deadline: float) -> dict[str, dict[str, dict[str, str]]]:
        path = self.tmp / _note(rank)
        while not self.stop.is_set():
            try:
                note: dict[str, dict[str, dict[str, str]]] = json.loads(path.read_bytes())
            except FileNotFoundError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self.folder}: process {rank} has not written its files within {self.saver.timeout:.0f} s; "
                        "train.out must be a folder that all processes share."
                    ) from None
                time.sleep(LOOK_EVERY)
            else:
                path.unlink()
                return note
        raise StoppedError


def _make(folder: Path, tmp: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder} is there already: another run writes to {folder.parent}, or move that folder away.")
    try:
        tmp.mkdir()
    except OSError as error:
        raise _not_written(folder, error) from error


def _not_written(folder: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"The disk is full: could not write {folder}. The checkpoints before it are untouched; free some space and "
            "run the same command again."
        )
    if error.errno == errno.ENOENT:  # the main process made it
        return UserError(
            f"Could not write {folder}, which is not there: all processes must share train.out's file system."
        )
    return UserError(f"Could not write {folder}: {error.strerror}. The checkpoints before it are untouched.")


def _note(rank: int) -> str:
    return f"rank-{rank}.json"
