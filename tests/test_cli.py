import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ALLOY, bcc, rock_salt, write_parquet
from typer.testing import CliRunner

import ssl_matfeat
from ssl_matfeat import SSLPretrainer, SSLStructureFeaturizer, list_weights
from ssl_matfeat.cli import app
from ssl_matfeat.demo import markdown_table, run_demo
from ssl_matfeat.weights import load_weights

SALT, IRON = rock_salt(), bcc()


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def unwrapped(output):
    """Return the text of an error without the box that it is printed in."""
    return " ".join(output.replace("│", " ").split())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "files" / "deeper").mkdir(parents=True)
    SALT.to(tmp_path / "files" / "salt.vasp", fmt="poscar")
    IRON.to(tmp_path / "files" / "deeper" / "POSCAR", fmt="poscar")
    (tmp_path / "files" / "notes.txt").write_text("no structure")
    return tmp_path / "files"


def test_featurize_writes_what_the_featurizer_gives(folder, tmp_path):
    output = tmp_path / "features.parquet"
    result = run("featurize", folder, "--output", output)
    assert result.exit_code == 0, result.output
    table = pd.read_parquet(output)
    assert table["file"].tolist() == [str(folder / "deeper" / "POSCAR"), str(folder / "salt.vasp")]
    expected = SSLStructureFeaturizer().set_output(transform="pandas").fit_transform([IRON, SALT])
    assert list(table.columns[1:]) == list(expected.columns)
    np.testing.assert_allclose(table.iloc[:, 1:], expected, rtol=1e-4, atol=1e-4)


def test_csv_holds_the_same_table(folder, tmp_path):
    run("featurize", folder, "--output", tmp_path / "features.parquet")
    run("featurize", folder, "--output", tmp_path / "features.csv")
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "features.csv"),
        pd.read_parquet(tmp_path / "features.parquet"),
        check_dtype=False,
    )


def test_bad_files_are_reported_and_lose_no_other(folder, tmp_path):
    ALLOY.to(folder / "alloy.cif")
    (folder / "broken.cif").write_text("data_broken\n_cell_length_a nonsense\n")
    output = tmp_path / "features.parquet"
    result = run("featurize", folder, "--output", output)
    assert result.exit_code == 1
    assert f"{folder / 'broken.cif'}: cannot be read" in result.output
    assert f"{folder / 'alloy.cif'}: " in result.output
    assert "disordered" in result.output
    assert "2 of 4 structures written" in result.output
    table = pd.read_parquet(output)
    assert len(table) == 2
    assert table.notna().all(axis=None)


def test_a_file_of_several_structures_is_reported(tmp_path):
    SALT.to(tmp_path / "salt.cif")
    IRON.to(tmp_path / "iron.cif")
    both = (tmp_path / "salt.cif").read_text() + (tmp_path / "iron.cif").read_text()
    (tmp_path / "both.cif").write_text(both)
    result = run("featurize", tmp_path, "--output", tmp_path / "features.csv")
    assert result.exit_code == 1
    assert f"{tmp_path / 'both.cif'}: holds 2 structures; write each to a file" in result.output
    assert "2 of 3 structures written" in result.output


