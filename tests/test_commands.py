"""The commands eval and segment, bad input, --resume, and real formats in miniature.

Real formats: RefCOCOg, ReasonSeg, a policy in a local folder, a SAM checkpoint of an official size.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from makers import contents, make_refcocog, read_rows, refused, run
from PIL import Image
from segment_anything import sam_model_registry

import samr1_mini
from data import Shapes
from plumbing.boxes import true_box
from plumbing.sam import SAM_SIZES, build_sam, load_sam
from plumbing.scenes import interior_points
from plumbing.sources import load_data
from plumbing.vlm import load_vlm, vlm_path
from reward import SamPrompt

ROOT = Path(samr1_mini.__file__).parent

pytestmark = pytest.mark.usefixtures("quick_pictures")  # `evaluated` draws its pictures


def answers(out: Path) -> list[dict]:
    return read_rows(out / "answers.jsonl")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """An evaluation of the base model on six drawn scenes."""
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    run("eval --limit 6 --out", out)
    return out


@pytest.fixture
def refcocog(tmp_path) -> Path:
    make_refcocog(tmp_path / "refcocog")
    return tmp_path / "refcocog"


def test_eval_of_an_adapter_repeats_the_metrics_of_its_run(whole_run, tmp_path):
    out = tmp_path / "eval"
    run("eval --limit 4 --adapter", whole_run / "adapter", "--out", out)
    results = json.loads((out / "eval.json").read_text())
    after = json.loads((whole_run / "eval.json").read_text())["after"]
    assert {name: results["run"][name] for name in after} == after
    assert results["run"]["protocol"] == "lisa" and after["giou"] == results["run"]["lisa_giou"]
    rows = answers(out)
    assert len({row["id"] for row in rows}) == 4
    assert results["run"]["giou"] == pytest.approx(np.mean([row["iou"] for row in rows]))


def test_two_evaluations_are_compared_pair_by_pair(evaluated, tmp_path, capsys):
    """A third evaluation is made from the answers of the second one: its IoU is 0.1 lower."""
    rows = answers(evaluated)
    for row in rows:
        row["lisa"]["iou"] -= 0.1
    other = tmp_path / "answers.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = Path(shutil.copytree(evaluated, tmp_path / "again"))
    run("eval --resume --out", again, "--against", other)
    found = json.loads((again / "eval.json").read_text())["base"]["against"]
    assert [found["giou"], *found["giou_95"]] == pytest.approx([0.1] * 3)
    assert [found["ciou"], *found["ciou_95"]] == [0, 0, 0]
    assert f"against {other}: gIoU +0.100 (+0.100 to +0.100)" in capsys.readouterr().out

    against = ("eval --resume --out", again, "--against", other)
    again_rows = answers(again)
    rows[1]["id"] = "another"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "answer 2 is about ('another'" in refused(run, *against)
    rows[1] |= {"id": again_rows[1]["id"], "lisa": 7}
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "was not counted by --protocol lisa" in refused(run, *against)
    other.write_bytes(b"\xff\n")
    assert "name another --against" in refused(run, *against)
    other.write_text(json.dumps(rows[0]) + "\n")
    assert "it has 1 answers, not 6" in refused(run, *against)
    other.unlink()
    assert "no such file" in refused(run, *against)


def test_an_interrupted_eval_continues(evaluated, tmp_path, monkeypatch):
    cut = Path(shutil.copytree(evaluated, tmp_path / "cut"))
    lines = (evaluated / "answers.jsonl").read_text().splitlines(keepends=True)
    (cut / "answers.jsonl").write_text("".join(lines[:2]) + lines[2][:40])  # killed within a line
    evaluate_batch = Mock(wraps=samr1_mini.evaluate_batch)
    monkeypatch.setattr(samr1_mini, "evaluate_batch", evaluate_batch)
    run("eval --resume --out", cut)
    ids = [one.id for call in evaluate_batch.call_args_list for one in call.args[2]]
    assert ids == [row["id"] for row in answers(evaluated)[2:]]
    for name in ("answers.jsonl", "eval.json"):
        assert (cut / name).read_text() == (evaluated / name).read_text()
    assert Image.open(evaluated / "sheet.png").width > 500


def test_answers_to_other_samples_are_not_continued(evaluated, tmp_path):
    """A line is missing, as if the first sample had been added to the set since."""
    cut = Path(shutil.copytree(evaluated, tmp_path / "cut"))
    lines = (evaluated / "answers.jsonl").read_text().splitlines(keepends=True)
    (cut / "answers.jsonl").write_text("".join(lines[1:4]))
    assert "are not those of its samples" in refused(run, "eval --resume --out", cut)
    assert (cut / "answers.jsonl").read_text() == "".join(lines[1:4])


def test_an_evaluation_without_a_usable_sample_is_refused(refcocog, tmp_path):
    for file in refcocog.rglob("*.jpg"):
        file.write_bytes(b"no picture")
    out = tmp_path / "eval"
    message = refused(run, "eval --data", f"refcocog:{refcocog}/test", "--out", out)
    assert "--data: none of " in message
    assert "skipped" in answers(out)[0] and not (out / "eval.json").exists()


def test_metrics_by_hand():
    """In the first sample 16 of 24 pixels are right; in the second one of 10 none. In the third one
    nothing is found, where nothing is."""
    rows = []
    for k, (intersection, union, iou) in enumerate([(16, 24, 16 / 24), (0, 10, 0), (0, 0, 1)]):
        row = {"intersection": intersection, "union": union, "iou": iou, "format": True}
        row |= {"box_iou": 0.4 * k, "points_inside": k / 2, "boxonly_iou": k / 4}
        rows += [row, {"skipped": "no file"}]
    metrics = samr1_mini.compute_metrics(rows)
    assert metrics["giou"] == pytest.approx((16 / 24 + 0 + 1) / 3)
    assert metrics["ciou"] == pytest.approx(16 / (24 + 10))
    assert metrics["points"] == 0.5 and metrics["boxonly"] == 0.25 and metrics["n"] == 3
    assert metrics["box"] == pytest.approx(1 / 3) and metrics["format"] == 1


def test_three_prompts_are_scored_for_each_sample(scorer, monkeypatch):
    """The policy's; the true box with good points; the policy's box without its points."""
    policy = load_vlm("tiny", "cpu", 64, "brief")
    batch = [Shapes("heldout")[i] for i in range(3)]
    box = '"bbox": [8, 8, 56, 56], "points_1": [10, 10]'
    y, x = np.argwhere(batch[0].mask)[0]
    width, height = batch[0].image.size
    inside = f'"points_2": [{(x + 0.5) * 64 / width}, {(y + 0.5) * 64 / height}]'
    answers = [f"{{{box}, {inside}}}", f"{{{box}}}", "no idea"]
    texts = [[f"<think>t</think><answer>{body}</answer>"] for body in answers]
    monkeypatch.setattr(policy, "texts", lambda _: texts)
    monkeypatch.setattr(samr1_mini, "sample_completions", lambda *_, **__: None)
    score, scored = scorer.score, []

    def noted(samples, prompts, keep_masks=False):
        scored.append((prompts, score(samples, prompts, keep_masks)))
        return scored[-1][1]

    monkeypatch.setattr(scorer, "score", noted)
    rows = samr1_mini.evaluate_batch(policy, scorer, batch, samr1_mini.parse_settings("eval", []))
    ((prompts, overlap),) = scored  # all in one call
    for b, (one, group) in enumerate(zip(batch, prompts, strict=True)):
        ours, ceiling, box_only = group
        assert ceiling == SamPrompt(true_box(one.mask), interior_points(one.mask))
        assert box_only == SamPrompt(ours.box, ())
        assert (rows[b]["box"], rows[b]["points"]) == (ours.box, ours.points)
        for k, prefix in enumerate(("", "ceiling_", "boxonly_")):
            for name in ("intersection", "union", "iou"):
                assert rows[b][prefix + name] == getattr(overlap, name)[b, k].item()
    assert [len(row["points"]) for row in rows] == [2, 1, 0] and rows[2]["box"] is None
    for one, row in zip(batch, rows, strict=True):
        inside = sum(one.mask[int(y), int(x)] for x, y in row["points"])
        assert row["points_inside"] == inside / 2
    assert rows[0]["points_inside"] >= 0.5 and rows[2]["points_inside"] == 0
    assert [row["format"] for row in rows] == [True, False, False]
    scale = np.array(batch[0].image.size * 2) / 64
    assert rows[0]["box"] == pytest.approx(tuple(scale * (8, 8, 56, 56)))
    assert rows[2]["box_iou"] == 0 < rows[0]["box_iou"]


def test_segment_answers_as_eval_does_and_rotates_as_exif_says(evaluated, tmp_path, capsys):
    """A camera stores a picture on its side. SAM and the policy must see it upright."""
    image = Shapes("heldout")[0].image
    image.save(tmp_path / "scene.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "stored.png", exif=exif)
    row = answers(evaluated)[0]
    for name, out in (("scene.png", tmp_path / "out.PNG"), ("stored.png", tmp_path / "out.jpg")):
        run("segment --image", tmp_path / name, "--query", row["query"], "--out", out)
        printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert printed["completion"] == row["answer"] and printed["bbox"] == row["box"]
        assert Image.open(out).width > 300


@pytest.mark.parametrize("out", ["~/scene.png", "link.png"])
def test_segment_never_overwrites_its_picture(out, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "scene.png"
    Shapes("heldout")[0].image.save(image)
    (tmp_path / "link.png").hardlink_to(image)
    before = image.read_bytes()
    assert "--image itself" in refused(run, "segment --query star --image", image, "--out", out)
    assert image.read_bytes() == before


def test_a_folder_with_files_is_never_written_to(whole_run, evaluated):
    """Neither that of another run, nor that of the adapter that is read."""
    before = [contents(folder) for folder in (whole_run, evaluated)]
    assert "not empty" in refused(run, "eval --adapter", whole_run / "adapter", "--out", whole_run)
    assert str(evaluated) in refused(run, "train --resume --out", evaluated)
    assert str(whole_run) in refused(run, "eval --resume --out", whole_run)
    assert [contents(folder) for folder in (whole_run, evaluated)] == before


# One of each folder, whose __init__.py imports plumbing.interrupts, and the script.
PROGRAMS = "samr1_mini tools.fetch assignment.grade tiny.make_tiny examples.trl_grpo"
PROGRAMS += " benchmarks.gpu_24gb"


@pytest.mark.parametrize("program", PROGRAMS.split())
def test_ctrl_c_while_a_program_imports_is_one_line(program, tmp_path):
    for slow in ("numpy", "torch", "transformers", "matplotlib", "argparse"):
        (tmp_path / f"{slow}.py").write_text("raise KeyboardInterrupt")
    typed, env = [sys.executable, "-m", program], os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(typed, cwd=ROOT, env=env, text=True, capture_output=True, timeout=300)
    name = f"{program.rpartition('.')[2]}.py"
    assert (done.returncode, done.stderr) == (130, f"{name}: interrupted\n")


PRINTS = (
    "from plumbing.errors import exit_with_one_line\nwith exit_with_one_line(): print('a line')"
)


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
def test_a_closed_pipe_ends_a_program_without_a_word(unbuffered):
    """As in `... | head -1`. With a buffer, the pipe is met when the program ends."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *unbuffered, "-c", PRINTS]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "file.png").write_bytes(b"no picture")
    (tmp / "empty").mkdir()
    return tmp


