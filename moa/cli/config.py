"""`moa config ...`: shows what params.yaml may hold, and what it holds.

Heavy modules are imported inside the commands.
"""

from moa.cli.app import App, AsJson, opened, print_json, print_result

config_app = App(name="config", help="Show the parameters of params.yaml: values, defaults, schema.")


@config_app.command()
def show(as_json: AsJson = False) -> None:
    """Show every parameter with its value and what it means; * marks those that are not the default."""
    from moa.core.config_reference import as_text, effective

    groups = effective(opened()[1])
    print_result({"groups": [group.as_dict() for group in groups]}, as_text(groups), as_json)


@config_app.command_without_workspace()
def schema() -> None:
    """Print the JSON schema of params.yaml, with which editors complete and check the file."""
    from moa.core import config_reference

    print_json(config_reference.schema())