def test_warnings_are_told_without_lines_of_code(folder, tmp_path):
    (folder / "neon.vasp").write_text("Ne\n1\n4.4 0 0\n0 4.4 0\n0 0 4.4\nNe\n1\ndirect\n0 0 0\n")
    # Another process, since pytest takes the warnings of this one.
    command = [sys.executable, "-c", "from ssl_matfeat.cli import app; app()", "featurize"]
    output = tmp_path / "features.csv"
    ran = subprocess.run([*command, folder, "--output", output], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "warning: the weights never saw Ne" in ran.stderr
    assert ".py:" not in ran.stderr


def test_upper_case_names_count_too(tmp_path):
    SALT.to(tmp_path / "salt.cif")
    (tmp_path / "salt.cif").rename(tmp_path / "SALT.CIF")
    result = run("featurize", tmp_path, "--output", tmp_path / "features.csv")
    assert result.exit_code == 0, result.output
    assert len(pd.read_csv(tmp_path / "features.csv")) == 1


def test_layers_are_chosen_by_name(folder, tmp_path):
    output = tmp_path / "features.csv"
    assert run("featurize", folder, "--layers", "cell,1", "--output", output).exit_code == 0
    names = SSLStructureFeaturizer(layers=("cell", 1)).feature_labels()
    assert list(pd.read_csv(output)) == ["file", *names]
    assert run("featurize", folder, "--layers", " cell, 1", "--output", output).exit_code == 0
    assert list(pd.read_csv(output)) == ["file", *names]
    refused = run("featurize", folder, "--layers", "cell,7", "--output", output)
    assert refused.exit_code == 2
    assert "no layer 7" in refused.output


def test_a_file_named_twice_gives_one_row(folder, tmp_path):
    output = tmp_path / "features.parquet"
    run("featurize", folder, folder / "salt.vasp", "--output", output)
    assert len(pd.read_parquet(output)) == 2


@pytest.mark.parametrize("readable", [False, True])
def test_nothing_is_written_when_nothing_can_be_used(readable, tmp_path):
    bad, output = tmp_path / "bad.cif", tmp_path / "features.csv"
    if readable:
        ALLOY.to(bad)
    else:
        bad.write_text("")
    result = run("featurize", bad, "--output", output)
    assert result.exit_code == 1
    assert "0 of 1 structures can be used: nothing written\n" in result.output
    assert not output.exists()
    output.write_text("rows of before")
    result = run("featurize", bad, "--output", output)
    assert result.exit_code == 1
    assert f"nothing written; {output} is an older file, left as it was" in result.output
    assert output.read_text() == "rows of before"


def test_skipped_files_of_a_folder_are_counted_unless_they_are_named(folder, tmp_path):
    SALT.to(folder / "salt.json")
    output = tmp_path / "features.csv"
    result = run("featurize", folder, "--output", output)
    assert result.exit_code == 0, result.output
    assert "files skipped: 2 (1 .txt, 1 .json)" in result.output
    assert "*.cif" in result.output
    assert len(pd.read_csv(output)) == 2
    result = run("featurize", folder, folder / "salt.json", "--output", output)
    assert "files skipped: 1 (1 .txt)" in result.output
    assert len(pd.read_csv(output)) == 3
    (folder / "notes.txt").unlink()
    result = run("featurize", folder, folder / "salt.json", "--output", output)
    assert "files skipped" not in result.output


@pytest.mark.parametrize("device", [f"cuda:{torch.cuda.device_count()}", "nonsense"])
def test_a_device_that_is_missing_is_refused(device, folder, tmp_path):
    result = run("featurize", folder, "-o", tmp_path / "f.csv", "--device", device)
    assert result.exit_code == 2
    assert "--device" in result.output
    assert f"torch sees {torch.cuda.device_count()} CUDA devices" in unwrapped(result.output)


@pytest.mark.parametrize("name", ["features.xlsx", "no/such/folder/features.csv"])
def test_an_output_that_cannot_be_written_is_refused_first(name, folder, tmp_path):
    result = run("featurize", folder, "--output", tmp_path / name)
    assert result.exit_code == 2
    assert "--output" in result.output


def test_a_folder_without_structures_is_refused(tmp_path):
    result = run("featurize", tmp_path, "--output", tmp_path / "features.csv")
    assert result.exit_code == 2
    assert "no structure files" in result.output


def test_unknown_weights_are_refused_by_name(folder, tmp_path):
    result = run("featurize", folder, "-o", tmp_path / "f.csv", "--weights", "nonsense")
    assert result.exit_code == 2
    assert "nonsense" in result.output
    assert "default" in result.output


@pytest.fixture
def corpus(small_crystals, tmp_path):
    pytest.importorskip("matplotlib")
    return write_parquet(small_crystals[0][:20], tmp_path / "corpus.parquet")


def test_pretrain_replaces_weights_only_if_told_to(corpus, tmp_path):
    output = tmp_path / "own.safetensors"
    output.write_text("weights of before")
    command = ["pretrain", corpus, output, "--task", "strain", "--epochs", 1]
    refused = run(*command)
    assert refused.exit_code == 2
    assert "exists; give another name, or --overwrite" in unwrapped(refused.output)
    assert output.read_text() == "weights of before"
    output.rename(output.with_suffix(".png"))  # where the plot of the losses will be
    assert "own.pngexists" in unwrapped(run(*command).output).replace(" ", "")  # wherever it wraps
    done = run(*command, "--overwrite")
    assert done.exit_code == 0, done.output
    assert {file.name for file in tmp_path.iterdir()} == {corpus.name, output.name, "own.png"}


def test_pretrain_reads_a_folder_and_names_the_files_that_it_leaves_out(small_crystals, tmp_path):
    pytest.importorskip("matplotlib")
    folder, output = tmp_path / "crystals", tmp_path / "own.safetensors"
    folder.mkdir()
    for i, crystal in enumerate(small_crystals[0][:20]):
        crystal.to(folder / f"{i}.cif")
    ALLOY.to(folder / "alloy.cif")
    (folder / "broken.cif").write_text("")
    result = run("pretrain", folder, output, "--task", "strain", "--epochs", 1)
    assert result.exit_code == 0, result.output
    data = load_weights(output).card["training_data"]
    assert data["n_training"] + data["n_validation"] == 20
    assert f"{folder / 'broken.cif'}: cannot be read" in result.output
    assert f"{folder / 'alloy.cif'}: " in result.output
    assert "X[" not in result.output


def test_pretrain_says_what_it_can_read(corpus, tmp_path):
    text = tmp_path / "corpus.csv"
    text.write_text("numbers,lattice\n")
    result = run("pretrain", text, tmp_path / "own.safetensors")
    assert result.exit_code == 2
    assert "no parquet file with columns numbers, lattice, frac_coords" in unwrapped(result.output)
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.cif").write_text("")
    result = run("pretrain", folder, tmp_path / "own.safetensors")
    assert result.exit_code == 2
    assert "no file in" in unwrapped(result.output)


def test_pretrain_refuses_an_unknown_task_before_it_reads(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_matfeat.cli._read", None)
    result = run("pretrain", folder, tmp_path / "own.safetensors", "--task", "foo")
    assert result.exit_code == 2
    assert "tasks must be of" in unwrapped(result.output)


def test_warnings_of_parsers_become_one_line(folder, tmp_path):
    rounded = SALT.to(fmt="cif").replace("0.50000000", "0.33330000", 1)  # which pymatgen warns of
    for name in ("a", "b"):
        (folder / f"{name}.cif").write_text(rounded)
    result = run("featurize", folder, "--output", tmp_path / "f.csv")
    assert result.exit_code == 0, result.output
    assert "files with warnings: 2, such as" in result.output
    assert "UserWarning" not in result.output


def test_pretrain_passes_its_options_on(corpus, tmp_path):
    output = tmp_path / "own.safetensors"
    options = {
        "n_channels": 8,
        "batch_size": 900,
        "lr": 0.001,
        "max_sites": 12,
        "max_expansion": 4.0,
    }
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    more = ["--validation-fraction=0.25", "--seed=3"]
    result = run("pretrain", corpus, output, "--task=strain", "--epochs=2", *words, *more)
    assert result.exit_code == 0, result.output
    parameters = load_weights(output).card["parameters"]
    expected = {**options, "max_epochs": 2, "validation_fraction": 0.25, "random_state": 3}
    assert {name: parameters[name] for name in expected} == expected


def test_pretrain_goes_on_from_its_checkpoint_though_the_output_is_there(corpus, tmp_path):
    output = tmp_path / "own.safetensors"
    SSLPretrainer("strain", max_epochs=1).fit(corpus, checkpoint=tmp_path / "own.checkpoint")
    output.write_text("written in part, then interrupted")
    result = run("pretrain", corpus, output, "--task", "strain", "--epochs", 1)
    assert result.exit_code == 0, result.output
    assert load_weights(output).card["task"] == {"strain": 1.0}


def test_pretrain_refuses_an_output_of_another_kind_before_it_trains(corpus, tmp_path):
    result = run("pretrain", corpus, tmp_path / "own.pt")
    assert result.exit_code == 2
    assert "must end in .safetensors" in unwrapped(result.output)
    assert [file.name for file in tmp_path.iterdir()] == [corpus.name]


def test_weights_list_names_every_one_with_its_attribution():
    result = run("weights", "list")
    assert result.exit_code == 0
    for name in list_weights():
        assert f"{name}: " in result.output
    assert "Materials Project" in result.output


def test_version():
    assert run("--version").output == f"ssl-matfeat {ssl_matfeat.__version__}\n"


def test_demo_scores_every_set_of_features_with_every_model(tmp_path):
    table = run_demo(tmp_path, n_crystals=60)
    report = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    pairs = [(row["features"], row["model"]) for row in report["rows"]]
    assert len(pairs) == len(set(pairs)) == 9
    dummy, *others = (row["mae"] for row in report["rows"])
    assert max(others) < dummy
    assert table == markdown_table(report["rows"])
    assert (tmp_path / "demo_parity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_demo_on_every_crystal_writes_into_the_folder_it_is_given(tmp_path):
    result = run("demo", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert "1181 crystals" in report["data"]
    assert (tmp_path / "demo_parity.png").exists()


def test_pretrain_says_what_it_reads_of_a_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("no structure")
    refused = run("pretrain", tmp_path, tmp_path / "own.safetensors")
    assert refused.exit_code == 2
    assert "no structure files in" in unwrapped(refused.output)
    assert "*.cif" in refused.output
