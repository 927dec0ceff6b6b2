"""Who owns which page of the cache; knows no tokens, no requests and no JAX."""


class Pages:
    """A pool of equal pages, numbered from 0. Every page is either free or handed out once."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that ``take`` could hand out now."""
        return len(self._free)

    def take(self, n: int) -> list[int]:
        """Hand out ``n`` pages; the caller owns them until it calls ``give_back``. There must be as many."""
        assert 0 <= n <= len(self._free), f"{n} pages wanted, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(n)]
        self._taken.update(pages)
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Return pages that ``take`` handed out."""
        assert self._taken.issuperset(pages) and len(set(pages)) == len(pages), "a page given back twice"
        self._taken.difference_update(pages)
        self._free.extend(reversed(pages))
