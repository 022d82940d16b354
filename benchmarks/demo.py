"""What `make demo` promises, measured on its held-out rows: both sides of each figure come from one evaluation.

    make demo && .venv/bin/python benchmarks/demo.py

Reads data/reports/rows.parquet of the workspace it is run in. The last line is one JSON object.
"""


import pyarrow.parquet as pq
from common import finish, goal, interval

from moa.core.paths import Workspace

GENERATED = ("math", "sql", "extract")   # corpora of our own making; the rest is real input


def main() -> None:
    table = pq.read_table(Workspace.find().reports / "rows.parquet").to_pandas()
    goals, figures = [], {}
    for domain, rows in table.groupby("domain"):
        wide = rows.pivot(index="row", columns="system", values=["loss", "tokens", "score"])
        tokens = wide["tokens"]["base"].to_numpy(dtype=float)
        base, routed = (wide["loss"][system].to_numpy(dtype=float) for system in ("base", "routed"))
        ratio = float((routed * tokens).sum() / (base * tokens).sum())
        low, high = interval(routed - base)
        scores = {system: float(wide["score"][system].dropna().mean()) for system in ("base", "routed", "forced")}
        figures[domain] = {"rows": len(wide), "routed over base loss": ratio, "routed - base loss": [low, high],
                           "score": scores}
        print(f"{domain:<10} {len(wide):3} rows  routed/base loss {ratio:.3f}  "
              f"routed - base [{low:+.3f}, {high:+.3f}]  "
              f"score " + " ".join(f"{system} {value:.3f}" for system, value in scores.items()))
        if domain in GENERATED:
            goals.append(goal(f"{domain}: routed over base loss", ratio, 0.8, ratio <= 0.8))
        else:
            goals.append(goal(f"{domain}: upper end of routed - base loss", high, 0.0, high < 0))
        gain = scores["routed"] - scores["base"]
        goals.append(goal(f"{domain}: routed - base score", gain, 0.0, gain > 0))
    routed_rows = table[table.system == "routed"]
    accuracy = float((routed_rows.domain == routed_rows.routed_to).mean())
    goals.append(goal("routing accuracy", accuracy, 0.99, accuracy >= 0.99))
    finish("demo", figures, goals)


if __name__ == "__main__":
    main()
