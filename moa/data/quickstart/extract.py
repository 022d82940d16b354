"""Business notes and the JSON record of their facts. The notes themselves are in `notes.yaml`.

Dates become ISO 8601, times 24-hour, amounts plain numbers beside a currency code, quantities in words integers.
"""

import json
import random
from dataclasses import dataclass

from moa.data.quickstart.bank import Row, distinct, joined, load, words

INSTRUCTIONS = words(
    "Return {keys} as JSON.|Extract {keys} into a JSON object.|Read the text and give JSON with {keys}.|"
    "Which {keys} does the text state? Answer in JSON.|Turn this into JSON with the keys {keys}.|"
    "Give a JSON record of {keys}.|Fill a JSON object with {keys}.")
KEY_COUNTS = (3, 3, 4)   # keys in an instruction: three twice as often as four
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
Fact = tuple[str, dict[str, Value]]   # its wording in the text, and its entries of the record


@dataclass(frozen=True)
class Note:
    """The kinds of a note's facts by their keys, and its wordings. A kind is a name or a list of values."""

    facts: dict[str, str | list[str]]
    texts: list[str]


# Each of the following functions, which KINDS lists, draws a fact of one kind for the key `key`.

def day(rng: random.Random, key: str) -> Fact:
    year, month, number = rng.randint(2019, 2026), rng.randint(1, 12), rng.randint(1, 28)
    name = MONTHS[month - 1]
    written = rng.choice((f"{number} {name} {year}", f"{name} {number}, {year}", f"{number} {name[:3]} {year}",
                          f"{number:02}.{month:02}.{year}", f"{name[:3]} {number}, {year}"))
    return written, {key: f"{year}-{month:02}-{number:02}"}


def time(rng: random.Random, key: str) -> Fact:
    hour, minute = rng.randint(7, 20), rng.choice((0, 5, 15, 20, 30, 40, 45))
    half, twelve = ("am" if hour < 12 else "pm"), (hour - 1) % 12 + 1
    short = f"{twelve} {half}" if minute == 0 else f"{twelve}:{minute:02} {half}"
    return rng.choice((short, short, f"{hour:02}:{minute:02}")), {key: f"{hour:02}:{minute:02}"}


def money(rng: random.Random, key: str) -> Fact:
    code = rng.choice(tuple(CURRENCIES))
    amount: int | float = rng.choice((rng.randint(10, 99), rng.randint(1, 9) * 100 + 50, rng.randint(1001, 9999)))
    if code != "JPY" and rng.random() < 0.3:
        amount += rng.choice((0.5, 0.25, 0.75, 0.9))
    written = f"{amount:,}" if isinstance(amount, int) else f"{amount:,.2f}"
    return rng.choice(CURRENCIES[code]).format(written), {key: amount, "currency": code}


def quantity(rng: random.Random, key: str) -> Fact:
    if rng.random() < 0.4:
        number = rng.randint(2, 90)
        return str(number), {key: number}
    word, number = rng.choice(QUANTITIES)
    return word, {key: number}


def weight(rng: random.Random, key: str) -> Fact:
    grams = rng.choice((rng.randint(2, 19) * 50, rng.randint(2, 90) * 500))
    kilograms = grams // 1000 if grams % 1000 == 0 else grams / 1000
    return (f"{grams} g" if grams < 1000 else f"{kilograms} kg"), {key: kilograms}


def code(rng: random.Random, key: str) -> Fact:
    written = f"{rng.choice('ABDFHKMPRTX')}{rng.choice('CEGJLNSVZ')}-{rng.randint(100, 999)}"
    return written, {key: written}


def yes_no(rng: random.Random, key: str) -> Fact:
    """Whether something is paid, stated in words."""
    paid = rng.random() < 0.5
    return rng.choice(("already paid", "settled") if paid else ("still unpaid", "not yet paid")), {key: paid}


KINDS = {"day": day, "time": time, "money": money, "quantity": quantity, "weight": weight, "code": code,
         "yes_no": yes_no}
BANKS = {"person": PEOPLE, "company": COMPANIES, "city": CITIES}


def draw_fact(rng: random.Random, key: str, kind: str | list[str]) -> Fact:
    """A fact of `kind`: a name in `KINDS` or `BANKS`, or a list of its possible values."""
    if isinstance(kind, str) and kind in KINDS:
        return KINDS[kind](rng, key)
    value = rng.choice(BANKS[kind] if isinstance(kind, str) else kind)
    return value, {key: value}


def draw(note: Note, rng: random.Random) -> Row:
    """A row of this note with random facts and wording."""
    written: dict[str, str] = {}
    facts: dict[str, Value] = {}
    for key, kind in note.facts.items():
        written[key], stated = draw_fact(rng, key, kind)
        facts |= stated
    keys = rng.sample(tuple(facts), min(rng.choice(KEY_COUNTS), len(facts)))
    text = rng.choice(note.texts).format_map(written)
    return {
        "instruction": rng.choice(INSTRUCTIONS).format(keys=joined(keys)),
        "input": text[0].upper() + text[1:],
        "output": json.dumps({key: facts[key] for key in keys}, ensure_ascii=False),
    }


def generate(rng: random.Random, rows: int) -> list[Row]:
    """`rows` rows of the corpus, or fewer where no more differ enough."""
    notes = [Note(**entry) for entry in load("notes")]
    return distinct(lambda: draw(rng.choice(notes), rng), rows)
