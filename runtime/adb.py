"""A phone over `adb`: find it, give it files, run commands on it."""

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cq_edge.errors import DeviceError

_QUICK_S = 60.0  # a command that only asks
_PUSH_S = 1800.0
_LAST_LINES = 3  # of what a command said, that a message quotes


@dataclass(frozen=True, slots=True)
class Phone:
    """A phone that is attached and lets itself be used."""

    serial: str

    def shell(self, command: str, timeout_s: float = _QUICK_S) -> str:
        """Returns what a command said on the phone, both streams.

        Args:
            command: For its shell.
            timeout_s: After which it is given up.

        Raises:
            DeviceError: It failed, took too long, or the phone is gone.
        """
        done = _adb("-s", self.serial, "shell", f"{{ {command}; }} 2>&1", timeout_s=timeout_s)
        if done.returncode != 0:
            what = f"exit code {done.returncode}: {_quote(done)}"
            raise DeviceError(f"phone {self.serial}: `{command}` failed with {what}")
        return done.stdout

    def try_shell(self, command: str) -> str:
        """Returns what a command said, or nothing if it failed: for what may be missing."""
        try:
            return self.shell(command).strip()
        except DeviceError:
            return ""

    def push(self, local: Path, remote: str) -> None:
        """Copies a file to the phone and makes sure that all of it arrived.

        Raises:
            DeviceError: The storage is full, the phone is gone, or what arrived is another file.
        """
        done = _adb("-s", self.serial, "push", str(local), remote, timeout_s=_PUSH_S)
        if done.returncode != 0:
            if "No space left" in done.stdout + done.stderr:
                need_mib = local.stat().st_size / 2**20
                raise DeviceError(
                    f"phone {self.serial}: its storage is full: {local.name} needs "
                    f"{need_mib:.1f} MiB in {Path(remote).parent}"
                )
            raise DeviceError(f"phone {self.serial}: cannot copy {local.name}: {_quote(done)}")
        found = self.shell(f"sha256sum {remote}").split()
        with local.open("rb") as stream:
            expected = hashlib.file_digest(stream, "sha256").hexdigest()
        if found[:1] != [expected]:
            raise DeviceError(
                f"phone {self.serial}: {local.name} did not arrive whole: its sha256 there is "
                f"{' '.join(found[:1]) or 'missing'}, here {expected}"
            )


def find_phone(serial: str | None) -> Phone:
    """Returns the phone that is attached.

    Args:
        serial: Which; None where there is one only.

    Raises:
        DeviceError: There is none, it does not let itself be used, or there are several.
    """
    done = _adb("devices")
    if done.returncode != 0:
        raise DeviceError(f"adb cannot list phones: {_quote(done)}")
    rows = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    states = {row[0]: row[1].strip() for row in rows}
    if serial is None and len(states) > 1:
        raise DeviceError(
            f"{len(states)} phones are attached ({', '.join(states)}): name one with --serial"
        )
    if serial is None and not states:
        raise DeviceError(
            "no phone is attached: connect one, and allow USB debugging on it (`adb devices` "
            "must list it)"
        )
    chosen = next(iter(states)) if serial is None else serial
    if chosen not in states:
        there = ", ".join(states) or "none"
        raise DeviceError(f"phone {chosen} is not attached: attached are {there}")
    if states[chosen] != "device":
        raise DeviceError(
            f"phone {chosen} is {states[chosen]}: unlock it and allow USB debugging from here"
        )
    return Phone(chosen)


def _adb(*words: str, timeout_s: float = _QUICK_S) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["adb", *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise DeviceError("adb is not installed: it is part of Android's platform tools") from None
    except subprocess.TimeoutExpired:
        raise DeviceError(
            f"`adb {' '.join(words[:3])}` did not end within {timeout_s:g} s: given up"
        ) from None


def _quote(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout + done.stderr).strip().splitlines()
    return " / ".join(lines[-_LAST_LINES:]) or "it said nothing"
