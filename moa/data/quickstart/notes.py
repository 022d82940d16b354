"""The notes of the `extract` corpus, as data: which facts one states, and how it may be worded.

A fact's kind is a name that `moa.data.quickstart.extract` knows, or the possible values themselves. A `money` fact also
states a `currency`. Every telling states every fact.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    facts: dict[str, str]
    tellings: tuple[str, ...]


NOTES: tuple[Note, ...] = (
    Note({"supplier": "company", "invoice": "code", "date": "day", "total": "money", "paid": "yes_no"}, (
        "Invoice {invoice} from {supplier}, issued {date}. Amount due: {total}, {paid}.",
        "{supplier} billed us {total} on {date}. Their invoice {invoice} is {paid}.",
        "We enclose our invoice {invoice} of {date} over {total}, which is {paid}. Kind regards, {supplier}",
    )),
    Note({"carrier": "DHL|UPS|FedEx|PostNord|Hermes|DPD", "tracking": "code", "delivery": "day", "weight_kg": "weight",
          "city": "city"}, (
        "Parcel {tracking} ({weight_kg}) left with {carrier} and reaches {city} on {delivery}.",
        "{carrier} will deliver your {weight_kg} shipment in {city} on {delivery}. Track it as {tracking}.",
        "Good news! On {delivery} {carrier} brings box {tracking}, weighing {weight_kg}, to {city}.",
    )),
    Note({"guest": "person", "city": "city", "checkin": "day", "nights": "quantity", "price": "money"}, (
        "Dear {guest}, your room in {city} is booked from {checkin} for {nights} nights at {price} in all.",
        "Reservation for {guest}: {city}, arriving {checkin}, {nights} nights, {price}.",
        "{guest} will stay {nights} nights at our house in {city}, check-in {checkin}. The bill will be {price}.",
    )),
    Note({"customer": "person", "product": "printer|router|scanner|laptop|tablet|monitor|headset|webcam",
          "opened": "day", "priority": "low|normal|high|urgent", "ticket": "code"}, (
        "Ticket {ticket}: {customer} says the {product} stopped working. Opened {opened}, priority {priority}.",
        "On {opened} {customer} reported a broken {product}. We filed it as {ticket} with {priority} priority.",
        "{customer} wrote again about the {product}. Please treat {ticket}, open since {opened}, as {priority}.",
    )),
    Note({"customer": "company", "item": "desk lamps|office chairs|notebooks|gloves|batteries|mugs|bolts",
          "quantity": "quantity", "total": "money", "needed": "day"}, (
        "Please send us {quantity} {item} by {needed}. We agreed on {total}. {customer}",
        "{customer} orders {quantity} {item} for {total}, to arrive no later than {needed}.",
        "Hello, {customer} here. Could we get {quantity} {item} until {needed}? Your offer of {total} is fine.",
    )),
    Note({"topic": "budget|hiring|safety|roadmap|training|marketing|audit|design", "date": "day", "start": "time",
          "room": "Atlas|Orion|Vega|Lyra|Hydra|Draco|Cygnus", "host": "person"}, (
        "{host} invites you to the {topic} meeting on {date} at {start} in room {room}.",
        "Reminder: {topic} meeting, {date}, {start}, room {room}. Questions go to {host}.",
        "The {topic} meeting moves to room {room}. It now starts at {start} on {date}, says {host}.",
    )),
    Note({"employee": "person", "category": "taxi|meals|train|hotel|software|postage|parking|fuel", "amount": "money",
          "date": "day"}, (
        "{employee} asks for {amount} back, spent on {category} on {date}.",
        "Expense claim by {employee}, {date}: {category}, {amount}.",
        "On {date} I paid {amount} for {category}. Please refund me. {employee}",
    )),
    Note({"name": "person", "role": "nurse|welder|analyst|chef|editor|driver|tutor|planner|chemist", "city": "city",
          "start": "day", "salary": "money"}, (
        "We are glad to offer {name} the post of {role} in {city} from {start} at {salary} a month.",
        "{name} joins our {city} office as {role} on {start}, with a monthly salary of {salary}.",
        "New contract: {role} {name}, {city}, first day {start}, monthly pay {salary}.",
    )),
    Note({"passenger": "person", "origin": "Rome|Paris|Cairo|Tokyo|Lima|Delhi", "destination": "city", "date": "day",
          "departure": "time", "flight": "code"}, (
        "{passenger} flies {flight} from {origin} to {destination} on {date}, leaving at {departure}.",
        "Boarding pass: {passenger}, flight {flight}, {date}, {departure}, {origin} to {destination}.",
        "Your flight {flight} to {destination} departs {origin} at {departure} on {date}. Safe travels, {passenger}!",
    )),
    Note({"driver": "person", "car": "van|minibus|hatchback|pickup|convertible|truck", "days": "quantity",
          "pickup": "day", "deposit": "money"}, (
        "{driver} rents a {car} for {days} days from {pickup} and leaves a deposit of {deposit}.",
        "Rental: {car}, pick-up {pickup}, {days} days, deposit {deposit}, driver {driver}.",
        "Hi {driver}, the {car} is yours from {pickup} for {days} days. Bring {deposit} as deposit.",
    )),
    Note({"seller": "company", "item": "drill|kettle|jacket|blender|tent|toaster|camera|clock", "refund": "money",
          "returned": "day", "order": "code"}, (
        "We received the {item} of order {order} back on {returned} and refund {refund}. {seller}",
        "Return of {returned}: {item}, order {order}. {seller} will pay back {refund}.",
        "{seller} refunds {refund} for the {item} that you sent back on {returned} (order {order}).",
    )),
    Note({"warehouse": "city", "product": "rice|flour|coffee|tea|sugar|salt|cocoa|pasta", "pallets": "quantity",
          "counted": "day", "clerk": "person"}, (
        "Stock count {counted}, {warehouse}: {pallets} pallets of {product}. Signed {clerk}.",
        "{clerk} counted {pallets} pallets of {product} in {warehouse} on {counted}.",
        "In {warehouse} there were {pallets} pallets of {product} on {counted}, according to {clerk}.",
    )),
    Note({"patient": "person", "doctor": "Dr Weiss|Dr Malik|Dr Rossi|Dr Lund|Dr Adeyemi|Dr Costa", "date": "day",
          "time": "time", "fee": "money"}, (
        "{patient} sees {doctor} on {date} at {time}. The visit costs {fee}.",
        "Appointment confirmed: {date}, {time}, {doctor} for {patient}, fee {fee}.",
        "{doctor} can see {patient} at {time} on {date}; please bring {fee}.",
    )),
    Note({"tenant": "person", "city": "city", "rent": "money", "rooms": "quantity", "from": "day"}, (
        "{tenant} takes the flat with {rooms} rooms in {city} from {from} at {rent} a month.",
        "Lease: {city}, {rooms} rooms, {rent} monthly, tenant {tenant}, beginning {from}.",
        "From {from} on {tenant} pays {rent} each month for {rooms} rooms in {city}.",
    )),
)
