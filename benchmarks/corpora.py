"""Real and made corpora for benchmarks that must be judged on data that nobody tuned to.

Two disjoint pools: rules and constants are chosen on "choose" only, and "report" reports. `kin` names the near
neighbours of a corpus, in both pools: a router confuses them first.

    report   the five quickstart corpora; nine of ../shared/data as they are (algebra, bash, code, math, medicine,
             notes, papers, tools, trivia); two SQL databases; ten groups of ten intents; four made corpora
    choose   two SQL databases; five groups of ten intents; eight made corpora, which are four pairs of neighbours

SQL rows have no "Database NAME." before the question, and their group is the query without its literals
(moa/data/splits.py); of the others, rows with the same prompt are a group. The other four databases have fewer than
LEAST groups of rows that are short enough, and are left out. Intents: the sorted names are shuffled by INTENT_SEED and
cut into groups of ten; the answer is the intent's name; `oos` rows are left out. Made corpora come from small
generators, seeded by their names.

`split` cuts a corpus by group, in an order that depends on content alone. Rows longer than MAX_TOKENS are dropped:
of `tools`, `papers` and `medicine` the shorter rows are left.
"""

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moa.core.config import Domain
from moa.data import splits
from moa.data.quickstart import generate

Pool = Literal["choose", "report"]
Split = Literal["train", "validation", "test", "further"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test", "further")

MAX_TOKENS = 320         # of prompt and answer; longer rows are dropped
TEST_GROUPS, TEST_ROWS_A_GROUP = 40, 2
VALIDATION_GROUPS = 40   # a row each
TRAIN_GROUPS, TRAIN_ROWS = 120, 160
CALIBRATION_GROUPS = 480   # of train, validation and further together; further has a row a group, for features only
LEAST = TEST_GROUPS + VALIDATION_GROUPS + 50   # groups of a corpus
MADE_ROWS = 600
QUICKSTART_ROWS = 1000
INTENT_SEED = "intents"
SQL = Domain(metric="sql")   # as prepare would group its rows

WHOLE = ("algebra", "bash", "code", "math", "medicine", "notes", "papers", "tools", "trivia")   # each one corpus
REPORT_DATABASES, CHOOSE_DATABASES = ("advising", "geography"), ("academic", "scholar")
REPORT_INTENTS, ALL_INTENTS = 10, 15   # groups of ten intents: the first ones report, the others choose


@dataclass(frozen=True)
class Row:
    """A question, its answer, and the group of rows that depend on each other."""

    prompt: str
    answer: str
    group: str

    @property
    def id(self) -> str:
        return hashlib.sha256(json.dumps([self.prompt, self.answer]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """A corpus of one pool; `kin` are names of near neighbours, in both pools."""

    name: str
    kin: tuple[str, ...]
    pool: Pool
    rows: tuple[Row, ...]


def corpora(shared: Path, pool: Pool) -> list[Corpus]:
    """The corpora of a pool, by name. Exits with a message where the shared ones are absent."""
    needed = [*WHOLE, "sql", "intents"]
    if missing := [name for name in needed if not (shared / f"{name}.jsonl").is_file()]:
        sys.exit(f"No {', '.join(f'{name}.jsonl' for name in missing)} in {shared}: this benchmark is judged on these "
                 "real corpora; name their folder by --shared.")
    rows = {"report": _report(shared), "choose": _choose(shared)}
    names = [name for each in rows.values() for name in each]
    return [Corpus(name, kin(name, names), pool, tuple(each)) for name, each in sorted(rows[pool].items())]


def _report(shared: Path) -> dict[str, list[Row]]:
    found = {f"quickstart {name}": quickstart_rows(name, QUICKSTART_ROWS, f"{name}:0") for name in generate.NAMES}
    found |= {f"shared {name}": _rows(_read(shared, name)) for name in WHOLE}
    found |= _databases(shared, REPORT_DATABASES)
    intents = _intents(shared)
    found |= {name: intents[name] for name in list(intents)[:REPORT_INTENTS]}
    return found | {f"made {name}": made(name, make) for name, make in MADE_REPORT.items()}


def quickstart_rows(name: str, count: int, seed: str) -> list[Row]:
    """Rows of a quickstart generator with different prompts: fewer than `count` where it repeats itself."""
    return _rows(generate.GENERATORS[name](random.Random(seed), count), by_query=name == "sql")


def _choose(shared: Path) -> dict[str, list[Row]]:
    found = _databases(shared, CHOOSE_DATABASES)
    intents = _intents(shared)
    found |= {name: intents[name] for name in list(intents)[REPORT_INTENTS:]}
    return found | {f"made {name}": made(name, make) for name, make in MADE_CHOOSE.items()}


# Real corpora.

def _read(shared: Path, name: str) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in (shared / f"{name}.jsonl").open(encoding="utf-8")]
    return [_flat(row) for row in rows] if name == "tools" else rows


def _flat(row: Mapping[str, list[dict]]) -> dict[str, str]:
    """A conversation with tools as one prompt, which lists the functions, and one answer, the calls as text."""
    functions = [_function(tool["function"]) for tool in row["tools"]]
    said = [message["content"] for message in row["messages"] if message["role"] != "assistant"]
    last = row["messages"][-1]
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in last.get("tool_calls") or []]
    return {"instruction": "\n".join([*said, "", "Functions:", *functions]),
            "output": "\n".join(calls) or last["content"]}


def _function(function: Mapping) -> str:
    names = ", ".join(function["parameters"].get("properties", {}))
    return f"{function['name']}({names}): {function['description']}"


def _rows(records: Iterable[Mapping[str, str]], by_query: bool = False) -> list[Row]:
    """Rows with different prompts; of one prompt with several answers the first stays."""
    found: dict[str, Row] = {}
    for record in records:
        prompt = "\n\n".join(record[key].strip() for key in ("instruction", "input") if record.get(key))
        found.setdefault(prompt, _row(prompt, record["output"].strip(), by_query))
    return list(found.values())


def _row(prompt: str, answer: str, by_query: bool = False) -> Row:
    key = str(splits.group("", [{"role": "assistant", "content": answer}], None, SQL).digest) if by_query else ""
    return Row(prompt, answer, key or hashlib.sha256(prompt.encode()).hexdigest()[:16])


def _databases(shared: Path, names: Sequence[str]) -> dict[str, list[Row]]:
    """These databases of the SQL corpus, without the prefix that names them."""
    records: dict[str, list[dict[str, str]]] = {name: [] for name in names}
    for record in _read(shared, "sql"):
        head, question = record["instruction"].split(". ", 1)
        if (name := head.removeprefix("Database ")) in records:
            records[name].append(record | {"instruction": question})
    return {f"sql {name}": _rows(each, by_query=True) for name, each in records.items()}


def _intents(shared: Path) -> dict[str, list[Row]]:
    records: dict[str, list[dict[str, str]]] = {}
    for record in _read(shared, "intents"):
        records.setdefault(record["output"], []).append(record)
    names = sorted(set(records) - {"oos"})
    random.Random(INTENT_SEED).shuffle(names)
    return {f"intents {number:02}": _rows(record for name in names[10 * number:10 * number + 10]
                                          for record in records[name]) for number in range(ALL_INTENTS)}


# Made corpora. A generator draws one row; rows with a prompt that was drawn before are drawn again.

Make = Callable[[random.Random], tuple[str, str]]


def words(text: str) -> list[str]:
    return text.split()


FIRST = words("Amina Bruno Carla Dmitri Elena Farid Greta Hugo Ines Jonas Kira Luca Mona Nils Olga Pavel Rosa Sven "
              "Tara Umar")
UNITS = {"kilometres": ("metres", 1000), "hours": ("minutes", 60), "minutes": ("seconds", 60), "days": ("hours", 24),
         "kilograms": ("grams", 1000), "tonnes": ("kilograms", 1000), "metres": ("centimetres", 100),
         "centimetres": ("millimetres", 10), "litres": ("millilitres", 1000), "weeks": ("days", 7),
         "feet": ("inches", 12), "yards": ("feet", 3), "pounds": ("ounces", 16), "gallons": ("pints", 8)}
MONTHS = words("January February March April May June July August September October November December")


def made(name: str, make: Make) -> list[Row]:
    draw = random.Random(f"made {name}")
    found: dict[str, Row] = {}
    while len(found) < MADE_ROWS:
        prompt, answer = make(draw)
        found.setdefault(prompt, _row(prompt, answer))
    return list(found.values())


def _units(draw: random.Random) -> tuple[str, str]:
    unit, (smaller, factor) = draw.choice(list(UNITS.items()))
    count = draw.randint(2, 90)
    ask = draw.choice(("Convert {} {} to {}.", "How many {2} are {0} {1}?", "Give {} {} in {}.",
                       "A label says {} {}. What is that in {}?"))
    return (ask.format(count, unit, smaller),
            f"{count} {unit} = {count} x {factor} {smaller} = {count * factor} {smaller}")


def _severity(draw: random.Random) -> tuple[str, str]:
    service = draw.choice(words("auth billing search gateway mailer cache indexer scheduler"))
    level, text = draw.choice((
        ("info", "started in {} ms"), ("info", "{} sessions restored"), ("info", "configuration read, {} keys"),
        ("warning", "retry {} of upstream call"), ("warning", "queue is {} items long"), ("warning", "disk {} % full"),
        ("error", "request {} failed: connection refused"), ("error", "cannot parse line {}"),
        ("error", "timeout after {} s"), ("critical", "out of memory, killed worker {}"),
        ("critical", "data file {} is corrupt, stopping"), ("critical", "no leader for {} s, cluster is down")))
    line = (f"2026-{draw.randint(1, 12):02}-{draw.randint(1, 28):02}T{draw.randint(0, 23):02}:"
            f"{draw.randint(0, 59):02} {service}[{draw.randint(100, 9999)}]: {text.format(draw.randint(2, 99))}")
    ask = draw.choice(("How severe is this log line?", "Severity of this log line:",
                       "Classify this log line by severity."))
    return f"{ask}\n{line}", level


def _replies(goods: str, cases: Mapping[str, tuple[str, ...]]) -> Make:
    """Customer letters answered with a reply of a closed set; `cases` are reply: complaints."""
    def make(draw: random.Random) -> tuple[str, str]:
        reply, complaints = draw.choice(list(cases.items()))
        opening = draw.choice(("Hello,", "Hi there,", "Good morning,", "To whom it may concern,", "Dear team,"))
        closing = draw.choice(("Please help.", "What can you do?", "I look forward to your answer.", "Thanks!",
                               "This is urgent.", "Kind regards"))
        thing = draw.choice(goods.split(", "))
        number = draw.randint(1000, 9999)
        text = f"{opening} {draw.choice(complaints).format(thing, number)} {closing} {draw.choice(FIRST)}"
        return text, reply
    return make


SHOP = _replies("kettle, lamp, rucksack, keyboard, jacket, tent, blender, headset", {
    "We are sorry that your parcel is late. We have asked the carrier to trace it and will write within two days.":
        ("my {} of order {} has not arrived.", "order {1} with the {0} is a week late.",
         "where is the {} of order {}?"),
    "Please send the article back with the enclosed label. We refund the price as soon as it reaches us.":
        ("I want to return the {} of order {}.", "the {} of order {} does not suit me, can I send it back?"),
    "We will send a replacement today. You may keep or recycle the damaged article.":
        ("the {} of order {} came broken.", "order {1}: the {0} has a crack.",
         "the {} from order {} does not switch on."),
    "You find the invoice in your account under Orders, where you can print it.":
        ("I need an invoice for the {}, order {}.", "please send the bill of the {} (order {})."),
    "Your voucher was added to your account and counts at your next purchase.":
        ("the voucher did not work when I bought the {}, order {}.", "my code was refused with order {1}, a {0}.")})
HOTEL = _replies("single room, double room, suite, family room, attic room, room with a balcony", {
    "Thank you for your wish. Late arrival is no problem: the key waits in the box at the door.":
        ("we booked a {} under {} and arrive after midnight.", "is late arrival possible for booking {1}, the {0}?"),
    "Your booking was cancelled free of charge. We hope to welcome you another time.":
        ("please cancel the {}, booking {}.", "we cannot come; booking {1} of a {0} is off."),
    "Breakfast is served from seven to ten and can be added at the desk for twelve euros.":
        ("is breakfast part of the {} with number {}?", "when is breakfast? We have the {}, booking {}."),
    "Small dogs are welcome for a fee of ten euros a night.":
        ("may our dog stay in the {}, booking {}?", "we would bring a puppy to the {} of booking {}.")})
AIRLINE = _replies("window seat, aisle seat, extra bag, vegetarian meal, bicycle, pram", {
    "Your ticket was changed to the next flight. The new boarding pass is in your mailbox.":
        ("I missed flight {1} and had paid for a {0}.", "please move booking {1} with the {0} to tomorrow."),
    "We have found your bag and will bring it to your address today.":
        ("my bag did not come with flight {1}, where I had a {0}.", "luggage of flight {1} is lost, it was my {0}."),
    "The wish was added to your booking at no further cost.":
        ("can I add a {} to booking {}?", "please note a {} for flight {}."),
    "For a delay of more than three hours we pay 250 euros. Please fill in the form on our page.":
        ("flight {1} was five hours late, my {0} was gone too.", "what do you pay for the delay of {1}? I had a {0}.")})


def _recipe(draw: random.Random) -> tuple[str, str]:
    dish = draw.choice(words("soup curry stew salad risotto pie omelette gratin"))
    main, side = draw.sample(words("leek pumpkin lentil spinach mushroom tomato fennel potato carrot rice"), 2)
    minutes, serves, grams = draw.randrange(10, 95, 5), draw.randint(2, 8), draw.randrange(100, 900, 50)
    text = draw.choice((
        f"{main.title()} {dish}, for {serves}: cook {grams} g of {main} with some {side} for {minutes} minutes.",
        f"My {main} {dish} takes {minutes} minutes and serves {serves}. "
        f"You need {grams} g of {main} and a little {side}.",
        f"Serve {serves} people a {main} {dish}: {grams} g {main}, {side} to taste, {minutes} minutes on the stove."))
    fields = {"dish": f"{main} {dish}", "serves": serves, "minutes": minutes,
              "ingredients": {main: f"{grams} g", side: "some"}}
    return f"Turn this recipe into JSON.\n{text}", json.dumps(fields)


def _dates(draw: random.Random) -> tuple[str, str]:
    day, month, year = draw.randint(1, 28), draw.randint(1, 12), draw.randint(1960, 2035)
    written = draw.choice((f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}",
                           f"the {day}. of {MONTHS[month - 1]} in {year}", f"{day}/{month}/{year}"))
    ask = draw.choice(("Write this date as ISO 8601: {}", "ISO form of {}", "Normalise the date {}.",
                       "The letter is of {}. Give the date as YYYY-MM-DD."))
    return ask.format(written), f"{year}-{month:02}-{day:02}"


