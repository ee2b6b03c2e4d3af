"""The command `train`: what a run writes, resuming, and what a step does."""

import json
import shutil
import signal
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from makers import contents, read_rows, refused, run
from safetensors.torch import load_file, save_file
from segment_anything.modeling import MaskDecoder
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

import samr1_mini
from data import Shapes
from grpo import group_logprobs
from plumbing import runs
from plumbing.errors import UserError
from plumbing.settings import parse_settings
from plumbing.tracking import Tracker
from plumbing.vlm import load_vlm, vlm_path

ROOT = Path(samr1_mini.__file__).parent
QUICK = "train --prompts_per_step 4 --group_size 4"  # and 4 steps: that of `whole_run`
NOT_REPEATABLE = ("seconds_", "tokens_per_second", "peak_mib")

pytestmark = pytest.mark.usefixtures("quick_pictures")  # `whole_run` draws its pictures


def read_metrics(out: Path) -> list[dict]:
    rows = read_rows(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(NOT_REPEATABLE)} for row in rows]


def state(out: Path) -> dict:
    return torch.load(out / "checkpoint" / "state.pt", weights_only=True)


@pytest.fixture
def copied_run(whole_run, tmp_path) -> Path:
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def test_a_run_writes_its_files(whole_run):
    files = """config.json metrics.jsonl eval.json curves.png samples/step_00001.png
        samples/step_00004.png rollouts/step_00004.json adapter/adapter_config.json
        adapter/adapter_model.safetensors adapter/README.md checkpoint/state.pt"""
    for name in files.split():
        assert (whole_run / name).stat().st_size > 0, name
    assert not list(whole_run.rglob("*.tmp*"))
    assert len({file.stat().st_mode for file in (whole_run / "adapter").iterdir()}) == 1
    assert set(json.loads((whole_run / "eval.json").read_text())) == {"before", "after", "ceiling"}


