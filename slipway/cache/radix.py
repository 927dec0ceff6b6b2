"""Which pages hold which tokens: a radix tree over page-sized blocks, shared by reference count; knows no JAX.

A node is one full page: its key is the page's tokens as bytes, its place in the tree all that came before. Nodes that
nobody locks stay until their pages are needed; then the least recently used leaves go first.
"""

import heapq
import itertools
from collections.abc import Callable


class Node:
    """One page of the tree, or a root, which has none.

    ``locks`` counts the sequences that hold this very node as their deepest, and its children that are locked: it is 0
    exactly where no sequence reads the page.
    """

    __slots__ = ("block", "children", "depth", "generation", "last_used", "locks", "page", "parent", "windows")

    def __init__(self, parent: "Node | None", block: bytes, page: int, generation: int):
        self.parent, self.block, self.page, self.generation = parent, block, page, generation
        self.children: dict[bytes, Node] = {}
        self.depth: int = 0 if parent is None else parent.depth + 1  # pages from the root on, this one included
        self.locks = self.last_used = 0
        self.windows: list[int] = []  # its pages of layers with sliding windows (windows.py), one for each numbering


class RadixTree:
    """The pages that finished and running sequences have computed, found again by their tokens.

    The tree owns the pages of its nodes. ``on_free`` gets each node that leaves it.
    """

    def __init__(self, on_free: Callable[[Node], None]):
        self._on_free = on_free
        self._roots: dict[str, Node] = {}
        self._generation = 0
        self._leaves: list[tuple[int, int, Node]] = []  # a heap of (last use, tie, leaf), outdated entries included
        self._clock, self._ties = 0, itertools.count()
        self.num_pages = self.num_unlocked = 0

    def match(self, salt: str, blocks: list[bytes]) -> Node:
        """The deepest node on the path of ``blocks``, to be locked at once; roots of different salts share nothing."""
        node = self._roots.get(salt)
        if node is None:
            node = self._roots[salt] = Node(None, salt.encode(), -1, self._generation)
        for block in blocks:
            child = node.children.get(block)
            if child is None:
                break
            node = child
        return node

    def pages(self, node: Node) -> list[int]:
        """The pages from the root to ``node``."""
        found = []
        while node.parent is not None:
            found.append(node.page)
            node = node.parent
        return found[::-1]

    def lock(self, node: Node) -> None:
        """Keep a node and all above it until ``unlock``."""
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
                self._drop(node)  # flushed while it was locked: nobody can find it any more
            elif not node.children:
                self._push(node)
            node = parent

    def extend(self, node: Node, block: bytes, page: int) -> Node:
        """Hang ``page``, the tree's from now on, below a locked node that has no such block; the lock moves there."""
        assert node.locks > 0 and block not in node.children
        child = node.children[block] = Node(node, block, page, node.generation)
        child.locks = 1  # and the lock on ``node`` becomes that of a locked child
        self.num_pages += 1
        return child

    def descend(self, node: Node, child: Node) -> Node:
        """Move a lock from a node to its child."""
        assert node.locks > 0 and child.parent is node
        if child.locks:
            node.locks -= 1  # it counts the child already
        else:
            self.num_unlocked -= 1
        child.locks += 1
        return child

    def evict(self, num_pages: int) -> int:
        """Free up to this many pages, those least recently used first; how many it were."""
        freed = 0
        while freed < num_pages and self._leaves:
            last_used, _, node = heapq.heappop(self._leaves)
            if node.parent is None or node.locks or node.children:
                continue  # gone, or no longer a leaf that may go
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
        """Forget everything; what is locked goes when it is unlocked. Returns the pages freed at once."""
        freed = self.evict(self.num_unlocked)
        self._generation += 1
        self._roots.clear()
        return freed

    def _forget(self, root: Node) -> None:
        """Drop a root that holds nothing: salts are the callers', and many."""
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
