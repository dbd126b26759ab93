//! Requests for each second, and what a request costs the server: axum alone, axum with one thing
//! more, and our own server, each a process with one thread, in rounds of all of them in turn.

use std::time::Duration;

use tokio::runtime;

use super::{
    child::{Form, Server},
    figures::{Figures, pairs},
    load::{Load, Version},
    rows::{Budget, Rows},
};

/// Plain axum first, which the others are compared with.
const FORMS: [Form; 5] = [
    Form::Plain,
    Form::Counted,
    Form::Layer,
    Form::Listener,
    Form::Serve,
];
const ROUNDS: usize = 21;
const TURN: Duration = Duration::from_millis(250);

/// A server, its clients, and what they have found.
struct Measured {
    server: Server,
    load: Load,
    /// For each second.
    requests: Vec<f64>,
    /// Microseconds for each request.
    cpu: Vec<f64>,
}

impl Measured {
    async fn new(form: Form, version: Version) -> Self {
        let server = Server::start(form, 0);
        Self {
            load: Load::connect(server.address, version).await,
            server,
            requests: Vec::new(),
            cpu: Vec::new(),
        }
    }

    async fn round(&mut self) {
        let before = self.server.cpu_time();
        let requests = self.load.run(TURN).await;
        let cpu = self.server.cpu_time() - before;
        self.requests.push(requests);
        self.cpu.push(cpu / 1e3 / (requests * TURN.as_secs_f64()));
    }
}

pub(crate) fn measure(rows: &mut Rows) {
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    runtime.block_on(async {
        measure_version(rows, "h1", Version::Http1).await;
        measure_version(rows, "h2", Version::Http2).await;
    });
}

async fn measure_version(rows: &mut Rows, name: &str, version: Version) {
    let mut all = Vec::new();
    for form in FORMS {
        all.push(Measured::new(form, version).await);
    }
    for measured in &mut all {
        measured.round().await;
        measured.requests.clear();
        measured.cpu.clear();
    }
    for round in 0..ROUNDS {
        for turn in 0..all.len() {
            let next = (round + turn) % all.len();
            all[next].round().await;
        }
    }
    let [plain, ours @ ..] = &*all else {
        unreachable!("there are several")
    };
    for (ours, form) in ours.iter().zip(&FORMS[1..]) {
        let budget = match form {
            Form::Listener => Budget::AtLeast(0.98),
            _ => Budget::None,
        };
        let of = |what: &str| format!("{what} {name}, {}", form.name());
        let per_second = |figures: &[f64]| {
            let median = Figures::new(figures.to_vec()).median();
            format!("{median:.0}/s")
        };
        let ratio = pairs(&ours.requests, &plain.requests, |ours, plain| ours / plain);
        rows.add(
            &of("throughput"),
            &per_second(&ours.requests),
            &per_second(&plain.requests),
            ratio.median(),
            budget,
        );
        let each = |figures: &[f64]| {
            let median = Figures::new(figures.to_vec()).median();
            format!("{median:.2} µs")
        };
        // As a share of what it could do with the same time.
        let ratio = pairs(&ours.cpu, &plain.cpu, |ours, plain| plain / ours);
        rows.add(
            &of("throughput by CPU time"),
            &each(&ours.cpu),
            &each(&plain.cpu),
            ratio.median(),
            budget,
        );
    }
}
