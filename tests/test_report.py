"""The record holds what was asked for, and the page shows it without help from outside."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser

import pydantic
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tamba import plots, report
from tamba.errors import UserError
from tamba.report import (
    CachePoint,
    Chat,
    Curve,
    FrontierPoint,
    Layers,
    LossPoint,
    Measured,
    Paired,
    Perplexity,
    PlanLayer,
    Point,
    Record,
    RepairStep,
    Score,
    compare,
    is_share,
    number,
    read_record,
    render,
    write_report,
)

ODD = "a <b> & $x^$ “日本”"


def full_record(**sections) -> Record:
    converted = {1, 3}
    known = {
        "teacher": "the teacher",
        "command": "tamba run recipe.toml --out demo",
        "date": "2026-11-22T10:00:00+00:00",
        "perplexity": Perplexity(
            teacher=20.0,
            student=22.0,
            ratio=1.1,
            ratio_error=0.0041,
            tokens=41203,
            length=512,
            kl=0.1,
            agreement=0.85,
            bits_per_byte={"teacher": 0.9, "student": 0.93},
        ),
        "layers": Layers(total=5, converted=2),
        "plan": [
            PlanLayer(
                mixer="mamba2" if i in converted else "attention",
                origin="converted" if i in converted else "kept",
                source="the teacher",
                source_layer=i,
            )
            for i in range(5)
        ],
        "scores": [0.9, 0.01, 0.3, 0.02, None],
        "score_name": "loss added",
        "frontier": [FrontierPoint(converted=n, ratio=1 + n / 9, stage="fitted") for n in range(4)]
        + [FrontierPoint(converted=2, ratio=1.1, stage=ODD, chosen=True)],
        "repair": [RepairStep(name="surgery", ratio=240.0), RepairStep(name="fit", ratio=1.1)],
        "training": [LossPoint(stage="align", tokens=n * 100, loss=1 / n) for n in range(1, 60)],
        "memory": [
            CachePoint(context=c, teacher=c * 5000, student=c * 3000 + 10**6)
            for c in (1024, 8192, 32768)
        ],
        "chat": [Chat(prompt=ODD, teacher="Paris.", student="<script>alert(1)</script>\nParis.")],
        "answer": "Paris.",
        "seconds": {"analyze": 61.2, "build": 9.0, "evaluate": 130.0},
        "versions": {"torch": "2.13.0"},
        "hardware": {"cpu": "some", "cores": "2"},
        "digests": {"text": "ab" * 32},
        "recipe": 'name = "demo"  # <tag>',
    }
    return Record(name=ODD, **(known | sections))


def share(value: float, n: int = 30, **more) -> dict:
    return {"value": value, "n": n, "low": max(0, value - 0.1), "high": min(1, value + 0.1), **more}


def suites(student: float = 0.4, *, teacher: bool = True) -> dict[str, Measured]:
    """What an evaluation measures: a task, one that was stopped, a curve, and speed."""
    roles = ["student", "teacher"] if teacher else ["student"]
    task = {
        role: {"acc": Score(**share(student if role == "student" else 0.5, 200, error=0.02))}
        for role in roles
    }
    worse = Paired(
        difference=student - 0.5, n=200, low=-0.2, high=-0.01, p=0.01, test="mcnemar",
        student_higher=5, teacher_higher=25,
    )  # fmt: skip
    lengths = {
        role: [Point(x=2.0**k, **share(1 - 0.1 * (k - 8))) for k in range(8, 14)] for role in roles
    }
    speeds = {
        role: [Point(x=x, value=v, n=3) for x, v in ((1024.0, 10.0), (32768.0, 9.0 - i))]
        for i, role in enumerate(roles)
    }
    return {
        "task": Measured(
            about=ODD, settings={"seed": 0}, scores=task, paired={"acc": worse} if teacher else {}
        ),
        "stopped": Measured(problem="the disk is full"),
        "phonebook": Measured(curves={"acc": Curve(axis="length, tokens", points=lengths)}),
        "speed": Measured(
            scores={
                "student": {
                    "break_even_decode_tokens": Score(value=2048, n=3),
                    "break_even_memory_tokens": Score(value=1024, n=1),
                }
            },
            curves={"decode_tokens_per_second": Curve(axis="context, tokens", points=speeds)},
            rows=[{"role": "student", "context": 1024, "tokens_per_second": 10.0, "note": None}],
        ),
    }


class Page(HTMLParser):
    """Elements, ids, words and unbalanced tags of a page."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if not self.open or self.open[-1] != "style":
            self.words += " " + text


