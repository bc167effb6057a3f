"""A real Slurm on this one machine, for the batch scripts: munge, a controller and one daemon per node, on loopback.

It needs root and Debian's packages slurm-wlm, slurmd, slurmctld, slurm-client and munge. Every node claims 64 cores and
8 GPUs (stand-in device files), so that scripts written for nodes with 8 GPUs are accepted as they are. Ports and job
numbers are new each time: several of these can run side by side, next to the machine's own Slurm, too.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.ports import free_ports

TOOLS = ("sbatch", "scancel", "sinfo", "squeue", "slurmctld", "slurmd", "munged", "setpriv", "unshare")
GPUS = 8
START_SECONDS = 30
STOP_SECONDS = 20
CONFIGURATION = """\
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
FirstJobId={job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait=5
OverTimeLimit=0
MessageTimeout=10
SlurmctldTimeout=30
SlurmdTimeout=30
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=64 Boards=1 SocketsPerBoard=2 "
    "CoresPerSocket=32 ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:{gpus} State=UNKNOWN\n"
)
# In a mount (and host name) namespace of its own: the machine's /etc/hosts and its name stay as they are.
WITH_HOSTS = 'mount --bind "$0" /etc/hosts && exec "$@"'
WITH_HOSTS_AND_NAME = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'


def missing() -> str | None:
    """None where a local Slurm can be started, else what it lacks."""
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"needs the packages of Slurm and munge: {', '.join(absent)} not found on the PATH"
    return None if os.geteuid() == 0 else "the local Slurm needs root"


@contextmanager
def local_slurm(nodes: int = 2) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands reach a cluster of that many idle nodes."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    slurm = LocalSlurm(folder, [f"n{i + 1}" for i in range(nodes)])
    try:
        slurm.start()
        yield slurm.environment
    finally:
        slurm.stop()
        shutil.rmtree(folder, ignore_errors=True)


class LocalSlurm:
    """The daemons of one cluster, as children of this process."""

    def __init__(self, folder: Path, nodes: list[str]) -> None:
        self.folder = folder
        self.nodes = nodes
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the daemons and wait until every node is idle."""
        self._write_configuration()
        folder, configuration = self.folder, self.folder / "slurm.conf"
        self._spawn(
            "munged", "--foreground", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/log/munged.log",
            f"--seed-file={folder}/munge.seed", "--num-threads=2",
        )  # fmt: skip
        self._wait(lambda: (folder / "munge.socket").exists(), "munged does not answer")
        hosts = folder / "hosts"
        in_namespace = ["unshare", "--mount", "sh", "-c", WITH_HOSTS, hosts]
        self._spawn(*in_namespace, "slurmctld", "-D", "-i", "-f", configuration)
        for node in self.nodes:
            in_namespace = ["unshare", "--mount", "--uts", "sh", "-c", WITH_HOSTS_AND_NAME, hosts, node]
            self._spawn(*in_namespace, "slurmd", "-D", "-N", node, "-f", configuration)
        self._wait(lambda: set(self._ask("sinfo", "-hNt", "idle", "-o%N")) == set(self.nodes), "not all nodes are idle")

    def stop(self) -> None:
        """Kill the jobs that are left, then end the daemons."""
        if self.daemons and (jobs := sorted(set(self._ask("squeue", "-ho%A")))):
            self._ask("scancel", "--full", "--signal=KILL", *jobs)
            self._ask("scancel", *jobs)
            deadline = time.monotonic() + STOP_SECONDS
            while self._ask("squeue", "-h") and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _write_configuration(self) -> None:
        folder = self.folder
        folder.chmod(0o755)  # munge refuses a socket in a folder that not everybody may enter
        for name in ("log", "state", "spool", *(f"spool/{node}" for node in self.nodes)):
            (folder / name).mkdir(mode=0o755)
        for i in range(GPUS):
            os.mknod(folder / f"gpu{i}", stat.S_IFCHR | 0o666, os.makedev(1, 3))  # /dev/null
        (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
        # job numbers, which give the ranks' ports, begin above the ports that are taken
        job, port, *node_ports = sorted(free_ports(2 + len(self.nodes)), reverse=True)
        nodes = [NODE.format(name=name, port=p, gpus=GPUS) for name, p in zip(self.nodes, node_ports, strict=True)]
        # nodes before the partition that has them all
        (folder / "slurm.conf").write_text("".join(nodes) + CONFIGURATION.format(port=port, job=job, folder=folder))
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        names = "".join(f"127.0.0.1 {node}\n" for node in self.nodes)
        (folder / "hosts").write_text(f"{Path('/etc/hosts').read_text()}\n{names}")

    def _spawn(self, *arguments: str | Path) -> None:
        """Start a daemon that ends with this process, even if this process is killed."""
        command = ["setpriv", "--pdeathsig", "TERM", *arguments]
        with (self.folder / "log" / "output.log").open("ab") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.daemons.append(subprocess.Popen(command, **streams, start_new_session=True))

    def _ask(self, *arguments: str) -> list[str]:
        """The words that one of Slurm's commands prints; none while the controller does not answer."""
        try:
            done = subprocess.run(arguments, env=self.environment, capture_output=True, text=True, timeout=10)
        except subprocess.TimeoutExpired:
            return []
        return done.stdout.split() if done.returncode == 0 else []

    def _wait(self, condition, problem: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            ended = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = [f"{log.name}:\n{log.read_text()[-2000:]}" for log in (self.folder / "log").iterdir()]
                raise RuntimeError("\n".join([f"local Slurm: {problem}; ended: {ended}", *logs]))
            time.sleep(0.1)
