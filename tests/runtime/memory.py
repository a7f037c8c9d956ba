"""Pages that know what is mapped where, and the system's own under the same tests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from xllm.runtime.xtensor import LinuxMemory, PageTicket


class FakeMemory:
    """PageMemory without memory: `content` remembers what was written to each page."""

    huge_pages = "none"

    def __init__(self, page_bytes: int):
        self.page_bytes = page_bytes
        self.mapped: dict[int, int] = {}  # address -> page
        self.writable: dict[int, int] = {}  # page -> the one address where it may be written
        self.content: dict[tuple[int, int], int] = {}
        self.end = page_bytes
        self.pages = 0

    def reserve(self, size: int) -> int:
        address, self.end = self.end, self.end + size
        return address

    def create_pages(self, count: int) -> range:
        self.pages += count
        return range(self.pages - count, self.pages)

    def map(self, page: int, address: int, writable: bool = True) -> None:
        assert address % self.page_bytes == 0 and address not in self.mapped
        self.mapped[address] = page
        if writable:
            assert list(self.mapped.values()).count(page) == 1, "a page that others read"
            assert page not in self.writable, "a page writable by two"
            self.writable[page] = address

    def copy(self, page: int, address: int, size: int) -> None:
        assert 0 < size <= self.page_bytes and self.writable[self.mapped[address]] == address
        for (source, offset), value in list(self.content.items()):
            if source == page and offset < size:
                self.content[self.mapped[address], offset] = value

    def copy_out(self, page: int, offset: int, into: memoryview) -> None:
        raise NotImplementedError  # with tiers, tests have real memory

    def copy_in(self, page: int, pieces: Iterable[tuple[int, memoryview]]) -> None:
        raise NotImplementedError

    def populate(self, address: int) -> None:
        assert address % self.page_bytes == 0

    def unmap(self, address: int, pages: int = 1) -> None:
        for offset in range(pages):
            at = address + offset * self.page_bytes
            page = self.mapped.pop(at)
            if self.writable.get(page) == at:
                del self.writable[page]

    def discard(self) -> None:
        self.content.clear()

    def reclaim(self) -> None: ...

    def export_page(self, page: int) -> PageTicket:
        raise NotImplementedError

    def import_page(self, ticket: PageTicket) -> int:
        raise NotImplementedError

    def release(self) -> None:
        self.mapped, self.writable = {}, {}

    def write(self, address: int, value: int) -> None:
        base = address // self.page_bytes * self.page_bytes
        assert self.writable.get(self.mapped[base]) == base, "a write to a shared page"
        self.content[self.mapped[base], address - base] = value

    def read(self, address: int) -> int:
        base = address // self.page_bytes * self.page_bytes
        return self.content[self.mapped[base], address - base]


class RealMemory(LinuxMemory):
    """The system's memory under the same tests: a hole reads as token 0."""

    def write(self, address: int, value: int) -> None:
        ctypes.c_int32.from_address(address).value = value

    def read(self, address: int) -> int:
        return ctypes.c_int32.from_address(address).value
