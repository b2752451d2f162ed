"""What items are, in words: hashed texts of their attributes, so that an item that nobody bought yet has its like."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.feature_extraction import FeatureHasher

from models.recommender.neighbours import cosine

WIDTH = 2**18
COMMON = 2_000
"""A word that more items have says too little to be compared by."""
PORTION = 1_000
"""How many texts are compared at once."""
_WORD = re.compile(r"[^\W_]+")


class Contents:
    """The words of a model's items, each weighted by how rare it is; rows have length 1.

    Words are hashed, so that there is no vocabulary to keep (Weinberger et al., "Feature Hashing for Large Scale Multitask Learning",
    ICML 2009).
    """

    def __init__(self, vectors: sp.csr_matrix, rarity: NDArray[np.float32]) -> None:
        self.vectors, self.rarity = vectors, rarity
        self._by_word: sp.csr_matrix = vectors.T.tocsr()

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]]) -> Contents:
        """Of the words of each item (``words_of``)."""
        counted = _hashed(texts)
        items_with = np.bincount(counted.indices, minlength=WIDTH)
        rarity = np.log1p(len(texts) / np.maximum(items_with, 1)).astype(np.float32)
        # a word of half a small catalogue says as little, and of one that no item has nothing can be said
        rarity[(items_with > min(COMMON, max(0.5 * len(texts), 10))) | (items_with == 0)] = 0.0
        return cls(_weighted(counted, rarity), rarity)

    def similar(self, count: int) -> sp.csr_matrix:
        """For each item the *count* most alike others by cosine."""
        common = np.bincount(self.vectors.indices, minlength=WIDTH) > COMMON
        rare = self.vectors.multiply(~common[None, :]).tocsr() if common.any() else self.vectors
        rare.eliminate_zeros()
        used, columns = np.unique(rare.indices, return_inverse=True)
        narrow = sp.csr_matrix((rare.data, columns, rare.indptr), shape=(rare.shape[0], max(len(used), 1)))
        return cosine(narrow.T.tocsr(), count)

    def nearest(self, words: Sequence[str], count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The *count* items most like one of these words, and how like; costs as much as there are items that share one."""
        told = _weighted(_hashed([words]), self.rarity)
        alike = (told @ self._by_word).tocoo()
        order = np.lexsort((alike.col, -alike.data))[:count]
        return alike.col[order].astype(np.int32), alike.data[order].astype(np.float32)

    def closest(self, texts: Sequence[Sequence[str]]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """For each of many texts the item most like it, and how like; -1 and 0 where none shares a word. In portions."""
        places, likeness = np.full(len(texts), -1, np.int32), np.zeros(len(texts), np.float32)
        for start in range(0, len(texts), PORTION):
            alike = (_weighted(_hashed(texts[start : start + PORTION]), self.rarity) @ self._by_word).tocsr()
            rows = np.flatnonzero(np.diff(alike.indptr))
            order = np.lexsort((alike.indices, -alike.data, np.repeat(np.arange(alike.shape[0]), np.diff(alike.indptr))))
            best = order[alike.indptr[rows]]
            places[start + rows], likeness[start + rows] = alike.indices[best], alike.data[best]
        return places, likeness

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything to keep."""
        return {
            "content_offsets": self.vectors.indptr, "content_words": self.vectors.indices, "content_weights": self.vectors.data,
            "content_rarity": self.rarity,
        }  # fmt: skip

    @classmethod
    def read(cls, arrays: Mapping[str, NDArray[Any]]) -> Contents:
        """The inverse of ``arrays``."""
        offsets = arrays["content_offsets"]
        vectors = sp.csr_matrix((arrays["content_weights"], arrays["content_words"], offsets), shape=(len(offsets) - 1, WIDTH))
        return cls(vectors, arrays["content_rarity"])


def words_of(told: Mapping[str, Any]) -> list[str]:
    """The words of one item: each text attribute's whole value, and the words in it."""
    return list(_words(told))


def _words(told: Mapping[str, Any]) -> Iterator[str]:
    for name, value in told.items():
        for text in [value] if isinstance(value, str) else value if isinstance(value, list | tuple | np.ndarray) else ():
            lower = str(text).lower()
            yield f"{name}={lower}"
            yield from _WORD.findall(lower)


def _hashed(texts: Sequence[Sequence[str]]) -> sp.csr_matrix:
    if not texts:
        return sp.csr_matrix((0, WIDTH), dtype=np.float32)
    hasher = FeatureHasher(WIDTH, input_type="string", alternate_sign=False, dtype=np.float32)
    return hasher.transform([list(dict.fromkeys(words)) for words in texts]).tocsr()


def _weighted(counted: sp.csr_matrix, rarity: NDArray[np.float32]) -> sp.csr_matrix:
    weighted = counted.copy()
    weighted.data = rarity[counted.indices] * np.minimum(counted.data, 1.0)
    weighted.eliminate_zeros()
    lengths = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1))).ravel()
    weighted.data /= np.repeat(np.maximum(lengths, 1e-9), np.diff(weighted.indptr)).astype(np.float32)
    return weighted.astype(np.float32)
