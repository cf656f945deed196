"""Hosts on this machine: network namespaces with an address and an SSH server each. For ``tests.deploy.ssh``.

Debian: ``apt-get install iproute2 openssh-server``. Needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/sshd-{name}.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
"""
CLIENT = """
Host *
    IdentityFile {folder}/key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""
BRIDGE, NET = "ca2cl0", "10.77.31"


class Hosts:
    """A bridge and hosts on it, for a ``with`` statement: they end with it."""

    def __init__(self, folder: Path, count: int) -> None:
        missing = [name for name in ("ip", "ssh", "ssh-keygen") if shutil.which(name) is None]
        if missing or os.geteuid() != 0 or not Path("/usr/sbin/sshd").exists():
            raise SystemExit(f"needs root, iproute2 and openssh-server; missing: {missing or 'sshd or root'}")
        self.folder, self.names = folder, [f"ca2cl-{number}" for number in range(1, count + 1)]
        self.addresses = [f"{NET}.{number}" for number in range(1, count + 1)]
        self.config = folder / "ssh_config"
        self._servers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        self.folder.mkdir(parents=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("key", "host_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        self.config.write_text(CLIENT.format(folder=self.folder))
        try:
            _run("ip", "link", "add", BRIDGE, "type", "bridge")
            _run("ip", "address", "add", f"{NET}.254/24", "dev", BRIDGE)
            _run("ip", "link", "set", BRIDGE, "up")
            for name, address in zip(self.names, self.addresses, strict=True):
                self._add(name, address)
            time.sleep(1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.terminate()
            server.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False, capture_output=True)

    def _add(self, name: str, address: str) -> None:
        outside = f"{BRIDGE}-{name.rpartition('-')[2]}"
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "link", "set", outside, "master", BRIDGE, "up")
        for words in (["address", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"],
                      ["link", "set", "lo", "up"]):  # fmt: skip
            _run("ip", "-n", name, *words)
        config = self.folder / f"sshd-{name}.conf"
        config.write_text(SSHD.format(address=address, folder=self.folder, name=name))
        with (self.folder / f"sshd-{name}.log").open("wb") as log:
            command = ["ip", "netns", "exec", name, "/usr/sbin/sshd", "-D", "-e", "-f", str(config)]
            self._servers.append(subprocess.Popen(command, stdout=log, stderr=log))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
