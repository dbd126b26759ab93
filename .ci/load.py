"""Clients of a service that is restarted. Some open a connection for each request, some keep their
connections, and some hold WebSockets. Uses only the standard library."""

import base64
import os
import select
import socket
import threading
import time

REQUEST = b"GET / HTTP/1.1\r\nhost: load\r\n%s\r\n"


class Load:
    """Runs the clients until `end`, which prints their results and asserts that no request failed."""

    def __init__(self, port, anew=4, keep=8, sockets=0, pause=0.01):
        self.address = ("127.0.0.1", port)
        self.begun = time.monotonic()
        self.over = False
        self.pause = pause
        # For each kind: the start and the duration.
        self.connects, self.requests, self.messages = [], [], []
        self.moved, self.failed = 0, []
        kinds = [(self.anew, anew), (self.keep, keep), (self.websocket, sockets)]
        self.threads = [
            threading.Thread(target=self.run, args=(kind,), daemon=True)
            for kind, count in kinds
            for _ in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def run(self, client):
        while not self.over:
            try:
                client()
            except (OSError, AssertionError, ValueError, IndexError) as error:
                self.failed.append(f"{client.__name__}: {type(error).__name__}: {error}")

    def timed(self, list, begun):
        list.append((begun - self.begun, time.monotonic() - begun))

    def connect(self):
        begun = time.monotonic()
        sock = socket.create_connection(self.address, 20)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.timed(self.connects, begun)
        return sock

    def ask(self, sock, header=b""):
        sock.sendall(REQUEST % header)
        head, body = b"", b""
        while b"\r\n\r\n" not in head:
            more = sock.recv(65536)
            assert more, "closed before a response"
            head += more
        head, body = head.split(b"\r\n\r\n", 1)
        assert head.startswith(b"HTTP/1.1 200"), head[:40]
        fields = head.lower().split(b"\r\n")
        length = next(int(field[15:]) for field in fields if field.startswith(b"content-length:"))
        while len(body) < length:
            more = sock.recv(65536)
            assert more, "closed in a response"
            body += more
        return b"connection: close" in fields

    def anew(self):
        begun = time.monotonic()
        with self.connect() as sock:
            self.ask(sock, b"connection: close\r\n")
        self.timed(self.requests, begun)
        time.sleep(self.pause)

    def keep(self):
        with self.connect() as sock:
            while not self.over:
                # Checks whether the connection is closed, as connection pools do before they reuse one.
                if select.select([sock], [], [], 0)[0]:
                    self.moved += 1
                    return
                begun = time.monotonic()
                closes = self.ask(sock)
                self.timed(self.requests, begun)
                time.sleep(self.pause)
                if closes:
                    self.moved += 1
                    return

    def websocket(self):
        with self.connect() as sock:
            key = base64.b64encode(os.urandom(16))
            sock.sendall(
                b"GET /echo HTTP/1.1\r\nhost: load\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
                b"sec-websocket-version: 13\r\nsec-websocket-key: " + key + b"\r\n\r\n"
            )
            stream = sock.makefile("rb")
            assert b" 101 " in stream.readline(), "no upgrade"
            while stream.readline() != b"\r\n":
                pass
            while not self.over:
                begun = time.monotonic()
                # The mask of the frame is zero.
                sock.sendall(b"\x81\x85\0\0\0\0hello")
                opcode, payload = self.frame(stream)
                if opcode == 1:
                    assert payload == b"hello", payload
                    self.timed(self.messages, begun)
                    time.sleep(self.pause)
                    continue
                # 1001, going away: answers the close frame, and reconnects.
                assert opcode == 8 and payload[:2] == b"\x03\xe9", (opcode, payload)
                sock.sendall(b"\x88\x82\0\0\0\0\x03\xe9")
                self.moved += 1
                return

    @staticmethod
    def frame(stream):
        head = stream.read(2)
        assert len(head) == 2, "closed without a close frame"
        return head[0] & 15, stream.read(head[1] & 127)

    def end(self, name, most=0.9):
        self.over = True
        rate = len(self.connects) / (time.monotonic() - self.begun)
        for thread in self.threads:
            thread.join(30)
        print(f"{name}: {len(self.requests)} requests, {len(self.messages)} messages, "
              f"{self.moved} connections have moved, {len(self.failed)} failed, "
              f"{rate:.0f} new connections a second")
        for what in ("connects", "requests", "messages"):
            times = sorted(took for _, took in getattr(self, what))
            if times:
                p50, p99 = (times[int(len(times) * part)] * 1000 for part in (0.5, 0.99))
                print(f"{name}: {what}: p50 {p50:.2f} ms, p99 {p99:.2f} ms, most {times[-1] * 1000:.1f} ms")
        assert not self.failed, self.failed[:5]
        slowest = max(took for _, took in self.connects)
        assert slowest < most, f"a connect took {slowest:.3f} s"
        return self

    def p99(self, what):
        times = sorted(took for _, took in getattr(self, what))
        return times[int(len(times) * 0.99)]
