"""Questions about dates and times of day with one exact, short answer: Gregorian calendar, 24-hour clock.

Time zones are given as differences in the question, so no answer depends on a zone database.
"""

import random
from calendar import monthrange
from collections.abc import Callable
from datetime import date, timedelta

from moa.data.quickstart.bank import Row, distinct, words

WEEKDAYS = words("Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday")
MONTHS = words("January|February|March|April|May|June|July|August|September|October|November|December")
EVENTS = words("exam|concert|flight|wedding|race|auction|launch|match|interview|fair|recital|audit|move|festival")
SITTINGS = words("workshop|lecture|rehearsal|meeting|film|class|dinner|surgery|webinar|tour|drill|hearing|seminar|show")
CHORES = words("The bins are emptied|The plant is watered|The filter is changed|The pool is cleaned|The lift is "
               "checked|"
               "A newsletter is sent|The backup is tested|The cat gets its pill|The roof is inspected|Wages are paid")
RIDES = words("bus|tram|ferry|shuttle|train|cable car|boat")
# Invented names, so that no time difference is wrong for a real town.
TOWNS = words("Northgate|Westfield|Eastmoor|Riverton|Lakeside|Hillcrest|Stonebridge|Fairhaven|Oakford|Millbrook")
ORDINALS = (("first", 1), ("second", 2), ("third", 3), ("fourth", 4))

Pair = tuple[str, str]   # question, answer


def random_day(rng: random.Random) -> date:
    """A random day of 2020 to 2027."""
    return date(2020, 1, 1) + timedelta(days=rng.randrange(365 * 8))


def shown(day: date) -> str:
    """2024-05-01 as `1 May 2024`."""
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def clock(minutes: int) -> str:
    """Minutes since midnight as HH:MM, whatever the day."""
    return f"{minutes // 60 % 24:02}:{minutes % 60:02}"


def span(minutes: int) -> str:
    """`95` as `1 hour 35 minutes`."""
    hours, rest = divmod(minutes, 60)
    parts = [f"{hours} hour{'s' * (hours != 1)}"] * (hours > 0) + [f"{rest} minute{'s' * (rest != 1)}"] * (rest > 0)
    return " ".join(parts)


def nth(number: int) -> str:
    """`21` as `21st`."""
    return f"{number}{'th' if 10 <= number <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


# Each of the following functions, which SHAPES lists, draws a question of one kind and its answer.

def weekday_later(rng: random.Random) -> Pair:
    today, days, event = rng.randrange(7), rng.randint(3, 60), rng.choice(EVENTS)
    text = rng.choice(("Today is {day}. The {event} is in {n} days. Which weekday is that?",
                       "It is {day}, and the {event} takes place {n} days from now. On which weekday?"))
    return text.format(day=WEEKDAYS[today], event=event, n=days), WEEKDAYS[(today + days) % 7]


def weekday_earlier(rng: random.Random) -> Pair:
    today, days, event = rng.randrange(7), rng.randint(3, 60), rng.choice(EVENTS)
    text = rng.choice(("Today is {day}. The {event} was {n} days ago. Which weekday was it?",
                       "The {event} happened {n} days before this {day}. On which weekday?"))
    return text.format(day=WEEKDAYS[today], event=event, n=days), WEEKDAYS[(today - days) % 7]


def date_later(rng: random.Random) -> Pair:
    day, days, event = random_day(rng), rng.randint(5, 45), rng.choice(EVENTS)
    text = rng.choice(("The {event} is {n} days after {day}. What is its date?",
                       "Tickets for the {event} were bought on {day}, {n} days ahead. What date is the {event}?"))
    return text.format(day=shown(day), n=days, event=event), shown(day + timedelta(days=days))


def date_earlier(rng: random.Random) -> Pair:
    day, days, event = random_day(rng), rng.randint(5, 45), rng.choice(EVENTS)
    text = rng.choice(("The {event} is on {day}. Reminders go out {n} days before. On what date?",
                       "Which date is {n} days before the {event} on {day}?"))
    return text.format(day=shown(day), n=days, event=event), shown(day - timedelta(days=days))


def days_between(rng: random.Random) -> Pair:
    day, days, event = random_day(rng), rng.randint(8, 90), rng.choice(EVENTS)
    text = rng.choice(("How many days is it from {day} to the {event} on {end}?",
                       "It is {day}. The {event} is on {end}. How many days are left?"))
    return text.format(day=shown(day), end=shown(day + timedelta(days=days)), event=event), f"{days} days"


def ends_at(rng: random.Random) -> Pair:
    start, length, sitting = rng.randint(84, 240) * 5, rng.randint(5, 40) * 5, rng.choice(SITTINGS)
    text = rng.choice(("A {sitting} starts at {start} and lasts {n} minutes. When does it end?",
                       "The {sitting} begins at {start}. It takes {n} minutes. At what time is it over?"))
    return text.format(sitting=sitting, start=clock(start), n=length), clock(start + length)


def starts_at(rng: random.Random) -> Pair:
    end, length, sitting = rng.randint(130, 280) * 5, rng.randint(5, 40) * 5, rng.choice(SITTINGS)
    text = rng.choice(("A {sitting} of {length} must end at {end}. When must it start?",
                       "The {sitting} was over at {end} after {length}. At what time did it begin?"))
    return text.format(sitting=sitting, end=clock(end), length=span(length)), clock(end - length)


def lasted(rng: random.Random) -> Pair:
    start, length, sitting = rng.randint(84, 220) * 5, rng.randint(5, 55) * 5, rng.choice(SITTINGS)
    text = rng.choice(("A {sitting} runs from {start} to {end}. How long is it?",
                       "The {sitting} starts at {start} and ends at {end}. What is its length?"))
    return text.format(sitting=sitting, start=clock(start), end=clock(start + length)), span(length)


