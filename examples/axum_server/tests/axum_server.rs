//! Runs the example `axum_server` as a separate process, with real signals, sockets and TLS. The module
//! [`guide`] runs the programs that the guide prints.

#![cfg(unix)]

use std::{
    env, fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, ChildStdout, Command, Stdio},
    sync::{
        Arc, Once,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, ClientConnection, RootCertStore, StreamOwned,
        pki_types::{CertificateDer, ServerName},
    },
};

mod guide;

/// The timeout of each step, much longer than any step takes.
const BOUND: Duration = Duration::from_secs(30);

/// The path of the example, in the folder above the test program. Cargo builds it together with the tests,
/// unless only some targets are selected.
fn example() -> PathBuf {
    static BUILT: Once = Once::new();
    let tests = env::current_exe().unwrap();
    let profile = tests.ancestors().nth(2).unwrap();
    let example = profile.join("examples/axum_server");
    BUILT.call_once(|| {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--example", "axum_server"]);
        if profile.ends_with("release") {
            build.arg("--release");
        }
        assert!(example.exists() || build.status().unwrap().success());
    });
    example
}

/// The settings of a client that trusts `certificate`.
fn client_config(certificate: CertificateDer<'static>, protocol: &str) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    let mut config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.into()];
    Arc::new(config)
}

trait Stream: Read + Write + Send {
    fn tcp(&self) -> &TcpStream;
}

impl Stream for TcpStream {
    fn tcp(&self) -> &TcpStream {
        self
    }
}

impl Stream for StreamOwned<ClientConnection, TcpStream> {
    fn tcp(&self) -> &TcpStream {
        &self.sock
    }
}

struct Service {
    child: Child,
    output: BufReader<ChildStdout>,
    address: SocketAddr,
    certificate: Option<CertificateDer<'static>>,
}

impl Service {
    fn start(tls: bool) -> Self {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let mut command = Command::new(example());
        command.arg("127.0.0.1:0").stdout(Stdio::piped());
        let number = STARTED.fetch_add(1, Relaxed);
        let folder = format!("axum-server-{}-{number}", std::process::id());
        let folder = env::temp_dir().join(folder);
        let certificate = tls.then(|| {
            let CertifiedKey { cert, signing_key } =
                generate_simple_self_signed(["localhost".into()]).unwrap();
            fs::create_dir(&folder).unwrap();
            let files = [folder.join("cert.pem"), folder.join("key.pem")];
            fs::write(&files[0], cert.pem()).unwrap();
            fs::write(&files[1], signing_key.serialize_pem()).unwrap();
            command.args(files);
            cert.der().clone()
        });
        let mut child = command.spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let _ = fs::remove_dir_all(folder);
        let address = line.trim().strip_prefix("listening on ").unwrap();
        Self {
            address: address.parse().unwrap(),
            child,
            output,
            certificate,
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().try_into().unwrap());
        kill(pid, signal).unwrap();
    }

    fn client_config(&self, protocol: &str) -> Arc<ClientConfig> {
        client_config(self.certificate.clone().unwrap(), protocol)
    }

