"""Tools that others wrote, against each form of the server: slowhttptest, h2load, nghttp and wrk.

While the service serves, what a tool reports must be what it reports about plain axum. During a stop of the
forms of this crate, no request may fail in the lame-duck phase, the stop must end within its plan
whatever slow clients do, and the numbers in the report must agree with each other, and with those of the tool.

Argument: `short` for fewer clients and one form during the stop; nothing for everything."""

import concurrent.futures
import csv
import os
import re
import subprocess
import sys
import tempfile
import time

from server import BOUND, FORMS, Server

short = "short" in sys.argv
folder = tempfile.TemporaryDirectory()
threads = concurrent.futures.ThreadPoolExecutor(32)


def run(*command):
    it = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                        errors="replace", timeout=4 * BOUND)
    return it.returncode, it.stdout


def url(server, path="/"):
    return f"http://{server.address[0]}:{server.address[1]}{path}"


def requests(report):
    """The numbers of requests in a report, by what happened to them."""
    found = dict.fromkeys(("in flight when it began", "more", "finished", "refused", "cut", "dropped"), 0)
    # The line that begins so, and those that continue it, which are indented further.
    listed = re.search(r"\|  requests: (.*?)(?: \|  \S|$)", report)
    for count, what in re.findall(r"(\d+) (" + "|".join(found) + ")", listed[1] if listed else ""):
        found[what] = int(count)
    begun = found["in flight when it began"] + found["more"]
    ended = found["finished"] + found["cut"] + found["dropped"]
    assert begun == ended, f"{begun} requests began, {ended} ended: {report}"
    return found


# slowhttptest: what it does, its options, the path, and whether its requests are in flight.
SLOW = {
    "slow headers": (["-H", "-i", "1"], "/", False),
    "slow body": (["-B", "-i", "1", "-s", "8192"], "/upload", True),
    "slow read": (["-X", "-n", "1", "-w", "512", "-y", "1024", "-z", "32"], "/large", True),
    # Its request is whole, and so is the response to it.
    "range": (["-R", "-a", "1", "-b", "200"], "/", False),
}
CLIENTS = 30 if short else 150


def slow_command(server, options, path, seconds, output):
    return ["slowhttptest", *options, "-c", str(CLIENTS), "-r", str(CLIENTS), "-l", str(seconds), "-p", "10",
            "-u", url(server, path), "-g", "-o", output]


def slow(server, what, seconds=3 if short else 8):
    """What slowhttptest says at its end: why it ended, and whether the service was available all the time."""
    options, path, _ = SLOW[what]
    output = os.path.join(folder.name, f"{server.form}-{what.replace(' ', '-')}")
    code, text = run(*slow_command(server, options, path, seconds, output))
    assert code == 0, f"slowhttptest, {what}, {server.form}: {code}: {text[-2000:]}"
    with open(output + ".csv") as file:
        rows = list(csv.DictReader(file))
    assert rows, text
    # The figures of each second, so some connections may be in none of them.
    most = max(int(row["Connected"]) + int(row["Closed"]) for row in rows)
    assert most > CLIENTS // 4, f"slowhttptest, {what}, {server.form}: {most} of {CLIENTS} connections"
    # Only the rows after the connections were made. A loaded machine may be slow before.
    available = all(row["Service Available"] != "0" for row in rows[1:])
    end = re.search(r"Exit status:(.*)", re.sub(r"\x1b\[[0-9;]*m", "", text))
    return f"{end[1].strip()}, always available: {available}"


