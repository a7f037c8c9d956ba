"""What the system says of memory of this process."""

from __future__ import annotations

import re
from pathlib import Path


def huge_bytes(address: int) -> int:
    """Bytes in huge pages of the mapping that holds an address."""
    for mapping in re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]:
        begin, end = (int(part, 16) for part in mapping.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            kinds = "AnonHugePages|ShmemPmdMapped|FilePmdMapped|Shared_Hugetlb|Private_Hugetlb"
            return 1024 * sum(map(int, re.findall(rf"(?:{kinds}): +(\d+) kB", mapping)))
    raise AssertionError(f"nothing is mapped at {address:x}")
