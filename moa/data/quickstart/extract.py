"""Business notes and the JSON record of what they say. Knows how facts are written and normalised, not which notes.

Dates become ISO 8601, times 24-hour, amounts plain numbers beside a currency code, quantities in words integers.
"""

import json
import random

from moa.data.quickstart.bank import Row, distinct, joined, words
from moa.data.quickstart.notes import NOTES, Note

ASKED = words(
    "Return {keys} as JSON.|Extract {keys} into a JSON object.|Read the text and give JSON with {keys}.|"
    "Which {keys} does the text state? Answer in JSON.|Turn this into JSON with the keys {keys}.|"
    "Give a JSON record of {keys}.|Fill a JSON object with {keys}.")
KEYS_ASKED = (3, 3, 4)
MONTHS = words("January|February|March|April|May|June|July|August|September|October|November|December")
CURRENCIES: dict[str, tuple[str, ...]] = {
    "EUR": words("EUR {}|{} euros|{} EUR|€{}"), "USD": words("USD {}|${}|{} US dollars"),
    "GBP": words("GBP {}|£{}|{} pounds"), "CHF": words("CHF {}|{} francs"), "JPY": words("JPY {}|¥{}|{} yen"),
    "SEK": words("SEK {}|{} Swedish kronor"), "INR": words("INR {}|₹{}|{} rupees"),
}
QUANTITIES = (("two", 2), ("three", 3), ("four", 4), ("five", 5), ("six", 6), ("seven", 7), ("eight", 8), ("nine", 9),
              ("ten", 10), ("eleven", 11), ("a dozen", 12), ("fifteen", 15), ("twenty", 20), ("two dozen", 24),
              ("thirty", 30), ("half a dozen", 6))
PEOPLE = words("Ana Ruiz|Tom Berg|Li Wei|Sara Khan|Ivan Petrov|Mia Olsen|Omar Haddad|Julia Stein|Ravi Nair|Emma Clark|"
               "Noah Fischer|Chloe Martin|Kofi Mensah|Lena Vogel|Pablo Soto|Aiko Tanaka")
COMPANIES = words("Nordlicht GmbH|Acme Tools|Bluefin Ltd|Harbor Foods|Solano Paper|Kestrel Labs|Maple & Sons|"
                  "Orbit Print|Tessera AG|Delta Cables|Quill Books|Verde Farms|Polar Pumps|Cobalt Optics")
CITIES = words("Lyon|Oslo|Porto|Vienna|Dublin|Turin|Ghent|Malmo|Cork|Basel|Leeds|Krakow|Boston|Osaka|Pune|Zurich")

Value = str | int | float
# What is written in the text, and the facts it states.
Drawn = tuple[str, dict[str, Value]]


def day(rng: random.Random, key: str) -> Drawn:
    year, month, number = rng.randint(2019, 2026), rng.randint(1, 12), rng.randint(1, 28)
    name = MONTHS[month - 1]
    written = rng.choice((f"{number} {name} {year}", f"{name} {number}, {year}", f"{number} {name[:3]} {year}",
                          f"{number:02}.{month:02}.{year}", f"{name[:3]} {number}, {year}"))
    return written, {key: f"{year}-{month:02}-{number:02}"}


def time(rng: random.Random, key: str) -> Drawn:
    hour, minute = rng.randint(7, 20), rng.choice((0, 5, 15, 20, 30, 40, 45))
    half, twelve = ("am" if hour < 12 else "pm"), (hour - 1) % 12 + 1
    short = f"{twelve} {half}" if minute == 0 else f"{twelve}:{minute:02} {half}"
    return rng.choice((short, short, f"{hour:02}:{minute:02}")), {key: f"{hour:02}:{minute:02}"}


def money(rng: random.Random, key: str) -> Drawn:
    code = rng.choice(tuple(CURRENCIES))
    amount: int | float = rng.choice((rng.randint(10, 99), rng.randint(1, 9) * 100 + 50, rng.randint(1001, 9999)))
    if code != "JPY" and rng.random() < 0.3:
        amount += rng.choice((0.5, 0.25, 0.75, 0.9))
    written = f"{amount:,}" if isinstance(amount, int) else f"{amount:,.2f}"
    return rng.choice(CURRENCIES[code]).format(written), {key: amount, "currency": code}


def quantity(rng: random.Random, key: str) -> Drawn:
    if rng.random() < 0.4:
        number = rng.randint(2, 90)
        return str(number), {key: number}
    word, number = rng.choice(QUANTITIES)
    return word, {key: number}


def weight(rng: random.Random, key: str) -> Drawn:
    grams = rng.choice((rng.randint(2, 19) * 50, rng.randint(2, 90) * 500))
    kilograms = grams // 1000 if grams % 1000 == 0 else grams / 1000
    return (f"{grams} g" if grams < 1000 else f"{kilograms} kg"), {key: kilograms}


def code(rng: random.Random, key: str) -> Drawn:
    written = f"{rng.choice('ABDFHKMPRTX')}{rng.choice('CEGJLNSVZ')}-{rng.randint(100, 999)}"
    return written, {key: written}


def yes_no(rng: random.Random, key: str) -> Drawn:
    """A status that is stated in passing: `done` in the text decides true or false."""
    done = rng.random() < 0.5
    return rng.choice(("already paid", "settled") if done else ("still unpaid", "not yet paid")), {key: done}


KINDS = {"day": day, "time": time, "money": money, "quantity": quantity, "weight": weight, "code": code,
         "yes_no": yes_no}
BANKS = {"person": PEOPLE, "company": COMPANIES, "city": CITIES}


def draw_fact(rng: random.Random, key: str, kind: str) -> Drawn:
    """A fact of `kind`: one of `KINDS`, the name of a bank, or a bank itself written as `one|two`."""
    if kind in KINDS:
        return KINDS[kind](rng, key)
    value = rng.choice(BANKS.get(kind) or words(kind))
    return value, {key: value}


def tell(note: Note, rng: random.Random) -> Row:
    written: dict[str, str] = {}
    facts: dict[str, Value] = {}
    for key, kind in note.facts.items():
        written[key], stated = draw_fact(rng, key, kind)
        facts |= stated
    keys = rng.sample(tuple(facts), min(rng.choice(KEYS_ASKED), len(facts)))
    text = rng.choice(note.tellings).format_map(written)
    return {
        "instruction": rng.choice(ASKED).format(keys=joined(keys)),
        "input": text[0].upper() + text[1:],
        "output": json.dumps({key: facts[key] for key in keys}, ensure_ascii=False),
    }


def generate(rng: random.Random, rows: int) -> list[Row]:
    return distinct(lambda: tell(rng.choice(NOTES), rng), rows)
