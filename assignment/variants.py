"""variants.py - reference solutions of exercises 14 and 15: `train` with a few lines changed.

    python -m assignment.variants gspo train --seed 0        any name of VARIANTS, flags of train
    python -m benchmarks.sweep own_reward      exercise 14: three rewards, 60 steps each
    python -m benchmarks.sweep variants        exercise 15: five seeds of each

Each is a change of one script. The file itself stays as it is.
"""

import importlib
import sys

from assignment.handout import ROOT
from plumbing.errors import UserError, exit_with_one_line

# Name: the script that is changed, and its changes. Each line after a "-" occurs once in it, and
# the lines after "+" take its place.
VARIANTS = {
    # Exercise 14. The tiers on the smaller of two IoUs, that of the masks and that of the boxes. So
    # a tier is reached only with a good mask and a good box, and the true mask has the only label.
    "own_reward": """reward.py
-        earned = accuracy_reward(iou, accuracy)
+        earned = tiered_reward(torch.minimum(iou, box_ious(samples, prompts)))
""",
    # Dr. GRPO: no division by the standard deviation, and none by the lengths. 48 is the default of
    # --max_new_tokens, a constant.
    "dr_grpo": """grpo.py
-    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + eps)
+    return rewards - rewards.mean(-1, keepdim=True)
-        objective = gain.sum((1, 2)) / mask.sum((1, 2))  # (B,)
+        objective = gain.sum((1, 2)) / (48 * mask.shape[1])  # (B,)
""",
    # GSPO: one ratio for a completion, the geometric mean of its tokens' ratios. It is used with
    # --normalise sequence. The mean varies less than a token's ratio, so the clip is narrower. Its
    # width is ours: GSPO's paper has 0.0003 and 0.0004, for completions of thousands of tokens.
    "gspo": """grpo.py
-    ratio = (logprobs - old).exp()  # (B, G, T)
+    eps_low, eps_high = 0.02, 0.03
+    log_ratio = ((logprobs - old) * mask).sum(2) / mask.sum(2)  # (B, G)
+    ratio = log_ratio.exp()[..., None].expand_as(logprobs)  # (B, G, T)
""",
    # CISPO: the clipped ratio is a weight without gradient. Only the upper side is clipped.
    "cispo": """grpo.py
-    surrogate = torch.min(ratio * advantage, clipped * advantage)
+    surrogate = ratio.detach().clamp(max=1 + eps_high) * advantage * logprobs
""",
}


def changed_text(name: str) -> str:
    """The text of a variant's script."""
    script, *changes = VARIANTS[name].split("\n-")
    text = (ROOT / script).read_text("utf-8")
    for change in changes:
        old, *new = change.rstrip().split("\n+")
        if text.count(old) != 1:
            raise ValueError(f"{script} has not once: {old}")
        text = text.replace(old, "\n".join(new))
    return text


def main(argv: list[str]) -> None:
    if not argv or argv[0] not in VARIANTS:
        raise UserError(f"name a variant, one of {', '.join(VARIANTS)}, then the command train")
    # Executed in the module itself, before samr1_mini takes functions from it.
    module = importlib.import_module(VARIANTS[argv[0]].partition(".")[0])
    exec(compile(changed_text(argv[0]), module.__file__, "exec"), module.__dict__)
    import samr1_mini

    samr1_mini.main(argv[1:])


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])
