"""The training script: every flag runs, interrupted runs continue, two processes train as one."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich", reason="the demo extra is not installed")
pytest.importorskip("sklearn", reason="the demo extra is not installed")

import models
import train
from test_data import binary, pixels, write_folder

import regfast

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = (
    "--limit",
    "128",
    "--epochs",
    "1",
    "--width",
    "4",
    "--batch",
    "32",
    "--shift-images",
    "8",
    "--device",
    "cpu",
)


def run(out: Path, *flags: str) -> dict:
    return train.main([*SMALL, *flags, "--out", str(out)])


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_time(records: list[dict]) -> list[dict]:
    return [
        {name: value for name, value in record.items() if name != "seconds"} for record in records
    ]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--antialias",),
        ("--mixup", "0.2"),
        ("--cutmix", "1"),
        ("--mixup", "0.2", "--cutmix", "1", "--flip"),
        ("--manifold", "2"),
        ("--amp", "--channels-last"),
        ("--model", "resnet", "--antialias", "--rezero", "--mixup", "0.25"),
        pytest.param(("--model", "resnet", "--manifold", "2"), marks=pytest.mark.slow),
        pytest.param(("--compile", "--antialias", "--mixup", "0.2"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_every_flag_runs(
    tmp_path: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tmp_path, *flags)
    (record,) = lines(tmp_path)
    assert record["epoch"] == 1 and 0 < record["loss"] < 10 and 0 <= record["accuracy"] <= 1
    assert result["accuracy"] == record["accuracy"] and 0 < result["consistency"] <= 1
    assert json.loads((tmp_path / "result.json").read_text()) == result
    shifts = torch.load(tmp_path / "shifts.pt")
    assert shifts["probability"].shape == (8, 64)
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {
        ".jsonl",
        ".json",
        ".pt",
    }
    assert "epoch   1  loss" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("model", ["timm:resnet18", "torchvision:resnet18"])
def test_timm_and_torchvision_models_train(tmp_path: Path, model: str) -> None:
    """In separate processes, in which nothing else has prepared torchvision."""
    skip_without(model)
    binary(tmp_path, True, pixels(70), list(range(10)) * 7)
    flags = (
        "--data",
        "cifar10",
        "--root",
        str(tmp_path),
        "--model",
        model,
        "--antialias",
        "--mixup",
        "0.2",
    )
    command = [
        sys.executable,
        str(EXAMPLES / "train.py"),
        *SMALL,
        *flags,
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (record,) = lines(tmp_path / "out")
    assert 0 < record["loss"] < 10


def skip_without(model: str) -> None:
    library = model.split(":")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


@pytest.mark.parametrize("model,channels", [("timm:resnet18", 1), ("torchvision:resnet18", 3)])
def test_timm_and_torchvision_models_are_made_as_given(model: str, channels: int) -> None:
    skip_without(model)
    made = models.make(model, channels, 7, antialias=True)
    assert made.conv1.in_channels == channels and made.fc.out_features == 7
    assert any(isinstance(module, regfast.MaxPool2dAA) for module in made.modules())


@pytest.mark.parametrize(
    "model,words",
    [
        ("timm:nosuch", "--model timm:nosuch: timm makes no such model: Unknown model (nosuch)"),
        ("torchvision:nosuch", "--model torchvision:nosuch: torchvision has no such classifier"),
        # The model would download a backbone.
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision has no such classifier"),
        # The digits have one channel.
        ("torchvision:resnet18", "images of 3 channels, and these have 1"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(
    tmp_path: Path, model: str, words: str, capsys
) -> None:
    skip_without(model)
    assert words in refused(tmp_path / "out", capsys, "--model", model)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_not_installed_is_one_line(
    tmp_path: Path, library: str, capsys, monkeypatch
) -> None:
    # A module that is None in sys.modules does not import, whatever is installed.
    monkeypatch.setitem(sys.modules, library, None)
    told = refused(tmp_path / "out", capsys, "--model", f"{library}:resnet18")
    assert told.startswith(f"error: {library} does not import: ") and told.endswith(
        f"(pip install {library})\n"
    )


def test_a_library_that_does_not_import_is_one_line(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text(
        'raise RuntimeError("its operators are missing\\nand more")'
    )
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    told = refused(tmp_path / "out", capsys, "--model", "timm:resnet18")
    assert re.fullmatch(
        r"error: timm does not import beside torch \S+: its operators are missing\n", told
    )


def refused(out: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The error's one line; the status is 2, and nothing is written."""
    with pytest.raises(SystemExit) as raised:
        run(out, *flags)
    assert raised.value.code == 2 and not out.exists()
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("flags", [(), ("--mixup", "0.2"), ("--manifold", "2")], ids=" ".join)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, flags: tuple[str, ...], monkeypatch
) -> None:
    """Parameters, optimizer and metrics, bit for bit.

    The run stops in the middle of its second epoch, and once more at its end.
    """
    flags = ("--epochs", "3", "--seed", "5", *flags)
    run(tmp_path / "whole", *flags)
    step, steps = train.Run.step, []

    def stopping(self, *arguments):
        steps.append(1)
        if len(steps) in (6, 12):
            raise Interrupted
        return step(self, *arguments)

    monkeypatch.setattr(train.Run, "step", stopping)
    for _ in range(2):
        with pytest.raises(Interrupted):
            run(tmp_path / "broken", *flags)
    assert len(lines(tmp_path / "broken")) == 2
    run(tmp_path / "broken", *flags)
    whole, broken = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "broken"))
    assert without_time(lines(tmp_path / "whole")) == without_time(lines(tmp_path / "broken"))
    check_equal(whole["model"], broken["model"])
    check_equal(whole["optimizer"], broken["optimizer"])


