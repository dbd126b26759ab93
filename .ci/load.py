"""Clients of a service that is restarted. Some open a connection for each request, together a thousand each second,
some keep their connections, and some hold WebSockets. Uses only the standard library."""

import base64
import multiprocessing
import os
import select
import socket
import threading
import time

REQUEST = b"GET / HTTP/1.1\r\nhost: load\r\n%s\r\n"


# Python runs one thread of a process at a time. So that a client does not wait for many others, they are spread over
# some processes.
PROCESSES = 4
# The time from one connection of a client to its next, unless a request takes longer, and the time that a client with a
# kept connection waits.
ANEW, PAUSE = 0.03, 0.01
# The least rate of new connections, each second, on a machine that is busy.
LEAST_RATE = 300


class Load:
    """Runs the clients until `end`, which prints their results and asserts that no request failed."""

    def __init__(self, port, anew=32, keep=8, sockets=0):
        self.begun = time.monotonic()
        self.over = multiprocessing.Event()
        kinds = ["anew"] * anew + ["keep"] * keep + ["websocket"] * sockets
        self.parts = []
        for index in range(PROCESSES):
            results, sender = multiprocessing.Pipe(duplex=False)
            clients = Clients(("127.0.0.1", port), self.begun, self.over)
            multiprocessing.Process(target=clients.run, args=(kinds[index::PROCESSES], sender), daemon=True).start()
            self.parts.append(results)

    def end(self, name, most=0.9):
        self.over.set()
        length = time.monotonic() - self.begun
        # For each kind: the start and the duration.
        self.connects, self.requests, self.messages = [], [], []
        self.moved, self.failed = 0, []
        for results in self.parts:
            assert results.poll(60), "a process of clients does not end"
            connects, requests, messages, moved, failed = results.recv()
            self.connects += connects
            self.requests += requests
            self.messages += messages
            self.moved += moved
            self.failed += failed
        rate = len(self.connects) / length
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
        assert rate >= LEAST_RATE, f"only {rate:.0f} new connections a second"
        return self

    def p99(self, what):
        times = sorted(took for _, took in getattr(self, what))
        return times[int(len(times) * 0.99)]


class Clients:
    """The clients of one process, each a thread."""

    def __init__(self, address, begun, over):
        self.address, self.begun, self.over = address, begun, over
        self.connects, self.requests, self.messages = [], [], []
        self.moved, self.failed = 0, []

    def run(self, kinds, results):
        threads = [threading.Thread(target=self.repeat, args=(getattr(self, kind),), daemon=True) for kind in kinds]
        for thread in threads:
            thread.start()
        self.over.wait()
        for kind, thread in zip(kinds, threads):
            thread.join(30)
            if thread.is_alive():
                self.failed.append(f"{kind}: does not end")
        results.send((self.connects, self.requests, self.messages, self.moved, self.failed))

    def repeat(self, client):
        while not self.over.is_set():
            try:
                client()
            except Exception as error:
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
        time.sleep(max(0, begun + ANEW - time.monotonic()))

    def keep(self):
        with self.connect() as sock:
            while not self.over.is_set():
                # Checks whether the connection is closed, as connection pools do before they reuse one.
                if select.select([sock], [], [], 0)[0]:
                    self.moved += 1
                    return
                begun = time.monotonic()
                closes = self.ask(sock)
                self.timed(self.requests, begun)
                time.sleep(PAUSE)
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
            while not self.over.is_set():
                begun = time.monotonic()
                # The mask of the frame is zero.
                sock.sendall(b"\x81\x85\0\0\0\0hello")
                opcode, payload = self.frame(stream)
                if opcode == 1:
                    assert payload == b"hello", payload
                    self.timed(self.messages, begun)
                    time.sleep(PAUSE)
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
