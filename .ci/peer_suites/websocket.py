"""The cases of the Autobahn test suite for WebSockets, played against an echo of axum under each form of the
server. The outcome of a case must be the one of plain axum. What Autobahn calls wrong is printed as a note
if plain axum has it too.

The package `autobahntestsuite` contains the cases as classes, and a driver for Python 2 and an old Twisted. This
program replaces the driver. In the cases a string is a sequence of octets, so here each octet is a character
of Latin-1. The cases about compression are left out: axum does not compress WebSockets.

The cases run while the service serves. For the forms of this crate they run again in the lame-duck phase,
where the outcomes must be the same. At last, clients in the middle of a frame, a message or a close
are there when draining starts.

Argument: `short` to leave out the cases that send megabytes, and the lame-duck phase of one form; nothing for
everything."""

import asyncio
import base64
import codecs
import importlib.util
import logging
import os
import pathlib
import re
import struct
import sys
import types

from server import BOUND, FORMS, Server

# Autobahn ends a case after one second in which the server does nothing. A busy machine needs longer.
PATIENCE = 20
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
COUNT = 301


class States:
    STATE_CLOSED, STATE_CONNECTING, STATE_CLOSING, STATE_OPEN = range(4)


class Validator:
    """Autobahn's validator: whether the octets are valid, and whether they end with a whole character."""

    def reset(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def validate(self, text):
        try:
            self.decoder.decode(text.encode("latin-1"))
        except UnicodeDecodeError:
            return False, False
        return True, self.decoder.getstate()[0] == b""


def load():
    """The classes of the cases, each with its number."""
    found = importlib.util.find_spec("autobahntestsuite")
    folder = pathlib.Path(found.submodule_search_locations[0]) / "case"
    for name, content in [
        ("autobahn", {}), ("autobahn.websocket", {}),
        ("autobahn.websocket.protocol", {"WebSocketProtocol": States}),
        ("autobahn.websocket.utf8validator", {"Utf8Validator": Validator}),
        ("case", {}),
    ]:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    cases = {}
    files = sorted(folder.glob("case*.py"))
    for file in files:
        # Compression, and one that the suite itself leaves out.
        if file.stem.startswith("case12") or file.stem == "case9_9_1":
            continue
        source = file.read_text("latin-1")
        # From Python 2 to 3. Only messages of the suite are printed and written in hexadecimal.
        source = re.sub(r"^(\s*)print\b.*$", r"\1pass", source, flags=re.M)
        source = source.replace("binascii.b2a_hex(", "repr(").replace("(object, Case, )", "(Case, )")
        source = source.replace("len(self.payload) / ", "len(self.payload) // ")
        module = sys.modules["case"] if file.stem == "case" else types.ModuleType(file.stem)
        vars(module).update({"xrange": range, "unichr": chr})
        for name, it in cases.items():
            # Some cases are variants of others.
            vars(sys.modules.setdefault(f"case{name.replace('.', '_')}", types.ModuleType(name)))[it.__name__] = it
        exec(compile(source, file.name, "exec"), vars(module))
        made = [vars(module)] + [{it.__name__: it for it in value} for value in vars(module).values()
                                 if isinstance(value, list) and all(isinstance(it, type) for it in value)]
        for name, it in [pair for names in made for pair in names.items()]:
            if re.fullmatch(r"Case\d+(_\d+)+", name) and isinstance(it, type):
                cases[name[4:].replace("_", ".")] = it
    assert len(cases) == COUNT, f"{len(cases)} cases and not {COUNT}: {sorted(cases)}"
    return dict(sorted(cases.items(), key=lambda pair: [int(it) for it in pair[0].split(".")]))


class Client(asyncio.Protocol):
    """What a case calls `self.p`, with the names of Autobahn."""

    CLOSE_STATUS_CODE_NORMAL = 1000
    CLOSE_STATUS_CODE_GOING_AWAY = 1001
    CLOSE_STATUS_CODE_PROTOCOL_ERROR = 1002
    CLOSE_STATUS_CODE_UNSUPPORTED_DATA = 1003
    CLOSE_STATUS_CODE_NULL = 1005
    CLOSE_STATUS_CODE_ABNORMAL_CLOSE = 1006
    CLOSE_STATUS_CODE_INVALID_PAYLOAD = 1007
    CLOSE_STATUS_CODES_ALLOWED = [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011]

    def __init__(self, case):
        self.factory = types.SimpleNamespace(isServer=False)
        self.state = States.STATE_CONNECTING
        self.connectionWasOpen = self.closedByMe = self.failedByMe = self.droppedByMe = self.wasClean = False
        self.remoteCloseCode = self.localCloseCode = self.localCloseReason = None
        self.createWirelog, self.autoFragmentSize, self.txFrameStats = False, 0, {}
        self.received, self.message, self.kind, self.status = bytearray(), bytearray(), None, None
        self.over = asyncio.get_running_loop().create_future()
        self.opened = asyncio.get_running_loop().create_future()
        self.case = case(self)

    # The connection.

    def connection_made(self, transport):
        self.transport = transport
        transport.write(
            b"GET /ws/messages HTTP/1.1\r\nhost: peer\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-version: 13\r\nsec-websocket-key: " + base64.b64encode(os.urandom(16)) + b"\r\n\r\n"
        )

    def data_received(self, octets):
        self.received += octets
        if self.state == States.STATE_CONNECTING:
            head, found, rest = bytes(self.received).partition(b"\r\n\r\n")
            if not found:
                return
            self.status = int(head.split()[1])
            if self.status != 101:
                self.transport.close()
                return
            self.received = bytearray(rest)
            self.state, self.connectionWasOpen = States.STATE_OPEN, True
            self.opened.set_result(None)
            self.case.onOpen()
        while self.take_frame():
            pass

    def take_frame(self):
        buffer = self.received
        if len(buffer) < 2:
            return False
        length, at = buffer[1] & 127, 2
        if length > 125:
            at += 2 if length == 126 else 8
            length = int.from_bytes(buffer[2:at], "big")
        if len(buffer) < at + length:
            return False
        fin, opcode, payload = buffer[0] & 0x80, buffer[0] & 0x0F, bytes(buffer[at:at + length])
        del buffer[:at + length]
        self.on_frame(fin, opcode, payload)
        return True

    def on_frame(self, fin, opcode, payload):
        if opcode == CLOSE:
            self.remoteCloseCode = int.from_bytes(payload[:2], "big") if payload else None
            self.wasClean = True
            # With the code of the server, if it is none of the codes that are not sent.
            self.close_frame(self.remoteCloseCode, "", reply=True)
        elif self.remoteCloseCode is not None or self.wasClean:
            return
        elif opcode == PING:
            self.sendFrame(PONG, payload.decode("latin-1"))
            self.case.onPing(payload.decode("latin-1"))
        elif opcode == PONG:
            self.case.onPong(payload.decode("latin-1"))
        else:
            self.kind = opcode or self.kind
            self.message += payload
            if fin:
                message, self.message = self.message.decode("latin-1"), bytearray()
                self.case.onMessage(message, self.kind == BINARY)

    def eof_received(self):
        return False

    def connection_lost(self, error):
        self.state = States.STATE_CLOSED
        self.case.onConnectionLost(self.failedByMe)
        if not self.over.done():
            self.over.set_result(None)
        if not self.opened.done():
            self.opened.set_result(None)

    def drop(self):
        self.droppedByMe = True
        self.transport.abort()

    # What the cases call.

    def sendFrame(self, opcode, payload="", fin=True, rsv=0, mask=None, payload_len=None, chopsize=None, sync=False):
        if self.state == States.STATE_CLOSED:
            return
        octets = payload.encode("latin-1")
        if payload_len is not None:
            octets = (octets * (payload_len // len(octets) + 1))[:payload_len] if payload_len else b""
        self.txFrameStats[opcode] = self.txFrameStats.get(opcode, 0) + 1
        head = bytes([(0x80 if fin else 0) | rsv % 8 << 4 | opcode % 128]) + self.length(len(octets))
        mask = mask or os.urandom(4)
        self.write(head + mask + self.masked(octets, mask), chopsize)

    @staticmethod
    def length(length):
        if length < 126:
            return bytes([0x80 | length])
        if length < 1 << 16:
            return struct.pack(">BH", 0x80 | 126, length)
        return struct.pack(">BQ", 0x80 | 127, length)

    @staticmethod
    def masked(octets, mask):
        key = (mask * (len(octets) // 4 + 1))[:len(octets)]
        return (int.from_bytes(octets, "big") ^ int.from_bytes(key, "big")).to_bytes(len(octets), "big")

    def write(self, octets, chopsize=None):
        for at in range(0, len(octets), chopsize or max(len(octets), 1)):
            self.transport.write(octets[at:at + (chopsize or len(octets))])

    def sendMessage(self, payload, isBinary=False, fragmentSize=None, sync=False, doNotCompress=False):
        size = fragmentSize or self.autoFragmentSize or max(len(payload), 1)
        kind = BINARY if isBinary else TEXT
        for at in range(0, max(len(payload), 1), size):
            piece = payload[at:at + size]
            self.sendFrame(kind if at == 0 else 0, piece, fin=at + size >= len(payload))

    def beginMessage(self, isBinary=False, doNotCompress=False):
        self.streamed = BINARY if isBinary else TEXT

    def beginMessageFrame(self, length):
        self.mask, self.sent = os.urandom(4), 0
        self.write(bytes([self.streamed]) + self.length(length) + self.mask)
        self.streamed = 0

    def sendMessageFrameData(self, payload, sync=False):
        at = self.sent % 4
        self.sent += len(payload)
        self.write(self.masked(payload.encode("latin-1"), self.mask[at:] + self.mask[:at]))

    def endMessage(self):
        self.sendFrame(0, "", fin=True)

    def sendClose(self, code=None, reason=None):
        self.close_frame(code, reason or "", reply=False)

    def sendCloseFrame(self, code=None, reasonUtf8=None, isReply=False):
        self.close_frame(code, reasonUtf8 or "", isReply)

    def close_frame(self, code, reason, reply):
        if self.state != States.STATE_OPEN:
            return
        self.state, self.closedByMe, self.localCloseCode = States.STATE_CLOSING, not reply, code
        self.localCloseReason = reason
        self.sendFrame(CLOSE, (struct.pack(">H", code).decode("latin-1") if code is not None else "") + reason)
        # The server closes the connection.
        self.later(PATIENCE, self.drop)

    def later(self, seconds, call):
        def unless_closed():
            if self.state != States.STATE_CLOSED:
                call()
        asyncio.get_running_loop().call_later(seconds, unless_closed)

    def continueLater(self, seconds, call, tag=None):
        self.later(seconds, call)

    def killAfter(self, seconds):
        def fail():
            self.failedByMe = True
            if self.state == States.STATE_OPEN:
                self.sendClose(self.CLOSE_STATUS_CODE_GOING_AWAY)
            else:
                self.drop()
        self.later(max(seconds, PATIENCE), fail)

    def closeAfter(self, seconds):
        # A case with much data closes by itself when it has received everything.
        self.later(max(seconds, 6 * PATIENCE), self.sendClose)

    def enableWirelog(self, enable):
        pass

    def outcome(self):
        received = [(it[0], len(it[1]), *it[2:]) for it in self.case.received]
        if len(received) > 12:
            received = [*received[:12], "…"]
        by = "client" if self.closedByMe else "server"
        return f"{self.case.behavior}, {self.case.behaviorClose}, closed by {by}, {self.remoteCloseCode}, {received}"


async def play(address, case):
    loop = asyncio.get_running_loop()
    client = None

    def make():
        nonlocal client
        client = Client(case)
        return client

    await loop.create_connection(make, *address)
    async with asyncio.timeout(12 * BOUND):
        await client.over
    return client.outcome()


async def play_all(address, cases):
    """Plays all cases, some at the same time. Those that send megabytes come last, because this program is too
    busy then for cases that measure a second."""
    found = {}
    for heavy in (False, True):
        room = asyncio.Semaphore(8 if heavy else 32)

        async def one(name, case):
            async with room:
                found[name] = await play(address, case)

        await asyncio.gather(*(one(*it) for it in cases.items() if it[0].startswith("9.") == heavy))
    return found


async def compare(what, address, reference, cases, expected):
    found = await play_all(address, cases)
    differences = []
    for name, case in cases.items():
        if found[name] == expected[name]:
            continue
        # Outcomes may depend on timing: the other server must then be able to have it too.
        ours, theirs = {found[name]}, {expected[name]}
        for _ in range(6):
            theirs.update(await asyncio.gather(*(play(reference, case) for _ in range(16))))
            if ours <= theirs:
                break
        if ours <= theirs:
            print(f"websocket: {what}, {name}: the outcome varies, with plain axum too: {sorted(theirs)}")
        else:
            differences.append(f"websocket: {what}, {name}: {sorted(ours - theirs)}, plain axum: {sorted(theirs)}")
    return differences


# Requests that are no WebSocket, or a bad one: what to change of a good request.
HANDSHAKES = {
    "a good one": {},
    "no key": {"sec-websocket-key": None},
    "no version": {"sec-websocket-version": None},
    "another version": {"sec-websocket-version": "8"},
    "no Upgrade": {"upgrade": None},
    "another protocol": {"upgrade": "h2c"},
    "no Connection": {"connection": None},
    "a list in Connection": {"connection": "keep-alive, Upgrade"},
    "compression": {"sec-websocket-extensions": "permessage-deflate"},
    "a subprotocol": {"sec-websocket-protocol": "chat"},
}


async def shake_hands(address):
    """The head of the response to each handshake, without what differs each time."""
    heads = {}
    for name, change in HANDSHAKES.items():
        fields = {
            "host": "peer", "connection": "upgrade", "upgrade": "websocket",
            "sec-websocket-version": "13", "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==", **change,
        }
        lines = ["GET /ws/messages HTTP/1.1", *(f"{key}: {it}" for key, it in fields.items() if it), "", ""]
        reader, writer = await asyncio.open_connection(*address)
        writer.write("\r\n".join(lines).encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), BOUND)
        heads[name] = sorted(line for line in head.split(b"\r\n") if not line.startswith(b"date:"))
        writer.close()
    return heads


class Idle:
    """A case that does nothing by itself, and whose client answers a close frame or does not."""

    received, behavior, behaviorClose = [], "", ""

    def __init__(self, client):
        self.client = client

    def onOpen(self):
        pass

    def onMessage(self, *_):
        pass

    onPing = onPong = onConnectionLost = onMessage


async def stop(form, silent):
    """Clients in all states are there when draining starts. With `silent` they do not answer the close frame."""
    with Server(form, delay=200, drain=4000, close_within=1000) as server:
        loop = asyncio.get_running_loop()
        clients = []
        for begin in [
            lambda it: None,
            lambda it: it.sendFrame(TEXT, "half", fin=False),
            lambda it: it.write(b"\x81\x85\0\0\0\0he"),
            lambda it: it.write(b"\x81"),
            lambda it: it.sendFrame(PING, "still there?"),
            lambda it: it.sendFrame(BINARY, "x" * 100_000),
        ] * 4:
            _, client = await loop.create_connection(lambda: Client(Idle), *server.address)
            async with asyncio.timeout(BOUND):
                await client.opened
            assert client.status == 101, client.status
            if silent:
                client.close_frame = lambda *_, **__: None
            begin(client)
            clients.append(client)
        server.terminate()
        async with asyncio.timeout(BOUND):
            await asyncio.gather(*(client.over for client in clients))
        codes = {client.remoteCloseCode for client in clients}
        assert codes == {1001}, f"{form}: {codes}"
        code, report = await asyncio.to_thread(server.end)
        assert code == 0, f"{form}: exit code {code}: {report}"
        took = server.seconds(report)
        assert took < 4.7, f"{form}: {took} s: {report}"
        kind = "silent clients" if silent else "clients"
        print(f"websocket: {form}: {len(clients)} {kind} receive 1001, exit code {code} after {took:.1f} s")


async def main(short):
    cases = load()
    if short:
        cases = {name: it for name, it in cases.items() if not name.startswith("9.")}
    with Server("Plain") as plain:
        expected = await play_all(plain.address, cases)
        heads = await shake_hands(plain.address)
        for name, outcome in expected.items():
            if not re.match("(OK|INFORMATIONAL), (OK|INFORMATIONAL)", outcome):
                print(f"websocket: note: plain axum, {name}: {outcome}")

        async def serving(form):
            with Server(form, delay=0, drain=5000) as server:
                differences = await compare(form, server.address, plain.address, cases, expected)
                found = await shake_hands(server.address)
                differences += [f"websocket: {form}, handshake, {name}: {found[name]}, plain axum: {heads[name]}"
                                for name in HANDSHAKES if found[name] != heads[name]]
                server.terminate()
                code, report = await asyncio.to_thread(server.end)
                assert code == 0, f"{form}: exit code {code}: {report}"
                print(f"websocket: {form}: {len(cases)} cases; the stop is clean")
                return differences

        async def lame_duck(form):
            with Server(form, delay=BOUND * 10_000, drain=20000, grace=BOUND * 10_000 + 50000) as server:
                _, idle = await asyncio.get_running_loop().create_connection(lambda: Client(Idle), *server.address)
                await idle.opened
                server.terminate()
                await asyncio.to_thread(server.logs, "lame duck, because")
                differences = await compare(f"{form}, lame duck", server.address, plain.address, cases, expected)
                assert "draining, because" not in server.log_text(), "the delay was over"
                print(f"websocket: {form}, lame duck: {len(cases)} cases")
                return differences

        forms = [serving(form) for form in list(FORMS)[1:]]
        forms += [lame_duck(form) for form in ("Listener", "Serve") if form == "Serve" or not short]
        # In the short form at once, because most of the time is spent in waiting.
        if short:
            found = await asyncio.gather(*forms)
        else:
            found = [await it for it in forms]
        differences = [line for lines in found for line in lines]
    for form in ("Listener", "Serve"):
        # If the clients are silent, the handler gives up after a second, and its hold ends.
        await asyncio.gather(stop(form, silent=False), stop(form, silent=True))
    for line in differences:
        print(line)
    if differences:
        sys.exit(f"websocket: {len(differences)} differences")
    print(f"websocket: {len(cases)} cases in each form end as with plain axum")


# It would warn of each write to a connection that the server has closed.
logging.disable(logging.WARNING)
asyncio.run(main("short" in sys.argv))
