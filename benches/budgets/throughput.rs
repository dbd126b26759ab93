//! Requests per second, and the CPU time of the server for a request: plain axum, axum with one
//! addition, and `Graceful::serve`. Each server is a process with one thread. In each round every form has
//! its turn, in a process of its own.

use std::time::Duration;

use tokio::runtime;

use super::{
    child::{Form, Server},
    figures::{Figures, pairs},
    load::{Load, Version},
    rows::{Budget, Rows},
    tls::Identity,
};

/// A form, the form it is compared with, and the budget of the ratio.
type Row = (Form, Form, Budget);

const ROWS: [Row; 12] = [
    (Form::Wrapped, Form::Plain, Budget::None),
    (Form::Counted, Form::Plain, Budget::None),
    (Form::Layer, Form::Plain, Budget::None),
    (Form::Tracked, Form::Plain, Budget::AtLeast(0.98)),
    (Form::Listener, Form::Plain, Budget::None),
    (Form::Listener, Form::Wrapped, Budget::AtLeast(0.95)),
    (Form::Listener, Form::Counted, Budget::AtLeast(0.95)),
    (Form::Serve, Form::Plain, Budget::None),
    (Form::Serve, Form::Counted, Budget::None),
    (Form::Serve, Form::Listener, Budget::AtLeast(0.98)),
    (Form::AxumServer, Form::Plain, Budget::None),
    (Form::Serve, Form::AxumServer, Budget::None),
];

const FORMS: [Form; 8] = [
    Form::Plain,
    Form::Wrapped,
    Form::Counted,
    Form::Layer,
    Form::Tracked,
    Form::Listener,
    Form::Serve,
    Form::AxumServer,
];

const TLS_ROWS: [Row; 4] = [
    (Form::TlsListener, Form::TlsPlain, Budget::None),
    (Form::TlsServe, Form::TlsPlain, Budget::None),
    (Form::TlsAxumServer, Form::TlsPlain, Budget::None),
    (Form::TlsServe, Form::TlsAxumServer, Budget::None),
];

const TLS_FORMS: [Form; 4] = [
    Form::TlsPlain,
    Form::TlsListener,
    Form::TlsServe,
    Form::TlsAxumServer,
];
const ROUNDS: usize = 21;
const SLOT: Duration = Duration::from_millis(250);
const WARM_UP: Duration = Duration::from_millis(50);

/// The figures of a form, one of each round.
struct Measured {
    form: Form,
    /// Requests per second.
    requests: Vec<f64>,
    /// Microseconds of CPU time for a request.
    cpu: Vec<f64>,
}

impl Measured {
    fn new(form: Form) -> Self {
        Self {
            form,
            requests: Vec::new(),
            cpu: Vec::new(),
        }
    }

    /// Starts a server of its own, because the system places the code and the memory of each process
    /// elsewhere, which changes its figures by some two percent.
    async fn round(&mut self, version: Version) {
        let (server, mut load);
        if self.form.is_tls() {
            let identity = Identity::new();
            server = Server::start_tls(self.form, &identity);
            load = Load::connect_tls(server.address, version, &identity).await;
        } else {
            server = Server::start(self.form, 0);
            load = Load::connect(server.address, version).await;
        }
        load.run(WARM_UP).await;
        let before = server.cpu_time();
        let requests = load.run(SLOT).await;
        let cpu = server.cpu_time() - before;
        self.requests.push(requests);
        self.cpu.push(cpu / 1e3 / (requests * SLOT.as_secs_f64()));
    }
}

pub(crate) fn measure(rows: &mut Rows) {
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    runtime.block_on(async {
        for (forms, listed) in [(&FORMS[..], &ROWS[..]), (&TLS_FORMS, &TLS_ROWS)] {
            measure_version(rows, "h1", Version::Http1, forms, listed).await;
            measure_version(rows, "h2", Version::Http2, forms, listed).await;
        }
    });
}

async fn measure_version(
    rows: &mut Rows,
    name: &str,
    version: Version,
    forms: &[Form],
    listed: &[Row],
) {
    let mut all: Vec<_> = forms.iter().copied().map(Measured::new).collect();
    for round in 0..ROUNDS {
        for index in 0..all.len() {
            let next = (round + index) % all.len();
            all[next].round(version).await;
        }
    }
    let of = |form| &all[forms.iter().position(|it| *it == form).expect("measured")];
    for &(form, peer_form, budget) in listed {
        let [ours, peer] = [form, peer_form].map(of);
        let row = |what: &str| {
            let over = match peer_form {
                Form::Plain | Form::TlsPlain => String::new(),
                peer => format!(", over {}", peer.name()),
            };
            format!("{what} {name}, {}{over}", form.name())
        };
        let per_second = |figures: &[f64]| {
            let median = Figures::new(figures.to_vec()).median();
            format!("{median:.0}/s")
        };
        let ratio = pairs(&ours.requests, &peer.requests, |ours, peer| ours / peer);
        rows.add(
            &row("throughput"),
            &per_second(&ours.requests),
            &per_second(&peer.requests),
            ratio.median(),
            // Without plain axum the budget is for CPU time alone: two servers that cost nearly the same
            // differ in requests per second by chance.
            match peer_form {
                Form::Plain => budget,
                _ => Budget::None,
            },
        );
        let each = |figures: &[f64]| {
            let median = Figures::new(figures.to_vec()).median();
            format!("{median:.2} µs")
        };
        // Inverted, so that more is better, as above.
        let ratio = pairs(&ours.cpu, &peer.cpu, |ours, peer| peer / ours);
        rows.add(
            &row("throughput by CPU time"),
            &each(&ours.cpu),
            &each(&peer.cpu),
            ratio.median(),
            budget,
        );
    }
}
