"""An invented fashion shop's export, as its own systems would write it: receipts and products of an Italian till, web events as JSON lines.

``python tests/fashion_shop.py FOLDER [LAST-DAY]`` writes 2,000 customers over 14 months; the same seed gives the same files. Nothing in it is real.
Each customer likes some styles and colours, comes in a rhythm of their own, and some stop coming.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np

STYLES = ("casual", "elegante", "sportivo", "rock")
COLOURS = ("rosso", "blu", "nero", "bianco", "verde", "beige")
SIZES = ("XS", "S", "M", "L", "XL")
KINDS = {"Donna": ("Abito", "Gonna", "Camicetta", "Giacca"), "Uomo": ("Camicia", "Pantaloni", "Giacca", "Maglione")}
BRANDS = ("Corsari", "Lumière", "Nordwind")
STORES = ("Milano Duomo", "Roma Prati", "Bologna")
ZONE = ZoneInfo("Europe/Rome")
ORDERS = "Data;Ora;Negozio;Canale;N. scontrino;Tessera;Email;Codice articolo;Descrizione;Quantità;Prezzo;Importo"
PRODUCTS = "Codice articolo;Prodotto;Reparto;Categoria;Marca;Colore;Stile;Taglia;Prezzo;Immagine"


@dataclass(frozen=True)
class Product:
    """One variant of the shop's collection."""

    code: str
    department: str
    kind: str
    brand: str
    colour: str
    style: str
    size: str
    cents: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.style} {self.colour} – {self.brand}"


def euros(cents: int) -> str:
    """1234567 cents are 12.345,67."""
    return f"{cents / 100:,.2f}".translate(str.maketrans(",.", ".,"))


def collection(rng: np.random.Generator, count: int) -> list[Product]:
    products = []
    for k in range(count):
        department = str(rng.choice(list(KINDS)))
        kind, style = str(rng.choice(KINDS[department])), str(rng.choice(STYLES))
        base = 120_000 if kind == "Giacca" and style == "elegante" else 4_000
        products.append(
            Product(
                f"{'DU'[department == 'Uomo']}{k:05}", department, kind, str(rng.choice(BRANDS)), str(rng.choice(COLOURS)), style,
                str(rng.choice(SIZES)), base + 500 * int(rng.integers(0, 20)) + 90,
            )
        )  # fmt: skip
    return products


class FashionShop:
    """Everything that the shop has recorded up to *end*."""

    def __init__(self, customers: int = 2_000, days: int = 425, products: int = 400, seed: int = 7, end: datetime | None = None) -> None:
        self.rng = np.random.default_rng(seed)
        self.end = end or datetime(2024, 6, 1, tzinfo=ZONE)
        self.days, self.customers = days, customers
        self.products = collection(self.rng, products)
        self.orders: list[str] = []
        self.events: list[tuple[datetime, dict[str, object]]] = []
        self._receipts: dict[tuple[str, str], int] = {}
        for number in range(customers):
            self._live(number)
        self.orders.sort(key=lambda line: (line[6:10], line[3:5], line[:2], line.split(";")[1], line.split(";")[4]))
        self.events.sort(key=lambda each: each[0])

    def _live(self, number: int) -> None:
        """One customer's visits: on the web first, then a purchase, sometimes a return; some stop coming."""
        rng = self.rng
        card, mail = f"F{100000 + number}", f"cliente{number}@example.org" if number % 3 else ""
        style, colour = rng.choice(STYLES), rng.choice(COLOURS)
        weights = np.array([(6.0 if p.style == style else 1.0) * (3.0 if p.colour == colour else 1.0) for p in self.products])
        weights /= weights.sum()
        gap = float(rng.choice([14, 25, 40, 60], p=[0.25, 0.35, 0.25, 0.15]))
        stays = self.days if rng.random() < 0.7 else rng.uniform(0.2, 0.9) * self.days
        day = rng.exponential(gap)
        home, cookie = str(rng.choice(STORES)), f"ck-{number:06d}-{int(rng.integers(1e6)):06d}"
        while day < stays:
            at = (self.end - timedelta(days=self.days)).replace(hour=10) + timedelta(days=int(day), minutes=int(rng.integers(0, 540)))
            looked = [self.products[k] for k in rng.choice(len(self.products), size=int(rng.integers(1, 5)), p=weights)]
            if rng.random() < 0.6:
                self._browse(at - timedelta(minutes=90), cookie, card if rng.random() < 0.3 else None, looked)
            self._buy(at, home if rng.random() < 0.7 else "Online", card, mail, looked[: int(rng.integers(1, 4))])
            day += max(1.0, rng.gamma(2.0, gap / 2.0))

    def _browse(self, at: datetime, cookie: str, card: str | None, looked: list[Product]) -> None:
        for k, product in enumerate(looked):
            name = "view_item" if k or self.rng.random() < 0.8 else "add_to_cart"
            moment = at + timedelta(seconds=40 * k)
            said = {"event": name, "ts": moment.isoformat(), "visitor": {"cookie": cookie, "card": card}, "sku": product.code}
            self.events.append((moment, said))

    def _buy(self, at: datetime, where: str, card: str, mail: str, bought: list[Product]) -> None:
        known = card if self.rng.random() < 0.95 else ""
        self._receipt(at, where, known, mail if known else "", [(each, int(self.rng.integers(1, 3))) for each in bought], "")
        if known and self.rng.random() < 0.06 and (back := at + timedelta(days=4)) < self.end:
            self._receipt(back, where, known, mail, [(bought[0], -1)], "R")

    def _receipt(self, at: datetime, where: str, card: str, mail: str, lines: list[tuple[Product, int]], letter: str) -> None:
        # every till counts anew each day
        key = (where, f"{at:%Y-%m-%d}")
        self._receipts[key] = number = self._receipts.get(key, 0) + 1
        channel = "Online" if where == "Online" else "Negozio"
        for product, quantity in {product.code: (product, quantity) for product, quantity in lines}.values():
            fields = [
                f"{at:%d/%m/%Y}", f"{at:%H:%M}", where, channel, f"{letter}{number}", card, mail, product.code, product.name, f"{quantity}",
                euros(product.cents), euros(product.cents * quantity),
            ]  # fmt: skip
            self.orders.append(";".join(fields))

    def write(self, folder: Path) -> tuple[Path, Path, Path]:
        """Write orders and products as Excel does, and web events as JSON lines."""
        folder.mkdir(parents=True, exist_ok=True)
        orders, products, events = folder / "vendite.csv", folder / "prodotti.csv", folder / "web.jsonl"
        orders.write_bytes("\r\n".join([ORDERS, *self.orders, ""]).encode("windows-1252"))
        rows = [
            f"{p.code};{p.name};{p.department};{p.kind};{p.brand};{p.colour};{p.style};{p.size};{euros(p.cents)};https://img.example.org/{p.code}.jpg"
            for p in self.products
        ]
        products.write_bytes("\r\n".join([PRODUCTS, *rows, ""]).encode("windows-1252"))
        events.write_text("".join(json.dumps(said) + "\n" for _, said in self.events))
        return orders, products, events


if __name__ == "__main__":
    # a day as YYYY-MM-DD on which the data ends: those who try the service want data that end now
    end = datetime.fromisoformat(sys.argv[2]).replace(tzinfo=ZONE) if len(sys.argv) > 2 else None
    for path in FashionShop(end=end).write(Path(sys.argv[1])):
        print(path)
