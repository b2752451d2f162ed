"""The marketer's pages: whom to reach, with what, along which way, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence

from serving.console.pages.marketing import audiences, coverage, experiments, exports, journeys, offers
from serving.console.visit import Page

PAGES: Sequence[Page] = [*audiences.PAGES, *offers.PAGES, *journeys.PAGES, *experiments.PAGES, *coverage.PAGES, *exports.PAGES]
"""In the order of the menu."""
