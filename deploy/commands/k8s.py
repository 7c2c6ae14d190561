"""`distrl k8s`: a run on Kubernetes."""

from typing import Annotated, Any

import typer

from deploy.commands.arguments import ConfigPath, Overrides

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="What the cluster needs to know.")]
Overlay = Annotated[str, typer.Option("--overlay", help="cpu (one node) or gpu (a GPU cluster).")]
Context = Annotated[str | None, typer.Option("--context", help="Of the kubeconfig; without it the current one.")]

k8s = typer.Typer(
    help="Print or apply what CONFIG needs on Kubernetes.\n\n"
    "Example: distrl k8s render examples/jsonl.yaml --set image=distrl:0.1.0-cpu",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@k8s.command()
def render(config: ConfigPath, overrides: Overrides = None, overlay: Overlay = "cpu", settings: Set = None) -> None:
    """Print the objects of a run as YAML, the same bytes each time; starts nothing.

    Example: distrl k8s render examples/jsonl.yaml run.name=first --set image=distrl:0.1.0-cpu
    """
    from deploy.k8s.objects import to_yaml

    typer.echo(to_yaml(_objects(config, overrides, overlay, settings)), nl=False)


@k8s.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    overlay: Overlay = "cpu",
    settings: Set = None,
    context: Context = None,
) -> None:
    """Apply the objects of a run to a cluster, through the official client.

    Example: distrl k8s submit examples/jsonl.yaml --set image=distrl:0.1.0-cpu --context staging
    """
    from deploy.k8s.submit import submit as apply

    for name in apply(_objects(config, overrides, overlay, settings), context):
        typer.echo(f"applied {name}")


def _objects(
    config: Any, overrides: list[str] | None, overlay: str, settings: list[str] | None
) -> list[dict[str, Any]]:
    from deploy.k8s.objects import run_objects
    from deploy.k8s.values import make_values
    from distrl.config import load_config

    loaded = load_config(config, overrides or [])
    return run_objects(loaded, make_values(overlay, settings or [], loaded))
