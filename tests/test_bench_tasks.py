import json

import matplotlib.pyplot as plt
import pytest

from bench import tasks


def record(condition: str, seed: int, shares: list[float]) -> dict:
    results = [{"n_loops": k, "accuracy": {"answers": share, "1 hop": 1.0}} for k, share in enumerate(shares, start=1)]
    versions = dict.fromkeys(("python", "torch", "numpy"), "1.0")
    where = {"device": "cpu: a processor", "versions": versions, "commit": "abc", "steps": 1500}
    options = ["--preset", "p-hop", "--seed", str(seed), "--eval-loops", "8", *tasks.CONDITIONS[condition]]
    where["options"] = options
    return {"seed": seed, "cpu_seconds": 71.6, "evaluation": results[:2], "evaluation_beyond": results[2:], **where}


@pytest.fixture
def recorded(tmp_path):
    """Records of two seeds in every condition."""
    (tmp_path / "p-hop").mkdir()
    for number, condition in enumerate(tasks.CONDITIONS):
        for seed in (0, 1):
            content = record(condition, seed, [0.25 + number / 8 + seed / 32, 0.5, 0.75])
            (tmp_path / "p-hop" / f"{condition}-seed-{seed}.json").write_text(json.dumps(content))
    return tmp_path


def test_page_and_figure_of_records(recorded, monkeypatch, capsys):
    shown: list[plt.Figure] = []
    monkeypatch.setattr(plt, "close", shown.append)
    monkeypatch.setattr(tasks, "train", None)  # nothing that is there is trained again
    tasks.main(["p-hop", "--seeds", "0", "1", "--out", str(recorded)])
    monkeypatch.undo()
    lines = (recorded / "p-hop" / "accuracy.md").read_text().splitlines()
    assert lines[0] == "cpu: a processor; python 1.0, torch 1.0, numpy 1.0; commit abc; 1500 steps."
    assert lines[2] == "| | seed | K = 1 | K = 2 | K = 3 | CPU seconds |"
    assert lines[4] == "| trained at K = 4 | 0 | 0.250 | 0.500 | 0.750 | 72 |"
    assert lines[-1] == "| trained at K = 1 | 1 | 0.531 | 0.500 | 0.750 | 72 |"
    assert capsys.readouterr().out.startswith(lines[0])
    whole, parts = shown[0].axes
    curves = [list(line.get_ydata()) for line in whole.lines[:-1]]
    assert curves == [[0.25 + n / 8 + seed / 32, 0.5, 0.75] for n in range(3) for seed in (0, 1)]
    assert [list(line.get_xdata()) for line in parts.lines[:-1]] == [[1, 2, 3]] * 2
    plt.close(shown[0])


def test_a_missing_record_is_trained_and_kept(recorded, monkeypatch, capsys):
    missing = recorded / "p-hop" / "uniform-4-8-seed-1.json"
    kept = json.loads(missing.read_text())
    missing.unlink()
    asked = []

    def train(options):
        asked.append(options)
        run = recorded / "runs" / "p-hop" / "uniform-4-8-seed-1"
        assert options[-1] == str(run)
        run.mkdir(parents=True)
        (run / "summary.json").write_text(json.dumps(kept))
        return 0

    monkeypatch.setattr(tasks, "train", train)
    tasks.main(["p-hop", "--seeds", "0", "1", "--out", str(recorded), "--runs", str(recorded / "runs")])
    words = "--preset p-hop --seed 1 --eval-loops 8 --depth uniform:4-8"
    assert " ".join(asked[0]).startswith(words)
    assert len(asked) == 1
    assert " ".join(json.loads(missing.read_text())["options"]) == words
    monkeypatch.setattr(tasks, "train", lambda options: 1)
    missing.unlink()
    with pytest.raises(SystemExit):
        tasks.main(["p-hop", "--seeds", "0", "1", "--out", str(recorded), "--runs", str(recorded / "runs")])
    assert "uniform-4-8-seed-1 was not trained to its end. Remove it." in capsys.readouterr().err


def test_a_record_of_other_options_is_refused(recorded, capsys):
    path = recorded / "p-hop" / "one-loop-seed-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"options": ["--steps", "3"]}))
    with pytest.raises(SystemExit):
        tasks.main(["p-hop", "--seeds", "0", "1", "--out", str(recorded)])
    assert "one-loop-seed-0.json must be the record of" in capsys.readouterr().err
