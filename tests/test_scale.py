"""The files for SLURM say what the command line knows, and the page's sizes are those of its formula."""

import os
import re
import shlex
import subprocess
from math import ceil
from pathlib import Path

import pytest
import tiny_data
from test_launch import forecasting

from climax_elevation.train import train

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.sbatch"))


def asked_of_srun(file, out, tmp_path, *arguments, tasks="2"):
    """What a file would have srun run."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    said = tmp_path / "bin" / "srun"
    said.write_text('#!/bin/bash\nprintf "%q " "$@"\n')
    said.chmod(0o755)
    of_slurm = {"JOB_NAME": "a", "JOB_ID": "1", "NNODES": "1", "NTASKS_PER_NODE": tasks, "CPUS_PER_TASK": "1"}
    environment = os.environ | {f"SLURM_{name}": value for name, value in of_slurm.items()}
    environment |= {"OUT": str(out), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    run = subprocess.run(
        ["bash", file, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return shlex.split(run.stdout)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_requeued_job_goes_on_from_the_last_checkpoint(file, tmp_path):
    begun = asked_of_srun(file, tmp_path / "out", tmp_path)
    command = ["climax-elevation", "train", "global_forecast", "--reader", "plugin", "--"]
    assert begun[:7] == ["--kill-on-bad-exit", *command]
    last = tmp_path / "out" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    assert asked_of_srun(file, tmp_path / "out", tmp_path) == [*begun, f"--ckpt_path={last}"]


def test_the_small_job_is_one_that_could_start(no_climax, tmp_path, capsys):
    root = tiny_data.write(tmp_path / "shards")
    own = [argument for argument in forecasting(root, tmp_path / "x") if "devices" not in argument]
    asked = asked_of_srun(ROOT / "configs" / "slurm.sbatch", tmp_path / "out", tmp_path, *own)
    train("global_forecast", None, asked[7:], plan=True, reader="plugin")
    said = capsys.readouterr().out
    assert "processes: 2 (1 nodes of 2), DDPStrategy" in said
    assert "train: 12 samples in 3 shards, 6 a process, 3 batches" in said
    assert f"results: {tmp_path / 'out'}" in said


def test_the_options_of_slurm_fit_the_large_runs_configuration(tmp_path):
    text = (ROOT / "configs" / "lumi.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, flags=re.MULTILINE))
    config = (ROOT / "configs" / "config_elevation_corrected.yaml").read_text()
    assert f"num_nodes: {options['nodes']}\n" in config
    assert f"devices: {options['ntasks-per-node']}\n" in config
    assert options["ntasks-per-node"] == options["gpus-per-node"]


def test_the_sizes_on_paper():
    hours, ahead, a_gpu = 324342, 24, 2
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", (ROOT / "docs" / "scale.md").read_text(), flags=re.MULTILINE)
    assert len(rows) == 4
    for gpus, rest in rows:
        gpus, cells = int(gpus), [cell.strip() for cell in rest.split("|")]
        pairs = ceil((hours - ahead) / gpus)
        steps = ceil(pairs / a_gpu)
        length = pairs + ahead
        more = 100 * (length * gpus / hours - 1)
        shown = [f"{gpus // 8}", f"{gpus}", f"{length} h", f"{more:.1f} %", f"{steps}", f"{20000 / steps:.1f}"]
        assert cells == shown