def elsewhere(rng: random.Random) -> Pair:
    (here, there), hours = rng.sample(TOWNS, 2), rng.randint(2, 13)
    now, ahead = rng.randint(0, 95) * 15, rng.random() < 0.5
    text = rng.choice(("It is {now} in {here}. {there} is {n} hours {way}. What time is it in {there}?",
                       "{there} is {n} hours {way} of {here}. What does a clock in {there} show at {now} {here} time?"))
    if not ahead:
        text = text.replace("{way} of", "{way}")
    then = now + (hours if ahead else -hours) * 60
    when = {-1: " the previous day", 0: "", 1: " the next day"}[then // 1440]
    question = text.format(now=clock(now), here=here, there=there, n=hours, way="ahead" if ahead else "behind")
    return question, clock(then) + when


def recurring(rng: random.Random) -> Pair:
    day, every, (ordinal, count) = random_day(rng), rng.randint(4, 24), rng.choice(ORDINALS[:3])
    text = rng.choice(("{chore} every {n} days, last on {day}. What is the date of the {ordinal} time after that?",
                       "{chore} every {n} days. Counting from {day}, when is the {ordinal} time to follow?"))
    question = text.format(chore=rng.choice(CHORES), n=every, day=shown(day), ordinal=ordinal)
    return question, shown(day + timedelta(days=every * count))


def same_month(rng: random.Random) -> Pair:
    day, event = random_day(rng).replace(day=rng.randint(1, 10)), rng.choice(EVENTS)
    other = day.replace(day=rng.randint(day.day + 4, 28))
    text = rng.choice(("{day} is a {weekday}. The {event} is on the {nth} of that month. Which weekday is that?",
                       "If {day} falls on a {weekday}, on which weekday is the {event} on the {nth}?"))
    question = text.format(day=shown(day), weekday=WEEKDAYS[day.weekday()], event=event, nth=nth(other.day))
    return question, WEEKDAYS[other.weekday()]


def nth_weekday(rng: random.Random) -> Pair:
    first, weekday, (ordinal, count) = random_day(rng).replace(day=1), rng.randrange(7), rng.choice(ORDINALS)
    text = rng.choice(("{first} is a {start}. What date is the {ordinal} {weekday} of that month?",
                       "The {event} is on the {ordinal} {weekday} of the month, whose first day, {first}, is a "
                       "{start}. "
                       "What date is it?"))
    day = first + timedelta(days=(weekday - first.weekday()) % 7 + 7 * (count - 1))
    return text.format(first=shown(first), start=WEEKDAYS[first.weekday()], ordinal=ordinal, weekday=WEEKDAYS[weekday],
                       event=rng.choice(EVENTS)), shown(day)


def timetable(rng: random.Random) -> Pair:
    first, every, ride = rng.randint(60, 120) * 5, rng.choice((7, 8, 9, 11, 12, 14, 18, 25, 35, 40)), rng.choice(RIDES)
    reached = first + every * rng.randint(2, 8) + rng.randint(1, every - 1)
    text = rng.choice(("A {ride} leaves every {n} minutes from {first} on. You arrive at {reached}. When does the "
                       "next go?",
                       "From {first} a {ride} departs each {n} minutes. Which is the earliest at or after {reached}?"))
    question = text.format(ride=ride, n=every, first=clock(first), reached=clock(reached))
    return question, clock(first + -(-(reached - first) // every) * every)


def months_later(rng: random.Random) -> Pair:
    month, year, months = rng.randrange(12), rng.randint(2019, 2026), rng.randint(5, 40)
    text = rng.choice(("A {thing} of {n} months begins in {start}. In which month does it run out?",
                       "In which month and year is it {n} months after {start}, when the {thing} was signed?"))
    years, end = divmod(month + months, 12)
    thing = rng.choice(words("lease|warranty|loan|contract|licence|subscription|pass"))
    return text.format(thing=thing, n=months, start=f"{MONTHS[month]} {year}"), f"{MONTHS[end]} {year + years}"


def working_days(rng: random.Random) -> Pair:
    start, days = rng.randrange(5), rng.randint(3, 14)
    text = rng.choice(("A {job} starts on {start} and takes {n} working days, Monday to Friday. On which weekday is "
                       "it done?",
                       "Work on a {job} fills {n} weekdays, the first a {start}; weekends are free. What is the last "
                       "day?"))
    job = rng.choice(words("repair|report|survey|painting job|review|translation|test run|delivery|paint job"))
    return text.format(job=job, start=WEEKDAYS[start], n=days), WEEKDAYS[(start + days - 1) % 5]


def month_lengths(rng: random.Random) -> Pair:
    year, month = rng.randint(2019, 2032), rng.choice((1, 1, 2, 3, 5, 7, 8, 10, 11))
    text = rng.choice(("How many days do {one} and {two} {year} have together?",
                       "The {event} lasts all of {one} and {two} {year}. How many days is that?"))
    days = monthrange(year, month)[1] + monthrange(year, month + 1)[1]
    return text.format(one=MONTHS[month - 1], two=MONTHS[month], year=year, event=rng.choice(EVENTS)), f"{days} days"


SHAPES: tuple[Callable[[random.Random], Pair], ...] = (
    weekday_later, weekday_earlier, date_later, date_earlier, days_between, ends_at, starts_at, lasted, elsewhere,
    recurring, same_month, nth_weekday, timetable, months_later, working_days, month_lengths,
)


def generate(rng: random.Random, rows: int) -> list[Row]:
    """`rows` rows of the corpus, or fewer where no more differ enough."""
    def draw() -> Row:
        question, answer = rng.choice(SHAPES)(rng)
        return {"instruction": question, "output": answer}

    return distinct(draw, rows)
