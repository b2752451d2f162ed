"""What is in force: the champions with their pipelines, the offers and their terms, the policy, and the rates of sending."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from features.catalogue.nearest import Stores
from features.catalogue.offers import offers_in_force
from features.catalogue.shop import Shop
from features.catalogue.tables import STORES, Catalogue
from features.catalogue.yaml_file import WrittenError
from features.definitions.conditions import ConditionError, folds_of
from features.definitions.domain import domain_named
from features.definitions.segments import Vocabulary
from features.definitions.view import views_of
from features.state.disk import DamagedStateError
from features.state.home import Home
from features.store.feature_store import SERVICES
from models.attributes import Attributes
from models.decision import Pipeline
from models.inputs import Input
from models.kind import ModelKind
from models.next_best_offer import NextBestOffer
from models.offers import Offer, OfferBook
from models.recommender.recommender import Recommender
from models.recommender.shelf import Shelf
from models.registry import LoadedModel, ModelSettings, NoChampionError, Registry
from models.sending import SENDING, SendingRates
from serving.decide.governor import LAST_TOUCH, MESSAGES, POLICY, Governor
from serving.decide.merchandising import RULES, Merchandiser, TriedRules
from serving.decide.policy import Policy
from serving.decide.reader import STATE
from serving.decide.risk import LEAVING, Champion, ChurnRisk
from serving.decide.rule_checks import RuleChecks
from serving.decide.rule_shelf import RuleShelf
from serving.decide.rules import Rules, ShopRule
from serving.decide.terms import Terms

logger = logging.getLogger("ubiquo")
EVERYTHING = "customer_v1"
"""The FeatureService of all that is known of a customer."""


@dataclass(frozen=True)
class Loaded:
    """A champion with the pipeline that serves it."""

    model: LoadedModel
    pipeline: Pipeline[Any] | None
    attributes: Attributes = field(default_factory=lambda: Attributes({}))
    """Of what its pipeline chooses from."""
    positions: Mapping[str, int] = field(default_factory=dict)
    """Where in the attributes each of them stands."""
    label: Callable[[str], str] = str
    """What to call one of them."""
    shown: Callable[[str], Mapping[str, Any]] = lambda item_id: {}
    """What is shown of an item beside."""
    book: OfferBook | None = None
    """The offers that it chooses from."""
    terms: Terms | None = None
    """Their terms under the policy in force."""
    offers_digest: str = ""
    items_digest: str = ""
    """Which tables it was built on."""
    shelf: RuleShelf | None = None
    """Its items, as merchandising rules reach them."""
    goods: Shelf | None = None
    """Its items with what is known of each, as the catalogue stands."""


class Champions:
    """What is in force in one home; each part is read again by ``refresh``, and one that is broken leaves the one before in force."""

    def __init__(self, home: Home, registry: Registry) -> None:
        self._home = home
        self.registry = registry
        self.models: Mapping[str, ModelSettings] = self.registry.settings.models
        """The models that there are, by the name under which they are asked."""
        self._features = _feature_names(home)
        self._windowed = frozenset(views_of(Shop.load(home).domain)["customer_activity"].columns)
        self._loaded: dict[str, Loaded] = {}
        self.broken: dict[str, str] = {}
        """The models whose champion cannot be loaded, and files that are not in force, and why."""
        self._stores, self._stores_read = Stores(STORES.empty_table()), ""
        self._sending: SendingRates | None = None
        """By which channel and when messages are answered, once that was learnt."""
        self._sending_read: float | None = None
        self._rng = np.random.default_rng()
        self.risk = ChurnRisk(self._leaving)
        """How likely a customer is to leave."""
        self.governor = Governor(home, self.risk)
        self.rules = Rules(home, RuleChecks(home, lambda: self.governor.vocabulary))
        """What the shop pins, boosts and blocks."""
        self.merchandiser = Merchandiser(self.rules, self.governor)
        self.refresh()

    def refresh(self) -> list[str]:
        """Load champions that are new since the last call, offers and the policy; returns what was loaded."""
        news = [*self._refresh_policy(), *self._refresh_sending()]
        offers, items = Catalogue(self._home).digest("offers"), Catalogue(self._home).digest("items")
        for name, settings in self.models.items():
            version = self.registry.version_of(name, self.registry.settings.champion)
            held = self._loaded.get(name)
            if version is None:
                continue
            try:
                if held is not None and held.model.version == version:
                    # offers choose items by their attributes
                    reads = {"offers": (offers, items) != (held.offers_digest, held.items_digest), "items": items != held.items_digest}
                    if reads.get(settings.kind.answers):
                        # until that has worked it is tried again
                        self._loaded[name] = self._ready(settings.kind, held.model, offers, items)
                        self.broken.pop(name, None)
                        news.append(f"{held.model.label} with new {settings.kind.answers}")
                    self.broken.pop(name, None)
                    continue
                loaded = self.registry.load(f"{name}@{self.registry.settings.champion}")
                _describe(loaded.model, self._home)
                self._check_inputs(loaded.model)
                self._loaded[name] = self._ready(settings.kind, loaded, offers, items)
            except Exception as error:
                # the others go on, and so does the champion before, if there was one
                why = f"version {version} cannot be loaded: {error}"[:300]
                if self.broken.get(name) != why:
                    logger.exception("%s: version %s cannot be loaded", name, version)
                self.broken[name] = why
                continue
            self.broken.pop(name, None)
            news.append(loaded.label)
        if (stores := Catalogue(self._home).digest("stores")) != self._stores_read:
            place = Catalogue(self._home).path("stores")
            known = Catalogue(self._home).read("stores") if place.exists() else STORES.empty_table()
            self._stores, self._stores_read = Stores(known), stores
        self._refresh_rules()
        return news

    def under(self, rules: Sequence[ShopRule]) -> Self:
        """The same, as it would answer under other rules, the strongest first. One that is only tried needs an id that no other has: what
        a rule reaches is kept by its id, and forgotten with the next ``refresh``.
        """
        tried = copy(self)
        tried.merchandiser = Merchandiser(TriedRules(tuple(rules)), self.governor)
        return tried

    def _refresh_rules(self) -> None:
        """Find out what the rules reach before anybody asks, and which of them do not act."""
        shelves = [held.shelf for held in self._loaded.values() if held.shelf is not None]
        if (why := self.merchandiser.refresh(shelves)) is None:
            self.broken.pop(RULES, None)
        else:
            self.broken[RULES] = why

    def _refresh_policy(self) -> list[str]:
        try:
            policy, vocabulary = self.governor.read()
            if policy == self.governor.policy and vocabulary == self.governor.vocabulary:
                self.broken.pop(POLICY, None)
                return []
            # offers that name what is no more keep the segments that have it
            ready = {name: self._with_terms(name, held, vocabulary, policy) for name, held in self._loaded.items()}
        except (WrittenError, ConditionError, DamagedStateError, OSError) as error:
            if self.broken.get(POLICY) != (why := f"the policy before stays in force: {error}"):
                logger.error("%s", why)
            self.broken[POLICY] = why
            return []
        self._loaded, self.governor.policy, self.governor.vocabulary = ready, policy, vocabulary
        self.broken.pop(POLICY, None)
        return [POLICY]

    def _with_terms(self, name: str, held: Loaded, vocabulary: Vocabulary, policy: Policy) -> Loaded:
        """A champion under another policy: on the tables as they are now, where those and the policy were changed together."""
        tables = Catalogue(self._home)
        offers, items = tables.digest("offers"), tables.digest("items")
        if held.book is not None and (offers, items) != (held.offers_digest, held.items_digest):
            try:
                return self._ready(self.models[name].kind, held.model, offers, items, vocabulary, policy)
            except Exception as error:
                # it is told, and tried again, with the tables
                logger.warning("%s cannot take its new tables with the new policy: %s", name, error)
        return replace(held, terms=_terms(held.book, vocabulary, policy))

    def _refresh_sending(self) -> list[str]:
        path = self._home.root / SENDING
        changed = path.stat().st_mtime if path.exists() else None
        if changed == self._sending_read:
            return []
        try:
            self._sending = None if changed is None else SendingRates.load(path)
        except (ValueError, KeyError, OSError) as error:
            # the rates before go on
            self.broken[SENDING] = f"it cannot be read: {error}"[:300]
            return []
        self._sending_read = changed
        self.broken.pop(SENDING, None)
        return [SENDING]

    def _check_inputs(self, model: Any) -> None:
        """See that everything that the model was trained on is still computed: more may be by now.

        Raises:
            ValueError: something is not.
        """
        wanted = [each.name for each in getattr(model, "customer", getattr(model, "inputs", ()))]
        if missing := [name for name in wanted if name not in self._features]:
            raise ValueError(f"it was trained on features that this version does not compute: {', '.join(missing)}: train again")

    def reads(self, name: str, channels: Sequence[str | None]) -> tuple[str, ...]:
        """The folds that must be told of a customer whom an answer of that model is to reach by one of *channels*."""
        held = self._loaded.get(name)
        folds = self.governor.reads(channels, held.terms if held is not None else None)
        if self._sending is None or all(channel is None for channel in channels):
            return folds
        # how they answered what was sent to them
        return tuple(sorted({*folds, MESSAGES, LAST_TOUCH}))

    def reading(self, name: str) -> ModelSettings:
        """What a question to that model reads of a customer: what the model asks, and what the conditions of merchandising rules do."""
        settings = self.models[name]
        if settings.kind.answers != "items" or not (needs := self.merchandiser.needs()):
            return settings
        kind, folds = settings.kind, folds_of(needs)
        if needs & self._windowed or (folds and STATE not in kind.views):
            settings = replace(settings, feature_service=EVERYTHING)
            kind = replace(kind, views=tuple(dict.fromkeys((*kind.views, *SERVICES[EVERYTHING]))))
        return replace(settings, kind=replace(kind, folds=tuple(dict.fromkeys((*kind.folds, *folds)))))

    def limited(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """The budgets and the stocks of the offers in force, by offer."""
        terms = [held.terms for held in self._loaded.values() if held.terms is not None]
        budgets = {offer: limit for each in terms for offer, limit in each.budgets.items()}
        return budgets, {offer: limit for each in terms for offer, limit in each.stocks.items()}

    def services(self) -> dict[str, tuple[str, ...]]:
        """The FeatureService of each model, with the views that it reads."""
        return self.registry.settings.services()

    def missing(self) -> list[str]:
        """The models that have no champion."""
        return [name for name in self.models if name not in self._loaded]

    def _ready(
        self,
        kind: ModelKind,
        loaded: LoadedModel,
        offers_digest: str,
        items: str,
        vocabulary: Vocabulary | None = None,
        policy: Policy | None = None,
    ) -> Loaded:
        """The champion with what serves it, built on the tables of these digests, under the policy in force or another."""
        if kind.answers == "items":
            trained: Recommender = loaded.model
            stocked = trained.stocked(Catalogue(self._home).read("items").to_pydict())
            shelf = RuleShelf(stocked.shelf.ids, stocked.positions, stocked.attributes, stocked.shelf.popularity_share)
            return Loaded(
                loaded,
                stocked.pipeline,
                attributes=stocked.attributes,
                positions=stocked.positions,
                label=stocked.label,
                shown=stocked.shown,
                items_digest=items,
                shelf=shelf,
                goods=stocked.shelf,
            )
        if kind.answers == "offers":
            offers: NextBestOffer = loaded.model
            book = offers.book(Offer.from_row(row) for row in offers_in_force(self._home))
            terms = _terms(book, vocabulary or self.governor.vocabulary, policy or self.governor.policy)
            return Loaded(
                loaded, offers.pipeline(book), book.attributes, book=book, terms=terms, offers_digest=offers_digest, items_digest=items
            )
        return Loaded(loaded, None)

    def champion(self, name: str) -> Loaded:
        """The champion of that model.

        Raises:
            NoChampionError: there is none.
        """
        try:
            return self._loaded[name]
        except KeyError:
            detail = f"no champion for {name}: train and promote one (python -m training {name})"
            if name in self.broken:
                detail = f"the champion for {name} cannot be loaded: train and promote another, or roll back (python -m training rollback)"
            raise NoChampionError(detail) from None

    def _leaving(self) -> Champion | None:
        """The champion that tells how likely a customer is to leave, and the base rate that it was trained on."""
        name = next((name for name, model in self.models.items() if model.kind.name == LEAVING), "")
        if (held := self._loaded.get(name)) is None:
            return None
        rate = held.model.tags.get("base_rate")
        return held.model.model, None if rate is None else float(rate)

    def views_of(self, name: str) -> tuple[str, ...]:
        """The feature views that a model reads."""
        return self.models[name].kind.views if name in self.models else ()


def _describe(model: Any, home: Home) -> None:
    """Let a champion of the time before models carried their phrases speak like any other."""
    customer = getattr(model, "customer", getattr(model, "inputs", ()))
    if not customer or any(each.phrase for each in customer):
        return
    features = domain_named(Shop.load(home).domain).customer
    known = {f.name: Input(f.name, f.phrase, f.unknown, direction=f.direction, low=f.low, high=f.high, is_age=f.is_age) for f in features}
    told = tuple(known.get(each.name, each) for each in customer)
    if hasattr(model, "customer"):
        model.customer, model.inputs = told, (*told, *model.inputs[len(told) :])
    else:
        model.inputs = told


def _feature_names(home: Home) -> frozenset[str]:
    """Everything that the views of the home's shop tell of a customer."""
    views = views_of(Shop.load(home).domain).values()
    return frozenset(name for view in views if view.key == "customer_id" for name in view.columns)


def _terms(book: OfferBook | None, vocabulary: Vocabulary, policy: Policy) -> Terms | None:
    return None if book is None else Terms(book, vocabulary, policy)
