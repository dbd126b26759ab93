//! The tests of `docs/testing.md`, as they are printed there.

// Printed from here
use axum::{Router, body::Body, routing::get};
use http::{Request, StatusCode};
use std::time::Duration;
use tower::ServiceExt;
use tower_graceful::{Graceful, Outcome, Phase};

async fn slow() -> &'static str {
    tokio::time::sleep(Duration::from_secs(10)).await;
    "done"
}

fn app(graceful: &Graceful) -> Router {
    let app = Router::new()
        .route("/slow", get(slow))
        .layer(graceful.layer());
    graceful.probes().merge(app)
}

fn request(path: &str) -> Request<Body> {
    Request::get(path).body(Body::empty()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_slow_request_completes_and_a_late_one_is_refused() {
    let graceful = Graceful::new();
    let app = app(&graceful);
    // A server that ends when the drain says so, in place of a real one.
    let server = tokio::spawn(graceful.run(graceful.drain_on(std::future::pending())));

    let in_flight = tokio::spawn(app.clone().oneshot(request("/slow")));
    // The paused clock advances when every task waits.
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(graceful.in_flight(), 1, "no request reached the layer");
    graceful.shutdown();
    let ready = app.clone().oneshot(request("/readyz")).await.unwrap();
    assert_eq!(ready.status(), StatusCode::SERVICE_UNAVAILABLE);

    graceful.draining().await; // five seconds later
    let late = app.clone().oneshot(request("/slow")).await.unwrap();
    assert_eq!(late.status(), StatusCode::SERVICE_UNAVAILABLE);

    let response = in_flight.await.unwrap().unwrap(); // another five seconds later
    assert_eq!(response.status(), StatusCode::OK);
    drop(response); // its body ends here

    let report = server.await.unwrap();
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.requests().finished + report.requests().dropped, 1);
    assert_eq!(report.requests().refused, 1);
    assert!(report.time_in(Phase::Draining) > Duration::from_secs(4));
}

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

async fn soon() -> &'static str {
    tokio::time::sleep(Duration::from_millis(200)).await;
    "done"
}

#[tokio::test]
async fn a_response_arrives_whole_over_a_socket() {
    let graceful = Graceful::builder().drain_delay(Duration::ZERO);
    let graceful = graceful.build().unwrap();
    let app = Router::new().route("/", get(soon)).layer(graceful.layer());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let server = tokio::spawn(graceful.serve(listener, app).into_future());

    let request = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n";
    client.write_all(request).await.unwrap();
    let arrived = async {
        while graceful.in_flight() == 0 {
            tokio::task::yield_now().await;
        }
    };
    let arrived = tokio::time::timeout(Duration::from_secs(5), arrived).await;
    arrived.expect("no request reached the layer");
    graceful.shutdown();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("done"));
    assert_eq!(server.await.unwrap().outcome(), Outcome::Clean);
}

// to here.

use std::{fs, path::Path};

/// The page prints the program of this file, in two parts.
#[test]
fn the_page_prints_this_test() {
    let (page, file) = (include_str!("../docs/testing.md"), include_str!("guide.rs"));
    let printed = page.split("```rust,ignore\n").skip(1);
    let printed: Vec<_> = printed.map(|it| it.split("```").next().unwrap()).collect();
    assert_eq!(printed.len(), 2);
    let printed = printed.join("\n");
    let printed = format!("// Printed from here\n{printed}\n// to here.\n");
    assert!(file.contains(&printed), "{printed}");
}

/// The worker of a queue from the line after `stop.idle()` to its last loop, without comments and
/// indentation.
fn queue_worker(text: &str) -> String {
    let lines = text.lines().map(|it| it.trim().trim_start_matches("///"));
    let code = lines.map(|it| it.split("//").next().unwrap().trim());
    let code: Vec<_> = code.collect();
    let code = code.join("\n");
    let (_, worker) = code.split_once("let mut idle = stop.idle();\n").unwrap();
    let last_loop = worker.find("while let Some(job) = ").unwrap();
    let end = last_loop + worker[last_loop..].find("\n}").unwrap();
    worker[..end].to_owned()
}

/// The worker that `tests/blackbox/work.rs` stops under load is the one that the pages print.
#[test]
fn the_pages_print_the_queue_worker_of_the_tests() {
    let tested = queue_worker(include_str!("blackbox/server.rs"));
    let pages = [
        include_str!("../README.md"),
        include_str!("../docs/workers.md"),
        include_str!("../src/handle/work.rs"),
    ];
    for page in pages {
        assert_eq!(queue_worker(page), tested);
    }
}

/// The black-box tests run the loop that the page prints.
#[test]
fn the_loop_of_the_page_is_tested() {
    let (page, tested) = (
        include_str!("../docs/other_servers.md"),
        include_str!("blackbox/server.rs"),
    );
    let printed = page
        .split_once("    let connections = GracefulShutdown::new();\n")
        .and_then(|(_, printed)| printed.split_once("\n}\n"));
    let (printed, _) = printed.expect("the page prints the loop");
    assert!(printed.contains("graceful.track(stream)"), "{printed}");
    let printed = format!("    let connections = GracefulShutdown::new();\n{printed}\n}}\n");
    assert!(tested.contains(&printed), "{printed}");
}

/// A page with another block of this kind needs a test, as this page, `examples/axum_server/tests/guide` and
/// `examples/grpc/tests/guide` have.
#[test]
fn all_other_programs_are_doc_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_dir(root.join("docs")).unwrap();
    let pages = docs.map(|it| it.unwrap().path());
    let mut marked = Vec::new();
    for page in pages.chain([root.join("README.md")]) {
        let text = fs::read_to_string(&page).unwrap();
        let fences = text.lines().filter(|it| it.trim_start().starts_with("```"));
        let count = fences.filter(|it| it.contains("ignore")).count();
        if count > 0 {
            let name = page.file_name().unwrap().to_str().unwrap();
            marked.push((name.to_owned(), count));
        }
    }
    marked.sort();
    let tested = [("migration", 2), ("streams", 1), ("testing", 2), ("tls", 1)];
    let tested = tested.map(|(page, count)| (format!("{page}.md"), count));
    assert_eq!(marked, tested);
}