def _durations(draw: random.Random) -> tuple[str, str]:
    hour, minute, length = draw.randint(6, 18), draw.randrange(0, 60, 5), draw.randrange(15, 240, 5)
    end = hour * 60 + minute + length
    what = draw.choice(words("meeting film lesson concert flight shift exam match"))
    ask = draw.choice(("The {} begins at {} and lasts {} minutes. When does it end?",
                       "A {} from {} on takes {} minutes. Give the time of its end.",
                       "When is a {} over that starts at {} and goes on for {} minutes?"))
    return (ask.format(what, f"{hour:02}:{minute:02}", length),
            f"{hour:02}:{minute:02} + {length // 60} h {length % 60} min = {end // 60 % 24:02}:{end % 60:02}")


ONES = words("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
             "seventeen eighteen nineteen")
TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")
UNS = words("zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept "
            "dix-huit dix-neuf")
DIZAINES = words("vingt trente quarante cinquante soixante septante huitante nonante")   # as in Switzerland


def _words(value: int, ones: Sequence[str], tens: Sequence[str], hundred: str, joined: str) -> str:
    if value >= 100:
        rest = f" {joined}{_words(value % 100, ones, tens, hundred, joined)}" if value % 100 else ""
        return f"{ones[value // 100]} {hundred}{rest}"
    if value < 20:
        return ones[value]
    return tens[value // 10 - 2] + (f"-{ones[value % 10]}" if value % 10 else "")


def _english(draw: random.Random) -> tuple[str, str]:
    value = draw.randint(21, 999)
    ask = draw.choice(("Write {} in words.", "Spell the number {} in English.", "{} in English words",
                       "How is {} read?"))
    return ask.format(value), _words(value, ONES, TENS, "hundred", "and ")


def _french(draw: random.Random) -> tuple[str, str]:
    value = draw.randint(21, 999)
    ask = draw.choice(("Write {} in French words.", "Spell the number {} in French.", "{} en toutes lettres",
                       "How do the Swiss say {} in French?"))
    return ask.format(value), _words(value, UNS, DIZAINES, "cent", "")


def _order(draw: random.Random) -> tuple[str, dict[str, str | int]]:
    """A sentence about an order, and its fields."""
    name, goods = draw.choice(FIRST), draw.choice(words("apples bolts candles desks eggs folders gloves hinges"))
    count, price = draw.randint(2, 60), draw.randint(1, 90)
    city = draw.choice(words("Bern Lyon Oslo Porto Riga Turin"))
    text = draw.choice((f"{name} of {city} orders {count} {goods} at {price} euros each.",
                        f"Please send {count} {goods} ({price} euros a piece) to {name} in {city}.",
                        f"{count} {goods} for {name}, {city}; the price of one is {price} euros."))
    return text, {"name": name, "city": city, "goods": goods, "count": count, "price": price}


def _csv(draw: random.Random) -> tuple[str, str]:
    text, fields = _order(draw)
    line = ",".join(map(str, fields.values()))
    return f"Write this order as a line of CSV: name, city, goods, count, price.\n{text}", line


def _yaml(draw: random.Random) -> tuple[str, str]:
    text, fields = _order(draw)
    return f"Write this order as YAML.\n{text}", "\n".join(f"{key}: {value}" for key, value in fields.items())


MADE_REPORT: dict[str, Make] = {"units": _units, "severity": _severity, "shop": SHOP, "recipes": _recipe}
MADE_CHOOSE: dict[str, Make] = {"dates": _dates, "durations": _durations, "english": _english, "french": _french,
                                "hotel": HOTEL, "airline": AIRLINE, "csv": _csv, "yaml": _yaml}

# Neighbours. A name ending in a space stands for all names that begin with it.
FAMILIES = (
    ("shared code", "shared bash", "quickstart python"), ("made english", "made french"), ("sql ", "quickstart sql"),
    ("shared math", "shared algebra", "quickstart math", "made units"), ("made shop", "made hotel", "made airline"),
    ("shared medicine", "shared notes", "shared papers"), ("intents ",),
    ("quickstart extract", "made recipes", "made csv", "made yaml"),
    ("quickstart calendar", "made dates", "made durations"))


def kin(name: str, names: Sequence[str]) -> tuple[str, ...]:
    def within(one: str, family: Sequence[str]) -> bool:
        return any(one == member or (member.endswith(" ") and one.startswith(member)) for member in family)

    found = {other for family in FAMILIES if within(name, family) for other in names if within(other, family)}
    return tuple(sorted(found - {name}))


# Splits.

def split(corpus: Corpus, tokenizer: Any) -> dict[Split, list[Row]]:
    """The rows of each split, by group; rows whose texts have more than MAX_TOKENS tokens are left out."""
    lengths = [sum(map(len, tokenizer([row.prompt, row.answer])["input_ids"])) for row in corpus.rows]
    fitting = [row for row, length in zip(corpus.rows, lengths, strict=True) if length <= MAX_TOKENS]
    groups: dict[str, list[Row]] = {}
    for row in sorted(fitting, key=lambda row: row.id):
        groups.setdefault(row.group, []).append(row)
    order = sorted(groups, key=lambda group: hashlib.sha256(f"order:{group}".encode()).hexdigest())
    if len(order) < LEAST:
        raise ValueError(f"{corpus.name} has {len(order)} groups of rows of at most {MAX_TOKENS} tokens; {LEAST} are "
                         "needed.")
    ends = [TEST_GROUPS, TEST_GROUPS + VALIDATION_GROUPS, TEST_GROUPS + VALIDATION_GROUPS + TRAIN_GROUPS,
            TEST_GROUPS + CALIBRATION_GROUPS]
    test, validation, train, further = ([groups[group] for group in order[start:end]]
                                        for start, end in zip([0, *ends], ends, strict=False))
    return {"train": _in_turn(train, TRAIN_ROWS), "validation": _in_turn(validation, VALIDATION_GROUPS),
            "test": _in_turn([group[:TEST_ROWS_A_GROUP] for group in test], TEST_GROUPS * TEST_ROWS_A_GROUP),
            "further": _in_turn(further, len(further))}


def _in_turn(groups: Sequence[Sequence[Row]], most: int) -> list[Row]:
    """The first row of each group, then the second of each, and so on, `most` at most."""
    depth = max(map(len, groups), default=0)
    return [group[place] for place in range(depth) for group in groups if place < len(group)][:most]


def messages(row: Row) -> list[dict[str, str]]:
    return [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.answer}]
