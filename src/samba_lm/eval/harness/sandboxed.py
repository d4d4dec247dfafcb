"""What runs in the process of an untrusted program: it shuts the doors it can, then runs the program in its folder.

Started by ``sandbox.py`` as ``python -I -S -c <this text>``, so it imports nothing but the standard library. On the
standard input come a word to be written back once the program has come to its end (nothing else counts as success), the
seconds it may take, and the bytes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import runpy
import struct
import sys

PROGRAM = "program.py"
NEW_USER, NEW_NET, NEW_IPC = 0x10000000, 0x40000000, 0x08000000
LANDLOCK_CREATE, LANDLOCK_RESTRICT = 444, 446  # the same number on all machines
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2
# Of files: write, remove folders and files, and make any kind; 13 (move between folders) and 14 (truncate) came later.
WRITES = (1, 4, 5, 6, 7, 8, 9, 10, 11, 12)
# System calls that are refused, by machine: to make processes (clone, clone3, fork, vfork, execve, execveat), sockets
# (socket, socketpair), to touch other processes (kill, tkill, pidfd_send_signal, ptrace, process_vm_writev), to change
# modes and owners of files (chmod, fchmod, fchmodat, fchmodat2, chown, fchown, lchown, fchownat), and mounts (mount,
# umount2, unshare, setns). tgkill stays: a program may end itself.
REFUSED = {
    "x86_64": (0xC000003E, (
        56, 435, 57, 58, 59, 322, 41, 53, 62, 200, 424, 101, 311, 90, 91, 268, 452, 92, 93, 94, 260, 165, 166, 272, 308,
    )),
    "aarch64": (0xC00000B7, (
        220, 435, 221, 281, 198, 199, 129, 130, 424, 117, 271, 52, 53, 452, 54, 55, 40, 39, 97, 268,
    )),
}  # fmt: skip


def limit(seconds: int, memory: int) -> None:
    """Limits that a process sets itself: of processor time, memory, sizes of files, open files and processes."""
    for name, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),  # none more than there are; the administrator is exempt, see `refuse`
    ):
        try:
            resource.setrlimit(name, (most, most))
        except (OSError, ValueError):  # macOS knows no limit of memory
            continue


def leave_network(libc: ctypes.CDLL) -> None:
    """Go into a network without anything in it, as a user without rights outside it, where Linux allows that."""
    if libc.unshare(NEW_USER | NEW_NET | NEW_IPC) != 0:
        libc.unshare(NEW_NET | NEW_IPC)  # of the administrator, where users may not


def write_nothing(libc: ctypes.CDLL) -> None:
    """Linux' Landlock: from now on no file is made, written or removed anywhere."""
    version = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    bits = sum(1 << bit for bit in WRITES) | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    rules = libc.syscall(LANDLOCK_CREATE, struct.pack("<Q", bits), ctypes.c_size_t(8), 0)
    libc.syscall(LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def refuse(libc: ctypes.CDLL) -> None:
    """A filter of system calls: see :data:`REFUSED`. A refused one fails as if it were not permitted."""
    machine, calls = REFUSED.get(platform.machine(), (0, ()))
    if not calls:
        return

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("<HBBI", code, yes, no, value)

    load, equal, more, give = 0x20, 0x15, 0x35, 0x06
    denied, killed, allowed = 0x00050001, 0x80000000, 0x7FFF0000
    steps = [
        step(load, 4), step(equal, machine, 1, 0), step(give, killed),  # another machine's calls have other numbers
        step(load, 0), step(more, 0x40000000, 0, 1), step(give, killed),
    ]  # fmt: skip
    for call in calls:
        steps += [step(equal, call, 0, 1), step(give, denied)]
    code = ctypes.create_string_buffer(b"".join([*steps, step(give, allowed)]))
    program = struct.pack("<HxxxxxxQ", len(steps) + 1, ctypes.addressof(code))
    libc.prctl(SET_SECCOMP, FILTER, program, 0, 0)


def main() -> None:
    """Run the program in the current folder; see the module."""
    word, seconds, memory = sys.stdin.readline().split()
    told = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    limit(int(seconds), int(memory))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        leave_network(libc)
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        write_nothing(libc)
        refuse(libc)
    try:
        runpy.run_path(PROGRAM, run_name="__main__")
    except BaseException as error:  # SystemExit too: a program that ends itself has not come to its end
        os.write(told, f"failed\n{type(error).__name__}: {error}"[:200].encode(errors="replace"))
        raise
    os.write(told, word.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