RECORDS = {
    "full": full_record(),
    "suites": full_record(suites=suites()),
    "suites alone": Record(name="x", suites=suites(teacher=False)),
    "nothing": Record(name="bare"),
    "model alone": Record(
        name="m", perplexity=Perplexity(student=9.5, tokens=10, bits_per_byte={"student": 1.0})
    ),
    "no scores": full_record(scores=[]),
    "one layer": full_record(
        plan=[PlanLayer(mixer="mamba1", origin="reinitialized")], scores=[0.1]
    ),
    "donor": full_record(
        plan=[PlanLayer(mixer="mamba1", origin="transplanted")] * 100, scores=[1.0] * 100
    ),
    "better": full_record(perplexity=Perplexity(teacher=3.0, student=2.0, ratio=2 / 3, tokens=5)),
    "flat": full_record(
        frontier=[FrontierPoint(converted=0, ratio=1.0, stage="s")],
        repair=[RepairStep(name="one", ratio=1.0)],
        training=[LossPoint(stage="a", tokens=1, loss=0.0)],
        scores=[0.0] * 5,
        seconds={"a": 0.0},
    ),
    "odd": full_record(
        training=[LossPoint(stage=f"{ODD}{i % 3}", tokens=i, loss=-1.0 * i) for i in range(9)],
        scores=[-1.0, 2.0, None, 1e-9, 5.0],
        memory=[CachePoint(context=1000, student=5), CachePoint(context=2000, student=9)],
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_gives_a_whole_page_that_needs_nothing_else(name):
    text = render(RECORDS[name])
    page = Page(text)
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    outside = [v for k, v in page.attributes if v and "//" in v and not k.startswith("xmlns")]
    assert outside == []
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    # References of drawings meet their own definitions.
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert used <= set(page.ids)
    # A drawing that kept a colour of its own would not follow the dark theme.
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) <= {"#000000", "#ffffff"} - set(
        plots.LIGHT.values()
    )
    assert "font-family" not in drawings


@pytest.fixture(scope="module")
def full_page():
    return render(full_record())


def test_the_page_says_what_matters(full_page):
    words = " ".join(Page(full_page).words.split())
    for said in (
        "2 of 5 layers are Mamba-2 now, and 90.9 % of the quality is kept.",
        "On 41,203 held-out tokens the perplexity went from 20.00 to 22.00 , 1.100 times",
        "± 0.0041",
        "Cache at 8k tokens −38 %",
        "Cache at 32k tokens −39 %",
        "Time 3 min 20 s",
        "<script>alert(1)</script>",
        ODD,
    ):
        assert said in words, said


def test_the_page_says_what_the_suites_found():
    text = render(full_record(suites=suites()))
    words = " ".join(Page(text).words.split())
    for said in (
        "acc 50.0 % ± 2.0 40.0 % ± 2.0 −10.0 points 0.010 200",
        "stopped not complete: the disk is full",
        "break even decode tokens 2,048",
        "Decoding at 32,768 tokens 1.12 × the teacher’s speed, 9.00 tokens/s; "
        "at least as fast from 2,048 tokens on, smaller from 1,024 on",
    ):
        assert said in words, said
    assert '<td class="n worse">−10.0 points</td>' in text
    labels = [v for k, v in Page(text).attributes if k == "aria-label"]
    assert "phonebook: acc, along length, tokens. teacher: 1 to 0.5; hybrid: 1 to 0.5" in labels


def runs_on_disk(folder, **accuracies: float) -> list:
    for name, accuracy in accuracies.items():
        record = full_record(
            suites=suites(accuracy), perplexity=Perplexity(teacher=20.0, student=22.0, tokens=9)
        )
        write_report(record, folder / name, html=False)
    return [folder / name for name in accuracies]


def test_runs_are_compared(tmp_path):
    runs = runs_on_disk(tmp_path, a=0.40, b=0.41, c=0.60)
    page = report.report(runs, tmp_path / "out")
    Page(page.read_text())
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["runs"] == ["a", "b", "c"]
    rows = {(row["suite"], row["name"]): row for row in found["rows"]}
    accuracy = rows["task", "acc"]
    assert {k: v["value"] for k, v in accuracy["values"].items()} == {
        "a": 0.4, "b": 0.41, "c": 0.6, "teacher": 0.5,
    }  # fmt: skip
    assert accuracy["best"] == "c"
    assert rows[None, "perplexity"]["best"] is None  # all alike
    drawn = {p.name for p in (tmp_path / "out" / "plots").iterdir()}
    assert {"phonebook-acc.png", "phonebook-acc.svg", "speed-decode_tokens_per_second.png"} <= drawn


def test_the_best_leads_by_more_than_the_noise():
    def best(a: float, b: float, metric: str) -> str | None:
        runs = {
            name: Record(
                name=name,
                suites={
                    "t": Measured(scores={"student": {metric: Score(value=v, n=9, error=0.1)}})
                },
            )
            for name, v in (("a", a), ("b", b))
        }
        return compare(runs).rows[-1].best

    assert best(1.0, 1.3, "perplexity") == "a"
    assert best(0.2, 0.5, "exact_match") == "b"
    assert best(0.2, 0.35, "acc") is None
    assert best(1.0, 9.0, "something") is None


def test_other_text_or_items_are_not_compared(tmp_path):
    def row(metric, **settings):
        runs = {
            name: Record(
                name=name,
                perplexity=Perplexity(student=v, tokens=settings.get(name, 9)),
                suites={
                    "t": Measured(
                        settings={"data": settings.get(name, "x"), "judge_usage": v},
                        scores={"student": {"acc": Score(value=v / 9, n=9, error=0.01)}},
                    )
                },
            )
            for name, v in (("a", 2.0), ("b", 4.0))
        }
        found = compare(runs)
        page = report._render_comparison(runs, found)
        (row,) = (r for r in found.rows if r.name == metric)
        assert (" *</th>" in page) == (not row.alike) == ("do not compare" in page)
        return row

    assert row("acc").best == "b" and row("perplexity").best == "a"
    assert row("acc", b=8).best is row("perplexity", b=8).best is None


def test_a_grade_is_no_share():
    assert is_share("acc", [Score(value=1.0, n=3)])
    assert not is_share("score", [Score(value=1.0, n=3)])
    assert not is_share("score, turn 1", [Score(value=1.0, n=3)])


def test_places_of_a_curve_are_those_that_were_measured():
    points = [Point(x=x, value=0.5, n=3, low=0.4, high=0.6) for x in (1000, 2048)]
    page = render(
        full_record(
            suites={"s": Measured(curves={"acc": Curve(axis="x", points={"student": points})})}
        )
    )
    assert ">1000<" in page and ">2k<" in page and not re.search(r">\d\.\d{3,}k<", page)


def test_one_run_is_drawn_again(tmp_path):
    (run,) = runs_on_disk(tmp_path, a=0.4)
    page = report.report([run / "report.json"], tmp_path / "again")
    assert page.read_text() == render(read_record(run / "report.json"))


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [*runs_on_disk(tmp_path / "x", a=0.4), *runs_on_disk(tmp_path / "y", a=0.5)]
    report.report(runs, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["runs"] == ["a", "y/a"]
    with pytest.raises(UserError, match="is given twice"):
        report.report([runs[0], runs[0] / "report.json"], tmp_path / "out")
    with pytest.raises(UserError, match="no run was given"):
        report.report([], tmp_path / "out")
    with pytest.raises(UserError, match=r"nowhere.*No such file"):
        report.report([tmp_path / "nowhere"], tmp_path / "out")


def test_drawings_describe_themselves(full_page):
    labels = [v for k, v in Page(full_page).attributes if k == "aria-label"]
    assert len(labels) == 6
    assert any("2 layers: 1.10" in label for label in labels)
    assert any("surgery: 240; fit: 1.10" in label for label in labels)


def drawn(record: Record) -> dict[str, Figure]:
    """The figures that stand alone, rendered, by name."""
    figures = dict(plots.draw_all(record, titles=True))
    with plots.drawing():
        for figure in figures.values():
            FigureCanvasAgg(figure).draw()
    return figures


def test_titles_are_not_cut_off():
    curve = Curve(axis="tokens", points={"student": [Point(x=1, value=1, n=1)]})
    suites = {
        "a_long_name_of_a_suite": Measured(
            about="", curves={"and_a_long_one_of_what_it_measures": curve}
        )
    }
    frontier = [FrontierPoint(converted=n, ratio=1 + n / 10, stage="swap") for n in (1, 2)]
    figures = drawn(Record.begin("x", frontier=frontier, suites=suites))
    assert len(figures) == 2
    for figure in figures.values():
        assert figure.get_suptitle()
        assert figure.texts[0].get_window_extent().x1 < 0.99 * figure.bbox.x1


@pytest.mark.parametrize("ratios", [(1.007, 1.011), (1.0, 1.0004), (1.07, 2.62), (0.98, 0.995)])
def test_marks_of_ratios_are_told_apart(ratios):
    points = [FrontierPoint(converted=n, ratio=r, stage="swap") for n, r in enumerate(ratios, 1)]
    axes = drawn(Record.begin("x", frontier=points))["frontier"].axes[0]
    words = [tick.get_text() for tick in axes.get_yticklabels()]
    assert len(set(words)) == len(words) > 2
    assert all(float(w) == pytest.approx(y) for w, y in zip(words, axes.get_yticks(), strict=True))


def test_a_stage_of_one_step_is_seen():
    points = [LossPoint(stage="least_squares", tokens=1024, loss=0.1)]
    axes = drawn(Record.begin("x", training=points))["training"].axes[0]
    assert any(line.get_marker() == "o" for line in axes.lines)
    # Nothing is hung on a number that the axis makes up around it.
    assert axes.get_ylim()[0] == 0
    for label in axes.get_yticklabels():
        assert label.get_window_extent().x0 >= 0


def test_words_beside_the_training_curves_do_not_meet():
    # The stages of the demo.
    stages = {"least_squares 1": [16384], "align": [1024, 49152], "least_squares 2": [12288]}
    stages["distil"] = [2048, 16384]
    points = [
        LossPoint(stage=name, tokens=tokens, loss=0.4)
        for name, at in stages.items()
        for tokens in at
    ]
    figure = drawn(Record.begin("x", training=points))["training"]
    assert len(figure.axes) == 4
    words = []
    for axes in figure.axes:
        words.append(axes._left_title.get_window_extent())
        for along, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for at, text in zip(along.get_ticklocs(), along.get_ticklabels(), strict=True):
                if low <= at <= high:
                    words.append(text.get_window_extent())
    assert len(words) > 16
    assert not any(a.overlaps(b) for i, a in enumerate(words) for b in words[:i])


def test_words_can_be_read_in_either_theme():
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in (0, 1):
        paper = luminance(plots.PALETTE["paper"][theme])
        for name in ("ink", "muted", "student"):
            color = luminance(plots.PALETTE[name][theme])
            contrast = (max(paper, color) + 0.05) / (min(paper, color) + 0.05)
            assert contrast >= 4.5, (name, theme)  # WCAG 2.2, criterion 1.4.3


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "demo"
    assert write_report(full_record(), folder) == folder / "report.json"
    return folder


def test_the_record_survives_its_file(written):
    path = written / "report.json"
    assert read_record(path) == full_record()
    raw = json.loads(path.read_text())
    assert {"teacher", "student", "ratio", "tokens"} <= raw["perplexity"].keys()
    assert raw["layers"] == {"total": 5, "converted": 2}
    assert raw["seconds"]["build"] == 9.0
    assert (raw["answer"], raw["versions"]) == ("Paris.", {"torch": "2.13.0"})
    found = sorted(str(p.relative_to(written)) for p in written.rglob("*.*"))
    drawn = [f"plots/{n}.{e}" for n in sorted(plots.NAMES) for e in ("png", "svg")]
    assert found == [*drawn, "report.html", "report.json"]
    for path in (written / "plots").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_same_record_gives_the_same_bytes(written, tmp_path):
    write_report(full_record(), tmp_path)
    files = [p.relative_to(written) for p in written.rglob("*") if p.is_file()]
    assert all((tmp_path / f).read_bytes() == (written / f).read_bytes() for f in files)


def test_the_record_alone_needs_no_drawing(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "_MISSING", True)
    write_report(full_record(), tmp_path / "a", html=False)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["report.json"]
    with pytest.raises(
        UserError, match=r"matplotlib: is not installed; pip install 'tamba\[report\]'"
    ):
        write_report(full_record(), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    record = Record(name="x", answer="first")
    write_report(record, tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    write_bytes = report.Path.write_bytes

    def fill(path, content):
        if "report.html" in path.name:
            write_bytes(path, content[:100])
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(report.Path, "write_bytes", fill)
    with pytest.raises(UserError, match="No space left on device"):
        write_report(record.updated(answer="second"), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert read_record(tmp_path / "report.json").answer == "first"
    assert not list(tmp_path.rglob("*.partial"))


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(UserError, match="out"):
        write_report(Record(name="x"), tmp_path / "out", html=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not a record"),
        ('{"name": "x", "colour": 1}', "colour: not a record"),
        (
            '{"name": "x", "layers": {"total": "many", "converted": 1}}',
            "layers.total: not a record",
        ),
    ],
)
def test_files_that_are_no_records(tmp_path, content, message):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_record(path)


def test_a_record_takes_only_finite_numbers():
    with pytest.raises(pydantic.ValidationError):
        RepairStep(name="x", ratio=float("nan"))
    with pytest.raises(pydantic.ValidationError):
        full_record().updated(layers={"total": 1})
    assert full_record().updated(answer="No.").answer == "No."


def test_a_record_knows_where_it_was_made():
    record = Record.begin("x", answer="yes")
    assert record.versions["torch"]
    assert int(record.hardware["cores"]) >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record.date)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (90.54, 3, "90.5"),
        (100, 3, "100"),
        (41203, 3, "41,203"),
        (0.0041, 2, "0.0041"),
        (0, 3, "0.00"),
        (-1.2345, 3, "−1.23"),
        (1234.5, 3, "1,234"),
        (0.991, 3, "0.991"),
        (5, 4, "5.000"),
    ],
)
def test_numbers(value, digits, text):
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("size", "text"), [(5, "5 B"), (1536, "1.5 KiB"), (7.5 * 2**20, "7.5 MiB"), (2**40, "1 TiB")]
)
def test_byte_sizes(size, text):
    assert plots.byte_size(size) == text


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1180])
def test_a_browser_shows_the_page_within_its_width(tmp_path, width):
    write_report(full_record(suites=suites()), tmp_path)
    probe = tmp_path / "probe.html"
    # The page holds no scripts, so another page measures it from outside.
    probe.write_text(
        f"<body><iframe src='report.html' width='{width}' height='4000'></iframe><script>"
        "onload = () => { const d = frames[0].document.documentElement;"
        "const names = [...d.querySelectorAll('.scores tbody tr:not(.suite) th')];"
        "document.title = [d.scrollWidth, d.querySelectorAll('svg').length,"
        "Math.max(...names.map(n => n.offsetHeight))].join(' ') }</script>"
    )
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
    ]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path}/profile"]
    command += ["--virtual-time-budget=5000", "--dump-dom", probe.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ})
    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", shown.stdout)
    assert found is not None, shown.stderr[-500:]
    wide, figures, highest = map(int, found.groups())
    assert wide <= width and figures == 7
    # Names of metrics keep their words whole, and are not set letter under letter.
    assert highest < 120


def test_rows_of_a_table_may_lack_cells():
    """Of two rows, the first has no peak, and the second ran out of memory."""
    rows = [
        {"role": "student", "context": 8, "floor": 2**20},
        {"role": "teacher", "context": 8, "floor": 2**21, "peak": 3 * 2**20, "note": "full"},
    ]
    page = render(full_record(suites={"memory": Measured(rows=rows)}))
    table = page[page.index("memory, row by row") :]
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", table[: table.index("</thead>")])
    assert heads == ["role", "context", "floor", "peak", "note"]
    body = table[: table.index("</tbody>")].split("<tbody>")[1].split("</tr>")[:2]
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", line) for line in body]
    assert cells[0] == ["student", "8", "1 MiB", "–", "–"]
    assert cells[1] == ["teacher", "8", "2 MiB", "3 MiB", "full"]


@pytest.mark.parametrize("program", ["/somewhere/bin/tamba", "/somewhere/tamba/__main__.py"])
def test_the_command_can_be_given_again(program, monkeypatch):
    said = ["run", "a recipe.toml", "--set", "build.plan=uniform 0.5"]
    monkeypatch.setattr("sys.argv", [program, *said])
    command = Record.begin("name").command
    assert command is not None and shlex.split(command) == ["tamba", *said]
