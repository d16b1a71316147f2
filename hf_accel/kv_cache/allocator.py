"""Page ids: which are free. Knows nothing of requests, tokens or tensors."""

from __future__ import annotations

from collections.abc import Iterable


class OutOfPagesError(RuntimeError):
    """Fewer pages are free than were asked for."""


class PageAllocator:
    """Hands out page ids from [0, num_pages). The page freed last is reused first; each page costs O(1)."""

    def __init__(self, num_pages: int) -> None:
        """Start with every page free.

        Raises:
            ValueError: if `num_pages` is not positive.
        """
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: its end goes out next
        self._in_use = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def is_free(self, page_id: int) -> bool:
        """Whether nobody owns `page_id`."""
        return not self._in_use[page_id]

    def allocate(self, n: int) -> list[int]:
        """Take `n` pages.

        Raises:
            OutOfPagesError: if fewer are free; nothing is taken then.
        """
        assert n >= 0, f"cannot allocate {n} pages"
        if n > len(self._free):
            raise OutOfPagesError(f"{n} pages asked for, {len(self._free)} of {self.num_pages} free")
        first = len(self._free) - n
        page_ids = self._free[first:]
        del self._free[first:]
        page_ids.reverse()
        for page_id in page_ids:
            self._in_use[page_id] = 1
        return page_ids

    def free(self, page_ids: Iterable[int]) -> None:
        """Give pages back.

        Raises:
            AssertionError: for an unknown page, or one that is free already (also twice in one call); nothing is
                freed then.
        """
        page_ids = list(page_ids)
        wrong = [p for p in page_ids if not 0 <= p < self.num_pages or not self._in_use[p]]
        if wrong:
            raise AssertionError(f"freed pages that are unknown or free already: {wrong}")
        if len(set(page_ids)) != len(page_ids):
            raise AssertionError(f"freed a page twice in one call: {page_ids}")
        for page_id in page_ids:
            self._in_use[page_id] = 0
        self._free.extend(page_ids)

    def check_integrity(self) -> None:
        """Verify that the free list and the use flags tell the same story. O(num_pages)."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        flagged = {page_id for page_id, in_use in enumerate(self._in_use) if not in_use}
        assert free == flagged, f"free list and flags differ on pages {sorted(free ^ flagged)}"
