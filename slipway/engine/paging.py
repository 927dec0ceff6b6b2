"""Paging of sequences: pools of pages, prefix tree and page tables of one copy of the weights.

Not here: the choice of sequences that run or are preempted (scheduler.py), the pools themselves
(cache/pages.py, cache/windows.py), the tree (cache/radix.py). Nothing here imports JAX.
"""

from collections.abc import Iterable

import numpy as np

from slipway.cache.pages import Pages
from slipway.cache.radix import Node, RadixTree
from slipway.cache.windows import FREED, WindowPages
from slipway.engine.request import Sequence


class Paging:
    """Every page of one copy of the weights: free, held by running sequences, or kept for prefixes.

    There is one pool for the layers with full attention and one for each sliding window.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        table_width: int,
        max_num_seqs: int,
        prefix_caching: bool,
        windows: Iterable[tuple[int, int]],
    ):
        """Create the pools, all free.

        ``table_width``: the most pages of one sequence. ``max_num_seqs``: rows of each page table.
        ``windows``: (window in positions, number of pages) for each sliding window of the model.
        """
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.pages = Pages(num_pages)
        self.windows = [
            WindowPages(count, window=window, page_size=page_size, numbering=numbering)
            for numbering, (window, count) in enumerate(windows)
        ]
        self.tree = RadixTree(self._forget)
        # By slot and index of the page: the page. The first table is of the layers with full
        # attention, the others are of the sliding windows, in order; there the entries of pages
        # that lie before the window are stale.
        self.page_tables = [
            np.zeros((max_num_seqs, table_width), np.int32) for _ in range(1 + len(self.windows))
        ]

    def num_for(self, num_tokens: int) -> int:
        """Return the number of pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def blocks(self, tokens: np.ndarray, count: int, first: int = 0) -> list[bytes]:
        """Return the full pages of the first ``count`` tokens, from page ``first`` on, as bytes."""
        size = self.page_size
        return [
            tokens[page * size : (page + 1) * size].tobytes()
            for page in range(first, count // size)
        ]

    def num_available(self) -> int:
        """Return how many pages ``make_free`` could provide in every pool."""
        of_tree = self.pages.num_free + self.tree.num_unlocked
        return min([of_tree, *(pool.num_available for pool in self.windows)])

    def make_free(self, needed: int) -> int:
        """Evict pages of the tree until ``needed`` are free, as far as no sequence reads them.

        Returns how many pages can then be taken from every pool.
        """
        if needed > self.pages.num_free:
            self.tree.evict(needed - self.pages.num_free)
        return min([self.pages.num_free, *(pool.num_available for pool in self.windows)])

    def take(self, sequence: Sequence, count: int) -> None:
        """Give a sequence its next ``count`` pages, from every pool."""
        taken = [self.pages.take(count), *(pool.take(count) for pool in self.windows)]
        self.hold(sequence, taken)

    def hold(self, sequence: Sequence, pages: list[list[int]]) -> None:
        """Append pages, one list for each pool, to a sequence and to its rows of the tables."""
        for held, table, more in zip(
            [sequence.pages, *sequence.window_pages], self.page_tables, pages, strict=True
        ):
            table[sequence.slot, len(held) : len(held) + len(more)] = more
            held += more

    def match(self, salt: str, blocks: list[bytes]) -> Node:
        """Return the deepest node on the path of ``blocks`` after which a sequence can continue.

        ``salt``: the request's ``cache_salt``. The caller locks the node at once.
        """
        return self.usable(self.tree.match(salt, blocks))

    def usable(self, node: Node) -> Node:
        """Return the deepest node, at or above ``node``, after which a sequence can continue.

        Every page that the next token sees must still exist: pages of sliding windows may have been
        reused while their node stayed in the tree.
        """
        while any(hole := pool.hole(node) for pool in self.windows):
            assert hole is not None and hole.parent is not None
            node = hole.parent
        return node

    def share(self, node: Node, first: int) -> list[list[int]]:
        """Return the pages of the path to ``node`` from index ``first`` on, one list for each pool.

        Pages of sliding windows count one user more; those that lie before a window are FREED.
        """
        found = [self.tree.pages(node)[first:]]
        for pool in self.windows:
            pages = [FREED] * (node.depth - first)
            for seen in pool.seen(node):
                if seen.depth > first:
                    pool.share(pool.page(seen))
                    pages[seen.depth - 1 - first] = pool.page(seen)
            found.append(pages)
        return found

    def publish(self, sequence: Sequence) -> None:
        """Enter a sequence's full pages into the prefix tree.

        All tokens of such a page are computed, and the host has their ids. If the tree already has
        a page with the same tokens from another sequence, this sequence keeps its own copy
        (``duplicates``) until it leaves, as the device may not have written that copy yet.
        """
        node = sequence.node
        assert node is not None
        full = min(sequence.num_computed, sequence.num_tokens) // self.page_size
        if full == node.depth or not self.prefix_caching:
            return
        for block in self.blocks(sequence.tokens, full * self.page_size, node.depth):
            child = node.children.get(block)
            page = sequence.pages[node.depth]
            if child is None:
                node = self.tree.extend(node, block, page)
                node.windows = [FREED] * len(self.windows)
            else:
                node = self.tree.descend(node, child)
                sequence.duplicates.append(page)
            for pool, pages in zip(self.windows, sequence.window_pages):
                if pool.page(node) == FREED != pages[node.depth - 1]:
                    pool.publish(pages[node.depth - 1], node)
        sequence.node = node

    def slide(self, sequence: Sequence, position: int) -> None:
        """Drop the pages of sliding windows that no token from ``position`` on sees."""
        for pool, pages in zip(self.windows, sequence.window_pages):
            for index in range(min(pool.first_seen(position), len(pages)) - 1, -1, -1):
                # All pages before a freed one are freed too.
                if pages[index] == FREED:
                    break
                pool.drop(pages[index])
                pages[index] = FREED

    def drop_windows(self, held: Iterable[list[int]]) -> None:
        """Drop pages of sliding windows, one list for each pool."""
        for pool, pages in zip(self.windows, held):
            for page in pages:
                if page != FREED:
                    pool.drop(page)

    def _forget(self, node: Node) -> None:
        """Free the pages of a node that leaves the tree."""
        self.pages.give_back([node.page])
        for pool in self.windows:
            pool.forget(node)