def slow_stop(form, what):
    """A stop under slow clients."""
    options, path, in_flight = SLOW[what]
    with Server(form, delay=300, drain=2000) as server:
        output = os.path.join(folder.name, f"stop-{form}-{what.replace(' ', '-')}")
        tool = subprocess.Popen(slow_command(server, options, path, 120, output),
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if in_flight:
                server.until("in flight", lambda: int(server.get("/count")[1]) >= CLIENTS)
            elif what == "slow headers":
                server.until("connected", lambda: int(server.get("/connections")[1]) > CLIENTS)
            else:
                time.sleep(1)
            server.terminate()
            code, report = server.end()
        finally:
            tool.kill()
            tool.wait(BOUND)
        took = server.seconds(report)
        found = requests(report)
        assert took < 2.3 + 0.7, f"{what}, {form}: {took} s: {report}"
        if in_flight:
            assert code == 1 and "forced" in report, f"{what}, {form}: {code}: {report}"
            # Requests of slowhttptest that it sent again, or probed with, come on top.
            assert found["cut"] >= CLIENTS, f"{what}, {form}: {report}"
            assert found["in flight when it began"] >= CLIENTS, f"{what}, {form}: {report}"
        else:
            assert code == 0 and " clean" in report, f"{what}, {form}: {code}: {report}"
            assert found["cut"] == 0 and found["dropped"] == 0, f"{what}, {form}: {report}"
        return f"exit code {code} after {took:.1f} s, {found['cut']} requests cut"


def slow_timeout(form):
    """With a timeout for heads, slow headers do not keep a connection."""
    with Server(form, header_read_timeout=1000) as server:
        seen = slow(server, "slow headers", BOUND)
        server.kill()
    assert seen == "No open connections left, always available: True", seen
    return seen


def h2load(server, path, *options):
    """The numbers of h2load: those of requests, and those of statuses."""
    code, text = run("h2load", *options, url(server, path))
    found = re.search(r"^requests: (.*)$", text, re.M)
    statuses = re.search(r"^status codes: (.*)$", text, re.M)
    assert code == 0 and found and statuses, f"h2load, {server.form}: {code}: {text[-2000:]}"
    return (dict((what, int(count)) for count, what in re.findall(r"(\d+) (\w+)", found[1])),
            dict((what, int(count)) for count, what in re.findall(r"(\d+) (\w+)", statuses[1])))


def wrk(server, seconds, *options):
    """The numbers of wrk: requests, errors, responses that are not 2xx."""
    code, text = run("wrk", "-t1", "-c24", f"-d{seconds}s", "--timeout", "20s", *options, url(server))
    total = re.search(r"(\d+) requests in", text)
    assert code == 0 and total, f"wrk, {server.form}: {code}: {text}"
    errors = re.search(r"Socket errors: (.*)", text)
    other = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    return int(total[1]), errors[1] if errors else "none", int(other[1]) if other else 0


REQUESTS = 2000 if short else 20000
# Options and paths of h2load.
LOADS = [
    (["-c16", "-m32"], "/"),
    (["-c4", "-m100", "-w", "15", "-W", "16"], "/buffered"),
    (["-c16", "--h1"], "/"),
    (["-c4", "-m4", "-d", __file__], "/upload"),
]
# Options and paths of nghttp.
GETS = [
    (["-m20"], "/"),
    (["-m20"], "/bytes/0/64"),
    (["-w13", "-W14"], "/bytes/0/256"),
    (["-m5", "-d", __file__], "/upload"),
    (["--continuation"], "/"),
    (["-b100"], "/"),
    (["--expect-continue", "-d", __file__], "/upload"),
    (["-H:method: HEAD"], "/"),
    (["-H:method: OPTIONS"], "/"),
    (["--trailer", "x-test: ok", "-d", __file__], "/upload"),
    (["--no-dep", "-p1"], "/empty/204"),
    (["-H", "accept-encoding: gzip"], "/not-there"),
    ([], "/stream/5/10"),
    (["-c0"], "/"),
]


def serving(server):
    """What the tools report about a server that serves."""
    found = {}
    slows = {what: threads.submit(slow, server, what) for what in SLOW}
    for options, path in LOADS:
        number = REQUESTS if path == "/" else REQUESTS // 40
        what = " ".join(options).replace(__file__, "FILE")
        found[f"h2load {what} {path}"] = h2load(server, path, f"-n{number}", *options)
    for options, path in GETS:
        code, text = run("nghttp", "-s", "-n", *options, url(server, path))
        # The last columns are status, size and path. The first ones are times.
        lines = [line.split()[-3:] for line in text.splitlines() if re.match(r" *\d+ .*[µm]?s ", line)]
        what = " ".join(options).replace(__file__, "FILE")
        found[f"nghttp {what} {path}"] = (code, lines or text[-300:])
    total, errors, other = wrk(server, 1)
    assert total > 0
    found["wrk"] = (errors, other)
    total, errors, other = wrk(server, 1, "-H", "connection: close")
    found["wrk, a connection for each request"] = (errors, other)
    for what, it in slows.items():
        found[what] = it.result()
    return found


def served(form):
    with Server(form, delay=0, drain=10000) as server:
        found = serving(server)
        # All clients have left.
        tracked = form in ("Listener", "Serve")
        path, least = ("/connections", 1) if tracked else ("/count", 0)
        server.until("no clients", lambda: int(server.get(path)[1]) <= least)
        server.terminate()
        code, report = server.end()
        requests(report)
        assert code == 0, f"{form}: {code}: {report}"
    return found


def load_lame_duck(form):
    """Clients with keep-alive and with HTTP/2 through the lame-duck phase: no request fails."""
    with Server(form, delay=BOUND * 1000, drain=5000, grace=BOUND * 1000 + 20000) as server:
        busy = [threads.submit(wrk, server, 2), threads.submit(wrk, server, 2, "-H", "connection: close")]
        server.until("load", lambda: int(server.get("/connections")[1]) > 40)
        server.terminate()
        server.logs("lame duck, because")
        # Begins in the phase.
        late = h2load(server, "/", f"-n{REQUESTS}", "-c8", "-m16")
        for it in busy:
            total, errors, other = it.result()
            assert total > 0 and (errors, other) == ("none", 0), f"wrk, {form}, lame duck: {errors}, {other} not 2xx"
        assert late[0]["succeeded"] == REQUESTS and late[1]["2xx"] == REQUESTS, f"h2load, {form}, lame duck: {late}"
        assert "draining, because" not in server.log_text(), "the delay was over"
        server.kill()
    return "no request of wrk and h2load has failed"


def load_stop(form):
    """Clients that go on through the whole stop."""
    with Server(form, delay=700, drain=5000) as server:
        busy = threads.submit(wrk, server, 3)
        multiplexed = threads.submit(run, "h2load", "-D3", "-c8", "-m16", url(server))
        server.until("load", lambda: int(server.get("/connections")[1]) > 30)
        server.terminate()
        code, report = server.end()
        found = requests(report)
        assert code == 0 and " clean" in report, f"{form}: {code}: {report}"
        assert found["cut"] == found["dropped"] == 0, f"{form}: {report}"
        total, errors, other = busy.result()
        multiplexed.result()
        # Each 503 that a client counts is in the report. h2load counts none after its connection has ended.
        assert other <= found["refused"], f"{form}: {other} refused of wrk: {report}"
        assert server.seconds(report) < 0.7 + 5, f"{form}: {report}"
        return f"clean; {found['finished']} finished, {found['refused']} refused, {other} of them of wrk"


def main():
    wrong = []
    # In the short form at once, because some of the time is spent in waiting.
    forms = concurrent.futures.ThreadPoolExecutor(len(FORMS) if short else 1)
    found = {form: forms.submit(served, form) for form in FORMS}
    expected = found["Plain"].result()
    for what, it in expected.items():
        print(f"tools: Plain: {what}: {it}")
    for form in list(FORMS)[1:]:
        ours = found[form].result()
        for what, it in expected.items():
            if ours[what] != it:
                wrong.append(f"tools: {form}, {what}: {ours[what]}, plain axum: {it}")
        print(f"tools: {form}: {len(ours)} tools; the stop is clean")
    for form in ("Listener", "Serve"):
        if form == "Serve" or not short:
            stops = {f"stop under slowhttptest, {what}": threads.submit(slow_stop, form, what) for what in SLOW}
            if not short:
                concurrent.futures.wait(stops.values())
            stops["lame duck"] = threads.submit(load_lame_duck, form)
            if not short:
                concurrent.futures.wait(stops.values())
            stops["stop under wrk and h2load"] = threads.submit(load_stop, form)
            if form == "Serve":
                stops["slow headers with a timeout"] = threads.submit(slow_timeout, form)
            for what, it in stops.items():
                print(f"tools: {form}, {what}: {it.result()}")
    for line in wrong:
        print(line)
    if wrong:
        sys.exit(f"tools: {len(wrong)} differences")
    print("tools: each form is to the tools as plain axum")


main()
