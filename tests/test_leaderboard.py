"""The leaderboard says what it shows and what it left out; a record says forever what its runs said."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.cli import InputError
from scripts.leaderboard import BEGIN, END, main
from tests.test_records import log_text, run_rows, write_run

ROOT = Path(__file__).parent.parent
README = f"# Title\n\n{BEGIN}\nold\n{END}\n\nText after.\n"


@pytest.fixture
def runs(tmp_path):
    """Two seeds of random and of up, and a run of down that was killed."""
    for i, final in enumerate((3.0, 3.2)):
        write_run(tmp_path / f"runs/random{i}", run_rows("random", f"r{i}", final, seed=i))
        write_run(tmp_path / f"runs/up{i}", run_rows("up", f"u{i}", final - 0.2, seed=i))
    write_run(tmp_path / "runs/down0", run_rows("down", "d0", 3.0)[:-1])
    (tmp_path / "README.md").write_text(README)
    return tmp_path / "runs"


@pytest.fixture
def places(tmp_path):
    return dict(records=tmp_path / "records", readme=tmp_path / "README.md")


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]


# -- On the terminal


def test_every_arm_is_shown_and_what_is_left_out_is_said(runs, capsys):
    main((runs,), baseline="random")
    shown = capsys.readouterr().out
    assert [row[:3] for row in cells(shown)[2:]] == [["random", "2", "3.1000"], ["up", "2", "2.9000"]]
    assert shown.endswith(f"note: {runs / 'down0'}: not finished: left out\n")


def test_it_says_what_could_have_been_seen(runs, capsys):
    """Pooled sd 0.1414, two seeds each: by the test of power, 5.86 sd are seen 8 times in 10."""
    main((runs,), baseline="random", effect=0.5)
    shown = capsys.readouterr().out
    assert "With 2 against 2, a spread of 0.1414 nats (pooled) and 1 arm under Holm at 0.05" in shown
    assert "an improvement of 0.8289 nats is shown 8 times in 10" in shown
    assert "to show 0.5 nats with a chance of 80 %: 3 order seeds in each arm" in shown


def test_a_target_adds_the_public_rules_and_the_way_to_it(runs, capsys):
    main((runs,), baseline="random", target=3.25)
    first, second = (cells(part) for part in capsys.readouterr().out.split("\n\n")[::2][:2])
    assert first[0][-2:] == ["tokens to target", "steps to it"]
    assert [row[-2:] for row in first[2:]] == [["1,700", "17"], ["1,300", "13"]]
    assert [row[0] for row in second[2:]] == ["random", "up"] and second[0][-1] == "≥ 0.004"


def test_the_cost_of_scoring_is_a_column_of_its_own(runs, capsys):
    main((runs,), baseline="random", scoring_cost_tokens=200)
    head, _, random, up = cells(capsys.readouterr().out)
    saved, less = head.index("tokens saved"), head.index("less scoring")
    share = float(up[saved].split(" ")[0]) / 100
    assert random[less] == "–" and float(up[less].removesuffix(" %")) == pytest.approx(
        100 * (1 - 1.1 * (1 - share)), abs=0.2
    )


def test_the_report_is_written(runs, tmp_path, capsys):
    main((runs,), baseline="random", out=tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (dict(runs=()), "no runs given"),
        (dict(baseline=""), "--baseline is missing"),
        (dict(baseline="nobody"), "--baseline nobody: no finished run has that name; finished are: random, up"),
        (dict(out=Path(".")), "is a folder; name an .html file"),
        (dict(alpha=1.5), "--alpha 1.5"),
        (dict(target=-1.0), "--target -1.0"),
        (dict(check=True), "--check reads the records alone"),
        (dict(record="a/b"), "--record 'a/b': expected letters"),
        (dict(runs=(Path("/nowhere/at/all"),)), "/nowhere/at/all: no run there"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(runs, given, sentence):
    given = dict(runs=(runs,), baseline="random") | given
    with pytest.raises(InputError, match=re.escape(sentence)):
        main(given.pop("runs"), **given)


# -- Public logs


def test_folders_of_public_logs_are_rows(tmp_path, capsys):
    for name, losses in dict(base=(3.2790, 3.2794, 3.2786), new=(3.2760, 3.2764, 3.2756)).items():
        for i, loss in enumerate(losses):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{i}.txt").write_text(log_text(["10.8", "3.5", f"{loss:.4f}"]))
    (tmp_path / "new" / "killed.txt").write_text(log_text(["10.8", "3.5"]))
    main((tmp_path,), baseline="base")
    shown = capsys.readouterr().out
    public, against = (cells(part) for part in shown.split("\n\n"))
    assert [row[:4] for row in public[2:]] == [["base", "3", "3.27900", "0.00040"], ["new", "3", "3.27600", "0.00040"]]
    assert [row[7:9] for row in public[2:]] == [["no", "20"], ["yes", "20"]]  # 0.001 sqrt 3 and 0.004 sqrt 3
    assert against[3][:2] == ["new", "3"] and against[3][4] == "-0.0030" and "claim" not in against[0]
    assert f"{tmp_path / 'new' / 'killed.txt'}: stops at step 10 of 20: left out" in shown
    assert "share one data order" in shown
    main((tmp_path / "base" / "0.txt",), target=3.4)
    assert cells(capsys.readouterr().out)[2][:4] == ["base", "1", "3.27900", "–"]


def test_logs_have_no_report_and_no_record(tmp_path, places):
    (tmp_path / "a.txt").write_text(log_text(["10.8", "3.5", "3.3"]))
    for given in (dict(out=tmp_path / "report.html"), dict(record="name")):
        with pytest.raises(InputError, match="need run folders"):
            main((tmp_path,), **given, **places)
    with pytest.raises(InputError, match="--baseline nobody: no folder of logs has that name"):
        main((tmp_path,), baseline="nobody")


# -- Records


@pytest.fixture
def record(runs, places, capsys):
    main((runs,), baseline="random", target=3.25, record="first", **places)
    capsys.readouterr()
    (folder,) = places["records"].iterdir()
    return folder


def test_a_record_holds_all_that_its_table_follows_from(record, runs, places, capsys):
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-first", record.name)
    names = {path.name for path in record.iterdir()}
    assert names == {"record.json", "runs.jsonl.gz", "arms.json", "table.md"}
    kept = [json.loads(line) for line in gzip.decompress((record / "runs.jsonl.gz").read_bytes()).splitlines()]
    assert [run["folder"] for run in kept] == ["down0", "random0", "random1", "up0", "up1"]
    assert all("val_nats" in row for run in kept for row in run["rows"])
    arms = json.loads((record / "arms.json").read_text())
    assert arms["up"]["config"]["optim"] == dict(muon_lr=0.02)
    assert [run["order"]["order_sha256"] for run in arms["up"]["runs"]] == ["u0", "u1"]
    shutil.rmtree(runs)
    main(check=True, **places)
    assert capsys.readouterr().out == "1 record, 2 arms: every row is what its runs say\n"


def test_the_readme_shows_the_table_between_its_markers(record, places):
    shown = places["readme"].read_text()
    table = (record / "table.md").read_text()
    before, _, rest = shown.partition(BEGIN)
    inside, _, after = rest.partition(END)
    assert (before, after) == ("# Title\n\n", "\n\nText after.\n") and "old" not in inside
    assert [line for line in inside.splitlines() if line.startswith("|")] == [
        line for line in table.splitlines() if line.startswith("|")
    ]
    assert f"**{record.name}**" in inside and "1 note and all runs" in inside and "not finished" not in inside


def test_the_newest_record_comes_first_and_a_name_is_taken_once_a_day(record, runs, places):
    older = record.with_name("2020-01-01-older")
    shutil.copytree(record, older)
    main((runs,), baseline="up", record="second", **places)
    shown = places["readme"].read_text()
    assert [shown.index(f"**{d}-") for d in (record.name[:10], "2020-01-01")] == sorted(
        shown.index(f"**{d}-") for d in (record.name[:10], "2020-01-01")
    )
    with pytest.raises(InputError, match="already there"):
        main((runs,), baseline="up", record="second", **places)


def edit_runs(record, change):
    path = record / "runs.jsonl.gz"
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()).decode()).encode()))


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (
            lambda record, _: edit_runs(record, lambda text: text.replace('"val_nats": 2.8', '"val_nats": 2.7')),
            "arms.json",
        ),
        (lambda record, _: edit_runs(record, lambda text: text.replace('"up"', '"upp"', 1)), "table.md: line"),
        (lambda record, _: edit_runs(record, lambda text: text[:-40]), "not the runs of a record"),
        (lambda record, _: (record / "runs.jsonl.gz").write_bytes(b"\x1f\x8b"), "not the runs of a record"),
        (lambda record, _: rewrite(record / "table.md", "2.9000", "2.8000"), "table.md: line 4 is '| up | 2 | 2.8000"),
        (lambda record, _: rewrite(record / "record.json", '"target": 3.25', '"target": 3.2'), "table.md: line"),
        (lambda record, _: (record / "arms.json").unlink(), "arms.json: line 1 is 'no such line'"),
        (lambda _, readme: rewrite(readme, "2.9000", "2.8000"), "README.md: line"),
    ],
)
def test_check_finds_whatever_differs(record, places, capsys, tamper, said):
    tamper(record, places["readme"])
    with pytest.raises(SystemExit) as left:
        main(check=True, **places)
    assert left.value.code == 1 and said in capsys.readouterr().err


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("text", ["", f"{END} {BEGIN}", BEGIN, f"{BEGIN}{BEGIN}{END}"])
def test_without_its_markers_nothing_is_written(runs, places, text):
    places["readme"].write_text(text)
    with pytest.raises(InputError, match="the leaderboard goes between the lines"):
        main((runs,), baseline="random", record="first", **places)
    assert not places["records"].exists() and places["readme"].read_text() == text


def test_without_records_there_is_nothing_to_check(places, capsys):
    main(check=True, **places)
    assert "no records there, nothing to check" in capsys.readouterr().out


def test_the_records_of_this_repository_are_what_their_runs_say():
    command = [sys.executable, "-m", "scripts.leaderboard", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_report_of_a_sweep_of_hundreds_of_runs_stays_small(tmp_path, capsys):
    """Fifteen megabytes for 100 arms, of which plotly takes nearly five; curves as finely logged as a real run's."""
    for arm in ["random", *(f"arm{i}" for i in range(99))]:
        for seed in range(2):
            rows = run_rows(arm, f"{arm}{seed}", 3.0 + 0.01 * seed, steps=2000)
            write_run(tmp_path / f"runs/{arm}/{seed}", rows)
    main((tmp_path / "runs",), baseline="random", out=tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 15e6
