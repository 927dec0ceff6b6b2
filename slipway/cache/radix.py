"""Radix tree over KV pages: finds the pages of a token prefix, shared by reference count.

A node is one full page. Its key is the page's tokens as bytes; the path from the root to it holds
all tokens before them. A node without locks stays in the tree until its page is needed; the least
recently used leaves are evicted first.

Not here: the pool of free pages (pages.py), partly filled pages of a sequence
(engine/scheduler.py).
"""

import heapq
import itertools
from collections.abc import Callable


class Node:
    """One page of the tree, or a root, which has no page.

    ``locks`` is the number of sequences that have this node as their deepest one, plus the number
    of its locked children. It is 0 if and only if no sequence reads the page.
    """

    __slots__ = (
        "block",
        "children",
        "depth",
        "generation",
        "last_used",
        "locks",
        "page",
        "parent",
        "windows",
    )

    def __init__(self, parent: "Node | None", block: bytes, page: int, generation: int):
        self.parent = parent
        self.block = block
        self.page = page
        self.generation = generation
        self.children: dict[bytes, Node] = {}
        # pages from the root on, this one included
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.locks = 0
        self.last_used = 0
        # its pages of layers with sliding windows (windows.py), one for each numbering
        self.windows: list[int] = []


class RadixTree:
    """Pages that finished and running sequences have computed, found again by their tokens.

    The tree owns the pages of its nodes and passes each node that leaves it to ``on_free``.
    """

    def __init__(self, on_free: Callable[[Node], None]):
        self._on_free = on_free
        self._roots: dict[str, Node] = {}
        self._generation = 0
        # a heap of (last use, tie, leaf), outdated entries included
        self._leaves: list[tuple[int, int, Node]] = []
        self._clock = 0
        self._ties = itertools.count()
        self.num_pages = 0
        self.num_unlocked = 0

    @property
    def num_salts(self) -> int:
        """Number of salts with a root in the tree."""
        return len(self._roots)

    def match(self, salt: str, blocks: list[bytes]) -> Node:
        """Return the deepest node on the path of ``blocks``; the caller locks it at once.

        Each ``salt`` has its own root, so sequences with different salts share no page.
        """
        node = self._roots.get(salt)
        if node is None:
            node = self._roots[salt] = Node(
                None, salt.encode(), page=-1, generation=self._generation
            )
        for block in blocks:
            child = node.children.get(block)
            if child is None:
                break
            node = child
        return node

    def pages(self, node: Node) -> list[int]:
        """Return the pages from the root to ``node``, in the order of their tokens."""
        found = []
        while node.parent is not None:
            found.append(node.page)
            node = node.parent
        return found[::-1]

    def lock(self, node: Node) -> None:
        """Protect a node and its ancestors from eviction until ``unlock``."""
        node.locks += 1
        while node.locks == 1 and node.parent is not None:
            self.num_unlocked -= 1
            node = node.parent
            node.locks += 1

    def unlock(self, node: Node) -> None:
        """Undo one ``lock``."""
        self._clock += 1
        while True:
            assert node.locks > 0, "unlocked more often than locked"
            node.locks -= 1
            node.last_used = self._clock
            parent = node.parent
            if parent is None:
                self._forget(node)
            if node.locks or parent is None:
                return
            self.num_unlocked += 1
            if node.generation != self._generation:
                self._drop(node)  # flushed while it was locked: ``match`` cannot find it any more
            elif not node.children:
                self._push(node)
            node = parent

    def extend(self, node: Node, block: bytes, page: int) -> Node:
        """Add a child for ``block`` below a locked node; move one lock from the node to it.

        The tree owns ``page`` from now on. The node must not have a child with this block.
        """
        assert node.locks > 0 and block not in node.children
        child = node.children[block] = Node(node, block, page, generation=node.generation)
        child.locks = 1  # the caller's lock on ``node`` now counts as that of a locked child
        self.num_pages += 1
        return child

    def descend(self, node: Node, child: Node) -> Node:
        """Move a lock from a node to its child."""
        assert node.locks > 0 and child.parent is node
        if child.locks:
            node.locks -= 1  # ``node.locks`` counts this locked child already
        else:
            self.num_unlocked -= 1
        child.locks += 1
        return child

    def evict(self, num_pages: int) -> int:
        """Free up to ``num_pages`` pages, the least recently used first; return how many."""
        freed = 0
        while freed < num_pages and self._leaves:
            last_used, _, node = heapq.heappop(self._leaves)
            if node.parent is None or node.locks or node.children:
                continue  # an outdated entry: dropped, locked, or no longer a leaf
            if node.last_used != last_used:
                self._push(node)
                continue
            parent = node.parent
            self._drop(node)
            freed += 1
            if parent.parent is None:
                self._forget(parent)
            elif not parent.children and not parent.locks:
                self._push(parent)
        return freed

    def flush(self) -> int:
        """Drop all unlocked nodes and hide the locked ones from ``match``; return the pages freed.

        A locked node is dropped when its last lock is released.
        """
        freed = self.evict(self.num_unlocked)
        self._generation += 1
        self._roots.clear()
        return freed

    def _forget(self, root: Node) -> None:
        """Remove an empty, unlocked root.

        Clients choose the salts, so the number of roots would otherwise have no bound.
        """
        if not root.children and not root.locks and root.generation == self._generation:
            self._roots.pop(root.block.decode(), None)

    def _push(self, leaf: Node) -> None:
        heapq.heappush(self._leaves, (leaf.last_used, next(self._ties), leaf))

    def _drop(self, node: Node) -> None:
        assert node.parent is not None and not node.children and not node.locks
        del node.parent.children[node.block]
        node.parent = None
        self.num_pages -= 1
        self.num_unlocked -= 1
        self._on_free(node)
