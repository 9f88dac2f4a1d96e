"""The command ``ssl-matfeat``; what is slow to import is imported where it is used."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import ssl_matfeat

if TYPE_CHECKING:
    from pymatgen.core import Structure

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
weights_app = typer.Typer(help="The pretrained weights that this version has.")
app.add_typer(weights_app, name="weights", no_args_is_help=True)

STRUCTURE_FILES = ("*.cif", "*poscar*", "*contcar*", "*.vasp")
"""What is taken from a folder, in upper or lower case; a file that is named itself may have any name pymatgen reads."""
_READ = f"of a folder only {', '.join(STRUCTURE_FILES)} are read"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ssl-matfeat {ssl_matfeat.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print it, and stop."
        ),
    ] = False,
) -> None:
    """Self-supervised features for crystals."""
    # Lines of code say nothing to who calls a command.
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"


@app.command()
def demo(
    output: Annotated[
        Path,
        typer.Option(exists=True, file_okay=False, help="Folder for demo.json and the plot."),
    ] = Path(),
) -> None:
    """Predict the bulk moduli of 1 181 real crystals, and compare with matminer's features."""
    from ssl_matfeat.demo import run_demo

    typer.echo(run_demo(output))
    typer.echo(f"\nWritten: {output / 'demo.json'}, {output / 'demo_parity.png'}")


@app.command()
def featurize(
    paths: Annotated[
        list[Path], typer.Argument(help="CIF or POSCAR files, or folders of them.", exists=True)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .parquet or .csv file.")] = Path(
        "features.parquet"
    ),
    weights: Annotated[
        str, typer.Option(help="Name (see 'weights list') or path of a .safetensors file.")
    ] = "default",
    layers: Annotated[
        str,
        typer.Option(
            help="auto, or some of element, shell, cell, pretext, environment, 0, 1, ... with commas between."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where the network runs: cpu, cuda, ...")] = "cpu",
) -> None:
    """Write one row of features for each structure file.

    Column 'file' names the source of a row. A file that cannot be read or featurized is reported
    and left out, and the command then ends with status 1; the other rows are always written. If no row is left,
    nothing is written.
    """
    if output.suffix not in (".parquet", ".csv"):
        raise typer.BadParameter(f"{output} must end in .parquet or .csv", param_hint="--output")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"no folder {output.parent}", param_hint="--output")
    files, skipped = _structure_files(paths)
    if not files:
        raise typer.BadParameter(
            f"no structure files in {', '.join(str(path) for path in paths)}: {_READ}; name other files themselves",
            param_hint="PATHS",
        )
    if skipped:
        counts = Counter(file.suffix or file.name for file in skipped).most_common(5)
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts)
        typer.echo(
            f"files skipped: {len(skipped)} ({kinds}); {_READ}; name other files themselves",
            err=True,
        )

    from ssl_matfeat._compute import check_device
    from ssl_matfeat.featurizers import SSLStructureFeaturizer
    from ssl_matfeat.weights import WeightsError

    try:
        check_device(device)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error
    names = tuple(int(n) if n.isdecimal() else n for n in map(str.strip, layers.split(",")))
    featurizer = SSLStructureFeaturizer(
        weights,
        "auto" if names == ("auto",) else names,
        device=device,
        on_error="nan",
        verbose=True,
    )
    featurizer.set_output(transform="pandas")
    try:
        featurizer.feature_labels()  # a wrong option is told before all files are read
    except WeightsError as error:
        raise typer.BadParameter(str(error), param_hint="--weights") from error
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--layers") from error
    structures, errors = _read(files)
    if structures:
        with warnings.catch_warnings():
            # Below each of these is told by its file.
            warnings.filterwarnings("ignore", ".*have NaN for features", UserWarning)
            features = featurizer.fit_transform(list(structures.values()))
        features.insert(0, "file", [str(file) for file in structures])
        errors |= _by_file(structures, featurizer.errors_)
        features = features[~features["file"].isin([str(file) for file in errors])]
    _report(errors)
    if len(errors) == len(files):
        older = f"; {output} is an older file, left as it was" if output.exists() else ""
        typer.echo(f"0 of {len(files)} structures can be used: nothing written{older}", err=True)
        raise typer.Exit(1)
    if output.suffix == ".parquet":
        features.to_parquet(output, index=False)
    else:
        features.to_csv(output, index=False)
    typer.echo(f"{len(files) - len(errors)} of {len(files)} structures written to {output}")
    if errors:
        raise typer.Exit(1)


