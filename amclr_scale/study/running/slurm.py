"""A study as SLURM job arrays: a script, and a file with one command line per cell that is not finished.

A line is the cell's name and the words of its run. Cells on the same number of ranks are one array. Nothing is
submitted. Every task runs one cell and goes on by itself after preemption and at the time limit, as
launch/cluster/train.sbatch does.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from amclr_scale.errors import UserError
from amclr_scale.study.planning.plan import StudyPlan
from amclr_scale.study.planning.planned import Planned
from amclr_scale.study.running.folder import StudyFolder
from amclr_scale.study.running.run import cell_words

SCRIPT = """\
#!/bin/bash
# Cells of study {name}, one task each: line N of {commands} is task N's. Submit it with
#
#   sbatch {script}
#
# and write the report with amclr-scale study PLAN --report. Account, partition and time limit are the cluster's own:
# give them to sbatch.
#SBATCH --job-name={name}
#SBATCH --array=1-{cells}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
{gpus}#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={logs}/%x-%A_%a.out

set -u
MOST_STARTS=50
TASK=${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}
eval "set -- $(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {commands})"
CELL=$1
shift
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export TORCH_EXTENSIONS_DIR=${{TMPDIR:-/tmp}}/torch_extensions_$SLURM_JOB_ID # a killed compile leaves a lock

cd {here} || exit 1
started=$(date +%s)
srun --kill-on-bad-exit=1 {python} -m amclr_scale train "$@"
code=$?
case $code in 0) status=done ;; 75) status=interrupted ;; *) status=failed ;; esac
# each cell has a file of its own: lines that several nodes append to one file may be lost
printf '{{"cell": "%s", "started": %d, "seconds": %d, "exit_code": %d, "status": "%s", "message": "%s"}}\n' \
    "$CELL" "$started" "$(($(date +%s) - started))" "$code" "$status" "logs/{name}-$TASK.out" \
    >> {quoted_logs}/"$CELL".attempts.jsonl
if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt "$MOST_STARTS" ]; then
    scontrol requeue "$TASK"
fi
exit "$code"
"""


def write_jobs(plan: StudyPlan, folder: StudyFolder, cells: Sequence[Planned], target: Path) -> list[Path]:
    """Write a script and the command lines of all cells that are not finished, once per number of ranks.

    Cells that wait for a learning rate are left out: once the tuning cells have run, the same command writes them.

    Args:
        plan, folder, cells: the study, its folder written.
        target: the folder to write into.

    Returns:
        The scripts.

    Raises:
        UserError: nothing is left to run, the ranks do not fill nodes, or the folder cannot be written.
    """
    left = [cell for cell in cells if not cell.waits and not folder.is_finished(cell)]
    if not left:
        raise UserError("--slurm: every cell is finished; write the report with --report")
    alike = {ranks: [cell for cell in left if cell.ranks == ranks] for ranks in sorted({cell.ranks for cell in left})}
    written = {}
    for ranks, members in alike.items():
        name = plan.name if len(alike) == 1 else f"{plan.name}-ranks{ranks}"
        script, commands = (target.absolute() / f"{name}.{kind}" for kind in ("sbatch", "commands"))
        written[script] = _script(plan, folder, name, members, script, commands)
        written[commands] = "".join(f"{shlex.join([cell.name, *cell_words(plan, folder, cell)])}\n" for cell in members)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path, text in written.items():
            path.write_text(text, "utf-8")
    except OSError as error:
        raise UserError(f"--slurm: {target} cannot be written: {error}") from error
    return [path for path in written if path.suffix == ".sbatch"]


def _script(
    plan: StudyPlan, folder: StudyFolder, name: str, cells: Sequence[Planned], script: Path, commands: Path
) -> str:
    ranks = cells[0].ranks
    tasks = min(ranks, plan.execution.ranks_per_node)
    if ranks % tasks:
        raise UserError(f"execution.ranks: expected a multiple of execution.ranks_per_node = {tasks}, got {ranks}")
    logs = folder.logs.absolute()
    return SCRIPT.format(
        name=name, commands=shlex.quote(str(commands)), script=shlex.quote(str(script)), cells=len(cells),
        nodes=ranks // tasks, tasks=tasks, logs=logs, quoted_logs=shlex.quote(str(logs)),
        here=shlex.quote(str(Path.cwd())), python=shlex.quote(sys.executable),
        gpus=f"#SBATCH --gpus-per-node={tasks}\n" if plan.execution.device == "cuda" else "",
    )  # fmt: skip
