"""Which chunks of prompts are kept, and where: a trie of chunks, in plain Python. The keys and values lie elsewhere.

Each node stands for a chunk of tokens after those of its parents, under one key, such as that of the weights. Chunks
are compared token by token. When there is no place left, the chunk goes that was not used for the longest time, of
those that no other one follows.
"""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass
class Node:
    """A chunk that is kept in a place."""

    place: int
    parent: "Node | None"
    tokens: tuple[int, ...]
    used: int = 0
    children: dict[tuple[int, ...], "Node"] = field(default_factory=dict)


class Prefixes:
    """The chunks that are kept, in at most `n_places` places, each of `size` tokens."""

    def __init__(self, n_places: int, size: int) -> None:
        self.size = size
        self.free = list(range(n_places))[::-1]
        self.roots: dict[Hashable, Node] = {}
        self.nodes: dict[int, Node] = {}  # By place.
        self.clock = itertools.count(1)

    def chunks(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """The whole chunks of tokens."""
        for start in range(0, len(tokens) - self.size + 1, self.size):
            yield tuple(tokens[start : start + self.size])

    def find(self, key: Hashable, tokens: Sequence[int]) -> list[int]:
        """The places of the longest kept prefix of tokens, a place a chunk."""
        return [node.place for node in self._path(key, tokens)]

    def _path(self, key: Hashable, tokens: Sequence[int]) -> list[Node]:
        path: list[Node] = []
        node = self.roots.get(key)
        for chunk in self.chunks(tokens):
            node = node and node.children.get(chunk)
            if node is None:
                break
            path.append(node)
        now = next(self.clock)
        for node in path:
            node.used = now
        return path

    def add(self, key: Hashable, tokens: Sequence[int]) -> int | None:
        """The place for the last whole chunk of tokens, if it is to be written there now.

        None when it is kept already, when those before it are not, or when there is no place for it.
        """
        path = self._path(key, tokens)
        chunk = list(self.chunks(tokens))[len(path) :]
        if len(chunk) != 1:
            return None
        place = self.free.pop() if self.free else self._evict(path)
        if place is None:
            return None
        parent = path[-1] if path else self.roots.setdefault(key, Node(-1, None, ()))
        node = Node(place, parent, chunk[0], next(self.clock))
        parent.children[chunk[0]] = self.nodes[place] = node
        return place

    def _evict(self, path: list[Node]) -> int | None:
        leaves = [node for node in self.nodes.values() if not node.children and node not in path[-1:]]
        if not leaves:
            return None
        node = min(leaves, key=lambda node: node.used)
        assert node.parent is not None
        del node.parent.children[node.tokens], self.nodes[node.place]
        return node.place
