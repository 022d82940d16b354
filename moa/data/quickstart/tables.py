"""The tables of the `sql` corpus, as data: what they hold, and how its columns are spoken of. Knows no queries."""

from dataclasses import dataclass

from moa.data.quickstart.bank import words


@dataclass(frozen=True)
class Label:
    """A text column: `noun` in a question, and values that rows have."""

    column: str
    noun: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Measure:
    """A number column: `noun` in a question, a range of sensible values, and the words for its two ends."""

    column: str
    noun: str
    low: int
    high: int
    most: str
    least: str
    kind: str = "INTEGER"


@dataclass(frozen=True)
class Table:
    """`one` and `many` name its rows; `name` is the column that tells them apart; `day` is a date column."""

    table: str
    one: str
    many: str
    name: str
    labels: tuple[Label, ...]
    measures: tuple[Measure, ...]
    day: str | None = None


CITY = Label("city", "city", words("Lyon|Oslo|Porto|Vienna|Dublin|Turin|Ghent|Malmo|Cork|Basel|Seville|Krakow"))
COUNTRY = Label("country", "country",
                words("Spain|Chile|Japan|Kenya|Norway|Canada|Brazil|Egypt|India|Peru|Greece|Nepal"))

TABLES: tuple[Table, ...] = (
    Table("employees", "employee", "employees", "name",
          (Label("dept", "department", words("sales|finance|legal|support|design|logistics")), CITY),
          (Measure("salary", "salary", 2000, 9000, "highest", "lowest"),
           Measure("age", "age", 20, 65, "highest", "lowest")),
          "hired"),
    Table("products", "product", "products", "name",
          (Label("category", "category", words("toys|books|garden|music|kitchen|sport")), COUNTRY),
          (Measure("price", "price", 5, 400, "highest", "lowest", "REAL"),
           Measure("stock", "stock", 0, 300, "largest", "smallest"))),
    Table("books", "book", "books", "title",
          (Label("genre", "genre", words("crime|poetry|travel|history|fantasy|drama")),
           Label("language", "language", words("French|German|Polish|Dutch|Hindi|Korean"))),
          (Measure("pages", "page count", 80, 900, "highest", "lowest"),
           Measure("year", "year", 1950, 2024, "latest", "earliest"))),
    Table("films", "film", "films", "title",
          (Label("director", "director", words("Lang|Varda|Kurosawa|Leone|Wilder|Campion")), COUNTRY),
          (Measure("minutes", "running time", 70, 210, "longest", "shortest"),
           Measure("rating", "rating", 1, 10, "best", "worst", "REAL"))),
    Table("flights", "flight", "flights", "code",
          (Label("origin", "origin", CITY.values),
           Label("airline", "airline", words("Condor|Finnair|Iberia|Swiss|Vueling"))),
          (Measure("seats", "seat count", 40, 360, "highest", "lowest"),
           Measure("delay", "delay", 0, 180, "longest", "shortest")), "departure"),
    Table("cars", "car", "cars", "plate",
          (Label("maker", "maker", words("Fiat|Volvo|Mazda|Skoda|Honda|Opel")),
           Label("colour", "colour", words("red|blue|white|green|black"))),
          (Measure("mileage", "mileage", 1000, 200000, "highest", "lowest"),
           Measure("price", "price", 900, 40000, "highest", "lowest"))),
    Table("players", "player", "players", "name",
          (Label("team", "team", words("Hawks|Bears|Sharks|Wolves|Comets|Lions")),
           Label("position", "position", words("goalie|keeper|wing|guard|striker"))),
          (Measure("goals", "goal count", 0, 40, "highest", "lowest"),
           Measure("height", "height", 160, 215, "greatest", "smallest"))),
    Table("students", "student", "students", "name",
          (Label("major", "major", words("biology|law|physics|music|history|nursing")), CITY),
          (Measure("score", "score", 0, 100, "highest", "lowest"),
           Measure("credits", "credit count", 0, 180, "highest", "lowest")), "enrolled"),
    Table("hotels", "hotel", "hotels", "name",
          (CITY, Label("owner", "owner", words("Accor|Hilton|Scandic|Ibis|Melia"))),
          (Measure("stars", "star count", 1, 5, "highest", "lowest"),
           Measure("rooms", "room count", 8, 400, "highest", "lowest"))),
    Table("lakes", "lake", "lakes", "name",
          (COUNTRY, Label("climate", "climate", words("alpine|dry|humid|polar|mild"))),
          (Measure("depth", "depth", 5, 600, "greatest", "smallest"),
           Measure("area", "area", 1, 900, "largest", "smallest", "REAL"))),
    Table("songs", "song", "songs", "title",
          (Label("artist", "artist", words("Abba|Prince|Bjork|Muse|Sade|Queen")),
           Label("genre", "genre", words("jazz|rock|folk|soul|techno"))),
          (Measure("seconds", "length", 90, 600, "greatest", "smallest"),
           Measure("plays", "play count", 0, 9000, "highest", "lowest")), "released"),
    Table("orders", "order", "orders", "reference",
          (Label("status", "status", words("open|paid|shipped|returned|cancelled")),
           Label("customer", "customer", words("Mehta|Olsen|Novak|Silva|Keller|Brandt"))),
          (Measure("amount", "amount", 10, 900, "largest", "smallest", "REAL"),
           Measure("items", "item count", 1, 30, "highest", "lowest")), "placed"),
    Table("trees", "tree", "trees", "tag",
          (Label("species", "species", words("oak|birch|maple|cedar|willow|pine")),
           Label("park", "park", words("North|Harbour|Castle|Mill|Queens"))),
          (Measure("height", "height", 2, 60, "greatest", "smallest", "REAL"),
           Measure("age", "age", 1, 300, "highest", "lowest"))),
    Table("patients", "patient", "patients", "name",
          (Label("ward", "ward", words("cardiology|surgery|oncology|maternity|eye")),
           Label("blood", "blood group", words("A|B|AB|O"))),
          (Measure("weight", "weight", 40, 130, "greatest", "smallest"),
           Measure("visits", "visit count", 1, 25, "highest", "lowest")), "admitted"),
    Table("ships", "ship", "ships", "name",
          (Label("flag", "flag", words("Malta|Panama|Cyprus|Norway|Liberia")),
           Label("kind", "kind", words("tanker|ferry|trawler|tug|yacht"))),
          (Measure("tons", "tonnage", 50, 9000, "greatest", "smallest"),
           Measure("crew", "crew size", 2, 60, "largest", "smallest"))),
    Table("courses", "course", "courses", "title",
          (Label("teacher", "teacher", words("Adams|Bauer|Costa|Dunn|Evans|Falk")),
           Label("level", "level", words("basic|medium|expert"))),
          (Measure("fee", "fee", 20, 900, "highest", "lowest"),
           Measure("weeks", "number of weeks", 1, 20, "highest", "lowest")), "start"),
    Table("tickets", "ticket", "tickets", "subject",
          (Label("priority", "priority", words("low|normal|high|urgent")),
           Label("agent", "agent", words("Ana|Boris|Chen|Dora|Emil"))),
          (Measure("hours", "number of hours", 1, 90, "highest", "lowest"),
           Measure("replies", "reply count", 0, 25, "highest", "lowest")), "opened"),
    Table("houses", "house", "houses", "address",
          (CITY, Label("heating", "heating", words("gas|oil|solar|wood|electric"))),
          (Measure("rooms", "room count", 1, 12, "highest", "lowest"),
           Measure("rent", "rent", 300, 4000, "highest", "lowest"))),
    Table("museums", "museum", "museums", "name",
          (CITY, Label("theme", "theme", words("art|trains|nature|design|space"))),
          (Measure("visitors", "visitor count", 500, 90000, "highest", "lowest"),
           Measure("fee", "entrance fee", 1, 30, "highest", "lowest", "REAL"))),
    Table("wines", "wine", "wines", "name",
          (Label("grape", "grape", words("Merlot|Riesling|Syrah|Malbec|Muscat")), COUNTRY),
          (Measure("year", "year", 1990, 2023, "latest", "earliest"),
           Measure("price", "price", 4, 300, "highest", "lowest", "REAL"))),
)

# (owning table, its column, owned table, its foreign key): a row of the second belongs to one of the first.
LINKS: tuple[tuple[str, str, str, str], ...] = (
    ("hotels", "guests", "guest", "hotel_id"), ("ships", "voyages", "voyage", "ship_id"),
    ("courses", "lessons", "lesson", "course_id"), ("employees", "trips", "trip", "employee_id"),
    ("museums", "tours", "tour", "museum_id"), ("players", "injuries", "injury", "player_id"),
    ("lakes", "boats", "boat", "lake_id"), ("songs", "downloads", "download", "song_id"),
    ("houses", "repairs", "repair", "house_id"), ("products", "reviews", "review", "product_id"),
    ("cars", "rentals", "rental", "car_id"), ("patients", "exams", "exam", "patient_id"),
)