def test_a_run_that_has_ended_says_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither trains nor measures again; a run that ended before its measurement is measured."""
    first = run(tmp_path)
    monkeypatch.setattr(train.Run, "epoch", lambda _: pytest.fail("it trained"))
    (tmp_path / "result.json").unlink()
    assert run(tmp_path) == first
    monkeypatch.setattr(train.Run, "shift_consistency", lambda *_: pytest.fail("it measured"))
    assert run(tmp_path) == first


@pytest.fixture
def epochs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per trained epoch; a deadline's clock reads their number."""
    begun: list[int] = []
    epoch = train.Run.epoch

    def counted(self):
        begun.append(1)
        return epoch(self)

    monkeypatch.setattr(train.Run, "epoch", counted)
    clock = SimpleNamespace(monotonic=lambda: len(begun), perf_counter=time.perf_counter)
    monkeypatch.setattr(train, "time", clock)
    return begun


def test_after_the_deadline_no_epoch_begins_and_another_call_goes_on(
    tmp_path: Path, epochs: list[int]
) -> None:
    flags = ("--epochs", "3", "--mixup", "0.2")
    whole = run(tmp_path / "whole", *flags)
    command = [*SMALL, *flags, "--out", str(tmp_path / "broken")]
    assert train.main(command, deadline=len(epochs)) is None
    assert not (tmp_path / "broken").exists()
    assert train.main(command, deadline=len(epochs) + 2) is None
    assert (
        len(lines(tmp_path / "broken")) == 2 and not (tmp_path / "broken" / "result.json").exists()
    )
    result = train.main(command)
    assert (
        len(epochs) == 6
        and result["accuracy"] == whole["accuracy"]
        and result["deviation"] == whole["deviation"]
    )
    check_equal(
        *(torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "broken"))
    )
    # A run that has ended prints its result at any time.
    assert train.main(command, deadline=0) == result


@pytest.mark.parametrize(
    "device,world,flags,expected",
    [
        ("cuda", 1, (), True),
        ("cuda", 1, ("--mixup", "1", "--amp", "--channels-last"), True),
        ("cuda", 1, ("--manifold", "2"), False),
        ("cuda", 1, ("--compile",), False),
        ("cuda", 1, ("--eager",), False),
        ("cuda", 2, (), False),
        ("mps", 1, (), False),
        ("cpu", 1, (), False),
    ],
)
def test_where_the_steps_are_cuda_graphs(
    device: str, world: int, flags: tuple[str, ...], expected: bool
) -> None:
    assert (
        train.is_captured(train.parse(flags), train.Job(0, world, torch.device(device))) is expected
    )


class Recorder:
    """A stand-in for torch.cuda.make_graphed_callables, as seen from outside.

    It first runs the network, and graphs only its training forward.
    """

    def __init__(self) -> None:
        self.samples: list[torch.Tensor] = []
        self.replays = 0

    def __call__(self, model: torch.nn.Module, arguments: tuple[torch.Tensor]) -> torch.nn.Module:
        (sample,) = arguments
        assert model.training and not torch.is_autocast_cache_enabled()
        self.samples.append(sample)
        before, forward = copy.deepcopy(model.state_dict()), model.forward
        for _ in range(3):
            model(sample)
        assert any(
            not torch.equal(value, before[name]) for name, value in model.state_dict().items()
        )

        def graphed(x: torch.Tensor) -> torch.Tensor:
            if model.training:
                assert (
                    x.shape == sample.shape
                    and x.stride() == sample.stride()
                    and x.dtype == sample.dtype
                )
                assert not torch.is_autocast_cache_enabled()
                self.replays += 1
            return forward(x)

        model.forward = graphed
        return model