def test_the_metrics_of_a_run_are_complete_and_consistent(whole_run):
    rows = read_rows(whole_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    columns = """reward accuracy think_format answer_format iou tier_0 tier_2 tier_3 tier_4
        equal_groups length truncated skipped kl entropy ratio clip_low clip_high grad_norm lr
        seconds_rollout seconds_reward seconds_logprobs seconds_update tokens_per_second peak_mib"""
    for row in rows:
        assert set(columns.split()) <= set(row)
        assert np.isfinite(list(row.values())).all()
        parts = row["accuracy"] + row["think_format"] + row["answer_format"]
        assert row["reward"] == pytest.approx(parts, abs=1e-5)
        assert sum(row[f"tier_{k}"] for k in (0, 2, 3, 4)) == pytest.approx(1)


def test_the_model_card_is_true_and_says_how_to_load_the_adapter(whole_run):
    card = (whole_run / "adapter" / "README.md").read_text()
    config = (whole_run / "adapter" / "adapter_config.json").read_text()
    for part in ("tiny/vlm", "shapes", "step 4 of 4", "seed 0", "tiered", "4 completions"):
        assert part in card, part
    for name, row in json.loads((whole_run / "eval.json").read_text()).items():
        assert f"| {name} | {row['giou']:.3f} | {row['ciou']:.3f} | {row['n']} |" in card
    assert json.loads(config)["base_model_name_or_path"] == "tiny/vlm"
    for path in (ROOT, whole_run, Path.home()):
        assert f"{path}/" not in card + config, "a path of this machine"
    lines = [line[4:] for line in card.splitlines() if line.startswith("    ")]
    folders = {"BASE_MODEL": vlm_path("tiny"), "THIS_FOLDER": str(whole_run / "adapter")}
    scope = {}
    exec("\n".join(lines), folders, scope)
    assert any("lora_A" in name for name, _ in scope["model"].named_parameters())


def test_only_the_adapter_on_the_language_model_is_trained(whole_run):
    trained = load_vlm("tiny", "cpu", 64, "brief", str(whole_run / "adapter")).model
    untrained = load_vlm("tiny", "cpu", 64, "brief").model.state_dict()
    adapter = {}
    for name, weight in trained.base_model.model.named_parameters():
        name = name.replace(".base_layer", "")
        if name in untrained:
            assert torch.equal(weight, untrained[name])
        else:
            adapter[name] = weight
    layers = trained.base_model.model.model.language_model.layers
    assert len(adapter) == 2 * 7 * len(layers)  # two factors for q, k, v, o, gate, up, down
    assert all("language_model" in name for name in adapter)
    assert all(p.abs().max() > 0 for name, p in adapter.items() if "lora_B" in name)
    assert trained.peft_config["default"].lora_alpha == 2 * trained.peft_config["default"].r


def test_training_continues_from_an_adapter(whole_run, tmp_path):
    """Its answers are the first ones, the base model is the reference, and --resume goes on.

    The copy of the adapter has half the factor B and the double alpha, so it does the same.
    """
    given = Path(shutil.copytree(whole_run / "adapter", tmp_path / "given"))
    file = given / "adapter_model.safetensors"
    halved = {k: x / 2 if "lora_B" in k else x for k, x in load_file(file).items()}
    save_file(halved, file)
    config = json.loads((given / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (given / "adapter_config.json").write_text(json.dumps(config))
    out = tmp_path / "run"
    run(QUICK, "--steps", 1, "--adapter", given, "--out", out)
    first = json.loads((whole_run / "eval.json").read_text())
    assert json.loads((out / "eval.json").read_text())["before"] == first["after"]
    assert read_metrics(out)[0]["kl"] > 2 * read_metrics(whole_run)[0]["kl"]  # of the base model
    trained = state(out)["adapter"]
    for key, weight in state(whole_run)["adapter"].items():
        assert 0 < (trained[key] - weight).abs().max() < 1e-3  # lr 1e-4 in the first of ten steps
    assert "started from another adapter" in (out / "adapter" / "README.md").read_text()
    shutil.rmtree(given)  # the checkpoint has all that is needed
    run("train --resume --steps 2 --out", out)
    assert state(out)["step"] == 2


@pytest.mark.parametrize(
    "module, message",
    [
        (None, "--track wandb: first pip install wandb"),
        (SimpleNamespace(init=Mock(side_effect=OSError("no account"))), "no account"),
    ],
)
def test_a_tracker_that_does_not_start_is_refused(module, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=message):
        Tracker(parse_settings("train", ["--track", "wandb"]), tmp_path)


@pytest.mark.slow
def test_an_interrupted_and_resumed_run_ends_bit_for_bit_like_a_whole_one(
    whole_run, tmp_path, monkeypatch
):
    """It gets SIGTERM in its second step. Its tracker gets every row and picture once."""
    out = tmp_path / "run"
    tracker = Mock(Image=lambda path: Path(path).name)
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    set_learning_rate = samr1_mini.set_learning_rate

    def signal_in_second_step(optimizer, s, step):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return set_learning_rate(optimizer, s, step)

    with monkeypatch.context() as patch:
        patch.setattr(samr1_mini, "set_learning_rate", signal_in_second_step)
        with pytest.raises(SystemExit) as stopped:
            run(QUICK, "--steps", 4, "--track", "trackio", "--out", out)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len(read_metrics(out)) == state(out)["step"] == 2  # the current one was finished
    # What a kill -9 between two checkpoints leaves: more lines than steps in the checkpoint.
    with open(out / "metrics.jsonl", "a") as log:
        later = read_metrics(out)[-1] | {"step": 9, "reward": 99.0}
        log.write(json.dumps(later) + '\n{"step": 10, "half a li')
    run("train --resume --out", out)
    assert read_metrics(out) == read_metrics(whole_run)
    for part in ("adapter", "optimizer", "generator"):
        torch.testing.assert_close(state(out)[part], state(whole_run)[part], rtol=0, atol=0)
    assert (out / "eval.json").read_text() == (whole_run / "eval.json").read_text()

    pictures = [{"samples": "step_00001.png"}, {}, {}, {"samples": "step_00004.png"}]
    rows = zip(read_rows(out / "metrics.jsonl"), pictures, strict=True)
    logged = [call.log(row | shown, step=row["step"]) for row, shown in rows]
    first, *before, again = tracker.mock_calls[:4]
    assert first.kwargs["name"] == "run" and first.kwargs["config"]["steps"] == 4
    assert (first.kwargs["resume"], again.kwargs["resume"]) == ("never", "allow")
    assert [*before, *tracker.mock_calls[4:]] == [*logged, call.finish()]


def test_a_run_that_was_killed_while_saving_can_be_resumed(whole_run, copied_run):
    """The checkpoint of the last step is complete, but files written after it are missing."""
    (copied_run / "eval.json").unlink()
    shutil.rmtree(copied_run / "adapter")
    run("train --resume", "--out", copied_run)
    assert read_metrics(copied_run) == read_metrics(whole_run)
    for name in ("eval.json", "adapter/adapter_model.safetensors"):
        assert (copied_run / name).read_bytes() == (whole_run / name).read_bytes()


def test_a_run_that_trains_on_has_no_result_until_it_ends(copied_run, monkeypatch):
    """The table would show the metrics of the old last step."""
    before = json.loads((copied_run / "eval.json").read_text())
    monkeypatch.setattr(samr1_mini, "evaluate", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run("train --resume --steps 5 --out", copied_run)
    del before["after"]
    assert json.loads((copied_run / "eval.json").read_text()) == before
    assert "| after |" not in (copied_run / "adapter" / "README.md").read_text()
    assert state(copied_run)["step"] == 5 and "after" not in state(copied_run)["results"]


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(copied_run, monkeypatch):
    def fail(state, file):
        Path(file).write_bytes(b"half a file")
        raise RuntimeError("PytorchStreamWriter failed")  # torch's way to say it

    monkeypatch.setattr(torch, "save", fail)
    assert "Writer failed" in refused(run, "train --resume --steps 5 --out", copied_run)
    assert state(copied_run)["step"] == 4 and not list(copied_run.rglob("*.tmp*"))


def old_names(adapter: dict) -> dict:
    return {k.replace("model.language_model.layers", "model.layers"): adapter[k] for k in adapter}


@pytest.mark.parametrize(
    "change, message",
    [
        (None, "no checkpoint"),
        (b"PK", "state.pt"),
        ({"optimizer": {}}, "state.pt: it does not fit this model"),
        (old_names, "lacks 42 .*has 42 "),
        (lambda held: {key: held[key] / 0 for key in held}, "not finite"),
    ],
)
def test_what_cannot_be_continued_is_refused_and_kept(change, message, copied_run):
    file = copied_run / "checkpoint" / "state.pt"
    if change is None:
        file.unlink()
    elif isinstance(change, bytes):
        file.write_bytes(change)
    else:
        saved = state(copied_run)
        spoiled = change if isinstance(change, dict) else {"adapter": change(saved["adapter"])}
        torch.save(saved | spoiled, file)
    before = contents(copied_run)
    with pytest.raises(UserError, match=f"--resume: .*{message}"):
        run("train --resume --steps 5 --out", copied_run)
    assert contents(copied_run) == before


@pytest.mark.slow
def test_training_raises_any_reward(tmp_path, monkeypatch):
    """Here the reward is 1 for completions that contain "left". No other code knows about it."""
    score = samr1_mini.score_completions

    def reward_left(scorer, samples, completions, *args, **options):
        rewards = [[float(" left" in text) for text in group] for group in completions]
        scores = score(scorer, samples, completions, *args, **options)
        return scores._replace(reward=torch.tensor(rewards))

    monkeypatch.setattr(samr1_mini, "score_completions", reward_left)
    monkeypatch.setattr(samr1_mini, "WARMUP", 2)
    flags = "--steps 10 --prompts_per_step 4 --lr 4e-3"
    run(f"train {flags} --max_new_tokens 16 --out", tmp_path / "run")
    rewards = [row["reward"] for row in read_metrics(tmp_path / "run")]
    assert np.mean(rewards[:2]) < 0.6
    assert np.mean(rewards[-4:]) > 0.9


class Sampled:
    """A policy with a random adapter, four prompts, and two completions for each."""

    def __init__(self, flags: str):
        sizes = "--prompts_per_step 4 --group_size 2 --temperature 1.5 --lora_rank 4"
        self.s = parse_settings("train", f"{sizes} {flags}".split())
        self.policy = samr1_mini.load_trainable_policy(self.s)
        self.weights = [p for p in self.policy.model.parameters() if p.requires_grad]
        torch.manual_seed(1)
        with torch.no_grad():
            for name, weight in self.policy.model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.05)
        self.prompts = self.policy.read([Shapes("train")[i] for i in range(4)])
        assert len(set(self.prompts.mask.sum(1).tolist())) > 1  # passes pad to different lengths
        generator = torch.Generator().manual_seed(0)
        self.completions = samr1_mini.sample_completions(
            self.policy, self.prompts, self.s, generator
        )

    def fixed_logprobs(self):
        return samr1_mini.fixed_logprobs(self.policy, self.prompts, self.completions, self.s)

    def update(self, old, reference):
        optimizer = torch.optim.AdamW(self.weights, 1e-2)
        advantages = torch.tensor([[1.0, -1.0], [2.0, 0.5], [-1.0, 1.0], [0.3, -2.0]])
        return samr1_mini.update(
            self.policy,
            optimizer,
            self.prompts,
            self.completions,
            advantages,
            old,
            reference,
            self.s,
        )


def test_old_logprobs_are_the_policys_and_reference_ones_the_base_models():
    sampled = Sampled("")
    old, reference = sampled.fixed_logprobs()
    expected = []
    for model in (sampled.policy.model, load_vlm("tiny", "cpu", 64, "brief").model):
        with torch.no_grad():
            expected += group_logprobs(
                model, sampled.prompts, sampled.completions, sampled.policy.banned, 1.5
            )[:1]
    first = slice(0, 2)  # a mini-batch has two prompts
    assert old[first].isnan().all()  # not known yet: the first update computes them
    sampled.update(old, reference)
    assert torch.allclose(old, expected[0], atol=1e-4)
    assert torch.allclose(reference, expected[1], atol=1e-4)
    assert (old - reference).abs().max() > 0.01  # the adapter has an effect
    sampled.s.beta = 0
    assert sampled.fixed_logprobs()[1] is None


def test_saving_memory_changes_neither_the_gradients_nor_the_statistics(monkeypatch):
    """All prompts in one pass; one prompt in a pass; and layers computed again for the gradient."""
    attention = modeling_qwen2_5_vl.Qwen2_5_VLAttention
    forward = attention.forward
    gradients, sides, logged = {}, [], []
    calls = Counter()  # of attention layers with gradient, for each level

    def count(*args, **options):
        calls[len(sides)] += torch.is_grad_enabled()
        return forward(*args, **options)

    def note(optimizer, scaler, max_norm):
        gradients[len(sides)] = torch.cat([p.grad.flatten() for p in sampled.weights])
        return torch.tensor(1.0)  # without a step, so the second gradient is added to the first

    monkeypatch.setattr(attention, "forward", count)
    monkeypatch.setattr(samr1_mini, "clipped_step", note)
    for level in (0, 1, 2):
        sampled = Sampled(f"--minibatches 2 --epochs 1 --beta 0.1 --save_memory {level}")
        old, reference = sampled.fixed_logprobs()
        # Some tokens of the second mini-batch are clipped, below and above.
        old[2:] = reference[2:] + torch.tensor([0.4, -0.4])[:, None]
        side, statistics = sampled.update(old, reference)
        sides.append(side)
        logged.append(statistics)
    assert len(gradients) == 3 and gradients[0].norm() > 0
    mask = sampled.completions.mask
    assert len(set(mask.sum((1, 2)).tolist())) > 1  # else passes would have equal weights anyway
    for number, name in ((-1, "clip_low"), (1, "clip_high")):
        share = (sides[0][mask] == number).float().mean().item()
        assert 0 < share == pytest.approx(logged[0][name])
    for level in (1, 2):
        difference = gradients[level] - gradients[0]
        assert difference.norm() < 1e-4 * gradients[0].norm()
        assert torch.equal(sides[level], sides[0]) and sides[0].unique().tolist() == [-1, 0, 1]
        assert logged[level] == pytest.approx(logged[0], rel=1e-4)
    assert calls[1] == 2 * calls[0] and calls[2] == 2 * calls[1]


@pytest.mark.parametrize("level", [0, 1])
def test_the_ratio_of_the_first_update_is_exactly_one(level, monkeypatch):
    """Old and new log-probs come from the same passes, so not even rounding differs.

    Otherwise ratios in bfloat16 would be off by percents before anything is learned. On a CPU,
    passes of other sizes happen to round alike, so this also compares the passes.
    """
    sampled = Sampled(f"--save_memory {level} --dtype bfloat16")
    forward = Mock(wraps=samr1_mini.group_logprobs)
    loss = Mock(wraps=samr1_mini.grpo_loss)
    monkeypatch.setattr(samr1_mini, "group_logprobs", forward)
    monkeypatch.setattr(samr1_mini, "grpo_loss", loss)
    old, reference = sampled.fixed_logprobs()
    sampled.update(old, reference)
    passes = [call.args[1].ids.tolist() for call in forward.call_args_list]
    differences = [(call.args[0] - call.kwargs["old"]).abs().max() for call in loss.call_args_list]
    n = 4 if level else 2  # passes over all prompts
    first = n // 2  # passes of the first mini-batch, which needs no old log-probs
    of_old, of_reference, of_updates = passes[:first], passes[first:][:n], passes[first + n :]
    assert of_old == of_reference[first:]
    assert of_updates == of_reference * 2  # two epochs
    assert differences[:first] == [0] * first and min(differences[first:]) > 0


def test_greedy_completions_are_the_same_for_any_number_of_prompts_together():
    policy = load_vlm("tiny", "cpu", 64, "brief")
    prompts = policy.read([Shapes("heldout")[i] for i in range(5)])
    texts = []
    for preset in ("tiny", "qwen2b"):  # all together, and three prompts at a time
        s = parse_settings("eval", ["--max_new_tokens", "48"])
        s.preset = preset
        texts.append(policy.texts(samr1_mini.sample_completions(policy, prompts, s, greedy=True)))
    assert texts[0] == texts[1]


def test_the_learning_rate_rises_then_decays():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    s = parse_settings("train", "--steps 100 --lr 2e-3".split())
    rates = [samr1_mini.set_learning_rate(optimizer, s, step) for step in range(100)]
    assert rates[0] == pytest.approx(2e-3 / 10)
    assert rates[50] == pytest.approx(1e-3) and rates[99] == pytest.approx(2e-5)
    assert optimizer.param_groups[0]["lr"] == rates[99]


def test_a_step_computes_nothing_twice(tmp_path, monkeypatch):
    """Counts calls for 3 prompts of 4 completions and 2 updates.

    The vision tower and SAM's encoder see each image once. SAM's decoder is called once for each
    form of prompt (box and points, box, points). The language model reads each prompt once to
    sample, and once for the reference, the old policy and each epoch, but not per completion.
    """
    sizes = defaultdict(list)  # of the calls of each function

    def note(owner, name, size):
        original = getattr(owner, name)

        def noted(*args, **options):
            sizes[name, owner].append(size(*args, **options))
            return original(*args, **options)

        monkeypatch.setattr(owner, name, noted)
        return sizes[name, owner]

    def forms(scorer, embeddings, factors, objects):
        prompts = [one for group in objects for one in group]
        return len({(p.box is not None, len(p.points)) for p in prompts} - {(False, 0)})

    def tokens(model, *args, inputs_embeds, **options):
        return inputs_embeds.shape[:2].numel()

    tower = modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel
    vision_images = note(tower, "forward", lambda *args, grid_thw: len(grid_thw))
    text_tokens = note(modeling_qwen2_5_vl.Qwen2_5_VLTextModel, "forward", tokens)
    sam_images = note(samr1_mini.SamScorer, "encode", lambda scorer, images: len(images))
    sam_forms = note(samr1_mini.SamScorer, "best_logits", forms)
    decoder_calls = note(MaskDecoder, "predict_masks", lambda *args, **options: 1)
    monkeypatch.setattr(samr1_mini, "evaluate", lambda *args: [])
    flags = "--steps 1 --prompts_per_step 3 --group_size 4 --save_memory 1 --minibatches 1"
    run(f"train {flags} --epochs 2 --out", tmp_path / "run")
    assert sum(vision_images) == sum(sam_images) == 3
    assert len(decoder_calls) == sum(sam_forms) > 0
    samples = Shapes("train", size=3000)
    chosen = runs.indices(0, 3, len(samples), seed=0)
    prompts = load_vlm("tiny", "cpu", 64, "brief").read([samples[i] for i in chosen])
    sampled = round(12 * read_metrics(tmp_path / "run")[0]["length"])  # tokens
    # 1 call for all prompts; 3 each for the reference and two epochs. The only mini-batch needs no
    # old log-probs.
    decode_steps = len(text_tokens) - 1 - 3 * 3
    assert 0 < decode_steps < 48
    packed = 3 * (int(prompts.mask.sum()) + sampled)
    assert sum(text_tokens) == prompts.ids.numel() + 12 * decode_steps + packed
