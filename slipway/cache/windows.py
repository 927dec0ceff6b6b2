"""Pool of KV pages for layers with a sliding window.

Sequences share a page by a count of its users. A page is freed when it is behind the window, and
kept for a cached prefix while no sequence uses it.

Not here: pages of layers that see everything (pages.py), the tree that finds cached prefixes
(radix.py).
"""

from collections import Counter
from collections.abc import Iterator

from slipway.cache.radix import Node

FREED = -1  # in place of a page


class WindowPages:
    """Pool of equal pages for layers that see ``window`` positions, the token's own included.

    A page is free, in use by one or several sequences, or idle: kept for its node of the prefix
    tree. If ``take`` needs idle pages, it takes the page first that was dropped first. The node
    then stays in the tree without a page in its ``windows``.
    """

    def __init__(self, num_pages: int, *, window: int, page_size: int, numbering: int):
        """Make all pages free; ``numbering`` is this pool's index in a node's ``windows``."""
        self.num_pages = num_pages
        self._window = window
        self._page_size = page_size
        self._numbering = numbering
        self._free = list(range(num_pages - 1, -1, -1))
        self._users: Counter[int] = Counter()
        self._nodes: dict[int, Node] = {}  # of published pages
        self._idle: dict[int, None] = {}  # in order of their last use

    @property
    def num_available(self) -> int:
        """Pages that ``take`` could hand out now."""
        return len(self._free) + len(self._idle)

    def first_seen(self, position: int) -> int:
        """Return the index of the first page of a sequence that the token at ``position`` sees."""
        return max(0, position - self._window + 1) // self._page_size

    def span(self, num_tokens: int) -> int:
        """Return the most pages that a sequence uses in a step of ``num_tokens`` tokens."""
        return (self._window - 1 + num_tokens) // self._page_size + 2

    def take(self, n: int) -> list[int]:
        """Hand out ``n`` pages with one user each; ``num_available`` must be as large."""
        while len(self._free) < n:
            page = next(iter(self._idle))
            del self._idle[page]
            self._nodes.pop(page).windows[self._numbering] = FREED
            self._free.append(page)
        pages = [self._free.pop() for _ in range(n)]
        self._users.update(pages)
        return pages

    def share(self, page: int) -> None:
        """Add a user to a published page."""
        self._idle.pop(page, None)
        self._users[page] += 1

    def drop(self, page: int) -> None:
        """Remove a user; without any the page is free, or idle if it is published."""
        self._users[page] -= 1
        assert self._users[page] >= 0, "dropped more often than taken and shared"
        if not self._users[page]:
            del self._users[page]
            if page in self._nodes:
                self._idle[page] = None
            else:
                self._free.append(page)

    def publish(self, page: int, node: Node) -> None:
        """Give a page in use to a node without a page in its ``windows``."""
        assert (
            self._users[page] and page not in self._nodes and node.windows[self._numbering] == FREED
        )
        node.windows[self._numbering] = page
        self._nodes[page] = node

    def forget(self, node: Node) -> None:
        """Take back the page of a node that leaves the tree."""
        page = node.windows[self._numbering]
        if page == FREED:
            return
        node.windows[self._numbering] = FREED
        del self._nodes[page]
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)

    def seen(self, node: Node) -> Iterator[Node]:
        """Yield the nodes, from ``node`` upwards, with pages that the token after ``node`` sees."""
        first = self.first_seen(node.depth * self._page_size)
        while node.parent is not None and node.depth > first:
            yield node
            node = node.parent

    def hole(self, node: Node) -> Node | None:
        """Return the deepest node without a page among those that the token after ``node`` sees."""
        return next(
            (each for each in self.seen(node) if each.windows[self._numbering] == FREED), None
        )

    def page(self, node: Node) -> int:
        """Return the page of a node, or FREED."""
        return node.windows[self._numbering]