    /// Opens a connection, and completes the handshake if the server has TLS.
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let mut tcp = TcpStream::connect_timeout(&self.address, BOUND)?;
        tcp.set_read_timeout(Some(BOUND))?;
        if self.certificate.is_none() {
            return Ok(Box::new(tcp));
        }
        let name = ServerName::try_from("localhost").unwrap();
        let config = self.client_config("http/1.1");
        let mut tls = ClientConnection::new(config, name).unwrap();
        while tls.is_handshaking() {
            tls.complete_io(&mut tcp)?;
        }
        Ok(Box::new(StreamOwned::new(tls, tcp)))
    }

    /// Sends a request on a new connection, and reads until the server closes it.
    fn get(&self, path: &str) -> io::Result<String> {
        let mut stream = self.connect()?;
        ask(&mut *stream, path, "connection: close\r\n")?;
        rest(&mut *stream)
    }

    /// Waits until the status of the service contains `text`.
    fn await_status(&self, text: &str) {
        let begun = Instant::now();
        loop {
            let status = self.get("/status").unwrap();
            if status.contains(text) {
                return;
            }
            assert!(begun.elapsed() < BOUND, "{status}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the process has ended. Returns the exit code and the report.
    fn end(mut self) -> (Option<i32>, String) {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(begun.elapsed() < BOUND, "it does not end");
            thread::sleep(Duration::from_millis(2));
        };
        let mut report = String::new();
        self.output.read_to_string(&mut report).unwrap();
        (status.code(), report)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ask(stream: &mut dyn Stream, path: &str, headers: &str) -> io::Result<()> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n");
    stream.write_all(request.as_bytes())
}

fn rest(stream: &mut dyn Stream) -> io::Result<String> {
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

#[track_caller]
fn assert_status(response: &str, status: u16) {
    let line = format!("HTTP/1.1 {status} ");
    assert!(response.starts_with(&line), "{response}");
}

fn a_request_completes_and_late_ones_are_refused(tls: bool) {
    let service = Service::start(tls);
    assert_status(&service.get("/readyz").unwrap(), 200);
    // This connection is idle when the stop begins.
    let mut idle = service.connect().unwrap();
    let mut slow = service.connect().unwrap();
    ask(&mut *slow, "/slow/4", "").unwrap();
    service.await_status("in_flight: 1");

    service.signal(Signal::SIGTERM);
    service.await_status("phase: LameDuck");
    assert_status(&service.get("/readyz").unwrap(), 503);
    assert_status(&service.get("/livez").unwrap(), 200);
    ask(&mut *idle, "/", "").unwrap();
    let response = rest(&mut *idle).unwrap();
    assert_status(&response, 200);
    assert!(response.contains("connection: close\r\n"), "{response}");

    service.await_status("phase: Draining");
    let refused = service.get("/").unwrap();
    assert_status(&refused, 503);
    assert!(refused.contains("retry-after: "), "{refused}");
    assert_status(&service.get("/readyz").unwrap(), 503);

    let response = rest(&mut *slow).unwrap();
    assert_status(&response, 200);
    assert!(response.contains("connection: close\r\n"), "{response}");
    assert!(response.ends_with("\r\n\r\nfinished\n"), "{response}");
    let (code, report) = service.end();
    assert_eq!(code, Some(0), "{report}");
    assert!(report.starts_with("shutdown by SIGTERM: clean"), "{report}");
    let requests = "1 in flight when it began, 1 more, 2 finished, 1 refused";
    assert!(report.contains(requests), "{report}");
    assert!(!report.contains("warning"), "{report}");
}

#[test]
fn a_request_completes_and_late_ones_are_refused_over_http() {
    a_request_completes_and_late_ones_are_refused(false);
}

#[test]
fn a_request_completes_and_late_ones_are_refused_over_tls() {
    a_request_completes_and_late_ones_are_refused(true);
}

fn connections_are_counted_and_cut(tls: bool) {
    let service = Service::start(tls);
    let mut stuck = service.connect().unwrap();
    ask(&mut *stuck, "/slow/600", "").unwrap();
    let mut half = service.connect().unwrap();
    half.write_all(b"GET / HTTP/1.1\r\nhost: loc").unwrap();
    // With TLS, a handshake that never ends.
    let silent = TcpStream::connect(service.address).unwrap();
    // The count includes the connection that asks.
    service.await_status("in_flight: 1, connections: 4");

    service.signal(Signal::SIGINT);
    service.await_status("phase: Draining");
    let response = rest(&mut *stuck);
    assert!(
        response.as_ref().map_or(true, String::is_empty),
        "{response:?}"
    );
    let (code, report) = service.end();
    assert_eq!(code, Some(1), "{report}");
    assert!(report.starts_with("shutdown by SIGINT: forced"), "{report}");
    assert!(report.contains("given up: 1 request, "), "{report}");
    // The other two connections may have closed before the deadline.
    let peer = stuck.tcp().local_addr().unwrap();
    let cut = format!("connection from {peer} ");
    assert!(report.contains(&cut), "{cut}: {report}");
    drop((half, silent));
}

#[test]
fn connections_are_counted_and_cut_over_http() {
    connections_are_counted_and_cut(false);
}

#[test]
fn connections_are_counted_and_cut_over_tls() {
    connections_are_counted_and_cut(true);
}

fn idle_and_silent_connections_do_not_delay_the_stop(tls: bool) {
    let service = Service::start(tls);
    let idle: Vec<_> = (0..8).map(|_| service.connect().unwrap()).collect();
    let silent = TcpStream::connect(service.address).unwrap();
    service.await_status("in_flight: 0, connections: 10");
    service.signal(Signal::SIGINT);
    let (code, report) = service.end();
    assert_eq!(code, Some(0), "{report}");
    assert!(report.starts_with("shutdown by SIGINT: clean"), "{report}");
    drop((idle, silent));
}

#[test]
fn idle_and_silent_connections_do_not_delay_the_stop_over_http() {
    idle_and_silent_connections_do_not_delay_the_stop(false);
}

#[test]
fn idle_and_silent_connections_do_not_delay_the_stop_over_tls() {
    idle_and_silent_connections_do_not_delay_the_stop(true);
}

#[test]
fn a_client_of_http_2_is_asked_to_leave_before_the_drain_ends() {
    let service = Service::start(true);
    let mut slow = service.connect().unwrap();
    ask(&mut *slow, "/slow/4", "").unwrap();
    service.await_status("in_flight: 1");
    let slow = thread::spawn(move || rest(&mut *slow));

    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let tcp = tokio::net::TcpStream::connect(service.address)
            .await
            .unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let tls = TlsConnector::from(service.client_config("h2"));
        let tls = tls.connect(name, tcp).await.unwrap();
        let (mut client, connection) = h2::client::handshake(tls).await.unwrap();
        let connection = tokio::spawn(connection);
        let mut get = async || {
            let request = http::Request::get("https://localhost/").body(()).unwrap();
            client = client.clone().ready().await.unwrap();
            let (response, _) = client.send_request(request, true).unwrap();
            let (head, mut body) = response.await.unwrap().into_parts();
            while body.data().await.is_some() {}
            assert_eq!(head.status, 200);
            assert!(!head.headers.contains_key("connection"));
        };
        get().await;
        service.signal(Signal::SIGTERM);
        service.await_status("phase: LameDuck");
        assert!(!connection.is_finished());
        get().await;
        let ended = tokio::time::timeout(BOUND, connection).await;
        ended.expect("no GOAWAY").unwrap().unwrap();
    });
    assert!(
        !slow.is_finished(),
        "the connection is closed by the end of the drain"
    );
    let response = slow.join().unwrap().unwrap();
    assert!(response.ends_with("finished\n"), "{response}");
    let (code, report) = service.end();
    assert_eq!(code, Some(0), "{report}");
}
