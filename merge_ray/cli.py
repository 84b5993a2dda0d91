"""The commands, thin: each reads its arguments, calls one function, and prints what a person needs next."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from merge_ray.errors import MergeRayError, SweepInterrupted, choose_from

app = typer.Typer(
    name="merge-ray",
    help="Find the best way to merge a set of fine-tuned models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console()

SpecPath = Annotated[Path, typer.Argument(help="The YAML file; see sweeps/ for examples.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, as in --set search.trials=8.")
]
Results = Annotated[
    list[str], typer.Argument(help="Results directories, such as results/quickstart or s3://bucket/results/quickstart.")
]
OneResults = Annotated[str, typer.Argument(help="A results directory, such as results/quickstart; s3:// too.")]


@app.command()
def sweep(
    spec: SpecPath,
    overrides: Overrides = None,
    retry_failed: Annotated[bool, typer.Option(help="Score candidates again whose rows say 'failed'.")] = False,
) -> None:
    """Search every study of a spec and rank the best merges on the test split.

    Runs on this machine, on a cluster that is running here ([cyan]ray start --head[/]), or inside
    [cyan]ray job submit[/]. Run the same command again after any interruption: it goes on where it stopped.
    """
    from merge_ray.leaderboard import rank, read_rows, render, render_search
    from merge_ray.progress import Progress
    from merge_ray.spec_files import load_sweeps
    from merge_ray.sweep import run_sweep

    for loaded in load_sweeps(spec, overrides or []):
        try:
            with Progress() as progress:
                directory = run_sweep(loaded, progress, retry_failed)
        except SweepInterrupted:
            _print(render_search(read_rows(loaded.directory)))
            console.print("\nNothing is confirmed on the test split yet.")
            _say_how_to_go_on()
        except KeyboardInterrupt:
            _say_how_to_go_on()
        _print(render(rank(read_rows(directory), loaded.evaluation.objective)))
        place = loaded.location
        console.print(f"\nLeaderboard  {place}/leaderboard.parquet\nReport       {place}/report.html")
        console.print(f"Next         merge-ray export {place} --best   (write the winner's weights)")


@app.command()
def validate(spec: SpecPath, overrides: Overrides = None) -> None:
    """Check a spec without running it; every mistake is reported at once."""
    from merge_ray.relatedness import RelatednessSpec
    from merge_ray.spec import SweepSpec
    from merge_ray.spec_files import load_any

    for loaded in load_any(spec, overrides or []):
        if isinstance(loaded, RelatednessSpec):
            about = f"{len(loaded.locations)} models"
        else:
            about = f"{len(loaded.tasks)} tasks"
        if isinstance(loaded, SweepSpec):
            pairs = f", {len(loaded.task_pairs)} pairs" if loaded.pairs else ""
            searches = ", ".join(f"{name} ({study.searcher})" for name, study in loaded.studies.items())
            about += f"{pairs}; studies: {searches}"
        console.print(f"[green]valid[/] {loaded.name}: {about}", highlight=False)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="Show one method in full.")] = None) -> None:
    """List the merging methods with their parameters, ranges, defaults and papers."""
    from merge_ray.methods.base import available_methods, find_method, parameter_fields

    chosen = {name: find_method(name)} if name else available_methods()
    for key, method in chosen.items():
        table = Table(title=f"[bold]{key}[/] [dim]{method.paper}[/]", title_justify="left", expand=True)
        for column in ("parameter", "default", "valid", "searched", "meaning"):
            table.add_column(column, overflow="fold")
        for parameter, field in parameter_fields(method).items():
            meta = field.metadata
            valid = f"{meta['valid']}" + (", or one per task" if meta["per_task"] else "")
            table.add_row(parameter, str(field.default), valid, str(meta["search"] or "fixed"), meta["help"])
        console.print(table if parameter_fields(method) else f"[bold]{key}[/] [dim]{method.paper}[/] (no parameters)")
        if name:
            console.print((method.__doc__ or "").strip(), markup=False, highlight=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def merge(
    context: typer.Context,
    method: Annotated[str, typer.Argument(help="A method; see [cyan]merge-ray methods[/].")],
    finetuned: Annotated[list[str], typer.Option(metavar="TASK=LOCATION ...", help="The fine-tuned models.")],
    output: Annotated[
        str, typer.Option("-o", "--output", help="The file to write, s3:// too; {task} in it stands for each.")
    ],
    base: Annotated[str | None, typer.Option(help="The base model's weights, where the models have one.")] = None,
    task: Annotated[str | None, typer.Option(help="Whose weights to write, for methods with weights per task.")] = None,
    family: Annotated[
        str | None, typer.Option(help="To match channels: the models' family, such as taskonomy.")
    ] = None,
    architecture: Annotated[str, typer.Option(help="Which of the family, as in specs.")] = "",
    images: Annotated[str | None, typer.Option(help="A folder of images to compare activations on.")] = None,
    image_count: Annotated[int, typer.Option(min=2, help="How many of the images are drawn.")] = 256,
) -> None:
    """Merge once, without Ray, and write the weights.

    Every parameter of the method is an option of its own:
    [cyan]merge-ray merge ties --base B --finetuned a=A b=B --density 0.2 -o merged.safetensors[/]

    Methods that match channels need to know the architecture, and images unless they match by weights:
    [cyan]merge-ray merge zipit --family taskonomy --architecture full --images rooms
    --finetuned a=A b=B -o {task}.safetensors[/]
    """
    from merge_ray.families import find_family
    from merge_ray.merging import merge as run
    from merge_ray.methods.base import find_method
    from merge_ray.progress import Progress
    from merge_ray.relatedness.jobs import read_images

    models, parameters = _merge_arguments(finetuned, context.args)
    made_of = find_family(family, architecture) if family else None
    if made_of is None and (images or "permutation_groups" in find_method(method).needs):
        raise MergeRayError(f"{method}: to match channels, name the models' --family and --architecture")
    if base is None and (made_of is None or made_of.has_base):
        raise MergeRayError("--base: name the model that the others were fine-tuned from")
    with Progress() as progress, progress.step("merge"):
        shown = read_images(images, made_of, image_count) if images and made_of else None
        result = run(method, base=base, finetuned=models, family=made_of, images=shown, **parameters)
        for note in result.merged.notes:
            progress.warn(note)
        paths = [output.replace("{task}", name) for name in result.bank.tasks]
        tasks = result.bank.tasks if "{task}" in output else [task]
        for path, name in zip(paths, tasks, strict=False):
            result.save(path, task=name)
            console.print(f"wrote {path}", highlight=False)


def _merge_arguments(finetuned: list[str], rest: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Sort ``TASK=LOCATION`` words and ``--parameter value`` pairs out of a command line."""
    from merge_ray.spec_files import parse_value

    models, parameters = {}, {}
    words = list(finetuned)
    queue = list(rest)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            words.append(word)
        elif "=" in word:
            key, _, value = word.partition("=")
            parameters[key[2:].replace("-", "_")] = parse_value(value)
        elif queue:
            parameters[word[2:].replace("-", "_")] = parse_value(queue.pop(0))
        else:
            raise MergeRayError(f"{word} needs a value")
    for word in words:
        name, equals, location = word.partition("=")
        if not equals:
            raise MergeRayError(f"--finetuned {word}: write TASK=LOCATION")
        models[name] = location
    return models, parameters


