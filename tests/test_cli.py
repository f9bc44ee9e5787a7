"""The command line: help, configuration, and one clear line for everything that is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from vitmix.cli import COMMANDS, main
from vitmix.evaluate import figures, preview
from vitmix.evaluate.study import studies
from vitmix.models import create_model, load_released
from vitmix.train.checkpoint import load_trained
from vitmix.train.methods import METHODS

SMALL = ["--train-limit", "64", "--img-size", "16", "--batch-size", "32", "--epochs", "1",
         "--threads", "1", "--device", "cpu"]  # fmt: skip


def train(tmp_path: Path, *arguments: str) -> list[str]:
    return ["train", *SMALL, "--out", str(tmp_path / "runs"), *arguments]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr; stdout must be empty."""
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert err.count("\n") == 1
    assert err.startswith("vitmix: ")
    return err


# --- help and configuration


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"example:\n  vitmix {command}" in out


def test_help_names_the_methods_and_the_studies(capsys: pytest.CaptureFixture[str]) -> None:
    for command, names in (("train", METHODS), ("study", studies())):
        assert main([command, "--help"]) == 0
        words = re.split(r"[\s,()]+", capsys.readouterr().out)
        assert {part for name in names for part in name.split("+")} <= set(words)


@pytest.mark.parametrize(
    ("command", "size"), [("preview", preview.BATCH), ("figure", figures.BATCH)]
)
def test_help_has_the_commands_own_defaults(
    command: str, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"images a step, of all processes together [{size}]" in out
    assert ("[digits]" in out) == (command == "preview")  # a figure takes the data of its run


def test_overview_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["help"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(command in out for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vitmix 0.")


def test_examples_in_help_parse(capsys: pytest.CaptureFixture[str]) -> None:
    from vitmix.options import Parser

    for name, command in COMMANDS.items():
        parser = Parser(f"vitmix {name}", command.summary, command.example)
        command.configure(parser)
        parser.parse(command.example.split()[2:])


def test_file_then_options_make_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("epochs: 7\nbatch_size: 16\nlr: 1e-3\n")
    arguments = ["--config", str(path), "--batch_size=8", "--tau", "inf", "--model-ema"]
    arguments += ["--scale", "0.5", "1", "--mix", "tokenmix", "--labels", "{name: aligned}"]
    arguments += ["--tokens", "[{name: horizontal, block: 1}, vertical]"]
    assert main(["train", *arguments, "--print-config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert (settings["epochs"], settings["batch_size"]) == (7, 8)
    assert settings["lr"] == 1e-3
    assert settings["tau"] == float("inf")
    assert settings["model_ema"] is True
    assert settings["scale"] == [0.5, 1.0]
    assert (settings["mix"], settings["labels"]) == ("tokenmix", {"name": "aligned"})
    assert settings["tokens"] == [{"name": "horizontal", "block": 1}, "vertical"]


def test_saved_settings_train_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = "[{name: horizontal, tau: 5, assignment: grouped:4}]"
    options = [
        "--cutmix",
        "1",
        "--tokens",
        tokens,
        "--seed",
        "3",
        "--scale",
        "0.5",
        "1",
        "--max-steps",
        "1",
    ]
    assert main(train(tmp_path, "--name", "a", *options)) == 0
    saved = tmp_path / "runs" / "a" / "config.yaml"
    assert main(["train", "--config", str(saved), "--name", "b"]) == 0
    results = [
        json.loads((tmp_path / "runs" / name / "results.json").read_text()) for name in ("a", "b")
    ]
    assert results[0]["loss"] == results[1]["loss"]
    assert results[1]["seed"] == 3


def test_train_then_evaluate_prints_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train(tmp_path, "--method", "tokenmixup", "--name", "run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("        HorizontalTokenMixup: block=1, tau=1.0, rho=0.08")
    assert lines[6].startswith("epoch 1/1  loss")  # plain lines: stdout is not a terminal
    top1 = next(line for line in lines if line.startswith("top-1")).split()[1]
    assert main(["evaluate", str(tmp_path / "runs" / "run")]) == 0
    assert capsys.readouterr().out.split()[1] == top1


def test_export_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file holds the weights that are evaluated: the averaged ones."""
    run, path = tmp_path / "runs" / "run", tmp_path / "weights.safetensors"
    assert main(train(tmp_path, "--model-ema", "true", "--name", "run")) == 0
    capsys.readouterr()
    assert main(["export", str(run), str(path)]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{path}: cct_2_3x2_32, 10 classes, 16 pixels, mean ")
    model = create_model("cct_2_3x2_32", num_classes=10, img_size=16)
    load_released(model, path)
    expected = load_trained(run).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert main(["export", str(run), str(tmp_path / "folder")]) == 2
    assert "ends in .safetensors" in one_line(capsys)


# --- bad input

HERE = str(Path(__file__).parent)
BAD_OPTIONS = [
    (["trian"], "got 'trian'; did you mean 'train'"),
    (["train", "--epoch", "3"], "got '--epoch'; did you mean '--epochs'"),
    (["train", "stray"], "only options, got 'stray'"),
    (["train", "--epochs", "many"], "--epochs to be a whole number, got 'many'"),
    (["train", "--lr", "fast"], "--lr to be a number, got 'fast'"),
    (["train", "--tau", "x"], "--tau to be a number, or auto:SHARE"),
    (["train", "--rho", "auto:1.5"], "such as auto:0.5, got 'auto:1.5'"),
    (["train", "--model-ema", "maybe"], "--model-ema to be true or false, got 'maybe'"),
    (["train", "--epochs"], "a value after --epochs"),
    (["train", "--precision", "fp8"], "one of fp32, bf16, fp16, got 'fp8'"),
    (["train", "--precision", "fp16", "--device", "cpu"], "a GPU for --precision fp16"),
    (["train", "--config", "nowhere.yaml"], "there is no"),
    (["train", "--epochs", "0"], "--epochs to be at least 1, got 0"),
    (["train", "--lr", "-1"], "--lr to be greater than 0"),
    (["train", "--smoothing", "1"], "--smoothing to be at least 0 and less than 1"),
    (["train", "--val-share", "1"], "--val-share to be at least 0 and less than 1"),
    (["train", "--ratio", "0.8", "1.2"], "expected --scale with --ratio"),
    (["train", "--reprob", "1.5"], "--reprob to be between 0 and 1"),
    (["train", "--name", "a/b"], "--name to be a plain folder name"),
    (["train", "--scale", "0.5"], "2 values after --scale"),
    (["train", "--scale", "0.5", "x"], "--scale to be a number"),
    (["train", "--scale", "0.5", "0.1"], "--scale to be 2 rising numbers above 0 up to 1, got 0.5"),
    (["train", "--ratio", "0", "1"], "--ratio to be 2 rising numbers above 0, got 0"),
    (["train", "--std", "0", "1", "1"], "--std to be 3 numbers above 0 up to 1"),
    (["train", "--scale", "0.5", "1", "--crop-padding", "2"], "either --scale"),
    (["train", "--crop-pct", "0"], "--crop-pct to be above 0"),
    (["train", "--interpolation", "random"], "one of bicubic, bilinear"),
    (["train", "--aa", "trivial", "--color-jitter", "0.4"], "either --aa"),
    (["train", "--data", "fake:3"], "fake:CLASSESxSIDExIMAGES"),
    (["train", "--opt", "adamww"], "did you mean 'adamw'"),
    (["train", "--opt-kwargs", "3"], "--opt-kwargs to be a mapping such as {name: value}, got"),
    (["train", "--layer-decay", "2"], "--layer-decay to be above 0 and up to 1"),
    (["train", "--layer-decay", "0.9"], "a timm model for --layer-decay"),
    (["train", "--model-kwargs", "{deep: 1}"], "--model-kwargs to be arguments of cct_2_3x2_32"),
    (["train", "--mixup", "-1"], "--mixup to be at least 0"),
    (["train", "--seed", str(2**63)], "--seed to be less than 2**32"),
    (["train", "--mixup", "1", "--mixup-prob", "2"], "--mixup-prob to be between 0 and 1"),
    (["train", "--mixup-mode", "all"], "--mixup-mode to be one of batch, pair, elem"),
    (["train", "--mix", "cutmx"], "--mix to name one of mixup, cutmix, tokenmix, got 'cutmx'"),
    (["train", "--mix", "{name: cutmix, alfa: 1}"], "got 'alfa'; did you mean 'alpha'"),
    (["train", "--tokens", "[horizontal, diagonal]"], "got 'diagonal'"),
    (["train", "--labels", "algined"], "did you mean 'aligned'"),
    (["train", "--mix", "[{name: [cutmix]}]"], "got ['cutmix']"),
    (["train", "--mix", "{name: one-of, draw: element}"], "expected `mixers` for one-of in --mix"),
    (["train", "--tokens", "{name: horizontal, args: 3}"], "expected `args` of horizontal in --to"),
    (["train", "--warmup-epochs", "inf"], "--warmup-epochs to be finite, got inf"),
    (["train", "--max-steps", "0"], "--max-steps to be at least 1"),
    (["train", "--aa", "auto"], "--aa to be none, trivial or rand"),
    (["train", "--method", "cutmx"], "got 'cutmx'; did you mean 'cutmix'"),
    (["train", "--method", "none.yaml"], "readable file"),
    (["train", "--method", "tokenmix+tl-align"], "got tokenmix and tl-align"),
    (["train", "--model", "cct_2_3x2_3"], "'cct_2_3x2_32'"),
    (["train", "--model", "resnet18", "--method", "tl-align"], "ResNet"),
    (["models", "resnet_none"], "a pattern that fits some"),
    (["train", "--model", "vit_tiny_patch16_224", "--img-size", "40"], "multiple"),
    (["train", "--pretrained"], "a timm model for --pretrained"),
    (["train", "--data", "digit"], "did you mean 'digits'"),
    (["train", "--data", "/no/such/folder"], "there is no '/no/such/folder'"),
    (["train", "--data", __file__], "a folder, got the file"),
    (["train", "--data", HERE], "found no images"),
    (["train", "--method", "tokenmixup-h", "--block", "9"], "from 0 to 1"),
    (["train", "--method", "tokenmixup-v", "--block", "0"], "block 1 or later"),
    (["train", "--method", "tokenmixup-v", "--kappa", "99"], "up to the 16 tokens"),
    (["train", "--method", "cutmix", "--tau", "1"], "a method that uses --tau"),
    (["train", "--method", "tokenmix", "--teacher", "no.ckpt"], "there is no no.ckpt"),
    (["train", "--method", "tokenmix", "--teacher", "resnet18"], "knows 1000 other classes"),
    (["train", "--method", "tokenmix", "--teacher", "cct_2_3x2_32"], "comes without weights"),
    (["train", "--method", "cutmix", "--teacher", "x.ckpt"], "a method that uses --teacher"),
    (["train", "--out", __file__], "--out to be a folder, got the file"),
    (["evaluate"], "the argument RUN"),
    (["evaluate", "/no/run"], "there is no /no/run"),
    (["export", "/no/run", "weights.safetensors"], "there is no /no/run"),
    (["evaluate", __file__], "cannot be read"),
    (["evaluate", "/no/run", "--precision", "fp8"], "--precision to be fp32, bf16 or fp16"),
    (["evaluate", "/no/run", "--device", "abacus"], "--device abacus"),
    (["compare", "--methods", "none,none"], "different methods"),
    (["compare", "--methods", "none,mixup", "--mixup", "0.8"], "none and mixup, which are"),
    (["compare", "--methods", "none,cutmx"], "did you mean 'cutmix'"),
    (["compare", "--seeds", "x"], "--seeds"),
    (["compare", "--data", "fake", "--ratio", "0.8", "1.2"], "expected --scale with --ratio"),
    (["compare", "--data", "fake", "--layer-decay", "0.9"], "a timm model for --layer-decay"),
    (["demo", "--out", "."], "a folder of its own"),
    (["demo", "--epochs", "0"], "--epochs to be at least 1, got 0"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_OPTIONS, ids=[" ".join(a)[-40:] for a, _ in BAD_OPTIONS]
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "train" and "--config" not in arguments:
        later = [*SMALL, "--out", str(tmp_path / "runs")]
        arguments = ["train", *later, *arguments[1:]]
    assert main(arguments) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "runs").exists()  # nothing was begun


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "got 'epoch'; did you mean '--epochs'"),
        ("epochs: many", "--epochs to be a whole number, got 'many'"),
        ("epochs: [", "valid YAML"),
        ("scale: [0.5]", "--scale to be 2 rising numbers"),
        ("name: \xff", "--config to be valid YAML, got: 'utf-8' codec"),
    ],
)
def test_bad_settings_files(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_bytes(text.encode("latin-1"))
    assert main(["train", "--config", str(tmp_path / "bad.yaml")]) == 2
    assert message in one_line(capsys)


def test_folder_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("precious")
    assert main(train(tmp_path, "--name", "mine")) == 2
    assert "exists and is not empty" in one_line(capsys)
    assert main(train(tmp_path, "--name", "mine", "--overwrite")) == 2
    assert "something else" in one_line(capsys)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_corrupt_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(3):
            path = tmp_path / "data" / name / f"{index}.png"
            Image.new("RGB", (32, 32), (index, 0, 0)).save(path)
    (tmp_path / "data" / "b" / "1.png").write_bytes(b"not a picture")
    arguments = ["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs")]
    assert main(arguments) == 2
    message = one_line(capsys)
    assert f"{tmp_path}/data/b/1.png" in message
    assert "--skip-corrupt" in message


def test_checkpoint_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train(tmp_path, "--name", "run")) == 0
    capsys.readouterr()
    path = tmp_path / "runs" / "run" / "last.ckpt"
    assert main(["evaluate", str(path), "--model", "cct_6_3x1_32"]) == 2
    assert "expected a checkpoint of cct_6_3x1_32" in one_line(capsys)
    content = torch.load(path, weights_only=True)
    content["state_dict"].popitem()
    content["state_dict"].pop("mixing.model.tokenizer.conv_layers.0.0.weight", None)
    torch.save(content, path)
    assert main(["evaluate", str(path)]) == 2
    assert "tensors differ" in one_line(capsys)


def test_broken_loss_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = train(tmp_path, "--lr", "1e30", "--clip-grad", "null", "--warmup-epochs", "0")
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert "vitmix: error: the loss became" in err
    assert "in step 2" in err


def test_an_interrupt_says_no_more_than_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**options: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitmix.evaluate.checkpoint.evaluate_checkpoint", interrupted)
    assert main(["evaluate", "runs/some"]) == 130
    assert capsys.readouterr().err == "vitmix: interrupted\n"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "digit", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


# --- as a process


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vitmix.cli", *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_process_fails_in_one_line() -> None:
    done = run("train", "--data", "digit")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


def test_process_ends_quietly_when_its_reader_has_gone() -> None:
    command = f"{sys.executable} -m vitmix.cli train --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage")
    assert done.stderr == ""


def test_importing_the_command_line_is_light() -> None:
    code = (
        "import sys, vitmix.cli; heavy = {'lightning', 'timm', 'torchvision', 'transformers', "
        "'matplotlib', 'sklearn', 'jsonargparse'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_a_checkpoint_and_status_130(tmp_path: Path) -> None:
    import signal

    process = subprocess.Popen(
        [sys.executable, "-m", "vitmix.cli", *train(tmp_path, "--epochs", "500", "--name", "run")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    checkpoint = tmp_path / "runs" / "run" / "last.ckpt"
    assert f"the checkpoint is {checkpoint}" in err
    assert err.strip().count("\n") == 0
    assert main(["evaluate", str(checkpoint)]) == 0
