"""The benchmark scripts, run for real on a few of the bundled crystals."""

import dataclasses
import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import write_parquet
from sklearn.kernel_ridge import KernelRidge

CHECKOUT = Path(__file__).parents[1]
BENCHMARKS = CHECKOUT / "benchmarks"
FOLDS = ["0", "1", "2", "3", "4"]


@pytest.fixture(scope="module", autouse=True)
def scripts(tmp_path_factory):
    """Import the scripts as they import each other, and keep their cache out of the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_MATFEAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.syspath_prepend(BENCHMARKS / "accuracy")
        patch.syspath_prepend(BENCHMARKS)
        yield


def run(script, *arguments):
    command = [sys.executable, BENCHMARKS / script, *map(str, arguments)]
    return subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def run_table(script, results, *arguments):
    limited = ["--task", "elastic", "--limit", 60, "--results", results]
    ran = run(f"accuracy/{script}", *limited, *arguments)
    assert ran.returncode == 0, ran.stderr
    return ran


@pytest.fixture(scope="module")
def results(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    two_folds = ["--folds", "0", "--folds", "1"]
    run_table("representation.py", folder / "accuracy", "--features", "default", *two_folds)
    others = ["--features", "raw", "--features", "dummy", "--head", "BKR"]
    run_table("representation.py", folder / "accuracy", *others)
    return folder


def test_json_says_what_was_scored_and_with_what(results):
    from representation import HEADS

    report = json.loads((results / "accuracy" / "elastic" / "default.json").read_text())
    assert report["rows"] == "60 of 1181"
    assert report["rows_with_nan"] == 0
    assert len(report["weights"]["default"]) == 64
    assert report["versions"]["ssl-matfeat"]
    scored = {(cell["head"], cell["fold"]) for cell in report["cells"]}
    assert scored == {(head, fold) for head in HEADS for fold in ("0", "1")}
    assert sum(cell["n_test"] for cell in report["cells"]) == len(HEADS) * 60 * 2 / 5


def test_features_beat_the_dummy(results):
    def mae(name):
        report = json.loads((results / "accuracy" / "elastic" / f"{name}.json").read_text())
        return np.mean([cell["mae"] for cell in report["cells"]])

    assert mae("default") < 0.7 * mae("dummy")


def test_finished_cells_are_skipped_and_missing_ones_run(results):
    path = results / "accuracy" / "elastic" / "dummy.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, "cells": before["cells"][1:]}))
    run_table("representation.py", results / "accuracy", "--features", "dummy", "--head", "BKR")
    after = json.loads(path.read_text())["cells"]
    assert after[:-1] == before["cells"][1:]
    assert after[-1]["mae"] == before["cells"][0]["mae"]


def test_rendered_pages_have_the_numbers_of_the_json(results, tmp_path):
    pages = [tmp_path / name for name in ("benchmarks.rst", "benchmarks_heads.rst")]
    for page in pages:
        page.write_text((CHECKOUT / "docs" / page.name).read_text())
    ran = run("render.py", "--page", pages[0], "--page", pages[1], "--results", results)
    assert ran.returncode == 0, ran.stderr
    report = json.loads((results / "accuracy" / "elastic" / "raw.json").read_text())
    maes = [cell["mae"] for cell in report["cells"] if cell["head"] == "BKR"]
    assert "60 of 1181" in pages[0].read_text()
    assert f'"raw", "{np.mean(maes):.4f} ± {np.std(maes):.4f}"' in pages[1].read_text()


def test_classes_of_crystals_are_told_better_than_by_chance(tmp_path):
    result = tmp_path / "classes.json"
    options = ["--task", "stiff", "--features", "raw", "--head", "ET", "--folds", "0", "--result"]
    ran = run("accuracy/classes.py", *options, result)
    assert ran.returncode == 0, ran.stderr
    text = result.read_text()
    run("accuracy/classes.py", *options, result)
    assert result.read_text() == text  # finished cells are skipped
    (cell,) = json.loads(text)["cells"]
    assert cell["auc"] > 0.9
    assert 0.8 < cell["balanced_accuracy"] < cell["auc"]


def test_committed_pages_are_what_the_committed_json_renders():
    import render

    for path in render.PAGES:
        page = path.read_text()
        assert render.render(page, BENCHMARKS / "results") == page


def test_learning_curve_trains_on_so_many_labels(tmp_path):
    quick = ["--features", "dummy", "--head", "ridge", "--limit", 100]
    run_table("learning_curves.py", tmp_path, *quick)
    report = json.loads((tmp_path / "elastic" / "dummy.json").read_text())
    assert {cell["labels"]: cell["n_train"] for cell in report["cells"]}[50] == 50


def test_paper_has_its_own_split(tmp_path):
    run_table("paper.py", tmp_path, "--features", "dummy", "--folds", "80/20")
    (cell,) = json.loads((tmp_path / "elastic" / "dummy.json").read_text())["cells"]
    assert (cell["fold"], cell["n_train"], cell["n_test"]) == ("80/20", 48, 12)


def test_submission_of_a_part_of_the_rows_is_refused(tmp_path):
    submission = ["--features", "dummy", "--head", "ridge", "--submission", tmp_path / "out"]
    limited = ["--task", "elastic", "--limit", "60", "--results", tmp_path]
    ran = run("accuracy/matbench.py", *limited, *submission)
    assert ran.returncode != 0
    assert "60 of 1181" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_submission_holds_a_prediction_of_every_crystal(tmp_path):
    import matbench
    from _runner import run_cells
    from _tasks import load_task

    data = dataclasses.replace(load_task("elastic", limit=60), n_published=60)
    features = run_cells(data, "lattice", ["ridge"], results=tmp_path)
    record = matbench._record(data, features, "ridge", seed=0)
    matbench._write_submission(tmp_path, {"matbench_elastic": record}, "lattice", "ridge")

    with gzip.open(tmp_path / "results.json.gz", "rt") as file:
        written = json.load(file)
    said = written.pop("hash")
    assert said == hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()
    folds = written["tasks"]["matbench_elastic"]["results"]
    assert sorted(folds) == [f"fold_{fold}" for fold in FOLDS]
    assert sorted(i for fold in folds.values() for i in fold["data"]) == sorted(data.ids)
    assert json.loads((tmp_path / "info.json").read_text())["bibtex_refs"]


def test_kernel_ridge_is_scikit_learns_at_its_own_choice():
    from _heads import KernelRidgeCV

    rng = np.random.default_rng(0)
    X = rng.normal(size=(90, 5))
    y = np.sin(X[:, 0]) + X[:, 1] + 7
    ours = KernelRidgeCV(max_search=60).fit(X[:60], y[:60])
    kernel, gamma, alpha = ours.best_
    theirs = KernelRidge(kernel=kernel, gamma=gamma, alpha=alpha).fit(
        X[:60], y[:60] - y[:60].mean()
    )
    np.testing.assert_allclose(ours.predict(X[60:]), theirs.predict(X[60:]) + y[:60].mean())
    assert np.abs(ours.predict(X[60:]) - y[60:]).mean() < np.abs(y[60:] - y[:60].mean()).mean() / 3


def test_kernel_ridge_scores_all_rows_after_a_search_on_some():
    from _heads import KernelRidgeCV

    X = np.random.default_rng(0).normal(size=(90, 2))
    y = X[:, 0] ** 2
    some, all_rows = (KernelRidgeCV(max_search=n).fit(X, y) for n in (45, 90))
    errors = [np.abs(model.inner_prediction_ - y).mean() for model in (some, all_rows)]
    assert errors[0] == pytest.approx(errors[1], rel=0.5)
    assert len(some.dual_coef_) == 90


def test_heads_fill_failed_rows_from_the_training_fold():
    from _heads import HEADS

    X = np.random.default_rng(0).normal(size=(40, 3))
    y = X[:, 0].copy()
    X[3], X[:, 2] = np.nan, np.nan
    for make in HEADS.values():
        assert np.isfinite(make(0, (1, 2)).fit(X[:30], y[:30]).predict(X[30:])).all()


def test_leakage_trains_both_encoders_and_scores_them(tmp_path, small_crystals):
    corpus = write_parquet(small_crystals[0], tmp_path / "corpus.parquet", split="pretrain")
    limited = ["--task", "elastic", "--limit", 15, "--n-crystals", 40, "--head", "ridge"]
    ran = run("accuracy/leakage.py", corpus, *limited, "--results", tmp_path / "accuracy")
    assert ran.returncode == 0, ran.stderr
    reports = [
        json.loads((tmp_path / "accuracy" / "elastic" / f"{name}.json").read_text())
        for name in ("unseen", "seen")
    ]
    assert reports[0]["weights"] != reports[1]["weights"]
    assert [len(report["cells"]) for report in reports] == [5, 5]


@pytest.mark.slow
def test_speed_table_runs(tmp_path):
    few = ["--n-structures", 4, "--peer", "magpie", "--sites", 1, "--crystals", 4]
    ran = run("speed/table.py", *few, "--results", tmp_path)
    assert ran.returncode == 0, ran.stderr
    tables = json.loads((tmp_path / "speed.json").read_text())["tables"]
    names = [row[0] for row in tables[0]["rows"]]
    assert names == ["SSL default", "SSL raw", "magpie"]
    assert sum(share for _, share in tables[1]["rows"]) == pytest.approx(100)


def test_networks_alone_and_with_features(tmp_path):
    cut = ["--variant", "cgcnn", "--variant", "cgcnn+features"]
    ran = run_table("negnn.py", tmp_path, *cut, "--folds", "0", "--labels", 20)
    assert "cgcnn+features" in ran.stdout
    alone, both = json.loads((tmp_path / "elastic.json").read_text())["cells"]
    assert (alone["n_train"], alone["n_test"]) == (20, 12)
    assert alone["parameters"] == both["parameters"]
    assert both["mae"] != alone["mae"]


def test_site_moments_of_networks_trees_and_a_mean(tmp_path, small_crystals):
    X = small_crystals[0][:12]
    both = [
        pd.read_parquet(write_parquet(X, tmp_path / f"{split}.parquet", split=split))
        for split in ("train", "test")
    ]
    frame = pd.concat(both, ignore_index=True)
    # A moment that the element decides, so that the mean of each element is exact.
    frame["magmom"] = [np.asarray(numbers) / 100 for numbers in frame["numbers"]]
    frame.to_parquet(tmp_path / "mp_magmom.parquet")
    files = ["--data", tmp_path, "--result", tmp_path / "result.json"]
    models = ["--model", "element mean", "--model", "site features, ET", "--model", "NEGNN, raw"]
    ran = run("accuracy/mp_magmom.py", *files, *models, "--n-train", 12, "--n-test", 12)
    assert ran.returncode == 0, ran.stderr
    cells = json.loads((tmp_path / "result.json").read_text())["cells"]
    assert [cell["n_test_sites"] for cell in cells] == [sum(map(len, X))] * 3
    assert cells[0]["mae"] < 1e-6
    assert 0 <= cells[1]["mae"] < 0.05
    assert 0 < cells[2]["mae"] < 0.1


@pytest.mark.slow
def test_epoch_of_both_networks_runs(tmp_path):
    ran = run("speed/epoch.py", "--n-structures", 40, "--n-epochs", 1, "--results", tmp_path)
    assert ran.returncode == 0, ran.stderr
    (table,) = json.loads((tmp_path / "epoch.json").read_text())["tables"]
    assert [row[0] for row in table["rows"]] == ["NEGNN, cgcnn", "plain PyG, CGConv"]
    assert table["rows"][0][2] == 1


def test_cut_down_or_other_data_leave_the_committed_results_alone(scripts, tmp_path):
    from _runner import RESULTS, results_folder
    from _tasks import DATA_HOME

    networks = RESULTS.with_name("negnn")
    for committed in (RESULTS, networks):
        assert results_folder(committed, DATA_HOME, None, committed) == committed
        assert results_folder(committed, f"{DATA_HOME}/", None, committed) == committed
        assert results_folder(tmp_path, str(tmp_path), 60, committed) == tmp_path
        for data, limit in ((DATA_HOME, 60), (str(tmp_path), None)):
            apart = results_folder(committed, data, limit, committed)
            assert RESULTS.parent not in apart.parents
    assert results_folder(networks, DATA_HOME, 60, networks) != results_folder(
        RESULTS, DATA_HOME, 60
    )


def test_verdict_on_a_difference(scripts):
    """By hand: mean -1, standard deviation 0.5, so error 0.5 √(1/5 + 1/4) = 0.34, and 2.78 of these are 0.93."""
    from feature_tables import _verdict

    spread = 0.5 * np.array([-1.0, 1.0, 0.0, -1.0, 1.0])
    assert _verdict(spread - 1, "1/cm") == "-1.0 ± 0.3, better"
    assert _verdict(1 - spread, "1/cm") == "+1.0 ± 0.3, worse"
    assert _verdict(spread - 0.9, "1/cm") == "-0.9 ± 0.3, within the noise"
    assert _verdict(np.zeros(5), "1/cm") == "+0.0 ± 0.0, within the noise"


def test_readme_shows_the_committed_demo(scripts):
    from render_readme import README, RESULTS, render

    readme = README.read_text(encoding="utf-8")
    assert render(readme, json.loads(RESULTS.read_text(encoding="utf-8"))) == readme
