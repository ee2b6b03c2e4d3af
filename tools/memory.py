"""memory.py - print the GPU memory that a training step is expected to need.

    python -m tools.memory --preset qwen3b [any flag of samr1_mini.py train]

The estimate is computed from the sizes of the models. It downloads no weights and needs no GPU.
`python -m benchmarks.gpu_24gb` measures.
"""

import sys

from plumbing.command_line import exit_on_error
from plumbing.memory import Parts, expected_memory, sam_sizes
from plumbing.settings import parse_settings
from plumbing.vlm import vlm_path
from samr1_mini import LORA_TARGETS


def print_memory(expected: dict[str, Parts]) -> None:
    """Print the parts of each phase, their sums, and the largest sum."""
    totals = {phase: sum(size for size, _ in parts.values()) for phase, parts in expected.items()}
    for phase, parts in expected.items():
        print(f"\n{phase}")
        for part, (size, why) in parts.items():
            print(f"  {part:22}{size / 2**30:8.2f} GiB  {why}")
        print(f"  {'sum':22}{totals[phase] / 2**30:8.2f} GiB")
    peak = max(totals.values())
    print(f"\nexpected peak: {peak / 2**30:.1f} GiB ({peak / 1e9:.1f} GB), computed, not measured")
    print("python -m benchmarks.gpu_24gb measures it")


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        return print(__doc__)
    s = parse_settings("train", argv)
    with exit_on_error(f"--sam {s.sam}"):
        sam_sizes(s.sam)
    with exit_on_error(f"--vlm {s.vlm}"):
        expected = expected_memory(s, vlm_path(s.vlm), LORA_TARGETS)
    print_memory(expected)


if __name__ == "__main__":
    main(sys.argv[1:])
