"""Pool of the KV cache's pages: which are free and which are handed out.

Not here: the tokens that a page holds (radix.py), requests (engine/scheduler.py), the device's
arrays.
"""


class Pages:
    """Pool of equal pages, numbered from 0. Each page is either free or handed out exactly once."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        """Number of pages that ``take`` can hand out now."""
        return len(self._free)

    def take(self, n: int) -> list[int]:
        """Hand out ``n`` pages; the caller owns them until it passes them to ``give_back``.

        The caller checks ``num_free`` first: at least ``n`` pages must be free.
        """
        assert 0 <= n <= len(self._free), f"{n} pages wanted, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(n)]
        self._taken.update(pages)
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Return pages that ``take`` handed out to the pool."""
        is_owned = self._taken.issuperset(pages)
        assert is_owned and len(set(pages)) == len(pages), "a page given back twice"
        self._taken.difference_update(pages)
        self._free.extend(reversed(pages))
