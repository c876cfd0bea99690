"""What is offered to clients beside the models themselves: adapters and variants of them, and pools.

An adapter or a variant is a name of its own for a model's engine: it is listed, permitted and counted by that name, and
the model that it belongs to is what is started, ages and sleeps. A pool is a name for whichever of its members is
loaded; what was chosen is permitted and counted by its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace

from vllmd.api.answers import Card
from vllmd.config.types import ModelConfig, PoolConfig, RequestRules
from vllmd.engines.base import Adapter
from vllmd.frozen import frozen


@frozen
class Offer:
    """An adapter or a variant of ``model``. ``path``: the adapter's. ``rules``: over those of the model."""

    name: str
    model: str
    path: str = ""
    is_adapter: bool = False
    rules: RequestRules = field(default_factory=RequestRules)
    display_name: str = ""
    description: str = ""
    hidden: bool = False

    def card(self, base: Card) -> Card:
        """The offer's card for ``/v1/models``: the model's, with the model as its parent, as of vLLM's adapters."""
        return replace(
            base,
            id=self.name,
            display_name=self.display_name or self.name,
            description=self.description,
            parent=self.model,
            root=self.path or self.model,
            hidden=self.hidden,
            aliases=(),
        )


class Offers:
    """All adapters, variants and pools, by name."""

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        pools: Mapping[str, PoolConfig],
        adapters_of: Callable[[ModelConfig], Mapping[str, Adapter]],
    ) -> None:
        self._offers: dict[str, Offer] = {}
        for model in models.values():
            if not (adapters := adapters_of(model)) and not model.variants:
                continue  # of ten thousand models nearly all have neither
            for offer in _offers_of(model, adapters):
                if offer.name not in models:
                    self._offers.setdefault(offer.name, offer)
        self._pools, self._members = dict(pools), dict[str, tuple[str, ...]]()
        if not pools:
            return
        named = {name: model.name for model in models.values() for name in (model.name, *model.aliases)}
        named |= {name: name for name in self._offers}
        # Members that are not configured here are for other machines, or not in the cache yet.
        self._members = {
            name: tuple(dict.fromkeys(named[member] for member in pool.models if member in named))
            for name, pool in pools.items()
        }

    def __iter__(self) -> Iterator[str]:
        return iter((*self._offers, *self._pools))

    def get(self, name: str) -> Offer | None:
        """The adapter or variant of this name."""
        return self._offers.get(name)

    def pool(self, name: str) -> Sequence[str] | None:
        """The members of a pool, by the names that they are offered by; None if there is no such pool."""
        return self._members.get(name)

    def opened_by(self, name: str) -> frozenset[str]:
        """What a key that names a model or an offer may use: of a model its variants, too, of a pool its members.

        An adapter is a model of its own: a key must name it.
        """
        members = self._members.get(name, ())
        opened = {name, *members}
        variants = {each.name for each in self._offers.values() if each.model in opened and not each.is_adapter}
        return frozenset(opened | variants)

    def cards(self, models: Sequence[Card]) -> Iterator[Card]:
        """All for ``/v1/models``, made of the cards of the models."""
        known = {card.id: card for card in models}
        for offer in self._offers.values():
            if offer.model in known:
                known[offer.name] = card = offer.card(known[offer.model])
                yield card
        for name, pool in self._pools.items():
            members = [known[member] for member in self._members[name] if member in known]
            if members:
                yield _pool_card(name, pool, members)


def _offers_of(model: ModelConfig, adapters: Mapping[str, Adapter]) -> Iterator[Offer]:
    """The adapters of a model, of the configuration and loaded at run time, and its variants."""
    for name, adapter in adapters.items():
        if name:
            config = model.adapters.get(name)
            about = (config.display_name, config.description, config.hidden) if config else ()
            yield Offer(name, model.name, adapter.path, True, RequestRules(set=adapter.members), *about)
    for name, variant in model.variants.items():
        about = (variant.display_name, variant.description, variant.hidden)
        yield Offer(name, model.name, "", False, variant.request, *about)


def _pool_card(name: str, pool: PoolConfig, members: Sequence[Card]) -> Card:
    """A pool's card: the abilities that all members have, and the state of the member that answers soonest."""
    able = set.intersection(*(set(card.capabilities) for card in members))
    lengths = [card.max_model_len for card in members if card.max_model_len]
    best = min(members, key=lambda card: ORDER.get(card.state, len(ORDER)))
    return replace(
        best,
        id=name,
        display_name=pool.display_name or name,
        description=pool.description,
        hidden=pool.hidden,
        aliases=(),
        members=tuple(card.id for card in members),
        capabilities=tuple(sorted(able)),
        max_model_len=min(lengths, default=None),
        parent=None,
        root=name,
    )


# How soon a model answers, by its state.
ORDER = {
    state: place
    for place, state in enumerate(
        ("running", "waking", "starting", "sleeping_l1", "falling_asleep", "draining", "sleeping_l2", "stopped")
    )
}
