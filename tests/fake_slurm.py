"""Five commands of SLURM for one machine, enough to run real jobs without it.

    write_commands(folder)   puts sbatch, srun, squeue, scontrol and scancel into a folder for $PATH

``sbatch`` runs the script detached, as often as ``scontrol requeue`` asks. While a file ``slow``
is in the folder it does not answer, and while a file ``full`` is there jobs wait. ``srun`` starts
its command as task 0 of one machine (or as all tasks of several, which are all this one) and, as
SLURM does, sends it the signals that the job gets. State: files in the folder.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")


def write_commands(folder: Path) -> None:
    """Write the commands; each calls this file."""
    for name in COMMANDS:
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__)} {folder} {name} "$@"\n')
        path.chmod(0o755)


def warn(folder: Path, number: str) -> None:
    """Send the tasks of a job the signal that SLURM sends before it ends a job."""
    for pid in (folder / f"{number}.tasks").read_text().split():
        os.kill(int(pid), signal.SIGUSR2)


def _sbatch(folder: Path, script: str) -> None:
    if "--partition=nowhere" in Path(script).read_text():
        sys.exit("sbatch: error: invalid partition specified: nowhere")
    number = str(1000 + len(list(folder.glob("*.sh"))))
    kept = folder / f"{number}.sh"
    kept.write_text(Path(script).read_text())
    words = [sys.executable, __file__, str(folder), "run", number]
    (folder / f"{number}.alive").touch()
    with (folder / f"{number}.out").open("w") as out:
        run = subprocess.Popen(words, start_new_session=True, stdout=out, stderr=out)
    (folder / f"{number}.pid").write_text(str(run.pid))
    while (folder / "slow").exists():
        time.sleep(0.05)
    print(f"Submitted batch job {number}")


def _run(folder: Path, number: str) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # a job inherits nothing from sbatch
    while (folder / "full").exists():
        time.sleep(0.05)
    again = folder / f"{number}.again"
    for restart in range(9):
        environment = {**os.environ, "SLURM_JOB_ID": number, "SLURM_RESTART_COUNT": str(restart)}
        subprocess.run(["bash", str(folder / f"{number}.sh")], env=environment)
        if not again.exists():
            break
        again.unlink()
    (folder / f"{number}.alive").unlink()


def _srun(folder: Path, *words: str) -> None:
    number = os.environ["SLURM_JOB_ID"]
    script = _script(folder, number)
    nodes = next(int(w.split("=")[1]) for w in script.split() if w.startswith("--nodes="))
    output = words[words.index("--output") + 1]
    command = words[words.index("--error") + 2 :]
    tasks = []
    for node in range(nodes):
        environment = os.environ | {
            "SLURM_PROCID": str(node), "SLURM_NODEID": str(node), "SLURM_LOCALID": "0",
            "SLURM_NTASKS": str(nodes), "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "localhost",
        }  # fmt: skip
        with open(output.replace("%j", number).replace("%t", str(node)), "a") as out:
            tasks.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment))
    (folder / f"{number}.tasks").write_text(" ".join(str(task.pid) for task in tasks))
    while any(task.poll() is None for task in tasks):
        if (folder / f"{number}.again").exists():  # the whole job ends
            time.sleep(0.5)
            for task in tasks:
                task.kill()
        time.sleep(0.05)


def _squeue(folder: Path, *words: str) -> None:
    name = next((word.removeprefix("--name=") for word in words if "--name=" in word), "")
    numbers = [path.stem for path in folder.glob("*.alive")]
    script = "#SBATCH --job-name={}\n".format
    print("\n".join(n for n in numbers if not name or script(name) in _script(folder, n)))


def _script(folder: Path, number: str) -> str:
    return (folder / f"{number}.sh").read_text()


def _scancel(folder: Path, number: str) -> None:
    os.killpg(int((folder / f"{number}.pid").read_text()), signal.SIGKILL)
    (folder / f"{number}.alive").unlink()


def _scontrol(folder: Path, verb: str, number: str) -> None:
    assert verb == "requeue"
    (folder / f"{number}.again").touch()


if __name__ == "__main__":
    home, command_name, *arguments = sys.argv[1:]
    globals()[f"_{command_name}"](Path(home), *arguments)
