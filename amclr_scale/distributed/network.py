"""Addresses and interfaces of this node, as messages between ranks will use them. Imports no torch."""

import ipaddress
import os
import socket
from collections.abc import Mapping

import psutil

from amclr_scale.errors import UserError

LISTENS = "AMCLR_SCALE_LISTENS"  # the descriptor of a socket that rank 0's supervisor has opened for it
VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}


def addresses(host: str) -> list[str]:
    """What a host's name resolves to on this node; empty where it is not known."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(place[0]) for *_, place in found))


def is_loopback(address: str) -> bool:
    """Whether an address is reached from its own machine alone, as 127.0.1.1 is."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interfaces() -> list[str]:
    """Names of this node's network interfaces that are up, without loopback ones."""
    up = psutil.net_if_stats()
    families = (socket.AF_INET, socket.AF_INET6)
    return [
        name
        for name, places in psutil.net_if_addrs().items()
        if name in up and up[name].isup
        and any(place.family in families and not is_loopback(place.address) for place in places)
    ]  # fmt: skip


def own_address() -> str:
    """The address that gloo gives out for this node where no interface is named: that of its host name."""
    for address in addresses(socket.gethostname()):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                continue
            return address
    return "127.0.0.1"


class HeldPort:
    """A port of all addresses that this process listens on, for one that it will start: nobody takes it meanwhile."""

    def __init__(self) -> None:
        six = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if six else socket.AF_INET
        self._socket = socket.create_server(("", 0), family=family, dualstack_ipv6=six, backlog=2048)
        self.number: int = self._socket.getsockname()[1]

    def variables_for(self, said: Mapping[str, str]) -> dict[str, str]:
        """By which rank 0 knows the socket, among its own open files; nothing for another rank.

        Args:
            said: the variables that the process will be started with.
        """
        return {LISTENS: str(self._socket.fileno())} if said["RANK"] == "0" else {}

    def close(self) -> None:
        """Listen no more, in this process."""
        self._socket.close()


def handed_over(port: int) -> int | None:
    """The descriptor of a listening socket that whoever started this process has left it; once, and None without."""
    text = os.environ.pop(LISTENS, "")
    try:
        with socket.socket(fileno=os.dup(int(text))) as one:
            return int(text) if one.getsockname()[1] == port else None
    except (ValueError, OSError):  # there is none, or a program between has closed it
        return None


def check_interfaces(backend: str, environment: Mapping[str, str] | None = None) -> None:
    """Refuse a named interface that this node does not have.

    Args:
        backend: gloo or nccl.

    Raises:
        UserError: naming the variable.
    """
    variable = VARIABLES[backend]
    named = (os.environ if environment is None else environment).get(variable, "")
    here = list(psutil.net_if_addrs())
    if backend == "gloo":
        wrong = [name for name in named.split(",") if named and name not in here]
    elif not named or named.startswith("^"):  # which NCCL is to leave out
        wrong = []
    else:
        exact, names = named.startswith("="), named.lstrip("=").split(",")
        known = [name for name in names if any(one == name or (not exact and one.startswith(name)) for one in here)]
        wrong = [] if known else names
    if wrong:
        raise UserError(
            f"{variable}: expected an interface of {socket.gethostname()} ({', '.join(here)}), got {', '.join(wrong)}"
        )


def about(host: str) -> str:
    """What may be wrong with a host that does not answer, as words to append; "" where nothing is to be seen."""
    found = addresses(host)
    if not found:
        return f"; {host} has no address here: is it the name of rank 0's node?"
    if all(map(is_loopback, found)):
        return f"; {host} is {found[0]} here, which no other node reaches: MASTER_ADDR has to be an address that all do"
    return ""
