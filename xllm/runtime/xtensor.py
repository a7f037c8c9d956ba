"""Virtual memory for the KV pool: address ranges without backing, and physical pages that are mapped into them.

One interface fits Linux, CUDA and Ascend: reserve, create_pages, map, unmap, release, export, import. On Linux a page
is a part of one memfd, mapped with MAP_FIXED. Unmapped parts of a range are holes: a private read-only mapping without
backing, so that reading one gives zeros and writing one is a fault instead of somebody's data.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from xllm.runtime.errors import MemoryFault

PAGE_BYTES = 2 << 20
SMALL_PAGE_BYTES = 64 << 10
# The kernel allows about 65 k mappings in a process and a hole may follow every page, so stay well below half of that.
MAX_MAPPINGS = 16_384

_PROT_READ, _PROT_WRITE = 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_MAP_NORESERVE, _MAP_POPULATE = 0x4000, 0x8000
_MFD_CLOEXEC, _MFD_HUGETLB, _MFD_HUGE_2MB = 0x0001, 0x0004, 21 << 26
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE, which wants FALLOC_FL_KEEP_SIZE
_MAP_FAILED = ctypes.c_void_p(-1).value
_SYSTEM_PAGE = 4096


@dataclass(frozen=True)
class PageTicket:
    """A physical page another process may map: a file descriptor (sent by SCM_RIGHTS), an offset and a size in
    bytes."""

    fd: int
    offset: int
    page_bytes: int


class PageMemory(Protocol):
    """Address ranges and pages. Every method raises MemoryFault naming the system call and errno.

    A page may be mapped into several ranges; who owns it is the caller's business, nothing is counted here. Fresh pages
    read as zeros; pages that are mapped again keep their bytes. Addresses are multiples of `page_bytes`.
    """

    @property
    def page_bytes(self) -> int: ...

    @property
    def huge_pages(self) -> str:
        """Which huge pages back the pool: "hugetlb", "transparent" or "none"."""
        ...

    def reserve(self, size: int) -> int:
        """Address of a new range of `size` bytes, all holes. Costs no memory."""
        ...

    def create_pages(self, count: int) -> range:
        """Ids of `count` new pages. Memory is taken when a page is first touched or populated."""
        ...

    def map(self, page: int, address: int, writable: bool = True) -> None:
        """Put a page at an address of a reserved range, in place of the hole or page that was there. Where it is not
        writable, a write is a fault."""
        ...

    def copy(self, page: int, address: int, size: int) -> None:
        """Copy the first `size` bytes of a page, mapped anywhere or not, to a writable address."""
        ...

    def copy_out(self, page: int, offset: int, into: memoryview) -> None:
        """Fill writable bytes from a page, mapped anywhere or not, `offset` bytes behind its start. Beside a writer of
        the same bytes, what is read is undefined."""
        ...

    def copy_in(self, page: int, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """Put bytes into a page that is mapped nowhere, each piece at its offset."""
        ...

    def populate(self, address: int) -> None:
        """Touch the page mapped at an address, so that its first user meets no page fault. Keeps its bytes; harmless
        beside concurrent users and on a hole."""
        ...

    def unmap(self, address: int, pages: int = 1) -> None:
        """Turn `pages` consecutive pages of a range back into holes."""
        ...

    def discard(self) -> None:
        """Give the memory of all created pages back to the system. They stay where they are mapped, and read as
        zeros."""
        ...

    def reclaim(self) -> None:
        """After `discard`, before a page is touched: see that there is memory for them where that must be asked for."""
        ...

    def export_page(self, page: int) -> PageTicket: ...

    def import_page(self, ticket: PageTicket) -> int:
        """Id under which a page of another process can be mapped here. The descriptor is duplicated."""
        ...

    def release(self) -> None:
        """Unmap every range and give all pages back. Calling it again does nothing."""
        ...


def choose_page_bytes(pool_bytes: int, span_bytes: int, spans: int) -> int:
    """2 MiB; doubled while the pool would need more mappings than the kernel should carry, halved while a span (a
    sequence's whole range) would not even fill half a page."""
    page_bytes = PAGE_BYTES
    while pool_bytes // page_bytes + spans > MAX_MAPPINGS and page_bytes < pool_bytes:
        page_bytes *= 2
    while page_bytes > SMALL_PAGE_BYTES and page_bytes // 2 >= span_bytes:
        page_bytes //= 2
    return page_bytes


class LinuxMemory:
    """PageMemory on memfd and mmap. `page_bytes` is a power of two of at least 4096.

    Huge pages are used when the system grants them: reserved ones (hugetlbfs) if the whole pool fits into those that
    are free, else transparent ones by madvise. Without either everything works, the first touch of a page costs more.
    """

    def __init__(self, page_bytes: int = PAGE_BYTES, huge: bool = True):
        if sys.platform != "linux":
            raise MemoryFault(
                "unsupported_platform", f"the KV pool needs Linux (memfd and mmap), this is {sys.platform}"
            )
        if page_bytes < _SYSTEM_PAGE or page_bytes & (page_bytes - 1):
            raise MemoryFault("memory_unavailable", f"page_bytes is {page_bytes}, must be a power of two from 4096")
        self._libc = _load_libc()
        self._page_bytes = page_bytes
        self._try_huge = huge and page_bytes % PAGE_BYTES == 0
        self._huge_pages = "none"
        self._fd = -1
        self._created = 0
        self._imported: dict[int, PageTicket] = {}
        self._ranges: list[tuple[int, int]] = []

    @property
    def page_bytes(self) -> int:
        return self._page_bytes

    @property
    def huge_pages(self) -> str:
        return self._huge_pages

    def reserve(self, size: int) -> int:
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
        # One page more than asked, to be able to start at a multiple of it.
        raw = self._mmap(0, size + self._page_bytes, _PROT_READ, flags, -1, 0)
        self._ranges.append((raw, size + self._page_bytes))
        return -(-raw // self._page_bytes) * self._page_bytes

    def create_pages(self, count: int) -> range:
        if self._fd < 0:
            self._fd = self._open_pool(count * self._page_bytes)
        first = self._created
        try:
            os.ftruncate(self._fd, (first + count) * self._page_bytes)
        except OSError as error:
            raise _fault("ftruncate", error.errno, f"{first + count} pages of {self._page_bytes} bytes") from None
        if self._huge_pages == "hugetlb" and not self._reserve_huge(self._fd, (first + count) * self._page_bytes):
            raise _fault("mmap", ctypes.get_errno(), f"{count} more pages on reserved huge pages")
        self._created += count
        return range(first, first + count)

    def map(self, page: int, address: int, writable: bool = True) -> None:
        ticket = self.export_page(page)
        protection = _PROT_READ | _PROT_WRITE if writable else _PROT_READ
        self._mmap(address, self._page_bytes, protection, _MAP_SHARED | _MAP_FIXED, ticket.fd, ticket.offset)
        if self._huge_pages == "transparent":
            # Advice only: a refusal leaves ordinary pages, which work.
            self._libc.madvise(address, self._page_bytes, _MADV_HUGEPAGE)

    def copy(self, page: int, address: int, size: int) -> None:
        self.copy_out(page, 0, memoryview((ctypes.c_ubyte * size).from_address(address)))

    def copy_out(self, page: int, offset: int, into: memoryview) -> None:
        ticket, size = self.export_page(page), into.nbytes
        try:
            copied = os.preadv(ticket.fd, [into], ticket.offset + offset)
        except OSError as error:
            raise _fault("preadv", error.errno, f"{size} bytes of a page") from None
        if copied != size:
            raise MemoryFault("memory_unavailable", f"{copied} of {size} bytes of a page could be copied")

    def copy_in(self, page: int, pieces: Iterable[tuple[int, memoryview]]) -> None:
        # By a mapping of its own: files of huge pages can be read but not written by a call.
        ticket, protection = self.export_page(page), _PROT_READ | _PROT_WRITE
        address = self._mmap(0, self._page_bytes, protection, _MAP_SHARED | _MAP_POPULATE, ticket.fd, ticket.offset)
        try:
            there = np.ctypeslib.as_array((ctypes.c_ubyte * self._page_bytes).from_address(address))
            for offset, data in pieces:
                there[offset : offset + data.nbytes] = np.frombuffer(data, np.uint8)
        finally:
            self._libc.munmap(address, self._page_bytes)

    def populate(self, address: int) -> None:
        if self._libc.madvise(address, self._page_bytes, _MADV_POPULATE_WRITE) == 0:
            return
        # Kernels before 5.14: reading allocates a page of shared memory as well, and cannot race with a writer.
        there = np.ctypeslib.as_array((ctypes.c_ubyte * self._page_bytes).from_address(address))
        there[::_SYSTEM_PAGE].max()

    def unmap(self, address: int, pages: int = 1) -> None:
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        self._mmap(address, pages * self._page_bytes, _PROT_READ, flags, -1, 0)

    def discard(self) -> None:
        size = self._created * self._page_bytes
        if size and self._libc.fallocate(self._fd, _PUNCH_HOLE, 0, size):
            raise _fault("fallocate", ctypes.get_errno(), f"giving {size} bytes back")

    def reclaim(self) -> None:
        size = self._created * self._page_bytes
        if self._huge_pages == "hugetlb" and not self._reserve_huge(self._fd, size):
            raise _fault("mmap", ctypes.get_errno(), f"{size} bytes of reserved huge pages, which others took")

    def export_page(self, page: int) -> PageTicket:
        return self._imported.get(page) or PageTicket(self._fd, page * self._page_bytes, self._page_bytes)

    def import_page(self, ticket: PageTicket) -> int:
        if ticket.page_bytes != self._page_bytes:
            raise MemoryFault(
                "memory_unavailable", f"a page of {ticket.page_bytes} bytes cannot join ranges of {self._page_bytes}"
            )
        page = -1 - len(self._imported)
        self._imported[page] = PageTicket(os.dup(ticket.fd), ticket.offset, ticket.page_bytes)
        return page

    def release(self) -> None:
        for address, size in self._ranges:
            self._libc.munmap(address, size)
        for fd in (self._fd, *(ticket.fd for ticket in self._imported.values())):
            if fd >= 0:
                os.close(fd)
        self._ranges, self._imported, self._fd, self._created = [], {}, -1, 0

    def _open_pool(self, size: int) -> int:
        """The pool's file: on reserved huge pages when all of it fits there, otherwise on ordinary shared memory."""
        if self._try_huge:
            fd = self._libc.memfd_create(b"xllm-kv", _MFD_CLOEXEC | _MFD_HUGETLB | _MFD_HUGE_2MB)
            if fd >= 0:
                os.ftruncate(fd, size)
                if self._reserve_huge(fd, size):
                    self._huge_pages = "hugetlb"
                    return fd
                os.close(fd)
        fd = self._libc.memfd_create(b"xllm-kv", _MFD_CLOEXEC)
        if fd < 0:
            raise _fault("memfd_create", ctypes.get_errno(), f"a pool of {size} bytes")
        if self._try_huge and _transparent_shared_memory():
            self._huge_pages = "transparent"
        return fd

    def _reserve_huge(self, fd: int, size: int) -> bool:
        """Without this a first touch could find no huge page left, which kills the process. A shared mapping reserves
        its pages for the life of the file, or is refused."""
        mapped = self._libc.mmap(None, size, _PROT_READ | _PROT_WRITE, _MAP_SHARED, fd, 0)
        if mapped == _MAP_FAILED:
            return False
        self._libc.munmap(mapped, size)
        return True

    def _mmap(self, address: int, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
        mapped = self._libc.mmap(address or None, size, protection, flags, fd, offset)
        if mapped == _MAP_FAILED:
            raise _fault("mmap", ctypes.get_errno(), f"{size} bytes")
        return mapped


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes, libc.mmap.restype = [address, size, number, number, number, ctypes.c_int64], address
    libc.fallocate.argtypes, libc.fallocate.restype = [number, number, ctypes.c_int64, ctypes.c_int64], number
    libc.munmap.argtypes, libc.munmap.restype = [address, size], number
    libc.madvise.argtypes, libc.madvise.restype = [address, size, number], number
    if not hasattr(libc, "memfd_create"):
        raise MemoryFault("unsupported_platform", "the C library has no memfd_create (glibc 2.27 or musl 1.1.20 has)")
    libc.memfd_create.argtypes, libc.memfd_create.restype = [ctypes.c_char_p, ctypes.c_uint], number
    return libc


def _transparent_shared_memory() -> bool:
    """Does the kernel give huge pages to shared memory that asks for them?"""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/shmem_enabled") as setting:
            return any(word in setting.read() for word in ("[always]", "[within_size]", "[advise]", "[force]"))
    except OSError:
        return False


def _fault(call: str, number: int | None, what: str) -> MemoryFault:
    name = errno.errorcode.get(number or 0, str(number))
    hint = ""
    if number == errno.ENOMEM and call == "mmap":
        hint = "; raise vm.max_map_count, or give the pool larger pages or less memory"
    elif number == errno.EMFILE:
        hint = "; raise the open-file limit (ulimit -n)"
    return MemoryFault("memory_unavailable", f"{call} failed for {what}: {name} ({os.strerror(number or 0)}){hint}")