@app.command()
def export(
    results: OneResults,
    best: Annotated[bool, typer.Option("--best", help="The highest-ranked merge (the default).")] = False,
    study: Annotated[str | None, typer.Option(help="The confirmed merge of this study instead.")] = None,
    pair: Annotated[
        str | None, typer.Option(metavar="A+B", help="In a sweep over pairs, the pair; by default the best.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="A directory, s3:// too; by default RESULTS/export.")
    ] = None,
    format: Annotated[str, typer.Option(help="safetensors, huggingface or open_clip.")] = "safetensors",
) -> None:
    """Write a merged model of a sweep: the best one, or that of one study."""
    from merge_ray.checkpoints import destination
    from merge_ray.export import export_merge
    from merge_ray.progress import Progress

    if best and study:
        raise MergeRayError("give either --best or --study")
    target = output or f"{results}/export"
    with Progress() as progress:
        with destination(target) as folder:
            published = target if "://" in target else None
            paths = export_merge(results, study, folder, format, progress, pair, published)
        for path in paths:
            console.print(f"wrote {target}/{path.relative_to(folder)}", highlight=False)


@app.command()
def leaderboard(
    results: Results,
    format: Annotated[str, typer.Option(help="table, csv, json or markdown.")] = "table",
    objective: Annotated[str, typer.Option(help="The metric to rank by.")] = "normalized_mean",
    published: Annotated[Path | None, typer.Option(help="A CSV of published results to show beside.")] = None,
    model: Annotated[str | None, typer.Option(help="Only published rows of this model, as in CLIP-ViT-B/32.")] = None,
    num_tasks: Annotated[int | None, typer.Option(help="Only published rows over this many tasks.")] = None,
    by_pair: Annotated[bool, typer.Option("--by-pair", help="A row for each pair of a sweep over pairs.")] = False,
) -> None:
    """Rank the confirmed merges of one or several sweeps."""
    from merge_ray.leaderboard import add_published, published_rows, rank, read_rows, render

    table = rank(read_rows(results), objective, by_pair)
    if published:
        table = add_published(table, published_rows(published, model=model, num_tasks=num_tasks))
    _print(render(table, format))


@app.command()
def report(results: OneResults) -> None:
    """Write the HTML report of a sweep again."""
    from merge_ray.report import write_report

    write_report(results)
    console.print(f"wrote {results}/report.html", highlight=False)


@app.command()
def finetune(
    spec: SpecPath,
    overrides: Overrides = None,
    workers_per_task: Annotated[int, typer.Option(min=1, help="Devices that share one task, through Ray Train.")] = 1,
) -> None:
    """Fine-tune one model per task from one base, the tasks side by side; a killed run continues."""
    from merge_ray.cluster.training import run_finetune
    from merge_ray.finetune import FinetuneSpec
    from merge_ray.progress import Progress
    from merge_ray.spec_files import load_spec

    loaded = load_spec(FinetuneSpec, spec, overrides or [])
    with Progress() as progress:
        console.print(run_finetune(loaded, workers_per_task, progress))


@app.command()
def relatedness(spec: SpecPath, overrides: Overrides = None) -> None:
    """Compare models by their gradient fields (ModelGiF): distances, a heat map and a tree.

    Fields are kept: the same command with another distance, or with one more model, costs only that.
    """
    from merge_ray.cluster.fields import compute_on_ray
    from merge_ray.progress import Progress
    from merge_ray.relatedness import RelatednessSpec, relate
    from merge_ray.spec_files import load_spec

    with Progress() as progress:
        found = relate(load_spec(RelatednessSpec, spec, overrides or []), progress, compute_on_ray)
    console.print(found.table())
    console.print(f"\nDistances    {found.directory / 'distances.parquet'}")
    console.print(f"Pictures     {found.directory / 'heat_map.png'}, {found.directory / 'tree.png'}")


@app.command()
def fetch(
    data: Annotated[str, typer.Argument(help="What to download: taskonomy.")],
    links: Annotated[
        Path | None, typer.Option(help="A file of archives' addresses, a line each; by default the paper's.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the buildings go.")] = Path("taskonomy_data"),
) -> None:
    """Download and unpack data; a run that was stopped goes on where it was."""
    from merge_ray.fetch import fetch as run
    from merge_ray.fetch import read_links, usual_links
    from merge_ray.progress import Progress

    if data != "taskonomy":
        raise MergeRayError(f"cannot fetch {data!r}; {choose_from(data, ['taskonomy'])}")
    with Progress() as progress, progress.counted("fetch taskonomy") as update:
        places = run(read_links(links) if links else usual_links(), output, update)
    console.print(f"{len(places)} folders are in {output}; next: merge-ray compress {output}", highlight=False)


@app.command()
def compress(
    root: Annotated[Path, typer.Argument(help="The directory of Taskonomy's buildings.")],
    size: Annotated[int, typer.Option(min=1, help="The height and width of the images.")] = 256,
) -> None:
    """Shrink Taskonomy's images in place, in parallel."""
    from merge_ray.compress import compress as run
    from merge_ray.progress import Progress

    with Progress() as progress, progress.counted("compress") as update:
        shrunk, seen = run(root, size, update)
    console.print(f"shrunk {shrunk} of {seen} images to {size} x {size}", highlight=False)


def _say_how_to_go_on() -> None:
    """After Ctrl-C, with the status that shells expect then."""
    console.print("Stopped; every row that was recorded stays. Next: the same command again goes on from there.")
    raise typer.Exit(130)


def _print(rendered: Any) -> None:
    if isinstance(rendered, str):
        print(rendered)
    else:
        console.print(rendered)


def main() -> None:
    """Run the command line; what a user can mend ends in one message and status 2."""
    try:
        app()
    except MergeRayError as error:
        Console(stderr=True).print("[red]error:[/]", str(error), highlight=False, markup=True)
        sys.exit(2)
