"""Starts the server of the black-box tests as a child process. Its forms:

- Plain: axum's own server, without this crate
- Layer: axum's own server with the layer, ended by `drain`
- Listener: axum's own server with the layer and the tracked listener, in `run`
- Serve: `serve`
"""

import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time

FORMS = {
    "Plain": ["form=Plain", "layer=none"],
    "Layer": ["form=Smallest"],
    "Listener": ["form=Run"],
    "Serve": ["form=Serve"],
}
# The limit of every wait whose length is not checked.
BOUND = 60


class Server:
    def __init__(self, form, **knobs):
        self.form = form
        self.log = tempfile.TemporaryFile("w+")
        knobs = [f"{name}={value}" for name, value in knobs.items()]
        self.process = subprocess.Popen(
            [os.environ["SERVER"], "--server", *FORMS[form], *knobs],
            stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1,
        )
        self.lines = []
        listening = threading.Event()
        self.reader = threading.Thread(target=self.read, args=(listening,), daemon=True)
        self.reader.start()
        assert listening.wait(BOUND), f"{form} does not listen"
        host, port = self.lines[0].split()[1].split(":")
        self.address = (host, int(port))

    def read(self, listening):
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.startswith("listening"):
                listening.set()

    def get(self, path):
        """A request on a connection of its own: the status and the body."""
        with socket.create_connection(self.address, BOUND) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nhost: peer\r\nconnection: close\r\n\r\n".encode())
            response = b""
            while piece := sock.recv(65536):
                response += piece
        head, body = response.split(b"\r\n\r\n", 1)
        return int(head.split()[1]), body

    def until(self, what, condition):
        for _ in range(BOUND * 50):
            if condition():
                return
            time.sleep(0.02)
        raise AssertionError(f"{self.form}: not within {BOUND} s: {what}")

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def log_text(self):
        # The child has the same file offset, so it is read without moving that offset.
        descriptor = self.log.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()

    def logs(self, text):
        self.until(f"{text!r} in the log", lambda: text in self.log_text())

    def end(self):
        """Waits for the end of the process. Returns its exit code and its report."""
        try:
            code = self.process.wait(BOUND)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.form}: still runs {BOUND} s after the signal") from None
        self.reader.join(BOUND)
        self.process.stdout.close()
        report = next((line for line in self.lines if line.startswith("report ")), "")
        return code, report

    @staticmethod
    def seconds(report):
        """How long the stop took, as the report says."""
        found = re.search(r"shutdown by \S+: .*?, ([0-9.]+) s", report)
        assert found, f"no duration in {report}"
        return float(found[1])

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(BOUND)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