@pytest.mark.parametrize(
    "flags",
    [("--antialias", "--mixup", "0.2"), ("--amp", "--channels-last"), ("--batch", "500")],
    ids=" ".join,
)
def test_a_captured_network_trains_as_the_plain_one(
    tmp_path: Path, flags: tuple[str, ...], epochs: list[int], monkeypatch
) -> None:
    """Bit for bit: warm-up runs leave no trace; also from a checkpoint and on a partial batch."""
    binary(tmp_path, True, pixels(70), list(range(10)) * 7)
    flags = ("--data", "cifar10", "--root", str(tmp_path), "--epochs", "3", *flags)
    run(tmp_path / "plain", *flags)
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorder)
    monkeypatch.setattr(train, "is_captured", lambda *_: True)
    command = [*SMALL, *flags, "--out", str(tmp_path / "captured")]
    assert train.main(command, deadline=len(epochs) + 1) is None
    train.main(command)
    assert len(recorder.samples) == 2
    batch = min(train.parse(command).batch, 70)
    layout = torch.channels_last if "--channels-last" in flags else torch.contiguous_format
    for sample in recorder.samples:
        assert sample.shape == (batch, 3, 24, 24) and sample.is_contiguous(memory_format=layout)
    # Evaluation uses the plain network.
    assert recorder.replays == 3 * (70 // batch)
    plain, captured = (
        torch.load(tmp_path / name / "checkpoint.pt") for name in ("plain", "captured")
    )
    assert without_time(plain["records"]) == without_time(captured["records"])
    check_equal(plain["model"], captured["model"])
    check_equal(plain["optimizer"], captured["optimizer"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA device is needed")
def test_graphs_train_as_launches_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    flags = (
        "--device",
        "cuda",
        "--model",
        "resnet",
        "--antialias",
        "--rezero",
        "--mixup",
        "0.25",
        "--epochs",
        "2",
    )
    run(tmp_path / "graphs", *flags)
    run(tmp_path / "launches", *flags, "--eager")
    for graphs, launches in zip(
        lines(tmp_path / "graphs"), lines(tmp_path / "launches"), strict=True
    ):
        # With other workspace sizes cuDNN may choose other kernels, which round differently.
        assert graphs["loss"] == pytest.approx(launches["loss"], rel=1e-3)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_one_line(
    tmp_path: Path, device: str, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(torch.get_device_module(device), "is_available", lambda: False)
    told = refused(tmp_path / "out", capsys, "--device", device)
    assert told == f"--device {device}: PyTorch finds no {device.upper()} device\n"


def check_equal(a, b) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            check_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            check_equal(x, y)
    else:
        assert a == b


def test_tensorboard_has_every_epoch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a run stops between an epoch's points and its checkpoint, and repeats the epoch."""
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the test extra is not installed",
    )
    save, saved = train.Run.save, []

    def stopping(self):
        saved.append(1)
        if len(saved) == 3:
            raise Interrupted
        save(self)

    monkeypatch.setattr(train.Run, "save", stopping)
    with pytest.raises(Interrupted):
        run(tmp_path, "--epochs", "3")
    run(tmp_path, "--epochs", "3")
    board = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "accuracy"):
        points = [(point.step, point.value) for point in board.Scalars(name)]
        assert points == [(line["epoch"], pytest.approx(line[name])) for line in lines(tmp_path)]


def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "--seed", "1")
    assert re.search(
        r"^error: .*checkpoint\.pt is of a run with other arguments \(seed=0, now 1\)",
        capsys.readouterr().err,
    )
    assert len(lines(tmp_path)) == 1


def named(*flags: str, world: int = 1) -> str:
    return train.folder_of(train.parse(flags), train.Job(0, world, torch.device("cpu"))).as_posix()


def test_different_runs_never_meet_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = train.main(SMALL)
    mixed = train.main([*SMALL, "--mixup", "0.25"])
    name = "digits-cnn-limit128-width4{}-epochs1-batch32-shift-images8"
    for flags, result in (("", plain), ("-mixup0.25", mixed)):
        assert (
            json.loads(
                (tmp_path / "out" / "train" / name.format(flags) / "result.json").read_text()
            )
            == result
        )
    # The same run finds its own folder.
    monkeypatch.setattr(train.Run, "epoch", lambda _: pytest.fail("it trained"))
    assert train.main(SMALL) == plain


def test_the_default_folder_is_named_after_the_data_the_model_and_the_flags(tmp_path: Path) -> None:
    assert named() == "out/train/digits-cnn"
    flags = ("--model", "resnet", "--antialias", "--rezero", "--mixup", "0.25")
    assert (
        named("--data", "cifar10", "--root", "here", *flags)
        == "out/train/cifar10-resnet-antialias-rezero-mixup0.25"
    )
    assert (
        named("--model", "timm:resnet50", "--channels-last")
        == "out/train/digits-timm-resnet50-channels-last"
    )
    # Options that a run may change.
    assert named("--device", "cpu", "--threads", "2") == "out/train/digits-cnn"
    assert named(world=2) == "out/train/digits-cnn-processes2"
    # Folders of one name in two places are two data sets.
    first, second = (
        named("--data", "folder", "--root", str(tmp_path / place / "images")) for place in "ab"
    )
    assert first != second and all(
        re.fullmatch(r"out/train/folder-images-[0-9a-f]{8}-cnn", name) for name in (first, second)
    )


def test_every_argument_of_a_run_is_in_its_default_folder(tmp_path: Path) -> None:
    """The folder has the arguments of `identity`, which a checkpoint is compared by."""
    changed = {
        "--data": "cifar10", "--size": "48", "--crop": "20", "--limit": "9", "--model": "resnet",
        "--width": "8",
        "--antialias": None, "--rezero": None, "--mixup": "0.5", "--cutmix": "0.5", "--flip": None,
        "--compile": None,
        "--amp": None, "--channels-last": None, "--epochs": "3", "--batch": "5", "--lr": "0.1",
        "--seed": "7",
        "--shift-images": "9",
    }  # fmt: skip
    single = [named(*filter(None, item)) for item in [*changed.items(), ("--manifold", "1")]]
    arguments = set(train.identity(train.parse([]), train.Job(0, 1, torch.device("cpu")))) - {
        "processes"
    }
    assert {flag[2:].replace("-", "_") for flag in [*changed, "--manifold"]} == arguments
    assert len({named(), *single}) == len(arguments) + 1


def test_the_measuring_of_the_shifts_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a log, which has no bar, before it begins; with the number of images that exist."""
    run(tmp_path, "--limit", "8", "--shift-images", "512")
    printed = capsys.readouterr().out
    measured = printed.index("measuring 8 test images at 64 shifts each\n")
    assert (
        printed.index("epoch   1")
        < measured
        < printed.index("shifts ")
        < printed.index("accuracy ", measured)
    )


@pytest.mark.parametrize(
    "flags,words",
    [
        (("--crop", "30"), "--crop must leave 7 of the images' 32 pixels"),
        (
            ("--model", "vgg"),
            "--model must be cnn, resnet, timm:NAME or torchvision:NAME, got 'vgg'",
        ),
        (("--rezero",), "--rezero is of --model resnet, got --model cnn"),
        (("--data", "cifar10"), "--data cifar10 needs --root"),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_errors_before_anything_is_written(
    tmp_path: Path, flags: tuple[str, ...], words: str, capsys
) -> None:
    assert words in refused(tmp_path / "out", capsys, *flags)


def test_the_wrong_cifar_and_a_class_without_images_are_one_line(tmp_path: Path, capsys) -> None:
    binary(tmp_path, True, pixels(10), list(range(10)))
    told = refused(tmp_path / "out", capsys, "--data", "cifar100", "--root", str(tmp_path))
    assert "holds no cifar100" in told and "data_batch_1.bin" in told
    write_folder(tmp_path, {"train/cat": 2, "train/dog": 0, "test/cat": 1, "test/dog": 1})
    told = refused(tmp_path / "out", capsys, "--data", "folder", "--root", str(tmp_path))
    assert f"{tmp_path / 'train' / 'dog'} has no images" in told


def test_a_package_of_the_data_that_is_missing_is_one_line(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    train.load.cache_clear()
    assert "sklearn" in refused(tmp_path / "out", capsys)


@pytest.mark.parametrize(
    "flags",
    [("--epochs", "0"), ("--mixup", "-1"), ("--manifold", "1", "--mixup", "1")],
    ids=" ".join,
)
def test_the_command_line_refuses(
    tmp_path: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, *flags)
    assert "error: " in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_an_error_before_training(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(train.Run, "step", lambda *_: pytest.fail("it trained"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*file"):
        run(tmp_path / "file" / "out")


FULL = """
import resource, signal, sys
sys.path.insert(0, {examples!r})
import train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
train.Run.step = lambda *_: sys.exit("it trained")
# Like a nearly full disk: no file may be longer than this.
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
train.main(sys.argv[1:])
"""


def test_a_full_disk_is_an_error_before_training_and_leaves_nothing_half_written(
    tmp_path: Path,
) -> None:
    command = [
        sys.executable,
        "-c",
        FULL.format(examples=str(EXAMPLES)),
        *SMALL,
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "checkpoint.pt cannot be written" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


# A network without batch normalisation, which would see only its process's images; and a step that
# may wait for the test.
DRIVER = """
import os, pathlib, sys, time
sys.path.insert(0, {examples!r})
import torch
import models, train
models.make = lambda name, channels, classes, **_: torch.nn.Sequential(
    torch.nn.Conv2d(channels, 4, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(),
    torch.nn.Linear(484, classes)
)
step, marker = train.Run.step, os.environ.get("MARKER")


def waiting(self, *arguments):
    if marker and len(self.records) == 1:
        pathlib.Path(marker, f"pid{{self.job.rank}}").write_text(str(os.getpid()))
        time.sleep(600)
    return step(self, *arguments)


train.Run.step = waiting
train.main(sys.argv[1:])
"""


def launch(tmp_path: Path, processes: int, *flags: str, **environment: str) -> subprocess.Popen:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(examples=str(EXAMPLES)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        str(driver),
    ]
    streams = dict(
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    return subprocess.Popen(
        [*command, *SMALL, *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        **streams,
    )


def finish(process: subprocess.Popen) -> str:
    try:
        printed, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            # So that it ends its workers, which are in another process group.
            process.terminate()
            process.wait(60)
    return printed


@pytest.mark.slow
def test_two_processes_train_as_one_with_their_batches_together(tmp_path: Path) -> None:
    """Without mixing and batch normalisation; to rounding, as averaging reorders the sums."""
    flags = ("--epochs", "2", "--flip")
    for processes, batch in ((1, "32"), (2, "16")):
        process = launch(
            tmp_path, processes, *flags, "--batch", batch, "--out", str(tmp_path / str(processes))
        )
        printed = finish(process)
        assert process.returncode == 0, printed
        # Only rank 0 prints and writes.
        assert printed.count("epoch   2") == 1
    one, two = (torch.load(tmp_path / name / "checkpoint.pt") for name in "12")
    for name, parameter in one["model"].items():
        torch.testing.assert_close(two["model"][name], parameter, rtol=1e-4, atol=1e-5)
    for a, b in zip(one["records"], two["records"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["accuracy"] == b["accuracy"]


@pytest.mark.slow
def test_mixing_streams_differ_by_rank_and_are_kept(tmp_path: Path) -> None:
    process = launch(tmp_path, 2, "--mixup", "0.5", "--out", str(tmp_path / "out"))
    printed = finish(process)
    assert process.returncode == 0, printed
    (first,), (second,) = torch.load(tmp_path / "out" / "checkpoint.pt")["streams"]
    assert not torch.equal(first[:-8], second[:-8])


@pytest.mark.slow
def test_a_dead_worker_ends_the_job_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """kill -9 in the second epoch, then the same command; compared to an uninterrupted run."""
    flags = ("--epochs", "3", "--mixup", "0.5", "--batch", "16")
    whole = launch(tmp_path, 2, *flags, "--out", str(tmp_path / "whole"))
    assert "epoch   3" in finish(whole)
    gate = tmp_path / "gate"
    gate.mkdir()
    process = launch(tmp_path, 2, *flags, "--out", str(tmp_path / "broken"), MARKER=str(gate))
    deadline = time.monotonic() + 60
    while (
        not ((gate / "pid0").exists() and (gate / "pid1").exists()) and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    os.kill(int((gate / "pid1").read_text()), signal.SIGKILL)
    printed = finish(process)
    assert process.returncode != 0 and "-9" in printed, printed
    assert len(lines(tmp_path / "broken")) == 1
    assert "epoch   3" in finish(launch(tmp_path, 2, *flags, "--out", str(tmp_path / "broken")))
    assert without_time(lines(tmp_path / "whole")) == without_time(lines(tmp_path / "broken"))
    check_equal(
        *(torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "broken"))
    )
