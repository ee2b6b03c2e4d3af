"""sweep.py - train several settings with several seeds, for ablations.py and mask_or_box.py.

Each run has its own folder and is trained by `samr1_mini.py train`. The same command continues an
interrupted sweep: Ctrl-C lets each run save its current step. Both scripts keep their runs in one
folder and share those of the paper's setting, so run one of them at a time.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PAPER = "mask"  # the paper's setting, which is the default: both scripts need its runs


def run_folder(out: Path, name: str, seed: int) -> Path:
    """The folder of one run of the sweep in `out`."""
    name = name.replace("+ ", "plus-").replace(", ", "-").replace(" ", "-")
    return out / f"{name}-{seed}"


def read_results(run: Path) -> dict | None:
    """eval.json of a finished run, else None."""
    file = run / "eval.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    return results if "after" in results else None


def read_metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, one per step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(run: Path, flags: list[str], program: tuple[str, ...] = ("-m", "samr1_mini")) -> None:
    """Train with these flags in a process, or resume the run if it has a checkpoint.

    program: arguments of Python that start samr1_mini.

    Raises RuntimeError with the last lines of the output if training fails.
    """
    resume = (run / "checkpoint" / "state.pt").is_file()
    flags = ["--resume"] if resume else ["--overwrite", *flags]
    command = [sys.executable, *program, "train", "--out", str(run.resolve()), *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        lines = "\n".join(result.stderr.splitlines()[-5:])
        raise RuntimeError(f"{run}: exit code {result.returncode}\n{lines}")


def train_missing(settings: dict[str, str], options: argparse.Namespace) -> None:
    """Train all runs of a sweep that are not finished, `jobs` at a time.

    settings: name and flags of each. options: of `parse_arguments`.
    Exits if a run fails or the user interrupts; the runs in progress save and stop, or finish.
    Exits with code 2 if a finished run has another number of steps: it cannot be compared.
    """
    pairs = [(name, seed) for seed in options.seeds for name in settings]
    folders = {pair: run_folder(options.out, *pair) for pair in pairs}
    missing = [pair for pair in pairs if not read_results(folders[pair])]
    for pair in pairs:
        run, finished = folders[pair], pair not in missing
        if finished and (steps := len(read_metrics(run))) != options.steps:
            problem = f"--steps {options.steps}: {run} was trained with {steps} steps"
            exit_with(f"{problem}: use --steps {steps}, or name another folder with --out")
    always = f"--steps {options.steps} --eval_samples {options.eval_samples}"
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {}
        for name, seed in missing:
            flags = f"{always} --seed {seed} {settings[name]}".split()
            runs[pool.submit(train, folders[name, seed], flags)] = (name, seed)
        finished = len(pairs) - len(runs)
        bar = tqdm(as_completed(runs), "sweep", len(pairs), initial=finished, unit="run")
        try:
            for run in bar:
                run.result()
                bar.set_postfix_str("finished: {}, seed {}".format(*runs[run]))
        except (RuntimeError, KeyboardInterrupt) as error:
            for run in runs:
                run.cancel()  # has no effect on runs that have started
            reason = f"{error or 'interrupted'}; the same command continues"
            raise SystemExit(f"sweep: {reason}") from None


def collect(settings: dict[str, str], options: argparse.Namespace) -> dict[str, list[dict]]:
    """The finished runs of each setting: the results of eval.json, the rows of metrics.jsonl, and
    the folder.

    Exits with one line if there is none, so that no empty figure replaces a good one.
    """
    rows = {}
    for name in settings:
        runs = [run_folder(options.out, name, seed) for seed in options.seeds]
        results = [(run, read_results(run)) for run in runs]
        rows[name] = [r | {"metrics": read_metrics(run), "run": run} for run, r in results if r]
    if not any(rows.values()):
        exit_with(f"--out {options.out} has no finished run: leave out --table")
    return rows


def exit_with(problem: str) -> None:
    """Print one line, and exit with code 2."""
    print(f"benchmarks: {problem}", file=sys.stderr)
    raise SystemExit(2)


def mean_and_spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds, 16 characters wide."""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):8.3f} ± {spread:5.3f}"


def parse_arguments(name: str, about: str, seeds: list[int]) -> argparse.Namespace:
    """The flags of a sweep: --seeds, --jobs, --out, --figure, --steps, --eval_samples, --table."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core")
    out, figure = ROOT / "runs" / "sweep", ROOT / "assets" / f"{name}.png"
    parser.add_argument("--out", type=Path, default=out, help="folder of the runs")
    parser.add_argument("--figure", type=Path, default=figure, help="figure to write")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--eval_samples", type=int, default=256)
    parser.add_argument("--table", action="store_true", help="do not train")
    return parser.parse_args()
