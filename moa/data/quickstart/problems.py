"""The word problems of the `math` corpus, as data: how each may be told, its steps, and the numbers that fit.

`{name}`, `{other}` are two people, `{she}`, `{She}`, `{her}` the first one's pronouns; the rest is each problem's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from moa.data.quickstart.bank import words


@dataclass(frozen=True)
class Problem:
    tellings: tuple[str, ...]
    steps: tuple[str, ...]
    numbers: dict[str, Sequence[int]]
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)


GOODS = words("pens|notebooks|candles|mugs|socks|puzzles|plates|scarves|posters|brushes|toy cars|flower pots")
SMALL = words("marbles|stickers|shells|coins|stamps|beads|cards|buttons|acorns|badges|pebbles|postcards")
FOOD = words("apples|oranges|muffins|cookies|pears|plums|rolls|lemons|peaches|bagels|figs|pancakes")

PROBLEMS: tuple[Problem, ...] = (
    Problem(
        ("{name} buys {a} {item} at {b} dollars each and a bag for {c} dollars. How much does {she} spend?",
         "A bag costs {c} dollars and {item} cost {b} dollars apiece. What does {name} pay for the bag and {a} "
         "{item}?"),
        ("The {item} cost <t = a * b> dollars.", "With the bag it is <u = t + c> dollars."),
        {"a": range(3, 10), "b": range(2, 10), "c": range(2, 15)}, {"item": GOODS}),
    Problem(
        ("{name} pays for {a} {item} with {p} dollars. Each costs {b} dollars. How much change does {she} get?",
         "At the market {item} are {b} dollars each. {name} takes {a} and hands over {p} dollars. What is {her} "
         "change?"),
        ("{a} {item} cost <t = a * b> dollars.", "The change is <u = p - t> dollars."),
        {"a": range(2, 10), "b": range(2, 10), "p": (20, 50, 60, 100)}, {"item": GOODS}),
    Problem(
        ("{name} has {a} {box} of {b} {item} and shares them equally among {c} {who}. How many does each get?",
         "{c} {who} split {a} {box} of {item} evenly. Every one of the {box} holds {b}. What is the share of each?"),
        ("There are <t = a * b> {item}.", "Each gets <u = t / c>."),
        {"a": range(2, 9), "b": range(4, 13), "c": range(2, 10)},
        {"item": FOOD, "box": words("boxes|baskets|trays|bags"), "who": words("friends|neighbours|children|cousins")}),
    Problem(
        ("A {book} has {a} pages. {name} reads {b} pages a day for {c} days. How many pages are left?",
         "For {c} days {name} reads {b} pages of a {book} every day. It has {a} pages. How many must {she} still "
         "read?"),
        ("{name} reads <t = b * c> pages.", "That leaves <u = a - t> pages."),
        {"a": range(60, 200, 5), "b": range(5, 13), "c": range(3, 10)},
        {"book": words("novel|comic book|travel guide|biography|cookbook|mystery story")}),
    Problem(
        ("A {bus} leaves with {a} people. At the first stop {b} get off and {c} get on, at the next {d} get off. How "
         "many are still aboard?",
         "{a} people are on a {bus}. Then {b} leave and {c} board; later {d} more leave. How many remain?"),
        ("After {b} leave there are <t = a - b>.", "Then <u = t + c> people.", "At the end <v = u - d> people."),
        {"a": range(20, 60), "b": range(3, 18), "c": range(2, 16), "d": range(2, 15)},
        {"bus": words("bus|tram|ferry|train|boat|shuttle")}),
    Problem(
        ("{name} is {a} years old and {her} {kin} is {b} times as old. How old are they together?",
         "{name}'s {kin} is {b} times as old as {name}, who is {a}. What is the sum of their ages?"),
        ("The {kin} is <t = a * b> years old.", "Together they are <u = t + a> years old."),
        {"a": range(4, 16), "b": range(2, 7)}, {"kin": words("mother|uncle|aunt|father|teacher|coach")}),
    Problem(
        ("{name} has {a} {item} and {other} has {b} times as many. How many more does {other} have?",
         "{other} collected {b} times as many {item} as {name}, who found {a}. By how many is {other} ahead?"),
        ("{other} has <t = a * b> {item}.", "The difference is <u = t - a> {item}."),
        {"a": range(5, 20), "b": range(2, 7)}, {"item": SMALL}),
    Problem(
        ("{name} earns {a} dollars an hour {job}. {She} works {b} hours on {d} and {c} hours on Sunday. What does "
         "{she} earn?",
         "On {d} {name} spends {b} hours {job}, on Sunday {c} hours, for {a} dollars an hour. How much is {she} paid?"),
        ("{name} works <t = b + c> hours.", "That pays <u = t * a> dollars."),
        {"a": range(6, 16), "b": range(2, 7), "c": range(2, 6)},
        {"job": words("walking dogs|washing cars|mowing lawns|painting fences|babysitting|picking fruit"),
         "d": words("Monday|Wednesday|Friday|Saturday")}),
    Problem(
        ("A rectangular {field} is {a} metres long and {b} metres wide. A fence runs around it, except for a gate of "
         "{c} metres. How long is the fence?",
         "{name} fences a {field} of {a} by {b} metres on all sides but leaves a {c} metre gate open. How many "
         "metres of fence are needed?"),
        ("Length plus width is <t = a + b>.", "All sides are <u = 2 * t> metres.", "Without the gate <v = u - c> "
                                                                                   "metres."),
        {"a": range(10, 35), "b": range(5, 25), "c": range(2, 6)},
        {"field": words("garden|meadow|playground|paddock|vineyard|field")}),
    Problem(
        ("A {wall} is {a} metres wide and {b} metres high, with {c} square metres of {gap}. What area is left to "
         "{paint}?",
         "{name} wants to {paint} a {wall} of {a} by {b} metres, all but {c} square metres of {gap}. What area is "
         "that?"),
        ("The {wall} has <t = a * b> square metres.", "To {paint} are <u = t - c> square metres."),
        {"a": range(5, 13), "b": range(3, 9), "c": range(3, 15)},
        {"wall": words("wall|barn wall|house front"), "gap": words("windows|doors|glass"),
         "paint": words("paint|plaster|clean")}),
    Problem(
        ("{name} packs {a} {item} and {b} {other_item} into {box} of {c} pieces. How many {box} does {she} fill?",
         "Each of the {box} holds {c} pieces. How many {box} are needed for {a} {item} and {b} {other_item}?"),
        ("There are <t = a + b> pieces.", "They fill <u = t / c> {box}."),
        {"a": range(10, 60), "b": range(10, 50), "c": range(4, 13)},
        {"item": FOOD, "other_item": words("pretzels|scones|waffles|tarts"), "box": words("boxes|bags|crates|tins")}),
    Problem(
        ("{name} rides a {bike} at {a} km an hour for {b} hours, then walks {c} km. How far does {she} travel?",
         "After {b} hours on a {bike} at {a} km an hour, {name} walks another {c} km. How long is the whole way?"),
        ("The ride is <t = a * b> km.", "The whole way is <u = t + c> km."),
        {"a": range(10, 31), "b": range(2, 6), "c": range(2, 9)}, {"bike": words("bike|scooter|horse|tandem")}),
    Problem(
        ("{name} has {a} dollars and saves {b} dollars a week for a {thing} that costs {c} dollars. How many weeks "
         "must {she} save?",
         "A {thing} costs {c} dollars. {name} owns {a} dollars and puts aside {b} each week. After how many weeks "
         "can {she} buy it?"),
        ("{name} needs <t = c - a> more dollars.", "That takes <u = t / b> weeks."),
        {"a": range(10, 60), "b": range(4, 13), "c": range(50, 150, 5)},
        {"thing": words("guitar|camera|tent|skateboard|telescope|drum|kayak|keyboard")}),
    Problem(
        ("A recipe for {a} people needs {b} {thing}. How many {thing} does {name} need for {c} people?",
         "{name} cooks for {c} guests. {recipe} serves {a} and takes {b} {thing}. How many {thing} must {she} buy?"),
        ("That is <t = c / a> times the recipe.", "{name} needs <u = t * b> {thing}."),
        {"a": range(2, 7), "b": range(2, 10), "c": range(8, 49)},
        {"thing": words("eggs|carrots|tomatoes|onions|potatoes|leeks"), "recipe": words("The recipe|One pot|A batch")}),
    Problem(
        ("A {tank} holds {a} litres. It loses {b} litres an hour for {c} hours, then {name} adds {d} litres. How "
         "much is in it now?",
         "For {c} hours {b} litres an hour leak from a {tank} with {a} litres. Then {d} litres are poured in. How "
         "many litres does it hold?"),
        ("It loses <t = b * c> litres.", "<u = a - t> litres stay.", "Now it holds <v = u + d> litres."),
        {"a": range(50, 150, 5), "b": range(2, 10), "c": range(3, 10), "d": range(5, 40)},
        {"tank": words("tank|pond|barrel|pool|cistern")}),
    Problem(
        ("{a} girls and {b} boys form teams of {c}. Every team gets {d} {item}. How many {item} are needed?",
         "A camp of {a} girls and {b} boys is split into teams of {c}, with {d} {item} for each team. How many "
         "{item} is that?"),
        ("There are <t = a + b> children.", "They form <u = t / c> teams.", "That takes <v = u * d> {item}."),
        {"a": range(8, 30), "b": range(8, 30), "c": range(3, 9), "d": range(2, 9)},
        {"item": words("balls|ropes|flags|maps|torches|tents|paddles")}),
    Problem(
        ("A {thing} of {a} dollars is sold at half price, and {name} has a coupon for {b} dollars off. What does "
         "{she} pay?",
         "The shop halves the price of a {thing}, which was {a} dollars, and takes off {b} more at the till. What is "
         "paid?"),
        ("Half the price is <t = a / 2> dollars.", "With {b} off it is <u = t - b> dollars."),
        {"a": range(40, 180, 2), "b": range(3, 20)},
        {"thing": words("coat|lamp|chair|jacket|carpet|desk|bike helmet|suitcase")}),
    Problem(
        ("{place} tickets are {c} dollars for adults and {d} for children. What do {a} adults and {b} children pay?",
         "{a} adults and {b} children visit the {place}. An adult pays {c} dollars, a child {d}. What is the total?"),
        ("The adults pay <t = a * c> dollars.", "The children pay <u = b * d> dollars.", "Together <v = t + u> "
                                                                                         "dollars."),
        {"a": range(2, 7), "b": range(2, 9), "c": range(8, 16), "d": range(3, 8)},
        {"place": words("zoo|museum|circus|castle|aquarium|theatre")}),
    Problem(
        ("{name} makes {a} {thing} and sells each for {b} dollars. The material cost {c} dollars. What is {her} "
         "profit?",
         "The material for {a} {thing} costs {name} {c} dollars. {She} sells them at {b} dollars each. How much does "
         "{she} gain?"),
        ("The sales bring <t = a * b> dollars.", "The profit is <u = t - c> dollars."),
        {"a": range(4, 13), "b": range(4, 11), "c": range(8, 40)},
        {"thing": words("cakes|birdhouses|bracelets|soaps|wooden toys|hats|baskets|kites")}),
    Problem(
        ("{name} scores {a}, {b} and {c} points in three {games}. What is {her} average?",
         "Over three {games} {name} got {a}, {b} and {c} points. How many is that on average?"),
        ("Two make <t = a + b> points.", "All three make <u = t + c> points.", "The average is <v = u / 3> points."),
        {"a": range(5, 50), "b": range(5, 50), "c": range(5, 50)},
        {"games": words("games|tests|rounds|matches|quizzes")}),
    Problem(
        ("After giving {a} {item} to {other} and finding {b} new ones, {name} has {c}. How many did {she} have at "
         "first?",
         "{name} has {c} {item} now. Before, {she} gave {a} to {other} and then got {b} from {her} sister. How many "
         "were there at the start?"),
        ("Without the new ones there are <t = c - b> {item}.", "At first there were <u = t + a> {item}."),
        {"a": range(4, 30), "b": range(3, 20), "c": range(25, 90)}, {"item": SMALL}),
    Problem(
        ("One {club} costs {a} dollars a month plus a fee of {b} dollars, another costs {c} dollars a month with no "
         "fee. How much dearer is the second after {d} months?",
         "{name} pays {c} dollars a month at a {club}. {other} pays {a} a month and once {b}. How much more has "
         "{name} paid after {d} months?"),
        ("The months cost <t = a * d> dollars.", "With the fee <u = t + b> dollars.",
         "The other costs <v = c * d> dollars.", "The difference is <w = v - u> dollars."),
        {"a": range(5, 11), "b": range(3, 15), "c": range(11, 18), "d": range(3, 8)},
        {"club": words("gym|swimming club|chess club|music school|film club")}),
    Problem(
        ("A {hall} has {a} rows of {b} seats. {c} seats are broken and {d} people sit down. How many good seats stay "
         "free?",
         "In a {hall} with {a} rows of {b} seats, {c} are broken and {d} are taken. How many can still be used?"),
        ("There are <t = a * b> seats.", "<u = t - c> of them are good.", "Free are <v = u - d> seats."),
        {"a": range(5, 11), "b": range(6, 12), "c": range(2, 9), "d": range(10, 50)},
        {"hall": words("hall|cinema|theatre|tent|church|lecture room")}),
    Problem(
        ("{name} cuts {a} pieces of {b} cm from a {rope} of {c} cm and the rest into {d} equal parts. How long is "
         "each part?",
         "From {c} cm of {rope}, {a} pieces of {b} cm are cut off. The rest is divided into {d} equal parts. How "
         "long is one?"),
        ("The pieces use <t = a * b> cm.", "The rest is <u = c - t> cm.", "Each part is <v = u / d> cm."),
        {"a": range(3, 9), "b": range(4, 13), "c": range(60, 160, 4), "d": range(2, 7)},
        {"rope": words("ribbon|rope|wire|string|tape")}),
    Problem(
        ("{name} {sells} {a} {item} on Monday, twice as many on Tuesday and {b} fewer on Wednesday than on Tuesday. "
         "How many in all?",
         "On Monday {name} {sells} {a} {item}, on Tuesday double that, on Wednesday {b} fewer than on Tuesday. What "
         "is the total?"),
        ("Tuesday: <t = a * 2>.", "Wednesday: <u = t - b>.", "The first two days: <v = a + t>.", "In all: <w = v + "
                                                                                                 "u>."),
        {"a": range(6, 35), "b": range(2, 15)},
        {"item": FOOD, "sells": words("sells|picks|packs|counts")}),
    Problem(
        ("A {machine} makes {a} {item} in {b} hours. How many does it make in {c} hours?",
         "In {b} hours {a} {item} leave the {machine}. How many leave it in {c} hours at that rate?"),
        ("In one hour it makes <t = a / b> {item}.", "In {c} hours it makes <u = t * c> {item}."),
        {"a": range(12, 100), "b": range(2, 9), "c": range(3, 12)},
        {"item": GOODS, "machine": words("machine|workshop|robot|factory line")}),
    Problem(
        ("A farm keeps {a} {cows} and {b} {hens}. How many legs do these animals have?",
         "{name} counts {a} {cows} and {b} {hens} on a farm. How many legs is that?"),
        ("The {cows} have <t = 4 * a> legs.", "The {hens} have <u = 2 * b> legs.", "Together <v = t + u> legs."),
        {"a": range(3, 26), "b": range(3, 30)},
        {"cows": words("cows|goats|sheep|horses|pigs|donkeys"), "hens": words("hens|ducks|geese|turkeys")}),
    Problem(
        ("{name} has {a} {item}, keeps {b} and puts the rest into {c} equal piles. How many are in two piles?",
         "Of {a} {item} {name} keeps {b}. The rest makes {c} equal piles, and {other} gets two of them. How many is "
         "that?"),
        ("The rest is <t = a - b> {item}.", "A pile has <u = t / c>.", "Two piles have <v = u * 2>."),
        {"a": range(30, 99), "b": range(5, 30), "c": range(3, 9)}, {"item": SMALL}),
    Problem(
        ("{name} practises {play} for {a} minutes on each of {d} weekdays and {b} minutes on each day of the "
         "weekend. How many minutes a week is that?",
         "Each week {name} plays {play} on {d} weekdays for {a} minutes and on both weekend days for {b}. How many "
         "minutes are these?"),
        ("Weekdays: <t = d * a> minutes.", "Weekend: <u = 2 * b> minutes.", "Together: <v = t + u> minutes."),
        {"a": range(10, 35, 5), "b": range(15, 50, 5), "d": range(2, 6)},
        {"play": words("the piano|the flute|tennis|the violin|chess|the trumpet")}),
)
