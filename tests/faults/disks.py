"""Disks that are full and system calls that fail, for a process of its own and without a compiler."""

import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

_NEW_NAMESPACE, _NEW_USER = 0x00020000, 0x10000000
_PRIVATE = 0x00040000 | 0x4000  # mounts of this process stay its own

# Of the calls that read, write and sync: their numbers on the machines that we know.
_NUMBERS = {
    "x86_64": {"fsync": 74, "fdatasync": 75, "pwrite64": 18, "rename": 82, "read": 0, "pread64": 17},
    "aarch64": {"fsync": 82, "fdatasync": 83, "pwrite64": 68, "read": 63, "pread64": 67},
}
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def mount_small(folder: Path, size: int) -> None:
    """Put a file system of so many bytes at a folder, which only this process sees. Raises OSError.

    The process must have one thread.
    """
    user, group = os.getuid(), os.getgid()
    if user == 0:
        _check(_libc.unshare(_NEW_NAMESPACE))
    else:
        _check(_libc.unshare(_NEW_NAMESPACE | _NEW_USER))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _check(_libc.mount(b"none", b"/", None, _PRIVATE, None))
    _check(_libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={size}".encode()))


def limit_files(size: int | None) -> None:
    """Let no file of this process grow beyond so many bytes (EFBIG); None: as far as they like."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def fail(call: str, error: int = errno.EIO, least: int = 0) -> None:
    """Have a system call fail from now on, in this process and for good, on descriptors of at least `least`.

    Raises OSError, KeyError.
    """
    machine = platform.machine()
    number = _NUMBERS[machine][call]
    allow, refuse = 0x7FFF0000, 0x00050000 | error
    program = b"".join(
        struct.pack("HBBI", *line)
        for line in (
            (0x20, 0, 0, 4),  # load the architecture
            (0x15, 1, 0, _ARCHITECTURES[machine]),
            (0x06, 0, 0, allow),
            (0x20, 0, 0, 0),  # load the number of the call
            (0x15, 0, 3, number),
            (0x20, 0, 0, 16),  # load its first argument
            (0x35, 0, 1, least),
            (0x06, 0, 0, refuse),
            (0x06, 0, 0, allow),
        )
    )
    lines = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(lines))
    no_new_privileges, install, all_threads = 38, 1, 1
    _check(_libc.prctl(no_new_privileges, 1, 0, 0, 0))
    seccomp = {"x86_64": 317, "aarch64": 277}[machine]
    _check(_libc.syscall(seccomp, install, all_threads, header))


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Meanwhile an open file of this process cannot be read: the kernel says EIO."""
    found = [int(name) for name in os.listdir("/proc/self/fd") if _leads_to(name, path)]
    bad = os.open("/proc/self/mem", os.O_RDONLY)  # nothing is at the addresses of a file's pages
    kept = {descriptor: os.dup(descriptor) for descriptor in found}
    try:
        for descriptor in found:
            os.dup2(bad, descriptor)
        yield
    finally:
        for descriptor, good in kept.items():
            os.dup2(good, descriptor)
            os.close(good)
        os.close(bad)


def _leads_to(name: str, path: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{name}") == str(path)
    except FileNotFoundError:
        return False


def next_descriptor() -> int:
    """The number that the next file opened by this process gets, and all after it more than that."""
    most = max(int(name) for name in os.listdir("/proc/self/fd"))
    while (found := os.open("/dev/null", os.O_RDONLY)) < most:
        pass  # one in a hole
    os.close(found)
    return found


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