@app.command()
def pretrain(
    corpus: Annotated[
        Path,
        typer.Argument(
            help="A folder of CIF or POSCAR files, or a .parquet file with columns numbers, lattice and frac_coords.",
            exists=True,
        ),
    ],
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write.", dir_okay=False)],
    task: Annotated[
        str,
        typer.Option(
            help="context, predictive, contrastive, property, replaced, denoising or strain."
        ),
    ] = "context",
    epochs: Annotated[int, typer.Option(help="Passes over the structures.")] = 15,
    n_channels: Annotated[int, typer.Option(help="Width of every embedding.")] = 64,
    batch_size: Annotated[
        int, typer.Option(help="Edges, about 15 a site, in a batch of one process.")
    ] = 8192,
    lr: Annotated[float, typer.Option(help="Learning rate at the start.")] = 2e-3,
    max_sites: Annotated[int, typer.Option(help="Leave larger crystals out.")] = 40,
    max_expansion: Annotated[
        float,
        typer.Option(help="Leave crystals out that have more times the volume of their elements."),
    ] = 5.0,
    validation_fraction: Annotated[
        float, typer.Option(help="Held out to measure the losses, if no column split says it.")
    ] = 0.02,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, ...")] = "cpu",
    precision: Annotated[str, typer.Option(help="32-true or bf16-mixed.")] = "32-true",
    n_devices: Annotated[
        int, typer.Option(help="Processes, one for each GPU, that share the batches.")
    ] = 1,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the output and its plot, once the training is done."
        ),
    ] = False,
) -> None:
    """Train weights on your own structures, without labels.

    A checkpoint beside the output is written after every epoch; after an interruption the same command goes on from
    it, and at the end removes it. The losses are plotted beside the output as well.
    """
    checkpoint, plot = output.with_suffix(".checkpoint"), output.with_suffix(".png")
    if output.suffix != ".safetensors":
        raise typer.BadParameter(f"{output} must end in .safetensors", param_hint="OUTPUT")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"no folder {output.parent}", param_hint="OUTPUT")
    # A checkpoint there means that the training it belongs to was allowed to write the output.
    existing = [path for path in (output, plot) if path.exists()]
    if existing and not (overwrite or checkpoint.exists()):
        raise typer.BadParameter(
            f"{existing[0]} exists; give another name, or --overwrite", param_hint="OUTPUT"
        )

    from ssl_matfeat.inspection import plot_losses
    from ssl_matfeat.pretrain import SSLPretrainer

    pretrainer = SSLPretrainer(
        task,
        n_channels=n_channels,
        max_epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        max_sites=max_sites,
        max_expansion=max_expansion,
        validation_fraction=validation_fraction,
        random_state=seed,
        device=device,
        precision=precision,
        n_devices=n_devices,
        verbose=True,
    )
    files = _structure_files([corpus])[0] if corpus.is_dir() else []
    if corpus.is_dir() and not files and not any(corpus.rglob("*.parquet")):
        raise typer.BadParameter(
            f"no structure files in {corpus}: {_READ}, or parquet files", param_hint="CORPUS"
        )
    try:
        pretrainer._check_parameters()  # a wrong option is told before all files are read
    except (ImportError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    structures, errors = _read(files)
    if files and not structures:
        _report(errors)
        raise typer.BadParameter(f"no file in {corpus} can be read", param_hint="CORPUS")
    try:
        pretrainer.fit(list(structures.values()) if files else corpus, checkpoint=checkpoint)
    except (ImportError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    pretrainer.save(output)
    checkpoint.unlink()
    plot_losses(pretrainer.history_).savefig(plot)
    if files:
        _report(errors | _by_file(structures, pretrainer.errors_))
    else:
        for text in pretrainer.errors_.values():
            typer.echo(text, err=True)
    typer.echo(f"{output}: {pretrainer.metrics_}")


@weights_app.command("list")
def list_weights() -> None:
    """List the weights by name, with what they were trained on."""
    from ssl_matfeat.weights import list_weights, load_card

    for name in list_weights():
        card = load_card(name)
        data, tasks = card["training_data"], " + ".join(card["task"])
        typer.echo(f"{name}: task {tasks}, {card['n_parameters']} parameters, {card['date']}")
        typer.echo(f"    trained on {data['n_training']} crystals: {data['corpus']}")
        typer.echo(f"    without {data['left_out']}")
        typer.echo(f"    {card['licence']}; {card['attribution']}")


def _structure_files(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """Return the files to read, and the others that are in the folders."""
    files: list[Path] = []
    inside: set[Path] = set()
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file())
            files += [f for f in found if any(fnmatch(f.name.lower(), p) for p in STRUCTURE_FILES)]
            inside.update(found)
        else:
            files.append(path)
    return list(dict.fromkeys(files)), sorted(inside - set(files))


def _read(files: list[Path]) -> tuple[dict[Path, Structure], dict[Path, str]]:
    """Return the structures, and why the other files cannot be read; warnings are summed up in one line."""
    from pymatgen.core import Structure
    from tqdm import tqdm

    structures, errors, doubts = {}, {}, {}
    for file in tqdm(files, desc="reading", unit="file", leave=False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # pymatgen's parsers raise whatever a malformed file makes them trip over.
            try:
                structures[file] = Structure.from_file(file)
                if file.suffix.lower() == ".cif" and (n := _count_cells(file)) > 1:
                    del structures[file]
                    errors[file] = f"holds {n} structures; write each to a file of its own"
            except Exception as error:
                errors[file] = f"cannot be read: {type(error).__name__}: {error}"
        if caught:
            doubts[file] = str(caught[0].message)
    for file, text in list(doubts.items())[:1]:
        typer.echo(f"files with warnings: {len(doubts)}, such as {file}: {text}", err=True)
    return structures, errors


def _count_cells(file: Path) -> int:
    """Return how many structures a CIF file holds, of which pymatgen returns the first."""
    return len(re.findall(r"^\s*_cell_length_a\s", file.read_text(errors="replace"), re.I | re.M))


def _by_file(structures: dict[Path, Structure], errors: dict[int, str]) -> dict[Path, str]:
    """Return messages about items of X as messages about the files that they were read from."""
    files = list(structures)
    return {files[row]: text.replace(f"X[{row}] ", "") for row, text in errors.items()}


def _report(errors: dict[Path, str]) -> None:
    for file, text in errors.items():
        typer.echo(f"{file}: {text}", err=True)
