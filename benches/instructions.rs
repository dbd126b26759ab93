//! So many requests in one way, for a tool that counts instructions. `.ci/instructions` runs it
//! under callgrind and compares.
//!
//! `instructions STYLE MODE REQUESTS`. A style is how the service is driven: `again`, one service
//! called again and again; `clone`, a clone of it for each request; `router`, through an axum
//! router, of which hyper clones one for each request too. A mode is what is around the handler:
//! `none`, `tower-http`, `graceful`, or `limited`, which is `graceful` with a limit.

use std::hint::black_box;

use axum::{Router, body::Body, routing::get};
use bytes::Bytes;
use http_body_util::Full;
use tower::{Layer, layer::util::Identity};
use tower_graceful::Graceful;
use tower_http::metrics::InFlightRequestsLayer;

use self::peers::{Handler, Peer, request, request_of_a_clone};

mod peers;

const STYLES: [&str; 3] = ["again", "clone", "router"];
const MODES: [&str; 4] = ["none", "tower-http", "graceful", "limited"];

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    if let [style, mode, requests] = &*args {
        run(style, mode, requests.parse().expect("a number of requests"));
        return;
    }
    // Of `cargo bench` and `cargo test`: it runs, and that is all they can know.
    for style in STYLES {
        for mode in MODES {
            run(style, mode, 10);
        }
    }
    println!("instructions: every style and mode runs; .ci/instructions counts them");
}

fn run(style: &str, mode: &str, requests: u32) {
    let app = Router::new().route("/", get(|| async { "hello" }));
    match mode {
        // A layer that does nothing, because axum's router boxes whatever is in one.
        "none" => {
            let app = app.layer(Identity::new());
            drive(style, Handler, &app, requests);
        }
        "tower-http" => {
            let (layer, _counter) = InFlightRequestsLayer::pair();
            drive(style, layer.layer(Handler), &app.layer(layer), requests);
        }
        "graceful" => {
            let layer = Graceful::new().layer();
            drive(style, layer.layer(Handler), &app.layer(layer), requests);
        }
        "limited" => {
            let limited = Graceful::builder().max_in_flight(1_000).build();
            let layer = limited.expect("a plan that fits").layer();
            drive(style, layer.layer(Handler), &app.layer(layer), requests);
        }
        other => panic!("no such mode: {other}"),
    }
}

fn drive(style: &str, peer: impl Peer, app: &Router, requests: u32) {
    let mut peer = black_box(peer);
    match style {
        "again" => (0..requests).for_each(|_| request::<_, Full<Bytes>, _>(&mut peer)),
        "clone" => (0..requests).for_each(|_| request_of_a_clone(&peer)),
        "router" => (0..requests).for_each(|_| request::<_, Body, _>(&mut app.clone())),
        other => panic!("no such style: {other}"),
    }
}
