"""Confine the running process: little memory, little time, and no system calls but those of computing.

For a process that is about to read bytes that it does not trust. It cannot open files or sockets, start processes or threads,
or send signals after that. Linux on x86-64 and ARM64 has all of it; elsewhere the limits on memory and time are left.
"""

import ctypes
import platform
import resource
import signal
import struct
from dataclasses import dataclass
from typing import Final

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER: Final = 2
_RETURN_ALLOW, _RETURN_ERROR, _RETURN_KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
#: Instructions of a classic BPF program: load a word, jump if equal, jump if a bit is set, return.
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_INSTRUCTION: Final = struct.Struct("<HBBI")
#: Places in the kernel's description of a call: its number, the architecture, the lower half of the first argument.
_CALL_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_CLONE_THREAD: Final = 0x10000
_CLONE3: Final = 435

#: read, write, close, lseek, fstat, poll or ppoll, mmap, mprotect, munmap, mremap, brk, madvise, futex, sched_yield,
#: rt_sigreturn, rt_sigaction, rt_sigprocmask, clock_gettime, gettimeofday, getrandom, getpid, gettid, exit, exit_group, rseq,
#: set_robust_list. Before them the architecture, and `clone`, which may start threads: libde265 does.
_ALLOWED: Final[dict[str, tuple[int, int, tuple[int, ...]]]] = {
    "x86_64": (
        0xC000003E,
        56,
        (0, 1, 3, 8, 5, 7, 9, 10, 11, 25, 12, 28, 202, 24, 15, 13, 14, 228, 96, 318, 39, 186, 60, 231, 334, 273),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (
            63,
            64,
            57,
            62,
            80,
            73,
            222,
            226,
            215,
            216,
            214,
            233,
            98,
            124,
            139,
            134,
            135,
            113,
            169,
            278,
            172,
            178,
            93,
            94,
            293,
            99,
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Allowance:
    """What the process may still use: seconds of processor time, and MiB of memory beyond what it has."""

    processor_seconds: int
    mib: int


def confine(allowance: Allowance) -> bool:
    """Confine this process for the rest of its life. Returns whether its system calls are filtered, too."""
    held = int(open("/proc/self/statm", "rb").read().split()[0]) * resource.getpagesize()  # noqa: PTH123, SIM115
    most = held + allowance.mib * 2**20
    for kind, value in (
        (resource.RLIMIT_AS, most),
        (resource.RLIMIT_CPU, allowance.processor_seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    libc = ctypes.CDLL(None, use_errno=True)
    # The parent's end is this process's end.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    return libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and _filter_calls(libc)


def _filter_calls(libc: ctypes.CDLL) -> bool:
    """Let any call but those of _ALLOWED fail with EPERM. Returns False where the kernel or the machine has no filter."""
    if platform.machine() not in _ALLOWED:
        return False
    program = _program(*_ALLOWED[platform.machine()])
    code = ctypes.create_string_buffer(program, len(program))
    head = ctypes.create_string_buffer(struct.pack("@HP", len(program) // _INSTRUCTION.size, ctypes.addressof(code)))
    filtered = libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_void_p(ctypes.addressof(head)), 0, 0)
    return bool(filtered == 0)


def _program(architecture: int, clone: int, calls: tuple[int, ...]) -> bytes:
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _RETURN_KILL),
        (_LOAD, 0, 0, _CALL_NUMBER),
        # The C library uses `clone` where `clone3` does not exist. The flags of `clone3` cannot be looked at here.
        (_JUMP_IF_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _RETURN_ERROR | _ENOSYS),
        *((_JUMP_IF_EQUAL, len(calls) - place + 3, 0, call) for place, call in enumerate(calls)),
        (_JUMP_IF_EQUAL, 0, 2, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_JUMP_IF_SET, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _RETURN_ERROR | _EPERM),
        (_RETURN, 0, 0, _RETURN_ALLOW),
    ]
    return b"".join(_INSTRUCTION.pack(*line) for line in lines)