SEGMENT = "segment --query star --image {root}/assets/tiers.png"
BAD = {  # what is wrong: (command line, what the message must name)
    "flag": ("train --stepz 3", "--stepz"),
    "choice": ("train --accuracy best", "--accuracy"),
    "stray word": ("train quickly", "quickly"),
    "command": ("trian", "trian"),
    "data": ("train --data imagenet", "--data imagenet"),
    "vlm": ("train --vlm {tmp}/none", "--vlm {tmp}/none"),
    "vlm folder": ("train --vlm {tmp}/empty", "--vlm {tmp}/empty"),
    "vlm file": ("train --vlm {tmp}/file.png", "name the folder"),
    "out is a file": ("eval --limit 1 --out {tmp}/file.png", "file.png"),
    "out is a folder": (f"{SEGMENT} --out {{tmp}}", "--out"),
    "out without a suffix": (f"{SEGMENT} --out {{tmp}}/noext", "name a picture"),
    "image token": ("segment --image {root}/assets/tiers.png --query <|image_pad|>", "query"),
    "no image": ("segment --query star", "--image"),
    "missing image": ("segment --query star --image {tmp}/none.png", "none.png"),
    "resume what": ("train --resume", "--out"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_input_is_refused_in_one_line(wrong, bad_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, named = (text.format(tmp=bad_files, root=ROOT) for text in BAD[wrong])
    assert named in refused(run, command)
    assert not (tmp_path / "runs").exists()  # nothing was started


def test_help_lists_the_commands_and_the_settings(capsys):
    run("--help")
    assert "python samr1_mini.py segment" in capsys.readouterr().out
    for command in samr1_mini.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            run(f"{command} --help")
        printed = capsys.readouterr().out
        assert stopped.value.code == 0 and "--vlm" in printed
        assert ("--eps_high" in printed) == (command == "train")
        assert "models and device" in printed  # the settings come in groups


@pytest.mark.slow
def test_train_and_eval_on_refcocog(refcocog, tmp_path, capsys, monkeypatch):
    """With a policy and a SAM from files. Bad samples are skipped and counted.

    The SAM is a ViT-B with two of its twelve layers, without and with global attention, for images
    of 256 x 256.
    """
    size = dict(SAM_SIZES["vit_b"], depth=2, global_blocks=(1,), image_size=256)
    monkeypatch.setitem(SAM_SIZES, "vit_b", size)
    torch.save(build_sam(**size).state_dict(), tmp_path / "vit_b.pth")
    images = sorted(refcocog.rglob("*.jpg"))
    images[0].write_bytes(images[0].read_bytes()[:200])
    images[1].unlink()
    models = ["--vlm", vlm_path("tiny"), "--sam", f"vit_b:{tmp_path}/vit_b.pth"]
    out, data = tmp_path / "run", f"refcocog:{refcocog}"
    quick = "--steps 3 --prompts_per_step 2 --group_size 2"
    run(f"train {quick} --data", data, *models, "--out", out)
    rows = read_rows(out / "metrics.jsonl")
    assert len(rows) == 3 and sum(row["skipped"] for row in rows) > 0
    assert "skipped: " in capsys.readouterr().err
    results = json.loads((out / "eval.json").read_text())
    assert results["after"]["n"] == results["ceiling"]["n"] > 0
    flags = [*models, "--protocol", "segzero", "--adapter", out / "adapter"]
    run("eval --limit 2 --data", f"{data}/test", *flags, "--out", tmp_path / "eval")
    printed = capsys.readouterr().out
    assert "gIoU 75.4, cIoU 73.1" in printed and "in the paper" in printed


def test_skipped_samples_keep_their_places_and_are_tried_again(refcocog, tmp_path, capsys):
    """They count in no metric. In the end, the answers are those of a whole evaluation."""
    out = tmp_path / "eval"
    command = f"eval --data refcocog:{refcocog}/test --out"
    heldout = load_data(f"refcocog:{refcocog}/test", "heldout")
    name = heldout.expressions[0].image[0]
    file = heldout.folder / name
    file = file.rename(file.with_suffix(".away"))
    run(command, out)
    ids = [None if one.image[0] == name else one.id for one in heldout.expressions]
    for again in (False, True):  # the second time, it is still missing
        if again:
            run("eval --resume --out", out)
        assert [row.get("id") for row in answers(out)] == ids and len(set(ids)) > 1
        assert all(name in row["skipped"] for row in answers(out) if "id" not in row)
    assert f"{ids.count(None)} samples could not be used" in capsys.readouterr().out
    results = json.loads((out / "eval.json").read_text())
    assert {row["n"] for row in results.values()} == {len(ids) - ids.count(None)}
    file.rename(file.with_suffix(".jpg"))
    run("eval --resume --out", out)
    run(command, tmp_path / "whole")
    assert answers(out) == answers(tmp_path / "whole") and None not in answers(out)
    assert (out / "eval.json").read_text() == (tmp_path / "whole" / "eval.json").read_text()


@pytest.mark.slow
def test_an_official_checkpoint_gives_the_model_that_the_package_builds(tmp_path):
    """Every weight is in its place. test_reward.py shows that the attention is the same."""
    torch.manual_seed(0)
    file = tmp_path / "sam_vit_b_01ec64.pth"
    theirs = sam_model_registry["vit_b"]()
    torch.save(theirs.state_dict(), file)
    ours = load_sam(f"vit_b:{file}")
    assert repr(ours) == repr(theirs)
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(p.requires_grad for p in ours.parameters())
    assert "vit_l" in refused(load_sam, f"vit_l:{file}")
    file.write_bytes(file.read_bytes()[:1_000_000])  # so it does not stay: it has 375 MB
    assert file.name in refused(load_sam, f"vit_b:{file}")


def test_ci_runs_the_test_command_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    tests = [line.strip() for line in readme.splitlines() if "-m pytest -q -n 2" in line]
    assert len(tests) == 1 and tests[0] in ci


@pytest.mark.parametrize("file", ["README.md", "TUTORIAL.md", ".ci/run", ".ci/versions"])
def test_the_flags_in_commands_exist(file):
    text = (ROOT / file).read_text()
    lines = re.findall(r"samr1_mini\.py (train|eval|segment)([^\n`|]*)", text)
    assert lines
    for command, rest in lines:
        fields = samr1_mini.parse_settings(command, []).__dataclass_fields__
        assert set(re.findall(r"--([a-z_]+)", rest)) <= {*fields, "help"}, rest
