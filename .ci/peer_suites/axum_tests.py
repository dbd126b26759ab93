"""axum's own unit tests, run on servers of this crate. The published package of axum contains the tests. A copy of it
is changed in one function, which starts the server that the tests talk to. Each test must end in each form as
it does with plain axum.

Argument: the folder for the copy and for what is built from it."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

FORMS = ["Plain", "Layer", "Listener", "Serve"]
root = pathlib.Path(__file__).resolve().parents[2]
folder = pathlib.Path(sys.argv[1]).resolve()
copy = folder / "axum"

metadata = subprocess.run(
    ["cargo", "metadata", "--format-version", "1", "--locked"], cwd=root, check=True, stdout=subprocess.PIPE)
axum = next(it for it in json.loads(metadata.stdout)["packages"] if it["name"] == "axum")
shutil.rmtree(copy, ignore_errors=True)
shutil.copytree(pathlib.Path(axum["manifest_path"]).parent, copy)
(copy / "Cargo.lock").unlink(missing_ok=True)

with open(copy / "Cargo.toml", "a") as manifest:
    manifest.write(f"""
# The attribute of the tests is not in axum's list, because it is a package of the same repository.
[dev-dependencies.axum-macros]
version = "0.5"
features = ["__private"]

[dev-dependencies.tower-graceful]
path = {json.dumps(str(root))}

# The server of the tracked listener. In the tests the name `axum` means the copy, whose trait it does not have.
[dev-dependencies.axum-of-the-crate]
package = "axum"
version = "={axum['version']}"
features = ["http2"]

[workspace]
""")

client = copy / "src/test_helpers/test_client.rs"
source = client.read_text()
SERVER = """    tokio::spawn(async move {
        serve(listener, Shared::new(svc))
            .await
            .expect("server error")
    });
"""
assert source.count(SERVER) == 1, "axum starts its server in another way"
client.write_text(source.replace(SERVER, """    use tower::{Layer as _, ServiceExt as _};

    let form = std::env::var("FORM").expect("a form");
    let graceful = tower_graceful::Graceful::new();
    let layered = graceful.layer().layer(svc.clone());
    let layered = layered.map_response(|it: http::Response<_>| it.map(axum_core::body::Body::new));
    tokio::spawn(async move {
        match &*form {
            "Plain" => serve(listener, Shared::new(svc)).await.expect("server error"),
            "Layer" => serve(listener, Shared::new(layered)).await.expect("server error"),
            "Listener" => axum_of_the_crate::serve(graceful.listener(listener), Shared::new(layered))
                .await
                .expect("server error"),
            "Serve" => drop(graceful.serve(listener, Shared::new(layered)).await),
            other => panic!("no such form: {other}"),
        }
    });
"""))

environment = {**os.environ, "CARGO_TARGET_DIR": str(folder / "build"), "CARGO_PROFILE_DEV_DEBUG": "0"}
built = subprocess.run(
    ["cargo", "test", "--quiet", "--lib", "--features", "http2,macros,multipart,ws", "--no-run",
     "--message-format=json"],
    cwd=copy, env=environment, check=True, stdout=subprocess.PIPE, text=True)
messages = [json.loads(line) for line in built.stdout.splitlines()]
program = next(it["executable"] for it in messages if it.get("executable"))

ends = {}
for form in FORMS:
    ran = subprocess.run([program], cwd=copy, env={**environment, "FORM": form}, text=True, timeout=600,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    ends[form] = dict(re.findall(r"^test (\S+).*? \.\.\. (ok|FAILED|ignored)$", ran.stdout, re.M))
    passed = sum(end == "ok" for end in ends[form].values())
    print(f"axum_tests: {form}: {passed} of {len(ends[form])} tests pass")
    differences = [f"{name}: {ends[form].get(name)}" for name, end in ends["Plain"].items()
                   if ends[form].get(name) != end]
    if differences:
        print(ran.stdout[-20_000:])
        sys.exit(f"axum_tests: {form}: {differences}")
# Tests that fail in each form would say nothing. At the end, the forms have the same results as plain axum.
assert passed > 300, passed
