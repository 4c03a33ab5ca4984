"""Nodes that are namespaces of this machine (Linux, root): network, host name, /etc/hosts and processes of their own.

Two of them hold the ends of one cable, which can be cut; one can be switched off, with all that runs on it, without a
word to the other. Its first process reaps nobody, as in a container without an init.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

ROOT = Path(__file__).parents[2]
ADDRESS = "10.77.0.{}"
CARD = "eth0"


def why_not() -> str:
    """Why there can be no nodes here; "" where there can."""
    if sys.platform != "linux" or os.geteuid():
        return "nodes are namespaces of Linux, which take root to make"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "ip", "link", "add", "c0", "type",
         "veth", "peer", "name", "c1"], capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"this kernel makes no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


class Node:
    """One node; `pid` is its first process as this machine counts."""

    def __init__(self, number: int, folder: Path, hosts: str):
        self.number, self.name, self.address = number, f"node{number}", ADDRESS.format(number)
        self.folder, self._hosts = folder, folder / f"hosts{number}"
        self._hosts.write_text(hosts)
        self.switch_on()

    def switch_on(self) -> None:
        """Start it, without a cable."""
        commands = f"hostname {self.name} && mount --bind {self._hosts} /etc/hosts && ip link set lo up"
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c",
             f"{commands} && exec sleep infinity"], stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until = time.monotonic() + 10
        while time.monotonic() < until:
            children = psutil.Process(self._holder.pid).children()
            if children and children[0].name() == "sleep":
                self.pid = children[0].pid
                return
            time.sleep(0.01)
        raise TimeoutError(f"{self.name} does not start")

    def switch_off(self) -> None:
        """All its processes are gone, with its end of the cable."""
        if self._holder.poll() is None:
            psutil.Process(self.pid).kill()
            self._holder.wait()

    def command(self, words: Sequence[str]) -> list[str]:
        """A command line that runs these words on the node, in the repository's folder."""
        entered = ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--pid", "--"]
        return [*entered, "env", "-C", str(ROOT), *words]

    def run(self, *words: str) -> str:
        """Run a command to its end; what it says."""
        return subprocess.run(self.command(words), check=True, stdout=subprocess.PIPE, text=True).stdout

    def start(self, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a command of the repository."""
        with log.open("ab") as out:
            return subprocess.Popen(
                self.command(words), cwd=ROOT, env={**os.environ, **environment}, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def link(self, up: bool) -> None:
        """Plug the cable in, or pull it out."""
        self.run("ip", "link", "set", CARD, "up" if up else "down")


class Cluster:
    """Two nodes, from when it is entered to when it is left.

    Args:
        folder: for files of its own.
        debian: node 1 calls itself 127.0.1.1, as Debian's installer writes it.
    """

    def __init__(self, folder: Path, debian: bool = False):
        self.folder, self.debian = folder, debian
        self.nodes: list[Node] = []

    def __enter__(self) -> Self:
        both = "".join(f"{ADDRESS.format(number)} node{number}\n" for number in (1, 2))
        own = "127.0.1.1 node1\n" if self.debian else ""
        for number in (1, 2):
            first = own if number == 1 else ""
            self.nodes.append(Node(number, self.folder, f"127.0.0.1 localhost\n{first}{both}"))
        self.connect()
        return self

    def connect(self) -> None:
        """Lay the cable between the nodes."""
        ends = [f"am{os.getpid() % 100000}{side}" for side in "ab"]
        subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
        for node, end in zip(self.nodes, ends, strict=True):
            subprocess.run(["ip", "link", "set", end, "netns", str(node.pid), "name", CARD], check=True)
            node.run("ip", "addr", "add", f"{node.address}/24", "dev", CARD)
            node.link(up=True)

    def replace(self, node: Node) -> None:
        """Switch a node that is off on again."""
        for other in self.nodes:
            if other is not node:  # its end of the old cable goes with the other end, but not at once
                subprocess.run(other.command(["ip", "link", "del", CARD]), capture_output=True, check=False)
        node.switch_on()
        self.connect()

    def repair(self) -> None:
        """Whatever was broken is whole again."""
        for node in self.nodes:
            if not psutil.pid_exists(node.pid):
                self.replace(node)
        self.nodes[1].link(up=True)

    def __exit__(self, *error: object) -> None:
        for node in self.nodes:
            node.switch_off()
